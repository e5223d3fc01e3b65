"""4x4 convolutions of stride 2 by Winograd's method: forward, transposed, and the gradients of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import conv_pool_cases
import conv_transpose_cases
import pytest
import torch

import pyops
from pyops import _C

CONV = {"stride": 2, "padding": 1, "pool": None, "activation": "leaky_relu", "negative_slope": 0.2}
TRANSPOSED = {"stride": 2, "padding": 1, "activation": "relu"}
# (batch, channels, out channels, height, width). The gradient of the weight is ours from 256 output pixels on.
SHAPES = {
    "one pixel": (1, 32, 32, 2, 2),
    "one row": (3, 32, 32, 2, 14),
    "small tiles": (20, 64, 32, 8, 8),
    "every size of tile": (6, 32, 64, 14, 14),
    "uneven tiles": (5, 32, 32, 10, 22),
    "odd": (5, 32, 96, 15, 17),
    "several blocks of images": (75, 64, 32, 14, 14),
    "an image a block": (2, 128, 32, 32, 26),
    "one image": (1, 32, 96, 32, 34),
}
EACH = pytest.mark.parametrize("name", SHAPES)
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)


def conv_inputs(name, channels_last=False, **options):
    batch, c, k, height, width = SHAPES[name]
    shapes = (batch, c, height, width), (k, c, 4, 4)
    return conv_pool_cases.make_inputs(*shapes, channels_last=channels_last, **options)


def transposed_inputs(name, channels_last=False, **options):
    batch, c, k, height, width = SHAPES[name]
    shapes = (batch, k, height // 2, width // 2), (k, c, 4, 4)
    return conv_transpose_cases.make_inputs(*shapes, channels_last=channels_last, **options)


def conv(x, w, b=None, **options):
    return pyops.conv_relu_pool2d(x, w, b, backend="cpu", **{**CONV, **options})


def gradients(function, leaves, bad=None):
    """Of the leaves, from a gradient of ones, but for one `bad` pixel."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    grad = torch.ones_like(out)
    if bad is not None:
        grad[1, 3, 2, 1] = bad
    return torch.autograd.grad(out, leaves, grad)


@LAYOUTS
@EACH
def test_convolution(name, channels_last):
    conv_pool_cases.check(*conv_inputs(name, channels_last), **CONV)


@LAYOUTS
@EACH
def test_transposed_convolution(name, channels_last):
    odd = {"output_padding": 1} if name == "odd" else {}
    conv_transpose_cases.check(transposed_inputs(name, channels_last), **TRANSPOSED, **odd)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_of_the_convolution(activation, bias):
    options = {**CONV, "activation": activation}
    conv_pool_cases.check(*conv_inputs("every size of tile", bias=bias), **options)


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "sigmoid", None])
@pytest.mark.parametrize("vectors", ["", "bst"])
def test_activations_of_the_transposed_convolution(activation, vectors):
    tensors = transposed_inputs("every size of tile", vectors=vectors)
    conv_transpose_cases.check(tensors, **{**TRANSPOSED, "activation": activation})


@pytest.mark.parametrize("shape", [(3, 64, 12, 10), (6, 32, 14, 14)])
def test_is_taken_where_channels_fill_blocks(shape):
    """Otherwise sums have another order: with an output channel more the same numbers are not quite equal."""
    x, w, b = conv_pool_cases.make_inputs(shape, (33, shape[1], 4, 4))
    whole, direct = conv(x, w[:32], b[:32]), conv(x, w, b)[:, :32]
    assert not torch.equal(whole, direct)
    torch.testing.assert_close(whole, direct, rtol=1e-4, atol=1e-4)
    w = torch.cat([w.transpose(0, 1)] * 2)[: shape[1]].contiguous()
    options = {**TRANSPOSED, "backend": "cpu"}
    whole = pyops.conv_transpose2d_act(x, w[:, :32].contiguous(), **options)
    direct = pyops.conv_transpose2d_act(x, w, **options)[:, :32]
    assert not torch.equal(whole, direct)
    torch.testing.assert_close(whole, direct, rtol=1e-4, atol=1e-4)


