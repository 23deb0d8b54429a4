"""Complex numbers and Fourier transforms, which mix the dimensions that they run along and no others."""

from __future__ import annotations

from torch import fx

from ..labels import Fields
from .elementwise import all_zero, combine, first_zero
from .movement import moved
from .reduction import mixed
from .registry import Context, Result, argument, rule


@rule("view_as_complex")
def to_complex(ctx: Context, node: fx.Node) -> Result:
    """Pairs along the last dimension become one number."""
    last = len(ctx.shape(node.args[0])) - 1
    return moved(ctx.collapse(ctx.fields(node.args[0]), {last}), lambda labels: labels.squeeze(last))


@rule("view_as_real")
def to_real(ctx: Context, node: fx.Node) -> Result:
    """One number becomes a pair along a new last dimension."""
    return moved(ctx.fields(node.args[0]), lambda labels: labels.unsqueeze(-1))


@rule("real", "imag", "angle", "conj", "_conj", "conj_physical", "resolve_conj", "resolve_neg")
def parts(ctx: Context, node: fx.Node) -> Result:
    """A part of each number (the angle of zero is zero), or its conjugate."""
    return ctx.fields(node.args[0])


@rule("complex")
def pair(ctx: Context, node: fx.Node) -> Result:
    """Real and imaginary part: zero where both are."""
    return combine(ctx, node.args[:2], ctx.shape(node), all_zero)


@rule("polar")
def polar(ctx: Context, node: fx.Node) -> Result:
    """Radius and angle: zero where the radius is."""
    return combine(ctx, node.args[:2], ctx.shape(node), first_zero)


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def fourier(ctx: Context, node: fx.Node) -> Result:
    """Along one dimension, the last unless told."""
    return _along(ctx, node, [int(argument(node, "dim", -1))])


@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn")
def fourier_of_several(ctx: Context, node: fx.Node) -> Result:
    """Along several dimensions: the last two, or all, unless told."""
    rank = len(ctx.shape(node.args[0]))
    dims = argument(node, "dim")
    if dims is None:
        sizes = argument(node, "s")
        dims = range(rank) if sizes is None else range(rank - len(sizes), rank)
    return _along(ctx, node, [int(d) for d in dims])


def _along(ctx: Context, node: fx.Node, dims: list[int]) -> Fields:
    rank = len(ctx.shape(node.args[0]))
    return mixed(ctx, ctx.fields(node.args[0]), [d % rank for d in dims], absent_zeros_count=True)[0]
