"""Private tensors in bundles: exact, trimmed, read one by one, and refused by releases that do not know them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pattern_cases import ConvNet, sparse
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import cocktailsdk as cocktail
from cocktailsdk import BundleError
from cocktailsdk.bundle import files
from cocktailsdk.bundle.private_entries import private_bytes
from cocktailsdk.cli.main import app

PATTERNS = ["unstructured@0.5", "2:4", "channel@0.5", "channel@0.5+2:4"]
HEAD = ("fc.weight", "fc.bias")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def net_with_private(names=PATTERNS, parameters=(*HEAD, "block2.conv1.weight", "bn.weight")):
    """Every subnetwork owns a head, a convolution and a norm's scale."""
    net = sparse("convolutions", PATTERNS)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        own = {n: torch.randn(net.coupling.shapes[n], generator=generator) for n in parameters}
        net.set_private(name, own)
    return net


def meta_of(folder):
    return json.loads((folder / "bundle.json").read_bytes())


def rewrite(folder, meta=None, tensors=None):
    """Put other content into a bundle, with checksums that are right."""
    meta = meta_of(folder) if meta is None else meta
    file = folder / "subnets.safetensors"
    if tensors is not None:
        save_file(tensors, file)
        meta["files"][file.name] = files._sums(file)
    meta.pop("checksum")
    body = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()[1:]
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / "bundle.json").write_bytes(b'{"checksum":"' + digest + b'",' + body)


def assert_same_private(a, b):
    assert a.private.keys() == b.private.keys()
    for name, own in a.private.items():
        assert list(own) == list(b.private[name])
        for n, t in own.items():
            assert torch.equal(t, b.private[name][n]) and t.dtype == b.private[name][n].dtype, (name, n)


