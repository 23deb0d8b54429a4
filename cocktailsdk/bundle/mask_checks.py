"""Whether a bundle's masks are those that its patterns make: a right checksum says nothing of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import BundleError, PatternError
from ..masks import Mask
from ..patterns import UMG, Pattern

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
                try:
                    pattern.check(subnet, masks[subnet.name], umg)
                except PatternError as error:
                    raise BundleError(f"{error}; {advice}") from error
