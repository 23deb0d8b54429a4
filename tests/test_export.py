"""Exported networks compute what torch does, hold their zeros, and leave nothing behind when something fails."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import IMAGE, TinyNet
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.exporting.openvino_file import compiled

SUFFIXES = (".onnx", ".pt2", ".safetensors", ".xml")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")


def packages_for(suffix: str) -> None:
    if suffix in (".onnx", ".xml"):
        pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    if suffix == ".xml":
        pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")


def net_of(patterns: list[str], model: nn.Module | None = None, batch: int = 1) -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model if model is not None else TinyNet()
        x = torch.randn(batch, 3, IMAGE, IMAGE)
    return cocktail.sparsify(made.eval(), patterns, example_inputs=(x,))


@pytest.fixture(scope="module")
def net() -> cocktail.CocktailNet:
    return net_of(["unstructured@0.5", "2:4", "channel@0.5", "channel@0.5+2:4"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_slim_network_of_two_patterns_is_written_checked_and_counted(
    net: cocktail.CocktailNet, suffix: str, tmp_path: Path
) -> None:
    packages_for(suffix)
    report = net.export("channel@0.5+2:4", tmp_path / f"net{suffix}")
    slim = net.slim("channel@0.5+2:4")
    assert report.parameters == sum(p.numel() for p in slim.parameters()) < report.parameters_dense
    wanted = sum(int((slim.get_parameter(n) == 0).sum()) for n in ("widen.weight", "inner.weight"))
    assert report.zeros.wanted == report.zeros.found == wanted > 0
    assert report.zeros.missing == ()
    assert report.error < 1e-6
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == (["net.bin", "net.xml"] if suffix == ".xml" else [f"net{suffix}"])
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_the_onnx_file_runs_alone_with_any_batch_and_holds_exact_zeros(
    net: cocktail.CocktailNet, tmp_path: Path
) -> None:
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    file = tmp_path / "net.onnx"
    report = net.export("unstructured@0.5", file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("x", ["batch", 3, IMAGE, IMAGE])
    assert made.name == "output" and made.shape[0] == "batch"
    for batch in (1, 7):
        x = torch.randn(batch, 3, IMAGE, IMAGE)
        with net.using("unstructured@0.5"), torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), net.model(x))
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
    masked = net.masks["unstructured@0.5"].elements
    assert sum(int((held[n] == 0).sum()) for n in masked) == report.zeros.found
    for name, keep in masked.items():
        assert not held[name][~keep.numpy()].any()


def test_pt2_runs_without_the_models_code(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    net.export("channel@0.5", tmp_path / "net.pt2")
    torch.save(x := torch.randn(4, 3, IMAGE, IMAGE), tmp_path / "x.pt")
    program = (
        "import sys, torch\n"
        "x = torch.load(sys.argv[2])\n"
        "y = torch.export.load(sys.argv[1]).module()(x)\n"
        "torch.save(y.detach(), sys.argv[3])\n"
        "assert 'tiny' not in sys.modules and 'cocktailsdk' not in sys.modules\n"
    )
    files = [str(tmp_path / n) for n in ("net.pt2", "x.pt", "y.pt")]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), net.slim("channel@0.5")(x))


def test_safetensors_load_into_a_slim_model(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    report = net.export("channel@0.5", tmp_path / "net.safetensors")
    assert not report.dynamic_batch
    state = load_file(tmp_path / "net.safetensors")
    slim = net.slim("channel@0.5")
    for name, t in slim.state_dict().items():
        assert torch.equal(state.pop(name), t)
    assert not state


def test_the_net_is_left_as_it_was(tmp_path: Path) -> None:
    net = net_of(["unstructured@0.5", "2:4"])
    net.train()
    net.switch("2:4")
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    net.export("unstructured@0.5", tmp_path / "net.pt2")
    assert net.active == "2:4" and net.model.training
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())


def test_a_batch_of_fixed_size(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    import onnxruntime

    assert not net.export("2:4", tmp_path / "net.onnx", dynamic_batch=False).dynamic_batch
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, IMAGE, IMAGE]


class Noisy(TinyNet):
    """What it returns is another thing each time, so no export can be right."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.rand_like(out)


