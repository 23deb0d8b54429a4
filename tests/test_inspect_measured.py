"""FLOPs of a real pass are those of its matrix products, whichever fused kernels this version of PyTorch has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.inspection.measuring import measured_flops, unfused

B, L, S, E, H = 2, 6, 10, 16, 4
"""Batch, queries, keys, width and heads."""

PROJECTIONS = 2 * 4 * B * L * E * E
ATTENTION = 2 * 2 * B * L * L * E


class Attend(nn.Module):
    def __init__(self, groups: int = H, **options: bool) -> None:
        super().__init__()
        self.groups, self.options = groups, options

    def forward(self, q: Tensor) -> Tensor:
        k = torch.randn(B, self.groups, S, E // H)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=self.groups < H, **self.options)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(E, H, 4 * E, batch_first=True)


class Myself(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "attention": (Attend, (B, H, L, E // H), 2 * 2 * B * L * S * E),
    "grouped queries": (lambda: Attend(2), (B, H, L, E // H), 2 * 2 * B * L * S * E),
    "causal, masked to half but run whole": (lambda: Attend(is_causal=True), (B, H, L, E // H), 2 * 2 * B * L * S * E),
    "multi-head attention": (lambda: Myself(E, H, batch_first=True), (B, L, E), PROJECTIONS + ATTENTION),
    "encoder layer": (encoder, (B, L, E), PROJECTIONS + ATTENTION + 2 * 2 * B * L * E * 4 * E),
    "encoder": (
        lambda: nn.TransformerEncoder(encoder(), 3),
        (B, L, E),
        3 * (PROJECTIONS + ATTENTION + 2 * 2 * B * L * E * 4 * E),
    ),
    "lstm": (lambda: nn.LSTM(E, 8, batch_first=True), (B, L, E), 2 * B * L * 4 * 8 * (E + 8)),
    "gru": (lambda: nn.GRU(E, 8, batch_first=True), (B, L, E), 2 * B * L * 3 * 8 * (E + 8)),
    "convolution": (lambda: nn.Conv2d(3, 8, 3, padding=1), (B, 3, 5, 5), 2 * B * 25 * 8 * 27),
}


@pytest.mark.parametrize("name", CASES)
def test_fused_kernels_count_as_their_matrix_products(name: str) -> None:
    make, shape, expected = CASES[name]
    assert measured_flops(make().eval(), (torch.randn(shape),))[""] == expected


def test_flops_are_told_by_module() -> None:
    model = nn.Sequential(nn.Linear(E, E), encoder()).eval()
    counts = measured_flops(model, (torch.randn(B, L, E),))
    assert counts["0"] == 2 * B * L * E * E
    assert counts["1.self_attn"] == PROJECTIONS + ATTENTION
    assert counts[""] == counts["0"] + counts["1"]


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("it never runs")


def settings() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    fused = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    return (*fused, torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)


@pytest.mark.parametrize("fast", [True, False])
def test_settings_are_put_back_whatever_the_model_does(fast: bool) -> None:
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        before = settings()
        with pytest.raises(RuntimeError, match="it never runs"):
            measured_flops(Fails(), (torch.ones(1),))
        assert settings() == before
        with unfused():
            assert settings() == (False, False, True, False, False)
        assert settings() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def test_inspect_tells_the_attention_of_a_model_that_it_cannot_trace() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = encoder()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x if float(x.sum()) > 0 else -x  # depends on values

    found = cocktail.inspect(Untraceable().eval(), (torch.randn(B, L, E),))
    assert found.flops >= PROJECTIONS + ATTENTION
