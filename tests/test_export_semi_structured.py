"""Which layers 2:4 kernels could run is known anywhere; that they do, only where there are such kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.exporting.semi_structured import MULTIPLES, eligible_linears, to_semi_structured

cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer",
)


class Mixed(nn.Module):
    """Linear layers of sizes that kernels take and do not take, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 64, 1)
        self.conv = nn.Conv1d(64, 64, 1)
        self.large = nn.Linear(64, 128)
        self.narrow = nn.Linear(128, 24)
        self.wide = nn.Linear(24, 64)
        self.back = nn.Linear(64, 64)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.first(x)))).transpose(1, 2)
        for layer in (self.large, self.narrow, self.wide, self.back):
            x = torch.relu(layer(x))
        return self.fc(x.mean(1))


@pytest.fixture(scope="module")
def net() -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cocktail.sparsify(
            Mixed().eval(), ["2:4", "4:8", "unstructured@0.3"], example_inputs=(torch.randn(8, 4, 32),)
        )


def reasons(net: cocktail.CocktailNet, name: str, dtype: torch.dtype = torch.float16) -> dict[str, str]:
    return {layer.module: layer.reason for layer in eligible_linears(net.slim(name), dtype)}


def test_eligible_are_linear_layers_of_whole_tiles_that_hold_2_4(net: cocktail.CocktailNet) -> None:
    found = reasons(net, "2:4")
    assert found["large"] == found["back"] == ""
    assert found["narrow"] == "24 x 128 is no multiple of 32 x 64"
    assert found["wide"] == "64 x 24 is no multiple of 32 x 64"
    assert "no multiple" in found["fc"]
    assert "conv" not in found and "first" not in found


@pytest.mark.parametrize("name", ["dense", "4:8", "unstructured@0.3"])
def test_other_zeros_are_not_2_4(net: cocktail.CocktailNet, name: str) -> None:
    assert "consecutive weights are not zero" in reasons(net, name)["large"]


def test_dtypes_without_kernels_and_shared_weights_are_not_eligible(net: cocktail.CocktailNet) -> None:
    assert "no 2:4 kernel for float64" in reasons(net, "2:4", torch.float64)["large"]
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    assert all("shared" in layer.reason for layer in eligible_linears(model))


def test_sizes_are_those_that_both_backends_take() -> None:
    backends = (torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT)
    for dtype, (rows, columns) in MULTIPLES.items():
        for backend in backends:
            limits = backend._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert rows % limits.sparse_min_rows == 0 and columns % limits.sparse_min_cols == 0


def test_without_such_a_gpu_it_says_so(net: cocktail.CocktailNet) -> None:
    with pytest.raises(cocktail.ExportFailed, match="compute capability 8.0.*neither its speed nor its memory"):
        to_semi_structured(net, "2:4", device="cpu")


@cuda
def test_layers_run_on_2_4_kernels(net: cocktail.CocktailNet) -> None:
    from cocktailsdk.choosing import layers_used

    model, report = to_semi_structured(net, "2:4", always=True, repeats=3)
    assert report.eligible == report.used == 2
    assert report.error < 1e-2
    assert all(layer.sparse_ms is not None for layer in report.layers if layer.used)
    assert report.other_zeros == ("conv.weight",)
    used = {u.weight: u.used for u in layers_used(net, "2:4", model)}
    assert used["large.weight"] == used["back.weight"] == "2:4 kernel"
    assert used["conv.weight"] == "nothing"


@cuda
def test_a_network_without_2_4_is_refused(net: cocktail.CocktailNet) -> None:
    with pytest.raises(cocktail.ExportFailed, match="no layer of 'unstructured@0.3' can run on a 2:4 kernel"):
        to_semi_structured(net, "unstructured@0.3")
