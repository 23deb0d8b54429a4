"""How bundles are stored: what one subnet needs is all that is read of it, fewer bits, older versions, provenance."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from test_bundle import assert_same, full_net
from test_bundle_damage import rewrite
from tiny import TinyNet, tiny_net

import cocktailsdk as cocktail
from cocktailsdk import BundleError, SubnetError
from cocktailsdk.bundle import bundle_bytes, files
from cocktailsdk.bundle.files import SUBNETS_FILE, WEIGHTS_FILE, meta_of, open_tensors, opened

PIECE = 64


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """With checksums of a few bytes each, as a large bundle has compared with its size."""
    monkeypatch.setattr(files, "PIECE", PIECE)
    full_net().save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def pieces_read_by(bundle, name):
    """The pieces of the subnets' file without which one subnet cannot be read: each is damaged in turn."""
    file = bundle / SUBNETS_FILE
    good = file.read_bytes()
    needed = []
    for at in range(0, len(good), PIECE):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            cocktail.from_pretrained(bundle, TinyNet(), subnets=[name])
        except BundleError:
            needed.append(at // PIECE)
    file.write_bytes(good)
    return needed


@pytest.mark.parametrize("name", ["2:4", "channel@0.469", "unstructured@0.672"])
def test_of_one_subnet_only_what_it_needs_is_read(bundle, name):
    meta = json.loads((bundle / "bundle.json").read_text())
    raw = (bundle / SUBNETS_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    statistics = next(e for e in meta["statistics"] if e["subnet"] == name)
    after = [e["start"] for e in meta["statistics"] if e["start"] > statistics["start"]]
    pattern = next(s["pattern"] for s in meta["subnets"] if s["name"] == name)
    own = {"n:m": "2:4.runs", "channel": "channel.units", "unstructured": "unstructured.elements"}[pattern]
    spans = [(0, 8 + length)]
    for tensor in ("units", own):
        begin, end = header[tensor]["data_offsets"]
        spans.append((8 + length + begin, 8 + length + end))
    begin, end = header["statistics.float32"]["data_offsets"]
    first = 8 + length + begin + 4 * statistics["start"]
    spans.append((first, 8 + length + begin + 4 * min([(end - begin) // 4, *after])))
    expected = {i for begin, end in spans for i in range(begin // PIECE, -(-end // PIECE))}
    assert set(pieces_read_by(bundle, name)) == expected
    assert len(expected) < len(raw) / PIECE * 0.75


def test_what_was_read_is_counted_and_nothing_is_read_twice(bundle):
    with opened(bundle) as files:
        file = open_tensors(files, meta_of(files), SUBNETS_FILE)
    header = file.bytes_read
    assert header < bundle_bytes(bundle)
    assert torch.equal(file["2:4.runs"], file["2:4.runs"])
    once = file.bytes_read
    assert 0 <= once - header - file["2:4.runs"].nbytes <= 2 * PIECE
    assert "1:2.runs" in file.unread
    assert "2:4.runs" not in file.unread


def test_some_subnets_are_what_they_are_among_all(bundle):
    whole = cocktail.from_pretrained(bundle, TinyNet())
    some = cocktail.from_pretrained(bundle, TinyNet(), subnets=["channel@0.469", "dense", "2:4"])
    assert list(some.masks) == ["2:4", "channel@0.469"]
    assert list(some.statistics) == ["dense", "2:4", "channel@0.469"]
    assert some.names == whole.names
    assert some.metrics == whole.metrics
    for name in some.masks:
        with whole.using(name), some.using(name):
            here, there = whole.model.state_dict(), some.model.state_dict()
            assert all(torch.equal(t, there[n]) for n, t in here.items())
    with pytest.raises(SubnetError, match="no mask"):
        some.switch("1:2")
    with pytest.raises(BundleError, match="load all of the bundle"):
        some.save_pretrained(bundle.parent / "again")
    with pytest.raises(SubnetError, match="no subnet '3:4'; nearest: 2:4, 1:2, 4:8"):
        cocktail.from_pretrained(bundle, TinyNet(), subnets=["3:4"])
    alone = cocktail.from_pretrained(bundle, TinyNet(), subnets=[])
    assert not alone.masks


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"])
def test_weights_in_half_the_bits_and_all_else_exact(tmp_path, dtype):
    net = full_net()
    net.save_pretrained(tmp_path / "whole")
    net.save_pretrained(tmp_path / "half", dtype=dtype)
    loaded = cocktail.from_pretrained(tmp_path / "half", TinyNet())
    stored = getattr(torch, str(dtype).removeprefix("torch."))
    for name, p in net.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), p.to(stored).to(p.dtype))
    for name, b in net.model.named_buffers():
        assert torch.equal(loaded.model.get_buffer(name), b)
    with torch.no_grad():
        for mine, theirs in zip(net.model.parameters(), loaded.model.parameters(), strict=True):
            mine.copy_(theirs)  # for the weights are all that differs
    assert_same(net, loaded)
    saved = (tmp_path / "whole" / WEIGHTS_FILE, tmp_path / "half" / WEIGHTS_FILE)
    assert saved[1].stat().st_size < 0.7 * saved[0].stat().st_size
    loaded.save_pretrained(tmp_path / "again", dtype=dtype)
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == saved[1].read_bytes()


def test_what_fewer_bits_cannot_hold_is_refused(tmp_path):
    net = tiny_net(["2:4"])
    with torch.no_grad():
        net.model.inner.weight[0, 0] = 1e5
    with pytest.raises(BundleError, match=r"inner\.weight has values up to 1e\+05, beyond float16's 65504"):
        net.save_pretrained(tmp_path / "bundle", dtype="float16")
    net.save_pretrained(tmp_path / "bundle", dtype="bfloat16")
    for bad in ("int8", torch.float64, 3):
        with pytest.raises(BundleError, match="float16 or bfloat16"):
            net.save_pretrained(tmp_path / "other", dtype=bad)
    assert not (tmp_path / "other").exists()
    half = tiny_net(["2:4"]).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half", dtype="float16")  # which has as few bits already
    loaded = cocktail.from_pretrained(tmp_path / "half", TinyNet().to(torch.bfloat16))
    assert torch.equal(loaded.model.fc.weight, half.model.fc.weight)


def as_version_1(bundle):
    """The same bundle as cocktailsdk 0.1.0 wrote it."""

    def older(meta):
        meta["format_version"] = 1
        for name in (WEIGHTS_FILE, SUBNETS_FILE):
            data = (bundle / name).read_bytes()
            meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for key in ("build", "stored", "provenance"):
            del meta[key]
        del meta["selection"]["whole"], meta["selection"]["eligible"]
        for e in meta["statistics"]:
            del e["start"]

    rewrite(bundle, older)


def test_bundles_of_the_first_version_are_read(bundle):
    whole = cocktail.from_pretrained(bundle, TinyNet())
    as_version_1(bundle)
    assert_same(whole, cocktail.from_pretrained(bundle, TinyNet()))
    some = cocktail.from_pretrained(bundle, TinyNet(), subnets=["4:8"])
    assert list(some.masks) == ["4:8"]
    assert list(some.statistics) == ["dense", "4:8"]
    rewrite(bundle, lambda meta: meta["selection"].update(target="(a+)+$"))
    with pytest.raises(BundleError, match="selects modules by an expression"):
        cocktail.from_pretrained(bundle, TinyNet())


def test_a_selection_comes_back_and_its_expression_is_not_run(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    net = cocktail.sparsify(TinyNet(), ["unstructured@0.5", "channel@0.5"], x, None, "widen|inner", ["fc"])
    net.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", TinyNet())
    assert loaded.selection == net.selection
    assert loaded.eligible == net.eligible
    assert loaded.slim("channel@0.5")(x).shape == (2, 5)
    rewrite(tmp_path / "bundle", lambda meta: meta["selection"].update(target="(a|a?)+" * 30 + "$"))
    assert cocktail.from_pretrained(tmp_path / "bundle", TinyNet()).eligible == net.eligible


def test_provenance_is_kept_with_the_versions_it_was_made_with(tmp_path):
    net = tiny_net(["2:4"])
    net.provenance["data"] = {"name": "digits", "examples": 1438}
    net.save_pretrained(tmp_path / "a")
    loaded = cocktail.from_pretrained(tmp_path / "a", TinyNet())
    assert loaded.provenance["data"] == {"name": "digits", "examples": 1438}
    assert loaded.provenance["versions"]["cocktailsdk"] == cocktail.__version__
    assert loaded.provenance["versions"]["torch"] == torch.__version__
    loaded.provenance["versions"]["torch"] = "1.0"
    loaded.save_pretrained(tmp_path / "b")
    assert cocktail.from_pretrained(tmp_path / "b", TinyNet()).provenance["versions"]["torch"] == "1.0"
    for bad in ({1: "a"}, {"a": {1, 2}}, {"a": float("nan")}):
        net.provenance = bad
        with pytest.raises(BundleError, match=r"net\.provenance"):
            net.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def example_of(shape):
    return lambda m: m["example"]["tuple"][0]["tuple"][0].__setitem__("shape", shape)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (example_of([1 << 13, 1 << 13]), "too large to make"),
        (example_of([-1, 3]), "an example's shape"),
        (lambda m: m["patterns"][0]["config"].update(rounds=10**9), r"rounds must be a whole number in 1 … 1000"),
        (lambda m: m["subnets"].extend([m["subnets"][1]] * 5000), "at most 4096"),
        (lambda m: m["coupling"]["units"].extend([[0, 24]] * 180_000), "coupling has more than 21600 entries"),
        (lambda m: m["coupling"]["units"].extend([[0, 500]] * 10_000), r"vectors of units have \d+ entries"),
        (lambda m: m["files"][SUBNETS_FILE].update(piece=1), "checksums of subnets.safetensors"),
        (lambda m: m["files"][WEIGHTS_FILE].update(sha256=["0"]), "a list of"),
        (lambda m: m["coupling"]["weights"][0].__setitem__(0, -1), "the place of a tensor"),
        (lambda m: m["coupling"]["weights"][0].__setitem__(3, True), "an axis of"),
        (lambda m: m["subnets"][3].update(sparsity=0.5), "something else than its pattern does"),
        (lambda m: m["subnets"][3].update(metric="1e3"), "for a metric"),
        (lambda m: m["masks"].append(m["masks"][0]), "twice"),
        (lambda m: m["statistics"][2].update(start=0), "do not begin where those before it end"),
        (lambda m: m.update(extra=1), "has 'extra'"),
        (lambda m: m.update(stored="float16"), "float32"),
        (lambda m: m["model"]["tensors"].reverse(), "other names"),
    ],
)
def test_limits_and_values_are_checked_behind_fitting_checksums(bundle, change, said):
    rewrite(bundle, change)
    with pytest.raises(BundleError, match=said):
        cocktail.from_pretrained(bundle, TinyNet())


def replaced(bundle, name, data):
    """Another tensor file with fitting checksums."""
    (bundle / name).write_bytes(data)
    rewrite(bundle, lambda meta: meta["files"].update({name: files._sums(bundle / name)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["units"].update(shape=[2**62, 4]), "does not take"),
        (lambda h: h["units"].update(dtype="F4"), "not known"),
        (lambda h: h["units"].update(data_offsets=[0, 2**60], shape=[2**60]), "ends past its end|does not take"),
        (lambda h: h.update(more=h["units"]), "does not begin where"),
        (lambda h: h.pop("1:2.runs"), "does not begin where|belong to no tensor"),
        (lambda h: h["2:4.runs"].update(shape=[1] * 40 + h["2:4.runs"]["shape"]), "40|41 dimensions"),
    ],
)
def test_headers_are_checked_behind_fitting_checksums(bundle, change, said):
    raw = (bundle / SUBNETS_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    replaced(bundle, SUBNETS_FILE, len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(BundleError, match=said):
        cocktail.from_pretrained(bundle, TinyNet())
    replaced(bundle, SUBNETS_FILE, (2**63).to_bytes(8, "little") + raw[8:])
    with pytest.raises(BundleError, match="says that its header has 9223372036854775808 bytes"):
        cocktail.from_pretrained(bundle, TinyNet())


def test_tensors_that_belong_to_no_subnet_are_refused(bundle):
    other = bundle.parent / "other"
    shutil.copytree(bundle, other)
    rewrite(other, lambda meta: meta["statistics"].clear())
    with pytest.raises(BundleError, match=r"'statistics\.float32', which belongs to no subnet"):
        cocktail.from_pretrained(other, TinyNet())
