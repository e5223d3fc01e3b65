"""The Hopper convolution on a GPU, with every way to address a tap's pixels.

Run with `-rA`: which of the unproven ones pass decides PYOPS_WGMMA_ADDRESSING's default
(docs/kernels/conv_relu_pool_hopper.md).
"""

import pytest
import torch
import torch.nn.functional as F

import pyops
from pyops import backends
from pyops.reference.conv_relu_pool import ConvPoolSpec, Expansion, conv_extents, make_codes
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

pytestmark = pytest.mark.gpu

UNPROVEN = pytest.mark.xfail(strict=False, reason="an operand that starts within a swizzle pattern")
ADDRESSINGS = [
    "copies",
    "planes",
    pytest.param("shifted", marks=UNPROVEN),
    pytest.param("pitch16", marks=UNPROVEN),
]
LAYERS = [
    ((8, 64, 224, 224), 64),
    ((4, 128, 112, 112), 128),
    ((4, 256, 56, 56), 256),
    ((3, 32, 57, 61), 72),
]


@pytest.fixture(autouse=True)
def _hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if (reason := backends.why_not("conv_relu_pool2d", "cuda", "cuda")) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, out_channels", LAYERS)
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_addressing(addressing, shape, out_channels, dtype, monkeypatch):
    monkeypatch.setenv("PYOPS_WGMMA_ADDRESSING", addressing)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to("cuda", dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(out_channels, shape[1], 3, 3, generator=generator) / (3 * shape[1] ** 0.5)
    w = w.to("cuda", dtype)
    b = torch.randn(out_channels, generator=generator).to("cuda", dtype)
    out = pyops.conv_relu_pool2d(x, w, b, padding=1, pool="max", pool_size=2, backend="cuda")

    def plain(x, w, b):
        return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)

    reference = plain(x.double(), w.double(), b.double())
    assert_within_budget(out, plain(x.contiguous(), w, b), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, out_channels", LAYERS)
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_gradient_of_the_input(addressing, shape, out_channels, dtype, monkeypatch):
    """Halos formed from the pooled gradient (copies, shifted), or brought from an expanded one."""
    monkeypatch.setenv("PYOPS_WGMMA_ADDRESSING", addressing)
    one, two = (1, 1), (2, 2)
    spec = ConvPoolSpec(one, one, one, 1, "relu", 0.01, "max", two, two, (0, 0), False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to("cuda", dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(out_channels, shape[1], 3, 3, generator=generator) / (3 * shape[1] ** 0.5)
    w = w.to("cuda", dtype)
    codes = make_codes(F.conv2d(x.double(), w.double(), padding=1), spec)
    grad = torch.randn(codes.shape, generator=generator).to("cuda", dtype)
    backward = torch.ops.pyops.conv_relu_pool2d_backward
    result = backward(grad, x, w, codes, *spec.flat(), [True, False, False])[0]

    def plain(grad, w):
        expanded = Expansion(codes, spec, conv_extents(x.shape, w.shape, spec)).expand(grad)
        return torch.nn.grad.conv2d_input(x.shape, w, expanded, padding=1)

    exact = plain(grad.double(), w.double())
    assert_within_budget(result, plain(grad, w), exact, k=GRADIENT_BUDGET)
