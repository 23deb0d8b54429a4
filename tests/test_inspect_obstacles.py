"""``inspect`` answers for every module, in words; ``sparsify`` and ``slim`` refuse with a CocktailError."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from awkward_models import Body, X
from torch import nn

import cocktailsdk as cocktail


def scripted(module: nn.Module) -> nn.Module:
    if not hasattr(torch.jit, "script"):
        pytest.skip("this PyTorch has no TorchScript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def quantization():
    return pytest.importorskip("torch.ao.quantization", reason="this PyTorch has no eager quantization")


def scripted_part() -> nn.Module:
    model = Body()
    model.b = scripted(nn.Linear(16, 16))
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))


def dynamically_quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization().quantize_dynamic(Body().eval(), {nn.Linear}, dtype=torch.qint8)


def prepared(model: nn.Module) -> nn.Module:
    ao = quantization()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = ao.get_default_qat_qconfig(torch.backends.quantized.supported_engines[-1])
        return ao.prepare_qat(model.train())


class BuildsLayer(Body):
    def __init__(self) -> None:
        super().__init__()
        self.late = None

    def extra(self, y):
        if self.late is None:
            self.late = nn.Linear(y.shape[-1], y.shape[-1]).to(y)
        return self.late(y)


class Raises(Body):
    def extra(self, y):
        raise ZeroDivisionError("in the user's code")


class Yields(Body):
    def forward(self, x):
        yield super().forward(x)


class ReturnsNothing(Body):
    def forward(self, x):
        super().forward(x)


class ReturnsObject(Body):
    def forward(self, x):
        super().forward(x)
        return object()


class NotCopied(Body):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


class Recursive(Body):
    def extra(self, y):
        return self.extra(y)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.o = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64)), nn.Linear(8, 4)

    def forward(self, x):
        return self.o((x.to(torch.complex64) @ self.weight).real)


def registered_twice() -> nn.Module:
    model = Body()
    model.again = model.b
    return model


WORDS = {
    "TorchScript": lambda: scripted(Body()),
    "compiled by torch.jit": scripted_part,
    "lazy": lazy,
    "quantized": dynamically_quantized,
    "prepared for quantization": lambda: prepared(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))),
    "builds parameters in its first forward pass (late.bias, late.weight)": BuildsLayer,
    "ZeroDivisionError: in the user's code": Raises,
}


@pytest.mark.parametrize(("words", "make"), WORDS.items(), ids=[m.__name__ for m in WORDS.values()])
def test_what_cannot_be_followed_is_told_in_words(words, make):
    model = make()
    names = [n for n, _ in model.named_parameters()]
    found = cocktail.inspect(model, X)
    assert words in " ".join(k.reason for k in found.kept)
    assert [n for n, _ in model.named_parameters()] == names
    assert any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()) == (make is lazy)


@pytest.mark.parametrize("make", [m for w, m in WORDS.items() if m is not scripted_part], ids=lambda m: m.__name__)
def test_what_cannot_be_followed_is_refused_with_an_error_of_this_package(make):
    for call in (cocktail.sparsify, cocktail.slim):
        with pytest.raises(cocktail.CocktailError):
            call(make(), example_inputs=X)


def test_channels_of_layers_that_the_first_pass_builds_are_found():
    assert {g.units for g in cocktail.inspect(BuildsLayer(), X).groups} == {16}
    model = BuildsLayer()
    model(*X)
    assert cocktail.sparsify(model, ["channel@0.5"], X).slim("channel@0.5")(*X).shape == (2, 5, 4)


ODD = [
    Yields,
    ReturnsNothing,
    ReturnsObject,
    NotCopied,
    Recursive,
    Complex,
    registered_twice,
    lambda: nn.Identity(),
    lambda: Body().to("meta"),
    lambda: nn.DataParallel(Body()),
    lambda: torch.compile(Body(), backend="eager"),
]


@pytest.mark.parametrize("make", ODD)
def test_inspect_answers_for_every_module(make):
    found = cocktail.inspect(make(), X)
    assert found.groups or found.kept or not found.params
    assert str(found) and found.to_dict()
    with contextlib.suppress(cocktail.CocktailError):  # some work, others are refused
        cocktail.slim(make(), X)


@pytest.mark.parametrize("inputs", [(), (torch.zeros(3, 3),), ("text",), {"x": 1}, 5, (None,)])
def test_inspect_answers_whatever_inputs_it_is_given(inputs):
    found = cocktail.inspect(Body(), inputs)
    assert not found.followed and found.kept[0].reason


class MergesInEval(Body):
    """As loralib does: ``train(False)`` adds the adapter to the weights, and a cache goes with ``train(True)``."""

    def __init__(self) -> None:
        super().__init__()
        self.delta, self.merged, self.kept = 1.0, False, {}

    def train(self, mode: bool = True):
        if mode:
            self.kept.clear()
        if mode is self.merged:
            self.b.weight.data += -self.delta if mode else self.delta
            self.merged = not mode
        return super().train(mode)

    def extra(self, y):
        return self.kept.setdefault(y.shape, torch.ones(())) * y


@pytest.mark.parametrize("call", ["inspect", "sparsify", "verify_nm"])
@pytest.mark.parametrize("kept", [False, True])
def test_models_that_change_with_their_mode_are_what_they_were(call, kept):
    model = MergesInEval()
    if kept:
        model(*X)
    before, cache = copy.deepcopy(model.state_dict()), dict(model.kept)
    {
        "inspect": lambda: cocktail.inspect(model, X),
        "sparsify": lambda: cocktail.sparsify(model, "2:4", X),
        "verify_nm": lambda: cocktail.verify_nm(model, 2, 4),
    }[call]()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.kept == cache and not model.merged and model.training


def test_a_model_with_a_scripted_part_is_sparsified_around_it():
    net = cocktail.sparsify(scripted_part(), "2:4", X, target_modules=["a", "o"])
    dense = net(*X)
    with net.using("2:4"):
        assert cocktail.verify_nm(net, 2, 4)
        assert not torch.equal(net(*X), dense)
    net.model.act = nn.ReLU()  # without parameters: no harm
    assert torch.equal(net.switch("dense")(*X), dense)


def test_a_graph_of_torch_export_is_followed_though_it_refuses_to_change_its_mode():
    graph = torch.export.export(Body().eval(), X).module()
    assert {layer.name for layer in cocktail.inspect(graph, X).layers} == {"a.weight", "b.weight", "o.weight"}
    net = cocktail.sparsify(graph, "2:4", X)
    with net.using("2:4"):
        assert cocktail.verify_nm(net, 2, 4)


def test_a_frozen_script_has_no_weights_to_check():
    model = torch.jit.freeze(scripted(Body().eval()))
    before = set(vars(model))
    with pytest.raises(cocktail.PatternError, match="no convolution and no linear layer"):
        cocktail.verify_nm(model, 2, 4)
    assert set(vars(model)) == before


def test_a_float_model_that_could_be_quantized_is_not_called_quantized():
    model = Body()
    model.add = quantization() and torch.ao.nn.quantized.FloatFunctional()
    assert not [k for k in cocktail.inspect(model, X).kept if "quantized" in k.reason]
