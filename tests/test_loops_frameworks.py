"""The loop inside Accelerate, Lightning and transformers, as docs/your-loop.md shows it: a plain loop's weights."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from ranks_program import ROUNDING, launch, outcome, own_loop
from torch import Tensor
from torch.nn import functional as F
from training_tiny import assert_identical

import cocktailsdk as cocktail

PAGE = Path(__file__).resolve().parent.parent / "docs" / "your-loop.md"
STEPS = 12


class Scorer(torch.nn.Module):
    """Takes and returns what transformers' Trainer gives and wants."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 16)
        self.second = torch.nn.Linear(16, 16)
        self.last = torch.nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def scorer() -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Scorer()
    return cocktail.sparsify(model, ["unstructured@0.5", "2:4"], example_inputs=(torch.zeros(1, 6),)).train()


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    return list(zip(x.split(4), x[:, :3].argmax(1).split(4), strict=True))


def assert_plain(net: cocktail.CocktailNet) -> None:
    """The net's weights are those of a plain loop, and subnets were trained."""
    plain = scorer()
    loop = cocktail.CoLoop(plain, STEPS)
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.05)
    seen = set()
    for x, y in loop.batches(batches()):
        with loop.step((x, y)) as step:
            seen.add(step.network)
            output = plain.model(x)
            optimizer.zero_grad()
            step.loss(F.cross_entropy(output, y), output, y).backward()
        optimizer.step()
    assert seen == set(plain.names) and net.active == "dense"
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(name).detach().cpu(), parameter.detach(), msg=name)


def shown(after: str, what: dict[str, Any]) -> Any:
    """The class that a section of the page shows."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {after}\n")[1].split("\n## ")[0]
    names = {"cocktail": cocktail, "torch": torch, "F": F, **what}
    block = re.search(r"^```py(?:thon)?\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    exec(compile(block[1], str(PAGE), "exec"), names)  # noqa: S102, RUF100
    return names["CoTrained"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_an_accelerate_loop(accumulate: int) -> None:
    try:
        accelerator = Accelerator(gradient_accumulation_steps=accumulate, cpu=True)
        net = scorer()
        made = torch.optim.SGD(net.model.parameters(), lr=0.05)
        prepared, optimizer = accelerator.prepare(net.model, made)
        loop = cocktail.CoLoop(net, STEPS)
        halves = [(a, b) for x, y in batches() for a, b in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)]
        for x, y in loop.batches(halves):
            with accelerator.accumulate(prepared):
                with loop.step((x, y), last=accelerator.sync_gradients) as step:
                    output = prepared(x)
                    accelerator.backward(step.loss(F.cross_entropy(output, y), output, y))
                optimizer.step()
                optimizer.zero_grad()
        assert_plain(net)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_in_a_lightning_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        net = scorer()
        module = shown("Lightning", {})(net, STEPS)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_steps=STEPS, max_epochs=-1, accelerator="cpu", devices=1, enable_model_summary=False, **quiet
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    assert module.loop.finished
    assert_plain(net)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_transformers_trainer(accumulate: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    net = scorer()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    examples = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    try:
        args = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
            eval_strategy="steps",
            eval_steps=5,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            optim="sgd",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = shown("transformers' Trainer", {})(net, args=args, train_dataset=examples, eval_dataset=examples[:8])
        trainer.train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert trainer.loop.finished
    assert_plain(net)


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="PyTorch was built without gloo",
)
def test_on_two_processes(tmp_path: Path) -> None:
    names = ("own_loop", "own_loop_sharded")
    done = launch(tmp_path, *names)
    assert done.returncode == 0, done.stderr
    one = own_loop(tmp_path)
    for name in names:
        first, second = outcome(tmp_path, name, 0), outcome(tmp_path, name, 1)
        assert_identical(first, second)
        assert_identical(first["masks"], one["masks"])
        for key, tensor in one["weights"].items():
            torch.testing.assert_close(first["weights"][key], tensor, rtol=0, atol=ROUNDING)
    assert "ema_decay cannot average sharded weights" in first["refused"]
