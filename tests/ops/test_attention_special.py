"""Rows that see nothing, NaN and infinities, the dropout mask, merging; and any call hypothesis can think of."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BACKENDS, check, dropout_mask, exact, make_qkv, plain, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyops
from pyops.reference.attention import dropout_threshold, philox4x32
from pyops.testing import within_budget

BOTH = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# options under which the first 16 of 53 rows (or those of the mask) see nothing
EMPTY_ROWS = {
    "causal": {"causal": True},
    "window": {"window": (2, 4)},
    "boolean mask": {"bias": (torch.arange(53) >= 20)[:, None]},
    "mask of -inf": {"bias": torch.where(torch.arange(53) >= 20, 0.0, -torch.inf)[:, None]},
    "boolean mask of all": {"bias": torch.zeros(1, dtype=torch.bool)},
}


@BOTH
@DTYPES
@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_rows_that_see_nothing(name, dtype, backend):
    options = EMPTY_ROWS[name]
    leaves = [t.requires_grad_() for t in make_qkv(2, 4, 53, 37, 24, heads_kv=2, dtype=dtype)]
    out, lse = pyops.attention(*leaves, return_lse=True, backend=backend, **options)
    empty = plain(*leaves, **options)[1] == -torch.inf
    assert empty.any() and torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any() and out.isfinite().all()
    grads = torch.autograd.grad(
        (out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)), retain_graph=True
    )
    assert all(g.isfinite().all() for g in grads) and not grads[0][empty].any()
    poison = torch.where(empty, torch.nan, 1.0).to(lse.dtype)
    (dq,) = torch.autograd.grad(lse.masked_fill(empty, 0), leaves[0], poison.masked_fill(empty, 0))
    assert dq.isfinite().all()
    sinks = randn(4).requires_grad_()
    out, lse = pyops.attention(*leaves, sinks=sinks, return_lse=True, backend=backend, **options)
    expected = sinks[None, :, None].expand(2, 4, 53)
    assert torch.equal(lse[empty], expected[empty]) and not out[empty].any()
    for grad in torch.autograd.grad(out.sum(), (*leaves, sinks)):
        assert grad.isfinite().all()


@BOTH
def test_mask_of_minus_infinities_in_places(backend):
    bias = randn(2, 4, 37, 53)
    bias[randn(2, 4, 37, 53, seed=8) > 0.3] = -torch.inf
    bias[:, :, :, 50] = 0.0
    qkv = make_qkv(2, 4, 37, 53)
    check(*qkv, backend=backend, bias=bias)


@BOTH
def test_large_scores_do_not_overflow(backend):
    q, k, v = make_qkv(1, 2, 40, 50)
    for factor in (30.0, 1e3):
        check(q * factor, k, v, backend=backend, gradients=factor < 100)
    out = pyops.attention(q, k, v, bias=torch.full((40, 50), 1e30), backend=backend)
    assert out.isfinite().all()


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinities_stay_in_their_rows(where, bad, backend):
    tensors = dict(zip(("query", "key", "value"), make_qkv(2, 2, 20, 20), strict=True))
    tensors[where][1, 1, 7, 3] = bad
    clean = make_qkv(2, 2, 20, 20)
    out = pyops.attention(**tensors, causal=True, backend=backend)
    want = pyops.attention(*clean, causal=True, backend=backend)
    touched = torch.zeros(2, 2, 20, dtype=torch.bool)
    # A value that no row sees is still multiplied by its weight of 0, here and in torch.
    rows = {"query": slice(7, 8), "key": slice(7, None), "value": slice(None)}
    touched[1, 1, rows[where]] = True
    assert torch.equal(out[~touched], want[~touched])
    theirs = plain(**tensors, causal=True)[0]
    assert torch.equal(out[touched].isnan(), theirs[touched].isnan()) or where == "value"
    assert not torch.equal(out[touched], want[touched])


def test_philox_known_answers():
    """The vectors published with Random123."""
    ones = 0xFFFFFFFF
    known = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((ones,) * 4, (ones,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
            *(0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    }
    for (counter, key), words in known.items():
        got = philox4x32(*map(torch.tensor, counter), key=tuple(map(torch.tensor, key)))
        assert tuple(w.item() for w in got) == words


@BOTH
def test_dropout_mask_is_the_documented_one(backend):
    """With value the identity the output shows which weights were kept, in every word of a counter."""
    q, k, _ = make_qkv(2, 3, 11, 37)
    v = torch.eye(37).expand(2, 3, 37, 37)
    for p in (0.1, 0.5, 0.95):
        generator = torch.Generator().manual_seed(2)
        out, lse = pyops.attention(
            *(q, k, v), dropout_p=p, generator=generator, return_lse=True, backend=backend
        )
        keep = dropout_mask((2, 3, 11, 37), p, 2)
        assert torch.equal(out != 0, keep)
        full, full_lse = pyops.attention(q, k, v, return_lse=True, backend=backend)
        torch.testing.assert_close(out, full * keep / (1 - p))
        assert torch.equal(lse, full_lse)
    assert abs(dropout_mask((2, 2, 128, 128), 0.3, 1).float().mean() - 0.7) < 0.005
    assert dropout_threshold(0.5) == 2**31 and dropout_threshold(1 - 1e-12) == 2**32 - 1


@BOTH
def test_dropout_follows_torchs_generators(backend):
    qkv = make_qkv()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(pyops.attention(*qkv, dropout_p=0.5, backend=backend))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    generator = torch.Generator().manual_seed(5)
    pair = [pyops.attention(*qkv, dropout_p=0.5, generator=generator) for _ in range(2)]
    assert not torch.equal(*pair)


@pytest.mark.parametrize("parts", [1, 2, 5])
@DTYPES
def test_merging_parts_of_the_keys(parts, dtype):
    q, k, v = make_qkv(2, 4, 20, 50, dtype=dtype)
    each = [
        pyops.attention(q, *both, return_lse=True)
        for both in zip(k.chunk(parts, 2), v.chunk(parts, 2), strict=True)
    ]
    out, lse = pyops.merge_attention(*zip(*each, strict=True))
    want, want_lse = pyops.attention(q, k, v, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
    stacked = pyops.merge_attention(*(torch.stack(c) for c in zip(*each, strict=True)))
    assert torch.equal(stacked[0], out)


def test_gradients_through_a_merge_are_those_of_the_whole():
    leaves = [t.requires_grad_() for t in make_qkv(2, 4, 20, 50, heads_kv=2)]
    q, k, v = leaves
    weight, grad = randn(2, 4, 20), randn(2, 4, 20, 16, seed=6)
    each = [
        pyops.attention(q, *both, return_lse=True, backend="cpu")
        for both in zip(k.split([20, 30], 2), v.split([20, 30], 2), strict=True)
    ]
    merged = pyops.merge_attention(*zip(*each, strict=True))
    whole = pyops.attention(*leaves, return_lse=True, backend="cpu")
    results = [torch.autograd.grad(pair, leaves, (grad, weight)) for pair in (merged, whole)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_merging_nothing():
    outs = [torch.zeros(2, 3, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.full((2, 3), -torch.inf) for _ in range(2)]
    lses[1] = torch.where(torch.arange(3) == 1, 0.5, -torch.inf).expand(2, 3).requires_grad_()
    out, lse = pyops.merge_attention(outs, lses)
    assert torch.equal(lse, lses[1]) and not out.any()
    grads = torch.autograd.grad(out.sum() + lse[:, 1].sum(), (*outs, lses[1]))
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[1][:, 1], torch.ones(2, 4)) and not grads[0].any()


@st.composite
def calls(draw):
    """(shapes and dtype for make_qkv, options with shapes in place of tensors, seed)."""
    heads_kv = draw(st.sampled_from([1, 2, 3]))
    heads = heads_kv * draw(st.sampled_from([1, 2]))
    batch = draw(st.integers(1, 2))
    seqlen_q, seqlen_k = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    shapes = {
        **{"batch": batch, "heads": heads, "heads_kv": heads_kv},
        **{"seqlen_q": seqlen_q, "seqlen_k": seqlen_k},
        "head_dim": draw(st.integers(1, 80)),
        "v_head_dim": draw(st.integers(1, 80)),
        "dtype": draw(
            st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        ),
        "heads_inside": draw(st.booleans()),
    }
    side = st.one_of(st.none(), st.integers(0, 110))
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(side, side))),
        "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.4])),
    }
    full = (batch, heads, seqlen_q, seqlen_k)
    if draw(st.booleans()):
        shape = tuple(size if draw(st.booleans()) else 1 for size in full)
        options["bias"] = (shape[draw(st.integers(0, 3)) :], draw(st.booleans()))
    if draw(st.booleans()):
        options["alibi_slopes"] = (heads,) if draw(st.booleans()) else (batch, heads)
    if draw(st.booleans()):
        options["sinks"] = (heads,)
    return shapes, options, draw(st.integers(0, 2**16))


FIXED = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@FIXED
@given(calls())
def test_any_call(call):
    """Output, lse and every gradient of backend cpu against the reference in float64."""
    shapes, options, seed = call
    qkv = make_qkv(**shapes, seed=seed)
    learned = {}
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            learned[name] = randn(*options.pop(name), seed=seed + 1).abs() / 4
    if "bias" in options:
        shape, boolean = options.pop("bias")
        learned["bias"] = randn(*shape, seed=seed + 2)
        if boolean:
            learned["bias"] = learned["bias"] > -0.5
    results = []
    for to, backend in ((None, "cpu"), (None, "reference"), (torch.float64, "reference")):
        tensors = {**dict(zip(("query", "key", "value"), qkv, strict=True)), **learned}
        if to is not None:
            tensors = {n: exact(t) for n, t in tensors.items()}
        tensors = {n: t.detach() for n, t in tensors.items()}
        leaves = [
            t.requires_grad_()
            for n, t in tensors.items()
            if t.is_floating_point() and n != "alibi_slopes"
        ]
        generator = torch.Generator().manual_seed(seed)
        out, lse = pyops.attention(
            **tensors, **options, generator=generator, return_lse=True, backend=backend
        )
        grad, weight = randn(*out.shape, seed=3), randn(*lse.shape, seed=4)
        finite = lse.masked_fill(lse.isinf(), 0)
        grads = torch.autograd.grad(
            (out, finite), leaves, (grad.to(out.dtype), weight.to(lse.dtype))
        )
        results.append((out, lse, *grads))
    for got, lowp, best in zip(*results, strict=True):
        assert got.shape == best.shape and torch.equal(got.isfinite(), lowp.isfinite())
        if shapes["dtype"] == torch.float32 and within_budget(got, lowp, best, 3.0):
            continue
        # A handful of elements, or one rounding less inside: relative to the largest value.
        finite = best.isfinite()
        scale = best[finite].abs().max().item() if finite.any() else 0.0
        eps = torch.finfo(shapes["dtype"]).eps
        atol = 16 * eps * max(1.0, scale)
        torch.testing.assert_close(got[finite].double(), best[finite], rtol=16 * eps, atol=atol)
