"""What bundles take and how their reader was tried, for docs/bundle-format.md."""

from __future__ import annotations

import json
from pathlib import Path

from cocktailsdk.report.numbers import bytes_text

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def bundle_block() -> str:
    """Sizes by dtype, what is read for one network, and the fuzz's counts."""
    return "\n".join([*_sizes(), *_fuzz()])


def _sizes() -> list[str]:
    found = json.loads((RESULTS / "bundle_size.json").read_text(encoding="utf-8"))
    out = [
        f"`{found['command']}` (torch {found['torch']}):",
        "",
        "| | networks | one dense file | bundle | of one dense file | of as many files | weights in float16 |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in found["rows"]:
        whole, half, dense = row["bundle_bytes_as they are"], row["bundle_bytes_float16"], row["dense_bytes"]
        out.append(
            f"| {row['model']} | {row['networks']} | {bytes_text(dense)} | {bytes_text(whole)} | {whole / dense:.2f} "
            f"| 1/{row['networks'] * dense / whole:.1f} | {bytes_text(half)}, {half / dense:.2f} |"
        )
    out.append("")
    for row in found["rows"]:
        read = [f"{bytes_text(row[k])} for `{k[5:]}`" for k in row if k.startswith("read_")]
        of = bytes_text(row["subnets_bytes"])
        out.append(f"Of {row['model']}, besides the weights, there are read of {of}: {', '.join(read)}.")
    return [*out, ""]


def _fuzz() -> list[str]:
    path = RESULTS / "bundle_fuzz.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    counts = ", ".join(f"{n:,} {what}" for what, n in found["counts"].items())
    return [
        f"`{found['command']}`: of {found['cases']:,} mutated bundles {len(found['failures']):,} were a failure "
        f"({counts}); the slowest took {found['slowest_processor_seconds']:.2f} s of the processor, none more than "
        f"{bytes_text(found['limit_memory_bytes'])} of memory (torch {found['torch']}, {found['machine']}).",
        "",
    ]
