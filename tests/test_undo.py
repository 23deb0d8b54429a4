"""The user's model is what it was after every public call, attribute for attribute."""

from __future__ import annotations

import functools
import gc
import random
from array import array

import awkward_models
import numpy as np
import pytest
import torch
from awkward_models import MAKERS, Body, X
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import cocktailsdk as cocktail
from cocktailsdk.utils.undo import unchanged


def photo(model: nn.Module) -> dict[str, object]:
    """Everything that a test can see of a model and of what its hooks refer to: identities, values and order."""
    seen: dict[str, object] = {}

    def look(path: str, value: object, depth: int = 6) -> None:
        if isinstance(value, Tensor):
            data = value.detach()
            seen[path] = (id(value), type(value), str(data.dtype), data.flatten().tolist(), value.requires_grad)
            look(f"{path} attributes", tuple(vars(value).items()), depth - 1) if depth else None
        elif isinstance(value, nn.Module):
            if f"module {id(value)}" not in seen:
                seen[f"module {id(value)}"] = (type(value), list(vars(value)))
                look(f"{path} slots", tuple(getattr(value, n, None) for n in getattr(value, "__slots__", ())))
                for key, held in vars(value).items():
                    look(f"{path}.{key}", held)
        elif isinstance(value, dict):
            seen[path] = (id(value), [(repr(k), id(v)) for k, v in value.items()])
            for key, held in list(value.items()) if depth else []:
                look(f"{path}[{key!r}]", held, depth - 1)
        elif isinstance(value, tuple):  # also what is made here to be looked at
            for i, held in enumerate(value if depth else ()):
                look(f"{path}[{i}]", held, depth - 1)
        elif isinstance(value, list | set) or type(value).__name__ == "deque":
            seen[path] = (type(value), [id(v) for v in value])
            for i, held in enumerate(value if depth else []):
                look(f"{path}[{i}]", held, depth - 1)
        elif callable(value) and hasattr(value, "__closure__"):
            seen[path] = id(value)
            cells = (c.cell_contents for c in value.__closure__ or ())
            look(f"{path} closure", (*cells, value.__defaults__, *vars(value).items()), depth - 1) if depth else None
        elif isinstance(value, awkward_models.Helper):
            look(f"{path} slots", tuple(getattr(value, n, None) for n in value.__slots__), depth - 1)
        elif isinstance(value, functools.partial):
            look(f"{path} partial", (value.func, value.args, value.keywords), depth - 1)
        else:
            by_value = isinstance(value, int | float | str | torch.Size | bytearray | array)
            seen[path] = repr(value) if by_value else id(value)

    look("model", model)
    look("class", tuple((k, v) for k, v in vars(type(model)).items() if not k.startswith("__")))
    look("beside", (awkward_models.BESIDE, awkward_models.COUNT))
    return seen


def globals_now() -> list[object]:
    state = np.random.get_state()  # noqa: NPY002  # the global generator is what must not change
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        (state[1].tolist(), state[2]),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    ]


def fakes_in(model: nn.Module) -> list[object]:
    """Stand-ins that anything of the model's still refers to."""
    seen, todo, found = {id(model)}, [(model, 0)], []
    while todo:
        value, depth = todo.pop()
        if isinstance(value, FakeTensor):
            found.append(value)
        for held in gc.get_referents(value) if depth < 6 else ():
            if id(held) not in seen and not isinstance(held, type | str | type(gc)):
                seen.add(id(held))
                todo.append((held, depth + 1))
    return found


CALLS = {
    "inspect": lambda model: cocktail.inspect(model, X),
    "sparsify": lambda model: cocktail.sparsify(model, ["channel@0.5", "2:4"], X),
    "slim": lambda model: cocktail.slim(model, X),
}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "run before"])
def test_a_model_that_its_own_forward_changes_is_traced_and_left_as_it_was(make, warm):
    torch.manual_seed(0)
    model = make()
    if warm:
        model(*X)
    for name, call in CALLS.items() if not warm else [("inspect", CALLS["inspect"])]:
        before, state = photo(model), globals_now()
        found = call(model)
        assert photo(model) == before, name
        assert globals_now() == state, name
        assert not fakes_in(model), name
        if name == "inspect":
            assert {g.units for g in found.groups} == {16}, found.kept


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_calls_of_a_net_leave_its_model_as_it_was(make):
    torch.manual_seed(0)
    model = make()
    net = cocktail.sparsify(model, ["channel@0.5", "2:4"], X)
    before = photo(model)
    slim = [net.slim("channel@0.5"), net.slim("2:4"), net.views("channel")["channel@0.5"]]
    with net.using("2:4"):
        assert cocktail.verify_nm(net, 2, 4)
    net.subnets()
    assert photo(model) == before
    assert not fakes_in(model)
    for made in slim:
        assert made(*X).shape == (2, 5, 4)


