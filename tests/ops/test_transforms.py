"""Ops under transforms that hide from a forward that gradients will be asked for, and around compile."""

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

import pyops

X = torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(0))
W = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(1)) / 7
Q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(2))
S = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(3))
LSTM_WEIGHTS = [
    torch.randn(shape, generator=torch.Generator().manual_seed(4)) / 2
    for shape in ((20, 4), (20, 5), (20,), (20,))
]


def lstm(x, backend=None):
    kinds = {"num_layers": 1, "bidirectional": False, "batch_first": False}
    return pyops.lstm(x, None, LSTM_WEIGHTS, **kinds, dropout=0.0, training=False, backend=backend)[
        0
    ]


# What is differentiated: (function of one tensor and a backend, that tensor).
CALLS = {
    "conv_relu_pool2d": (lambda x, b=None: pyops.conv_relu_pool2d(x, W, backend=b), X),
    "conv_relu_pool2d of weights": (lambda w, b=None: pyops.conv_relu_pool2d(X, w, backend=b), W),
    "conv_transpose2d_act": (
        lambda x, b=None: pyops.conv_transpose2d_act(x, W.transpose(0, 1), backend=b),
        X,
    ),
    "linear_act": (
        lambda x, b=None: pyops.linear_act(x, W.reshape(-1, 12), activation="tanh", backend=b),
        X,
    ),
    "attention": (lambda q, b=None: pyops.attention(q, Q, Q, causal=True, backend=b), Q),
    "lstm": (lstm, S),
}


def gradient(function, x, *args):
    x = x.detach().requires_grad_()
    y = function(x, *args)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return torch.autograd.grad((y * weights).sum(), x)[0]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_gradient_of_a_vmapped_call(name):
    call, x = CALLS[name]
    xs = torch.stack([x, x.flip(0), -x])
    ours = gradient(lambda t: vmap(call)(t), xs)
    close(ours, gradient(lambda t: torch.stack([call(s, "reference") for s in t]), xs))


class Calls(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("name", CALLS)
def test_gradient_of_what_was_exported_without_one_in_sight(name):
    call, x = CALLS[name]
    with torch.no_grad():
        program = torch.export.export(Calls(call), (x,)).module()
    close(gradient(program, x), gradient(call, x, "reference"))


@pytest.mark.parametrize("name", CALLS)
def test_func_grad_within_compile(name):
    call, x = CALLS[name]

    def gradient_of(t):
        return torch.func.grad(lambda t: call(t).square().sum())(t)

    compiled = torch.compile(gradient_of, backend="aot_eager", fullgraph=True)
    close(compiled(x), gradient_of(x))


def test_an_ensemble_of_optimised_models_trains():
    def model():
        return torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))

    torch.manual_seed(0)
    models = [model() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    whole = model()
    losses = []
    for swap in (False, True):
        if swap:
            assert len(pyops.optimize(whole).replaced) == 1
        leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        out = vmap(lambda p, b: functional_call(whole, (p, b), (X,)))(leaves, buffers)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        losses.append((out, *grads))
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_vmap_over_no_samples():
    none = X[:0].view(0, 1, *X.shape[1:])
    assert vmap(lambda x: pyops.conv_relu_pool2d(x, W))(none).shape == (0, 1, 8, 5, 5)
    transposed = W.transpose(0, 1)
    assert vmap(lambda x: pyops.conv_transpose2d_act(x, transposed))(none).shape[:2] == (0, 1)
    with pytest.raises(RuntimeError, match="dimension of size 0"):
        vmap(lambda w: pyops.conv_relu_pool2d(X, w))(W[None][:0])
