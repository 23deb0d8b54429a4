"""Subnetworks made ready, what a net takes in memory, and switching under ``torch.compile``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_net
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import SubnetError

NAMES = ("unstructured@0.488", "2:4", "channel@0.469")


def values(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def addresses(model):
    return {n: t.data_ptr() for n, t in model.state_dict(keep_vars=True).items()}


def wide_net():
    """Large enough that its weights outweigh everything else, with all 24 networks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.BatchNorm1d(1200), nn.ReLU(), nn.Linear(1200, 4)
    )
    return cocktail.sparsify(model.eval(), example_inputs=(torch.zeros(2, 64),))


def test_a_prepared_subnetwork_is_the_one_that_would_have_been_made():
    net = tiny_net()
    net.recalibrate("channel@0.469", [net.example[0][0]])
    expected = {}
    for name in NAMES:
        with net.using(name):
            expected[name] = values(net.model)
    dense, where = values(net.model), addresses(net.model)
    identities = [id(p) for p in net.model.parameters()]
    assert net.prepare(*NAMES).prepared == list(NAMES)
    for name in (*NAMES, "dense", *reversed(NAMES), "1:2", NAMES[0]):
        net.switch(name)
        if name in expected:
            assert same(values(net.model), expected[name])
    assert net.prepared == list(NAMES)
    net.switch("dense")
    assert same(values(net.model), dense)
    assert addresses(net.model) == where  # the dense weights' own memory
    assert identities == [id(p) for p in net.model.parameters()]


def test_the_dense_weights_are_not_written_at_all():
    net = tiny_net()
    weight = net.model.widen.weight
    alias = weight.detach()
    before = alias.clone()
    for name in NAMES:
        with net.using(name):
            assert not torch.equal(weight, before)
            assert torch.equal(alias, before)


def test_what_is_prepared_replaces_what_was():
    net = tiny_net()
    assert net.prepare("2:4", "channel@0.10").prepared == ["2:4", "channel@0.1"]
    assert net.prepare("1:2", "2:4").prepared == ["1:2", "2:4"]
    net.switch("2:4")
    assert net.prepare().prepared == []
    active = values(net.model)
    net.switch("2:4").switch("1:2").switch("2:4")
    assert same(values(net.model), active)
    with pytest.raises(SubnetError, match="nearest"):
        net.prepare("nothing")
    assert net.prepare("dense").prepared == []


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.load_state_dict(net.state_dict()),
        lambda net: torch._foreach_add_([p.detach() for p in net.parameters()], 0.1),  # as optimizers do
        lambda net: net.double(),
        lambda net: net.set_mask("2:4", net.masks["2:4"]),
    ],
    ids=["load", "step", "dtype", "mask"],
)
def test_a_copy_is_not_used_once_the_dense_weights_have_changed(change):
    net = tiny_net()
    net.prepare("2:4")
    change(net)
    assert net.prepared == []
    kept = net.masks["2:4"].tensors(net.coupling)["widen.weight"]
    expected = net.model.widen.weight.detach() * kept
    net.switch("2:4")
    assert torch.equal(net.model.widen.weight, expected)


def test_a_subnetwork_is_prepared_while_another_is_active_and_kept_by_switching():
    net = tiny_net()
    with net.using("2:4"):
        expected = values(net.model)
    for before in ("dense", "1:2", "channel@0.469"):
        net.switch(before)
        net.prepare("2:4")
        for name in (before, "unstructured@0.2", "2:4", "dense", "2:4"):
            net.switch(name)
            assert net.prepared == ["2:4"]
        assert same(values(net.model), expected)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_copy_that_was_updated_while_it_was_active_is_not_used_again(through_data):
    net = tiny_net()
    net.prepare("2:4").switch("2:4")
    expected = values(net.model)
    with torch.no_grad():
        weight = net.model.widen.weight
        (weight.data if through_data else weight).add_(1.0)
    with pytest.raises(SubnetError, match="widen.weight changed while '2:4' was active"):
        net.switch("dense")
    net.switch("dense", changes="discard")
    assert net.prepared == []
    net.switch("2:4")
    assert same(values(net.model), expected)


