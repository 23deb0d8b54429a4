"""Sums, gates and concatenations of channels; several inputs and outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, Ends, Table, Tokens, show
from torch import nn

case = CASES = Table()


@case((4, 12), [16, 10])
class BatchNormOfVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 3)
        self.n, self.m = nn.BatchNorm1d(16), nn.BatchNorm1d(10, affine=False)

    def forward(self, x):
        return self.last(F.elu(self.m(self.b(F.relu(self.n(self.a(x)))))))


@case(IMAGE, [12, 10])
class FrozenNorm(Ends):
    """Statistics and scales that are buffers go with their channels."""

    def __init__(self) -> None:
        super().__init__(12, 10)
        from torchvision.ops import FrozenBatchNorm2d

        self.norm, self.conv = FrozenBatchNorm2d(12), nn.Conv2d(12, 10, 1)
        for b in self.norm.buffers():
            b.copy_(torch.rand_like(b) + 0.5)

    def body(self, x):
        return self.conv(F.relu(self.norm(x)))


@case(IMAGE, [8, 12, 10])
class ActivationsWithSlopes(Ends):
    """A slope per channel goes with its channel; one for all stays."""

    def __init__(self) -> None:
        super().__init__(8, 10)
        self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 10, 1)
        self.each, self.all = nn.PReLU(12), nn.PReLU()

    def body(self, x):
        return self.all(self.b(self.each(self.a(F.leaky_relu(x)))))


@case(IMAGE, [16, 8])
class SqueezeExcite(Ends):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def body(self, x):
        return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


@case(IMAGE, [8, 6, 20])
class Concatenation(Ends):
    def __init__(self) -> None:
        super().__init__(8, 14)
        self.a, self.b, self.c = nn.Conv2d(8, 6, 1), nn.Conv2d(14, 20, 1), nn.Conv2d(20, 14, 1)

    def body(self, x):
        x = torch.cat([x, self.a(x)], 1)
        return x + self.c(F.relu(self.b(x)))


@case(IMAGE, [8, 6, 20])
class ConcatenatedResiduals(Ends):
    """Sums on both sides of a concatenation, which is itself summed."""

    def __init__(self) -> None:
        super().__init__(8, 14)
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((8, 6), (8, 8), (14, 20), (20, 14)))

    def body(self, x):
        y = torch.cat([x + F.relu(self.b(x)), self.a(x)], 1)
        return y + self.d(F.relu(self.c(y)))


@case(IMAGE, [8, 8, 12])
class DenseBlock(Ends):
    def __init__(self) -> None:
        super().__init__(8, 28)
        self.n, self.a = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.m, self.b = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)

    def body(self, x):
        x = torch.cat([x, self.a(F.relu(self.n(x)))], 1)
        return torch.cat([x, self.b(F.relu(self.m(x)))], 1)


@case((2, 6, 12), [16, 20])
class GatedLinearUnit(Tokens):
    """Both gates from one packed weight."""

    def __init__(self) -> None:
        super().__init__(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(20, 16)

    def body(self, x):
        a, b = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(a) * b)


@case((2, 6, 12), [16, 20])
class GatedByTwoWeights(Tokens):
    def __init__(self) -> None:
        super().__init__(16)
        self.gate, self.up, self.down = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(20, 16)

    def body(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@case(IMAGE, [12])
class FunctionalGlu(Ends):
    def __init__(self) -> None:
        super().__init__(24, 12)

    def body(self, x):
        return F.glu(x, 1)


@case(IMAGE, [6])
class Maxout(Ends):
    """The larger of two halves: the same position goes from both."""

    def __init__(self) -> None:
        super().__init__(12, 6)

    def body(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).amax(1)


@case(IMAGE, [8, 8])
class WeighedFusion(Ends):
    """Scalars that are parameters, as in BiFPN: they are nobody's channels."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.w, self.temperature = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor(1.5))

    def body(self, x):
        w = F.relu(self.w)
        return (w[0] * self.a(x) + w[1] * self.b(x)) / (w.sum() + 1e-4) * self.temperature.exp()


@case(IMAGE, [8, 5], {"values.weight": "softmax"})
class SpatialAttention(Ends):
    """A softmax over positions leaves channels free; the one over the map's own channels does not."""

    def __init__(self) -> None:
        super().__init__(8, 5)
        self.map, self.values, self.out = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 5, 1)

    def body(self, x):
        weights = self.map(x).flatten(2).softmax(-1).view(-1, 1, 8, 8)
        return self.out(self.values(x * weights).softmax(1))


@case(IMAGE, [8, 12])
class InPlace(Ends):
    """Sums, products and activations in place."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b, self.act = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), nn.ReLU(inplace=True)

    def body(self, x):
        y = self.b(self.act(self.a(x)).mul_(2).add_(1))
        y += x
        return y.clamp_(-3, 3)


@case(IMAGE, [8, 10])
class Siamese(Ends):
    """One tower for two images: its channels are tied to themselves only."""

    def __init__(self) -> None:
        super().__init__(8, 10)
        self.tower = nn.Sequential(nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10), nn.ReLU())

    def body(self, x):
        return (self.tower(x) - self.tower(x.flip(-1))).abs()


@case(((2, 4, 8, 8), (2, 5)), [8, 12])
class SeveralInputs(nn.Module):
    """Two inputs, modulating one the other (FiLM), and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 8, 3), nn.Linear(8, 3)
        self.hidden, self.film = nn.Linear(5, 12), nn.Linear(12, 16)

    def forward(self, x, condition):
        scale, shift = self.film(F.silu(self.hidden(condition)))[..., None, None].chunk(2, 1)
        y = self.conv(x) * (1 + scale) + shift
        return {"logits": self.out(y.relu().mean((2, 3))), "loss": y.new_zeros(())}


@case(IMAGE, [8], {"out.weight": "an output of the model"})
class SeveralOutputs(nn.Module):
    """Features that are returned stay; those in between go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out, self.last = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        features = self.out(F.relu(self.a(x)))
        return self.last(features.mean((2, 3))), [features]


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