@LAYOUTS
@BAD
@pytest.mark.parametrize("at", [(1, 3, 5, 7), (0, 0, 0, 0), (2, 31, 9, 21)], ids=str)
def test_nan_and_inf_in_the_input_stay_local(at, bad, channels_last):
    x, w, b = conv_inputs("uneven tiles", channels_last)
    x[at] = bad
    want = conv_pool_cases.plain(x, w, b, **CONV)
    torch.testing.assert_close(conv(x, w, b), want, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert 0 < want.isfinite().logical_not().sum() <= 4 * w.shape[0]
    ours = gradients(conv, (x, w, b))
    theirs = gradients(lambda *t: conv_pool_cases.plain(*t, **CONV), (x, w, b))
    assert torch.equal(ours[1].isfinite(), theirs[1].isfinite())


@LAYOUTS
@BAD
@pytest.mark.parametrize("name", ["uneven tiles", "every size of tile"])
def test_nan_and_inf_in_the_gradient_stay_local(name, bad, channels_last):
    x, w, b = conv_inputs(name, channels_last)
    ours = gradients(conv, (x, w, b), bad)
    theirs = gradients(lambda *t: conv_pool_cases.plain(*t, **CONV), (x, w, b), bad)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        assert want.isfinite().any() and not want.isfinite().all()


@LAYOUTS
@BAD
def test_nan_and_inf_through_the_transposed_convolution(bad, channels_last):
    x, w, *vectors = transposed_inputs("uneven tiles", channels_last)
    x[1, 2, 3, 4] = bad
    options = {**TRANSPOSED, "activation": None}
    got = conv_transpose_cases.fast(x, w, *vectors, **options)
    want = conv_transpose_cases.plain(x, w, *vectors, **options)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)
    ours = gradients(lambda *t: conv_transpose_cases.fast(*t, **options), (x, w, *vectors))
    theirs = gradients(lambda *t: conv_transpose_cases.plain(*t, **options), (x, w, *vectors))
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())


def test_an_overflow_within_the_transforms_is_torchs_result():
    x, w, b = conv_inputs("uneven tiles")
    x[0, :, 1:5, 1:5] = 3e38  # a sum of two of them is infinite
    w = w * 1e-3
    got, want = conv(x, w, b), conv_pool_cases.plain(x, w, b, **CONV)
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert not torch.equal(got[1:], conv(x[1:], w, b))  # the whole call went another way


@LAYOUTS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["every size of tile", "odd"])
def test_windows_of_zeros_give_exact_zeros(name, bias, channels_last):
    """The gradient there is told by the output's sign, which the transforms' rounding must not decide."""
    x, w, b = conv_inputs(name, channels_last, bias=bias)
    x[:, :, 4:11, 3:] = 0
    if bias:
        b[::3] = 0
    leaves = [t for t in (x, w, b) if t is not None]
    got, want = conv(*leaves), conv_pool_cases.plain(*leaves, **CONV)
    zeros = want == 0
    assert zeros.sum() > x.shape[0] * w.shape[0] // 3
    assert torch.equal(got == 0, zeros)
    w = w[: x.shape[1]]  # of a transposed convolution: x has 32 channels
    options = {**TRANSPOSED, "activation": "leaky_relu"}
    got = conv_transpose_cases.fast(x, w, **options)
    want = conv_transpose_cases.plain(x, w, **options)
    assert (want == 0).any() and torch.equal(got == 0, want == 0)


@LAYOUTS
@pytest.mark.parametrize("name", ["several blocks of images", "one image"])
def test_threads_do_not_change_the_result(name, channels_last):
    tensors = conv_inputs(name, channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (2, 4, 1):
            torch.set_num_threads(threads)
            results.append(gradients(conv, tensors))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_weights_that_lie_channels_last():
    x, w, b = conv_inputs("uneven tiles")
    strided = w.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv(x, strided, b), conv(x, w, b))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    ("shape", "ours"),
    [((8, 64, 64, 14), True), ((2, 64, 64, 14), False), ((8, 80, 64, 14), False)],
    ids=["taken", "few images", "channels between blocks"],
)
def test_automatic_choice(shape, ours, needs_grad):
    batch, c, k, size = shape
    x, w, b = conv_pool_cases.make_inputs((batch, c, size, size), (k, c, 4, 4))
    w.requires_grad_(needs_grad)
    chosen = pyops.conv_relu_pool2d(x, w, b, **CONV)
    plain = pyops.conv_relu_pool2d(x, w, b, backend="reference", **CONV)
    assert torch.equal(chosen, conv(x, w, b)) == ours
    assert torch.equal(chosen, plain) != ours


def each_instruction_set():
    """What runs in a process of its own under each of them."""
    torch.set_num_threads(2)
    worst = 0.0
    for name in ("every size of tile", "odd", "small tiles"):
        for last in (False, True):
            worst = max(worst, conv_pool_cases.check(*conv_inputs(name, last), **CONV))
            tensors = transposed_inputs(name, last)
            worst = max(worst, conv_transpose_cases.check(tensors, **TRANSPOSED))
    print(_C.active_isa(), worst)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(isa):
    if not _C.cpu_features()[isa]:
        pytest.skip(f"this CPU has no {isa}")
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", f"import {Path(__file__).stem} as m; m.each_instruction_set()"],
        env={**os.environ, "PYOPS_CPU_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == isa
