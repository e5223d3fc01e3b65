"""Calls of the CUDA convolution on the emulator, with poison around every tensor."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn import grad as nn_grad

from build import HERE, ROOT, Emulated
from pyops.reference.conv_relu_pool import (
    ConvPoolSpec,
    Expansion,
    conv_extents,
    pool_extents,
    stores_codes,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What products are rounded to, and the tensors' type.
PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "exact": torch.float32,
}
CUDA = ROOT / "csrc" / "cuda"
GENERIC = ("tile", "mma", "fma", "expand", "grad_input", "grad_weight")
SOURCES = [
    HERE / "conv_relu_pool_entry.cpp",
    *(CUDA / f"conv_relu_pool_{part}.cu" for part in GENERIC),
    *sorted(CUDA.glob("conv_relu_pool_wgmma*.cu")),
]
_MARGIN = 256  # elements of poison before and after a tensor
_MULTIPROCESSORS = 2


def spec_of(
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    activation="relu",
    slope=0.01,
    pool="max",
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    ceil_mode=False,
) -> ConvPoolSpec:
    def pair(value):
        return (value, value) if isinstance(value, int) else tuple(value)

    window = (pair(pool_size), pair(pool_stride or pool_size), pair(pool_padding), ceil_mode)
    if pool == "none":
        window = ((1, 1), (1, 1), (0, 0), False)
    return ConvPoolSpec(
        pair(stride), pair(padding), pair(dilation), groups, activation, slope, pool, *window
    )


def plain(x, w, b, spec: ConvPoolSpec):
    """(convolution with bias, result) in plain torch."""
    before = F.conv2d(x, w, b, spec.stride, spec.padding, spec.dilation, spec.groups)
    out = before
    if spec.activation == "relu":
        out = F.relu(out)
    elif spec.activation == "leaky_relu":
        out = F.leaky_relu(out, spec.negative_slope)
    window = (spec.pool_size, spec.pool_stride, spec.pool_padding)
    if spec.pool == "max":
        out = F.max_pool2d(out, *window, ceil_mode=spec.ceil_mode)
    elif spec.pool == "avg":
        out = F.avg_pool2d(out, *window, ceil_mode=spec.ceil_mode)
    return before, out


def plain_gradients(x, w, grad, selector, spec, rounded=lambda t: t):
    """Of input, weight and bias in plain torch; operands of products `rounded`."""
    dense = Expansion(selector, spec, conv_extents(x.shape, w.shape, spec)).expand(grad)
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups)
    x, w, operand = rounded(x), rounded(w), rounded(dense)
    return (
        nn_grad.conv2d_input(x.shape, w, operand, *geometry),
        nn_grad.conv2d_weight(x, w.shape, operand, *geometry),
        dense.sum((0, 2, 3)),
    )


def to_tf32(t):
    """Rounded to 10 bits of mantissa, to nearest, ties away from zero."""
    bits = t.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)


class Poisoned(NamedTuple):
    tensor: torch.Tensor
    buffer: torch.Tensor

    @classmethod
    def make(cls, shape, strides, dtype, offset=0) -> Poisoned:
        """A tensor within poison: NaN, or 0x55 in bytes; `offset` elements off the alignment of 16 bytes."""
        poison = 0x55 if dtype == torch.uint8 else float("nan")
        extent = sum((s - 1) * step for s, step in zip(shape, strides, strict=True)) + 1
        raw = torch.full((extent + 2 * _MARGIN + 16,), poison, dtype=dtype)
        start = _MARGIN + (-(raw.data_ptr() // dtype.itemsize) - _MARGIN) % 16 + offset
        return cls(raw.as_strided(shape, strides, start), raw)

    @classmethod
    def copy(cls, tensor, offset=0) -> Poisoned:
        made = cls.make(tensor.shape, tensor.stride(), tensor.dtype, offset)
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
        made.tensor[once].copy_(tensor[once])  # an expanded axis lies there once
        return made

    def only_inside_written(self) -> bool:
        outside = torch.ones(self.buffer.shape, dtype=torch.bool)
        start = (self.tensor.data_ptr() - self.buffer.data_ptr()) // self.buffer.element_size()
        outside.as_strided(self.tensor.shape, self.tensor.stride(), start).fill_(False)
        rest = self.buffer[outside]
        return bool((rest == 0x55).all() if rest.dtype == torch.uint8 else rest.isnan().all())


def dense_strides(shape, channels_last):
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def sizes_of(x, w, spec: ConvPoolSpec, out, tf32, capability=80):
    conv_size = conv_extents(x.shape, w.shape, spec)
    fields = [
        *(*x.shape, w.shape[0], *w.shape[2:], *spec.stride, *spec.padding, *spec.dilation),
        *(spec.groups, *conv_size, *spec.pool_size, *spec.pool_stride, *spec.pool_padding),
        *(*out.shape[2:], *x.stride(), *out.stride()),
        ("none", "relu", "leaky_relu").index(spec.activation),
        ("none", "max", "avg").index(spec.pool),
        DTYPES.index(x.dtype),
        int(tf32),
        capability,
        _MULTIPROCESSORS,
    ]
    return (ctypes.c_int64 * len(fields))(*fields)


def forward(
    library: Emulated,
    x,
    w,
    b,
    spec: ConvPoolSpec,
    *,
    codes=False,
    tf32=False,
    offset=0,
    **how,
):
    """(output, codes or None) of the emulated kernels; x as it lies, the output in x's format."""
    shape = (x.shape[0], w.shape[0], *pool_extents(conv_extents(x.shape, w.shape, spec), spec))
    channels_last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    strides = dense_strides(shape, channels_last)
    out = Poisoned.make(shape, strides, x.dtype, offset)
    coded = Poisoned.make(shape, strides, torch.uint8, offset)
    inputs = Poisoned.copy(x, offset)
    # (out_channels, kernel_h, kernel_w, channels), as the op hands it on
    weights = Poisoned.copy(w.permute(0, 2, 3, 1).contiguous(), offset)
    biases = None if b is None else Poisoned.copy(b)
    codes = codes and stores_codes(spec)
    library.call(
        "conv_relu_pool_forward",
        sizes_of(inputs.tensor, w, spec, out.tensor, tf32),
        spec.negative_slope,
        inputs.tensor,
        weights.tensor,
        None if biases is None else biases.tensor,
        out.tensor,
        coded.tensor if codes else None,
        **how,
    )
    assert out.only_inside_written() and coded.only_inside_written()
    return out.tensor, coded.tensor if codes else None


