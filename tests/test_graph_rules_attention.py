"""Attention in all its spellings: whole heads go, and what heads share stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import TOKENS, Heads, Streamed, Table, Tokens, assert_equal, one, removal, show
from torch import nn

from cocktailsdk.errors import SlimError
from cocktailsdk.graph import couple

case = CASES = Table()


@case(TOKENS, [16, 4])
class OneOp(Streamed):
    pass


@case(TOKENS, [16, 4])
class WithoutAnyScale(Streamed):
    class inner(Heads):
        def attend(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v


@case(TOKENS, [16, 4])
class ScaleFromWidth(Streamed):
    """A scale computed from the width as it runs."""

    class inner(Heads):
        def attend(self, q, k, v):
            return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@case(TOKENS, [16, 4])
class CausalMask(Streamed):
    class inner(Heads):
        def attend(self, q, k, v):
            mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
            return torch.where(mask, -torch.inf, q @ k.mT * 0.5).softmax(-1) @ v


@case(TOKENS, [16, 4])
class FilledMask(Streamed):
    class inner(Heads):
        def attend(self, q, k, v):
            mask = torch.ones(q.shape[-2], q.shape[-2]).tril() == 0
            return F.dropout((q @ k.mT * 0.5).masked_fill(mask, -1e9).softmax(-1), 0.1, self.training) @ v


@case(TOKENS, [16, 4])
class ByEinsum(Streamed):
    class inner(Heads):
        def split(self, t):
            return t.view(*t.shape[:2], -1, self.head_dim)

        def merge(self, t):
            return self.o(t.flatten(2))

        def attend(self, q, k, v):
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.5
            return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


@case(TOKENS, [16, 4])
class HeadsInTheBatch(Streamed):
    """Heads folded into the batch, as for bmm."""

    class inner(Heads):
        def attend(self, q, k, v):
            b, h, n, d = q.shape
            q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
            return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.5).softmax(-1), v).view(b, h, n, d)


@case(TOKENS, [16, 2])
class GroupedQuery(Streamed):
    """A unit is a key head and the two query heads that read it."""

    class inner(Heads):
        kv_heads = 2

        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@case(TOKENS, [16, 2])
class GroupedQueryRepeated(Streamed):
    class inner(Heads):
        kv_heads = 2

        def attend(self, q, k, v):
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            return F.scaled_dot_product_attention(q, k, v, scale=0.5)


@case(TOKENS, [16, 4], {"attn.k.weight": "mixes|needs", "attn.v.weight": "."})
class MultiQuery(Streamed):
    """One key and value head for all: query heads go, it stays."""

    class inner(Heads):
        kv_heads = 1


@case(TOKENS, [16, 4])
class Packed(Streamed):
    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48, bias=False)
            del self.q, self.k, self.v

        def forward(self, x):
            b, n, _ = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
            return self.merge(self.attend(qkv[0], qkv[1], qkv[2]))


@case(TOKENS, [16, 4])
class PackedByHead(Streamed):
    """Each head has its query, key and value side by side, as in GPT-NeoX."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            del self.q, self.k, self.v

        def forward(self, x):
            b, n, _ = x.shape
            return self.merge(self.attend(*self.qkv(x).view(b, n, -1, 3 * self.head_dim).transpose(1, 2).chunk(3, -1)))


@case(TOKENS, [16, 2])
class PackedUnequally(Streamed):
    """Four query heads and two key heads in one weight, split by widths that are fixed."""

    class inner(Heads):
        kv_heads = 2

        def __init__(self) -> None:
            super().__init__()
            self.q_size, self.kv_size = 16, 8
            self.qkv = nn.Linear(16, 32)
            del self.q, self.k, self.v

        def forward(self, x):
            q, k, v = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], -1)
            y = F.scaled_dot_product_attention(self.split(q), self.split(k), self.split(v), enable_gqa=True)
            return self.merge(y)


@case(TOKENS, [16, 4])
class QueryKeyNorm(Streamed):
    """A norm whose weight all heads share: the heads may go, its weight stays."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.qn, self.kn = nn.LayerNorm(4), nn.RMSNorm(4)

        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)


@case(TOKENS, [16, 4])
class QueryKeyNormOfAllHeads(Streamed):
    """A norm over all heads' channels, before they are split."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.qn, self.kn = nn.RMSNorm(16), nn.RMSNorm(16)

        def forward(self, x):
            q, k = self.split(self.qn(self.q(x))), self.split(self.kn(self.k(x)))
            return self.merge(self.attend(q, k, self.split(self.v(x))))


