"""Convolution, bias, activation and pooling in one pass over the output: the entry points."""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import common
from .common import Config
from .conv_relu_pool_backward import backward
from .conv_relu_pool_configs import (
    BOXED,
    FEW_CHANNELS,
    box_device,
    box_tiles,
    gather_configs,
    reduction_block,
    tma_configs,
    whole_windows,
)
from .conv_relu_pool_forward_kernels import (
    conv_relu_pool_forward_gather_kernel,
    conv_relu_pool_forward_tma_kernel,
)
from .conv_relu_pool_geometry import Geometry, Pair, stores_codes, supports

__all__ = ["backward", "forward", "supports"]


def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
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
    with_codes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """pool(activation(conv2d(input, weight, bias))) and the codes that `backward` needs.

    input: (batch, in_channels, height, width); weight: (out_channels, in_channels / groups, R, S);
    bias: (out_channels,) or None. The output has the input's memory format. codes: uint8, the
    output's shape and strides; (0,) without `with_codes` and where the output itself tells what
    backward needs (no pool, a slope above 0). Of a max window bits 0-6 hold the winner's place (y *
    window width + x, from the unclipped corner) and bit 7 whether its gradient passes the
    activation whole; otherwise bit y * window width + x tells that of each place.

    A kernel that reads an NCHW input by boxes, or 16 channels of it or more, reads a channels_last
    copy.
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
    channels_last = common.is_channels_last(input)
    output = torch.empty(
        (geometry.batch, geometry.out_channels, *geometry.pooled),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    codes = input.new_empty(0, dtype=torch.uint8)
    with_codes = with_codes and stores_codes(activation, negative_slope, pool)
    if with_codes:
        codes = torch.empty_strided(
            output.shape, output.stride(), dtype=torch.uint8, device=input.device
        )
    if output.numel() == 0:
        return output, codes

    few = geometry.group_in < FEW_CHANNELS and not channels_last
    input = input.contiguous(memory_format=torch.contiguous_format if few else torch.channels_last)
    # A negative slope makes bit 7 untold by the activated value, which is all that whole windows
    # keep.
    negative = activation == "leaky_relu" and not negative_slope >= 0
    tile = "place" if negative else whole_windows(geometry) or "place"
    arguments = geometry.constants() | {
        "bias": output if bias is None else bias.contiguous(),
        "output": output,
        "codes": codes,
        "slope": float(negative_slope),
        "N": geometry.batch,
        "K": geometry.out_channels,
        "P": geometry.conv[0],
        "Q": geometry.conv[1],
        "PO": geometry.pooled[0],
        "QO": geometry.pooled[1],
        "C": geometry.group_in,
        "GROUP_K": geometry.group_out,
        "GROUPS": geometry.groups,
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "CLIPPED": geometry.clipped,
        "CODED": with_codes,
        "CHANNELS_LAST": channels_last,
        "PRECISION": common.conv_precision(input.dtype),
        "WIDE": geometry.needs_int64,
        "UPCAST": common.INTERPRET,
    }
    with common.device_guard(input):
        if tile != "place" and takes_boxes(geometry, input):
            _forward_tma(geometry, input, weight, arguments)
        else:
            _forward_gather(geometry, input, weight, arguments, tile)
    return output, codes


def takes_boxes(geometry: Geometry, input: torch.Tensor) -> bool:
    """Whether the TMA kernel can do it, and the device is one where it pays."""
    row = geometry.group_in * input.dtype.itemsize
    block = reduction_block(geometry.group_in, input.dtype)
    return (
        (box_device(common.capability(input)) or common.INTERPRET)
        and geometry.stride == (1, 1)
        and {*zip(geometry.window, geometry.pool_stride, strict=True)} <= BOXED
        and geometry.group_in >= FEW_CHANNELS
        and row % 16 == 0
        # A box reaching into the next group would multiply its values, were they infinite, by zero.
        and (geometry.groups == 1 or geometry.group_in % block == 0)
        and (input.dtype is not torch.float32 or common.tf32_allowed())
        and input.data_ptr() % 16 == 0
    )


def _key(input: torch.Tensor, arguments: dict, geometry: Geometry) -> tuple:
    names = ("PRECISION", "ACTIVATION", "CODED", "CHANNELS_LAST", "HAS_BIAS")
    return (input.dtype, *(arguments[name] for name in names), *geometry.key())


def _forward_tma(
    geometry: Geometry, input: torch.Tensor, weight: torch.Tensor, arguments: dict
) -> None:
    pixels = input.permute(0, 2, 3, 1)
    # One copy, so that it is aligned too.
    weights = weight.new_empty(geometry.taps * geometry.out_channels, geometry.group_in)
    weights.view(*geometry.kernel, *weight.shape[:2]).copy_(weight.permute(2, 3, 0, 1))
    batch, channels, height, width = input.shape
    # Spelled out, since torch's strides of axes of size 1 are arbitrary.
    pixel_strides = [height * width * channels, width * channels, channels, 1]
    weight_strides = [geometry.group_in, 1]

    def bind(config: Config):
        box = [config["TN"], config["TH"], config["TW"], config["BK"]]
        images, rows, columns = box_tiles(geometry, config["TN"], config["TH"], config["TW"])
        blocks = triton.cdiv(geometry.group_out, config["BN"])
        descriptors = {
            "input_desc": TensorDescriptor(pixels, list(pixels.shape), pixel_strides, box),
            "weight_desc": TensorDescriptor(
                weights, list(weights.shape), weight_strides, [config["BN"], config["BK"]]
            ),
            "TILES_H": rows,
            "TILES_W": columns,
        }
        return (blocks * geometry.groups * images * rows * columns,), arguments | descriptors

    common.launch(
        conv_relu_pool_forward_tma_kernel,
        tma_configs(geometry, input.dtype),
        _key(input, arguments, geometry),
        bind,
    )


def _forward_gather(
    geometry: Geometry, input: torch.Tensor, weight: torch.Tensor, arguments: dict, tile: str
) -> None:
    arguments = arguments | {
        "input": input,
        "weight": weight.permute(0, 2, 3, 1).contiguous(),
        "H": geometry.height,
        "W": geometry.width,
        "INPUT_CHANNELS_LAST": input.is_contiguous(memory_format=torch.channels_last),
    }
    windows = geometry.batch * geometry.pooled[0] * geometry.pooled[1]

    def bind(config: Config):
        blocks = triton.cdiv(geometry.group_out, config["BN"])
        tiles = {"TILES_H": 1, "TILES_W": 1}
        count = triton.cdiv(windows, config["BM"])
        if tile == "box":
            images, rows, columns = box_tiles(geometry, config["TN"], config["TH"], config["TW"])
            tiles = {"TILES_H": rows, "TILES_W": columns}
            count = images * rows * columns
        return (blocks * geometry.groups * count,), arguments | tiles

    common.launch(
        conv_relu_pool_forward_gather_kernel,
        gather_configs(geometry, input.dtype, arguments["PRECISION"], tile),
        _key(input, arguments, geometry),
        bind,
    )
