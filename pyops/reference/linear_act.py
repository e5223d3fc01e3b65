"""linear_act in plain torch (differentiable to any order)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_transpose_act import activate


class LinearActSpec(NamedTuple):
    """Everything but tensors, normalised, in the order of the op's schema."""

    activation: str  # "relu", "leaky_relu", "tanh", "sigmoid", "none"
    negative_slope: float


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, spec: LinearActSpec) -> Tensor:
    """activation(linear(input, weight, bias)); input (..., in_features)."""
    return activate(F.linear(input, weight, bias), *spec)


def activation_backward(grad: Tensor, output: Tensor, spec: LinearActSpec) -> Tensor:
    """`grad` times the activation's derivative, told by the activation's output; differentiable in both."""
    aten = torch.ops.aten
    if spec.activation == "tanh":
        return aten.tanh_backward(grad, output)
    if spec.activation == "sigmoid":
        return aten.sigmoid_backward(grad, output)
    if spec.activation == "relu":
        return aten.threshold_backward(grad, output, 0)
    if spec.activation == "leaky_relu":
        return aten.leaky_relu_backward(grad, output, spec.negative_slope, True)
    return grad
