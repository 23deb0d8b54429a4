"""Whether a run that is killed anywhere ends with the same bundle, byte by byte, as one that never was.

    python benchmarks/kill_test.py

Small digits runs with the recipes "paper-finishing" and "paper" (kill_run.py) are ended with SIGKILL at 25 moments,
drawn with a seed: some within each phase (between any two Python calls of saving, pruning, merging, …), the others at
any time. Each is then started again by the same command, and its folder compared with that of a run that was left
alone: every byte of the bundle's files, the report but for seconds and versions, the history in the last state but
for seconds, and what else lies there. To save time, runs are forks of one process that has imported the libraries.

The moments are printed as a table and kept in benchmarks/results/kill_test.json; the same command resumes where it was
stopped, --fresh begins anew. Exits with 1 where a run differed.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "kill_test.json"
WORK = HERE.parent / "runs" / "kill_test"

WITHIN = (
    ("paper-finishing", "saving a state"),
    ("paper", "merging"),
    ("paper-finishing", "pruning"),
    ("paper", "recalibrating"),
    ("paper-finishing", "finishing"),
    ("paper", "saving a state"),
    ("paper-finishing", "merging"),
    ("paper", "pruning"),
    ("paper-finishing", "recalibrating"),
    ("paper", "saving a round"),
    ("paper-finishing", "measuring all"),
    ("paper", "measuring a round"),
    ("paper-finishing", "loading a state"),
    ("paper", "writing the bundle"),
    ("paper-finishing", "training"),
)
"""Recipes, and the phases within which moments are drawn; the moments beyond these may fall anywhere."""


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--work", type=Path, default=WORK, help="where runs are kept meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    import kill_run

    kill_run.warm()  # once for all runs: see run
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
        options.out.unlink(missing_ok=True)
    rows = json.loads(options.out.read_text())["moments"] if options.out.exists() else []
    for number in range(len(rows), options.moments):
        rows.append(moment(number, options.seed, options.work))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"moments": rows, "seed": options.seed, **environment()}, indent=1) + "\n")
        print(line(rows[-1]), flush=True)
    print()
    for row in rows:
        print(line(row))
    alike = sum(row["differs"] == [] for row in rows)
    print(f"{alike} of {len(rows)} ended with the same bytes; phases hit: {', '.join(sorted(hit(rows)))}")
    return int(alike < len(rows))


def moment(number: int, seed: int, work: Path) -> dict[str, Any]:
    """Kill one run, let it go on, and compare."""
    recipe, phase = WITHIN[number] if number < len(WITHIN) else (("paper-finishing", "paper")[number % 2], "")
    whole, counts = alone(recipe, work)
    draw = random.Random(f"{seed} {number}")
    seconds = json.loads((whole / "report.json").read_text())["seconds"]
    for attempt in range(5):
        if phase == "loading a state":  # of a run that was killed before
            told = [f"training:{draw.randint(1, counts['training'] // 2)}", f"{phase}:{draw.randint(200, 600)}"]
        elif phase:
            # how much is saved depends on the time that all else takes: not the last of it
            told = [f"{phase}:{draw.randint(1, counts[phase] * 3 // 4)}"]
        else:
            told = [f"after:{draw.uniform(0, seconds):.3f}"]
        folder = work / f"{number:02d}-{attempt}"
        shutil.rmtree(folder, ignore_errors=True)
        found = [killed(folder, recipe, moment) for moment in told]
        if None in found:
            continue  # the run was over before
        run(folder, recipe)
        row = {"number": number, "recipe": recipe, "told": told, "phases": found, "differs": differences(folder, whole)}
        if not row["differs"]:
            shutil.rmtree(folder)
        return row
    raise SystemExit(f"moment {number}: the run was over before it could be killed {told}")


def alone(recipe: str, work: Path) -> tuple[Path, dict[str, int]]:
    """The folder of a run that is left alone, and how many moments each phase has."""
    whole, counted, note = work / recipe, work / f"{recipe}-counted", work / f"{recipe}.json"
    if not (whole / "report.json").exists():
        run(whole, recipe)
    if not note.exists():
        shutil.rmtree(counted, ignore_errors=True)
        run(counted, recipe, COCKTAIL_KILL_NOTE=str(note))
        if wrong := differences(counted, whole):
            raise SystemExit(
                f"two runs that were left alone differ in {', '.join(wrong)}: nothing can be compared here"
            )
    return whole, json.loads(note.read_text())["counts"]


def run(folder: Path, recipe: str, **told: str) -> int:
    """The command, to its end or until it kills itself; its exit status."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "kill_run.py"), str(folder), recipe]
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as said:
        if "kill_run" in sys.modules:
            status = _forked(command, told, said.fileno())
        else:
            env = {**os.environ, **told}
            status = subprocess.run(command, env=env, stdout=said, stderr=said, check=False).returncode
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} ended with {status}:\n{log.read_text()}")
    log.unlink()
    return status


def _forked(command: list[str], told: dict[str, str], said: int) -> int:
    """The command in a copy of this process, which has imported all that it needs already."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(told)
        sys.argv = command[1:]
        sys.modules["kill_run"].main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(status)


def killed(folder: Path, recipe: str, told: str) -> str | None:
    """Run the command until it is killed; in which phase that was, or ``None`` where it was over before."""
    note = folder.parent / "note.json"
    note.unlink(missing_ok=True)
    if run(folder, recipe, COCKTAIL_KILL=told, COCKTAIL_KILL_NOTE=str(note)) == 0:
        return None
    phase: str = json.loads(note.read_text())["phase"]
    return phase


def differences(folder: Path, whole: Path) -> list[str]:
    """What two finished runs' folders differ in, but for times."""
    files = sorted((whole / "bundle").iterdir())
    wrong = [f"bundle/{f.name}" for f in files if f.read_bytes() != (folder / "bundle" / f.name).read_bytes()]
    if _report(folder) != _report(whole):
        wrong.append("report.json")
    if _history(folder) != _history(whole):
        wrong.append("history")
    names = [{_kind(p) for p in f.rglob("*") if p.is_file()} for f in (folder, whole)]
    return wrong + [f"left over: {name}" for name in sorted(names[0] ^ names[1])]


def _report(folder: Path) -> dict[str, Any]:
    read = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in read.items() if key not in ("seconds", "environment")}


def _history(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "state").glob("state-*.pt"))[-1]
    with newest.open("rb") as file:
        file.readline()
        history: dict[str, Any] = torch.load(file, weights_only=True)["history"]
    return {key: value for key, value in history.items() if key != "seconds"}


def _kind(path: Path) -> str:
    """A file's name; how many states were written depends on the time."""
    return path.suffix if path.name.startswith("state-") else path.name


def hit(rows: list[dict[str, Any]]) -> set[str]:
    """All phases in which a run was killed."""
    return {phase for row in rows for phase in row["phases"]}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    result = "same bytes" if not row["differs"] else f"DIFFERS: {', '.join(row['differs'])}"
    phases = " then ".join(row["phases"])
    return f"{row['number']:>3}  {row['recipe']:<9} {phases:<30} {result:<12} {', '.join(row['told'])}"


def environment() -> dict[str, Any]:
    """Where this ran."""
    return {"torch": str(torch.__version__), "python": platform.python_version(), "machine": platform.machine()}


if __name__ == "__main__":
    sys.exit(main())