class Odd(TinyNet):
    """ONNX has no such function."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().forward(x))


class Branching(nn.Module):
    """What it computes depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyNet()

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return out if out.sum() > 0 else -out


@pytest.mark.parametrize(
    ("model", "suffix", "said"),
    [
        (Noisy, ".onnx", "computes something else than in torch"),
        (Odd, ".onnx", "torch.onnx cannot write '2:4' of Odd"),
        (Branching, ".pt2", "torch.export cannot follow the whole Branching"),
    ],
)
def test_what_fails_leaves_no_file(model: type[nn.Module], suffix: str, said: str, tmp_path: Path) -> None:
    net = net_of(["2:4"], model())
    with pytest.raises(cocktail.ExportFailed, match=said):
        net.export("2:4", tmp_path / f"net{suffix}")
    assert not any(tmp_path.iterdir())


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    net = net_of(["2:4"], Noisy())
    (tmp_path / "net.pt2").write_text("earlier")
    with pytest.raises(cocktail.ExportFailed):
        net.export("2:4", tmp_path / "net.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "earlier"


def test_what_no_graph_holds_can_still_be_written_as_tensors(tmp_path: Path) -> None:
    net = net_of(["2:4"], Branching())
    assert net.export("2:4", tmp_path / "net.safetensors").zeros.found > 0


@pytest.mark.parametrize(
    ("name", "file", "error", "said"),
    [
        ("2:4", "net.onx", cocktail.ExportFailed, r"the suffix '.onx'.*Did you mean .onnx\?.*\.pt2.*\.safetensors"),
        ("2:4", "net", cocktail.ExportFailed, "no suffix"),
        ("2:4", "folder.onnx", cocktail.ExportFailed, "is a folder"),
        ("2:5", "net.onnx", cocktail.SubnetError, "nearest: 2:4"),
    ],
)
def test_wrong_requests_say_what_there_is(
    net: cocktail.CocktailNet, name: str, file: str, error: type[Exception], said: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(error, match=said):
        net.export(name, tmp_path / file)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


def test_without_example_inputs_there_is_nothing_to_run(tmp_path: Path) -> None:
    net = net_of(["2:4"])
    net.example = None
    with pytest.raises(cocktail.ExportFailed, match="net.example"):
        net.export("2:4", tmp_path / "net.onnx")


def test_missing_packages_are_named_with_their_extra() -> None:
    from cocktailsdk.utils.optional import check_installed

    with pytest.raises(cocktail.ExportFailed, match=r'nowhere_to_be, which is.*pip install "cocktailsdk\[onnx\]"'):
        check_installed("torch", "nowhere_to_be", purpose="this", extra="onnx", error=cocktail.ExportFailed)


def test_runtimes_are_not_imported_before_they_are_used() -> None:
    program = (
        "import sys\n"
        "import cocktailsdk.net, cocktailsdk.exporting, cocktailsdk.choosing\n"
        "assert not {'onnx', 'onnxruntime', 'onnxscript', 'openvino', 'nncf'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_weights_too_large_for_one_file_lie_beside_it(
    net: cocktail.CocktailNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr("cocktailsdk.exporting.onnx_file.LARGEST", 0)  # a protocol buffer's limit is 2 GiB
    report = net.export("channel@0.5", tmp_path / "net.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])


class _Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def stack_for_signals() -> tuple[int | None, int]:
    """Where this thread's signal handlers run, and in how many bytes."""
    stack = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.at, stack.size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's C library")
def test_openvino_leaves_this_threads_signals_alone(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    # It gives the thread that compiles a stack for signals and frees it later: a SIGTERM then ends in a segmentation
    # fault where it should save a training run.
    packages_for(".xml")
    before = stack_for_signals()
    net.export("2:4", tmp_path / "net.xml")
    run = compiled(tmp_path / "net.xml")
    assert stack_for_signals() == before
    assert next(iter(run({"x": torch.randn(2, 3, IMAGE, IMAGE)}).values())).shape[0] == 2
    assert stack_for_signals() == before
