"""The sizes of a fused convolution, activation and pooling, and which the kernels take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import common

Pair = Sequence[int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WINDOW = 128  # bits 0-6 of a code tell the winner's place
AVG_WINDOW = 8  # one bit of a code per place


@dataclass(frozen=True)
class Geometry:
    """Every size the kernels need; `conv` is the convolution's output before pooling."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pool: str
    window: tuple[int, int]
    pool_stride: tuple[int, int]
    pool_padding: tuple[int, int]
    ceil_mode: bool
    conv: tuple[int, int]
    pooled: tuple[int, int]

    @classmethod
    def of(
        cls,
        input: torch.Tensor,
        weight: torch.Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        pool: str,
        pool_size: Pair,
        pool_stride: Pair,
        pool_padding: Pair,
        ceil_mode: bool,
    ) -> "Geometry":
        batch, in_channels, height, width = input.shape
        out_channels, _, *kernel = weight.shape
        if pool == "none":
            pool_size, pool_stride, pool_padding, ceil_mode = (1, 1), (1, 1), (0, 0), False
        conv = tuple(
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, pad, dil, k, step in zip(
                (height, width), padding, dilation, kernel, stride, strict=True
            )
        )
        pooled = tuple(
            _pooled_size(size, k, step, pad, ceil_mode)
            for size, k, step, pad in zip(conv, pool_size, pool_stride, pool_padding, strict=True)
        )
        return cls(
            batch,
            in_channels,
            height,
            width,
            out_channels,
            tuple(kernel),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            groups,
            pool,
            tuple(pool_size),
            tuple(pool_stride),
            tuple(pool_padding),
            ceil_mode,
            conv,
            pooled,
        )

    @property
    def group_in(self) -> int:
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def clipped(self) -> bool:
        """Whether a window can reach outside the convolution's output."""
        return self.ceil_mode or self.pool_padding != (0, 0)

    @property
    def needs_int64(self) -> bool:
        pixels = self.batch * self.height * self.width
        conv_pixels = self.batch * self.conv[0] * self.conv[1]
        pooled_pixels = self.batch * self.pooled[0] * self.pooled[1]
        # The pooled pixels times a window bound the pixels that a tile of windows counts.
        return common.needs_int64(
            pixels * self.in_channels,
            conv_pixels,
            pooled_pixels * max(self.out_channels, self.window[0] * self.window[1]),
            self.out_channels * self.group_in * self.taps,
        )

    def constants(self) -> dict[str, Any]:
        """The sizes that every kernel takes as compile-time constants."""
        return {
            "R": self.kernel[0],
            "S": self.kernel[1],
            "STRIDE_H": self.stride[0],
            "STRIDE_W": self.stride[1],
            "PAD_H": self.padding[0],
            "PAD_W": self.padding[1],
            "DILATION_H": self.dilation[0],
            "DILATION_W": self.dilation[1],
            "POOL": self.pool,
            "WINDOW_H": self.window[0],
            "WINDOW_W": self.window[1],
            "POOL_STRIDE_H": self.pool_stride[0],
            "POOL_STRIDE_W": self.pool_stride[1],
            "POOL_PAD_H": self.pool_padding[0],
            "POOL_PAD_W": self.pool_padding[1],
        }

    def key(self) -> tuple:
        """The shape class a config is kept for: exact where compiled in, sizes by their magnitude."""
        pixels = (self.batch * self.conv[0] * self.conv[1]).bit_length()
        return (
            self.in_channels,
            self.out_channels,
            self.groups,
            pixels,
            min(self.conv[1], 256),
            *self.constants().values(),
            self.ceil_mode,
        )


def stores_codes(activation: str, negative_slope: float, pool: str) -> bool:
    """Whether backward needs codes; if not, the output's sign, or nothing, is enough."""
    return pool != "none" or (activation == "leaky_relu" and not negative_slope > 0)


def _pooled_size(size: int, window: int, stride: int, padding: int, ceil_mode: bool) -> int:
    pooled = (size + 2 * padding - window + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window must start inside the input or its left padding.
    if ceil_mode and (pooled - 1) * stride >= size + padding:
        pooled -= 1
    return pooled


def supports(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
    pool: str,
    pool_size: Pair,
    pool_stride: Pair,
    pool_padding: Pair,
    ceil_mode: bool,
) -> str | None:
    """None if the Triton kernels take these arguments, else a sentence saying why not.

    input: (batch, in_channels, height, width); weight: (out_channels, in_channels / groups, R, S).
    Looks at shapes, dtypes and devices only, so fake and meta tensors do.
    """
    if input.dim() != 4 or weight.dim() != 4:
        return "the Triton kernels take a 4-D input and weight"
    if input.dtype not in DTYPES or weight.dtype != input.dtype:
        return (
            "the Triton kernels take float32, bfloat16 and float16, input and weight alike, "
            f"not {input.dtype} and {weight.dtype}"
        )
    if input.device.type == "cpu" and not common.INTERPRET:
        return "the Triton kernels need a GPU (or TRITON_INTERPRET=1)"
    if activation not in ("none", "relu", "leaky_relu") or pool not in ("none", "max", "avg"):
        return f"the Triton kernels do not know activation {activation!r} with pool {pool!r}"
    places = pool_size[0] * pool_size[1]
    if pool == "max" and places > MAX_WINDOW:
        return f"the Triton kernels take max windows of up to {MAX_WINDOW} places, not {places}"
    if pool == "avg" and places > AVG_WINDOW:
        return f"the Triton kernels take average windows of up to {AVG_WINDOW} places, not {places}"
    return None
