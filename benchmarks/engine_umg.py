"""Unified mask generation: one round of all patterns, against concatenating everything and torch.topk."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocktailsdk.graph import Coupling, Group, Producer, Weight
from cocktailsdk.masks import Mask
from cocktailsdk.patterns import NM, UMG, Channel, Pattern, Unstructured, in_order

BEFORE = (Unstructured([0.590]), Channel([0.344], round_to=1))
PATTERNS: tuple[Pattern, ...] = (Unstructured([0.672]), NM(2, 4), Channel([0.410], round_to=1))
"""Round 5 of 10, the middle of training: what it makes, and the masks that it goes on from."""


def layers(name: str) -> list[tuple[int, ...]]:
    """Shapes of a model's prunable weights: ``"resnet50"``, or linear layers of so many weights in all."""
    if name == "resnet50":
        import timm

        model = timm.create_model(name, pretrained=False)
        return [tuple(p.shape) for p in model.parameters() if p.ndim in (2, 4)]
    weights = int(float(name))
    side = min(4096, max(64, int((weights / 16) ** 0.5) // 64 * 64))
    return [(side, side)] * max(1, round(weights / side**2))


def made_of(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> UMG:
    """Random weights of these shapes, each with channels of its own, as UMG sees them."""
    generator = torch.Generator(device).manual_seed(0)
    weights, producers, groups, at = [], [], [], 0
    values: dict[str, Tensor] = {}
    for i, shape in enumerate(shapes):
        n = f"layers.{i}.weight"
        values[n] = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        weights.append(Weight(n, f"layers.{i}", "conv" if len(shape) > 2 else "linear", shape, 0, 1, 1, 1, ""))
        producers.append(Producer(n, 0, torch.arange(at, at + shape[0])))
        groups.append(Group(f"layers.{i}", at, at + shape[0], (n,), ()))
        at += shape[0]
    coupling = Coupling(
        tuple(weights), tuple(producers), tuple(groups), {}, (), (), {n: tuple(v.shape) for n, v in values.items()}
    )
    return UMG(coupling, tuple(weights), values)


def ours(umg: UMG, previous: Mapping[str, Mask], patterns: Sequence[Pattern] = PATTERNS) -> dict[str, Mask]:
    """One round's masks."""
    made: dict[str, Mask] = {}
    for pattern in in_order(patterns):
        before = previous.get(pattern.name) if pattern.nested else None
        made[pattern.name] = pattern.mask(pattern.subnets()[-1], replace(umg, previous=before, made=dict(made)))
    return made


def usual_unstructured(umg: UMG, previous: Mask, sparsity: float) -> dict[str, Tensor]:
    """As ``torch.nn.utils.prune.global_unstructured`` does it: all magnitudes in one tensor, ``topk``, a mask."""
    scores = torch.cat([umg.values[w.name].abs().reshape(-1) for w in umg.eligible])
    kept = torch.cat([previous.elements[w.name].reshape(-1) for w in umg.eligible])
    scores[~kept] = -1.0  # what is gone goes first
    mask = torch.ones_like(kept)
    mask[scores.topk(round(sparsity * scores.numel()), largest=False).indices] = False
    parts = mask.split([w.numel for w in umg.eligible])
    return {w.name: part.reshape(w.shape) for w, part in zip(umg.eligible, parts, strict=True)}


def kthvalue_unstructured(umg: UMG, previous: Mask, sparsity: float) -> dict[str, Tensor]:
    """The quicker way: a threshold by ``kthvalue``. Ties are all kept, so that the count is not exact."""
    scores = torch.cat([umg.values[w.name].abs().reshape(-1) for w in umg.eligible])
    kept = torch.cat([previous.elements[w.name].reshape(-1) for w in umg.eligible])
    scores[~kept] = -1.0
    mask = scores > scores.kthvalue(round(sparsity * scores.numel())).values
    parts = mask.split([w.numel for w in umg.eligible])
    return {w.name: part.reshape(w.shape) for w, part in zip(umg.eligible, parts, strict=True)}


def usual(umg: UMG, previous: Mapping[str, Mask]) -> dict[str, Any]:
    """All three patterns: the global ranking as above, N:M by ``topk`` over runs, channels by sums of masked rows."""
    unstructured = usual_unstructured(umg, previous["unstructured"], 0.672)
    runs: dict[str, Tensor] = {}
    for w in umg.eligible:
        whole = w.shape[1] // 4 * 4
        parts = umg.values[w.name].abs().movedim(1, -1)
        keep = torch.ones(parts.shape, dtype=torch.bool, device=parts.device)
        parts = parts[..., :whole].unflatten(-1, (-1, 4))
        two = torch.zeros(parts.shape, dtype=torch.bool, device=parts.device)
        two.scatter_(-1, parts.topk(2, dim=-1).indices, True)
        keep[..., :whole] = two.flatten(-2)
        runs[w.name] = keep.movedim(-1, 1).contiguous()
    removed = torch.zeros(umg.coupling.n_units, dtype=torch.bool)
    gone = previous["channel"].removed
    assert gone is not None
    for w, group in zip(umg.eligible, umg.coupling.groups, strict=True):
        magnitude = umg.values[w.name].abs()
        rows = 0.8 * (magnitude * unstructured[w.name]).flatten(1).sum(1)
        rows += 0.2 * (magnitude * runs[w.name]).flatten(1).sum(1)
        rows[gone[group.start : group.stop].to(rows.device)] = -1.0
        removed[group.start + rows.topk(round(0.41 * group.size), largest=False).indices.cpu()] = True
    return {"unstructured": unstructured, "n:m": runs, "channel": removed}


def timed(work: Callable[[], Any], device: str = "cpu") -> tuple[float, float, Any]:
    """Wall and processor seconds of a piece of work, and what it returns."""
    _wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    out = work()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - processor, out


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Peak:
    """The most memory in use inside :func:`peak`, above what was in use before."""

    bytes = 0


@contextmanager
def peak(device: str = "cpu") -> Iterator[Peak]:
    """Peak memory: of the process, as the kernel counts it (resident, Linux), or of the device's allocator.

    Meant for a process of its own. Memory that the C library has kept from what was freed is given back first (glibc),
    or what is taken again would not be seen.
    """
    found = Peak()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found.bytes = torch.cuda.max_memory_allocated() - before
        return
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield found
    found.bytes = _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def mask_bytes(made: Mapping[str, Mask]) -> int:
    """Bytes of masks as patterns return them, a byte an element."""
    return sum(t.nbytes for mask in made.values() for t in mask.elements.values())


def memory(size: str, dtype: str, who: str, device: str = "cpu") -> dict[str, Any]:
    """Peak memory of one round in this process, besides the masks; ``who`` is ``"ours"``, ``"usual"`` or either's
    ``"-unstructured"``."""
    only = who.endswith("unstructured")
    small = made_of([(128, 128)] * 3, getattr(torch, dtype), device)
    previous = ours(small, {}, BEFORE)
    usual(small, previous) if who.startswith("usual") else ours(small, previous)  # what is loaded at the first use
    umg = made_of(layers(size), getattr(torch, dtype), device)
    previous = ours(umg, {}, BEFORE)
    with peak(device) as found:
        wall, _, made = timed(lambda: _once(umg, previous, who, only), device)
    weights = sum(v.nbytes for v in umg.values.values())
    masks = sum(w.numel for w in umg.eligible) * (1 if only else 2)
    del made
    return {
        "weights": sum(w.numel for w in umg.eligible),
        "weight_bytes": weights,
        "seconds": wall,
        "extra": max(0, found.bytes - masks) / weights,
        "peak_rss": _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(),
    }


def _once(umg: UMG, previous: Mapping[str, Mask], who: str, only: bool) -> Any:
    if who.startswith("ours"):
        return ours(umg, previous, PATTERNS[:1] if only else PATTERNS)
    return usual_unstructured(umg, previous["unstructured"], 0.672) if only else usual(umg, previous)


def against(size: str, dtype: str, repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Times of a round and of unstructured alone, ours and the usual way by turns; masks compared."""
    umg = made_of(layers(size), getattr(torch, dtype), device)
    previous = ours(umg, {}, BEFORE)
    rows: list[dict[str, float]] = []
    total = sum(w.numel for w in umg.eligible)
    for _ in range(repeats):
        row: dict[str, float] = {}
        for name, work in {
            "ours": lambda: ours(umg, previous),
            "usual": lambda: usual(umg, previous),
            "ours_unstructured": lambda: ours(umg, previous, PATTERNS[:1]),
            "usual_unstructured": lambda: usual_unstructured(umg, previous["unstructured"], 0.672),
            "kthvalue_unstructured": lambda: kthvalue_unstructured(umg, previous["unstructured"], 0.672),
        }.items():
            row[name], row[f"{name}_processor"], made = timed(work, device)
            if name == "ours":
                mine = made
            elif name == "usual":
                _compare(umg, mine, made)
            del made
        rows.append(row)
    return {"weights": total, "dtype": dtype, "rows": rows}


def _compare(umg: UMG, mine: Mapping[str, Mask], theirs: Mapping[str, Any]) -> None:
    """The same counts, and the same masks but for ties, which topk breaks as it happens to."""
    total = sum(w.numel for w in umg.eligible)
    kept = [
        sum(int(m.count_nonzero()) for m in of.values())
        for of in (mine["unstructured"].elements, theirs["unstructured"])
    ]
    assert kept[0] == kept[1] == total - round(0.672 * total), kept
    for name in ("unstructured", "n:m"):
        off = sum(int((m != theirs[name][n].cpu()).count_nonzero()) for n, m in mine[name].elements.items())
        ties = umg.values[umg.eligible[0].name].element_size() == 2
        assert ties or off <= 1e-5 * total, (name, off)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power by which a cost grows: the slope of a straight line through logarithms."""
    pairs = [(log(s), log(c)) for s, c in zip(sizes, costs, strict=True) if c > 0]
    x = sum(a for a, _ in pairs) / len(pairs)
    y = sum(b for _, b in pairs) / len(pairs)
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a, _ in pairs)
