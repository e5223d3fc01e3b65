"""flash-attn's functions on our kernels: its names, arguments, layout and results, on the CPU too.

Change `from flash_attn import ...` to `from pyops.integrations.flash_attn import ...`. Tensors are
(batch, seqlen, heads, head_dim); every head dim and float32 are taken as well. Inputs are read where they lie; the
output is contiguous, as flash-attn's is.

Source of the interface: github.com/Dao-AILab/flash-attention, version 2.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import attention
from ..ops.attention_decode import attention_decode
from ..ops.attention_varlen import attention_varlen
from .flash_attn_masks import DropoutSigns, packed_pages

Window = Sequence[int | None] | Tensor
Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`pyops.attention` in flash-attn's layout.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads.
        softmax_scale: None means ``head_dim ** -0.5``.
        causal: the last query sees the last key.
        window_size: keys before and after the diagonal, two numbers or a tensor of two; negative or None is
            unlimited.
        softcap: 0 or less leaves the scores.
        alibi_slopes: (heads,) or (batch, heads), float32.
        deterministic: results never depend on anything but the inputs, whatever it says.
        return_attn_probs: return (output, lse, S_dmask), for tests of dropout.

    Returns:
        (batch, seqlen_q, heads, head_dim); lse is (batch, heads, seqlen_q), float32, natural log. S_dmask, computed
        apart in plain torch, is empty without dropout, else (batch, heads, seqlen_q, seqlen_k) in q's dtype:
        exp(score - the row's greatest), negative where dropout has dropped it.

    Raises:
        TypeError, ValueError: as :func:`pyops.attention`, whose ``query``, ``key``, ``value`` and ``scale`` these are.
    """
    tensors = heads_outside(q, k, v)
    scores: Any = {
        "causal": causal,
        "scale": softmax_scale,
        "window": window(window_size),
        "softcap": max(softcap, 0.0),
        "dropout_p": dropout_p,
    }
    signs = DropoutSigns(q, dropout_p) if return_attn_probs else None
    result: Any = attention(
        *tensors,
        **scores,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_lse=True,
    )
    output, lse = result
    output = output.transpose(1, 2).contiguous()
    if signs is None:
        return output
    return output, lse, signs.dense(*tensors[:2], alibi_slopes, scores)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of qkv (batch, seqlen, 3, heads, head_dim)."""
    common: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = unpack("qkv", qkv, 2, 3)
    options: Any = (*common, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of kv (batch, seqlen_k, 2, heads_kv, head_dim)."""
    common: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    k, v = unpack("kv", kv, 2, 2)
    options: Any = (*common, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """:func:`pyops.attention_varlen`: sequences packed one after another, those of length zero too.

    Args:
        q: (total_q, heads, head_dim); k, v: (total_k, heads_kv, head_dim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32: where each sequence starts and the last ends.
        max_seqlen_q, max_seqlen_k: length of the longest.
        block_table: (batch, max_blocks) int32, and then k, v: (blocks, block_size, heads_kv, head_dim): the keys are
            copied out of the pages first, so for few queries :func:`flash_attn_with_kvcache` is faster.

    The other arguments are those of :func:`flash_attn_func`.

    Returns:
        (total_q, heads, head_dim); lse is (heads, total_q), S_dmask (batch, heads, max_seqlen_q, max_seqlen_k).
    """
    if block_table is not None:
        k, v = packed_pages(k, v, cu_seqlens_k, block_table)
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scores: Any = {
        "causal": causal,
        "scale": softmax_scale,
        "window": window(window_size),
        "softcap": max(softcap, 0.0),
        "dropout_p": dropout_p,
    }
    signs = DropoutSigns(q, dropout_p) if return_attn_probs else None
    result: Any = attention_varlen(
        *(q, k, v, *lengths),
        **scores,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_lse=True,
    )
    output, lse = result
    if signs is None:
        return output
    return output, lse, signs.packed(q, k, lengths, alibi_slopes, scores)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of qkv (total, 3, heads, head_dim)."""
    common: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    lengths: Any = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options: Any = (*common, deterministic, return_attn_probs)
    return flash_attn_varlen_func(*unpack("qkv", qkv, 1, 3), *lengths, *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of kv (total_k, 2, heads_kv, head_dim)."""
    common: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options: Any = (*common, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, *unpack("kv", kv, 1, 2), *lengths, *options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyops.attention_decode`: append k and v to the caches in place, then attend to what is in them.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (batch_cache, capacity, heads_kv, head_dim), or with ``block_table``
            (blocks, block_size, heads_kv, head_dim), any block size.
        k, v: (batch, seqlen_new, heads_kv, head_dim), written behind what is there.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2).
        cache_seqlens: (batch,) int32 or an int: what was in the cache before; None is all of it.
        cache_batch_idx: (batch,) int32: which entry of the caches is each sequence's; distinct where k is given.
        cache_leftpad: (batch,) int32: keys before it are not seen.
        block_table: (batch, max_blocks) int32; with ``cache_batch_idx`` that chooses among its rows.
        num_splits: among how many parts of the keys the work is split; 0 chooses.

    The other arguments are those of :func:`flash_attn_func`. There is no gradient.

    Returns:
        (batch, seqlen_q, heads, head_dim); with ``return_softmax_lse`` also lse, (batch, heads, seqlen_q).
    """
    if cache_batch_idx is not None:
        # Without a table, a cache is a page as long as it is.
        rows = cache_batch_idx[:, None] if block_table is None else block_table
        block_table = rows if block_table is None else rows[cache_batch_idx.long()]
    query, k_cache, v_cache = heads_outside(q, k_cache, v_cache)
    key, value = (None if t is None else t.transpose(1, 2) for t in (k, v))
    result: Any = attention_decode(
        query,
        k_cache,
        v_cache,
        key=key,
        value=value,
        cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        scale=softmax_scale,
        alibi_slopes=alibi_slopes,
        window=window(window_size),
        softcap=max(softcap, 0.0),
        num_splits=num_splits,
        return_lse=True,
    )
    output, lse = result
    output = output.transpose(1, 2).contiguous()
    return (output, lse) if return_softmax_lse else output


def heads_outside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (batch, heads, seqlen, head_dim) of flash-attn's tensors."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, seqlen, heads, head_dim), got {tuple(tensor.shape)}"
            )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def unpack(name: str, packed: Tensor, dim: int, count: int) -> Any:
    """The `count` tensors stacked at `dim`, as views."""
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed).__name__}")
    if packed.dim() != dim + 3 or packed.shape[dim] != count:
        raise ValueError(
            f"{name}: expected {dim + 3} dimensions, {count} long at dimension {dim}, "
            f"got {tuple(packed.shape)}"
        )
    return packed.unbind(dim)


def window(window_size: Any) -> Any:
    """pyops.attention's window; what is no pair is left for its check to refuse."""
    if isinstance(window_size, torch.Tensor):
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)):
        return window_size
    return tuple(None if side is None or side < 0 else side for side in window_size)


def refuse(**unsupported: Any) -> None:
    """Raise for the first argument that is given (not None, 0 or False)."""
    for name, value in unsupported.items():
        if isinstance(value, torch.Tensor) or value:
            raise NotImplementedError(f"{name}: not supported by pyops, leave it at its default")
