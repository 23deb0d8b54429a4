"""Optimizers by name, and the one that a run has if none is given.

========= ============== ============================================================ =====================
name      weights        settings                                                     rate
========= ============== ============================================================ =====================
``sgd``   from scratch   momentum 0.9, weight decay 1e-4 (the paper's)                0.1
``sgd``   pretrained     the same, and Nesterov's momentum                            0.014
``adamw`` any            weight decay 0.01                                            0.001, less if wider
========= ============== ============================================================ =====================

AdamW's rate is 0.001 for models whose weights have up to 64 input features (the median), and falls in proportion to the
width above: 8e-5 at width 768. That is the rule of Yang et al. (2022, arXiv:2203.03466) for Adam.

Measured for this default: 24 subnetworks in one run of 120 steps from trained weights, the loss half labels and half a
frozen teacher, held-out loss as the mean over all of them. Best rates, in steps of a factor of 2: 0.0016 for a vision
transformer of width 64 on scikit-learn's digits, between 0.0002 and 0.0004 for the same of width 192, and 0.0032 to
0.0064 for a language model of width 64 (260,032 parameters) on Shakespeare's plays. The default is lower than these at
width 64, since the dense network loses more with each doubling: 2 % of its loss at 0.0008, 4 % at 0.0016 and 10 % at
0.0032 on the plays. :meth:`CoTrainer.suggest_lr` measures a rate for your model and data.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer

from ..errors import TrainingError
from .settings import shortened

__all__ = [
    "OPTIMIZERS",
    "OptimizerChoice",
    "OptimizerFactory",
    "OptimizerName",
    "Start",
    "choose_optimizer",
    "optimizer_line",
]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
OptimizerName = Literal["sgd", "adamw"]
Start = Literal["scratch", "pretrained"]

ADAMW_RATE, ADAMW_WIDTH = 1e-3, 64
"""AdamW's rate for trained weights, and the width of the models that it was measured on."""
SGD_RATE = 0.014
"""SGD's rate for trained weights, measured with gradients clipped as the recipe ``"pretrained"`` does it."""
HALF_EPS = 1e-4
"""AdamW's eps for weights of float16, in which its default of 1e-8 is 0: the first step would divide by 0."""
_LAYER_NORM = re.compile(r"layer_?norm|rms_?norm", re.IGNORECASE)
"""Names of classes that normalise each token: transformers and timm have dozens of their own (``LlamaRMSNorm``)."""


@dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer of a run.

    Attributes:
        factory: Makes one.
        reason: Why this one, for logs.
    """

    factory: OptimizerFactory
    reason: str


def optimizer_line(described: Mapping[str, Any], reason: str) -> str:
    """One line for logs, such as ``SGD, rate 0.014, chosen because the model has batch norms``.

    Args:
        described: ``"optimizer"`` of a run's configuration.
        reason: That of the choice.
    """
    rate = described["groups"][0].get("lr")
    shown = f"{rate:.3g}" if isinstance(rate, float) else str(rate)  # a tensor is described by its text
    return f"{described['class']}, rate {shown}, {reason}"


def choose_optimizer(
    optimizer: OptimizerFactory | str | None,
    learning_rate: float | None,
    model: nn.Module,
    *,
    start: Start,
    by_model: bool,
) -> OptimizerChoice:
    """The optimizer that a run asks for, or the default one.

    Args:
        optimizer: As the user gave it.
        learning_rate: Replaces the rate of a default or an optimizer that is given by name.
        model: Decides about the default and AdamW's rate.
        start: Where the run's weights come from.
        by_model: Whether the model decides about the default for trained weights; the paper's SGD otherwise.

    Raises:
        TrainingError: A name is unknown, or a factory was given with a rate; says what to type.
    """
    if optimizer is not None and not isinstance(optimizer, str):
        return OptimizerChoice(_given(optimizer, learning_rate), "as given")
    rate = {} if learning_rate is None else {"lr": float(learning_rate)}
    changed = "" if learning_rate is None else ", with the learning_rate given"
    if optimizer is not None:
        if optimizer not in OPTIMIZERS:
            raise TrainingError(
                f"optimizer must be {' or '.join(map(repr, OPTIMIZERS))}, or a function that makes one, got "
                f'{shortened(optimizer)}: write optimizer="sgd", or optimizer=lambda parameters: '
                "torch.optim.SGD(parameters, lr=0.1)"
            )
        return OptimizerChoice(partial(OPTIMIZERS[optimizer](model, start), **rate), f"as named{changed}")
    if start == "scratch" or not by_model:
        weights = "from scratch" if start == "scratch" else "from trained weights"
        return OptimizerChoice(partial(_paper_sgd(start), **rate), f"the recipe's default {weights}{changed}")
    name, kind = _by_model(model)
    return OptimizerChoice(
        partial(OPTIMIZERS[name](model, start), **rate), f"chosen because the model has {kind}{changed}"
    )


def _given(optimizer: OptimizerFactory, learning_rate: float | None) -> OptimizerFactory:
    if learning_rate is not None:
        raise TrainingError(
            f"learning_rate={learning_rate} is for optimizers by name, and optimizer is a function with a rate of its "
            f'own: write optimizer="sgd" or optimizer="adamw", or set lr={learning_rate} in the function'
        )
    return optimizer


def _by_model(model: nn.Module) -> tuple[OptimizerName, str]:
    """The optimizer for a trained model, and what the model has that decides so."""
    modules = list(model.modules())
    if any(isinstance(m, _BatchNorm) or "BatchNorm" in type(m).__name__ for m in modules):
        return "sgd", "batch norms"  # "BatchNorm" in the name: torchvision's FrozenBatchNorm2d
    if any(_LAYER_NORM.search(kind.__name__) for m in modules for kind in type(m).__mro__):
        return "adamw", "layer norms"
    return "sgd", "neither batch norms nor layer norms"


def _paper_sgd(start: Start) -> OptimizerFactory:
    """The paper's SGD: rate 0.1 (0.01 from pretrained weights), momentum 0.9, weight decay 1e-4."""
    return partial(SGD, lr=0.1 if start == "scratch" else 0.01, momentum=0.9, weight_decay=1e-4, nesterov=False)


def _sgd(model: nn.Module, start: Start) -> OptimizerFactory:
    """The paper's SGD; for trained weights with Nesterov's momentum, at the rate that suits clipped gradients."""
    if start == "scratch":
        return _paper_sgd(start)
    return partial(SGD, lr=SGD_RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)


def _adamw(model: nn.Module, start: Start) -> OptimizerFactory:
    half = any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters())
    return partial(AdamW, lr=_adamw_rate(model), weight_decay=0.01, eps=HALF_EPS if half else 1e-8)


def _adamw_rate(model: nn.Module) -> float:
    widths = [p.shape[1] for p in model.parameters() if p.ndim == 2]
    return ADAMW_RATE * min(1.0, ADAMW_WIDTH / (statistics.median_low(widths) if widths else ADAMW_WIDTH))


OPTIMIZERS: Mapping[str, Callable[[nn.Module, Start], OptimizerFactory]] = MappingProxyType(
    {"sgd": _sgd, "adamw": _adamw}
)
"""Optimizers that may be given by name."""
