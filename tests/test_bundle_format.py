"""The written format is enough: a reader made from docs/bundle-format.md alone finds the same networks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pattern_cases import sparse

import cocktailsdk as cocktail

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def as_numpy(t):
    return t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy()


@pytest.mark.parametrize(
    ("name", "patterns", "options"),
    [
        ("convolutions", [cocktail.Unstructured(rounds=3), "1:2", "2:4", "4:8", cocktail.Channel(rounds=3)], {}),
        ("convolutions", ["block2x3@0.5", "transposable2:4", "depth@0.5", "channel@0.5+2:4"], {}),
        ("convolutions", ["channel@0.4+block2x2@0.5", "channel@0.5"], {"dtype": "float16"}),
        ("transformer", ["heads@0.5+2:4", "depth@0.5", "vector4@0.5", "unstructured@0.5"], {"dtype": "bfloat16"}),
    ],
)
def test_another_reader_finds_the_same_networks(tmp_path, name, patterns, options):
    from read_bundle import Bundle

    net = sparse(name, patterns)
    shape = net.example[0][0].shape
    for subnet in net.names[1::2]:  # every other subnet has statistics of its own
        net.recalibrate(subnet, [torch.randn(shape)])
    net.save_pretrained(tmp_path / "bundle", **options)
    loaded = cocktail.from_pretrained(tmp_path / "bundle", type(net.model)())
    found = Bundle(tmp_path / "bundle")
    assert found.names == net.names
    for subnet in net.names:
        loaded.switch(subnet)
        state, tensors = loaded.model.state_dict(), found.subnet(subnet)
        assert state.keys() == tensors.keys()
        for key, value in state.items():
            np.testing.assert_array_equal(as_numpy(value), tensors[key], f"{key} of {subnet}")


def test_the_other_reader_needs_nothing_of_this_package(tmp_path):
    sparse("convolutions", ["2:4"]).save_pretrained(tmp_path / "bundle")
    program = (
        "import sys; import read_bundle; read_bundle.main(); assert not {'torch', 'cocktailsdk'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "bundle"), "2:4"]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "block2.conv1.weight" in done.stdout
    assert "96 of 192 are zero" in done.stdout
