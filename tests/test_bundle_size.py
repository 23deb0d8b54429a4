"""24 networks of a ResNet-18 take little more than one, and one of them is read without the others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torchvision

import cocktailsdk as cocktail
from cocktailsdk.bundle import bundle_bytes
from cocktailsdk.report.run import dense_bytes
from cocktailsdk.utils.batchnorm import statistics_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The default networks with statistics of their own, which are no easier to pack than measured ones."""
    torch.manual_seed(0)
    net = cocktail.sparsify(torchvision.models.resnet18().eval(), example_inputs=(torch.randn(1, 3, 32, 32),))
    buffers = statistics_of(net.model)
    for name in net.names[1:]:
        kept = net.masks[name].tensors(net.coupling)
        net.statistics[name] = {b: torch.rand(t.shape) * kept.get(b, torch.ones(())) for b, t in buffers.items()}
    path = tmp_path_factory.mktemp("saved") / "bundle"
    net.save_pretrained(path)
    return net, path


@pytest.mark.slow
def test_24_networks_of_a_resnet_18_are_few_bytes(saved):
    net, path = saved
    count = {p.name: len(p.subnets()) for p in net.patterns}
    assert (len(net.names), count) == (24, {"unstructured": 10, "n:m": 3, "channel": 10})
    dense, bundle = dense_bytes(net.model), bundle_bytes(path)
    assert bundle <= 1.25 * dense, bundle / dense
    assert 18 * bundle <= 24 * dense, 24 * dense / bundle


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensor"), [("2:4", "2:4.runs"), ("channel@0.469", "channel.units")])
def test_of_one_network_little_more_is_read_than_it_takes(saved, caplog, name, tensor):
    _, path = saved
    with caplog.at_level(logging.DEBUG, logger="cocktailsdk.bundle.read"):
        net = cocktail.from_pretrained(path, torchvision.models.resnet18(), subnets=[name])
    read = {Path(r.args[2]).name: r.args[:2] for r in caplog.records if r.name == "cocktailsdk.bundle.read"}
    assert read["weights.safetensors"][0] == read["weights.safetensors"][1]
    own = {"2:4.runs": net.masks["2:4"].elements.nbytes * 3 // 4 if name == "2:4" else 0, "channel.units": 720}[tensor]
    statistics = 4 * sum(t.numel() for t in net.statistics[name].values())
    assert read["subnets.safetensors"][0] <= own + statistics + 5 * (256 << 10)
    assert read["subnets.safetensors"][1] > 9_000_000
