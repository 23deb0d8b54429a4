"""Every network is measured on the machine, in each runtime, and the command says and saves it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import IMAGE, TinyNet
from torch import nn
from typer.testing import CliRunner, Result

import cocktailsdk as cocktail
from cocktailsdk.choosing import bench, read_profile
from cocktailsdk.choosing.memory import peak_bytes
from cocktailsdk.cli.main import app

NET = """
from tiny import TinyNet as build
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def net() -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(1, 3, IMAGE, IMAGE)
        return cocktail.sparsify(TinyNet(), ["2:4", "channel@0.5"], example_inputs=(x,))


@pytest.fixture
def here(net: cocktail.CocktailNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "of_the_user.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "of_the_user", raising=False)
    net.metrics.update({"dense": 0.9, "2:4": 0.88, "channel@0.5": 0.8})
    net.save_pretrained(tmp_path / "bundle")
    return tmp_path


def test_peak_memory_is_weights_and_what_is_alive_at_once() -> None:
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    x = torch.randn(16, 8)
    weights = 4 * (8 * 32 + 32 * 4)
    # the input, which the caller holds, and two activations of 32 around the ReLU
    assert peak_bytes(model, (x,), {}) == weights + 4 * 16 * (8 + 32 + 32)


def test_every_network_is_measured_and_the_net_is_left_as_it_was(net: cocktail.CocktailNet) -> None:
    told: list[tuple[int, int, str]] = []
    net.switch("2:4")
    net.train()
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    profile = bench(net, batch_sizes=(4, 1), repeats=2, warmup=1, progress=lambda *a: told.append(a))
    assert net.active == "2:4" and net.model.training
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())
    net.switch("dense")
    net.eval()
    assert [n.name for n in profile.networks] == ["dense", "2:4", "channel@0.5"]
    reports = {r.name: r for r in net.subnets()}
    for n in profile.networks:
        assert [t.batch for t in n.timings] == [1, 4]
        assert (n.flops, n.params) == (reports[n.name].flops, reports[n.name].params)
        for t in n.timings:
            assert 0 < t.low_ms <= t.latency_ms <= t.high_ms
            assert t.throughput == pytest.approx(1e3 * t.batch / t.latency_ms)
    dense, zeros, slim = profile.networks
    assert zeros.timings[1].memory_bytes == dense.timings[1].memory_bytes
    assert slim.timings[1].memory_bytes < dense.timings[1].memory_bytes
    assert dense.timings[0].memory_bytes < dense.timings[1].memory_bytes
    assert (dense.used, zeros.used, slim.used) == ({"whole": 4}, {"nothing": 2, "whole": 2}, {"slim layer": 4})
    assert any(n.front for n in profile.networks)
    assert profile.machine["torch"] == torch.__version__ and profile.threads == torch.get_num_threads()
    done, total, _ = told[-1]
    assert done == total == 3 * (1 + 2 * 3)
    assert [d for d, _, _ in told] == sorted(d for d, _, _ in told)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_are_measured_through_checked_files(net: cocktail.CocktailNet, runtime: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    profile = bench(net, ["channel@0.5"], batch_sizes=(2,), runtime=runtime, repeats=1, warmup=0)
    assert profile.runtime.startswith(runtime)
    assert [n.name for n in profile.networks] == ["dense", "channel@0.5"]
    assert all(n.timings[0].memory_bytes is None for n in profile.networks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runtime": "tensorrt"}, "no runtime is named 'tensorrt'; there are torch, onnxruntime, openvino"),
        ({"batch_sizes": ()}, "at least 1"),
        ({"batch_sizes": (0,)}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
        ({"names": ["2:5"]}, "nearest: 2:4"),
    ],
)
def test_wrong_requests_are_refused(net: cocktail.CocktailNet, options: dict[str, object], said: str) -> None:
    with pytest.raises(cocktail.CocktailError, match=said):
        bench(net, **options)


def test_the_command_measures_and_saves_a_profile_that_pick_reads(here: Path, net: cocktail.CocktailNet) -> None:
    done = run("bench", "bundle", "--model", "of_the_user:build", "--batch", "2", "--repeats", "2", "--layers")
    assert done.exit_code == 0, done.output
    for said in (
        "batch 2",
        "channel@0.5",
        "x dense",
        "4 slim layer",
        "2 nothing",
        "peak",
        "0.8800",
        "as run",
        "profile:",
    ):
        assert said in done.stdout
    assert "\x1b" not in done.stdout
    profile = read_profile(here / "bundle.profile.json")
    assert [n.metric for n in profile.networks] == [0.9, 0.88, 0.8]
    assert net.pick(max_latency_ms=1e6, profile="bundle.profile.json") == "dense"


@pytest.mark.usefixtures("here")
def test_the_command_gives_data() -> None:
    arguments = ("--model", "of_the_user:build", "--batch", "1", "--repeats", "1", "--out", "p.json", "--json")
    done = run("bench", "bundle", "channel@0.5", *arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [n["name"] for n in found["networks"]] == ["dense", "channel@0.5"] and found["profile"] == "p.json"


@pytest.mark.usefixtures("here")
def test_the_command_exports() -> None:
    options = ("--model", "of_the_user:build")
    done = run("export", "bundle", "channel@0.5", "net.pt2", *options)
    assert done.exit_code == 0, done.output
    assert "checked in torch" in done.stdout and Path("net.pt2").is_file()
    done = run("export", "bundle", "channel@0.5", "net.safetensors", *options, "--json")
    assert json.loads(done.stdout)["subnet"] == "channel@0.5"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "bundle", "2:4", "net.onx", "--model", "of_the_user:build"), "Did you mean .onnx"),
        (("export", "bundle", "2:5", "net.pt2", "--model", "of_the_user:build"), "nearest: 2:4"),
        (("export", "not/here", "2:4", "net.pt2"), "not/here"),
        (("bench", "bundle", "2:5", "--model", "of_the_user:build"), "nearest: 2:4"),
        (("bench", "bundle", "--model", "resnet5o"), "resnet50"),
        (("bench", "not/here"), "not/here"),
    ],
)
def test_failures_say_one_thing_and_leave_nothing(arguments: tuple[str, ...], said: str) -> None:
    def left() -> set[str]:
        return {p.name for p in Path().iterdir()} - {"__pycache__"}

    before = left()
    done = run(*arguments)
    assert done.exit_code == 1 and done.stdout == ""
    assert said in done.stderr and "Traceback" not in done.stderr
    assert left() == before


def test_a_bundle_that_says_how_its_model_is_built_needs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    cocktail.sparsify(model, ["2:4"], example_inputs=(torch.randn(1, 3, 32, 32),)).save_pretrained("timm")
    done = run("export", "timm", "2:4", "net.safetensors")
    assert done.exit_code == 0, done.output
    cocktail.sparsify(TinyNet().eval(), ["2:4"], example_inputs=(torch.randn(1, 3, IMAGE, IMAGE),)).save_pretrained(
        "own"
    )
    done = run("export", "own", "2:4", "own.safetensors")
    assert done.exit_code == 1 and "--model" in done.stderr
