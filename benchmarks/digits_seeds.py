"""The digits preset over several seeds: is its quality a matter of luck?

    python benchmarks/digits_seeds.py --seeds 5 --out runs/digits_seeds

Each seed is a whole run (a minute or two). Stopped at any moment, the same command resumes; seeds that are done are
not run again. Results are in ``OUT/seeds.json``, and a table against the thresholds is printed.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from statistics import mean
from typing import Any

from cocktailsdk.io.atomic import write_json
from cocktailsdk.presets import get_preset

DENSE = 0.97
"""The least test accuracy of the dense network."""

POINTS = {"unstructured": 1.5, "n:m": 1.5, "channel": 6.0}
"""By pattern, how many points of accuracy its networks' mean may lie below the dense network."""


def measure(seed: int, out: Path) -> dict[str, Any]:
    """Train one seed, or load it, and measure every network on the test set."""
    net, trainer, loaders = get_preset("digits").prepare(seed=seed, out_dir=out / f"seed-{seed}")
    trainer.fit()
    accuracy = trainer.evaluate(loaders.test)
    patterns: dict[str, list[float]] = {}
    for name, value in accuracy.items():
        patterns.setdefault(net.subnet(name).pattern, []).append(value)
    return {
        "seed": seed,
        "fingerprint": trainer.fingerprint,
        "accuracy": accuracy,
        "dense": accuracy["dense"],
        "points_below": {p: 100 * (accuracy["dense"] - mean(patterns[p])) for p in POINTS},
        "alphas": trainer.history.alphas,
        "judged": trainer.history.judged,
        "seconds": trainer.history.seconds,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results by seed, their means, and the worst against what is allowed."""
    lines = [f"{'seed':>6} {'dense':>8} " + " ".join(f"{p:>13}" for p in POINTS) + f" {'seconds':>8}"]
    for r in results:
        below = " ".join(f"{r['points_below'][p]:>13.2f}" for p in POINTS)
        lines.append(f"{r['seed']:>6} {r['dense']:>8.4f} {below} {r['seconds']:>8.0f}")
    for label, pick, least in (("mean", mean, mean), ("worst", max, min)):
        below = " ".join(f"{pick(r['points_below'][p] for r in results):>13.2f}" for p in POINTS)
        lines.append(f"{label:>6} {least(r['dense'] for r in results):>8.4f} {below}")
    lines.append(f"{'limit':>6} {DENSE:>8.4f} " + " ".join(f"{limit:>13.2f}" for limit in POINTS.values()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_seeds"), help="where runs and results go")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in range(arguments.seeds):
        results.append(measure(seed, arguments.out))
        write_json(arguments.out / "seeds.json", results)
        print(table(results), flush=True)
    holds = all(
        r["dense"] >= DENSE and all(r["points_below"][p] <= limit for p, limit in POINTS.items()) for r in results
    )
    print("every seed is within the limits" if holds else "NOT every seed is within the limits")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
