"""Bundles, run states and a loop's state that were written before masks had one encoder load bit for bit."""

from __future__ import annotations

import io
import shutil

import old_formats
import pytest
import torch
from old_formats import DATA, RUNS, contents, loop_of, net_of, stop_at, trainer_of
from safetensors.torch import load_file

import cocktailsdk as cocktail
from cocktailsdk.training.state.encoding import written_before


def assert_same(found, file, made=None):
    """What :func:`contents` found is what the file has; of masks only those made, where these are given."""
    expected = load_file(file)
    if made is not None:
        assert made
        found, expected = (
            {key: t for key, t in tensors.items() if key.startswith("weights/") or key.split("/")[1] in made}
            for tensors in (found, expected)
        )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", old_formats.PATTERNS)
def test_a_bundle_of_before_loads_bit_for_bit_and_is_saved_with_the_same_bytes(name, tmp_path):
    folder = DATA / f"{name}-bundle"
    net = cocktail.from_pretrained(folder, net_of(name).model)
    assert_same(contents(net), folder / "expected.safetensors")
    net.save_pretrained(tmp_path)
    for file in ("subnets.safetensors", "weights.safetensors"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize(("run", "begins"), [("default-run", "RoundStarted 4"), ("paper-run", "MergeStarted ")])
def test_a_run_of_before_resumes_bit_for_bit_and_is_saved_in_the_new_form(run, begins, tmp_path):
    assert run in RUNS
    shutil.copytree(DATA / run / "state", tmp_path / "state")
    old = newest(tmp_path)
    trainer = trainer_of(run, tmp_path, stop_at(begins))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    made = {name for row in trainer.history.rounds for name in row.networks}
    assert_same(contents(trainer.net), DATA / run / "expected.safetensors", made)
    assert newest(tmp_path) != old
    masks = [entry["file"] for name, entry in content(newest(tmp_path))["files"].items() if name.startswith("masks-")]
    assert masks and not any(written_before(load_file(tmp_path / "state" / file)) for file in masks)

    again = trainer_of(run, tmp_path, stop_at(begins))
    with pytest.raises(KeyboardInterrupt):
        again.fit()
    assert_same(contents(again.net), DATA / run / "expected.safetensors", made)
    net = trainer_of(run, tmp_path, stop_at("never")).fit()
    assert net.metrics.keys() == set(net.names)


def newest(out):
    return max((out / "state").glob("state-*.pt"))


def content(path):
    data = path.read_bytes()
    return torch.load(io.BytesIO(data[data.index(b"\n") + 1 :]), weights_only=True)


def test_a_loops_state_of_before_loads_bit_for_bit_and_is_given_in_the_new_form():
    state = torch.load(DATA / "loop.pt", weights_only=True)
    made = {key.split("/")[0] for key in state["masks"]}
    for _ in range(2):
        net = net_of("convolutions")
        loop = loop_of(net)
        loop.load_state_dict(state)
        found = {key: tensor for key, tensor in contents(net).items() if key.startswith("masks/")}
        assert_same(found | weights_of(DATA / "loop.safetensors"), DATA / "loop.safetensors", made)
        state = loop.state_dict()
        assert not written_before(state["masks"])


def weights_of(file):
    return {key: tensor for key, tensor in load_file(file).items() if key.startswith("weights/")}
