"""Data movement along channels: cut, joined, turned, chosen, padded and overwritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, TOKENS, Ends, Table, Tokens, show
from torch import nn

case = CASES = Table()


class Inside(Ends):
    """Code of its own between two layers; a submodule, as code that takes numbers of channels mostly is."""

    width, out = 8, 12

    def __init__(self) -> None:
        super().__init__(self.width, self.out)
        self.inner = self.make_inner()

    class Move(nn.Module):
        """Moves channels about, before the next layer."""

        def __init__(self, width: int = 8, out: int = 12) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, out, 1)

        def move(self, x):
            raise AssertionError

        def forward(self, x):
            return self.conv(self.move(x))

    def make_inner(self) -> nn.Module:
        raise AssertionError

    def body(self, x):
        return self.inner(x)


def moving(width: int = 8, out: int = 12):
    """From a function on channels, between two convolutions: from eight channels to ``width``, to ``out``."""

    def make(fn):
        class Moved(Inside):
            class Inner(Inside.Move):
                def move(self, x):
                    return fn(x)

            def make_inner(self):
                return self.Inner(width, out)

        Moved.__name__ = fn.__name__
        Moved.out = out
        return Moved

    return make


@case(IMAGE, [12], {"first.weight": "roll"})
@moving()
def rolled(x):
    return torch.roll(x, 1, 1)


@case(IMAGE, [12], {"first.weight": "flip"})
@moving()
def flipped(x):
    return x.flip(1)


@case(IMAGE, [8, 12])
@moving()
def rolled_in_space(x):
    return torch.roll(x, (1, 2), (2, 3)).flip(-1).rot90(2, (2, 3))


@case(IMAGE, [5, 3, 12])
@moving(5)
def first_channels(x):
    return x[:, :5]


@case(IMAGE, [5, 3, 12])
@moving(5)
def middle_channels(x):
    return x.narrow(1, 2, 5)


@case(IMAGE, [5, 3, 12])
@moving()
def swapped_runs(x):
    a, b = x[:, :3], x[:, 3:]
    return torch.cat([b, a], 1)


@case(IMAGE, [4, 3, 12], {"first.weight": "1 of 8 channels: split"})
@moving()
def unequal_parts(x):
    a, b, c = torch.split(x, [1, 4, 3], 1)
    return torch.cat([b, a, c], 1)


@case(IMAGE, [4, 12])
@moving(4)
def equal_parts(x):
    a, b = x.chunk(2, 1)
    return a * b


@case(IMAGE, [12], {"first.weight": "slice|could not be fixed"})
@moving(4)
def every_other(x):
    return x[:, ::2]


@case(IMAGE, [12], {"first.weight": "slice|select"})
@moving(8)
def one_channel(x):
    return x * x[:, 3:4] + x[:, 0].unsqueeze(1)


@case(IMAGE, [12], {"first.weight": "index"})
@moving(4)
def chosen_channels(x):
    return x[:, torch.tensor([3, 0, 5, 5])]


@case(IMAGE, [12], {"first.weight": "index_select"})
@moving(3)
def selected_channels(x):
    return x.index_select(1, torch.tensor([1, 0, 6]))


@case(IMAGE, [12], {"first.weight": "gather"})
@moving(2)
def gathered_channels(x):
    return x.gather(1, torch.tensor([1, 4]).view(1, 2, 1, 1).expand(x.shape[0], 2, *x.shape[2:]))


@case(IMAGE, [12], {"first.weight": "take"})
@moving(2)
def taken_channels(x):
    return torch.take_along_dim(x, torch.tensor([1, 4]).view(1, 2, 1, 1), 1)


@case(IMAGE, [8, 12])
@moving(16)
def repeated(x):
    return x.repeat(1, 2, 1, 1)


@case(IMAGE, [8, 12])
@moving(16)
def repeated_each(x):
    return x.repeat_interleave(2, 1)


@case(IMAGE, [8, 12])
@moving(16)
def expanded(x):
    return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)


@case(IMAGE, [4, 12])
@moving(8)
def stacked(x):
    a, b = x.chunk(2, 1)
    return torch.stack([b, a], 2).flatten(1, 2)


@case(IMAGE, [8, 12])
@moving(8)
def stacked_and_unbound(x):
    a, b = torch.stack([x, x.relu()], 0).unbind(0)
    return a - b


@case(IMAGE, [8, 12])
@moving(8)
def squeezed(x):
    y = x.mean((2, 3), keepdim=True).squeeze(3).squeeze(2)
    return x * y[:, :, None, None].movedim(1, 1)


@case(IMAGE, [8, 12])
@moving(8)
def merged_positions(x):
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(-1, (h // 2) * (w // 2), c)
    y = y - y.amax(1, keepdim=True)
    return y.view(n, 2, 2, h // 2, w // 2, c).permute(0, 5, 3, 1, 4, 2).reshape(n, c, h, w)


@case(IMAGE, [8, 12])
@moving(32)
def focus(x):
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


@case(IMAGE, [8, 12])
@moving(10)
def with_coordinates(x):
    """Constant channels beside the others: the others go all the same."""
    n, _, h, w = x.shape
    rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(n, 1, h, w)
    return torch.cat([x, rows.to(x.dtype), rows.to(x.dtype).transpose(2, 3)], 1)


@case(IMAGE, [8, 12])
@moving(8)
def overwritten_in_space(x):
    y = x.clone()
    y[:, :, 1:] = x[:, :, :-1]
    return y


@case(IMAGE, [5, 12], {"first.weight": "3 of 8 channels: .* could not be fixed"})
@moving(8)
def overwritten_channels(x):
    """Written by position, which no tracer follows: what comes after goes."""
    y = x.clone()
    y[:, :3] = 1.0
    return y


@case(IMAGE, [12], {"first.weight": "could not be fixed"})
@moving(8)
def shifted_in_time(x):
    """A part of the channels looks ahead, a part looks back (TSM): by position too."""
    y = torch.zeros_like(x)
    y[:, :2, 1:] = x[:, :2, :-1]
    y[:, 2:4, :-1] = x[:, 2:4, 1:]
    y[:, 4:] = x[:, 4:]
    return y


@case(IMAGE, [8, 12])
@moving(8)
def chosen_by_value(x):
    return torch.where(x > 0, x, torch.zeros_like(x)) + torch.where(x.mean((1, 2, 3), keepdim=True) > 0, x, -x)


@case(IMAGE, [8, 12])
@moving(8)
def over_space(x):
    """cumulative sums, sorting and a Fourier transform over positions mix no channels."""
    y = x.cumsum(-1) + x.sort(-1).values + x.logsumexp(2, keepdim=True)
    return y + x.flatten(2).topk(1).values[..., None] * x.softmax(-1)


@case(IMAGE, [8, 12])
@moving(8)
def fourier_over_space(x):
    spectrum = torch.fft.rfft2(x, norm="ortho")
    return torch.fft.irfft2(spectrum * 0.5, s=x.shape[-2:], norm="ortho") + torch.fft.fft(x).abs()


@case(IMAGE, [8, 12])
@moving(8)
def sampled(x):
    theta = torch.tensor([[0.8, 0.1, 0.0], [-0.1, 0.8, 0.0]], dtype=x.dtype).expand(x.shape[0], 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, [x.shape[0], 1, *x.shape[2:]], align_corners=True), align_corners=True)


@case(TOKENS, [16, 8, 10], {"t2.weight": "add"})
class MixerTransposes(Tokens):
    """Tokens mixed like channels: the hidden widths go, the number of tokens does not."""

    def __init__(self) -> None:
        super().__init__(16)
        self.t1, self.t2, self.c1, self.c2 = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(16, 10), nn.Linear(10, 16)

    def body(self, x):
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.c2(F.gelu(self.c1(x)))


@case(IMAGE, [5, 3, 16, 6])
class SlicedChannels(Ends):
    """A run of channels, and parts of unequal length: bounds are fixed in the module that takes them."""

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


@case((2, 8, 8, 12), [16, 24])
class SwinWindow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(i, o) for i, o in ((12, 16), (16, 24), (24, 16), (16, 3)))

    def forward(self, x):
        x = self.first(x)
        b, h, w, c = x.shape
        y = torch.roll(x, (-2, -2), (1, 2)).view(b, h // 4, 4, w // 4, 4, c)
        y = self.b(F.gelu(self.a(y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c))))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.last((x + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))


@case((2, 8, 8, 12), [16, 20])
class PatchMerging(nn.Module):
    """Four neighbours side by side, normalised and reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 16), nn.LayerNorm(64)
        self.reduce, self.last = nn.Linear(64, 20, bias=False), nn.Linear(20, 3)

    def forward(self, x):
        x = self.first(x)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.last(self.reduce(self.norm(x)).mean((1, 2)))


@case(TOKENS, [16])
class PositionTable(Tokens):
    """A registered table along channels loses columns."""

    def __init__(self) -> None:
        super().__init__(16)
        t = torch.arange(9.0)[:, None] * torch.arange(1, 17)
        self.register_buffer("table", t.sin()[None])

    def body(self, x):
        return x * 4.0 + self.table[:, : x.shape[1]]


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
