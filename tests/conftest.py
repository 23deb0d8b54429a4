"""What every test may count on: no hub, drawings on no screen, and the same examples in every CI run."""

from __future__ import annotations

import os

# Before anything imports a model library, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")
# The tests' layers are too small to share among threads, and on a busy machine the threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

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
