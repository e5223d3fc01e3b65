"""LSTM in plain torch: a loop over the steps, the oracle of the kernels, with the options that only it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5


class LSTMSpec(NamedTuple):
    """Everything but tensors, normalised, in the order of the op's schema."""

    has_biases: bool
    num_layers: int
    bidirectional: bool


class Variant(NamedTuple):
    """What the kernels do not have.

    dropout: between layers, in training; zoneout: probabilities that a unit of (h, c) keeps its value.
    """

    dropout: float = 0.0
    training: bool = False
    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)


class Cell(NamedTuple):
    """The weights of one layer and direction; gates in the order i, f, g, o."""

    w_ih: Tensor  # (4 H, features)
    w_hh: Tensor  # (4 H, P), P = proj_size or H
    b_ih: Tensor | None  # (4 H,)
    b_hh: Tensor | None  # (4 H,)
    w_hr: Tensor | None  # (P, H)
    ln_ih: Tensor | None  # (4 H,)
    ln_hh: Tensor | None  # (4 H,)
    ln_c: Tensor | None  # (H,)
    ln_c_bias: Tensor | None  # (H,)


def cells(weights: Sequence[Tensor], spec: LSTMSpec, layer_norm: bool) -> list[Cell]:
    """The flat list of weights, cell by cell: w_ih, w_hh[, b_ih, b_hh][, w_hr][, the four of layer norm]."""
    count = len(weights) // (spec.num_layers * (2 if spec.bidirectional else 1))
    norms = 4 if layer_norm else 0
    biases = 2 if spec.has_biases else 0
    projected = count - 2 - biases - norms > 0
    result = []
    for first in range(0, len(weights), count):
        one = weights[first : first + count]
        b_ih, b_hh = one[2:4] if biases else (None, None)
        w_hr = one[2 + biases] if projected else None
        own_norms = one[-4:] if norms else (None,) * 4
        result.append(Cell(one[0], one[1], b_ih, b_hh, w_hr, *own_norms))
    return result


def lies_batch_major(input: Tensor) -> bool:
    """The op's rule for the layout of its results; csrc/cpu/lstm.cpp has the same."""
    return input.dim() == 3 and bool(input.stride(0) < input.stride(1))


def lstm(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: LSTMSpec,
    variant: Variant = Variant(),  # noqa: B008  # immutable
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of input (T, B, I), or (total, I) packed with batch_sizes (T,).

    For each step, with σ the logistic function and ⊙ the product of elements::

        i, f, g, o = W_ih x + b_ih + W_hh h + b_hh
        c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)
        h' = σ(o) ⊙ tanh(c')                      proj_size: h' = W_hr (σ(o) ⊙ tanh(c'))

    which is Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, with the forget gate of Gers et al., 2000,
    and the projection of Sak et al., 2014.

    ``layer_norm`` is Ba, Kiros and Hinton, "Layer Normalization", 2016, equations 20 to 22, where LN subtracts the
    mean and divides by sqrt(variance + 1e-5), over all 4 H gates or all H cells; its gate offsets would only
    add to the biases and are left out::

        i, f, g, o = ln_ih ⊙ LN(W_ih x) + b_ih + ln_hh ⊙ LN(W_hh h) + b_hh
        h' = σ(o) ⊙ tanh(ln_c ⊙ LN(c') + ln_c_bias)

    ``zoneout`` is Krueger et al., "Zoneout", 2016: with masks m of zeros and ones, one with the given probability,
    drawn for each unit and step in training, and replaced by that probability otherwise::

        h'' = m_h ⊙ h + (1 - m_h) ⊙ h'            c'' = m_c ⊙ c + (1 - m_c) ⊙ c'
    """
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    directions = 2 if spec.bidirectional else 1
    every = cells(weights, spec, variant.layer_norm)
    layer_input = input
    last_h, last_c = [], []
    for layer in range(spec.num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            output, h, c = _run_cell(
                layer_input, h0[index], c0[index], every[index], sizes, direction == 1, variant
            )
            outputs.append(output)
            last_h.append(h)
            last_c.append(c)
        layer_input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if variant.training and variant.dropout and layer < spec.num_layers - 1:
            layer_input = F.dropout(layer_input, variant.dropout, True)
    if lies_batch_major(input):
        layer_input = layer_input.transpose(0, 1).contiguous().transpose(0, 1)
    return layer_input, torch.stack(last_h), torch.stack(last_c)


def _run_cell(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    cell: Cell,
    sizes: list[int] | None,
    reverse: bool,
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction: (output, last h, last c)."""
    if cell.ln_ih is None:
        projected = F.linear(input, cell.w_ih, cell.b_ih)
    else:
        projected = _normalise(F.linear(input, cell.w_ih), cell.ln_ih, cell.b_ih)
    steps = list(projected.unbind(0) if sizes is None else projected.split(sizes))
    outputs = []
    first_h, first_c = h, c
    finished: list[tuple[Tensor, Tensor]] = []
    if reverse and sizes is not None:
        h, c = h[: sizes[-1]], c[: sizes[-1]]
    for gates in reversed(steps) if reverse else steps:
        running, wanted = h.shape[0], gates.shape[0]
        if sizes is not None and wanted < running:
            finished.append((h[wanted:], c[wanted:]))
            h, c = h[:wanted], c[:wanted]
        elif sizes is not None and wanted > running:
            h = torch.cat((h, first_h[running:wanted]))
            c = torch.cat((c, first_c[running:wanted]))
        h, c = step(gates, h, c, cell, variant)
        outputs.append(h)
    if reverse:
        outputs.reverse()
    if finished:
        ended_h, ended_c = zip(*reversed(finished), strict=True)
        h, c = torch.cat((h, *ended_h)), torch.cat((c, *ended_c))
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), h, c


def step(
    input_gates: Tensor, h: Tensor, c: Tensor, cell: Cell, variant: Variant
) -> tuple[Tensor, Tensor]:
    """One step: (h, c) after it. input_gates: (B, 4 H), what the input adds to the gates."""
    if cell.ln_hh is None:
        gates = input_gates + F.linear(h, cell.w_hh, cell.b_hh)
    else:
        gates = input_gates + _normalise(F.linear(h, cell.w_hh), cell.ln_hh, cell.b_hh)
    i, f, g, o = gates.chunk(4, 1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    shown = new_c if cell.ln_c is None else _normalise(new_c, cell.ln_c, cell.ln_c_bias)
    new_h = o.sigmoid() * shown.tanh()
    if cell.w_hr is not None:
        new_h = F.linear(new_h, cell.w_hr)
    keep_h, keep_c = variant.zoneout
    return (
        _zone_out(h, new_h, keep_h, variant.training),
        _zone_out(c, new_c, keep_c, variant.training),
    )


def _normalise(values: Tensor, gain: Tensor, offset: Tensor | None) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], gain, offset, LAYER_NORM_EPS)


def _zone_out(old: Tensor, new: Tensor, probability: float, training: bool) -> Tensor:
    if probability == 0:
        return new
    if training:
        return torch.where(torch.rand_like(new) < probability, old, new)
    return probability * old + (1 - probability) * new
