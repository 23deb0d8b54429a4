"""Networks are picked by budget, profiles are kept and checked, and what the hardware uses is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_net

import cocktailsdk as cocktail
from cocktailsdk.choosing import (
    DeviceProfile,
    SubnetCost,
    Timing,
    deployed_bytes,
    layers_used,
    pareto_front,
    read_profile,
    use_counts,
)
from cocktailsdk.exporting.torch_files import own_tensors

LEVELS = ["unstructured@0.5", "2:4", "channel@0.25", "channel@0.5"]


@pytest.fixture
def net() -> cocktail.CocktailNet:
    return tiny_net(LEVELS)


def cost(name: str, ms: float, metric: float | None = None, macs: int = 0) -> SubnetCost:
    return SubnetCost(name, "", 0.0, metric, 0, 0, macs, 0, (Timing(1, ms, ms, ms, 1e3 / ms),))


def profile_of(net: cocktail.CocktailNet, **milliseconds: float) -> DeviceProfile:
    rows = [
        SubnetCost(
            r.name, r.pattern, r.sparsity, r.metric, r.params, r.flops, r.nonzero_macs, deployed_bytes(net, r.name),
            tuple(Timing(b, ms, ms, ms, 1e3 * b / ms, 1000 * b) for b, ms in ((1, m), (8, 4 * m))),
        )
        for r in net.subnets()
        for m in [milliseconds.get(r.name, milliseconds.get(r.pattern, 10.0))]
    ]  # fmt: skip
    return DeviceProfile(tuple(rows), "TinyNet", "torch", 1, 3, {"processor": "a"})


def test_the_best_metric_within_the_budget_is_picked(net: cocktail.CocktailNet) -> None:
    net.metrics.update({"dense": 0.9, "unstructured@0.5": 0.88, "2:4": 0.87, "channel@0.25": 0.8, "channel@0.5": 0.7})
    flops = {r.name: r.flops for r in net.subnets()}
    assert net.pick() == "dense"
    assert net.pick(pattern="n:m") == "2:4"
    assert net.pick(max_flops=flops["dense"]) == "dense"
    assert net.pick(max_flops=flops["dense"] - 1) == "channel@0.25"
    assert net.pick(max_flops=flops["channel@0.5"]) == "channel@0.5"
    assert net.pick(max_bytes=deployed_bytes(net, "channel@0.25")) == "channel@0.25"
    assert net.pick(metric_mode="min") == "channel@0.5"


def test_without_metrics_it_is_what_keeps_most(net: cocktail.CocktailNet) -> None:
    assert net.pick() == "dense"
    most = max((r for r in net.subnets() if r.pattern == "channel"), key=lambda r: r.nonzero_macs)
    assert net.pick(pattern="channel") == most.name == "channel@0.25"
    net.metrics["channel@0.5"] = 0.1  # any metric is more than none
    assert net.pick(pattern="channel") == "channel@0.5"
    net.metrics["channel@0.25"] = float("nan")
    assert net.pick(pattern="channel") == "channel@0.5"


def test_latency_is_that_of_the_profile(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    profile = profile_of(net, **{"channel@0.25": 6.0, "channel@0.5": 3.0})
    assert net.pick(max_latency_ms=6.0, profile=profile) == "channel@0.25"
    assert net.pick(max_latency_ms=5.9, profile=profile.write(tmp_path / "p.json")) == "channel@0.5"
    assert net.pick(max_latency_ms=24.0, profile=profile, batch_size=8) == "channel@0.25"
    with pytest.raises(cocktail.CocktailError, match="no batch size 2; it has 1, 8"):
        net.pick(max_latency_ms=24.0, profile=profile, batch_size=2)


def test_nothing_within_the_budget_names_the_nearest(net: cocktail.CocktailNet) -> None:
    profile = profile_of(net, **{"channel@0.25": 6.0, "channel@0.5": 3.0})
    with pytest.raises(cocktail.SubnetError, match=r"nearest is 'channel@0.5' with 3 ms \(1.50 times max_latency_ms\)"):
        net.pick(max_latency_ms=2.0, profile=profile)
    with pytest.raises(cocktail.SubnetError, match="no subnet of pattern 'n:m' is within max_flops=10"):
        net.pick(max_flops=10, pattern="n:m")


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_latency_ms": 1.0}, "give profile=.*cocktail-cli bench"),
        ({"max_latency_ms": 1.0, "profile": "not/here.json"}, "no device profile not/here.json"),
        ({"max_flops": 0}, "a number above 0, not max_flops=0"),
        ({"max_flops": float("nan")}, "a number above 0"),
        ({"pattern": "chanel"}, "no subnet has the pattern 'chanel'; there are dense, unstructured"),
        ({"metric_mode": "best"}, "'max' or 'min'"),
    ],
)
def test_wrong_budgets_are_refused(net: cocktail.CocktailNet, budget: dict[str, object], said: str) -> None:
    with pytest.raises(cocktail.CocktailError, match=said):
        net.pick(**budget)


def test_a_profile_of_other_networks_is_refused(net: cocktail.CocktailNet) -> None:
    profile = profile_of(net)
    fewer = replace(profile, networks=profile.networks[:-1])
    with pytest.raises(cocktail.CocktailError, match="it does not have it"):
        net.pick(max_latency_ms=100, profile=fewer)
    other = replace(profile, networks=tuple(replace(n, flops=n.flops + 1) for n in profile.networks))
    with pytest.raises(cocktail.CocktailError, match="measured on other networks"):
        net.pick(max_latency_ms=100, profile=other)


def test_profiles_are_read_as_they_were_written(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    profile = profile_of(net)
    assert read_profile(profile.write(tmp_path / "deep" / "p.json")) == profile
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"networks": []}, {"networks": 3}, {"networks": [{"name": "dense"}]}, {"more": 1},
        {"networks": [{**vars(cost("dense", 1.0)), "timings": []}]},
        {"networks": [{**vars(cost("dense", 1.0)), "timings": [{**vars(Timing(1, 1, 1, 1, 1)), "latency_ms": "1"}]}]},
    ],
)  # fmt: skip
def test_damaged_profiles_are_refused(net: cocktail.CocktailNet, change: dict[str, object], tmp_path: Path) -> None:
    data = {**profile_of(net).to_dict(), **change}
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(cocktail.CocktailError, match=r"p\.json (has|is no)"):
        read_profile(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(cocktail.CocktailError, match="no device profile"):
        read_profile(tmp_path / "p.json")


def test_the_front_is_what_nothing_beats() -> None:
    rows = [cost("dense", 10, 0.9), cost("zeros", 9.9, 0.88), cost("slim", 4, 0.8), cost("slimmer", 3, 0.7)]
    assert pareto_front(rows) == {"dense", "slim", "slimmer"}  # 'zeros' is faster by noise only
    assert pareto_front([*rows, cost("best", 2, 0.95)]) == {"best"}
    assert pareto_front([cost("a", 10, 0.9), cost("b", 10.1, 0.9)]) == {"a", "b"}
    unknown = [cost("dense", 10, None, 100), cost("slim", 4, 0.1, 30), cost("slow", 11, 0.9, 30)]
    assert pareto_front(unknown) == {"dense", "slim"}  # by multiply-adds, since one has no metric


@pytest.mark.parametrize("name", ["dense", *LEVELS])
def test_bytes_and_layers_are_those_of_the_slim_model(net: cocktail.CocktailNet, name: str) -> None:
    net = cocktail.sparsify(net.model, LEVELS, example_inputs=net.example[0])
    slim = net.slim(name)
    assert deployed_bytes(net, name) == sum(t.nbytes for t in own_tensors(slim).values())
    layers = {u.weight: u for u in layers_used(net, name)}
    for weight, use in layers.items():
        assert use.shape == tuple(slim.get_parameter(weight).shape)
        assert use.zeros == pytest.approx(float((slim.get_parameter(weight) == 0).float().mean()))
    wanted = {
        "dense": {"whole": 4},
        "unstructured@0.5": {"nothing": 2, "whole": 2},
        "2:4": {"nothing": 2, "whole": 2},
        "channel@0.25": {"slim layer": 4},
        "channel@0.5": {"slim layer": 4},
    }
    assert use_counts(layers.values()) == wanted[name]
    run = sum(use.macs for use in layers.values())
    flops = {r.name: r.flops for r in net.subnets()}
    assert 2 * run == flops[name]


def test_dropped_branches_take_no_bytes() -> None:
    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Linear(8, 8)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
            self.head = torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    net = cocktail.sparsify(Deep(), ["depth@0.34"], example_inputs=(torch.randn(2, 8),))
    (name,) = (n for n in net.names if n != "dense")
    slim = own_tensors(net.slim(name))
    assert deployed_bytes(net, name) == sum(t.nbytes for t in slim.values()) < deployed_bytes(net, "dense")
    assert use_counts(layers_used(net, name))["layer gone"] >= 1
