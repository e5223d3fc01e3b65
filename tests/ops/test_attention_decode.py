"""attention_decode against attention on the same keys: contiguous and paged caches, append, rotary, splits."""

from __future__ import annotations

import pytest
import torch
from attention_cases import exact, plain, randn

import pyops
from pyops.reference.attention_decode import rotate
from pyops.testing import assert_within_budget

NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("pyops::attention_decode", "CPU")
BOTH = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not NATIVE, reason="no kernel was built")),
    ],
)
LENGTHS = (5, 0, 37)  # filled before the call
CAPACITY, BLOCK = 48, 8


class Case:
    """A cache with NaN wherever nothing is filled, and the same keys in dense tensors."""

    def __init__(
        self, paged, seqlen_new=0, seqlen_q=1, dtype=torch.float32, heads_kv=2, d=16, dv=24
    ):
        self.query = randn(3, 4, seqlen_q, d, dtype=dtype)
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        self.new = None
        if seqlen_new:
            self.new = [randn(3, heads_kv, seqlen_new, n, seed=i + 20, dtype=dtype) for i, n in
                        enumerate((d, dv))]  # fmt: skip
        whole = [
            randn(3, heads_kv, CAPACITY, n, seed=i, dtype=dtype) for i, n in enumerate((d, dv))
        ]
        for cache in whole:
            for b, length in enumerate(LENGTHS):
                cache[b, :, length:] = torch.nan
        self.dense = [t.clone() for t in whole]
        self.block_table = None
        self.caches = whole
        if paged:
            blocks = CAPACITY // BLOCK
            order = torch.randperm(3 * blocks + 4, generator=torch.Generator().manual_seed(2))
            self.block_table = order[: 3 * blocks].view(3, blocks).int()
            self.caches = [t.new_full((3 * blocks + 4, heads_kv, BLOCK, t.shape[3]), torch.nan)
                           for t in whole]  # fmt: skip
            for cache, dense in zip(self.caches, whole, strict=True):
                pages = dense.unflatten(2, (blocks, BLOCK)).transpose(1, 2)
                cache[self.block_table.long()] = pages

    def call(self, backend, **options):
        key, value = self.new or (None, None)
        return pyops.attention_decode(
            *(self.query, *self.caches),
            key=key,
            value=value,
            cache_seqlens=self.lengths,
            block_table=self.block_table,
            return_lse=True,
            backend=backend,
            **options,
        )

    def expected(self, query=None, new=None, leftpad=(0, 0, 0), **options):
        """((output, lse) in the dtype, the same in float64) by plain torch on dense keys."""
        query = self.query if query is None else query
        new = self.new if new is None else new
        each = []
        for b, length in enumerate(LENGTHS):
            keys = [t[b : b + 1, :, :length] for t in self.dense]
            if new is not None:
                keys = [torch.cat((t, n[b : b + 1]), 2) for t, n in zip(keys, new, strict=True)]
            keys = [t[:, :, leftpad[b] :] for t in keys]
            one = (query[b : b + 1], *keys)
            each.append((plain(*one, **options), plain(*map(exact, one), **options)))
        lowp, best = zip(*each, strict=True)
        return [[torch.cat(part) for part in zip(*half, strict=True)] for half in (lowp, best)]

    def gathered(self):
        """The caches as dense tensors."""
        if self.block_table is None:
            return self.caches
        return [t[self.block_table.long()].transpose(1, 2).flatten(2, 3) for t in self.caches]


def assert_right(results, expected):
    (lowp, lowp_lse), (best, best_lse) = expected
    assert_within_budget(results[0], lowp, best)
    assert_within_budget(results[1], lowp_lse.float(), best_lse)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (9, 0)},
    "everything": {
        **{"alibi_slopes": torch.tensor([0.1, 0.3, 0.2, 0.05]), "softcap": 5.0, "scale": 0.4},
        **{"sinks": torch.tensor([0.3, -0.5, 1.0, 0.0]), "causal": True},
    },
}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEQLENS = ((1, 0), (1, 1), (3, 3), (4, 2), (2, 9))  # of query and new keys
# Every two of (kind of cache, options, lengths, dtype) meet.
GRID = [
    ((i + j) % 2 == 1, name, *seqlens, DTYPES[(i + j) % 3])
    for i, name in enumerate(OPTIONS)
    for j, seqlens in enumerate(SEQLENS)
]


