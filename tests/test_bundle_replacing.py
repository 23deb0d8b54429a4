"""A bundle is replaced as a whole or not at all, wherever the process dies, and what a dead process left is removed."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from tiny import TinyNet, tiny_net

import cocktailsdk as cocktail
from cocktailsdk.bundle.files import FILES, write_folder
from cocktailsdk.io import folders as replacing

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")

NOTHING = {"model": {}, "subnets": []}


def write(folder, value):
    write_folder(folder, {**NOTHING, "value": value}, {"w": torch.full((8,), value)}, {"u": torch.full((4,), value)})


def contents(folder):
    return {f.name: f.read_bytes() for f in replacing.locate(folder).iterdir()}


def events_of_a_write(folder, value, kill_at=None):
    """Write in a child process, which kills itself at an event of Python's profiler (a call or a return).

    Returns:
        How many events there were; ``None`` where it died.
    """
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def count(*_):
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        write(folder, value)
        sys.setprofile(None)
        os.write(there, str(seen).encode())
        os._exit(0)
    os.close(there)
    _, status = os.waitpid(child, 0)
    with os.fdopen(here) as said:
        assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
        return int(said.read()) if os.WIFEXITED(status) else None


def can_exchange(folder):
    for name in ("x", "y"):
        (folder / name).mkdir()
    return replacing._exchange(folder / "x", folder / "y")


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_anywhere_there_is_the_old_bundle_or_the_new_one_and_no_rubbish(tmp_path, monkeypatch, exchange):
    if not exchange:  # as on a file system that cannot
        monkeypatch.setattr(replacing, "_exchange", lambda a, b: False)
    elif not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two folders")
    folder = tmp_path / "runs" / "bundle"
    write(folder, 1.0)
    new = {**contents(folder), "README.md": b"mine"}
    write(folder, 0.0)
    (folder / "README.md").write_text("mine")
    old = contents(folder)
    total = events_of_a_write(folder, 1.0)
    assert contents(folder) == new
    moments = sorted({*range(1, total, max(1, total // 15)), *range(total - 160, total, 4)})
    outcomes = []
    for moment in moments:
        write(folder, 0.0)
        assert os.listdir(folder.parent) == ["bundle"], moment
        assert contents(folder) == old
        assert events_of_a_write(folder, 1.0, kill_at=moment) is None
        assert contents(folder) in (old, new), moment
        assert folder.is_dir() or not exchange, "at its place at every moment"
        outcomes.append(contents(folder) == new)
    assert set(outcomes) == {True, False}
    assert outcomes == sorted(outcomes), "from some moment on it is the new one"


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    folder = tmp_path / "bundle"
    with replacing.new_folder(folder) as made:
        (made / "bundle.json").write_text("{}")
        child = os.fork()
        if child == 0:
            write(folder, 2.0)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert made.is_dir()
        (made / "more").write_text("")
    assert sorted(os.listdir(folder)) == ["bundle.json", "more", *sorted(set(FILES) - {"bundle.json"})]
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_bundle_that_lies_beside_its_place_is_found_and_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(replacing, "_exchange", lambda a, b: False)
    folder = tmp_path / "bundle"
    tiny_net(["2:4"]).save_pretrained(folder)
    folder.rename(tmp_path / ".bundle.old")  # as between two renames
    assert cocktail.from_pretrained(folder, TinyNet()).names == ["dense", "2:4"]
    tiny_net(["1:2"]).save_pretrained(folder)
    assert cocktail.from_pretrained(folder, TinyNet()).names == ["dense", "1:2"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_all_that_a_save_wrote_is_flushed_before_it_is_at_its_place(tmp_path, monkeypatch):
    flushed = []

    def noted(handle, fsync=os.fsync):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("which file a handle is of cannot be told here")
    monkeypatch.setattr(os, "fsync", noted)
    write(tmp_path / "bundle", 1.0)
    made = flushed[0].rpartition("/")[0]
    assert {*flushed[:3]} == {f"{made}/{name}" for name in FILES}
    assert flushed[3:] == [made, str(tmp_path.resolve())]


def test_links_and_folders_of_others_stay(tmp_path):
    folder = tmp_path / "bundle"
    write(folder, 0.0)
    (folder / "state").mkdir()
    (folder / "state" / "part").write_text("1")
    (folder / "link").symlink_to("state/part")
    write(folder, 1.0)
    assert (folder / "state" / "part").read_text() == "1"
    assert (folder / "link").is_symlink()
    assert (folder / "link").read_text() == "1"
    (folder / "state" / "part").write_text("2")
    assert os.listdir(tmp_path) == ["bundle"]
