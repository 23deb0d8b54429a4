"""A small digits run that ends itself with SIGKILL where it is told to; kill_test.py runs it.

    python benchmarks/kill_run.py FOLDER RECIPE

It is `cocktail-cli train --preset digits` with fewer epochs and networks. What it is told comes in the environment, so
that the command is the same whether it dies or goes on:

    COCKTAIL_KILL="merging:1234"   at the 1,234th event of Python's profiler (calls and returns) in that phase
    COCKTAIL_KILL="after:3.21"     that many seconds after training began, wherever it is
    COCKTAIL_KILL_NOTE=FILE        where it was, written just before; without a kill, how many events each phase had
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from cocktailsdk import CocktailNet, CoTrainer, presets
from cocktailsdk.bundle import write
from cocktailsdk.cli import runs
from cocktailsdk.cli.main import app
from cocktailsdk.patterns import NM, Channel, Unstructured
from cocktailsdk.presets import Preset, digits
from cocktailsdk.training import BatchSettings, EvaluationSettings, OutputSettings, RoundSettings, rounds
from cocktailsdk.training.merge import merging
from cocktailsdk.training.state.store import FolderStore

STARTING = "starting"
PHASES: dict[CodeType, str] = {
    FolderStore.load.__code__: "loading a state",
    FolderStore.save.__code__: "saving a state",
    FolderStore.put.__code__: "saving a round",
    rounds._make_masks.__code__: "pruning",
    rounds._train_round.__code__: "training",
    rounds._measure.__code__: "measuring a round",
    merging.merge_rounds.__code__: "merging",
    merging.finish.__code__: "measuring all",
    CocktailNet.recalibrate.__code__: "recalibrating",
    write.save_bundle.__code__: "writing the bundle",
}
"""What the innermost of these functions says of a moment."""


def phase_of(frame: FrameType, code: CodeType) -> str:
    """What a function that has just been called does."""
    if code is rounds._train_round.__code__ and frame.f_locals["session"].position.phase == "finishing":
        return "finishing"
    return PHASES[code]


class Killer:
    """Counts the profiler's events by phase, and ends the process at one of them."""

    def __init__(self, phase: str, at: int, note: Path | None) -> None:
        self.phase, self.at, self.note = phase, at, note
        self.counts: Counter[str] = Counter()
        self.stack = [STARTING]

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        known = code in PHASES
        if known and event == "call":
            self.stack.append(phase_of(frame, code))
        now = self.stack[-1]
        self.counts[now] += 1
        if now == self.phase and self.counts[now] == self.at:
            kill(self.note, now)
        if known and event == "return":
            self.stack.pop()


def kill(note: Path | None, phase: str) -> None:
    """End this process as a machine does that loses its power, as far as the process can tell."""
    if note is not None:
        note.write_text(json.dumps({"phase": phase}))
    os.kill(os.getpid(), signal.SIGKILL)


def phase_now() -> str:
    """What the main thread is doing, seen from another."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code in PHASES:
            return phase_of(frame, frame.f_code)
        frame = frame.f_back
    return STARTING


def kill_after(seconds: float, note: Path | None) -> None:
    """Wait in a thread of its own for training to begin, and then so long."""

    def wait() -> None:
        while phase_now() == STARTING:
            time.sleep(0.001)
        time.sleep(seconds)
        kill(note, phase_now())

    threading.Thread(target=wait, daemon=True).start()


def small(recipe: str) -> Preset:
    """The digits with 6 networks, 2 short epochs a round, and states saved all the time."""
    preset = digits.preset()
    patterns = (Unstructured(sparsities=[0.5, 0.8]), NM(2, 4), Channel(sparsities=[0.25, 0.5], round_to=1))
    changed = {
        "recipe": recipe,
        "epochs": 2,
        "rounds": RoundSettings(rewind_epoch=1, alphas=(1.0, 0.7, 0.4)),
        "evaluation": EvaluationSettings(recalibration_batches=2),
        "batches": BatchSettings(steps_per_epoch=10),
        "output": OutputSettings(save_seconds=0.3, save_minutes=0.6 / 60),
    }
    return dataclasses.replace(preset, patterns=patterns, training={**preset.training, **changed})


def warm() -> None:
    """Import all that a run imports, on one thread: a fork has no others."""
    torch.set_num_threads(1)
    small("paper-finishing").prepare()


def profiled(killer: Killer) -> None:
    """Have the profiler call from where training begins; imports and tracing are of no interest."""
    fit = CoTrainer.fit

    def begin(trainer: CoTrainer) -> CocktailNet:
        sys.setprofile(killer)
        return fit(trainer)

    CoTrainer.fit = begin  # type: ignore[method-assign]


def main() -> None:
    """Run as a script."""
    folder, recipe = sys.argv[1:]
    torch.set_num_threads(1)  # in a fork torch's pool of threads must be made anew, before two threads do it at once
    presets.PRESETS["digits"] = lambda: small(recipe)
    runs.write_figure = lambda *_: None  # of no interest here, and slow
    where, _, moment = os.environ.get("COCKTAIL_KILL", "").partition(":")
    note = Path(os.environ["COCKTAIL_KILL_NOTE"]) if "COCKTAIL_KILL_NOTE" in os.environ else None
    if where == "after":
        kill_after(float(moment), note)
    elif where or note is not None:
        killer = Killer(where, int(moment or 0), note)
        profiled(killer)
        if not where and note is not None:
            atexit.register(lambda to: to.write_text(json.dumps({"counts": killer.counts})), note)
    app(["train", "--preset", "digits", "--out", folder])


if __name__ == "__main__":
    main()
