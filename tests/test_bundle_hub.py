"""Bundles by name: pushed to a hub and fetched from it by its own client, and without a network from its cache."""

from __future__ import annotations

import shutil
import socket

import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin, constants
from test_bundle import assert_same, full_net
from tiny import TinyNet, tiny_net
from tiny_hub import tiny_hub

import cocktailsdk as cocktail
from cocktailsdk import BundleError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client believes in, with an empty cache."""
    with tiny_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        resolved = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolved)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        yield server


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_net_that_is_pushed_can_be_loaded_by_its_name(hub, tmp_path, monkeypatch):
    net = full_net()
    assert isinstance(net, ModelHubMixin)
    address = net.push_to_hub("somebody/tiny", model_card_kwargs={"license": "mit"})
    assert address.startswith(f"{hub.url}/somebody/tiny/commit/")
    net.save_pretrained(tmp_path / "bundle")
    files = hub.repos["somebody/tiny"]
    assert sorted(files) == ["README.md", "bundle.json", "subnets.safetensors", "weights.safetensors"]
    assert all((tmp_path / "bundle" / name).read_bytes() == data for name, data in files.items() if name != "README.md")
    loaded = cocktail.from_pretrained("somebody/tiny", TinyNet())
    assert_same(net, loaded)
    assert not any("README" in asked for asked in hub.asked if asked.startswith("GET"))
    assert_same(net, cocktail.CocktailNet.from_pretrained("somebody/tiny", TinyNet(), revision="main"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what was fetched is in the cache
    assert_same(net, cocktail.from_pretrained("somebody/tiny", TinyNet()))


def test_saving_and_pushing_in_one_call(hub, tmp_path):
    net = tiny_net(["2:4"])
    net.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="somebody/tiny", dtype="bfloat16")
    here = {f.name: f.read_bytes() for f in (tmp_path / "tiny").iterdir()}
    assert here == {name: data for name, data in hub.repos["somebody/tiny"].items() if name != "README.md"}
    with pytest.raises(BundleError, match=r"net\.provenance"):
        net.save_pretrained(tmp_path / "other", config={"a": 1})


def test_the_card_lists_the_networks_and_says_how_to_load_them(hub):
    net = tiny_net(["2:4", "channel@0.5"])
    net.metrics["2:4"] = 0.9712
    net.push_to_hub("somebody/tiny", model_card_kwargs={"license": "mit"})
    card = ModelCard(hub.repos["somebody/tiny"]["README.md"].decode())
    assert card.data.library_name == "cocktailsdk"
    assert card.data.license == "mit"
    assert "| `2:4` | 0.500 | 0.9712 |" in card.text
    assert 'from_pretrained("somebody/tiny", model)' in card.text
    assert "ranked by" not in card.text
    net.provenance["score"] = {"patterns": {"n:m": "wanda"}, "calibration": {"examples": 8, "fingerprint": "ab12"}}
    assert "Masks are ranked by wanda; calibrated on 8 examples (ab12).\n" in net.generate_model_card().text


def test_a_name_that_the_hub_does_not_have_is_said_so(hub):
    with pytest.raises(BundleError, match=r"no folder 'somebody/nothing' is here, and the Hugging Face hub has no"):
        cocktail.from_pretrained("somebody/nothing", TinyNet())
    hub.repos["somebody/other"] = {"config.json": b"{}"}
    with pytest.raises(BundleError, match="no bundle"):
        cocktail.from_pretrained("somebody/other", TinyNet())


def test_what_was_damaged_on_its_way_is_refused(hub):
    tiny_net(["2:4"]).push_to_hub("somebody/tiny")
    files = hub.repos["somebody/tiny"]
    files["weights.safetensors"] = files["weights.safetensors"][:-1] + b"x"
    with pytest.raises(BundleError, match=r"weights\.safetensors is damaged"):
        cocktail.from_pretrained("somebody/tiny", TinyNet())


def test_without_a_network_a_clear_error(offline, tmp_path, monkeypatch):
    with pytest.raises(BundleError, match=r"no folder 'some/body' is here, and no copy .* HF_HUB_OFFLINE is set"):
        cocktail.from_pretrained("some/body", TinyNet(), cache_dir=offline)
    with pytest.raises(BundleError, match=r"could not be pushed to 'some/body'.*HF_HUB_OFFLINE"):
        tiny_net(["2:4"]).push_to_hub("some/body")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(BundleError, match="local_files_only was asked for"):
        cocktail.from_pretrained("some/body", TinyNet(), cache_dir=offline, local_files_only=True)
    with socket.socket() as nobody:  # a port at which nobody listens
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(BundleError, match="cannot be reached"):
            cocktail.from_pretrained("some/body", TinyNet(), cache_dir=offline)


def test_a_copy_in_the_cache_is_enough(offline, tmp_path):
    net = tiny_net(["2:4"])
    net.save_pretrained(tmp_path / "bundle")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = offline / "models--some--body"
    shutil.copytree(tmp_path / "bundle", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    loaded = cocktail.from_pretrained("some/body", TinyNet(), cache_dir=offline)
    assert torch.equal(loaded.model.fc.weight, net.model.fc.weight)


def test_folders_come_first_and_paths_never_ask_the_hub(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_net(["2:4"]).save_pretrained("runs/tiny")
    assert cocktail.from_pretrained("runs/tiny", TinyNet()).names == ["dense", "2:4"]
    for path in (tmp_path / "no" / "where", "./no/where", "no/where/at/all", "nowhere"):
        with pytest.raises(BundleError, match="is no bundle"):
            cocktail.from_pretrained(path, TinyNet())
