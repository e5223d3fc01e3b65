"""lstm: all layers, directions and steps of an LSTM in one call.

The public function checks its arguments, takes a backend and calls that backend's op. The fake, autograd,
autocast and vmap rules, the same for all backends, are in lstm_rules.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import lstm as reference
from ..reference.lstm import LSTMSpec, Variant
from . import _registration as registration
from . import lstm_checks as checks
from ._arguments import facts_of
from ._choice import Plans, choose, settle
from .lstm_checks import Sizes
from .lstm_rules import EagerFunction

_OP = "lstm"
# torch's own LSTM (cuDNN on a GPU): what automatic choice takes where no kernel of ours does.
_TORCH = "torch"

States = tuple[Tensor, Tensor]


def lstm(
    input: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    layer_norm: bool = False,
    zoneout: float | tuple[float, float] = 0.0,
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, States]:
    """An LSTM over a whole sequence, with the semantics of :class:`torch.nn.LSTM`.

    T: steps, B: batch, I: features of the input, H: hidden size, P: proj_size or H, L: layers, D: directions (1 or 2).

    Args:
        input: (T, B, I); with ``batch_first`` (B, T, I); (T, I) unbatched; (total, I), the data of a packed
            sequence, with ``batch_sizes``. float32, bfloat16, float16 or float64; any strides.
        hx: h_0 (L * D, B, P) and c_0 (L * D, B, H), without B if unbatched; None: zeros. Of a packed sequence in the
            order of its rows, longest first.
        weights: for each layer, and in it each direction: w_ih (4 H, I or D * P), w_hh (4 H, P), then with biases
            b_ih and b_hh (4 H,), then with a projection w_hr (P, H), then with ``layer_norm`` the gains (4 H,) of
            W_ih x and of W_hh h and the gain and offset (H,) of the cell. Gates in the order i, f, g, o. dtype
            and device of ``input``.
        num_layers: L, at least 1.
        bidirectional: D = 2; the second direction runs from the last step to the first.
        batch_first: B before T in ``input`` and output; without effect on states and packed sequences.
        dropout: probability of zeroing an output of a layer but the last one, in training.
        training: whether ``dropout`` and ``zoneout`` draw masks.
        layer_norm: normalise the two sums of the gates and the cell; see :func:`pyops.reference.lstm.lstm`.
        zoneout: probability that a unit keeps its value from step to step, of h and c, or a pair (of h, of c).
        batch_sizes: (T,) int64 on the CPU: how many sequences run at each step, as in
            :class:`torch.nn.utils.rnn.PackedSequence`.
        backend: None takes the fastest one proven for these arguments on this device, else torch's own LSTM, else
            ``"reference"``; ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` never fall back. A
            projection, ``layer_norm`` and ``zoneout`` are the reference's alone.

    Returns:
        output, of the input's shape with D * P features, in its dtype and layout, and (h_n, c_n), of the shapes
        of ``hx``. Differentiable to any order.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: an explicit ``backend`` does not exist here or does not take these arguments.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; formulas and further sources in
    :func:`pyops.reference.lstm.lstm`.
    """
    try:
        states = hx
        if isinstance(states, Tensor):
            raise TypeError
        if registration.autocasting(input.device):
            dtype = torch.get_autocast_dtype(input.device.type)
            input = registration.autocast_to(dtype, input)
            weights = [registration.autocast_to(dtype, w) for w in weights]
            if states is not None:
                h0, c0 = states
                states = (registration.autocast_to(dtype, h0), registration.autocast_to(dtype, c0))
        facts = (
            facts_of(input),
            None if states is None else tuple([facts_of(s) for s in states]),
            tuple([facts_of(w) for w in weights]),
        )
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ):  # something is no tensor, or nested
        checks.check_tensors(input, hx, weights)
        raise
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad
        or any([w.requires_grad for w in weights])
        or (states is not None and (states[0].requires_grad or states[1].requires_grad))
    )
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._is_tracing():  # a graph for calls with and without gradients
        needs_grad = True
    batch = None
    if batch_sizes is not None:
        batch = _packed_batch(input, states, batch_sizes, compiling)
    options = (num_layers, bidirectional, batch_first, dropout, training, layer_norm, zoneout)

    def checked() -> _Plan:
        return _plan(input, states, weights, options, batch, backend)

    plan = (
        checked() if compiling else _plans.find((facts, options, batch, backend), options, checked)
    )

    packed, unbatched = batch_sizes is not None, plan.unbatched
    if unbatched:
        input = input.unsqueeze(1)
        states = None if states is None else (states[0].unsqueeze(1), states[1].unsqueeze(1))
    elif batch_first and not packed:
        input = input.transpose(0, 1)
    if states is None:
        states = _zero_states(input, plan, input.shape[1] if batch is None else batch)
    use = plan.backend
    use = settle(use, backend)
    if use == "reference" or (use == _TORCH and compiling):
        output, h, c = reference.lstm(input, *states, weights, batch_sizes, plan.spec, plan.variant)
    elif use == _TORCH:
        output, h, c = _torch_lstm(input, states, weights, batch_sizes, plan)
    else:
        output, h, c = _run(use, input, states, weights, batch_sizes, plan, needs_grad)
    if unbatched:
        return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
    return output.transpose(0, 1) if batch_first and not packed else output, (h, c)


class _Plan(NamedTuple):
    backend: str
    spec: LSTMSpec
    variant: Variant
    sizes: Sizes
    unbatched: bool


_plans = Plans()


def _packed_batch(
    input: Tensor, states: States | None, batch_sizes: Tensor, compiling: bool
) -> int:
    """The number of sequences. While compiling the contents are the op's to check."""
    if compiling and isinstance(batch_sizes, Tensor):
        if states is not None and states[0].dim() == 3:
            return states[0].shape[1]
        return int(batch_sizes[0])
    return checks.check_batch_sizes(batch_sizes, input.shape[0] if input.dim() else 0)


def _plan(
    input: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    options: tuple[Any, ...],
    batch: int | None,
    backend: str | None,
) -> _Plan:
    """Check and normalise everything that does not depend on the tensors' contents."""
    checks.check_tensors(input, states, weights)
    variant = checks.options(*options)
    num_layers, (bidirectional, batch_first) = int(options[0]), options[1:3]
    packed = batch is not None
    checks.check_input(input.shape, packed, batch_first)
    spec, sizes = checks.check_weights(
        input.shape[-1], [w.shape for w in weights], num_layers, bidirectional, variant.layer_norm
    )
    unbatched = not packed and input.dim() == 2
    if states is not None:
        layers = num_layers * (2 if bidirectional else 1)
        if not packed and not unbatched:
            batch = input.shape[0 if batch_first else 1]
        checks.check_states([s.shape for s in states], layers, batch, sizes)
    use = _choose(input, sizes, variant, backend)
    return _Plan(use, spec, variant, sizes, unbatched)


def _choose(
    input: Tensor,
    sizes: Sizes,
    variant: Variant,
    backend: str | None,
) -> str:
    use = choose(
        _OP, input.device, backend, lambda name: _refusal(name, input.dtype, sizes, variant)
    )
    if use is not None:
        return use
    known_to_torch = not variant.layer_norm and not any(variant.zoneout)
    return _TORCH if known_to_torch and input.device.type in ("cpu", "cuda") else "reference"


def _refusal(backend: str, dtype: torch.dtype, sizes: Sizes, variant: Variant) -> str | None:
    """Why `backend` cannot take this call at all, or None."""
    if backend == "reference":
        return None
    if sizes.out != sizes.hidden:
        return "a projection is only in the reference"
    if variant.layer_norm or any(variant.zoneout):
        return "layer_norm and zoneout are only in the reference"
    if dtype == torch.float64:
        return "float64 is only in the reference"
    if backend == "triton":
        from ..triton_kernels import lstm as kernels

        return kernels.supports(sizes.hidden, dtype)
    return None


def _operator(backend: str) -> Any:
    return (torch.ops.pyops.lstm_triton if backend == "triton" else torch.ops.pyops.lstm).default


def _zero_states(input: Tensor, plan: _Plan, batch: Any) -> States:
    layers = plan.spec.num_layers * (2 if plan.spec.bidirectional else 1)
    c0 = input.new_zeros((layers, batch, plan.sizes.hidden))
    if plan.sizes.out == plan.sizes.hidden:
        return c0, c0
    return input.new_zeros((layers, batch, plan.sizes.out)), c0


def _run(
    use: str,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    plan: _Plan,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of backend `use`: once, or once a layer with dropout between the calls."""
    op, (spec, variant) = _operator(use), plan[1:3]
    if not (variant.training and variant.dropout) or spec.num_layers == 1:
        return _call(op, input, *states, weights, batch_sizes, spec, needs_grad)
    directions = 2 if spec.bidirectional else 1
    count = len(weights) // spec.num_layers
    each = spec._replace(num_layers=1)
    last = []
    output = input
    for layer in range(spec.num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        own = weights[layer * count : (layer + 1) * count]
        if layer:
            output = F.dropout(output, variant.dropout, True)
        output, h, c = _call(
            op, output, states[0][rows], states[1][rows], own, batch_sizes, each, needs_grad
        )
        last.append((h, c))
    h, c = (torch.cat(column) for column in zip(*last, strict=True))
    return output, h, c


def _call(
    op: Any,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: LSTMSpec,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.compiler.is_compiling() or registration.needs_registered_op():
        return op(input, h0, c0, list(weights), batch_sizes, *spec, needs_grad)[:3]
    if needs_grad:
        return EagerFunction.apply(op, spec, batch_sizes, input, h0, c0, *weights)
    # past torch's Python autograd wrapper, which would only find nothing to do
    with torch._C._AutoDispatchBelowAutograd():
        return op(input, h0, c0, list(weights), batch_sizes, *spec, False)[:3]


def _torch_lstm(
    input: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    plan: _Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    spec, variant = plan.spec, plan.variant
    rest = (list(weights), spec.has_biases, spec.num_layers, variant.dropout, variant.training)
    if batch_sizes is not None:
        return torch.lstm(input, batch_sizes, states, *rest, spec.bidirectional)
    return torch.lstm(input, states, *rest, spec.bidirectional, False)
