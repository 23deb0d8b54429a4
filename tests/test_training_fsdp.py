"""Weights sharded by FSDP2 over two processes of this machine (gloo): all comes out as of whole ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ranks_program
import torch
from ranks_program import ROUNDING, PlainNet, launch, outcome
from training_tiny import assert_identical, tiny_net

import cocktailsdk as cocktail
from cocktailsdk.utils.fsdp import full_tensor, is_sharded, like, local, plain_class, sharded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="PyTorch was built without gloo",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    done = launch(folder, "fsdp", "fsdp_trained", "fsdp_resumed")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert "RANK" not in os.environ
    return ranks_program.fsdp(tmp_path_factory.mktemp("whole"))


def test_weights_are_sharded_by_rows(folder: Path) -> None:
    assert [outcome(folder, "fsdp", rank)["rows"] for rank in (0, 1)] == [(4, 8), (4, 8)]


def test_masks_of_sharded_weights_are_those_of_whole_ones_ties_included(folder: Path, alone: Any) -> None:
    for rank in (0, 1):
        assert_identical(outcome(folder, "fsdp", rank)["umg"], alone["umg"])


def test_a_sharded_run_is_that_of_one_process(folder: Path, alone: Any) -> None:
    first, second = outcome(folder, "fsdp", 0), outcome(folder, "fsdp", 1)
    for two in (first, second):
        assert_identical(two["masks"], alone["masks"])
        assert two["metrics"] == alone["metrics"]
        assert two["evaluated"] == alone["evaluated"]
        assert two["history"]["alphas"] == alone["history"]["alphas"]
        for found, expected in zip(two["history"]["rounds"], alone["history"]["rounds"], strict=True):
            for one, other in zip(found["losses"], expected["losses"], strict=True):
                assert one == pytest.approx(other, abs=ROUNDING)
        for name, weight in alone["weights"].items():
            assert torch.allclose(two["weights"][name], weight, rtol=0, atol=ROUNDING), name
    assert_identical(first["weights"], second["weights"])


def test_a_sharded_run_that_was_stopped_goes_on_identically(folder: Path) -> None:
    expected = outcome(folder, "fsdp", 0)["weights"]
    for rank in (0, 1):
        assert_identical(outcome(folder, "fsdp_resumed", rank), expected)


def test_a_sharded_run_from_trained_weights_is_that_of_one_process(folder: Path, tmp_path: Path) -> None:
    alone = ranks_program.fsdp_trained(tmp_path)
    for rank in (0, 1):
        sharded = outcome(folder, "fsdp_trained", rank)
        assert sharded["made"] == alone["made"]
        assert not sharded["private"]
        for name, weight in alone["weights"].items():
            assert torch.allclose(sharded["weights"][name], weight, rtol=0, atol=ROUNDING), name


def test_its_bundle_loads_into_a_whole_model(folder: Path) -> None:
    net = cocktail.from_pretrained(folder / "bundle-True", PlainNet().double())
    expected = outcome(folder, "fsdp", 0)
    for name, weight in expected["weights"].items():
        assert torch.equal(net.dense_tensor(name), weight), name
    assert net.metrics == expected["metrics"]
    assert_identical({n: {**m.elements} for n, m in net.masks.items()}, expected["masks"])


def test_what_is_not_sharded_is_left_as_it_is() -> None:
    net = tiny_net()
    weight = net.model.conv1.weight
    assert not is_sharded(weight) and not sharded(net.model)
    assert local(weight) is weight
    assert like(weight, weight) is weight
    assert torch.equal(full_tensor(weight), weight)
    assert plain_class(net.model) is type(net.model)