@BOTH
@pytest.mark.parametrize("paged, name, seqlen_q, seqlen_new, dtype", GRID)
def test_values(paged, name, seqlen_q, seqlen_new, dtype, backend):
    case = Case(paged, seqlen_new, seqlen_q, dtype)
    expected = case.expected(**OPTIONS[name])
    results = case.call(backend, **OPTIONS[name])
    assert results[0].is_contiguous() and results[1].dtype == torch.float32
    assert_right(results, expected)
    for cache, dense, i in zip(case.gathered(), case.dense, (0, 1), strict=True):
        for b, length in enumerate(LENGTHS):
            if seqlen_new:
                dense[b, :, length : length + seqlen_new] = case.new[i][b]
        assert torch.equal(cache.nan_to_num(7), dense.nan_to_num(7))  # and nothing else is written


@BOTH
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_leftpad(seqlen_q, name, backend):
    case = Case(name == "causal", 3, seqlen_q)
    leftpad = (4, 3, 17)  # of the second sequence everything
    for cache, dense in zip(case.caches, case.dense, strict=True):
        for b, count in enumerate(leftpad[: 0 if case.block_table is not None else 3]):
            cache[b, :, : min(count, LENGTHS[b])] = torch.nan
            dense[b, :, : min(count, LENGTHS[b])] = torch.nan
    expected = case.expected(leftpad=leftpad, **OPTIONS[name])
    options = {"cache_leftpad": torch.tensor(leftpad, dtype=torch.int32), **OPTIONS[name]}
    for splits in (0, 2):
        assert_right(case.call(backend, num_splits=splits, **options), expected)


@BOTH
@pytest.mark.parametrize("heads_kv, d, dv", [(1, 64, 64), (4, 59, 7), (2, 128, 128)])
def test_heads_and_head_dims(heads_kv, d, dv, backend):
    case = Case(True, 2, 2, heads_kv=heads_kv, d=d, dv=dv)
    assert_right(case.call(backend, causal=True), case.expected(causal=True))


