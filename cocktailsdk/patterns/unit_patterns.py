"""What patterns that remove channel units share: they differ in the groups that they choose from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, Group
from ..masks import Mask
from .base import UMG, Pattern, Subnet, checked_sparsities
from .checking import check_unit_count, check_units
from .unit_choice import Choice, checked_round_to, checked_scope, comparable, kept_units, pooled
from .unit_scores import checked_beta, unit_scores

__all__ = ["UnitPattern"]


class UnitPattern(Pattern):
    """Removes units of some of the channel groups, nested over its levels.

    With ``scope="group"`` exactly ``round(sparsity * n)`` of each group's n units go, never all. With
    ``scope="global"`` the units of all its groups are ranked together, each by its score divided by the mean of its
    group's; exactly ``round(sparsity * n)`` of all n units go, and at least one of each group stays. Ties by position.
    ``round_to`` is applied to each group afterwards.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept units that each default level removes.
        beta: Weight of the unstructured term in the channel score; the N:M term has the rest.
        round_to: Channels kept are rounded to a multiple of this; ``"auto"``: 8 in groups of 256 channels and more.
        scope: ``"group"`` or ``"global"``.

    Raises:
        PatternError: An argument makes no sense.
    """

    after = ("unstructured", "n:m")
    removes_units = True
    ranks = "units"

    def __init__(
        self,
        sparsities: Sequence[float] | None,
        rounds: int,
        rate: float,
        beta: float,
        round_to: int | str | None,
        scope: str,
    ) -> None:
        self.sparsities, self._subnets, self._levels = checked_sparsities(self.name, sparsities, rounds, rate)
        self.beta = checked_beta(self.name, beta)
        self.round_to = checked_round_to(round_to, self.name)
        self.scope = checked_scope(self.name, scope)

    @abstractmethod
    def groups(self, coupling: Coupling) -> tuple[Group, ...]:
        """The channel groups that it removes units from."""

    @abstractmethod
    def nothing(self, coupling: Coupling) -> str | None:
        """Why no unit can go, where :meth:`groups` finds none; ``None`` where that is no error."""

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the widest to the narrowest."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The units of least score go."""
        return self.mask_by(unit_scores(umg, self.beta), subnet, umg)

    def mask_by(self, scores: Float64[Tensor, " units"], subnet: Subnet, umg: UMG) -> Mask:
        """The mask where each unit has a given score.

        Raises:
            PatternError: The model has no group that this pattern is about.
        """
        groups = self.groups(umg.coupling)
        if not groups and (why := self.nothing(umg.coupling)) is not None:
            raise PatternError(f"{subnet.name!r}: {why}")
        if self.scope == "global" and umg.unit_scores is None:  # a score of units says by itself how groups compare
            scores = comparable(scores, groups)
        previous = umg.previous.removed if umg.previous is not None else None
        pools = pooled(groups, subnet.sparsity, self.scope) if groups else ()
        return Mask(removed=Choice(umg.coupling, scores, pools, self.round_to, previous=previous).removed())

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Removed units among all of its groups."""
        del subnet
        n = sum(g.size for g in self.groups(umg.coupling))
        return int(mask.removed.sum()) / n if mask.removed is not None and n else 0.0

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Exactly as many units go as asked for, of each group or of all, and nothing else.

        Raises:
            PatternError: Another number does, units of other groups go, or single elements are masked.
        """
        groups = self.groups(umg.coupling)
        if self.scope == "global":
            check_unit_count(subnet, mask, groups, self.round_to)
        else:
            check_units(subnet, mask, {g: g.size - kept_units(g, subnet.sparsity, self.round_to) for g in groups})

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the eligible weights that would go with all units of its groups."""
        del subnet, mask
        every = torch.zeros(umg.coupling.n_units, dtype=torch.bool)
        for g in self.groups(umg.coupling):
            every[g.start : g.stop] = True
        keep = umg.coupling.left(every)
        total = sum(w.numel for w in umg.eligible)
        stays = sum(
            int(k.sum()) * (w.numel // k.numel()) if (k := keep.get(w.name)) is not None else w.numel
            for w in umg.eligible
        )
        return 1.0 - stays / total if total else 0.0

    def config(self) -> dict[str, Any]:
        """What :meth:`Pattern.from_config` makes an equal pattern from."""
        # Bundles of before have no scope: there it is "group".
        scope = {} if self.scope == "group" else {"scope": self.scope}
        return {**self._levels, "beta": self.beta, "round_to": self.round_to, **scope}
