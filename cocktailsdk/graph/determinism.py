"""Random numbers that are the same in every run, whatever their shapes: for comparing models in training mode."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ConstantRandom", "seeded_rng"]

_CONSTANTS = {
    "bernoulli": 1.0,
    "exponential": 1.0,
    "normal": 0.0,
    "rand": 0.5,
    "rand_like": 0.5,
    "randn": 0.0,
    "randn_like": 0.0,
    "uniform": 0.5,
}
"""What is drawn, by the op."""


class ConstantRandom(TorchDispatchMode):
    """Puts a constant in the place of each random number: a slim model draws fewer of them than the masked one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        # Returns (output, mask); keeping everything is the one choice that needs no scaling by 1 / (1 - p).
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **(kwargs or {}))
        constant = _CONSTANTS.get(name)
        if constant is not None and isinstance(out, Tensor):
            out.fill_(constant)
        return out


@contextmanager
def seeded_rng() -> Iterator[None]:
    """The same seeds inside each time, and outside the state that generators had."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    # fork_rng saves the state of every GPU, and would initialise CUDA to do so.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
