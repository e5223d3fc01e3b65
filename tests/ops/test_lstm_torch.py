"""lstm inside torch: opcheck, compile, export, autocast, functorch, fake tensors."""

from __future__ import annotations

import io

import pytest
import torch
from lstm_cases import EACH_BACKEND, EACH_KERNEL, KERNELS, PACKED, data, ours, states, theirs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import pyops
from pyops.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not KERNELS, reason="no kernel of lstm here")

LAYOUTS = {
    "time first": lambda t: t.contiguous(),
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "features outside": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "batch innermost": lambda t: t.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "expanded": lambda t: t[:1].expand(t.shape),
}
OPTIONS = {
    "one layer": (theirs(3, 4), (True, 1, False)),
    "two layers both ways": (
        theirs(3, 4, num_layers=2, bidirectional=True),
        (True, 2, True),
    ),
    "no biases": (theirs(3, 4, bias=False), (False, 1, False)),
}
EACH = pytest.mark.parametrize("name", OPTIONS)
OPS = [torch.ops.pyops.lstm, *([torch.ops.pyops.lstm_triton] if "triton" in KERNELS else [])]


def op_arguments(name, layout="time first", requires_grad=True, packed=False):
    module, spec = OPTIONS[name]
    weights = [p.detach().clone().requires_grad_(requires_grad) for p in module.parameters()]
    x = data(8, 3) if packed else LAYOUTS[layout](data(5, 2, 3))
    batch_sizes = torch.tensor([2, 2, 2, 1, 1]) if packed else None
    tensors = [t.requires_grad_(requires_grad) for t in (x, *states(module, 2))]
    return (*tensors, weights, batch_sizes, *spec)


# The whole of opcheck takes seconds; what depends on strides shows in these two already.
STRIDE_CHECKS = ("test_schema", "test_faketensor")
EVERY_CHECK = (*STRIDE_CHECKS, "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize(
    "name, layout",
    [
        *((name, layout) for name in OPTIONS for layout in ("time first", "packed")),
        *(("two layers both ways", layout) for layout in LAYOUTS if layout != "time first"),
    ],
)
def test_opcheck(name, layout, op):
    packed = layout == "packed"
    arguments = op_arguments(name, "time first" if packed else layout, packed=packed)
    everything = layout == "time first" or packed
    checks = EVERY_CHECK if everything else STRIDE_CHECKS
    torch.library.opcheck(op.default, (*arguments, True), test_utils=checks)
    bare = op_arguments(name, "time first" if packed else layout, False, packed)
    torch.library.opcheck(op.default, (*bare, False), test_utils=STRIDE_CHECKS)


def backward_arguments(op, name, layout, mask, steps=5):
    packed = layout == "packed"
    arguments = op_arguments(name, "time first" if packed else layout, False, packed)
    arguments = (arguments[0] if packed else arguments[0][:steps], *arguments[1:])
    output, _, c_n, saved = op(*arguments, True)
    change = (lambda t: t) if packed else LAYOUTS[layout]
    grads = (change(torch.randn(output.shape)), None, torch.randn(c_n.shape))
    *tensors, weights, batch_sizes, a, b, c = arguments
    return (*grads, *tensors, weights, batch_sizes, output, saved, a, b, c, list(mask))


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize(
    "layout, mask",
    [
        *((layout, (True,) * 4) for layout in (*LAYOUTS, "packed")),
        ("packed", (True, False, False, False)),
        ("time first", (False, True, True, True)),
    ],
)
def test_opcheck_backward(layout, mask, op):
    backward = getattr(torch.ops.pyops, f"{op.__name__}_backward").default
    arguments = backward_arguments(op, "two layers both ways", layout, mask)
    torch.library.opcheck(backward, arguments, test_utils=STRIDE_CHECKS)


def test_opcheck_of_the_second_derivative():
    op = torch.ops.pyops.lstm
    arguments = backward_arguments(op, "one layer", "time first", (True,) * 4, steps=2)
    arguments = [
        t.requires_grad_() if isinstance(t, torch.Tensor) and place < 6 else t
        for place, t in enumerate(arguments)
    ]
    torch.library.opcheck(torch.ops.pyops.lstm_backward.default, arguments, test_utils=EVERY_CHECK)


@EACH
def test_fake_agrees_with_real(name):
    for layout in LAYOUTS:
        for save in (False, True):
            *tensors, weights, _, a, b, c = op_arguments(name, layout, False)
            real = torch.ops.pyops.lstm(*tensors, weights, None, a, b, c, save)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) for t in tensors]
                fake_weights = [mode.from_tensor(w) for w in weights]
                fake = torch.ops.pyops.lstm(*fakes, fake_weights, None, a, b, c, save)
            for f, r in zip(fake, real, strict=True):
                assert f.shape == r.shape and f.dtype == r.dtype and f.stride() == r.stride()


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_meta_tensors(backend):
    module = ours(theirs(3, 4, num_layers=2), backend=backend).to("meta")
    x = torch.empty(5, 2, 3, device="meta")
    if backend is not None:
        with pytest.raises(RuntimeError, match="backend"):
            module(x)
        return
    output, (h, c) = module(x)
    assert output.is_meta and output.shape == (5, 2, 4) and h.shape == c.shape == (2, 2, 4)


