"""Zeros read back from a file that was written, counted where the masks want them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..net.subnet_model import SubnetModel

__all__ = ["Zeros", "count_zeros", "masked_zeros"]


@dataclass(frozen=True)
class Zeros:
    """The zeros of a subnetwork's masked weights in a file.

    Attributes:
        wanted: Zeros of the masked weights.
        found: Of these, how many are exact zeros at the same places in the file.
        elements: Elements of the masked weights.
        missing: Weights that the file holds in no such form, since the exporter computed something of them.
    """

    wanted: int = 0
    found: int = 0
    elements: int = 0
    missing: tuple[str, ...] = ()


def masked_zeros(net: SubnetModel, name: str, model: nn.Module) -> dict[str, Bool[Tensor, "..."]]:
    """Where the weights of a slim model are zero because single elements are masked, by name."""
    mask = net.masks.get(name)
    if mask is None:
        return {}
    found = {n: p.detach() == 0 for n, p in model.named_parameters() if n in mask.elements}
    return {n: zero.cpu() for n, zero in found.items() if bool(zero.any())}


def count_zeros(wanted: Mapping[str, Bool[Tensor, "..."]], constants: Iterable[tuple[str, Tensor]]) -> Zeros:
    """Look for masked weights among the constants of a file.

    Exporters rename, transpose and reshape weights, and multiply batch norms into them, all of which leaves zeros where
    they are. So a weight is the constant of its name, else the first that is zero wherever it is.

    Args:
        wanted: By weight name, where it must be zero.
        constants: Names and values.
    """
    large = {n: t for n, t in constants if t.numel() > 1}
    patterns = {n: t == 0 for n, t in large.items()}
    by_size: dict[int, list[str]] = {}
    for n, zero in patterns.items():
        by_size.setdefault(zero.numel(), []).append(n)
    found, missing, taken = 0, [], set()
    for name, zero in wanted.items():
        near = sorted(by_size.get(zero.numel(), ()), key=lambda n: (n != name, not n.startswith(name)))
        match = next((n for n in near if n not in taken and _covers(patterns[n], zero)), None)
        if match is None:
            missing.append(name)
            continue
        taken.add(match)
        found += int(zero.sum())
    total = sum(int(z.sum()) for z in wanted.values())
    return Zeros(total, found, sum(z.numel() for z in wanted.values()), tuple(missing))


def _covers(zero: Bool[Tensor, "..."], wanted: Bool[Tensor, "..."]) -> bool:
    """Whether a tensor, its axes in some order, is zero wherever it should be."""
    # A quick no, before axes are permuted.
    if int(zero.sum()) < int(wanted.sum()):
        return False
    squeezed = torch.squeeze(zero)
    form = [n for n in wanted.shape if n > 1]
    # At most 24 orders; more dimensions are only compared as they are.
    for order in permutations(range(squeezed.ndim)) if squeezed.ndim <= 4 else [tuple(range(squeezed.ndim))]:
        moved = squeezed.permute(order)
        if list(moved.shape) == form and bool((moved | ~wanted.reshape(form)).all()):
            return True
    # Last, the same elements in the same order under another shape.
    return math.prod(squeezed.shape) == wanted.numel() and bool((zero.reshape(-1) | ~wanted.reshape(-1)).all())
