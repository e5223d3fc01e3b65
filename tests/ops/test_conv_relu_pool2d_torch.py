"""conv_relu_pool2d inside torch: opcheck, compile, export, autocast, functorch, fake tensors."""

from __future__ import annotations

import io

import pytest
import torch
from conv_pool_cases import expected_strides, is_channels_last, make_inputs, plain
from torch._subclasses.fake_tensor import FakeTensorMode

import pyops
from pyops.nn import ConvReLUPool2d
from pyops.reference.conv_relu_pool import ConvPoolSpec
from pyops.testing import assert_within_budget

OPTIONS = {
    "max": {"padding": 1},
    "max overlapping": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
    "avg leaky": {"pool": "avg", "activation": "leaky_relu"},
    "no pool": {"pool": None},
    "no pool leaky slope 0": {"pool": None, "activation": "leaky_relu", "negative_slope": 0.0},
    "convolution alone": {"pool": None, "activation": None, "stride": 2},
    "groups": {"groups": 2, "dilation": (1, 2)},
    "same": {"padding": "same"},
}
EACH = pytest.mark.parametrize("name", OPTIONS)


def leaves_of(
    name="max", dtype=torch.float32, batch=2, channels=4, size=(9, 10), requires_grad=True
):
    groups = OPTIONS[name].get("groups", 1)
    x, w, b = make_inputs((batch, channels, *size), (8, channels // groups, 3, 2), dtype=dtype)
    return [t.requires_grad_(requires_grad) for t in (x, w, b)]


def spec_of(name):
    """The op's arguments after its tensors, as the public function normalises them."""

    def both(value):
        return (value, value) if isinstance(value, int) else value

    o = OPTIONS[name]
    pool = o.get("pool", "max") or "none"
    size = both(o.get("pool_size", 2)) if pool != "none" else (1, 1)
    spec = ConvPoolSpec(
        *(both(o.get("stride", 1)), (1, 1) if o.get("padding") else (0, 0)),
        *(both(o.get("dilation", 1)), o.get("groups", 1)),
        *(o.get("activation", "relu") or "none", o.get("negative_slope", 0.01), pool, size),
        *(both(o.get("pool_stride", size)), both(o.get("pool_padding", 0))),
        o.get("ceil_mode", False),
    )
    return spec.flat()


LAYOUTS_OF_INPUT = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "width before height": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels before batch": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "channels innermost, width outside": lambda t: (
        t.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    ),
}


# The whole of opcheck takes seconds; what depends on strides shows in these two already.
STRIDE_CHECKS = ("test_schema", "test_faketensor")
EVERY_CHECK = (*STRIDE_CHECKS, "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("layout", LAYOUTS_OF_INPUT)
@EACH
def test_opcheck(name, layout):
    x, w, b = (t.detach() for t in leaves_of(name))
    x, w = (LAYOUTS_OF_INPUT[layout](t).requires_grad_() for t in (x, w))
    torch.library.opcheck(
        torch.ops.pyops.conv_relu_pool2d.default,
        (x, w, b.requires_grad_(), *spec_of(name), True),
        test_utils=EVERY_CHECK if layout == "contiguous" or name == "max" else STRIDE_CHECKS,
    )


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("layout", LAYOUTS_OF_INPUT)
@pytest.mark.parametrize("name", ["max", "avg leaky", "no pool"])
def test_opcheck_backward(name, layout, mask):
    change = LAYOUTS_OF_INPUT[layout]
    everything = layout in ("contiguous", "batch innermost") and all(mask)
    x, w, b = leaves_of(name, requires_grad=False)
    x, w = change(x), change(w)
    out, codes = torch.ops.pyops.conv_relu_pool2d(x, w, b, *spec_of(name), True)
    grad, selector = change(torch.randn(out.shape)), codes if name != "no pool" else out
    leaves = [t.requires_grad_() for t in (grad, x, w)]
    torch.library.opcheck(
        torch.ops.pyops.conv_relu_pool2d_backward.default,
        (*leaves, change(selector.detach()), *spec_of(name), list(mask)),
        test_utils=EVERY_CHECK if everything else STRIDE_CHECKS,
    )


@EACH
def test_fake_agrees_with_real(name):
    for dtype in (torch.float32, torch.bfloat16):
        for layout, change in LAYOUTS_OF_INPUT.items():
            x, w, b = (t.detach() for t in leaves_of(name, dtype))
            real_inputs = (change(x), w, b)
            real = torch.ops.pyops.conv_relu_pool2d(*real_inputs, *spec_of(name), True)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) for t in real_inputs]
                fake = torch.ops.pyops.conv_relu_pool2d(*fakes, *spec_of(name), True)
            for f, r in zip(fake, real, strict=True):
                assert f.shape == r.shape and f.dtype == r.dtype and f.stride() == r.stride(), (
                    layout
                )


