"""Decoding with a cache on Triton kernels against plain torch on the keys gathered from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attention_checks import BF16, CAUSAL, FP16, FP32, Case
from pyops.triton_kernels import attention_decode

from pyops.testing import OUTPUT_BUDGET, assert_within_budget


@dataclass
class DecodeCase:
    lengths: tuple[int, ...] | None  # filled, one for each of the batch
    leftpad: tuple[int, ...] | None = None
    new: int = 0
    seqlen_q: int = 1
    capacity: int = 64
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (16, 16)
    page: int = 0
    rotary: int = 0
    interleaved: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: int = 0
    sinks: bool = False
    dtype: torch.dtype = FP32


DECODE_CASES = {
    "whole-capacity": DecodeCase(None),
    "causal-append": DecodeCase((5, 40), new=3, seqlen_q=3, window=CAUSAL, head_dims=(16, 8)),
    "empty-cache": DecodeCase((0, 7), sinks=True),
    "nothing-seen": DecodeCase((0, 7)),
    "paged-rotary": DecodeCase((0, 40), new=3, seqlen_q=3, window=CAUSAL, page=16, rotary=16),
    "interleaved-partly": DecodeCase(
        (7, 40), new=5, seqlen_q=2, rotary=10, interleaved=True, window=(9, 0)
    ),
    "rotary-no-diagonal": DecodeCase((7, 40), new=2, seqlen_q=2, rotary=12, page=8),
    "options": DecodeCase((17, 60), seqlen_q=2, window=(20, 0), softcap=2.0, alibi=2, sinks=True),
    "many-rows": DecodeCase((30,), seqlen_q=9, window=CAUSAL, heads=(6, 2), dtype=FP16),
    "left-padding": DecodeCase((40, 7), (19, 9), new=2, seqlen_q=2, window=CAUSAL, alibi=1),
    "left-padding-window": DecodeCase((40, 60), (30, 3), page=16, seqlen_q=2, window=(20, 0)),
    "bf16-odd": DecodeCase((60, 3), new=1, head_dims=(13, 7), heads=(3, 1), dtype=BF16),
}


def check_decode(case: DecodeCase, device: str, num_splits: int) -> None:
    """The result within budget of plain torch on the gathered keys; the caches exactly as expected."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch = 2 if case.lengths is None else len(case.lengths)
    lengths = case.lengths or (case.capacity,) * batch
    heads, kv_heads = case.heads
    query = randn(batch, heads, case.seqlen_q, case.head_dims[0])
    held = [randn(batch, kv_heads, case.capacity, d) for d in case.head_dims]
    new = [randn(batch, kv_heads, case.new, d) for d in case.head_dims]
    cos, sin = (randn(case.capacity + 9, case.rotary // 2) for _ in range(2))
    alibi = randn(*(batch, heads)[2 - case.alibi :], dtype=FP32).abs() if case.alibi else None
    sinks = randn(heads, dtype=FP32) if case.sinks else None
    leftpad = case.leftpad or (0,) * batch
    for b, length in enumerate(lengths):  # what is not filled is never read
        for cache in held:
            cache[b, :, length:] = float("nan")
            cache[b, :, : min(leftpad[b], length)] = float("nan")
    caches, table = held, None
    if case.page:
        pages = case.capacity // case.page
        table = torch.randperm(batch * pages + 3, generator=generator)[: batch * pages]
        table = table.view(batch, pages).int().to(device)
        caches = []
        for cache in held:
            paged = torch.full((batch * pages + 3, kv_heads, case.page, cache.size(3)), torch.nan)
            paged = paged.to(device, case.dtype)
            paged[table.long()] = cache.unflatten(2, (pages, case.page)).transpose(1, 2)
            caches.append(paged)
        for b, length in enumerate(lengths):  # pages not in use may be anything
            table[b, -(-(length + case.new) // case.page) :] = -1
    output, lse = attention_decode.decode(
        query,
        *caches,
        *(new if case.new else (None, None)),
        None if case.lengths is None else torch.tensor(lengths, device=device).int(),
        None if case.leftpad is None else torch.tensor(case.leftpad, device=device).int(),
        table,
        cos if case.rotary else None,
        sin if case.rotary else None,
        case.interleaved,
        alibi,
        sinks,
        case.head_dims[0] ** -0.5,
        case.softcap,
        *case.window,
        num_splits,
    )
    diagonal = case.window != (-1, -1)
    for b, length in enumerate(lengths):
        total = length + case.new
        steps = torch.arange(max(case.new, case.seqlen_q), device=device)
        turned, added = query[b], new[0][b]
        if case.rotary:
            turned = rotated(turned, cos, sin, length + steps * diagonal, case.interleaved)
            added = rotated(added, cos, sin, length + steps, case.interleaved)
        expected = [torch.cat((held[0][b, :, :length], added), 1)]
        expected.append(torch.cat((held[1][b, :, :length], new[1][b]), 1))
        for cache, wanted in zip(caches, expected, strict=True):
            got = (
                cache[b] if table is None else cache[table[b].long()].transpose(0, 1).flatten(1, 2)
            )
            assert torch.equal(got[:, :length].nan_to_num(7), wanted[:, :length].nan_to_num(7))
            torch.testing.assert_close(got[:, length:total], wanted[:, length:])
            # The rest is untouched; of pages, only those in use are looked at.
            beyond = got[:, total : -(-total // case.page) * case.page if case.page else None]
            assert beyond.isnan().all()
        expected = [t[:, leftpad[b] :] for t in expected]
        total -= leftpad[b]
        if total == 0:
            assert (output[b] == 0).all()
            known = float("-inf") if sinks is None else sinks[:, None].expand_as(lse[b])
            assert torch.equal(lse[b], torch.zeros_like(lse[b]) + known)
            continue
        one = Case((case.seqlen_q, total), case.heads, case.head_dims, dtype=case.dtype)
        one.softcap, one.window = case.softcap, case.window
        tensors = {"query": turned[None], "key": expected[0][None], "value": expected[1][None]}
        slopes = alibi[b] if case.alibi == 2 else alibi
        tensors |= {"bias": None, "alibi_slopes": slopes, "sinks": sinks, "rng_state": None}
        low, low_lse = one.plain(tensors, case.dtype)
        wide, wide_lse = one.plain(tensors, torch.float64)
        assert_within_budget(output[b : b + 1], low, wide, OUTPUT_BUDGET, f"output of {b}")
        assert_within_budget(lse[b : b + 1], low_lse.float(), wide_lse, OUTPUT_BUDGET, "lse")


def rotated(states, cos, sin, positions, interleaved: bool):
    """The first 2 * cos.size(1) dimensions turned, pair by pair, as complex numbers."""
    half = cos.size(1)
    positions = positions[: states.size(1)]
    angle = torch.complex(cos[positions].float(), sin[positions].float())
    pairs = states[..., : 2 * half].float()
    if interleaved:
        turned = torch.view_as_complex(pairs.unflatten(-1, (half, 2)).contiguous()) * angle
        turned = torch.view_as_real(turned).flatten(-2)
    else:
        turned = torch.complex(pairs[..., :half], pairs[..., half:]) * angle
        turned = torch.cat((turned.real, turned.imag), -1)
    return torch.cat((turned.to(states.dtype), states[..., 2 * half :]), -1)
