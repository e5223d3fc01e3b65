"""flash-attn's functions against the plain formulas, in its layout, within the error budget."""

from __future__ import annotations

import inspect

import pytest
import torch

import pyops.integrations.flash_attn as fa2
import pyops.integrations.flash_attn_interface as fa3
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(q, k, v, *, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """(output, lse) of q (batch, seqlen, heads, head_dim), step by step in q's dtype."""
    repeat = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(repeat, 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    behind = rows + k.shape[2] - q.shape[2] - columns
    if slopes is not None:
        scores = scores - (slopes.view(-1, q.shape[1], 1, 1) * behind.abs()).to(q.dtype)
    left, right = window
    hidden = behind < (0 if causal else -right if right >= 0 else -(10**9))
    if left >= 0:
        hidden = hidden | (behind > left)
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(3).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(3)


def compare(call, tensors, gradients=True, **options):
    """Output, lse and gradients of call(*tensors), which returns the first two, against plain's."""
    results = []
    for function, dtype in ((call, None), (plain, None), (plain, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_(gradients) for t in tensors]
        output, lse = function(*leaves, **({} if function is call else options))
        grads = ()
        if gradients:
            grads = torch.autograd.grad(output, leaves, randn(*output.shape, seed=9).to(output))
        results.append((output, lse.to(dtype or torch.float32), *grads))
    assert results[0][0].is_contiguous()
    for i, triple in enumerate(zip(*results, strict=True)):
        assert_within_budget(*triple, OUTPUT_BUDGET if i < 2 else GRADIENT_BUDGET, f"result {i}")


CASES = {
    "plain": {},
    "causal, more keys": {"causal": True, "seqlen_k": 29},
    "causal, more queries: empty rows": {"causal": True, "seqlen_k": 9, "gradients": False},
    "window": {"window": (5, 3)},
    "window to the left": {"window": (4, -1), "seqlen_k": 23},
    "softcap": {"softcap": 2.5, "causal": True},
    "alibi": {"slopes": True, "seqlen_k": 25},
    "grouped heads": {"heads_kv": 2, "causal": True},
    "one key head, bfloat16": {"heads_kv": 1, "dtype": torch.bfloat16},
    "scale": {"scale": 0.4},
}


@pytest.mark.parametrize("case", CASES)
def test_dense(case):
    options = dict(CASES[case])
    seqlen_k, heads_kv = options.pop("seqlen_k", 17), options.pop("heads_kv", 4)
    dtype, gradients = options.pop("dtype", torch.float32), options.pop("gradients", True)
    tensors = [randn(2, 17, 4, 24, dtype=dtype)]
    tensors += [randn(2, seqlen_k, heads_kv, 24, seed=s, dtype=dtype) for s in (1, 2)]
    if options.get("slopes"):
        options["slopes"] = torch.tensor([[0.5, 0.25, 0.1, 0.0], [1.0, 0.3, 0.2, 0.4]])
    common = {
        "causal": options.get("causal", False),
        "window_size": options.get("window", (-1, -1)),
        "softcap": options.get("softcap", 0.0),
        "softmax_scale": options.get("scale"),
        "return_attn_probs": True,
    }

    def second(q, k, v):
        output, lse, probabilities = fa2.flash_attn_func(
            q, k, v, alibi_slopes=options.get("slopes"), **common
        )
        assert probabilities.numel() == 0
        assert torch.equal(
            output,
            fa2.flash_attn_func(
                q,
                k,
                v,
                alibi_slopes=options.get("slopes"),
                **{**common, "return_attn_probs": False},
            ),
        )
        return output, lse

    compare(second, tensors, gradients, **options)
    if "slopes" not in options:
        compare(lambda *qkv: fa3.flash_attn_func(*qkv, **common), tensors, gradients, **options)


def test_packed_is_unpacked():
    qkv = randn(2, 9, 3, 4, 16).requires_grad_()
    q, k, v = qkv.detach().unbind(2)
    want, lse, _ = fa2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    got = fa2.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(got, want) and got.is_contiguous()
    got.sum().backward()
    assert qkv.grad.shape == qkv.shape and qkv.grad.count_nonzero() > 0
    assert torch.equal(fa2.flash_attn_kvpacked_func(q, qkv.detach()[:, :, 1:], causal=True), want)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(qkv, causal=True), want)
    side_by_side = torch.cat((q, k[:, :, :2], v[:, :, :2]), 2)
    got, got_lse = fa3.flash_attn_qkvpacked_func(
        side_by_side, num_heads_q=4, return_attn_probs=True
    )
    want, lse = fa3.flash_attn_func(q, k[:, :, :2], v[:, :, :2], return_attn_probs=True)
    assert torch.equal(got, want) and torch.equal(got_lse, lse)


LENGTHS_Q, LENGTHS_K = (5, 0, 11, 3), (7, 4, 0, 3)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("causal", (False, True))
def test_varlen_is_each_sequence_alone(causal):
    q = randn(sum(LENGTHS_Q), 4, 16)
    k, v = (randn(sum(LENGTHS_K), 2, 16, seed=s) for s in (1, 2))
    lengths = (starts(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    options = {"causal": causal, "window_size": (3, 2), "return_attn_probs": True}
    output, lse, _ = fa2.flash_attn_varlen_func(q, k, v, *lengths, **options)
    assert lse.shape == (4, sum(LENGTHS_Q))
    split = (t.split(n) for t, n in ((q, LENGTHS_Q), (k, LENGTHS_K), (v, LENGTHS_K)))
    alone = [[t[None] for t in qkv] for qkv in zip(*split, strict=True)]
    for place, name in ((0, "output"), (1, "lse")):
        whole = []
        for dtype in (torch.float32, torch.float64):
            parts = [
                plain(*(t.to(dtype) for t in qkv), causal=causal, window=(3, 2)) for qkv in alone
            ]
            whole.append(torch.cat([p[place][0] for p in parts], place))
        assert_within_budget((output, lse)[place], *whole, OUTPUT_BUDGET, name)
    kv = torch.stack((k, v), 1)
    assert torch.equal(fa2.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)[0], output)
    assert torch.equal(fa3.flash_attn_varlen_func(q, k, v, *lengths, **options)[0], output)
    qkv = randn(sum(LENGTHS_Q), 3, 4, 16)
    packed = fa2.flash_attn_varlen_qkvpacked_func(qkv, lengths[0], lengths[2], causal=causal)
    same = (lengths[0], lengths[0], lengths[2], lengths[2])
    assert torch.equal(packed, fa2.flash_attn_varlen_func(*qkv.unbind(1), *same, causal=causal))


def rotate(x, cos, sin, positions, interleaved):
    """Rotary embedding of x (seqlen, heads, head_dim) by complex numbers."""
    half = cos.shape[1]
    angle = torch.complex(cos, sin)[positions][:, None]
    turned = x[..., : 2 * half]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.mT
    mixed = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous())
        * angle.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    )
    mixed = mixed if interleaved else mixed.mT
    return torch.cat((mixed.flatten(-2), x[..., 2 * half :]), -1)


@pytest.mark.parametrize("new", (0, 3))
@pytest.mark.parametrize("where", ("contiguous", "paged", "chosen"))
@pytest.mark.parametrize("rotary", (None, "interleaved", "halves"))
def test_kvcache(where, rotary, new):
    filled, capacity, heads, heads_kv, d = (6, 0, 9), 12, 4, 2, 16
    q, k, v = (randn(3, 3, h, d, seed=h + i) for i, h in enumerate((heads, heads_kv, heads_kv)))
    k_cache, v_cache = (randn(3, capacity, heads_kv, d, seed=s) for s in (6, 7))
    angles = randn(capacity + 3, 4, seed=8)
    cos, sin = angles.cos(), angles.sin()
    want = []
    for dtype in (torch.float32, torch.float64):
        outputs, lses, caches = [], [], []
        for b in range(3):
            places = torch.arange(filled[b], filled[b] + 3)
            turn = lambda x, at=places: rotate(x, cos, sin, at, rotary == "interleaved")  # noqa: E731
            query, added = q[b].to(dtype), k[b].to(dtype)
            if rotary:
                query, added = turn(query), turn(added)
            keys, values = k_cache[b].to(dtype), v_cache[b].to(dtype)
            keys, values = keys[: filled[b]], values[: filled[b]]
            if new:
                keys, values = torch.cat((keys, added)), torch.cat((values, v[b].to(dtype)))
            output, lse = plain(query[None], keys[None], values[None], causal=True)
            outputs.append(output)
            lses.append(lse)
            caches.append(keys)
        want.append((torch.cat(outputs), torch.cat(lses), torch.cat(caches)))

    index, table, given = None, None, [k_cache.clone(), v_cache.clone()]
    if where == "paged":
        pages = torch.tensor([[5, 0, 2], [7, 1, 8], [3, 6, 4]], dtype=torch.int32)
        table = pages
        for i, cache in enumerate((k_cache, v_cache)):
            given[i] = torch.empty(9, 4, heads_kv, d)
            given[i][pages.long().flatten()] = cache.reshape(9, 4, heads_kv, d)
    elif where == "chosen":
        index = torch.tensor([3, 0, 2], dtype=torch.int32)
        for i, cache in enumerate((k_cache, v_cache)):
            given[i] = torch.zeros(4, capacity, heads_kv, d)
            given[i][index.long()] = cache
    options = {
        "rotary_cos": cos if rotary else None,
        "rotary_sin": sin if rotary else None,
        "rotary_interleaved": rotary == "interleaved",
        "cache_seqlens": torch.tensor(filled, dtype=torch.int32),
        "cache_batch_idx": index,
        "causal": True,
        "return_softmax_lse": True,
    }
    added = (k, v) if new else (None, None)
    pages_name = {fa2: "block_table", fa3: "page_table"}
    for module in (fa2, fa3):
        caches = [c.clone() for c in given]
        output, lse = module.flash_attn_with_kvcache(
            q, *caches, *added, **options, **{pages_name[module]: table}
        )
        assert output.is_contiguous()
        if where == "paged":
            kept = caches[0][table.long()].flatten(1, 2)
        else:
            kept = caches[0] if index is None else caches[0][index.long()]
        kept = torch.cat([kept[b, : filled[b] + new] for b in range(3)])
        for name, ours, lowp, best in zip(
            ("output", "lse", "cache"), (output, lse, kept), *want, strict=True
        ):
            assert_within_budget(ours, lowp, best, OUTPUT_BUDGET, name)


def test_combine_puts_parts_together():
    q, k, v = (randn(2, 6, 4, 8, seed=s) for s in range(3))
    want, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    parts = [
        fa3.flash_attn_func(q, k[:, at], v[:, at], return_attn_probs=True)
        for at in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([part.transpose(1, 2) for _, part in parts])
    got, got_lse = fa3.flash_attn_combine(outs, lses)
    best, best_lse = plain(*(t.double() for t in (q, k, v)))
    assert_within_budget(got, want, best)
    assert_within_budget(got_lse.transpose(1, 2), lse, best_lse)
    assert fa3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    out = torch.empty_like(got)
    assert fa3.flash_attn_combine(outs, lses, out)[0] is out and torch.equal(out, got)


def test_dropout_is_reproducible_and_scaled():
    q, k, v = (randn(2, 64, 4, 8, seed=s) for s in range(3))
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(fa2.flash_attn_func(q, k, torch.ones_like(v), dropout_p=0.25))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].mean().item() == pytest.approx(1.0, abs=0.05)


def test_signatures_begin_as_flash_attns():
    first = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    for name, leading in (
        ("flash_attn_func", "q k v"),
        ("flash_attn_qkvpacked_func", "qkv"),
        ("flash_attn_kvpacked_func", "q kv"),
        ("flash_attn_varlen_qkvpacked_func", "qkv cu_seqlens max_seqlen"),
    ):
        parameters = inspect.signature(getattr(fa2, name)).parameters
        assert " ".join(parameters) == f"{leading} {first}", name


TENSOR = torch.zeros(1)


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        *((fa3.flash_attn_func, n, TENSOR) for n in ("qv", "q_descale", "k_descale", "v_descale")),
        (fa3.flash_attn_with_kvcache, "attention_chunk", 4),
        *(
            (fa3.flash_attn_with_kvcache, n, TENSOR)
            for n in ("qv", "cu_seqlens_q", "cu_seqlens_k_new")
        ),
    ],
)
def test_what_is_not_supported_is_named(function, name, value):
    qkv = [randn(1, 3, 2, 8)] * 3
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        function(*qkv, **{name: value})


