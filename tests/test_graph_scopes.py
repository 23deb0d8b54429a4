"""Models that torch.export cannot follow as a whole: the largest parts that it can are found and slimmed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import half, removal
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk.errors import ExportFailed, SlimError
from cocktailsdk.graph import couple
from cocktailsdk.graph.cut import Cutter
from cocktailsdk.graph.relabel import check_labels
from cocktailsdk.graph.verify_slim import verify_slim


def block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 1)
    )


class Choosing(nn.Module):
    """What it runs depends on values; its parts do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 16), block(3, 12)
        self.head = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if float(x.detach().abs().mean()) >= 0:
            x = self.second(x)
        return self.head["a"](x.mean((2, 3)))


class Tied(Choosing):
    """A weight of a part is also read by code that cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = self.first[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table.sum()


class Rows(Choosing):
    """How many rows a part is given depends on weights, as a detector's regions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.second(self.first(x)).movedim(1, -1).reshape(-1, 3)
        sums = rows.detach().sum(1)
        return self.head["a"](torch.stack([row for row, v in zip(rows, sums, strict=True) if float(v) > sums.mean()]))


class Opaque(nn.Module):
    """Nothing of it can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) if float(x.detach().sum()) > -1e9 else x


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_largest_parts_are_found() -> None:
    coupling = couple(Choosing(), (X,))
    assert coupling.trace is not None
    assert coupling.trace.scopes == ("first", "second", "head.a")
    assert sorted(g.size for g in coupling.groups) == [10, 12, 16]
    kept = {k.where: k.reason for k in coupling.kept}
    assert "could not be exported" in kept["the model"]
    assert "exported alone" in kept["first.3.weight"]


def test_slim_equals_masked_over_all_parts() -> None:
    model = Choosing()
    coupling = couple(model, (X,))
    proof = verify_slim(model, Cutter(coupling, coupling.trace, removal(coupling, half)), (X,))
    assert proof.error < 1e-9
    slim = cocktail.slim(model, (X,), ratio=0.5)
    assert type(slim) is Choosing
    assert (slim.first[0].out_channels, slim.second[0].out_channels, slim.head["a"][0].out_features) == (8, 6, 5)
    slim(X).sum().backward()


def test_a_part_may_be_given_another_number_of_rows() -> None:
    torch.manual_seed(0)
    model = Rows()
    coupling = couple(model, (X,))
    assert sorted(g.size for g in coupling.groups) == [10, 12, 16]  # none is kept whole for its rows
    slim = cocktail.slim(model, (X,), ratio=0.5)
    assert (slim.first[0].out_channels, slim.second[0].out_channels, slim.head["a"][0].out_features) == (8, 6, 5)


def test_what_other_code_reads_stays_whole() -> None:
    coupling = couple(Tied(), (X,))
    assert sorted(g.size for g in coupling.groups) == [10, 12]
    assert any("could not be exported" in k.reason for k in coupling.kept if k.where == "table")


def test_a_model_of_which_nothing_can_be_followed() -> None:
    with pytest.raises(ExportFailed, match="nor could any of its submodules"):
        couple(Opaque(), (X[:, :, 0, 0],))


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(ExportFailed, match="does not run on the example inputs"):
        couple(Choosing(), (torch.randn(2, 5, 8, 8),))


def test_a_detector() -> None:
    """Boxes cannot be exported; the backbone and the heads can, and hold nearly all weights."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    images = [torch.rand(3, 320, 320)]
    slim = cocktail.slim(model, (images,), ratio=0.5)
    assert type(slim) is type(model)
    count = sum(p.numel() for p in slim.parameters()) / sum(p.numel() for p in model.parameters())
    assert count < 0.6
    assert set(slim(images)[0]) == {"boxes", "scores", "labels"}


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Swapped(Split):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.cat(torch.relu(self.a(x)).chunk(2, -1)[::-1], -1).relu())


def test_labels_in_another_order_are_caught() -> None:
    """Without looking at any value: the slim model's code swaps halves of its channels, the original's does not."""
    model, x = Split(), torch.randn(2, 6)
    coupling = couple(model, (x,))
    cutter = Cutter(coupling, coupling.trace, removal(coupling, half))
    slim = cutter.cut(model)[0]
    assert check_labels(slim, cutter, (x,)) > 0
    slim.forward = Swapped.forward.__get__(slim)
    with pytest.raises(SlimError, match="in their order"):
        check_labels(slim, cutter, (x,))


def test_a_call_of_another_size_is_caught() -> None:
    model, x = Split(), torch.randn(2, 6)
    coupling = couple(model, (x,))
    cutter = Cutter(coupling, coupling.trace, removal(coupling, half))
    whole = Cutter(coupling, coupling.trace, torch.zeros_like(cutter.removed)).cut(model)[0]
    with pytest.raises(SlimError, match="survive"):
        check_labels(whole, cutter, (x,))


def test_outputs_of_unknown_types_do_not_break_the_model_into_parts() -> None:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = hf.LlamaForCausalLM(config).eval()
    words = {"input_ids": torch.arange(8).reshape(1, 8)}
    assert type(model(**words).past_key_values).__name__ == "DynamicCache"
    with_cache = couple(model, (), words)
    without = couple(model, (), {**words, "use_cache": False})
    assert [(g.name, g.size) for g in with_cache.groups] == [(g.name, g.size) for g in without.groups]
    assert "model" in {g.name for g in with_cache.groups}
    assert not model._forward_hooks
