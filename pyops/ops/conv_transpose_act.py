"""conv_transpose2d_act: transposed convolution, bias, per-channel affine map and activation in one pass.

The public function checks its arguments, takes a backend and calls that backend's op. The fake, autograd,
autocast and vmap rules, the same for all backends, are in conv_transpose_act_rules.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import conv_transpose_act as reference
from ..reference.conv_transpose_act import ConvTransposeSpec, output_extents
from . import _arguments as arguments
from . import _registration as registration
from ._choice import Plans, choose, settle
from .conv_transpose_act_rules import EagerFunction

_OP = "conv_transpose2d_act"
_VECTORS = ("bias", "scale", "shift")


def conv_transpose2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation(conv_transpose2d(input, weight, bias) * scale + shift)`` in one pass.

    The affine map is a batch normalisation in eval mode: ``scale = gamma / sqrt(var + eps)``,
    ``shift = beta - mean * scale``. What is saved for backward is the input and the output.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or float64. contiguous or
            channels_last; other strides are copied first.
        weight: (C, K / groups, kernel_h, kernel_w), dtype and device of ``input``.
        bias, scale, shift: (K,) or None.
        stride, padding, output_padding, dilation: pixels, as in
            :func:`torch.nn.functional.conv_transpose2d`.
        groups: divides C.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"sigmoid"`` or None.
        negative_slope: factor for negative values of leaky_relu.
        backend: None takes the fastest one proven for these arguments on this device and falls back
            to ``"reference"``; ``"reference"``, ``"cpu"`` or ``"triton"`` never fall back.

    Returns:
        (N, K, out_h, out_w) or (K, out_h, out_w), in ``input``'s dtype and memory format. Differentiable to
        any order in all tensors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: an explicit ``backend`` does not exist here or does not take these arguments.

    Source: the split by output phase is the sub-pixel form of Shi et al., "Is the deconvolution layer the
    same as a convolutional layer?", 2016.
    """
    tensors: tuple[Any, ...] = (input, weight, bias, scale, shift)
    try:
        facts = arguments.facts(tensors, 2)
    except (AttributeError, RuntimeError):  # not all of them are tensors, or one is nested
        _check_tensors(tensors)
        raise
    if registration.autocasting(input.device):
        dtype = torch.get_autocast_dtype(input.device.type)
        tensors = tuple(None if t is None else registration.autocast_to(dtype, t) for t in tensors)
        facts = arguments.facts(tensors, 2)
    options = (
        *(stride, padding, output_padding, dilation, groups, activation, negative_slope),
        backend,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
    )
    compiling = torch.compiler.is_compiling()
    if compiling:
        plan = _plan(facts, options, tensors)
    else:
        plan = _plans.find((facts, options), options, lambda: _plan(facts, options, tensors))
    use, spec, needs_grad = plan
    use = settle(use, backend)
    input, weight, bias, scale, shift = tensors
    if use == "reference":
        return reference.conv_transpose2d_act(input, weight, bias, scale, shift, spec)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    op = _operator(use)
    if compiling or registration.needs_registered_op():
        output = op(batched, weight, bias, scale, shift, *spec)
    elif needs_grad:
        output = EagerFunction.apply(batched, weight, bias, scale, shift, op, spec)
    else:  # past torch's Python autograd wrapper, which would only find nothing to do
        with torch._C._AutoDispatchBelowAutograd():
            output = op(batched, weight, bias, scale, shift, *spec)
    return output if input.dim() == 4 else output.squeeze(0)


def _check_tensors(tensors: tuple[Any, ...]) -> None:
    input, weight, *vectors = tensors
    arguments.floating_tensor("input", input)
    arguments.floating_tensor("weight", weight)
    arguments.like("weight", weight, "input", input)
    for name, vector in zip(_VECTORS, vectors, strict=True):
        if vector is not None:
            arguments.floating_tensor(name, vector)
            arguments.like(name, vector, "input", input)


class _Plan(NamedTuple):
    backend: str
    spec: ConvTransposeSpec
    needs_grad: bool


_plans = Plans()


