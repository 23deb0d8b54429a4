"""What of a detector can be pruned and why the rest cannot, what its networks cost, and how long they take here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.report.numbers import count_text, flops_text

from .models import Architecture

Slim = Callable[[str], nn.Module]


@dataclass(frozen=True)
class Part:
    """A part of a detector: a scope, or a child of a model that was followed as a whole.

    Attributes:
        name: Its path.
        parameters: How many it has.
        maskable: How many of these masks of single weights may touch.
        channels: Channel units that can go.
        groups: In how many groups.
        kept: What stays whole, by the reason.
    """

    name: str
    parameters: int
    maskable: int
    channels: int
    groups: int
    kept: Mapping[str, Sequence[str]]


def parts_found(net: cocktail.CocktailNet) -> list[Part]:
    """The parts of a detector."""
    out = []
    for name in parts_of(net):
        groups = [g for g in net.coupling.groups if inside(g.name, name)]
        kept: dict[str, list[str]] = {}
        for k in net.coupling.kept:
            if inside(k.where, name):
                kept.setdefault(k.reason, []).append(k.where.removeprefix(f"{name}.").removesuffix(".weight"))
        out.append(
            Part(
                name,
                sum(p.numel() for n, p in net.model.named_parameters() if inside(n, name)),
                sum(math.prod(w.shape) for w in net.eligible if inside(w.name, name)),
                sum(g.size for g in groups),
                len(groups),
                kept,
            )
        )
    return out


def prunable_table(net: cocktail.CocktailNet) -> Table:
    """For each part of a detector what masks may touch, which channels may go, and why others stay."""
    table = Table("part", "parameters", "maskable", "channels that can go", "stays whole")
    for part in parts_found(net):
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in part.kept.items())
        channels = f"{part.channels} in {part.groups} groups" if part.groups else "none"
        share = f"{100 * part.maskable / max(part.parameters, 1):.0f} %"
        table.add_row(part.name, count_text(part.parameters), share, channels, why)
    return table


def parts_of(net: cocktail.CocktailNet) -> list[str]:
    """The paths of a detector's parts."""
    scopes = list(net.coupling.trace.scopes) if net.coupling.trace is not None else [""]
    if scopes != [""]:
        return scopes
    parts: list[str] = []
    for name, child in net.model.named_children():
        big = sum(p.numel() for p in child.parameters()) > 0.5 * sum(p.numel() for p in net.model.parameters())
        parts += [f"{name}.{below}" for below, _ in child.named_children()] if big else [name]
    return [p for p in parts if any(True for _ in net.model.get_submodule(p).parameters())]


def inside(name: str, part: str) -> bool:
    """Whether a path is a part's or below it."""
    return name == part or name.startswith(f"{part}.")


def left_whole(net: cocktail.CocktailNet) -> list[str]:
    """What could not be followed, and why: code of the model that holds no weights of its own."""
    parts = parts_of(net)
    return [f"{k.where}: {k.reason}" for k in net.coupling.kept if not any(inside(k.where, part) for part in parts)]


def seconds_of(model: nn.Module, architecture: Architecture, images: list[Tensor], repeats: int) -> float:
    """Median time of a model's pass over images, after one that is not counted."""
    model.eval()
    device = images[0].device
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            architecture.detect(model, images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def cost_table(
    net: cocktail.CocktailNet,
    architecture: Architecture,
    images: list[Tensor],
    repeats: int = 5,
    names: Sequence[str] = (),
    slim: Slim | None = None,
) -> Table:
    """FLOPs and parameters of every network; the time here of the dense and of slim channel networks.

    Networks whose zeros stay in place run as the dense one does, and take its time.

    Args:
        net: The networks.
        architecture: Of the detector.
        images: What they are timed on.
        repeats: Passes of which the median is taken.
        names: Which networks; by default all.
        slim: Gives slim models by name; by default ``net.slim``.
    """
    table = Table("network", "parameters", "FLOPs", "of dense", "ms", "of dense")
    reports = [r for r in net.subnets() if r.name in names] if names else net.subnets()
    dense = net.subnets()[0]
    whole = seconds_of(net.model, architecture, images, repeats)
    for row in reports:
        took = None
        if row.name == "dense":
            took = whole
        elif row.flops < dense.flops:
            took = seconds_of((slim or net.slim)(row.name), architecture, images, repeats)
        table.add_row(
            row.name,
            count_text(row.params),
            flops_text(row.flops),
            f"{100 * row.flops / dense.flops:.0f} %",
            "as dense" if took is None else f"{1000 * took:.1f}",
            "" if took is None else f"{100 * took / whole:.0f} %",
        )
    return table


def exported_part(model: nn.Module) -> str:
    """What of a detector runs in other runtimes as it is: its backbone, or the whole where none is set apart (DETR)."""
    return "backbone" if hasattr(model, "backbone") else "whole"


def export_network(net: cocktail.CocktailNet, name: str, image: Tensor, path: Path, slim: Slim | None = None) -> float:
    """Write as ONNX what of a network runs in other runtimes as it is: its :func:`exported_part`.

    Args:
        net: The networks.
        name: Of one of them.
        image: ``(3, height, width)``, see :func:`export_backbone`.
        path: Of the file.
        slim: Gives slim models by name; by default ``net.slim``.

    Returns:
        The largest difference of onnxruntime's outputs from PyTorch's, as a share of the largest value; ``nan`` where
        onnxruntime is not there and a backbone was written.

    Raises:
        CocktailError: The model cannot be written whole.
    """
    if exported_part(net.model) == "backbone":
        return export_backbone((slim or net.slim)(name).cpu(), image.cpu(), path)
    return net.export(name, path).error


def export_backbone(small: nn.Module, image: Tensor, path: Path) -> float:
    """Write a detector's backbone as ONNX: the part that runs in other runtimes as it is.

    Its input is a batch of normalised images, its outputs are its maps.

    Args:
        small: The detector, as ``net.slim(name)`` gives it.
        image: ``(3, height, width)``; the file is for images of this size, batches of any.
        path: Of the file.

    Returns:
        The largest difference of onnxruntime's maps from PyTorch's, as a share of the largest value; ``nan`` where
        onnxruntime is not there.
    """
    wrapped = Maps(small.backbone).eval()
    x = torch.stack([image, image])
    with torch.no_grad():
        want = wrapped(x)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    names = [f"map{i}" for i in range(len(want))]
    program = torch.onnx.export(
        wrapped,
        (x,),
        dynamo=True,
        input_names=["images"],
        output_names=names,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.save(beside)
    beside.replace(path)
    try:
        import onnxruntime
    except ImportError:
        return math.nan
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {"images": x.numpy()})
    return max(
        float((torch.from_numpy(g) - w).abs().max() / w.abs().max().clamp(min=1e-12))
        for g, w in zip(got, want, strict=True)
    )


class Maps(nn.Module):
    """A backbone whose maps come as a tuple."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.backbone(images)
        return (found,) if isinstance(found, Tensor) else tuple(found.values())
