"""What experts of a mixture return for the tokens that are given to them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatternError
from ..graph import ExpertSet
from ..patterns.scores.base import Routed
from ..utils.losses import ForwardFn
from ..utils.modes import evaluating
from .data import CalibrationData
from .passes import run_batches

__all__ = ["observe_experts"]

log = logging.getLogger(__name__)


def observe_experts(
    model: nn.Module, sets: Iterable[ExpertSet], data: CalibrationData, forward_fn: ForwardFn | None = None
) -> dict[str, Routed]:
    """Pass the data through the model and see what each expert returns.

    The module that holds the experts must be called as those of transformers are: with the hidden states, the experts
    chosen for each token, and the router's weights for these. To see each expert's output by itself, the module is run
    again for each of the ``top_k`` places, with this place's expert alone and a weight of 1.

    Args:
        model: Run in evaluation mode, without gradients; it is left as it was.
        sets: The sets of experts.
        data: The data.
        forward_fn: As in training.

    Returns:
        By the name of a set.

    Raises:
        PatternError: Experts are called in another way, or were not called at all, or what they return is not finite.
    """
    sums = {s.name: _Sums(s) for s in sets}
    handles = [
        model.get_submodule(_holder(of.set)).register_forward_hook(of.observe, with_kwargs=True) for of in sums.values()
    ]
    try:
        with evaluating(model), torch.no_grad():
            for _ in run_batches(model, data, forward_fn, "observing experts"):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: of.routed() for name, of in sums.items()}


def _holder(of: ExpertSet) -> str:
    """Path of the module that holds the experts' own parameters, without those of the router."""
    paths = [name.rpartition(".")[0] for name in of.tensors]
    owners = [path.split(".") for path in paths if path != paths[0]] or [paths[0].split(".")]
    return ".".join(p[0] for p in takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False)))


class _Sums:
    """Sums over the tokens given to each expert of a set."""

    def __init__(self, of: ExpertSet) -> None:
        self.set = of
        self.tokens = torch.zeros(of.count, dtype=torch.int64)
        self.norms = torch.zeros(of.count, dtype=torch.float64)

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the module that holds the experts."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        tensors = {key: v for key, v in given.items() if isinstance(v, Tensor) and v.ndim == 2}
        places = [key for key, v in tensors.items() if not v.is_floating_point() and v.shape[1] == self.set.top_k]
        shape = tensors[places[0]].shape if len(places) == 1 else None
        weights = [key for key, v in tensors.items() if v.is_floating_point() and v.shape == shape]
        if shape is None or not weights or not isinstance(output, Tensor) or output.shape[:1] != shape[:1]:
            raise PatternError(
                f"score 'activation': {type(module).__name__} in {self.set.name!r} is not called with the experts "
                "chosen for each token and the router's weights for them, so what each expert returns is not known; "
                "choose a score of elements, such as 'magnitude' or 'wanda'"
            )
        chosen, gates = tensors[places[0]], tensors[weights[-1]]
        for k in range(self.set.top_k):
            alone = {**given, places[0]: chosen[:, k : k + 1], weights[-1]: torch.ones_like(gates[:, k : k + 1])}
            returned = module.forward(
                *(alone[i] for i in range(len(args))), **{key: v for key, v in alone.items() if isinstance(key, str)}
            )
            norms = returned.flatten(1).double().norm(dim=1) * gates[:, k].double()
            self.norms.index_add_(0, chosen[:, k].cpu(), norms.cpu())
        self.tokens += torch.bincount(chosen.flatten().cpu(), minlength=self.set.count)

    def routed(self) -> Routed:
        """The sums, checked."""
        if not bool(self.norms.isfinite().all()):
            raise PatternError(f"calibration: what the experts of {self.set.name!r} return is infinite or NaN")
        idle = (self.tokens == 0).nonzero().flatten().tolist()
        if len(idle) == self.set.count:
            raise PatternError(
                f"calibration: the experts of {self.set.name!r} were not called; leave them out with "
                f"exclude_modules=[{self.set.name!r}], or choose another score"
            )
        if idle:
            log.warning(
                "no calibration token was given to %d of %d experts of %r, which go first: %s",
                len(idle),
                self.set.count,
                self.set.name,
                ", ".join(map(str, idle[:8])),
            )
        return Routed(self.tokens, self.norms)
