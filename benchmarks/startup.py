"""How long a command takes before it does anything.

    python benchmarks/startup.py [--turns 7]

Runs the interpreter alone, `import torch`, `import cocktailsdk`, `cocktail-cli --help` and `cocktail-cli inspect
resnet50` in processes of their own, in turns, and prints the least and the median seconds of each and the median's
ratio to `import torch`. The figures go to benchmarks/results/startup.json. Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "startup.json"

CLI = "from cocktailsdk.cli.main import main; main()"
COMMANDS: dict[str, list[str]] = {
    "python": ["pass"],
    "import torch": ["import torch"],
    "import cocktailsdk": ["import cocktailsdk"],
    "cocktail-cli --help": [CLI, "--help"],
    "cocktail-cli inspect resnet50": [CLI, "inspect", "resnet50"],
}
LIMITS = {"cocktail-cli --help": 0.5, "cocktail-cli inspect resnet50": 15.0}
"""Seconds that a command may take at best, the machine's other work aside."""


def seconds(arguments: list[str]) -> float:
    """Of one process, from its start to its end.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    """Measure, print and write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="how often each is run")
    turns = parser.parse_args().turns
    if turns < 1:
        parser.error("--turns must be at least 1")
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(turns):
        for name, arguments in COMMANDS.items():
            taken[name].append(seconds(arguments))
    rows = {name: {"least": min(s), "median": statistics.median(s), "turns": turns} for name, s in taken.items()}
    for name, row in rows.items():
        limit = f"  (limit {LIMITS[name]:g} s)" if name in LIMITS else ""
        ratio = row["median"] / rows["import torch"]["median"]
        print(f"{name:30} least {row['least']:6.2f} s  median {row['median']:6.2f} s  {ratio:5.2f} x torch{limit}")
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(rows[name]["least"] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
