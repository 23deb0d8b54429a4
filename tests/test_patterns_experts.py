"""Experts: whole experts go, tokens go to those that stay, and slim models have fewer experts."""

from __future__ import annotations

import copy
import logging
import pickle
import threading

import pytest
import torch
from block_models import WORDS, block_model, logits
from torch import nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk import Mask, PatternError
from cocktailsdk.bundle.couplings import read_coupling, write_coupling
from cocktailsdk.calibration.data import CalibrationData
from cocktailsdk.calibration.experts import observe_experts
from cocktailsdk.masks.encoder import decode_masks
from cocktailsdk.patterns.experts import expert_scores, removable_experts

KINDS = ["mixtral", "mixtral, batched", "qwen3-moe"]
GENERATION = {"attention_mask": torch.ones_like(WORDS), "max_new_tokens": 6, "do_sample": False}


def made(kind, patterns=("experts@0.25", "experts@0.5"), double=False, **options):
    model, args, kwargs = block_model(kind, 3)
    if double:
        model = model.double()
    return cocktail.sparsify(model, list(patterns), args, kwargs, **options), kwargs


@pytest.fixture(scope="module")
def mixtral():
    return made("mixtral")


def chosen(net, kwargs):
    """For each router, the experts that it gives tokens to."""
    found = {}

    def hook(path):
        return lambda _m, _a, out: found.setdefault(path, set()).update(out[2].flatten().tolist())

    handles = [net.model.get_submodule(s.module).register_forward_hook(hook(s.name)) for s in net.coupling.experts]
    with torch.no_grad():
        net(**kwargs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_slim_models_have_fewer_experts_and_compute_what_masked_ones_do(kind, tmp_path):
    double = kind == "mixtral, batched"  # grouped products have no float64
    net, kwargs = made(kind, double=double)
    layers = [1, 2] if kind == "qwen3-moe" else [0, 1, 2]
    assert [s.name for s in net.coupling.experts] == [f"model.layers.{i}.mlp" for i in layers]
    small = net.slim("experts@0.5")
    report = net.subnets()[2]
    assert report.sparsity_exact == 0.5
    assert sum(p.numel() for p in small.parameters()) == report.params
    assert {small.get_submodule(s.module).weight.shape[0] for s in net.coupling.experts} == {2}
    with net.using("experts@0.5"), torch.no_grad():
        masked = net(**kwargs).logits
        generated = net.model.generate(WORDS, **GENERATION)
    assert not torch.equal(masked, net(**kwargs).logits)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if double else {}
    torch.testing.assert_close(small(**kwargs).logits, masked, **tolerance)
    assert torch.equal(small.generate(WORDS, **GENERATION), generated)
    assert small.config.num_local_experts == 2
    assert net.model.config.num_local_experts == 4
    small.save_pretrained(tmp_path)
    read, found = type(net.model).from_pretrained(tmp_path, output_loading_info=True, dtype=small.dtype)
    assert not any(found.values())
    if double:
        read.set_experts_implementation("batched_mm")
    torch.testing.assert_close(read.eval()(**kwargs).logits, small(**kwargs).logits)


def test_no_token_is_given_to_a_removed_expert_and_all_are_chosen_from_again_afterwards(mixtral):
    net, kwargs = mixtral
    dense, before = chosen(net, kwargs), net(**kwargs).logits
    for name in ("experts@0.25", "experts@0.5"):
        with net.using(name):
            for at, used in chosen(net, kwargs).items():
                assert not used & set(net.masks[name].experts[at].nonzero().flatten().tolist())
    assert chosen(net, kwargs) == dense
    assert torch.equal(net(**kwargs).logits, before)
    assert not any("forward" in vars(m) for m in net.model.modules())


def test_what_is_active_stays_so_in_copies_pickles_and_compiled_models(mixtral):
    net, kwargs = mixtral
    compiled = torch.compile(net.model, backend="eager")
    dense = net(**kwargs).logits
    with torch.no_grad():
        torch.testing.assert_close(compiled(**kwargs).logits, dense)
    with net.using("experts@0.5"), torch.no_grad():
        masked = net(**kwargs).logits
        other, model = copy.deepcopy(net), copy.deepcopy(net.model)
        torch.testing.assert_close(compiled(**kwargs).logits, masked)
        assert torch.equal(pickle.loads(pickle.dumps(net.model))(**kwargs).logits, masked)
    with torch.no_grad():
        assert torch.equal(other(**kwargs).logits, masked)
        assert torch.equal(model(**kwargs).logits, masked)
        assert torch.equal(other.switch("dense")(**kwargs).logits, dense)
        torch.testing.assert_close(compiled(**kwargs).logits, dense)


def test_preloaded_weights_come_with_their_routers(mixtral):
    net, kwargs = mixtral
    with net.using("experts@0.5"):
        masked = net(**kwargs).logits
    net.preload("experts@0.5", "experts@0.25")
    assert net.preloaded == ["experts@0.25", "experts@0.5"]
    for _ in range(2):
        assert torch.equal(net.switch("experts@0.5")(**kwargs).logits, masked)
        net.switch("experts@0.25")
    net.switch("dense").preload()


def test_threads_see_the_routers_of_the_subnetwork_that_they_read(mixtral):
    net, kwargs = mixtral
    with torch.no_grad():
        wanted = {}
        for name in net.names:
            with net.using(name):
                wanted[name] = net(**kwargs).logits
    wrong = []

    def read():
        for _ in range(20):
            with net.hold() as name, torch.no_grad():
                if not torch.equal(net.model(**kwargs).logits, wanted[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for t in threads:
        t.start()
    for _ in range(5):
        for name in net.names:
            net.switch(name)
    net.switch("dense")
    for t in threads:
        t.join()
    assert not wrong


def test_the_experts_of_least_score_go_nested(mixtral):
    net, _ = mixtral
    umg = net.umg()
    assert removable_experts(net.coupling, net.eligible) == net.coupling.experts
    for s in net.coupling.experts:
        scores = expert_scores(umg, s)
        by_hand = []
        for i in range(4):
            own = torch.cat([umg.values[t][i].flatten() for t in s.tensors[1:]]).double()
            by_hand.append(own.abs().mean() * umg.values[s.router][i].double().norm())
        torch.testing.assert_close(scores, torch.stack(by_hand))
        order = scores.argsort().tolist()
        for k, name in enumerate(net.names[1:], 1):
            assert net.masks[name].experts[s.name].nonzero().flatten().tolist() == sorted(order[:k])


def test_activation_is_the_mean_router_weighted_norm_of_an_experts_outputs():
    model, args, kwargs = block_model("mixtral", 1)
    experts, router = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate
    seen = []
    with model.model.layers[0].mlp.register_forward_pre_hook(lambda _m, a: seen.append(a[0])), torch.no_grad():
        model(**kwargs)
        x = seen[0].flatten(0, 1)
        top, index = F.softmax(x @ router.weight.T, -1).topk(2)
        gates = top / top.sum(-1, keepdim=True)
        wanted = []
        for i in range(4):
            gate, up = (x @ experts.gate_up_proj[i].T).chunk(2, -1)
            norms = ((F.silu(gate) * up) @ experts.down_proj[i].T).norm(dim=-1)
            given = index == i
            wanted.append(float((norms[:, None] * gates)[given].mean()) if given.any() else 0.0)
    net = cocktail.sparsify(model, ["experts@0.5"], args, kwargs, score="activation", calibration=[kwargs])
    (of,) = net.coupling.experts
    routed = observe_experts(model, [of], CalibrationData.of([kwargs]))[of.name]
    scores = cocktail.patterns.scores.Activation().experts(routed)
    torch.testing.assert_close(scores, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert int(routed.tokens.sum()) == 2 * WORDS.numel()
    gone = net.masks["experts@0.5"].experts[of.name]
    assert set(gone.nonzero().flatten().tolist()) == set(sorted(range(4), key=wanted.__getitem__)[:2])
    assert not any(m._forward_hooks for m in model.modules())


def test_experts_without_tokens_go_first_and_are_named(caplog):
    model, args, kwargs = block_model("mixtral", 1)
    mlp, seen = model.model.layers[0].mlp, []
    with mlp.register_forward_pre_hook(lambda _m, a: seen.append(a[0])), torch.no_grad():
        model(**kwargs)
        x = seen[0].flatten(0, 1)  # 12 tokens of 16 channels: a row exists that gives each of them the same logit
        mlp.gate.weight[2] = torch.linalg.lstsq(x, torch.full((len(x), 1), -10.0)).solution.flatten()
    with caplog.at_level(logging.WARNING):
        net = cocktail.sparsify(model, ["experts@0.25"], args, kwargs, score="activation", calibration=[kwargs])
    (of,) = net.coupling.experts
    assert f"no calibration token was given to 1 of 4 experts of {of.name!r}, which go first: 2" in caplog.text
    assert net.masks["experts@0.25"].experts[of.name].tolist() == [False, False, True, False]


def test_bundles_keep_which_experts_go(mixtral, tmp_path):
    net, kwargs = mixtral
    net.save_pretrained(tmp_path / "bundle")
    read = cocktail.from_pretrained(tmp_path / "bundle")
    assert read.coupling.experts == net.coupling.experts
    for name in net.names[1:]:
        assert read.masks[name].experts.keys() == net.masks[name].experts.keys()
        with net.using(name), read.using(name):
            torch.testing.assert_close(read(**kwargs).logits, net(**kwargs).logits)
    assert read.slim("experts@0.5").config.num_local_experts == 2


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ([["model", [0]]], "the model has none there"),
        ([["model.layers.0.mlp", [4]]], "for an expert"),
        ([["model.layers.0.mlp", [0]], ["model.layers.0.mlp", [1]]], "twice"),
        ({"model.layers.0.mlp": [0]}, "not a list"),
    ],
)
def test_entries_of_masks_that_do_not_fit_the_model_are_refused(mixtral, sets, said):
    net, _ = mixtral
    name = "experts@0.5"
    with pytest.raises(cocktail.BundleError, match=said):
        decode_masks([{"experts": name, "sets": sets}], dict.__getitem__, [name], net.coupling, net.eligible)


def test_couplings_with_experts_that_do_not_fit_the_model_are_refused(mixtral):
    net, _ = mixtral
    names = list(net.coupling.shapes)
    meta, units = write_coupling(net.coupling, names)
    assert read_coupling(meta, units, names, net.coupling.shapes, {}).experts == net.coupling.experts
    name, module, tensors, count, top_k = meta["experts"][0]
    wrong = [
        [name, "elsewhere", tensors, count, top_k],
        [name, module, tensors, count + 1, top_k],
        [name, module, tensors, count, count + 1],
        [name, module, [], count, top_k],
    ]
    for entry in wrong:
        with pytest.raises(cocktail.BundleError):
            read_coupling({**meta, "experts": [entry]}, units, names, net.coupling.shapes, {})


def test_such_subnetworks_are_trained_and_removed_experts_get_no_gradient():
    net, kwargs = made("mixtral", ["experts@0.5"])
    with net.using("experts@0.5"):
        out = net(**kwargs, labels=WORDS, output_router_logits=True)
        out.loss.backward()
        assert torch.isfinite(out.loss)
    for s in net.coupling.experts:
        gone = net.masks["experts@0.5"].experts[s.name]
        for t in s.tensors:
            grad = net.model.get_parameter(t).grad
            assert bool(grad.isfinite().all())
            assert not bool(grad[gone].any())
            assert bool(grad[~gone].any())


def test_co_training_keeps_tokens_from_removed_experts(tmp_path):
    net, kwargs = made("mixtral", ["experts@0.25", "experts@0.5"])
    data = [{"input_ids": WORDS, "labels": WORDS}] * 2
    cocktail.CoTrainer(net, data, val_loader=data, epochs=2, out_dir=tmp_path, learning_rate=1e-3).fit()
    for name in net.names[1:]:
        with net.using(name):
            for at, used in chosen(net, kwargs).items():
                assert not used & set(net.masks[name].experts[at].nonzero().flatten().tolist())
            masked = net(**kwargs).logits
        torch.testing.assert_close(net.slim(name)(**kwargs).logits, masked)


def test_impossible_requests_say_what_to_type(mixtral):
    net, kwargs = mixtral
    model = net.model
    with pytest.raises(PatternError, match=r"removes 3 of the 4 experts.*given to 2.*Experts\(\[0.5\]\)"):
        cocktail.sparsify(model, ["experts@0.75"], example_kwargs=kwargs)
    with pytest.raises(PatternError, match=r"not eligible.*exclude_modules"):
        cocktail.sparsify(model, ["experts@0.5"], example_kwargs=kwargs, exclude_modules=["gate"])
    llama, _, words = block_model("llama", 1)
    with pytest.raises(PatternError, match="no experts that can go.*'mlp@0.5'"):
        cocktail.sparsify(llama, ["experts@0.5"], example_kwargs=words)
    with pytest.raises(PatternError, match="no factor of a product"):
        cocktail.sparsify(model, ["heads@0.5+experts@0.5"], example_kwargs=kwargs)
    of = net.coupling.experts[0].name
    with pytest.raises(PatternError, match="leaves 1 experts.*at most 2"):
        net.set_mask("experts@0.5", Mask(experts={of: torch.tensor([True, True, True, False])}))
    with pytest.raises(PatternError, match="has no such experts"):
        net.set_mask("experts@0.5", Mask(experts={"model": torch.ones(4, dtype=torch.bool)}))
    with pytest.raises(PatternError, match="use net.slim"):
        cocktail.reconstruct(net, "experts@0.5", [kwargs, kwargs])
    with pytest.raises(cocktail.SubnetError, match="removes experts"):
        net.views(["experts@0.25"])


class Mixture(nn.Module):
    """A mixture of one's own, whose router is a linear layer with a bias."""

    def __init__(self, k=1):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.num_experts, self.k = 4, k
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 6)), nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x):
        weights, chosen = self.router(x).topk(self.k, -1)
        out = 0
        for i in range(self.k):
            up, down = self.up[chosen[:, i]], self.down[chosen[:, i]]
            hidden = torch.bmm(x[:, None], up).relu()
            out = out + torch.bmm(hidden, down)[:, 0] * weights.softmax(-1)[:, i, None]
        return x + out


