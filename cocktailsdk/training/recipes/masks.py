"""Mask rules: how the masks of a round are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ...errors import TrainingError
from ...masks import Mask
from ...net.subnet_model import SubnetModel
from ...patterns import rounds_of
from ...patterns.base import UMG, Subnet
from ...patterns.ranking import drop_smallest
from ...patterns.scoring import PatternScores

__all__ = ["MASK_RULES", "MaskRule", "Pruning", "layerwise", "levels", "own", "refilling", "tickets", "umg"]


@dataclass(frozen=True)
class Pruning:
    """What a mask rule sees.

    Attributes:
        net: Its weights are those that the round before ended with.
        subnets: Of the round by pattern, in the order in which masks are made.
        new: Those without a mask of this run.
        load_dense: Loads the weights that the dense round ended with into the net.
        scores: How patterns rank the weights that are loaded; ``None`` where all rank by magnitude.
    """

    net: SubnetModel
    subnets: Mapping[str, tuple[Subnet, ...]]
    new: frozenset[str]
    load_dense: Callable[[], None]
    scores: Callable[[], PatternScores | None] = lambda: None

    def make_masks(self, subnet: Subnet, previous: Mask | None = None, made: Mapping[str, Mask] | None = None) -> Mask:
        """The mask of a subnet, ranked by the run's score; otherwise as ``net.make_masks``."""
        return self.net.make_masks(subnet, previous, made, self.scores())

    def umg(self, subnet: Subnet, previous: Mask | None = None) -> UMG:
        """What the subnet's pattern sees, with the run's score."""
        seen, scores = self.net.umg(previous), self.scores()
        return seen if scores is None else scores.seen_by(self.net.pattern(subnet.pattern), seen, subnet)

    def previous(self, subnet: Subnet, made: Mapping[str, Mask]) -> Mask | None:
        """The mask of the level before, for nested patterns."""
        pattern = self.net.pattern(subnet.pattern)
        levels = [s.name for s in pattern.subnets()]
        level = levels.index(subnet.name)
        if not pattern.nested or not level:
            return None
        before = levels[level - 1]
        return made[before] if before in made else self.net.masks[before]

    def in_turn(self) -> Iterator[tuple[str, Subnet]]:
        """The new subnets, each with its pattern's name."""
        for pattern, subnets in self.subnets.items():
            yield from ((pattern, s) for s in subnets if s.name in self.new)


MaskRule = Callable[[Pruning], dict[str, Mask]]


def umg(pruning: Pruning) -> dict[str, Mask]:
    """Unified mask generation (paper, section 3.2): each pattern sees the masks made before it in the round."""
    net, out = pruning.net, dict[str, Mask]()
    made: dict[str, Mask] = {}
    for pattern, subnets in pruning.subnets.items():
        for s in subnets:
            if s.name in pruning.new:
                out[s.name] = pruning.make_masks(s, pruning.previous(s, out), dict(made))
        if subnets:
            last = subnets[-1].name
            made[pattern] = out[last] if last in out else net.masks[last]
    return out


def own(pruning: Pruning) -> dict[str, Mask]:
    """Each pattern for itself, from the magnitudes, or scores, of all weights."""
    out: dict[str, Mask] = {}
    for _, s in pruning.in_turn():
        out[s.name] = pruning.make_masks(s, pruning.previous(s, out))
    return out


def levels(pruning: Pruning) -> dict[str, Mask]:
    """All levels at once, as the rounds would make them one after the other: the masks that ``sparsify()`` makes.

    Each level of a pattern sees the same level of the patterns before it. On ResNet-20 this gave channel@0.469 2.7
    points over :func:`own`, where channels are ranked by all weights (``benchmarks/trained.py``).
    """
    net, out = pruning.net, dict[str, Mask]()
    for plan in rounds_of(net.patterns):
        made: dict[str, Mask] = {}
        for pattern, subnets in plan.items():
            for s in subnets:
                if s.name in pruning.new and s.name not in out:
                    out[s.name] = pruning.make_masks(s, pruning.previous(s, out), dict(made))
            if subnets:
                last = subnets[-1].name
                made[pattern] = out[last] if last in out else net.masks[last]
    return out


def tickets(pruning: Pruning) -> dict[str, Mask]:
    """As :func:`own`, but what does not nest is cut from the dense round's weights, not from another ticket's."""
    if not all(pruning.net.pattern(name).nested for name, subnets in pruning.subnets.items() if subnets):
        pruning.load_dense()
    return own(pruning)


def refilling(pruning: Pruning) -> dict[str, Mask]:
    """Channels with most weights surviving in the unstructured mask stay, and are filled whole; N:M made apart.

    Raises:
        TrainingError: The net has no unstructured pattern.
    """
    net, out = pruning.net, dict[str, Mask]()
    surviving = pruning.subnets.get("unstructured", ())
    if not surviving:
        raise TrainingError(
            'refilling fills channels by what the pattern "unstructured" keeps, which this net has not: give it to '
            "sparsify() too"
        )
    for pattern, s in pruning.in_turn():
        previous = pruning.previous(s, out)
        if pattern == "channel":
            last = surviving[-1].name
            mask = out[last] if last in out else net.masks[last]
            seen = net.umg(previous)
            counts = {n: mask.elements[n].to(v) if n in mask.elements else v * 0 + 1 for n, v in seen.values.items()}
            out[s.name] = net.pattern(pattern).mask(s, replace(seen, values=counts))
        else:
            out[s.name] = pruning.make_masks(s, previous)
    return out


def layerwise(pruning: Pruning) -> dict[str, Mask]:
    """Unstructured masks with the same sparsity in every layer, nested; other patterns as :func:`own`."""
    net, out = pruning.net, dict[str, Mask]()
    for pattern, s in pruning.in_turn():
        previous = pruning.previous(s, out)
        scored = None if pattern != "unstructured" or pruning.scores() is None else pruning.umg(s, previous)
        # a score that is compared within layers or rows gives all layers the same sparsity anyway
        if pattern != "unstructured" or (scored is not None and scored.comparison != "global"):
            out[s.name] = pruning.make_masks(s, previous)
            continue
        elements, total, gone = {}, 0, 0
        for weight in net.eligible:
            value = net.dense_tensor(weight.name).detach() if scored is None else scored.ranked[weight.name]
            kept = torch.ones_like(value, dtype=torch.bool) if previous is None else previous.elements[weight.name]
            kept = kept.to(value.device)
            # what rounding takes from one layer the next one gets: the sum is exact
            total += value.numel()
            goes = round(s.sparsity * total) - gone
            gone += goes
            count = goes - int((~kept).sum())
            elements[weight.name] = drop_smallest({"": value}, {"": kept}, count)[""].cpu()
        out[s.name] = Mask(elements)
    return out


MASK_RULES: Mapping[str, MaskRule] = {
    "umg": umg,
    "own": own,
    "levels": levels,
    "layerwise": layerwise,
    "tickets": tickets,
    "refilling": refilling,
}
"""Rules that a recipe may name."""
