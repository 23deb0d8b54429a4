"""The fuzz of bundles finds nothing in its first cases, goes on where it stopped, and would notice."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

import cocktailsdk as cocktail

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sound(tmp_path):
    """A bundle that nobody has mutated, and the net in it."""
    import bundle_fuzz

    (tmp_path / "bundle").mkdir()
    for name, data in bundle_fuzz.seeds()[0].items():
        (tmp_path / "bundle" / name).write_bytes(data)
    return tmp_path / "bundle", cocktail.from_pretrained(tmp_path / "bundle", bundle_fuzz.small(7))


@pytest.mark.slow
def test_no_mutated_bundle_is_taken_for_what_it_is_not(tmp_path, capsys):
    import bundle_fuzz

    results = bundle_fuzz.run(200, tmp_path / "kept.jsonl")
    assert results["failures"] == []
    assert results["cases"] == 200
    assert results["counts"]["refused, mended"] > 50
    assert results["counts"]["refused, not mended"] > 5
    assert results["counts"]["accepted, as its files say"] > 5
    capsys.readouterr()
    assert bundle_fuzz.run(200, tmp_path / "kept.jsonl")["counts"] == results["counts"]
    assert capsys.readouterr().out == "", "nothing is done twice"


def test_a_net_that_is_not_what_its_files_say_is_noticed(sound):
    import bundle_fuzz

    folder, net = sound
    bundle_fuzz.examine(net, folder, 0)
    net.metrics["2:4"] = 0.1
    with pytest.raises(bundle_fuzz.Wrong, match="other metrics"):
        bundle_fuzz.examine(net, folder, 0)


def test_another_mask_and_other_weights_are_noticed(sound):
    import bundle_fuzz

    folder, net = sound
    number = next(n for n in range(100) if "2:4" in random.Random(n).sample(net.names, 2))
    mask, metrics, statistics = net.masks["2:4"], dict(net.metrics), dict(net.statistics)
    net.set_mask("2:4", net.masks["1:2"])
    net.metrics.update(metrics)
    net.statistics.update(statistics)
    with pytest.raises(bundle_fuzz.Wrong, match="accepted with another"):
        bundle_fuzz.examine(net, folder, number)
    net.switch("dense").set_mask("2:4", mask)
    net.metrics.update(metrics)
    net.statistics.update(statistics)
    bundle_fuzz.examine(net, folder, number)
    with torch.no_grad():
        net.switch("dense").model.fc.bias[0] += 1
    with pytest.raises(bundle_fuzz.Wrong, match=r"accepted with another fc\.bias"):
        bundle_fuzz.examine(net, folder, number)


def test_a_case_that_kills_its_process_is_a_failure_and_the_others_go_on(tmp_path, monkeypatch):
    import bundle_fuzz

    def case(number, folder):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return "refused, mended"

    monkeypatch.setattr(bundle_fuzz, "case", case)
    found = bundle_fuzz.chunk(0, 8, tmp_path)
    assert found["counts"] == {"refused, mended": 7, "failed": 1}
    assert [f[0] for f in found["failures"]] == [3]