def measured_net():
    """With batch-norm statistics of each subnetwork's own."""
    net = tiny_net()
    for name in NAMES:
        net.recalibrate(name, [torch.randn(4, 3, 6, 6)])
    return net


def test_statistics_are_made_ready_too_and_their_dense_memory_is_not_written():
    net = measured_net()
    dense, where = values(net.model), addresses(net.model)
    buffers = {n: b.detach() for n, b in net.model.named_buffers()}
    net.prepare(*NAMES)
    for name in (*NAMES, *reversed(NAMES)):
        net.switch(name)
        now = dict(net.model.named_buffers())
        assert all(torch.equal(now[n], t) for n, t in net.statistics[name].items())
        assert all(torch.equal(b, dense[n]) and now[n].data_ptr() != b.data_ptr() for n, b in buffers.items())
        assert same({n.removeprefix("model."): t for n, t in net.state_dict().items()}, dense)
    net.switch("dense")
    assert same(values(net.model), dense)
    assert addresses(net.model) == where


@pytest.mark.parametrize(
    "change",
    [
        lambda net, name: net.recalibrate(name, [torch.randn(4, 3, 6, 6)]),
        lambda net, name: net.statistics[name]["bn1.running_mean"].mul_(2.0),
        lambda net, name: net.statistics[name].pop("bn2.running_var"),
        lambda net, name: net.statistics.pop(name),
        lambda net, name: net.model.bn1.running_var.add_(1.0),
        lambda net, name: net.model.bn2.num_batches_tracked.add_(1),
        lambda net, name: setattr(net.model.bn2, "running_mean", torch.ones(16)),
    ],
    ids=["recalibrated", "in place", "fewer", "none", "dense", "count", "replaced"],
)
@pytest.mark.parametrize("name", NAMES[1:])
def test_statistics_that_have_changed_since_are_used_as_they_are_now(change, name):
    net = measured_net()
    net.prepare(name)
    change(net, name)
    dense = values(net.model)
    expected = dense | net.statistics.get(name, {})
    kept = net.masks[name].tensors(net.coupling)
    expected = {n: t * kept[n] if n in kept else t for n, t in expected.items()}
    for _ in range(2):  # once more with what the change left made ready
        for _ in range(2):
            net.switch(name)
            assert same(values(net.model), expected)
            net.switch("dense")
            assert same(values(net.model), dense)
        assert net.prepare(name).prepared == [name]


def test_what_training_does_to_prepared_statistics_is_the_subnetworks_own():
    net = measured_net().train()
    dense = values(net.model)
    net.prepare("2:4")
    for _ in range(3):
        net.switch("2:4")
        assert torch.equal(net.model.bn1.running_mean, net.statistics["2:4"]["bn1.running_mean"])
        net(net.example[0][0])
        assert not torch.equal(net.model.bn1.running_mean, net.statistics["2:4"]["bn1.running_mean"])
        assert net.model.bn1.num_batches_tracked == dense["bn1.num_batches_tracked"] + 1
        trained = values(net.model)
        net.switch("dense")
        assert same(values(net.model), dense)
        assert all(torch.equal(t, trained[n]) for n, t in net.statistics["2:4"].items())


def test_a_model_that_moves_while_a_prepared_subnetwork_is_active_gets_its_dense_values_back():
    net = measured_net()
    dense = values(net.model)
    net.prepare("2:4").switch("2:4")
    net.double()
    assert net.model.bn1.running_mean.dtype == net.model.widen.weight.dtype == torch.float64
    net.switch("dense")
    assert all(torch.equal(t, dense[n].to(t.dtype)) for n, t in net.model.state_dict().items())
    assert net.model.widen.weight.dtype == torch.float64
    assert net.prepared == []


def test_a_weight_that_was_replaced_gets_no_prepared_values():
    net = tiny_net()
    net.prepare("2:4")
    net.model.widen.weight = nn.Parameter(torch.randn_like(net.model.widen.weight))
    dense = values(net.model)
    net.switch("2:4")
    assert net.prepared == []
    kept = net.masks["2:4"].tensors(net.coupling)["widen.weight"]
    assert torch.equal(net.model.widen.weight, dense["widen.weight"] * kept)
    net.switch("dense")
    assert same(values(net.model), dense)


