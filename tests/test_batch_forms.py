"""Batches of any form: used alike by training, evaluation and recalibration, or refused in one line at the start."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.errors import CocktailError, TrainingError
from cocktailsdk.utils.nested import default_forward, nbytes, outputs_of, split, tensors_in, to_device

ALWAYS = settings(deadline=None, derandomize=True, max_examples=60)
CPU = torch.device("cpu")


@dataclass
class Named:
    image: Any
    label: Any


@dataclass(frozen=True)
class Frozen:
    image: Any
    label: Any


Fields = namedtuple("Fields", "label image")


class Moving:
    """An object of the user's own with a ``.to``, as PyTorch Geometric's."""

    def __init__(self) -> None:
        self.moved = 0

    def to(self, device: torch.device) -> Moving:
        self.moved += 1
        return self


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.bn(self.a(x))))


def small_net(model: nn.Module | None = None, inputs: int = 1) -> cocktail.CocktailNet:
    torch.manual_seed(0)
    return cocktail.sparsify(model or Small(), ["2:4"], example_inputs=(torch.randn(4, 16),) * inputs)


def pairs(n: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 16, generator=generator), torch.arange(6) % 3) for _ in range(n)]


FORMS: dict[str, Any] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "nested": lambda x, y: ((x,), y),
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "numpy, read-only and backwards": lambda x, y: (np.flip(np.flip(x.numpy(), 0), 0), y.numpy()),
    "image and label": lambda x, y: {"image": x, "label": y},
    "with a path": lambda x, y: {"image": x, "label": y, "path": ["a.png"] * 6},
    "by the argument's name": lambda x, y: {"x": x, "labels": y},
    "mapping and target": lambda x, y: ({"x": x}, y),
    "mapping of another name and target": lambda x, y: ({"pixels": x}, y),
    "UserDict": lambda x, y: UserDict(image=x, target=y),
    "OrderedDict": lambda x, y: OrderedDict(image=x, y=y),
    "MappingProxyType": lambda x, y: MappingProxyType({"image": x, "targets": y}),
    "dataclass": Named,
    "frozen dataclass": Frozen,
    "named tuple with the label first": lambda x, y: Fields(label=y, image=x),
    "dict of numpy": lambda x, y: {"image": x.numpy(), "label": y.numpy()},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_any_usual_form_means_the_same_everywhere(form: str) -> None:
    plain, formed = pairs(), [FORMS[form](x, y) for x, y in pairs()]
    results = []
    for data in (plain, formed):
        net = small_net()
        trainer = cocktail.CoTrainer(
            net, data, F.cross_entropy, val_loader=data, epochs=1, rounds=cocktail.RoundSettings(count=1)
        )
        trainer.fit()
        net.recalibrate("2:4", data)
        tuned = cocktail.training.finetune(net, "2:4", data, F.cross_entropy, epochs=1, val_loader=data)
        measured = torch.tensor(list(trainer.evaluate(data).values()))
        states = (net.state_dict(), net.statistics["2:4"], tuned.state_dict(), {"measured": measured})
        results.append([tensor for state in states for tensor in state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"image": torch.zeros(4, 16), "mask": torch.zeros(4, 16), "label": torch.zeros(4)}, "forward_fn=lambda"),
        ((torch.zeros(4, 16), torch.zeros(4), torch.zeros(4)), "forward_fn"),
        (torch.zeros(4, 16, dtype=torch.float64).numpy(), "float64"),
        ((["a", "b"], torch.zeros(2)), "forward_fn"),
        (("a", "b"), "forward_fn"),
        (Moving(), "forward_fn"),
        ((torch.zeros(4, 7), torch.zeros(4)), "forward_fn"),
        (7, "forward_fn"),
        ({}, "forward_fn"),
        (None, "train_loader|batches"),
    ],
)
def test_other_batches_are_refused_in_one_line_before_anything_is_trained(batch: Any, named: str) -> None:
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(TrainingError, match=named) as caught:
        cocktail.CoTrainer(
            net, [batch] * 2, F.cross_entropy, rounds=cocktail.RoundSettings(merge=False, count=1), epochs=1
        ).fit()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_loss_that_does_not_fit_is_named_with_what_it_was_given() -> None:
    with pytest.raises(
        TrainingError, match=r"loss_fn\(output, target\) raised .* a tensor \(6, 3\) of float32"
    ) as caught:
        cocktail.CoTrainer(
            small_net(), [(pairs()[0][0], None)], F.cross_entropy, rounds=cocktail.RoundSettings(merge=False), epochs=1
        ).fit()
    assert "\n" not in str(caught.value)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(a + b) * scale


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: ((x, x), y),
        lambda x, y: ([x, x], y),
        lambda x, y: ({"a": x, "b": x}, y),
        lambda x, y: {"a": x, "b": x, "target": y},
        lambda x, y: {"a": x, "b": x, "scale": 1.0, "label": y},
        lambda x, y: ((x.numpy(), x.numpy()), y.numpy()),
    ],
)
def test_models_of_two_inputs_train_and_recalibrate_alike(form: Any) -> None:
    data = [form(x, y) for x, y in pairs()]
    net = small_net(Two(), 2)
    cocktail.CoTrainer(
        net, data, F.cross_entropy, val_loader=data, epochs=1, rounds=cocktail.RoundSettings(count=1)
    ).fit()
    own = {name: value.clone() for name, value in net.statistics["2:4"].items()}
    net.recalibrate("2:4", [(x, x) for x, _ in pairs()], lambda model, batch: model(*batch))
    expected = {name: value.clone() for name, value in net.statistics["2:4"].items()}
    net.recalibrate("2:4", data)
    assert own.keys() == expected.keys()
    assert all(torch.equal(net.statistics["2:4"][name], value) for name, value in expected.items())


def test_longer_tuples_recalibrate_by_their_first_element() -> None:
    net, data = small_net(), pairs()
    net.recalibrate("2:4", [x for x, _ in data])
    expected = {name: value.clone() for name, value in net.statistics["2:4"].items()}
    net.recalibrate("2:4", [(x, y, ["a.png"]) for x, y in data])
    assert all(torch.equal(net.statistics["2:4"][name], value) for name, value in expected.items())


class Own(nn.Module):
    """A model that computes its own loss where it is given labels, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **others: Any) -> dict[str, Tensor]:
        logits = self.inner(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("key", ["labels", "label"])
def test_a_model_that_names_labels_is_given_them(key: str) -> None:
    data = [{"pixel_values": x, key: y} for x, y in pairs()]
    net = small_net(Own())
    cocktail.CoTrainer(net, data, val_loader=data, epochs=1, rounds=cocktail.RoundSettings(count=1)).fit()
    assert 0 <= net.metrics["2:4"] <= 1


def test_a_second_input_named_y_is_no_target() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    batch = {"x": torch.ones(2), "y": torch.ones(2)}
    assert split(Both(), batch) == ((), batch, None)


leaves = st.one_of(
    st.integers(0, 3).map(lambda n: torch.ones(n + 1, 2)),
    st.integers(0, 3).map(lambda n: np.ones((n + 1, 2), np.float32)),
    st.sampled_from(["a", b"b", 3, 1.5, None, True]),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["image", "label", "x", "meta"]), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(UserDict),
        st.tuples(inner, inner).map(lambda pair: Named(*pair)),
        st.tuples(inner, inner).map(lambda pair: Frozen(*pair)),
        st.tuples(inner, inner).map(lambda pair: Fields(*pair)),
    ),
    max_leaves=8,
)


