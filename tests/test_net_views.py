"""Channel subnetworks as views: they compute what slim and masked models do, and share one set of tensors."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk import SlimError, SubnetError
from cocktailsdk.graph import reorder
from cocktailsdk.slimming import Views

LEVELS = (0.25, 0.5, 0.75)
NAMES = [f"channel@{s}" for s in LEVELS]


class Block(nn.Module):
    """A residual block as ResNet-18 has them."""

    def __init__(self, n: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(n, out, 1, bias=False), nn.BatchNorm2d(out)) if n != out else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class Bottleneck(nn.Module):
    """A bottleneck with a grouped convolution, as ResNet-50 and ResNeXt have them."""

    def __init__(self, n: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, n, 1, bias=False), nn.BatchNorm2d(n)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + x)


def convolutional(*blocks: nn.Module, out: int) -> nn.Module:
    """Blocks after a first convolution, before a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 5)
    )


class Dense(nn.Module):
    """Layers that read all that came before, as DenseNet's do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.first(x)
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


class Attention(nn.Module):
    """A transformer's block, q, k and v made by one weight."""

    def __init__(self, n: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (n // heads) ** -0.5
        self.patches = nn.Conv2d(3, n, 3, stride=3)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(n), nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(n), nn.Linear(n, 24), nn.Linear(24, n)
        self.norm, self.head = nn.LayerNorm(n), nn.Linear(n, 5)
        self.head_dim = n // heads

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x).mean(1))


class Flat(nn.Module):
    """Reads its weight's memory, not its strides."""

    def __init__(self, n: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, n))

    def forward(self, x):
        return F.linear(x, self.weight.view(-1).view(self.weight.shape))


CASES = {
    "resnet": lambda: convolutional(Block(8, 8), Block(8, 16), out=16),
    "bottleneck": lambda: convolutional(Bottleneck(8, 1), Bottleneck(8, 1), out=8),
    "grouped": lambda: convolutional(Bottleneck(8, 4), out=8),
    "depthwise": lambda: convolutional(Bottleneck(8, 16), out=8),
    "dense": Dense,
    "attention": Attention,
}
WHOLE = {"resnet", "bottleneck", "depthwise"}
"""Of which everything but statistics is shared."""


def built(case: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[case]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 2.0)
            m.bias.data.normal_()
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


@functools.cache
def shared(case: str) -> tuple[cocktail.CocktailNet, Views]:
    """A net and its views, made once for all tests, which leave them as they are."""
    net = made(case)
    net.switch("channel@0.5")  # views are of the dense weights, whatever is active
    views = net.views()
    net.switch("dense")
    return net, views


