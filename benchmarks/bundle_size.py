"""Bytes of a bundle of 24 networks against one dense checkpoint and against 24 of them, and bytes read for one network.

    python benchmarks/bundle_size.py

The networks are the default ones (10 unstructured, 10 channel, 3 N:M, and the dense one), each with batch-norm
statistics of its own, stored as they are and in half the bits. The weights are random: how many bytes they take does
not depend on their values. A dense checkpoint is a safetensors file of the `state_dict`. What is read for one network,
besides the weights, is what `from_pretrained(..., subnets=[name])` reads of `subnets.safetensors`, in whole pieces.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

import cocktailsdk as cocktail
from cocktailsdk.bundle import bundle_bytes
from cocktailsdk.models import build_model
from cocktailsdk.report.run import dense_bytes

OUT = Path(__file__).resolve().parent / "results" / "bundle_size.json"
MODELS = ("torchvision:resnet18",)
SHOWN = ("2:4", "channel@0.469", "unstructured@0.488")


def whole_net(name: str) -> cocktail.CocktailNet:
    """The model's default 24 networks, with statistics for each."""
    torch.manual_seed(0)
    net = cocktail.sparsify(build_model(name), example_inputs=(torch.randn(1, 3, 64, 64),))
    batch = torch.randn(2, 3, 64, 64)
    for subnet in net.names:
        net.recalibrate(subnet, [batch])
    return net


class Read(logging.Handler):
    """Bytes read and bytes there, by file, of the last bundle loaded."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.bytes: dict[str, tuple[int, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        read, of, file = record.args  # type: ignore[misc]
        self.bytes[Path(str(file)).name] = int(str(read)), int(str(of))


def row(name: str) -> dict[str, Any]:
    """One model's figures."""
    net = whole_net(name)
    dense = dense_bytes(net.model)
    out: dict[str, Any] = {"model": name, "networks": len(net.names), "dense_bytes": dense}
    log, handler = logging.getLogger("cocktailsdk.bundle.read"), Read()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    with tempfile.TemporaryDirectory() as beside:
        for dtype in (None, "float16", "bfloat16"):
            net.save_pretrained(Path(beside) / "bundle", dtype=dtype)
            out[f"bundle_bytes_{dtype or 'as they are'}"] = bundle_bytes(Path(beside) / "bundle")
        model = build_model(name)
        for subnet in SHOWN:
            cocktail.from_pretrained(Path(beside) / "bundle", model, subnets=[subnet])
            out[f"read_{subnet}"] = handler.bytes["subnets.safetensors"][0]
        out["subnets_bytes"] = handler.bytes["subnets.safetensors"][1]
    log.removeHandler(handler)
    whole = out["bundle_bytes_as they are"]
    out |= {"of_one_dense": whole / dense, "dense_files_to_one": len(net.names) * dense / whole}
    return out


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(row(name))
        print(json.dumps(rows[-1], indent=1), flush=True)
    results = {"command": "python benchmarks/bundle_size.py", "torch": str(torch.__version__), "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
