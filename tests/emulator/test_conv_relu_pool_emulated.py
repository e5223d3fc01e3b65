"""The generic CUDA convolution kernels, executed by the emulator, against plain torch."""

from __future__ import annotations

import pytest
import torch
from conv_relu_pool_emulated import (
    DTYPES,
    PRECISIONS,
    SOURCES,
    forward,
    gradients,
    plain,
    plain_gradients,
    spec_of,
    to_tf32,
)

from build import Emulated, missing
from pyops.reference.conv_relu_pool import make_codes, stores_codes
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def library():
    return Emulated(SOURCES)


@pytest.fixture(scope="module")
def racing():
    """With race detection: every unordered access to shared memory is an error."""
    return Emulated(SOURCES, "race")


# Input, weight, options.
SHAPES = {
    "3x3, 2x2 windows": ((2, 16, 9, 10), (24, 16, 3, 3), {"padding": 1}),
    "more channels than a block": ((1, 40, 6, 6), (136, 40, 3, 3), {"padding": 1}),
    "first layer of 3": ((1, 3, 13, 12), (20, 3, 5, 5), {"padding": 2}),
    "first layer of 1": ((2, 1, 10, 11), (9, 1, 3, 3), {}),
    "odd channels": ((1, 13, 8, 9), (11, 13, 3, 3), {"padding": (1, 0)}),
    "AlexNet": ((1, 3, 27, 26), (8, 3, 7, 7), {"stride": 3, "padding": 2, "pool_size": 3, "pool_stride": 2}),
    "overlapping": ((2, 8, 12, 13), (16, 8, 3, 3), {"padding": 1, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}),
    "2x2 with step 1, padded": ((1, 8, 7, 8), (8, 8, 1, 1), {"pool_stride": 1, "pool_padding": 1}),
    "ceil_mode": ((1, 8, 9, 11), (8, 8, 3, 3), {"padding": 1, "ceil_mode": True}),
    "ceil_mode, 3x3 windows": ((3, 8, 8, 9), (8, 8, 3, 3), {"pool_size": 3, "pool_stride": 2, "ceil_mode": True}),
    "groups, strides, dilation": ((1, 16, 14, 15), (24, 8, 3, 2),
        {"groups": 2, "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}),
    "depthwise": ((1, 6, 8, 8), (12, 1, 3, 3), {"groups": 6, "padding": 1}),
    "no pool": ((2, 16, 9, 9), (24, 16, 3, 3), {"padding": 1, "pool": "none"}),
    "average": ((1, 8, 10, 9), (16, 8, 3, 3), {"padding": 1, "pool": "avg"}),
    "average, padded, ceil_mode": ((1, 8, 9, 10), (8, 8, 1, 1),
        {"pool": "avg", "pool_size": (2, 3), "pool_stride": 2, "pool_padding": 1, "ceil_mode": True}),
    "gaps between windows": ((1, 8, 13, 14), (8, 8, 1, 1), {"pool_size": 2, "pool_stride": 3}),
    "a window of 128": ((1, 8, 17, 33), (8, 8, 1, 1), {"pool_size": (8, 16)}),
}  # fmt: skip


def integers(x_shape, w_shape, dtype, channels_last, seed=0):
    """Small integers: every sum is exact, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, x_shape, generator=generator).to(dtype)
    w = torch.randint(-1, 2, w_shape, generator=generator).to(dtype)
    b = torch.randint(-3, 4, w_shape[:1], generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x, w, b


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", SHAPES)
def test_exact_on_integers_with_codes(library, name, channels_last):
    x_shape, w_shape, options = SHAPES[name]
    order = list(SHAPES).index(name)
    # Every shape meets each of them in one layout or the other, over the list.
    dtype = DTYPES[(order + channels_last) % 3]
    activation = ("relu", "leaky_relu", "none")[order % 3]
    spec = spec_of(activation=activation, slope=0.25, **options)
    x, w, b = integers(x_shape, w_shape, dtype, channels_last)
    out, codes = forward(library, x, w, b, spec, codes=True, tf32=order % 2 == 0)
    before, want = plain(x.double(), w.double(), b.double(), spec)
    if spec.pool == "avg":
        assert_within_budget(out, plain(x, w, b, spec)[1], want)
    else:
        assert torch.equal(out.double(), want.to(dtype).double())
    if spec.pool != "avg" or spec.pool_size[0] * spec.pool_size[1] <= 8:
        assert (codes is not None) == stores_codes(spec)
        if codes is not None:
            assert torch.equal(codes, make_codes(before, spec))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["3x3, 2x2 windows", "overlapping", "odd channels", "average"])
def test_error_budget(library, name, precision):
    x_shape, w_shape, options = SHAPES[name]
    dtype = PRECISIONS[precision]
    spec = spec_of(**options)
    x = torch.randn(x_shape).to(dtype).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(w_shape) / (w_shape[1] * w_shape[2] * w_shape[3]) ** 0.5).to(dtype)
    b = torch.randn(w_shape[0]).to(dtype)
    out, _ = forward(library, x, w, b, spec, tf32=precision == "tf32")
    if precision == "tf32":  # what rounding the operands costs, and no more
        rounded = plain(to_tf32(x), to_tf32(w), b, spec)[1]
        exact = plain(to_tf32(x).double(), to_tf32(w).double(), b.double(), spec)[1]
        assert_within_budget(out, rounded, exact)
        return
    exact = plain(x.double(), w.double(), b.double(), spec)[1]
    assert_within_budget(out, plain(x.contiguous(), w, b, spec)[1], exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"pool_size": 3, "pool_stride": 2}, {"pool": "none"}])
def test_nan_and_infinity_go_where_torch_puts_them(library, dtype, options):
    x, w, b = integers((1, 8, 12, 12), (8, 8, 3, 3), dtype, True)
    x[0, 3, 2, 2] = float("nan")
    x[0, 1, 7, 8] = float("inf")
    x[0, 2, 10, 3] = float("-inf")
    w[2] = 0.0  # inf * 0
    spec = spec_of(**options)
    out, codes = forward(library, x, w, b, spec, codes=True)
    before, want = plain(x.float(), w.float(), b.float(), spec)
    assert torch.equal(out.isnan(), want.isnan()) and want.isnan().any()
    finite = ~want.isnan()
    assert torch.equal(out.float()[finite], want[finite])
    if codes is not None:
        assert torch.equal(codes, make_codes(before, spec))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slope_below_zero(library, dtype):
    spec = spec_of(activation="leaky_relu", slope=-0.5, padding=1)
    x, w, b = integers((1, 8, 8, 8), (8, 8, 3, 3), dtype, True)
    out, codes = forward(library, x, w, b, spec, codes=True)
    before, want = plain(x.double(), w.double(), b.double(), spec)
    assert torch.equal(out.double(), want)
    assert torch.equal(codes, make_codes(before, spec))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_and_odd_strides(library, dtype):
    """A storage offset of one element, rows with gaps, an expanded batch: slower, but right."""
    spec = spec_of(padding=1)
    x, w, b = integers((2, 16, 9, 10), (16, 16, 3, 3), dtype, True)
    want = plain(x.double(), w.double(), b.double(), spec)[1]
    out, _ = forward(library, x, w, b, spec, offset=1)
    assert torch.equal(out.double(), want)
    wide = torch.full((2, 16, 9, 14), float("nan"), dtype=dtype)
    wide[..., 3:13] = x
    out, _ = forward(library, wide[..., 3:13], w, b, spec)
    assert torch.equal(out.double(), want)
    out, _ = forward(library, x[:1].expand(3, -1, -1, -1), w, None, spec)
    once = plain(x[:1].double(), w.double(), None, spec)[1]
    assert torch.equal(out.double(), once.expand(3, -1, -1, -1))


def test_every_order_of_events_gives_the_same_bits(racing):
    for dtype, shape in ((torch.bfloat16, "3x3, 2x2 windows"), (torch.float32, "overlapping")):
        x_shape, w_shape, options = SHAPES[shape]
        x = torch.randn(x_shape).to(dtype).contiguous(memory_format=torch.channels_last)
        w, b = torch.randn(w_shape).to(dtype), torch.randn(w_shape[0]).to(dtype)
        for tf32 in {False, dtype == torch.float32}:
            runs = [
                forward(racing, x, w, b, spec_of(**options), codes=True, tf32=tf32, seed=seed, mode=mode)
                for seed, mode in ((0, "early"), (1, "late"), (2, "random"), (3, "random"))
            ]  # fmt: skip
            for out, codes in runs[1:]:
                assert torch.equal(out, runs[0][0]) and torch.equal(codes, runs[0][1])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "a window of 128"])
def test_gradients_are_exact_on_integers(library, name, channels_last):
    x_shape, w_shape, options = SHAPES[name]
    order = list(SHAPES).index(name)
    dtype = DTYPES[(order + channels_last) % 3]
    activation = ("relu", "leaky_relu", "none")[order % 3]
    spec = spec_of(activation=activation, slope=0.25, **options)
    x, w, b = integers(x_shape, w_shape, dtype, channels_last)
    before, out = plain(x.double(), w.double(), b.double(), spec)
    grad = torch.randint(-2, 3, out.shape).to(dtype)
    selector = make_codes(before, spec) if stores_codes(spec) else out.to(dtype)
    if activation == "none" and spec.pool == "none":
        selector = None
    # Averages are no integers, and lose digits in TF32.
    tf32 = order % 2 == 0 and spec.pool != "avg"
    results = gradients(library, x, w, grad, selector, spec, tf32=tf32)
    selector = before if selector is None else selector
    wants = plain_gradients(x.double(), w.double(), grad.double(), selector, spec)
    lows = plain_gradients(x.contiguous(), w, grad, selector, spec)
    for result, want, low in zip(results, wants, lows, strict=True):
        if spec.pool == "avg":
            assert_within_budget(result, low, want, k=GRADIENT_BUDGET)
        else:
            assert torch.equal(result.double(), want.to(dtype).double())


# The last has enough pixels for the weight's gradient to be summed in several parts.
GRADIENT_SHAPES = {
    "2x2 windows": ((2, 16, 9, 10), (24, 16, 3, 3), {"padding": 1}),
    "overlapping, stride": ((1, 8, 15, 14), (8, 8, 3, 3),
        {"stride": 2, "padding": 1, "pool_size": 3, "pool_stride": 2}),
    "average": ((2, 8, 8, 9), (16, 8, 3, 3), {"pool": "avg", "activation": "leaky_relu", "slope": 0.1}),
    "parts": ((4, 8, 20, 20), (9, 8, 3, 3), {"padding": 1, "pool": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GRADIENT_SHAPES)
def test_error_budget_of_gradients(library, name, precision):
    x_shape, w_shape, options = GRADIENT_SHAPES[name]
    dtype = PRECISIONS[precision]
    spec = spec_of(**options)
    x = torch.randn(x_shape).to(dtype).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(w_shape) / (w_shape[1] * w_shape[2] * w_shape[3]) ** 0.5).to(dtype)
    before, out = plain(x.double(), w.double(), None, spec)
    # One selector for all three, so that near ties are no matter of rounding.
    selector = make_codes(before, spec) if stores_codes(spec) else out.to(dtype)
    grad = torch.randn(out.shape).to(dtype)
    results = gradients(library, x, w, grad, selector, spec, tf32=precision == "tf32")

    rounded = to_tf32 if precision == "tf32" else lambda t: t
    lowp = plain_gradients(x.contiguous(), w, grad, selector, spec, rounded)
    exact = plain_gradients(x.double(), w.double(), grad.double(), selector, spec, rounded)
    for result, low, want in zip(results, lowp, exact, strict=True):
        assert_within_budget(result, low, want, k=GRADIENT_BUDGET)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_unaligned_tensors(library, dtype):
    spec = spec_of(padding=1)
    x, w, b = integers((2, 16, 9, 10), (16, 16, 3, 3), dtype, True)
    before, out = plain(x.double(), w.double(), b.double(), spec)
    grad, codes = torch.randint(-2, 3, out.shape).to(dtype), make_codes(before, spec)
    straight = gradients(library, x, w, grad, codes, spec)
    for shifted, want in zip(
        gradients(library, x, w, grad, codes, spec, offset=1), straight, strict=True
    ):
        assert torch.equal(shifted, want)


def test_gradients_are_the_same_bits_in_every_order_of_events(racing):
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        x_shape, w_shape, options = GRADIENT_SHAPES["overlapping, stride"]
        spec = spec_of(**options)
        x, w, b = integers(x_shape, w_shape, dtype, True)
        before, out = plain(x.double(), w.double(), b.double(), spec)
        grad, codes = torch.randn(out.shape).to(dtype), make_codes(before, spec)
        runs = [
            gradients(racing, x, w, grad, codes, spec, tf32=tf32, seed=seed, mode=mode)
            for seed, mode in ((0, "early"), (1, "late"), (2, "random"))
        ]
        for results in runs[1:]:
            for result, first in zip(results, runs[0], strict=True):
                assert torch.equal(result, first)
