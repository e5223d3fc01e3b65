"""flash-attn's own extras: S_dmask, pages of packed keys, left padding, unused rows, chunks, tensors as windows."""

from __future__ import annotations

import math

import pytest
import torch

import pyops.integrations.flash_attn as fa2
import pyops.integrations.flash_attn_interface as fa3
from pyops.testing import OUTPUT_BUDGET, assert_within_budget


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def scores_of(q, k, causal=False, slopes=None):
    """(heads, seqlen_q, seqlen_k) of one sequence's q, k (seqlen, heads, head_dim), -inf where hidden."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    behind = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])
    if slopes is not None:
        scores = scores - slopes[:, None, None].to(q.dtype) * behind.abs()
    return scores.masked_fill(behind < 0, -torch.inf) if causal else scores


def values_of(scores, v, kept=None, keep_scale=1.0):
    """softmax, dropout, product: (seqlen_q, heads, head_dim)."""
    v = v.repeat_interleave(scores.shape[0] // v.shape[1], 1)
    weights = scores.softmax(2).nan_to_num(0.0)
    if kept is not None:
        weights = weights * kept * keep_scale
    return torch.einsum("hqk,khd->qhd", weights, v)


def check_signs(signs, scores, v, output, dropout_p):
    """One sequence's S_dmask: its size is exp(score - most), its signs are the mask that the output was made with."""
    most = scores.amax(2, keepdim=True).masked_fill(scores.amax(2, keepdim=True).isinf(), 0.0)
    torch.testing.assert_close(signs.abs(), torch.exp(scores - most), rtol=1e-4, atol=1e-6)
    kept = ~torch.signbit(signs)
    seen = scores > -torch.inf
    dropped = (~kept & seen).sum() / seen.sum()
    assert abs(dropped.item() - dropout_p) < 0.1
    both = [
        values_of(scores.to(d), v.to(d), kept, 1 / (1 - dropout_p))
        for d in (torch.float32, torch.float64)
    ]
    assert_within_budget(output, *both, OUTPUT_BUDGET, "output with the signs' dropout")


@pytest.mark.parametrize("causal", (False, True))
def test_dropout_signs_are_those_of_the_output(causal):
    q, (k, v) = randn(2, 13, 4, 8), (randn(2, 21, 2, 8, seed=s) for s in (1, 2))
    slopes = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3]])
    options = {"dropout_p": 0.3, "causal": causal, "alibi_slopes": slopes}
    torch.manual_seed(5)
    output, _, signs = fa2.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    torch.manual_seed(5)
    assert torch.equal(fa2.flash_attn_func(q, k, v, **options), output)  # asking changes nothing
    assert signs.shape == (2, 4, 13, 21)
    for b in range(2):
        scores = scores_of(q[b], k[b], causal, slopes[b])
        check_signs(signs[b], scores, v[b], output[b], 0.3)
    assert fa2.flash_attn_func(q, k, v, return_attn_probs=True)[2].shape == (0,)
    half = fa2.flash_attn_func(q.half(), k.half(), v.half(), **options, return_attn_probs=True)
    assert half[2].dtype == torch.float16


def test_dropout_signs_of_packed_sequences():
    lengths = ((9, 0, 17), (15, 4, 6))
    starts = [ints(0, *torch.tensor(n).cumsum(0).tolist()) for n in lengths]
    q, (k, v) = randn(26, 4, 8), (randn(25, 2, 8, seed=s) for s in (1, 2))
    slopes = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    output, _, signs = fa2.flash_attn_varlen_func(
        *(q, k, v, *starts, 20, 18, 0.4),
        causal=True,
        alibi_slopes=slopes,
        return_attn_probs=True,
    )
    assert signs.shape == (3, 4, 20, 18)
    for b in range(3):
        rows, keys = (slice(*s[b : b + 2]) for s in starts)
        n, m = lengths[0][b], lengths[1][b]
        assert signs[b, :, n:].count_nonzero() == signs[b, :, :, m:].count_nonzero() == 0
        if n:
            scores = scores_of(q[rows], k[keys], True, slopes[b])
            check_signs(signs[b, :, :n, :m], scores, v[keys], output[rows], 0.4)
    qkv, two = randn(26, 3, 4, 8), (starts[0], 17)
    given = fa2.flash_attn_varlen_qkvpacked_func(qkv, *two, return_attn_probs=True)
    assert given[2].shape == (0,)


