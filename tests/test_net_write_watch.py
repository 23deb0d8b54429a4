"""Values written while a subnetwork is active: never lost without a word."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_net
from torch import nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk import SubnetError, TrainingError

NAME = "2:4"


def other_weights(model):
    generator = torch.Generator().manual_seed(3)
    return {
        n: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in model.state_dict().items()
    }


def step(model):
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()


@torch.no_grad()
def average(model):
    new = other_weights(model)
    for n, p in model.named_parameters():
        p.data.copy_(new[n])


EDITS = {
    "load_state_dict": lambda m: m.load_state_dict(other_weights(m)),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(other_weights(m), assign=True),
    "a submodule's load_state_dict": lambda m: m.widen.load_state_dict({"weight": torch.rand_like(m.widen.weight)}),
    "zeros": lambda m: m.widen.load_state_dict({"weight": torch.zeros_like(m.widen.weight)}),
    "an optimizer's step": step,
    "nn.init": lambda m: nn.init.normal_(m.widen.weight),
    "copy_": torch.no_grad()(lambda m: m.inner.weight.copy_(torch.rand_like(m.inner.weight))),
    "one element": torch.no_grad()(lambda m: m.inner.weight.view(-1)[7].add_(1)),
    "data.copy_": average,
    "data": lambda m: setattr(m.widen.weight, "data", torch.rand_like(m.widen.weight)),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        torch.rand(sum(p.numel() for p in m.parameters())), m.parameters()
    ),
    "a norm's buffer": lambda m: m.bn1.running_mean.fill_(3.0),
    "a norm's load_state_dict": lambda m: m.bn2.load_state_dict(
        {n: torch.full_like(t, 2) for n, t in m.bn2.state_dict().items()}
    ),
}


def active(preloaded):
    net = tiny_net()
    net.recalibrate(NAME, [net.example[0][0]])
    return net.preload(*([NAME] if preloaded else [])).switch(NAME)


@pytest.mark.parametrize("preloaded", [False, True])
@pytest.mark.parametrize("edit", sorted(EDITS))
def test_what_was_written_is_refused_kept_or_discarded_as_asked(edit, preloaded):
    for changes in ("keep", "discard"):
        net = active(preloaded)
        dense = {n: t.clone() for n, t in net.state_dict().items()}
        EDITS[edit](net.model)
        written = {n: t.clone() for n, t in net.model.state_dict().items()}
        calls = [
            lambda net=net: net.switch("dense"),
            lambda net=net: net.recalibrate("dense", [net.example[0][0]]),
            net.state_dict if "norm" not in edit else lambda net=net: net.switch("1:2"),
        ]
        for call in calls:
            with pytest.raises(SubnetError, match=f"changed while '{NAME}' was active"):
                call()
        assert net.active == NAME
        net.switch("dense", changes=changes)
        now = net.model.state_dict()
        for n, mask in net.mask_tensors(NAME).items():
            old = dense[f"model.{n}"]
            kept = changes == "keep" and not torch.equal(written[n], old * mask)
            assert torch.equal(now[n], written[n] if kept else old), n
        if changes == "keep" and edit == "a norm's buffer":
            assert (net.model.bn1.running_mean == 3).all()
        net.switch(NAME)
        assert all((net.model.get_parameter(n)[m == 0] == 0).all() for n, m in net.mask_tensors(NAME).items())


def test_inside_using_a_change_is_dropped_with_an_error_unless_it_is_to_be_kept():
    net = tiny_net()
    dense = net.model.widen.weight.detach().clone()
    with pytest.raises(SubnetError, match=r"dropped when `using\('2:4'\)` ended"), net.using(NAME):
        EDITS["copy_"](net.model)
    assert net.active == "dense"
    assert torch.equal(net.model.widen.weight, dense)
    with net.using(NAME, changes="keep"):
        EDITS["nn.init"](net.model)
        new = net.model.widen.weight.detach().clone()
    assert torch.equal(net.model.widen.weight, new)
    with pytest.raises(ZeroDivisionError), net.using(NAME):
        _edit_and_fail(net.model)
    assert torch.equal(net.model.widen.weight, new)
    with pytest.raises(SubnetError, match="changes must be"):
        net.switch("dense", changes="maybe")


def _edit_and_fail(model):
    EDITS["nn.init"](model)
    raise ZeroDivisionError


def test_nothing_is_said_of_what_changes_no_value():
    net = active(False)
    net.model.widen.weight.data = net.model.widen.weight.data.clone()
    with torch.no_grad():
        net.model.inner.weight.add_(0)
    net(net.example[0][0]).sum().backward()
    net.double().switch("1:2").float().switch("dense")
    with net.using(NAME), torch.no_grad():
        net.model.fc.weight.add_(1)  # not masked: shared by all networks


def test_a_copy_of_an_active_net_notices_changes_too():
    twin = copy.deepcopy(active(False))
    EDITS["copy_"](twin.model)
    with pytest.raises(SubnetError, match="inner.weight changed"):
        twin.switch("dense")


def test_running_statistics_that_passes_in_train_mode_move_are_the_subnetworks_own():
    net = active(False).train()
    dense = net.state_dict()["model.bn1.running_mean"].clone()
    for _ in range(3):
        net(torch.randn(4, 3, 6, 6))
    moved = net.model.bn1.running_mean.clone()
    net.switch("dense")
    assert torch.equal(net.model.bn1.running_mean, dense)
    assert torch.equal(net.switch(NAME).model.bn1.running_mean, moved)


def test_a_loop_says_where_the_optimizer_steps():
    net = tiny_net().train()
    loop = cocktail.CoLoop(net, steps=4, rounds=1, start="pretrained", distill_weight=0)
    optimizer = torch.optim.SGD(net.model.parameters(), 0.1)
    batch = (torch.randn(4, 3, 6, 6), torch.arange(4))

    def run():
        for x, y in loop.batches([batch]):
            with loop.step((x, y)):
                F.cross_entropy(net.model(x), y).backward()
                optimizer.step()

    with pytest.raises(TrainingError, match="step the optimizer after"):
        run()
    assert net.active == "dense"
    assert loop.current is None