@BOTH
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_rotary(rotary_dim, causal, interleaved, backend):
    paged = (rotary_dim == 16) ^ causal ^ interleaved
    case = Case(paged, 3, 3)
    angles = randn(CAPACITY + 4, rotary_dim // 2) * 3
    cos, sin = angles.cos(), angles.sin()
    query, key = case.query.clone(), case.new[0].clone()
    turn = torch.polar(torch.ones_like(angles), angles)
    half = rotary_dim // 2
    for b, length in enumerate(LENGTHS):
        for t in range(3):
            for tensor, position in ((query, length + t * causal), (key, length + t)):
                row = tensor[b, :, t]
                first = row[:, 0:rotary_dim:2] if interleaved else row[:, :half]
                second = row[:, 1:rotary_dim:2] if interleaved else row[:, half:rotary_dim]
                turned = torch.complex(first, second) * turn[position]
                first.copy_(turned.real.clone()), second.copy_(turned.imag.clone())
    expected = case.expected(query, (key, case.new[1]), causal=causal)
    results = case.call(
        backend, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, causal=causal
    )
    for got, want in zip(results, expected[1], strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
    for b, length in enumerate(LENGTHS):
        written = case.gathered()[0][b, :, length : length + 3]
        torch.testing.assert_close(written, key[b], rtol=1e-5, atol=1e-5)


@BOTH
def test_rotary_needs_the_positions_in_use(backend):
    longest = max(LENGTHS)
    angles = randn(longest + 4, 4)
    for causal, new, needed in ((False, 0, 1), (False, 3, 3), (True, 0, 4), (True, 3, 4)):
        tables = {"rotary_cos": angles[: longest + needed].cos()}
        tables["rotary_sin"] = angles[: longest + needed].sin()
        case = Case(False, new, 4)
        assert case.call(backend, causal=causal, **tables)[0].isfinite().any()
        tables = {name: table[:-1] for name, table in tables.items()}
        with pytest.raises((ValueError, RuntimeError), match=f"rotary_cos: .*{longest + needed}"):
            case.call(backend, causal=causal, **tables)


def test_rotation_by_zero_and_its_inverse():
    x, angles = randn(2, 5, 8), randn(9, 3)
    positions = torch.arange(5)
    for interleaved in (False, True):
        there = rotate(x, angles.cos(), angles.sin(), positions, interleaved)
        back = rotate(there, angles.cos(), -angles.sin(), positions, interleaved)
        torch.testing.assert_close(back, x)
        assert torch.equal(there[..., 6:], x[..., 6:]) and not torch.equal(there, x)


@BOTH
def test_splits_change_rounding_only(backend):
    results = []
    for splits in (0, 1, 2, 3, 7, 64):
        torch.set_num_threads(1 + splits % 2)
        results.append([Case(True, 1).call(backend, causal=True, num_splits=splits) for _ in "ab"])
        assert all(torch.equal(a, b) for a, b in zip(*results[-1], strict=True)), splits
    for (out, lse), _ in results[1:]:
        torch.testing.assert_close(out, results[0][0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, results[0][0][1], rtol=1e-5, atol=1e-6)


@BOTH
def test_lengths_as_an_int_and_the_whole_cache(backend):
    q, k, v = randn(2, 4, 1, 16), randn(2, 2, 20, 16), randn(2, 2, 20, 16)
    whole = pyops.attention_decode(q, k, v, backend=backend)
    torch.testing.assert_close(whole, plain(q, k, v)[0], rtol=1e-5, atol=1e-5)
    part = pyops.attention_decode(q, k, v, cache_seqlens=7, backend=backend)
    torch.testing.assert_close(part, plain(q, k[:, :, :7], v[:, :, :7])[0], rtol=1e-5, atol=1e-5)
    nothing, lse = pyops.attention_decode(
        q, k, v, cache_seqlens=0, return_lse=True, backend=backend
    )
    assert not nothing.any() and (lse == -torch.inf).all()


@BOTH
def test_unused_entries_of_the_table_are_not_looked_at(backend):
    case = Case(True, 2)
    want = Case(True, 2).call(backend)
    for b, length in enumerate(LENGTHS):
        case.block_table[b, -(-(length + 2) // BLOCK) :] = -1 - b * 10**6
    for got, expected in zip(case.call(backend), want, strict=True):
        assert torch.equal(got, expected)


@BOTH
def test_strided_caches_and_queries(backend):
    q, k, v = randn(2, 3, 4, 16), randn(2, 20, 2, 16), randn(2, 20, 2, 16)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, seqlen, heads, head_dim) in memory
    new = [randn(2, 3, 2, 16, seed=i).transpose(1, 2) for i in (6, 7)]
    lengths = torch.tensor([4, 17], dtype=torch.int32)
    results = []
    for tensors in ((q, k.clone(), v.clone()), (t.contiguous() for t in (q, k, v))):
        query, *caches = tensors
        out = pyops.attention_decode(
            query, *caches, key=new[0], value=new[1], cache_seqlens=lengths, causal=True,
            backend=backend,
        )  # fmt: skip
        results.append((out, *caches))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert results[0][0].transpose(1, 2).is_contiguous()


@BOTH
def test_compile_and_fake(backend):
    torch._dynamo.reset()

    def step(q, k, v, key, value, lengths):
        return pyops.attention_decode(
            q, k, v, key=key, value=value, cache_seqlens=lengths, backend="cpu"
        )

    if backend == "reference":
        out = torch.ops.pyops.attention_decode(
            *(t.to("meta") for t in (Case(False).query, *Case(False).caches)),
            *(None,) * 7, False, None, None, 1.0, 0.0, -1, -1, 0,
        )  # fmt: skip
        assert [t.shape for t in out] == [(3, 4, 1, 24), (3, 4, 1)]
        return
    cases = [Case(False, 1) for _ in "ab"]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    outs = [
        f(c.query, *c.caches, *c.new, c.lengths)
        for f, c in zip((compiled, step), cases, strict=True)
    ]
    assert torch.equal(*outs)
    for a, b in zip(cases[0].caches, cases[1].caches, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_no_gradient():
    case = Case(False)
    case.query.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        case.call(None)
    with torch.no_grad():
        assert case.call(None)[0].shape == (3, 4, 1, 24)


def arguments(**changed):
    paged = changed.pop("paged", False)
    case = Case(paged, 2)
    made = {"query": case.query, "key_cache": case.caches[0], "value_cache": case.caches[1]}
    made.update(key=case.new[0], value=case.new[1], cache_seqlens=case.lengths)
    made.update(block_table=case.block_table)
    for name, value in changed.items():
        made[name] = value(made) if callable(value) else value
    return made


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


TABLE = (randn(60, 8).cos(), randn(60, 8).sin())
# what is wrong: (arguments changed, words of the message)
BAD = {
    "query of rank 3": ({"query": lambda a: a["query"][0]}, "query: expected 4"),
    "cache of rank 3": ({"key_cache": lambda a: a["key_cache"][0]}, "key_cache: expected 4"),
    "value_cache None": ({"value_cache": None}, "value_cache: expected a torch.Tensor"),
    "batch": ({"key_cache": lambda a: a["key_cache"][:2]}, "key_cache: .*batch size 3"),
    "capacity": ({"value_cache": lambda a: a["value_cache"][:, :, :9]}, "value_cache: .*capacity"),
    "dtype of cache": ({"key_cache": lambda a: a["key_cache"].half()}, "key_cache: .*float16"),
    "dtype of key": ({"key": lambda a: a["key"].half()}, "key: .*float16"),
    "heads": ({"query": lambda a: a["query"][:, :3]}, "key_cache: .*divides"),
    "value without key": ({"key": None}, "key: .*value is given"),
    "key without value": ({"value": None}, "value: .*key is given"),
    "no lengths": ({"cache_seqlens": None}, "cache_seqlens: .*new key"),
    "lengths int64": ({"cache_seqlens": ints(1, 2, 3).long()}, "cache_seqlens: .*int32"),
    "number of lengths": ({"cache_seqlens": ints(1, 2)}, r"cache_seqlens: .*\(3,\)"),
    "leftpad int64": ({"cache_leftpad": ints(1, 2, 3).long()}, "cache_leftpad: .*int32"),
    "number of leftpads": ({"cache_leftpad": ints(1, 2)}, r"cache_leftpad: .*\(3,\)"),
    "shape of key": ({"key": randn(3, 2, 2, 15)}, "key: .*15"),
    "shape of value": ({"value": randn(3, 2, 3, 24)}, "value: .*3, 2, 3, 24"),
    "table rank": ({"block_table": ints(1, 2, 3)}, "block_table: expected shape"),
    "table dtype": ({"block_table": ints(1, 2, 3)[:, None].long()}, "block_table: .*int32"),
    "last stride": (
        {"key_cache": lambda a: a["key_cache"].transpose(2, 3).contiguous().transpose(2, 3)},
        "key_cache: .*last stride",
    ),
    "one rotary table": ({"rotary_cos": TABLE[0]}, "rotary_sin: .*rotary_cos"),
    "rotary too wide": (
        {"rotary_cos": randn(60, 9), "rotary_sin": randn(60, 9)},
        "rotary_cos: .*8",
    ),
    "rotary tables differ": ({"rotary_cos": TABLE[0], "rotary_sin": TABLE[1][:50]}, "rotary_sin"),
    "num_splits": ({"num_splits": -1}, "num_splits: .*-1"),
    "num_splits float": ({"num_splits": 1.0}, "num_splits: .*int"),
    "window": ({"window": (-1, 0)}, "window: .*at least 0"),
    "sinks": ({"sinks": randn(3)}, r"sinks: .*\(4,\)"),
    "backend": ({"backend": "gpu"}, "backend: .*gpu"),
    # values, which the op itself has to check
    "no room": ({"cache_seqlens": ints(5, 0, 47)}, "cache_seqlens"),
    "length below 0": ({"cache_seqlens": ints(5, -1, 3)}, "cache_seqlens"),
    "length beyond": ({"cache_seqlens": ints(5, 49, 3)}, "cache_seqlens"),
    "no room in the pages": (
        {"paged": True, "cache_seqlens": ints(5, 0, 47)},
        "cache_seqlens: .*block_table's 48",
    ),
    "leftpad below 0": ({"cache_leftpad": ints(0, -1, 0)}, "cache_leftpad: .*-1 for sequence 1"),
    "leftpad beyond": ({"cache_leftpad": ints(0, 3, 0)}, "cache_leftpad: .*2 keys, got 3"),
    "block below 0": (
        {
            "paged": True,
            "block_table": lambda a: a["block_table"].index_fill(1, ints(4).long(), -1),
        },
        "block_table",
    ),
    "block beyond": (
        {
            "paged": True,
            "block_table": lambda a: a["block_table"].index_fill(1, ints(0).long(), 22),
        },
        "block_table",
    ),
    "rotary too short": (
        {"rotary_cos": TABLE[0][:38], "rotary_sin": TABLE[1][:38]},
        "rotary",
    ),
}


@BOTH
@pytest.mark.parametrize("what", BAD)
def test_bad_argument_writes_nothing(what, backend):
    changed, words = BAD[what]
    made = arguments(**changed)
    caches = [made[n] for n in ("key_cache", "value_cache")]
    before = [None if t is None else t.clone() for t in caches]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        pyops.attention_decode(**{"backend": backend, **made})
    for cache, kept in zip(caches, before, strict=True):
        assert cache is None or torch.equal(cache.nan_to_num(7), kept.nan_to_num(7))
