"""attention_plain, which calls without options or gradients go through: the same results by a shorter way."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from attention_cases import check, expected_strides, make_qkv, randn
from torch.utils._python_dispatch import TorchDispatchMode

import pyops

PLAIN = torch.ops.pyops.attention_plain.default
# batch, heads, seqlen_q, seqlen_k, head_dim, heads_kv, v_head_dim: some of the kernel for short sequences, whose
# limits are 16 queries, 128 keys and a head_dim of at least the queries', some just outside of it, and some of few
# queries whose scores are dot products.
SHAPES = [
    (3, 4, 10, 10, 16, 4, 16),
    (2, 4, 16, 128, 16, 2, 16),
    (2, 2, 16, 129, 16, 2, 16),
    (2, 2, 17, 20, 20, 2, 20),
    (1, 6, 9, 5, 33, 3, 47),
    (2, 2, 12, 7, 11, 2, 11),
    (2, 4, 1, 3, 8, 4, 8),
    (2, 4, 8, 40, 64, 4, 64),
    (2, 4, 9, 40, 64, 2, 64),
    (1, 2, 70, 50, 24, 2, 24),
    (1, 2, 5, 799, 64, 2, 64),
    (1, 4, 8, 300, 40, 2, 40),
]


class Calls(TorchDispatchMode):
    """Names of the ops of pyops that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyops":
            self.seen.append(func._schema.name.removeprefix("pyops::"))
        return func(*args, **(kwargs or {}))


def called(function):
    with Calls() as calls:
        function()
    return calls.seen


