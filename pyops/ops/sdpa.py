"""scaled_dot_product_attention: torch's function, on our kernels wherever they take the call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import backends
from . import _registration as registration
from .attention import plain_attention, top_left_attention
from .attention_checks import MOST_HEAD_DIM

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`: its arguments, results and errors.

    Calls that no kernel of ours takes here (float64, head dims above 256, devices without a proven kernel,
    arguments torch refuses) go to torch's. Dropout draws from torch's default generator, but not torch's own mask.

    Args:
        query: (..., heads, seqlen_q, head_dim), at least 2-D.
        key: (..., heads, seqlen_k, head_dim); value: (..., heads, seqlen_k, v_head_dim). Leading sizes broadcast.
        attn_mask: broadcastable to (..., seqlen_q, seqlen_k): bool, True where attended, or added to the scores.
        dropout_p: probability with which a weight is dropped.
        is_causal: query i attends to keys 0 to i (the diagonal starts at the first key).
        scale: None means ``head_dim ** -0.5``.
        enable_gqa: key and value may have fewer heads than query.
        backend: as for :func:`pyops.attention`; what it is asked for and our op does not take still goes to torch's.

    Returns:
        (..., heads, seqlen_q, v_head_dim)
    """
    if (
        attn_mask is None
        and type(dropout_p) is float
        and dropout_p == 0
        and (backend is None or backend == "cpu")
    ):
        plain = plain_attention(query, key, value, is_causal, scale, True)
        if plain is not None:
            return plain
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if _takes(tensors, dropout_p, is_causal):
        folded = _fold(tensors, enable_gqa)
        if folded is not None:
            (q, k, v, mask), shape = folded
            output, _ = top_left_attention(q, k, v, mask, is_causal, dropout_p, scale, backend)
            return output if shape is None else output.reshape(shape)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _takes(tensors: tuple[Any, ...], dropout_p: Any, is_causal: Any) -> bool:
    """Whether the call is one for our op, up to the sizes before seqlen; what is not goes to torch's."""
    if not all(
        type(t) in (Tensor, Parameter) and not t.is_nested and t.numel() and t.dim() >= 2
        for t in tensors
    ):
        return False  # subclasses too: they may have an answer of their own
    query, key, value, *mask = tensors
    if backends.automatic("attention", query.device)[0][0] == "reference":
        return False
    if not isinstance(is_causal, bool) or not 0 <= dropout_p < 1:
        return False
    autocasting = registration.autocasting(query.device)
    if query.dtype not in _DTYPES or any(t.device != query.device for t in tensors):
        return False
    if mask and mask[0].dtype not in (torch.bool, torch.float32, query.dtype):
        return False
    same_dtype = query.dtype == key.dtype == value.dtype
    return (
        (same_dtype or autocasting)
        and query.dim() == key.dim() == value.dim()
        and key.shape[-1] == query.shape[-1] <= MOST_HEAD_DIM >= value.shape[-1]
        and key.shape[-2] == value.shape[-2]
    )


def _fold(
    tensors: tuple[Any, ...], enable_gqa: bool
) -> tuple[tuple[Any, ...], torch.Size | None] | None:
    """((query, key, value, mask) 4-D, shape of the output if not that of the 4-D call), None if the sizes misfit."""
    query, key, value = tensors[:3]
    mask = tensors[3] if len(tensors) == 4 else None
    rank = query.dim()
    if rank < 4:
        fill = (None,) * (4 - rank)
        query, key, value = query[fill], key[fill], value[fill]
    heads = [t.shape[-3] for t in (query, key, value)]
    if enable_gqa:
        if heads[1] != heads[2] or heads[0] % heads[1]:
            return None
    elif not heads[0] == heads[1] == heads[2]:
        most = max(heads)
        if any(h not in (1, most) for h in heads):
            return None
        shared = heads[1] == heads[2] == 1  # one key/value head is what our op takes as it is
        heads = [most, 1, 1] if shared else [most] * 3
    leading = [t.shape[:-3] for t in (query, key, value)]
    if not leading[0] == leading[1] == leading[2]:
        try:
            leading = [torch.broadcast_shapes(*leading)] * 3
        except RuntimeError:
            return None
    query, key, value = (
        t if t.shape[:-2] == (*lead, h) else t.expand(*lead, h, *t.shape[-2:])
        for t, lead, h in zip((query, key, value), leading, heads, strict=True)
    )
    full = (*leading[0], heads[0], query.shape[-2], key.shape[-2])
    if mask is not None:
        fits = mask.dim() <= rank and all(
            size in (1, whole)
            for size, whole in zip(reversed(mask.shape), reversed(full), strict=False)
        )
        if not fits:
            return None
    if rank == 4:
        return (query, key, value, mask), None
    shape = torch.Size((*full[len(full) - rank : -1], value.shape[-1]))
    if rank > 4:
        query, key, value = (t.flatten(0, -4) for t in (query, key, value))
        if mask is not None and any(size > 1 for size in mask.shape[:-3]):
            mask = mask.expand(*leading[0], *mask.shape[-3:]).flatten(0, -4)
        elif mask is not None and mask.dim() > 4:
            mask = mask.reshape(mask.shape[-4:])
    return (query, key, value, mask), shape
