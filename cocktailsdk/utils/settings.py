"""Global state that running someone's code can change: random generators, and PyTorch's modes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["computing_threads", "forked", "settings_restored"]


@contextmanager
def forked() -> Iterator[None]:
    """Put the global generators of torch, numpy and ``random`` back as they were, whatever happens inside."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy, python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy)
        random.setstate(python)


_MODES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    (lambda: torch.is_autocast_enabled("cuda"), lambda on: torch.set_autocast_enabled("cuda", on)),
    (lambda: torch.backends.cudnn.benchmark, lambda on: setattr(torch.backends.cudnn, "benchmark", on)),
    (lambda: torch.backends.cudnn.deterministic, lambda on: setattr(torch.backends.cudnn, "deterministic", on)),
)
"""What is read, and how it is set. ``torch.set_num_threads`` has a cost, so only what changed is set."""


@contextmanager
def settings_restored() -> Iterator[None]:
    """:func:`forked`, and the same for PyTorch's global modes."""
    before = [read() for read, _ in _MODES]
    with forked():
        try:
            yield
        finally:
            for (read, write), value in zip(_MODES, before, strict=True):
                if read() != value:
                    write(value)


@contextmanager
def computing_threads(wanted: int | None) -> Iterator[None]:
    """Compute with so many threads for a while; with as many as before if ``None``."""
    before = torch.get_num_threads()
    try:
        if wanted is not None:
            torch.set_num_threads(wanted)
        yield
    finally:
        torch.set_num_threads(before)
