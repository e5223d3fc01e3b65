"""linear_act: values, gradients to second order, torch's machinery, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyops
from pyops.nn import LinearAct
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", None)
EACH = pytest.mark.parametrize("activation", ACTIVATIONS)
OP = torch.ops.pyops.linear_act.default


def plain(x, w, b=None, *, activation="relu", negative_slope=0.01):
    y = F.linear(x, w, b)
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    return y if activation is None else getattr(torch, activation)(y)


def make_inputs(shape=(6, 10), outputs=40, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    w = torch.randn(outputs, shape[-1], generator=g)
    b = torch.randn(outputs, generator=g) if bias else None
    return [None if t is None else t.to(dtype) for t in (x, w, b)]


def results_of(function, tensors, grad, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    wanted = [t for t in leaves if t is not None]
    return [out, *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def check(*tensors, backend="cpu", **options):
    """Output and gradients are within the error budget."""
    wide = [None if t is None else t.double() for t in tensors]
    grad = torch.randn(plain(*tensors, **options).shape, generator=torch.Generator().manual_seed(9))
    grad = grad.to(tensors[0].dtype)
    exact = results_of(plain, wide, grad, **options)
    theirs = results_of(plain, tensors, grad, **options)
    ours = results_of(pyops.linear_act, tensors, grad, backend=backend, **options)
    with torch.no_grad():
        assert torch.equal(pyops.linear_act(*tensors, backend=backend, **options), ours[0])
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_within_budget(a, b, c, GRADIENT_BUDGET if i else 2.0, f"result {i}")


@DTYPES
@EACH
@pytest.mark.parametrize("shape", [(20,), (1, 16), (6, 10), (2, 3, 7), (33, 130)], ids=str)
def test_within_budget(shape, activation, dtype):
    for outputs, bias in ((40, False), (517, True)):
        check(*make_inputs(shape, outputs, dtype, bias), activation=activation)


@EACH
def test_a_single_value(activation):
    """By itself: whose rounding is luckier is no question for a budget."""
    x, w, b = make_inputs((1, 1), 1)
    got = pyops.linear_act(x, w, b, activation=activation, backend="cpu")
    torch.testing.assert_close(got, plain(x, w, b, activation=activation))


def test_many_outputs_on_two_threads():
    check(*make_inputs((64, 128), 784), activation="tanh", backend=None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data):
    """Few numbers each: compared as such, since one rounding decides what torch's own error is."""
    shape = (*data.draw(st.lists(st.integers(1, 9), max_size=2)), data.draw(st.integers(1, 70)))
    tensors = make_inputs(shape, data.draw(st.integers(1, 90)), seed=data.draw(st.integers(0, 99)))
    options = {
        "activation": data.draw(st.sampled_from(ACTIVATIONS)),
        "negative_slope": data.draw(st.sampled_from([0.0, 0.2, 1.5])),
    }
    grad = torch.ones(plain(*tensors).shape)
    ours = results_of(pyops.linear_act, tensors, grad, backend="cpu", **options)
    for a, b in zip(ours, results_of(plain, tensors, grad, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@EACH
def test_special_values(activation):
    """A diagonal weight, so that every value reaches the activation as it is."""
    values = [0.0, -0.0, 1e-30, -1e-30, 1e-4, -0.5, 3.0, -9.5, 30.0, -88.0, 104.0, -200.0, 1e38]
    values += [-1e38, float("inf"), float("-inf"), float("nan")]
    x = torch.tensor(values)[:, None]
    w = torch.ones(1, 1)
    got = pyops.linear_act(x, w, activation=activation, backend="cpu")
    want = plain(x.double(), w.double(), activation=activation)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-37, equal_nan=True)


def test_strided_and_empty_inputs():
    x, w, b = make_inputs((10, 6), 5)
    check(x.t()[:, ::2], w[:, :5].t()[:5].t().contiguous(), b, activation="tanh")
    out = pyops.linear_act(torch.zeros(0, 6), w, b, backend="cpu")
    assert out.shape == (0, 5)


@EACH
def test_gradients_of_gradients(activation):
    """The penalty on a gradient, as R1 and WGAN-GP have it, beside plain torch in float64."""

    def penalty(function, tensors, **extra):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves, activation=activation, **extra)
        (gx,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(gx.square().sum(), leaves)

    tensors = make_inputs((4, 5), 6)
    ours = penalty(pyops.linear_act, tensors, backend="cpu")
    theirs, exact = penalty(plain, tensors), penalty(plain, [t.double() for t in tensors])
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_within_budget(a, b, c, GRADIENT_BUDGET)


@EACH
def test_gradcheck_of_the_rule(activation):
    """The backward rule in float64, its second order too; the reference stands in for the kernel."""
    from pyops.reference.linear_act import LinearActSpec, activation_backward

    spec = LinearActSpec(activation or "none", 0.2)

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            y = plain(z, torch.eye(4).double(), activation=activation, negative_slope=0.2)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad):
            return activation_backward(grad, *ctx.saved_tensors, spec)

    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Rule.apply, z)
    assert torch.autograd.gradgradcheck(Rule.apply, z)


def test_only_the_gradients_asked_for_and_nothing_saved_without():
    x, w, b = make_inputs()
    w.requires_grad_()
    out = pyops.linear_act(x, w, b, activation="tanh", backend="cpu")
    out.sum().backward()
    assert w.grad is not None and x.grad is None and b.grad is None
    assert not pyops.linear_act(x, w.detach(), b, backend="cpu").requires_grad


