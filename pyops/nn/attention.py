"""Multi-head attention with torch's constructor, state_dict and results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.sdpa import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` on :func:`pyops.scaled_dot_product_attention`.

    Constructor, parameters, state_dict and outputs are torch's, for self- and cross-attention. Calls with
    ``need_weights=True`` (torch's default) and modules with ``add_bias_kv`` or ``add_zero_attn`` run as in torch:
    the attention weights themselves are what the fused op never writes.

    Shapes: query (L, N, E), key (S, N, kdim), value (S, N, vdim); with ``batch_first`` (N, L, E), ...; unbatched
    (L, E), .... Returns (output of query's shape, None or the weights).
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not takes(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
            return super().forward(
                *(query, key, value, key_padding_mask, need_weights, attn_mask),
                *(average_attn_weights, is_causal),
            )
        return attend(self, query, key, value, key_padding_mask, attn_mask, is_causal), None


def takes(
    module: torch.nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    is_causal: bool,
) -> bool:
    """Whether `attend` gives what torch's forward would; what it refuses torch explains best."""
    if need_weights or module.bias_k is not None or module.add_zero_attn:
        return False
    if not all(isinstance(t, Tensor) and not t.is_nested for t in (query, key, value)):
        return False
    rank = query.dim()
    if rank not in (2, 3) or not rank == key.dim() == value.dim():
        return False
    sequence = 0 if rank == 2 or not module.batch_first else 1
    batch = 1 if rank == 2 else query.shape[1 - sequence]
    sizes = (batch, query.shape[sequence], key.shape[sequence])
    if key.shape[:-1] != value.shape[:-1] or (
        rank == 3 and key.shape[1 - sequence] != query.shape[1 - sequence]
    ):
        return False
    widths = (query.shape[-1], key.shape[-1], value.shape[-1])
    if widths != (module.embed_dim, module.kdim, module.vdim):
        return False
    if is_causal and attn_mask is None:
        return False
    return _mask_fits(attn_mask, _mask_shapes(module, sizes, rank)) and _mask_fits(
        key_padding_mask, ((sizes[2],),) if rank == 2 else ((batch, sizes[2]),)
    )


def _mask_shapes(
    module: torch.nn.MultiheadAttention, sizes: tuple[int, int, int], rank: int
) -> tuple[tuple[int, ...], ...]:
    batch, seqlen_q, seqlen_k = sizes
    per_head = batch * module.num_heads if rank == 3 else module.num_heads
    return (seqlen_q, seqlen_k), (per_head, seqlen_q, seqlen_k)


def _mask_fits(mask: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    return mask is None or (
        isinstance(mask, Tensor)
        and tuple(mask.shape) in shapes
        and (mask.dtype == torch.bool or mask.is_floating_point())
    )


def attend(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    backend: str | None = None,
) -> Tensor:
    """The output of `module` for arguments that `takes` has agreed to."""
    batched = query.dim() == 3
    # (batch, heads, seqlen, head_dim) by strides alone
    order = (0, 2, 1, 3) if module.batch_first or not batched else (1, 2, 0, 3)
    q, k, v = (
        t.unflatten(-1, (module.num_heads, -1))[(None,) * (not batched)].permute(order)
        for t in _project(module, query, key, value)
    )
    if is_causal and key_padding_mask is None and q.shape[2] == k.shape[2]:
        mask = None
    else:
        mask, is_causal = _joined_mask(module, q, key_padding_mask, attn_mask), False
    mixed = scaled_dot_product_attention(
        *(q, k, v, mask, module.dropout if module.training else 0.0, is_causal), backend=backend
    )
    back = (0, 2, 1, 3) if module.batch_first or not batched else (2, 0, 1, 3)
    joined = mixed.permute(back).flatten(2)
    return F.linear(joined if batched else joined[0], module.out_proj.weight, module.out_proj.bias)


def _project(
    module: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    bias = module.in_proj_bias
    weights: tuple[Tensor, ...]
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif query is key and key is value:
        return F.linear(query, module.in_proj_weight, bias).chunk(3, -1)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    each = zip((query, key, value), weights, biases, strict=True)
    return tuple(F.linear(t, weight, b) for t, weight, b in each)


def _joined_mask(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor | None:
    """Both masks as one, broadcastable to (batch, heads, seqlen_q, seqlen_k): bool (True attends) or added."""
    masks = []
    if attn_mask is not None:
        by_head = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, (-1, module.num_heads)) if by_head else attn_mask)
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
        masks.append(padding[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    added = [
        torch.zeros_like(m, dtype=query.dtype).masked_fill_(m, -torch.inf)
        if m.dtype == torch.bool
        else m.to(query.dtype)
        for m in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
