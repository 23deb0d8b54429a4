"""Runs of a comparison as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any


def run_child(command: Sequence[str], key: str, threads: int, deadline: float) -> dict[str, Any] | str | None:
    """A run's row, what went wrong, or ``None`` where time was up and it can be gone on with.

    Args:
        command: Prints the row as the last line that begins with a brace; SIGINT has it save and stop.
        key: What the run is called where it fails.
        threads: That it may use.
        deadline: When it is stopped, on the monotonic clock.
    """
    if time.monotonic() > deadline:
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = child.communicate(timeout=max(deadline - time.monotonic(), 0))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.send_signal(signal.SIGINT)  # it finishes the step and saves
        child.communicate()
        return None
    found = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(found[-1]) if found else f"{key}: {err.strip()[-400:]}"
