"""linear_act: a dense layer and its activation.

The public function checks its arguments, takes a backend and calls that backend's op. The fake, autograd,
autocast and vmap rules are in linear_act_rules.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import linear_act as reference
from ..reference.linear_act import LinearActSpec
from . import _arguments as arguments
from . import _registration as registration
from ._choice import Plans, choose, settle
from .linear_act_rules import EagerFunction

_OP = "linear_act"
_LEAST_OUTPUTS = 2048  # with fewer, the call itself costs more than tanh saves


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """``activation(linear(input, weight, bias))``; what is saved for backward is the input and the output.

    On the CPU the product is the library's and the activation a vectorised pass over its result in cache: what
    is faster than torch's own is tanh, the only activation for which automatic choice takes it.

    Args:
        input: (..., in_features); float32, bfloat16, float16 or float64.
        weight: (out_features, in_features), dtype and device of ``input``.
        bias: (out_features,) or None.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"sigmoid"`` or None.
        negative_slope: factor for negative values of leaky_relu.
        backend: None takes the fastest one proven for these arguments on this device and falls back
            to ``"reference"``; ``"reference"`` or ``"cpu"`` never fall back.

    Returns:
        (..., out_features), in ``input``'s dtype. Differentiable to any order in all tensors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: an explicit ``backend`` does not exist here or does not take these arguments.
    """
    tensors: tuple[Any, ...] = (input, weight, bias)
    try:
        facts = arguments.facts(tensors, 2)
    except (AttributeError, RuntimeError):  # not all of them are tensors, or one is nested
        _check_tensors(tensors)
        raise
    if registration.autocasting(input.device):
        dtype = torch.get_autocast_dtype(input.device.type)
        tensors = tuple(None if t is None else registration.autocast_to(dtype, t) for t in tensors)
        facts = arguments.facts(tensors, 2)
    input, weight, bias = tensors
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    options = (activation, negative_slope, backend, needs_grad)
    compiling = torch.compiler.is_compiling()
    if compiling:
        plan = _plan(facts, options, tensors)
    else:
        plan = _plans.find((facts, options), options, lambda: _plan(facts, options, tensors))
    use = settle(plan.backend, backend)
    if use == "reference":
        return reference.linear_act(input, weight, bias, plan.spec)
    op = torch.ops.pyops.linear_act.default
    if compiling or registration.needs_registered_op():
        return op(input, weight, bias, *plan.spec)
    if needs_grad:
        return EagerFunction.apply(input, weight, bias, plan.spec)
    with torch._C._AutoDispatchBelowAutograd():
        return op(input, weight, bias, *plan.spec)


def _check_tensors(tensors: tuple[Any, ...]) -> None:
    input, weight, bias = tensors
    arguments.floating_tensor("input", input)
    arguments.floating_tensor("weight", weight)
    arguments.like("weight", weight, "input", input)
    if bias is not None:
        arguments.floating_tensor("bias", bias)
        arguments.like("bias", bias, "input", input)


class _Plan(NamedTuple):
    backend: str
    spec: LinearActSpec


_plans = Plans()


def _plan(facts: tuple[Any, ...], options: tuple[Any, ...], tensors: tuple[Any, ...]) -> _Plan:
    """Check and normalise everything that does not depend on the tensors' contents."""
    _check_tensors(tensors)
    activation, negative_slope, backend, needs_grad = options
    (input_shape, dtype, device, _), (weight_shape, *_), bias = facts
    if len(weight_shape) != 2:
        raise ValueError(
            f"weight: expected 2 dimensions (out_features, in_features), got {tuple(weight_shape)}"
        )
    if len(input_shape) < 1 or input_shape[-1] != weight_shape[1]:
        raise ValueError(
            f"input: expected shape (..., {weight_shape[1]}) for weight {tuple(weight_shape)}, "
            f"got {tuple(input_shape)}"
        )
    if bias is not None and tuple(bias[0]) != (weight_shape[0],):
        raise ValueError(f"bias: expected shape ({weight_shape[0]},), got {tuple(bias[0])}")
    spec = spec_of(activation, negative_slope, dtype)

    def refusal(name: str) -> str | None:
        if name == "cpu" and dtype == torch.float64:
            return "it takes float32, bfloat16 and float16, got torch.float64"
        if name == "cpu" and needs_grad and spec.activation == "leaky_relu" and not spec[1] >= 0:
            return (
                "with gradients, negative_slope must be at least 0 (the output's sign tells the input's), "
                f"got {spec.negative_slope}"
            )
        return None

    def passed_over(name: str) -> bool:  # docs/kernels/conv_transpose.md, "Dense layers"
        outputs = input_shape.numel() // input_shape[-1] * weight_shape[0] if input_shape[-1] else 0
        return name == "cpu" and (spec.activation != "tanh" or outputs < _LEAST_OUTPUTS)

    return _Plan(choose(_OP, device, backend, refusal, passed_over) or "reference", spec)


def spec_of(activation: Any, negative_slope: Any, dtype: torch.dtype) -> LinearActSpec:
    """The options, checked."""
    arguments.one_of("activation", activation, ("relu", "leaky_relu", "tanh", "sigmoid", None))
    slope = arguments.slope("negative_slope", negative_slope, dtype)
    return LinearActSpec(activation or "none", slope)
