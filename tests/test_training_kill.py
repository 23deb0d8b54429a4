"""A run that is killed in the middle of saving, and again in merging, ends as one that never was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

PROGRAM = """
import sys
from pathlib import Path

import kill_run
from kill_test import differences, killed, run

kill_run.warm()
whole, folder = Path(sys.argv[1], "whole"), Path(sys.argv[1], "killed")
assert run(whole, "paper-finishing") == 0
for phase, moment in (("saving a state", 20_000), ("merging", 9_000), ("loading a state", 300)):
    assert killed(folder, "paper-finishing", f"{phase}:{moment}") == phase
    assert not (folder / "bundle").exists()
assert run(folder, "paper-finishing") == 0
assert differences(folder, whole) == [], differences(folder, whole)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL there")
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
