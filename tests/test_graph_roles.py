"""Which weights count as classifiers: those that make the model's output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cocktailsdk.graph import couple


class Heads(nn.Module):
    """A trunk, and heads that make the output as ``join`` says."""

    def __init__(self, join):
        super().__init__()
        self.trunk, self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(3, 3)
        self.offset = nn.Parameter(torch.ones(3))
        self.join = join

    def forward(self, x):
        return self.join(self, torch.relu(self.trunk(x)))


def classifiers(model, *args):
    return {w.module for w in couple(model, args, prove=False).weights if w.role == "classifier"}


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        (lambda m, h: m.a(h), {"a"}),
        (lambda m, h: (m.a(h), m.b(h)), {"a", "b"}),
        (lambda m, h: m.a(h)[:, None].flatten(1), {"a"}),
        (lambda m, h: (m.a(h) + m.b(h)) / 2, {"a", "b"}),
        (lambda m, h: 0.5 * m.a(h) - m.b(h) * 0.25 + 1.0, {"a", "b"}),
        (lambda m, h: (y := m.a(h)) + m.b(h) + m.c(y), set()),  # a's product is read by more than the sum
        (lambda m, h: (y := m.a(h)) + m.c(y), set()),  # a residual stream
        (lambda m, h: m.a(h) + torch.relu(m.b(h)), set()),
        (lambda m, h: m.a(h) * m.b(h), set()),
        (lambda m, h: torch.softmax(m.a(h), -1), set()),
        (lambda m, h: m.a(h) + m.offset, set()),
    ],
)
def test_heads_whose_sum_or_average_is_the_output_are_classifiers(join, expected):
    assert classifiers(Heads(join), torch.randn(2, 4)) == expected


@pytest.mark.slow
def test_both_heads_of_a_distilled_transformer():
    import timm

    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    assert classifiers(model, torch.randn(1, 3, 224, 224)) == {"head", "head_dist"}
