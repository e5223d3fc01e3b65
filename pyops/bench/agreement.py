"""How far a conv + activation + pool is from float64, measured against plain torch's own error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops.bench.shapes import ConvShape
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, error_ratio, within_budget

FLOAT64_ERROR = 16  # units in the last place of the largest value

ConvFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Verdict(NamedTuple):
    """Error as a multiple of plain torch's, and whether it is within the budget."""

    ratio: float
    passed: bool


def judge(out: Tensor, plain: Tensor, expected: Tensor, budget: float) -> Verdict:
    """Compares `out` with the float64 `expected`, allowing `budget` times the error of `plain`.

    In float64 itself the expected values are plain torch's own, so that nothing tells its error,
    and `FLOAT64_ERROR` stands for it.
    """
    if plain.dtype == torch.float64 and expected.numel() > 0:
        unit = FLOAT64_ERROR * torch.finfo(torch.float64).eps * expected.abs().max().item()
        ratio = (out - expected).abs().max().item() / (unit or 1.0)
        return Verdict(ratio, ratio <= budget)
    ratio = error_ratio(out, plain, expected)
    passed = ratio <= budget or within_budget(out, plain, expected, budget)
    # plain torch is exact there, and so is `out` but for one rounding
    return Verdict(0.0 if passed and ratio == float("inf") else ratio, passed)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The largest ratio; passed only if all have."""
    verdicts = list(verdicts)
    return Verdict(max(v.ratio for v in verdicts), all(v.passed for v in verdicts))


def chain(shape: ConvShape) -> ConvFunction:
    """The layer in plain torch: the baseline, and in float64 the reference."""

    def conv_relu_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = F.conv2d(x, weight, bias, shape.stride, shape.padding, shape.dilation, shape.groups)
        if shape.activation == "relu":
            x = F.relu(x)
        elif shape.activation == "leaky_relu":
            x = F.leaky_relu(x, 0.01)
        if shape.pool == "max":
            x = F.max_pool2d(x, shape.pool_size, shape.pool_stride, shape.pool_padding)
        elif shape.pool == "avg":
            x = F.avg_pool2d(x, shape.pool_size, shape.pool_stride, shape.pool_padding)
        return x

    return conv_relu_pool


def make_inputs(
    shape: ConvShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Input (normal), weight and bias (as torch.nn.Conv2d initialises them), NCHW."""
    generator = torch.Generator().manual_seed(seed)
    fan_in = shape.in_channels // shape.groups * shape.kernel[0] * shape.kernel[1]
    x = torch.randn(shape.batch, shape.in_channels, shape.height, shape.width, generator=generator)
    weight_size = (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)
    weight = (2 * torch.rand(weight_size, generator=generator) - 1) * fan_in**-0.5
    bias = (2 * torch.rand(shape.out_channels, generator=generator) - 1) * fan_in**-0.5
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


class Agreement:
    """Compares implementations of one layer with it in float64, on the same inputs.

    Where rounding decides which element of a window wins, or whether one passes the ReLU, every
    implementation may be right in its own way, so no gradient is sent into such windows.
    """

    def __init__(self, shape: ConvShape, inputs: tuple[Tensor, ...], backward: bool) -> None:
        self.inputs, self.backward = inputs, backward
        plain = chain(shape)
        with torch.no_grad():
            wide = [t.double() for t in inputs]
            if backward:
                generator = torch.Generator().manual_seed(1)
                decided = decided_windows(shape, wide[0], wide[1], wide[2], inputs[0].dtype)
                grad = torch.randn(decided.shape, generator=generator).to(decided.device)
                self.grad_output = (grad * decided).to(inputs[0].dtype)
        self.expected = self._run(plain, *wide)
        self.plain = self._run(plain, *inputs)

    def _run(self, fn: ConvFunction, *inputs: Tensor) -> dict[str, Tensor]:
        if not self.backward:
            with torch.no_grad():
                return {"output": fn(*inputs)}
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = fn(*leaves)
        grads = torch.autograd.grad(out, leaves, self.grad_output.to(out.dtype))
        names = ("grad_input", "grad_weight", "grad_bias")
        return {"output": out.detach(), **dict(zip(names, grads, strict=True))}

    def verdicts(self, fn: ConvFunction, layout: torch.memory_format) -> dict[str, Verdict]:
        """Of `fn`'s "output" and, if asked for, "grad_input", "grad_weight", "grad_bias"."""
        x, weight, bias = self.inputs
        x, weight = x.to(memory_format=layout), weight.to(memory_format=layout)
        found = self._run(fn, x, weight, bias)
        return {
            name: judge(
                value,
                self.plain[name],
                self.expected[name],
                OUTPUT_BUDGET if name == "output" else GRADIENT_BUDGET,
            )
            for name, value in found.items()
        }


def decided_windows(
    shape: ConvShape, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """Which pooled outputs have the same winner and the same ReLU state in any rounding.

    x, weight, bias: float64. Returns a bool tensor of the output's shape. The margin is some
    units in the last place of `dtype`, times the typical size of the convolution's output.
    """
    conv = F.conv2d(x, weight, bias, shape.stride, shape.padding, shape.dilation, shape.groups)
    margin = max(4 * torch.finfo(dtype).eps, 2e-5) * conv.std()
    live = (conv.abs() > margin) if shape.activation else torch.ones_like(conv, dtype=torch.bool)
    if shape.pool is None:
        return live
    size, stride, pad = shape.pool_size, shape.pool_stride, shape.pool_padding
    if shape.pool == "avg":
        doubtful = F.max_pool2d((~live).double(), size, stride, pad)
        return doubtful == 0
    padded = F.pad(conv, (pad,) * 4, value=-torch.inf)
    windows = padded.unfold(2, size, stride).unfold(3, size, stride).flatten(4)
    if size == 1:
        return live[:, :, ::stride, ::stride]
    first, second = windows.topk(2, dim=-1).values.unbind(-1)
    decided = first - second > margin
    return decided & (first.abs() > margin) if shape.activation else decided
