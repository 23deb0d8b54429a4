"""A small module for every rule: slim equals masked (proven at every slimming), and as much goes as should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_graph_models import check
from torch import nn

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {}
"""By name: the module, its input's shape, and the sizes of the groups that it must have."""


def case(shape: tuple[int, ...], groups: list[int]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(cls: type[nn.Module]) -> type[nn.Module]:
        CASES[cls.__name__] = (cls, shape, sorted(groups))
        return cls

    return register


IMAGE, TOKENS = (2, 4, 8, 8), (2, 6, 12)


class Ends(nn.Module):
    """A body between a first layer and a classifier, so that the body's channels are free."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, width, 1), nn.Linear(out or width, 3)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x)).mean((2, 3)))


class Tokens(nn.Module):
    """The same for sequences."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, width), nn.Linear(width, 3)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x)).mean(1))


@case(IMAGE, [16, 8])
class SqueezeExcite(Ends):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def body(self, x):
        return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


@case(TOKENS, [16, 20])
class GatedLinearUnit(Tokens):
    def __init__(self) -> None:
        super().__init__(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(20, 16)

    def body(self, x):
        a, b = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(a) * b)


@case(IMAGE, [12])
class FunctionalGlu(Ends):
    def __init__(self) -> None:
        super().__init__(24, 12)

    def body(self, x):
        return F.glu(x, 1)


@case(IMAGE, [6, 16])
class ChannelShuffle(Ends):
    """Two rows of six: as many columns as can go without tearing the shuffle."""

    def __init__(self) -> None:
        super().__init__(12, 16)
        self.conv = nn.Conv2d(12, 16, 1)

    def body(self, x):
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.conv(x)


@case(TOKENS, [16, 4])
class Attention(Tokens):
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


@case(TOKENS, [16, 2])
class GroupedQueryRotary(Tokens):
    """Two key heads for four query heads, rotary tables: a unit is a key head and its two query heads."""

    def __init__(self) -> None:
        super().__init__(16)
        self.q, self.k, self.v, self.o = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)
        self.head_dim = 8
        t = torch.arange(6).float()[:, None] * torch.arange(1, 5).float()
        self.register_buffer("cos", t.cos().repeat(1, 2))
        self.register_buffer("sin", t.sin().repeat(1, 2))

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def body(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (
            t[:, :, None].expand(b, t.shape[1], 2, n, self.head_dim).reshape(b, -1, n, self.head_dim) for t in (k, v)
        )
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


@case(TOKENS, [16, 4])
class QueryKeyNorm(Tokens):
    """A norm whose weight all heads share: the heads may go, its weight stays."""

    def __init__(self) -> None:
        super().__init__(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.qn, self.kn = nn.LayerNorm(4), nn.LayerNorm(4)

    def body(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


@case((2, 6), [16])
class TiedEmbedding(nn.Module):
    """An embedding that is also the classifier: its columns go once, for both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


@case(IMAGE, [12])
class SharedModule(Ends):
    """Called twice: one axis, one set of labels."""

    def __init__(self) -> None:
        super().__init__(12)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    def body(self, x):
        return self.conv(F.relu(self.conv(x)))


@case(IMAGE, [8, 6, 20])
class Concatenation(Ends):
    def __init__(self) -> None:
        super().__init__(8, 14)
        self.a, self.b, self.c = nn.Conv2d(8, 6, 1), nn.Conv2d(14, 20, 1), nn.Conv2d(20, 14, 1)

    def body(self, x):
        x = torch.cat([x, self.a(x)], 1)
        return x + self.c(F.relu(self.b(x)))


@case(IMAGE, [8, 5])
class PixelShuffle(Ends):
    def __init__(self) -> None:
        super().__init__(8, 5)
        self.up, self.shuffle = nn.Conv2d(8, 20, 1), nn.PixelShuffle(2)

    def body(self, x):
        return self.shuffle(self.up(x))


@case(IMAGE, [8, 10])
class TransposedConvolution(Ends):
    def __init__(self) -> None:
        super().__init__(8, 10)
        self.up = nn.ConvTranspose2d(8, 10, 2, stride=2)

    def body(self, x):
        return F.relu(self.up(x))


@case(IMAGE, [6, 4])
class GroupedConvolution(Ends):
    """Every group loses the same positions, so that all stay equally wide."""

    def __init__(self) -> None:
        super().__init__(18, 12)
        self.conv = nn.Conv2d(18, 12, 3, groups=3)

    def body(self, x):
        return self.conv(x)


@case(IMAGE, [12])
class DepthwiseMultiplier(Ends):
    """Two outputs for each input channel: all three go together."""

    def __init__(self) -> None:
        super().__init__(12, 24)
        self.conv = nn.Conv2d(12, 24, 3, groups=12)

    def body(self, x):
        return self.conv(x)


@case(IMAGE, [4])
class GroupNormalised(Ends):
    """Whole groups go: each has its own statistics."""

    def __init__(self) -> None:
        super().__init__(16)
        self.norm = nn.GroupNorm(4, 16)

    def body(self, x):
        return self.norm(x)


@case(TOKENS, [16, 24])
class LayerNormStream(Tokens):
    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.a, self.b, self.out = (
            nn.LayerNorm(16),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            nn.LayerNorm(16, bias=False),
        )

    def body(self, x):
        return self.out(x + self.b(F.gelu(self.a(self.norm(x)))))


@case(TOKENS, [16, 24])
class RmsNormStream(Tokens):
    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.a, self.b = nn.RMSNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def body(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


@case(TOKENS, [16, 8, 10])
class MixerTransposes(Tokens):
    """Tokens mixed like channels: the hidden widths go, the number of tokens does not."""

    def __init__(self) -> None:
        super().__init__(16)
        self.t1, self.t2, self.c1, self.c2 = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(16, 10), nn.Linear(10, 16)

    def body(self, x):
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.c2(F.gelu(self.c1(x)))


@case((2, 8, 8, 12), [16, 24])
class SwinWindow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (
            nn.Linear(12, 16),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x):
        x = self.first(x)
        b, h, w, c = x.shape
        y = (
            torch.roll(x, (-2, -2), (1, 2))
            .view(b, h // 4, 4, w // 4, 4, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(-1, 16, c)
        )
        y = self.b(F.gelu(self.a(y))).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.last((x + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))


@case(IMAGE, [16])
class RolledChannels(Ends):
    """Rolled along channels: those stay; the next layer's do not."""

    def __init__(self) -> None:
        super().__init__(8, 16)
        self.conv = nn.Conv2d(8, 16, 1)

    def body(self, x):
        return self.conv(torch.roll(x, 1, 1))


@case(IMAGE, [8, 16, 6])
class SlicedChannels(Ends):
    """A run of channels, and parts of unequal length: bounds are mended in the module that takes them."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(5, 16, 1), nn.Conv2d(3, 6, 1)

        def forward(self, x):
            return torch.cat([self.a(x[:, :5]), self.b(x.split([5, 3], 1)[1])], 1)

    def __init__(self) -> None:
        super().__init__(8, 22)
        self.inner = self.Inner()

    def body(self, x):
        return self.inner(x)


@case(TOKENS, [16, 24])
class RmsNormInPieces(Tokens):
    """The mean over channels goes on dividing by how many there were."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.a, self.b = self.Norm(), nn.Linear(16, 24), nn.Linear(24, 16)

    def body(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


@case(IMAGE, [16])
class GroupNormOfOneGroup(Ends):
    def __init__(self) -> None:
        super().__init__(16)
        self.norm = nn.GroupNorm(1, 16)

    def body(self, x):
        return self.norm(x)


@case(IMAGE, [8, 12])
class NeitherZeroNorTied(Ends):
    """exp(0) is not 0: the consumer's columns are masked, so that does not matter."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.conv = nn.Conv2d(8, 12, 3)

    def body(self, x):
        return self.conv(torch.exp(x).clamp(max=3.0) + 1)


@case(TOKENS, [])
class NormOfNonZero(Tokens):
    """LayerNorm after a sigmoid: absent channels would be counted as zeros but are one half, so nothing goes."""

    def __init__(self) -> None:
        super().__init__(16)
        self.norm = nn.LayerNorm(16)

    def body(self, x):
        return self.norm(torch.sigmoid(x))


@case(IMAGE, [])
class ChannelMean(Ends):
    """A mean over channels divides by how many there are."""

    def __init__(self) -> None:
        super().__init__(8)

    def body(self, x):
        return x - x.mean(1, keepdim=True)


@case(IMAGE, [8])
class ChannelSum(Ends):
    """A sum over channels that are truly zero does not."""

    def __init__(self) -> None:
        super().__init__(8)

    def body(self, x):
        return F.relu(x) * torch.sigmoid(x.sum(1, keepdim=True))


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    make, shape, groups = CASES[name]
    torch.manual_seed(0)
    x = torch.randint(0, 9, shape) if name == "TiedEmbedding" else torch.randn(shape)
    coupling, _ = check(make(), x)
    assert sorted(g.size for g in coupling.groups) == groups, [(g.name, g.size) for g in coupling.groups]


def test_an_op_without_a_rule_is_named_and_keeps_what_it_touches() -> None:
    class Cross(Ends):
        def __init__(self) -> None:
            super().__init__(6)

        def body(self, x):
            return x + torch.linalg.matrix_exp(x)

    coupling, _ = check(Cross(), torch.randn(2, 4, 5, 5))
    assert list(coupling.unknown_ops)
    assert any("without a rule" in k.reason for k in coupling.kept)


def test_what_cannot_be_mended_is_kept_whole_with_a_reason() -> None:
    class Closed(Tokens):
        """Heads hidden in a closure, and control flow on sizes that no tracer follows."""

        def __init__(self) -> None:
            super().__init__(16)
            self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
            heads = [4]
            self.view = lambda t: t.view(*t.shape[:-1], heads[0], int(t.shape[-1] > 0) * 6)

        def body(self, x):
            y = self.view(self.a(x)).softmax(-1).flatten(-2)
            return x + self.b(y)

    coupling, _ = check(Closed(), torch.randn(*TOKENS))
    kept = {k.where: k.reason for k in coupling.kept}
    assert "a.weight" in kept
    assert coupling.groups  # the stream still goes


def test_excluded_modules_keep_their_output_channels() -> None:
    from cocktailsdk.graph import couple

    model, x = LayerNormStream(), torch.randn(*TOKENS)
    coupling = couple(model, (x,), exclude=lambda path: path == "a")
    assert [g.size for g in coupling.groups] == [16]
    assert any(k.where == "a.weight" and "excluded" in k.reason for k in coupling.kept)
