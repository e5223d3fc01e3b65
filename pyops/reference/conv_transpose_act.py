"""conv_transpose2d_act in plain torch (differentiable to any order)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ConvTransposeSpec(NamedTuple):
    """Everything but tensors, normalised, in the order of the op's schema."""

    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    output_padding_h: int
    output_padding_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    activation: str  # "relu", "leaky_relu", "tanh", "sigmoid", "none"
    negative_slope: float

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int]:
        return self.padding_h, self.padding_w

    @property
    def output_padding(self) -> tuple[int, int]:
        return self.output_padding_h, self.output_padding_w

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w


def output_extents(
    input_shape: Sequence[int], weight_shape: Sequence[int], spec: ConvTransposeSpec
) -> tuple[int, int]:
    """(out_h, out_w); below 1 if the padding removes everything."""

    def extent(i: int) -> int:
        full = (input_shape[-2 + i] - 1) * spec.stride[i] + 1
        full += spec.dilation[i] * (weight_shape[2 + i] - 1) + spec.output_padding[i]
        return full - 2 * spec.padding[i]

    return extent(0), extent(1)


def conv_transpose2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    spec: ConvTransposeSpec,
) -> Tensor:
    """activation((conv_transpose2d(input, weight) + bias) * scale + shift); (N, C, H, W) or (C, H, W)."""
    out = F.conv_transpose2d(
        *(input, weight, bias, spec.stride, spec.padding),
        *(spec.output_padding, spec.groups, spec.dilation),
    )
    if scale is not None:
        out = out * scale.view(-1, 1, 1)
    if shift is not None:
        out = out + shift.view(-1, 1, 1)
    return activate(out, spec.activation, spec.negative_slope)


def activate(out: Tensor, activation: str, negative_slope: float) -> Tensor:
    """relu, leaky_relu, tanh, sigmoid or none of `out`."""
    if activation == "relu":
        return F.relu(out)
    if activation == "leaky_relu":
        return F.leaky_relu(out, negative_slope)
    if activation == "tanh":
        return torch.tanh(out)
    return torch.sigmoid(out) if activation == "sigmoid" else out


def damp(values: Tensor, output: Tensor, spec: ConvTransposeSpec) -> Tensor:
    """`values` times the activation's derivative, told by the activation's output."""
    if spec.activation == "relu":
        return values.masked_fill(output <= 0, 0.0)
    if spec.activation == "leaky_relu":
        return torch.where(output > 0, values, values * spec.negative_slope)
    if spec.activation == "tanh":
        return values * (1 - output * output)
    if spec.activation == "sigmoid":
        return values * (output * (1 - output))
    return values


def damping_slope(output: Tensor, spec: ConvTransposeSpec) -> Tensor | None:
    """The derivative in `output` of the factor that :func:`damp` multiplies by; None if it is zero."""
    if spec.activation == "tanh":
        return -2 * output
    if spec.activation == "sigmoid":
        return 1 - 2 * output
    return None
