"""All patterns in one net: trained, stopped and resumed, saved, listed; and bundles that break their forms."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pattern_cases import MODELS, Transformer, sparse
from test_bundle_damage import rewrite
from torch.nn import functional as F
from typer.testing import CliRunner

import cocktailsdk as cocktail
from cocktailsdk import BundleError
from cocktailsdk.cli.main import app

ALL = [
    "unstructured@0.5",
    "block2x4@0.5",
    "vector4@0.5",
    "1:2",
    "transposable2:4",
    "channel@0.25",
    "heads@0.5",
    "depth@0.1",
    "depth@0.5",
    "heads@0.25+2:4",
]


class Stop(Exception):
    """Raised in the middle of a run."""


def trained(folder, stop=None):
    net = sparse("transformer", ALL)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 5, 12, generator=generator), torch.arange(24) % 5
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]
    calls = iter(range(10**6))

    def loss(output, target):
        if next(calls) == stop:
            raise Stop
        return F.cross_entropy(output, target)

    trainer = cocktail.CoTrainer(net, batches, loss, val_loader=batches, epochs=1, out_dir=folder)
    trainer.fit()
    return net


def same(a, b):
    assert a.metrics == b.metrics
    assert a.subnets() == b.subnets()
    for name in a.names:
        with a.using(name), b.using(name):
            for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
                assert torch.equal(p, q)


def test_all_train_together_and_a_run_that_was_stopped_ends_the_same(tmp_path):
    whole = trained(tmp_path / "whole")
    assert [r.name for r in whole.subnets()] == whole.names == ["dense", *ALL]
    with pytest.raises(Stop):
        trained(tmp_path / "stopped", stop=7)
    same(trained(tmp_path / "stopped"), whole)
    whole.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", Transformer())
    same(loaded, whole)
    listed = CliRunner().invoke(app, ["subnets", str(tmp_path / "bundle")])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in ALL)


def test_a_net_is_inspected_with_all_patterns():
    found = cocktail.inspect(sparse("transformer", ALL))
    assert found.followed
    assert [s.pattern for s in found.savings] == ["unstructured", "n:m", "n:m", "n:m", "channel"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "bundle"
    sparse("transformer", ["block2x4@0.5", "transposable1:4", "depth@0.5", "heads@0.5+2:4"]).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"block": [2, 8]},
        {"block": [0, 4]},
        {"block": [2, 4, 1]},
        {"block": "24"},
        {"n": 2},
        {"m": 8},
        {"m": 17},
        {"n": 4},
        {"left": False},
        {"zeroed": "depth@0.9"},
        {"weights": ["nothing"]},
    ],
)
def test_forms_that_do_not_fit_are_refused(saved, tmp_path, change):
    bundle = shutil.copytree(saved, tmp_path / "bundle")
    key = next(iter(change))

    def broken(meta):
        next(e for e in meta["masks"] if key in e and (key != "weights" or "zeroed" in e)).update(change)

    rewrite(bundle, broken)
    with pytest.raises(BundleError):
        cocktail.from_pretrained(bundle, MODELS["transformer"][0]())


def test_bundles_from_before_branches_were_known_are_read(tmp_path):
    net = sparse("transformer", ["unstructured@0.5", "channel@0.25"])
    net.save_pretrained(tmp_path / "bundle")
    rewrite(tmp_path / "bundle", lambda meta: meta["coupling"].pop("branches"))
    assert "branches" not in json.loads((tmp_path / "bundle" / "bundle.json").read_text())["coupling"]
    assert cocktail.from_pretrained(tmp_path / "bundle", Transformer()).subnets() == net.subnets()
