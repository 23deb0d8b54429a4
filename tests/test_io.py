"""Files of the project have the mode that the umask asks for; what is no file is refused without waiting."""

from __future__ import annotations

import os
import socket
import stat
import threading

import pytest
import torch
from tiny import TinyNet, tiny_net

import cocktailsdk as cocktail
from cocktailsdk import BundleError
from cocktailsdk.bundle.files import FILES, is_bundle, read_meta
from cocktailsdk.io import folders as replacing
from cocktailsdk.io import open_regular

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and FIFOs are of POSIX systems")


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def modes(folder):
    return {p.relative_to(folder).as_posix(): (p.is_dir(), stat.S_IMODE(p.stat().st_mode)) for p in folder.rglob("*")}


def assert_usual(folder, mask):
    found = modes(folder)
    assert found
    wrong = {n: oct(m) for n, (is_folder, m) in found.items() if m != (0o777 if is_folder else 0o666) & ~mask}
    assert not wrong


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027, 0o000])
def test_bundles_and_exports_have_the_mode_that_the_umask_asks_for(tmp_path, umask, mask):
    net = tiny_net()
    net.example = ((torch.randn(2, 3, 6, 6),), {})
    home = tmp_path / "home"
    for _ in range(2):  # new, and in the place of the old
        umask(mask)
        net.save_pretrained(home / "deep" / "bundle")
        net.export("2:4", home / "exports" / "one.safetensors")
        umask(0o022)
    assert_usual(home, mask)


@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize(("suffix", "needs"), [("onnx", "onnxruntime"), ("pt2", "torch"), ("xml", "openvino")])
def test_exports_of_every_format_have_the_usual_mode(tmp_path, umask, mask, suffix, needs):
    pytest.importorskip(needs)
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    net = cocktail.sparsify(model, ["2:4"], (torch.randn(1, 8),))
    umask(mask)
    net.export("2:4", tmp_path / "home" / f"one.{suffix}")
    umask(0o022)
    assert_usual(tmp_path / "home", mask)


def test_a_file_of_another_mode_gets_the_usual_one_when_it_is_replaced(tmp_path, umask):
    net = tiny_net(["2:4"])
    net.save_pretrained(tmp_path / "bundle")
    for name in FILES:
        (tmp_path / "bundle" / name).chmod(0o600)
    (tmp_path / "bundle" / "mine.txt").touch(0o640)
    net.save_pretrained(tmp_path / "bundle")
    assert {n: m for n, (_, m) in modes(tmp_path / "bundle").items()} == {
        **dict.fromkeys(FILES, 0o644),
        "mine.txt": 0o640,
    }


def test_the_umask_is_not_changed_meanwhile(tmp_path, umask):
    """Not for a moment: other threads make files too."""
    umask(0o077)
    seen, stop = set(), threading.Event()

    def others():
        n = 0
        while not stop.is_set():
            handle = os.open(tmp_path / f"other{n % 4}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
            seen.add(stat.S_IMODE(os.fstat(handle).st_mode))
            os.close(handle)
            os.unlink(tmp_path / f"other{n % 4}")
            n += 1

    thread = threading.Thread(target=others)
    thread.start()
    net = tiny_net(["2:4"])
    for _ in range(20):
        net.save_pretrained(tmp_path / "bundle")
    stop.set()
    thread.join()
    assert seen == {0o600}


def put(kind, path):
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.with_name("nowhere"))


KINDS = ("FIFO", "socket", "folder", "device", "dangling link")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_in_the_place_of_a_bundles_file_is_refused_at_once(tmp_path, name, kind):
    tiny_net(["2:4"]).save_pretrained(tmp_path / "bundle")
    put(kind, tmp_path / "bundle" / name)
    for read in (read_meta, lambda path: cocktail.from_pretrained(path, TinyNet())):
        with pytest.raises(
            BundleError, match="missing|no bundle" if kind == "dangling link" else f"a {kind}, not a file"
        ):
            read(tmp_path / "bundle")


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path, kind):
    put(kind, tmp_path / "x")
    with pytest.raises(OSError, match="not a file|No such file"):
        open_regular(tmp_path / "x")
    (tmp_path / "file").write_bytes(b"yes")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"yes"


@pytest.mark.parametrize("way", ["exchange", "two renames", "no handles of folders"])
def test_a_reader_finds_the_old_bundle_or_the_new_one_while_it_is_replaced(tmp_path, monkeypatch, way):
    """Two networks in turn, each with a metric that says which weights belong to it."""
    nets = [tiny_net(["2:4"], seed) for seed in (0, 1)]
    for i, net in enumerate(nets):
        net.metrics["2:4"] = float(i)
    folder = tmp_path / "bundle"
    nets[0].save_pretrained(folder)
    child = os.fork()
    if child == 0:
        try:
            if way != "exchange":
                replacing._exchange = lambda a, b: False
            for k in range(1, 120):
                nets[k % 2].save_pretrained(folder)
            os._exit(0)
        finally:
            os._exit(1)
    if way == "no handles of folders":
        monkeypatch.setattr(os, "supports_dir_fd", set())
    seen, model = set(), TinyNet()
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            net = cocktail.from_pretrained(folder, model)
            which = int(net.metrics["2:4"])
            assert torch.equal(net.model.fc.weight, nets[which].dense_tensor("fc.weight"))
            assert read_meta(folder)[1]["subnets"][1]["metric"] in (0.0, 1.0)
            assert is_bundle(folder)
            seen.add(which)
    except BaseException:
        os.waitpid(child, 0)
        raise
    assert seen


def test_what_is_missing_is_said_at_once_and_not_taken_for_one_that_is_replaced(tmp_path):
    with pytest.raises(BundleError, match="no bundle"):
        read_meta(tmp_path / "nowhere")
    assert not is_bundle(tmp_path / "nowhere")
    assert not is_bundle(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="no bundle"):
        read_meta(tmp_path / "file")
    assert not is_bundle(tmp_path / "file")
