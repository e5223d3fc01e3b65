"""FlashAttention-3's interface for Hopper on our kernels: its module name, arguments and results, on the CPU too.

Change `from flash_attn_interface import ...` to `from pyops.integrations.flash_attn_interface import ...`. `pack_gqa`,
`sm_margin` and `scheduler_metadata` tune its kernels and mean nothing here, nor does `num_splits` but for decoding.

Source of the interface: github.com/Dao-AILab/flash-attention, directory hopper, version 3.0 beta.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.attention import attention, merge_attention
from . import flash_attn as version2
from .flash_attn import Window, refuse
from .flash_attn_masks import same_chunk, used_rows

Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`pyops.integrations.flash_attn.flash_attn_func` without dropout and ALiBi.

    v may have a head_dim of its own. With ``attention_chunk`` a query sees the keys of the chunk of so many that its
    diagonal lies in, by a mask of (seqlen_q, seqlen_k). ``qv``, ``q_descale``, ``k_descale`` and ``v_descale`` are not
    supported. With ``return_attn_probs``: (output, lse).
    """
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    query, key, value = version2.heads_outside(q, k, v)
    chunks = None
    if attention_chunk > 0:
        chunks = same_chunk(q.shape[1], k.shape[1], attention_chunk, q.device)
    result: Any = attention(
        *(query, key, value),
        causal=causal,
        scale=softmax_scale,
        bias=chunks,
        window=version2.window(window_size),
        softcap=max(softcap, 0.0),
        deterministic=deterministic,
        return_lse=True,
    )
    output, lse = result[0].transpose(1, 2).contiguous(), result[1]
    return (output, lse) if return_attn_probs else output


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of qkv (batch, seqlen, 3, heads, head_dim), or with ``num_heads_q`` of
    (batch, seqlen, heads + 2 * heads_kv, head_dim)."""
    if num_heads_q is None:
        q, k, v = version2.unpack("qkv", qkv, 2, 3)
    else:
        heads_kv, rest = divmod(qkv.shape[2] - num_heads_q, 2)
        if qkv.dim() != 4 or rest or heads_kv < 1:
            raise ValueError(
                f"qkv: expected (batch, seqlen, {num_heads_q} + 2 * heads_kv, head_dim), "
                f"got {tuple(qkv.shape)}"
            )
        q, k, v = qkv.split((num_heads_q, heads_kv, heads_kv), 2)
    descales: Any = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        **descales,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`pyops.integrations.flash_attn.flash_attn_varlen_func`; with ``return_attn_probs``: (output, lse).

    ``seqused_q``, ``seqused_k``: (batch,) int32, how many rows of each sequence count; the other queries give 0, lse
    -inf. The rows that count are copied together first. ``attention_chunk`` and what :func:`flash_attn_func` does not
    support are not supported.
    """
    refuse(attention_chunk=attention_chunk)
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    total, rows = q.shape[0], None
    if seqused_q is not None:
        rows, cu_seqlens_q = used_rows("q", cu_seqlens_q, seqused_q)
        q = q[rows]
    if seqused_k is not None:
        keys, cu_seqlens_k = used_rows("k", cu_seqlens_k, seqused_k)
        k, v = k[keys], v[keys]
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options: Any = (0.0, softmax_scale, causal, window_size, softcap, None, deterministic, True)
    output, lse, _ = version2.flash_attn_varlen_func(q, k, v, *lengths, *options)
    if rows is not None:
        output = output.new_zeros((total, *output.shape[1:])).index_copy(0, rows, output)
        lse = lse.new_full((lse.shape[0], total), -torch.inf).index_copy(1, rows, lse)
    return (output, lse) if return_attn_probs else output


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Result:
    """:func:`pyops.integrations.flash_attn.flash_attn_with_kvcache`; ``page_table`` is its ``block_table``.

    ``cu_seqlens_q``, ``cu_seqlens_k_new``, ``attention_chunk``, ``rotary_seqlens`` other than ``cache_seqlens`` and
    what :func:`flash_attn_func` does not support are not supported.
    """
    refuse(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new)
    refuse(attention_chunk=attention_chunk)
    if rotary_cos is not None and rotary_seqlens is not cache_seqlens:
        refuse(rotary_seqlens=rotary_seqlens)
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    tensors: Any = (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin)
    where: Any = (cache_seqlens, cache_batch_idx, cache_leftpad, page_table)
    scores: Any = (softmax_scale, causal, window_size, softcap, rotary_interleaved, None)
    return version2.flash_attn_with_kvcache(
        *(*tensors, *where, *scores, num_splits, return_softmax_lse)
    )


def get_scheduler_metadata(*arguments: Any, **options: Any) -> None:
    """What FlashAttention-3 prepares for ``scheduler_metadata``: nothing here."""


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them: :func:`pyops.merge_attention`.

    Args:
        out_partial: (num_splits, batch, seqlen, heads, head_dim).
        lse_partial: (num_splits, batch, seqlen, heads). Any strides, both.
        out: where to write the result, (batch, seqlen, heads, head_dim); None is a new tensor.
        out_dtype: of a new tensor; None is ``out_partial``'s.

    Returns:
        (output, lse (batch, seqlen, heads)).
    """
    parts: Any = (out_partial, lse_partial)  # stacked will do for sequences
    merged, lse = merge_attention(*parts)
    if out is None:
        return merged if out_dtype is None else merged.to(out_dtype), lse
    if out_dtype not in (None, out.dtype):
        raise TypeError(f"out: expected out_dtype {out_dtype}, got {out.dtype}")
    if out.shape != merged.shape:
        raise ValueError(f"out: expected shape {tuple(merged.shape)}, got {tuple(out.shape)}")
    return out.copy_(merged), lse
