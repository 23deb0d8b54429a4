"""A bundle that is not what it was, or not this model's, is refused with one clear error; the model stays as it was."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from test_bundle import full_net
from tiny import TinyNet
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import BundleError, SubnetError
from cocktailsdk.bundle.files import _to_json
from cocktailsdk.patterns import registry

FILES = ("bundle.json", "weights.safetensors", "subnets.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "bundle"
    full_net().save_pretrained(path)
    return path


@pytest.fixture
def bundle(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "bundle")


def refused(bundle, said, model=None):
    model = model or TinyNet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    training = [m.training for m in model.modules()]
    with pytest.raises(BundleError, match=said) as error:
        cocktail.from_pretrained(bundle, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == training
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(bundle, change):
    """Change bundle.json as someone would who also mends its checksum."""
    file = bundle / "bundle.json"
    meta = json.loads(file.read_text())
    del meta["checksum"]
    change(meta)
    file.write_bytes(_to_json(meta))


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_is_found(bundle, file):
    good = (bundle / file).read_bytes()
    rng = random.Random(file)
    places = {*rng.sample(range(len(good)), 60), 0, 1, 7, len(good) - 1}
    model = TinyNet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for place in sorted(places):
        bad = bytearray(good)
        bad[place] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        (bundle / file).write_bytes(bytes(bad))
        with pytest.raises(BundleError):
            cocktail.from_pretrained(bundle, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    (bundle / file).write_bytes(good)
    cocktail.from_pretrained(bundle, model)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_found(bundle, file, keep):
    good = (bundle / file).read_bytes()
    (bundle / file).write_bytes(good[:keep])
    assert file in refused(bundle, "damaged|truncated|changed")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(bundle, file):
    (bundle / file).unlink()
    assert file in refused(bundle, "missing|no bundle")


def test_what_is_no_bundle_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no bundle")
    refused(tmp_path, "no bundle")
    for text in ("[]", "3", '{"format":"other"}', "{}"):
        (tmp_path / "bundle.json").write_text(text)
        refused(tmp_path, "not a bundle's")
    (tmp_path / "bundle.json").write_text("[" * 100_000)
    refused(tmp_path, "not JSON")


def test_an_unknown_version_is_named(bundle):
    rewrite(bundle, lambda meta: meta.update(format_version=99))
    assert "99" in refused(bundle, "format version")
    meta = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(meta, indent=1))  # even without a fitting checksum
    refused(bundle, "format version 99")


def test_a_reformatted_json_file_is_refused(bundle):
    meta = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(meta, indent=1))
    refused(bundle, "was changed")


class Wider(TinyNet):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 7)


class More(TinyNet):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


class Less(TinyNet):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(16, 16, 1, bias=False)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Wider, r"'fc.weight' has shape \(7, 16\), in the bundle \(5, 16\)"),
        (More, r"the model has 'extra.weight', which the bundle lacks"),
        (Less, r"the bundle has 'inner.bias', which the model lacks"),
        (lambda: TinyNet().double(), "float64"),
        (lambda: nn.Linear(3, 3), "made from another model"),
    ],
)
def test_another_model_is_refused_with_the_difference(bundle, model, said):
    refused(bundle, said, model())


def test_a_model_without_memory_is_refused(bundle):
    with torch.device("meta"):
        model = TinyNet()
    with pytest.raises(BundleError, match="to_empty"):
        cocktail.from_pretrained(bundle, model)


def test_what_is_no_model_is_refused(bundle):
    net = cocktail.from_pretrained(bundle, TinyNet())
    for bad in (net, "resnet18", 3):
        with pytest.raises(BundleError, match=r"plain nn\.Module"):
            cocktail.from_pretrained(bundle, bad)
    with pytest.raises(BundleError, match="does not say how its TinyNet is built"):
        cocktail.from_pretrained(bundle)


def test_an_unregistered_pattern_is_named(bundle, monkeypatch):
    monkeypatch.delitem(registry._REGISTERED, "channel")
    assert "register" in refused(bundle, "'channel'")


def test_a_name_that_is_no_subnet_is_refused_and_nothing_switches(bundle):
    net = cocktail.from_pretrained(bundle, TinyNet())
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    with pytest.raises(SubnetError, match=r"nearest: .*channel@0\.469"):
        net.switch("channel@0.468")
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())


def double_levels(meta):
    next(e for e in meta["masks"] if len(e.get("levels", ())) == 10)["levels"] *= 30


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["coupling"]["groups"][0].__setitem__(2, 10**12),
        lambda m: m["coupling"]["units"].__setitem__(0, [0, 10**12]),
        lambda m: m["coupling"]["fields"][0].__setitem__(0, 10**6),
        lambda m: m["coupling"]["fields"][0][1].__setitem__(0, [3]),
        lambda m: m["coupling"].pop("weights"),
        lambda m: m["example"]["tuple"][0]["tuple"][0].__setitem__("shape", [10**9, 10**9]),
        lambda m: m["masks"].pop(),
        double_levels,
        lambda m: m["masks"][0].__setitem__("tensor", "nowhere"),
        lambda m: m["subnets"].pop(),
        lambda m: m["patterns"][0].__setitem__("config", {"rounds": -1}),
        lambda m: m["patterns"][0].__setitem__("config", {"open": "/etc/passwd"}),
        lambda m: m["statistics"].pop(),
        lambda m: m["statistics"][0].__setitem__("buffers", ["nowhere"]),
        lambda m: m["selection"]["eligible"].__setitem__(0, 0),
        lambda m: m["selection"].__setitem__("target", [3]),
        lambda m: m["model"].__setitem__("fingerprint", "0" * 64),
        lambda m: m.pop("files"),
        lambda m: m["files"].clear(),
    ],
)
def test_a_malformed_bundle_with_fitting_checksums_is_refused_without_harm(bundle, change):
    rewrite(bundle, change)
    model = TinyNet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(BundleError):
        cocktail.from_pretrained(bundle, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
