"""What the tests of conv_relu_pool2d share: plain torch written out, inputs, and the comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import pyops
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget

# How far apart, relative to the largest value, two pre-activations must lie for
# rounding not to decide which of them wins a window.
_UNDECIDED = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def conv(x, w, b=None, *, stride=1, padding=0, dilation=1, groups=1, **_):
    return F.conv2d(x, w, b, stride, padding, dilation, groups)


def activate(y, *, activation="relu", negative_slope=0.01, **_):
    if activation == "relu":
        return F.relu(y)
    return F.leaky_relu(y, negative_slope) if activation == "leaky_relu" else y


def pooled(y, *, pool="max", pool_size=2, pool_stride=None, pool_padding=0, ceil_mode=False, **_):
    if pool is None:
        return y
    function = F.max_pool2d if pool == "max" else F.avg_pool2d
    return function(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)


def plain(x, w, b=None, **options):
    """The op in plain torch, step by step."""
    return pooled(activate(conv(x, w, b, **options), **options), **options)


def make_inputs(x_shape, w_shape, *, bias=True, dtype=torch.float32, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fan_in = w_shape[1] * w_shape[2] * w_shape[3]
    x = torch.randn(x_shape, generator=generator).to(dtype)
    w = (torch.randn(w_shape, generator=generator) / fan_in**0.5).to(dtype)
    b = torch.randn(w_shape[0], generator=generator).to(dtype) / 2 if bias else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, w, b


def is_channels_last(t):
    """The documented rule for what counts as channels_last; all else counts as contiguous."""
    return t.shape[1] > 1 and t.stride(1) == 1 and not t.is_contiguous()


def expected_strides(shape, channels_last):
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def decided(pre, tolerance, **options):
    """1 where the winner of an output's window, and the sign of its members, is beyond rounding."""
    near_zero = (pre.abs() < tolerance).to(pre.dtype)
    if options.get("activation", "relu") is None:
        near_zero = torch.zeros_like(near_zero)
    pool = options.get("pool", "max")
    if pool is None:
        return near_zero == 0
    geometry = {k: v for k, v in options.items() if k.startswith("pool_") or k == "ceil_mode"}
    good = pooled(near_zero, pool="max", **geometry) == 0
    if pool == "avg":
        return good
    values = activate(pre, **options)
    size, stride, pad = (
        (v, v) if isinstance(v, int) else tuple(v)
        for v in (
            options.get("pool_size", 2),
            options.get("pool_stride") or options.get("pool_size", 2),
            options.get("pool_padding", 0),
        )
    )
    far = [
        max(0, (good.shape[2 + i] - 1) * stride[i] + size[i] - pad[i] - pre.shape[2 + i])
        for i in (0, 1)
    ]
    padded = F.pad(values, (pad[1], far[1], pad[0], far[0]), value=float("-inf"))
    windows = padded.unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])
    windows = windows[:, :, : good.shape[2], : good.shape[3]].flatten(4)
    if windows.shape[-1] < 2:
        return good
    first, second = windows.topk(2).values.unbind(-1)
    dead = (first == 0) & (options.get("activation", "relu") == "relu")
    return good & (dead | (first - second > tolerance))


def assert_right(out, lowp, exact, budget, name):
    """The error budget; float64 has nothing more exact beside it and is held to 12 digits."""
    if out.dtype != torch.float64:
        return assert_within_budget(out, lowp, exact, budget, name)
    scale = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12 * max(1.0, scale))
    return 0.0


def check(x, w, b=None, *, backend="cpu", gradients=True, **options):
    """Compare outputs and gradients with plain torch by the error budget; the largest ratio.

    Gradients flow only into windows whose winner is decided beyond rounding: two results that
    are both right may disagree about the others.
    """
    leaves = [t for t in (x, w, b) if t is not None]
    fast = [t.detach().requires_grad_(gradients) for t in leaves]
    lowp = [t.detach().contiguous().requires_grad_(gradients) for t in leaves]
    exact = [t.detach().double().contiguous().requires_grad_(gradients) for t in leaves]
    out = pyops.conv_relu_pool2d(*fast, backend=backend, **options)
    want, want64 = plain(*lowp, **options), plain(*exact, **options)
    assert out.shape == want.shape
    if backend != "reference" and x.dim() == 4 and 0 not in out.shape:
        assert out.stride() == expected_strides(out.shape, is_channels_last(x))
    ratios = [assert_right(out, want, want64, OUTPUT_BUDGET, "output")]
    if gradients:
        pre = conv(*exact, **options).detach()
        unbatched = x.dim() == 3
        scale = pre.abs().max().item() if pre.numel() else 1.0
        mask = decided(
            pre[None] if unbatched else pre, _UNDECIDED[x.dtype] * max(scale, 1e-30), **options
        ).to(x.dtype)
        assert mask.numel() == 0 or mask.double().mean() > 0.4
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        grad = grad * (mask[0] if unbatched else mask)
        results = [
            torch.autograd.grad(o, inputs, grad.to(o.dtype))
            for o, inputs in ((out, fast), (want, lowp), (want64, exact))
        ]
        for name, leaf, *triple in zip(
            ("grad_input", "grad_weight", "grad_bias"), leaves, *results, strict=False
        ):
            assert triple[0].shape == leaf.shape
            if name == "grad_bias" and leaf.numel() < 8 and x.dtype != torch.float64:
                # A few long sums: how well torch happens to hit each of them is luck.
                atol = torch.finfo(x.dtype).eps * grad.abs().sum().item()
                torch.testing.assert_close(triple[0].double(), triple[2], rtol=0, atol=atol)
            else:
                ratios.append(assert_right(*triple, GRADIENT_BUDGET, name))
    return max(ratios)
