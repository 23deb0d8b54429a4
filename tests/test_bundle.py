"""Bundles: loading what was saved is the identity, in few bytes, the same bytes each time."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import TinyNet, tiny_net
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import NM, BundleError, Channel, Mask, Pattern, Subnet, Unstructured
from cocktailsdk.bundle import bundle_bytes
from cocktailsdk.bundle.examples import describe, remake
from cocktailsdk.patterns import registry
from cocktailsdk.slimming import coupling_difference


def full_net(patterns=("unstructured", "n:m", "channel"), seed=0):
    """A net with statistics and metrics for every subnetwork."""
    net = tiny_net(patterns, seed)
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(2)]
    for i, name in enumerate(net.names):
        net.recalibrate(name, batches)
        net.metrics[name] = 0.97 - i / 359
    return net


def assert_same(a, b):
    assert a.names == b.names
    assert a.patterns == b.patterns
    assert a.metrics == b.metrics
    assert a.subnets() == b.subnets()
    assert a.eligible == b.eligible
    assert a.selection == b.selection
    for name in a.names[1:]:
        x, y = a.masks[name], b.masks[name]
        assert x.elements.keys() == y.elements.keys()
        assert all(torch.equal(m, y.elements[n]) for n, m in x.elements.items())
        assert (x.removed is None) == (y.removed is None)
        assert x.removed is None or torch.equal(x.removed, y.removed)
    assert a.statistics.keys() == b.statistics.keys()
    for name, own in a.statistics.items():
        assert own.keys() == b.statistics[name].keys()
        assert all(
            torch.equal(t, b.statistics[name][n]) and t.dtype == b.statistics[name][n].dtype for n, t in own.items()
        )
    first, second = a.state_dict(), b.state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)
    x, y = a.coupling, b.coupling
    assert coupling_difference(x, y) is None
    assert (x.weights, x.groups, x.kept, x.shapes, x.unknown_ops) == (
        y.weights,
        y.groups,
        y.kept,
        y.shapes,
        y.unknown_ops,
    )
    assert [(p.weight, p.axis, p.units.tolist()) for p in x.producers] == [
        (p.weight, p.axis, p.units.tolist()) for p in y.producers
    ]
    assert [(c.module, c.weight, c.macs, len(c.factors)) for c in x.contractions] == [
        (c.module, c.weight, c.macs, len(c.factors)) for c in y.contractions
    ]


@pytest.mark.parametrize(
    "patterns",
    [
        ("unstructured", "n:m", "channel"),
        [Unstructured([0.5])],
        [Unstructured(rounds=20, rate=0.1)],  # more levels than four bits hold
        [NM(pairs=[(1, 3), (7, 16), (3, 17)])],  # remainders, and runs too long for ranks
        [Channel([0.25], round_to=2)],
        ["4:8"],
    ],
)
def test_loading_what_was_saved_is_the_identity(tmp_path, patterns):
    net = full_net(patterns)
    net.save_pretrained(tmp_path / "bundle")
    torch.manual_seed(3)
    loaded = cocktail.from_pretrained(tmp_path / "bundle", TinyNet())
    assert_same(net, loaded)
    x = net.example[0][0]
    for name in net.names:
        with net.using(name), loaded.using(name):
            assert torch.equal(net.model.eval()(x), loaded.model.eval()(x))


class AnyMasks(Pattern):
    """A user's pattern, which takes any mask for its own: not nested, not N:M."""

    def __init__(self, sparsities=(0.5,)):
        self.sparsities = tuple(sparsities)

    def subnets(self):
        named = [Subnet(f"any@{s:.3f}", "any", s) for s in self.sparsities]
        return (*named, Subnet("any2:4", "any", 0.5, {"n": 2, "m": 4}))

    def mask(self, subnet, umg):
        return Mask(removed=torch.zeros(umg.coupling.n_units, dtype=torch.bool))

    def check(self, subnet, mask, umg):
        pass

    def config(self):
        return {"sparsities": list(self.sparsities)}


