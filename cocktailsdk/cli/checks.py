"""What can be seen wrong with a command line before torch is imported and anything is built."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import CocktailError, ExportFailed, SubnetError, TrainingError
from ..utils.nearest import loose, no_subnet, shown
from ..utils.optional import check_installed
from .bundles import bundle_folder
from .options import PRESETS, RECIPES, SCORES

__all__ = [
    "FORMATS",
    "SETTINGS",
    "check_device",
    "check_format",
    "check_preset",
    "check_score",
    "check_subnets",
    "input_file",
    "input_folder",
    "output_file",
    "output_folder",
]

KINDS = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "privateuseone", "meta", "ipu", "xla", "vulkan", "maia")
"""Kinds of devices that PyTorch has names for."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "digits": ("weights", "start", "recipe"),
    "cifar10": ("model", "epochs_scale", "weights", "start", "recipe"),
    "fashion-mnist": ("model", "epochs_scale", "weights", "start", "recipe"),
}
"""What each preset can be given; the others are no options of it."""
MODELS = ("resnet20", "resnet18")
"""Models of the image sets."""
WEIGHTS = (".safetensors", ".pth", ".pt")
"""Suffixes of files that trained weights are read from."""
OTHER_RECIPES = ("ac/dc", "ast", "imp")
"""Recipes that train a net of one pattern or one network, and so none of the presets."""

FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    ".onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    ".xml": (("openvino", "onnx", "onnxscript"), "openvino"),
    ".pt2": ((), ""),
    ".safetensors": ((), ""),
}
"""By suffix what must be installed, and the extra that has it."""


def check_device(device: str | None, option: str = "--device") -> None:
    """See that a device is here.

    Raises:
        CocktailError: It is not; says which are.
    """
    if device is None or device == "cpu":
        return
    kind, _, index = device.partition(":")
    if kind not in KINDS or (":" in device and not index.isdecimal()):
        raise CocktailError(f"{option} {shown(device)} is no device that PyTorch knows; use {option} cpu, cuda or mps")
    from ..utils.devices import available_device

    available_device(device, of=f"{option} ")


def check_preset(
    preset: str,
    *,
    data: Path | None = None,
    model: str | None = None,
    epochs_scale: float | None = None,
    weights: Path | None = None,
    start: str | None = None,
    recipe: str | None = None,
    loads_data: bool = True,
) -> None:
    """See that there is such a preset, that it takes what it is given, and that its data are there.

    Raises:
        TrainingError: Something is wrong; says what.
    """
    _check_choice("preset", preset, PRESETS)
    takes = SETTINGS[preset]
    settings = {"model": model, "epochs_scale": epochs_scale, "weights": weights, "start": start, "recipe": recipe}
    for name, value in settings.items():
        if value is not None and name not in takes:
            others = f"it takes {', '.join(_option(t) for t in takes)}"
            raise TrainingError(f"preset {preset!r} has no option {_option(name)}: {others}")
    if recipe is not None:
        _check_recipe(preset, recipe, trained=weights is not None and start != "scratch")
    if model is not None and model not in MODELS:
        raise TrainingError(f"preset {preset!r} has no model {shown(model)}: it has --model {' or '.join(MODELS)}")
    if epochs_scale is not None and not 0 < epochs_scale < math.inf:
        raise TrainingError(f"--epochs-scale must be greater than 0 and finite, got {epochs_scale}")
    if weights is not None:
        input_file(weights, "--weights")
        if weights.suffix.lower() not in WEIGHTS:
            raise TrainingError(
                f"--weights {weights}: weights are read from {', '.join(WEIGHTS)} files; give one of these"
            )
    if preset == "digits" and data is not None:
        raise TrainingError(f"preset {preset!r} takes no data folder (it comes with scikit-learn): leave out --data")
    if preset == "digits" and loads_data:
        check_installed("sklearn", purpose="preset 'digits'", error=TrainingError)
    if preset != "digits" and data is None and loads_data:
        raise TrainingError(f"preset {preset!r} needs the folder that holds its images (--data PATH)")
    if data is not None:
        input_folder(data, "--data")


