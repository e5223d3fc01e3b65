"""Values: outputs and gradients of conv_transpose2d_act against plain torch by the error budget."""

from __future__ import annotations

import pytest
import torch
from conv_transpose_cases import check, fast, make_inputs, plain

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# (in_channels, out_channels, kernel, options)
GEOMETRIES = {
    "1x1": (8, 16, (1, 1), {}),
    "3x3": (5, 20, (3, 3), {"padding": 1}),
    "k4 s2 p1": (19, 33, (4, 4), {"stride": 2, "padding": 1}),
    "k4 s2 p1 to 3": (16, 3, (4, 4), {"stride": 2, "padding": 1}),
    "k4 s2 p1 to 1": (20, 1, (4, 4), {"stride": 2, "padding": 1}),
    "k3 s2 p1 op1": (6, 18, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "k3 s2 to 5": (6, 5, (3, 3), {"stride": 2}),
    "k2 s2": (16, 32, (2, 2), {"stride": 2}),
    "k5 s3": (7, 12, (5, 5), {"stride": 3, "padding": 2, "output_padding": 2}),
    "stride over kernel": (4, 20, (2, 2), {"stride": 3}),
    "stride over kernel, to 2": (4, 2, (2, 2), {"stride": (3, 4), "output_padding": (1, 2)}),
    "kernel 3x1": (6, 17, (3, 1), {"padding": (1, 0), "stride": (2, 1)}),
    "kernel 2x5": (4, 8, (2, 5), {"padding": (0, 2), "stride": (1, 2)}),
    "dilation": (4, 24, (3, 3), {"dilation": 2, "padding": 2}),
    "dilation and stride": (4, 24, (4, 2), {"dilation": 2, "stride": 2}),
    "dilation, stride, to 3": (
        *(4, 3, (3, 4)),
        {"dilation": (3, 2), "stride": (2, 3), "output_padding": (2, 1)},
    ),
    "padding over kernel": (3, 20, (3, 3), {"padding": (3, 4)}),
    "groups": (12, 60, (3, 3), {"groups": 3, "padding": 1, "stride": 2}),
    "depthwise": (20, 20, (4, 4), {"groups": 20, "stride": 2, "padding": 1}),
    "long reduction": (300, 16, (2, 2), {"stride": 2}),
    "long reduction to 2": (300, 2, (2, 2), {"stride": 2}),
}
ACTIVATIONS = {
    "relu": {},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.2},
    "leaky_relu slope 0": {"activation": "leaky_relu", "negative_slope": 0.0},
    "tanh": {"activation": "tanh"},
    "sigmoid": {"activation": "sigmoid"},
    "identity": {"activation": None},
}


def inputs_of(name, size=(6, 9), batch=3, **kwargs):
    c, k, kernel, options = GEOMETRIES[name]
    groups = options.get("groups", 1)
    return make_inputs((batch, c, *size), (c, k // groups, *kernel), groups=groups, **kwargs)


@pytest.mark.parametrize(
    "dtype, channels_last",
    [(F32, False), (F32, True), (BF16, True), (F16, False)],
    ids=str,
)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, channels_last):
    tensors = inputs_of(name, dtype=dtype, channels_last=channels_last)
    check(tensors, **GEOMETRIES[name][3])


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    for name in ("k3 s2 p1 op1", "k4 s2 p1 to 3"):
        tensors = inputs_of(name, size=(4, 5), dtype=dtype)
        check(tensors, **GEOMETRIES[name][3], **ACTIVATIONS[activation])


@LAYOUTS
@pytest.mark.parametrize("vectors", ["", "b", "s", "t", "bs", "st"])
def test_affine_maps(vectors, channels_last):
    for name, dtype in (("k3 s2 p1 op1", F32), ("k4 s2 p1 to 3", BF16), ("1x1", F64)):
        tensors = inputs_of(
            name, size=(4, 5), vectors=vectors, dtype=dtype, channels_last=channels_last
        )
        check(tensors, **GEOMETRIES[name][3])


def test_negative_slope_below_zero_forward():
    tensors = inputs_of("k4 s2 p1")
    options = {**GEOMETRIES["k4 s2 p1"][3], "activation": "leaky_relu", "negative_slope": -0.5}
    check(tensors, gradients=False, **options)
    check(tensors, backend="reference", **options)


# Small images of many make tiles of images, all else tiles of pixels; around the sizes of both.
@LAYOUTS
@pytest.mark.parametrize("batch", [2, 16, 31])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 8), (8, 9), (3, 40)], ids=str)
def test_sizes(size, batch, channels_last):
    for dtype in (F32, BF16):
        tensors = make_inputs(
            (batch, 9, *size), (9, 35, 4, 4), dtype=dtype, channels_last=channels_last
        )
        check(tensors, gradients=False, stride=2, padding=1)


