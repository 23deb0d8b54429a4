"""Steps of co-training against plain dense ones: time by turns in one process, and memory."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from engine_umg import exponent, timed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import cocktailsdk as cocktail
from cocktailsdk.presets.models import ResNet18
from cocktailsdk.training.events import Event, RoundStarted, StepDone
from cocktailsdk.training.recipes import recipe_named

BATCH, SIDE, CLASSES = 128, 32, 10
LEVELS = (cocktail.Unstructured([0.672]), cocktail.NM(2, 4), cocktail.Channel([0.41], round_to=1))
TURNS = 6
"""Steps after which every network has had its turn: dense, unstructured, dense, N:M, dense, channel."""


def resnet18() -> nn.Module:
    """Of the paper's main experiment: 11.2 M weights, at 32x32."""
    return ResNet18(CLASSES)


def vit() -> nn.Module:
    """A vision transformer of 2.7 M weights: 6 blocks of width 192, patches of 4x4."""
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=SIDE, patch_size=4, depth=6, num_classes=CLASSES
    )


def vit_small() -> nn.Module:
    """A vision transformer of 21 M weights: 12 blocks of width 384, patches of 4x4."""
    import timm

    return timm.create_model(
        "vit_small_patch16_224", pretrained=False, img_size=SIDE, patch_size=4, num_classes=CLASSES
    )


