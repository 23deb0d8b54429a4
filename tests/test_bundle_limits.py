"""Short files that ask for much are refused before it is made; nothing of them reaches a terminal as it is.

These take no noticeable time: what each of them asked for would take seconds or gigabytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import traceback

import pytest
import torch
from tiny import TinyNet, tiny_net
from typer.testing import CliRunner

import cocktailsdk as cocktail
from cocktailsdk import BundleError, CocktailError
from cocktailsdk.bundle.files import _to_json, read_meta
from cocktailsdk.cli.console import messages, results
from cocktailsdk.cli.main import app
from cocktailsdk.cli.options import networks
from cocktailsdk.io.values import quoted
from cocktailsdk.printable import all_printable, printable

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold red]\u2066\r"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("limits") / "bundle"
    net = tiny_net(["unstructured@0.5", "2:4", cocktail.Channel(rounds=2)])
    net.recalibrate("2:4", [torch.randn(2, 3, 6, 6)])
    net.metrics["2:4"] = 0.5
    net.save_pretrained(path)
    return {f.name: f.read_bytes() for f in path.iterdir()}


@pytest.fixture
def bundle(saved, tmp_path):
    (tmp_path / "bundle").mkdir()
    for name, data in saved.items():
        (tmp_path / "bundle" / name).write_bytes(data)
    return tmp_path / "bundle"


def rewrite(bundle, change):
    meta = json.loads((bundle / "bundle.json").read_text())
    del meta["checksum"]
    change(meta)
    (bundle / "bundle.json").write_bytes(_to_json(meta))


def with_header(bundle, name, header, body=b""):
    """Another safetensors file, with the checksums that fit it."""
    raw = json.dumps(header).encode()
    data = len(raw).to_bytes(8, "little") + raw + body
    (bundle / name).write_bytes(data)
    sums = [hashlib.sha256(data[i : i + 262144]).hexdigest() for i in range(0, len(data), 262144)]
    rewrite(bundle, lambda m: m["files"][name].update(bytes=len(data), piece=262144, sha256=sums))


def nested(depth, value=0):
    for _ in range(depth):
        value = [value]
    return value


def example(*values):
    return lambda m: m.update(example={"tuple": [{"tuple": list(values)}, {"dict": []}]})


def tensor(*shape, **more):
    return {"tensor": "float32", "shape": list(shape), **more}


def product(pairs):
    one = [{"name": "channel", "config": {"rounds": 999}}, {"name": "unstructured", "config": {"rounds": 1}}]
    return lambda m: m["patterns"].append({"name": "product", "config": {"pairs": [one] * pairs}})


def huge_dict(n):
    return {str(i): i for i in range(n)}


def more_fields(n):
    return lambda m: m["coupling"]["fields"][0].extend([m["coupling"]["fields"][0][1]] * n)


SHORT = {
    "450,000 example tensors without elements": example(*[tensor(0)] * 450_000),
    "200,000 example tuples without values": example(*[{"tuple": []}] * 200_000),
    "100,000 example texts": example(*[{"value": "a"}] * 100_000),
    "an example tensor of many dimensions": example(tensor(*[1] * 100_000)),
    "an example tensor of huge dimensions and none": example(tensor(0, 2**62, 2**62)),
    "example inputs deep in lists": lambda m: m.update(example=json.loads('{"list":[' * 300 + "]}" * 300)),
    "a product of 20,000 pairs of 999 levels": product(20_000),
    "a pattern given 5,000 times": lambda m: m["patterns"].extend(
        [{"name": "unstructured", "config": {"rounds": 1000, "rate": 0.2}}] * 5000
    ),
    "400,000 sparsities": lambda m: m["patterns"][0]["config"].update(sparsities=[i / 4e5 for i in range(400_000)]),
    "a configuration deep in lists": lambda m: m["patterns"][0].update(config={"sparsities": nested(400)}),
    "300,000 reasons": lambda m: m["coupling"]["kept"].extend([["", ""]] * 300_000),
    "200,000 empty groups": lambda m: m["coupling"]["groups"].extend(
        [f"g{i}", m["coupling"]["groups"][-1][2], m["coupling"]["groups"][-1][2], 1, [], []] for i in range(200_000)
    ),
    "a million touches": lambda m: m["coupling"]["groups"][0][5].extend([[0, [], "r"]] * 300_000),
    "one vector in 100,000 fields": lambda m: m["coupling"]["fields"][0].extend(
        [m["coupling"]["fields"][0][1]] * 100_000
    ),
    "30 times more fields": lambda m: m["coupling"]["fields"][0].extend([m["coupling"]["fields"][0][1]] * 40),
    "a field of many dimensions": lambda m: m["coupling"]["fields"][0].append([[1] * 500_000, 0]),
    "500,000 vectors": lambda m: m["coupling"]["units"].extend([[0, 0]] * 500_000),
    "300,000 unknown ops": lambda m: m["coupling"].update(unknown_ops=huge_dict(300_000)),
    "a million subnets": lambda m: m["subnets"].extend([0] * 1_000_000),
    "two million values": lambda m: m["provenance"].update(x=[0] * 2_200_000),
    "files that are deep lists": lambda m: m.update(files=nested(400)),
    "files that are a long object": lambda m: m["files"].update(huge_dict(500_000)),
    "a piece that is all of a large file": lambda m: m["files"]["weights.safetensors"].update(piece=2**40),
    "a metric that no float holds": lambda m: m["subnets"][1].update(metric=10**4000),
    "a metric that is an object": lambda m: m["subnets"][1].update(metric={}),
}


@pytest.mark.parametrize("change", SHORT.values(), ids=SHORT)
def test_short_files_that_ask_for_much_are_refused(bundle, change):
    rewrite(bundle, change)
    with pytest.raises(BundleError) as error:
        cocktail.from_pretrained(bundle, TinyNet())
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "subnets.safetensors"])
@pytest.mark.parametrize(
    "header",
    [
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(99_000)},
        {"t": {"dtype": "F32", "shape": [0, *[1] * 500_000], "data_offsets": [0, 0]}},
        {"t": {"dtype": "F32", "shape": [0, *[2**62] * 30], "data_offsets": [0, 0]}},
        {"__metadata__": huge_dict(500_000)},
        nested(500),
    ],
    ids=["empty tensors", "many dimensions", "huge dimensions and none", "metadata", "deep lists"],
)
def test_headers_that_ask_for_much_are_refused(bundle, name, header):
    with_header(bundle, name, header)
    with pytest.raises(BundleError) as error:
        cocktail.from_pretrained(bundle, TinyNet())
    assert len(str(error.value)) < 1000


def test_an_honest_example_of_empty_and_many_tensors_loads(tmp_path):
    net = tiny_net(["2:4"])
    net.example = ((torch.randn(2, 3, 6, 6), torch.zeros(0, 4), [torch.zeros(1)] * 500), {"flag": True})
    net.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", TinyNet())
    assert [t.shape for t in loaded.example[0][:2]] == [(2, 3, 6, 6), (0, 4)]
    net.example = ((torch.zeros(1), [0] * 20_000), {})
    net.save_pretrained(tmp_path / "bundle")
    assert cocktail.from_pretrained(tmp_path / "bundle", TinyNet()).example is None


def test_a_bundle_that_could_not_be_read_again_is_not_written(tmp_path):
    net = tiny_net(["2:4"])
    net.save_pretrained(tmp_path / "bundle")
    net.provenance["losses"] = [0] * 2_200_000
    with pytest.raises(BundleError, match=r"2200\d+ values; at most 1500000 are read"):
        net.save_pretrained(tmp_path / "bundle")
    cocktail.from_pretrained(tmp_path / "bundle", TinyNet())


def places(tree, path=()):
    """Every text of a JSON value, and every key that a stranger might choose."""
    if isinstance(tree, str):
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else ()):
        yield from places(value, (*path, key))


def at_places(meta):
    """One place of each kind: of a list only the first and the last."""
    seen = set()
    for path in places(meta):
        kind = tuple("*" if isinstance(key, int) else key for key in path)
        if kind not in seen and path[0] not in ("checksum", "format"):
            seen.add(kind)
            yield path


def escaped_in(text):
    return [c for c in text if not c.isprintable() and c not in "\n\t"]


def test_no_escape_of_any_text_in_a_bundle_is_printed(bundle, caplog):
    whole = (bundle / "bundle.json").read_bytes()
    meta = json.loads(whole)
    paths = list(at_places(meta))
    assert len(paths) > 20
    caplog.set_level(logging.DEBUG, logger="cocktailsdk")
    for path in paths:
        (bundle / "bundle.json").write_bytes(whole)

        def change(tree, path=path):
            for key in path[:-1]:
                tree = tree[key]
            tree[path[-1]] += ESCAPE

        rewrite(bundle, change)
        caplog.clear()
        try:
            net = cocktail.from_pretrained(bundle, TinyNet())
            shown = [
                repr(net.coupling.kept),
                *(g.name for g in net.coupling.groups),
                *(b.name for b in net.coupling.branches),
            ]
        except BundleError:
            shown = [traceback.format_exc()]
        shown += [record.getMessage() for record in caplog.records]
        for command in (["subnets", str(bundle)], ["subnets", str(bundle), "--json"]):
            done = CliRunner().invoke(app, command)
            assert done.exception is None or isinstance(done.exception, SystemExit), path
            shown.append(done.output)
        assert not escaped_in("".join(shown)), path


def test_keys_and_header_names_are_not_printed_as_they_are(bundle):
    for change in (
        lambda m: m.update({ESCAPE: 1}),
        lambda m: m["files"].update({ESCAPE: 1}),
        lambda m: m["patterns"][0]["config"].update({ESCAPE: 1}),
        lambda m: m["subnets"][1].update({ESCAPE: 1}),
        lambda m: m["masks"][0].update({ESCAPE: 1}),
        lambda m: m["coupling"].update({ESCAPE: 1}),
        lambda m: m["model"].update({ESCAPE: 1}),
    ):
        whole = (bundle / "bundle.json").read_bytes()
        rewrite(bundle, change)
        with pytest.raises(BundleError):
            cocktail.from_pretrained(bundle, TinyNet())
        try:
            cocktail.from_pretrained(bundle, TinyNet())
        except BundleError:
            shown = traceback.format_exc()
        assert not escaped_in(shown + CliRunner().invoke(app, ["subnets", str(bundle)]).output)
        (bundle / "bundle.json").write_bytes(whole)
    with_header(bundle, "weights.safetensors", {ESCAPE: {"dtype": ESCAPE, "shape": [0], "data_offsets": [0, 0]}})
    try:
        cocktail.from_pretrained(bundle, TinyNet())
    except BundleError:
        assert not escaped_in(traceback.format_exc())


def test_listing_shows_names_with_escapes_and_markup_as_text(bundle):
    rewrite(bundle, lambda m: m["subnets"][1].update(name="[bold red]2:4[/]" + ESCAPE, metric="inf"))
    done = CliRunner().invoke(app, ["subnets", str(bundle)], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert r"[bold red]2:4[/]\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold red]\u2066\r" in done.stdout
    assert read_meta(bundle)[1]["subnets"][1]["name"].endswith(ESCAPE), "data are left as they are"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["subnets"][1].update(sparsity="0.5"),
        lambda m: m["subnets"][1].update(sparsity=[]),
        lambda m: m["subnets"][1].update(pattern=[]),
        lambda m: m["subnets"][1].update(name=3),
        lambda m: m["subnets"][1].update(metric={}),
        lambda m: m["subnets"][1].pop("name"),
        lambda m: m["subnets"].append(3),
        lambda m: m.update(subnets=3),
        lambda m: m.pop("subnets"),
        lambda m: m.update(model=3),
        lambda m: m["model"].update({"class": 3}),
        lambda m: m.pop("model"),
    ],
)
def test_a_list_that_makes_no_sense_is_one_clear_error(bundle, change):
    rewrite(bundle, change)
    done = CliRunner().invoke(app, ["subnets", str(bundle)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


class Given:
    def __init__(self, bundle):
        self.params = {"bundle": str(bundle)}


def test_completion_offers_no_names_with_escapes(bundle):
    rewrite(bundle, lambda m: m["subnets"][1].update(name="2:4" + ESCAPE))
    context = Given(bundle)
    assert "dense" in networks(context, "")
    assert not escaped_in("".join(networks(context, "")))


@pytest.mark.parametrize("make", [results, messages])
def test_consoles_print_no_control_characters_and_keep_their_own(make, monkeypatch):
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = make()
    console.file = io.StringIO()
    table = Table("a" + ESCAPE)
    table.add_row(Text(ESCAPE, style="bold"))
    for what in (ESCAPE, Text(ESCAPE), table, Panel(ESCAPE)):
        console.print(what)
    printed = console.file.getvalue()
    assert "\x1b[1m" in printed, "its own styles"
    assert not any(bad in printed for bad in ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\u2066", "\x07", "\r"))


def test_errors_escape_what_a_terminal_would_obey():
    assert str(CocktailError("a\x1b[2J\nb\tc\u202e é 漢 \U0001f600")) == "a\\x1b[2J\nb\tc\\u202e é 漢 \U0001f600"
    assert cocktail.CocktailError(3).args == (3,)
    assert str(cocktail.SubnetError("no \x07")) == r"no \x07"
    assert printable("plain, überall") == "plain, überall"
    assert all_printable({"a\x1b": ["\x07", 1, None]}) == {r"a\x1b": [r"\x07", 1, None]}


def test_values_are_quoted_in_bounded_time_and_length():
    for value in ([0] * 1_000_000, nested(900), huge_dict(300_000), "x" * 1_000_000, [["y" * 1000] * 1000] * 1000):
        assert len(quoted(value)) <= 60
    assert quoted([1, "a"]) == "[1, 'a']"