@case(TOKENS, [16, 4])
class HeadScales(Streamed):
    """A temperature and a gate for each head."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.temperature, self.gate = nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(16, 4)

        def forward(self, x):
            q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            y = (q @ k.mT * self.temperature).softmax(-1) @ v
            return self.merge(y * torch.sigmoid(self.gate(x)).transpose(1, 2)[..., None])


@case(TOKENS, [16, 4, 4])
class TalkingHeads(Streamed):
    """Scores mixed over heads: those before the mixing and those after it are different units."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.talk = nn.Linear(4, 4)

        def attend(self, q, k, v):
            scores = self.talk((q @ k.mT * 0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return scores.softmax(-1) @ v


@case(TOKENS, [16, 4])
class ChannelsAttend(Streamed):
    """Cross-covariance attention: channels of a head attend to each other, so heads go whole."""

    class inner(Heads):
        def attend(self, q, k, v):
            q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
            return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v).transpose(-2, -1)


@case(TOKENS, [16, 4])
class LinearAttention(Streamed):
    """No softmax: keys meet values first."""

    class inner(Heads):
        def attend(self, q, k, v):
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return q @ (k.mT @ v) / (q @ k.sum(-2)[..., None])


@case(TOKENS, [16, 4])
class KeysOfTwoLayers(Tokens):
    """Keys and values of one layer are read by another one too."""

    def __init__(self) -> None:
        super().__init__(16)
        self.first_layer, self.q, self.o = Heads(), nn.Linear(16, 16), nn.Linear(16, 16)

    def body(self, x):
        a = self.first_layer
        k, v = a.split(a.k(x)), a.split(a.v(x))
        x = x + a.merge(a.attend(a.split(a.q(x)), k, v))
        y = a.attend(a.split(self.q(x)), k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))


@case(((2, 6, 12), (2, 9, 10)), [16, 4])
class Cross(nn.Module):
    """Queries of one input, keys and values of another, and learned ones in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn, self.last = nn.Linear(12, 16), Heads(), nn.Linear(16, 3)
        self.attn.k, self.attn.v = nn.Linear(10, 16), nn.Linear(10, 16)
        self.latents = nn.Parameter(torch.randn(1, 2, 16))

    def forward(self, x, context):
        x, a = torch.cat([self.latents.expand(x.shape[0], -1, -1), self.first(x)], 1), self.attn
        q, k, v = a.split(a.q(x)), a.split(a.k(context)), a.split(a.v(context))
        return self.last((x + a.merge(a.attend(q, k, v))).mean(1))


@case(TOKENS, [16, 4, 24])
class Parallel(Tokens):
    """Attention and MLP side by side, from one norm."""

    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.attn, self.a, self.b = nn.LayerNorm(16), Heads(), nn.Linear(16, 24), nn.Linear(24, 16)

    def body(self, x):
        y = self.norm(x)
        return x + self.attn(y) + self.b(F.gelu(self.a(y)))


@case(TOKENS, [16, 4])
class PackedAndUnbound(Tokens):
    """Whole heads go; four heads of four channels look alike, and are told apart."""

    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.heads, self.head_dim = 4, 4

    def body(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)  # no scale argument: head_dim must stay
        return x + self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))


@case(TOKENS, [16, 4])
class AttentionByInputWidth(Tokens):
    """Heads computed from the input's own width, which loses channels too: its code is rewritten."""

    def __init__(self) -> None:
        super().__init__(16)
        self.attn = self.Inner()

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
            attn = (q @ k.transpose(-2, -1)) * (c // self.num_heads) ** -0.5
            return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))

    def body(self, x):
        return x + self.attn(x)


class Checked(nn.Module):
    """Heads taken from the input's own width, with checks and branches on sizes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        size = x.size()
        b, n, c = size
        heads = (b, n, self.num_heads, c // self.num_heads)
        if c % self.num_heads:
            raise ValueError("the width is no multiple of the number of heads")
        q, k, v = (f(x).view(*heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT * (1.0 if n > 8 else 0.5)
        if scores.size() != (b, self.num_heads, n, n):
            raise ValueError("scores of another size")
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(size))


@case(TOKENS, [16, 4])
class ChecksOnSizes(Streamed):
    """Rewritten along the branches that the example takes."""

    inner = Checked


def test_a_rewritten_forward_refuses_inputs_for_which_its_code_would_branch_otherwise() -> None:
    torch.manual_seed(0)
    model, x = ChecksOnSizes(), torch.randn(*TOKENS)
    coupling = couple(model, (x,))
    slim = assert_equal(model, coupling, removal(coupling, one), (x,))
    short, long = torch.randn(1, 8, 12).double(), torch.randn(1, 9, 12).double()
    slim(short)
    with pytest.raises(SlimError, match="would branch otherwise"):
        slim(long)


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
