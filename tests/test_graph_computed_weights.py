"""Weights that are computed from a parameter: masks are exact in what the model multiplies with, slim equals masked.

Weight norm and spectral norm (hooks and parametrizations), torch.nn.utils.prune, parametrizations of users, fake
quantization.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_cases import assert_equal, half, one, removal, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

import cocktailsdk as cocktail
from cocktailsdk.errors import PatternError
from cocktailsdk.graph import couple
from cocktailsdk.graph.cut import duplicate
from cocktailsdk.masks import Mask

property_test = settings(max_examples=12, deadline=None, derandomize=True)


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 0.5


class Tanh(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * torch.tanh(w)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


class Centred(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean(1, keepdim=True)


def parametrized(module: nn.Module, by: type[nn.Module]) -> nn.Module:
    parametrize.register_parametrization(module, "weight", by(), unsafe=True)
    return module


def of_old(wrap: Callable[..., nn.Module], module: nn.Module, **options: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrap(module, **options)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda m: m,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of inputs": lambda m: parametrizations.weight_norm(m, dim=1),
    "weight_norm of all": lambda m: parametrizations.weight_norm(m, dim=None),
    "weight_norm of old": lambda m: of_old(nn.utils.weight_norm, m),
    "weight_norm of old, of all": lambda m: of_old(nn.utils.weight_norm, m, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm of old": lambda m: of_old(nn.utils.spectral_norm, m),
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", amount=0.2),
    "random_structured": lambda m: prune.random_structured(m, "weight", amount=0.25, dim=1),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", amount=0.25, n=2, dim=0),
    "custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.rand(m.weight.shape) > 0.1),
    "pruned twice": lambda m: prune.random_unstructured(prune.l1_unstructured(m, "weight", 0.1), "weight", 0.1),
    "halved": lambda m: parametrized(m, Halved),
    "tanh": lambda m: parametrized(m, Tanh),
    "two parametrizations": lambda m: parametrized(parametrizations.weight_norm(m), Halved),
}
wrappers = st.sampled_from(sorted(WRAPPERS))
layers = st.lists(st.tuples(st.sampled_from(["conv", "transposed", "depthwise"]), wrappers), min_size=1, max_size=3)


def images(chosen: list[tuple[str, str]], width: int) -> nn.Module:
    """A stack of wrapped layers between a convolution and a classifier."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 1), nn.ReLU()]
    channels = width
    for kind, wrap in chosen:
        out = channels if kind == "depthwise" else 8 if channels != 8 else 12
        made = {
            "conv": lambda n, m: nn.Conv2d(n, m, 3, padding=1),
            "transposed": lambda n, m: nn.ConvTranspose2d(n, m, 3, padding=1),
            "depthwise": lambda n, m: nn.Conv2d(n, m, 3, padding=1, groups=n),
        }[kind](channels, out)
        parts += [WRAPPERS["plain" if kind == "depthwise" and "inputs" in wrap else wrap](made), nn.ReLU()]
        channels = out
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def sequences(chosen: list[str]) -> nn.Module:
    """The same of linear layers."""
    parts: list[nn.Module] = [nn.Linear(8, 12), nn.ReLU()]
    for wrap in chosen:
        parts += [WRAPPERS[wrap](nn.Linear(12, 12)), nn.GELU()]
    return nn.Sequential(*parts, nn.Linear(12, 3))


