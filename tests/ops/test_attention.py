"""Values of attention, forward and backward, against plain torch by the error budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import BACKENDS, check, make_qkv, plain, randn

import pyops
from pyops import _C

BOTH = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
HEADS = {"mha": (3, 3), "mqa": (4, 1), "gqa": (4, 2)}
LENGTHS = [
    *((16, 239), (33, 300), (127, 129), (113, 203), (128, 217), (113, 211), (108, 256), (239, 16)),
    *((64, 64), (65, 65), (200, 200), (70, 131), (131, 70)),
]
# All combinations of mask and head_dim; over them heads, dtypes, lengths and layouts run evenly.
MASKS = [
    {"causal": causal, "window": window, "softcap": softcap}
    for causal in (False, True)
    for window in (None, (40, 25))
    for softcap in (0.0, 15.0)
]
GRID = [
    pytest.param(
        *(head_dim, heads, mask, dtype, LENGTHS[(5 * i + 3 * j) % len(LENGTHS)], (i + j) % 3 == 0),
        id=f"{head_dim}-{heads}-mask{j}-{dtype}",
    )
    for i, head_dim in enumerate(HEAD_DIMS)
    for j, mask in enumerate(MASKS)
    for heads in [[*HEADS][(i + j + j // 3) % 3]]
    for dtype in [(torch.float32, torch.bfloat16)[(i // 2 + j + j // 2) % 2]]
]


@pytest.mark.parametrize("head_dim, heads, mask, dtype, lengths, heads_inside", GRID)
def test_grid(head_dim, heads, mask, dtype, lengths, heads_inside):
    h, h_kv = HEADS[heads]
    options = {"heads_kv": h_kv, "dtype": dtype, "heads_inside": heads_inside}
    check(*make_qkv(1, h, *lengths, head_dim, **options), backend="cpu", **mask)


def test_grid_meets_everything():
    """Each pair of (heads, mask, dtype, lengths) values, so that no corner hides behind the diagonal."""
    rows = [p.values for p in GRID]
    assert len({(r[0], str(r[2])) for r in rows}) == len(HEAD_DIMS) * len(MASKS)
    assert len({(r[1], str(r[2])) for r in rows}) == len(HEADS) * len(MASKS)
    assert len({(str(r[2]), r[3]) for r in rows}) == 2 * len(MASKS)
    assert len({(r[0], r[1]) for r in rows}) == len(HEADS) * len(HEAD_DIMS)
    assert len({(str(r[2]), r[4]) for r in rows}) > 7 * len(LENGTHS)
    assert len({(r[4], r[3]) for r in rows}) == 2 * len(LENGTHS)


SEQLENS = [
    *((1, 1), (1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (108, 256)),
    *((239, 1), (799, 3), (1, 128), (128, 1), (17, 16), (64, 64), (65, 65), (113, 211)),
]
LONG = [
    *((256, 512, False), (512, 256, True), (1024, 128, True), (1023, 1024, False)),
    *((1024, 1023, True), (1024, 1024, False), (2048, 2048, True), (2048, 2048, False)),
]


@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, causal",
    [*((*seqlens, causal) for seqlens in SEQLENS for causal in (False, True)), *LONG],
)
def test_lengths(seqlen_q, seqlen_k, causal):
    large = seqlen_q * seqlen_k > 500_000
    dtype = torch.float32 if seqlen_q % 2 or seqlen_q == 2048 else torch.bfloat16
    qkv = make_qkv(1, 1 if large else 3, seqlen_q, seqlen_k, 40 if large else 64, dtype=dtype)
    check(*qkv, backend="cpu", causal=causal)


@BOTH
@DTYPES
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(37, 53), (53, 37)])
def test_dtypes_and_backends(seqlen_q, seqlen_k, dtype, backend):
    qkv = make_qkv(2, 4, seqlen_q, seqlen_k, 24, heads_kv=2, dtype=dtype)
    check(*qkv, backend=backend, causal=True, lse_gradient=True)


OPTIONS = {
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.2},
    "scale 0": {"scale": 0.0},
    "bias": {"bias": (2, 4, 37, 53)},
    "bias of heads": {"bias": (4, 1, 1), "sinks": (4,)},
    "bias of keys": {"bias": (2, 1, 1, 53)},
    "bias of queries": {"bias": (37, 1)},
    "bias of positions": {"bias": (37, 53)},
    "bias for all": {"bias": (1,), "sinks": (4,)},
    "alibi": {"alibi_slopes": (4,)},
    "alibi of a batch": {"alibi_slopes": (2, 4), "causal": True},
    "sinks": {"sinks": (4,)},
    "window to the left": {"window": (5, None)},
    "window to the right": {"window": (None, 3)},
    "window of the diagonal": {"window": (0, 0)},
    "window beyond": {"window": (500, 500)},
    "window right and causal": {"window": (3, 9), "causal": True},
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3},
    "much dropout": {"dropout_p": 0.9, "causal": True},
    "everything": {
        **{"bias": (4, 37, 53), "alibi_slopes": (4,), "sinks": (4,), "dropout_p": 0.2},
        **{"causal": True, "window": (20, None), "softcap": 5.0, "scale": 0.4},
    },
}


def with_tensors(options, dtype=torch.float32):
    made = dict(options)
    for i, name in enumerate(("bias", "alibi_slopes", "sinks")):
        if name in made:
            made[name] = randn(*made[name], seed=10 + i, dtype=dtype if name == "bias" else None)
    if "alibi_slopes" in made:
        made["alibi_slopes"] = made["alibi_slopes"].abs() / 4
    return made


@BOTH
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, backend):
    heads_kv = 1 if backend == "cpu" else 4
    qkv = make_qkv(2, 4, 37, 53, 20, heads_kv=heads_kv)
    check(*qkv, backend=backend, lse_gradient=True, **with_tensors(OPTIONS[name]))


@DTYPES
@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_every_dtype(name, dtype):
    """Longer, with another value head_dim, in the layout of a projection split into heads."""
    qkv = make_qkv(2, 4, 37, 53, 33, v_head_dim=70, dtype=dtype, heads_inside=True)
    check(*qkv, backend="cpu", **with_tensors(OPTIONS[name], dtype))


@BOTH
def test_bias_of_float32_with_16_bit_inputs(backend):
    qkv = make_qkv(2, 4, 20, 30, 16, dtype=torch.bfloat16)
    check(*qkv, backend=backend, bias=randn(2, 1, 20, 30))
    check(*qkv, backend=backend, sinks=randn(4, dtype=torch.bfloat16))


@BOTH
@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "every other", "expanded", "offset", "keys outside"]
)
def test_layouts_of_bias(layout, backend):
    full = randn(2, 4, 37, 53)
    bias = {
        "contiguous": full,
        "transposed": full.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": torch.stack((full, full * 9), -1).flatten(3)[..., ::2],
        "expanded": full[:1, :, :1].expand(2, 4, 37, 53),
        "offset": torch.cat((full[..., :1] * 9, full), 3)[..., 1:],
        "keys outside": full.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }[layout]
    check(*make_qkv(2, 4, 37, 53), backend=backend, bias=bias)


@BOTH
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 53), (37, 53), (1, 4, 37, 53), (2, 4, 37, 53)], ids=str
)
def test_boolean_masks(shape, backend):
    mask = randn(*shape) > -0.3
    mask[..., 5] = True
    qkv = make_qkv(2, 4, 37, 53)
    check(*qkv, backend=backend, bias=mask)
    check(*qkv, backend=backend, bias=mask, causal=True, dropout_p=0.25)
    as_floats = torch.zeros(shape).masked_fill(~mask, -torch.inf)
    got, want = (pyops.attention(*qkv, bias=b, backend=backend) for b in (mask, as_floats))
    torch.testing.assert_close(got, want)


ODD = [1, 2, 3, 7, 17, 31, 33, 65, 130, 255]
ODD_VALUES = [1, 3, 17, 64, 100, 256]
# Each meets half of the others, in dtypes that vary.
ODD_PAIRS = [(d, v) for i, d in enumerate(ODD) for v in ODD_VALUES[i % 2 :: 2]]


@pytest.mark.parametrize("head_dim, v_head_dim", ODD_PAIRS)
def test_odd_head_dims(head_dim, v_head_dim):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[(head_dim + v_head_dim) % 3]
    qkv = make_qkv(1, 2, 19, 40, head_dim, v_head_dim=v_head_dim, dtype=dtype)
    check(*qkv, backend="cpu", causal=True)


def strided_variants(tensor):
    """The same values in other memory layouts, all with a unit last stride, and one without."""
    batch, heads, seqlen, d = tensor.shape
    nan = torch.full((), torch.nan, dtype=tensor.dtype)
    wide = nan.expand(batch + 1, heads + 2, seqlen + 3, d + 5).clone()
    part = wide[1:, 1:-1, 2:-1, 3:-2]
    part.copy_(tensor)
    flat = torch.cat((nan[None], tensor.flatten()))
    return {
        "heads inside": tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "part of a larger one": part,
        "offset by one": flat[1:].view(tensor.shape),
        "seqlen outside": tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "every other row": torch.stack((tensor, nan.expand_as(tensor)), 3).flatten(2, 3)[:, :, ::2],
        "head_dim outside": tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 33])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["query", "key", "value", "grad_output"])
def test_strides_do_not_change_a_bit(which, head_dim, dtype):
    """NaN lies all around the values."""
    tensors = make_qkv(2, 4, 21, 34, head_dim, heads_kv=2, dtype=dtype)
    tensors.append(randn(2, 4, 21, head_dim, dtype=dtype))

    def run(q, k, v, grad):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = pyops.attention(*leaves, causal=True, backend="cpu")
        return (out, *torch.autograd.grad(out, leaves, grad))

    want = run(*tensors)
    for name, variant in strided_variants(tensors[which]).items():
        got = run(*(variant if i == which else t for i, t in enumerate(tensors)))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


def test_expanded_tensors():
    q, k, v = make_qkv(3, 4, 21, 34, heads_kv=4)
    k, v = k[:1, :1].expand(3, 4, -1, -1), v[:1, :1].expand(3, 4, -1, -1)
    check(q, k, v, backend="cpu", causal=True)
    grad = randn(1, 1, 1, 16).expand(3, 4, 21, 16)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = pyops.attention(*leaves, backend="cpu")
    want = torch.autograd.grad(out, leaves, grad.contiguous(), retain_graph=True)
    for expanded in (grad, out.new_zeros(()).expand_as(out)):
        got = torch.autograd.grad(out, leaves, expanded, retain_graph=True)
        if expanded is grad:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        else:
            assert not any(g.any() for g in got)


@BOTH
@pytest.mark.parametrize("heads_inside", [False, True], ids=["heads outside", "heads inside"])
def test_layout_of_results(heads_inside, backend):
    leaves = [t.requires_grad_() for t in make_qkv(2, 3, 9, 11, 8, heads_inside=heads_inside)]
    out, lse = pyops.attention(*leaves, backend=backend, return_lse=True)
    assert out.transpose(1, 2).is_contiguous() == heads_inside
    assert out.is_contiguous() != heads_inside and lse.is_contiguous()
    if backend != "reference":
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert grad.transpose(1, 2).is_contiguous() == heads_inside


@BOTH
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_sizes(shape, backend):
    batch, heads, seqlen_q, seqlen_k = shape
    leaves = make_qkv(batch, heads, seqlen_q, seqlen_k, 8)
    sinks = torch.tensor([0.5, -1.0])
    leaves = [t.requires_grad_() for t in (*leaves, sinks)]
    for use in {None, backend}:
        out, lse = pyops.attention(*leaves[:3], return_lse=True, backend=use)
        assert out.shape == (batch, heads, seqlen_q, 8) and not out.any()
        assert lse.shape == shape[:3] and (lse == -torch.inf).all()
        out, lse = pyops.attention(*leaves[:3], sinks=leaves[3], return_lse=True, backend=use)
        assert not out.any() and torch.equal(lse, sinks[None, :, None].expand(lse.shape))
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        assert not any(g is not None and g.any() for g in grads)


def test_any_head_dim_by_automatic_choice():
    qkv = make_qkv(1, 2, 9, 11, 300)
    torch.testing.assert_close(pyops.attention(*qkv), plain(*qkv)[0])
    with pytest.raises(RuntimeError, match="backend: cpu .* at most 256, got 300"):
        pyops.attention(*qkv, backend="cpu")


def compact_grid():
    """What runs in a process of its own under each instruction set: prints the largest ratio."""
    torch.set_num_threads(1)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim, options in (
            (64, {"causal": True}),
            (59, {"window": (20, 7), "softcap": 3.0}),
            (16, with_tensors({"bias": (4, 70, 90), "sinks": (4,), "dropout_p": 0.2}, dtype)),
            (128, with_tensors({"alibi_slopes": (4,)}, dtype)),
        ):
            qkv = make_qkv(1, 4, 70, 90, head_dim, heads_kv=2, dtype=dtype)
            worst = max(worst, check(*qkv, backend="cpu", **options))
    print(_C.active_isa(), worst)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(isa):
    if not _C.cpu_features()[isa]:
        pytest.skip(f"this CPU has no {isa}")
    if isa == _C.active_isa():
        pytest.skip("all other tests run on it")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", f"import {Path(__file__).stem} as m; m.compact_grid()"],
        env={**os.environ, "PYOPS_CPU_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == isa
