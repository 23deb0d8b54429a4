"""States with a right checksum and another content are not taken over: the one before is, or one clear error comes."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_tiny import grouped

import cocktailsdk as cocktail
from cocktailsdk import TrainingError

warnings.filterwarnings("ignore", category=UserWarning)


def run(out, stop=False, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        net = cocktail.sparsify(model, ["2:4", "unstructured@0.5"], example_inputs=(torch.randn(2, 8),))
        data = [(torch.randn(4, 8), torch.randint(0, 8, (4,))) for _ in range(4)]
    calls = 0

    def cross_entropy(output, target):
        nonlocal calls
        calls += 1
        if stop and calls == 24:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    options = {"epochs": 2, "save_seconds": 0, "save_minutes": 1e-6, "val_loader": data} | options
    cocktail.CoTrainer(net, data, cross_entropy, out_dir=out, **grouped(options)).fit()
    return net


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The weights of a run that nobody stopped."""
    return {n: t.clone() for n, t in run(tmp_path_factory.mktemp("whole")).model.state_dict().items()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The state of one that was, by file."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        run(out, stop=True)
    return {p.name: p.read_bytes() for p in (out / "state").iterdir()}


@pytest.fixture
def out(stopped, tmp_path):
    (tmp_path / "state").mkdir()
    for name, data in stopped.items():
        (tmp_path / "state" / name).write_bytes(data)
    return tmp_path


def states(out):
    return sorted((out / "state").glob("state-*.pt"))


def content(path):
    data = path.read_bytes()
    return torch.load(io.BytesIO(data[data.index(b"\n") + 1 :]), weights_only=True)


def put(path, value):
    """A state with another content and the checksum that fits it."""
    data = value
    if not isinstance(value, bytes):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = buffer.getvalue()
    head = path.read_bytes().split(b" ")[0]
    path.write_bytes(head + b" " + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


class Marks:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def assert_goes_on_from_the_state_before(out, finished, caplog):
    newest = states(out)[-1].name
    net = run(out)
    assert f"{newest} cannot be gone on from" in caplog.text
    for name, value in net.model.state_dict().items():
        assert torch.equal(value, finished[name]), name


@pytest.mark.parametrize(
    "other",
    [
        {"a": 1},
        [1, 2],
        "text",
        3,
        None,
        {},
        {"files": {}},
        {"files": 3},
        b"",
        b"rubbish",
        pickle.dumps([1]),
        torch.zeros(3),
        "code",
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_state_of_something_else_is_passed_over(out, finished, caplog, other):
    marker = out / "marker"
    put(states(out)[-1], {"a": Marks(marker)} if other == "code" else other)
    assert_goes_on_from_the_state_before(out, finished, caplog)
    assert not marker.exists(), "its code was run"


def set_(*path, to):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = to

    return change


def old_gradients(state):
    """As states were before there were hooks."""
    del state["hooks"]
    state["gradients"] = {"x": torch.zeros(2)}


def drop(*path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def of_another_file(state):
    next(iter(state["files"].values()))["file"] = "weights-/../../../../etc/passwd.safetensors"


def wrong_moment(state):
    of = next(iter(state["optimization"]["optimizer"]["state"].values()))
    key = next(k for k, v in of.items() if isinstance(v, torch.Tensor) and v.numel() > 1)
    of[key] = torch.zeros(3)


CHANGES = {
    "no model": drop("model"),
    "no position": drop("position"),
    "no weight": drop("model", "0.weight"),
    "a weight more": set_("model", "other", to=torch.zeros(2)),
    "a weight of another shape": set_("model", "0.weight", to=torch.zeros(8, 9)),
    "a weight that would broadcast": set_("model", "0.weight", to=torch.zeros(1, 8)),
    "a weight that is a number": set_("model", "0.weight", to=3),
    "another phase": set_("position", "phase", to="x"),
    "a round beyond": set_("position", "round", to=10**6),
    "a round below": set_("position", "round", to=-1),
    "a round of text": set_("position", "round", to="1"),
    "a position more": set_("position", "more", to=1),
    "a history of text": set_("history", to="x"),
    "a history of other rounds": set_("history", "rounds", to=[{"a": 1}]),
    "a history without rounds": set_("history", "rounds", to=[]),
    "steps of text": set_("history", "steps", to="many"),
    "weights of nowhere": set_("history", "weights", to={"2:4": "nowhere"}),
    "no generators": set_("generators", to=[torch.zeros(3)]),
    "generators that are a number": set_("first_generators", to=3),
    "losses of nobody": set_("losses", to={"x": torch.zeros(2)}),
    "losses of text": set_("losses", to={"dense": "x"}),
    "judged nonsense": set_("judged", to=[[1, 2]]),
    "judged texts": set_("judged", to=[["a", "2:4", 0, "x", None]]),
    "a mask of nobody": set_("masks", to={"x/elements/0.weight": torch.zeros(8, 8, dtype=torch.bool)}),
    "a mask of another shape": set_("masks", to={"2:4/elements/0.weight": torch.zeros(8, dtype=torch.bool)}),
    "a mask of floats": set_("masks", to={"2:4/elements/0.weight": torch.zeros(8, 8)}),
    "a mask without a kind": set_("masks", to={"2:4": torch.zeros(8, 8, dtype=torch.bool)}),
    "gradients of nobody": old_gradients,
    "hooks of another recipe": set_("hooks", to=[{"x": torch.zeros(2)}]),
    "no optimizer": set_("optimization", to={"a": 1}),
    "an optimizer of text": set_("optimization", "optimizer", to="x"),
    "an optimizer without groups": set_("optimization", "optimizer", "param_groups", to=[]),
    "groups of other parameters": set_("optimization", "optimizer", "param_groups", 0, "params", to=[0, 1]),
    "moments of another parameter": set_("optimization", "optimizer", "state", 99, to={}),
    "moments of another shape": wrong_moment,
    "a schedule of something else": set_("optimization", "scheduler", to={}),
    "statistics of another shape": set_("statistics", to={"2:4": {"1.running_mean": torch.zeros(3)}}),
    "metrics of text": set_("metrics", to={"2:4": "x"}),
    "classes of something else": set_("classes", to={"a": 1}),
    "classes along no axis": set_("classes", to={"axis": 3}),
    "classes that shift by a tensor": set_("classes", to={"axis": 1, "shift": torch.zeros(0)}),
    "a generator that no path leads to": set_("generators", to={3: torch.zeros(3)}),
    "examples of text": set_("held_examples", to="x"),
    "files that are a list": set_("files", to=[]),
    "a file of text": set_("files", "x", to=3),
    "a file outside": of_another_file,
    "no masks' files": set_("files", to={}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_with_other_values_is_passed_over(out, finished, caplog, change):
    newest = states(out)[-1]
    state = content(newest)
    change(state)
    put(newest, state)
    assert_goes_on_from_the_state_before(out, finished, caplog)


def test_of_random_changes_none_ends_in_another_error(stopped, tmp_path, caplog):
    """Any place of both states becomes something else: the run goes on, or ends with a TrainingError."""
    rng = random.Random(0)
    endings = []
    for number in range(25):
        folder = tmp_path / str(number)
        (folder / "state").mkdir(parents=True)
        for name, data in stopped.items():
            (folder / "state" / name).write_bytes(data)
        for path in states(folder):
            state = content(path)
            at, key = state, rng.choice(list(state))
            while isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
                at = at[key]
                key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at[key] = copy.copy(
                rng.choice([None, 3, -1, 2.5, "x", [], {}, [1], {"a": 1}, torch.zeros(0), torch.ones(3, 2)])
            )
            put(path, state)
        try:
            run(folder)
            endings.append("done")
        except TrainingError:
            endings.append("refused")
    assert "refused" in endings


def test_where_every_state_is_of_something_else_one_error_names_them(out):
    for path in states(out):
        put(path, {"a": 1})
    with pytest.raises(TrainingError, match=r"no state in .* can be gone on from") as error:
        run(out)
    assert all(path.name in str(error.value) for path in states(out))


def test_files_of_another_model_are_passed_over(out, finished, caplog):
    """The newest state names a file of masks with the right checksum of other tensors."""
    from safetensors.torch import save

    newest = states(out)[-1]
    state = content(newest)
    name = next(n for n in state["files"] if n.startswith("masks-"))
    data = save({"2:4/elements/other": torch.zeros(3, dtype=torch.bool)})
    digest = hashlib.sha256(data).hexdigest()
    file = f"{name}-{digest[:12]}.safetensors"
    (out / "state" / file).write_bytes(data)
    state["files"][name] = {"file": file, "sha256": digest, "bytes": len(data), "needed": True}
    put(newest, state)
    assert_goes_on_from_the_state_before(out, finished, caplog)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_no_file_in_a_states_place_is_passed_over_at_once(out, finished, caplog, kind):
    newest = states(out)[-1]
    newest.unlink()
    if kind == "folder":
        newest.mkdir()
    elif kind == "device":
        newest.symlink_to("/dev/zero")
    else:
        os.mkfifo(newest)
    if kind != "folder":  # which no file can take the place of
        assert_goes_on_from_the_state_before(out, finished, caplog)
    else:
        with pytest.raises(TrainingError, match="cannot be written"):
            run(out)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifos_elsewhere_in_the_folder_are_refused_at_once(out):
    needed = next(p for p in (out / "state").glob("masks-*.safetensors"))
    for path, said in ((needed, "damaged"), (out / "state" / "configuration.json", "FIFO")):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(TrainingError, match=said):
            run(out)


def test_a_loops_state_of_something_else_is_one_clear_error():
    torch.manual_seed(0)
    net = cocktail.sparsify(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        ["2:4"],
        (torch.randn(2, 8),),
    )
    loop = cocktail.CoLoop(net, steps=8)
    good = loop.state_dict()
    for change in (
        {"masks": 3},
        {"done": "x"},
        {"done": 99},
        {"entered": None},
        {"masks": {"x": torch.ones(2)}},
        {"format": 2},
    ):
        with pytest.raises(TrainingError):
            loop.load_state_dict({**good, **change})
    with pytest.raises(TrainingError):
        loop.load_state_dict([1])
    for key in ("masks", "done", "configuration", "entered"):
        with pytest.raises(TrainingError):
            loop.load_state_dict({k: v for k, v in good.items() if k != key})
    loop.load_state_dict(good)
