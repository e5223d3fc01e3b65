"""Values that rounding must not touch: ties, zeros, NaN, infinities; and the layouts of grad_output."""

from __future__ import annotations

import pytest
import torch
from conv_pool_cases import conv, make_inputs, plain
from test_conv_relu_pool2d import POOLS, strided_variants

import pyops
from pyops.testing import assert_within_budget, within_budget

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# (in_channels, out_channels, kernel, options): one for each way the CPU kernels go.
PATHS = {
    "one channel": (1, 32, 3, {"padding": 1}),
    "three channels": (3, 32, 3, {"padding": 1}),
    "sixteen channels": (16, 32, 3, {"padding": 1}),
    "many channels": (64, 64, 3, {"padding": 1}),
    "5x5": (8, 16, 5, {"padding": 2}),
    "5x5, many channels": (24, 64, 5, {"padding": 2}),
    "1x1": (8, 16, 1, {}),
    "stride 2": (8, 16, 3, {"stride": 2, "padding": 1}),
    "depthwise": (16, 16, 3, {"groups": 16, "padding": 1}),
}
EACH_PATH = pytest.mark.parametrize("path", PATHS)
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


def inputs_of(path, dtype=torch.float32, channels_last=False, batch=2, size=(16, 18)):
    c, k, kernel, options = PATHS[path]
    w_shape = (k, c // options.get("groups", 1), kernel, kernel)
    return *make_inputs((batch, c, *size), w_shape, dtype=dtype, channels_last=channels_last), dict(
        options
    )


def both_ways(x, w, b, grad=None, **options):
    """((output, *gradients) of the op, the same of plain torch)."""
    results = []
    for function in (pyops.conv_relu_pool2d, plain):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        extra = {"backend": "cpu"} if function is pyops.conv_relu_pool2d else {}
        out = function(*leaves, **options, **extra)
        if grad is None:
            grad = torch.ones_like(out)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    return results


def assert_all_equal(results):
    for name, ours, theirs in zip(("output", "dx", "dw", "db"), *results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: NaN elsewhere"
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), name


def ternary(t):
    """-1, 0 or 1 everywhere: every sum is exact in every dtype, and ties abound."""
    return t.float().mul(1.3).round().clamp(-1, 1).to(t.dtype)


@LAYOUTS
@DTYPES
@EACH_PATH
def test_ties_go_to_the_first_of_the_window(path, dtype, channels_last):
    x, w, b, options = inputs_of(path, dtype, channels_last, batch=1, size=(8, 10))
    x, w, b = ternary(x), ternary(w), ternary(b)
    pre = conv(x, w, b, **options)
    top = pre.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).topk(2).values
    assert (top[..., 0] == top[..., 1]).float().mean() > 0.02  # there are ties to break
    assert_all_equal(both_ways(x, w, b, **options))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", None])
def test_ties_in_every_pool(pool, activation):
    x, w, b, options = inputs_of("stride 2")
    x, w, b = ternary(x), ternary(w), ternary(b)
    grad = ternary(torch.randn(plain(x, w, b, **options, **POOLS[pool]).shape)) * 12
    options.update(POOLS[pool], activation=activation, negative_slope=0.25)
    results = both_ways(x, w, b, grad, **options)
    if options.get("pool", "max") == "avg":  # divides by odd numbers in places
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    else:
        assert_all_equal(results)


@LAYOUTS
@EACH_PATH
def test_constant_input_ties_whole_windows(path, channels_last):
    x, w, b, options = inputs_of(path, channels_last=channels_last)
    for value in (0.0, 1.0):
        for bias in (0.5, 0.0, -0.5):
            assert_all_equal(
                both_ways(
                    torch.full_like(x, value), ternary(w), torch.full_like(b, bias), **options
                )
            )


@DTYPES
@EACH_PATH
def test_negative_zero_is_dead(path, dtype):
    x, w, b, options = inputs_of(path, dtype)
    for zero in (0.0, -0.0):
        results = both_ways(torch.full_like(x, zero), w, torch.full_like(b, -0.0), **options)
        assert_all_equal(results)
        assert not results[0][1].any() and not results[0][3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@LAYOUTS
@DTYPES
@EACH_PATH
def test_nan_and_inf_stand_where_torch_has_them(path, dtype, channels_last, bad):
    x, w, b, options = inputs_of(path, dtype, channels_last)
    spots = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 2 / x[0].numel()
    spots[0, 0, 0, 0] = spots[1, 0, 7, 9] = True
    assert not spots[0].all() and spots.any()
    x = x.masked_fill(spots, bad)
    ours = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
    theirs = plain(x, w, b, **options)
    exact = plain(x.double(), w.double(), b.double(), **options)
    # Plain torch's 16-bit convolution multiplies infinities with the zeros it pads with; float64's does not.
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.isinf(), exact.isinf())
    if torch.equal(theirs.isfinite(), exact.isfinite()):
        assert within_budget(ours, theirs, exact)
    assert ours.isfinite().any() and (bad == float("-inf") or not ours.isfinite().all())


