"""What every test may count on: no hub, drawings on no screen, and the same examples in every CI run."""

from __future__ import annotations

import os

# Before anything imports a model library, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")
# The tests' layers are too small to share among threads, and on a busy machine the threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import distributed as dist

from cocktailsdk.exporting.formats import FORMATS
from cocktailsdk.graph.rules import RULES
from cocktailsdk.patterns import registry
from cocktailsdk.presets import PRESETS

# Tests send Ctrl-C, which a shell's background jobs ignore, and with them the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with real data sets (``cifar10/``, ``resnet_cifar10/`` …), named by the variable COCKTAIL_DATA."""
    folder = os.environ.get("COCKTAIL_DATA")
    if not folder:
        pytest.skip("COCKTAIL_DATA does not name a folder of data sets")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"COCKTAIL_DATA={folder} is no folder")
    return path


# Files run in any order, on several workers: random numbers do not depend on what ran before, and nothing is left.


@pytest.fixture(autouse=True, scope="module")
def seeded_module() -> None:
    """Fixtures of a file draw the same numbers whatever ran before it."""
    _seed()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """So does every test."""
    _seed()


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A file leaves the process as it found it, or is told by name."""
    before = _process()
    yield
    after = _process()
    left = {what: (before[what], after[what]) for what in before if before[what] != after[what]}
    assert not left, f"{request.node.name} leaves behind (before, after): {left}"


OURS = ("COCKTAIL", "HF_", "OMP_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
"""Variables that tests set; libraries add others when they are imported."""


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def _process() -> dict[str, Any]:
    """What tests may change for all that come after them."""
    return {
        "rules": sorted(RULES),
        "patterns": sorted(registry._REGISTERED),
        "formats": sorted(FORMATS),
        "presets": sorted(PRESETS),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processes": dist.is_initialized(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "folder": Path.cwd(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(OURS)},
    }