@given(st.integers(0, 1000), st.lists(st.floats(0.05, 0.95), min_size=1, max_size=3, unique_by=lambda s: round(s, 3)))
def test_loading_is_the_identity_for_any_masks(tmp_path_factory, seed, sparsities):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
        cocktail.register_pattern("any")(AnyMasks)
        save_and_load_any_masks(tmp_path_factory.mktemp("any") / "bundle", seed, sparsities)


def save_and_load_any_masks(path, seed, sparsities):
    net = tiny_net([AnyMasks(sorted(sparsities))])
    generator = torch.Generator().manual_seed(seed)
    for name in net.names[1:]:
        shapes = {w.name: w.shape for w in net.eligible[seed % 2 :]}
        elements = {n: torch.rand(s, generator=generator) < 0.5 for n, s in shapes.items()}
        removed = torch.rand(net.coupling.n_units, generator=generator) < 0.3 if seed % 3 else None
        net.set_mask(name, Mask(elements, removed))
    net.save_pretrained(path)
    assert_same(net, cocktail.from_pretrained(path, TinyNet()))


def test_saving_twice_gives_the_same_bytes_and_so_does_saving_what_was_loaded(tmp_path):
    net = full_net()
    net.save_pretrained(tmp_path / "a")
    net.switch("channel@0.469")  # what is active makes no difference
    net.save_pretrained(tmp_path / "b")
    assert net.active == "channel@0.469"
    cocktail.from_pretrained(tmp_path / "a", TinyNet()).save_pretrained(tmp_path / "c")
    for file in ("bundle.json", "weights.safetensors", "subnets.safetensors"):
        a = (tmp_path / "a" / file).read_bytes()
        assert a == (tmp_path / "b" / file).read_bytes()
        if file != "bundle.json":  # which describes the values of the example inputs
            assert a == (tmp_path / "c" / file).read_bytes()


