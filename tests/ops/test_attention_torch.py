"""attention inside torch: opcheck, compile, export, autocast, functorch, fake and meta tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_cases import expected_strides, make_qkv, plain, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import pyops
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

SPEC = (
    0.3,
    0.0,
    -1,
    -1,
    False,
    0.0,
)  # scale, softcap, window_left, window_right, top_left, dropout_p
SPECS = {
    "plain": SPEC,
    "causal window softcap": (0.3, 2.0, 3, 0, False, 0.0),
    "top left with dropout": (0.3, 0.0, -1, 0, True, 0.25),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "seqlen outside": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "heads outside": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "batch inside": lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
}
# Every layout, and every spec.
SPECS_AND_LAYOUTS = [
    *(("plain", layout) for layout in LAYOUTS),
    ("causal window softcap", "contiguous"),
    ("causal window softcap", "heads inside"),
    ("top left with dropout", "contiguous"),
    ("top left with dropout", "seqlen outside"),
]
STRIDE_CHECKS = ("test_schema", "test_faketensor")
EVERY_CHECK = (*STRIDE_CHECKS, "test_autograd_registration", "test_aot_dispatch_dynamic")


def arguments_of(spec, layout="contiguous", extras=True, seqlen_q=5, seqlen_k=6):
    """The op's tensors: query, key, value, bias, alibi_slopes, sinks, rng_state."""
    q, k, v = map(LAYOUTS[layout], make_qkv(2, 4, seqlen_q, seqlen_k, 8, heads_kv=2, v_head_dim=12))
    rng_state = torch.tensor([5, 6]) if SPECS[spec][-1] else None
    if not extras:
        return [q, k, v, None, None, None, rng_state]
    return [q, k, v, randn(1, 4, 1, seqlen_k), randn(4).abs(), randn(4), rng_state]


def requiring_grad(tensors):
    return [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() and i != 4 else t
        for i, t in enumerate(tensors)
    ]


@pytest.mark.parametrize("extras", [True, False], ids=["everything", "bare"])
@pytest.mark.parametrize("spec, layout", SPECS_AND_LAYOUTS)
def test_opcheck(spec, layout, extras):
    everything = (spec, layout) in (
        ("plain", "heads inside"),
        ("top left with dropout", "contiguous"),
    )
    torch.library.opcheck(
        torch.ops.pyops.attention.default,
        (*requiring_grad(arguments_of(spec, layout, extras)), *SPECS[spec]),
        test_utils=EVERY_CHECK if everything else STRIDE_CHECKS,
    )


