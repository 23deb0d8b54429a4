"""Every error that this package raises on purpose.

Each message says what was asked, what was found, and what to do. Catch
:class:`CocktailError` for all of them.
"""

from __future__ import annotations

from .printable import printable

__all__ = [
    "AdapterError",
    "BundleError",
    "CocktailError",
    "ExportFailed",
    "PatternError",
    "SlimError",
    "SubnetError",
    "TrainingError",
]


class CocktailError(Exception):
    """Base class of all errors of this package.

    Messages may quote files of strangers: what a terminal would obey is escaped in them.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args))


class AdapterError(CocktailError):
    """A model's name is not known, or its example inputs cannot be made."""


class ExportFailed(CocktailError):
    """``torch.export`` could not follow the model, or a file for another runtime cannot be written or is not right."""


class PatternError(CocktailError, ValueError):
    """A pattern's name, specification or parameters make no sense."""


class SubnetError(CocktailError, KeyError):
    """No subnetwork of that name exists, or none is within a budget."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""


class SlimError(CocktailError):
    """A slim model could not be made, or does not compute what the masked one does.

    Attributes:
        module: Path of the module that fails or differs first, where it is known.
    """

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class BundleError(CocktailError):
    """A bundle cannot be read, or does not belong to the model."""


class TrainingError(CocktailError):
    """Training cannot start or go on."""


def described(error: BaseException) -> str:
    """Any error in a message of ours: its type, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
