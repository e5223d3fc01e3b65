"""Values: outputs and gradients of conv_relu_pool2d against plain torch by the error budget."""

from __future__ import annotations

import pytest
import torch
from conv_pool_cases import check, make_inputs, plain

import pyops

# Plain torch's own remark about "same" with even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# (in_channels, out_channels, kernel, options)
CONVOLUTIONS = {
    "1x1": (8, 16, (1, 1), {}),
    "2x2": (5, 7, (2, 2), {}),
    "3x3": (3, 8, (3, 3), {"padding": 1}),
    "3x3 no padding": (16, 32, (3, 3), {}),
    "3x3 odd channels": (19, 33, (3, 3), {"padding": 1}),
    "5x5": (4, 6, (5, 5), {"padding": 2}),
    "7x7 stride 2": (3, 16, (7, 7), {"stride": 2, "padding": 3}),
    "kernel 3x1": (6, 8, (3, 1), {"padding": (1, 0)}),
    "kernel 2x5": (4, 8, (2, 5), {"padding": (1, 2)}),
    "stride pair": (4, 8, (3, 3), {"stride": (1, 2), "padding": (1, 0)}),
    "stride over kernel": (4, 8, (2, 2), {"stride": 3}),
    "dilation": (4, 8, (3, 3), {"dilation": 2, "padding": 2}),
    "dilation pair": (4, 8, (3, 2), {"dilation": (2, 3), "padding": (0, 1)}),
    "padding over kernel": (3, 8, (3, 3), {"padding": (4, 3)}),
    "groups": (12, 18, (3, 3), {"groups": 3, "padding": 1}),
    "depthwise": (20, 20, (3, 3), {"groups": 20, "padding": 1}),
    "depthwise stride 2": (16, 16, (3, 3), {"groups": 16, "padding": 1, "stride": 2}),
    "depthwise times 2": (9, 18, (3, 3), {"groups": 9}),
    "same": (4, 8, (3, 3), {"padding": "same"}),
    "same even kernel": (4, 8, (4, 2), {"padding": "same"}),
    "same dilation": (4, 8, (3, 2), {"padding": "same", "dilation": (2, 3)}),
    "valid": (4, 8, (3, 3), {"padding": "valid"}),
}
POOLS = {
    "max 2": {},
    "max 3": {"pool_size": 3},
    "max 3 stride 2": {"pool_size": 3, "pool_stride": 2},
    "max 3 stride 2 padded": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "max 3 stride 1": {"pool_size": 3, "pool_stride": 1, "pool_padding": 1},
    "max 2 ceil": {"ceil_mode": True},
    "max 3 stride 2 ceil padded": {
        "pool_size": 3,
        "pool_stride": 2,
        "pool_padding": 1,
        "ceil_mode": True,
    },
    "max 1x3": {"pool_size": (1, 3), "pool_stride": (2, 1), "pool_padding": (0, 1)},
    "max stride over size": {"pool_size": 2, "pool_stride": 3},
    "max 1": {"pool_size": 1},
    "avg 2": {"pool": "avg"},
    "avg 2 ceil": {"pool": "avg", "ceil_mode": True},
    "avg 2x4 padded": {"pool": "avg", "pool_size": (2, 4), "pool_padding": (1, 2)},
    "avg 2 stride 1": {"pool": "avg", "pool_stride": 1, "pool_padding": 1},
    "avg 2x3 stride 2 ceil": {
        "pool": "avg",
        "pool_size": (2, 3),
        "pool_stride": 2,
        "pool_padding": (1, 1),
        "ceil_mode": True,
    },
    "none": {"pool": None},
}
ACTIVATIONS = {
    "relu": {},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.2},
    "leaky_relu slope 0": {"activation": "leaky_relu", "negative_slope": 0.0},
    "leaky_relu slope below 0": {"activation": "leaky_relu", "negative_slope": -0.5},
    "identity": {"activation": None},
}


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, dtype, channels_last):
    c, k, kernel, options = CONVOLUTIONS[name]
    x, w, b = make_inputs(
        (3, c, 15, 18),
        (k, c // options.get("groups", 1), *kernel),
        dtype=dtype,
        channels_last=channels_last,
    )
    check(x, w, b, **options)


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_pools_and_activations(pool, activation, channels_last):
    x, w, b = make_inputs((2, 5, 15, 14), (9, 5, 3, 3), channels_last=channels_last)
    check(x, w, b, padding=1, **POOLS[pool], **ACTIVATIONS[activation])


@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
@pytest.mark.parametrize("pool", POOLS)
def test_pools_in_other_dtypes(pool, dtype):
    x, w, b = make_inputs((3, 8, 15, 15), (16, 8, 3, 3), dtype=dtype)
    check(x, w, b, padding=1, **POOLS[pool])


# Height and width around tile boundaries; channels around vector widths.
@LAYOUTS
@pytest.mark.parametrize(
    "size", [(2, 2), (3, 4), (4, 5), (7, 9), (13, 13), (16, 33), (29, 6)], ids=str
)
@pytest.mark.parametrize(
    "channels", [(1, 1), (1, 32), (3, 20), (17, 16), (32, 64), (48, 40)], ids=str
)
@pytest.mark.parametrize("kernel", [3, 5])
def test_sizes_of_the_fast_paths(kernel, size, channels, channels_last):
    c, k = channels
    x, w, b = make_inputs((4, c, *size), (k, c, kernel, kernel), channels_last=channels_last)
    check(x, w, b, padding=kernel // 2)
    check(x, w, b, padding=kernel // 2, gradients=False)


# The shapes the CPU kernels are tuned on, with batches cut to what a test can afford.
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "batch, channels, size, out_channels, padding",
    [
        (4, 3, 32, 32, 1),
        (4, 32, 16, 64, 1),
        (4, 1, 28, 32, 0),
        (4, 32, 13, 64, 0),
        (1, 64, 48, 64, 1),
        (1, 128, 32, 128, 1),
        (1, 256, 20, 256, 1),
        (1, 512, 14, 128, 1),
        (2, 64, 28, 64, 1),
    ],
)
def test_benchmark_shapes(batch, channels, size, out_channels, padding, dtype):
    x, w, b = make_inputs(
        (batch, channels, size, size), (out_channels, channels, 3, 3), dtype=dtype
    )
    check(x, w, b, padding=padding)


def test_large_image():
    x, w, b = make_inputs((1, 64, 224, 224), (64, 64, 3, 3))
    check(x, w, b, padding=1, gradients=False)


@BACKENDS
@LAYOUTS
def test_without_bias(backend, channels_last):
    x, w, _ = make_inputs((2, 16, 12, 12), (32, 16, 3, 3), channels_last=channels_last)
    check(x, w, padding=1, backend=backend)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("pool", ["max 2", "avg 2", "none", "max 3 stride 2 ceil padded"])
def test_reference_backend(pool, dtype):
    x, w, b = make_inputs((2, 6, 11, 12), (8, 3, 3, 3), dtype=dtype)
    check(x, w, b, padding=1, groups=2, backend="reference", **POOLS[pool])


@BACKENDS
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_unbatched(backend, padding):
    x, w, b = make_inputs((3, 12, 14), (8, 3, 4, 3))
    check(x, w, b, padding=padding, backend=backend)


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("pool", ["max", "avg", None])
def test_empty_batch(backend, channels_last, pool):
    x, w, b = make_inputs((0, 3, 12, 14), (8, 3, 3, 3), channels_last=channels_last)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    out = pyops.conv_relu_pool2d(*leaves, padding=1, pool=pool, backend=backend)
    assert out.shape == plain(*leaves, padding=1, pool=pool).shape
    dx, dw, db = torch.autograd.grad(out.sum(), leaves)
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w)) and torch.equal(db, torch.zeros_like(b))