@EACH
def test_opcheck(activation):
    tensors = [t.requires_grad_() for t in make_inputs((2, 3, 4), 5)]
    torch.library.opcheck(OP, (*tensors, activation or "none", 0.1))
    torch.library.opcheck(OP, (*tensors[:2], None, activation or "none", 0.1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def call(x, w, b):
        return pyops.linear_act(x, w, b, activation="tanh", backend="cpu")

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 8):
        tensors = [t.requires_grad_() for t in make_inputs((rows, 7), 300)]
        assert torch.equal(compiled(*tensors), call(*tensors))
        ours = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
        for a, b in zip(
            ours, torch.autograd.grad(call(*tensors).square().sum(), tensors), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_export_and_meta():
    module = LinearAct(7, 300, activation="tanh", backend="cpu")
    x = torch.randn(4, 7)
    program = torch.export.export(module, (x,))
    assert "linear_act" in str(program.graph)
    assert torch.equal(program.module()(x), module(x))
    x, w, b = (t.to("meta") for t in make_inputs((2, 3, 7), 5))
    assert pyops.linear_act(x, w, b).shape == (2, 3, 5)


def test_vmap():
    x, w, b = make_inputs((4, 3, 6), 9)
    call = lambda *t: pyops.linear_act(*t, activation="tanh", backend="cpu")  # noqa: E731
    torch.testing.assert_close(torch.vmap(call, (0, None, None))(x, w, b), call(x, w, b))
    torch.testing.assert_close(torch.vmap(call, (1, None, None), 1)(x, w, b), call(x, w, b))
    ws = torch.stack([w, -w, w + 1, 2 * w])
    each = torch.stack([call(*pair, b) for pair in zip(x, ws, strict=True)])
    torch.testing.assert_close(torch.vmap(call, (0, 0, None))(x, ws, b), each)


def test_autocast():
    x, w, b = make_inputs((3, 6), 800)
    with torch.autocast("cpu", torch.bfloat16):
        out = pyops.linear_act(x, w, b, activation="tanh", backend="cpu")
        assert torch.equal(out, OP(x, w, b, "tanh", 0.01))
    want = OP(*(t.bfloat16() for t in (x, w, b)), "tanh", 0.01)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)


def test_automatic_choice_takes_what_was_measured_faster(monkeypatch):
    calls = []
    monkeypatch.setattr(
        pyops.ops.linear_act.reference, "linear_act", lambda *a: calls.append(a) or plain(*a[:3])
    )
    x, w, b = make_inputs((64, 8), 64)
    pyops.linear_act(x, w, b, activation="tanh")
    assert not calls
    pyops.linear_act(x, w, b, activation="relu")
    pyops.linear_act(x[:2], w, b, activation="tanh")
    assert len(calls) == 2


def test_module_is_a_linear():
    module, linear = LinearAct(6, 9, activation="tanh", backend="cpu"), nn.Linear(6, 9)
    linear.load_state_dict(module.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(module(x), linear(x).tanh())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
    assert "activation=tanh, backend=cpu" in repr(module)
    with pytest.raises(ValueError, match="activation"):
        LinearAct(6, 9, activation="gelu")
    with pytest.raises(ValueError, match="backend"):
        LinearAct(6, 9, backend="tpu")


BAD = {
    "rank of weight": (lambda x, w, b: (x, w[0], b), {}, ValueError, r"weight: expected 2 dim"),
    "width": (
        lambda x, w, b: (x[:, :5], w, b),
        {},
        ValueError,
        r"input: expected shape \(\.\.\., 10",
    ),
    "scalar": (lambda x, w, b: (x[0, 0], w, b), {}, ValueError, "input: expected shape"),
    "bias": (lambda x, w, b: (x, w, b[:3]), {}, ValueError, r"bias: expected shape \(40,\)"),
    "dtype": (lambda x, w, b: (x, w.half(), b), {}, TypeError, "weight: expected"),
    "device": (lambda x, w, b: (x, w, b.to("meta")), {}, ValueError, "bias: expected"),
    "integers": (lambda x, w, b: (x.long(), w, b), {}, TypeError, "input: expected"),
    "no tensor": (lambda x, w, b: (x, None, b), {}, TypeError, "weight: expected"),
    "list": (lambda x, w, b: ([1.0], w, b), {}, TypeError, "input: expected"),
    "activation": (lambda *t: t, {"activation": "gelu"}, ValueError, "activation: expected"),
    "slope": (lambda *t: t, {"negative_slope": "a"}, TypeError, "negative_slope: expected"),
    "backend": (lambda *t: t, {"backend": "tpu"}, ValueError, "backend: expected"),
    "triton": (lambda *t: t, {"backend": "triton"}, RuntimeError, "no implementation"),
    "float64": (
        lambda *t: [i.double() for i in t],
        {"backend": "cpu"},
        RuntimeError,
        "backend: cpu cannot take",
    ),
    "slope below 0 with gradients": (
        lambda x, w, b: (x, w.requires_grad_(), b),
        {"backend": "cpu", "activation": "leaky_relu", "negative_slope": -1.0},
        RuntimeError,
        "negative_slope",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        pyops.linear_act(*change(*make_inputs()), **options)


def test_swapped_into_models_and_out_again():
    class Pooler(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(32, 64)

        def forward(self, x):
            return torch.tanh(self.dense(x[:, 0]))

    model = nn.Sequential(Pooler(), nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 3), nn.ReLU())
    x = torch.randn(40, 2, 32)
    want = model(x)
    report = pyops.optimize(model, backend="cpu")
    assert [(e.place, e.pattern) for e in report.replaced] == [
        ("1", "linear → tanh"),
        ("0.dense", "linear → tanh"),
    ]
    assert not report.skipped
    torch.testing.assert_close(model(x), want)
    grads = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    pyops.restore(model)
    for a, b in zip(
        grads, torch.autograd.grad(model(x).sum(), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert "forward" not in model.__dict__
