"""After training: one pass over batches gives each network its statistics, and the features that a head is fitted to.

Co-trained weights serve all networks, and so does the last layer, though each network has other features. Fitting the
layer to them afterwards costs no backward pass of the model. On ResNet-20 a head of its own gave unstructured@0.893
3.6 points, channel@0.613 2.5, and networks that were trained alone nothing (``benchmarks/trained.py``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..patterns.base import DENSE
from ..utils.fsdp import is_sharded
from ..utils.losses import loss_of
from ..utils.modes import evaluating
from .checkpoints import save, save_if_late
from .distributed.sharing import inputs_of
from .evaluation import recalibrate
from .events import HeadRefitted
from .head_fit import Features, HardLoss, Head, find_hard_loss, fit_head
from .session import Session
from .step.forward import output_tensor
from .user_code import emit, guarded, guarded_batches

__all__ = ["refit_head"]

log = logging.getLogger(__name__)

OWN_BYTES = 0.1
"""With ``refit_head="auto"``, networks get heads of their own if these take at most this part of the model's bytes."""
LEAST_EXAMPLES = 64
"""With ``"auto"``, a head is fitted to at least so many. On a small classifier, heads fitted to 12 examples lost 26
points on average, and those fitted to 32 lost 10. Trying heads on a quarter of so few does not reliably show it. Heads
fitted to 64 examples gained 4 points, and those fitted to 200 gained 7."""
FEATURE_BYTES = 1 << 29
"""Memory for the features of all networks at once, for a shared head; fewer examples are taken beyond it."""


@dataclass(frozen=True)
class Layer:
    """The model's classifier head.

    Attributes:
        name: Path of the module.
        module: The last linear layer.
        hard: The loss from the labels that it was trained with.
    """

    name: str
    module: nn.Linear
    hard: HardLoss

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight".lstrip(".")

    @property
    def bias(self) -> str:
        """Name of the bias."""
        return f"{self.name}.bias".lstrip(".")

    def head(self) -> Head:
        """The layer's values as they are, in single precision."""
        weight, bias = (
            None if p is None else p.detach().to(torch.float32, copy=True)
            for p in (self.module.weight, self.module.bias)
        )
        assert weight is not None
        return Head(weight, bias)

    def trained(self) -> dict[str, Tensor]:
        """Copies of the layer's parameters, by name."""
        return {
            name: getattr(self.module, name.rpartition(".")[2]).detach().clone() for name in self.tensors(self.head())
        }

    def tensors(self, head: Head) -> dict[str, Tensor]:
        """A head's values as the layer's parameters, by name."""
        out = {self.weight: head.weight.to(self.module.weight.dtype)}
        if head.bias is not None:
            out[self.bias] = head.bias.to(self.module.bias.dtype)
        return out


@dataclass(frozen=True)
class Targets:
    """What heads are fitted to.

    Attributes:
        counted: Of all examples, which have a label that counts.
        labels: Of these.
        teacher: The teacher's logits for these; ``None`` without distillation.
    """

    counted: Bool[Tensor, " all"]
    labels: Int[Tensor, " n"]
    teacher: Float[Tensor, "n classes"] | None


def refit_head(session: Session) -> None:
    """Fit the head, in the phase between training and measuring; the networks then have their statistics too."""
    position = session.position
    if position.phase != "refit":
        return
    session.modes.apply()
    if position.step == 0:
        session.net.statistics.clear()
        session.net.metrics.clear()
        session.heads.clear()
    names = [DENSE, *session.names(session.options.rounds)]
    layer = _find_head(session)
    targets = None if layer is None else _enough_targets(session)
    if layer is not None and targets is not None:
        own = _heads_are_own(session, layer, len(names))
        log.info("refitting the classifier head %r: %s", layer.name, "one for each network" if own else "one for all")
        (_refit_own if own else _refit_shared)(session, layer, names, targets)
    position.phase, position.step = "finish", 0
    save(session)