def test_sizes_beyond_int32():
    x = torch.empty(2**12, 2**14, 64, device="meta")
    state = torch.empty(1, 2**14, 64, device="meta")
    weights = [torch.empty(256, 64, device="meta") for _ in range(2)]
    results = torch.ops.pyops.lstm(x, state, state, weights, None, False, 1, False, True)
    assert results[0].shape == x.shape and results[3].shape == (2**32 * 5,)


class Recorder:
    """A torch.compile backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


def assert_same_step(compiled, module, x, hx=None, budget=0.0):
    results = []
    for function in (compiled, module):
        leaves = [t.clone().requires_grad_() for t in (x, *(hx or ()))]
        output, (h, c) = function(leaves[0], tuple(leaves[1:]) or None)
        loss = output.square().sum() + h.sum() + c.square().sum()
        results.append((output, h, c, *torch.autograd.grad(loss, [*leaves, *module.parameters()])))
    for got, want in zip(*results, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=budget, atol=budget)


@EACH_KERNEL
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(dynamic, options, backend):
    torch._dynamo.reset()
    recorder = Recorder()
    module = ours(theirs(4, 6, **options), backend=backend)
    compiled = torch.compile(module, backend=recorder, fullgraph=True, dynamic=dynamic)
    shapes = [(7, 3), (5, 9), (12, 4), (2, 6)]
    for a, b in shapes if dynamic else shapes[:1]:
        assert_same_step(
            compiled, module, data(a, b, 4), states(module, a if module.batch_first else b)
        )
    stem = "pyops.lstm" if backend == "cpu" else "pyops.lstm_triton"
    assert len([g for g in recorder.graphs if f"{stem}.default" in g.code]) == 1


@EACH_KERNEL
@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "states"])
def test_compile_packed(hx, backend):
    torch._dynamo.reset()
    module = ours(theirs(4, 6, bidirectional=True), backend=backend)
    packed = pack_padded_sequence(data(9, 6, 4), PACKED, enforce_sorted=False)
    given = states(module, 6) if hx else None
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    got, want = compiled(packed, given), module(packed, given)
    assert torch.equal(got[0].data, want[0].data)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


def test_compile_with_inductor():
    torch._dynamo.reset()
    module = ours(theirs(4, 6, num_layers=2, batch_first=True))
    compiled = torch.compile(module, fullgraph=True)
    assert_same_step(compiled, module, data(5, 3, 4), budget=1e-5)
    with torch.no_grad():
        assert torch.equal(compiled(data(5, 3, 4))[0], module(data(5, 3, 4))[0])


@pytest.mark.parametrize(
    "options", [{"layer_norm": True}, {"zoneout": 0.1}, {"proj_size": 3}], ids=str
)
def test_compile_what_only_the_reference_has(options):
    torch._dynamo.reset()
    module = pyops.nn.LSTM(4, 6, **options).eval()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(data(2, 3, 4)), module(data(2, 3, 4)))


@EACH_KERNEL
def test_compile_with_dropout(backend):
    torch._dynamo.reset()
    module = ours(theirs(4, 50, num_layers=2, dropout=0.5), backend=backend)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, module):
        torch.manual_seed(4)
        results.append(function(data(5, 3, 4))[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(strict, dynamic):
    module = ours(theirs(4, 6, num_layers=2, batch_first=True)).eval()
    x = data(5, 3, 4)
    shapes = None
    if dynamic:
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = {"input": {0: batch, 1: torch.export.Dim("steps", min=2, max=99)}}
    program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "pyops.lstm.default" in targets, targets
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch, steps in ((5, 3), (2, 8)) if dynamic else ((5, 3),):
        x = data(batch, steps, 4)
        torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "backend, compiled", [(b, c) for b in (*KERNELS, "reference") for c in (False, True)][:-1]
)
def test_autocast(backend, compiled):
    """In bfloat16: torch's own LSTM takes no float16 under autocast on the CPU."""
    torch._dynamo.reset()
    dtype = torch.bfloat16
    module = theirs(8, 24, num_layers=2)
    mine = ours(module, backend=backend)
    exact = theirs(8, 24, torch.float64, num_layers=2)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), module.parameters(), strict=True):
            p.copy_(q.to(dtype))
    x, hx = data(6, 9, 8).to(dtype).float(), tuple(s.to(dtype).float() for s in states(module, 9))
    function = torch.compile(mine, backend="aot_eager", fullgraph=True) if compiled else mine
    results = []
    for f, parameters in ((function, mine.parameters()), (module, module.parameters())):
        with torch.autocast("cpu", dtype):
            output, (h, c) = f(x, hx)
        assert output.dtype == h.dtype == c.dtype == dtype
        grads = torch.autograd.grad(output.float().square().sum(), list(parameters))
        assert {g.dtype for g in grads} == {torch.float32}
        results.append((output, grads))
    exact_output, _ = exact(x.double(), tuple(s.double() for s in hx))
    exact_grads = torch.autograd.grad(exact_output.square().sum(), list(exact.parameters()))
    assert_within_budget(results[0][0], results[1][0], exact_output)
    for got, want, true in zip(results[0][1], results[1][1], exact_grads, strict=True):
        assert (got - true).norm() <= 3 * (want - true).norm()


