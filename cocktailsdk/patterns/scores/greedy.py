"""Layers in the order in which the loss bears that they go (Song et al., "SLEB")."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ...errors import PatternError
from .base import Layers, Score
from .registry import register_score

__all__ = ["Greedy"]

log = logging.getLogger(__name__)


@register_score("greedy")
class Greedy(Score):
    """Of layers and branches: the next to go is the one without which the loss on the calibration data is least, given
    those that are gone already (SLEB, Algorithm 1).

    Trials are saved as in lazy greedy maximization (Minoux 1978): what a layer costs hardly falls when others go, so a
    layer that cost more before than another costs now is not tried again.
    """

    needs = frozenset({"trials"})

    def layers(self, found: Layers) -> Mapping[str, float]:
        """Each layer's place in the order in which layers go. Those that no subnetwork drops share the last."""
        if found.loss_without is None:
            raise PatternError(f"score {self.name!r} needs the loss without layers, and it was not computed")
        loss = found.loss_without(())
        costs = {name: found.loss_without((name,)) - loss for name in found.names}
        current, gone = set(costs), list[str]()
        while len(gone) < found.most:
            name = min((n for n in found.names if n not in gone), key=lambda n: costs[n])
            if name in current:
                gone.append(name)
                loss += costs[name]
                current = set()
                log.info("%d of %d layers: %s goes, the loss is %.4f", len(gone), found.most, name, loss)
            else:
                costs[name] = found.loss_without((*gone, name)) - loss
                current.add(name)
        return {name: float(gone.index(name) if name in gone else len(gone)) for name in found.names}
