"""Errors of a user's model, loss or metric, told in one line that says what it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..errors import CocktailError, TrainingError

__all__ = ["MISFITS", "blamed", "one_line"]

MISFITS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
"""What a model raises for a batch that it does not take; others are errors of another kind."""


@contextmanager
def blamed(
    what: str, where: Callable[[], str], hint: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Name in one line what raised; errors that say so themselves, and those of full memory, pass.

    Args:
        what: What raises: ``"the model"``.
        where: Says for what: ``"on the first batch, which is …"``.
        hint: What to do.
        kinds: Errors of other kinds pass too.

    Raises:
        TrainingError: Something raised.
    """
    try:
        yield
    except (CocktailError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        raise TrainingError(f"{what} raised {type(error).__name__} ({one_line(error)}) {where()}: {hint}") from error


def one_line(error: Exception) -> str:
    """An error's text, in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
