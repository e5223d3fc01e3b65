"""Tile shapes of the conv_relu_pool kernels: the heuristic choice, then what tuning may prefer."""

import math

import torch

from .common import INTERPRET, Config, power_of_2
from .conv_relu_pool_geometry import Geometry

# Channels below this make taps and channels one reduction axis.
FEW_CHANNELS = 16

# (window, step) along an axis such that a box of pixels pools in registers.
BOXED = {(1, 1), (2, 2), (3, 2)}


def box_device(capability: tuple[int, int]) -> bool:
    """Whether tl.dot reads both operands from shared memory here, so that TMA boxes pay."""
    return capability[0] in (9, 10)


def reduction_block(channels: int, dtype: torch.dtype) -> int:
    """Channels a step: a row of 128 bytes, the widest swizzle, unless there are fewer."""
    return power_of_2(channels, 16, 128 // dtype.itemsize)


def channel_block(channels: int) -> int:
    """Channels a tile: 16 to 128, but 64 where 128 would leave more of the last tile idle."""
    block = power_of_2(channels, 16, 128)
    return 64 if block == 128 and -channels % 128 >= 64 else block


def without_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    """Whether tl.dot multiplies in float32 itself, its operands in registers."""
    return dtype is torch.float32 and precision == "ieee" and not INTERPRET


def scattered(channels: int, dtype: torch.dtype) -> bool:
    """Whether rows of channels are no multiple of 16 bytes, so that loads are of single elements."""
    return channels * dtype.itemsize % 16 != 0


def windows_overlap(geometry: Geometry) -> bool:
    """Whether an element can lie in several windows, so that its gradient is a sum."""
    return geometry.window[0] > geometry.pool_stride[0] or (
        geometry.window[1] > geometry.pool_stride[1]
    )


def whole_windows(geometry: Geometry) -> str | None:
    """How a tile can hold whole windows: "run", one by one; "box", sharing edges; None: it cannot."""
    axes = set(zip(geometry.window, geometry.pool_stride, strict=True))
    if max(geometry.window) <= 2:
        return "run"
    return "box" if axes <= BOXED else None


def box_windows(geometry: Geometry, height: int, width: int) -> tuple[int, int]:
    """The rows and columns of windows that lie whole in a box of pixels of that size."""
    return tuple(
        (size - window) // step + 1
        for size, window, step in zip(
            (height, width), geometry.window, geometry.pool_stride, strict=True
        )
    )


def box_tiles(geometry: Geometry, images: int, height: int, width: int) -> tuple[int, int, int]:
    """How many boxes cover the images, the rows and the columns of the output."""
    rows, columns = box_windows(geometry, height, width)
    sizes = (geometry.batch, *geometry.pooled)
    return tuple(
        -(-size // part) for size, part in zip(sizes, (images, rows, columns), strict=True)
    )


def box(geometry: Geometry, pixels: int) -> tuple[int, int, int]:
    """(images, rows, columns) of the box of that many pixels that covers the output in fewest."""
    # Of equals the widest, which makes the longest stores.
    fewest, best = None, None
    width = 8
    while width <= min(pixels, 256):
        height = 4 if geometry.window[0] > geometry.pool_stride[0] else geometry.pool_stride[0]
        while width * height <= pixels:
            shape = (pixels // (width * height), height, width)
            tiles = math.prod(box_tiles(geometry, *shape))
            if fewest is None or tiles <= fewest:
                fewest, best = tiles, shape
            height *= 2
        width *= 2
    return best


def tma_configs(geometry: Geometry, dtype: torch.dtype) -> list[Config]:
    block_k = reduction_block(geometry.group_in, dtype)
    if channel_block(geometry.group_out) == 128:
        # The smaller ones leave room for two blocks a multiprocessor, one pooling while the other
        # multiplies.
        tiles = [(128, 256, 8, 4), (128, 128, 4, 3), (128, 128, 8, 3)]
    else:
        tiles = [(64, 256, 4, 4), (64, 128, 4, 4), (64, 256, 8, 2)]
    return [
        _forward_config(geometry, block_n, pixels, block_k, warps, stages)
        for block_n, pixels, warps, stages in tiles
    ]


def _forward_config(geometry, block_n, pixels, block_k, warps, stages) -> Config:
    images, rows, columns = box(geometry, pixels)
    constants = {"TN": images, "TH": rows, "TW": columns, "BN": block_n, "BK": block_k}
    return Config(constants, num_warps=warps, num_stages=stages)


def gather_configs(
    geometry: Geometry, dtype: torch.dtype, precision: str, tile: str
) -> list[Config]:
    flat = geometry.group_in < FEW_CHANNELS
    reduction = geometry.taps * geometry.group_in if flat else geometry.group_in
    block_k = power_of_2(reduction, 16, 128 // dtype.itemsize)
    half_k = max(16, block_k // 2)
    block_n = channel_block(geometry.group_out)
    places = geometry.window[0] * geometry.window[1] if tile == "run" else 1
    if without_tensor_cores(dtype, precision):
        tiles = [(min(block_n, 64), 64, 16, 4, 2)]
    elif tile == "place":
        # Three accumulators live at once.
        block_n = min(block_n, 64)
        tiles = [(block_n, 64, half_k, 8, 3)]
    elif scattered(geometry.group_in, dtype) and block_k > 32:
        block_n = min(block_n, 64)
        tiles = [(block_n, 128, half_k, 8, 2), (block_n, 64, half_k, 4, 2)]
    elif block_n == 128:
        tiles = [(128, 128, block_k, 8, 3), (64, 128, block_k, 4, 3)]
    else:
        tiles = [(block_n, 128, block_k, 4, 3), (block_n, 256, block_k, 8, 3)]
    configs = []
    for block_n, pixels, block_k, warps, stages in tiles:
        images, rows, columns = box(geometry, pixels) if tile == "box" else (1, 1, 1)
        constants = {"TN": images, "TH": rows, "TW": columns, "BM": pixels // places}
        constants |= {"BN": block_n, "BK": block_k, "TILE": tile, "FLAT": flat}
        configs.append(Config(constants, num_warps=warps, num_stages=stages))
    return configs


def input_configs(geometry: Geometry, dtype: torch.dtype, precision: str) -> list[Config]:
    block_n = channel_block(geometry.group_in)
    block_k = power_of_2(geometry.group_out, 16, 128 // dtype.itemsize)
    if without_tensor_cores(dtype, precision):
        tiles = [(64, min(block_n, 64), 16, 4, 2)]
    elif windows_overlap(geometry) or scattered(geometry.group_out, dtype):
        half_k = max(16, block_k // 2)
        tiles = [(128, min(block_n, 64), half_k, 8, 2), (64, min(block_n, 64), half_k, 4, 2)]
    elif block_n == 128:
        tiles = [(128, 128, block_k, 8, 3), (128, 128, block_k // 2, 8, 3)]
    else:
        tiles = [(128, block_n, block_k, 8, 3), (64, block_n, max(16, block_k // 2), 4, 3)]
    return [
        Config({"BM": pixels, "BN": n, "BK": k}, num_warps=warps, num_stages=stages)
        for pixels, n, k, warps, stages in tiles
    ]


def weight_configs(
    geometry: Geometry, dtype: torch.dtype, precision: str, capability: tuple[int, int]
) -> list[Config]:
    block_n = channel_block(geometry.group_out)
    block_f = power_of_2(geometry.taps * geometry.group_in, 16, 128)
    block_m = 128 // dtype.itemsize
    if without_tensor_cores(dtype, precision):
        tiles = [(16, min(block_n, 64), min(block_f, 64), 4, 2)]
    elif (
        windows_overlap(geometry)
        or scattered(geometry.group_out, dtype)
        or scattered(geometry.group_in, dtype)
    ):
        tiles = [(32, min(block_n, 64), min(block_f, 64), 8, 2)]
    else:
        warps = 8 if block_n * block_f >= 128 * 64 else 4
        tiles = [(32, block_n, block_f, warps, 3)]
        if box_device(capability):
            tiles.append((block_m, block_n, block_f, warps, 3))
    return [
        Config({"BM": pixels, "BN": n, "BF": f}, num_warps=warps, num_stages=stages)
        for pixels, n, f, warps, stages in tiles
    ]
