"""What a run was asked to do, as JSON values: another run may not go on in its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ...errors import TrainingError
from ...io import open_regular
from ...net.subnet_model import SubnetModel
from ...utils.blame import blamed
from ..optimization import OPTIMIZER_HINT, SCHEDULE_HINT, check_optimizer, check_schedule
from ..options import Options

__all__ = ["CONFIGURATION", "describe", "differences", "fingerprint", "settings_line", "stored_configuration"]

CONFIGURATION = "configuration.json"
"""The file that holds it, beside a run's state."""


def describe(net: SubnetModel, options: Options, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A run's configuration.

    The names in it are a file format: those that the trainer's settings had in release 0.1, so that its runs resume.

    Of functions only the name is known; of the optimizer its class and settings; of the schedule its class and, for
    ``LambdaLR``, the rate at some steps. Weights and data are not part of it: what matters of them belongs in
    ``config``.

    Raises:
        TrainingError: Where ``config`` is no mapping of JSON values, or a factory returns something else.
    """
    try:
        user = json.loads(json.dumps(dict(config or {})))
    except (TypeError, ValueError) as error:
        raise TrainingError(f"config must be a mapping of JSON values: {error}") from error
    settings = options.settings
    training = {
        "distill_weight": settings.distillation.weight,
        "metric_mode": settings.evaluation.metric_mode,
        "epochs": options.epochs,
        "finishing_epochs": options.finishing_epochs,
        "total_hours": options.total_hours,
        "rewind_epoch": options.rewind_epoch,
        "rewind_schedule": settings.rounds.rewind_schedule,
        "rounds": options.rounds,
        "steps_per_epoch": options.steps_per_epoch,
        "start": options.start,
        "merge": settings.rounds.merge,
        "recalibration_batches": options.recalibration_batches,
        "seed": options.seed,
        "loss_fn": _name(options.loss_fn),
        "forward_fn": _name(options.forward_fn),
        "distill_fn": _name(settings.distillation.loss_fn),
        "metric": _name(options.metric),
        "alphas": sorted(settings.rounds.alphas),
        "recipe": options.recipe.describe(),
        **_execution(options),
        **({"steps": list(options.budget)} if options.budget else {}),
    }
    return {
        "format": 1,
        "patterns": {p.name: p.config_on(net.coupling) for p in net.patterns},
        "eligible": [w.name for w in net.eligible],
        "tensors": {name: list(t.shape) for name, t in [*net.model.named_parameters(), *net.model.named_buffers()]},
        "training": training,
        **_optimization(net, options),
        "config": user,
    }


def _execution(options: Options) -> dict[str, Any]:
    """How passes run, where not in the plain way. The number of processes is no part of it: a run may change it."""
    execution = options.settings.execution
    plain_and_chosen = {
        "mixed_precision": (None, options.precision.name),
        "accumulate": (1, options.gradient_accumulation_steps),
        "clip_norm": (None, execution.max_grad_norm),
        "sync_batch_norm": (False, execution.sync_batch_norm),
        "ema": (None, execution.ema_decay),
        "temperature": (None, options.settings.distillation.temperature),
    }
    return {name: chosen for name, (plain, chosen) in plain_and_chosen.items() if chosen != plain}


def _optimization(net: SubnetModel, options: Options) -> dict[str, Any]:
    parameters = [p for p in net.model.parameters() if p.requires_grad]
    if not parameters:
        raise TrainingError("the model has no parameter that requires a gradient: there is nothing to train")
    with blamed("optimizer(parameters)", lambda: f"for a list of {len(parameters)} parameters", OPTIMIZER_HINT):
        optimizer = options.optimizer(parameters)
    check_optimizer(optimizer, net.model)
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    steps = options.schedule_steps(options.first_round)
    with blamed("schedule(optimizer, steps)", lambda: f"for steps={steps}", SCHEDULE_HINT):
        schedule = options.schedule(optimizer, steps)
    check_schedule(schedule)
    rates = []
    if isinstance(schedule, LambdaLR):
        rates = [float(schedule.lr_lambdas[0](steps * i // 8)) for i in range(9)]
    return {
        "optimizer": {"class": type(optimizer).__name__, "groups": groups},
        "schedule": {"class": type(schedule).__name__, "rates": rates},
    }


def _name(function: Any) -> str | None:
    if function is None:
        return None
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value)


def settings_line(configuration: Mapping[str, Any]) -> str:
    """Every setting of a run, defaults included, as one line of text: ``recipe.name=pretrained, epochs=10, …``."""
    training = configuration["training"]
    optimizer = dict(configuration["optimizer"]["groups"][0])
    parts = {**training, "optimizer": {"class": configuration["optimizer"]["class"], **optimizer}}
    rates = configuration["schedule"]["rates"]
    parts["schedule"] = {"class": configuration["schedule"]["class"], **({"rates": rates} if rates else {})}
    return ", ".join(f"{name}={_setting(value)}" for name, value in _flat(parts).items() if value is not None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{' '.join(map(_setting, value))}]"
    return str(value)


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration of JSON values."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Where two configurations differ, as readable lines: ``epochs: 20, now 30``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in sorted({*old, *new}):
            lines += differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return sorted(lines, key=lambda line: line.startswith("schedule.rates"))  # which follow from other settings
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = zip(old, new, strict=True)
        if all(isinstance(a, Mapping) and isinstance(b, Mapping) for a, b in parts):  # an optimizer's groups
            every = [differences(a, b, f"{key}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
            return [line for lines in every for line in lines]
    return [f"{key}: {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def stored_configuration(folder: Path) -> dict[str, Any]:
    """The configuration of the run whose state a folder holds; empty where it holds none.

    Raises:
        TrainingError: Where the file is damaged.
    """
    path = folder / CONFIGURATION
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            stored = json.loads(file.read())
    except (ValueError, OSError, RecursionError) as error:
        raise TrainingError(
            f"{path} is no JSON ({error}): remove {folder} to start anew, or train into another folder"
        ) from error
    return stored if isinstance(stored, dict) else {}