def tensors(shape, dtype=torch.float32):
    batch, heads, seqlen_q, seqlen_k, head_dim, heads_kv, v_head_dim = shape
    made = make_qkv(
        batch, heads, seqlen_q, seqlen_k, head_dim, heads_kv=heads_kv, v_head_dim=v_head_dim
    )
    return [t.to(dtype) for t in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitwise_the_op_with_all_options(shape, dtype):
    q, k, v = tensors(shape, dtype)
    for causal, top_left, scale in itertools.product((False, True), (False, True), (None, 0.7)):
        spec = (shape[4] ** -0.5 if scale is None else scale, 0.0, -1, 0 if causal else -1)
        want, _ = torch.ops.pyops.attention(q, k, v, *(None,) * 4, *spec, top_left, 0.0)
        got = PLAIN(q, k, v, scale, causal, top_left)
        assert torch.equal(got, want) and got.stride() == want.stride()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_plain_torch(shape, causal):
    """With lse and gradients, whose sums must be those of the kernel that forward took."""
    check(*tensors(shape), backend="cpu", causal=causal, lse_gradient=True)


@pytest.mark.parametrize("seqlen_q", [3, 8])
def test_few_queries_sum_alike_in_backward(seqlen_q):
    """Nothing averages exp(score - lse) there: scores summed in another order have up to 7 times torch's error."""
    for seed in range(8):
        check(*make_qkv(1, 4, seqlen_q, 64, 128, seed=seed), backend="cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_strides(shape):
    q, k, v = tensors(shape)
    want = PLAIN(q, k, v, None, True, False)
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    out = PLAIN(*heads_inside, None, True, False)
    assert torch.equal(out, want) and out.stride() == expected_strides(heads_inside[0], out.shape)
    columns = [t.mT.contiguous().mT for t in (q, k, v)]
    assert torch.equal(PLAIN(*columns, None, True, False), want)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in (q, k, v)]
    assert torch.equal(PLAIN(*shifted, None, True, False), want)


def test_hidden_keys_are_not_read():
    """The last keys are nobody's; a row that sees no key gives 0."""
    q, k, v = tensors((2, 2, 10, 30, 16, 2, 16))
    want = PLAIN(q, k[:, :, :12].contiguous(), v[:, :, :12].contiguous(), None, True, True)
    k[:, :, 12:], v[:, :, 12:] = torch.nan, torch.nan
    assert torch.equal(PLAIN(q, k, v, None, True, True), want)
    q, k, v = tensors((2, 2, 10, 4, 16, 2, 16))
    out = PLAIN(q, k, v, None, True, False)
    assert not out[:, :, :6].any() and out[:, :, 6:].all()


def test_threads_do_not_change_results():
    before = torch.get_num_threads()
    q, k, v = tensors((32, 8, 10, 10, 16, 8, 16))
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(PLAIN(q, k, v, None, True, False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_opcheck():
    inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(SHAPES[0])]
    for made in (tensors(SHAPES[0]), tensors(SHAPES[4]), inside):
        torch.library.opcheck(PLAIN, (*made, None, True, False))


def test_who_goes_this_way():
    q, k, v = tensors(SHAPES[0])
    attention, sdpa = pyops.attention, pyops.scaled_dot_product_attention
    short, long = ["attention_plain"], ["attention"]
    assert called(lambda: attention(q, k, v)) == short
    assert called(lambda: attention(q, k, v, causal=True, scale=0.5, backend="cpu")) == short
    assert called(lambda: sdpa(q, k, v, is_causal=True)) == short
    assert called(lambda: attention(q, k, v, return_lse=True)) == long
    assert called(lambda: attention(q, k, v, window=(2, 2))) == long
    assert called(lambda: attention(q, k, v, softcap=1.0)) == long
    assert called(lambda: attention(q, k, v, bias=randn(10, 10))) == long
    assert called(lambda: attention(q, k, v, backend="reference")) == []
    assert called(lambda: attention(q.double(), k.double(), v.double())) == []
    k.requires_grad_()
    assert called(lambda: attention(q, k, v)) == called(lambda: sdpa(q, k, v)) == long
    with torch.no_grad():
        assert called(lambda: attention(q, k, v)) == called(lambda: sdpa(q, k, v)) == short


def test_autocast_goes_the_long_way():
    q, k, v = tensors(SHAPES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyops.attention(q, k, v).dtype == torch.bfloat16


def test_sdpa_leaves_other_heads_and_sizes_to_torch():
    q, k, v = tensors((2, 4, 6, 6, 8, 2, 8))
    with pytest.raises(RuntimeError):  # torch's own
        pyops.scaled_dot_product_attention(q, k, v)
    out = pyops.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    empty = q[:, :, :0]
    assert pyops.scaled_dot_product_attention(empty, q, q).shape == empty.shape


def test_tiny_call_costs_less_than_twice_torchs():
    """In processor time, the best of several runs of each; the op with all options takes 2.5 times."""
    q, k, v = tensors((1, 1, 2, 2, 4, 1, 4))

    def seconds(function):
        start = time.thread_time()
        for _ in range(500):
            function(q, k, v)
        return time.thread_time() - start

    torch.use_deterministic_algorithms(False)  # filling new memory is no part of either
    for _ in range(5):
        both = (pyops.attention, F.scaled_dot_product_attention)
        ours, theirs = (min(seconds(f) for _ in range(9)) for f in both)
        if ours < 2 * theirs:
            return
    pytest.fail(f"{ours / 500 * 1e6:.1f} us against torch's {theirs / 500 * 1e6:.1f} us")


BAD = {
    "rank": lambda q, k, v: (q[0], k, v, None, False, False),
    "rank of value": lambda q, k, v: (q, k, v[0], None, False, False),
    "head_dim": lambda q, k, v: (q, k[..., :7], v, None, False, False),
    "heads": lambda q, k, v: (q, k[:, :3], v[:, :3], None, False, False),
    "dtype": lambda q, k, v: (q, k.half(), v, None, False, False),
    "float64": lambda q, k, v: (q.double(), k.double(), v.double(), None, False, False),
    "empty": lambda q, k, v: (q[:, :, :0], k, v, None, False, False),
    "scale": lambda q, k, v: (q, k, v, float("nan"), False, False),
}


@pytest.mark.parametrize("what", BAD)
def test_direct_call_is_refused(what):
    with pytest.raises(RuntimeError, match="query|key|value|scale"):
        PLAIN(*BAD[what](*tensors(SHAPES[0])))