def made(case: str | nn.Module, patterns=None) -> cocktail.CocktailNet:
    model = built(case) if isinstance(case, str) else case.eval()
    x = torch.randn(2, 3, 6, 6)
    net = cocktail.sparsify(model, patterns or [cocktail.Channel(sparsities=LEVELS)], example_inputs=(x,))
    for name in net.names[1:3]:  # some have statistics of their own, some the dense network's
        net.recalibrate(name, [torch.randn(4, 3, 6, 6)])
    return net


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("case", CASES)
def test_views_compute_what_slim_and_masked_models_do_and_share_their_tensors(case):
    net, views = shared(case)
    x = torch.randn(3, 3, 6, 6)
    before = built(case).state_dict()
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())
    assert isinstance(views, Views) and list(views) == NAMES and len(views) == 3
    held = {t.untyped_storage().data_ptr(): t for t in views.shared.values()}
    own = {t.untyped_storage().data_ptr() for t in net.model.state_dict().values()}
    assert held.keys().isdisjoint(own)
    assert views.shared_bytes == sum(t.nbytes for t in net.model.state_dict().values())
    for name, view in views.items():
        slim = net.slim(name)
        assert type(view) is type(net.model)
        assert {n: t.shape for n, t in view.state_dict().items()} == {n: t.shape for n, t in slim.state_dict().items()}
        with torch.no_grad(), net.using(name):
            got = view(x)
            assert torch.allclose(got, slim(x), rtol=1e-4, atol=1e-5)
            assert torch.allclose(got, net(x), rtol=1e-4, atol=1e-5)
        copied = {}
        for n, t in tensors(view).items():
            whole = held.get(t.untyped_storage().data_ptr())
            if whole is None:
                copied[n] = t.nbytes
            else:  # the first elements of the tensor of that name, along every axis
                assert whole is views.shared[n]
                assert torch.equal(t, whole[tuple(slice(s) for s in t.shape)])
                assert t.data_ptr() == whole.data_ptr()
        assert copied == views.copied[name]
        statistics = {n for n in copied if n.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
        assert case not in WHOLE or copied.keys() == statistics
    assert views.copied_bytes == sum(sum(by.values()) for by in views.copied.values())


def test_what_is_copied_is_named():
    _, views = shared("dense")
    assert {n for by in views.copied.values() for n in by if "running" not in n} == {
        *("b.weight", "bn.weight", "bn.bias", "bn.num_batches_tracked", "fc.weight")
    }
    _, views = shared("attention")
    assert {n for by in views.copied.values() for n in by} == {"qkv.weight", "qkv.bias"}
    _, views = shared("grouped")
    copied = {n for by in views.copied.values() for n in by if "running" not in n and "tracked" not in n}
    assert copied == {f"2.{n}" for n in ("conv1.weight", "bn1.weight", "bn1.bias")} | {
        f"2.{n}" for n in ("conv2.weight", "bn2.weight", "bn2.bias", "conv3.weight")
    }


def test_views_are_those_that_were_asked_for_dense_among_them():
    net, _ = shared("resnet")
    views = net.views(["channel@0.75", "dense", "channel@0.250"])
    assert list(views) == ["dense", "channel@0.25", "channel@0.75"]
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(views["dense"](x), net(x), rtol=1e-4, atol=1e-5)
    assert "3 networks" not in repr(net) and repr(views).startswith("Views(dense, channel@0.25")
    assert not any(p.requires_grad for view in views.values() for p in view.parameters())


def test_views_do_not_follow_the_net_nor_the_net_the_views():
    net, views = shared("resnet")
    net = copy.deepcopy(net)
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        before = views[NAMES[1]](x)
        net.switch("channel@0.75")
        for p in net.parameters():
            p.add_(1.0)
        assert torch.equal(views[NAMES[1]](x), before)


def test_each_width_is_compiled_once():
    views = copy.deepcopy(shared("resnet")[1])
    x = torch.randn(3, 3, 6, 6)
    compiled = []

    def backend(module, inputs):
        compiled.append(len(inputs))
        return module.forward

    torch.compiler.reset()
    with torch.no_grad():
        wanted = {n: view(x) for n, view in views.items()}
        views.compile(backend=backend, fullgraph=True)
        counts = []
        for name in NAMES * 3:
            torch.testing.assert_close(views[name](x), wanted[name])
            counts.append(len(compiled))
    first = counts[: len(views)]  # older releases compile each block of a Sequential by itself
    assert first == sorted({*first}) and counts[0] > 0
    assert counts[len(views) :] == [first[-1]] * (2 * len(views))


def test_subnetworks_that_cannot_share_are_refused():
    net = made("bottleneck", ["2:4", "channel@0.25", "channel@0.5+2:4"])
    with pytest.raises(SubnetError, match="masks single weights"):
        net.views(["2:4"])
    with pytest.raises(SubnetError, match="masks single weights"):
        net.views(["channel@0.5+2:4"])
    with pytest.raises(SubnetError, match="no pattern 'width'; this net has"):
        net.views("width")
    with pytest.raises(SubnetError, match="nearest"):
        net.views(["channel@0.9"])
    with pytest.raises(SubnetError, match="no subnets"):
        net.views([])
    net = copy.deepcopy(shared("resnet")[0])
    removed = net.masks["channel@0.25"].removed.clone()
    net.set_mask("channel@0.25", cocktail.Mask(removed=removed.flip(0)))
    with pytest.raises(SubnetError, match="removes channels that the narrower"):
        net.views()
    net.example = None
    with pytest.raises(SlimError, match="example inputs"):
        net.views("channel")


def test_code_that_reads_memory_instead_of_strides_gets_a_copy():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), Flat(8, 12), nn.ReLU(), nn.Linear(12, 5))
    net = made(model)
    views = net.views()
    x = torch.randn(3, 3, 6, 6)
    for name in NAMES:
        assert set(views.copied[name]) == {"3.weight"}
        with torch.no_grad(), net.using(name):
            assert torch.allclose(views[name](x), net(x), rtol=1e-4, atol=1e-5)


def test_a_group_that_cannot_be_put_in_another_order_keeps_its_own(monkeypatch, caplog):
    net, _ = shared("resnet")
    group = net.coupling.groups[-1]
    same = reorder._Check.same

    def refuses(check, order):
        moved = order.units[group.start : group.stop] != torch.arange(group.start, group.stop)
        return not bool(moved.any()) and same(check, order)

    monkeypatch.setattr(reorder._Check, "same", refuses)
    views = net.views()
    assert f"keep their order, since the model computes something else in another: {group.name}" in caplog.text
    x = torch.randn(3, 3, 6, 6)
    for name in NAMES:
        assert any("running" not in n and "tracked" not in n for n in views.copied[name])
        with torch.no_grad(), net.using(name):
            assert torch.allclose(views[name](x), net(x), rtol=1e-4, atol=1e-5)


def test_an_order_that_changes_what_a_model_computes_is_found_out():
    net, _ = shared("attention")
    coupling = net.coupling
    check = reorder._Check(net.model, coupling, *net.example)
    units = torch.arange(coupling.n_units)
    assert check.same(reorder.Order(coupling, units))
    group = coupling.groups[0]
    units[group.start : group.stop] = units[group.start : group.stop].flip(0)
    order = reorder.Order(coupling, units)
    assert check.same(order)
    name = next(n for n in order._along if n != "qkv.weight")
    del order._along[name]  # one tensor left as it was
    assert not check.same(order)
