"""attention in plain torch: every option, in float32 (float64 for float64), rounded once at the end.

Memory is quadratic in the sequence length: this is the oracle and the fallback, not the fast path.
Differentiable to any order; rows with nothing to attend to give 0, lse -inf and gradients 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionSpec(NamedTuple):
    """Everything but tensors, normalised, in the order of the op's schema."""

    scale: float
    softcap: float  # 0: none
    window_left: int  # -1: unlimited
    window_right: int
    top_left: bool  # the diagonal starts at the first key, not ends at the last
    dropout_p: float


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where scores, sums and lse live."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lies_heads_inside(tensor: Tensor) -> bool:
    """Whether (batch, heads, seqlen, head_dim) lies in memory as (batch, seqlen, heads, head_dim).

    The op's rule for the layout of its results; csrc/cpu/attention.cpp has the same.
    """
    return not tensor.is_contiguous() and tensor.transpose(1, 2).is_contiguous()


def visible(seqlen_q: int, seqlen_k: int, spec: AttentionSpec, device: torch.device) -> Tensor:
    """(seqlen_q, seqlen_k) bool: the keys within each query's window."""
    ahead = -_behind_diagonal(seqlen_q, seqlen_k, spec, device)
    mask = torch.ones_like(ahead, dtype=torch.bool)
    if spec.window_left >= 0:
        mask = mask & (ahead >= -spec.window_left)
    if spec.window_right >= 0:
        mask = mask & (ahead <= spec.window_right)
    return mask


def _behind_diagonal(
    seqlen_q: int, seqlen_k: int, spec: AttentionSpec, device: torch.device
) -> Tensor:
    """(seqlen_q, seqlen_k): how many keys before its row's diagonal each key stands."""
    shift = 0 if spec.top_left else seqlen_k - seqlen_q
    rows = torch.arange(seqlen_q, device=device)[:, None] + shift
    return rows - torch.arange(seqlen_k, device=device)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    spec: AttentionSpec,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of the op `attention`; bias 4-D, each size 1 or full.

    For dropout, batch element b counts as number first + b.
    """
    batch, heads, seqlen_q, _ = query.shape
    dtype = compute_dtype(query.dtype)
    scores = masked_scores(query, key, bias, alibi_slopes, spec)
    probabilities, lse = softmax_with_lse(scores, None if sinks is None else sinks.to(dtype))
    if rng_state is not None:
        keep = dropout_keep(rng_state, scores.shape, spec.dropout_p, first)
        probabilities = probabilities * keep.to(dtype) / (1 - spec.dropout_p)
    output = _grouped(probabilities, key.shape[1]) @ value.to(dtype)
    output = output.reshape(batch, heads, seqlen_q, value.shape[3]).to(query.dtype)
    return in_layout_of(query, output), lse


def _grouped(tensor: Tensor, heads_kv: int) -> Tensor:
    """The queries of one key/value head under each other."""
    batch, heads, seqlen_q, width = tensor.shape
    return tensor.reshape(batch, heads_kv, heads // heads_kv * seqlen_q, width)


def masked_scores(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    spec: AttentionSpec,
) -> Tensor:
    """What softmax is taken of: (batch, heads, seqlen_q, seqlen_k), -inf where nothing is seen."""
    batch, heads, seqlen_q, _ = query.shape
    heads_kv, seqlen_k = key.shape[1:3]
    dtype = compute_dtype(query.dtype)
    scores = _grouped(query.to(dtype), heads_kv) @ key.to(dtype).transpose(2, 3) * spec.scale
    scores = scores.reshape(batch, heads, seqlen_q, seqlen_k)
    if spec.softcap > 0:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if alibi_slopes is not None:
        distance = _behind_diagonal(seqlen_q, seqlen_k, spec, query.device).abs()
        scores = scores - alibi_slopes.to(dtype)[..., None, None] * distance
    hidden = torch.zeros((), dtype=torch.bool, device=query.device)
    if bias is not None and bias.dtype == torch.bool:
        hidden = hidden | ~bias
    elif bias is not None:
        scores = scores + bias.to(dtype)
    if spec.window_left >= 0 or spec.window_right >= 0:
        hidden = hidden | ~visible(seqlen_q, seqlen_k, spec, query.device)
    return scores.masked_fill(hidden, float("-inf"))


def in_layout_of(query: Tensor, output: Tensor) -> Tensor:
    """output, copied if need be, in the layout that the op gives it."""
    if lies_heads_inside(query):
        return output.transpose(1, 2).contiguous().transpose(1, 2)
    return output.contiguous()


def softmax_with_lse(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(probabilities, log-sum-exp) over the last dimension; sinks (heads,) join the sum.

    torch's own softmax and logsumexp have NaN gradients where a whole row is -inf.
    """
    seqlen_k = scores.shape[-1]
    top = scores.detach().amax(-1) if seqlen_k else scores.new_full(scores.shape[:-1], -torch.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach()[:, None])
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None] - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    return weights / total[..., None], lse


def dropout_keep(
    rng_state: Tensor, shape: Sequence[int], dropout_p: float, first: int = 0
) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k) bool: the probabilities that dropout keeps.

    Element (b, h, i, j) is word j % 4 of Philox4x32-10 with the seed as key and
    (j // 4, i, (first + b) * heads + h, offset) as counter; it is kept if the word is at least dropout_p * 2**32.
    """
    batch, heads, seqlen_q, seqlen_k = shape
    device = rng_state.device
    seed, offset = rng_state.unbind()
    words = philox4x32(
        torch.arange((seqlen_k + 3) // 4, device=device),
        torch.arange(seqlen_q, device=device)[:, None],
        torch.arange(batch * heads, device=device)[:, None, None] + first * heads,
        offset & _WORD,
        key=(seed & _WORD, (seed >> 32) & _WORD),
    )
    bits = torch.stack(words, -1).flatten(2)[..., :seqlen_k]
    return (bits >= dropout_threshold(dropout_p)).view(*shape)


def dropout_threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1)


_WORD = 0xFFFFFFFF


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on 32-bit words held in int64 (broadcast against each other).

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product, by halves: the whole would overflow int64."""
    low = (word & 0xFFFF) * factor
    middle = (word >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
