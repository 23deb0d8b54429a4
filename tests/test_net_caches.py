"""What torch keeps of weights inside a context does not outlive a switch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import cocktailsdk as cocktail
from cocktailsdk.training.session import load_tensors, model_tensors

PATTERNS = ["unstructured@0.9", "2:4", "channel@0.5"]
NAMES = ["dense", *PATTERNS]


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def small_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Linear(256, 4),
    )
    parametrize.register_parametrization(model[2], "weight", Half())
    return cocktail.sparsify(model.eval(), PATTERNS, (torch.randn(2, 3, 8, 8),))


NET = small_net()
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast that caches": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=True),
    "cached parametrizations": parametrize.cached,
    "both": lambda: _both(),
}


@contextlib.contextmanager
def _both():
    # the inner one does not drop the casts when it ends: the outer one keeps them
    with torch.autocast("cpu", torch.bfloat16), parametrize.cached(), torch.autocast("cpu", torch.bfloat16):
        yield


def output(net, name, way):
    if way == "switch":
        return net.switch(name)(X).float()
    with net.using(name):
        if way == "using":
            return net(X).float()
        return net.model(X).float() if way == "model" else torch.func.functional_call(net.model, {}, X).float()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.sampled_from(sorted(CONTEXTS)),
    st.booleans(),
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(["switch", "using", "model", "call"])), min_size=2, max_size=6
    ),
)
def test_in_any_order_inside_one_context_every_network_gives_what_it_gives_in_one_of_its_own(
    context, preloaded, grad, steps
):
    NET.preload(*(PATTERNS if preloaded else ())).switch("dense")
    with torch.set_grad_enabled(grad):
        right = []
        for name, way in steps:
            with CONTEXTS[context]():
                right.append(output(NET, name, way))
        NET.switch("dense")
        with CONTEXTS[context]():
            NET(X)
            assert all(torch.equal(output(NET, *step), wanted) for step, wanted in zip(steps, right, strict=True))


@pytest.mark.parametrize("context", sorted(CONTEXTS))
def test_statistics_recalibrated_inside_a_context_are_each_networks_own(context):
    net, right = small_net(), {}
    for name in NAMES:
        with CONTEXTS[context]():
            net.recalibrate(name, [X])
        right[name] = net.statistics[name]["3.running_var"].clone()
    with CONTEXTS[context]():
        net(X)
        for name in NAMES:
            net.recalibrate(name, [X])
            assert torch.equal(net.statistics[name]["3.running_var"], right[name])


def test_weights_that_are_loaded_inside_a_context_are_used_at_once():
    net = small_net()
    other = {n: t + 0.1 if t.is_floating_point() else t for n, t in net.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        before = net(X)
        net.load_state_dict(other)
        after = net(X)
        load_tensors(net.model, {n: t * 2 for n, t in model_tensors(net.model).items()})
        assert not torch.equal(before, after)
        assert not torch.equal(net(X), after)


def loss_after(net, outer):
    """Of a plain loop, and of a trainer, inside the caller's autocast or not."""
    loop = cocktail.CoLoop(net, steps=8, rounds=1)
    optimizer = torch.optim.SGD(net.model.parameters(), 0.1)
    batch = (X, torch.tensor([0, 1, 2, 3]))
    with outer:
        for x, y in loop.batches([batch]):
            with torch.autocast("cpu", torch.bfloat16), loop.step((x, y)) as step:
                out = net.model(x)
                optimizer.zero_grad()
                step.loss(F.cross_entropy(out, y), out, y).backward()
            optimizer.step()
        cocktail.CoTrainer(
            net,
            [batch],
            F.cross_entropy,
            epochs=1,
            start="pretrained",
            execution=cocktail.ExecutionSettings(mixed_precision="bf16"),
        ).fit()
    return net.state_dict()


def test_training_inside_the_callers_autocast_ends_with_the_same_weights():
    plain = loss_after(small_net(), contextlib.nullcontext())
    inside = loss_after(small_net(), torch.autocast("cpu", torch.bfloat16))
    assert all(torch.equal(t, inside[n]) for n, t in plain.items())


def test_weights_have_gradients_after_a_recalibration_inside_autocast():
    net = small_net()
    with torch.autocast("cpu", torch.bfloat16):
        net.recalibrate("dense", [X])
        net.recalibrate("2:4", [X])
        net(X).sum().backward()
    assert all(p.grad is not None for p in net.model.parameters())


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_compute_a_weight_before_each_pass_see_the_switch(norm):
    net = small_net()
    norm(net.model[0])  # before sparsify in real code: here only the hook's own recomputation matters
    model = net.model
    net = cocktail.sparsify(model, ["channel@0.5"], (X,))
    with torch.no_grad():
        right = {name: net.switch(name)(X).clone() for name in net.names}
        assert all(torch.equal(net.switch(name)(X), right[name]) for name in reversed(net.names))
    assert not torch.equal(right["dense"], right["channel@0.5"])