def gradients(
    library: Emulated,
    x,
    w,
    grad,
    selector,
    spec: ConvPoolSpec,
    *,
    tf32=False,
    offset=0,
    wanted=(True, True, True),
    expand=False,
    capability=80,
    **how,
):
    """Gradients of input (as it lies), weight and bias, None where not `wanted`.

    selector: codes, or the output, or None. expand: as where Hopper's convolution has to be given
    the expanded gradient.
    """

    def last(t):
        return Poisoned.copy(t.contiguous(memory_format=torch.channels_last), offset).tensor

    inputs = Poisoned.copy(x, offset)
    weights = Poisoned.copy(w.permute(0, 2, 3, 1).contiguous(), offset).tensor
    results = [
        Poisoned.make(t, s, x.dtype, offset) if want else None
        for want, t, s in zip(
            wanted,
            (x.shape, w.shape, w.shape[:1]),
            (x.stride(), w.stride(), (1,)),
            strict=True,
        )
    ]
    sizes = sizes_of(inputs.tensor, w, spec, grad, tf32, capability)
    size = library.library.conv_relu_pool_workspace
    size.restype = ctypes.c_int64
    workspace = Poisoned.make((size(sizes) // 4 + 1,), (1,), torch.float32)
    grad = last(grad)
    coded = selector is not None and selector.dtype == torch.uint8
    expanded = None
    if expand or needs_expanded(library, sizes, wanted[0]):
        shape = (x.shape[0], w.shape[0], *conv_extents(x.shape, w.shape, spec))
        expanded = Poisoned.make(shape, dense_strides(shape, True), x.dtype)
    unchanged = spec.pool == "none" and spec.activation == "none"
    library.call(
        "conv_relu_pool_gradients",
        sizes,
        spec.negative_slope,
        grad,
        last(selector) if coded else None,
        last(selector) if selector is not None and not coded else None,
        inputs.tensor,
        weights,
        grad if unchanged else expanded and expanded.tensor,
        *(result and result.tensor for result in results),
        workspace.tensor,
        **how,
    )
    for each in (*results, expanded, workspace):
        assert each is None or each.only_inside_written()
    return tuple(result and result.tensor for result in results)


def needs_expanded(library: Emulated, sizes, grad_input: bool) -> bool:
    function = library.library.conv_relu_pool_needs_expanded
    function.restype = ctypes.c_bool
    return function(sizes, ctypes.c_bool(grad_input))