@LAYOUTS
@pytest.mark.parametrize("width", [1, 7, 8, 15, 17, 70])
@pytest.mark.parametrize("out_channels", [1, 3, 8])
def test_widths_of_few_output_channels(out_channels, width, channels_last):
    # Enough outputs that how well torch happens to hit one of them does not decide.
    x_shape = (2 + 32 // width, 11, 8, width)
    tensors = make_inputs(x_shape, (11, out_channels, 4, 4), channels_last=channels_last)
    check(tensors, gradients=width == 7, stride=2, padding=1, activation="tanh")


# The layers the CPU kernels are tuned on, with batches cut to what a test can afford.
@pytest.mark.parametrize("dtype, channels_last", [(F32, False), (F32, True), (BF16, True)], ids=str)
@pytest.mark.parametrize(
    "batch, channels, out_channels, kernel, stride, padding, size, activation",
    [
        (16, 100, 128, 7, 1, 0, 1, "relu"),
        (8, 128, 64, 4, 2, 1, 7, "relu"),
        (4, 64, 1, 4, 2, 1, 14, "tanh"),
        (8, 512, 64, 4, 2, 1, 4, "relu"),
        (2, 128, 64, 4, 2, 1, 16, "relu"),
        (2, 64, 3, 4, 2, 1, 32, "tanh"),
    ],
)
def test_generator_layers(
    batch, channels, out_channels, kernel, stride, padding, size, activation, dtype, channels_last
):
    tensors = make_inputs(
        (batch, channels, size, size),
        (channels, out_channels, kernel, kernel),
        vectors="st",
        dtype=dtype,
        channels_last=channels_last,
    )
    options = {"stride": stride, "padding": padding, "activation": activation}
    check(tensors, gradients=dtype == F32, **options)


@BACKENDS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_unbatched(backend, dtype):
    x, *rest = inputs_of("k3 s2 p1 op1", dtype=dtype)
    check([x[1], *rest], backend=backend, **GEOMETRIES["k3 s2 p1 op1"][3])


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_backend(activation, dtype):
    tensors = inputs_of("groups", size=(3, 4), dtype=dtype)
    check(tensors, backend="reference", **GEOMETRIES["groups"][3], **ACTIVATIONS[activation])


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_empty_batch(backend, channels_last, dtype):
    tensors = inputs_of("k4 s2 p1", batch=0, dtype=dtype, channels_last=channels_last)
    leaves = [t.requires_grad_() for t in tensors]
    out = fast(*leaves, backend=backend, stride=2, padding=1)
    assert out.shape == plain(*leaves, stride=2, padding=1).shape
    grads = torch.autograd.grad(out.sum(), leaves)
    assert grads[0].shape == tensors[0].shape
    for leaf, grad in zip(leaves[1:], grads[1:], strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def strided_variants(t):
    """The same values in other places: name -> tensor."""
    n, c, h, w = t.shape
    nan = float("nan")
    return {
        "offset 1": torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t),
        "sliced": t.new_full((n, c, h + 2, w + 3), nan)[:, :, 1:-1, 2:-1].copy_(t),
        "stepped": t.new_full((n, 2 * c, h, 2 * w), nan)[:, ::2, :, ::2].copy_(t),
        "channels_last, offset 1": torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        .view(n, h, w, c)
        .permute(0, 3, 1, 2)
        .copy_(t),
        "width before height": t.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["k4 s2 p1", "k4 s2 p1 to 3"])
def test_strides_of_every_tensor(name, dtype):
    options = GEOMETRIES[name][3]
    tensors = inputs_of(name, dtype=dtype)
    expected = fast(*tensors, **options)
    for i in (0, 1):
        for what, variant in strided_variants(tensors[i]).items():
            given = [*tensors[:i], variant, *tensors[i + 1 :]]
            torch.testing.assert_close(fast(*given, **options), expected, msg=what)
            check(given, gradients=dtype == F32, **options)
    stepped = [t.repeat_interleave(2)[::2] for t in tensors[2:]]
    assert torch.equal(fast(*tensors[:2], *stepped, **options), expected)


@pytest.mark.parametrize("expanded", ["scalar", "rows", "permuted"])
def test_strides_of_the_gradient(expanded):
    tensors = [t.requires_grad_() for t in inputs_of("k4 s2 p1")]
    out = fast(*tensors, stride=2, padding=1, activation="tanh")
    grad = {
        "scalar": torch.ones(()).expand(out.shape),
        "rows": torch.randn(out.shape[:3])[..., None].expand(out.shape),
        "permuted": torch.randn(out.transpose(1, 3).shape).transpose(1, 3),
    }[expanded]
    got = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    want = torch.autograd.grad(out, tensors, grad.contiguous())
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@LAYOUTS
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", None])
@pytest.mark.parametrize("name", ["k4 s2 p1", "k4 s2 p1 to 3"])
def test_nan_and_inf_stand_where_torch_has_them(name, activation, channels_last):
    tensors = inputs_of(name, batch=9, size=(4, 4), channels_last=channels_last)
    # One image of each, and images without.
    for image, bad in ((1, "nan"), (4, "inf"), (7, "-inf")):
        tensors[0][image, 2, 1, 3] = tensors[0][image, 0, 3, 0] = float(bad)
    options = {**GEOMETRIES[name][3], "activation": activation}
    for given in (tensors, [tensors[0][:2], *tensors[1:]]):
        out, want = fast(*given, **options), plain(*given, **options)
        assert torch.equal(out.isnan(), want.isnan())
        torch.testing.assert_close(out, want, equal_nan=True)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("out_channels", [1, 16])
def test_saturating_activations_to_the_last_digits(activation, out_channels):
    """By a 1x1 kernel that hands values on: the activation alone, near 0 and far out."""
    values = torch.linspace(-1, 1, 4096).pow(3) * 20
    small = torch.logspace(-30, 0, 1024)
    values = torch.cat([values, small, -small, torch.tensor([0.0, -0.0, 90.0, -90.0, 3e38, -3e38])])
    x = values.view(1, 1, 1, -1)
    out = fast(x, torch.ones(1, out_channels, 1, 1), activation=activation)
    exact = getattr(torch, activation)(x.double()).expand_as(out)
    error = (out - exact).abs()
    assert (error <= 3e-7 * exact.abs() + 1e-38).all(), (error / exact.abs()).nan_to_num().max()


@LAYOUTS
@pytest.mark.parametrize("name", ["k4 s2 p1", "k4 s2 p1 to 3", "groups"])
@pytest.mark.parametrize("batch", [2, 16])
def test_results_do_not_depend_on_threads_and_repeat(name, batch, channels_last):
    options = GEOMETRIES[name][3]
    leaves = [
        t.requires_grad_()
        for t in inputs_of(name, batch=batch, size=(8, 8), channels_last=channels_last)
    ]
    results = []
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        out = fast(*leaves, **options)
        # The library's own wgrad depends on the number of threads.
        wanted = leaves if threads == 2 else leaves[2:3] + leaves[4:]
        grads = torch.autograd.grad(out.square().sum(), wanted)
        results.append((out, *(grads if threads == 2 else ()), grads[-1]))
    for a, b in zip(results[0], results[1], strict=True):
        assert torch.equal(a, b)
    for other in results[2:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[-1], results[0][-1])


def test_nothing_is_aliased_or_written():
    tensors = inputs_of("1x1")
    before = [t.clone() for t in tensors]
    out = fast(*tensors, activation=None)
    assert out.data_ptr() != tensors[0].data_ptr()
    out.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
