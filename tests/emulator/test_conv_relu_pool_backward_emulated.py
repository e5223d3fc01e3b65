"""The CUDA backward that forms the gradient before the pool in shared memory, in the emulator."""

from __future__ import annotations

import pytest
import torch
from conv_relu_pool_emulated import (
    PRECISIONS,
    SOURCES,
    gradients,
    needs_expanded,
    plain,
    plain_gradients,
    sizes_of,
    spec_of,
    to_tf32,
)

from build import Emulated, missing
from pyops.reference.conv_relu_pool import make_codes
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def library():
    return Emulated(SOURCES)


@pytest.fixture(scope="module")
def racing():
    return Emulated(SOURCES, "race")


# Input, weight, options.
SHAPES = {
    "a line and a column that no window covers": ((2, 16, 9, 11), (24, 16, 3, 3), {"padding": 1}),
    "ceil_mode": ((1, 8, 9, 11), (8, 8, 3, 3), {"padding": 1, "ceil_mode": True}),
    "several passes, blocks and boxes": ((1, 72, 17, 18), (72, 72, 3, 3), {"padding": 1}),
    "blocks of 128 channels": ((4, 72, 9, 9), (40, 72, 3, 3), {"padding": 1}),
    "several images in a box": ((5, 8, 4, 5), (16, 8, 3, 3), {"padding": 1}),
    "parts of the sum over windows": ((4, 8, 20, 20), (9, 8, 3, 3), {"padding": 1}),
    "odd channels": ((1, 13, 8, 9), (11, 13, 3, 3), {"padding": (1, 0)}),
    "depthwise": ((1, 6, 8, 8), (12, 1, 3, 3), {"groups": 6, "padding": 1}),
    "groups, strides, dilation": ((1, 16, 14, 15), (24, 8, 3, 2),
        {"groups": 2, "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}),
    "stride 2": ((2, 8, 13, 12), (8, 8, 3, 3), {"stride": 2, "padding": 1}),
    "a kernel smaller than its stride": ((1, 8, 13, 14), (8, 8, 1, 2), {"stride": (2, 3)}),
    "more padding than kernel": ((1, 8, 7, 8), (8, 8, 3, 3), {"padding": 4}),
    "1x1": ((1, 40, 16, 16), (72, 40, 1, 1), {}),
    "boxes of odd height": ((1, 8, 15, 25), (8, 8, 3, 3), {"padding": 1}),
    "5x5": ((1, 8, 12, 13), (8, 8, 5, 5), {"padding": 2}),
    "padded windows": ((1, 8, 8, 9), (8, 8, 3, 3), {"padding": 1, "pool_padding": 1}),
    "padded windows, ceil_mode": ((1, 8, 8, 9), (8, 8, 3, 3),
        {"padding": 1, "pool_padding": 1, "ceil_mode": True}),
    "windows of 1x2": ((1, 8, 8, 10), (8, 8, 3, 3), {"padding": 1, "pool_size": (1, 2)}),
    "windows of 2x1": ((1, 8, 8, 10), (8, 8, 3, 3), {"padding": 1, "pool_size": (2, 1)}),
    "windows of 1x1": ((1, 8, 8, 9), (8, 8, 3, 3), {"pool_size": 1, "pool_stride": (1, 2)}),
    "gaps between windows": ((1, 8, 13, 14), (8, 8, 3, 3), {"pool_size": 2, "pool_stride": 3}),
}  # fmt: skip


# Those that Hopper's convolution takes.
HOPPER = {
    "a line and a column that no window covers": ((2, 16, 9, 11), (24, 16, 3, 3), {"padding": 1}),
    "several blocks of channels": ((1, 80, 8, 10), (136, 80, 3, 3), {"padding": 1}),
    "several tiles, no padding": ((2, 16, 37, 13), (32, 16, 3, 3), {}),
    "ceil_mode, twice the padding": ((1, 16, 6, 8), (16, 16, 3, 3), {"padding": 2, "ceil_mode": True}),
    "padded windows, ceil_mode": ((1, 16, 8, 9), (16, 16, 3, 3),
        {"padding": 1, "pool_padding": 1, "ceil_mode": True}),
}  # fmt: skip


def case(name, dtype, *, whole=True, **options):
    """(x, w, gradient of the output, codes, spec); whole: small integers, all sums exact."""
    x_shape, w_shape, shape_options = (SHAPES | HOPPER)[name]
    spec = spec_of(**shape_options, **options)
    generator = torch.Generator().manual_seed(0)
    if whole:
        x = torch.randint(-2, 3, x_shape, generator=generator)
        w = torch.randint(-1, 2, w_shape, generator=generator)
    else:
        x = torch.randn(x_shape, generator=generator)
        w = torch.randn(w_shape, generator=generator) / torch.Size(w_shape[1:]).numel() ** 0.5
    x, w = x.to(dtype).contiguous(memory_format=torch.channels_last), w.to(dtype)
    before, out = plain(x.double(), w.double(), None, spec)
    grad = torch.randint(-2, 3, out.shape, generator=generator).to(dtype)
    if not whole:
        grad = torch.randn(out.shape, generator=generator).to(dtype)
    return x, w, grad, make_codes(before, spec), spec


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("name", SHAPES)
def test_exact_on_integers(library, name, pool):
    """Quarters, where a slope or an average divides: exact in every type but for sums in TF32."""
    order = list(SHAPES).index(name) + (pool == "avg")
    precision = list(PRECISIONS)[order % 4]
    activation = ("relu", "leaky_relu", "none")[order % 3]
    x, w, grad, codes, spec = case(
        name, PRECISIONS[precision], pool=pool, activation=activation, slope=0.25
    )
    wants = plain_gradients(x.double(), w.double(), grad.double(), codes, spec)
    results = gradients(library, x, w, grad, codes, spec, tf32=precision == "tf32")
    for result, want in zip(results, wants, strict=True):
        assert torch.equal(result.double(), want.to(result.dtype).double())


@pytest.mark.parametrize("addressing", ["copies", "shifted", "planes"])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("name", HOPPER)
def test_exact_on_integers_on_hopper(library, monkeypatch, name, pool, addressing):
    monkeypatch.setenv("PYOPS_WGMMA_ADDRESSING", addressing)
    order = list(HOPPER).index(name) + (pool == "avg")
    activation = ("leaky_relu", "relu", "none")[order % 3]
    dtype = (torch.bfloat16, torch.float16)[(order + (addressing == "shifted")) % 2]
    x, w, grad, codes, spec = case(name, dtype, pool=pool, activation=activation, slope=0.25)
    # In planes TMA has to bring the halos, of an expanded gradient.
    sizes = sizes_of(x, w, spec, grad, False, 90)
    assert needs_expanded(library, sizes, True) == (addressing == "planes")
    wants = plain_gradients(x.double(), w.double(), grad.double(), codes, spec)
    results = gradients(library, x, w, grad, codes, spec, capability=90)
    for result, want in zip(results, wants, strict=True):
        assert torch.equal(result.double(), want.to(result.dtype).double())


def test_memory_before_the_pool_is_needed_by_exact_float32_alone(library):
    for precision, dtype in PRECISIONS.items():
        for pool in ("max", "avg"):
            x, w, grad, codes, spec = case("5x5", dtype, pool=pool)
            sizes = sizes_of(x, w, spec, grad, precision == "tf32")
            assert needs_expanded(library, sizes, True) == (precision == "exact")
            assert not needs_expanded(library, sizes, False)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_error_budget(library, precision, pool):
    x, w, grad, codes, spec = case(
        "a line and a column that no window covers",
        PRECISIONS[precision],
        whole=False,
        pool=pool,
        activation="leaky_relu",
        slope=0.3,
    )
    tf32 = precision == "tf32"
    results = gradients(library, x, w, grad, codes, spec, tf32=tf32)
    rounded = to_tf32 if tf32 else lambda t: t
    lows = plain_gradients(x.contiguous(), w, grad, codes, spec, rounded)
    exact = plain_gradients(x.double(), w.double(), grad.double(), codes, spec, rounded)
    for result, low, want in zip(results, lows, exact, strict=True):
        assert_within_budget(result, low, want, k=GRADIENT_BUDGET)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
def test_nan_and_infinity_reach_what_their_windows_winners_reach(library, precision, activation):
    """As they do through a gradient that was expanded in memory, which losers have as zeros."""
    x, w, grad, codes, spec = case(
        "ceil_mode", PRECISIONS[precision], activation=activation, slope=0.25
    )
    grad[0, 3, 1, 2], grad[0, 5, 4, 5] = float("nan"), float("inf")
    codes[0, 3, 1, 2] |= 128
    tf32 = precision == "tf32"
    results = gradients(library, x, w.abs() + 1, grad, codes, spec, tf32=tf32)
    wants = gradients(library, x, w.abs() + 1, grad, codes, spec, tf32=tf32, expand=True)
    for result, want in zip(results, wants, strict=True):
        assert torch.equal(result.nan_to_num(7e4), want.nan_to_num(7e4))
    assert results[0].isnan().sum() == 9 * 8  # the taps of one winner, in every channel
    assert results[1].isnan().all((1, 2, 3)).nonzero().tolist() == [[3]]
    assert results[2].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gradient_alone_is_the_same(library, precision):
    x, w, grad, codes, spec = case("ceil_mode", PRECISIONS[precision], whole=False)
    how = {"tf32": precision == "tf32"}
    together = gradients(library, x, w, grad, codes, spec, **how)
    for i in range(3):
        wanted = tuple(i == j for j in range(3))
        alone = gradients(library, x, w, grad, codes, spec, wanted=wanted, **how)
        assert torch.equal(alone[i], together[i])
        assert [result is None for result in alone] == [not want for want in wanted]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits_in_every_order_of_events(racing, precision):
    """Two passes over the channels of the halo, and several stages of windows."""
    for name in ("1x1", "groups, strides, dilation"):
        x, w, grad, codes, spec = case(name, PRECISIONS[precision], whole=False)
        runs = [
            gradients(
                racing, x, w, grad, codes, spec, tf32=precision == "tf32", seed=seed, mode=mode
            )
            for seed, mode in ((0, "early"), (1, "late"), (2, "random"))
        ]
        for results in runs[1:]:
            for result, first in zip(results, runs[0], strict=True):
                assert torch.equal(result, first)


@pytest.mark.parametrize("addressing", ["copies", "shifted"])
def test_the_same_bits_in_every_order_of_events_on_hopper(racing, monkeypatch, addressing):
    monkeypatch.setenv("PYOPS_WGMMA_ADDRESSING", addressing)
    for name in ("several tiles, no padding", "several blocks of channels"):
        x, w, grad, codes, spec = case(name, torch.bfloat16, whole=False)
        only = {"wanted": (True, False, False), "capability": 90}
        orders = ((0, "early"), (1, "late"), (2, "random"))
        runs = [
            gradients(racing, x, w, grad, codes, spec, seed=seed, mode=mode, **only)[0]
            for seed, mode in orders
        ]
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
