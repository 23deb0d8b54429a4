"""Modules and functions that replace layers which cannot simply be narrowed in a slim model."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import SlimError

__all__ = [
    "SlimGroupNorm",
    "SlimLayerNorm",
    "SlimRMSNorm",
    "expect",
    "expect_still",
    "layer_norm_of_all",
    "mean_of_all",
    "standardised_of_all",
    "variance_of_all",
]


class _SlimNorm(nn.Module):
    """A norm that counts removed channels as zeros.

    Attributes:
        channels: How many channels the original normalised over.
        axis: The channel axis of the input.
        eps: Added to the variance; ``None`` for the smallest that the input's dtype resolves.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter | None, bias: nn.Parameter | None, *, channels: int, axis: int, eps: float | None
    ) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.channels, self.axis, self.eps = channels, axis, eps

    def _eps(self, x: Float[Tensor, "..."]) -> float:
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps

    def _affine(self, y: Float[Tensor, "..."], axis: int) -> Float[Tensor, "..."]:
        view = [1] * y.dim()
        view[axis] = -1
        if self.weight is not None:
            y = y * self.weight.view(view)
        if self.bias is not None:
            y = y + self.bias.view(view)
        return y

    def extra_repr(self) -> str:
        """The text in a printed model."""
        return f"channels={self.channels}, axis={self.axis}, eps={self.eps}"


class SlimLayerNorm(_SlimNorm):
    """LayerNorm whose statistics count the absent channels as zeros.

    With C channels in the original and C' left, of mean m = Σx / C: the variance is (Σ(x-m)² + (C-C')m²) / C.
    """

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Normalises ``x`` along its channel axis; shape and dtype stay."""
        axis = self.axis % x.dim()
        y = _standardised(_wide(x), (axis,), self.channels, self.channels - x.shape[axis], self._eps(x))
        return self._affine(y.to(x.dtype), axis)


class SlimRMSNorm(_SlimNorm):
    """RMSNorm whose mean square counts the absent channels as zeros."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Normalises ``x`` along its channel axis; shape and dtype stay."""
        axis = self.axis % x.dim()
        wide = _wide(x)
        square = wide.square().sum(axis, keepdim=True) / self.channels
        return self._affine((wide * torch.rsqrt(square + self._eps(x))).to(x.dtype), axis)


class SlimGroupNorm(_SlimNorm):
    """GroupNorm with one group, whose statistics count the absent channels as zeros."""

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Normalises each sample over channels and positions; shape and dtype stay."""
        positions = x.shape[2:].numel()
        count, absent = self.channels * positions, (self.channels - x.shape[1]) * positions
        y = _standardised(_wide(x), tuple(range(1, x.dim())), count, absent, self._eps(x))
        return self._affine(y.to(x.dtype), 1)


def _wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    # Half precision loses the mean of squares of large activations; torch's own norms accumulate in float32, too.
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _standardised(
    x: Float[Tensor, "..."], dims: tuple[int, ...], count: int, absent: int, eps: float
) -> Float[Tensor, "..."]:
    """``x`` less its mean, divided by its standard deviation; of the ``count`` elements the absent ones are zero."""
    mean = x.sum(dims, keepdim=True) / count
    centred = x - mean
    variance = (centred.square().sum(dims, keepdim=True) + absent * mean.square()) / count
    return centred * torch.rsqrt(variance + eps)


def mean_of_all(x: Float[Tensor, "..."], dim: tuple[int, ...], keepdim: bool, share: float) -> Float[Tensor, "..."]:
    """A mean that counts absent channels as zeros.

    Args:
        x: What is left.
        dim: The dimensions to reduce.
        keepdim: Keep them with size 1.
        share: How much of the original is left along these dimensions.
    """
    return x.mean(dim, keepdim=keepdim) * share


def variance_of_all(
    x: Float[Tensor, "..."], dim: tuple[int, ...], keepdim: bool, share: float, correction: float, root: bool
) -> Float[Tensor, "..."]:
    """A variance that counts absent channels as zeros, each as far from the mean as the mean is from zero.

    Args:
        x: What is left.
        dim: The dimensions to reduce.
        keepdim: Keep them with size 1.
        share: How much of the original is left along these dimensions.
        correction: Taken from the count, as in :func:`torch.var`.
        root: Return the standard deviation.
    """
    present = prod(x.shape[d] for d in dim)
    count = round(present / share)
    mean = x.sum(dim, keepdim=True) / count
    total = (x - mean).square().sum(dim, keepdim=True) + (count - present) * mean.square()
    variance = total / max(count - correction, 0)
    variance = variance if keepdim else variance.squeeze(tuple(dim))
    return variance.sqrt() if root else variance


def layer_norm_of_all(
    x: Float[Tensor, "... channels"],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    eps: float,
    channels: int,
) -> Float[Tensor, "... channels"]:
    """LayerNorm over the last dimension that counts absent channels as zeros; see :class:`SlimLayerNorm`."""
    y = _standardised(x, (-1,), channels, channels - x.shape[-1], eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def standardised_of_all(
    x: Float[Tensor, "1 out fan_in"],
    weight: Float[Tensor, " out"] | None,
    bias: Float[Tensor, " out"] | None,
    eps: float,
    share: float,
) -> Float[Tensor, "1 out fan_in"]:
    """Rows of a weight standardised (batch norm by their own statistics), counting absent inputs as zeros.

    Args:
        x: What is left of the weight.
        weight: Scale of each row.
        bias: Offset of each row.
        eps: Added to the variance.
        share: How much of the original fan-in is left.
    """
    mean = x.mean((0, 2), keepdim=True) * share
    centred = x - mean
    variance = centred.square().mean((0, 2), keepdim=True) * share + (1 - share) * mean.square()
    y = centred * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight.view(1, -1, 1)
    return y if bias is None else y + bias.view(1, -1, 1)


def expect(value: object, constant: object, name: str) -> None:
    """Refuses a call for which a rewritten forward was not made.

    Raises:
        SlimError: Where an optional argument has another value than when the model was slimmed.
    """
    if value is not constant and (isinstance(value, torch.Tensor) or value != constant):
        raise SlimError(
            f"this slim module was made for {name}={constant!r}, but was called with {name} of type "
            f"{type(value).__name__}; slim the model with example inputs that give {name}, or exclude the module."
        )


def expect_still(condition: object, was: bool) -> None:
    """Refuses sizes for which a rewritten forward was not made.

    Args:
        condition: The condition that the code branches on.
        was: Its value on the example inputs.

    Raises:
        SlimError: Where it has come out otherwise.
    """
    if bool(condition) is not was:
        raise SlimError(
            "this slim module's code was rewritten for the sizes of the example inputs, and would branch otherwise for "
            "these; slim the model with example inputs of such sizes, or exclude the module."
        )