@pytest.mark.parametrize("make", [awkward_models.CountsInTensors, awkward_models.MaskInDict, awkward_models.SavedMap])
def test_recalibrating_leaves_all_but_the_statistics_as_it_was(make):
    torch.manual_seed(0)
    model, seen = make(), []
    net = cocktail.sparsify(model, ["2:4"], X)
    model.b.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    before = photo(model)
    net.recalibrate("2:4", [X, X])
    assert len(seen) == 2  # what a hook collects of the user's own batches is the user's
    seen.clear()
    assert photo(model) == before


class Fails(Body):
    """Raises in its n-th call, after having changed everything that the others change."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        super().__init__()
        self.n, self.error, self.calls, self.log, self.cache = n, error, [0], [], {}
        self.register_buffer("hits", torch.zeros(2))

    def extra(self, y):
        self.calls[0] += 1
        self.log.append(y)
        self.cache[len(self.log)] = y
        self.map = y
        self.hits.add_(1)
        self.register_buffer("late", y)
        torch.rand(2)
        if self.calls[0] == self.n:
            raise self.error("injected")
        return y


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [1, 2])
def test_a_model_whose_forward_fails_is_left_as_it_was(call, error, n):
    torch.manual_seed(0)
    model = Fails(n, error)
    before, state = photo(model), globals_now()
    try:
        CALLS[call](model)
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    except cocktail.CocktailError:
        assert call in ("sparsify", "slim")  # inspect gives the reason
    assert photo(model) == before
    assert globals_now() == state
    assert not fakes_in(model)


ACTIONS = {
    "attribute": lambda m, y: setattr(m, "kept", y),
    "new module": lambda m, y: setattr(m, "late", nn.Identity()),
    "new buffer": lambda m, y: m.register_buffer("kept_buffer", y.detach()),
    "list": lambda m, y: m.things.append(y),
    "nested dict": lambda m, y: m.table["a"].update({len(m.table["a"]): y}),
    "in place": lambda m, y: m.counter.add_(1),
    "a slice in place": lambda m, y: m.big[2:4].fill_(7),
    "data": lambda m, y: setattr(m.a.weight, "data", m.a.weight.data * 2),
    "mode": lambda m, y: m.train(not m.training),
    "order": lambda m, y: m.table.update(a=m.table.pop("a")),
    "delete": lambda m, y: m.__dict__.pop("things", None),
    "array": lambda m, y: m.array.__setitem__(0, m.array[0] + 1),
    "class": lambda m, y: setattr(type(m), "shared", y),
    "hook": lambda m, y: m.o.register_forward_hook(lambda *_: None),
    "random": lambda m, y: (torch.rand(1), random.random()),
    "no longer trained": lambda m, y: m.b.weight.requires_grad_(False),
    "buffer moved": lambda m, y: m._buffers.update(counter=m.counter.clone()),
}


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=6), st.booleans())
def test_whatever_a_forward_pass_does_is_undone(actions, fails):
    class Acts(Body):
        shared = None

        def __init__(self) -> None:
            super().__init__()
            self.things, self.table, self.array = [], {"z": 1, "a": {}}, np.zeros(2)
            self.register_buffer("counter", torch.zeros(()))
            self.big = torch.zeros(8)

        def extra(self, y):
            for action in actions:
                if hasattr(self, "things") or action != "list":
                    ACTIONS[action](self, y)
            if fails:
                raise KeyboardInterrupt
            return y

    torch.manual_seed(0)
    model = Acts()
    before, state, array = photo(model), globals_now(), model.array.tolist()
    try:
        with unchanged(model):
            model(*X)
    except KeyboardInterrupt:
        assert fails
    assert photo(model) == before
    assert model.array.tolist() == array
    assert globals_now() == state


def test_caches_of_functools_hold_no_tensors_of_a_run_that_is_undone():
    @functools.cache
    def everlasting(n):
        return {"mask": torch.ones(n)}

    @functools.lru_cache(maxsize=2)
    def limited(n):
        return torch.ones(n)

    class Cached(Body):
        def extra(self, y):
            return y * everlasting(1)["mask"] * limited(1)

    with unchanged(model := Cached()):
        model(*X)
    assert everlasting.cache_info().currsize == limited.cache_info().currsize == 0
    model(*X)
    with unchanged(model):
        model(*X)
    assert everlasting.cache_info().currsize == limited.cache_info().currsize == 1  # nothing came in addition


def test_a_large_tensor_that_is_not_written_is_not_copied():
    model = Body()
    model.register_buffer("cache", torch.zeros(1 << 20))
    with unchanged(model) as before:
        model(*X)
        assert not before.writes._saved
        model.cache[3] = 1
        assert len(before.writes._saved) == 1
    assert float(model.cache.sum()) == 0


def test_functions_that_a_copy_holds_refer_to_the_copy():
    model = awkward_models.hook_of_the_model()
    slim = cocktail.slim(model, X)
    slim(*X)
    assert len(slim.features) == 1 and model.features == []
    assert slim.features[0].shape[-1] == slim.b.out_features < 16
