"""torch.nn.LSTM and LSTMCell over the fused op, with layer normalisation and zoneout besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..ops import _arguments as arguments
from ..ops import lstm_checks as checks
from ..ops.lstm import States, lstm

_NORMS = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")


def _initial(name: str) -> float:
    """Gains start at one, offsets at zero."""
    return float(name.startswith("weight"))


def _add_norms(
    module: torch.nn.Module, hidden_size: int, suffix: str, device: Any, dtype: torch.dtype | None
) -> None:
    for norm in _NORMS:
        size = hidden_size if norm.endswith("_c") else 4 * hidden_size
        value = torch.full((size,), _initial(norm), device=device, dtype=dtype)
        module.register_parameter(f"{norm}{suffix}", torch.nn.Parameter(value))


def _reset_norms(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.startswith(_NORMS):
            torch.nn.init.constant_(parameter, _initial(name))


def _options(module: Any) -> str:
    """What torch's repr does not show."""
    norm = ", layer_norm=True" if module.layer_norm else ""
    return norm + (f", zoneout={module.zoneout}" if module.zoneout else "")


def run(
    call: Callable[..., tuple[Tensor, States]], input: Any, hx: States | None
) -> tuple[Any, States]:
    """`call(data, states, batch_sizes)` for a tensor or a PackedSequence, whose order the states follow."""
    if not isinstance(input, PackedSequence):
        return call(input, hx, None)
    data, batch_sizes, to_sorted, to_unsorted = input
    if to_sorted is not None and hx is not None:
        hx = (hx[0].index_select(1, to_sorted), hx[1].index_select(1, to_sorted))
    output, (h, c) = call(data, hx, batch_sizes)
    if to_unsorted is not None:
        h, c = h.index_select(1, to_unsorted), c.index_select(1, to_unsorted)
    return PackedSequence(output, batch_sizes, to_sorted, to_unsorted), (h, c)


class LSTM(torch.nn.RNNBase):
    """:class:`torch.nn.LSTM` with the same arguments, attributes, parameters and results; see :func:`pyops.lstm`.

    It is no subclass of torch.nn.LSTM, since torch.compile refuses those; state_dicts go both ways.

    Args:
        layer_norm: normalise the sums of the gates and the cell in each step. Adds for each layer and direction
            ``weight_ln_ih`` and ``weight_ln_hh`` (4 * hidden_size,), ``weight_ln_c`` and ``bias_ln_c``
            (hidden_size,), suffixed as torch's weights are.
        zoneout: probability that a unit of (h, c) keeps its value from step to step, or one for each.
        backend: as for :func:`pyops.lstm`; the other arguments are torch's.

    Shapes: (T, B, input_size), with ``batch_first`` (B, T, input_size), (T, input_size) or a PackedSequence, to
    the same with features directions * (proj_size or hidden_size); the states are (layers * directions, B, ...).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        backend: str | None = None,
    ) -> None:
        arguments.backend(backend)
        checks.options(
            *(num_layers, bidirectional, batch_first, dropout, True, layer_norm, zoneout)
        )
        self.layer_norm = layer_norm
        self.zoneout = zoneout
        self.backend = backend
        super().__init__(
            "LSTM",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            *(proj_size, device, dtype),
        )
        if layer_norm:
            for names in self._all_weights:
                _add_norms(self, hidden_size, names[0].removeprefix("weight_ih"), device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_norms(self)

    def weights(self) -> list[Tensor]:
        """The parameters in the order in which :func:`pyops.lstm` takes them."""
        found = []
        for names in self._all_weights:
            found += [getattr(self, name) for name in names]
            if self.layer_norm:
                suffix = names[0].removeprefix("weight_ih")
                found += [getattr(self, f"{norm}{suffix}") for norm in _NORMS]
        return found

    def forward(self, input: Any, hx: States | None = None) -> tuple[Any, States]:
        return run(self._call, input, hx)

    def _call(
        self, input: Tensor, hx: States | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, States]:
        return lstm(
            input,
            hx,
            self.weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            layer_norm=self.layer_norm,
            zoneout=self.zoneout,
            batch_sizes=batch_sizes,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{_options(self)}"


class LSTMCell(torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell`, one step of :func:`pyops.lstm`.

    Args:
        layer_norm: normalise the sums of the gates and the cell. Adds ``weight_ln_ih`` and ``weight_ln_hh``
            (4 * hidden_size,), ``weight_ln_c`` and ``bias_ln_c`` (hidden_size,).
        zoneout: probability that a unit of (h, c) keeps its value, or one for each.
        backend: as for :func:`pyops.lstm`; the other arguments are torch's.

    Shapes: input (B, input_size) or (input_size,); h and c (B, hidden_size) or (hidden_size,).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        backend: str | None = None,
    ) -> None:
        arguments.backend(backend)
        checks.options(1, False, False, 0.0, True, layer_norm, zoneout)
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self.layer_norm = layer_norm
        self.zoneout = zoneout
        self.backend = backend
        if layer_norm:
            _add_norms(self, hidden_size, "", device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_norms(self)

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        if input.dim() not in (1, 2):
            raise ValueError(
                "input: expected 1 or 2 dimensions, (input_size,) or (batch, input_size), "
                f"got {tuple(input.shape)}"
            )
        weights = [self.weight_ih, self.weight_hh]
        if self.bias:
            weights += [self.bias_ih, self.bias_hh]
        if self.layer_norm:
            weights += [getattr(self, norm) for norm in _NORMS]
        states = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        _, (h, c) = lstm(
            input.unsqueeze(0),
            states,
            weights,
            training=self.training,
            layer_norm=self.layer_norm,
            zoneout=self.zoneout,
            backend=self.backend,
        )
        return h.squeeze(0), c.squeeze(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{_options(self)}"
