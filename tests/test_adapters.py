"""Names become models, models get inputs, and what cannot be had is said clearly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cocktailsdk import models as registry
from cocktailsdk.errors import AdapterError
from cocktailsdk.models import Adapter, adapters, build_model, example_inputs_for


def runs(model: nn.Module) -> object:
    args, kwargs = example_inputs_for(model)
    model.eval()
    with torch.no_grad():
        return model(*args, **kwargs)


def test_the_three_adapters_are_found_by_entry_points() -> None:
    assert {"timm", "torchvision", "transformers"} <= set(adapters())
    assert all(isinstance(a, Adapter) for a in adapters().values())


@pytest.mark.parametrize(
    "reference",
    ["resnet18", "timm:vit_tiny_patch16_224", "torchvision:resnet18", "torchvision:ssdlite320_mobilenet_v3_large"],
)
def test_image_models_run_on_their_example_inputs(reference: str) -> None:
    assert runs(build_model(reference)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["hf:bert", "hf:vit", "hf:t5", "hf:whisper", "hf:clip"])
def test_transformers_run_on_their_example_inputs(reference: str) -> None:
    assert runs(build_model(reference)) is not None


def test_a_local_folder_gives_its_own_configuration_and_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    saved = BertModel(config)
    saved.save_pretrained(tmp_path)
    loaded = build_model(f"hf:{tmp_path}", pretrained=True)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    fresh = build_model(f"hf:{tmp_path}")
    assert not torch.equal(
        fresh.state_dict()["encoder.layer.0.output.dense.weight"],
        saved.state_dict()["encoder.layer.0.output.dense.weight"],
    )
    assert runs(fresh) is not None


@pytest.mark.parametrize("reference", ["resnet50", "hf:google/vit-base-patch16-224"])
def test_trained_weights_offline_fail_clearly(reference: str) -> None:
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        build_model(reference, pretrained=True)


def test_a_model_type_has_no_trained_weights() -> None:
    with pytest.raises(AdapterError, match="no trained weights"):
        build_model("hf:bert", pretrained=True)


@pytest.mark.parametrize(
    ("reference", "near"),
    [
        ("resnet5o", "resnet50"),
        ("timm:resnet5o", "resnet50"),
        ("hf:bret", "hf:bert"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("json:lodas", "loads"),
    ],
)
def test_a_mistyped_name_gets_near_matches(reference: str, near: str) -> None:
    with pytest.raises(AdapterError, match=near):
        build_model(reference)


def test_a_factory_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_mine.py").write_text(
        "from torch import nn\n"
        "import torch\n"
        "class Net(nn.Linear):\n"
        "    example_inputs = torch.ones(2, 4)\n"
        "class Maker:\n"
        "    @staticmethod\n"
        "    def make(pretrained=False):\n"
        "        return Net(4, 7 if pretrained else 3)\n"
        "ready = Net(4, 2)\n"
        "number = 3\n"
        "def fails():\n"
        "    raise RuntimeError('no such luck')\n"
    )
    (tmp_path / "broken_one.py").write_text("import torch.does_not_exist\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = list(sys.path)
    model = build_model("of_mine:Maker.make")
    assert isinstance(model, nn.Linear)
    assert model.out_features == 3
    assert build_model("of_mine:Maker.make", pretrained=True).out_features == 7
    assert build_model("of_mine:ready").out_features == 2
    assert tuple(runs(model).shape) == (2, 3)  # type: ignore[attr-defined]
    for reference, said in [
        ("of_mine:number", "int"),
        ("of_mine:fails", "no such luck"),
        ("of_mine:Maker.makes", "it has make"),
        ("broken_one:f", "does_not_exist"),
        ("nowhere.at_all:f", "no module 'nowhere'"),
        ("json:JSONDecoder", "not a torch.nn.Module"),
        ("not a name:f", "names no model"),
    ]:
        with pytest.raises(AdapterError, match=said):
            build_model(reference)
    assert sys.path == before


def test_example_inputs_as_the_model_itself_gives_them() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(AdapterError, match="example_inputs=.*--input-size"):
        example_inputs_for(model)
    x = torch.zeros(1, 3)
    for given, want in [
        (x, ((x,), {})),
        ((x, 2), ((x, 2), {})),
        ({"a": x}, ((), {"a": x})),
        (lambda: x, ((x,), {})),
    ]:
        model.example_inputs = given  # type: ignore[assignment]
        args, kwargs = example_inputs_for(model)
        assert len(args) == len(want[0])
        assert all(a is b for a, b in zip(args, want[0], strict=True))
        assert kwargs.keys() == want[1].keys()


class Point:
    """As an entry point: what a package may name under the group."""

    def __init__(self, name: str, target: object) -> None:
        self.name, self.value, self._target = name, f"somewhere:{name}", target

    def load(self) -> object:
        if isinstance(self._target, Exception):
            raise self._target
        return self._target


class Own:
    """A third party's adapter."""

    name = "own"

    def owns(self, reference: str) -> bool:
        return reference.startswith("own:")

    def build(self, reference: str, *, pretrained: bool = False) -> nn.Module:
        del reference, pretrained
        return nn.Linear(2, 2)

    def example_inputs(self, model: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, object]] | None:
        return ((torch.zeros(1, 2),), {}) if isinstance(model, nn.Linear) else None

    def references(self) -> list[str]:
        return ["own:model"]


def test_other_packages_can_ship_adapters_and_a_broken_one_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = [Point("own", Own), Point("broken", ImportError("not here")), Point("wrong", dict)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    adapters.cache_clear()
    try:
        assert list(adapters()) == ["own"]
        assert "not here" in caplog.text
        assert "no Adapter" in caplog.text
        assert runs(build_model("own:model")) is not None
        with pytest.raises(AdapterError, match="own:model"):
            build_model("own-model")
    finally:
        monkeypatch.undo()
        adapters.cache_clear()