def tiny() -> nn.Module:
    """For trying this file."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "vit": vit, "vit_small": vit_small, "tiny": tiny}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The paper's."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """A pass, in bfloat16 where it is on a GPU."""
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return model(x), y


class Dense:
    """Plain training of a model, for comparison: the same batches, loss, optimizer and learning-rate schedule."""

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self._batches, self._at = model.train(), batches, 0
        self._optimizer = sgd(model.parameters())
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, 1000)

    def step(self) -> None:
        """One step."""
        batch = self._batches[self._at % len(self._batches)]
        self._at += 1
        self._optimizer.zero_grad(set_to_none=True)
        output, target = forward(self.model, batch)
        F.cross_entropy(output, target).backward()
        self._optimizer.step()
        self._schedule.step()


def batches_of(count: int, batch: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Random images in memory."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, 3, SIDE, SIDE, generator=generator).to(device),
         torch.randint(0, CLASSES, (batch,), generator=generator).to(device))
        for _ in range(count)
    ]  # fmt: skip


def trainer_of(
    name: str,
    recipe: str,
    batches: list[tuple[Tensor, Tensor]],
    steps: int,
    callback: Any,
    device: str = "cpu",
    compiled: bool = False,
    out_dir: str | None = None,
) -> cocktail.CoTrainer:
    """Co-training of one round, in which every pattern trains a network."""
    net = cocktail.sparsify(MODELS[name](), LEVELS, example_inputs=(torch.zeros(2, 3, SIDE, SIDE),))
    net.model.to(device)
    if compiled:
        net.model.compile()
    return cocktail.CoTrainer(
        net, (batches * steps)[:steps], F.cross_entropy,
        recipe=replace(recipe_named(recipe), finishing=0.0),
        optimizer=sgd, start="pretrained", epochs=1, out_dir=out_dir, callbacks=[callback],
        rounds=cocktail.RoundSettings(count=1, merge=False),
        evaluation=cocktail.EvaluationSettings(recalibration_batches=1),
        batches=cocktail.BatchSettings(forward_fn=forward, steps_per_epoch=steps),
        output=cocktail.OutputSettings(event_seconds=0.0),
    )  # fmt: skip


class _Enough(Exception):
    """All that was to be measured is."""


def step_times(name: str, recipe: str, turns: int = 1, batch: int = BATCH, device: str = "cpu") -> dict[str, Any]:
    """An epoch of co-training against one of dense training, of the same steps; after each of the one's (or two that
    share a batch) as many of the other's follow, so that both see the same machine."""
    compiled = device != "cpu"
    warm, steps = 2 * TURNS if compiled else 0, TURNS * turns
    batches = batches_of(4, batch, device)
    model = MODELS[name]().to(device)
    if compiled:
        model.compile()
    dense = Dense(model, batches)
    dense.step()
    rows: list[dict[str, float]] = []
    done, began = 0, (0.0, 0.0)

    def between(event: Event) -> None:
        nonlocal done, began
        if isinstance(event, StepDone):
            _wait(device)
            ours = (time.perf_counter() - began[0], time.process_time() - began[1])
            count = event.step - done
            wall, processor, _ = timed(lambda: [dense.step() for _ in range(count)], device)
            if event.step > warm:
                rows.append({"steps": count, "ours": ours[0], "ours_processor": ours[1], "dense": wall,
                             "dense_processor": processor})  # fmt: skip
            done = event.step
            if event.step >= warm + steps:
                raise _Enough
        if isinstance(event, RoundStarted | StepDone):
            _wait(device)
            began = (time.perf_counter(), time.process_time())

    trainer = trainer_of(name, recipe, batches, warm + steps, between, device, compiled)
    with contextlib.suppress(_Enough):
        trainer.fit()
    return {"model": name, "recipe": recipe, "batch": batch, "rows": rows}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def step_memory(name: str, recipe: str, batch: int = 8, device: str = "cpu") -> dict[str, Any]:
    """Peak memory of dense training and of co-training, by what torch itself allocates: a small batch, so that weights
    are what counts."""
    batches = batches_of(2, batch, device)
    dense = Dense(MODELS[name]().to(device), batches)
    dense.step()
    plain = _peak_of(lambda: [dense.step() for _ in range(2)], device)
    del dense
    steps, found = 3 * TURNS, {"ours": 0}
    recording: list[Any] = []
    live = 0

    def window(event: Event) -> None:
        nonlocal live
        if not isinstance(event, StepDone):
            return
        if event.step == TURNS:  # every network has had its turn
            live = _live(device)
            recording.append(_record(device))
        elif event.step == 2 * TURNS:
            found["ours"] = live + _most(recording[0], device)
            raise _Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):  # the run's state is on disk
        trainer = trainer_of(name, recipe, batches, steps, window, device, out_dir=folder)
        net = trainer.net
        trainer.fit()
    masked = {n for s in net.names[1:] for n in net.masked_parameters(s)}
    prunable = sum(p.nbytes for n, p in net.model.named_parameters() if n in masked)
    packed = sum(-(-m.numel() // 8) for s in net.names[1:] for m in net.masks[s].tensors(net.coupling).values())
    return {
        "model": name, "recipe": recipe, "batch": batch, "dense": plain, "ours": found["ours"],
        "prunable": prunable, "packed": packed, "copies": (found["ours"] - plain - packed) / prunable,
    }  # fmt: skip


def _peak_of(work: Callable[[], Any], device: str) -> int:
    live, recording = _live(device), _record(device)
    work()
    return live + _most(recording, device)


def _live(device: str) -> int:
    """Bytes of tensors that are held now."""
    gc.collect()
    if device != "cpu":
        return int(torch.cuda.memory_allocated())
    held: dict[int, int] = {}
    for o in gc.get_objects():
        if type(o) in (Tensor, nn.Parameter) and o.device.type == "cpu":  # not torch.export's fake ones
            for t in (o, o.grad) if o.is_leaf else (o,):
                if t is not None:
                    held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(held.values())


def _record(device: str) -> Any:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    recording = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    recording.start()
    return recording


def _most(recording: Any, device: str) -> int:
    """The most bytes allocated at a time since then, above what there was."""
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated()) - int(recording)
    recording.stop()
    events = recording.profiler.kineto_results.events()
    held = most = 0
    for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += e.nbytes()
        most = max(most, held)
    return most


def round_costs(counts: list[int]) -> dict[str, Any]:
    """Seconds of a run without merging, and of one with, by its rounds: a small convolutional network."""
    rows = []
    for rounds in counts:
        row: dict[str, float] = {"rounds": rounds}
        for merge in (False, True):
            torch.manual_seed(0)
            net = cocktail.sparsify(
                MODELS["tiny"](),
                (
                    cocktail.Unstructured(rounds=rounds, rate=0.1),
                    cocktail.Channel(rounds=rounds, rate=0.02, round_to=1),
                ),
                example_inputs=(torch.zeros(2, 3, SIDE, SIDE),),
            )
            batches = batches_of(4, 16, "cpu")
            trainer = cocktail.CoTrainer(
                net, batches, F.cross_entropy, val_loader=batches[:1], optimizer=sgd, start="pretrained",
                epochs=2, recipe="paper", rounds=cocktail.RoundSettings(count=rounds, merge=merge),
                evaluation=cocktail.EvaluationSettings(recalibration_batches=1),
            )  # fmt: skip
            wall, processor, _ = timed(trainer.fit)
            row["merged" if merge else "trained"] = processor
            row["merged_wall" if merge else "trained_wall"] = wall
            if merge:
                row["judged"], row["to_judge"] = trainer.history.judged, trainer.history.to_judge
        rows.append(row)
    return {"rows": rows, "exponents": {k: exponent(counts, [r[k] for r in rows]) for k in ("trained", "merged")}}


def subnet_costs(counts: list[int]) -> dict[str, Any]:
    """Bytes of masks, seconds to make them and to switch, by the number of subnets: 2 M weights."""
    rows = []
    for count in counts:
        model = nn.Sequential(nn.Linear(64, 1408), nn.ReLU(), nn.Linear(1408, 1408), nn.ReLU(), nn.Linear(1408, 4))
        levels = [round((k + 1) / (count + 1), 4) for k in range(count)]
        wall, processor, net = timed(
            lambda model=model, levels=levels: cocktail.sparsify(
                model, [cocktail.Unstructured(levels)], example_inputs=(torch.zeros(2, 64),)
            )
        )
        made = timed(lambda net=net: [net.make_masks(n) for n in net.names[1:]])
        switched = timed(lambda net=net: [net.switch(n) for n in net.names])
        held = sum(-(-m.numel() // 8) for n in net.names[1:] for m in net.masks[n].elements.values())
        rows.append({"subnets": count, "mask_bytes": held, "sparsify": processor, "sparsify_wall": wall,
                     "masks": made[1], "switches": switched[1]})  # fmt: skip
    keys = ("mask_bytes", "masks", "switches")
    return {"rows": rows, "exponents": {k: exponent(counts, [r[k] for r in rows]) for k in keys}}
