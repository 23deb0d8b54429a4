"""Modules registered under several names, parts of the graph that follow a width, and what modules keep of a run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, TOKENS, Ends, Heads, Streamed, Table, Tokens, assert_equal, half, one, removal, show
from torch import nn

from cocktailsdk.graph import couple, slim_module
from cocktailsdk.graph.rewritten_module import RewrittenModule

case = CASES = Table()


class Split(nn.Module):
    """Splits channels by a list of its own and convolves each part; two blocks share one."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [8, 16]
        self.convs = nn.ModuleList(nn.Conv1d(n, n, 3, padding=1, groups=n) for n in self.sizes)

    def forward(self, x):
        return torch.cat([conv(part) for conv, part in zip(self.convs, x.split(self.sizes, 1), strict=True)], 1)


class Block(nn.Module):
    """Takes the width of its heads from its input; the module that it is given is shared."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.heads, self.shared = nn.Linear(24, 24), nn.Linear(24, 24), 4, shared

    def forward(self, x):
        b, n, c = x.shape
        y = self.up(x).reshape(b, n, self.heads, c // self.heads).softmax(1)
        y = y.permute(0, 2, 3, 1).reshape(b, c, n)
        return x + self.down(self.shared(y).transpose(1, 2))


@case(TOKENS, [24, 6])
class SharedUnderSeveralNames(Tokens):
    """Registered first by the model, then by each block that calls it."""

    def __init__(self) -> None:
        super().__init__(24)
        self.split = Split()
        self.norm = nn.LayerNorm(24)
        self.blocks = nn.ModuleList(Block(self.split) for _ in range(2))
        self.norms = nn.ModuleList([self.norm, self.norm])

    def body(self, x):
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(block(x))
        return x


@case(TOKENS, [16, 10])
class PointwiseAlongPositions(Tokens):
    """A kernel of one leaves the positions as they are, and these are channels."""

    def __init__(self) -> None:
        super().__init__(16, 10)
        self.mix, self.up = nn.Conv1d(3, 1, 1), nn.Linear(16, 10)

    def body(self, x):
        three = torch.stack([x.mean(1), x.amax(1), x.sum(1)], 1)
        return self.up(self.mix(three))


@case(TOKENS, [10], {"first.weight": "conv1d", "mix.weight": "mean"})
class WiderKernelsMixPositions(Tokens):
    """A kernel of three does not."""

    def __init__(self) -> None:
        super().__init__(16, 10)
        self.mix, self.up = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(16, 10)

    def body(self, x):
        return self.up(self.mix(x))


class BiasOfZeros(Heads):
    """A bias of zeros for each head, made from the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 4

    def attend(self, q, k, v):
        bias = torch.zeros(1, self.n, q.shape[2], k.shape[2], dtype=q.dtype) + torch.linspace(0, 1, k.shape[2]).to(q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@case(TOKENS, [16, 4])
class TensorsOfOneValueFollow(Streamed):
    inner = BiasOfZeros


@case(IMAGE, [12])
class Windows(Ends):
    """Overlapping windows of positions, one after the other."""

    def __init__(self) -> None:
        super().__init__(12)

    def body(self, x):
        return x.unfold(2, 4, 2).unfold(3, 4, 2).amax((4, 5))


class Chosen(nn.Module):
    """Has no forward but the one that it takes when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.inner = 8, nn.Linear(8, 8)
        self.forward = self.in_part

    def in_part(self, x):
        return torch.cat([self.inner(x[..., : self.width]), x[..., self.width :]], -1)


@case(TOKENS, [8, 8, 8])
class ForwardChosenWhenBuilt(Tokens):
    def __init__(self) -> None:
        super().__init__(16)
        self.part = Chosen()

    def body(self, x):
        return self.part(x).relu()


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])


def test_what_modules_keep_of_a_run_is_forgotten() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention, self.last = nn.Linear(12, 16), Attention(), nn.Linear(16, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last((x + self.attention(x)).mean(1))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.heads, self.table, self.kept = 4, nn.Parameter(torch.randn(4, 6)), {}

        def train(self, mode=True):
            self.kept = {} if mode else self.kept
            return super().train(mode)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if "bias" not in self.kept:
                self.kept["bias"] = self.table[:, (torch.arange(6)[:, None] - torch.arange(6)).abs()]
            scores = (q @ k.transpose(-2, -1) / 2 + self.kept["bias"].to(q)).softmax(-1)
            return self.out((scores @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(*TOKENS)
    model(x)  # keeps a bias of four heads
    kept = dict(model.attention.kept)
    coupling = couple(model, (x,))
    assert sorted(g.size for g in coupling.groups) == [4, 16]
    assert model.attention.kept["bias"] is kept["bias"]  # the user's own model is left as it was
    model.train().eval()  # it forgets: what follows gives its copies other weights
    assert_equal(model, coupling, removal(coupling, half), (x,))


def test_rewritten_modules_are_of_their_class_and_can_be_copied() -> None:
    torch.manual_seed(0)
    model, x = SharedUnderSeveralNames(), torch.randn(*TOKENS)
    coupling = couple(model, (x,))
    slim = slim_module(model, coupling, removal(coupling, one), (x,)).eval()  # heads no longer fit the stream's width
    assert all(isinstance(block, RewrittenModule) and isinstance(block, Block) for block in slim.blocks)
    assert slim.norms[0] is slim.norms[1] is slim.norm and slim.blocks[0].shared is slim.split
    for other in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(other(x), slim(x))
        assert other.blocks[0].shared is other.split
    again = couple(slim, (x,))  # a slim model can be slimmed again
    assert_equal(slim, again, removal(again, half), (x,))
    with pytest.raises(RuntimeError, match="shape|size|mat1"):
        slim(torch.randn(2, 6, 11))