def test_statistics_that_two_norms_share_are_copied():
    net = measured_net()
    net.model.bn3 = nn.BatchNorm2d(8).eval()
    net.model.bn3.running_mean = net.model.bn1.running_mean
    net = cocktail.CocktailNet(
        net.model, net.patterns, net.coupling, net.selection, net.example, {n: net.masks[n] for n in NAMES}
    )
    dense, where = values(net.model), addresses(net.model)
    net.statistics["2:4"] = {n: torch.full((8,), 2.0) for n in ("bn1.running_mean", "bn3.running_mean")}
    net.prepare("2:4").switch("2:4")
    assert (net.model.bn1.running_mean == 2.0).all()
    assert net.model.bn1.running_mean.data_ptr() == where["bn1.running_mean"]
    net.switch("dense")
    assert same(values(net.model), dense)


def test_a_backward_pass_that_would_see_other_weights_is_refused():
    net = tiny_net()
    with net.using("2:4"):
        loss = net(net.example[0][0]).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_that_share_memory_are_written_in_place():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.register_buffer("seen", self.inner.weight.detach(), persistent=False)

        def forward(self, x):
            return self.out(torch.relu(self.inner(torch.relu(self.up(x)))))

    net = cocktail.sparsify(Shared(), ["2:4"], example_inputs=torch.randn(3, 8))
    dense = values(net.model)
    net.prepare("2:4").switch("2:4")
    assert net.prepared == []
    assert (net.model.seen == 0).sum() == 128
    assert net.model.seen.data_ptr() == net.model.inner.weight.data_ptr()
    net.switch("dense")
    assert same(values(net.model), dense)


def test_a_copy_of_a_net_has_prepared_subnetworks_of_its_own():
    net = tiny_net()
    dense = values(net.model)
    net.prepare("2:4").switch("2:4")
    twin = copy.deepcopy(net)
    twin.switch("dense")
    assert same(values(twin.model), dense)
    assert (net.model.widen.weight == 0).any()
    twin.switch("2:4")
    assert same(values(twin.model), values(net.model))
    assert twin.model.widen.weight.data_ptr() != net.model.widen.weight.data_ptr()


@pytest.mark.parametrize("prepare", [False, True])
def test_a_compiled_net_is_not_compiled_again_when_it_switches(prepare):
    net, x = tiny_net(), tiny_net().example[0][0]
    expected = {}
    with torch.no_grad():
        for name in net.names:
            with net.using(name):
                expected[name] = net(x)
    compiled = []

    def backend(module, inputs):
        compiled.append(len(inputs))
        return module.forward

    torch.compiler.reset()
    net.compile(backend=backend, fullgraph=True)
    if prepare:
        net.prepare(*NAMES)
    with torch.no_grad():
        for _ in range(2):
            for name in net.names:
                net.switch(name)
                torch.testing.assert_close(net(x), expected[name])
    assert len(compiled) == 1


def test_a_net_that_is_compiled_as_a_whole_is_not_compiled_again_either():
    net, x = tiny_net(), tiny_net().example[0][0]
    compiled = []

    def backend(module, inputs):
        compiled.append(len(inputs))
        return module.forward

    torch.compiler.reset()
    whole = torch.compile(net, backend=backend, fullgraph=True)
    with torch.no_grad():
        for name in net.names:
            net.switch(name)
            torch.testing.assert_close(whole(x), net.model(x))
    assert len(compiled) == 1


def test_memory_at_rest_is_little_more_than_one_network_and_active_one_copy_more(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    sys.modules.pop("switch", None)
    from switch import storage_bytes

    net = wide_net()
    for name in net.names[1:]:
        net.recalibrate(name, [torch.randn(4, 64)])
    net.switch("dense")  # gives back what the last use of a subnetwork took
    one = sum(t.nbytes for t in net.model.state_dict().values())
    assert storage_bytes(net.model) == one
    assert storage_bytes(net) <= 1.3 * one
    for name in net.names:
        net.switch(name)
        assert storage_bytes(net) <= 2.3 * one
    net.switch("dense")
    assert storage_bytes(net) <= 1.3 * one
    net.prepare("unstructured@0.488").switch("unstructured@0.488")
    assert storage_bytes(net) <= 2.3 * one
    net.switch("dense").prepare()
    assert storage_bytes(net) <= 1.3 * one
