"""Adapters (LoRA): not pruned, not merged into masked weights, put on before `sparsify`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import CocktailError, SubnetError

peft = pytest.importorskip("peft")
X = torch.randn(2, 16)


def adapted(**options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    config = peft.LoraConfig(r=8, target_modules=["2"], init_lora_weights=False, **options)
    return peft.get_peft_model(base, config)


def test_adapters_are_neither_masked_nor_are_their_ranks_channels():
    net = cocktail.sparsify(adapted(), ["2:4", "unstructured@0.5", "channel@0.5"], (X,))
    assert [w.name for w in net.eligible] == ["base_model.model.0.weight", "base_model.model.2.base_layer.weight"]
    assert {tuple(p.weight for p in net.coupling.producers if "lora_A" in p.weight)} == {()}
    small = net.slim("channel@0.5")
    with net.using("channel@0.5"), torch.no_grad():
        assert torch.allclose(small(X), net(X), atol=1e-5)
    chosen = cocktail.sparsify(adapted(), "2:4", (X,), target_modules=["lora_B.default"])
    assert [w.name for w in chosen.eligible] == ["base_model.model.2.lora_B.default.weight"]


def test_channels_that_dora_divides_by_their_norm_stay_and_weights_go():
    with pytest.raises(CocktailError, match="divided by channels that masking would make zero"):
        cocktail.sparsify(adapted(use_dora=True), "channel@0.5", (X,))
    net = cocktail.sparsify(adapted(use_dora=True), ["2:4", "unstructured@0.5"], (X,))
    assert [w.name for w in net.eligible] == ["base_model.model.0.weight", "base_model.model.2.base_layer.weight"]


def test_norms_that_dora_keeps_are_those_of_the_active_subnetwork():
    helpers = pytest.importorskip("peft.helpers")
    net = cocktail.sparsify(adapted(use_dora=True).eval(), "2:4", (X,))
    with torch.no_grad():
        want = {}
        for name in net.names:
            with net.using(name):
                want[name] = net(X)
        with helpers.DoraCaching():
            for name in (*net.names, *net.names):
                net.switch(name)
                assert torch.equal(net(X), want[name]), name


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_while_a_subnetwork_is_active_and_works_after(merge):
    model = adapted()
    net = cocktail.sparsify(model, "2:4", (X,))
    dense = net.model(X).detach()
    net.switch("2:4")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(SubnetError, match="adapters cannot be merged while '2:4' is active"):
        getattr(model, merge)()
    with net.using("2:4"), pytest.raises(SubnetError, match="cannot be merged"):
        getattr(model, merge)()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    net.switch("dense")
    merged = getattr(model, merge)() or model
    assert torch.allclose(merged(X), dense, atol=1e-5)
    assert not any("merge" in m.__dict__ for m in model.modules())


def test_copies_and_files_of_an_active_model_merge_as_ever():
    net = cocktail.sparsify(adapted(), "2:4", (X,)).switch("2:4")
    masked = net(X).detach()
    stored = io.BytesIO()
    torch.save(net.model, stored)
    assert b"cocktailsdk" not in stored.getvalue()
    stored.seek(0)
    for model in (copy.deepcopy(net.model), torch.load(stored, weights_only=False), net.slim("2:4")):
        assert torch.allclose(model.merge_and_unload()(X), masked, atol=1e-5)
    twin = copy.deepcopy(net)
    with pytest.raises(SubnetError, match="cannot be merged"):
        twin.model.merge_and_unload()


def test_unloading_adapters_under_a_subnetwork_gives_the_dense_weights_back():
    model = adapted()
    weight = model.base_model.model[2].base_layer.weight
    dense = weight.detach().clone()
    net = cocktail.sparsify(model, "2:4", (X,)).switch("2:4")
    plain = model.unload()
    with pytest.raises(CocktailError, match="was changed after sparsify"):
        net.switch("dense")
    assert plain[2].weight is weight
    assert torch.equal(weight, dense)


def test_adapters_put_on_after_sparsify_are_named():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    net = cocktail.sparsify(base, ["2:4", "channel@0.5"], (X,))
    peft.get_peft_model(net.model, peft.LoraConfig(r=4, target_modules=["2"]))
    calls = (net.subnets, net.state_dict, lambda: net.switch("2:4"), lambda: net.slim("channel@0.5"))
    for call in (*calls, lambda: cocktail.verify_nm(net, 2, 4)):
        with pytest.raises(CocktailError, match=r"'2' \(Linear\) was replaced by a peft\.[\w.]+: *|adapters"):
            call()


def test_a_trained_net_with_adapters_is_saved_and_loaded(tmp_path):
    net = cocktail.sparsify(adapted(), "2:4", (X,))
    batches = [(X, torch.tensor([0, 1]))]
    cocktail.CoTrainer(net, batches, nn.functional.cross_entropy, epochs=3, start="pretrained").fit()
    net.save_pretrained(tmp_path / "net")
    again = cocktail.from_pretrained(tmp_path / "net", adapted())
    assert torch.equal(again.switch("2:4")(X), net.switch("2:4")(X))
    assert [w.name for w in again.eligible] == [w.name for w in net.eligible]
