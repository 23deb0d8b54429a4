"""Ops that mix channels or tell them apart by number: those stay, with the reason; what else there is goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, TOKENS, Ends, Table, Tokens, show
from test_graph_rules_movement import moving
from torch import nn

case = CASES = Table()


@case(IMAGE, [12], {"first.weight": "softmax"})
@moving()
def softmax_over_channels(x):
    return x.softmax(1)


@case(IMAGE, [12], {"first.weight": "log_softmax"})
@moving()
def log_softmax_over_channels(x):
    return F.log_softmax(x, 1)


@case(IMAGE, [12], {"first.weight": "argmax"})
@moving(1)
def largest_channel(x):
    return x.argmax(1, keepdim=True).to(x.dtype)


@case(IMAGE, [12], {"first.weight": "topk"})
@moving(3)
def three_largest(x):
    return x.topk(3, 1).values


@case(IMAGE, [12], {"first.weight": "sort"})
@moving()
def sorted_channels(x):
    return x.sort(1, descending=True)[0]


@case(IMAGE, [12], {"first.weight": "cumsum"})
@moving()
def running_sum(x):
    return x.cumsum(1)


@case(IMAGE, [12], {"first.weight": "amax|max"})
@moving(1)
def maximum_over_channels(x):
    return x.max(1, keepdim=True).values


@case(IMAGE, [12], {"first.weight": "logsumexp"})
@moving(1)
def log_sum(x):
    return x.logsumexp(1, keepdim=True)


@case(IMAGE, [12], {"first.weight": "prod"})
@moving(1)
def product_over_channels(x):
    return x.prod(1, keepdim=True)


@case(IMAGE, [12], {"first.weight": "median"})
@moving(1)
def median_over_channels(x):
    return x.median(1, keepdim=True).values


@case(IMAGE, [12], {"first.weight": "fft"})
@moving()
def fourier_over_channels(x):
    return torch.fft.fft(x, dim=1).real


@case(IMAGE, [12], {"first.weight": "."})
@moving(7)
def differences(x):
    return x[:, 1:] - x[:, :-1]


@case(IMAGE, [12], {"first.weight": "avg_pool3d"})
@moving(4)
def pooled_over_channels(x):
    return F.avg_pool3d(x.unsqueeze(1), (2, 1, 1)).squeeze(1)


@case(IMAGE, [12], {"first.weight": "mul"})
@moving()
def weighed_by_number(x):
    """A constant that tells the channels apart, made as it runs."""
    return x * torch.arange(8.0).view(1, 8, 1, 1).to(x.dtype).sin()


@case(IMAGE, [12], {"first.weight": "one_hot|."})
@moving()
def gated_by_place(x):
    place = x.mean((2, 3)).argmax(1)
    return x * F.one_hot(place, 8).to(x.dtype)[..., None, None]


@case(IMAGE, [2, 12], {"first.weight": "6 of 8 .* op without a rule", "linalg_cross": "without a rule"})
@moving(3, 12)
def vectors(x):
    return torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1)


@case(IMAGE, [8, 12])
@moving()
def sum_over_channels(x):
    """A sum over channels that are truly zero needs none of them."""
    return F.relu(x) * torch.sigmoid(x.sum(1, keepdim=True))


@case(IMAGE, [8, 12])
@moving()
def mean_over_channels(x):
    """A mean goes on dividing by how many there were."""
    return x - x.mean(1, keepdim=True)


@case(IMAGE, [8, 12])
@moving()
def deviation_over_channels(x):
    """So does a standard deviation, which counts the absent channels' distance from the mean."""
    return x / (x.var(1, keepdim=True) + x.std(1, keepdim=True, unbiased=False) + 1)


@case(IMAGE, [8, 12])
@moving()
def norm_over_channels(x):
    return F.normalize(x, dim=1) + x / (x.norm(dim=1, keepdim=True) + x.abs().sum(1, keepdim=True))


@case(IMAGE, [8, 12])
@moving()
def neither_zero_nor_tied(x):
    """exp(0) is not 0: the consumer's columns are masked, so that does not matter."""
    return torch.exp(x).clamp(max=3.0) + 1


@case(IMAGE, [8, 12])
@moving()
def functions_of_all_kinds(x):
    y = F.softplus(x) * F.mish(x) + torch.atan(x) ** 2 - torch.rsqrt(x.square() + 1) + F.hardsigmoid(x)
    return torch.addcmul(y, x, x.sign(), value=0.5) + torch.maximum(x, y) - torch.fmod(x, 2.0) + torch.clip(x, 1, 2)


@case(IMAGE, [8, 12])
@moving()
def compared(x):
    y = (x > 0.1) & ~(x > 0.5) | (x == 0)
    return y.to(x.dtype) * x + torch.logical_not(y)


@case(IMAGE, [12], {"first.weight": "divided"})
@moving()
def divided_by_channels(x):
    """0 / 0 is no number."""
    return x.sin() / x


@case(IMAGE, [8, 12, 4])
class ChannelAndSpaceAttention(Ends):
    """CBAM's spatial map takes a mean over channels; its maximum would keep them all."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 7, padding=3)

        def forward(self, x):
            return x * torch.sigmoid(self.conv(x.mean(1, keepdim=True)))

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.a, self.b, self.gate, self.out = nn.Linear(8, 4), nn.Linear(4, 8), self.Gate(), nn.Conv2d(8, 12, 1)

    def mlp(self, x):
        return self.b(F.relu(self.a(x)))

    def body(self, x):
        x = x * torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))[..., None, None]
        return self.out(self.gate(x))


@case(IMAGE, [8, 12], {"b.weight": "linear"})
class OuterProduct(Ends):
    """Two sets of channels multiplied one with another: the next layer's inputs go by the first of them only."""

    def __init__(self) -> None:
        super().__init__(8)
        self.b, self.fc, self.last = nn.Conv2d(8, 5, 1), nn.Linear(40, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(F.relu(self.fc(torch.einsum("nchw,ndhw->ncd", x, self.b(x)).flatten(1))))


@case(IMAGE, [12], {"first.weight": "."})
class Gram(Ends):
    """Channels multiplied with themselves: rows and columns are the same channels."""

    def __init__(self) -> None:
        super().__init__(6)
        self.fc, self.last = nn.Linear(36, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x).flatten(2)
        return self.last(F.relu(self.fc((x @ x.mT).flatten(1))))


@case(TOKENS, [16, 10])
class Contracted(Tokens):
    """einsum in several spellings, with weights and between activations."""

    def __init__(self) -> None:
        super().__init__(16, 10)
        self.w, self.v = nn.Parameter(torch.randn(16, 10)), nn.Linear(16, 10)

    def body(self, x):
        y = torch.einsum("bnc,cd->bnd", x, self.w)
        scores = torch.einsum("bnc,bmc->bnm", x, x).softmax(-1)
        return torch.einsum("bnm,bmd->bnd", scores, y) * torch.sigmoid(self.v(x))


@case(((2, 12), (2, 9)), [10, 7, 6])
class Cosine(nn.Module):
    """Two towers that end in a common space, compared there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.p, self.q = nn.Linear(12, 10), nn.Linear(9, 7), nn.Linear(10, 6), nn.Linear(7, 6)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, y):
        x, y = F.normalize(self.p(F.relu(self.a(x))), dim=-1), F.normalize(self.q(F.relu(self.b(y))), dim=-1)
        return {"logits": x @ y.t() * self.temperature.exp(), "pairs": F.cosine_similarity(x, y)}


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
