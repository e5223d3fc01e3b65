"""A dense layer and its activation as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import _arguments as arguments
from ..ops.linear_act import linear_act, spec_of


class LinearAct(torch.nn.Linear):
    """Dense layer and activation; see :func:`pyops.linear_act`.

    Parameters, their initialisation and state_dict keys (``weight``, ``bias``) are those of
    :class:`torch.nn.Linear`, whose arguments come first.

    Shapes: (..., in_features) to (..., out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend
        arguments.backend(backend)
        spec_of(activation, negative_slope, self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(
            input,
            self.weight,
            self.bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation}"
        if self.negative_slope != 0.01:
            text += f", negative_slope={self.negative_slope}"
        return text if self.backend is None else f"{text}, backend={self.backend}"
