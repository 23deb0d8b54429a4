"""``nn.MultiheadAttention`` with fewer heads, or on a stream of fewer channels, than its own code can express."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["SlimMultiheadAttention"]


class SlimMultiheadAttention(nn.MultiheadAttention):
    """Attention whose heads have the width that they had, whatever is left of the stream and of the heads.

    PyTorch's own takes the width of a head from the width of the stream, so that it cannot lose either by itself. Names
    of parameters are the same.

    Args:
        narrowed: A module whose parameters were cut.
        head_dim: Width of a head.
    """

    def __init__(self, narrowed: nn.MultiheadAttention, head_dim: int) -> None:
        # nn.MultiheadAttention.__init__ would allocate full-size weights and refuse widths that heads do not divide.
        nn.Module.__init__(self)
        for name in (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "in_proj_bias",
            "bias_k",
            "bias_v",
        ):
            self.register_parameter(name, getattr(narrowed, name))
        self.out_proj = narrowed.out_proj
        self.dropout, self.batch_first = narrowed.dropout, narrowed.batch_first
        self.add_zero_attn = narrowed.add_zero_attn
        self.head_dim = head_dim
        # The output projection reads all heads side by side, so its input width is heads x head_dim.
        self.num_heads = self.out_proj.weight.shape[1] // head_dim
        matrices = self._matrices()
        self.embed_dim, self.kdim, self.vdim = (m.shape[1] for m in matrices)
        self._qkv_same_embed_dim = False  # keeps layers around this one from running its weights in one fused op

    def _matrices(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :class:`torch.nn.MultiheadAttention`: the same arguments, the same results."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), self._matrices(), biases, strict=True))
        mask = self._mask(attn_mask, key_padding_mask, q, batched)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([t, b.expand(t.shape[0], -1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        # Appended before heads are split, which gives each head its part of the bias, or zeros.
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, batched: bool
    ) -> Float[Tensor, "..."] | None:
        """Both masks in one, to be added to the scores of (batch, heads, queries, keys)."""
        mask = None
        if attn_mask is not None:
            mask = _added(attn_mask, q)
            if mask.dim() == 3:  # (batch * heads, queries, keys), with all the heads that there were
                mask_heads = mask.shape[0] // q.shape[0]
                mask = mask.unflatten(0, (q.shape[0], mask_heads))
                # A mask for each original head cannot be assigned to the surviving heads; masks of all heads are taken
                # to be equal.
                mask = mask if mask_heads in (1, self.num_heads) else mask[:, :1].expand(-1, self.num_heads, -1, -1)
        if padding is not None:
            own = _added(padding if batched else padding[None], q)[:, None, None]
            mask = own if mask is None else mask + own
        return mask


def _added(mask: Bool[Tensor, "..."] | Float[Tensor, "..."], like: Tensor) -> Float[Tensor, "..."]:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)
