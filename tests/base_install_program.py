"""What a base install can do, and what it says where a package is missing; run by test_dependencies.py.

Hides the packages of the extras from this process, then trains, saves, loads, switches, extracts and reports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HIDDEN = {
    *("PIL", "accelerate", "matplotlib", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "pycocotools"),
    *("scipy", "sklearn", "tensorboard", "torchvision"),
}


class Hiding:
    """A finder of modules that does not find the hidden ones, as if they were not installed."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def refusal(work: Callable[[], Any]) -> str:
    from cocktailsdk.errors import CocktailError  # late: the finders come first

    try:
        work()
    except CocktailError as error:
        return str(error)
    raise AssertionError("it was not refused")


def main(folder: Path) -> None:
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]  # type: ignore[misc]

    import os

    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    import cocktailsdk as cocktail
    from cocktailsdk.cli.main import app
    from cocktailsdk.models import build_model
    from cocktailsdk.presets import get_preset
    from cocktailsdk.report.figure import write_figure
    from cocktailsdk.report.figures import write_figures
    from cocktailsdk.report.page import ReportedRun, report_page
    from cocktailsdk.report.run import RunReport, dense_bytes, network_rows, read_report
    from cocktailsdk.report.tensorboard import TensorBoard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x, labels = torch.randn(32, 8), torch.arange(32) % 4
    batches = list(zip(x.split(8), labels.split(8), strict=True))
    assert cocktail.inspect(model, x[:1]).groups
    net = cocktail.sparsify(model, ["unstructured@0.5", "2:4", "channel@0.5"], example_inputs=(x[:1],))
    trainer = cocktail.CoTrainer(net, batches, cross_entropy, val_loader=batches, epochs=1, out_dir=folder)
    trainer.fit()
    rows = network_rows(net.subnets(), trainer.evaluate(batches), net.metrics)
    net.save_pretrained(folder / "bundle")
    RunReport(rows, 1, dense_bytes(model), trainer.history.seconds).write(folder)
    net = cocktail.from_pretrained(folder / "bundle", model).eval()
    net.switch("channel@0.5")
    with torch.no_grad():
        assert torch.allclose(net.slim("channel@0.5")(x), net(x), atol=1e-5)
    app(["subnets", str(folder / "bundle")], standalone_mode=False)
    report = read_report(folder)
    assert report is not None

    says = {
        "presets": [refusal(get_preset("digits").loaders)],
        "plots": [
            refusal(lambda: write_figure(report, folder / "networks.png")),
            refusal(lambda: write_figures(report, folder, folder / "figures")),
            refusal(lambda: report_page([ReportedRun(report, folder)])),
        ],
        "vision": [refusal(lambda: build_model("torchvision:resnet18"))],
        "tensorboard": [refusal(lambda: TensorBoard(folder / "board"))],
        "onnx": [refusal(lambda: net.export("2:4", folder / "net.onnx"))],
        "openvino": [refusal(lambda: net.export("2:4", folder / "net.xml"))],
    }
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    says["distributed"] = [refusal(lambda: cocktail.CoTrainer(net, batches, cross_entropy, epochs=1))]
    for extra, messages in says.items():
        for message in messages:
            assert f'not installed: pip install "cocktailsdk[{extra}]"' in message, message
    assert not (folder / "figures").exists()
    assert not HIDDEN & sys.modules.keys(), HIDDEN & sys.modules.keys()
    sys.stdout.write("all done\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
