"""A run that is killed in the middle of saving, and again in merging, ends as one that never was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL there")
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from kill_test import differences, killed, run

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, "cocktail") == 0
    assert killed(folder, "cocktail", "saving a state:30000") == "saving a state"
    assert not (folder / "bundle").exists()
    assert killed(folder, "cocktail", "merging:9000") == "merging"
    assert killed(folder, "cocktail", "loading a state:300") == "loading a state"
    assert run(folder, "cocktail") == 0
    assert differences(folder, whole) == []
