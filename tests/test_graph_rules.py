"""The registry of rules is honest, and what cannot be followed is kept whole, by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, TOKENS, Ends, Tokens, all_but_one, assert_equal, half, one, removal
from test_graph_rules_norms import LayerNormStream
from torch import Tensor, nn

from cocktailsdk.graph import couple
from cocktailsdk.graph.rules import RULES


@torch.library.custom_op("cocktail_tests::half_of", mutates_args=())
def half_of(x: Tensor) -> Tensor:
    """An op that no rule knows."""
    return x * 0.5


@half_of.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unknown(Ends):
    """The op between two layers, and two more that it does not touch."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.mystery, self.conv, self.out = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 12, 1), nn.Conv2d(12, 6, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.conv(half_of(self.mystery(x)))))


@pytest.fixture
def without_the_rule() -> Iterator[None]:
    assert "half_of" not in RULES
    yield
    RULES.pop("half_of", None)


@pytest.mark.usefixtures("without_the_rule")
def test_an_op_without_a_rule_keeps_what_touches_it_and_is_named() -> None:
    coupling = couple(Unknown(), (torch.randn(*IMAGE),))
    assert coupling.unknown_ops == {"half_of": 1}
    kept = {k.where: k.reason for k in coupling.kept}
    assert kept.keys() == {"mystery.weight", "last.weight", "half_of"}
    assert kept["mystery.weight"] == "half_of in the model is an op without a rule"
    assert "used 1 times" in kept["half_of"]
    assert {g.name: g.size for g in coupling.groups} == {"first": 8, "conv": 12, "out": 6}


@pytest.mark.usefixtures("without_the_rule")
def test_one_small_function_is_all_that_a_new_op_needs() -> None:
    from cocktailsdk.graph.rules import rule

    @rule("half_of")
    def passed_on(ctx, node):
        return ctx.fields(node.args[0])

    torch.manual_seed(0)
    model, args = Unknown(), (torch.randn(*IMAGE),)
    coupling = couple(model, args)
    assert not coupling.unknown_ops
    assert {g.name: g.size for g in coupling.groups} == {"first": 8, "mystery": 10, "conv": 12, "out": 6}
    for count in (half, one, all_but_one):
        assert_equal(model, coupling, removal(coupling, count), args)


@pytest.mark.usefixtures("without_the_rule")
def test_a_wrong_rule_is_caught_when_its_groups_are_proven() -> None:
    from cocktailsdk.graph.rules import rule

    @rule("half_of")
    def turned(ctx, node):  # says that channels come out in another order than they do
        return tuple(f.with_labels(f.labels.flip(1)) for f in ctx.fields(node.args[0]))

    coupling = couple(Unknown(), (torch.randn(*IMAGE),))
    kept = {k.where: k.reason for k in coupling.kept}
    assert "could not be fixed" in kept["mystery.weight"]
    assert {g.name for g in coupling.groups} == {"first", "conv", "out"}


def test_rules_are_for_ops_that_there_are() -> None:
    elsewhere = {"getitem", "grouped_mm", "grouped_mm_fallback"}  # Python's own, and those of transformers
    unknown = {n for n in RULES if not any(hasattr(torch.ops.aten, name) for name in (n, f"{n}_"))}
    assert unknown <= elsewhere


def test_code_that_cannot_be_fixed_is_left_unpruned_with_a_reason() -> None:
    class Closed(Tokens):
        """Heads hidden in a closure, and control flow on sizes that no tracer follows."""

        def __init__(self) -> None:
            super().__init__(16)
            self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
            heads = [4]
            self.view = lambda t: t.view(*t.shape[:-1], heads[0], int(t.shape[-1] > 0) * 6)

        def body(self, x: Tensor) -> Tensor:
            y = self.view(self.a(x)).softmax(-1).flatten(-2)
            return x + self.b(y)

    torch.manual_seed(0)
    model, args = Closed(), (torch.randn(*TOKENS),)
    coupling = couple(model, args)
    kept = {k.where: k.reason for k in coupling.kept}
    assert "could not be fixed" in kept["a.weight"]
    assert [g.size for g in coupling.groups] == [16]  # the stream still goes
    assert_equal(model, coupling, removal(coupling, half), args)


def test_what_fails_twice_is_not_tried_in_every_layer(caplog: pytest.LogCaptureFixture) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
            sizes = [4, 6]
            self.view = lambda t: t.view(*t.shape[:-1], *sizes)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.view(self.a(x)).softmax(-1).flatten(-2))

    torch.manual_seed(0)
    model, args = nn.Sequential(*(Fixed() for _ in range(6))), (torch.randn(2, 5, 16),)
    with caplog.at_level(logging.INFO, logger="cocktailsdk.graph.prove"):
        coupling = couple(model, args)
    assert len([r for r in caplog.records if r.message.startswith("kept whole")]) == 2
    kept = {k.where: k.reason for k in coupling.kept}
    assert "'0'" in kept["0.a.weight"] and "'1'" in kept["1.a.weight"]
    for layer in "2345":
        assert f"in '{layer}'" in kept[f"{layer}.a.weight"] and "as it could not in '1'" in kept[f"{layer}.a.weight"]


def test_excluded_modules_keep_their_output_channels() -> None:
    coupling = couple(LayerNormStream(), (torch.randn(*TOKENS),), exclude=lambda path: path == "a")
    assert [g.size for g in coupling.groups] == [16]
    assert any(k.where == "a.weight" and "excluded" in k.reason for k in coupling.kept)


def test_every_run_that_code_cuts_out_keeps_something() -> None:
    class Parts(Ends):
        def __init__(self) -> None:
            super().__init__(8, 5)

        def body(self, x: Tensor) -> Tensor:
            return x[:, :5]

    coupling = couple(Parts(), (torch.randn(*IMAGE),), prove=False)
    assert [g.size for g in coupling.groups] == [5, 3]


def test_a_module_may_be_called_again_with_other_sizes() -> None:
    torch.manual_seed(0)
    model, x = LayerNormStream(), torch.randn(*TOKENS)
    coupling = couple(model, (x,))
    slim = assert_equal(model, coupling, removal(coupling, half), (x,))
    longer = torch.randn(5, 11, 12, dtype=torch.float64)
    assert slim(longer).shape == (5, 3)


@pytest.mark.parametrize("bad", ["", "no_such_module"])
def test_exclusion_that_names_nothing_changes_nothing(bad: str) -> None:
    coupling = couple(LayerNormStream(), (torch.randn(*TOKENS),), exclude=lambda path: path == bad, prove=False)
    assert sorted(g.size for g in coupling.groups) == [16, 24]
