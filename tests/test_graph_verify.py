"""A deliberately wrong fix is caught by the verification, and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_cases import half, removal
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.errors import PatternError, SlimError
from cocktailsdk.graph import Coupling, couple, slim_module
from cocktailsdk.graph.compare import NARROWED
from cocktailsdk.graph.cut import Cutter
from cocktailsdk.graph.layers import SlimLayerNorm
from cocktailsdk.graph.module_fixes import ModuleFixes
from cocktailsdk.graph.verify_slim import verify_slim


class Attention(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.attn = Attention()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm(x))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x.mean(1))


def wrong_scale(slim: nn.Module) -> None:
    slim.attn.scale *= 1.01


def swapped_heads(slim: nn.Module) -> None:
    w = slim.attn.proj.weight.data
    slim.attn.proj.weight.data = w.roll(slim.attn.head_dim, dims=1)


def one_channel_out_of_order(slim: nn.Module) -> None:
    w = slim.fc2.weight.data
    order = torch.arange(w.shape[1])
    order[0], order[1] = 1, 0
    slim.fc2.weight.data = w[:, order]


def permuted_heads_of_one_weight(slim: nn.Module) -> None:
    """Two heads change places in the queries, and nowhere else."""
    rows = torch.arange(slim.attn.qkv.out_features)
    d = slim.attn.head_dim
    rows[:d], rows[d : 2 * d] = rows[d : 2 * d].clone(), rows[:d].clone()
    slim.attn.qkv.weight.data = slim.attn.qkv.weight.data[rows]
    slim.attn.qkv.bias.data = slim.attn.qkv.bias.data[rows]


def one_row_out_of_order(slim: nn.Module) -> None:
    w = slim.fc1.weight.data
    w[[0, 1]] = w[[1, 0]]


def another_channel(slim: nn.Module) -> None:
    """A channel that was to go is there in place of one that was to stay."""
    slim.fc1.weight.data[0] = torch.randn_like(slim.fc1.weight.data[0])


def unmasked_bias(slim: nn.Module) -> None:
    slim.attn.proj.bias.data[0] += 0.01


def wrong_eps(slim: nn.Module) -> None:
    slim.norm.eps *= 10


def forgotten_zeros(slim: nn.Module) -> None:
    slim.norm.channels = slim.norm.weight.numel()


def wrong_heads(slim: nn.Module) -> None:
    slim.attn.heads, slim.attn.head_dim = slim.attn.head_dim, slim.attn.heads


@dataclass(frozen=True)
class Slimmed:
    """A model with what is known of slimming half of each of its groups."""

    model: Net
    x: torch.Tensor
    coupling: Coupling
    removed: torch.Tensor
    fixes: ModuleFixes

    def verify(self) -> None:
        verify_slim(self.model, Cutter(self.coupling, self.coupling.trace, self.removed), (self.x,))


@pytest.fixture(scope="module")
def right() -> Slimmed:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 6, 8)
    coupling = couple(model, (x,))
    removed = removal(coupling, half)
    fixes = verify_slim(model, Cutter(coupling, coupling.trace, removed), (x,)).fixes
    return Slimmed(model, x, coupling, removed, fixes)


HARMS: list[tuple[Callable[[nn.Module], None], str]] = [
    (wrong_scale, "attn"),
    (swapped_heads, "attn.proj"),
    (permuted_heads_of_one_weight, "attn.qkv"),
    (one_channel_out_of_order, "fc2"),
    (one_row_out_of_order, "fc1"),
    (forgotten_zeros, "norm"),
    (wrong_eps, "norm"),
    (wrong_heads, "attn"),
    (another_channel, "fc1"),
    (unmasked_bias, "attn.proj"),
]
"""What goes wrong in a slim model, and the module that must be named."""


@pytest.mark.parametrize(("harm", "named"), HARMS, ids=[h.__name__ for h, _ in HARMS])
def test_a_wrong_fix_is_caught_and_named(right: Slimmed, harm: Callable[[nn.Module], None], named: str) -> None:
    class Wrong(Cutter):
        def cut(self, model, fixes=None):
            slim, _ = super().cut(model, right.fixes)
            harm(slim)
            return slim, {}  # nothing is left to settle

    with pytest.raises(SlimError, match=r"relative error|does not run") as caught:
        verify_slim(right.model, Wrong(right.coupling, right.coupling.trace, right.removed), (right.x,))
    assert caught.value.module == named
    assert repr(named) in str(caught.value)


def test_a_right_slim_model_is_not_refused(right: Slimmed) -> None:
    right.verify()


def test_a_norm_that_forgets_absent_zeros_is_caught(right: Slimmed, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = SlimLayerNorm.forward

    def forgetful(self, x):
        self.channels = x.shape[-1]
        return forward(self, x)

    monkeypatch.setattr(SlimLayerNorm, "forward", forgetful)
    stream = next(g for g in right.coupling.groups if "embed.weight" in g.producers)
    removed = right.removed.clone()
    removed[: stream.start], removed[stream.stop :] = False, False
    with pytest.raises(SlimError, match="relative error") as caught:
        verify_slim(right.model, Cutter(right.coupling, right.coupling.trace, removed), (right.x,))
    assert caught.value.module == "norm"


def test_counts_that_are_not_fixed_are_caught(right: Slimmed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocktailsdk.graph.module_fixes._options", lambda value, changed: [])
    monkeypatch.setattr("cocktailsdk.graph.verify_slim.rewritten", lambda *_: None)
    with pytest.raises(SlimError, match="does not run") as caught:
        right.verify()
    assert caught.value.module == "attn"


@pytest.mark.parametrize(
    ("tensor", "axis", "named"),
    [("attn.qkv.weight", 0, "attn.qkv"), ("attn.proj.weight", 1, "attn.proj"), ("fc2.weight", 1, "fc2")],
)
def test_one_tensor_cut_elsewhere_is_caught(right: Slimmed, tensor: str, axis: int, named: str) -> None:
    """The right number of positions, but others than those that were masked."""
    fields = dict(right.coupling.fields)
    moved = [u.roll(1, axis) if u.shape[axis] > 1 else u for u in fields[tensor]]
    wrong = replace(right.coupling, fields={**fields, tensor: tuple(moved)})

    class Wrong(Cutter):
        def cut(self, model, fixes=None):
            return Cutter(wrong, self.trace, self.removed).cut(model, right.fixes)[0], {}

    with pytest.raises(SlimError, match="relative error") as caught:
        verify_slim(right.model, Wrong(right.coupling, right.coupling.trace, right.removed), (right.x,))
    assert caught.value.module == named


def test_masks_that_miss_a_tensor_are_caught(right: Slimmed) -> None:
    """A coupling that does not know of a norm's bias leaves it in the masked model, and in the slim one as it was."""
    fields = {name: f for name, f in right.coupling.fields.items() if name != "norm.bias"}
    wrong = replace(right.coupling, fields=fields)
    with pytest.raises(SlimError):
        verify_slim(right.model, Cutter(wrong, wrong.trace, right.removed), (right.x,))