@pytest.mark.parametrize("mask", [(1, 1, 1, 1, 1), (0, 1, 0, 0, 1), (1, 0, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("spec, layout", SPECS_AND_LAYOUTS)
def test_opcheck_backward(spec, layout, mask):
    tensors = arguments_of(spec, layout)
    out, lse = torch.ops.pyops.attention(*tensors, *SPECS[spec])
    grad, grad_lse = LAYOUTS[layout](randn(*out.shape)), randn(*lse.shape)
    # The short one, since its second derivatives are traced too.
    everything = mask == (1, 0, 1, 0, 0) and (spec, layout) == ("plain", "contiguous")
    q, k, v, bias, slopes, sinks, rng_state = requiring_grad(tensors)
    torch.library.opcheck(
        torch.ops.pyops.attention_backward.default,
        (
            *(grad.requires_grad_(), None if mask[4] == 0 else grad_lse.requires_grad_()),
            *(q, k, v, out, lse, bias, slopes, sinks, rng_state),
            *(*SPECS[spec], [bool(m) for m in mask]),
        ),
        test_utils=EVERY_CHECK if everything else STRIDE_CHECKS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_agrees_with_real(layout, dtype):
    real_inputs = [t.to(dtype) for t in arguments_of("plain", layout, extras=False)[:3]]
    none = (None,) * 4
    real = torch.ops.pyops.attention(*real_inputs, *none, *SPEC)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in real_inputs]
        fake = torch.ops.pyops.attention(*fakes, *none, *SPEC)
        public = pyops.attention(*fakes, scale=0.3, return_lse=True)
    for f, p, r in zip(fake, public, real, strict=True):
        assert f.shape == r.shape and f.dtype == r.dtype and f.stride() == r.stride()
        assert p.shape == r.shape and p.dtype == r.dtype
    assert real[0].stride() == expected_strides(real_inputs[0], real[0].shape)


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_meta_tensors(backend):
    leaves = [t.to("meta").requires_grad_() for t in make_qkv(2, 4, 9, 12, heads_kv=2)]
    if backend is not None:
        with pytest.raises(RuntimeError, match="backend"):
            pyops.attention(*leaves, backend=backend)
        return
    out, lse = pyops.attention(*leaves, causal=True, return_lse=True)
    assert out.is_meta and out.shape == (2, 4, 9, 16) and lse.shape == (2, 4, 9)
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]


def test_meta_tensors_of_more_than_int32_elements():
    q = torch.empty(8, 64, 2**18, 128, device="meta", dtype=torch.bfloat16)
    assert q.numel() > 2**33
    none = (None,) * 4
    out, lse = torch.ops.pyops.attention(q, q, q, *none, *SPEC)
    assert out.shape == q.shape and out.stride() == q.stride() and lse.shape == q.shape[:3]
    mask = [True, True, True, False, False]
    grads = torch.ops.pyops.attention_backward(out, None, q, q, q, out, lse, *none, *SPEC, mask)
    assert [g.shape for g in grads] == [q.shape] * 3 + [(0,)] * 2


AUTOCASTS = [
    *itertools.product(("eager",), (torch.bfloat16, torch.float16), (None, "cpu", "reference")),
    ("compiled", torch.bfloat16, None),
    ("compiled", torch.float16, "cpu"),
    ("compiled", torch.bfloat16, "reference"),
]


@pytest.mark.parametrize("mode, dtype, backend", AUTOCASTS)
def test_autocast(mode, dtype, backend):
    torch._dynamo.reset()
    tensors = (*make_qkv(2, 4, 30, 40), randn(1, 4, 30, 40))

    def run(function, leaves, **extra):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        out = function(*leaves[:3], bias=leaves[3], **extra)
        out = out[0] if isinstance(out, tuple) else out
        return out, *torch.autograd.grad(out.sum(), leaves)

    op = pyops.attention
    if mode == "compiled":
        op = torch.compile(op, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        ours = run(op, tensors, backend=backend)
    theirs = run(plain, [t.to(dtype) for t in tensors])
    exact = run(plain, [t.to(dtype).double() for t in tensors[:3]] + [tensors[3].double()])
    assert ours[0].dtype == dtype and [g.dtype for g in ours[1:]] == [torch.float32] * 4
    assert_within_budget(ours[0], theirs[0], exact[0])
    for got, lowp, best in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert_within_budget(got.to(dtype), lowp, best, GRADIENT_BUDGET)


def test_autocast_mixes_dtypes_and_leaves_float64_and_float32_extras_alone():
    q, k, v = make_qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = pyops.attention(q.bfloat16(), k, v.half(), bias=randn(33, 33), sinks=randn(4))
        assert out.dtype == torch.bfloat16
        assert pyops.attention(q, k, v, bias=randn(33, 33).half()).dtype == torch.bfloat16
        assert pyops.attention(q.double(), k.double(), v.double()).dtype == torch.float64
        direct, lse = torch.ops.pyops.attention(q, k, v, None, None, None, None, *SPEC)
    assert direct.dtype == torch.bfloat16 and lse.dtype == torch.float32


VMAPPED = {  # name: (in_dims of query, key, value, bias, alibi_slopes, sinks)
    "queries": (0, None, None, None, None, None),
    "all of qkv": (0, 1, 2, None, None, None),
    "head_dim outside": (4, 4, 4, None, None, None),
    "values": (None, None, 0, None, None, None),
    "bias": (None, None, None, 0, None, None),
    "slopes": (0, None, None, None, 0, None),
    "sinks": (None, 0, None, None, None, 0),
    "everything": (0, 0, 0, 1, 1, 1),
}


@pytest.mark.parametrize(
    "bias_shape, slopes_shape",
    [((3, 4, 9, 12), (4,)), ((1, 4, 1, 12), (3, 4)), ((9, 12), (3, 4))],
    ids=str,
)
@pytest.mark.parametrize("name", VMAPPED)
def test_vmap(name, slopes_shape, bias_shape):
    in_dims = VMAPPED[name]
    tensors = (*make_qkv(3, 4, 9, 12, heads_kv=2), randn(*bias_shape))
    tensors = (*tensors, randn(*slopes_shape).abs(), randn(4))
    batched = [
        t if d is None else torch.stack([t, t * 0.5, t + 0.25], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]

    def op(q, k, v, bias, slopes, sinks):
        extras = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
        return pyops.attention(q, k, v, causal=True, return_lse=True, backend="cpu", **extras)

    each = [
        op(*(t if d is None else t.select(d, i) for t, d in zip(batched, in_dims, strict=True)))
        for i in range(3)
    ]
    for got, *want in zip(torch.vmap(op, in_dims)(*batched), *each, strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", [(1, 1, 1, 0, 0), (1, 1, 1, 1, 1)], ids=str)
def test_vmap_of_the_backward_op(asked):
    tensors = [t[:3] for t in arguments_of("plain")[:3]]
    bias, slopes, sinks = arguments_of("plain")[3:6]
    batched = [torch.stack((t, t * 0.5)) for t in tensors]
    mask = [bool(a) for a in asked]

    def step(q, k, v):
        out, lse = torch.ops.pyops.attention(q, k, v, bias, slopes, sinks, None, *SPEC)
        rest = (q, k, v, out, lse, bias, slopes, sinks, None)
        return torch.ops.pyops.attention_backward(out, lse, *rest, *SPEC, mask)

    mapped = torch.vmap(step)(*batched)
    each = [step(*(t[i] for t in batched)) for i in range(2)]
    for got, *want in zip(mapped, *each, strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-5)


def test_vmap_with_dropout():
    q, k, v = make_qkv(2, 2, 16, 16)

    def op(v):
        return pyops.attention(q, k, v, dropout_p=0.5, backend="cpu")

    stacked = torch.stack((v, v))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(op)(stacked)
    same = torch.vmap(op, randomness="same")(stacked)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(op, randomness="different")(stacked)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "per-sample grad"])
def test_torch_func(transform):
    q, k, v = (t.double() for t in make_qkv(2, 2, 4, 5, 3))
    results = []
    for function in (pyops.attention, lambda *a, **o: plain(*a, **o)[0]):

        def loss(q, k=k, function=function):
            return function(q, k, v, causal=True).pow(2).sum()

        if transform == "grad":
            results.append(torch.func.grad(loss, (0, 1))(q, k))
        elif transform == "per-sample grad":
            results.append(torch.vmap(torch.func.grad(loss))(torch.stack((q, q * 2))))
        else:
            results.append(getattr(torch.func, transform)(loss)(q))
    torch.testing.assert_close(*results)


def test_forward_mode():
    q, k, v = make_qkv(2, 2, 6, 7)
    tangents = tuple(torch.randn_like(t) for t in (q, k, v))
    results = [
        torch.func.jvp(f, (q, k, v), tangents) for f in (pyops.attention, lambda *a: plain(*a)[0])
    ]
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match="backend: cpu has no forward-mode"):
        torch.func.jvp(lambda t: pyops.attention(t, k, v, backend="cpu"), (q,), tangents[:1])
