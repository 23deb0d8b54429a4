"""Detections of several networks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .models import Detection

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")


def drawn(image: Tensor, detection: Detection, classes: Sequence[str], threshold: float) -> Tensor:
    """An image with what was found in it.

    Args:
        image: ``(3, height, width)`` in 0 … 1.
        detection: In the image's pixels.
        classes: Names of the labels 1, 2, …
        threshold: The least score that is drawn.
    """
    picture = (image.clamp(0, 1) * 255).byte().cpu()
    chosen = detection["scores"] >= threshold
    boxes, labels, scores = (detection[k][chosen].cpu() for k in ("boxes", "labels", "scores"))
    apart = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, labels, scores = boxes[apart], labels[apart], scores[apart]
    if not len(boxes):
        return picture
    colours = [COLOURS[(label - 1) % len(COLOURS)] for label in labels.tolist()]
    if "masks" in detection:
        masks = detection["masks"][chosen].cpu()[apart][:, 0] > 0.5
        picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colours)
    names = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]
    return draw_bounding_boxes(picture, boxes, names if len(names) <= 12 else None, colours)


def write_comparison(path: Path, rows: Sequence[Sequence[Tensor]], titles: Sequence[str]) -> None:
    """Write pictures as a PNG: a row for each image, a column for each network.

    Args:
        path: Of the file.
        rows: Pictures ``(3, height, width)`` of 0 … 255; those of a row in one size.
        titles: Of the columns.
    """
    height = sum(row[0].shape[1] / row[0].shape[2] for row in rows)
    figure = Figure(figsize=(3.2 * len(titles), 3.2 * height + 0.4), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            axes[i, j].imshow(picture.permute(1, 2, 0).numpy())
            axes[i, j].set_axis_off()
            if i == 0:
                axes[i, j].set_title(titles[j])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    FigureCanvasAgg(figure).print_png(str(beside))
    beside.replace(path)


def chosen_networks(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The dense network and three more: those wanted, or the middle one of each pattern."""
    if wanted:
        return ["dense", *(n for n in wanted if n != "dense")]
    kinds: dict[str, list[str]] = {}
    for name in names:
        if name != "dense":
            kinds.setdefault(name.partition("@")[0] if "@" in name else "n:m", []).append(name)
    groups = list(kinds.values())
    middles = [group[len(group) // 2] for group in groups]
    rest = [name for group in groups for name in group if name not in middles]
    return ["dense", *(middles + rest[::-1])[:3]]


def empty() -> Detection:
    """Nothing found."""
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