@pytest.mark.parametrize(
    "x_shape, w_shape, options",
    [
        ((1, 1, 8, 8), (1, 1, 3, 3), {}),
        ((1, 1, 1, 1), (1, 1, 1, 1), {"pool_size": 1}),
        ((5, 1, 1, 1), (40, 1, 3, 3), {"padding": 1, "pool": None}),
        ((3, 16, 1, 20), (8, 16, 1, 3), {"pool_size": (1, 2)}),
        ((3, 16, 20, 1), (8, 16, 3, 1), {"pool_size": (2, 1)}),
        ((40, 4, 2, 2), (1, 4, 1, 1), {}),
        ((20, 8, 1, 1), (16, 8, 3, 3), {"padding": 2, "pool": None}),
        ((3, 1, 20, 20), (1, 1, 3, 3), {"padding": 1}),
    ],
)
@LAYOUTS
def test_dimensions_of_size_one(x_shape, w_shape, options, channels_last):
    # Seven digits of a handful of outputs say little: several draws, of which no one may be off.
    for seed in range(3):
        x, w, b = make_inputs(x_shape, w_shape, channels_last=channels_last, seed=seed)
        out = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
        exact = plain(x.double(), w.double(), b.double(), **options)
        torch.testing.assert_close(out.double(), exact, rtol=3e-6, atol=3e-6)
        if max(x_shape) >= 20:
            check(x, w, b, **options)