@pytest.mark.parametrize("k", [1, 2])
def test_mixtures_of_ones_own_lose_experts_and_the_biases_of_their_routers(k):
    torch.manual_seed(0)
    model, x = Mixture(k), torch.randn(16, 8)
    net = cocktail.sparsify(nn.Sequential(model), ["experts@0.25"], (x,))
    (of,) = net.coupling.experts
    assert set(of.tensors) == {"0.router.weight", "0.router.bias", "0.up", "0.down"}
    assert (of.count, of.top_k) == (4, k)
    small = net.slim("experts@0.25")
    assert small[0].router.bias.shape == (3,)
    assert small[0].num_experts == 3
    with net.using("experts@0.25"):
        torch.testing.assert_close(logits(small(x)), net(x))
    with pytest.raises(PatternError, match="is not called with the experts chosen"):
        cocktail.sparsify(net.model, ["experts@0.25"], (x,), score="activation", calibration=[x])


def test_a_forward_that_somebody_else_has_hidden_is_used_and_comes_back():
    torch.manual_seed(0)
    model, x = Mixture(1), torch.randn(16, 8)
    net = cocktail.sparsify(model, ["experts@0.25"], (x,))
    with net.using("experts@0.25"):
        wanted = net(x)
    calls = []

    def hidden(inputs):
        calls.append(inputs)
        return F.linear(inputs, model.router.weight, model.router.bias)

    model.router.forward = hidden
    with net.using("experts@0.25"):
        assert torch.equal(net(x), wanted)
    assert len(calls) == 1
    assert vars(model.router)["forward"] is hidden


def test_a_router_that_computes_its_logits_in_another_way_is_no_silent_error():
    torch.manual_seed(0)
    model, x = Mixture(1), torch.randn(16, 8)
    net = cocktail.sparsify(model, ["experts@0.25"], (x,))
    model.router.forward = lambda inputs: inputs @ model.router.weight.T + model.router.bias
    with net.using("experts@0.25"), pytest.raises(cocktail.SubnetError, match=r"did not compute the logits.*net.slim"):
        net(x)
