"""Ignored labels: no errors of a metric, no part of a soft loss; read from the loss, or seen from what it computes."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.errors import TrainingError
from cocktailsdk.training.metrics import accuracy, accuracy_of
from cocktailsdk.training.step.distill import Classes, counted, find_classes, ignored_by, soft_cross_entropy

ALWAYS = settings(deadline=None, derandomize=True, max_examples=60)


class Inside(nn.Module):
    """A loss around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, 1.0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.weight * self.inner(output, target)


def own_loss(output: Tensor, target: Tensor, ignore_index: int = 3) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=ignore_index)


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (nn.CrossEntropyLoss(), -100),
        (nn.CrossEntropyLoss(ignore_index=255), 255),
        (nn.NLLLoss(ignore_index=0), 0),
        (F.cross_entropy, -100),
        (F.nll_loss, -100),
        (functools.partial(F.cross_entropy, ignore_index=7), 7),
        (functools.partial(functools.partial(F.nll_loss, ignore_index=7), reduction="mean"), 7),
        (functools.partial(nn.CrossEntropyLoss(ignore_index=2)), 2),
        (nn.CrossEntropyLoss(ignore_index=2).forward, 2),
        (Inside(nn.CrossEntropyLoss(ignore_index=2)), 2),
        (own_loss, 3),
        (nn.ModuleList([nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(ignore_index=2)]), None),
        (lambda o, t: F.cross_entropy(o, t, ignore_index=9), None),
        (nn.MSELoss(), None),
        (None, None),
        (print, None),
    ],
)
def test_the_ignored_label_is_read_from_the_loss(loss_fn: Any, expected: int | None) -> None:
    assert ignored_by(loss_fn) == expected


FORMS = {
    "(N, C)": lambda x: x,
    "(N, C, L)": lambda x: x,
    "(N, C, H, W)": lambda x: x,
    "(N, L, C)": lambda x: x.movedim(1, -1),
}
SHAPES = {"(N, C)": (12, 5), "(N, C, L)": (4, 5, 6), "(N, C, H, W)": (3, 5, 4, 2), "(N, L, C)": (4, 5, 6)}


@ALWAYS
@given(
    st.sampled_from(list(SHAPES)),
    st.sampled_from([-100, -1, 255, 2, 0]),
    st.sampled_from(["module", "partial", "lambda", "wrapped"]),
    st.floats(0.1, 0.7),
    st.integers(0, 10**6),
)
def test_what_counts_is_what_a_naive_count_says(form: str, ignored: int, how: str, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPES[form], generator=generator)  # classes along axis 1
    target = torch.randint(0, 5, (logits.shape[0], *logits.shape[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < share] = ignored
    target.view(-1)[:2] = torch.tensor([1, 3])  # some always count
    output = FORMS[form](logits)
    axis = -1 if form == "(N, L, C)" else 1

    def plain(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o.movedim(axis, 1), t, ignore_index=ignored)

    loss_fn: Any = {
        "module": nn.CrossEntropyLoss(ignore_index=ignored),
        "partial": functools.partial(F.cross_entropy, ignore_index=ignored),
        "lambda": plain,
        "wrapped": Inside(nn.CrossEntropyLoss(ignore_index=ignored)),
    }[how if axis == 1 else "lambda"]
    classes = find_classes(output, target, loss_fn(output, target), loss_fn)
    assert classes is not None and classes.axis == axis and not classes.shift
    kept = [
        (row, int(label))
        for row, label in zip(logits.movedim(1, -1).reshape(-1, 5), target.reshape(-1), strict=True)
        if int(label) != ignored
    ]
    assert int(classes.counted(target).sum()) == len(kept)
    if axis == 1:
        scores = accuracy_of(classes)(output, target)
        hits = [int(row.argmax()) == label for row, label in kept]
        assert scores.numel() == len(hits) and int(scores.sum()) == sum(hits)
    teacher = torch.randn(logits.shape, generator=generator)
    soft = [
        -(t.softmax(-1) * row.log_softmax(-1)).sum()
        for t, (row, label) in zip(teacher.movedim(1, -1).reshape(-1, 5), all_rows(logits, target), strict=True)
        if label != ignored
    ]
    torch.testing.assert_close(
        soft_cross_entropy(output, FORMS[form](teacher), target, classes), torch.stack(soft).mean()
    )


def all_rows(logits: Tensor, target: Tensor) -> list[tuple[Tensor, int]]:
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return [(row, int(label)) for row, label in zip(rows, target.reshape(-1), strict=True)]


@pytest.mark.parametrize("ignored", [-100, 0])
def test_language_models_that_shift_by_themselves_count_the_next_tokens(ignored: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 9), torch.randint(1, 9, (3, 7))
    labels[:, 4:] = ignored
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1), ignore_index=ignored)
    classes = find_classes({"logits": logits}, labels, loss)
    assert classes == Classes(-1, shift=True)
    assert int(classes.counted(labels[:, 1:]).sum()) == 9


def test_ignored_positions_that_are_no_number_leave_the_soft_loss_finite() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    target = torch.tensor([0, 1, -100, 2])
    expected = soft_cross_entropy(student[target >= 0], teacher[target >= 0], target[target >= 0], Classes(1))
    teacher[2] = math.nan
    torch.testing.assert_close(soft_cross_entropy(student, teacher, target, Classes(1)), expected)


