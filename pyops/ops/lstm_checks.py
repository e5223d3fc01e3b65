"""Checks of lstm's arguments, with messages that name the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.lstm import LSTMSpec, Variant
from . import _arguments as arguments

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_NORM_NAMES = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")


class Sizes(NamedTuple):
    """hidden: units of a cell; out: features of h, proj_size or hidden."""

    hidden: int
    out: int


def check_tensors(input: Any, hx: Any, weights: Any) -> None:
    """Types, dtypes and devices."""
    arguments.floating_tensor("input", input)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected a list of tensors, got {type(weights).__name__}")
    others = [(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    if hx is not None:
        if not isinstance(hx, (list, tuple)) or len(hx) != 2:
            what = f"{len(hx)} of them" if isinstance(hx, (list, tuple)) else type(hx).__name__
            raise TypeError(f"hx: expected None or a pair of tensors (h_0, c_0), got {what}")
        others += [("hx[0]", hx[0]), ("hx[1]", hx[1])]
    for name, value in others:
        arguments.floating_tensor(name, value)
        arguments.like(name, value, "input", input)


def check_batch_sizes(batch_sizes: Any, total: int) -> int:
    """Raises unless these are the batch sizes of `total` packed rows; the first, which is the batch."""
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(
            f"batch_sizes: expected None or a torch.Tensor, got {type(batch_sizes).__name__}"
        )
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise TypeError(
            "batch_sizes: expected dtype torch.int64 on the CPU, got "
            f"{batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.dim() != 1 or batch_sizes.shape[0] == 0:
        raise ValueError(
            f"batch_sizes: expected shape (steps,), one step at least, got {tuple(batch_sizes.shape)}"
        )
    sizes = batch_sizes.tolist()
    if sizes[-1] < 1 or any(a < b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"batch_sizes: expected positive numbers that never grow, got {sizes}")
    if sum(sizes) != total:
        raise ValueError(
            f"batch_sizes: expected a sum of {total}, the input's rows, got {sum(sizes)}"
        )
    return sizes[0]


def options(
    num_layers: Any,
    bidirectional: Any,
    batch_first: Any,
    dropout: Any,
    training: Any,
    layer_norm: Any,
    zoneout: Any,
) -> Variant:
    num_layers = arguments.integer("num_layers", num_layers)
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    flags = {
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "training": training,
        "layer_norm": layer_norm,
    }
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")
    both = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if len(both) != 2:
        raise TypeError(f"zoneout: expected a number or a pair (of h, of c), got {zoneout!r}")
    for name, value, given in (
        ("dropout", dropout, dropout),
        *(("zoneout", value, zoneout) for value in both),
    ):
        if not 0 <= arguments.number(name, value) <= 1:
            raise ValueError(f"{name}: expected a probability between 0 and 1, got {given!r}")
    return Variant(float(dropout), training, layer_norm, (float(both[0]), float(both[1])))


def check_weights(
    features: int, shapes: Sequence[torch.Size], num_layers: int, bidirectional: bool, norms: bool
) -> tuple[LSTMSpec, Sizes]:
    """Whether the weights fit each other and an input of `features`."""
    directions = 2 if bidirectional else 1
    count, rest = divmod(len(shapes), num_layers * directions)
    usual = count - (len(_NORM_NAMES) if norms else 0)
    if rest or usual not in (2, 3, 4, 5):
        kinds = "2 (4 with biases, one more with a projection" + (
            ", 4 more for layer_norm)" if norms else ")"
        )
        raise ValueError(
            f"weights: expected {kinds} for each of {num_layers} layers and {directions} directions, "
            f"got {len(shapes)} tensors"
        )  # fmt: skip
    has_biases, projected = usual >= 4, usual % 2 == 1
    if len(shapes[0]) != 2 or shapes[0][0] < 4 or shapes[0][0] % 4:
        raise ValueError(
            f"weights[0] (weight_ih_l0): expected shape (4 * hidden_size, {features}), "
            f"got {tuple(shapes[0])}"
        )
    hidden = shapes[0][0] // 4
    out = hidden
    if projected:
        at = 4 if has_biases else 2
        if len(shapes[at]) != 2 or not 1 <= shapes[at][0] < hidden:
            raise ValueError(
                f"weights[{at}] (weight_hr_l0, which {usual} tensors a layer and direction mean, of {len(shapes)} in "
                f"all): expected shape (proj_size, {hidden}) with a proj_size from 1 to {hidden - 1}, got "
                f"{tuple(shapes[at])}"
            )
        out = shapes[at][0]
    names = [*_NAMES[: 4 if has_biases else 2], *(_NAMES[4:] if projected else ())]
    for cell in range(num_layers * directions):
        layer, direction = divmod(cell, directions)
        expected = {
            "weight_ih": (4 * hidden, features if layer == 0 else directions * out),
            "weight_hh": (4 * hidden, out),
            "bias_ih": (4 * hidden,),
            "bias_hh": (4 * hidden,),
            "weight_hr": (out, hidden),
            "weight_ln_ih": (4 * hidden,),
            "weight_ln_hh": (4 * hidden,),
            "weight_ln_c": (hidden,),
            "bias_ln_c": (hidden,),
        }
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        for place, name in enumerate((*names, *(_NORM_NAMES if norms else ()))):
            index = cell * count + place
            if tuple(shapes[index]) != expected[name]:
                raise ValueError(
                    f"weights[{index}] ({name}{suffix}): expected shape {expected[name]}, "
                    f"got {tuple(shapes[index])}"
                )
    return LSTMSpec(has_biases, num_layers, bidirectional), Sizes(hidden, out)


def check_input(shape: torch.Size, packed: bool, batch_first: bool) -> None:
    if packed and len(shape) != 2:
        raise ValueError(
            f"input: expected 2 dimensions (total, features) with batch_sizes, got {tuple(shape)}"
        )
    if len(shape) not in (2, 3):
        raise ValueError(
            "input: expected 2 or 3 dimensions, (T, I) or "
            f"{'(B, T, I)' if batch_first else '(T, B, I)'}, got {tuple(shape)}"
        )
    steps = shape[1] if batch_first and len(shape) == 3 and not packed else shape[0]
    if steps == 0:
        raise ValueError(f"input: expected one time step at least, got {tuple(shape)}")
    if shape[-1] == 0:
        raise ValueError(f"input: expected one feature at least, got {tuple(shape)}")


def check_states(
    shapes: Sequence[torch.Size], layers: int, batch: int | None, sizes: Sizes
) -> None:
    """The states of `layers` layers and directions; `batch` None: of an unbatched input."""
    for index, features in enumerate((sizes.out, sizes.hidden)):
        expected = (layers, features) if batch is None else (layers, batch, features)
        if tuple(shapes[index]) != expected:
            name = ("h_0", "c_0")[index]
            raise ValueError(
                f"hx[{index}] ({name}): expected shape {expected}, got {tuple(shapes[index])}"
            )