def test_bad_masks_are_refused() -> None:
    model, x = Net(), torch.randn(2, 6, 8)
    coupling = couple(model, (x,))
    with pytest.raises(SlimError, match="channel units"):
        slim_module(model, coupling, torch.zeros(3, dtype=torch.bool), (x,))
    with pytest.raises(SlimError, match="at least one of each group"):
        slim_module(model, coupling, torch.ones(coupling.n_units, dtype=torch.bool), (x,))
    with pytest.raises(SlimError, match="example inputs"):
        slim_module(model, coupling, torch.zeros(coupling.n_units, dtype=torch.bool))


class Experts(nn.Module):
    """Through grouped matrix products, whose kernel has no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 8, 16)), nn.Parameter(torch.randn(2, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows, ends = x.flatten(0, 1), torch.tensor([8, 16], dtype=torch.int32)
        inner = torch.nn.functional.grouped_mm(rows, self.up, offs=ends).relu()
        return torch.nn.functional.grouped_mm(inner, self.down, offs=ends).view(x.shape)


def test_kernels_without_float64_are_given_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(2, 8, 8)
    coupling = couple(model, (x,))
    assert [g.size for g in coupling.groups] == [16]
    removed = torch.arange(16) % 4 == 0
    proof = verify_slim(model, Cutter(coupling, coupling.trace, removed), (x,))
    assert proof.error < NARROWED
    slim = slim_module(model, coupling, removed, (x,))
    assert slim.up.shape == (2, 8, 12)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.down.mul_(~removed[:, None])
    torch.testing.assert_close(slim(x), masked(x), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_run_in_float64_is_refused_in_words() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.a.weight.dtype == torch.float64:
                raise TypeError("single precision only")
            return self.b(self.a(x).relu())

    model, x = Single(), torch.randn(2, 8)
    coupling = couple(model, (x,), prove=False)
    removed = torch.arange(16) % 2 == 0
    with pytest.raises(SlimError, match="does not run in float64.*single precision only"):
        slim_module(model, coupling, removed, (x,))


@dataclass
class Answer:
    """A type that ``torch.export`` has not been told of."""

    chosen: Tensor
    logits: Any


class Answers(nn.Module):
    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.hidden = nn.Linear(8, 16), nn.Linear(16, 4), hidden

    def forward(self, x: Tensor) -> Answer:
        logits = self.last(self.first(x).relu())
        return Answer(logits.argmax(-1), None if self.hidden else {"all": logits})


def test_what_a_dataclass_holds_is_followed_and_compared():
    model, x = Answers().eval(), torch.randn(3, 8)
    slim = cocktail.slim(model, (x,), ratio=0.5, round_to=1)
    assert slim.first.weight.shape == (8, 8)
    assert slim(x).logits["all"].shape == (3, 4)


def test_of_a_model_that_returns_nothing_to_compare_all_stays_whole():
    with pytest.raises(PatternError, match="no channels of Answers can be removed"):
        cocktail.slim(Answers(hidden=True).eval(), (torch.randn(3, 8),), ratio=0.5, round_to=1)
