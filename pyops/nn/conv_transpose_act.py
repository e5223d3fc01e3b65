"""Transposed convolution, affine map and activation as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import _arguments as arguments
from ..ops.conv_transpose_act import check_options, conv_transpose2d_act


class ConvTranspose2dAct(torch.nn.ConvTranspose2d):
    """Transposed convolution and activation in one pass; see :func:`pyops.conv_transpose2d_act`.

    Parameters, their initialisation and state_dict keys (``weight``, ``bias``) are those of
    :class:`torch.nn.ConvTranspose2d`, whose arguments come first; its ``output_size`` works too.

    Shapes: (N, C, H, W) or (C, H, W) to (N, K, out_h, out_w) or (K, out_h, out_w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, output_padding),
            *(groups, bias, dilation),
            padding_mode=padding_mode,  # type: ignore[arg-type]  # torch refuses all but "zeros"
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend
        arguments.backend(backend)
        geometry = (self.stride, self.padding, self.output_padding, self.dilation, self.groups)
        check_options(in_channels, self.weight, (*geometry, activation, negative_slope))

    def forward(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """``scale`` and ``shift``, (K,) or None, are those of the op: a folded batch normalisation."""
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {self.padding_mode!r}")
        output_padding: Any = self.output_padding
        if output_size is not None:
            output_padding = tuple(
                self._output_padding(
                    *(input, output_size, self.stride, self.padding, self.kernel_size),  # type: ignore[arg-type]
                    *(2, self.dilation),  # type: ignore[arg-type]  # pairs, whatever torch's stubs say
                )
            )
        return conv_transpose2d_act(
            input,
            self.weight,
            self.bias,
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            output_padding=output_padding,
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            activation=self.activation,
            negative_slope=self.negative_slope,
            scale=scale,
            shift=shift,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation}"
        if self.negative_slope != 0.01:
            text += f", negative_slope={self.negative_slope}"
        return text if self.backend is None else f"{text}, backend={self.backend}"
