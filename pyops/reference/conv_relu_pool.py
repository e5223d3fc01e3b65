"""conv_relu_pool2d in plain torch, and the calculus of its codes (differentiable to any order)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ConvPoolSpec(NamedTuple):
    """Everything but tensors, normalised."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str  # "relu", "leaky_relu", "none"
    negative_slope: float
    pool: str  # "max", "avg", "none"
    pool_size: tuple[int, int]
    pool_stride: tuple[int, int]
    pool_padding: tuple[int, int]
    ceil_mode: bool

    def flat(self) -> tuple[Any, ...]:
        """In the order of the op's schema, which has two scalars for each pair."""
        return (
            *(*self.stride, *self.padding, *self.dilation, self.groups),
            *(self.activation, self.negative_slope, self.pool),
            *(*self.pool_size, *self.pool_stride, *self.pool_padding, self.ceil_mode),
        )

    @classmethod
    def from_flat(cls, a: Sequence[Any]) -> ConvPoolSpec:
        """The inverse of `flat`."""
        stride, padding, dilation = (a[0], a[1]), (a[2], a[3]), (a[4], a[5])
        groups, activation, slope, pool = a[6:10]
        size, pool_stride, pool_padding = (a[10], a[11]), (a[12], a[13]), (a[14], a[15])
        return cls(
            *(stride, padding, dilation, groups, activation, slope),
            *(pool, size, pool_stride, pool_padding, a[16]),
        )


def stores_codes(spec: ConvPoolSpec) -> bool:
    """Whether backward needs codes; if not, the output's sign (or nothing) is enough."""
    if spec.pool != "none":
        return True
    return spec.activation == "leaky_relu" and not spec.negative_slope > 0


def codes_fit(spec: ConvPoolSpec) -> bool:
    """Whether one byte per output can describe the pool's window."""
    places = spec.pool_size[0] * spec.pool_size[1]
    return spec.pool == "none" or places <= (128 if spec.pool == "max" else 8)


def conv_extents(
    input_shape: Sequence[int], weight_shape: Sequence[int], spec: ConvPoolSpec
) -> tuple[int, int]:
    """(conv_h, conv_w): extent of the convolution's own output; below 1 if the kernel does not fit."""

    def extent(i: int) -> int:
        span = spec.dilation[i] * (weight_shape[2 + i] - 1) + 1
        return (input_shape[-2 + i] + 2 * spec.padding[i] - span) // spec.stride[i] + 1

    return extent(0), extent(1)