@EACH
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_meta_tensors(name, backend):
    x, w, b = leaves_of(name)
    want = plain(x, w, b, **OPTIONS[name])
    leaves = [t.detach().to("meta").requires_grad_() for t in (x, w, b)]
    if backend is not None:
        with pytest.raises(RuntimeError, match="backend"):
            pyops.conv_relu_pool2d(*leaves, backend=backend, **OPTIONS[name])
        return
    out = pyops.conv_relu_pool2d(*leaves, **OPTIONS[name])
    assert out.is_meta and out.shape == want.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [t.shape for t in leaves]


def test_meta_tensors_of_more_than_int32_elements():
    x = torch.empty(2**16, 64, 112, 112, device="meta")
    w = torch.empty(128, 64, 3, 3, device="meta")
    assert x.numel() > 2**35
    spec = (1, 1, 1, 1, 1, 1, 1, "relu", 0.01, "max", 2, 2, 2, 2, 0, 0, False)
    out, codes = torch.ops.pyops.conv_relu_pool2d(x, w, None, *spec, True)
    assert out.shape == codes.shape == (2**16, 128, 56, 56)
    assert out.stride() == expected_strides(out.shape, False)
    grads = torch.ops.pyops.conv_relu_pool2d_backward(out, x, w, codes, *spec, [True, True, True])
    assert [g.shape for g in grads] == [x.shape, w.shape, (128,)]
    assert pyops.conv_relu_pool2d(x, w, padding=1).shape == out.shape


