"""Importing the package costs nothing; its names are found when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cocktailsdk


def test_importing_loads_neither_torch_nor_model_libraries():
    heavy = ("torch", "timm", "torchvision", "transformers", "numpy", "rich")
    code = f"import sys, cocktailsdk; dir(cocktailsdk); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", cocktailsdk.__all__)
def test_every_public_name_is_there(name):
    assert getattr(cocktailsdk, name) is not None
    assert name in dir(cocktailsdk)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cocktailsdk.nonsense


def test_public_errors_have_one_base():
    for name in cocktailsdk.__all__:
        value = getattr(cocktailsdk, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, cocktailsdk.CocktailError)
