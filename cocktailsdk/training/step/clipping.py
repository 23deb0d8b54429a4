"""Gradient clipping by the norms that the run itself has had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...utils.fsdp import local
from .hooks import StepContext, StepHook

__all__ = ["AutoClip"]


class AutoClip(StepHook):
    """Clip gradients to a quantile of the norms of the last steps (Seetharaman et al. 2020, "AutoClip").

    The networks of a run have gradients of very different sizes: from trained weights, those of narrow channel subnets
    are three times as long as the dense network's. Unclipped, they undo what the others learned, and the learning rate
    has to be small for all. What is long depends on model, loss and stage of the run, so no constant limit would do.

    Args:
        quantile: Of the norms, in (0, 1).
        window: How many of the last steps count.

    Raises:
        TrainingError: An argument is out of its range.
    """

    def __init__(self, quantile: float = 0.7, window: int = 100) -> None:
        if not 0 < quantile < 1:
            raise TrainingError(f"AutoClip: quantile must be between 0 and 1, not {quantile!r}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise TrainingError(f"AutoClip: window is a number of steps, at least 1, not {window!r}")
        self.quantile, self.window = quantile, window
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def before_update(self, context: StepContext) -> None:
        """Shorten gradients that are longer than the quantile."""
        with_gradient = [p for p in context.parameters.values() if p.grad is not None]
        if not with_gradient:
            return
        norm = nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
        if (whole := getattr(norm, "full_tensor", None)) is not None:  # of sharded gradients (FSDP2)
            norm = whole()
        # norms stay on their device, so that no step waits for it; an overflow (fp16) counts as no number
        self._norms.append(torch.where(norm.isfinite(), norm, torch.nan).float())
        del self._norms[: -self.window]
        limit = torch.stack(self._norms).nanquantile(self.quantile)
        share = (limit / norm.clamp(min=torch.finfo(norm.dtype).tiny)).nan_to_num(nan=1.0).clamp(max=1.0)
        for p in with_gradient:
            assert p.grad is not None
            local(p.grad).mul_(share)

    def state_dict(self) -> dict[str, Any]:
        """The norms that count."""
        return {"norms": torch.stack(self._norms)} if self._norms else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the norms of a saved run."""
        self._norms = list(state["norms"]) if "norms" in state else []
