"""What a net's provenance says of its score, as text. Needs no torch: reports are read without."""

from __future__ import annotations

from typing import Any

__all__ = ["score_text"]


def score_text(record: Any) -> str:
    """One line: ``wanda (unstructured, n:m), activation (channel); calibrated on 128 examples (8c9f…)``.

    Args:
        record: ``provenance["score"]``, perhaps from a file: nothing is assumed of it.

    Returns:
        Empty where the record says nothing of a score, as of networks that were ranked by magnitude.
    """
    scores = _mapping(_mapping(record).get("patterns"))
    if not scores:
        return ""
    patterns: dict[str, list[str]] = {}
    for pattern, score in scores.items():
        patterns.setdefault(str(score), []).append(str(pattern))
    if len(patterns) == 1:
        text = next(iter(patterns))
    else:
        text = ", ".join(f"{score} ({', '.join(of)})" for score, of in patterns.items())
    data = _mapping(_mapping(record).get("calibration"))
    if data:
        text += f"; calibrated on {data.get('examples')} examples ({data.get('fingerprint')})"
    return text


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
