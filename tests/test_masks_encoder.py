"""Masks as packed tensors and entries: bits, ranks, levels, and masks that build on others."""

from __future__ import annotations

import json
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_net as net_by_hand
from torch import nn
from training_tiny import tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import BundleError, Mask, Unstructured
from cocktailsdk.masks import encoder
from cocktailsdk.masks.bits import from_levels, from_ranks, level_bits, pack, rank_bits, to_levels, to_ranks, unpack
from cocktailsdk.patterns import rounds_of
from cocktailsdk.training.state.compatibility import Foreign, check_masks
from cocktailsdk.training.state.encoding import decode_masks, encode_masks


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, mask in expected.items():
        assert found[name].elements.keys() == mask.elements.keys()
        assert all(torch.equal(keep, mask.elements[key]) for key, keep in found[name].elements.items())
        assert (found[name].removed is None) == (mask.removed is None)
        assert mask.removed is None or torch.equal(found[name].removed, mask.removed)


def rounds_masks(net):
    """The masks that are new in each round, and those of the rounds before."""
    known = {}
    for row in rounds_of(net.patterns):
        new = {s.name: net.masks[s.name] for p in net.patterns for s in row[p.name] if s.name not in known}
        yield new, known
        known = {**known, **new}


def bytes_in_bundle(net):
    """What a bundle takes for its masks: their tensors, their lines in the header, and their entries."""
    entries, tensors = encoder.encode_masks(net.patterns, net.masks, net.coupling, net.eligible)
    end = sum(t.numel() for t in tensors.values())
    header = {n: {"dtype": "U8", "shape": [t.numel()], "data_offsets": [end, end]} for n, t in tensors.items()}
    return end + len(json.dumps(header, separators=(",", ":"))) + len(json.dumps(entries, separators=(",", ":")))


def bytes_in_rounds(net):
    """What a run's files of masks take."""
    sizes = [encode_masks(net, new, base)["encoded"].numel() for new, base in rounds_masks(net) if new]
    header = len('{"encoded":{"dtype":"U8","shape":[1234567],"data_offsets":[0,1234567]}}')
    return sum(sizes) + len(sizes) * (8 + header)