def pool_extents(conv_size: tuple[int, int], spec: ConvPoolSpec) -> tuple[int, int]:
    """(out_h, out_w) after the pool, with torch's rule for ceil_mode; below 1 if the window does not fit."""

    def extent(i: int) -> int:
        stride, pad = spec.pool_stride[i], spec.pool_padding[i]
        room = conv_size[i] + 2 * pad - spec.pool_size[i]
        if not spec.ceil_mode:
            return room // stride + 1
        out = -(-room // stride) + 1
        # no window may start in the padding at the far side
        return out - 1 if (out - 1) * stride >= conv_size[i] + pad else out

    return extent(0), extent(1)


def conv_relu_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvPoolSpec
) -> Tensor:
    """pool(activation(conv2d(input, weight) + bias)); input (N, C, H, W) or (C, H, W)."""
    out = F.conv2d(input, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    if spec.activation == "relu":
        out = F.relu(out, inplace=True)  # nothing else has it, and no derivative needs it
    elif spec.activation == "leaky_relu":
        out = F.leaky_relu(out, spec.negative_slope)
    pooling = (spec.pool_size, spec.pool_stride, spec.pool_padding)
    if spec.pool == "max":
        out = F.max_pool2d(out, *pooling, ceil_mode=spec.ceil_mode)
    elif spec.pool == "avg":
        out = F.avg_pool2d(out, *pooling, ceil_mode=spec.ceil_mode)
    return out


def passes_whole(pre_activation: Tensor, spec: ConvPoolSpec) -> Tensor:
    """Where the activation passes the gradient unchanged, as torch's own backward has it."""
    if spec.activation == "relu":
        return ~(pre_activation <= 0)
    if spec.activation == "leaky_relu":
        return pre_activation > 0
    return torch.ones_like(pre_activation, dtype=torch.bool)


def _window_places(
    spec: ConvPoolSpec, conv_size: Sequence[int], out_size: Sequence[int]
) -> Iterator[tuple[int, Any, Any]]:
    """For each place of the window: (bit, slice of outputs, slice of conv elements) that meet."""

    def along(extent: int, outs: int, stride: int, pad: int, offset: int) -> tuple[slice, slice]:
        first = max(0, -(-(pad - offset) // stride))
        last = min(outs, (extent - 1 + pad - offset) // stride + 1)
        start = first * stride - pad + offset
        return slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)

    for y in range(spec.pool_size[0]):
        outs_y, conv_y = along(
            conv_size[0], out_size[0], spec.pool_stride[0], spec.pool_padding[0], y
        )
        for x in range(spec.pool_size[1]):
            outs_x, conv_x = along(
                conv_size[1], out_size[1], spec.pool_stride[1], spec.pool_padding[1], x
            )
            if outs_y.start < outs_y.stop and outs_x.start < outs_x.stop:
                yield y * spec.pool_size[1] + x, (..., outs_y, outs_x), (..., conv_y, conv_x)


def make_codes(pre_activation: Tensor, spec: ConvPoolSpec) -> Tensor:
    """Codes (uint8, output's shape) for a convolution's output (N, K, conv_h, conv_w).

    max: bits 0-6 the winner's place in its window (y * pool_w + x, from the unclipped corner), bit 7
    set if it passes the gradient whole; avg: one bit a place; none: bit 0.
    """
    whole = passes_whole(pre_activation, spec)
    if spec.pool == "none":
        return whole.to(torch.uint8)
    activated = pre_activation
    if spec.activation == "relu":
        activated = F.relu(pre_activation)
    elif spec.activation == "leaky_relu":
        activated = F.leaky_relu(pre_activation, spec.negative_slope)
    if spec.pool == "max":
        _, index = F.max_pool2d(
            activated,
            spec.pool_size,
            spec.pool_stride,
            spec.pool_padding,
            ceil_mode=spec.ceil_mode,
            return_indices=True,
        )
        conv_w = pre_activation.shape[3]
        corner_y, corner_x = _window_corners(spec, index)
        place = (index // conv_w - corner_y) * spec.pool_size[1] + (index % conv_w - corner_x)
        won = whole.flatten(2).gather(2, index.flatten(2)).view_as(index)
        return (place + 128 * won).to(torch.uint8)
    pooled = F.avg_pool2d(
        activated, spec.pool_size, spec.pool_stride, spec.pool_padding, ceil_mode=spec.ceil_mode
    )
    codes = torch.zeros_like(pooled, dtype=torch.uint8)
    for bit, outs, elements in _window_places(spec, pre_activation.shape[2:], pooled.shape[2:]):
        codes[outs] |= whole[elements].to(torch.uint8) << bit
    return codes


def _window_corners(spec: ConvPoolSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(like.shape[2], device=like.device)
    columns = torch.arange(like.shape[3], device=like.device)
    y = rows[:, None] * spec.pool_stride[0] - spec.pool_padding[0]
    return y, columns[None, :] * spec.pool_stride[1] - spec.pool_padding[1]


class Expansion:
    """The linear map between the output's gradient and the gradient before activation and pool.

    `selector` is the op's codes, or its output where :func:`stores_codes` is false. Both maps are
    plain differentiable torch; conv_size is (conv_h, conv_w).
    """

    def __init__(self, selector: Tensor, spec: ConvPoolSpec, conv_size: tuple[int, int]) -> None:
        self.spec = spec
        self.conv_size = conv_size
        self.whole: Tensor | None = None  # None: the activation passes everything
        if spec.pool == "max":
            corner_y, corner_x = _window_corners(spec, selector)
            place = (selector & 127).long()
            y = corner_y + place // spec.pool_size[1]
            x = corner_x + place % spec.pool_size[1]
            self.out_size = selector.shape[2:]
            self.index = (y * conv_size[1] + x).flatten(2)
            self.whole = selector >= 128
        elif spec.pool == "avg":
            whole = selector.new_zeros((*selector.shape[:2], *conv_size), dtype=torch.bool)
            for bit, outs, elements in _window_places(spec, conv_size, selector.shape[2:]):
                whole[elements] |= (selector[outs] >> bit) & 1 != 0
            self.whole = whole
        elif stores_codes(spec):
            self.whole = selector != 0
        elif spec.activation != "none":
            self.whole = passes_whole(selector, spec)

    def _damp(self, values: Tensor) -> Tensor:
        if self.spec.activation == "none" or self.whole is None:
            return values
        if self.spec.activation == "relu":
            return values.masked_fill(~self.whole, 0.0)
        return torch.where(self.whole, values, values * self.spec.negative_slope)

    def expand(self, grad: Tensor) -> Tensor:
        """Gradient of the output (N, K, out_h, out_w) to that of the convolution (N, K, conv_h, conv_w)."""
        if self.spec.pool == "none":
            return self._damp(grad)
        if self.spec.pool == "max":
            plane = grad.new_zeros((*grad.shape[:2], self.conv_size[0] * self.conv_size[1]))
            plane = plane.scatter_add(2, self.index, self._damp(grad).flatten(2))
            return plane.view(*grad.shape[:2], *self.conv_size)
        spec = self.spec
        like = grad.new_zeros((*grad.shape[:2], *self.conv_size))
        spread = torch.ops.aten.avg_pool2d_backward(
            grad,
            like,
            spec.pool_size,
            spec.pool_stride,
            spec.pool_padding,
            spec.ceil_mode,
            True,
            None,
        )
        return self._damp(spread)

    def reduce(self, values: Tensor) -> Tensor:
        """The transposed map: (N, K, conv_h, conv_w) to (N, K, out_h, out_w)."""
        if self.spec.pool == "none":
            return self._damp(values)
        if self.spec.pool == "max":
            taken = values.flatten(2).gather(2, self.index)
            return self._damp(taken.view(*values.shape[:2], *self.out_size))
        spec = self.spec
        return F.avg_pool2d(
            self._damp(values), spec.pool_size, spec.pool_stride, spec.pool_padding, spec.ceil_mode
        )
