"""Which runs the comparison of detectors is made of, what the paper has beside them, and how rows are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from result_rows import KINDS, Row, kind_of, read_rows, write_rows

RESULTS = Path(__file__).resolve().parent / "results" / "detection.json"


@dataclass(frozen=True)
class Task:
    """A data set and a detector.

    Attributes:
        title: For people.
        config: Of ``examples/detectron_style/configs/``.
        settings: What differs from it.
        paper: The backbone with which the paper's Table 4 compares.
    """

    title: str
    config: str
    settings: tuple[str, ...] = ()
    paper: str = "ResNet-50"


VGG = ("MODEL.BACKBONE.NAME", "vgg11_bn", "MODEL.ANCHORS.SIZES", "[8, 16, 32, 64]")
FULL = (
    *("INPUT.MIN_SIZE_TRAIN", "[0]", "INPUT.MIN_SIZE_TEST", "0", "INPUT.FLIP", "both", "COCKTAIL.DISTILL", "false"),
    *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "3e-4"),
    *("SOLVER.WEIGHT_DECAY", "0.01", "SOLVER.IMS_PER_BATCH", "8"),
)
"""Images as they are, and a schedule from scratch; the configurations' own is for COCO."""
BLOOD = (*FULL, "DATASETS.TRAIN", "bccd_train", "DATASETS.TEST", "bccd_test")
NUCLEI = (
    *(*FULL, "DATASETS.TRAIN", "nuclei_train", "DATASETS.TEST", "nuclei_test"),
    *("MODEL.ANCHORS.SIZES", "[8, 16, 32, 64, 128]"),
)
TASKS: Mapping[str, Task] = {
    "bccd": Task("Faster R-CNN, ResNet-18-FPN, on blood cells", "bccd_faster_rcnn_R_18_FPN.yaml"),
    "nuclei": Task("Mask R-CNN, ResNet-18-FPN, on nuclei", "nuclei_mask_rcnn_R_18_FPN.yaml"),
    "bccd-vgg": Task("Faster R-CNN, VGG-11-FPN, on blood cells", "bccd_faster_rcnn_R_18_FPN.yaml", VGG, "VGG-16"),
    "nuclei-vgg": Task("Mask R-CNN, VGG-11-FPN, on nuclei", "nuclei_mask_rcnn_R_18_FPN.yaml", VGG, "VGG-16"),
    "bccd-full": Task(
        "Faster R-CNN, ResNet-50-FPN, on whole images of blood cells", "faster_rcnn_R_50_FPN.yaml", BLOOD
    ),
    "nuclei-full": Task("Mask R-CNN, ResNet-50-FPN, on whole images of nuclei", "mask_rcnn_R_50_FPN.yaml", NUCLEI),
    "bccd-full-vgg": Task(
        "Faster R-CNN, VGG-16, on whole images of blood cells", "faster_rcnn_VGG_16.yaml", BLOOD, "VGG-16"
    ),
    "nuclei-full-vgg": Task("Mask R-CNN, VGG-16, on whole images of nuclei", "mask_rcnn_VGG_16.yaml", NUCLEI, "VGG-16"),
}

METHODS: Mapping[str, tuple[str, ...]] = {
    "cocktail": (),
    "cocktail, distillation": ("COCKTAIL.DISTILL", "true"),
    "cocktail, channels alone": ("COCKTAIL.PATTERNS", "[channel]"),
    "mutualnet": ("COCKTAIL.RECIPE", "mutualnet", "COCKTAIL.PATTERNS", "[channel]"),
}
"""Settings of the example's script, by the name that rows have."""

PAPER: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "bbox": {
        "ResNet-50": {"dense": 32.1, "cocktail": 31.0, "mutualnet": 31.3},
        "VGG-16": {"dense": 33.8, "cocktail": 32.3, "mutualnet": 30.7},
    },
    "segm": {
        "ResNet-50": {"dense": 32.5, "cocktail": 30.9, "mutualnet": 30.1},
        "VGG-16": {"dense": 31.3, "cocktail": 30.3, "mutualnet": 29.4},
    },
}
"""The paper's Table 4: AP on COCO of the dense network, and the mean of ten channel networks by method."""


def paper_gap(kind: str, backbone: str, method: str) -> float | None:
    """How far the paper's mean channel network is below its dense one, in points; ``None`` of other methods."""
    figures = PAPER[kind][backbone]
    name = method.partition(",")[0]
    return round(figures["dense"] - figures[name], 1) if method in PAPER[kind][backbone] else None


@dataclass(frozen=True)
class Line:
    """A method's seeds on a task, in points of AP of boxes or masks.

    Attributes:
        task: Of its rows.
        method: Its name.
        kind: ``"bbox"`` or ``"segm"``.
        seeds: How many.
        steps: Optimizer steps of a run.
        passes: Forward and backward passes of a run.
        dense: The dense network's AP.
        dense50: The same at IoU 0.5.
        means: By pattern the mean over its networks; ``None`` where it trains none.
        gap: The dense network's less the mean channel network's.
        spread: Standard deviation of the gap over seeds; ``None`` of one.
        seconds: Of training a run.
    """

    task: str
    method: str
    kind: str
    seeds: int
    steps: int
    passes: int
    dense: float
    dense50: float
    means: Mapping[str, float | None]
    gap: float
    spread: float | None
    seconds: float


def lines(rows: Iterable[Row]) -> list[Line]:
    """A line for every task, method, budget and kind, in the order of tasks and methods."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"], row["budget"]), []).append(row)
    out = []
    for (task, method, _), mine in groups.items():
        for kind in next(iter(mine[0]["networks"].values())):
            values = [{name: found[kind]["AP"] for name, found in row["networks"].items()} for row in mine]
            by_kind = [{k: [v for n, v in found.items() if kind_of(n) == k] for k in KINDS} for found in values]
            means = {k: [mean(found[k]) for found in by_kind if found[k]] for k in KINDS}
            gaps = [found["dense"] - mean(by["channel"]) for found, by in zip(values, by_kind, strict=True)]
            out.append(
                Line(
                    task=task,
                    method=method,
                    kind=kind,
                    seeds=len(mine),
                    steps=mine[0]["steps"],
                    passes=mine[0]["passes"],
                    dense=mean(found["dense"] for found in values),
                    dense50=mean(row["networks"]["dense"][kind]["AP50"] for row in mine),
                    means={k: mean(found) if found else None for k, found in means.items()},
                    gap=mean(gaps),
                    spread=stdev(gaps) if len(gaps) > 1 else None,
                    seconds=mean(row["seconds"] for row in mine),
                )
            )
    order = [*METHODS]
    known = {task: i for i, task in enumerate(TASKS)}
    return sorted(out, key=lambda x: (known[x.task], x.kind, -x.steps, order.index(x.method)))


def read(path: Path = RESULTS) -> list[Row]:
    """All rows."""
    return read_rows(path)


def write(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Replaces the file."""
    write_rows(rows, path, ("task", "method", "seed", "budget"))
