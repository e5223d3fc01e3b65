"""attention_varlen: packed sequences against the same sequences one by one."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BACKENDS, plain, randn

import pyops
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

BOTH = pytest.mark.parametrize("backend", BACKENDS)
LENGTHS = {
    "several": ([5, 40, 1, 17], [9, 33, 60, 17]),
    "one": ([37], [53]),
    "empty ones": ([0, 20, 0, 7, 0], [3, 0, 0, 11, 5]),
    "long and short": ([140, 1, 1, 3], [140, 3, 90, 1]),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (7, 2)},
    "alibi, sinks, softcap": {
        **{"alibi_slopes": torch.tensor([0.1, 0.3, 0.2, 0.05]), "softcap": 5.0},
        **{"sinks": torch.tensor([0.3, -0.5, 1.0, 0.0]), "causal": True},
    },
}


def cu_seqlens(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def packed(lengths_q, lengths_k, head_dim=16, v_head_dim=24, tail=0, dtype=torch.float32):
    total_q, total_k = sum(lengths_q) + tail, sum(lengths_k) + tail
    shapes = ((total_q, 4, head_dim), (total_k, 2, head_dim), (total_k, 2, v_head_dim))
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def one_by_one(query, key, value, cu_q, cu_k, **options):
    outputs, lses = [], []
    for b in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], key[keys], value[keys]))
        if q.shape[2]:
            out, lse = plain(q, k, v, **options)
            outputs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, 1)


# Every two of (lengths, options, dtype) meet.
GRID = [
    (lengths, options, (torch.float32, torch.bfloat16)[(i + j) % 2])
    for i, lengths in enumerate(LENGTHS)
    for j, options in enumerate(OPTIONS)
]


@BOTH
@pytest.mark.parametrize("lengths, options, dtype", GRID)
def test_equals_one_by_one(lengths, options, dtype, backend):
    options = dict(OPTIONS[options])
    sinks = options.pop("sinks", None)
    cu_q, cu_k = map(cu_seqlens, LENGTHS[lengths])
    tensors = packed(*LENGTHS[lengths], dtype=dtype)
    results = []
    for function, to in ((pyops.attention_varlen, dtype), (one_by_one, dtype), (one_by_one, None)):
        leaves = [t.detach().to(to or torch.float64).requires_grad_() for t in tensors]
        more = dict(options)
        if sinks is not None:
            more["sinks"] = sinks.to(to or torch.float64).requires_grad_()
            leaves.append(more["sinks"])
        if function is pyops.attention_varlen:
            more.update(return_lse=True, backend=backend)
        out, lse = function(*leaves[:3], cu_q, cu_k, **more)
        grad = randn(*out.shape, seed=9).to(out.dtype)
        weight = randn(*lse.shape, seed=8).to(lse.dtype)
        loss = (out * grad).sum() + (lse.masked_fill(lse.isinf(), 0) * weight).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = [
            torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)
        ]
        results.append((out, lse.float() if to else lse, *grads))
    (out, lse, *grads), *wanted = results
    assert out.is_contiguous() and lse.is_contiguous()
    if dtype == torch.float32 or out.numel() > 1000:
        assert_within_budget(out, wanted[0][0], wanted[1][0])
        assert_within_budget(lse, wanted[0][1], wanted[1][1])
        for got, lowp, best in zip(grads, *(w[2:] for w in wanted), strict=True):
            assert_within_budget(got, lowp, best, GRADIENT_BUDGET)
    else:
        torch.testing.assert_close(out.double(), wanted[1][0].double(), rtol=2e-2, atol=2e-2)


@BOTH
def test_nothing_at_all(backend):
    tensors, cu = packed([0, 0], [0, 0]), [*map(cu_seqlens, ([0, 0], [0, 0]))]
    out, lse = pyops.attention_varlen(*tensors, *cu, return_lse=True, backend=backend)
    assert out.shape == (0, 4, 24) and lse.shape == (4, 0)


@BOTH
def test_poisoned_tail_and_gaps(backend):
    """cu_seqlens may end before the tensors do: what lies behind is neither read nor left unwritten."""
    lengths = [5, 0, 12], [9, 4, 7]
    cu = [*map(cu_seqlens, lengths)]
    tensors = packed(*lengths, tail=6)
    for tensor, ends in zip(tensors, (cu[0], cu[1], cu[1]), strict=True):
        tensor[ends[-1] :] = float("nan")
    for sinks in (None, torch.zeros(4)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, lse = pyops.attention_varlen(
            *leaves, *cu, causal=True, sinks=sinks, return_lse=True, backend=backend
        )
        assert not out[17:].any() and (lse[:, 17:] == -torch.inf).all()
        assert out[:17].isfinite().all() and lse[:, 5:17].isfinite().any()
        grads = torch.autograd.grad(out.sum() + lse[:, 5:10].sum(), leaves)
        for grad, ends in zip(grads, (cu[0], cu[1], cu[1]), strict=True):
            assert grad.isfinite().all() and not grad[ends[-1] :].any() and grad.any()


@BOTH
def test_dropout_counts_sequences(backend):
    lengths = [4, 6, 3], [8, 5, 9]
    q, k, v = packed(*lengths)
    cu = [*map(cu_seqlens, lengths)]
    from pyops.reference.attention import dropout_keep

    state = torch.randint(2**63 - 1, (2,), generator=torch.Generator().manual_seed(4))
    out = pyops.attention_varlen(
        *(q, k, v, *cu),
        dropout_p=0.4,
        generator=torch.Generator().manual_seed(4),
        backend=backend,
    )
    for b in range(3):
        rows, keys = slice(*cu[0][b : b + 2]), slice(*cu[1][b : b + 2])
        keep = dropout_keep(state, (3, 4, lengths[0][b], lengths[1][b]), 0.4)[b : b + 1]
        one = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        want, _ = plain(*one, keep=keep, dropout_p=0.4)
        torch.testing.assert_close(out[rows], want[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_slopes_of_each_sequence():
    lengths = [4, 6], [8, 5]
    tensors, cu = packed(*lengths), [*map(cu_seqlens, lengths)]
    slopes = randn(2, 4).abs()
    got = pyops.attention_varlen(*tensors, *cu, alibi_slopes=slopes, backend="cpu")
    want = pyops.attention_varlen(*tensors, *cu, alibi_slopes=slopes, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    rows = pyops.attention_varlen(*tensors, *cu, alibi_slopes=slopes[1], backend="cpu")
    torch.testing.assert_close(rows[4:], got[4:], rtol=1e-5, atol=1e-5)


def test_max_seqlen_as_given_or_found():
    lengths = LENGTHS["several"]
    tensors, cu = packed(*lengths), [*map(cu_seqlens, lengths)]
    want = pyops.attention_varlen(*tensors, *cu)
    assert torch.equal(pyops.attention_varlen(*tensors, *cu, 40, 60), want)
    assert torch.equal(pyops.attention_varlen(*tensors, *cu, 500, 99), want)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    lengths = [2, 0, 1], [3, 2, 1]
    leaves = [t.double().requires_grad_() for t in packed(*lengths, 3, 2)]
    options = {
        k: v.double() if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[options].items()
    }

    def call(*tensors):
        out, lse = pyops.attention_varlen(
            *tensors, *map(cu_seqlens, lengths), return_lse=True, **options
        )
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(call, leaves)
    assert options or torch.autograd.gradgradcheck(call, leaves)


def test_second_order_of_the_kernels():
    lengths = [2, 5], [3, 4]
    grads = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, None)):
        leaves = [t.to(dtype).requires_grad_() for t in packed(*lengths)]
        out = pyops.attention_varlen(*leaves, *map(cu_seqlens, lengths), backend=backend)
        first = torch.autograd.grad(out.pow(2).sum(), leaves, create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


SPEC = (0.3, 0.0, -1, 0, False, 0.0)


def test_opcheck():
    lengths = [5, 0, 12], [9, 4, 7]
    cu, slopes, sinks = [*map(cu_seqlens, lengths)], randn(4).abs(), randn(4)
    leaves = [t.requires_grad_() for t in (*packed(*lengths), sinks)]
    extras = (*cu, 12, 9, slopes, leaves[3], None, *SPEC)
    torch.library.opcheck(torch.ops.pyops.attention_varlen.default, (*leaves[:3], *extras))
    out, lse = torch.ops.pyops.attention_varlen(*(t.detach() for t in leaves[:3]), *extras)
    out, lse = out.detach(), lse.detach()
    for mask in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(
            torch.ops.pyops.attention_varlen_backward.default,
            (out, lse, *(t.detach() for t in leaves[:3]), out, lse, *extras, mask),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compile_without_graph_breaks():
    torch._dynamo.reset()

    def function(q, k, v, cu_q, cu_k):
        return pyops.attention_varlen(q.sin(), k, v, cu_q, cu_k, 40, 60, causal=True, backend="cpu")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    lengths = LENGTHS["several"]
    results = []
    for f in (compiled, function):
        leaves = [t.requires_grad_() for t in packed(*lengths)]
        out = f(*leaves, *map(cu_seqlens, lengths))
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_vmap_and_autocast():
    lengths = [5, 3], [4, 6]
    q, k, v = packed(*lengths)
    cu = [*map(cu_seqlens, lengths)]

    def call(q):
        return pyops.attention_varlen(q, k, v, *cu, 5, 6, backend="cpu")

    mapped = torch.vmap(call)(torch.stack((q, q * 2)))
    torch.testing.assert_close(mapped, torch.stack((call(q), call(q * 2))))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(q).dtype == torch.bfloat16


def test_bits_repeat_over_runs_and_threads():
    lengths = LENGTHS["long and short"]
    leaves = [t.requires_grad_() for t in packed(*lengths)]
    cu, first = [*map(cu_seqlens, lengths)], None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out = pyops.attention_varlen(*leaves, *cu, causal=True, backend="cpu")
        results = (out, *torch.autograd.grad(out.square().sum(), leaves))
        first = results if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


Q, K, V = packed([3, 4], [5, 2], 8, 8)
CU_Q, CU_K = cu_seqlens([3, 4]), cu_seqlens([5, 2])
BAD = {
    "query of rank 4": ({"query": Q[None]}, ValueError, ["query", "3 dimensions"]),
    "heads": ({"key": K[:, [0, 1, 1]], "value": V[:, [0, 1, 1]]}, ValueError, ["key", "divides"]),
    "rows of value": ({"value": V[:6]}, ValueError, ["value", "7 rows", "(6, 2, 8)"]),
    "head_dim": ({"key": K[..., :7]}, ValueError, ["key", "head_dim 8"]),
    "no cu_seqlens": ({"cu_seqlens_q": None}, TypeError, ["cu_seqlens_q", "Tensor", "NoneType"]),
    "list": ({"cu_seqlens_k": [0, 7]}, TypeError, ["cu_seqlens_k", "Tensor", "list"]),
    "int64": ({"cu_seqlens_k": CU_K.long()}, TypeError, ["cu_seqlens_k", "int32", "int64"]),
    "rank": ({"cu_seqlens_q": CU_Q[None]}, ValueError, ["cu_seqlens_q", "(batch + 1,)", "(1, 3)"]),
    "device": ({"cu_seqlens_q": CU_Q.to("meta")}, ValueError, ["cu_seqlens_q", "cpu", "meta"]),
    "other batch": ({"cu_seqlens_k": CU_K[:2]}, ValueError, ["cu_seqlens_k", "(3,)", "(2,)"]),
    "no zero": (
        {"cu_seqlens_q": CU_Q + 1},
        ValueError,
        ["cu_seqlens_q", "start at 0", "[1, 4, 8]"],
    ),
    "decreasing": (
        {"cu_seqlens_k": torch.tensor([0, 6, 5], dtype=torch.int32)},
        ValueError,
        ["cu_seqlens_k", "decrease", "[0, 6, 5]"],
    ),
    "beyond": (
        {"cu_seqlens_q": torch.tensor([0, 3, 8], dtype=torch.int32)},
        ValueError,
        ["cu_seqlens_q", "7 rows", "[0, 3, 8]"],
    ),
    "max_seqlen_q": ({"max_seqlen_q": 3}, ValueError, ["max_seqlen_q", "at least 4", "3"]),
    "max_seqlen_k": ({"max_seqlen_k": 4.0}, TypeError, ["max_seqlen_k", "int", "4.0"]),
    "slopes": ({"alibi_slopes": randn(3, 4)}, ValueError, ["alibi_slopes", "(2, 4)", "(3, 4)"]),
    "dropout": ({"dropout_p": 1.0}, ValueError, ["dropout_p", "[0, 1)"]),
    "window": ({"window": (-1, -1)}, ValueError, ["window", "at least 0"]),
    "backend": ({"backend": "gpu"}, ValueError, ["backend", "gpu"]),
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_bad_argument(what, backend):
    changed, exception, words = BAD[what]
    arguments = {"query": Q, "key": K, "value": V, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    with pytest.raises(exception) as caught:
        pyops.attention_varlen(**{**arguments, "backend": backend, **changed})
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("values", [[1, 4, 7], [0, 6, 5], [0, 3, 8]], ids=str)
def test_direct_call_of_the_op(values):
    """The op checks the values itself: nothing of ours stands between it and an exported program."""
    bad = torch.tensor(values, dtype=torch.int32)
    for name, cu in (("cu_seqlens_q", (bad, CU_K)), ("cu_seqlens_k", (CU_Q, bad))):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.pyops.attention_varlen(Q, K, V, *cu, 10, 10, None, None, None, *SPEC)