def multiplied(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each layer multiplies with, as seen after a pass."""
    with torch.no_grad():
        model(x)
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        return {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, kinds)}


def agree(model: nn.Module, x: Tensor) -> None:
    """Masks are zeros of the computed weights and nothing else is; slim equals masked in both modes."""
    model.eval()
    net = cocktail.sparsify(model, ["unstructured@0.5", "2:4", "channel@0.5"], (x,))
    dense = multiplied(net.model, x)
    for name in ("unstructured@0.5", "2:4"):
        with net.using(name):
            now = multiplied(net.model, x)
            assert name != "2:4" or cocktail.verify_nm(net, 2, 4)
        for w in net.eligible:
            module = w.module.partition(".parametrizations")[0]
            keep = net.masks[name].elements[w.name]
            assert not now[module][~keep].any()
            assert not now[module].isnan().any()
            kept = now[module][keep] != 0
            assert torch.equal(kept, dense[module][keep] != 0) or "unstructured" in name
    assert all(torch.equal(a, b) for a, b in zip(dense.values(), multiplied(net.model, x).values(), strict=True))
    coupling = net.coupling
    for count in (half, one):
        removed = removal(coupling, count)
        slim = assert_equal(model, coupling, removed, (x,))
        masked = duplicate(wide(model)).train()
        tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
        with torch.no_grad():
            for name, keep in coupling.masks(removed).items():
                tensors[name].mul_(keep)
            want = masked(x.double())
            torch.testing.assert_close(slim.train()(x.double()), want, rtol=1e-8, atol=1e-8)


@property_test
@given(chosen=layers, width=st.sampled_from([4, 6, 8]), seed=st.integers(0, 5))
def test_masks_are_exact_and_slim_equals_masked_for_random_wrapped_convolutions(
    chosen: list[tuple[str, str]], width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    agree(images([("conv", "plain"), *chosen], width), torch.randn(2, 3, 5, 5))


@property_test
@given(chosen=st.lists(wrappers, min_size=1, max_size=3), seed=st.integers(0, 5))
def test_masks_are_exact_and_slim_equals_masked_for_random_wrapped_linear_layers(chosen: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    agree(sequences(chosen), torch.randn(3, 8))


@pytest.mark.parametrize("wrap", sorted(WRAPPERS))
def test_each_wrapper_leaves_its_channels_and_its_weights_prunable(wrap: str) -> None:
    model, x = sequences([wrap]), torch.randn(3, 8)
    net = cocktail.sparsify(model, ["unstructured@0.5", "channel@0.5"], (x,))
    assert {w.module.partition(".parametrizations")[0] for w in net.eligible} == {"0", "2"}
    assert [g.size for g in net.coupling.groups] == [12, 12]
    slim = net.slim("channel@0.5")
    assert [p.shape for p in slim[2].parameters()] and slim[4].weight.shape == (3, 6)


@pytest.mark.parametrize("wrap", [w for w in sorted(WRAPPERS) if "weight_norm" in w])
def test_a_row_without_weights_is_zero_and_not_nan_under_weight_norm(wrap: str) -> None:
    model, x = sequences([wrap]).eval(), torch.randn(3, 8)
    net = cocktail.sparsify(model, ["unstructured@0.5"], (x,))
    weight = next(w for w in net.eligible if w.module.startswith("2"))
    keep = torch.ones(weight.shape, dtype=torch.bool)
    keep[:3], keep[:, 5] = False, False
    net.set_mask("unstructured@0.5", Mask({weight.name: keep}))
    with net.using("unstructured@0.5"):
        now = multiplied(net.model, x)["2"]
    assert not now[~keep].any() and bool((now[keep] != 0).all())
    net.set_mask("unstructured@0.5", Mask({weight.name: torch.zeros_like(keep)}))
    with net.using("unstructured@0.5"):
        assert not multiplied(net.model, x)["2"].any()


@pytest.mark.parametrize("wrap", ["spectral_norm", "spectral_norm of old"])
def test_a_mask_that_would_divide_zero_by_zero_is_refused(wrap: str) -> None:
    with pytest.raises(PatternError, match=r"0 / 0.*exclude_modules=\['2'\]"):
        cocktail.sparsify(sequences([wrap]), ["unstructured@1"], (torch.randn(3, 8),))


@pytest.mark.parametrize("by", [Symmetric, Centred])
def test_weights_that_lose_zeros_are_not_masked_and_inspect_says_why(by: type[nn.Module]) -> None:
    model, x = sequences(["plain"]), torch.randn(3, 8)
    parametrized(model[2], by)
    net = cocktail.sparsify(model, ["unstructured@0.5"], (x,))
    assert [w.module for w in net.eligible] == ["0"]
    layer = next(layer for layer in cocktail.inspect(model, (x,)).layers if "original" in layer.name)
    assert "would not be zeros" in layer.unstructured.reason
    with pytest.raises(PatternError, match="selects no weight"):
        cocktail.sparsify(model, ["2:4"], (x,), target_modules=["original"])


def test_orthogonal_weights_are_not_masked() -> None:
    model, x = sequences(["plain"]), torch.randn(3, 8)
    parametrizations.orthogonal(model[2])
    net = cocktail.sparsify(model, ["unstructured@0.5"], (x,))
    assert [w.module for w in net.eligible] == ["0"]


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def test_standardised_weights_are_not_masked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Standardised(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1))
    net = cocktail.sparsify(model, ["2:4"], (torch.randn(2, 3, 6, 6),))
    assert [w.module for w in net.eligible] == ["3"]


def test_what_torch_prune_removed_goes_first() -> None:
    torch.manual_seed(0)
    model, x = sequences(["plain"]), torch.randn(3, 8)
    large = torch.zeros(12, 12, dtype=torch.bool)
    large[:, ::2] = True
    with torch.no_grad():
        model[2].weight[~large] += 10.0  # by its own magnitude it would stay
    prune.custom_from_mask(model[2], "weight", large)
    net = cocktail.sparsify(model, ["2:4"], (x,), target_modules=["2"])
    assert torch.equal(net.masks["2:4"].elements["2.weight_orig"], large)


def test_weights_are_ranked_by_what_the_model_multiplies_with() -> None:
    model, x = sequences(["weight_norm"]), torch.randn(3, 8)
    with torch.no_grad():
        model[2].parametrizations.weight.original1[:6] *= 100.0  # a direction has no length
    net = cocktail.sparsify(model, ["unstructured@0.5"], (x,), target_modules=["2"])
    keep = net.masks["unstructured@0.5"].elements["2.parametrizations.weight.original1"]
    weight = model[2].weight.detach().abs()
    assert float(weight[keep].min()) >= float(weight[~keep].max())


def quantization_aware() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.prepare_qat(model, inplace=True)
    model(torch.randn(4, 3, 8, 8))
    return model.eval()


def test_fake_quantized_weights_are_masked() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = cocktail.sparsify(quantization_aware(), ["2:4"], (x,))
    assert {w.name for w in net.eligible} == {"2.weight"}
    with net.using("2:4"), torch.no_grad():
        weight = net.model[2].weight_fake_quant(net.model[2].weight)
        assert cocktail.verify_nm(net, 2, 4)
    assert not weight[~net.masks["2:4"].elements["2.weight"]].any()
    reasons = {k.where: k.reason for k in cocktail.inspect(net.model, (x,)).kept}
    assert "fake quantization" in reasons["2.weight"]


@pytest.mark.parametrize("wrap", ["weight_norm", "weight_norm of old", "l1_unstructured", "spectral_norm"])
def test_bundles_of_computed_weights_give_the_same_networks(wrap: str, tmp_path) -> None:
    model, x = sequences([wrap]).eval(), torch.randn(3, 8)
    again = sequences([wrap]).eval()
    net = cocktail.sparsify(model, ["unstructured@0.9", "2:4", "channel@0.5"], (x,))
    net.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", again)
    with torch.no_grad():
        for name in net.names:
            with net.using(name), loaded.using(name):
                assert torch.equal(loaded(x), net(x))
                assert name != "2:4" or cocktail.verify_nm(loaded, 2, 4)
        torch.testing.assert_close(loaded.slim("channel@0.5")(x), net.slim("channel@0.5")(x))


@pytest.mark.parametrize("wrap", ["weight_norm", "weight_norm of old", "l1_unstructured", "tanh"])
def test_plain_models_are_checked_by_what_they_multiply_with(wrap: str) -> None:
    model, x = sequences([wrap]).eval(), torch.randn(3, 8)
    net = cocktail.sparsify(model, ["2:4"], (x,))
    slim = net.slim("2:4")
    assert cocktail.verify_nm(slim, 2, 4) and not cocktail.verify_nm(model, 2, 4)
    with net.using("2:4"):
        assert int((net.model[2].weight != 0).sum(1).max()) <= 6  # also before the next pass


def test_training_keeps_masks_exact_and_weights_finite() -> None:
    model = sequences(["weight_norm", "weight_norm of old", "l1_unstructured"])
    x, y = torch.randn(16, 8), torch.arange(16) % 3
    net = cocktail.sparsify(model, ["unstructured@0.9", "2:4", "channel@0.5"], (x,))
    loader = [(x, y)] * 2
    cocktail.CoTrainer(net, loader, F.cross_entropy, total_steps=44, rounds=cocktail.RoundSettings(count=2)).fit()
    model.eval()
    for name in net.names[1:]:
        with net.using(name):
            now = multiplied(net.model, x)
            assert name != "2:4" or cocktail.verify_nm(net, 2, 4)
        assert all(bool(t.isfinite().all()) for t in now.values())
        for w in net.eligible:
            keep = net.masks[name].elements.get(w.name)
            assert keep is None or not now[w.module.partition(".parametrizations")[0]][~keep].any()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: of_old(nn.utils.weight_norm, m, name="weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.2),
    ],
)
def test_recurrent_layers_with_computed_weights_are_pruned(wrap: Callable[[nn.Module], nn.Module]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.last = nn.Linear(8, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 3)
            wrap(self.lstm)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.first(x))[0][:, -1])

    x = torch.randn(2, 5, 8)
    net = cocktail.sparsify(Recurrent().eval(), ["channel@0.5", "2:4"], (x,))
    assert len(net.eligible) == 3 and [g.size for g in net.coupling.groups] == [8, 12]
    with net.using("channel@0.5"), torch.no_grad():
        torch.testing.assert_close(net.slim("channel@0.5")(x), net(x))


def test_a_direction_that_is_used_elsewhere_keeps_its_channels() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)
            self.mid = parametrizations.weight_norm(nn.Linear(12, 12))

        def forward(self, x: Tensor) -> Tensor:
            y = self.mid(self.first(x))
            return self.last(y + F.linear(x[:, :1].expand(-1, 12), self.mid.parametrizations.weight.original1))

    coupling = couple(Tied(), (torch.randn(3, 8),))
    kept = {k.where: k.reason for k in coupling.kept}
    assert "each one's own norm" in kept["mid.parametrizations.weight.original1"]


def test_branches_of_spectral_norms_are_not_dropped() -> None:
    class Block(nn.Module):
        def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
            super().__init__()
            self.a, self.b = wrap(nn.Linear(12, 12)), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)))

    blocks = [Block(parametrizations.spectral_norm), Block(parametrizations.weight_norm), Block(lambda m: m)]
    model, x = nn.Sequential(nn.Linear(8, 12), *blocks, nn.Linear(12, 3)).eval(), torch.randn(3, 8)
    net = cocktail.sparsify(model, ["depth@0.5"], (x,))
    assert [b.modules for b in net.coupling.branches] == [("2.a", "2.b"), ("3.a", "3.b")] or len(
        net.coupling.branches
    ) == 2
    with net.using("depth@0.5"), torch.no_grad():
        assert bool(net(x).isfinite().all())