def count(tree: Any) -> int:
    """Tensors and arrays in a batch, found naively."""
    if isinstance(tree, Tensor | np.ndarray):
        return 1
    if isinstance(tree, dict | UserDict):
        return sum(count(v) for v in tree.values())
    if isinstance(tree, Named | Frozen):
        return count(tree.image) + count(tree.label)
    return sum(map(count, tree)) if isinstance(tree, list | tuple) else 0


@ALWAYS
@given(trees)
def test_moving_keeps_any_nested_batch_and_makes_its_arrays_tensors(tree: Any) -> None:
    size = nbytes(tree)
    moved = to_device(tree, torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in tensors_in(moved))
    assert len(tensors_in(moved)) == count(tree) == len(tensors_in(to_device(tree, CPU)))
    assert nbytes(moved) == size
    assert type(moved) is (
        dict if isinstance(tree, UserDict) else Tensor if isinstance(tree, np.ndarray) else type(tree)
    )


@ALWAYS
@given(trees)
def test_any_batch_is_run_or_refused_and_never_changed(tree: Any) -> None:
    model, form = Small(), repr(tree)
    for run in (default_forward, outputs_of):
        # what the model itself raises, the first look puts in one line
        with contextlib.suppress(CocktailError, TypeError, RuntimeError, AttributeError, ValueError):
            run(model, tree)
    assert repr(tree) == form


def test_objects_with_a_method_to_are_moved_by_it_and_classes_are_not() -> None:
    thing = Moving()
    assert to_device([thing, Moving], CPU) == [thing, Moving]
    assert thing.moved == 1


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "mirrored": np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::-1],
    "every other row": np.arange(48, dtype=np.float32).reshape(8, 6)[::2],
    "transposed": np.arange(24, dtype=np.float32).reshape(6, 4).T,
    "in Fortran's order": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(4, 6)),
    "in foreign byte order": np.arange(24, dtype=">f4").reshape(4, 6),
    "read-only": np.broadcast_to(np.float32(3), (4, 6)),
    "of no dimension": np.array(3.0, dtype=np.float32),
    "without elements": np.zeros((0, 6), np.float32),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_in_any_layout_become_tensors(array: np.ndarray[Any, Any]) -> None:
    tensor = to_device(array, CPU)
    assert tensor.shape == array.shape and tensor.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("batch", "typed"),
    [
        ({"x": torch.ones(2, 4), "idx": torch.ones(2), "label": torch.ones(2)}, "model(x=batch['x']), batch['label'])"),
        ({"idx": torch.ones(2), "jpg": torch.ones(2, 4), "cls": torch.ones(2)}, "model(batch['jpg']), None)"),
        (({"mask": torch.ones(2), "image": torch.ones(2, 4)}, torch.ones(2)), "model(batch[0]['image']), batch[1])"),
    ],
)
def test_the_function_that_is_proposed_uses_the_batch_as_it_is(batch: Any, typed: str) -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(CocktailError) as error:
        split(One(), batch)
    assert typed in str(error.value)


@pytest.mark.parametrize("batch", [np.ones((4, 16)), ([[1.0] * 16] * 2, [1, 2]), torch.ones(4, 16, dtype=torch.long)])
def test_recalibration_names_a_batch_that_the_model_does_not_take(batch: Any) -> None:
    net = cocktail.sparsify(Small(), ["2:4"], (torch.randn(4, 16),))
    with pytest.raises(CocktailError, match="on the first batch, which is ") as error:
        net.recalibrate("dense", [batch])
    assert "\n" not in str(error.value) and not net.statistics
