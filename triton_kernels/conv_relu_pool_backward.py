"""Gradients of the fused convolution, activation and pooling: the launchers."""

import torch
import triton

from . import common
from .common import Config
from .conv_relu_pool_backward_kernels import (
    conv_relu_pool_backward_bias_kernel,
    conv_relu_pool_backward_input_kernel,
    conv_relu_pool_backward_weight_kernel,
)
from .conv_relu_pool_configs import input_configs, weight_configs, without_tensor_cores
from .conv_relu_pool_geometry import Geometry, Pair


def backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
    pool: str,
    pool_size: Pair,
    pool_stride: Pair,
    pool_padding: Pair,
    ceil_mode: bool,
    output_mask: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (input, weight, bias), each an empty (0,) tensor where `output_mask` is False.

    grad_output: (batch, out_channels, pooled height, pooled width), any strides; codes: as
    `forward` gave them, or where it gives none the output (of no use, and not read, if activation
    is "none"). grad_input has the input's memory format, grad_weight is contiguous; both have the
    input's dtype.
    """
    geometry = Geometry.of(
        input,
        weight,
        stride,
        padding,
        dilation,
        groups,
        pool,
        pool_size,
        pool_stride,
        pool_padding,
        ceil_mode,
    )
    empty = input.new_empty(0)
    grad_input, grad_weight, grad_bias = empty, empty, empty
    if grad_output.numel() == 0 or input.numel() == 0:
        if output_mask[0]:
            grad_input = torch.zeros_like(input)
        if output_mask[1]:
            grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if output_mask[2]:
            grad_bias = weight.new_zeros(geometry.out_channels)
        return grad_input, grad_weight, grad_bias
    # The pooled tensors are the small ones, and both gradients read runs of channels.
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    coded = activation != "none" or pool == "max"
    if coded:
        codes = codes.contiguous(memory_format=torch.channels_last)
    shared = {
        "grad_output": grad_output,
        "codes": codes,
        "BY_OUTPUT": coded and codes.dtype is not torch.uint8,
        "slope": float(negative_slope),
        "ACTIVATION": activation,
        "WIDE": geometry.needs_int64,
    }
    with common.device_guard(input):
        if output_mask[0]:
            grad_input = _backward_input(geometry, input, weight, shared)
        if output_mask[1]:
            grad_weight = _backward_weight(geometry, input, weight, shared)
        if output_mask[2]:
            grad_bias = _backward_bias(geometry, weight, shared)
    return grad_input, grad_weight, grad_bias


def _backward_input(
    geometry: Geometry, input: torch.Tensor, weight: torch.Tensor, shared: dict
) -> torch.Tensor:
    channels_last = common.is_channels_last(input)
    grad_input = torch.empty(
        input.shape,
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    packed = (
        weight.unflatten(0, (geometry.groups, geometry.group_out))
        .permute(0, 2, 3, 4, 1)
        .contiguous()
    )
    arguments = shared | _sizes(geometry) | geometry.constants()
    arguments |= {
        "weight": packed,
        "grad_input": grad_input,
        "CHANNELS_LAST": channels_last,
        "PRECISION": common.conv_precision(input.dtype),
        "EXACT": without_tensor_cores(input.dtype, common.conv_precision(input.dtype)),
        "UPCAST": common.INTERPRET,
    }
    rows, columns = (
        triton.cdiv(size, step) for size, step in zip(input.shape[2:], geometry.stride, strict=True)
    )
    residues = geometry.stride[0] * geometry.stride[1]

    def bind(config: Config):
        blocks = triton.cdiv(geometry.batch * rows * columns, config["BM"])
        channel_blocks = triton.cdiv(geometry.group_in, config["BN"])
        return (channel_blocks * geometry.groups * residues * blocks,), arguments

    key = (input.dtype, arguments["PRECISION"], arguments["ACTIVATION"], channels_last)
    common.launch(
        conv_relu_pool_backward_input_kernel,
        input_configs(geometry, input.dtype, arguments["PRECISION"]),
        (*key, *geometry.key()),
        bind,
    )
    return grad_input


def _backward_weight(
    geometry: Geometry, input: torch.Tensor, weight: torch.Tensor, shared: dict
) -> torch.Tensor:
    # Reading runs of channels pays for the conversion unless there are few of them.
    channels_last = common.is_channels_last(input) or geometry.group_in >= 16
    input = input.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    precision = common.conv_precision(input.dtype)
    configs = weight_configs(geometry, input.dtype, precision, common.capability(input))
    parts, part_pixels = weight_parts(geometry, configs[0], common.multiprocessors(input))
    flat = geometry.taps * geometry.group_in
    partial = torch.empty(
        (parts, geometry.out_channels, flat), dtype=torch.float32, device=input.device
    )
    arguments = shared | _sizes(geometry) | geometry.constants()
    arguments |= {
        "input": input,
        "partial": partial,
        "CHANNELS_LAST": channels_last,
        "PRECISION": precision,
        "EXACT": without_tensor_cores(input.dtype, precision),
        "UPCAST": common.INTERPRET,
    }

    def bind(config: Config):
        tiles = triton.cdiv(geometry.group_out, config["BN"]) * triton.cdiv(flat, config["BF"])
        part_blocks = triton.cdiv(part_pixels, config["BM"])
        return (tiles * geometry.groups * parts,), arguments | {"part_blocks": part_blocks}

    key = (input.dtype, precision, arguments["ACTIVATION"], channels_last, parts)
    common.launch(conv_relu_pool_backward_weight_kernel, configs, (*key, *geometry.key()), bind)
    total = partial.sum(0) if parts > 1 else partial[0]
    total = total.view(geometry.out_channels, *geometry.kernel, geometry.group_in)
    return total.permute(0, 3, 1, 2).to(weight.dtype, memory_format=torch.contiguous_format)


def _backward_bias(geometry: Geometry, weight: torch.Tensor, shared: dict) -> torch.Tensor:
    pixels = geometry.batch * geometry.pooled[0] * geometry.pooled[1]
    channels = common.power_of_2(geometry.out_channels, 8, 64)
    config = Config({"BM": 4096 // channels, "BN": channels}, num_warps=4, num_stages=2)
    tiles = triton.cdiv(geometry.out_channels, channels)
    blocks = triton.cdiv(pixels, config["BM"])
    parts = max(1, min(blocks, 4 * common.multiprocessors(weight) // tiles))
    part_blocks = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, part_blocks)
    partial = torch.empty((parts, geometry.out_channels), dtype=torch.float32, device=weight.device)
    sizes = _sizes(geometry)
    pooling = {
        name: value
        for name, value in geometry.constants().items()
        if name.startswith(("POOL", "WINDOW"))
    }
    arguments = shared | pooling | {name: sizes[name] for name in ("N", "K", "P", "Q", "PO", "QO")}
    arguments |= {"partial": partial, "part_blocks": part_blocks}
    common.launch(
        conv_relu_pool_backward_bias_kernel, [config], (), lambda _: ((tiles, parts), arguments)
    )
    return partial.sum(0).to(weight.dtype)


def _sizes(geometry: Geometry) -> dict[str, int]:
    return {
        "N": geometry.batch,
        "H": geometry.height,
        "W": geometry.width,
        "K": geometry.out_channels,
        "P": geometry.conv[0],
        "Q": geometry.conv[1],
        "PO": geometry.pooled[0],
        "QO": geometry.pooled[1],
        "C": geometry.group_in,
        "GROUP_K": geometry.group_out,
        "GROUPS": geometry.groups,
    }


def weight_parts(geometry: Geometry, config: Config, multiprocessors: int) -> tuple[int, int]:
    """Into how many parts to split the sum over pixels, and the pixels of one.

    Enough to fill the device twice, each long enough to be worth its partial result. It depends on
    the heuristic config alone, so that tuning does not change the order of the sum.
    """
    tiles = triton.cdiv(geometry.group_out, config["BN"]) * geometry.groups
    tiles *= triton.cdiv(geometry.taps * geometry.group_in, config["BF"])
    pixels = geometry.batch * geometry.conv[0] * geometry.conv[1]
    parts = max(1, min(2 * multiprocessors // tiles, pixels // 512))
    part_pixels = triton.cdiv(triton.cdiv(pixels, parts), 128) * 128
    return triton.cdiv(pixels, part_pixels), part_pixels
