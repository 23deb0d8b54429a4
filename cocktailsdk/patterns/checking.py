"""Whether a mask is one that a pattern makes: what the patterns' own checks share.

A mask from a file has right checksums and may still be any mask. A network that is called ``"2:4"`` must be 2:4, so
every pattern counts what its masks keep when a bundle is saved and when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Never

from jaxtyping import Bool
from torch import Tensor

from ..errors import PatternError
from ..graph import Group, Weight
from ..masks import Mask
from .base import UMG, Subnet
from .unit_choice import least_units, widths_before_rounding

__all__ = ["check_unit_count", "check_units", "covered_share", "refuse", "weight_masks", "zeros_among_covered"]


def refuse(subnet: Subnet, why: str) -> Never:
    """Say that a mask is not one that its pattern makes.

    Raises:
        PatternError: Always; it names the subnetwork.
    """
    raise PatternError(f"the mask of {subnet.name!r} is not one that its pattern makes: {why}")


def weight_masks(
    subnet: Subnet, mask: Mask, umg: UMG
) -> Iterator[tuple[Weight, Bool[Tensor, "..."] | None, Bool[Tensor, "..."] | None]]:
    """Every eligible weight with its mask (``None``: nothing is masked) and what is hidden of it (``UMG.hidden``).

    Raises:
        PatternError: The mask removes channel units, or masks a tensor that is not eligible.
    """
    if mask.removed is not None and bool(mask.removed.any()):
        refuse(subnet, f"{int(mask.removed.sum())} channel units are removed, and the pattern removes none")
    odd = set(mask.elements) - {w.name for w in umg.eligible}
    if odd:
        refuse(subnet, f"{min(odd)!r} is masked, which is no eligible weight")
    for weight in umg.eligible:
        yield weight, mask.elements.get(weight.name), umg.hidden.get(weight.name)


def covered_share(umg: UMG, covered: Callable[[Weight], int]) -> float:
    """The share of the eligible weights' elements that a pattern can touch, from how many those of each weight are."""
    total = sum(w.numel for w in umg.eligible)
    return sum(covered(w) for w in umg.eligible) / total if total else 0.0


def zeros_among_covered(mask: Mask, umg: UMG, covered: Callable[[Weight], int]) -> float:
    """The share that a mask zeroes of the elements that its pattern can touch."""
    total = sum(covered(w) for w in umg.eligible)
    zeros = sum(int((~mask.elements[w.name]).sum()) for w in umg.eligible if w.name in mask.elements)
    return zeros / total if total else 0.0


def check_units(subnet: Subnet, mask: Mask, groups: dict[Group, int]) -> None:
    """See that of every group so many units are removed, of other groups none, and that no element is masked.

    Raises:
        PatternError: It is not so.
    """
    if mask.elements:
        refuse(subnet, f"single elements of {min(mask.elements)!r} are masked, and the pattern masks none")
    for group, gone in groups.items():
        found = 0 if mask.removed is None else int(mask.removed[group.start : group.stop].sum())
        if found != gone:
            refuse(subnet, f"{found} of the {group.size} units of the group {group.name!r} are removed, not {gone}")
    found = 0 if mask.removed is None else int(mask.removed.sum())
    if found != sum(groups.values()):
        refuse(subnet, f"{found} units are removed, {sum(groups.values())} of them of groups that the pattern prunes")


def check_unit_count(subnet: Subnet, mask: Mask, groups: Sequence[Group], round_to: int | str) -> None:
    """See that exactly so many units of all groups together are removed, of other groups none, and that no element is.

    ``round(sparsity * n)`` units go before each group is rounded. So the widths must be those that rounding makes of
    widths with that sum.

    Raises:
        PatternError: It is not so.
    """
    gone = [0 if mask.removed is None else int(mask.removed[g.start : g.stop].sum()) for g in groups]
    check_units(subnet, mask, dict(zip(groups, gone, strict=True)))
    total = sum(g.size for g in groups)
    kept = total - min(round(subnet.sparsity * total), total - sum(least_units(g, round_to) for g in groups))
    fewest = most = 0
    for group, n in zip(groups, gone, strict=True):
        widths = widths_before_rounding(group, group.size - n, round_to)
        if widths is None:
            refuse(subnet, f"{group.size - n} of the {group.size} units of the group {group.name!r} are kept")
        fewest, most = fewest + widths[0], most + widths[1]
    if not fewest <= kept <= most:
        refuse(subnet, f"{sum(gone)} of the {total} units are removed, not {total - kept}")
