"""conv_transpose2d_act inside torch: opcheck, compile, export, autocast, functorch, fake tensors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conv_transpose_cases import expected_strides, fast, is_channels_last, make_inputs, plain
from torch._subclasses.fake_tensor import FakeTensorMode

import pyops
from pyops.nn import ConvTranspose2dAct
from pyops.testing import assert_within_budget

OPTIONS = {
    "relu": {"stride": 2, "padding": 1},
    "tanh": {"activation": "tanh", "stride": 2, "output_padding": 1},
    "leaky in groups": {"groups": 2, "dilation": (1, 2), "activation": "leaky_relu"},
    "alone": {"activation": None, "padding": (1, 0)},
}
EACH = pytest.mark.parametrize("name", OPTIONS)
FORWARD = torch.ops.pyops.conv_transpose2d_act.default
BACKWARD = torch.ops.pyops.conv_transpose2d_act_backward.default


def leaves_of(name="relu", dtype=torch.float32, batch=2, size=(5, 6), vectors="bst", grad=True):
    groups = OPTIONS[name].get("groups", 1)
    tensors = make_inputs(
        *((batch, 4, *size), (4, 6 // groups, 3, 2)), groups=groups, vectors=vectors, dtype=dtype
    )
    return [None if t is None else t.requires_grad_(grad) for t in tensors]


def spec_of(name):
    """The op's arguments after its tensors, as the public function normalises them."""
    o = OPTIONS[name]

    def both(key, default):
        value = o.get(key, default)
        return (value, value) if isinstance(value, int) else value

    return (
        *(*both("stride", 1), *both("padding", 0), *both("output_padding", 0)),
        *(*both("dilation", 1), o.get("groups", 1)),
        *(o.get("activation", "relu") or "none", o.get("negative_slope", 0.01)),
    )


