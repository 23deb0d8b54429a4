"""What runs in training mode only: slim equals masked in both modes, or what it reads is left unpruned."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from graph_cases import half, removal, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.graph import Coupling, couple, slim_module
from cocktailsdk.graph.cut import duplicate
from cocktailsdk.graph.determinism import ConstantRandom
from cocktailsdk.graph.training_mode import in_training

IMAGE = (2, 3, 12, 12)


class Trunk(nn.Module):
    """Two convolutions, then a third that the classifier reads; what happens in training mode differs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, width, 3)
        self.norm, self.c, self.out = nn.BatchNorm2d(width), nn.Conv2d(width, 12, 3), nn.Linear(12, 5)
        self.build(width)

    def build(self, width: int) -> None:
        pass

    def finish(self, h: Tensor, y: Tensor) -> object:
        return y

    def forward(self, x: Tensor) -> object:
        h = torch.relu(self.norm(self.b(torch.relu(self.a(x)))))
        return self.finish(h, self.out(torch.relu(self.c(h)).mean((2, 3))))


class Auxiliary(Trunk):
    def build(self, width: int) -> None:
        self.aux = nn.Sequential(
            nn.Conv2d(width, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(6 * 64, 5)
        )

    def finish(self, h, y):
        return (y, self.aux(h)) if self.training else y


class Flattened(Trunk):
    def build(self, width: int) -> None:
        self.aux = nn.Linear(width * 64, 5)

    def finish(self, h, y):
        return (y, self.aux(h.flatten(1))) if self.training else y


class Functional(Trunk):
    def build(self, width: int) -> None:
        self.w = nn.Parameter(torch.randn(5, width))

    def finish(self, h, y):
        return {"y": y, "aux": F.linear(h.mean((2, 3)), self.w)} if self.training else {"y": y}


class Deep(Trunk):
    """Heads at every depth, with norms of their own."""

    def build(self, width: int) -> None:
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5)) for _ in range(2))

    def finish(self, h, y):
        return [y, *(head(h.mean((2, 3))) for head in self.heads)] if self.training else y


class Depth(Trunk):
    """Stochastic depth and dropout: other calls in training mode, but nothing that reads more channels."""

    def finish(self, h, y):
        y = F.dropout(y, 0.3, self.training)
        if self.training:
            y = y * torch.empty(y.shape[0], 1).bernoulli_(0.8).to(y)
        return y


class Features(Trunk):
    def finish(self, h, y):
        return (y, h) if self.training else y


class FixedWidth(Trunk):
    """A number of training mode alone, as wide as the channels, and no parameter."""

    def build(self, width: int) -> None:
        self.width = width

    def finish(self, h, y):
        return y + (h.mean((2, 3)) @ torch.arange(16.0).to(h))[:, None] if self.training else y


class Targets(Trunk):
    def build(self, width: int) -> None:
        self.aux = nn.Linear(width, 5)

    def forward(self, x, target=None):
        h = torch.relu(self.norm(self.b(torch.relu(self.a(x)))))
        y = self.out(torch.relu(self.c(h)).mean((2, 3)))
        if not self.training:
            return y
        return F.cross_entropy(y, target) + F.cross_entropy(self.aux(h.mean((2, 3))), target)


class ByValue(Trunk):
    """Branches on values, so that its training mode runs but cannot be exported."""

    def build(self, width: int) -> None:
        self.aux = nn.Linear(width, 5)

    def finish(self, h, y):
        if self.training and float(h.mean()) > -1e9:
            return y, self.aux(h.mean((2, 3)))
        return y


class Unused(Trunk):
    def build(self, width: int) -> None:
        self.never = nn.Linear(width, 7)


def agree(model: nn.Module, coupling: Coupling, x: Tensor) -> nn.Module:
    """Slim equals masked in training mode, batch statistics included, and nothing random differs."""
    dense, removed = wide(model), removal(coupling, half)
    slim = slim_module(dense, coupling, removed, (x.double(),))
    masked = duplicate(dense)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, keep in coupling.masks(removed).items():
            tensors[name].mul_(keep)
        for mode in (nn.Module.eval, nn.Module.train):
            with ConstantRandom():
                want, got = mode(masked)(x.double()), mode(slim)(x.double())
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    return slim


class WhereGradients(Trunk):
    """An auxiliary head wherever gradients are recorded, in eval mode, too."""

    def build(self, width: int) -> None:
        self.aux = nn.Linear(width, 5)

    def finish(self, h, y):
        return (y, self.aux(h.mean((2, 3)))) if torch.is_grad_enabled() else y


class ModeOfAPart(Trunk):
    """Asks a part of PyTorch's own for the mode."""

    def build(self, width: int) -> None:
        self.aux = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 5))

    def finish(self, h, y):
        return {"out": y, "aux": self.aux(h.mean((2, 3)))} if self.aux.training else {"out": y}


@pytest.mark.parametrize("kind", [Auxiliary, Flattened, Functional, Deep, Depth, Unused, WhereGradients, ModeOfAPart])
def test_every_channel_of_the_trunk_goes_and_both_modes_agree(kind: type[Trunk]) -> None:
    model, x = kind(), torch.randn(IMAGE)
    coupling = couple(model, (x,))
    assert sorted(g.size for g in coupling.groups) == [8, 12, 16]
    agree(model, coupling, x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Features, "an output of the model in training mode"),
        (FixedWidth, "could not be shown|mixes these channels"),
        (ByValue, "in training mode 'aux' reads it"),
    ],
)
def test_what_cannot_go_in_training_mode_is_left_unpruned_with_the_reason(kind: type[Trunk], reason: str) -> None:
    model, x = kind(), torch.randn(IMAGE)
    coupling = couple(model, (x,))
    assert sorted(g.size for g in coupling.groups) == [8, 12]
    assert re.search(reason, {k.where: k.reason for k in coupling.kept}["b.weight"])
    agree(model, coupling, x)


