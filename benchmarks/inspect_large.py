"""How long `cocktail-cli inspect` takes, and how much memory, on models that do not fit into it.

    python benchmarks/inspect_large.py

Writes the configurations of a Llama-3-8B-shaped and a Mixtral-8x7B-shaped model, runs the command on each in a process
of its own (the models are built on the meta device, without values), and prints seconds, peak memory and what was
found. The figures go to benchmarks/results/inspect_large.json. Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "inspect_large.json"

SECONDS, GIB = 90.0, 6.0
"""What one inspection may take."""

SHAPE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        **SHAPE,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "Mixtral-8x7B": {
        **SHAPE,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
EXPECTED = {
    "Llama-3-8B": {"grouped-query units": [32, 8], "channels": [32, 14336], "residual stream": [1, 4096]},
    "Mixtral-8x7B": {"grouped-query units": [32, 8], "expert channels": [32, 14336], "residual stream": [1, 4096]},
}
"""By kind of group, how many there are and how many units each has."""


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One inspection in a process of its own."""
    path = folder / name / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    program = "from cocktailsdk.cli.main import main; main()"
    out = folder / f"{name}.json"
    began = time.perf_counter()
    with out.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", program, "inspect", f"hf:{path}", "--json"], stdout=file)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"inspecting {name} failed with exit code {process.returncode}")
    found = json.loads(out.read_text(encoding="utf-8"))
    kinds = Counter((g["kind"], g["units"]) for g in found["groups"])
    return {
        "model": name,
        "params": found["params"],
        "seconds": round(seconds, 1),
        "peak_gib": round(_bytes(used) / 2**30, 2),
        "groups": {kind: [count, units] for (kind, units), count in kinds.items()},
        "kept": len(found["kept"]),
    }


def _bytes(used: resource.struct_rusage) -> int:
    return used.ru_maxrss if sys.platform == "darwin" else 1024 * used.ru_maxrss


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, Path(folder)) for name in CONFIGS]
    passed = True
    print(f"{'model':>14} {'params':>8} {'seconds':>8} {'GiB':>6}  groups")
    for r in results:
        groups = "; ".join(f"{count} x {units} {kind}" for kind, (count, units) in r["groups"].items())
        right = r["groups"] == EXPECTED[r["model"]] and r["seconds"] < SECONDS and r["peak_gib"] < GIB
        passed &= right
        print(
            f"{r['model']:>14} {r['params'] / 1e9:>6.2f} G {r['seconds']:>8.1f} {r['peak_gib']:>6.2f}  {groups}"
            + ("" if right else "  MISSED")
        )
    print(f"limits: {SECONDS:g} s, {GIB:g} GiB")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
