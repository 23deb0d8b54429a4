"""The proof in the other mode: slim equals masked in training mode, where code asks for the mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SlimError, described
from .compare import Precision, failing_module, first_difference, relative_error, tensors_in
from .determinism import ConstantRandom, seeded_rng
from .training_mode import in_training, reads_training

__all__ = ["TrainingModeError", "check_training"]


class TrainingModeError(SlimError):
    """The slim model does not compute in training mode what the masked one does."""


def check_training(masked: nn.Module, slim: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Compares two models in training mode, with batch norms in eval mode and without randomness.

    Args:
        masked: The masked model, in float64; its buffers may change.
        slim: The slim one.
        args: Positional inputs of both.
        kwargs: Keyword inputs of both.

    Returns:
        Whether there was anything to compare: code that asks for the mode, and that runs without targets.

    Raises:
        TrainingModeError: The slim model does not run there, or computes something else.
    """
    if not reads_training(masked):
        return False
    precision = Precision()
    with torch.no_grad(), in_training(masked), in_training(slim):
        want, failed = _outcome(masked, args, kwargs, precision)
        got, error = _outcome(slim, args, kwargs, precision)
        if error is not None:
            if (
                failed is not None
                and type(failed) is type(error)
                and _at(masked, args, kwargs) == _at(slim, args, kwargs)
            ):
                return False  # it wants targets, say
            raise _refused(slim, f"does not run ({described(error)})", _at(slim, args, kwargs))
        if failed is not None:
            return False
        if relative_error(got, want, want) <= precision.limit:
            return True
        # Shapes that agree but values that do not: either the slim model is wrong, or the model is random in a way that
        # ConstantRandom does not see (numpy, its own generator).
        if [t.shape for t in got] == [t.shape for t in want]:
            again, _ = _outcome(masked, args, kwargs, precision)
            if not relative_error(again, want, want) <= precision.limit:
                return False  # two runs of the masked model differ as well, so values show nothing
        with ConstantRandom(), seeded_rng():
            where = first_difference(masked, slim, args, kwargs)
        raise _refused(slim, "computes something else than the masked one", where)


def _outcome(model: nn.Module, args: Any, kwargs: Any, precision: Precision) -> tuple[list[Tensor], Exception | None]:
    try:
        with seeded_rng(), precision, ConstantRandom():
            return tensors_in(model(*args, **kwargs)), None
    except Exception as error:  # the model's own, for want of targets, or of the right sizes
        return [], error


def _at(model: nn.Module, args: Any, kwargs: Any) -> str:
    with seeded_rng(), ConstantRandom():
        return failing_module(model, args, kwargs)


def _refused(slim: nn.Module, what: str, where: str) -> TrainingModeError:
    return TrainingModeError(
        f"in training mode the slim {type(slim).__name__} {what}; it goes wrong in {where or 'its own forward'!r}. "
        "Exclude what this module reads (exclude_modules=[...]).",
        module=where,
    )