def test_where_training_mode_wants_targets_what_its_parts_may_read_is_left_unpruned() -> None:
    model, x = Targets(), torch.randn(IMAGE)
    net = cocktail.sparsify(model, ["channel@0.5"], (x,))
    assert [g.size for g in net.coupling.groups] == [12]
    assert "'aux' never runs" in {k.where: k.reason for k in net.coupling.kept}["b.weight"]
    slim = net.slim("channel@0.5").train()
    slim(x, torch.tensor([0, 1])).backward()


def test_a_part_that_no_trace_reaches_may_read_flattened_channels() -> None:
    class Flat(Targets):
        def build(self, width: int) -> None:
            self.aux = nn.Linear(width * 64, 5)

        def forward(self, x, target=None):
            if self.training:
                h = torch.relu(self.norm(self.b(torch.relu(self.a(x)))))
                return F.cross_entropy(self.aux(h.flatten(1)), target)
            return Trunk.forward(self, x)

    x = torch.randn(IMAGE)
    slim = cocktail.slim(Flat(), (x,)).train()
    slim(x, torch.tensor([0, 1])).backward()


def test_detectors_without_such_parts_lose_nothing_for_want_of_targets() -> None:
    class Detector(Targets):
        def build(self, width: int) -> None:
            pass

        def forward(self, x, target=None):
            if self.training and target is None:
                raise ValueError("targets should not be none when in training mode")
            return Trunk.forward(self, x)

    coupling = couple(Detector(), (torch.randn(IMAGE),))
    assert sorted(g.size for g in coupling.groups) == [8, 12, 16]


def test_parts_of_training_mode_are_not_counted_and_lose_no_channels_of_their_own() -> None:
    x = torch.randn(IMAGE)
    with_head, without = couple(Auxiliary(), (x,)), couple(Trunk(), (x,))
    assert with_head.flops() == without.flops()
    assert [w.name for w in with_head.weights] == [w.name for w in without.weights]
    assert with_head.n_units == without.n_units


@pytest.mark.parametrize("training", [True, False])
def test_models_are_left_as_they_were(training: bool) -> None:
    model, x = Auxiliary().train(training), torch.randn(IMAGE)
    model.aux[1].eval()
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    cocktail.sparsify(model, ["channel@0.5"], (x,)).slim("channel@0.5")
    cocktail.slim(model, (x,))
    assert torch.equal(random, torch.random.get_rng_state())
    assert [m.training for m in model.modules()] == before[1]
    assert all(torch.equal(t, before[0][n]) for n, t in model.state_dict().items())


def test_slim_models_with_an_auxiliary_head_train_and_are_found_again_in_bundles(tmp_path) -> None:
    model, x = Auxiliary(), torch.randn(IMAGE)
    net = cocktail.sparsify(model, ["channel@0.5", "channel@0.75"], (x,))
    net.save_pretrained(tmp_path / "bundle")
    slim = cocktail.from_pretrained(tmp_path / "bundle", Auxiliary()).slim("channel@0.5").train()
    optimizer = torch.optim.SGD(slim.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(t.sum() for t in slim(x)).backward()
        optimizer.step()
    assert all(p.grad is not None for p in slim.parameters())
    views = net.views("channel")
    assert views["channel@0.75"].train()(x)[1].shape == (2, 5)


CALLS = {
    "head": lambda h, m: m.extra(h.mean((2, 3))),
    "scaled": lambda h, m: m.extra(F.relu(h).amax((2, 3)) * 0.5),
    "dropped": lambda h, m: m.extra(F.dropout(h, 0.5, m.training).mean((2, 3))),
    "first half": lambda h, m: m.extra(F.pad(h.mean((2, 3)), (0, 0))),
    "summed": lambda h, m: h.mean((2, 3)).sum(1, keepdim=True),
}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    calls=st.lists(st.sampled_from(sorted(CALLS)), min_size=1, max_size=3),
    width=st.integers(4, 12),
    whole=st.booleans(),
    seed=st.integers(0, 3),
)
def test_random_branches_of_training_mode_agree(calls: list[str], width: int, whole: bool, seed: int) -> None:
    class Random(Trunk):
        def build(self, width: int) -> None:
            self.extra = nn.Linear(width, 5)

        def finish(self, h, y):
            if not self.training:
                return y
            more = [CALLS[name](h, self) for name in calls]
            return (y, *more, h.mean()) if whole else (y + sum(t.mean(1, keepdim=True) for t in more), *more)

    torch.manual_seed(seed)
    model, x = Random(width), torch.randn(IMAGE)
    agree(model, couple(model, (x,)), x)


def test_only_code_of_the_model_itself_is_put_in_training_mode() -> None:
    model = Auxiliary().eval()
    with in_training(model):
        assert model.training and not model.norm.training and not model.aux[3].training
    assert not any(m.training for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_of_torchvision_agree(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)(weights=None, init_weights=False, aux_logits=True, num_classes=10)
    x = torch.randn(2, 3, *((64, 64) if name == "googlenet" else (299, 299)))
    net = cocktail.sparsify(model, ["channel@0.5"], (x,))
    assert net.coupling.params(net.masks["channel@0.5"].removed) < 0.6 * net.coupling.params()
    slim = net.slim("channel@0.5").train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = slim(x)
    assert [tuple(t.shape) for t in out if t is not None] == [(2, 10)] * sum(t is not None for t in out)
    masked = model
    with net.using("channel@0.5"), torch.no_grad():
        for m in (masked, slim):
            for part in m.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
        want, got = masked.train()(x), slim.train()(x)
    for w, g in zip(want, got, strict=True):
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-2)