def test_a_bundle_gives_private_tensors_back_bit_for_bit(tmp_path):
    net = net_with_private()
    net.save_pretrained(tmp_path / "a")
    loaded = cocktail.from_pretrained(tmp_path / "a", type(net.model)())
    assert_same_private(net, loaded)
    for name in net.names:
        net.switch(name), loaded.switch(name)
        now = net.model.state_dict()
        assert all(torch.equal(t, now[n]) for n, t in loaded.model.state_dict().items())
    loaded.save_pretrained(tmp_path / "b")  # with a subnetwork active
    for file in ("subnets.safetensors", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, b = meta_of(tmp_path / "a"), meta_of(tmp_path / "b")
    assert a["private"] == b["private"] and len(a["private"]) == len(PATTERNS)


def test_only_a_bundle_with_private_tensors_has_the_new_version(tmp_path):
    net = net_with_private(["2:4"])
    net.save_pretrained(tmp_path / "with")
    net.set_private("2:4", {})
    net.save_pretrained(tmp_path / "without")
    sparse("convolutions", PATTERNS).save_pretrained(tmp_path / "never")
    assert (meta_of(tmp_path / "with")["format_version"], meta_of(tmp_path / "without")["format_version"]) == (3, 2)
    assert "private" not in meta_of(tmp_path / "without")
    for file in ("bundle.json", "subnets.safetensors", "weights.safetensors"):
        assert (tmp_path / "without" / file).read_bytes() == (tmp_path / "never" / file).read_bytes()


def test_masked_elements_take_no_bytes_and_reports_say_how_many_there_are(tmp_path):
    net = net_with_private()
    net.save_pretrained(tmp_path / "bundle")
    meta = meta_of(tmp_path / "bundle")
    bytes_of = private_bytes(meta)
    assert bytes_of == {r.name: r.private_bytes for r in net.subnets() if r.private_bytes}
    stored = load_file(tmp_path / "bundle" / "subnets.safetensors")["private.float32"]
    assert 4 * stored.numel() == sum(bytes_of.values())
    convolution = net.coupling.shapes["block2.conv1.weight"]
    assert bytes_of["2:4"] == 4 * (torch.Size(convolution).numel() // 2 + 5 * 24 + 5 + 16)
    assert bytes_of["channel@0.5+2:4"] < bytes_of["channel@0.5"] < bytes_of["2:4"]


def test_of_a_part_only_its_private_tensors_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 64)  # so that a bundle this small has many pieces
    net = net_with_private()
    net.save_pretrained(tmp_path / "bundle")
    file = tmp_path / "bundle" / "subnets.safetensors"
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    begin = 8 + int.from_bytes(file.read_bytes()[:8], "little") + header["private.float32"]["data_offsets"][0]
    entry = next(e for e in meta_of(tmp_path / "bundle")["private"] if e["subnet"] == "unstructured@0.5")
    raw = bytearray(file.read_bytes())
    raw[begin + 4 * entry["start"] + 128] ^= 1  # a byte of another subnetwork's
    file.write_bytes(raw)
    part = cocktail.from_pretrained(tmp_path / "bundle", type(net.model)(), subnets=["channel@0.5"])
    assert list(part.private) == ["channel@0.5"]
    assert torch.equal(part.private["channel@0.5"]["fc.weight"], net.private["channel@0.5"]["fc.weight"])
    with pytest.raises(BundleError, match="do not fit their checksum"):
        cocktail.from_pretrained(tmp_path / "bundle", type(net.model)(), subnets=["unstructured@0.5"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_private_tensors_are_stored_in_half_the_bits_as_the_weights_are(tmp_path, dtype):
    net = net_with_private()
    net.save_pretrained(tmp_path, dtype=dtype)
    loaded = cocktail.from_pretrained(tmp_path, type(net.model)())
    half = getattr(torch, dtype)
    for name, own in net.private.items():
        assert all(torch.equal(loaded.private[name][n], t.to(half).float()) for n, t in own.items())
    net.set_private("2:4", {"fc.bias": torch.full((5,), 1e6)})
    if dtype == "float16":
        with pytest.raises(BundleError, match=r"fc\.bias has values up to 1e\+06"):
            net.save_pretrained(tmp_path, dtype=dtype)


def test_private_tensors_of_several_dtypes_and_of_a_model_that_was_cast_are_stored_in_the_parameters(tmp_path):
    net = net_with_private(["2:4"])
    net.model.fc.double()
    net.save_pretrained(tmp_path)
    model = type(net.model)()
    model.fc.double()
    loaded = cocktail.from_pretrained(tmp_path, model)
    assert {n: t.dtype for n, t in loaded.private["2:4"].items()} == {
        "bn.weight": torch.float32,
        "block2.conv1.weight": torch.float32,
        "fc.weight": torch.float64,
        "fc.bias": torch.float64,
    }
    assert torch.equal(loaded.private["2:4"]["fc.bias"].float(), net.private["2:4"]["fc.bias"])


def test_another_reader_finds_the_same_networks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from read_bundle import Bundle

    net = net_with_private()
    net.save_pretrained(tmp_path)
    found = Bundle(tmp_path)
    for name in net.names:
        net.switch(name)
        tensors = found.subnet(name)
        for key, value in net.model.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), tensors[key], f"{key} of {name}")


@pytest.fixture(scope="module")
def two_with_private(tmp_path_factory):
    """A sound bundle of which two subnetworks have private tensors."""
    folder = tmp_path_factory.mktemp("sound")
    net_with_private(["unstructured@0.5", "2:4"]).save_pretrained(folder)
    return folder


def of(**changes):
    """Changes to the entry of ``2:4``, and what it says besides."""

    def change(meta):
        entry = next(e for e in meta["private"] if e["subnet"] == "2:4")
        entry.update({k: v(entry[k]) if callable(v) else v for k, v in changes.items()})

    return change


def nothing(meta):
    del meta["private"]


def older(meta):
    meta["format_version"] = 2


def twice(meta):
    meta["private"].append(dict(meta["private"][-1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nothing, "lacks 'private'"),
        (older, "has 'private'"),
        (twice, "two entries for the private tensors"),
        (of(subnet="3:4"), "private tensors of '3:4'"),
        (of(subnet="dense"), "private tensors of 'dense'"),
        (of(dtype="int64"), "private tensors of 'int64', which is not known"),
        (of(dtype="float64"), "that fit nothing"),
        (of(start=0), "do not begin where those before them end"),
        (of(count=lambda n: n - 1), "do not begin where|values"),
        (of(count=-1), "how many private values"),
        (of(parameters=lambda places: places[:-1]), "whose mask keeps"),
        (of(parameters=lambda places: [*places[:-1], places[0]]), "names one of"),
        (of(parameters=[]), "that fit nothing"),
        (of(parameters=lambda places: [*places[:-1], 10**6]), "a private tensor's parameter"),
        (of(parameters="fc.weight"), "not a list"),
        (of(more=1), "has 'more'"),
    ],
)
@pytest.mark.parametrize("part", [None, ["2:4"]], ids=["all", "a part"])
def test_entries_that_make_no_sense_are_refused(tmp_path, two_with_private, change, said, part):
    shutil.copytree(two_with_private, tmp_path, dirs_exist_ok=True)
    meta = meta_of(tmp_path)
    change(meta)
    rewrite(tmp_path, meta)
    model = ConvNet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(BundleError, match=said):
        cocktail.from_pretrained(tmp_path, model, subnets=part)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_buffers_longer_and_missing_tensors_are_refused(tmp_path):
    net = net_with_private(["2:4"])
    net.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "subnets.safetensors")
    own = whole.pop("private.float32")
    cases = {
        "lacks the tensor 'private.float32'": whole,
        "belong to no subnet": whole | {"private.float32": torch.cat([own, own[:1]])},
        "are of torch.float64": whole | {"private.float32": own.double()},
        "which belongs to no subnet": whole | {"private.float32": own, "private.float64": own.double()},
    }
    for said, tensors in cases.items():
        rewrite(tmp_path, tensors=tensors)
        with pytest.raises(BundleError, match=said):
            cocktail.from_pretrained(tmp_path, type(net.model)())
    rewrite(tmp_path, tensors=whole | {"private.float32": own})
    meta = meta_of(tmp_path)
    meta["private"][0]["parameters"][0] = meta["model"]["tensors"].index("bn.running_mean")
    rewrite(tmp_path, meta)
    with pytest.raises(BundleError, match=r"'bn\.running_mean'\] that fit nothing"):
        cocktail.from_pretrained(tmp_path, type(net.model)())


def test_a_bundle_whose_private_tensors_are_mostly_masked_is_refused(tmp_path, monkeypatch):
    from cocktailsdk.bundle import private

    net = net_with_private()
    net.save_pretrained(tmp_path)
    monkeypatch.setattr(private, "max_private_zeros", lambda elements: 10)
    with pytest.raises(BundleError, match="more than 10 elements are masked"):
        cocktail.from_pretrained(tmp_path, type(net.model)())


def test_the_command_line_lists_the_bytes_of_private_tensors(tmp_path):
    net = net_with_private(["2:4"])
    net.save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["subnets", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "private tensors" in shown.output
    data = json.loads(CliRunner().invoke(app, ["subnets", str(tmp_path), "--json"]).output)
    own = {s["name"]: s.get("private_bytes") for s in data["subnets"]}
    assert own["2:4"] == private_bytes(meta_of(tmp_path))["2:4"] and own["channel@0.5"] is None
