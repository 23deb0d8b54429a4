"""Batch-norm statistics: measured exactly, kept for each subnetwork, no trace anywhere else."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_net
from torch.nn import functional as F

from cocktailsdk import CocktailError, SubnetError


def batches(n=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(n)]


def test_statistics_are_the_average_over_batches_of_the_networks_own_activations():
    net = tiny_net()
    means, variances = [], []

    def watch(module, inputs, out):
        means.append(out.mean((0, 2, 3)))
        variances.append(out.transpose(0, 1).flatten(1).var(1))

    net.model.widen.register_forward_hook(watch)
    net.recalibrate("2:4", batches())
    found = net.statistics["2:4"]
    assert torch.allclose(found["bn2.running_mean"], torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(found["bn2.running_var"], torch.stack(variances).mean(0), rtol=1e-5)


def test_recalibrating_a_subnet_leaves_modes_momenta_weights_and_dense_buffers_alone():
    net = tiny_net().train()
    net.model.bn1.eval()
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    modes = [m.training for m in net.modules()]
    net.recalibrate("channel@0.344", batches())
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert net.model.bn1.momentum == 0.1
    assert all(p.grad is None for p in net.parameters())


def test_the_subnets_own_statistics_serve_while_it_is_active():
    net = tiny_net()
    net.recalibrate("channel@0.344", batches())
    own = net.statistics["channel@0.344"]
    removed = net.masks["channel@0.344"].removed[:8]
    assert (own["bn1.running_var"][removed] == 0).all()
    dense = net.model.bn1.running_mean.clone()
    with net.using("channel@0.344"):
        assert torch.equal(net.model.bn1.running_mean, own["bn1.running_mean"])
        assert torch.isfinite(net(batches()[0])).all()
    assert torch.equal(net.model.bn1.running_mean, dense)


def test_recalibrating_the_active_subnet_takes_effect_at_once():
    net = tiny_net()
    net.switch("2:4")
    net.recalibrate("2:4", batches())
    assert net.active == "2:4"
    assert torch.equal(net.model.bn2.running_var, net.statistics["2:4"]["bn2.running_var"])


def test_the_dense_networks_statistics_are_the_models_buffers():
    net = tiny_net()
    net.switch("2:4")
    net.recalibrate("dense", batches())
    net.switch("dense")
    assert torch.equal(net.model.bn2.running_var, net.statistics["dense"]["bn2.running_var"])
    with net.using("channel@0.1"):
        pass
    assert torch.equal(net.model.bn2.running_var, net.statistics["dense"]["bn2.running_var"])


@pytest.mark.parametrize("name", ["dense", "2:4"])
def test_no_batches_is_an_error_and_changes_nothing(name):
    net = tiny_net()
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    with pytest.raises(CocktailError, match="no batches"):
        net.recalibrate(name, [])
    with pytest.raises(ZeroDivisionError):
        net.recalibrate(name, [batches()[0], None], forward=lambda m, b: m(b) if b is not None else 1 / 0)
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())
    assert net.statistics == {}
    with pytest.raises(SubnetError):
        net.recalibrate("nothing", batches())


def test_batches_may_be_tensors_tuples_dicts_or_the_users_own():
    net = tiny_net()

    results = []
    for made, forward in (
        (batches(), None),
        ([(b, torch.zeros(4)) for b in batches()], None),
        ([{"x": b} for b in batches()], None),
        ([{"image": b, "id": 1} for b in batches()], lambda m, b: m(b["image"])),
    ):
        net.recalibrate("2:4", made, forward)
        results.append(net.statistics["2:4"]["bn2.running_mean"])
    assert all(torch.equal(r, results[0]) for r in results)


def test_dropout_is_off_while_statistics_are_measured():
    net = tiny_net()
    net.model.first.register_forward_hook(lambda module, inputs, out: F.dropout(out, 0.9, module.training))
    net.train()
    net.recalibrate("dense", batches())
    first = net.statistics["dense"]["bn1.running_mean"]
    net.recalibrate("dense", batches())
    assert torch.equal(net.statistics["dense"]["bn1.running_mean"], first)
