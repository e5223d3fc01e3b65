"""attention_decode in plain torch: append to the cache, rotate, gather the pages, one dense call a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import AttentionSpec, attention, in_layout_of


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of the op; writes key and value into the caches. The arguments have been checked."""
    batch, _, seqlen_q, _ = query.shape
    appended = 0 if key is None else key.shape[2]
    if cache_seqlens is None:
        filled = [key_cache.shape[2]] * batch
        if block_table is not None:
            filled = [block_table.shape[1] * key_cache.shape[2]] * batch
    else:
        filled = cache_seqlens.tolist()
    leftpad = [0] * batch if cache_leftpad is None else cache_leftpad.tolist()
    # Without a diagonal all queries stand at the first new position.
    step = int(spec.window_left >= 0 or spec.window_right >= 0)
    outputs, lses = [], []
    for b in range(batch):
        place = _Place(b, block_table, key_cache.shape[2])
        new = torch.arange(filled[b], filled[b] + appended, device=query.device)
        rotated = query[b]
        if rotary_cos is not None and rotary_sin is not None:
            positions = filled[b] + step * torch.arange(seqlen_q, device=query.device)
            rotated = rotate(rotated, rotary_cos, rotary_sin, positions, rotary_interleaved)
        if key is not None and value is not None:
            added = key[b]
            if rotary_cos is not None and rotary_sin is not None:
                added = rotate(added, rotary_cos, rotary_sin, new, rotary_interleaved)
            place.write(key_cache, new, added)
            place.write(value_cache, new, value[b])
        everything = torch.arange(leftpad[b], filled[b] + appended, device=query.device)
        slopes = alibi_slopes
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            slopes = alibi_slopes[b]
        output, lse = attention(
            rotated[None],
            place.read(key_cache, everything)[None],
            place.read(value_cache, everything)[None],
            *(None, slopes, sinks, None, spec),
        )
        outputs.append(output)
        lses.append(lse)
    return in_layout_of(query, torch.cat(outputs)), torch.cat(lses)


class _Place:
    """Where sequence b's positions lie in a cache: (batch, heads_kv, capacity, d) or pages of it."""

    def __init__(self, b: int, block_table: Tensor | None, block_size: int) -> None:
        self.b, self.block_table, self.block_size = b, block_table, block_size

    def _index(self, positions: Tensor) -> tuple[Tensor | int, slice, Tensor]:
        if self.block_table is None:
            return self.b, slice(None), positions
        blocks = self.block_table[self.b].long()[positions // self.block_size]
        return blocks, slice(None), positions % self.block_size

    def read(self, cache: Tensor, positions: Tensor) -> Tensor:
        """(heads_kv, len(positions), d)"""
        taken = cache[self._index(positions)]
        return taken if self.block_table is None else taken.transpose(0, 1)

    def write(self, cache: Tensor, positions: Tensor, values: Tensor) -> None:
        cache[self._index(positions)] = (
            values if self.block_table is None else values.transpose(0, 1)
        )


def rotate(
    states: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """Rotary embedding of the first 2 * cos.shape[1] dimensions; states (heads, seqlen, head_dim).

    Pairs are (0, 1), (2, 3), ... if interleaved, else (0, n), (1, n + 1), ... with n = cos.shape[1]; computed in
    float32. Source: Su et al., "RoFormer", 2021.
    """
    half = cos.shape[1]
    cos, sin = cos[positions].float(), sin[positions].float()
    turned, rest = states[..., : 2 * half].float(), states[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, first * sin + second * cos)
    mixed = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((mixed.to(states.dtype), rest), -1)
