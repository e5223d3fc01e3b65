"""Bad arguments raise and say which argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from conv_transpose_cases import fast, make_inputs, plain

import pyops
from pyops.nn import ConvTranspose2dAct

X, W, B, S, T = make_inputs((2, 6, 5, 5), (6, 8, 4, 4))
BACKENDS = pytest.mark.parametrize("backend", [None, "cpu", "reference"])

# what is wrong: (arguments changed, exception, words of the message)
BAD = {
    "input not a tensor": ({"input": [1.0]}, TypeError, ["input", "Tensor", "list"]),
    "input None": ({"input": None}, TypeError, ["input", "Tensor", "NoneType"]),
    "weight None": ({"weight": None}, TypeError, ["weight", "Tensor", "NoneType"]),
    "bias a number": ({"bias": 0.5}, TypeError, ["bias", "Tensor", "float"]),
    "scale a number": ({"scale": 2}, TypeError, ["scale", "Tensor", "int"]),
    "input of rank 2": ({"input": X[0, 0]}, ValueError, ["input", "3 or 4", "(5, 5)"]),
    "input of rank 5": ({"input": X[None]}, ValueError, ["input", "3 or 4", "(1, 2, 6, 5, 5)"]),
    "weight of rank 3": ({"weight": W[0]}, ValueError, ["weight", "4", "(8, 4, 4)"]),
    "channels": ({"weight": W[:5]}, ValueError, ["weight", "6", "(5, 8, 4, 4)"]),
    "groups and input": ({"groups": 4}, ValueError, ["groups", "6", "4"]),
    "groups 0": ({"groups": 0}, ValueError, ["groups", "0"]),
    "groups below 0": ({"groups": -1}, ValueError, ["groups", "-1"]),
    "groups a float": ({"groups": 1.0}, TypeError, ["groups", "int", "1.0"]),
    "bias in groups": ({"groups": 2}, ValueError, ["bias", "(16,)", "(8,)"]),
    "bias size": ({"bias": B[:7]}, ValueError, ["bias", "(8,)", "(7,)"]),
    "scale size": ({"scale": S[:1]}, ValueError, ["scale", "(8,)", "(1,)"]),
    "shift rank": ({"shift": T[:, None, None]}, ValueError, ["shift", "(8,)", "(8, 1, 1)"]),
    "integers": ({"input": X.long()}, TypeError, ["input", "float32", "int64"]),
    "complex": ({"weight": W.cfloat()}, TypeError, ["weight", "float32", "complex64"]),
    "weight dtype": ({"weight": W.double()}, TypeError, ["weight", "float32", "float64"]),
    "shift dtype": ({"shift": T.half()}, TypeError, ["shift", "float32", "float16"]),
    "weight device": ({"weight": W.to("meta")}, ValueError, ["weight", "cpu", "meta"]),
    "scale device": ({"scale": S.to("meta")}, ValueError, ["scale", "cpu", "meta"]),
    "sparse": ({"input": X.to_sparse()}, TypeError, ["input", "strided", "sparse_coo"]),
    "no channels": ({"input": X[:, :0]}, ValueError, ["input", "0"]),
    "no rows": ({"input": X[:, :, :0]}, ValueError, ["input", "0", "(6, 0, 5)"]),
    "no output channels": ({"weight": W[:, :0]}, ValueError, ["weight", "0", "(6, 0, 4, 4)"]),
    "kernel of size 0": ({"weight": W[..., :0]}, ValueError, ["weight", "(6, 8, 4, 0)"]),
    "stride 0": ({"stride": 0}, ValueError, ["stride", "at least 1", "0"]),
    "stride float": ({"stride": 1.5}, TypeError, ["stride", "int", "1.5"]),
    "stride of three": ({"stride": (1, 1, 1)}, TypeError, ["stride", "pair", "(1, 1, 1)"]),
    "stride huge": ({"stride": 2**31}, ValueError, ["stride", "2**31", str(2**31)]),
    "padding below 0": ({"padding": -1}, ValueError, ["padding", "at least 0", "-1"]),
    "padding word": ({"padding": "same"}, TypeError, ["padding", "int", "same"]),
    "padding over all": ({"padding": (1, 4)}, ValueError, ["padding", "size", "(1, 4)", "(6, 0)"]),
    "output_padding": (
        {"output_padding": 1},
        ValueError,
        ["output_padding", "(1, 1)", "stride", "dilation"],
    ),
    "output_padding below 0": ({"output_padding": (0, -1)}, ValueError, ["output_padding", "-1"]),
    "dilation 0": ({"dilation": (0, 1)}, ValueError, ["dilation", "at least 1", "(0, 1)"]),
    "activation": ({"activation": "gelu"}, ValueError, ["activation", "sigmoid", "gelu"]),
    "activation function": ({"activation": torch.relu}, ValueError, ["activation", "relu"]),
    "slope": ({"negative_slope": "0.1"}, TypeError, ["negative_slope", "number", "0.1"]),
    "unknown backend": ({"backend": "cudnn"}, ValueError, ["backend", "cpu", "triton", "cudnn"]),
}


@BACKENDS
@pytest.mark.parametrize("what", BAD)
def test_message_names_the_argument(what, backend):
    changes, exception, words = BAD[what]
    arguments = {"input": X, "weight": W, "bias": B, "scale": S, "shift": T, "backend": backend}
    arguments.update(changes)
    with pytest.raises(exception) as raised:
        pyops.conv_transpose2d_act(**arguments)
    message = str(raised.value)
    assert message.startswith(words[0]), message
    for word in words:
        assert word in message, message


def test_bad_arguments_raise_while_compiling_too():
    torch._dynamo.reset()
    compiled = torch.compile(pyops.conv_transpose2d_act, backend="eager")
    with pytest.raises(Exception, match="bias: expected shape"):
        compiled(X, W, B[:7])


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(RuntimeError, match="backend: cuda cannot take this call"):
        pyops.conv_transpose2d_act(X, W, backend="cuda")
    with pytest.raises(RuntimeError, match="backend: cpu cannot.*takes cpu tensors"):
        pyops.conv_transpose2d_act(X.to("meta"), W.to("meta"), backend="cpu")


def test_slopes_that_hide_the_sign_go_to_the_reference():
    options = {"activation": "leaky_relu", "negative_slope": -0.5}
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="backend: cpu cannot.*negative_slope"):
        fast(x, w, **options)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, w, **options), plain(x, w, **options))
    got = torch.autograd.grad(fast(x, w, backend=None, **options).sum(), (x, w))
    want = torch.autograd.grad(plain(x, w, **options).sum(), (x, w))
    torch.testing.assert_close(got, want)


def test_module_passes_its_arguments_to_the_op():
    with pytest.raises(ValueError, match="activation"):
        ConvTranspose2dAct(6, 8, 4, activation="gelu")
    with pytest.raises(ValueError, match="shift"):
        ConvTranspose2dAct(6, 8, 4)(X, shift=T[:3])


FORWARD = torch.ops.pyops.conv_transpose2d_act
BACKWARD = torch.ops.pyops.conv_transpose2d_act_backward
SPEC = {
    **{f"{name}_{axis}": 1 for name in ("stride", "dilation") for axis in "hw"},
    **{f"{name}_{axis}": 0 for name in ("padding", "output_padding") for axis in "hw"},
    "groups": 1,
    "activation": "relu",
    "negative_slope": 0.01,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"input": X[0]},
        {"weight": W[0]},
        {"weight": W[:5]},
        {"weight": W.double()},
        {"weight": W[..., :0]},
        {"input": X[:, :, :0]},
        {"bias": B[:3]},
        {"scale": S.double()},
        {"shift": T[None]},
        {"stride_h": 0},
        {"stride_w": 2**40},
        {"padding_h": -1},
        {"padding_w": 4},
        {"output_padding_h": 1},
        {"dilation_w": 0},
        {"groups": 0},
        {"groups": 4},
        {"activation": "gelu"},
    ],
    ids=lambda c: f"{next(iter(c))}",
)
def test_direct_calls_of_the_op_are_checked(changes):
    arguments = {"input": X, "weight": W, "bias": B, "scale": S, "shift": T, **SPEC, **changes}
    (name,) = changes
    name = name.removesuffix("_h").removesuffix("_w")
    with pytest.raises(RuntimeError, match=name):
        FORWARD(**arguments)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"grad_output": torch.ones(2, 8, 8, 7)}, "grad_output"),
        ({"grad_output": torch.ones(2, 8, 8, 8).double()}, "grad_output"),
        ({"output": torch.ones(2, 8, 8)}, "output"),
        ({"scale": S[:2]}, "scale"),
        ({"output_mask": [True]}, "output_mask"),
        ({"activation": "leaky_relu", "negative_slope": -1.0}, "negative_slope"),
    ],
    ids=str,
)
def test_direct_calls_of_the_backward_op_are_checked(changes, word):
    out = FORWARD(X, W, B, S, T, **SPEC)
    arguments = {"grad_output": torch.ones_like(out), "input": X, "weight": W, "bias": B}
    arguments |= {"scale": S, "output": out, **SPEC, "output_mask": [True] * 5, **changes}
    with pytest.raises(RuntimeError, match=word):
        BACKWARD(**arguments)
