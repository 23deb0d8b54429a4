"""Patterns that find nothing are refused, those that find little are told of."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.errors import PatternError


def heard(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("cocktailsdk") and r.levelno >= logging.WARNING]


def narrow() -> nn.Module:
    """Three input channels everywhere: no run of four."""
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


def wide(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


class Softmaxed(nn.Module):
    """No channel can go: each is compared with all others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).softmax(-1)).softmax(-1))


class Centred(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean()


def centred() -> nn.Module:
    model = wide()
    for i in (0, 2, 4):
        nn.utils.parametrize.register_parametrization(model[i], "weight", Centred())
    return model


@pytest.mark.parametrize(
    ("make", "n", "patterns", "named", "why"),
    [
        (narrow, 3, ["2:4"], "2:4", "too small"),
        (narrow, 3, ["unstructured", "2:4"], "2:4", r"ask for patterns=\['unstructured'\] alone"),
        (narrow, 3, ["4:8", "2:4"], "4:8", "too small"),
        (narrow, 3, ["n:m"], "n:m", None),
        (narrow, 3, ["block8x8@0.5"], "block8x8@0.5", "too small"),
        (narrow, 3, ["channel@0.5+2:4"], r"channel@0.5\+2:4", ""),
        (Softmaxed, 8, ["channel"], "channel", "softmax in the model normalises"),
        (Softmaxed, 8, ["2:4", "channel@0.5"], "channel@0.5", "normalises"),
        (centred, 3, ["unstructured@0.5"], "unstructured@0.5", "sub changes them"),
        (centred, 3, ["2:4"], "2:4", "sub changes them"),
    ],
)
def test_a_pattern_that_finds_nothing_is_refused_with_the_reason(make, n, patterns, named, why) -> None:
    x = torch.randn(2, n)
    if why is None:  # of the three of n:m one finds runs of two
        assert cocktail.sparsify(make(), patterns, (x,)).names[1:] == ["1:2", "2:4", "4:8"]
        return
    with pytest.raises(PatternError, match=f"(?s)('{named}' finds nothing|nothing in the model).*{why}") as error:
        cocktail.sparsify(make(), patterns, (x,))
    assert "\n" not in str(error.value)


def test_a_level_that_removes_nothing_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    cocktail.sparsify(wide(4), ["channel@0.1", "channel@0.5"], (torch.randn(2, 3),))
    assert len(heard(caplog)) == 1
    assert "'channel@0.1': nothing is removed" in heard(caplog)[0]


def test_one_pair_of_several_that_finds_no_runs_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    cocktail.sparsify(wide(4), ["n:m"], (torch.randn(2, 3),))
    assert any("'4:8': nothing is removed" in m and "too small" in m for m in heard(caplog))


def test_a_level_that_was_asked_to_remove_nothing_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    cocktail.sparsify(wide(), ["unstructured@0", "channel@0.5", "2:4"], (torch.randn(2, 3),))
    assert not heard(caplog)


@pytest.mark.parametrize(("width", "told"), [(8, True), (512, False)])
def test_a_pattern_that_covers_less_than_a_tenth_is_told_of(
    caplog: pytest.LogCaptureFixture, width: int, told: bool
) -> None:
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3000))
    cocktail.sparsify(model, ["2:4", "unstructured@0.5"], (torch.randn(2, 8),))
    assert len(heard(caplog)) == 2 * told
    assert all(
        "4.weight: classifier (name it in target_modules" in m and "% of the weights" in m for m in heard(caplog)
    )


def test_targeted_weights_need_be_no_tenth_of_the_model_to_be_pruned(caplog: pytest.LogCaptureFixture) -> None:
    net = cocktail.sparsify(wide(64), ["2:4"], (torch.randn(2, 3),), target_modules=["4"])
    assert [w.name for w in net.eligible] == ["4.weight"]
    assert "not targeted" in heard(caplog)[0]


def test_slim_refuses_what_has_no_channels_and_tells_where_none_or_few_go(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PatternError, match="no channels of Softmaxed can be removed.*normalises"):
        cocktail.slim(Softmaxed(), (torch.randn(2, 8),))
    cocktail.slim(wide(4), (torch.randn(2, 3),), ratio=0.1)
    assert ["no channel of Sequential is removed" in m for m in heard(caplog)] == [True]
    caplog.clear()
    cocktail.slim(wide(4), (torch.randn(2, 3),), ratio=0.0)
    cocktail.slim(wide(4), (torch.randn(2, 3),), ratio=0.5)
    assert not heard(caplog)


def test_slim_tells_where_few_weights_can_go(caplog: pytest.LogCaptureFixture) -> None:
    class Mostly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.table = nn.Linear(8, 4), nn.Linear(4, 2), nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.table.softmax(0).mean()

    cocktail.slim(Mostly(), (torch.randn(2, 8),))
    assert ["% of the weights of Mostly can be removed" in m for m in heard(caplog)] == [True]


def test_no_subnetwork_equals_the_dense_one_unless_it_was_told(caplog: pytest.LogCaptureFixture) -> None:
    """Over widths and patterns: what computes the dense output under a sparse name was refused or told of."""
    for width in (2, 3, 4, 6, 8):
        for pattern in ("1:2", "2:4", "4:8", "unstructured@0.01", "unstructured@0.5", "channel@0.1", "block4x4@0.5"):
            caplog.clear()
            x, model = torch.randn(2, 3), wide(width)
            try:
                net = cocktail.sparsify(model, [pattern], (x,))
            except PatternError:
                continue
            name = net.names[1]
            with torch.no_grad(), net.using(name):
                now = {n: p.clone() for n, p in net.model.named_parameters()}
            same = all(torch.equal(now[n], p) for n, p in net.model.named_parameters())
            assert same == any(f"'{name}': nothing is removed" in m for m in heard(caplog)), (width, pattern)
