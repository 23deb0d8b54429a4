"""The committed versions are exact, ordinary, and cover everything that the project asks for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[f"ci_{name}"] = importlib.util.module_from_spec(spec)  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


PINS = script("pins")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_dependency_and_extra_is_pinned_on_every_supported_python() -> None:
    assert PINS.check(CONSTRAINTS, PYPROJECT) == []


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("torch==2.14.1", "torch>=2.14", "is no exact version; write torch==VERSION"),
        ("torch==2.14.1", "torch==2.14.*", "is no exact version"),
        ("torch==2.14.1", "torch==2.14.1+cpu", "is a local version, which PyPI does not have"),
        ("torch==2.14.1", "torch==2.15.0", "is above 2.14.1, which not every machine offers"),
        ("torch==2.14.1", "torch==2.10.0", "is not >=2.11, as pyproject.toml asks"),
        ("peft==", "no-such-peft==", "peft has 0 pins for Python 3.12.1 on linux"),
        ("torch==2.14.1", "torch==2.14.1 ; python_version < '3.13'", "torch has 0 pins for Python 3.13.0 on darwin"),
        ("torch==2.14.1", "torch==2.14.1\ntorch==2.13.0", "torch has 2 pins for Python 3.11.7"),
    ],
)
def test_what_is_wrong_with_a_pin_is_told(before: str, after: str, says: str) -> None:
    faults = PINS.check(CONSTRAINTS.replace(f"\n{before}", f"\n{after}"), PYPROJECT)
    assert any(says in fault for fault in faults), faults
