"""AST's two operations: masks that drop and regrow weights, and gradients corrected by the step before's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import TrainingError
from ...graph import Weight
from ...masks import Mask
from ...masks.tiles import runs, unruns
from ...net.subnet_model import SubnetModel

__all__ = ["correct_gradients", "regrown"]


@torch.no_grad()
def regrown(net: SubnetModel, name: str, share: float) -> Mask:
    """A subnet's mask after each layer dropped its smallest weights and regrew as many by gradient.

    Every layer keeps as many weights as it had; in N:M masks every run does.

    Args:
        net: Its parameters' gradients are those of the subnet, also of weights that it masks. Dense is active.
        name: The subnet, of the pattern ``"unstructured"`` or ``"n:m"``.
        share: Of a layer's kept weights, or of its runs, how many are exchanged.

    Raises:
        TrainingError: The subnet is of another pattern.
    """
    subnet, mask = net.subnet(name), net.masks[name]
    if subnet.pattern not in ("unstructured", "n:m"):
        raise TrainingError(f"single weights are dropped and regrown in unstructured and n:m masks, not in {name!r}")
    parameters = dict(net.model.named_parameters())
    out = dict(mask.elements)
    for weight in net.eligible:
        gradient = parameters[weight.name].grad
        if weight.name not in out or gradient is None:
            continue
        now = out[weight.name].to(gradient.device)
        value = net.dense_tensor(weight.name)
        if subnet.pattern == "n:m":
            new = _exchanged_in_runs(weight, now, value, gradient, share, subnet.options["m"])
        else:
            new = _exchanged(now, value, gradient, share)
        out[weight.name] = new.cpu()
    return Mask(out, mask.removed)


def _exchanged(
    mask: Bool[Tensor, "..."], value: Float[Tensor, "..."], gradient: Float[Tensor, "..."], share: float
) -> Bool[Tensor, "..."]:
    flat = mask.flatten().clone()
    inside, outside = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
    count = min(round(share * len(inside)), len(outside))
    drop = value.flatten()[inside].abs().argsort(stable=True)[:count]
    grow = gradient.flatten()[outside].abs().argsort(descending=True, stable=True)[:count]
    flat[inside[drop]], flat[outside[grow]] = False, True
    return flat.reshape(mask.shape)


def _exchanged_in_runs(
    weight: Weight, mask: Tensor, value: Tensor, gradient: Tensor, share: float, m: int
) -> Bool[Tensor, "..."]:
    """In the runs whose smallest kept weight is smallest, it makes room for the masked one of largest gradient."""
    keep = runs(weight, mask, m)
    shape = keep.shape
    keep = keep.reshape(-1, m).clone()
    smallest = runs(weight, value, m).reshape(-1, m).abs().masked_fill(~keep, torch.inf).min(1)
    largest = runs(weight, gradient, m).reshape(-1, m).abs().masked_fill(keep, -1.0).max(1)
    chosen = smallest.values.argsort(stable=True)[: round(share * len(keep))]
    keep[chosen, smallest.indices[chosen]] = False
    keep[chosen, largest.indices[chosen]] = True
    return unruns(weight, keep.reshape(shape), True)


@torch.no_grad()
def correct_gradients(gradients: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where a layer's gradient g opposes the step before's, p, take its part along that out: g - (g·p / p·p) p.

    Args:
        gradients: By parameter; changed in place.
        previous: The gradients of the step before, as this function returned them.

    Returns:
        Copies of the corrected gradients.
    """
    for name, g in gradients.items():
        if (p := previous.get(name)) is not None:
            along, square = (g * p).sum(), p.square().sum()
            # torch.where instead of an if: no waiting for the device. 0 where the two agree, and where p is 0
            g.sub_(p * torch.where(along < 0, along / square, torch.zeros_like(along)))
    return {name: g.clone() for name, g in gradients.items()}
