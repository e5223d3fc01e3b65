"""conv_relu_pool2d: convolution, bias, activation and pooling in one pass.

The public function checks its arguments, takes a backend and calls that backend's op. The fake, autograd,
autocast and vmap rules, the same for all backends, are in conv_relu_pool_rules.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..reference import conv_relu_pool as reference
from ..reference.conv_relu_pool import ConvPoolSpec, codes_fit, conv_extents, pool_extents
from . import _arguments as arguments
from . import _registration as registration
from ._arguments import facts_of
from ._choice import Plans, choose, settle
from .conv_relu_pool_rules import EagerFunction

_OP = "conv_relu_pool2d"
_MOST_PLACES_CUDA = 128  # of a window: as many as a tile has rows
_LEAST_BATCH_OF_WINOGRAD = 8


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    pool: str | None = "max",
    pool_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``pool(activation(conv2d(input, weight, bias)))`` in one pass, with torch's own semantics.

    Nothing between the convolution and the pool is written to memory, and what is saved for backward is the
    input and one byte per output element.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or float64. contiguous or
            channels_last; other strides are copied first.
        weight: (K, C / groups, kernel_h, kernel_w), dtype and device of ``input``.
        bias: (K,) or None.
        stride, padding, dilation: pixels, as in :func:`torch.nn.functional.conv2d`; padding may be
            ``"valid"`` or, with stride 1, ``"same"``.
        groups: divides C and K.
        activation: ``"relu"``, ``"leaky_relu"`` or None.
        negative_slope: factor for negative values of leaky_relu.
        pool: ``"max"``, ``"avg"`` (padding counts, as torch's default) or None.
        pool_size, pool_stride, pool_padding: pixels; ``pool_stride=None`` means ``pool_size``;
            the padding is at most half of the size.
        ceil_mode: round the pooled extent up instead of down.
        backend: None takes the fastest one proven for these arguments on this device and falls back
            to ``"reference"``; ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` never fall back.

    Returns:
        (N, K, out_h, out_w) or (K, out_h, out_w), in ``input``'s dtype and memory format. Differentiable to
        any order in input, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: an explicit ``backend`` does not exist here or does not take these arguments.

    Source: max pooling's gradient by stored winners follows Zeiler and Fergus, "Visualizing and Understanding
    Convolutional Networks", 2014 (switches); the fast CPU path is Winograd's minimal filtering (Lavin
    and Gray, 2016).
    """
    try:
        facts = (facts_of(input), facts_of(weight), None if bias is None else facts_of(bias))
    except (AttributeError, RuntimeError):  # not all of them are tensors, or one is nested
        _check_tensors(input, weight, bias)
        raise
    if registration.autocasting(input.device):
        dtype = torch.get_autocast_dtype(input.device.type)
        input = registration.autocast_to(dtype, input)
        weight = registration.autocast_to(dtype, weight)
        bias = None if bias is None else registration.autocast_to(dtype, bias)
        facts = (facts_of(input), facts_of(weight), None if bias is None else facts_of(bias))
    options = (
        *(stride, padding, dilation, groups, activation, negative_slope),
        *(pool, pool_size, pool_stride, pool_padding, ceil_mode),
    )
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._is_tracing():  # a graph for calls with and without gradients
        needs_grad = True
    if compiling:
        plan = _plan(facts, options, backend, needs_grad, input, weight, bias)
    else:
        plan = _plans.find(
            (facts, options, backend, needs_grad),
            options,
            lambda: _plan(facts, options, backend, needs_grad, input, weight, bias),
        )
    if plan.extra_padding is not None:
        input = F.pad(input, plan.extra_padding)
    use, flat = plan.backend, plan.flat
    use = settle(use, backend)
    if use == "reference":
        return reference.conv_relu_pool2d(input, weight, bias, plan.spec)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    op = _operator(use, input.dtype)
    if compiling or registration.needs_registered_op():
        output, _ = op(batched, weight, bias, *flat, needs_grad)
    elif needs_grad:
        output = EagerFunction.apply(batched, weight, bias, op, flat)
    else:  # past torch's Python autograd wrapper, which would only find nothing to do
        with torch._C._AutoDispatchBelowAutograd():
            output, _ = op(batched, weight, bias, *flat, False)
    return output if input.dim() == 4 else output.squeeze(0)


