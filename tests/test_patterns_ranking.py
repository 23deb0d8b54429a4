"""Ranking over many tensors: exact to the last weight and position, in few bytes, whole or in shards."""

from __future__ import annotations

import itertools
import json
import threading
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_net
from torch import Tensor

from cocktailsdk import NM, Channel, PatternError
from cocktailsdk.graph import Weight
from cocktailsdk.patterns.bracketing import WORTH_A_SAMPLE, drop_between
from cocktailsdk.patterns.magnitudes import piece_size, row_sums
from cocktailsdk.patterns.nm import nm_mask
from cocktailsdk.patterns.ranking import Shards, drop_smallest, histogram

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Few magnitudes, so that most examples are full of ties: zeros of both signs, subnormals, neighbours, infinities.
MAGNITUDES = [0.0, -0.0, 0.5, -0.5, 1.0, 1.0000001, 1.0000000000000002, 2.0**-149, -(2.0**-24), 2.0**-1074, -3.0]
MAGNITUDES += [float("inf"), -float("inf"), 65504.0]


def taken_by_sorting(values: Mapping[str, Tensor], keep: Mapping[str, Tensor], count: int) -> Tensor:
    """What stays of everything, flat, found by a stable sort of all of it."""
    flat = torch.cat([v.reshape(-1).double() for v in values.values()]).abs()
    kept = torch.cat([keep.get(n, torch.ones(v.shape, dtype=torch.bool)).reshape(-1) for n, v in values.items()])
    order = flat.argsort(stable=True)
    left = kept.clone()
    left[order[kept[order]][:count]] = False
    return left