class Recorder:
    """A torch.compile backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


def assert_same_step(compiled, function, leaves, budget=0.0):
    results = []
    for f in (compiled, function):
        copies = [t.detach().clone().requires_grad_() for t in leaves]
        out = f(*copies)
        results.append((out, *torch.autograd.grad(out.square().sum(), copies)))
    for got, want in zip(*results, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=budget, atol=budget)


@EACH
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(name, dynamic):
    torch._dynamo.reset()
    recorder = Recorder()

    def function(x, w, b):
        return pyops.conv_relu_pool2d(x.sin(), w, b, **OPTIONS[name], backend="cpu")

    compiled = torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic)
    sizes = [(7, (9, 10)), (3, (12, 11)), (5, (16, 21)), (6, (30, 14))]
    for batch, size in sizes if dynamic else sizes[:1]:
        assert_same_step(compiled, function, leaves_of(name, batch=batch, size=size))
    with_op = [graph for graph in recorder.graphs if "pyops.conv_relu_pool2d" in graph.code]
    assert len(with_op) == 1, [graph.code for graph in recorder.graphs]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_compile_with_inductor(channels_last):
    torch._dynamo.reset()
    module = ConvReLUPool2d(3, 8, 3, padding=1, backend="cpu")
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 3, 12, 12)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    assert_same_step(compiled, module, [x], budget=1e-5)
    assert is_channels_last(compiled(x)) == channels_last


def test_compile_unbatched():
    torch._dynamo.reset()
    x, w, b = leaves_of()
    compiled = torch.compile(pyops.conv_relu_pool2d, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x[0], w, b), pyops.conv_relu_pool2d(x[0], w, b))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(strict, dynamic):
    module = ConvReLUPool2d(3, 8, 3, padding=1).eval()
    x = torch.randn(2, 3, 12, 12)
    shapes = {"input": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "pyops.conv_relu_pool2d.default" in targets, targets
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch in (2, 5) if dynamic else (2,):
        x = torch.randn(batch, 3, 12, 12)
        assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_autocast(dtype, compiled, backend):
    torch._dynamo.reset()
    x, w, b = leaves_of(channels=3, size=(16, 16), batch=4)

    def run(function, leaves, to, **extra):
        leaves = [t.detach().to(to).requires_grad_() for t in leaves]
        with torch.autocast("cpu", dtype, enabled=to == torch.float32):
            out = function(*leaves, padding=1, **extra)
        return out, *torch.autograd.grad(out.sum(), leaves)

    op = pyops.conv_relu_pool2d
    if compiled:
        op = torch.compile(op, backend="aot_eager", fullgraph=True)
    ours = run(op, (x, w, b), torch.float32, backend=backend)
    theirs = run(plain, (x, w, b), torch.float32)
    exact = run(plain, [t.to(dtype) for t in (x, w, b)], torch.float64)
    assert ours[0].dtype == dtype and [g.dtype for g in ours[1:]] == [torch.float32] * 3
    assert_within_budget(ours[0], theirs[0], exact[0])
    # No winner of a window is in doubt here but a few, whose gradients go elsewhere by right.
    for got, want in zip(ours[1:], theirs[1:], strict=True):
        error = (got - want).norm() / want.norm()
        assert error < 0.1, error


def test_autocast_mixes_dtypes_and_leaves_float64_alone():
    x, w, b = leaves_of(requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert pyops.conv_relu_pool2d(x.bfloat16(), w, b.half()).dtype == torch.bfloat16
        out = pyops.conv_relu_pool2d(x.double(), w.double(), b.double())
        direct, _ = torch.ops.pyops.conv_relu_pool2d(x, w, b, *spec_of("max"), False)
    assert out.dtype == torch.float64 and direct.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (1, None, None), (3, None, None), (None, 0, None), (None, 0, 0)]
    + [(0, 0, 0), (1, 2, 1), (None, None, 0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["max", "avg leaky", "no pool"])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_vmap(name, in_dims, backend):
    tensors = leaves_of(name, requires_grad=False)
    batched = [
        t if d is None else torch.stack([t, t * -0.5, t + 0.25], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]

    def op(x, w, b):
        return pyops.conv_relu_pool2d(x, w, b, backend=backend, **OPTIONS[name])

    mapped = torch.vmap(op, in_dims)(*batched)
    each = [
        op(*(t if d is None else t.select(d, i) for t, d in zip(batched, in_dims, strict=True)))
        for i in range(3)
    ]
    torch.testing.assert_close(mapped, torch.stack(each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "per-sample grad"])
@pytest.mark.parametrize("name", ["max", "avg leaky", "no pool leaky slope 0"])
def test_torch_func(name, transform):
    x, w, b = leaves_of(name, torch.float64, channels=2, size=(5, 6), requires_grad=False)
    results = []
    for function in (pyops.conv_relu_pool2d, plain):

        def loss(w, x, function=function):
            return function(x, w, b, **OPTIONS[name]).pow(2).sum()

        def output(b, function=function):
            return function(x, w, b, **OPTIONS[name])

        if transform == "grad":
            results.append(torch.func.grad(loss, (0, 1))(w, x))
        elif transform == "jacrev":
            results.append(torch.func.jacrev(output)(b))
        elif transform == "jacfwd":
            results.append(torch.func.jacfwd(output)(b))
        elif transform == "hessian":
            results.append(torch.func.hessian(lambda b, o=output: o(b).pow(2).sum())(b))
        else:
            results.append(torch.vmap(torch.func.grad(loss), (None, 0))(w, x.unsqueeze(1)))
    torch.testing.assert_close(*results)


def test_forward_mode():
    x, w, b = leaves_of(requires_grad=False)
    tangents = tuple(torch.randn_like(t) for t in (x, w, b))
    results = [torch.func.jvp(f, (x, w, b), tangents) for f in (pyops.conv_relu_pool2d, plain)]
    torch.testing.assert_close(*results)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
        got = torch.autograd.forward_ad.unpack_dual(pyops.conv_relu_pool2d(dual, w, b)).tangent
        want = torch.autograd.forward_ad.unpack_dual(plain(dual, w, b)).tangent
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="backend: cpu has no forward-mode"):
        torch.func.jvp(lambda t: pyops.conv_relu_pool2d(t, w, backend="cpu"), (x,), (tangents[0],))
