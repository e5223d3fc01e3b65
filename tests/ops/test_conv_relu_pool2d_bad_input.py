"""Bad arguments raise and say which argument, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch
from conv_pool_cases import make_inputs

import pyops
from pyops.nn import ConvReLUPool2d
from pyops.reference.conv_relu_pool import ConvPoolSpec

X, W, B = make_inputs((2, 6, 10, 10), (8, 6, 3, 3))
BACKENDS = pytest.mark.parametrize("backend", [None, "cpu", "reference"])

# what is wrong: (arguments changed, exception, words of the message)
BAD = {
    "input not a tensor": ({"input": [1.0]}, TypeError, ["input", "Tensor", "list"]),
    "weight None": ({"weight": None}, TypeError, ["weight", "Tensor", "NoneType"]),
    "bias a number": ({"bias": 0.5}, TypeError, ["bias", "Tensor", "float"]),
    "input of rank 2": ({"input": X[0, 0]}, ValueError, ["input", "3 or 4", "(10, 10)"]),
    "input of rank 5": ({"input": X[None]}, ValueError, ["input", "3 or 4", "(1, 2, 6, 10, 10)"]),
    "weight of rank 3": ({"weight": W[0]}, ValueError, ["weight", "4", "(6, 3, 3)"]),
    "channels": ({"weight": W[:, :5]}, ValueError, ["weight", "6", "(8, 5, 3, 3)"]),
    "channels in groups": ({"groups": 2}, ValueError, ["weight", "3", "(8, 6, 3, 3)"]),
    "groups and input": ({"groups": 4}, ValueError, ["groups", "6", "8", "4"]),
    "groups and output": ({"groups": 3, "weight": W[:, :2]}, ValueError, ["groups", "8", "3"]),
    "groups 0": ({"groups": 0}, ValueError, ["groups", "0"]),
    "groups below 0": ({"groups": -1}, ValueError, ["groups", "-1"]),
    "groups a float": ({"groups": 1.0}, TypeError, ["groups", "int", "1.0"]),
    "bias size": ({"bias": B[:7]}, ValueError, ["bias", "(8,)", "(7,)"]),
    "bias rank": ({"bias": B[:, None]}, ValueError, ["bias", "(8,)", "(8, 1)"]),
    "integers": ({"input": X.long()}, TypeError, ["input", "float32", "int64"]),
    "booleans": ({"input": X > 0}, TypeError, ["input", "float32", "bool"]),
    "complex": ({"weight": W.cfloat()}, TypeError, ["weight", "float32", "complex64"]),
    "weight dtype": ({"weight": W.double()}, TypeError, ["weight", "float32", "float64"]),
    "bias dtype": ({"bias": B.half()}, TypeError, ["bias", "float32", "float16"]),
    "weight device": ({"weight": W.to("meta")}, ValueError, ["weight", "cpu", "meta"]),
    "bias device": ({"bias": B.to("meta")}, ValueError, ["bias", "cpu", "meta"]),
    "sparse": ({"input": X.to_sparse()}, TypeError, ["input", "strided", "sparse_coo"]),
    "no channels": ({"input": X[:, :0]}, ValueError, ["input", "0"]),
    "no rows": ({"input": X[:, :, :0]}, ValueError, ["input", "0", "(6, 0, 10)"]),
    "no output channels": ({"weight": W[:0], "bias": None}, ValueError, ["weight", "0"]),
    "kernel of size 0": ({"weight": W[..., :0]}, ValueError, ["weight", "(8, 6, 3, 0)"]),
    "stride 0": ({"stride": 0}, ValueError, ["stride", "at least 1", "0"]),
    "stride pair with 0": ({"stride": (1, 0)}, ValueError, ["stride", "at least 1", "(1, 0)"]),
    "stride float": ({"stride": 1.5}, TypeError, ["stride", "int", "1.5"]),
    "stride of three": ({"stride": (1, 1, 1)}, TypeError, ["stride", "pair", "(1, 1, 1)"]),
    "stride bool": ({"stride": True}, TypeError, ["stride", "int", "True"]),
    "stride None": ({"stride": None}, TypeError, ["stride", "int", "None"]),
    "stride huge": ({"stride": 2**31}, ValueError, ["stride", "2**31", str(2**31)]),
    "padding below 0": ({"padding": -1}, ValueError, ["padding", "at least 0", "-1"]),
    "padding word": ({"padding": "full"}, ValueError, ["padding", "same", "valid", "full"]),
    "padding same, stride": ({"padding": "same", "stride": 2}, ValueError, ["padding", "stride 1"]),
    "dilation 0": ({"dilation": (0, 1)}, ValueError, ["dilation", "at least 1", "(0, 1)"]),
    "dilation text": ({"dilation": "1"}, TypeError, ["dilation", "int", "'1'"]),
    "activation": ({"activation": "gelu"}, ValueError, ["activation", "relu", "leaky", "gelu"]),
    "activation function": ({"activation": torch.relu}, ValueError, ["activation", "relu"]),
    "slope": ({"negative_slope": "0.1"}, TypeError, ["negative_slope", "number", "0.1"]),
    "pool": ({"pool": "min"}, ValueError, ["pool", "max", "avg", "min"]),
    "pool_size 0": ({"pool_size": 0}, ValueError, ["pool_size", "at least 1", "0"]),
    "pool_size below 0": ({"pool_size": (2, -2)}, ValueError, ["pool_size", "(2, -2)"]),
    "pool_stride 0": ({"pool_stride": 0}, ValueError, ["pool_stride", "at least 1", "0"]),
    "pool_padding below 0": ({"pool_padding": -1}, ValueError, ["pool_padding", "at least 0"]),
    "pool_padding over half": (
        {"pool_padding": (1, 2), "pool_size": 3},
        ValueError,
        ["pool_padding", "half", "(3, 3)", "(1, 2)"],
    ),
    "ceil_mode": ({"ceil_mode": "yes"}, TypeError, ["ceil_mode", "bool", "yes"]),
    "kernel over input": ({"input": X[..., :2]}, ValueError, ["input", "10, 2)", "(3, 3)"]),
    "dilated kernel over input": ({"dilation": 5}, ValueError, ["input", "dilation (5, 5)"]),
    "pool over convolution": ({"pool_size": 9}, ValueError, ["pool", "(9, 9)", "(8, 8)"]),
    "unknown backend": ({"backend": "cudnn"}, ValueError, ["backend", "cpu", "triton", "cudnn"]),
}


@BACKENDS
@pytest.mark.parametrize("what", BAD)
def test_bad_argument(what, backend):
    changed, exception, words = BAD[what]
    arguments = {"input": X, "weight": W, "bias": B, "backend": backend, **changed}
    with pytest.raises(exception) as caught:
        pyops.conv_relu_pool2d(**arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "good, bad", [({"stride": 1}, {"stride": True}), ({"groups": 1}, {"groups": 1.0}),
                  ({"ceil_mode": False}, {"ceil_mode": 0})], ids=str,
)  # fmt: skip
def test_equal_values_of_the_wrong_type_are_refused_after_a_good_call(good, bad):
    """What was found about the good call must not be remembered for the bad one."""
    pyops.conv_relu_pool2d(X, W, B, **good)
    with pytest.raises(TypeError, match=next(iter(bad))):
        pyops.conv_relu_pool2d(X, W, B, **bad)


def test_module_raises_likewise():
    with pytest.raises(ValueError, match="pool: expected one of 'max', 'avg', None, got 'median'"):
        ConvReLUPool2d(6, 8, 3, pool="median")
    with pytest.raises(ValueError, match=r"weight: expected 5 input channels"):
        ConvReLUPool2d(6, 8, 3)(X[:, :5])


def test_gradient_of_integers_is_refused():
    with pytest.raises(RuntimeError, match="floating point"):
        X.long().requires_grad_()
    with pytest.raises(TypeError, match="input: expected dtype"):
        pyops.conv_relu_pool2d(X.long(), W.clone().requires_grad_())


@pytest.mark.parametrize("pool, size", [("max", (12, 11)), ("avg", (3, 3))])
def test_windows_too_large_for_codes(pool, size):
    """An explicit backend refuses what it cannot differentiate, automatic choice goes elsewhere."""
    x, w, _ = make_inputs((1, 2, 30, 30), (4, 2, 3, 3))
    w.requires_grad_()
    with pytest.raises(RuntimeError) as caught:
        pyops.conv_relu_pool2d(x, w, pool=pool, pool_size=size, backend="cpu")
    for word in ("backend", "cpu", "places", str(size)):
        assert word in str(caught.value)
    out = pyops.conv_relu_pool2d(x, w, pool=pool, pool_size=size)
    assert torch.autograd.grad(out.sum(), w)[0].any()
    with torch.no_grad():
        fast = pyops.conv_relu_pool2d(x, w, pool=pool, pool_size=size, backend="cpu")
    torch.testing.assert_close(fast, out, rtol=1e-5, atol=1e-5)


# Direct calls of the ops, past the public function's checks.

FORWARD = {
    "input": X,
    "weight": W,
    "bias": B,
    **{"stride_h": 1, "stride_w": 1, "padding_h": 1, "padding_w": 1},
    **{"dilation_h": 1, "dilation_w": 1},
    "groups": 1,
    "activation": "relu",
    "negative_slope": 0.01,
    "pool": "max",
    **{"pool_h": 2, "pool_w": 2, "pool_stride_h": 2, "pool_stride_w": 2},
    **{"pool_padding_h": 0, "pool_padding_w": 0, "ceil_mode": False},
}
BAD_DIRECT = {
    "input of rank 3": ({"input": X[0]}, "input: expected 4 dimensions"),
    "weight of rank 5": ({"weight": W[None]}, "weight: expected 4 dimensions"),
    "bias size": ({"bias": B[:3]}, r"bias: expected shape \(8\)"),
    "bias scalar": ({"bias": B[0]}, "bias: expected shape"),
    "bias dtype": ({"bias": B.double()}, "bias: expected the dtype of input"),
    "weight dtype": ({"weight": W.half()}, "weight: expected the dtype of input"),
    "integers": ({"input": X.int(), "weight": W.int(), "bias": B.int()}, "input: expected dtype"),
    "channels": ({"weight": W[:, :5]}, "groups: 1 does not fit"),
    "groups 0": ({"groups": 0}, "groups: 0 does not fit"),
    "groups below 0": ({"groups": -6}, "groups: -6 does not fit"),
    "groups 3": ({"groups": 3, "weight": W[:, :2]}, "groups: 3 does not fit"),
    "stride 0": ({"stride_h": 0}, "stride: expected integers of at least 1"),
    "stride huge": ({"stride_h": 2**40}, "stride: expected integers"),
    "padding below 0": ({"padding_w": -1}, "padding: expected integers of at least 0"),
    "padding huge": ({"padding_h": 2**62, "padding_w": 2**62}, "padding: expected integers"),
    "dilation 0": ({"dilation_w": 0}, "dilation: expected integers of at least 1"),
    "pool_size 0": ({"pool_h": 0, "pool_w": 0}, "pool_size: expected integers of at least 1"),
    "pool_stride 0": ({"pool_stride_w": 0}, "pool_stride: expected integers of at least 1"),
    "pool_padding": (
        {"pool_padding_h": 2, "pool_padding_w": 2},
        "pool_padding: expected at most half",
    ),
    "pool_padding below 0": ({"pool_padding_h": -1}, "pool_padding: expected integers"),
    "activation": (
        {"activation": "tanh"},
        "activation: expected relu, leaky_relu or none, got tanh",
    ),
    "pool": ({"pool": "min"}, "pool: expected max, avg or none, got min"),
    "kernel over input": (
        {"dilation_h": 6, "dilation_w": 6},
        r"input: \(2, 6, 10, 10\) is too small",
    ),
    "pool over convolution": ({"pool_h": 11, "pool_w": 11}, "is too small"),
    "no rows": ({"input": X[:, :, :0], "padding_h": 0, "padding_w": 0}, "is too small"),
    "kernel of size 0": ({"weight": W[..., :0]}, "weight: expected no dimension of size 0"),
    "no channels": ({"input": X[:, :0], "weight": W[:, :0]}, "no dimension of size 0"),
}


@pytest.mark.parametrize("what", BAD_DIRECT)
def test_direct_call_of_the_op(what):
    changed, words = BAD_DIRECT[what]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pyops.conv_relu_pool2d(*{**FORWARD, **changed}.values(), False)


def backward_arguments(**changed):
    forward = {**FORWARD, **{k: v for k, v in changed.items() if k in FORWARD}}
    sound = {k: changed[k] if k in ("pool", "pool_h", "pool_w") and k in changed else v
             for k, v in FORWARD.items()}  # fmt: skip
    out, codes = torch.ops.pyops.conv_relu_pool2d(*sound.values(), True)
    tensors = {
        "grad_output": torch.ones_like(out),
        "input": forward["input"],
        "weight": forward["weight"],
        "codes": codes,
    }
    tensors.update({k: v for k, v in changed.items() if k in tensors})
    rest = [forward[k] for k in list(FORWARD)[3:]]
    return (*tensors.values(), *rest, changed.get("output_mask", [True, True, True]))


GRAD = torch.ones(2, 8, 5, 5)
BAD_BACKWARD = {
    "grad_output shape": (
        {"grad_output": GRAD[:, :, :4]},
        r"grad_output: expected shape \(2, 8, 5, 5\)",
    ),
    "grad_output rank": ({"grad_output": GRAD[0]}, "grad_output: expected shape"),
    "grad_output dtype": (
        {"grad_output": GRAD.double()},
        "grad_output: expected the dtype of input",
    ),
    "codes shape": ({"codes": GRAD[:1].byte()}, "codes: expected shape"),
    "codes empty": ({"codes": torch.empty(0, dtype=torch.uint8)}, "codes: expected shape"),
    "codes dtype": ({"codes": GRAD}, "codes: expected dtype uint8"),
    "input channels": ({"input": X[:, :5]}, "groups: 1 does not fit"),
    "input size": ({"input": X[:, :, :8]}, "grad_output: expected shape"),
    "weight dtype": ({"weight": W.half()}, "weight: expected the dtype of input"),
    "pool_padding": (
        {"pool_padding_h": 2, "pool_padding_w": 2},
        "pool_padding: expected at most half",
    ),
}


@pytest.mark.parametrize("what", BAD_BACKWARD)
def test_direct_call_of_the_backward_op(what):
    changed, words = BAD_BACKWARD[what]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pyops.conv_relu_pool2d_backward(*backward_arguments(**changed))


@pytest.mark.parametrize("mask", [[True], [True] * 4])
def test_output_mask_of_wrong_length(mask):
    with pytest.raises(RuntimeError, match="output_mask"):
        torch.ops.pyops.conv_relu_pool2d_backward(*backward_arguments(output_mask=mask))


def test_codes_left_out_are_computed_again():
    weight = W.clone().requires_grad_()
    call = {**FORWARD, "weight": weight}
    grads = [
        torch.autograd.grad(
            torch.ops.pyops.conv_relu_pool2d(*call.values(), with_codes)[0].sum(), weight
        )[0]
        for with_codes in (False, True)
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("channels", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0, 3, 4, 64, 127, 132, 255])
@pytest.mark.parametrize("geometry", ["2x2", "3x3 stride 2 padded", "avg"])
def test_wrong_codes_stay_in_bounds(channels, dtype, value, geometry):
    """Codes are user input: a place outside its window or plane must not be read or written.

    The arrays lie inside larger ones whose margins must come back untouched.
    """
    x, w, _ = make_inputs((2, channels, 10, 10), (8, channels, 3, 3), dtype=dtype)
    pools = {
        "2x2": ("max", (2, 2), (2, 2), (0, 0)),
        "3x3 stride 2 padded": ("max", (3, 3), (2, 2), (1, 1)),
        "avg": ("avg", (2, 2), (2, 2), (0, 0)),
    }
    spec = ConvPoolSpec((1, 1), (1, 1), (1, 1), 1, "relu", 0.01, *pools[geometry], False).flat()
    out, codes = torch.ops.pyops.conv_relu_pool2d(x, w, None, *spec, True)
    margins = [torch.full((t.numel() + 256,), 77.0).to(t.dtype) for t in (x, w, codes)]
    inside = [
        m[128:-128].view(t.shape).copy_(t) for m, t in zip(margins, (x, w, codes), strict=True)
    ]
    inside[2].fill_(value)
    grads = torch.ops.pyops.conv_relu_pool2d_backward(
        torch.ones_like(out), inside[0], inside[1], inside[2], *spec, [True, True, True]
    )
    for margin in margins:
        assert (margin[:128] == 77).all() and (margin[-128:] == 77).all()
    assert [g.shape for g in grads] == [x.shape, w.shape, (8,)]
    # Whatever they mean, the numbers come from these inputs: nothing of what lies beside them.
    assert all(g.isfinite().all() for g in grads)
    assert grads[0].abs().max() <= w.abs().sum() * 10
    assert re.fullmatch(r"torch\.\w+", str(grads[0].dtype))
