"""attention_varlen in plain torch: one call of the dense reference a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import AttentionSpec, attention, compute_dtype


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """(output (total_q, heads, v_head_dim), lse (heads, total_q)); rows outside all sequences: 0, -inf."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    heads = query.shape[1]
    outputs, lses = [], []

    def nothing(rows: int) -> None:
        outputs.append(query.new_zeros((rows, heads, value.shape[2])))
        lses.append(query.new_full((heads, rows), -torch.inf, dtype=compute_dtype(query.dtype)))

    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        if rows.start == rows.stop:
            continue
        slopes = alibi_slopes
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            slopes = alibi_slopes[b]
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], key[keys], value[keys]))
        output, lse = attention(q, k, v, None, slopes, sinks, rng_state, spec, b)
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    nothing(query.shape[0] - starts_q[-1])
    return torch.cat(outputs), torch.cat(lses, 1)
