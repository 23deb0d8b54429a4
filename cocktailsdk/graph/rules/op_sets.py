"""Names of ATen ops by what they do to zeros and to shapes, for the rules and for :mod:`.weights`.

The tables stand apart from the rules, so that both sides import them and neither imports the other.
"""

from __future__ import annotations

__all__ = ["ADDITIVE", "FAKE_QUANTIZATION", "KEEP_ZERO", "LOSE_ZERO", "PASSED_ON", "RESHAPES"]

# Functions with f(0) = 0, and some others.
KEEP_ZERO = """
    relu relu6 gelu silu mish hardswish leaky_relu elu selu celu tanh hardshrink softshrink
    rrelu abs neg negative sqrt square sin asin sinh tan atan erf floor ceil round trunc sign expm1 log1p
    nan_to_num sgn rrelu_with_noise absolute zeros_like
""".split()  # noqa: SIM905
LOSE_ZERO = """
    sigmoid hardsigmoid exp exp2 log log2 log10 rsqrt reciprocal cos cosh acos erfc softplus log_sigmoid
    bitwise_not logical_not __or__ __xor__ bitwise_xor isnan isinf isfinite
    rand_like randn_like ones_like full_like empty_like
    erfinv sigmoid_backward eq ne lt le gt ge logical_or logical_xor bitwise_and bitwise_or atan2 remainder fmod
    floor_divide
""".split()  # noqa: SIM905
ADDITIVE = ["add", "sub", "rsub", "where", "maximum", "minimum", "subtract", "fmax", "fmin"]

PASSED_ON = """
    alias clone contiguous detach detach_copy dropout feature_dropout lift_fresh_copy to _to_copy type_as positive
    bernoulli requires_grad feature_alpha_dropout alpha_dropout resolve_conj resolve_neg native_dropout
""".split()  # noqa: SIM905
"""Ops whose result is their operand, or a cast of it, position by position."""

RESHAPES = """
    reshape view _unsafe_view flatten unflatten view_copy squeeze unsqueeze reshape_as view_as ravel
""".split()  # noqa: SIM905
"""Ops that change the shape and keep the order of elements."""

FAKE_QUANTIZATION = frozenset(
    """
    fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine
    fake_quantize_per_tensor_affine_cachemask fused_moving_avg_obs_fake_quant _fused_moving_avg_obs_fq_helper
    """.split()  # noqa: SIM905
)
"""Zero is a point of every affine grid, so a zero weight stays zero."""