def test_bad_input_is_named():
    q = randn(2, 5, 4, 8)
    lengths = (starts((3, 2)), starts((3, 2)), 3, 3)
    with pytest.raises(ValueError, match="^q: expected 4 dimensions"):
        fa2.flash_attn_func(q[0], q, q)
    with pytest.raises(TypeError, match="^v: expected a torch.Tensor"):
        fa2.flash_attn_func(q, q, None)
    with pytest.raises(ValueError, match="^kv: "):
        fa2.flash_attn_kvpacked_func(q, q)
    with pytest.raises(ValueError, match="^qkv: "):
        fa3.flash_attn_qkvpacked_func(q, num_heads_q=3)
    with pytest.raises(NotImplementedError, match="^attention_chunk: "):
        fa3.flash_attn_varlen_func(*[q[0]] * 3, *lengths, attention_chunk=4)
    with pytest.raises(NotImplementedError, match="^rotary_seqlens: "):
        turn = {"rotary_cos": randn(9, 4), "rotary_sin": randn(9, 4)}
        fa3.flash_attn_with_kvcache(q, q, q, **turn, cache_seqlens=3, rotary_seqlens=TENSOR)
    with pytest.raises(ValueError, match="^out: "):
        fa3.flash_attn_combine(q[None], q[None, ..., 0], torch.empty(1))
