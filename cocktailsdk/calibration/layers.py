"""What layers change of the stream, and the loss without some of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import PatternError
from ..utils.losses import ForwardFn, LossFn, loss_of
from ..utils.modes import evaluating
from ..utils.nested import default_forward
from .data import CalibrationData
from .passes import run_batches

__all__ = ["layer_cosines", "loss_without"]

TRIAL_EXAMPLES = 16
"""Each trial passes at least so many examples through the model, of the first batches: there are many trials."""


def layer_cosines(
    model: nn.Module, paths: Sequence[str], data: CalibrationData, forward_fn: ForwardFn | None = None
) -> dict[str, float]:
    """The mean cosine similarity of each layer's first input and its output, over all positions.

    Args:
        model: Run in evaluation mode; it is left as it was.
        paths: Modules that return the stream, or a tuple that begins with it.
        data: The data.
        forward_fn: As in training.

    Raises:
        PatternError: A module does not hand a tensor of one shape on.
    """
    sums = dict.fromkeys(paths, 0.0)
    counts = dict.fromkeys(paths, 0)

    def hook(path: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            after = output[0] if isinstance(output, tuple) else output
            if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
                raise PatternError(f"score 'cosine': the layer {path!r} does not hand on a tensor of the same shape")
            axis = 1 if before.ndim == 4 else -1  # images have channels first
            similarity = F.cosine_similarity(before.float(), after.float(), dim=axis)
            sums[path] += float(similarity.sum())
            counts[path] += similarity.numel()

        return observe

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        with evaluating(model), torch.no_grad():
            for _ in run_batches(model, data, forward_fn, "comparing layers"):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return {path: sums[path] / max(1, counts[path]) for path in paths}


def loss_without(
    model: nn.Module,
    tensors: Mapping[str, Sequence[str]],
    data: CalibrationData,
    loss_fn: LossFn | None,
    forward_fn: ForwardFn | None = None,
) -> Any:
    """A function that computes the mean loss with some layers' parameters set to zero, which then add nothing.

    Args:
        model: Run in evaluation mode; it is left as it was.
        tensors: By layer, the names of its parameters.
        data: The data, of which the first batches are used.
        loss_fn: As in training.
        forward_fn: As in training.
    """
    examples = data.examples / len(data.batches)
    few = data.batches[: max(1, round(TRIAL_EXAMPLES / examples))]
    part = CalibrationData(few, data.examples, data.fingerprint)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def trial(names: Sequence[str]) -> float:
        gone = dict.fromkeys(itertools.chain.from_iterable(tensors[name] for name in names))
        before = {name: parameters[name].detach().clone() for name in gone}
        try:
            for name in gone:
                parameters[name].zero_()
            with evaluating(model):
                passes = run_batches(model, part, forward_fn or default_forward, "trying without layers")
                return fmean(float(loss_of(output, target, loss_fn)) for output, target in passes)
        finally:
            for name, value in before.items():
                parameters[name].copy_(value)

    return trial
