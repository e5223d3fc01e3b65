"""What the tests of conv_transpose2d_act share: plain torch written out, inputs, and the comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import pyops
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget

NAMES = ("input", "weight", "bias", "scale", "shift")
# How far from 0, relative to the largest value, a pre-activation must lie for
# rounding not to decide on which side of the kink it is.
_UNDECIDED = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def linear(x, w, b=None, scale=None, shift=None, **options):
    """What stands before the activation."""
    y = F.conv_transpose2d(
        *(x, w, b, options.get("stride", 1), options.get("padding", 0)),
        *(options.get("output_padding", 0), options.get("groups", 1), options.get("dilation", 1)),
    )
    if scale is not None:
        y = y * scale.view(-1, 1, 1)
    return y if shift is None else y + shift.view(-1, 1, 1)


def plain(x, w, b=None, scale=None, shift=None, **options):
    """The op in plain torch, step by step."""
    y = linear(x, w, b, scale, shift, **options)
    activation = options.get("activation", "relu")
    if activation == "leaky_relu":
        return F.leaky_relu(y, options.get("negative_slope", 0.01))
    functions = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    return functions[activation](y) if activation else y


def fast(x, w, b=None, scale=None, shift=None, *, backend="cpu", **options):
    """The op, its tensors in the order of `plain`."""
    return pyops.conv_transpose2d_act(x, w, b, scale=scale, shift=shift, backend=backend, **options)


def make_inputs(
    x_shape, w_shape, *, groups=1, vectors="bst", dtype=torch.float32, channels_last=False, seed=0
):
    """[input, weight, bias, scale, shift]; None for each of b, s, t that `vectors` lacks."""
    generator = torch.Generator().manual_seed(seed)
    channels = w_shape[1] * groups
    fan_in = w_shape[0] // groups * max(1, w_shape[2] * w_shape[3] / 4)
    x = torch.randn(x_shape, generator=generator).to(dtype)
    w = (torch.randn(w_shape, generator=generator) / fan_in**0.5).to(dtype)
    made = []
    for name in "bst":
        values = torch.randn(channels, generator=generator).to(dtype) / 2
        made.append((values + 1 if name == "s" else values) if name in vectors else None)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return [x, w, *made]


def is_channels_last(t):
    """The documented rule for what counts as channels_last; all else counts as contiguous."""
    return t.shape[1] > 1 and t.stride(1) == 1 and not t.is_contiguous()


def expected_strides(shape, channels_last):
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def assert_right(out, lowp, exact, budget, name):
    """The error budget; float64 has nothing more exact beside it and is held to 12 digits."""
    if out.dtype != torch.float64:
        return assert_within_budget(out, lowp, exact, budget, name)
    scale = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12 * max(1.0, scale))
    return 0.0


def check(tensors, *, backend="cpu", gradients=True, **options):
    """Compare outputs and gradients with plain torch by the error budget; the largest ratio.

    Gradients flow only through elements whose side of the activation's kink is decided beyond rounding:
    two results that are both right may disagree about the others.
    """
    x = tensors[0]
    dtype = x.dtype

    def leaves(convert):
        return [
            None if t is None else convert(t.detach()).requires_grad_(gradients) for t in tensors
        ]

    mine = leaves(lambda t: t)
    lowp = leaves(lambda t: t.contiguous())
    exact = leaves(lambda t: t.double().contiguous())
    out = fast(*mine, backend=backend, **options)
    want, want64 = plain(*lowp, **options), plain(*exact, **options)
    assert out.shape == want.shape
    if backend != "reference" and x.dim() == 4 and 0 not in out.shape:
        assert out.stride() == expected_strides(out.shape, is_channels_last(x))
    ratios = [assert_right(out, want, want64, OUTPUT_BUDGET, "output")]
    if gradients:
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        if options.get("activation", "relu") in ("relu", "leaky_relu"):
            before = linear(*exact, **options).detach()
            decided = before.abs() >= _UNDECIDED[dtype] * before.abs().max()
            assert decided.double().mean() > 0.4
            grad = grad * decided
        results = [
            torch.autograd.grad(o, [t for t in given if t is not None], grad.to(o.dtype))
            for o, given in ((out, mine), (want, lowp), (want64, exact))
        ]
        present = [(n, t) for n, t in zip(NAMES, tensors, strict=True) if t is not None]
        for (name, leaf), *triple in zip(present, *results, strict=True):
            assert triple[0].shape == leaf.shape
            if leaf.numel() < 8 and dtype != torch.float64:
                # A few long sums: how well torch happens to hit each of them is luck.
                size = grad.abs().sum().item() * max(1.0, want64.abs().max().item())
                atol = 2 * torch.finfo(dtype).eps * size
                torch.testing.assert_close(triple[0].double(), triple[2], rtol=0, atol=atol)
            else:
                ratios.append(assert_right(*triple, GRADIENT_BUDGET, f"gradient of {name}"))
    return max(ratios)
