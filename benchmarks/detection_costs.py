"""What the slim networks of detectors cost: FLOPs, parameters, and latency beside the dense detector's.

    python benchmarks/detection_costs.py                 what is missing, then the table
    python benchmarks/detection_costs.py --table         the table of what has been measured

Detectors are those of examples/detectron_style's configurations with ResNet-50 and VGG-16, untrained: time depends on
how many regions are proposed and where, here those of the dense detector for both, the most that the configuration
allows; and what follows the parts that can be pruned (boxes that lie over each other, regions) takes as long in a slim
detector as in the dense one. Mask heads are left out, since an untrained detector finds nothing that is worth a mask.
The dense detector and a slim one run by turns in torch, with one thread; a figure is the median over turns of dense
time by slim time. What runs elsewhere as it is, the backbone, or all of DETR, is written as ONNX, too, and run by turns
in onnxruntime. Rows are kept one by one in benchmarks/results/detection_costs.json.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_rows import Row, read_rows, write_rows
from rich.console import Console
from rich.table import Table
from torch import nn

import cocktailsdk as cocktail

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "detectron_style"
RESULTS = Path(__file__).resolve().parent / "results" / "detection_costs.json"
sys.path.append(str(EXAMPLE))

DETECTORS: Mapping[str, str] = {
    "Faster R-CNN, ResNet-50-FPN": "faster_rcnn_R_50_FPN.yaml",
    "Faster R-CNN, VGG-16": "faster_rcnn_VGG_16.yaml",
    "RetinaNet, ResNet-50-FPN": "retinanet_R_50_FPN.yaml",
    "DETR, ResNet-50": "detr_R_50.yaml",
}
NETWORKS = ("channel@0.1", "channel@0.271", "channel@0.469", "channel@0.613")

Call = Callable[[], object]


def by_turns(dense: Call, slim: Call, turns: int) -> tuple[float, float]:
    """The dense one's median time in seconds, and the median over turns of its time by the slim one's."""
    times = []
    for _ in range(turns + 1):
        pair = []
        for call in (dense, slim):
            began = time.perf_counter()
            call()
            pair.append(time.perf_counter() - began)
        times.append(pair)
    return median(a for a, _ in times[1:]), median(a / b for a, b in times[1:])


def in_onnxruntime(
    net: cocktail.CocktailNet, name: str, image: torch.Tensor, feeds: Mapping[str, torch.Tensor], path: Path
) -> tuple[Call, float]:
    """What of a network can be written as ONNX, as a call; and how far its outputs are from PyTorch's."""
    import onnxruntime
    from cocktail_detection.analysis import export_network

    apart = export_network(net, name, image, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {node.name: feeds[node.name].numpy() for node in session.get_inputs()}
    return lambda: session.run(None, given), apart


@contextmanager
def same_regions(*models: nn.Module) -> Iterator[None]:
    """Detectors with proposals all take what the first that runs proposes, and leave out no box that lies over another.

    What an untrained detector proposes is chance, and how long regions take depends on where they are.
    """
    first: list[Any] = []

    def proposals(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del module, args
        first[:] = first or [output]
        return first[0]

    found = [model.rpn for model in models if hasattr(model, "rpn")]
    before = [(rpn, rpn.nms_thresh, rpn.head.register_forward_hook(proposals)) for rpn in found]
    for rpn in found:
        rpn.nms_thresh = 1.0
    try:
        yield
    finally:
        for rpn, threshold, handle in before:
            rpn.nms_thresh = threshold
            handle.remove()


def measure(title: str, done: set[str], side: int, turns: int, keep: Callable[[Row], None]) -> None:
    """The networks of a detector that have no row yet."""
    from cocktail_detection.analysis import exported_part
    from cocktail_detection.catalog import register_builtin
    from cocktail_detection.config import get_cfg
    from cocktail_detection.data import example_images
    from cocktail_detection.engine import Setup

    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.merge_from_file(EXAMPLE / "configs" / DETECTORS[title])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", str(side), "COCKTAIL.PATTERNS", "[channel]", "MODEL.DEVICE", "cpu"])
    cfg.merge_from_list(["TEST.SCORE_THRESH", "0.99"])  # what untrained scores leave to be sorted is chance
    register_builtin()
    setup = Setup.of(cfg, classes=80)
    net = setup.net()
    net.eval()
    (image,) = example_images(cfg)
    detect = setup.architecture.detect
    reports: dict[str, cocktail.SubnetReport] = {report.name: report for report in net.subnets()}
    example = setup.architecture.example([image])
    feeds = {"images": image[None], **{name: x for name, x in example[1].items() if isinstance(x, torch.Tensor)}}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = Path(folder)
        dense = in_onnxruntime(net, "dense", image, feeds, files / "dense.onnx")[0]
        for name in (n for n in NETWORKS if n not in done):
            small = net.slim(name).eval()
            with same_regions(net.model, small):
                seconds, ratio = by_turns(lambda: detect(net.model, [image]), lambda: detect(small, [image]), turns)  # noqa: B023
            row = {
                "detector": title,
                "network": name,
                "image": list(image.shape),
                "turns": turns,
                "parameters": reports[name].params / reports["dense"].params,
                "flops": reports[name].flops / reports["dense"].flops,
                "dense_parameters": reports["dense"].params,
                "dense_flops": reports["dense"].flops,
                "dense_seconds": round(seconds, 3),
                "times_as_fast": round(ratio, 2),
            }
            slim, row["onnx_apart"] = in_onnxruntime(net, name, image, feeds, files / f"{name}.onnx")
            row["onnx_part"] = exported_part(net.model)
            row["onnx_times_as_fast"] = round(by_turns(dense, slim, turns)[1], 2)
            row["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
            keep(row)


def table(rows: list[Row]) -> Table:
    """The rows, for people."""
    made = Table("detector", "network", "parameters", "FLOPs", "times as fast", "part", "in onnxruntime")
    for row in rows:
        cells = [row["detector"], row["network"], f"{row['parameters']:.2f}", f"{row['flops']:.2f}"]
        cells += [f"{row['times_as_fast']:.2f}", row["onnx_part"], f"{row['onnx_times_as_fast']:.2f}"]
        made.add_row(*cells)
    return made


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(DETECTORS), default=list(DETECTORS))
    parser.add_argument("--side", type=int, default=480, help="the shorter side of the image; the longer is 4/3 of it")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure what has a row, too")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = read_rows(asked.results)

    def keep(row: Row) -> None:
        rows[:] = [r for r in rows if (r["detector"], r["network"]) != (row["detector"], row["network"])] + [row]
        write_rows(rows, asked.results, ("detector", "network"))

    if not asked.table:
        torch.set_num_threads(1)
        for title in asked.only:
            done = set() if asked.again else {r["network"] for r in rows if r["detector"] == title}
            if not done.issuperset(NETWORKS):
                measure(title, done, asked.side, asked.turns, keep)
    Console(width=130).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
