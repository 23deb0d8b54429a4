"""Whether a bundle's masks are those that its patterns make: a right checksum says nothing of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import BundleError, PatternError
from ..masks import Mask
from ..patterns import UMG, Pattern, Subnet

__all__ = ["check_masks"]


def check_masks(patterns: Sequence[Pattern], masks: Mapping[str, Mask], umg: UMG, advice: str) -> None:
    """See that every mask is one that its pattern makes.

    Args:
        patterns: The patterns.
        masks: By subnetwork; those that are missing are not checked.
        umg: The coupling, the eligible weights and the dense values.
        advice: What to do about a wrong one.

    Raises:
        BundleError: One is not; names the subnetwork.
    """
    for pattern in patterns:
        for subnet in pattern.subnets():
            if subnet.name in masks:
                _check(pattern, subnet, masks[subnet.name], umg, advice)


def _check(pattern: Pattern, subnet: Subnet, mask: Mask, umg: UMG, advice: str) -> None:
    try:
        pattern.check(subnet, mask, umg)
    except PatternError as error:
        exact = _before_rounding(pattern, subnet)
        if exact is None:
            raise BundleError(f"{error}; {advice}") from error
        try:
            pattern.check(exact, mask, umg)
        except PatternError:
            raise BundleError(f"{error}; {advice}") from error


def _before_rounding(pattern: Pattern, subnet: Subnet) -> Subnet | None:
    """The default level of a subnetwork's name.

    ``finetune`` of release 0.1.0 recorded the sparsity that is in the name, with three decimals; the mask has the exact
    one.
    """
    if len(pattern.subnets()) > 1:
        return None
    try:
        levels = type(pattern)().subnets()
    except (TypeError, PatternError):  # a pattern that needs arguments has no default levels
        return None
    return next((s for s in levels if s.name == subnet.name and s.sparsity != subnet.sparsity), None)
