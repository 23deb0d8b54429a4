"""``inspect``: what is prunable, coupled, kept and why, and what could be saved."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from tiny import TinyNet, tiny_coupling
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.inspection import Inspection
from cocktailsdk.report.inspection import inspection_view

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def printed(found: Inspection, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    console.print(inspection_view(found, "tiny"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_layers_and_totals_are_those_of_the_coupling() -> None:
    model = TinyNet()
    found = cocktail.inspect(model, X[:1])
    coupling = tiny_coupling(model)
    assert found.followed
    assert found.params == coupling.params() == sum(p.numel() for p in model.parameters())
    assert found.flops == coupling.flops()
    assert [(la.name, la.shape, la.flops) for la in found.layers] == [
        (w.name, w.shape, 2 * w.macs) for w in coupling.weights
    ]
    assert sum(la.params for la in found.layers) == sum(w.numel for w in coupling.weights)


def test_eligibility_has_a_reason_where_not() -> None:
    by = {layer.module: layer for layer in cocktail.inspect(TinyNet(), (X,)).layers}
    assert not by["first"].unstructured.eligible
    assert "first convolution" in by["first"].unstructured.reason
    assert "classifier" in by["fc"].nm.reason
    assert by["widen"].unstructured.eligible
    assert by["widen"].unstructured.reason == ""
    assert by["fc"].channel.eligible is False
    assert "output" in by["fc"].channel.reason
    assert by["widen"].groups == by["inner"].groups != by["first"].groups


def test_nm_coverage_counts_full_runs_of_input_channels() -> None:
    class Net(nn.Sequential):
        example_inputs = torch.randn(1, 3, 8, 8)

    net = Net(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 8, 1), nn.Flatten(), nn.Linear(128, 2)
    )
    first, depthwise, pointwise, _ = cocktail.inspect(net).layers
    assert first.coverage[2] == pytest.approx(2 / 3)
    assert not depthwise.nm.eligible
    assert "shortest run" in depthwise.nm.reason
    assert depthwise.unstructured.eligible
    assert pointwise.nm.eligible
    assert pointwise.coverage == {2: 1.0, 4: 1.0, 8: pytest.approx(2 / 3), 16: 0.0}


def test_savings_at_half() -> None:
    model = TinyNet()
    found = cocktail.inspect(model, X)
    by = {s.subnet: s for s in found.savings}
    assert list(by) == ["unstructured@0.5", "1:2", "2:4", "4:8", "channel@0.5"]
    eligible = model.widen.weight.numel() + model.inner.weight.numel()
    assert by["unstructured@0.5"].params == found.params - eligible // 2
    assert by["2:4"].params == found.params - eligible // 2
    assert by["2:4"].coverage == pytest.approx(eligible / found.params)
    assert by["unstructured@0.5"].flops == found.flops > by["unstructured@0.5"].nonzero_flops
    removed = torch.zeros(24, dtype=torch.bool)
    removed[0:4] = removed[8:16] = True
    coupling = tiny_coupling(model)
    assert by["channel@0.5"].params == coupling.params(removed)
    assert by["channel@0.5"].flops == coupling.flops(removed) * X.shape[0]


def test_groups_say_what_they_couple() -> None:
    group = cocktail.inspect(TinyNet(), X).groups[1]
    assert group.units == 16
    assert set(group.rows) == {"widen.weight", "inner.weight"}
    assert set(group.columns) == {"inner.weight", "fc.weight"}
    assert {"bn2.running_var", "inner.bias"} <= set(group.entries)


def test_as_data_it_is_json() -> None:
    found = cocktail.inspect(TinyNet(), X)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["model"] == "TinyNet"
    assert data["inputs"] == ["2x3x6x6 float32"]
    assert len(data["layers"]) == 4


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum().item() > 0 else x


def test_what_does_not_run_is_kept_whole_with_the_reason() -> None:
    model = Undecided().train()
    found = cocktail.inspect(model, (torch.ones(1, 5),))
    assert not found.followed
    assert found.groups == ()
    assert "does not run on the example inputs" in found.kept[0].reason
    assert [layer.module for layer in found.layers] == ["inner"]
    assert found.params == 20
    assert found.flops == 0
    assert model.training
    assert "does not run on the example inputs" in " ".join(printed(found).split())


def test_of_what_cannot_be_exported_the_parts_are_followed() -> None:
    model = Undecided().train()
    found = cocktail.inspect(model, (torch.ones(1, 4),))
    assert found.followed
    assert [layer.module for layer in found.layers] == ["inner"]
    assert (found.params, found.flops) == (20, 32)
    assert model.training
    text = " ".join(printed(found).split())
    assert "inner: channels: an output of a part that was exported alone" in text
    assert "the model: channels: its own code could not be exported" in text


@pytest.mark.slow
def test_a_detection_model_is_told_of_in_few_words(capfd: pytest.CaptureFixture[str]) -> None:
    from cocktailsdk.models import build_model

    found = cocktail.inspect(build_model("torchvision:ssdlite320_mobilenet_v3_large"))
    assert found.followed
    assert any(kept.where == "the model" for kept in found.kept)
    assert max(len(kept.reason) for kept in found.kept) <= 500
    assert found.flops > 1e9
    assert capfd.readouterr() == ("", "")  # the exporter would print pages


def test_without_inputs_the_reason_says_how_to_give_them() -> None:
    found = cocktail.inspect(nn.Linear(3, 3))
    assert not found.followed
    assert "example_inputs" in found.kept[0].reason


def test_a_model_without_layers() -> None:
    found = cocktail.inspect(nn.ReLU(), (X,))
    assert found.layers == ()
    assert found.params == 0
    assert "Sum" in printed(found)


def test_a_net_is_inspected_as_its_model() -> None:
    net = cocktail.sparsify(TinyNet(), ["2:4"], example_inputs=(X,))
    assert cocktail.inspect(net) == cocktail.inspect(net.model, (X,))


def test_the_model_is_left_as_it_was() -> None:
    model = TinyNet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cocktail.inspect(model, X)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_view_fits_its_width(width: int) -> None:
    text = printed(cocktail.inspect(TinyNet(), X), width)
    assert max(map(len, text.splitlines())) <= width
    for said in ("N:M", "Channel groups", "Kept whole", "fc: channels: an output of the model", "Sum:"):
        assert said in text


def test_long_names_stand_under_their_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_rather_long_name = nn.Linear(8, 8)
            self.another_quite_long_name = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.another_quite_long_name(self.a_rather_long_name(x).relu())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    lines = printed(cocktail.inspect(Net(), torch.ones(1, 8))).splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() == "blocks.0")
    assert lines[at + 1].startswith("  a_rather_long_name ")