def test_autocast_leaves_float64_alone():
    module = ours(theirs(4, 6, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(data(5, 3, 4, dtype=torch.float64))[0].dtype == torch.float64
        arguments = op_arguments("one layer", requires_grad=False)
        assert torch.ops.pyops.lstm(*arguments, False)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (1, None, None), (2, 0, 1), (None, None, 0), (None, 2, None)],
    ids=str,
)
@EACH_BACKEND
def test_vmap_over_inputs_and_states(in_dims, backend):
    module = ours(theirs(4, 6, num_layers=2, bidirectional=True), backend=backend)
    tensors = (data(2, 3, 4), *states(module, 3))
    batched = [
        t if d is None else torch.stack([t, t * -0.5, t + 0.25], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]

    def run(x, h, c):
        return module(x, (h, c))

    with torch.no_grad():
        mapped = torch.vmap(run, in_dims)(*batched)
        for i in range(3):
            own = [
                t if d is None else t.select(d, i) for t, d in zip(batched, in_dims, strict=True)
            ]
            output, (h, c) = run(*own)
            torch.testing.assert_close(mapped[0][i], output)
            torch.testing.assert_close((mapped[1][0][i], mapped[1][1][i]), (h, c))
    # With gradients around it.
    leaves = [t.detach().requires_grad_() for t in batched]
    got = torch.autograd.grad(torch.vmap(run, in_dims)(*leaves)[0].square().sum(), leaves)
    total = sum(
        run(*(t if d is None else t.select(d, i) for t, d in zip(leaves, in_dims, strict=True)))[0]
        .square()
        .sum()
        for i in range(3)
    )
    torch.testing.assert_close(got, torch.autograd.grad(total, leaves))


@EACH_BACKEND
def test_vmap_over_models(backend):
    """An ensemble: weights stacked, one input."""
    models = [ours(theirs(4, 6, seed=i), backend=backend) for i in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    x = data(5, 3, 4)

    def run(own):
        return torch.func.functional_call(models[0], own, (x,))[0]

    with torch.no_grad():
        torch.testing.assert_close(
            torch.vmap(run)(parameters), torch.stack([m(x)[0] for m in models])
        )


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "per-sample grad"])
def test_torch_func(transform):
    module = ours(theirs(2, 3))
    plain = ours(theirs(2, 3), backend="reference")
    x = data(4, 2, 2)
    results = []
    for m in (module, plain):
        parameters = dict(m.named_parameters())

        def output(own, x, m=m):
            return torch.func.functional_call(m, own, (x,))[0]

        def loss(own, x, output=output):
            return output(own, x).pow(2).sum()

        if transform == "grad":
            results.append(torch.func.grad(loss)(parameters, x))
        elif transform == "jacrev":
            results.append(torch.func.jacrev(output)(parameters, x))
        elif transform == "jacfwd":
            results.append(torch.func.jacfwd(output)(parameters, x))
        else:
            samples = x.transpose(0, 1).unsqueeze(2)
            results.append(torch.vmap(torch.func.grad(loss), (None, 0))(parameters, samples))
    torch.testing.assert_close(*results)


def test_batched_gradients():
    """The backward op under vmap."""
    module = ours(theirs(3, 4, num_layers=2))
    x = data(4, 2, 3).requires_grad_()
    output, _ = module(x)
    seeds = data(3, *output.shape, seed=8)
    leaves = [x, *module.parameters()]

    def gradients(seed):
        return torch.autograd.grad(output, leaves, seed, retain_graph=True)

    got = torch.vmap(gradients)(seeds)
    each = [torch.autograd.grad(output, leaves, s, retain_graph=True) for s in seeds]
    torch.testing.assert_close(got, tuple(torch.stack(c) for c in zip(*each, strict=True)))


def test_forward_mode():
    module = ours(theirs(3, 4))
    plain = ours(theirs(3, 4), backend="reference")
    x, tangent = data(4, 2, 3), data(4, 2, 3, seed=7)
    results = [torch.func.jvp(lambda t, m=m: m(t)[0], (x,), (tangent,)) for m in (module, plain)]
    torch.testing.assert_close(*results)
    explicit = ours(theirs(3, 4), backend="cpu")
    with pytest.raises(RuntimeError, match="backend: cpu has no forward-mode"):
        torch.func.jvp(lambda t: explicit(t)[0], (x,), (tangent,))
