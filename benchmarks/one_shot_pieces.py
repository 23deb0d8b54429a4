"""The pieces that the one-shot comparison is made of, each a few runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from one_shot_images import Lite0, ResNet
from one_shot_runs import Dense, Ours, Reference, Run
from one_shot_tasks import Size, Task
from one_shot_text import MiniLM, SmolLM2, Stories

TASKS: dict[str, Task] = {task.name: task for task in (SmolLM2(), Stories(), MiniLM(), ResNet(20), ResNet(56), Lite0())}

USUAL, LARGE = SmolLM2.sizes

ELEMENTS = ("unstructured@0.5", "2:4")
"""Of SmolLM2, as of most papers."""

UNITS = ("mlp@0.1", "mlp@0.2", "heads@0.111", "channel@0.1")
BLOCKS = ("layers@0.1", "depth@0.1")

TWELVE = (
    "unstructured@0.3", "unstructured@0.5", "unstructured@0.6", "2:4", "4:8",
    "mlp@0.1", "mlp@0.2", "heads@0.111", "heads@0.222", "channel@0.1", "layers@0.1", "depth@0.1",
)  # fmt: skip

IMAGES = ("unstructured@0.5", "unstructured@0.7", "unstructured@0.9", "2:4", "channel@0.1", "channel@0.3")
TEXTS = ("unstructured@0.5", "unstructured@0.7", "2:4", "mlp@0.1", "mlp@0.3", "heads@0.25")
SUBNETS = {"stories260k": TEXTS, "minilm": TEXTS, "resnet20": IMAGES, "resnet56": IMAGES, "effnet": IMAGES}
"""The subnetworks of the smaller tasks."""

SCORES = ("magnitude", "wanda", "sparsegpt", "taylor", "fisher")
"""Of elements; units get theirs from these."""

SEQUENTIAL = ("wanda", "sparsegpt")
"""Scores whose inputs may be those that pruned blocks give; each subnetwork then has passes of its own."""


@dataclass(frozen=True)
class Piece:
    """A part of the comparison that is run by name.

    Attributes:
        task: Its task.
        title: In words.
        runs: Its runs, in order.
    """

    task: Task
    title: str
    runs: tuple[Run, ...]


def _references(size: Size) -> Iterator[Run]:
    for of in ("wanda", "sparsegpt"):
        yield from (Reference(of=of, subnets=(subnet,), size=size) for subnet in ELEMENTS)
    yield from (Reference(of="activation", subnets=(subnet,), size=size) for subnet in ("mlp@0.1", "mlp@0.2"))
    yield from (Reference(of=of, subnets=("layers@0.1",), size=size) for of in ("cosine", "loss"))


def _each(runs: Sequence[Ours]) -> tuple[Run, ...]:
    """The runs, each subnetwork a run of its own: an interruption loses less, and CPU seconds are its own."""
    return tuple(replace(run, subnets=(subnet,)) for run in runs for subnet in run.subnets)


def _smollm2() -> Iterator[tuple[str, str, Sequence[Run]]]:
    yield "dense", "the model as it is", (Dense(),)
    for name, size in (("", USUAL), ("-large", LARGE)):
        yield f"reference{name}", f"plain versions of published methods, {size}", tuple(_references(size))
    yield "magnitude", "magnitudes, no data", (Ours(subnets=ELEMENTS), Ours(subnets=UNITS), Ours(subnets=BLOCKS[1:]))
    for name, size in (("", USUAL), ("-large", LARGE)):
        scored = [Ours(subnets=ELEMENTS, score=s, size=size) for s in SCORES[1:]]
        yield f"scores{name}", f"elements by score, {size}", scored
        units = [Ours(subnets=UNITS, score=s, size=size) for s in ("activation", "wanda", "taylor")]
        yield f"units{name}", f"units by score, {size}", units
        layers = BLOCKS[:1]  # cosine compares what goes into a layer with what comes out; branches have neither
        blocks = [Ours(subnets=s, score=n, size=size) for n, s in (("cosine", layers), ("greedy", BLOCKS))]
        yield f"blocks{name}", f"blocks by score, {size}", blocks
        flows = [Ours(subnets=ELEMENTS, score=s, size=size, sequential=True) for s in SEQUENTIAL]
        yield f"sequential{name}", f"elements by score, block by block, {size}", _each(flows)
        repaired = [
            *(replace(run, repaired=True) for run in (*scored[:2], *flows)),
            Ours(subnets=UNITS, score="activation", size=size, repaired=True),
            Ours(subnets=BLOCKS[:1], score="greedy", size=size, repaired=True),
        ]
        yield f"reconstructed{name}", f"scored and reconstructed, {size}", _each(repaired)
    twelve = Ours(subnets=TWELVE, score=(("*", "wanda"), ("mlp", "activation"), ("layers", "cosine")), size=USUAL)
    yield "twelve", "twelve subnetworks of one net at once", (twelve,)


def _other(task: Task) -> Iterator[tuple[str, str, Sequence[Run]]]:
    subnets, size = SUBNETS[task.name], task.sizes[0]
    units = tuple(s for s in subnets if s.startswith(("channel", "mlp", "heads")))
    parts = tuple(s for s in subnets if s not in units), units
    yield "dense", "the model as it is", (Dense(),)
    for score in SCORES:
        needs = None if score == "magnitude" else size
        yield score, f"by {score}", [Ours(subnets=part, score=score, size=needs) for part in parts]
    yield "activation", "units by activation", (Ours(subnets=units, score="activation", size=size),)
    repaired = [Ours(subnets=subnets, score=score, size=size, repaired=True) for score in ("wanda", "sparsegpt")]
    repaired += [Ours(subnets=units, score="activation", size=size, repaired=True)]
    yield "reconstructed", "scored and reconstructed", _each(repaired)


def pieces() -> dict[str, Piece]:
    """All pieces by name, in the order in which they are run."""
    return {
        f"{task.name}:{name}": Piece(task, title, tuple(runs))
        for task in TASKS.values()
        for name, title, runs in (_smollm2() if task.name == "smollm2" else _other(task))
    }
