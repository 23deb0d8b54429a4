"""Old names work for one version, and the warning says what to write."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cocktailsdk
from cocktailsdk.moved import MODULES, moved_names

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cocktailsdk.__file__).parent.parent)}


@pytest.fixture(autouse=True)
def _not_imported_yet(monkeypatch):
    for old in MODULES:
        monkeypatch.delitem(sys.modules, old, raising=False)
        parent, _, last = old.rpartition(".")
        monkeypatch.delattr(importlib.import_module(parent), last, raising=False)


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_an_old_module_is_the_new_one_and_warns_where_it_is_imported(old, new):
    with pytest.warns(DeprecationWarning, match=f"^{old} is {new} now") as warned:
        exec(compile(f"import {old}", "user.py", "exec"), {})
    assert [w.filename for w in warned] == ["user.py"]
    assert sys.modules[old] is importlib.import_module(new)
    parent, _, last = old.rpartition(".")
    assert getattr(sys.modules[parent], last) is sys.modules[old]
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        importlib.import_module(old)


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_can_be_imported_from_the_package(old):
    with pytest.warns(DeprecationWarning, match=f"^{old} is "):
        exec("from {} import {}".format(*old.rsplit(".", 1)), {})


def test_names_of_an_old_module_are_the_same_objects():
    from cocktailsdk.models import Adapter
    from cocktailsdk.net.costs import SubnetReport

    with pytest.warns(DeprecationWarning, match="is cocktailsdk.models now"):
        from cocktailsdk.adapters import Adapter as OldAdapter
    with pytest.warns(DeprecationWarning, match="is cocktailsdk.net.costs now"):
        from cocktailsdk.counts import SubnetReport as OldReport
    assert OldAdapter is Adapter
    assert OldReport is SubnetReport is cocktailsdk.SubnetReport


@pytest.mark.parametrize(
    ("module", "name", "new"),
    [
        ("cocktailsdk.bundle", "from_pretrained", "cocktailsdk.from_pretrained"),
        ("cocktailsdk.bundle", "save_pretrained", "cocktailsdk.bundle.save_bundle"),
        ("cocktailsdk.net", "CocktailNet", "cocktailsdk.CocktailNet"),
        ("cocktailsdk.net", "sparsify", "cocktailsdk.sparsify"),
    ],
)
def test_an_old_name_is_the_new_object_and_warns_where_it_is_imported(module, name, new):
    found: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=f"^{module}.{name} is {new} now") as warned:
        exec(compile(f"from {module} import {name}", "user.py", "exec"), found)
    assert {w.filename for w in warned} == {"user.py"}
    parent, _, last = new.rpartition(".")
    assert found[name] is getattr(importlib.import_module(parent), last)


def test_names_that_never_were_are_refused_as_ever():
    for module in ("cocktailsdk.net", "cocktailsdk.bundle"):
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nonsense'"):
            _ = importlib.import_module(module).nonsense
        with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
            exec(f"from {module} import nonsense", {})
    with pytest.raises(ModuleNotFoundError, match="No module named 'cocktailsdk.nonsense'"):
        importlib.import_module("cocktailsdk.nonsense")
    missing = pytest.raises(ModuleNotFoundError, match="No module named 'cocktailsdk.devices.nonsense'")
    with pytest.warns(DeprecationWarning, match=r"cocktailsdk\.devices is "), missing:
        importlib.import_module("cocktailsdk.devices.nonsense")


def test_a_module_imported_by_its_old_name_can_be_reloaded():
    with pytest.warns(DeprecationWarning, match="is cocktailsdk.utils.devices now"):
        module = importlib.import_module("cocktailsdk.devices")
    assert (module.__name__, module.__spec__.name) == ("cocktailsdk.utils.devices",) * 2
    before = dict(vars(module))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert importlib.reload(module) is module
    finally:
        vars(module).update(before)  # others have imported its functions
    assert module.__spec__.origin.endswith("devices.py")


def test_threads_that_import_an_old_module_at_once_get_the_same_one():
    together = threading.Barrier(4)

    def old_and_new(i):
        together.wait(30)
        return importlib.import_module(("cocktailsdk.datasets", "cocktailsdk.presets.datasets")[i % 2])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(4) as pool:
            modules = list(pool.map(old_and_new, range(4)))
    assert len(set(modules)) == 1
    assert modules[0].__spec__.name == "cocktailsdk.presets.datasets"


def test_names_of_a_module_below_are_found_late_and_without_a_warning():
    look_up = moved_names("cocktailsdk.bundle", {}, late={"load_bundle": ".read"})
    assert look_up("load_bundle") is importlib.import_module("cocktailsdk.bundle.read").load_bundle


def test_the_old_names_cost_nothing_until_they_are_used():
    heavy = ("importlib.abc", "importlib.util", "importlib.resources", *MODULES, *MODULES.values())
    code = f"import sys; import cocktailsdk; print([m for m in {heavy} if m in sys.modules])"
    # -S: an environment's own start-up files import what they like.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_installing_twice_adds_one_finder():
    from cocktailsdk import moved

    before = list(sys.meta_path)
    moved.install()
    assert sys.meta_path == before
