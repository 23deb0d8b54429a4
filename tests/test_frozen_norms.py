"""Norms that the user froze keep their statistics, whatever trains or recalibrates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cocktailsdk as cocktail
from cocktailsdk.utils.batchnorm import frozen_norms
from cocktailsdk.utils.modes import TrainingModes, train_as_handed

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.tensor([0, 1, 2, 3]))] * 2
KINDS = {
    "batch": nn.BatchNorm2d,
    "lazy": lambda n: nn.LazyBatchNorm2d(),
    "sync": nn.SyncBatchNorm,
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
}


class Net(nn.Module):
    """Four norms; `held` are kept in eval mode by `train()`."""

    def __init__(self, kind="batch", held=()):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(KINDS[kind](8) for _ in range(4))
        self.out = nn.Linear(8, 4)
        self.held = held

    def train(self, mode=True):
        super().train(mode)
        for i in self.held:
            self.norms[i].eval()
        return self

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.out(x.mean((2, 3)))


def ready(kind, how, which):
    """A net with some norms frozen in a certain way, and statistics of their own that nothing would measure."""
    model = Net(kind, which if how == "train()" else ())
    model(X)  # what is lazy is made; the others' statistics move
    model.train(how in ("eval() after train()", "container"))
    for i in which:
        norm = model.norms[i]
        norm.running_mean.fill_(0.5)
        if how == "eval() after train()":
            norm.eval()
        elif how == "momentum=0":
            norm.momentum = 0.0
        elif how == "track_running_stats":
            norm.track_running_stats = False
        elif how == "train is a no-op":
            norm.eval().train = lambda mode=True: None
    return cocktail.sparsify(model, ["2:4", "unstructured@0.5"], (X,))


def co_train(net, recipe=None):
    cocktail.CoTrainer(
        net, BATCHES, F.cross_entropy, val_loader=BATCHES, epochs=1, start="pretrained", recipe=recipe
    ).fit()


def loop(net):
    loop, optimizer = cocktail.CoLoop(net, steps=4, rounds=1), torch.optim.SGD(net.model.parameters(), 0.1)
    for x, y in loop.batches(BATCHES):
        with loop.step((x, y)) as step:
            out = net.model(x)
            step.loss(F.cross_entropy(out, y), out, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish(BATCHES, BATCHES)


def recalibrate(net):
    for name in ("2:4", "dense", "unstructured@0.5", "2:4"):
        net.recalibrate(name, BATCHES)


WORK = {"recalibrate": recalibrate, "CoTrainer": co_train, "rounds": lambda net: co_train(net, "cocktail")}
HOWS = ["train()", "eval() after train()", "momentum=0", "track_running_stats", "train is a no-op"]


@settings(deadline=None, derandomize=True, max_examples=14)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(HOWS),
    st.sets(st.integers(0, 3)),
    st.sampled_from(sorted(WORK)),
)
def test_frozen_norms_keep_their_statistics_in_every_network_and_others_are_measured(kind, how, which, work):
    net = ready(kind, how, which)
    before = {n: b.clone() for n, b in net.model.named_buffers()}
    modes = [m.training for m in net.modules()]
    WORK[work](net)
    assert [m.training for m in net.modules()] == modes
    frozen = tuple(f"norms.{i}." for i in which)
    for name in net.names:
        with net.using(name):
            for key, value in net.model.named_buffers():
                if key.endswith(("mean", "var")):
                    assert torch.equal(value, before[key]) == key.startswith(frozen), (name, key)
        assert all(torch.equal(t, before[k]) for k, t in net.statistics[name].items() if k.startswith(frozen))


def test_the_papers_recipe_and_finetune_leave_frozen_norms_alone():
    net = ready("batch", "train()", {0, 2})
    mean = net.model.norms[0].running_mean.clone()
    cocktail.CoTrainer(
        net,
        BATCHES,
        F.cross_entropy,
        val_loader=BATCHES,
        recipe="paper",
        epochs=1,
        rounds=cocktail.RoundSettings(count=1),
    ).fit()
    assert torch.equal(net.model.norms[0].running_mean, mean)
    tuned = cocktail.finetune(net, "2:4", BATCHES, F.cross_entropy, epochs=1)
    assert torch.equal(tuned.model.norms[0].running_mean, mean)
    assert not torch.equal(tuned.model.norms[1].running_mean, net.model.norms[1].running_mean)


def test_a_loop_remembers_what_was_frozen_while_it_trained():
    net = ready("batch", "eval() after train()", {1})
    mean, other = net.model.norms[1].running_mean.clone(), net.model.norms[2].running_mean.clone()
    real, ends = cocktail.CoLoop.finish, []

    def finish(self, *args):
        net.model.eval()  # for the user's own validation
        ends.append(real(self, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cocktail.CoLoop, "finish", finish)
        loop(net)
    assert ends
    assert torch.equal(net.statistics["2:4"]["norms.1.running_mean"], mean)
    assert not torch.equal(net.statistics["2:4"]["norms.2.running_mean"], other)


@pytest.mark.parametrize("how", ["train()", "eval() after train()"])
def test_with_frozen_norms_a_run_of_one_example_a_batch_reaches_its_end(how):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
            self.out = nn.Linear(32, 3)

        def train(self, mode=True):
            super().train(mode)
            if how == "train()":
                self.m[1].eval()
            return self

        def forward(self, x):
            return self.out(self.m(x))

    model = Flat().train()
    model.m[1].eval()
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(5, 12, generator=generator), torch.arange(5) % 3), 1)
    net = cocktail.sparsify(model, ["2:4", "unstructured"], (torch.randn(4, 12),))
    trainer = cocktail.CoTrainer(
        net, loader, F.cross_entropy, val_loader=loader, epochs=1, rounds=cocktail.RoundSettings(count=2)
    )
    trainer.plan()
    trainer.fit()
    assert set(net.metrics) == set(net.names)
    cocktail.finetune(net, "2:4", loader, F.cross_entropy, epochs=1)


def test_a_model_that_is_wholly_in_eval_mode_has_frozen_nothing():
    net = ready("batch", "none", ())
    assert not net.model.training
    assert frozen_norms(net.model) == {}
    before = net.model.norms[0].running_mean.clone()
    net.recalibrate("dense", BATCHES)
    assert not torch.equal(net.model.norms[0].running_mean, before)


def test_a_part_in_eval_mode_stays_there_with_all_that_is_inside_and_what_holds_it_trains():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)),
        nn.Sequential(nn.BatchNorm2d(8), nn.Dropout()),
    )
    model.eval()
    model[1].train()
    modes = TrainingModes(model)
    model.eval()  # in between, as an evaluation does
    modes.apply()
    assert [m.training for m in model[0].modules()] == [False] * 4
    assert [m.training for m in [model, *model[1].modules()]] == [True] * 4
    assert list(frozen_norms(model)) == ["0.1"]
    train_as_handed(model)
    assert not model[0][1].training


def test_norms_with_frozen_parameters_alone_are_measured():
    net = ready("batch", "none", ())
    net.model.norms.requires_grad_(False)
    before = net.model.norms[0].running_var.clone()
    co_train(net)
    assert not torch.equal(net.statistics["2:4"]["norms.0.running_var"], before)
