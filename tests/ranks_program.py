"""What tests run on several processes: ``torchrun ranks_program.py FOLDER SCENARIO …``.

Every process writes what each scenario returned to ``FOLDER/SCENARIO-RANK.pt``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from training_tiny import augment, grouped, result, tiny_images, tiny_net, tiny_trainer, to_float

import cocktailsdk as cocktail
from cocktailsdk import TrainingError, presets
from cocktailsdk.cli.main import app
from cocktailsdk.presets import digits
from cocktailsdk.presets.datasets import TensorLoader
from cocktailsdk.training import events as ev
from cocktailsdk.training.distributed.ranks import digest
from cocktailsdk.training.recipes import masks as recipe_masks
from cocktailsdk.training.recipes import recipe_named
from cocktailsdk.utils.fsdp import local

TIMEOUT = 400  # seconds, of a launch

ROUNDING = 1e-6
"""How far weights and losses of two processes may be from those of one.

The runs are in float64, but the trainer weighs its parts of a batch (3 of 7 examples) and records its losses in
float32: weights were 1e-8 apart and losses 1e-7. A gradient that misses one example moves them by more than 1e-4.
"""


class PlainNet(nn.Module):
    """Without batch statistics and without random numbers: the same whoever computes which examples.

    Two processes sum gradients in another order than one, and the order within one depends on the number of threads. In
    float32 that rounding can move a ReLU's input to the other side of zero: then weights differ by 2e-4 after 24 steps,
    as much as a wrong gradient makes them differ (seen with MKL on two threads; with SiLU it stays at 1e-7). So one
    process and two are compared in float64, in which the same rounding is 1e-16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, padding=1)
        self.norm2 = nn.GroupNorm(4, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x.to(self.conv1.weight.dtype))))
        return self.fc(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


def plain_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PlainNet().to(dtype)
    patterns = (
        cocktail.Unstructured(sparsities=[0.3, 0.6]),
        "2:4",
        cocktail.Channel(sparsities=[0.25, 0.5], round_to=1),
    )
    return cocktail.sparsify(model, patterns, example_inputs=(torch.zeros(1, 1, 8, 8),))


class Digits(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A map-style dataset; its examples are not augmented, so that they are the same in any process."""

    def __init__(self) -> None:
        self.data = tiny_images()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return to_float(self.data.images[i]), int(self.data.labels[i])


def uneven() -> TensorLoader:
    """Batches of 7 and one of 6: they do not divide by two."""
    return TensorLoader(tiny_images(), 7, augment, shuffle=True)


def shuffled() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(Digits(), 7, shuffle=True, generator=torch.Generator().manual_seed(3))


def plain_trainer(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> cocktail.CoTrainer:
    settings: dict[str, Any] = {"recipe": "paper-finishing", "train_loader": uneven(), "alphas": (1.0, 0.5)}
    return tiny_trainer(plain_net(seed, dtype), **{**settings, **options})


def trained(trainer: cocktail.CoTrainer) -> dict[str, Any]:
    trainer.fit()
    held_out = TensorLoader(tiny_images(33, seed=5), 16, to_float)  # the last batch has one example
    return {**result(trainer), "evaluated": trainer.evaluate(held_out), "digest": of(trainer)}


def of(trainer: cocktail.CoTrainer) -> str:
    """Of all that must be the same in every process, bit by bit."""
    out = result(trainer)
    tensors = {f"weights {n}": t for n, t in out["weights"].items()}
    for kind in ("masks", "statistics", "private"):
        tensors |= {f"{kind} {name} {key}": t for name, some in out[kind].items() for key, t in some.items()}
    return digest(tensors) + repr(out["metrics"]) + repr(out["history"])


def main_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


TRAINED: dict[str, Any] = {
    "recipe": None,
    "start": "pretrained",
    "epochs": None,
    "total_steps": 30,
    "rewind_epoch": None,
}


# -------------------------------------------------------------------------------------------------- scenarios


def plain(folder: Path) -> Any:
    # every process has weights of its own: the main one's count
    return trained(plain_trainer(seed=int(os.environ.get("RANK", "0"))))


def loader(folder: Path) -> Any:
    return trained(plain_trainer(train_loader=shuffled(), merge=False))


def several(folder: Path) -> Any:
    """Accumulation, clipping and the sandwich of several networks a step."""
    return trained(plain_trainer(recipe="us-net", accumulate=2, clip_norm=0.5))


def from_trained(folder: Path) -> Any:
    """A frozen teacher, and passes by need; process 0 fits the heads to its own examples, so here none are."""
    recipe = dataclasses.replace(recipe_named("pretrained"), refit_head="none")
    return trained(plain_trainer(**{**TRAINED, "recipe": recipe}))


def scored(folder: Path) -> Any:
    """Masks by a score; the calibration data is whole batches in every process."""
    return trained(plain_trainer(score={"channel": "activation", "*": "wanda"}, merge=False))


def scored_apart(folder: Path) -> Any:
    """Loops of one's own whose processes judge the score from other data."""
    images, labels = to_float(tiny_images().images).double(), tiny_images().labels
    mine = 24 * int(os.environ.get("RANK", "0"))
    calibration = [(images[mine : mine + 24], labels[mine : mine + 24])]
    loop = cocktail.CoLoop(
        plain_net(), 12, start="pretrained", recipe="cocktail", score="wanda", calibration=calibration
    )
    try:
        loop.begin((images[:4], labels[:4]))
    except cocktail.TrainingError as error:
        return str(error)
    return None


def own_heads(folder: Path) -> Any:
    return trained(tiny_trainer(tiny_net(), **TRAINED))


def batch_norm(folder: Path) -> Any:
    return trained(tiny_trainer(tiny_net()))


def interrupted(folder: Path) -> Any:
    """Process 1 is interrupted, in the middle of a step; all stop, and go on."""
    calls = 0

    def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 35 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(output, target)

    cross_entropy.__qualname__ = "cross_entropy"
    seen: list[str] = []
    first = tiny_trainer(
        out_dir=folder / "run", loss_fn=cross_entropy, callbacks=[lambda event: seen.append(type(event).__name__)]
    )
    try:
        first.fit()
    except KeyboardInterrupt:
        stopped = True
    else:
        stopped = False
    return {"stopped": stopped, "seen": seen, **trained(tiny_trainer(tiny_net(seed=9), out_dir=folder / "run"))}


def grown(folder: Path) -> Any:
    """A run that one process alone began goes on with all of them."""
    seen: list[ev.Event] = []
    trainer = plain_trainer(out_dir=folder / "grown", callbacks=[seen.append])
    out = trained(trainer)
    return {**out, "resumed": [(e.resumed, e.done_steps) for e in seen if isinstance(e, ev.TrainingStarted)]}


def mixed(folder: Path) -> Any:
    return trained(plain_trainer(dtype=torch.float32, mixed_precision="bf16", merge=False))


class WithUnused(PlainNet):
    """One parameter gets no gradient, of which DDP must know."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))


def unused(folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = cocktail.sparsify(
            WithUnused(), cocktail.Unstructured(sparsities=[0.5]), example_inputs=(torch.zeros(1, 1, 8, 8),)
        )
    return trained(tiny_trainer(net, recipe="paper-finishing", train_loader=uneven(), on_nan="skip"))


def planned(folder: Path) -> Any:
    """Measured in every process, and agreed; a plan leaves nothing behind."""
    trainer = plain_trainer(merge=False, rounds=1)
    steps = trainer.plan().steps
    hours = plain_trainer(total_hours=0.01, epochs=None, rewind_epoch=None, merge=False, rounds=1)
    return {"steps": steps, "hours": hours.configuration["training"], **trained(trainer)}


def refused(folder: Path) -> Any:
    """What cannot be shared out, and what differs, is refused in words, in every process."""
    sampler = torch.utils.data.DistributedSampler(Digits())
    padded = torch.utils.data.DataLoader(Digits(), 8, sampler=sampler)
    texts = [(torch.zeros(4, 1, 8, 8), ["a", "b", "c", "d"])]
    attempts: dict[str, Callable[[], Any]] = {
        "padded": lambda: plain_trainer(val_loader=padded),
        "texts": lambda: plain_trainer(train_loader=texts, distill_weight=0, epochs=1).fit(),
        "synchronised": lambda: plain_trainer(sync_batch_norm=True).fit(),
        "folder": lambda: plain_trainer(out_dir=folder / "run").fit(),
    }
    out = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except TrainingError as error:
            out[name] = str(error)
    return out


def own_parts(folder: Path) -> Any:
    """Loaders that share out by themselves are left alone."""
    sampler = torch.utils.data.DistributedSampler(Digits(), shuffle=False)
    parts = torch.utils.data.DataLoader(Digits(), 4, sampler=sampler)
    return trained(plain_trainer(train_loader=parts, merge=False, rounds=1))


def cli(folder: Path) -> Any:
    """``cocktail-cli train`` with a preset that is small enough."""

    def small() -> presets.Preset:
        preset = digits.preset()
        few = {"epochs": 1, "rewind_epoch": 0, "recalibration_batches": 1, "alphas": (1.0, 0.5)}
        training = {**preset.training, **grouped(few)}
        patterns = (cocktail.Unstructured(sparsities=[0.5, 0.8]), cocktail.NM(2, 4))
        return dataclasses.replace(preset, patterns=patterns, training=training)

    presets.PRESETS["digits"] = small
    said = {}
    for way in ("first", "again"):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app(["train", "--preset", "digits", "--out", str(folder / "cli"), "--json"], standalone_mode=False)
        said[way] = (out.getvalue(), err.getvalue())
    return said


def with_ties(net: cocktail.CocktailNet) -> cocktail.CocktailNet:
    """Weights of few values, so that thresholds fall among many equal ones."""
    with torch.no_grad():
        for p in net.model.parameters():
            p.copy_((p * 20).round() / 20)
    return net


def shard(net: cocktail.CocktailNet) -> cocktail.CocktailNet:
    """FSDP2 as users call it: the convolutions by themselves, the rest together."""
    for module in (net.model.conv1, net.model.conv2):
        fully_shard(module)
    fully_shard(net.model)
    return net


def masks_of(net: cocktail.CocktailNet) -> dict[str, Any]:
    made = recipe_masks.umg(
        recipe_masks.Pruning(
            net,
            {"unstructured": net.pattern("unstructured").subnets(), "n:m": net.pattern("n:m").subnets()}
            | {"channel": net.pattern("channel").subnets()},
            frozenset(net.names) - {"dense"},
            lambda: None,
        )
    )
    return {
        name: {**mask.elements, **({} if mask.removed is None else {"removed": mask.removed})}
        for name, mask in made.items()
    }


def fsdp_trainer(seed: int = 0, sharded: bool = True, **options: Any) -> cocktail.CoTrainer:
    net = plain_net(seed)
    settings: dict[str, Any] = {"recipe": "paper-finishing", "train_loader": uneven(), "alphas": (1.0, 0.5)}
    return tiny_trainer(shard(net) if sharded else net, **{**settings, **options})


def fsdp(folder: Path) -> Any:
    """Masks of sharded weights, a run, and its bundle."""
    several_ranks = "RANK" in os.environ
    if several_ranks and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    net = with_ties(plain_net())
    out: dict[str, Any] = {"umg": masks_of(shard(net) if several_ranks else net)}
    trainer = fsdp_trainer(sharded=several_ranks, clip_norm=0.5, accumulate=2, out_dir=folder / f"fsdp-{several_ranks}")
    trainer.fit()
    held_out = TensorLoader(tiny_images(33, seed=5), 16, to_float)
    out["evaluated"] = trainer.evaluate(held_out)
    out["history"] = trainer.history.to_dict()
    out["metrics"] = dict(trainer.net.metrics)
    out["weights"] = {n: trainer.net.dense_tensor(n).clone() for n, _ in trainer.net.model.named_parameters()}
    out["masks"] = {n: {**m.elements} for n, m in trainer.net.masks.items()}
    trainer.net.save_pretrained(folder / f"bundle-{several_ranks}")
    if several_ranks:
        p = next(iter(trainer.net.model.parameters()))
        out["rows"] = (local(p).shape[0], p.shape[0])
    return out


def fsdp_trained(folder: Path) -> Any:
    """From trained weights: the teacher's are sharded as the model's; the head is not refitted."""
    several_ranks = "RANK" in os.environ
    if several_ranks and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    trainer = fsdp_trainer(sharded=several_ranks, **TRAINED) if several_ranks else from_trained_whole()
    trainer.fit()
    weights = {n: trainer.net.dense_tensor(n).clone() for n, _ in trainer.net.model.named_parameters()}
    return {"weights": weights, "private": dict(trainer.net.private), "made": trainer.history.rounds[-1].made}


def from_trained_whole() -> cocktail.CoTrainer:
    recipe = dataclasses.replace(recipe_named("pretrained"), refit_head="none")
    return fsdp_trainer(sharded=False, **{**TRAINED, "recipe": recipe})


def fsdp_resumed(folder: Path) -> Any:
    """Stopped in the middle, and gone on with: bit by bit the same."""
    left = [9]

    def stop(event: ev.Event) -> None:
        left[0] -= isinstance(event, ev.StepDone)
        if left[0] == 0:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"clip_norm": 0.5, "accumulate": 2, "out_dir": folder / "fsdp-stopped"}
    with contextlib.suppress(KeyboardInterrupt):
        fsdp_trainer(callbacks=[stop], event_seconds=0, **options).fit()
        raise AssertionError
    trainer = fsdp_trainer(seed=9, **options)
    trainer.fit()
    return {n: trainer.net.dense_tensor(n).clone() for n, _ in trainer.net.model.named_parameters()}


def own_loop(folder: Path, *, sharded: bool = False) -> Any:
    """A loop of one's own around DDP or FSDP2, every process with its half of two accumulated batches."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    net = plain_net().train()
    sharded = sharded and world > 1
    if sharded:
        shard(net)
    model: Any = net.model if sharded or world == 1 else nn.parallel.DistributedDataParallel(net.model)
    optimizer = torch.optim.SGD(net.model.parameters(), lr=0.05, momentum=0.9)
    loop = cocktail.CoLoop(net, 24)
    data = tiny_images()
    x, y = to_float(data.images), data.labels
    while not loop.finished:
        optimizer.zero_grad()
        for last in (False, True):
            at = ((2 * loop.done + last) * 8) % 48
            mine = slice(at + 8 // world * rank, at + 8 // world * (rank + 1))
            waiting = contextlib.nullcontext() if last or sharded or world == 1 else model.no_sync()
            with waiting, loop.step((x[mine], y[mine]), last=last) as step:
                output = model(x[mine])
                (0.5 * step.loss(F.cross_entropy(output, y[mine]), output, y[mine])).backward()
        optimizer.step()
    weights = {n: net.dense_tensor(n).clone() for n, _ in net.model.named_parameters()}
    masks = {n: {**m.elements, **({} if m.removed is None else {"removed": m.removed})} for n, m in net.masks.items()}
    return {"weights": weights, "masks": masks, "done": loop.done}


def own_loop_sharded(folder: Path) -> Any:
    out = own_loop(folder, sharded=True)
    try:
        fsdp_trainer(ema=0.9).fit()
    except TrainingError as error:
        out["refused"] = str(error)
    return out


def dies(folder: Path) -> Any:
    """Process 1 is killed in round 2."""

    def watch(event: ev.Event) -> None:
        (folder / "round-2").touch() if isinstance(event, ev.RoundStarted) and event.round == 2 else None

    def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
        if os.environ.get("RANK") == "1" and (folder / "round-2").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    cross_entropy.__qualname__ = "cross_entropy"
    options: dict[str, Any] = {"out_dir": folder / "run", "save_seconds": 0, "callbacks": [watch]}
    return trained(plain_trainer(loss_fn=cross_entropy, **options))


DDP = (
    plain,
    loader,
    several,
    from_trained,
    scored,
    scored_apart,
    own_heads,
    batch_norm,
    interrupted,
    grown,
    mixed,
    unused,
    planned,
    refused,
    own_parts,
    cli,
)
SCENARIOS: dict[str, Callable[[Path], Any]] = {
    f.__name__: f for f in (*DDP, fsdp, fsdp_trained, fsdp_resumed, dies, own_loop, own_loop_sharded)
}


def launch(folder: Path, *names: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run scenarios on several processes of this machine, one after the other; never for longer than a while."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run(
        [*torchrun, __file__, str(folder), *names],
        env=env,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        check=False,
    )


def outcome(folder: Path, name: str, rank: int) -> Any:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=False)


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        out = SCENARIOS[name](folder)
        torch.save(out, folder / f"{name}-{os.environ['RANK']}.pt")
        del out
    gc.collect()  # models wrapped by DDP and FSDP2 hold on to the group
    torch.distributed.destroy_process_group()
    # What still holds one keeps gloo's threads alive, and a thread that lets go of a tensor while the interpreter ends
    # aborts the process, all done as it is.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
