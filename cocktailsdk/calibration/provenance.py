"""What a net's provenance says of the scores that its masks were ranked by."""

from __future__ import annotations

from collections.abc import Mapping

from ..net.subnet_model import SubnetModel
from ..patterns.scores import Score
from ..patterns.scoring import ScoreFunction, described_scores, needs_data
from .data import CalibrationData

__all__ = ["note_scores"]


def note_scores(net: SubnetModel, scores: Mapping[str, Score | ScoreFunction], data: CalibrationData | None) -> None:
    """Write the score of each pattern into ``net.provenance["score"]``, with the data that it was judged from.

    Where all patterns rank by magnitude the entry is removed: bundles of such nets have none, as before there were
    scores.

    Args:
        net: All masks of which were made by these scores.
        scores: By pattern name.
        data: The calibration data, which is noted where a score needs any.
    """
    by_pattern = described_scores(scores)
    if not by_pattern:
        net.provenance.pop("score", None)
        return
    record: dict[str, object] = {"patterns": by_pattern}
    if data is not None and needs_data(scores):
        record["calibration"] = {"fingerprint": data.fingerprint, "examples": data.examples}
    net.provenance["score"] = record
