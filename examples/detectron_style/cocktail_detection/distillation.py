"""What the dense network of a detector teaches the sparse ones: its features, and its class logits where they compare.

Detection losses take no soft targets: boxes are matched to labels, and each network proposes its own. What all networks
have in common are the maps that the backbone returns, and the classes of places that do not depend on proposals. Those
teach no boxes, so they are added to what the labels say; where soft targets take the place of labels, a share of the
labels' loss is given up for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .models import Losses


@dataclass(frozen=True)
class DenseTeacher:
    """The ``loss_fn`` of the trainer's ``DistillationSettings``.

    Attributes:
        features: Weight of the features' part.
        logits: Weight of the logits' part.
        softmax: Whether classes exclude each other; otherwise each is a yes or no of its own.
    """

    features: float = 1.0
    logits: float = 1.0
    softmax: bool = False

    def __call__(self, student: Losses, teacher: Losses) -> dict[str, Tensor]:
        """The parts by name, which the trainer adds: ``(1 - w) L + w (L + D)`` is ``L + w D``."""
        maps = zip(student.features, teacher.features, strict=True)
        parts = {"labels": torch.stack([*student.losses.values()]).sum()} if student.losses else {}
        parts["features"] = self.features * _mean([_apart(s, t) for s, t in maps])
        alike = [(s, t) for s, t in zip(student.logits, teacher.logits, strict=True) if s.shape == t.shape]
        if alike:
            parts["logits"] = self.logits * _mean([self._soft(s, t) for s, t in alike])
        return parts

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.softmax:
            return F.cross_entropy(student.flatten(0, -2), teacher.flatten(0, -2).softmax(-1))
        return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance as a share of the teacher's square. A student that saw smaller images is compared at its size.

    Channels that a student lacks are 0 in it whatever it does, and give no gradient.
    """
    if student.shape != teacher.shape:
        teacher = F.interpolate(teacher, student.shape[-2:], mode="bilinear", align_corners=False)
    return (student - teacher).square().mean() / teacher.square().mean().clamp(min=1e-6)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