def _plan(facts: tuple[Any, ...], options: tuple[Any, ...], tensors: tuple[Any, ...]) -> _Plan:
    """Check and normalise everything that does not depend on the tensors' contents."""
    _check_tensors(tensors)
    *geometry, backend, needs_grad = options
    (input_shape, dtype, device, _), (weight_shape, *_), *vectors = facts
    if len(input_shape) not in (3, 4):
        raise ValueError(
            f"input: expected 3 or 4 dimensions, (C, H, W) or (N, C, H, W), got {tuple(input_shape)}"
        )
    if len(weight_shape) != 4:
        raise ValueError(
            "weight: expected 4 dimensions (C, K / groups, kernel_h, kernel_w), "
            f"got {tuple(weight_shape)}"
        )
    for name, sizes in (("input", input_shape[-3:]), ("weight", weight_shape)):
        if any(size == 0 for size in sizes):
            raise ValueError(f"{name}: expected no size 0 (but for the batch), got {tuple(sizes)}")
    spec = _spec(input_shape, weight_shape, dtype, *geometry)
    channels = weight_shape[1] * spec.groups
    for name, vector in zip(_VECTORS, vectors, strict=True):
        if vector is not None and tuple(vector[0]) != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},), got {tuple(vector[0])}")
    size = output_extents(input_shape, weight_shape, spec)
    if min(size) < 1:
        raise ValueError(
            f"padding: expected something left of the output, got size {size} for input "
            f"{tuple(input_shape)}, kernel {tuple(weight_shape[2:])} and padding {spec.padding}"
        )
    use = _choose(input_shape, weight_shape, dtype, device, spec, backend, needs_grad)
    return _Plan(use, spec, needs_grad)


def check_options(channels: int, weight: Tensor, options: tuple[Any, ...]) -> None:
    """Raise what the op would, whatever the input; `options` are its own from stride to negative_slope, in order."""
    _spec(torch.Size((channels, 1, 1)), weight.shape, weight.dtype, *options)


def _spec(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    negative_slope: Any,
) -> ConvTransposeSpec:
    stride = arguments.pair("stride", stride, 1)
    padding = arguments.pair("padding", padding, 0)
    output_padding = arguments.pair("output_padding", output_padding, 0)
    dilation = arguments.pair("dilation", dilation, 1)
    if any(o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise ValueError(
            f"output_padding: expected less than stride {stride} or dilation {dilation}, "
            f"got {output_padding}"
        )
    groups = arguments.integer("groups", groups)
    channels = input_shape[-3]
    if groups < 1 or channels % groups:
        raise ValueError(
            f"groups: expected a divisor of the input's {channels} channels, got {groups}"
        )
    if weight_shape[0] != channels:
        raise ValueError(
            f"weight: expected {channels} input channels (input {tuple(input_shape)}), "
            f"got {tuple(weight_shape)}"
        )
    arguments.one_of("activation", activation, ("relu", "leaky_relu", "tanh", "sigmoid", None))
    negative_slope = arguments.slope("negative_slope", negative_slope, dtype)
    return ConvTransposeSpec(
        *(stride[0], stride[1], padding[0], padding[1], output_padding[0], output_padding[1]),
        *(dilation[0], dilation[1], groups, activation or "none", negative_slope),
    )


def _choose(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    spec: ConvTransposeSpec,
    backend: str | None,
    needs_grad: bool,
) -> str:
    def refusal(name: str) -> str | None:
        return _refusal(name, input_shape, weight_shape, dtype, spec, needs_grad)

    def passed_over(name: str) -> bool:
        if dtype == torch.float64 or input_shape[0] == 0:
            return True
        return name == "cpu" and _slower_on_cpu(input_shape, weight_shape, dtype, spec)

    return choose(_OP, device, backend, refusal, passed_over) or "reference"


def _slower_on_cpu(
    input_shape: torch.Size, weight_shape: torch.Size, dtype: torch.dtype, spec: ConvTransposeSpec
) -> bool:
    """Where plain torch was measured faster than backend cpu: docs/kernels/conv_transpose.md."""
    pixels = math.prod(input_shape[-2:])
    taps = math.prod(weight_shape[2:])
    if pixels * (input_shape[0] if len(input_shape) == 4 else 1) < 32 and (
        dtype != torch.float32 and math.prod(weight_shape) > 2**18
    ):
        return True  # packing the weights costs as much as using them
    dense = spec.stride == (1, 1) and taps > 1 and spec.groups == 1
    return dense and dtype == torch.float32 and pixels > 64 and weight_shape[1] > 8


def _refusal(
    backend: str,
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    spec: ConvTransposeSpec,
    needs_grad: bool,
) -> str | None:
    """Why `backend` cannot take this call at all, or None."""
    if backend == "reference":
        return None
    if needs_grad and spec.activation == "leaky_relu" and not spec.negative_slope >= 0:
        return (
            "with gradients, negative_slope must be at least 0 (the output's sign tells the input's), "
            f"got {spec.negative_slope}"
        )
    if backend == "triton":
        from ..triton_kernels import conv_transpose_act as kernels

        shape = input_shape if len(input_shape) == 4 else (1, *input_shape)
        return kernels.supports(shape, weight_shape, dtype, spec)
    return None


def _operator(backend: str) -> Any:
    if backend == "triton":
        return torch.ops.pyops.conv_transpose2d_act_triton.default
    return torch.ops.pyops.conv_transpose2d_act.default
