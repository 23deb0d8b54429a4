"""target_modules and exclude_modules choose what may be pruned, as PEFT reads them."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyNet, tiny_coupling
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import AdapterError, PatternError
from cocktailsdk.net.target_modules import Selection


def eligible(target=None, exclude=None):
    model = TinyNet()
    return [w.module for w in Selection.of(model, target, exclude).eligible(tiny_coupling(model))]


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (None, None, ["widen", "inner"]),
        (["inner"], None, ["inner"]),
        ("w.*|i.*", None, ["widen", "inner"]),
        (["fc", "first"], None, ["first", "fc"]),
        (None, ["inner"], ["widen"]),
        (None, "inn.*", ["widen"]),
        ("(?!inner).*", None, ["first", "widen", "fc"]),
        (["inner.weight"], None, ["inner"]),
        (["widen", "inner"], ["inner"], ["widen"]),
        (None, [], ["widen", "inner"]),
        (None, ("bn1",), ["widen", "inner"]),
    ],
)
def test_weights_are_chosen_by_name_suffix_and_expression(target, exclude, expected):
    assert eligible(target, exclude) == expected


@pytest.mark.parametrize(
    ("target", "exclude", "said"),
    [
        (["iner"], None, "did you mean 'inner'"),
        (None, ["widen2"], "did you mean 'widen'"),
        ("conv", None, "matches no module"),
        ("(", None, "not a regular expression"),
        ([], None, "empty"),
        ([3], None, "names"),
        (7, None, "regular expression or a list"),
        (["bn1"], None, "selects no weight"),
        (["inner"], ["inner"], "exclude_modules"),
    ],
)
def test_a_selection_of_nothing_is_an_error(target, exclude, said):
    with pytest.raises(PatternError, match=said):
        eligible(target, exclude)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1))
        self.neck = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.neck(torch.relu(self.stage(self.stem(x)))).mean((2, 3)))


def test_a_container_stands_for_all_inside_it_and_suffixes_find_it():
    x = torch.randn(1, 3, 8, 8)
    net = cocktail.sparsify(Nested(), "unstructured@0.5", (x,), target_modules=["stage"])
    assert [w.module for w in net.eligible] == ["stage.0", "stage.2"]
    with pytest.raises(PatternError, match=r"write \['0'\]"):
        cocktail.sparsify(Nested(), "unstructured@0.5", (x,), target_modules="0")


def test_excluded_modules_keep_their_output_channels():
    x = torch.randn(1, 3, 8, 8)
    free = cocktail.sparsify(Nested(), "channel@0.5", (x,))
    assert {p for g in free.coupling.groups for p in g.producers} >= {"stem.weight", "stage.0.weight", "stage.2.weight"}
    held = cocktail.sparsify(Nested(), "channel@0.5", (x,), exclude_modules=["stage.0", "stem"])
    made = {p for g in held.coupling.groups for p in g.producers}
    assert made == {"stage.2.weight", "neck.weight"}
    only = cocktail.sparsify(Nested(), "channel@0.5", (x,), target_modules=["stage.2"])
    assert {p for g in only.coupling.groups for p in g.producers} == {"stage.2.weight"}


def test_sparsify_leaves_the_model_as_it_was():
    model = Nested().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    net = cocktail.sparsify(model, example_inputs=(torch.randn(1, 3, 8, 8),))
    assert net.model is model
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert type(model) is Nested


def test_sparsify_refuses_what_it_cannot_use():
    x = torch.randn(1, 3, 8, 8)
    net = cocktail.sparsify(Nested(), "2:4", (x,))
    with pytest.raises(PatternError, match=r"\.model"):
        cocktail.sparsify(net, "2:4", (x,))
    with pytest.raises(PatternError, match=r"nn\.Module"):
        cocktail.sparsify("resnet18", "2:4", (x,))
    with pytest.raises(PatternError, match="example_inputs"):
        cocktail.sparsify(Nested(), "2:4", 3)
    with pytest.raises(PatternError, match="nothing in the model can be pruned"):
        cocktail.sparsify(nn.Sequential(nn.Linear(3, 2)), "2:4", (torch.randn(1, 3),))


def test_without_example_inputs_and_adapter_the_error_says_so():
    with pytest.raises(AdapterError, match="example"):
        cocktail.sparsify(Nested(), "2:4")