def _refit_own(session: Session, layer: Layer, names: list[str], targets: Targets) -> None:
    """A head for each network: the dense network's replaces the model's, the others become private tensors."""
    net, heads, trained, values = session.net, session.heads, layer.head(), layer.trained()
    most = max(1, FEATURE_BYTES // (4 * layer.module.in_features))
    for i, name in enumerate(names[session.position.step :], session.position.step):
        features = _features(session, layer, name, targets, most)
        heads[name] = _fit(session, trained, [features], name)
        session.position.step = i + 1
        emit(session, HeadRefitted(name, i + 1, len(names)))
        save_if_late(session)
    for name in names:
        head = heads[name]
        if name == DENSE:
            if head is not None:
                _write(layer, head)
        elif head is not None:
            net.set_private(name, layer.tensors(head))
        elif heads[DENSE] is not None:  # the dense network's head is no longer the one that was trained
            net.set_private(name, values)
    heads.clear()


def _refit_shared(session: Session, layer: Layer, names: list[str], targets: Targets) -> None:
    """One head for all networks, fitted to the features of all."""
    most = max(1, FEATURE_BYTES // (4 * layer.module.in_features * len(names)))
    features: list[Features | None] = []
    for i, name in enumerate(names):
        features.append(_features(session, layer, name, targets, most))
        emit(session, HeadRefitted(name, i + 1, len(names)))
    head = _fit(session, layer.head(), features, "all networks")
    if head is not None:
        _write(layer, head)


def _fit(session: Session, trained: Head, features: list[Features | None], of: str) -> Head | None:
    """Fitted by the main process, to its own examples, for all processes."""

    def fit() -> Head | None:
        usable = [one for one in features if one is not None]
        if len(usable) < len(features):
            log.info("the model did not call its head once for every batch, on the features of its examples")
            return None
        head = fit_head(trained, usable, session.options.distillation)
        return None if head is None else Head(head.weight.cpu(), None if head.bias is None else head.bias.cpu())

    session.seed("refit")
    head = session.ranks.from_main(fit)
    if head is None:
        log.info("the head of %s stays as it was trained: a refitted one is worse on other training examples", of)
        return None
    device = trained.weight.device
    return Head(head.weight.to(device), None if head.bias is None else head.bias.to(device))


@torch.no_grad()
def _write(layer: Layer, head: Head) -> None:
    for name, value in layer.tensors(head).items():
        getattr(layer.module, name.rpartition(".")[2]).copy_(value)


def _heads_are_own(session: Session, layer: Layer, networks: int) -> bool:
    wanted = session.options.recipe.refit_head
    if wanted != "auto":
        return wanted == "own"
    heads = sum(p.nbytes for p in layer.module.parameters()) * (networks - 1)
    return heads <= OWN_BYTES * sum(p.nbytes for p in session.net.model.parameters())


def _features(session: Session, layer: Layer, name: str, targets: Targets, most: int) -> Features | None:
    """Measure a network's statistics, and keep what its head sees on the way.

    Batch norms normalize by the batch meanwhile. Heads fitted to such features are as good as those fitted to features
    under the network's own statistics, which would take a second pass.

    Returns:
        Of the first ``most`` examples; ``None`` if the head did not see each example once.
    """
    seen: list[Tensor] = []
    rows = 0

    def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal rows
        features = inputs[0] if inputs else named["input"]
        if rows < most:
            seen.append(features.detach().float())
        rows += features.numel() // features.shape[-1]

    handle = layer.module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        recalibrate(session, name)
    finally:
        handle.remove()
    if rows != len(targets.counted) or any(part.ndim != 2 for part in seen):
        return None
    mask = session.net.mask_tensors(name).get(layer.weight)
    counted = targets.counted[:most]
    n = int(counted.sum())
    inputs = torch.cat(seen)[:most][counted]
    teacher = None if targets.teacher is None else targets.teacher[:n]
    return Features(inputs, targets.labels[:n], teacher, None if mask is None else mask.float(), layer.hard)


def _enough_targets(session: Session) -> Targets | None:
    """What heads are fitted to; ``None`` by default if that is too little."""
    targets = _targets(session)
    count = session.ranks.from_main(lambda: len(targets.labels))
    if session.options.recipe.refit_head == "auto" and count < LEAST_EXAMPLES:
        log.info(
            "no classifier head is refitted: there are %d labels in %d training batches, and it takes %d. Give more, "
            "evaluation=EvaluationSettings(recalibration_batches=%d)",
            count,
            session.options.recalibration_batches,
            LEAST_EXAMPLES,
            2 * session.options.recalibration_batches,
        )
        return None
    return targets


@torch.no_grad()
def _targets(session: Session) -> Targets:
    """Labels of the recalibration batches, and the teacher's logits for them."""
    execution, options, model = session.execution, session.options, session.net.model
    assert execution is not None
    assert session.classes is not None
    frozen = execution.frozen
    if frozen is None:
        # the dense network teaches, and its statistics are those of all networks until they are measured
        recalibrate(session, DENSE)
    labels, logits = [], []
    for batch in guarded_batches(session, session.data.recalibration, "train_loader, recalibrating,"):
        with guarded("running the teacher"), evaluating(model) if frozen is None else frozen.active():
            output, target = options.forward_fn(model, inputs_of(batch))
        rows, wanted = session.classes.positions(_logits(output).float(), target)
        labels.append(wanted.long())
        logits.append(rows)
    every = torch.cat(labels)
    counted = session.classes.counted(every)
    return Targets(counted, every[counted], torch.cat(logits)[counted] if options.distillation else None)


def _logits(output: Any) -> Tensor:
    logits = output_tensor(output)
    assert logits is not None
    return logits


def _find_head(session: Session) -> Layer | None:
    """The linear layer whose output the logits are; ``None``, with the reason logged, if it cannot be refitted."""
    wanted = session.options.recipe.refit_head
    if wanted == "none":
        return None
    found = _search(session)
    if session.ranks.any(isinstance(found, str)):  # all processes decide alike
        log.info("no classifier head is refitted: %s", found)
        return None
    assert not isinstance(found, str)
    return replace(found, hard=session.ranks.from_main(lambda: found.hard))


@torch.no_grad()
def _search(session: Session) -> Layer | str:
    model, classes, options = session.net.model, session.classes, session.options
    if classes is None:
        return "the task is not a classification with integer labels"
    outputs: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    handles = [
        m.register_forward_hook(lambda module, inputs, output, name=name: outputs.setdefault(name, []).append(output))
        for name, m in layers.items()
    ]
    rows = labels = torch.empty(0)
    output = target = logits = None
    try:
        for batch in guarded_batches(session, session.data.recalibration, "train_loader, recalibrating,"):
            outputs.clear()
            with guarded("looking for the classifier head"), evaluating(model):
                output, target = options.forward_fn(model, inputs_of(batch))
            logits = output_tensor(output)
            if logits is None or logits.ndim != 2:
                return "the logits do not have the shape (batch, classes)"
            rows, labels = classes.positions(logits, target)
            counted = classes.counted(labels)
            rows, labels = rows[counted], labels[counted].long()
            if len(labels):  # all labels of a batch may be ignored
                break
    finally:
        for handle in handles:
            handle.remove()
    if logits is None or not len(labels):
        return "no label of the training batches counts"
    heads = [
        n for n, seen in outputs.items() if len(seen) == 1 and seen[0].shape == logits.shape and seen[0].equal(logits)
    ]
    if not heads:
        return "no nn.Linear returns the logits"
    name = heads[-1]
    module = layers[name]
    own = [f"{name}.{part}".lstrip(".") for part, p in module._parameters.items() if p is not None]
    if "weight" not in module._parameters:  # torch.nn.utils.weight_norm computes it
        return f"the weight of {name!r} is computed from other parameters"
    users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is module.weight or p is module.bias]
    if set(users) != set(own):
        return f"the weight of {name!r} is tied to {', '.join(n for n in users if n not in own)}"
    if not all(p.requires_grad for p in module.parameters()):
        return f"{name!r} is frozen"
    if is_sharded(module.weight):
        return f"the weight of {name!r} is sharded (FSDP2)"
    try:
        hard = find_hard_loss(options.loss_fn, rows, labels, loss_of(output, target, options.loss_fn))
    except Exception:  # of the user's: it may take only what the model returns in train mode
        hard = None
    if hard is None and options.recipe.refit_head == "auto":
        return (
            "the loss is not the mean cross-entropy of the logits, which a head is fitted with. Choose "
            'refit_head="own" or "shared" in the recipe if it shall be fitted with that anyway'
        )
    return Layer(name, module, hard or HardLoss())
