"""What flash-attn's interface has and attention's does not: S_dmask, pages and unused rows of packed
sequences, chunks of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import attention_checks as checks
from ..reference.attention import dropout_keep, masked_scores


class DropoutSigns:
    """S_dmask of a call that is made after this and draws from the default generator."""

    def __init__(self, like: Tensor, dropout_p: float) -> None:
        self.dropout_p, self.generator = dropout_p, None
        if dropout_p > 0:
            device = like.device
            default = torch.default_generator
            if device.type == "cuda":
                default = torch.cuda.default_generators[device.index or 0]
            self.generator = default.clone_state()

    def _state(self, like: Tensor) -> Any:
        return checks.draw_rng_state(self.dropout_p, self.generator, like.device)

    @torch.no_grad()
    def dense(self, query: Tensor, key: Tensor, slopes: Tensor | None, options: Any) -> Tensor:
        """Of query and key (batch, heads, seqlen, head_dim)."""
        if self.generator is None:
            return query.new_empty(0)
        return _signed(query, key, slopes, options, self._state(query), 0)

    @torch.no_grad()
    def packed(
        self, query: Tensor, key: Tensor, lengths: Any, slopes: Tensor | None, options: Any
    ) -> Tensor:
        """Of query and key (total, heads, head_dim), 0 past the sequences' ends."""
        if self.generator is None:
            return query.new_empty(0)
        starts_q, starts_k = (t.tolist() for t in lengths[:2])
        batch, state = len(starts_q) - 1, self._state(query)
        signed = query.new_zeros((batch, query.shape[1], *lengths[2:]))
        for b in range(batch):
            q, k = (
                t[starts[b] : starts[b + 1]].transpose(0, 1)[None]
                for t, starts in ((query, starts_q), (key, starts_k))
            )
            own = slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes
            one = _signed(q, k, own, options, state, b)
            signed[b, :, : q.shape[2], : k.shape[2]] = one[0]
        return signed


def _signed(
    query: Tensor, key: Tensor, slopes: Tensor | None, options: Any, state: Tensor, first: int
) -> Tensor:
    spec = checks.make_spec(query.shape[3], **options)
    scores = masked_scores(query, key, None, slopes, spec)
    if scores.numel() == 0:
        return scores.to(query.dtype)
    top = scores.amax(-1, keepdim=True)
    size = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    keep = dropout_keep(state, scores.shape, spec.dropout_p, first)
    return torch.where(keep, size, -size).to(query.dtype)


def packed_pages(
    key: Tensor, value: Tensor, cu_seqlens_k: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """The sequences' keys and values, (total, heads_kv, head_dim), out of pages of a cache.

    key, value: (blocks, block_size, heads_kv, head_dim). Waits for the device.
    """
    for name, tensor in (("k", key), ("v", value)):
        if tensor.dim() != 4 or tensor.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"{name}: expected (blocks, block_size, heads_kv, head_dim) with a block_table, "
                f"k and v alike, got {tuple(tensor.shape)}"
            )
    checks.check_index("block_table", block_table, key)
    checks.check_index("cu_seqlens_k", cu_seqlens_k, key)
    batch = cu_seqlens_k.numel() - 1
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"block_table: expected shape ({batch}, max_blocks), got {tuple(block_table.shape)}"
        )
    blocks, block_size = key.shape[:2]
    lengths = cu_seqlens_k.diff()
    longest = int(lengths.max()) if batch else 0
    if longest > block_table.shape[1] * block_size:
        raise ValueError(
            f"cu_seqlens_k: expected sequences within the block_table's "
            f"{block_table.shape[1] * block_size} keys, got one of {longest}"
        )
    position = torch.arange(longest, device=key.device)
    table = block_table.long()[:, position // block_size]
    table, position = torch.broadcast_tensors(table, position % block_size)
    filled = torch.arange(longest, device=key.device) < lengths[:, None]
    table, position = table[filled], position[filled]
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < blocks:
        raise ValueError(f"block_table: expected blocks from 0 to {blocks - 1}, got others")
    return key[table, position], value[table, position]


def same_chunk(seqlen_q: int, seqlen_k: int, chunk: int, device: torch.device) -> Tensor:
    """(1, 1, seqlen_q, seqlen_k) bool: the keys in the chunk that each query's diagonal lies in."""
    diagonal = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    same = diagonal // chunk == torch.arange(seqlen_k, device=device) // chunk
    return same[None, None]


def used_rows(side: str, cu_seqlens: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of packed sequences count if only the first used[b] of each do, and cu_seqlens without the others.

    Waits for the device.
    """
    checks.check_index(f"cu_seqlens_{side}", cu_seqlens, used)
    checks.check_index(f"seqused_{side}", used, cu_seqlens)
    lengths = cu_seqlens.diff()
    if used.shape != lengths.shape or bool(((used < 0) | (used > lengths)).any()):
        raise ValueError(
            f"seqused_{side}: expected from 0 to each sequence's length, {lengths.tolist()}, "
            f"got {used.tolist()}"
        )
    position = torch.arange(int(used.max()) if used.numel() else 0, device=used.device)
    rows = (cu_seqlens[:-1, None] + position)[position < used[:, None]]
    return rows, torch.cat((cu_seqlens[:1], used.cumsum(0))).int()