def test_the_weights_file_is_a_plain_dense_checkpoint(tmp_path):
    net = full_net()
    net.switch("2:4")
    net.save_pretrained(tmp_path / "bundle")
    net.switch("dense")
    model = TinyNet()
    model.load_state_dict(load_file(tmp_path / "bundle" / "weights.safetensors"))
    assert all(torch.equal(t, net.model.state_dict()[n]) for n, t in model.state_dict().items())


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet8(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layers = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.layers(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def test_24_networks_take_at_most_1_4_dense_checkpoints(tmp_path):
    model = ResNet8()
    assert 77_000 < sum(p.numel() for p in model.parameters()) < 79_000
    net = cocktail.sparsify(model, example_inputs=torch.randn(16, 1, 8, 8))
    batches = [torch.randn(16, 1, 8, 8) for _ in range(2)]
    for i, name in enumerate(net.names):
        net.recalibrate(name, batches)
        net.metrics[name] = 0.9712345678901234 - i / 359
    assert len(net.names) == 24
    net.save_pretrained(tmp_path / "bundle")
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    ratio = bundle_bytes(tmp_path / "bundle") / (tmp_path / "dense.safetensors").stat().st_size
    assert ratio <= 1.40, ratio
    loaded = cocktail.from_pretrained(tmp_path / "bundle", ResNet8())
    assert_same(net, loaded)
    small = loaded.slim("channel@0.469")  # the graph is found again from inputs made anew
    x = torch.randn(4, 1, 8, 8)
    with loaded.using("channel@0.469"):
        loaded.eval()
        assert torch.allclose(small.eval()(x), loaded(x), atol=1e-5)


def test_a_model_that_couples_otherwise_than_its_bundle_is_not_slimmed(tmp_path):
    class Otherwise(TinyNet):
        def forward(self, x):
            x = torch.relu(self.bn1(self.first(x)))
            x = torch.relu(self.bn2(self.widen(x)))
            return self.fc(self.inner(x).mean((2, 3)))

    net = cocktail.sparsify(TinyNet(), "channel@0.5", example_inputs=torch.randn(2, 3, 6, 6))
    net.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", Otherwise())
    with pytest.raises(cocktail.SlimError, match="otherwise than when the bundle was made"):
        loaded.slim("channel@0.5")
    assert loaded.active == "dense"


def test_a_bundle_replaces_a_bundle_but_nothing_else(tmp_path):
    net = tiny_net(["2:4"])
    (tmp_path / "empty").mkdir()
    net.save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "README.md").write_text("mine")
    other = tiny_net(["1:2"])
    other.save_pretrained(str(tmp_path / "empty"))
    assert cocktail.from_pretrained(tmp_path / "empty", TinyNet()).names == ["dense", "1:2"]
    assert (tmp_path / "empty" / "README.md").read_text() == "mine"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(BundleError, match=r"holds other things \(cat.png\)"):
        net.save_pretrained(tmp_path / "photos")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is a file"):
        net.save_pretrained(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "photos"]
    assert os.listdir(tmp_path / "photos") == ["cat.png"]


def test_a_failed_save_leaves_the_old_bundle_and_no_rubbish(tmp_path, monkeypatch):
    net = tiny_net(["2:4"])
    net.save_pretrained(tmp_path / "bundle")
    before = (tmp_path / "bundle" / "bundle.json").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("cocktailsdk.bundle.files.fsync", full)
    with pytest.raises(OSError, match="no space"):
        tiny_net(["1:2"]).save_pretrained(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "bundle.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["bundle"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    net = tiny_net(["2:4"])
    net.metrics["3:4"] = 0.5
    with pytest.raises(BundleError, match="3:4"):
        net.save_pretrained(tmp_path / "bundle")
    net.metrics.clear()
    net.statistics["2:4"] = {"bn1.running_mean": torch.zeros(3)}
    with pytest.raises(BundleError, match=r"bn1\.running_mean"):
        net.save_pretrained(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


def test_tied_and_fleeting_tensors_and_other_dtypes_are_kept(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 16)
            self.first, self.second, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.second.weight = self.first.weight
            self.register_buffer("fleeting", torch.ones(16), persistent=False)
            self.register_buffer("count", torch.tensor(7))

        def forward(self, x):
            return self.out(self.second(torch.relu(self.first(torch.relu(self.up(x)) * self.fleeting))))

    model = Odd().to(torch.bfloat16)
    net = cocktail.sparsify(model, ["unstructured@0.5", "2:4"], torch.randn(3, 8, dtype=torch.bfloat16))
    net.metrics["2:4"] = float("nan")
    net.save_pretrained(tmp_path / "bundle")
    fresh = Odd().to(torch.bfloat16)
    fresh.count.fill_(0)
    loaded = cocktail.from_pretrained(tmp_path / "bundle", fresh)
    assert fresh.second.weight is fresh.first.weight
    assert torch.equal(fresh.first.weight, model.first.weight)
    assert fresh.count == 7
    assert loaded.metrics["2:4"] != loaded.metrics["2:4"]
    with pytest.raises(BundleError, match=r"float32.*bfloat16"):
        cocktail.from_pretrained(tmp_path / "bundle", Odd())


def test_example_inputs_are_described_without_their_data():
    value = (
        (torch.randint(3, 9, (2, 5)), [torch.rand(2, 2), None, True, 1.5, "a"]),
        {"mask": torch.ones(2, 5, dtype=torch.bool), "nested": {"x": torch.full((1,), -2.0, dtype=torch.float16)}},
    )
    spec = json.loads(json.dumps(describe(value)))
    again = remake(spec)
    assert again[0][1][1:] == [None, True, 1.5, "a"]
    ids = again[0][0]
    assert ids.dtype == torch.int64
    assert ids.shape == (2, 5)
    assert ids.min() >= 3
    assert ids.max() <= 8
    assert again[1]["mask"].all()
    assert again[1]["nested"]["x"] == torch.tensor([-2.0], dtype=torch.float16)
    assert torch.equal(remake(spec)[0][0], ids)
    with pytest.raises(BundleError, match="object"):
        describe(object())


def test_inputs_that_cannot_be_described_are_only_missed_by_slim(tmp_path):
    net = cocktail.sparsify(TinyNet(), "channel@0.5", example_inputs=torch.randn(2, 3, 6, 6))
    net.example = ((object(),), {})
    net.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", TinyNet())
    loaded.switch("channel@0.5")
    with pytest.raises(cocktail.SlimError, match=r"net\.example"):
        loaded.slim("channel@0.5")
    loaded.example = ((torch.randn(2, 3, 6, 6),), {})
    assert isinstance(loaded.slim("channel@0.5"), TinyNet)