def test_pages_of_packed_keys():
    page, lengths = 4, (7, 0, 12, 1)
    table = ints(*range(20)).view(4, 5)[:, torch.tensor([3, 0, 4, 1, 2])].contiguous()
    pages = [randn(20, page, 2, 8, seed=s).requires_grad_() for s in (1, 2)]
    starts_q, starts_k = ints(0, 3, 5, 5, 9), ints(0, 7, 7, 19, 20)
    q = randn(9, 4, 8)
    rows = [
        torch.cat([p[table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(lengths)])
        for p in pages
    ]
    for module in (fa2,):
        got = module.flash_attn_varlen_func(
            q, *pages, starts_q, starts_k, 4, 12, causal=True, block_table=table
        )
        want = module.flash_attn_varlen_func(q, *rows, starts_q, starts_k, 4, 12, causal=True)
        assert torch.equal(got, want)
    got.sum().backward()
    unused = torch.ones(20, dtype=torch.bool)
    for b, n in enumerate(lengths):
        unused[table[b, : -(-n // page)].long()] = False
    assert pages[1].grad[unused].count_nonzero() == 0
    assert pages[1].grad[~unused].count_nonzero() > 0


def test_bad_pages_are_named():
    q, pages, starts = randn(4, 2, 8), randn(3, 4, 2, 8), ints(0, 4, 8)
    call = fa2.flash_attn_varlen_func
    lengths = (ints(0, 2, 4), starts, 2, 4)
    for table, words in (
        (ints(0, 1), r"^block_table: expected shape \(2, max_blocks\)"),
        (ints(0, 3)[:, None], "^block_table: expected blocks from 0 to 2"),
        (ints(0, -1)[:, None], "^block_table: expected blocks from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            call(q, pages, pages, *lengths, block_table=table)
    with pytest.raises(ValueError, match="^cu_seqlens_k: .*block_table's 4 keys, got one of 5"):
        call(q, pages, pages, ints(0, 2, 4), ints(0, 5, 8), 2, 5, block_table=ints(0, 1)[:, None])
    with pytest.raises(ValueError, match="^v: "):
        call(q, pages, pages[:2], *lengths, block_table=ints(0, 1)[:, None])
    with pytest.raises(TypeError, match="^block_table: expected dtype int32"):
        call(q, pages, pages, *lengths, block_table=ints(0, 1)[:, None].long())


@pytest.mark.parametrize("module", (fa2, fa3), ids=("fa2", "fa3"))
@pytest.mark.parametrize("new", (0, 2))
def test_left_padding_hides_keys(module, new):
    filled, padding = (9, 6), ints(4, 0)
    q, k_cache, v_cache = (randn(2, n, 2, 8, seed=n) for n in (2, 12, 12))
    added = [randn(2, new, 2, 8, seed=s) for s in (7, 8)] if new else (None, None)
    caches = [k_cache.clone(), v_cache.clone()]
    for cache in caches:
        cache[0, :4] = torch.nan
    output = module.flash_attn_with_kvcache(
        *(q, *caches, *added),
        cache_seqlens=ints(*filled),
        cache_leftpad=padding,
        causal=True,
    )
    for b in range(2):
        keys, values = (
            torch.cat((c[b, padding[b] : filled[b]], *(n[b : b + 1][0] for n in [a] if new)))
            for c, a in zip((k_cache, v_cache), added, strict=True)
        )
        both = [
            values_of(scores_of(q[b].to(d), keys.to(d), True), values.to(d))
            for d in (torch.float32, torch.float64)
        ]
        assert_within_budget(output[b], *both)


def test_cache_batch_idx_chooses_rows_of_the_block_table():
    q, pages = randn(2, 1, 2, 8), [randn(9, 4, 2, 8, seed=s) for s in (1, 2)]
    table, index = ints(0, 1, 2, 5, 4, 3, 8, 7, 6).view(3, 3), ints(2, 0)
    options = {"cache_seqlens": ints(11, 6)}
    got = fa2.flash_attn_with_kvcache(
        q, *pages, **options, block_table=table, cache_batch_idx=index
    )
    want = fa2.flash_attn_with_kvcache(q, *pages, **options, block_table=table[[2, 0]].contiguous())
    assert torch.equal(got, want)
    # Seqlens of the rotation may be given if they are those of the cache.
    turned = {"rotary_cos": randn(16, 2), "rotary_sin": randn(16, 2), **options}
    table = {"page_table": table[:2]}
    got = fa3.flash_attn_with_kvcache(
        q, *pages, **turned, **table, rotary_seqlens=options["cache_seqlens"]
    )
    assert torch.equal(got, fa3.flash_attn_with_kvcache(q, *pages, **turned, **table))


def test_rows_that_do_not_count():
    starts, used_q, used_k = ints(0, 5, 5, 12), ints(3, 0, 7), ints(4, 0, 5)
    q, k, v = (randn(14, 2, 8, seed=s).requires_grad_() for s in range(3))
    lengths = (starts, starts, 7, 7)
    output, lse = fa3.flash_attn_varlen_func(
        q, k, v, *lengths, used_q, used_k, causal=True, return_attn_probs=True
    )
    counted_q = [0, 1, 2, *range(5, 12)]
    counted_k = [0, 1, 2, 3, *range(5, 10)]
    want, want_lse = fa3.flash_attn_varlen_func(
        *(q[counted_q], k[counted_k], v[counted_k]),
        *(ints(0, 3, 3, 10), ints(0, 4, 4, 9), 7, 7),
        causal=True,
        return_attn_probs=True,
    )
    assert torch.equal(output[counted_q], want) and torch.equal(lse[:, counted_q], want_lse)
    others = [3, 4, 12, 13]
    assert (output[others] == 0).all() and (lse[:, others] == -torch.inf).all()
    output.sum().backward()
    assert v.grad[[4, 10, 11, 12, 13]].count_nonzero() == 0 and v.grad[0].count_nonzero() > 0
    for name, bad in (("seqused_q", ints(6, 0, 1)), ("seqused_k", ints(1, -1, 1))):
        with pytest.raises(ValueError, match=f"^{name}: "):
            fa3.flash_attn_varlen_func(q, k, v, *lengths, **{name: bad})


@pytest.mark.parametrize("seqlens", ((11, 11), (5, 14), (14, 5)))
def test_chunks(seqlens):
    q, k, v = (randn(2, n, 2, 8, seed=i) for i, n in enumerate((*seqlens, seqlens[1])))
    got = fa3.flash_attn_func(q, k, v, causal=True, attention_chunk=4)
    diagonal = torch.arange(seqlens[0])[:, None] + seqlens[1] - seqlens[0]
    start = diagonal - diagonal.remainder(4)
    keys = torch.arange(seqlens[1])
    hidden = (keys < start) | (keys >= start + 4)
    for b in range(2):
        both = []
        for d in (torch.float32, torch.float64):
            scores = scores_of(q[b].to(d), k[b].to(d), True).masked_fill(hidden, -torch.inf)
            both.append(values_of(scores, v[b].to(d)))
        assert_within_budget(got[b], *both)
    assert not torch.equal(got, fa3.flash_attn_func(q, k, v, causal=True))


def test_a_window_may_be_a_tensor():
    q, k, v = (randn(1, 9, 2, 8, seed=s) for s in range(3))
    want = fa2.flash_attn_func(q, k, v, window_size=(3, 1))
    for window in (torch.tensor([3, 1]), [3, 1]):
        assert torch.equal(fa2.flash_attn_func(q, k, v, window_size=window), want)
        assert torch.equal(fa3.flash_attn_func(q, k, v, window_size=window), want)
    whole = fa2.flash_attn_func(q, k, v, window_size=torch.tensor([-1, -1]))
    assert torch.equal(whole, fa2.flash_attn_func(q, k, v)) and not torch.equal(whole, want)
