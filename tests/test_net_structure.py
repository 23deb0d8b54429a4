"""A model that is changed after `sparsify`: every call says which module, and nothing is damaged."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import cocktailsdk as cocktail
from cocktailsdk import CocktailError

X = torch.randn(2, 3, 8, 8)
BATCH = (X, torch.tensor([0, 1]))


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(1)),
        nn.Linear(256, 16),
        nn.Linear(16, 4),
    )


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


CHANGES = {
    "replaced": lambda m: m.__setitem__(4, nn.Linear(256, 16)),
    "replaced inside": lambda m: m[3].__setitem__(0, nn.Conv2d(8, 16, 3)),
    "removed": lambda m: m.__setitem__(5, nn.Identity()),
    "added": lambda m: m.append(nn.Linear(4, 4)),
    "norm added": lambda m: m.add_module("norm", nn.BatchNorm1d(4, affine=False)),
    "parametrized": lambda m: parametrize.register_parametrization(m[4], "weight", Half()),
    "weight norm": lambda m: parametrizations.weight_norm(m[4]),
    "pruned": lambda m: prune.l1_unstructured(m[4], "weight", 0.5),
    "quantized": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
    "fused": lambda m: torch.ao.quantization.fuse_modules(m.eval(), [["0", "1"]], inplace=True),
    "wrapped": lambda m: m.__setitem__(4, nn.Sequential(m[4])),
    "reshaped": lambda m: setattr(m[4], "weight", nn.Parameter(torch.zeros(16, 9))),
}
CALLS = {
    "switch": lambda net, path: net.switch("2:4"),
    "using": lambda net, path: net.using("2:4").__enter__(),
    "dense": lambda net, path: net.switch("dense"),
    "preload": lambda net, path: net.preload("2:4"),
    "recalibrate": lambda net, path: net.recalibrate("2:4", [X]),
    "slim": lambda net, path: net.slim("channel@0.5"),
    "views": lambda net, path: net.views(),
    "save_pretrained": lambda net, path: net.save_pretrained(path),
    "export": lambda net, path: net.export("2:4", path / "x.pt2"),
    "subnets": lambda net, path: net.subnets(),
    "umg": lambda net, path: net.umg(),
    "make_masks": lambda net, path: net.make_masks("2:4"),
    "mask_tensors": lambda net, path: net.mask_tensors("2:4"),
    "state_dict": lambda net, path: net.state_dict(),
    "load_state_dict": lambda net, path: net.load_state_dict({}),
    "dense_tensor": lambda net, path: net.dense_tensor("4.weight"),
    "pick": lambda net, path: net.pick(max_bytes=1e9),
    "finetune": lambda net, path: cocktail.finetune(net, "2:4", [BATCH], F.cross_entropy),
    "CoTrainer": lambda net, path: cocktail.CoTrainer(net, [BATCH], F.cross_entropy, epochs=1).fit(),
    "CoLoop": lambda net, path: cocktail.CoLoop(net, steps=4, rounds=1).begin(BATCH),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_every_call_names_what_was_changed(change, tmp_path):
    changed = model()
    net = cocktail.sparsify(changed, ["2:4", "channel@0.5"], (X,))
    CHANGES[change](changed)
    said = re.compile(r"was changed after sparsify\(\): .*'[\w.]+' .*call sparsify\(\) again")
    for call in CALLS.values():
        with pytest.raises(CocktailError, match=said):
            call(net, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preloaded", [False, True])
@pytest.mark.parametrize("change", ["replaced", "pruned", "parametrized", "wrapped", "removed"])
def test_a_change_while_a_subnetwork_is_active_gives_the_dense_weights_back(change, preloaded):
    changed = model()
    net = cocktail.sparsify(changed, ["2:4", "channel@0.5"], (X,))
    parameters = {n: (p, p.detach().clone()) for n, p in changed.named_parameters()}
    net.preload(*(["2:4"] if preloaded else [])).switch("2:4")
    CHANGES[change](changed)
    with pytest.raises(CocktailError, match="was changed after sparsify"):
        net.switch("dense")
    assert net.active == "dense"
    assert all(torch.equal(p, dense) for p, dense in parameters.values())


def test_what_holds_no_weights_may_come_and_go_and_a_module_may_be_replaced_by_one_with_the_same_tensors():
    changed = model()
    net = cocktail.sparsify(changed, ["2:4", "channel@0.5"], (X,))
    wanted = net.switch("2:4").state_dict()
    net.switch("dense")
    changed[2] = nn.GELU()
    changed.append(nn.Dropout())
    nn.SyncBatchNorm.convert_sync_batchnorm(changed)
    changed.register_buffer("seen", torch.zeros(1))
    net.recalibrate("2:4", [X])
    assert torch.equal(changed[1].running_mean, net.state_dict()["model.1.running_mean"])
    assert wanted.keys() < net.switch("2:4").state_dict().keys()
    assert (changed[4].weight == 0).float().mean() == 0.5