@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@EACH_PATH
def test_nan_and_inf_in_parameters(path, bad, where):
    x, w, b, options = inputs_of(path)
    (w if where == "weight" else b)[1] = bad
    ours = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
    theirs = plain(x, w, b, **options)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert ours[:, 2:].isfinite().all()


@EACH_PATH
def test_gradients_of_nan_go_where_torch_sends_them(path):
    """The last NaN of a window wins it, and a NaN passes the ReLU's gradient.

    Plain torch multiplies every NaN of the input into grad_weight, those that no gradient reaches
    as 0 * NaN; the sparse backward leaves these out, as it never reads them.
    """
    x, w, b, options = inputs_of(path)
    x[0, 0, 5, 6] = x[1, -1, 0, 0] = x[1, 0, 15, 17] = float("nan")
    (_, *ours), (_, *theirs) = both_ways(x, w, b, **options)
    for name, got, want in zip(("dx", "dw", "db"), ours, theirs, strict=True):
        if name == "dw":
            assert got.isnan().any() and not (got.isnan() & ~want.isnan()).any()
            got, want = got.masked_fill(want.isnan(), 0), want.masked_fill(want.isnan(), 0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4, msg=name)


@DTYPES
@EACH_PATH
def test_nan_in_the_gradient_of_dead_windows_is_stopped(path, dtype):
    x, w, b, options = inputs_of(path, dtype)
    b = b - 100  # every window is dead
    out = plain(x, w, b, **options)
    assert not out.any()
    for bad in (float("nan"), float("inf")):
        results = both_ways(x, w, b, torch.full_like(out, bad), **options)
        assert_all_equal(results)
        assert not results[0][1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@EACH_PATH
def test_nan_and_inf_in_the_gradient_of_live_windows_stay_local(path, bad):
    """A NaN or an infinity covers the winner's kernel in grad_input, and nothing else."""
    x, w, b, options = inputs_of(path)
    b = b + 10  # every window is alive
    grad = torch.ones_like(plain(x, w, b, **options))
    grad[0, 3, 2, 2] = bad
    (_, *ours), (_, *theirs) = both_ways(x, w, b, grad, **options)
    for got, want in zip(ours, theirs, strict=True):
        assert not want.isfinite().all()
        assert torch.equal(got.isfinite(), want.isfinite())


@EACH_PATH
def test_float16_overflows_as_torch_does(path):
    x, w, b, options = inputs_of(path, torch.float16)
    x, w = x * 1e4, w * 8
    ours = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
    theirs = plain(x, w, b, **options)
    exact = plain(x.double(), w.double(), b.double(), **options)
    near = (exact - 65520).abs() < 100  # where one rounding decides
    assert torch.equal(ours.isinf() | near, theirs.isinf() | near)
    assert theirs.isinf().any() and theirs.isfinite().any()


@LAYOUTS
@pytest.mark.parametrize("path", ["three channels", "many channels", "5x5", "depthwise"])
def test_layouts_of_grad_output(path, channels_last):
    x, w, b, options = inputs_of(path, channels_last=channels_last)
    grad = torch.randn(plain(x, w, b, **options).shape)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    out = pyops.conv_relu_pool2d(*leaves, backend="cpu", **options)
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for name, variant in strided_variants(grad).items():
        results = torch.autograd.grad(out, leaves, variant, retain_graph=True)
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want), name
    for expanded in (grad[:1, :1, :1, :1], grad[:, :, :1, :1], grad[:, :1]):
        results = torch.autograd.grad(out, leaves, expanded.expand_as(grad), retain_graph=True)
        dense = expanded.expand_as(grad).contiguous()
        expected = torch.autograd.grad(out, leaves, dense, retain_graph=True)
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("w_shape", "stride", "groups"),
    [((40, 16, 5, 5), 1, 1), ((33, 64, 3, 3), 2, 1), ((20, 9, 5, 5), 1, 1), ((40, 24, 3, 3), 1, 1),
     ((16, 4, 3, 3), 1, 1), ((24, 2, 3, 3), 1, 12)],
)  # fmt: skip
def test_weights_in_channels_last(w_shape, stride, groups, channels_last, dtype):
    """Each kernel reads them where they lie, or has them copied."""
    x, w, b = make_inputs(
        (2, w_shape[1] * groups, 15, 17), w_shape, dtype=dtype, channels_last=channels_last
    )
    options = {"stride": stride, "groups": groups, "padding": 1}
    ours = pyops.conv_relu_pool2d(
        x, w.contiguous(memory_format=torch.channels_last), b, backend="cpu", **options
    )
    exact = plain(x.double(), w.double(), b.double(), **options)
    assert_within_budget(ours, plain(x, w, b, **options), exact)


def test_values_beyond_the_largest_float_are_infinite_not_nan():
    w = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    out = pyops.conv_relu_pool2d(torch.full((1, 16, 12, 12), 3e38), w, padding=1, backend="cpu")
    assert out.max() == float("inf") and not out.isnan().any()
