"""After training: one pass over batches gives each network its statistics, and the features that a head is fitted to.

Co-trained weights serve all networks, and so does the last layer, though each network has other features. Fitting the
layer to them afterwards costs no backward pass of the model. On ResNet-20 a head of its own gave unstructured@0.893
3.6 points, channel@0.613 2.5, and networks that were trained alone nothing (``benchmarks/trained.py``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..patterns.base import DENSE
from ..utils.fsdp import is_sharded
from ..utils.modes import evaluating
from .checkpoints import save, save_if_late
from .distributed.sharing import inputs_of
from .evaluation import recalibrate
from .events import HeadRefitted
from .head_fit import Features, Head, fit_head
from .session import Session
from .step.forward import output_tensor
from .user_code import emit, guarded, guarded_batches

__all__ = ["refit_head"]

log = logging.getLogger(__name__)

OWN_BYTES = 0.1
"""With ``refit_head="auto"``, networks get heads of their own if these take at most this part of the model's bytes."""
FEATURE_BYTES = 1 << 29
"""Memory for the features of all networks at once, for a shared head; fewer examples are taken beyond it."""


@dataclass(frozen=True)
class Layer:
    """The model's classifier head.

    Attributes:
        name: Path of the module.
        module: The last linear layer.
    """

    name: str
    module: nn.Linear

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
        bias = self.module.bias
        return Head(
            self.module.weight.detach().float().clone(), None if bias is None else bias.detach().float().clone()
        )

    def tensors(self, head: Head) -> dict[str, Tensor]:
        """A head's values as the layer's parameters, by name."""
        out = {self.weight: head.weight.to(self.module.weight.dtype)}
        if head.bias is not None:
            out[self.bias] = head.bias.to(self.module.weight.dtype)
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
    if layer is not None:
        own = _heads_are_own(session, layer, len(names))
        log.info("refitting the classifier head %r: %s", layer.name, "one for each network" if own else "one for all")
        (_refit_own if own else _refit_shared)(session, layer, names, _targets(session))
    position.phase, position.step = "finish", 0
    save(session)


def _refit_own(session: Session, layer: Layer, names: list[str], targets: Targets) -> None:
    """A head for each network: the dense network's replaces the model's, the others become private tensors."""
    net, heads, trained = session.net, session.heads, layer.head()
    for i, name in enumerate(names[session.position.step :], session.position.step):
        features = _features(session, layer, name, targets)
        heads[name] = _fit(session, trained, [features], name)
        session.position.step = i + 1
        emit(session, HeadRefitted(name, i + 1, len(names)))
        save_if_late(session)
    for name in names:
        head = heads[name] or trained
        if name == DENSE:
            _write(layer, head)
        elif heads[name] or heads[DENSE]:  # the dense network's head is no longer the one that was trained
            net.set_private(name, layer.tensors(head))
    heads.clear()


def _refit_shared(session: Session, layer: Layer, names: list[str], targets: Targets) -> None:
    """One head for all networks, fitted to the features of all."""
    most = max(1, FEATURE_BYTES // (4 * layer.module.in_features * len(names)))
    features = []
    for i, name in enumerate(names):
        features.append(_features(session, layer, name, targets).part(0, most))
        emit(session, HeadRefitted(name, i + 1, len(names)))
    head = _fit(session, layer.head(), features, "all networks")
    if head is not None:
        _write(layer, head)


def _fit(session: Session, trained: Head, features: list[Features], of: str) -> Head | None:
    """Fitted by the main process, to its own examples, for all processes."""

    def fit() -> Head | None:
        head = fit_head(trained, features, session.options.distillation)
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


def _features(session: Session, layer: Layer, name: str, targets: Targets) -> Features:
    """Measure a network's statistics, and keep what its head sees on the way.

    Batch norms normalize by the batch meanwhile. Heads fitted to such features are as good as those fitted to features
    under the network's own statistics, which would take a second pass.
    """
    seen: list[Tensor] = []
    handle = layer.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().float()))
    try:
        recalibrate(session, name)
    finally:
        handle.remove()
    mask = session.net.mask_tensors(name).get(layer.weight)
    inputs = torch.cat(seen)[targets.counted]
    return Features(inputs, targets.labels, targets.teacher, None if mask is None else mask.float())


@torch.no_grad()
def _targets(session: Session) -> Targets:
    """Labels of the recalibration batches, and the teacher's logits for them."""
    execution, options, model = session.execution, session.options, session.net.model
    assert execution is not None
    assert session.classes is not None
    frozen = execution.frozen
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
    if session.options.recipe.refit_head == "none":
        return None
    found = _search(session)
    if isinstance(found, str):
        log.info("no classifier head is refitted: %s", found)
        return None
    return found


@torch.no_grad()
def _search(session: Session) -> Layer | str:
    model, classes = session.net.model, session.classes
    if classes is None:
        return "the task is not a classification with integer labels"
    outputs: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    handles = [
        m.register_forward_hook(lambda module, inputs, output, name=name: outputs.setdefault(name, []).append(output))
        for name, m in layers.items()
    ]
    try:
        batch = next(iter(guarded_batches(session, session.data.recalibration, "train_loader, recalibrating,")))
        with guarded("looking for the classifier head"), evaluating(model):
            output, _ = session.options.forward_fn(model, inputs_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    logits = output_tensor(output)
    if logits is None or logits.ndim != 2:
        return "the logits do not have the shape (batch, classes)"
    heads = [
        n for n, seen in outputs.items() if len(seen) == 1 and seen[0].shape == logits.shape and seen[0].equal(logits)
    ]
    if not heads:
        return "no nn.Linear returns the logits"
    module = layers[heads[-1]]
    users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is module.weight or p is module.bias]
    if len(users) != 1 + (module.bias is not None):
        return f"the weight of {heads[-1]!r} is tied to {', '.join(users)}"
    if not module.weight.requires_grad:
        return f"{heads[-1]!r} is frozen"
    if is_sharded(module.weight):
        return f"the weight of {heads[-1]!r} is sharded (FSDP2)"
    return Layer(heads[-1], module)
