"""Attention of packed sequences in Triton: the entry points, each taking its schema's arguments."""

import torch

from .attention_backward import run_backward
from .attention_call import Call, Options, Packed, supports
from .attention_forward import run_forward

__all__ = ["backward", "forward", "supports"]


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` of packed sequences: query (total_q, heads, head_dim), key and value (total_k,
    kv_heads, ...), sequence b from cu_seqlens[b] to cu_seqlens[b + 1]; lse is (heads, total_q).

    Rows past the last sequence give 0 and -inf. The grid is that of the longest sequences, so that
    the device need not be asked.
    """
    options = Options(scale, softcap, window_left, window_right, top_left, dropout_p)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return run_forward(
        Call(query, key, value, options, packed, None, alibi_slopes, sinks, rng_state)
    )


def backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    dropout_p: float,
    output_mask: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward` of packed sequences: gradients of (query, key, value, sinks); 0 in rows past the
    last sequence.
    """
    options = Options(scale, softcap, window_left, window_right, top_left, dropout_p)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = Call(query, key, value, options, packed, None, alibi_slopes, sinks, rng_state)
    mask = (*output_mask[:3], False, output_mask[3])
    grad_query, grad_key, grad_value, _, grad_sinks = run_backward(
        call, grad_output, grad_lse, output, lse, mask
    )
    return grad_query, grad_key, grad_value, grad_sinks