def strided_variants(t):
    """The same values in other places: name -> tensor."""
    n, c, h, w = t.shape
    shifted = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    sliced = torch.full((n, c, h + 2, w + 3), float("nan"), dtype=t.dtype)[:, :, 1:-1, 2:-1]
    stepped = torch.full((n, 2 * c, h, 2 * w), float("nan"), dtype=t.dtype)[:, ::2, :, ::2]
    return {
        "offset 1": shifted,
        "slice": sliced.copy_(t),
        "steps": stepped.copy_(t),
        "transposed": t.transpose(2, 3).contiguous().transpose(2, 3),
        "batch innermost": t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "channels_last slice": sliced.copy_(t).contiguous(memory_format=torch.channels_last)[
            :, :, :, :
        ],
        "channels_last part of channels": torch.cat(
            [t, t.new_full(t.shape, float("nan"))], 1
        ).contiguous(memory_format=torch.channels_last)[:, :c],
    }


VARIANTS = list(strided_variants(torch.zeros(2, 2, 2, 2)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("channels", [(3, 8), (32, 32)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs_and_weights(variant, channels, dtype):
    c, k = channels
    x, w, b = make_inputs((2, c, 12, 14), (k, c, 3, 3), dtype=dtype)
    check(strided_variants(x)[variant], w, b, padding=1)
    check(x, strided_variants(w)[variant], b, padding=1)
    check(x, w, strided_variants(b.view(1, -1, 1, 1))[variant].flatten(), padding=1)


def test_strides_do_not_change_the_bits():
    x, w, b = make_inputs((2, 16, 12, 14), (32, 16, 3, 3))
    expected = pyops.conv_relu_pool2d(x, w, b, padding=1, backend="cpu")
    for name, variant in strided_variants(x).items():
        if variant.stride(1) != 1:
            assert torch.equal(
                pyops.conv_relu_pool2d(variant, w, b, padding=1, backend="cpu"), expected
            ), name
    for name, variant in strided_variants(w).items():
        out = pyops.conv_relu_pool2d(x, variant, b, padding=1, backend="cpu")
        assert torch.equal(out, expected), name


def test_expanded_inputs():
    x, w, b = make_inputs((1, 8, 12, 12), (16, 8, 3, 3))
    check(x.expand(4, -1, -1, -1), w, b, padding=1)
    check(x[:, :1].expand(-1, 8, -1, -1), w, b, padding=1)
    check(x[:, :, :1].expand(-1, -1, 12, -1), w[:1].expand(16, -1, -1, -1), b, padding=1)
    check(x, w, b[:1].expand(16), padding=1)