def flat(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([m.reshape(-1) for m in masks.values()])


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.sampled_from(MAGNITUDES), max_size=20)), min_size=1, max_size=4
    ),
    st.data(),
)
def test_of_any_dtypes_together_what_a_stable_sort_would_take_goes(rows, data):
    values = {f"w{i}": torch.tensor(r, dtype=torch.float64).to(dtype) for i, (dtype, r) in enumerate(rows)}
    draw = data.draw
    keep = {n: torch.tensor(draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v))), dtype=torch.bool)
            for n, v in values.items() if draw(st.booleans())}  # fmt: skip
    kept = sum(int(keep[n].sum()) if n in keep else v.numel() for n, v in values.items())
    count = draw(st.integers(0, kept))
    assert torch.equal(flat(drop_smallest(values, keep, count)), taken_by_sorting(values, keep, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", ["none", "some", "all"])
def test_over_pieces_and_layouts_of_memory_nothing_changes(dtype, ties):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "a": (64, 3, 3, 3),
        "b": (piece_size(torch.device("cpu")) + 9,),
        "c": (64, 600, 3, 3),
        "d": (7,),
        "e": (0,),
    }
    values = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    if ties != "none":
        values = {n: (v * 4).round() / 4 if ties == "some" else torch.full_like(v, -0.25) for n, v in values.items()}
    values = {n: v.to(dtype) for n, v in values.items()}
    values["c"] = values["c"].contiguous(memory_format=torch.channels_last)
    values["f"] = torch.randn(500, 700, generator=generator).to(dtype).T
    keep = {n: torch.rand(values[n].shape, generator=generator) < 0.7 for n in ("b", "c", "f")}
    left = drop_smallest(values, keep, 300_000)
    assert torch.equal(flat(left), taken_by_sorting(values, keep, 300_000))
    again = drop_smallest(values, left, 100_000)
    assert torch.equal(flat(again), taken_by_sorting(values, left, 100_000))
    assert not (flat(again) & ~flat(left)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_a_sample_guesses_the_threshold_and_where_it_cannot_nothing_changes(dtype):
    generator = torch.Generator().manual_seed(1)
    smooth = {
        n: torch.randn(s, generator=generator).to(dtype) for n, s in {"a": (700, 900), "b": (WORTH_A_SAMPLE,)}.items()
    }
    tied = {n: (v * 3).round() for n, v in smooth.items()}
    striped = {n: v.abs() + torch.arange(v.shape[-1], dtype=dtype) for n, v in smooth.items()}
    heavy = {n: torch.where(v > 0, v, 0.25) for n, v in smooth.items()}
    for values in (smooth, tied, striped, heavy):
        every = values is smooth and dtype == torch.float32
        keep = {"a": torch.rand(700, 900, generator=generator) < 0.5}
        kept = int(keep["a"].sum()) + WORTH_A_SAMPLE
        for count in (1, kept // 3, kept - 1, kept) if every else (kept // 3,):
            assert torch.equal(flat(drop_smallest(values, keep, count)), taken_by_sorting(values, keep, count))
    one_pass = [drop_between(v, {}, dtype, 500_000, WORTH_A_SAMPLE + 630_000) is not None for v in (smooth, tied)]
    assert one_pass == [True, False]  # both ways were taken
    smooth["b"][-1] = float("nan")
    with pytest.raises(PatternError, match="1 of the weights in 'b' is NaN"):
        drop_smallest(smooth, {}, 500_000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_same_goes(dtype):
    values = {n: (torch.randn(s) * 8).round().to(dtype) for n, s in {"a": (300, 1000), "b": (3, 5)}.items()}
    keep = {"a": torch.rand(300, 1000) < 0.5}
    there = drop_smallest({n: v.cuda() for n, v in values.items()}, keep, 40_000)
    here = drop_smallest(values, keep, 40_000)
    assert all(m.is_cuda and torch.equal(m.cpu(), here[n]) for n, m in there.items())
    weight = Weight("a", "a", "linear", (300, 1000), 0, 1, 1, 1, "")
    assert torch.equal(nm_mask(weight, values["a"].cuda(), 2, 4).cpu(), nm_mask(weight, values["a"], 2, 4))


class Threads:
    """Ranks that are threads of this process, and their all-reduce."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._given: list[Tensor] = [torch.empty(0)] * ranks
        self.largest = 0

    def shards(self, rank: int) -> Shards:
        def total(counts: Tensor) -> Tensor:
            assert counts.dtype == torch.int64 and counts.device.type == "cpu"
            self.largest = max(self.largest, counts.numel())
            self._given[rank] = counts
            self._barrier.wait()
            out = torch.stack(self._given).sum(0)
            self._barrier.wait()
            return out

        return Shards(total, rank, self.ranks)

    def run(self, values: Sequence[Mapping[str, Tensor]], keep: Sequence[Mapping[str, Tensor]], count: int) -> list:
        out: list = [None] * self.ranks

        def work(rank: int) -> None:
            try:
                out[rank] = drop_smallest(values[rank], keep[rank], count, self.shards(rank))
            except PatternError as e:
                out[rank] = e

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.ranks)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return out


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 5), st.floats(0, 1), st.sampled_from([1, 4, 1000]), st.sampled_from(DTYPES))
def test_ranks_that_hold_slices_find_what_one_process_finds(ranks, seed, share, levels, dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 3, 2), "b": (1, 9), "c": (16, 4)}
    values = {n: ((torch.randn(s, generator=generator) * levels).round() / levels).to(dtype) for n, s in shapes.items()}
    keep = {n: torch.rand(values[n].shape, generator=generator) < 0.8 for n in ("a", "c")}
    kept = sum(int(keep[n].sum()) if n in keep else v.numel() for n, v in values.items())
    count = round(share * kept)

    def sliced(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """As FSDP cuts them: equal numbers of rows, fewer or none for the last ranks."""
        cut = {n: -(-t.shape[0] // ranks) for n, t in tensors.items()}
        return {n: t[rank * cut[n] : (rank + 1) * cut[n]] for n, t in tensors.items()}

    threads = Threads(ranks)
    out = threads.run([sliced(values, r) for r in range(ranks)], [sliced(keep, r) for r in range(ranks)], count)
    whole = drop_smallest(values, keep, count)
    assert all(torch.equal(torch.cat([masks[n] for masks in out]), whole[n]) for n in values)
    assert threads.largest <= 1 << 16  # never the scores


def test_histograms_of_slices_add_up_and_count_all_that_is_kept():
    values, keep = torch.randn(1000), torch.rand(1000) < 0.5
    whole = histogram({"w": values}, {"w": keep}, torch.float32)
    parts = [
        histogram({"w": v}, {"w": k}, torch.float32) for v, k in zip(values.split(300), keep.split(300), strict=True)
    ]
    assert torch.equal(sum(parts), whole)
    assert int(whole.sum()) == int(keep.sum())
    first = int(whole.argmax())
    inside = histogram({"w": values}, {"w": keep}, torch.float32, 1, first)
    assert int(inside.sum()) == int(whole[first])


def test_nan_is_refused_by_name_and_count_on_every_rank():
    for dtype in DTYPES:
        values = {"good": torch.randn(50).to(dtype), "bad": torch.randn(50).to(dtype)}
        values["bad"][[3, 7]] = float("nan")
        with pytest.raises(PatternError, match="2 of the weights in 'bad' are NaN"):
            drop_smallest(values, {}, 10)
        assert drop_smallest(values, {"bad": ~values["bad"].isnan()}, 98)  # what is gone already is not ranked
    bits = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # NaN by its last bit alone
    with pytest.raises(PatternError, match="1 of the weights in 'w' is NaN"):
        drop_smallest({"w": torch.cat([bits, torch.ones(3)])}, {}, 1)
    out = Threads(2).run([{"w": bits}, {"w": torch.ones(1)}], [{}, {}], 1)
    assert all(isinstance(e, PatternError) for e in out)


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(PatternError, match=r"'w' is torch\.int64"):
        drop_smallest({"w": torch.arange(4)}, {}, 1)
    with pytest.raises(PatternError, match="cannot drop 5 of 3"):
        drop_smallest({"w": torch.randn(4)}, {"w": torch.tensor([True, True, True, False])}, 5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
def test_patterns_refuse_nan_naming_the_weight(pattern):
    net = tiny_net(["unstructured", NM(2, 4), Channel()])
    with torch.no_grad():
        net.model.widen.weight[0, 0, 0, 0] = float("nan")
    name = next(n for n in net.names if n.startswith(pattern))
    with pytest.raises(PatternError, match=r"1 of the weights in 'widen\.weight' is NaN"):
        net.make_masks(name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (3, 40)])
def test_runs_keep_the_largest_ties_by_position_in_any_layout(dtype, n, m):
    generator = torch.Generator().manual_seed(m)
    for shape, axis in (((6, 90, 3, 3), 1), ((100, 7), 0), ((3, 5, 120), 2)):
        weight = Weight("w", "w", "linear", shape, 0 if axis else 1, axis, 1, 1, "")
        value = torch.tensor(MAGNITUDES).to(dtype)[torch.randint(len(MAGNITUDES), shape, generator=generator)]
        if len(shape) == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        lines = value.movedim(axis, -1).double().abs()
        runs = lines[..., : shape[axis] // m * m].unflatten(-1, (-1, m))
        best = runs.argsort(dim=-1, descending=True, stable=True)[..., :n]
        expected = torch.ones(lines.shape, dtype=torch.bool)
        expected[..., : shape[axis] // m * m] = torch.zeros(runs.shape).scatter(-1, best, 1.0).bool().flatten(-2)
        assert torch.equal(nm_mask(weight, value, n, m).movedim(axis, -1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((700, 500), 0), ((700, 500), 1), ((2, 300_000), 0), ((6, 5, 3, 3), 1), ((9,), 0)]
)
def test_rows_are_summed_under_their_masks(dtype, shape, axis):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=generator).to(dtype)
    masks = [torch.rand(shape, generator=generator) < p for p in (0.3, 0.9)]
    dims = [d for d in range(value.ndim) if d != axis]
    sums = [(value.double().abs() * m) for m in masks]
    sums = [s.sum(dims) if dims else s for s in sums]
    found = row_sums("w", value, axis, [(0.75, {"w": masks[0]}), (0.25, {"w": masks[1]}), (2.0, {})])
    whole = value.double().abs().sum(dims) if dims else value.double().abs()
    torch.testing.assert_close(
        found, 0.75 * sums[0] + 0.25 * sums[1] + 2.0 * whole, rtol=1e-12 if dtype == torch.float64 else 3e-7, atol=0
    )


def counted(values: Mapping[str, Tensor], trace: Path) -> tuple[int, int, int]:
    """Bytes of all masks made of ``values``, the most that torch held at a time for them, and that NumPy did."""
    weights = {n: Weight(n, n, "linear", tuple(v.shape), 0, 1, 1, 1, "") for n, v in values.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        tracemalloc.start()
        try:
            first = drop_smallest(values, {}, 100)
            second = drop_smallest(values, first, sum(v.numel() for v in values.values()) // 3)
            runs = {n: nm_mask(w, values[n], 2, 4) for n, w in weights.items()}
            for n, v in values.items():
                row_sums(n, v, 0, [(0.8, second), (0.2, runs)])
            by_numpy = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    profiled.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    taken = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    live = list(itertools.accumulate(size for _, size in taken))
    masks = sum(m.nbytes for part in (first, second, runs) for m in part.values())
    assert live[-1] >= masks  # everything that torch took was counted
    return masks, max(live), by_numpy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_besides_the_masks_it_takes_less_than_a_fifth_of_the_weights(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = {f"w{i}": torch.randn(2048, 2048, generator=generator).to(dtype) for i in range(6)}
    counted({"w": torch.randn(64, 64, generator=generator).to(dtype)}, tmp_path / "first")
    masks, by_torch, by_numpy = counted(values, tmp_path / "trace.json")
    assert by_torch - masks + by_numpy <= 0.2 * sum(v.nbytes for v in values.values())
