"""Convolution, activation and pooling as one module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _arguments as arguments
from ..ops.conv_relu_pool import check_options, conv_relu_pool2d


class ConvReLUPool2d(torch.nn.Conv2d):
    """Convolution, activation and pooling in one pass; see :func:`pyops.conv_relu_pool2d`.

    Parameters, their initialisation and state_dict keys (``weight``, ``bias``) are those of
    :class:`torch.nn.Conv2d`, whose arguments come first.

    Shapes: (N, C, H, W) or (C, H, W) to (N, K, out_h, out_w) or (K, out_h, out_w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        pool: str | None = "max",
        pool_size: int | tuple[int, int] = 2,
        pool_stride: int | tuple[int, int] | None = None,
        pool_padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            padding_mode=padding_mode,  # type: ignore[arg-type]  # torch checks it
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.pool = pool
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding
        self.ceil_mode = ceil_mode
        self.backend = backend
        arguments.backend(backend)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        pooling = (pool, pool_size, pool_stride, pool_padding, ceil_mode)
        check_options(in_channels, self.weight, (*geometry, activation, negative_slope, *pooling))

    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":  # as torch.nn.Conv2d: written out around the input
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        return conv_relu_pool2d(
            input,
            self.weight,
            self.bias,
            stride=self.stride,  # type: ignore[arg-type]  # pairs, whatever torch's stubs say
            padding=padding,
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            activation=self.activation,
            negative_slope=self.negative_slope,
            pool=self.pool,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            ceil_mode=self.ceil_mode,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation}"
        if self.negative_slope != 0.01:
            text += f", negative_slope={self.negative_slope}"
        text += f", pool={self.pool}"
        if self.pool is not None:
            text += f", pool_size={self.pool_size}"
        for name, default in (("pool_stride", None), ("pool_padding", 0), ("ceil_mode", False)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.backend is None else f"{text}, backend={self.backend}"
