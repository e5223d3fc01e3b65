"""Attention in Triton: the entry points, each taking its schema's arguments."""

import torch

from .attention_backward import run_backward
from .attention_call import Call, Options, supports
from .attention_forward import run_forward

__all__ = ["backward", "forward", "supports"]


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
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
    """softmax(score) @ value and the scores' log-sum-exp.

    query: (batch, heads, seqlen_q, head_dim), key: (batch, kv_heads, seqlen_k, head_dim), value:
    (batch, kv_heads, seqlen_k, value_dim), any strides with unit last one; bias: float or bool,
    4-D, each size 1 or full; alibi_slopes: float32, (heads,) or (batch,
    heads); sinks: float32, (heads,); rng_state: int64 (seed, offset). The output is in the query's
    layout and dtype; lse is float32, (batch, heads, seqlen_q).
    """
    options = Options(scale, softcap, window_left, window_right, top_left, dropout_p)
    return run_forward(Call(query, key, value, options, None, bias, alibi_slopes, sinks, rng_state))


def backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    dropout_p: float,
    output_mask: tuple[bool, bool, bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (query, key, value, bias, sinks), each an empty (0,) tensor where `output_mask`
    is False.

    Arguments as `forward`'s; output and lse are its results. Gradients are in their tensor's layout
    and dtype; the bias's is summed over the dimensions in which the bias is broadcast; the sinks'
    is float32. A bool bias has no gradient.
    """
    options = Options(scale, softcap, window_left, window_right, top_left, dropout_p)
    call = Call(query, key, value, options, None, bias, alibi_slopes, sinks, rng_state)
    return run_backward(call, grad_output, grad_lse, output, lse, output_mask)
