"""Results of the comparisons: rows in a JSON file, one for each run, and which pattern a network is of."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cocktailsdk.io.atomic import write_json

Row = dict[str, Any]

KINDS = ("unstructured", "n:m", "channel")


def kind_of(name: str) -> str:
    """The pattern of a network, by its name."""
    return "n:m" if ":" in name else name.partition("@")[0]


def read_rows(path: Path) -> list[Row]:
    """All rows; none where there is no file yet."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def write_rows(rows: Iterable[Row], path: Path, order: Sequence[str]) -> None:
    """Replaces the file; rows are sorted by these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda r: tuple(r[column] for column in order))
    write_json(path, {"rows": ordered})


def provenance() -> Row:
    """What a run was made with, and when."""
    return {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "date": datetime.now(UTC).date().isoformat(),
    }
