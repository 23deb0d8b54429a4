"""Element scores judged block by block, each block on what the pruned blocks before it return."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..errors import PatternError
from ..graph import Weight
from ..patterns.base import UMG, Pattern, Subnet
from ..patterns.scores import Score
from ..patterns.scores.matrices import parts_of
from ..patterns.scoring import PatternScores
from .accumulate import InputSums
from .observe import InputObserver
from .passes import weight_tensors
from .replay import Replay

__all__ = ["SequentialScores", "check_sequential"]

log = logging.getLogger(__name__)


def check_sequential(pattern: Pattern, score: object) -> bool:
    """Whether a pattern's masks are made block by block.

    Units and layers are chosen from one pass: a residual stream belongs to no block. So are weights that are judged
    without inputs.

    Raises:
        PatternError: The pattern compares weights of different blocks with one another.
    """
    if pattern.ranks != "elements" or not isinstance(score, Score) or not score.needs & {"squares", "gram"}:
        return False
    if score.comparison == "global" and pattern.nested:
        raise PatternError(
            f"sequential=True prunes one block after another, and score {score.name!r} compares all blocks' weights "
            f"for the pattern {pattern.name!r}; choose 'wanda' or 'sparsegpt', or sequential=False"
        )
    return True


@dataclass(frozen=True, kw_only=True)
class SequentialScores(PatternScores):
    """Scores that are computed anew for every subnetwork, on the inputs that its own pruned blocks give.

    Attributes:
        model: The dense model.
        replay: Its blocks, at the first one's inputs.
    """

    model: nn.Module
    replay: Replay

    def seen_by(self, pattern: Pattern, umg: UMG, subnet: Subnet) -> UMG:
        """What a pattern sees: summaries of inputs in the pruned model. The data passes through it meanwhile."""
        score = self.by_pattern.get(pattern.name)
        if not check_sequential(pattern, score):
            return super().seen_by(pattern, umg, subnet)
        assert isinstance(score, Score)
        found = dict(self.summaries.get(score.name, {}))  # those of weights outside of the blocks stay
        replay = self.replay.again()
        for k, name in enumerate(replay.names):
            log.info("%s: block %d of %d", subnet.name, k + 1, len(replay.names))
            weights = tuple(w for w in umg.eligible if w.name.startswith(f"{name}."))
            found |= self._observed(score, k, weights, replay)
            if k + 1 == len(replay.names):
                break
            scores = replace(self, summaries={**self.summaries, score.name: found})
            seen = PatternScores.seen_by(scores, pattern, replace(umg, eligible=weights), subnet)
            mask = pattern.mask(subnet, seen)
            pruned: dict[str, Tensor] = {}
            for weight in weights:
                keep = mask.elements.get(weight.name)
                if keep is not None:
                    value = self.model.get_parameter(weight.name).detach()
                    pruned[weight.name.removeprefix(f"{name}.")] = value * keep.to(value.device)
            replay.advance(k, pruned)
        return PatternScores.seen_by(
            replace(self, summaries={**self.summaries, score.name: found}), pattern, umg, subnet
        )

    def _observed(
        self, score: Score, k: int, weights: tuple[Weight, ...], replay: Replay
    ) -> dict[str, Mapping[str, Tensor]]:
        sums = InputSums([w.name for w in weights] if "gram" in score.needs else ())
        with InputObserver(weights, weight_tensors(self.model, weights), sums):
            for _ in replay.outputs(k):
                pass
        seen = {w.name: sums.of(w, parts_of(w)) for w in weights}
        return {name: score.summary(observed) for name, observed in seen.items() if observed is not None}
