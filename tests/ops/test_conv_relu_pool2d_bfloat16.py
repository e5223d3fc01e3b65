"""bfloat16 by integer products: inputs whose scales are uneven, extreme or not finite."""

import math

import pytest
import torch
import torch.nn.functional as F

import pyops
from pyops.testing import assert_within_budget

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def plain(x, w, b):
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)


def tensors(channels, out_channels=40, size=18, batch=2):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, size, size, generator=generator)
    w = torch.randn(out_channels, channels, 3, 3, generator=generator) / math.sqrt(9 * channels)
    return x, w, torch.randn(out_channels, generator=generator) / 2


def check(x, w, b, layout):
    x, w, b = (t.bfloat16() for t in (x, w, b))
    memory_format = LAYOUTS[layout]
    with torch.no_grad():
        out = pyops.conv_relu_pool2d(
            x.to(memory_format=memory_format), w.to(memory_format=memory_format), b, padding=1, backend="cpu"
        )  # fmt: skip
    assert_within_budget(out, plain(x, w, b), plain(x.double(), w.double(), b.double()))
    return out


def uneven_channels(x, w):
    """Loud input channels with quiet weights and the reverse, four orders of magnitude apart."""
    scale = torch.logspace(-2, 2, x.shape[1]).view(1, -1, 1, 1)
    return x * scale, w / scale


def dead_channel(x, w):
    x, w = x.clone(), w.clone()
    x[:, 3], w[:, 3] = 1e6, 0
    return x, w


def uneven_rows(x, w):
    return x, w * torch.logspace(-3, 0, w.shape[0]).view(-1, 1, 1, 1)


def bright_spot(x, w):
    x = x.clone()
    x[0, :, 5, 5] *= 1e3
    return x, w


CASES = {
    "uneven channels": uneven_channels,
    "dead channel": dead_channel,
    "uneven rows": uneven_rows,
    "bright spot": bright_spot,
    "far from zero": lambda x, w: (x + 10, w),
    "sparse": lambda x, w: (x * (x > 2), w),
    "tiny": lambda x, w: (x * 1e-25, w),
    "tiny weights": lambda x, w: (x, w * 1e-30),
    "huge": lambda x, w: (x * 1e22, w),
    "zero weights": lambda x, w: (x, w * (torch.arange(w.shape[0]) % 2).view(-1, 1, 1, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [8, 33, 200])  # one sum with a part vector, and two sums
@pytest.mark.parametrize("case", CASES)
def test_uneven_and_extreme_scales(case, channels, layout):
    x, w, b = tensors(channels)
    x, w = CASES[case](x, w)
    if "tiny" in case:
        b = b * 0
    check(x, w, b, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "out_channels"), [(136, 130), (256, 160)])
def test_weights_block_by_block(channels, out_channels, layout):
    """Few pixels and many channels take the other order of loops."""
    x, w, b = tensors(channels, out_channels, size=9, batch=1)
    check(x, w, b, layout)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["input", "weight"])
def test_not_finite(where, bad):
    x, w, b = tensors(40)
    if where == "input":
        x[0, 7, 6, 6] = bad
    else:
        w[3, 7, 1, 1] = bad
    check(x, w, b, "nchw")


def test_same_on_any_number_of_threads():
    x, w, b = tensors(160, 70, size=40)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(check(x, w, b, "channels_last"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
