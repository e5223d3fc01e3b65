"""Backward of a strided convolution without a pool, as in a GAN's discriminator: our own kernels."""

from __future__ import annotations

import pytest
import torch
from conv_pool_cases import check, make_inputs, plain
from torch.utils._python_dispatch import TorchDispatchMode

import pyops

LEAKY = {"pool": None, "activation": "leaky_relu", "negative_slope": 0.2}
# (input shape, weight shape, options): the kernels by few output channels, rows of pixels, rows of images.
CASES = {
    "first layer": ((3, 3, 18, 20), (40, 3, 4, 4), {"stride": 2, "padding": 1}),
    "middle layer": ((2, 24, 20, 18), (32, 24, 4, 4), {"stride": 2, "padding": 1}),
    "last layer": ((16, 40, 8, 8), (48, 40, 4, 4), {"stride": 2, "padding": 1}),
    "small images of many channels": (
        (16, 128, 8, 6),
        (24, 128, 4, 4),
        {"stride": 2, "padding": 1},
    ),
    "pixels that no window reads": ((2, 16, 11, 12), (32, 16, 2, 1), {"stride": 4}),
    "uneven": (
        (3, 17, 17, 13),
        (33, 17, 3, 5),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 1)},
    ),
    "stride 1 in one direction": ((2, 8, 9, 16), (24, 8, 3, 3), {"stride": (1, 2), "padding": 1}),
    "groups": ((2, 32, 14, 14), (48, 16, 4, 4), {"stride": 2, "padding": 1, "groups": 2}),
    "depthwise": ((2, 16, 15, 15), (16, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 16}),
}
EACH = pytest.mark.parametrize("name", CASES)
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_within_the_budget(name, dtype, channels_last):
    x_shape, w_shape, options = CASES[name]
    tensors = make_inputs(x_shape, w_shape, dtype=dtype, channels_last=channels_last)
    check(*tensors, **options, **LEAKY)


@LAYOUTS
@pytest.mark.parametrize(
    "activation", ["relu", None, 0.0, -0.3, 1e-60], ids=lambda a: f"activation {a}"
)
@pytest.mark.parametrize("name", ["last layer", "groups", "small images of many channels"])
def test_every_activation(name, activation, channels_last):
    """Slopes of at most 0 need codes; one that is 0 in float32 stops the gradient."""
    x_shape, w_shape, options = CASES[name]
    if isinstance(activation, float):
        options = {**options, **LEAKY, "negative_slope": activation}
    else:
        options = {**options, "pool": None, "activation": activation}
    check(*make_inputs(x_shape, w_shape, channels_last=channels_last), **options)


@LAYOUTS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@EACH
def test_nan_and_inf_in_the_gradient_stay_local(name, bad, channels_last):
    x_shape, w_shape, options = CASES[name]
    x, w, b = make_inputs(x_shape, w_shape, channels_last=channels_last)
    results = []
    for function, extra in ((pyops.conv_relu_pool2d, {"backend": "cpu"}), (plain, {})):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        out = function(*leaves, **options, **LEAKY, **extra)
        grad = torch.ones_like(out)
        # Away from the padding, which torch multiplies with them where the kernel is dilated.
        grad[0, 1, 1, 1] = grad[-1, 2, 2, 2] = bad
        results.append(torch.autograd.grad(out, leaves, grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert theirs.isfinite().any() and not theirs.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("slope", [None, 0.0, 1e-60])
def test_nan_in_the_gradient_of_dead_elements_is_stopped(slope, bad):
    x_shape, w_shape, options = CASES["last layer"]
    activation = {"activation": "relu"} if slope is None else {**LEAKY, "negative_slope": slope}
    x, w, b = make_inputs(x_shape, w_shape)
    leaves = [t.detach().requires_grad_() for t in (x, w, b - 100)]
    options = {**options, **activation, "pool": None}
    out = pyops.conv_relu_pool2d(*leaves, backend="cpu", **options)
    for gradient in torch.autograd.grad(out, leaves, torch.full_like(out, bad)):
        assert not gradient.any()


@LAYOUTS
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("name", ["last layer", "small images of many channels"])
def test_nan_and_inf_in_the_forward_are_torchs(name, activation, channels_last):
    x_shape, w_shape, options = CASES[name]
    x, w, _ = make_inputs(x_shape, w_shape, channels_last=channels_last)
    b = torch.zeros(w_shape[0])
    b[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    options = {**options, **LEAKY, "activation": activation}
    got = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
    want = plain(x, w, b, **options)
    assert got.stride() == want.stride() and torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got[:, :3], want[:, :3], equal_nan=True)


class Calls(TorchDispatchMode):
    """The names of every call."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "ours"),
    [(3, 4, 2, True), (128, 4, 2, True), (64, 4, 2, False), (3, 3, 1, False)],
)
def test_automatic_choice_in_training(channels, kernel, stride, ours):
    """Ours where it was measured faster than plain torch."""
    shapes = (64, channels, 4, 4), (8, channels, kernel, kernel)
    leaves = [t.requires_grad_() for t in make_inputs(*shapes)]
    with Calls() as calls:
        pyops.conv_relu_pool2d(*leaves, stride=stride, padding=1, **LEAKY).sum().backward()
    assert ("conv_relu_pool2d_backward" in calls.names) == ours