@pytest.fixture(scope="module")
def wide():
    """Of a million and a half weights, and 23 networks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip
    return cocktail.sparsify(model, example_inputs=torch.zeros(2, 64))


def test_a_runs_masks_take_at_most_the_bytes_of_the_bundles(wide):
    assert len(wide.names) == 24
    assert bytes_in_rounds(wide) <= bytes_in_bundle(wide)


def test_of_a_tiny_net_headers_and_descriptions_add_less_than_128_bytes_a_file(tmp_path):
    net = tiny_trainer(out_dir=tmp_path).fit()
    files = list((tmp_path / "state").glob("masks-*.safetensors"))
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) <= 1.2 * bytes_in_bundle(net) + 128 * len(files)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("rounds", [1, 3, 4, 15, 16])
def test_whatever_the_levels_a_runs_masks_take_at_most_1_2_times_the_bytes_of_the_bundles(rate, rounds):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    net = cocktail.sparsify(model, [Unstructured(rounds=rounds, rate=rate)], example_inputs=torch.zeros(2, 8))
    assert bytes_in_rounds(net) <= 1.2 * bytes_in_bundle(net)


PATTERNS = [
    ("unstructured", "n:m", "channel"),
    ("block", "vector@0.5", "channel@0.5+2:4"),
    (Unstructured(sparsities=[0.1, 0.2, 0.3]), "transposable2:4", "channel@0.5+unstructured"),
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_masks_of_rounds_that_build_on_those_before_come_back(patterns):
    net = net_by_hand(patterns)
    built = 0
    for new, base in rounds_masks(net):
        entries, tensors = encoder.encode_masks(net.patterns, new, net.coupling, net.eligible, base)
        built += sum("within" in e for e in entries)
        assert_same(decode_masks(encode_masks(net, new, base), net, base), new)
        if any("within" in e for e in entries):
            with pytest.raises(BundleError, match="has 'within'"):
                encoder.decode_masks(entries, tensors.__getitem__, list(new), net.coupling, net.eligible)
    assert built >= 2


@given(st.integers(0, 99), st.booleans())
def test_a_mask_that_is_not_nested_in_the_one_before_comes_back(seed, units):
    net = net_by_hand(["unstructured", "channel"])
    generator = torch.Generator().manual_seed(seed)
    names = [n for n in net.names if n.startswith("channel" if units else "unstructured")][:3]

    def random_mask():
        if units:
            return Mask(removed=torch.rand(net.coupling.n_units, generator=generator) < 0.5)
        return Mask({w.name: torch.rand(w.shape, generator=generator) < 0.5 for w in net.eligible})

    first, *others = ({n: random_mask()} for n in names)
    others = {**others[0], **others[1]}
    assert_same(decode_masks(encode_masks(net, others, first), net, first), others)


def test_masks_of_a_run_that_are_something_else_are_refused_as_foreign():
    net = tiny_net()
    names = [n for n in net.names if n.startswith("unstructured")]
    base = {names[0]: net.masks[names[0]]}
    good = encode_masks(net, {names[1]: net.masks[names[1]]}, base)
    check_masks(good, net, base)
    data = zlib.decompress(good["encoded"].numpy().tobytes())
    head, _, packed = data.partition(b"\n")
    said = json.loads(head)
    (entry,) = said["entries"]
    for changed in (
        b"",
        head,
        data[:-1],
        data + b"x",
        b"[]\n" + packed,
        b"{\n" + packed,
        encoded({**said, "sizes": []}, packed),
        encoded({**said, "sizes": [-1]}, packed),
        encoded({**said, "entries": [{**entry, "tensor": 3}]}, packed),
        encoded({**said, "entries": [{**entry, "levels": ["nobody"]}]}, packed),
        encoded({**said, "entries": [{**entry, "within": names[2]}]}, packed),
        encoded({**said, "entries": [{**entry, "within": 3}]}, packed),
        encoded({**said, "entries": [{**entry, "units": True}]}, packed),
        encoded({**said, "entries": [{k: v for k, v in entry.items() if k != "within"}]}, packed),
    ):
        tensor = torch.tensor(list(zlib.compress(changed)), dtype=torch.uint8)
        with pytest.raises(Foreign, match="cannot be decoded"):
            check_masks({"encoded": tensor}, net, base)
    for tensors in (
        {"encoded": good["encoded"][:-4]},
        {"encoded": torch.cat([good["encoded"], good["encoded"]])},
        {"encoded": good["encoded"].float()},
        {"other": good["encoded"]},
        {"encoded": torch.tensor(list(zlib.compress(b"0" * 10**8)), dtype=torch.uint8)},
    ):
        with pytest.raises(Foreign, match="cannot be decoded"):
            check_masks(tensors, net, base)
    with pytest.raises(Foreign, match="cannot be decoded"):
        check_masks(good, net)


def encoded(said, packed):
    return json.dumps(said).encode() + b"\n" + packed


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=100))
def test_packing_whole_numbers_and_back(bits, numbers):
    values = torch.tensor([n % (1 << bits) for n in numbers], dtype=torch.int32)
    packed = pack(values, bits)
    assert packed.numel() == (len(numbers) * bits + 7) // 8
    assert unpack(packed, bits, len(numbers)).tolist() == values.tolist()


@given(st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))), st.integers(0, 99))
def test_packing_runs_and_back(pair, seed):
    n, m = pair
    scores = torch.rand(17, m, generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros(17, m, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :n], True)
    ranks = to_ranks(keep, n)
    assert torch.equal(from_ranks(unpack(pack(ranks, rank_bits(n, m)), rank_bits(n, m), 17), n, m), keep)
    keep[3] = True
    assert to_ranks(keep, n) is None


def test_bits_are_few():
    assert [rank_bits(1, 2), rank_bits(2, 4), rank_bits(4, 8)] == [1, 3, 7]
    assert [level_bits(n) for n in (1, 2, 3, 4, 15, 16, 255, 256)] == [1, 2, 2, 4, 4, 8, 8, None]


@given(st.integers(1, 12), st.integers(0, 99))
def test_packing_nested_masks_and_back(count, seed):
    level = torch.randint(0, count + 1, (50,), generator=torch.Generator().manual_seed(seed))
    kept = [(level == 0) | (level > k) for k in range(1, count + 1)]
    levels = to_levels(kept)
    assert levels.tolist() == level.tolist()
    again = from_levels(unpack(pack(levels, 4), 4, 50), count)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    assert to_levels([torch.tensor([False, True]), torch.tensor([True, True])]) is None
