"""Torch-Pruning as a backend: what it removes, under the check that slim equals masked."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch_pruning as tp
from tiny import TinyNet
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import PatternError, SlimError
from cocktailsdk.slimming.positions import check_equal, named_tensors

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def tiny(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyNet()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data.uniform_(0.5, 2.0)
                m.bias.data.normal_()
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
    return model.eval()


def slimmed(model, x=X, **options):
    return cocktail.slim(model, (x,), backend="torch-pruning", **options)


def by_itself(model, x=X, ignored=("fc",), **options):
    """What its own users would get."""
    model = copy.deepcopy(model).double()
    layers = [model.get_submodule(n) for n in ignored]
    options = {"pruning_ratio": 0.5, **options}
    if "by_name" in options:
        options["pruning_ratio_dict"] = {model.get_submodule(n): r for n, r in options.pop("by_name").items()}
    pruner = tp.pruner.MetaPruner(
        model,
        x.double(),
        importance=tp.importance.MagnitudeImportance(),
        ignored_layers=layers,
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **options,
    )
    pruner.step()
    return model.float()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"ratio": 0.3}, {"pruning_ratio": 0.3}),
        ({"ratio": 0.3, "round_to": 4}, {"pruning_ratio": 0.3, "round_to": 4}),
        ({"scope": "global", "ratio": 0.4}, {"global_pruning": True, "pruning_ratio": 0.4}),
        ({"exclude_modules": ["widen"]}, {"ignored": ("fc", "widen")}),
        ({"target_modules": ["first"]}, {"ignored": ("fc", "widen", "inner")}),
        ({"ratio": {"first": 0.25, "*": 0.5}}, {"by_name": {"first": 0.25}}),
        ({"ratio": {"first": 0.25}}, {"by_name": {"first": 0.25}, "pruning_ratio": 0.0}),
        ({"ratio": {"widen|inner": 0.75}}, {"by_name": {"widen": 0.75, "inner": 0.75}, "pruning_ratio": 0.0}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_it_removes_what_it_does_by_itself(options, theirs, seed):
    model = tiny(seed)
    small = slimmed(model, **options)
    assert type(small) is TinyNet
    assert same(small, by_itself(model, **theirs))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_slim_equals_masked():
    model = tiny().double()
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():  # no two elements are equal, so what is left can be recognised
                t += torch.rand(t.shape, dtype=t.dtype) * 1e-3
    small, left = slimmed(model, X.double(), ratio=0.6), {}
    left = named_tensors(small)
    with torch.no_grad():
        for name, t in named_tensors(model).items():
            if t.shape != left[name].shape:
                t *= torch.isin(t, left[name])
        assert (small(X.double()) - model(X.double())).norm() <= 1e-12 * model(X.double()).norm()


def test_several_ratios_are_ranked_apart_globally():
    model = tiny()
    small = slimmed(model, ratio={"first": 0.25, "*": 0.5}, scope="global")
    assert (small.first.out_channels, small.widen.out_channels) == (6, 8)


def test_the_model_and_the_world_are_left_as_they_were(capsys, recwarn, caplog):
    class Scaled(TinyNet):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 16, 1, 1))  # which Torch-Pruning warns of

        def forward(self, x):
            x = torch.relu(self.bn1(self.first(x)))
            return self.fc((self.bn2(self.widen(x)) * self.scale).mean((2, 3)))

    model = Scaled().train()
    model.bn2.eval()
    model.first.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "cocktailsdk"):
        small = slimmed(model)
        small = slimmed(model, round_to=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and not model.bn2.training
    assert model.fc.weight.grad is not None
    assert small.training and not small.bn2.training
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["first.weight"]
    assert all(p.dtype == torch.float32 and p.grad is None for p in small.parameters())
    assert small.scale.shape == (1, 8, 1, 1)
    assert capsys.readouterr().out == ""
    assert not [w for w in recwarn if "nwrapped" in str(w.message)]
    assert "Unwrapped parameters detected" in caplog.text
    small(X).sum().backward()
    assert small.widen.weight.grad is not None


def test_one_of_its_importances_can_be_given():
    model = tiny()
    model(X).square().sum().backward()
    small = slimmed(model, score=tp.importance.TaylorImportance())
    theirs = copy.deepcopy(model)
    for p, q in zip(theirs.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    theirs = theirs.double()
    pruner = tp.pruner.MetaPruner(
        theirs, X.double(), tp.importance.TaylorImportance(), pruning_ratio=0.5, ignored_layers=[theirs.fc],
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    pruner.step()
    assert same(small, theirs.float())
    assert not same(small, slimmed(model))


@pytest.mark.parametrize("options", [{"score": "wanda"}, {"score": "wanda", "calibration": [X]}, {"calibration": [X]}])
def test_scores_from_data_are_not_for_it(options):
    with pytest.raises(PatternError, match="use backend='cocktail'"):
        slimmed(tiny(), **options)


def test_ratio_none_is_a_copy():
    model = tiny()
    small = slimmed(model, ratio=0.0)
    assert same(small, model)
    assert small is not model


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 8), norm, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)))


class Fixed(nn.Module):
    """Reshapes by numbers of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.a(x).view(-1, 3, 4).transpose(1, 2).reshape(-1, 12))


