"""int8 by onnxruntime's own quantizer: what it came to is told, and what it needs is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import IMAGE, TinyNet
from torch import Tensor, nn

import cocktailsdk as cocktail

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, IMAGE, IMAGE, generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def net() -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cocktail.sparsify(TinyNet().eval(), ["2:4"], example_inputs=(torch.randn(1, 3, IMAGE, IMAGE),))


def test_a_convolutional_network_is_quantized_on_calibration_data(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    import onnx

    report = net.export("2:4", tmp_path / "net.onnx", int8=True, calibration=batches(), evaluation=batches())
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    q = report.int8
    assert q is not None and q.method == "static" and q.quantizer.startswith("onnxruntime.quantization")
    assert q.weights == 4
    assert 0 < q.mean < 0.1 and 0 < q.largest < 0.2
    with net.using("2:4"), torch.no_grad():
        right = [net.model(x).argmax(1) == y for x, y in batches()]
    assert q.metric_float == pytest.approx(float(torch.cat(right).float().mean()))
    assert q.metric is not None and 0 <= q.metric <= 1
    types = {t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer if len(t.dims) > 1}
    assert types == {onnx.TensorProto.INT8}
    assert report.zeros.found == report.zeros.wanted > 0  # zeros stay zeros


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_linear_layers_need_no_calibration_and_deviation_is_told_without_data(tmp_path: Path) -> None:
    net = cocktail.sparsify(Linears().eval(), ["2:4"], example_inputs=(torch.randn(2, 12),))
    report = net.export("2:4", tmp_path / "net.onnx", int8=True)
    q = report.int8
    assert q is not None and q.method == "dynamic" and q.metric is None and q.metric_float is None
    assert q.weights == 3 and 0 < q.mean < 0.1
    assert any("int8 (dynamic" in line for line in report.lines())


@pytest.mark.parametrize(
    ("suffix", "options", "said"),
    [
        (".onnx", {}, "needs calibration data.*calibration="),
        (".pt2", {}, r"\.pt2 has none here: export to \.onnx"),
        (".onnx", {"calibration": [{"wrong": torch.ones(1)}]}, "takes x"),
    ],
)
def test_what_cannot_be_quantized_leaves_no_file(
    net: cocktail.CocktailNet, suffix: str, options: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(cocktail.ExportFailed, match=said):
        net.export("2:4", tmp_path / f"net{suffix}", int8=True, **options)
    assert not any(tmp_path.iterdir())


def test_openvino_asks_for_its_quantizer(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    import importlib.util

    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    if importlib.util.find_spec("nncf") is not None:
        report = net.export("2:4", tmp_path / "net.xml", int8=True, calibration=batches())
        assert report.int8 is not None and report.int8.weights > 0
        return
    with pytest.raises(cocktail.ExportFailed, match="int8 for OpenVINO needs nncf.*pip install nncf"):
        net.export("2:4", tmp_path / "net.xml", int8=True, calibration=batches())
    assert not any(tmp_path.iterdir())
