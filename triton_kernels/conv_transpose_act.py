"""Transposed convolution, affine map and activation in one pass: the entry points."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton

from . import common
from .common import Config
from .conv_transpose_act_kernels import (
    conv_transpose_act_forward_kernel,
    conv_transpose_act_gradient_kernel,
)

__all__ = ["backward", "forward", "supports"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh", "sigmoid")
MAX_TAPS = 64  # along an axis: the search for a phase's first tap is unrolled


def supports(
    input_shape: Sequence[int], weight_shape: Sequence[int], dtype: torch.dtype, spec: Any
) -> str | None:
    """None if the Triton kernels take these arguments, else a sentence saying why not."""
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    if spec.activation not in ACTIVATIONS:
        return f"the Triton kernels do not know activation {spec.activation!r}"
    if max(weight_shape[2:]) > MAX_TAPS:
        return (
            f"the Triton kernels take kernels of at most {MAX_TAPS} taps an axis, "
            f"got {tuple(weight_shape[2:])}"
        )
    return None


def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    spec: Any,
) -> torch.Tensor:
    """activation((conv_transpose2d(input, weight) + bias) * scale + shift).

    input: (batch, in_channels, height, width); weight: (in_channels, out_channels / groups, R, S);
    bias, scale, shift: (out_channels,) or None. spec: the fields of the op's schema after its
    tensors. The output has the input's memory format; an NCHW input is read as a channels_last
    copy.
    """
    batch, in_channels, height, width = input.shape
    _, group_out, *taps = weight.shape
    groups, out_channels = spec.groups, group_out * spec.groups
    size = tuple(
        (extent - 1) * step + dilation * (tap - 1) + extra + 1 - 2 * pad
        for extent, step, dilation, tap, extra, pad in zip(
            *((height, width), spec.stride, spec.dilation, taps, spec.output_padding),
            spec.padding,
            strict=True,
        )
    )
    channels_last = common.is_channels_last(input)
    output = torch.empty(
        (batch, out_channels, *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    if output.numel() == 0:
        return output
    group_in = in_channels // groups
    steps = [s // math.gcd(s, d) for s, d in zip(spec.stride, spec.dilation, strict=True)]
    backs = [t * d // s for t, d, s in zip(steps, spec.dilation, spec.stride, strict=True)]
    phases = [min(s, extent) for s, extent in zip(spec.stride, size, strict=True)]
    pixels = batch * math.prod(-(-extent // s) for extent, s in zip(size, spec.stride, strict=True))
    # (R, S, out_channels, group_in): channels of the reduction fastest.
    weights = weight.view(groups, group_in, group_out, *taps).permute(3, 4, 0, 2, 1).contiguous()
    arguments = {
        "input": input.contiguous(memory_format=torch.channels_last),
        "weight": weights,
        "bias": output if bias is None else bias.contiguous(),
        "scale": output if scale is None else scale.contiguous(),
        "shift": output if shift is None else shift.contiguous(),
        "output": output,
        "slope": float(spec.negative_slope),
        "N": batch,
        "H": height,
        "W": width,
        "K": out_channels,
        "P": size[0],
        "Q": size[1],
        "C": group_in,
        "GROUP_K": group_out,
        "GROUPS": groups,
        "R": taps[0],
        "S": taps[1],
        "STRIDE_H": spec.stride_h,
        "STRIDE_W": spec.stride_w,
        "PAD_H": spec.padding_h,
        "PAD_W": spec.padding_w,
        "DILATION_H": spec.dilation_h,
        "DILATION_W": spec.dilation_w,
        "TAP_STEP_H": steps[0],
        "TAP_STEP_W": steps[1],
        "BACK_H": backs[0],
        "BACK_W": backs[1],
        "PHASES_H": phases[0],
        "PHASES_W": phases[1],
        "ACTIVATION": spec.activation,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "CHANNELS_LAST": channels_last,
        "PRECISION": common.conv_precision(input.dtype),
        "WIDE": common.needs_int64(input.numel(), output.numel(), weight.numel()),
        "UPCAST": common.INTERPRET,
    }

    def bind(config: Config):
        blocks = triton.cdiv(group_out, config["BN"]) * groups * triton.cdiv(pixels, config["BM"])
        return (blocks * phases[0] * phases[1],), arguments

    names = ("PRECISION", "ACTIVATION", "CHANNELS_LAST", "HAS_BIAS", "HAS_SCALE", "HAS_SHIFT")
    key = (input.dtype, in_channels, out_channels, pixels.bit_length(), *taps)
    key += (*spec[:9], *(arguments[name] for name in names))
    scattered = not channels_last and max(phases) > 1
    configs = forward_configs(group_in, group_out, input.dtype, arguments["PRECISION"], scattered)
    with common.device_guard(input):
        common.launch(conv_transpose_act_forward_kernel, configs, key, bind)
    return output


def forward_configs(
    group_in: int, group_out: int, dtype: torch.dtype, precision: str, scattered: bool
) -> list[Config]:
    """`scattered`: neighbouring outputs of a phase do not lie side by side, so that each has its address."""
    block_k = common.power_of_2(group_in, 16, 128 // dtype.itemsize)
    block_n = common.power_of_2(group_out, 16, 128)
    if dtype is torch.float32 and precision == "ieee" and not common.INTERPRET:
        # Without tensor cores: operands in registers.
        tiles = [(min(block_n, 64), 64, 16, 4, 2)]
    elif group_in * dtype.itemsize % 16 != 0:  # loads are of single elements
        tiles = [(min(block_n, 64), 128, min(block_k, 32), 8, 2)]
    elif scattered:
        tiles = [(block_n, 64, block_k, 8 if block_n == 128 else 4, 3)]
    elif block_n == 128:
        tiles = [(128, 128, block_k, 8, 3), (64, 128, block_k, 4, 3)]
    else:
        tiles = [(block_n, 128, block_k, 4, 3), (block_n, 256, block_k, 8, 3)]
    return [
        Config({"BN": n, "BM": m, "BK": k}, num_warps=warps, num_stages=stages)
        for n, m, k, warps, stages in tiles
    ]


def backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    output: torch.Tensor,
    spec: Any,
    mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of input, weight, bias, scale and shift that `mask` asks for; (0,) for others.

    The activation's gradient and its sums are one kernel; the plain convolution and the
    correlation that follow are the library's. With u = conv * scale + ..., and the convolution
    linear in a channel's weights, sum(du * conv) = <w, dw of du>: the gradient of scale needs no
    stored convolution.
    """
    grads = [weight.new_empty(0) for _ in range(5)]
    groups, (in_channels, group_out) = spec.groups, weight.shape[:2]
    channels_last = common.is_channels_last(input)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if input.shape[0] == 0:
        shapes = (input.shape, weight.shape, *((group_out * groups,),) * 3)
        return tuple(
            weight.new_zeros(shape) if wanted else grad
            for shape, wanted, grad in zip(shapes, mask, grads, strict=True)
        )
    grad, sums = _activation_gradient(grad_output, output, spec, channels_last)

    def by_channel(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        spread = factors.view(groups, 1, group_out).expand(groups, in_channels // groups, -1)
        return values * spread.reshape(in_channels, group_out, 1, 1)

    wanted = [mask[0], mask[1] or mask[3], False]
    if any(wanted):
        scaled = weight if scale is None else by_channel(weight, scale)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *(grad, input, scaled, None, spec.stride, spec.padding, spec.dilation, True),
            *(spec.output_padding, groups, wanted),
        )
        if mask[0]:
            grads[0] = dx.contiguous(memory_format=layout)
        if mask[1]:
            grads[1] = (dw if scale is None else by_channel(dw, scale)).contiguous()
        if mask[3]:
            products = (weight.float() * dw.float()).sum((2, 3))
            products = products.view(groups, -1, group_out).sum(1).flatten()
            if bias is not None:
                products += bias.float() * sums
            grads[3] = products.to(weight.dtype)
    if mask[2]:
        grads[2] = (sums if scale is None else sums * scale.float()).to(weight.dtype)
    if mask[4]:
        grads[4] = sums.to(weight.dtype)
    return tuple(grads)


def _activation_gradient(
    grad_output: torch.Tensor, output: torch.Tensor, spec: Any, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_output = grad_output.contiguous(memory_format=layout)
    output = output.contiguous(memory_format=layout)
    batch, channels, height, width = output.shape
    pixels = height * width
    grad = torch.empty(output.shape, dtype=output.dtype, device=output.device, memory_format=layout)
    block_c, block_p = (64, 64) if channels_last else (4, 1024)
    constants = {
        "BC": common.power_of_2(channels, 1, block_c),
        "BP": common.power_of_2(pixels, 16, block_p),
    }
    blocks = triton.cdiv(pixels, constants["BP"])
    sums = torch.empty(
        (batch * blocks, channels),
        dtype=torch.float32,
        device=output.device,
        memory_format=torch.contiguous_format,
    )
    arguments = {
        "grad_output": grad_output,
        "output": output,
        "grad": grad,
        "sums": sums,
        "slope": float(spec.negative_slope),
        "K": channels,
        "PIXELS": pixels,
        "channel_stride": 1 if channels_last else pixels,
        "pixel_stride": channels if channels_last else 1,
        "ACTIVATION": spec.activation,
        "WIDE": common.needs_int64(output.numel()),
    }

    def bind(config: Config):
        return (batch, triton.cdiv(channels, config["BC"]), blocks), arguments

    with common.device_guard(output):
        common.run(conv_transpose_act_gradient_kernel, Config(constants, 4, 1), bind)
    return grad, sums.sum(0)
