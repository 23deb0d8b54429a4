"""Switching in place: what is masked is zero, what was dense comes back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinyNet, tiny_net
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import Mask, PatternError, SubnetError
from cocktailsdk.api import CocktailNet


def values(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_masked_weight_is_zero_in_the_network_that_masks_it_and_no_other_changes():
    net = tiny_net()
    dense = values(net.model)
    for name in net.names[1:]:
        kept = net.masks[name].tensors(net.coupling)
        with net.using(name):
            for n, t in net.model.state_dict().items():
                expected = dense[n] * kept[n] if n in kept else dense[n]
                assert torch.equal(t, expected), (name, n)
    assert same(values(net.model), dense)


@given(st.lists(st.tuples(st.integers(0, 23), st.booleans()), min_size=1, max_size=8))
def test_the_dense_network_is_bit_identical_after_any_switching(steps):
    net = tiny_net()
    dense = values(net.model)
    identities = {n: id(p) for n, p in net.model.named_parameters()}
    for place, nested in steps:
        name = net.names[place]
        net.switch(name)
        if nested:
            with net.using(net.names[(place + 7) % 24]), net.using("dense", statistics=False):
                pass
            assert net.active == name
    net.switch("dense")
    assert same(values(net.model), dense)
    assert identities == {n: id(p) for n, p in net.model.named_parameters()}


def test_using_may_be_nested_and_restores_what_was_active():
    net = tiny_net()
    with net.using("2:4"):
        inside = values(net.model)
        with net.using("channel@0.469"):
            assert net.active == "channel@0.469"
            with net.using("2:4"):
                assert same(values(net.model), inside)
        assert net.active == "2:4"
        assert same(values(net.model), inside)
    assert net.active == "dense"


def test_an_exception_inside_using_restores_too():
    net = tiny_net()
    dense = values(net.model)
    with pytest.raises(RuntimeError, match="mine"), net.using("2:4"):
        raise RuntimeError("mine")
    assert net.active == "dense"
    assert same(values(net.model), dense)


def test_updates_of_masked_tensors_inside_using_are_discarded_with_an_error_and_outside_are_kept():
    net = tiny_net()
    dense = values(net.model)
    with pytest.raises(SubnetError, match="widen.weight changed"), net.using("2:4"), torch.no_grad():
        net.model.widen.weight.add_(1.0)
    assert same(values(net.model), dense)
    with net.using("2:4", changes="discard"), torch.no_grad():
        net.model.widen.weight.add_(1.0)
    assert same(values(net.model), dense)
    with torch.no_grad():
        net.model.widen.weight.add_(1.0)
    with net.using("2:4"):
        pass
    assert torch.equal(net.model.widen.weight, dense["widen.weight"] + 1.0)


def test_batch_norm_statistics_stay_shared_when_asked():
    net = tiny_net().train()
    x = net.example[0][0]
    net.statistics["2:4"] = {"bn1.running_mean": torch.full((8,), 9.0)}
    before = net.model.bn1.running_mean.clone()
    with net.using("2:4", statistics=False):
        assert torch.equal(net.model.bn1.running_mean, before)
        net(x)
    after = net.model.bn1.running_mean.clone()
    assert not torch.equal(after, before)
    assert net.model.bn1.num_batches_tracked == 1
    with net.using("2:4"):
        assert (net.model.bn1.running_mean == 9.0).all()
        net(x)
    assert torch.equal(net.model.bn1.running_mean, after)
    assert net.model.bn1.num_batches_tracked == 1


def test_gradients_flow_through_the_masked_network_and_masks_apply_to_them():
    net = tiny_net()
    x = net.example[0][0]
    with net.using("unstructured@0.488", statistics=False):
        net(x).sum().backward()
    masks = net.mask_tensors("unstructured@0.488")
    names = list(masks)
    net.zero_masked("unstructured@0.488", {n: p.grad for n, p in net.model.named_parameters()})
    assert all((net.model.get_parameter(n).grad[masks[n] == 0] == 0).all() for n in names)
    assert masks.keys() == {"widen.weight", "inner.weight"}
    assert all(masks[n].dtype == net.model.get_parameter(n).dtype for n in names)
    assert names == net.masked_parameters("unstructured@0.488")
    assert "bn1.running_mean" not in net.mask_tensors("channel@0.469")
    assert net.mask_tensors("dense") == {}
    assert net.masked_parameters("dense") == []


def test_switching_under_inference_mode_leaves_tensors_that_can_be_trained():
    net = tiny_net()
    dense = values(net.model)
    with torch.inference_mode():
        net.switch("2:4")
        net.switch("channel@0.1")
    net.switch("2:4")
    net.switch("dense")
    assert same(values(net.model), dense)
    net(net.example[0][0]).sum().backward()


def test_the_model_may_change_dtype_while_a_subnet_is_active():
    net = tiny_net()
    dense = values(net.model)
    net.switch("channel@0.469")
    net.double()
    net.switch("2:4")
    assert (net.model.widen.weight == 0).sum() == net.model.widen.weight.numel() // 2
    net.switch("dense")
    assert all(torch.equal(t, dense[n].to(t.dtype)) for n, t in net.model.state_dict().items())
    assert net.model.widen.weight.dtype == torch.float64
    assert net.mask_tensors("2:4")["widen.weight"].dtype == torch.float64


def test_the_nets_own_state_dict_is_always_dense():
    net = tiny_net()
    dense = {n: t.clone() for n, t in net.state_dict().items()}
    net.switch("2:4")
    assert same(net.state_dict(), dense)
    assert not torch.equal(net.model.state_dict()["widen.weight"], dense["model.widen.weight"])
    other = tiny_net(seed=1)
    other.switch("channel@0.469")
    other.load_state_dict(net.state_dict())
    assert other.active == "channel@0.469"
    other.switch("dense")
    assert same(other.state_dict(), dense)


def test_a_deep_copy_of_an_active_net_switches_on_its_own():
    net = tiny_net()
    dense = values(net.model)
    net.switch("2:4")
    twin = copy.deepcopy(net)
    assert twin.active == "2:4"
    twin.switch("dense")
    assert same(values(twin.model), dense)
    assert net.active == "2:4"
    assert (net.model.widen.weight == 0).any()
    net.switch("dense")
    assert same(values(net.model), dense)
    assert twin.model.widen.weight.data_ptr() != net.model.widen.weight.data_ptr()


def test_tied_parameters_are_masked_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 16)
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)
            self.second.weight = self.first.weight
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            return self.out(self.second(torch.relu(self.first(torch.relu(self.up(x))))))

    model = Tied()
    dense = values(model)
    net = cocktail.sparsify(model, "unstructured@0.5", example_inputs=torch.randn(3, 8))
    assert sum(w.name.startswith(("first", "second")) for w in net.eligible) == 1
    net.switch("unstructured@0.5")
    assert model.second.weight is model.first.weight
    assert (model.first.weight == 0).any()
    net.switch("dense")
    assert same(values(model), dense)


def test_names_may_be_written_loosely_and_unknown_ones_name_the_nearest():
    net = tiny_net()
    assert net.subnet("channel@0.10").name == "channel@0.1"
    assert net.subnet("unstructured@0.5904").name == "unstructured@0.59"
    for bad in ("chanel@0.1", "channel@0.11", "4:2", "", "dense@0", 3, None):
        with pytest.raises(SubnetError, match="nearest"):
            net.switch(bad)
    assert net.active == "dense"


def test_masks_change_only_while_dense_and_only_if_they_fit():
    net = tiny_net()
    mask = net.masks["2:4"]
    with net.using("1:2"), pytest.raises(SubnetError, match="while 'dense' is active"):
        net.set_mask("2:4", mask)
    with pytest.raises(SubnetError, match="no mask"):
        net.set_mask("dense", mask)
    with pytest.raises(PatternError, match="no parameter"):
        net.set_mask("2:4", Mask({"nowhere": torch.ones(1, dtype=torch.bool)}))
    with pytest.raises(PatternError, match="bool of shape"):
        net.set_mask("2:4", Mask({"widen.weight": torch.ones(3, dtype=torch.bool)}))
    with pytest.raises(PatternError, match="bool of shape"):
        net.set_mask("2:4", Mask({"widen.weight": torch.ones(16, 8, 3, 3)}))
    with pytest.raises(PatternError, match="24 units"):
        net.set_mask("2:4", Mask(removed=torch.zeros(3, dtype=torch.bool)))


def test_a_new_mask_drops_what_belonged_to_the_old_one():
    net = tiny_net()
    net.recalibrate("2:4", [net.example[0][0]])
    net.metrics["2:4"] = 0.9
    before = net.mask_tensors("2:4")
    net.set_mask("2:4", net.masks["1:2"])
    assert "2:4" not in net.statistics
    assert "2:4" not in net.metrics
    assert any(not torch.equal(before[n], m) for n, m in net.mask_tensors("2:4").items())


def test_a_subnet_without_a_mask_cannot_be_used_yet():
    full = tiny_net()
    net = CocktailNet(TinyNet(), full.patterns, full.coupling, full.selection, full.example, {})
    with pytest.raises(SubnetError, match="no mask yet"):
        net.switch("2:4")
    assert [r.name for r in net.subnets()] == ["dense"]


def test_unknown_attributes_are_the_models():
    net = tiny_net()
    net.model.config = {"a": 1}
    assert net.config == {"a": 1}
    assert net.widen is net.model.widen
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = net.nothing_of_this_name
    assert len(list(net.parameters())) == len(list(net.model.parameters()))


def test_reports_count_parameters_and_multiply_adds():
    net = tiny_net()
    reports = {r.name: r for r in net.subnets()}
    total = sum(p.numel() for p in net.model.parameters())
    assert reports["dense"].params == total
    for name, r in reports.items():
        with net.using(name):
            kept = net.masks[name].tensors(net.coupling) if name != "dense" else {}
            zeros = sum(int((~kept[n]).expand(p.shape).sum()) for n, p in net.model.named_parameters() if n in kept)
            assert r.params == total - zeros
        if name.startswith("channel"):
            assert r.nonzero_macs * 2 == r.flops
        else:
            assert r.flops == reports["dense"].flops
    eligible = sum(w.numel for w in net.eligible)
    assert reports["unstructured@0.2"].params == total - round(0.2 * eligible)
    assert reports["2:4"].nonzero_macs == reports["dense"].nonzero_macs - sum(w.macs // 2 for w in net.eligible)
