"""Optional packages: imported when they are used. A missing one gives an error with the command that installs it.

Nothing here imports torch, so a command can check for packages before it loads anything.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..errors import CocktailError

__all__ = ["EXTRAS", "check_installed", "install_command", "installed", "missing", "require"]

EXTRAS = {
    "PIL": "vision",
    "accelerate": "distributed",
    "fastapi": "serving",
    "matplotlib": "plots",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "prometheus_client": "serving",
    "pycocotools": "detection",
    "sklearn": "presets",
    "tensorboard": "tensorboard",
    "torchvision": "vision",
    "uvicorn": "serving",
    "yaml": "detection",
}
"""Optional modules, and the extra of ``cocktailsdk`` that installs each. All others are installed by name."""


def require(module: str, purpose: str, *, error: type[CocktailError] = CocktailError) -> Any:
    """Import a module of an optional package.

    Args:
        module: The module's full name, such as ``"matplotlib.figure"``.
        purpose: What needs the module, as the subject of an error message: ``"drawing figures"``.
        error: The class of error to raise if the package is missing.

    Returns:
        The module.

    Raises:
        CocktailError: The package is not installed. The message has the command that installs it.
    """
    check_installed(module.partition(".")[0], purpose=purpose, error=error)
    return importlib.import_module(module)


def check_installed(*packages: str, purpose: str, extra: str = "", error: type[CocktailError] = CocktailError) -> None:
    """Check that optional packages are installed, before work begins that needs them.

    Args:
        packages: Names of their modules.
        purpose: What needs them, as the subject of an error message.
        extra: The extra that installs all of them. Default: the extras in :data:`EXTRAS`.
        error: The class of error to raise if one is missing.

    Raises:
        CocktailError: One is not installed. The message has the command that installs it.
    """
    if message := missing(*packages, purpose=purpose, extra=extra):
        raise error(message)


def missing(*packages: str, purpose: str, extra: str = "") -> str:
    """An error message that names the packages that are not installed; empty if all are installed."""
    names = [p for p in packages if not installed(p)]
    if not names:
        return ""
    verb = "is" if len(names) == 1 else "are"
    command = install_command(*names, extra=extra)
    return f"{purpose} needs {', '.join(names)}, which {verb} not installed: {command}"


def install_command(*packages: str, extra: str = "") -> str:
    """The command that installs packages: by extras if these have them, otherwise by name."""
    extras = {extra} if extra else {EXTRAS[p] for p in packages if p in EXTRAS}
    others = [] if extra else [p for p in packages if p not in EXTRAS]
    return " ".join(["pip install", *([f'"cocktailsdk[{",".join(sorted(extras))}]"'] if extras else []), *others])


def installed(package: str) -> bool:
    """Whether a package is installed; this does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # half-loaded, or part of a package that is not installed
        return False
