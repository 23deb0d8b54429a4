"""One subnetwork as a plain model whose remaining weights make up for the others, layer by layer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..calibration.accumulate import InputSums
from ..calibration.data import CalibrationData
from ..calibration.observe import InputObserver
from ..calibration.passes import weight_tensors
from ..calibration.replay import Replay, WholeModel, find_chain
from ..errors import PatternError
from ..graph import Weight
from ..net.subnet_model import SubnetModel, model_unchanged
from ..patterns.base import DENSE
from ..patterns.scores.base import Observed
from ..patterns.scores.matrices import as_matrices, from_matrices, parts_of
from ..utils.batchnorm import measure, running_norms
from ..utils.losses import ForwardFn
from .least_squares import iterates, masked_least_squares, output_error
from .subnets import slim_subnet

__all__ = ["reconstruct"]

log = logging.getLogger(__name__)

DAMPING = 0.1
"""What weights cost that move from their values, as a share of the mean energy of their inputs."""

CHECKED = 3
"""After so many iterations each the held-out error is computed. Where it rises, the solution begins to fit what is
particular to the calibration data: stopping there is the usual regularization of conjugate gradients."""

HELD_OUT = 8
"""One batch in so many is held out."""


def reconstruct(
    net: SubnetModel,
    name: str,
    calibration: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
) -> nn.Module:
    """A plain model of one subnetwork, with weights fitted anew so that each layer's outputs change little.

    Block by block, each weight that the subnetwork masks solves a least-squares problem on the calibration data: its
    remaining elements are chosen so that its outputs come close to those of all its elements, on the inputs that the
    reconstructed blocks before it give (as in SparseGPT, which solves it greedily; here it is solved by conjugate
    gradients, under the mask as it is). The model that is returned leaves the shared weights; the net stays as it is.

    One in eight calibration batches is held out. Each solution is iterated for as long as the error on them falls. A
    weight whose error there would not fall keeps its values.

    Args:
        net: The net.
        name: The subnetwork.
        calibration: As in :func:`~cocktailsdk.sparsify`; at least two batches. For a weight of n inputs, some 8 n
            tokens or positions are wanted.
        forward_fn: ``forward_fn(model, batch) -> (output, target)``; by default batches are used as in training.

    Returns:
        The slim model, as :meth:`CocktailNet.slim` makes it. Batch norms have statistics of the calibration data.

    Raises:
        SubnetError: There is no such subnetwork.
        PatternError: There is too little data, activations are not finite, or the subnetwork removes whole experts.
        SlimError: The slim model cannot be made.
    """
    mask = net.mask_tensors(name)
    if name in net.masks and net.masks[name].experts:
        raise PatternError(
            f"{name!r} removes whole experts, and leaves no weight of those that stay to fit: use net.slim({name!r})"
        )
    data = CalibrationData.of(calibration)
    if len(data.batches) < 2:
        raise PatternError("reconstruct holds out some batches, and calibration has only one; give smaller batches")
    weights = [w for w in net.coupling.weights if w.name in mask and not w.unmaskable]
    with net.using(DENSE), model_unchanged(net):
        fitted = _fitted(net.model, weights, mask, data, forward_fn)
    with _owned(net, name, fitted):
        made = slim_subnet(net, name)
    if running_norms(made):
        forward = None if forward_fn is None else lambda model, batch: forward_fn(model, batch)[0]
        measure(made, data.batches, forward)
    return made


def _fitted(
    model: nn.Module,
    weights: Sequence[Weight],
    mask: Mapping[str, Tensor],
    data: CalibrationData,
    forward_fn: ForwardFn | None,
) -> dict[str, Tensor]:
    """New values of weights by name."""
    names = find_chain(model, data, forward_fn)
    passes: Replay | WholeModel
    if names:
        passes = Replay.capture(model, data, forward_fn, names)
    else:
        passes = WholeModel.of(model, weights, data, forward_fn)
    out: dict[str, Tensor] = {}
    errors = [0.0, 0.0]
    with contextlib.closing(passes):
        for k, name in enumerate(passes.names):
            own = [w for w in weights if _inside(name, w.name)]
            found = _observed(model, own, passes, k)
            solved = {w.name: _solve(w, model, mask[w.name], seen, errors) for w, seen in found}
            out |= solved
            if k + 1 < len(passes.names):
                parameters = {n: p.detach() for n, p in model.named_parameters() if n in mask and _inside(name, n)}
                values = {n: solved[n] if n in solved else p * mask[n] for n, p in parameters.items()}
                passes.advance(k, {n.removeprefix(f"{name}."): v for n, v in values.items()})
            log.info("reconstructing: block %d of %d", k + 1, len(passes.names))
    if errors[0]:
        log.info("held-out error of layers fell to %.0f %%", 100 * errors[1] / errors[0])
    return out


def _inside(block: str, parameter: str) -> bool:
    return parameter.startswith(f"{block}.") if block else "." not in parameter


def _observed(
    model: nn.Module, weights: Sequence[Weight], passes: Replay | WholeModel, k: int
) -> Iterator[tuple[Weight, tuple[Observed | None, Observed | None]]]:
    """Each weight with what was observed of it in the batches that it is fitted to, and in those held out."""
    sums = [InputSums([w.name for w in weights]) for _ in range(2)]
    last, ran = passes.batches - 1, 0

    def receive(name: str, part: int, inputs: Tensor) -> None:
        held = ran % HELD_OUT == HELD_OUT - 1 or (last < HELD_OUT - 1 and ran == last)
        sums[held](name, part, inputs)

    with InputObserver(weights, weight_tensors(model, weights), receive):
        for _ in passes.outputs(k):
            ran += 1
    for weight in weights:
        parts = parts_of(weight)
        yield weight, (sums[0].of(weight, parts), sums[1].of(weight, parts))


def _solve(
    weight: Weight,
    model: nn.Module,
    mask: Tensor,
    seen: tuple[Observed | None, Observed | None],
    errors: list[float],
) -> Tensor:
    """A weight's new values; those under the mask as they are where no fit is better on what was held out."""
    value = model.get_parameter(weight.name).detach()
    masked = value * mask
    fit, held = seen
    if fit is None or held is None or fit.gram is None or held.gram is None:
        return masked  # the data does not reach it
    whole = as_matrices(weight, value).to(fit.gram.dtype)
    keep = as_matrices(weight, mask.expand_as(value) != 0)
    before = least = output_error(whole, whole * keep, held.gram)
    best = 0
    for i, new in enumerate(iterates(whole, keep, fit.gram, DAMPING), start=1):
        if i % CHECKED:
            continue
        error = output_error(whole, new, held.gram)
        if error >= least:
            break
        best, least = i, error
    if best:  # that long, with all data
        new = masked_least_squares(whole, keep, fit.gram + held.gram, DAMPING, best)
        masked = from_matrices(weight, new).to(value.dtype)
    errors[0] += before
    errors[1] += least
    return masked


@contextlib.contextmanager
def _owned(net: SubnetModel, name: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a subnetwork owns these values."""
    before = dict(net.private.get(name, {}))
    net.set_private(name, {**before, **tensors})
    try:
        yield
    finally:
        net.set_private(name, before)
