"""Activations as steps of a chain: functions, tensor methods and modules, and what they ask of an op."""

import numbers
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyops._swap.pattern import Reader, Settings

_RELU: Settings = {"activation": "relu"}
_TANH: Settings = {"activation": "tanh"}
_SIGMOID: Settings = {"activation": "sigmoid"}
IDENTITY: Settings = {}


def _relu(inplace: bool = False) -> Settings | None:
    return _RELU


def _relu_in_torch() -> Settings | None:
    return _RELU


def _tanh() -> Settings | None:
    return _TANH


def _sigmoid() -> Settings | None:
    return _SIGMOID


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Settings | None:
    # Autograd refuses a negative slope in place, and the pooled maximum moves under one. torch also takes
    # bools and tensors, which the op does not.
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, numbers.Real):
        return None
    if not negative_slope >= 0:
        return None
    return {"activation": "leaky_relu", "negative_slope": negative_slope}


def _leaky_relu_(negative_slope: float = 0.01) -> Settings | None:
    return _leaky_relu(negative_slope)


def _leaky_relu_module(module: Any) -> Settings | None:
    return _leaky_relu(module.negative_slope)


RELU_FUNCTIONS: dict[Any, tuple[str, Reader]] = {
    F.relu: ("relu", _relu),
    F.relu_: ("relu", _relu_in_torch),
    torch.relu: ("relu", _relu_in_torch),
    torch.relu_: ("relu", _relu_in_torch),
    "relu": ("relu", _relu_in_torch),
    "relu_": ("relu", _relu_in_torch),
    F.leaky_relu: ("leaky_relu", _leaky_relu),
    F.leaky_relu_: ("leaky_relu", _leaky_relu_),
}
TANH_FUNCTIONS: dict[Any, tuple[str, Reader]] = {
    f: ("tanh", _tanh) for f in (torch.tanh, F.tanh, "tanh")
}
SQUASHING_FUNCTIONS: dict[Any, tuple[str, Reader]] = {
    **TANH_FUNCTIONS,
    **{f: ("sigmoid", _sigmoid) for f in (torch.sigmoid, F.sigmoid, "sigmoid")},
}
RELU_MODULES: dict[type, tuple[str, Any]] = {
    nn.ReLU: ("relu", lambda module: _RELU),
    nn.LeakyReLU: ("leaky_relu", _leaky_relu_module),
    nn.Identity: ("identity", lambda module: IDENTITY),
}
TANH_MODULES: dict[type, tuple[str, Any]] = {nn.Tanh: ("tanh", lambda module: _TANH)}
SQUASHING_MODULES: dict[type, tuple[str, Any]] = {
    **TANH_MODULES,
    nn.Sigmoid: ("sigmoid", lambda module: _SIGMOID),
}