def test_labels_in_eight_bits_count_as_others_do() -> None:
    labels = torch.tensor([0, 156, 255, 2], dtype=torch.uint8)
    assert counted(labels, 256, -100).tolist() == [True] * 4
    assert counted(labels, 3, None).tolist() == [True, False, False, True]


def test_a_loss_that_is_no_plain_cross_entropy_ignores_no_class() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(40, 4), torch.arange(40) % 4

    def smooth(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=0.1)

    found = find_classes(logits, target, smooth(logits, target), smooth)
    assert found is not None and found.ignored is None


class Pixels(nn.Module):
    """The classes are the input's channels, so that it is always right; some weights to prune beside."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv1d(4, 16, 1), nn.Conv1d(16, 16, 1), nn.Conv1d(16, 4, 1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out = self.o(torch.relu(self.b(torch.relu(self.a(x))))) * 0 + x * 10
        return out.movedim(1, -1) if self.last else out


def pixels(ignored: int, n: int = 3, whole: int | None = None) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for i in range(n):
        y = torch.randint(1, 4, (4, 6), generator=generator)
        x = F.one_hot(y, 4).movedim(-1, 1).float()
        y[:, : 6 if i == whole else 3] = ignored
        out.append((x, y))
    return out


def pixels_net(last: bool = False) -> cocktail.CocktailNet:
    torch.manual_seed(0)
    patterns = ["2:4", cocktail.Unstructured(sparsities=[0.3, 0.5])]
    return cocktail.sparsify(Pixels(last), patterns, (torch.rand(4, 4, 6),))


@pytest.mark.parametrize("recipe", ["cocktail", "paper"])
@pytest.mark.parametrize(
    ("loss_fn", "ignored"),
    [
        (nn.CrossEntropyLoss(), -100),
        (nn.CrossEntropyLoss(ignore_index=255), 255),
        (functools.partial(F.cross_entropy, ignore_index=0), 0),
        (lambda o, t: F.cross_entropy(o, t, ignore_index=0), 0),
        (lambda o, t: F.cross_entropy(o, t, ignore_index=255), 255),
        (lambda o, t: F.nll_loss(o.log_softmax(1), t, ignore_index=-1), -1),
    ],
)
def test_a_net_that_is_right_wherever_it_counts_has_accuracy_one(loss_fn: Any, ignored: int, recipe: str) -> None:
    net, held = pixels_net(), pixels(ignored, whole=1)  # one batch is ignored whole
    cocktail.CoTrainer(
        net,
        pixels(ignored),
        loss_fn,
        val_loader=held,
        epochs=1,
        rounds=cocktail.RoundSettings(count=2, alphas=(1, 0.5)),
        recipe=recipe,
    ).fit()
    assert net.metrics == dict.fromkeys(net.names, 1.0)


def test_where_the_loss_is_the_metric_each_label_weighs_the_same() -> None:
    net, held = pixels_net(last=True), pixels(-100, whole=1)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.movedim(-1, 1), target)

    trainer = cocktail.CoTrainer(
        net, pixels(-100), loss_fn, val_loader=held, epochs=1, rounds=cocktail.RoundSettings(count=1)
    )
    trainer.fit()
    with torch.no_grad():
        rows = torch.cat([net.model(x).flatten(0, 1) for x, _ in held])
    expected = -float(F.cross_entropy(rows, torch.cat([y.flatten() for _, y in held])))
    assert net.metrics["dense"] == pytest.approx(expected, rel=1e-4)


def test_the_loop_ignores_the_same_labels() -> None:
    net, data = pixels_net(), pixels(-100)
    loop = cocktail.CoLoop(net, steps=8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1)
    for x, y in loop.batches(data):
        with loop.step((x, y)) as step:
            output = net.model(x)
            optimizer.zero_grad()
            step.loss(F.cross_entropy(output, y), output, y).backward()
        optimizer.step()
    assert loop.finish(data, data).metrics == dict.fromkeys(net.names, 1.0)


def test_held_out_data_of_which_every_label_is_ignored_is_refused_at_the_start() -> None:
    net, data = pixels_net(), pixels(-100)
    nothing = [(x, torch.full_like(y, -100)) for x, y in data]
    with pytest.raises(TrainingError, match=r"no label of the 3 batches of val_loader counts"):
        cocktail.CoTrainer(
            net, data, nn.CrossEntropyLoss(), val_loader=nothing, epochs=1, rounds=cocktail.RoundSettings(count=1)
        ).fit()


def test_a_first_batch_without_labels_does_not_hide_a_classification() -> None:
    data = pixels(-100)
    first = [(data[0][0], torch.full_like(data[0][1], -100)), *data]
    net = pixels_net(last=True)
    trainer = cocktail.CoTrainer(
        net,
        first,
        lambda o, t: F.cross_entropy(o.movedim(-1, 1), t),
        epochs=1,
        rounds=cocktail.RoundSettings(count=1, merge=False),
        execution=cocktail.ExecutionSettings(on_nan="skip"),
    )
    trainer.fit()
    assert trainer.history.skipped


def test_accuracy_leaves_out_what_no_class_can_be() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]]
    assert accuracy(logits, torch.tensor([0, 1, 0, 0])).tolist() == [True, True, False, True]
    assert accuracy(logits, torch.tensor([0, -100, 0, 9])).tolist() == [True, False]