def _check_choice(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TrainingError(f"no {what} {shown(name)}{hint}: there are {', '.join(known)}")


def _check_recipe(preset: str, recipe: str, *, trained: bool) -> None:
    if recipe in OTHER_RECIPES:
        raise TrainingError(
            f"recipe {recipe!r} trains one pattern or one network, and preset {preset!r} has three patterns: give "
            f"another --recipe ({', '.join(RECIPES[:3])}, …), or use recipe={recipe!r} in Python"
        )
    _check_choice("recipe", recipe, RECIPES)
    if recipe == "pretrained" and not trained:
        raise TrainingError(
            "--recipe pretrained starts from trained weights: give --weights FILE, without --start scratch"
        )


def check_score(given: Sequence[str]) -> str | dict[str, str] | None:
    """What ``--score`` says, as the trainer takes it: a score for all patterns, or by pattern.

    Raises:
        TrainingError: A score is unknown, or two are given for the same patterns.
    """
    out: dict[str, str] = {}
    for text in given:
        pattern, _, name = text.rpartition("=")
        pattern = pattern or "*"
        _check_choice("score", name, SCORES)
        if pattern in out:
            of = "all patterns" if pattern == "*" else f"pattern {shown(pattern)}"
            raise TrainingError(
                f"--score is given twice for {of}: give one score, and others by pattern, as in --score wanda --score "
                "channel=activation"
            )
        out[pattern] = name
    if not out:
        return None
    return out["*"] if set(out) == {"*"} else out


def check_subnets(bundle: Path, names: Sequence[str]) -> None:
    """See that a bundle has networks of these names, from its ``bundle.json`` alone.

    Raises:
        SubnetError: It has not; says which come nearest.
        BundleError: There is no bundle.
    """
    if not names:
        return
    from ..bundle.files import read_meta

    try:
        known = ["dense", *(str(s["name"]) for s in read_meta(bundle_folder(bundle))[1]["subnets"])]
    except (KeyError, TypeError):  # reading all of it says what is wrong
        return
    known = list(dict.fromkeys(known))
    values = {loose(n) for n in known} - {None}
    for name in names:
        if name not in known and loose(name) not in values:
            raise SubnetError(no_subnet(name, known, "cocktail-cli subnets lists"))


def check_format(path: Path, *, int8: bool, fixed_batch: bool) -> None:
    """See that a suffix names a format, that its packages are installed, and that the options are for it.

    Raises:
        ExportFailed: They are not.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        return  # exporting says which formats there are
    packages, extra = FORMATS[suffix]
    check_installed(*packages, purpose=f"exporting to {suffix}", extra=extra, error=ExportFailed)
    if int8 and suffix not in (".onnx", ".xml"):
        raise ExportFailed(f"--int8 does not apply to {suffix}, which has no quantizer here: use .onnx or .xml")
    if fixed_batch and suffix == ".safetensors":
        raise ExportFailed("--fixed-batch does not apply to .safetensors, which holds no graph: leave it out")


def input_file(path: Path, option: str) -> None:
    """See that a file can be read.

    Raises:
        CocktailError: It is not there, is no file, or cannot be read.
    """
    if not _exists(path, option):
        raise CocktailError(f"{option} {path}: no such file")
    if path.is_dir():
        raise CocktailError(f"{option} {path} is a folder; give a file")
    _readable(path, option, os.R_OK)


def input_folder(path: Path, option: str) -> None:
    """See that a folder can be read.

    Raises:
        CocktailError: It is not there, is no folder, or cannot be read.
    """
    if not _exists(path, option):
        raise CocktailError(f"{option} {path}: no such folder")
    if not path.is_dir():
        raise CocktailError(f"{option} {path} is a file; give a folder")
    _readable(path, option, os.R_OK | os.X_OK)


def _readable(path: Path, option: str, rights: int) -> None:
    if not os.access(path, rights):
        raise CocktailError(f"{option} {path} cannot be read: permission denied")


def output_file(path: Path | None, option: str) -> None:
    """See that a file can be written, without touching anything.

    Raises:
        CocktailError: It cannot be.
    """
    if path is None:
        return
    if _exists(path, option) and path.is_dir():
        raise CocktailError(f"{option} {path} is a folder; give a file's path")
    if path.exists() and not os.access(path, os.W_OK):
        raise CocktailError(f"{option} {path} cannot be written: permission denied; choose another path")
    _writable(path.parent, path, option)


def output_folder(path: Path | None, option: str) -> None:
    """See that files can be written into a folder, which may not be there yet.

    Raises:
        CocktailError: They cannot be.
    """
    if path is None:
        return
    if _exists(path, option) and not path.is_dir():
        raise CocktailError(f"{option} {path} is a file; give a folder")
    _writable(path, path, option)


def _writable(folder: Path, path: Path, option: str) -> None:
    """See that the nearest folder that is there can be written to."""
    here = folder.expanduser().absolute()
    while not here.exists() and here != here.parent:
        here = here.parent
    if not here.is_dir():
        raise CocktailError(f"{option} {path} cannot be written: {here} is a file; choose another path")
    if not os.access(here, os.W_OK | os.X_OK):
        raise CocktailError(f"{option} {path} cannot be written: {here} is read-only here; choose another path")


def _exists(path: Path, option: str) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CocktailError(f"{option} {path} is a link to nothing; give another path") from None
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CocktailError(f"{option} {shown(path)}: {reason}; give another path") from None
    return True


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