def _check_tensors(input: Any, weight: Any, bias: Any) -> None:
    arguments.floating_tensor("input", input)
    arguments.floating_tensor("weight", weight)
    arguments.like("weight", weight, "input", input)
    if bias is not None:
        arguments.floating_tensor("bias", bias)
        arguments.like("bias", bias, "input", input)


class _Plan(NamedTuple):
    backend: str
    spec: ConvPoolSpec
    flat: tuple[Any, ...]  # the spec, as the op takes it
    extra_padding: tuple[int, int, int, int] | None  # F.pad before the op, for an uneven "same"


def _plan(
    facts: tuple[Any, ...],
    options: tuple[Any, ...],
    backend: str | None,
    needs_grad: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> _Plan:
    """Check and normalise everything that does not depend on the tensors' contents."""
    _check_tensors(input, weight, bias)
    (input_shape, dtype, device, _), (weight_shape, *_), _ = facts
    bias_shape = None if bias is None else bias.shape
    if len(input_shape) not in (3, 4):
        raise ValueError(
            f"input: expected 3 or 4 dimensions, (C, H, W) or (N, C, H, W), got {tuple(input_shape)}"
        )
    if len(weight_shape) != 4:
        raise ValueError(
            f"weight: expected 4 dimensions (K, C / groups, kernel_h, kernel_w), got {tuple(weight_shape)}"
        )
    for name, sizes in (("input", input_shape[-3:]), ("weight", weight_shape)):
        if any(size == 0 for size in sizes):
            raise ValueError(f"{name}: expected no size 0 (but for the batch), got {tuple(sizes)}")
    spec, extra = _spec(input_shape, weight_shape, dtype, *options)
    if bias_shape is not None and tuple(bias_shape) != (weight_shape[0],):
        raise ValueError(f"bias: expected shape ({weight_shape[0]},), got {tuple(bias_shape)}")
    if extra is not None:
        height, width = input_shape[-2] + extra[3], input_shape[-1] + extra[1]
        input_shape = torch.Size((*input_shape[:-2], height, width))
    _check_extents(input_shape, weight_shape, spec)
    use = _choose(input_shape, weight_shape, dtype, device, spec, backend, needs_grad)
    return _Plan(use, spec, spec.flat(), extra)


_plans = Plans()


def check_options(channels: int, weight: Tensor, options: tuple[Any, ...]) -> None:
    """Raise what the op would, whatever the input; `options` are its own from stride to ceil_mode, in order."""
    _spec(torch.Size((channels, 1, 1)), weight.shape, weight.dtype, *options)


def _spec(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    negative_slope: Any,
    pool: Any,
    pool_size: Any,
    pool_stride: Any,
    pool_padding: Any,
    ceil_mode: Any,
) -> tuple[ConvPoolSpec, tuple[int, int, int, int] | None]:
    stride = arguments.pair("stride", stride, 1)
    dilation = arguments.pair("dilation", dilation, 1)
    groups = arguments.integer("groups", groups)
    channels, out_channels = input_shape[-3], weight_shape[0]
    if groups < 1 or channels % groups or out_channels % groups:
        raise ValueError(
            f"groups: expected a divisor of the input's {channels} and the weight's {out_channels} channels, "
            f"got {groups}"
        )
    if weight_shape[1] * groups != channels:
        raise ValueError(
            f"weight: expected {channels // groups} input channels a group (input {tuple(input_shape)}, "
            f"groups {groups}), got {tuple(weight_shape)}"
        )
    padding, extra = _padding(padding, weight_shape, stride, dilation)
    arguments.one_of("activation", activation, ("relu", "leaky_relu", None))
    negative_slope = arguments.slope("negative_slope", negative_slope, dtype)
    arguments.one_of("pool", pool, ("max", "avg", None))
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode: expected a bool, got {ceil_mode!r}")
    pool_size = arguments.pair("pool_size", pool_size, 1)
    pool_stride = (
        pool_size if pool_stride is None else arguments.pair("pool_stride", pool_stride, 1)
    )
    pool_padding = arguments.pair("pool_padding", pool_padding, 0)
    if 2 * pool_padding[0] > pool_size[0] or 2 * pool_padding[1] > pool_size[1]:
        raise ValueError(
            f"pool_padding: expected at most half of pool_size {pool_size}, got {pool_padding}"
        )
    if pool is None:
        pool_size, pool_stride, pool_padding, ceil_mode = (1, 1), (1, 1), (0, 0), False
    spec = ConvPoolSpec(
        *(stride, padding, dilation, groups, activation or "none", negative_slope),
        *(pool or "none", pool_size, pool_stride, pool_padding, ceil_mode),
    )
    return spec, extra


def _padding(
    padding: Any, weight_shape: torch.Size, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    if not isinstance(padding, str):
        return arguments.pair("padding", padding, 0), None
    arguments.one_of("padding", padding, ("same", "valid"))
    if padding == "valid":
        return (0, 0), None
    if stride != (1, 1):
        raise ValueError(f"padding: 'same' needs stride 1, got stride {stride}")
    total_h = dilation[0] * (weight_shape[2] - 1)
    total_w = dilation[1] * (weight_shape[3] - 1)
    # torch puts the odd pixel at the right and the bottom.
    extra = (0, total_w % 2, 0, total_h % 2)
    return (total_h // 2, total_w // 2), (extra if any(extra) else None)


def _check_extents(input_shape: torch.Size, weight_shape: torch.Size, spec: ConvPoolSpec) -> None:
    conv_size = conv_extents(input_shape, weight_shape, spec)
    if min(conv_size) < 1:
        raise ValueError(
            f"input: {tuple(input_shape)} with padding {spec.padding} is smaller than the kernel "
            f"{tuple(weight_shape[2:])} with dilation {spec.dilation}"
        )
    if min(pool_extents(conv_size, spec)) < 1:
        raise ValueError(
            f"pool_size: expected a window within the convolution's output {conv_size} with padding "
            f"{spec.pool_padding}, got {spec.pool_size}"
        )


def _choose(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    spec: ConvPoolSpec,
    backend: str | None,
    needs_grad: bool,
) -> str:
    def refusal(name: str) -> str | None:
        return _refusal(name, input_shape, weight_shape, dtype, device, spec, needs_grad)

    def passed_over(name: str) -> bool:
        if dtype == torch.float64 or input_shape[0] == 0:
            return True
        return name == "cpu" and _slower_on_cpu(input_shape, weight_shape, dtype, spec, needs_grad)

    return choose(_OP, device, backend, refusal, passed_over) or "reference"


def _slower_on_cpu(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    spec: ConvPoolSpec,
    needs_grad: bool,
) -> bool:
    """Where plain torch was measured faster than backend cpu: docs/kernels/conv_relu_pool_cpu_direct.md."""
    out_channels, group_channels, kernel_h, kernel_w = weight_shape
    taps = kernel_h * kernel_w
    half = dtype != torch.float32
    if not half and _by_strided_winograd(input_shape, weight_shape, spec):
        return False
    if needs_grad and spec.pool == "none" and max(spec.stride) > 1 and not half:
        return _strided_slower(input_shape, weight_shape, spec)
    if needs_grad and (spec.pool != "max" or spec.groups > 1 or max(spec.dilation) > 1):
        return True  # the library's backward, after which the forward's gain is too small
    if spec.groups > 1:
        group_outputs = out_channels // spec.groups
        if group_channels == group_outputs == 1:
            return spec.pool == "none" and (max(spec.stride) > 1 or taps > 25 or half)
        return group_outputs <= 8 and (half or group_outputs == 8)
    if dtype == torch.float16 and not needs_grad:
        return False  # which torch has no fast convolution for
    pixels = (input_shape[0] if len(input_shape) == 4 else 1) * math.prod(
        conv_extents(input_shape, weight_shape, spec)
    )
    if pixels < 100 and out_channels * group_channels > 2**17 and (half or taps == 1):
        return True  # packing the weights costs as much as using them
    if pixels < 200 and out_channels * group_channels >= 2**16 and half and needs_grad:
        return True
    winograd = ((3, 3), (5, 5)) if dtype != torch.bfloat16 else ((3, 3),)
    if (kernel_h, kernel_w) in winograd and (*spec.stride, *spec.dilation) == (1, 1, 1, 1):
        return False
    return spec.pool == "none" and taps > 1 and group_channels >= 64


def _by_strided_winograd(
    input_shape: torch.Size, weight_shape: torch.Size, spec: ConvPoolSpec
) -> bool:
    """Where csrc/cpu/strided_conv_winograd.isa.cpp takes it and pays, in float32, with gradients or without."""
    batch = input_shape[0] if len(input_shape) == 4 else 1
    geometry = (*weight_shape[2:], *spec.stride, *spec.padding, *spec.dilation, spec.groups)
    return (
        spec.pool == "none"
        and geometry == (4, 4, 2, 2, 1, 1, 1, 1, 1)
        and weight_shape[0] % 32 == weight_shape[1] % 32 == 0
        and batch >= _LEAST_BATCH_OF_WINOGRAD
    )


def _strided_slower(input_shape: torch.Size, weight_shape: torch.Size, spec: ConvPoolSpec) -> bool:
    """Forward and backward without a pool in float32: docs/kernels/conv_transpose.md."""
    batch = input_shape[0] if len(input_shape) == 4 else 1
    geometry = (*weight_shape[2:], *spec.stride, *spec.dilation, spec.groups)
    return batch < 64 or 4 < weight_shape[1] < 128 or geometry != (4, 4, 2, 2, 1, 1, 1)


def _refusal(
    backend: str,
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    spec: ConvPoolSpec,
    needs_grad: bool,
) -> str | None:
    """Why `backend` cannot take this call at all, or None."""
    if backend == "reference":
        return None
    if needs_grad and not codes_fit(spec):
        most = 128 if spec.pool == "max" else 8
        return (
            f"with gradients, {spec.pool} pooling takes windows of at most {most} places, "
            f"got {spec.pool_size}"
        )
    if backend == "cuda":
        return _refusal_of_cuda(input_shape, weight_shape, dtype, device, spec)
    if backend == "triton":
        from ..triton_kernels import conv_relu_pool as kernels

        shape = input_shape if len(input_shape) == 4 else (1, *input_shape)
        return kernels.supports(
            torch.empty(shape, dtype=dtype, device="meta"),
            torch.empty(weight_shape, dtype=dtype, device="meta"),
            **{name: value for name, value in spec._asdict().items() if name != "negative_slope"},
        )
    return None


def _refusal_of_cuda(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    spec: ConvPoolSpec,
) -> str | None:
    """The same limits as sizes_fit in csrc/cuda/conv_relu_pool_tile.cu."""
    if dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not float64"
    if backends.capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if math.prod(spec.pool_size) > _MOST_PLACES_CUDA:
        return f"it takes windows of at most {_MOST_PLACES_CUDA} places, got {spec.pool_size}"
    extents = (size + 2 * pad for size, pad in zip(input_shape[-2:], spec.padding, strict=True))
    if max(*extents, math.prod(weight_shape[1:]), weight_shape[0]) >= 2**30:
        return "it takes sizes below 2**30"
    return None


def _tf32_allowed() -> bool:
    # This getter understands both of torch's APIs; cudnn.allow_tf32 raises once the newer one was used.
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # not in its stub
    return precision == "tf32"


def _operator(backend: str, dtype: torch.dtype) -> Any:
    if backend == "triton":
        return torch.ops.pyops.conv_relu_pool2d_triton.default
    if backend == "cuda" and dtype == torch.float32 and _tf32_allowed():
        return torch.ops.pyops.conv_relu_pool2d_tf32.default
    return torch.ops.pyops.conv_relu_pool2d.default
