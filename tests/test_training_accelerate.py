"""Accumulation, clipping and mixed precision, in one process: against loops written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_program import PlainNet, plain_net, plain_trainer, uneven
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from training_tiny import assert_identical, result, tiny_images, tiny_net, tiny_trainer, to_float

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training import events as ev

SIZES = (8, 8, 8, 5)  # with two batches a step, the last step has 13 examples


def batches() -> list[tuple[Tensor, Tensor]]:
    data = tiny_images(sum(SIZES))
    return list(zip(to_float(data.images).split(SIZES), data.labels.split(SIZES), strict=True))


def constant(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def one_round(**options: Any) -> cocktail.CoTrainer:
    """One round from given weights: dense, sparse, dense, sparse steps."""
    net = cocktail.sparsify(
        plain_net().model, cocktail.Unstructured(sparsities=[0.5]), example_inputs=(torch.zeros(1, 1, 8, 8),)
    )
    settings: dict[str, Any] = {"recipe": "paper", "start": "pretrained", "merge": False, "schedule": constant}
    settings |= {"train_loader": batches(), "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}
    return tiny_trainer(net, **{**settings, "rewind_epoch": None, **options})


def by_hand(epochs: int, accumulate: int, clip_norm: float | None) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The same in a loop without anything of the trainer's: masked weights are products, gradients go through them."""
    model: PlainNet = plain_net().model
    masked = {name: p.detach() for name, p in model.named_parameters()}["conv2.weight"].abs()
    mask = (masked > masked.flatten().kthvalue(masked.numel() // 2).values).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = batches()
    steps = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    losses: list[dict[str, float]] = []
    done = 0
    for _ in range(epochs):
        sums: dict[str, list[float]] = {}
        for group in steps:
            optimizer.zero_grad()
            examples, mean = sum(len(y) for _, y in group), 0.0
            for x, y in group:
                if done % 2 == 0:
                    loss = F.cross_entropy(model(x), y)
                else:
                    with torch.no_grad():
                        teacher = model(x).softmax(1)
                    weights = {n: p * mask if n == "conv2.weight" else p for n, p in model.named_parameters()}
                    output = functional_call(model, weights, (x,))
                    loss = 0.5 * F.cross_entropy(output, y) + 0.5 * F.cross_entropy(output, teacher)
                (loss * (len(y) / examples)).backward()
                mean += float(loss.detach()) * len(y) / examples
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            sums.setdefault("unstructured@0.5" if done % 2 else "dense", []).append(mean)
            done += 1
        losses.append({name: sum(values) / len(values) for name, values in sums.items()})
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize(("accumulate", "clip_norm"), [(2, None), (3, 0.05), (4, None)])
def test_accumulation_and_clipping_are_those_of_a_loop_by_hand(accumulate: int, clip_norm: float | None) -> None:
    trainer = one_round(epochs=3, accumulate=accumulate, clip_norm=clip_norm)
    net = trainer.fit()
    weights, losses = by_hand(3, accumulate, clip_norm)
    for found, expected in zip(trainer.history.rounds[0].losses, losses, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    for name, weight in weights.items():
        assert torch.allclose(net.model.get_parameter(name), weight, atol=1e-5), name
    assert trainer.history.steps == 3 * -(-len(SIZES) // accumulate)


def test_the_same_batch_pivot_accumulates_on_the_same_batches() -> None:
    seen: list[int] = []

    def forward_fn(model: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if model.training:
            seen.append(batch[0].data_ptr())
        return model(batch[0]), batch[1]

    data = batches()
    one_round(recipe="paper-finishing", train_loader=data, epochs=2, accumulate=2, forward_fn=forward_fn).fit()
    first, second = data[0][0].data_ptr(), data[1][0].data_ptr()
    # the first look, then a dense step on two batches, and the sparse step on the same
    assert seen[:5] == [first, first, second, first, second]


def test_one_batch_a_step_changes_no_bit() -> None:
    plain, asked = tiny_trainer(), tiny_trainer(accumulate=1, mixed_precision=None, clip_norm=None)
    assert plain.fingerprint == asked.fingerprint
    plain.fit(), asked.fit()
    assert_identical(result(asked), result(plain))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_goes_on_identically(precision: Any, tmp_path: Path) -> None:
    options = {"mixed_precision": precision, "accumulate": 2, "clip_norm": 1.0, "alphas": (1.0, 0.5)}
    whole = tiny_trainer(**options)
    whole.fit()
    full = tiny_trainer(accumulate=2, clip_norm=1.0, alphas=(1.0, 0.5))
    full.fit()
    first, single = whole.history.rounds[0].losses[0], full.history.rounds[0].losses[0]
    assert first == pytest.approx(single, rel=0.05)
    if precision == "bf16":  # not every CPU computes in fp16
        assert first != single
    left = [7]

    def stop(event: ev.Event) -> None:
        left[0] -= isinstance(event, ev.StepDone)
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(out_dir=tmp_path, callbacks=[stop], **options).fit()
    again = tiny_trainer(tiny_net(seed=9), out_dir=tmp_path, **options)
    again.fit()
    assert_identical(result(again), result(whole))


def test_half_precision_stays_inside_training_passes() -> None:
    dtypes: dict[str, set[torch.dtype]] = {"train": set(), "eval": set()}

    def forward_fn(model: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        output = model(batch[0])
        dtypes["train" if model.training else "eval"].add(output.dtype)
        return output, batch[1]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        assert output.dtype == torch.float32
        return F.cross_entropy(output, target)

    def metric(output: Tensor, target: Tensor) -> Tensor:
        assert output.dtype == torch.float32
        return output.argmax(1) == target

    functions: dict[str, Any] = {"forward_fn": forward_fn, "loss_fn": loss_fn, "metric": metric}
    trainer = plain_trainer(dtype=torch.float32, train_loader=uneven(), mixed_precision="bf16", **functions)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's own does not leak in
        net = trainer.fit()
    assert torch.bfloat16 in dtypes["train"]
    assert dtypes["eval"] == {torch.float32}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_step_that_overflows_is_left_out_and_the_scale_is_saved() -> None:
    from cocktailsdk.training.optimizers import choose_optimizer
    from cocktailsdk.training.recipes.steps import DENSE_STEP
    from cocktailsdk.training.step.distill import Distillation
    from cocktailsdk.training.step.engine import Stepper
    from cocktailsdk.training.step.execution import Execution, Precision

    net = plain_net(dtype=torch.float32)
    huge: list[float] = [1.0]
    scaler = Precision("fp16").scaler(torch.device("cpu"))
    assert scaler is not None
    default = choose_optimizer(None, None, net.model, start="scratch", by_model=False)
    optimizer = default.factory(net.model.parameters())

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * huge[0]

    execution = Execution(net.model, lambda model, batch: (model(batch[0]), batch[1]))
    stepper = Stepper(net, execution, loss_fn, Distillation(0.0))
    before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    scale = scaler.get_scale()
    huge[0] = 1e36  # times the scale it is infinite
    assert stepper.step(DENSE_STEP, batches()[:1], optimizer, None, scaler).overflowed
    assert all(torch.equal(before[n], p) for n, p in net.model.named_parameters())
    assert scaler.get_scale() == scale / 2
    huge[0] = 1.0
    assert not stepper.step(DENSE_STEP, batches()[:1], optimizer, None, scaler).overflowed
    assert not torch.equal(before["fc.weight"], net.model.fc.weight)


def test_an_accelerator_says_precision_and_accumulation() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    given, asked = one_round(accelerator=accelerator, epochs=1), one_round(accumulate=2, epochs=1)
    assert given.fingerprint == asked.fingerprint
    given.fit(), asked.fit()
    assert_identical(result(given), result(asked))
    assert one_round(accelerator=accelerator, accumulate=4, epochs=1).configuration["training"]["accumulate"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "half"}, 'None, "bf16" or "fp16", got \'half\''),
        ({"accumulate": 0}, "ExecutionSettings.gradient_accumulation_steps must be at least 1, got 0"),
        ({"clip_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"clip_norm": -1.0}, "max_grad_norm must be above 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        one_round(**options)


def test_a_run_with_other_precision_or_accumulation_is_another_run() -> None:
    others = ({"mixed_precision": "bf16"}, {"accumulate": 2}, {"clip_norm": 1.0})
    assert len({one_round(**options).fingerprint for options in ({}, *others)}) == 4
