"""Convolution, activation and pooling as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.conv_relu_pool import conv_relu_pool2d


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

    def forward(self, input: Tensor) -> Tensor:
        return conv_relu_pool2d(
            input,
            self.weight,
            self.bias,
            stride=self.stride,  # type: ignore[arg-type]  # pairs, whatever torch's stubs say
            padding=self.padding,  # type: ignore[arg-type]
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
        window = "" if self.pool is None else f", pool_size={self.pool_size}"
        return f"{super().extra_repr()}, activation={self.activation}, pool={self.pool}{window}"