class Features(nn.Module):
    """Returns activations: no layer of it is a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("model", "x", "said"),
    [
        (
            Normed(nn.LayerNorm(8)),
            torch.randn(2, 4),
            r"computes something else than the masked model: .* the channels left, .*: norm \(LayerNorm\)",
        ),
        (Fixed(), torch.randn(2, 4), r"what Torch-Pruning \S+ leaves of Fixed does not run \(RuntimeError: "),
        (Features(), X, r"returns \[\[2, 3, 6, 6\]\] where the model returns \[\[2, 6, 6, 6\]\]"),
        (nn.Conv2d(3, 8, 1), X, r"Torch-Pruning \S+ cannot prune Conv2d \(\w+: "),
        (nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3), "found nothing to remove from Sequential"),
    ],
)
def test_what_it_gets_wrong_is_refused(model, x, said):
    with pytest.raises(SlimError, match=said) as caught:
        slimmed(model, x)
    assert "backend='cocktail'" in str(caught.value)


def test_what_is_refused_is_equal_once_excluded():
    assert slimmed(Normed(nn.LayerNorm(8)), torch.randn(2, 4), ratio={"stem": 0.0, "*": 0.0}).stem.out_features == 8
    small = slimmed(Features(), X, exclude_modules=["b"])
    assert (small.a.out_channels, small.b.out_channels) == (4, 6)
    # The norm that keeps count of absent channels is the other backend's.
    assert cocktail.slim(Normed(nn.LayerNorm(8)), (torch.randn(2, 4),)).stem.out_features == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flops": 0.5}, "not Torch-Pruning's"),
        ({"params": 0.5}, "not Torch-Pruning's"),
        ({"min_width": 8}, "not Torch-Pruning's"),
        ({"round_to": "auto"}, "not Torch-Pruning's"),
        ({"ratio": {"stream": 0.5}}, "nothing in the model is called 'stream'"),
        ({"ratio": {"bn1": 0.5}}, "'bn1' names no layer that Torch-Pruning could prune; layers are first, widen"),
        ({"ratio": {"first|widen": 0.5, "fi.*": 0.25}}, "both claim 'first.weight'"),
    ],
)
def test_options_that_it_does_not_have_are_refused(options, said):
    with pytest.raises(PatternError, match=said):
        slimmed(tiny(), **options)


class TestTheCheck:
    """It sees what is wrong, whoever made it."""

    def cut(self, order_of_norm=(0, 2, 5)):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        kept = torch.tensor([0, 2, 5])
        small = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
        where = {name: torch.arange(t.numel()).view(t.shape) for name, t in named_tensors(model).items()}
        where["0.weight"], where["0.bias"] = where["0.weight"][kept], where["0.bias"][kept]
        where["3.weight"] = where["3.weight"][:, kept]
        for n in ("weight", "bias", "running_mean", "running_var"):
            where[f"1.{n}"] = where[f"1.{n}"][list(order_of_norm)]
        return model.double(), small.double(), where

    def check(self, model, small, where):
        check_equal(model, small, where, ((torch.randn(5, 4),), {}), "this", "do not")

    def test_a_right_one_passes(self):
        self.check(*self.cut())

    @pytest.mark.parametrize("order", [(2, 0, 5), (0, 2, 4), (0, 0, 5)])
    def test_channels_out_of_order_do_not(self, order):
        with pytest.raises(SlimError, match="this computes something else than the masked model"):
            self.check(*self.cut(order))

    def test_nor_does_a_wrong_scale(self):
        model, small, where = self.cut()
        small[2] = nn.LeakyReLU(1e-6)
        with pytest.raises(SlimError, match="computes something else"):
            self.check(model, small, where)

    def test_nor_tied_tensors_that_were_cut_apart(self):
        class Tied(nn.Module):
            def __init__(self, tie):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
                if tie:
                    self.b.weight = self.a.weight

            def forward(self, x):
                return self.b(torch.relu(self.a(x)))

        model, small = Tied(True).double(), Tied(False).double()
        kept = torch.tensor([0, 3])
        positions = torch.arange(16).view(4, 4)
        small.a.weight = nn.Parameter(torch.empty(2, 4, dtype=torch.float64))
        small.b.weight = nn.Parameter(torch.empty(4, 2, dtype=torch.float64))
        with pytest.raises(SlimError, match="computes something else"):
            self.check(model, small, {"a.weight": positions[kept], "b.weight": positions[:, kept]})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "equal"), [("resnet18", True), ("mobilenetv3_small_050", True), ("test_vit", False)])
def test_models_of_timm(name, equal):
    import timm

    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.default_cfg["input_size"])
    if equal:
        assert slimmed(model, x)(x).shape == model(x).shape
    else:
        with pytest.raises(SlimError):
            slimmed(model, x)