LAYOUTS_OF_INPUT = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "width before height": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}
# The whole of opcheck takes seconds; what depends on strides shows in these two already.
STRIDE_CHECKS = ("test_schema", "test_faketensor")
EVERY_CHECK = (*STRIDE_CHECKS, "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("layout", LAYOUTS_OF_INPUT)
@EACH
def test_opcheck(name, layout):
    x, w, *vectors = (t.detach() for t in leaves_of(name))
    x, w = (LAYOUTS_OF_INPUT[layout](t).requires_grad_() for t in (x, w))
    torch.library.opcheck(
        FORWARD,
        (x, w, *(v.requires_grad_() for v in vectors), *spec_of(name)),
        test_utils=EVERY_CHECK if layout == "contiguous" else STRIDE_CHECKS,
    )


@pytest.mark.parametrize("vectors", ["", "b", "st"])
def test_opcheck_without_some_vectors(vectors):
    torch.library.opcheck(FORWARD, (*leaves_of(vectors=vectors), *spec_of("relu")))


@pytest.mark.parametrize(
    "layout, mask",
    [
        *((layout, (1, 1, 1, 1, 1)) for layout in LAYOUTS_OF_INPUT),
        ("contiguous", (1, 0, 0, 0, 0)),
        ("channels_last", (0, 1, 0, 1, 0)),
    ],
)
@pytest.mark.parametrize("name", ["tanh", "leaky in groups"])
def test_opcheck_backward(name, layout, mask):
    change = LAYOUTS_OF_INPUT[layout]
    everything = layout == "contiguous" and all(mask)
    x, w, b, s, t = leaves_of(name, grad=False)
    x, w = change(x), change(w)
    out = FORWARD(x, w, b, s, t, *spec_of(name))
    leaves = [change(torch.randn(out.shape)), x, w, b, s, change(out)]
    torch.library.opcheck(
        BACKWARD,
        (*(leaf.requires_grad_() for leaf in leaves), *spec_of(name), [bool(m) for m in mask]),
        test_utils=EVERY_CHECK if everything else STRIDE_CHECKS,
    )


@EACH
def test_fake_agrees_with_real(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout, change in LAYOUTS_OF_INPUT.items():
            x, *rest = leaves_of(name, dtype, grad=False)
            real_inputs = (change(x), *rest)
            real = FORWARD(*real_inputs, *spec_of(name))
            with FakeTensorMode() as mode:
                fake = FORWARD(*(mode.from_tensor(t) for t in real_inputs), *spec_of(name))
            assert fake.shape == real.shape and fake.dtype == real.dtype
            assert fake.stride() == real.stride(), layout


@EACH
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_meta_tensors(name, backend):
    leaves = leaves_of(name, grad=False)
    want = plain(*leaves, **OPTIONS[name])
    leaves = [t.to("meta").requires_grad_() for t in leaves]
    if backend is not None:
        with pytest.raises(RuntimeError, match="backend"):
            fast(*leaves, backend=backend, **OPTIONS[name])
        return
    out = fast(*leaves, backend=None, **OPTIONS[name])
    assert out.is_meta and out.shape == want.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [t.shape for t in leaves]


def test_meta_tensors_of_more_than_int32_elements():
    x = torch.empty(2**16, 64, 56, 56, device="meta")
    w = torch.empty(64, 64, 4, 4, device="meta")
    assert x.numel() > 2**31
    spec = (2, 2, 1, 1, 0, 0, 1, 1, 1, "relu", 0.01)
    out = FORWARD(x, w, None, None, None, *spec)
    assert out.shape == (2**16, 64, 112, 112)
    assert out.stride() == expected_strides(out.shape, False)
    grads = BACKWARD(out, x, w, None, None, out, *spec, [True, True, True, False, False])
    assert [g.shape for g in grads] == [x.shape, w.shape, (64,), (0,), (0,)]


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


@pytest.mark.parametrize(
    "name, dynamic", [*((name, True) for name in OPTIONS), ("relu", False)], ids=str
)
def test_compile_without_graph_breaks(name, dynamic):
    torch._dynamo.reset()
    recorder = Recorder()

    def function(x, w, b, s, t):
        return fast(x.sin(), w, b, s, t, **OPTIONS[name])

    compiled = torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic)
    sizes = [(7, (5, 9)), (5, (8, 11)), (8, (10, 12))]
    for batch, size in sizes if dynamic else sizes[:1]:
        assert_same_step(compiled, function, leaves_of(name, batch=batch, size=size))
    with_op = [graph for graph in recorder.graphs if "conv_transpose2d_act" in graph.code]
    assert len(with_op) == 1, [graph.code for graph in recorder.graphs]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_compile_with_inductor(channels_last):
    torch._dynamo.reset()
    module = ConvTranspose2dAct(3, 8, 4, 2, 1, activation="tanh", backend="cpu")
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 3, 6, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    assert_same_step(compiled, module, [x], budget=1e-5)
    assert is_channels_last(compiled(x)) == channels_last


def test_compile_unbatched():
    torch._dynamo.reset()
    x, w, b, *_ = leaves_of()
    compiled = torch.compile(pyops.conv_transpose2d_act, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x[0], w, b), pyops.conv_transpose2d_act(x[0], w, b))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(strict, dynamic):
    module = ConvTranspose2dAct(3, 8, 4, 2, 1, backend="cpu").eval()
    x = torch.randn(2, 3, 6, 6)
    shapes = {"input": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "pyops.conv_transpose2d_act.default" in targets, targets
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch in (2, 5) if dynamic else (2,):
        x = torch.randn(batch, 3, 6, 6)
        assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_autocast(dtype, compiled, backend):
    torch._dynamo.reset()
    tensors = leaves_of("tanh", size=(12, 12))

    def run(function, to, **extra):
        leaves = [t.detach().to(to).requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype, enabled=to == torch.float32):
            out = function(*leaves, **OPTIONS["tanh"], **extra)
        return out, *torch.autograd.grad(out.sum(), leaves)

    op = torch.compile(fast, backend="aot_eager", fullgraph=True) if compiled else fast
    ours = run(op, torch.float32, backend=backend)
    rounded = [t.detach().to(dtype) for t in tensors]
    theirs = plain(*rounded, **OPTIONS["tanh"])
    exact = [t.double().requires_grad_() for t in rounded]
    exact_out = plain(*exact, **OPTIONS["tanh"])
    assert ours[0].dtype == dtype and [g.dtype for g in ours[1:]] == [torch.float32] * 5
    assert_within_budget(ours[0], theirs, exact_out)
    for got, want in zip(ours[1:], torch.autograd.grad(exact_out.sum(), exact), strict=True):
        error = (got - want).norm() / want.norm()
        assert error < 0.1, error


def test_autocast_mixes_dtypes_and_leaves_float64_alone():
    x, w, *vectors = leaves_of(grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fast(x.bfloat16(), w, *(v.half() for v in vectors))
        double = fast(*(t.double() for t in (x, w, *vectors)))
        direct = FORWARD(x, w, *vectors, *spec_of("relu"))
    assert mixed.dtype == direct.dtype == torch.bfloat16 and double.dtype == torch.float64


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None, None, None), (3, None, None, None, None), (None, 0, None, None, None)]
    + [(0, 0, 0, 0, 0), (1, 2, 1, 0, 0), (None, None, None, 0, 0)],
    ids=str,
)
@pytest.mark.parametrize("name", ["relu", "leaky in groups"])
def test_vmap(name, in_dims):
    tensors = leaves_of(name, grad=False)
    batched = [
        t if d is None else torch.stack([t, t * -0.5, t + 0.25], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]

    def op(*given):
        return fast(*given, **OPTIONS[name])

    mapped = torch.vmap(op, in_dims)(*batched)
    each = [
        op(*(t if d is None else t.select(d, i) for t, d in zip(batched, in_dims, strict=True)))
        for i in range(3)
    ]
    torch.testing.assert_close(mapped, torch.stack(each), rtol=1e-5, atol=1e-5)


def test_vmap_of_the_gradient():
    """Many gradients of one output at once, as jacobian(vectorize=True) takes them."""
    tensors = leaves_of("tanh")
    out = fast(*tensors, **OPTIONS["tanh"])
    grads = torch.randn(3, *out.shape)
    got = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        want = torch.autograd.grad(out, tensors, grads[i], retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("name", ["tanh", "leaky in groups"])
def test_torch_func(name, transform):
    x, w, b, s, t = leaves_of(name, torch.float64, size=(3, 2), grad=False)
    results = []
    for function, extra in ((fast, {"backend": None}), (plain, {})):

        def output(b, function=function, extra=extra):
            return function(x, w, b, s, t, **OPTIONS[name], **extra)

        def loss(w, x, function=function, extra=extra):
            return function(x, w, b, s, t, **OPTIONS[name], **extra).pow(2).sum()

        if transform == "grad":
            results.append(torch.func.grad(loss, (0, 1))(w, x))
        elif transform == "hessian":
            results.append(torch.func.hessian(lambda b, o=output: o(b).pow(2).sum())(b))
        else:
            results.append(getattr(torch.func, transform)(output)(b))
    torch.testing.assert_close(*results)


def test_forward_mode():
    x, w, b, *_ = leaves_of(grad=False)
    tangents = tuple(torch.randn_like(t) for t in (x, w, b))
    functions = (pyops.conv_transpose2d_act, plain)
    results = [torch.func.jvp(f, (x, w, b), tangents) for f in functions]
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match="backend: cpu has no forward-mode"):
        torch.func.jvp(lambda t: fast(t, w), (x,), (tangents[0],))


def test_module_state_dict_goes_to_conv_transpose2d_and_back():
    conv = torch.nn.ConvTranspose2d(4, 8, 4, 2, 1)
    module = ConvTranspose2dAct(4, 8, 4, 2, 1, activation="tanh", backend="cpu")
    assert list(module.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 4, 5, 5)
    module(x)
    module.load_state_dict(conv.state_dict())
    torch.testing.assert_close(module(x), conv(x).tanh(), rtol=1e-5, atol=1e-5)
    scale, shift = torch.rand(8), torch.randn(8)
    want = (conv(x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).tanh()
    torch.testing.assert_close(module(x, scale=scale, shift=shift), want, rtol=1e-5, atol=1e-5)
    wide = conv(x, output_size=[11, 11]).tanh()
    torch.testing.assert_close(module(x, output_size=[11, 11]), wide, rtol=1e-5, atol=1e-5)


def test_module_copies():
    module = ConvTranspose2dAct(4, 8, 3, 2, 1, 1, activation="leaky_relu", negative_slope=0.2)
    x = torch.randn(2, 4, 5, 5)
    expected = module(x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), expected) and repr(copied) == repr(module)
        with torch.no_grad():
            copied.weight.zero_()
        assert torch.equal(module(x), expected) and not torch.equal(copied(x), expected)
