"""3x3 and 5x5 convolutions under pools whose windows overlap, are padded or large: Winograd's sums, then the pool."""

import pytest
import torch
from conv_pool_cases import check, make_inputs

import pyops

POOLS = {
    "3s2": {"pool_size": 3, "pool_stride": 2},
    "3s2 padded": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "2s1": {"pool_size": 2, "pool_stride": 1},
    "3s3 ceil": {"pool_size": 3, "ceil_mode": True},
    "avg 2x3s1": {"pool": "avg", "pool_size": (2, 3), "pool_stride": 1, "pool_padding": (1, 0)},
    "leaky 3x2s2": {"pool_size": (3, 2), "pool_stride": 2, "activation": "leaky_relu"},
    "no activation": {"pool_size": 3, "pool_stride": 2, "activation": None},
}
# (input, weight): few tiles of many channels, many tiles, channels that fill no vector, images of
# which not all fit one pass
SHAPES = {
    "few": ((1, 64, 13, 13), (128, 64, 3, 3)),
    "many": ((2, 24, 31, 29), (40, 24, 3, 3)),
    "odd": ((3, 17, 14, 15), (19, 17, 3, 3)),
    "5x5": ((2, 24, 19, 17), (40, 24, 5, 5)),
    "5x5, few": ((1, 40, 13, 14), (128, 40, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool", POOLS)
def test_within_budget(pool, shape, channels_last, dtype):
    tensors = make_inputs(*SHAPES[shape], dtype=dtype, channels_last=channels_last)
    for gradients in (False, dtype == torch.float32):
        check(*tensors, gradients=gradients, padding=1, **POOLS[pool])


def test_passes_over_a_few_images_join():
    x, w, b = make_inputs((11, 8, 64, 64), (64, 8, 3, 3))
    options = {"padding": 1, "pool_size": 3, "pool_stride": 2, "backend": "cpu"}
    whole = pyops.conv_relu_pool2d(x, w, b, **options)
    each = [pyops.conv_relu_pool2d(image[None], w, b, **options) for image in x]
    torch.testing.assert_close(whole, torch.cat(each), rtol=1e-5, atol=1e-5)
    check(x, w, b, gradients=False, padding=1, pool_size=3, pool_stride=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_pixels_stay_where_they_are(value):
    x, w, b = make_inputs((1, 32, 20, 20), (64, 32, 3, 3))
    x[0, 3, 9, 9] = value
    options = {"padding": 1, "pool_size": 3, "pool_stride": 2}
    with torch.no_grad():
        out = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
        want = pyops.conv_relu_pool2d(x, w, b, backend="reference", **options)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())
    finite = want.isfinite()
    torch.testing.assert_close(out[finite], want[finite], rtol=1e-4, atol=1e-4)


def test_ties_go_to_the_first_as_in_torch():
    """A constant image: equal outputs within every window; the gradient shows the winner."""
    w = torch.randint(-3, 4, (32, 16, 3, 3)).float()
    grads = []
    for backend in ("cpu", "reference"):
        x = torch.ones(1, 16, 15, 15, requires_grad=True)
        y = pyops.conv_relu_pool2d(
            x, w, padding=1, pool_size=3, pool_stride=2, activation=None, backend=backend
        )
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)
