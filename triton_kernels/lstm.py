"""An LSTM by persistent kernels, one launch a layer, and torch's own products for all steps at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from . import common
from .common import Config
from .lstm_kernels import lstm_backward_kernel, lstm_forward_kernel

__all__ = ["backward", "forward", "supports"]

# Units whose recurrent weights (4 H, H) fit the shared memory of one multiprocessor.
MOST_UNITS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}


def supports(hidden: int, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for this hidden size and dtype, or None."""
    most = MOST_UNITS.get(dtype)
    if most is None:
        return f"dtype {dtype} has no Triton kernel"
    if hidden > most:
        return f"the recurrent weights of more than {most} units in {dtype} do not fit one multiprocessor"
    return None


class _Geometry(NamedTuple):
    """Sizes, and where the row of (step, sequence) is: t * stride_t + b * stride_b, or offsets[t] + b if packed."""

    steps: int
    batch: int
    rows: int
    hidden: int
    directions: int
    stride_t: int
    stride_b: int
    batch_major: bool
    sizes: torch.Tensor | None  # (T,) int64 on the CPU
    offsets: torch.Tensor | None  # (T,) int64
    lengths: torch.Tensor | None  # (B,) int32

    @classmethod
    def of(
        cls,
        input: torch.Tensor,
        c0: torch.Tensor,
        batch_sizes: torch.Tensor | None,
        bidirectional: bool,
    ) -> "_Geometry":
        hidden, directions = c0.shape[2], 2 if bidirectional else 1
        if batch_sizes is None:
            steps, batch, _ = input.shape
            major = input.stride(0) < input.stride(1)
            strides = (1, steps) if major else (batch, 1)
            return cls(
                *(steps, batch, steps * batch, hidden, directions, *strides, major),
                *(None, None, None),
            )
        batch = c0.shape[1]
        offsets = batch_sizes.cumsum(0) - batch_sizes
        lengths = (batch_sizes[:, None] > torch.arange(batch)).sum(0, dtype=torch.int32)
        return cls(
            *(batch_sizes.shape[0], batch, input.shape[0], hidden, directions, 0, 0, False),
            *(batch_sizes, offsets.to(input.device), lengths.to(input.device)),
        )

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """(T, B, features) or (total, features) as (rows, features), contiguous."""
        if self.sizes is None:
            tensor = tensor.transpose(0, 1) if self.batch_major else tensor
        return tensor.reshape(self.rows, tensor.shape[-1]).contiguous()

    def shaped(self, rows: torch.Tensor) -> torch.Tensor:
        """The reverse of `flat`."""
        if self.sizes is not None:
            return rows
        if self.batch_major:
            return rows.view(self.batch, self.steps, rows.shape[-1]).transpose(0, 1)
        return rows.view(self.steps, self.batch, rows.shape[-1])

    def states_before(self, output: torch.Tensor, h0: torch.Tensor, reverse: bool) -> torch.Tensor:
        """(rows, H): of each row the h that its step began with. output: (rows, H) of one direction."""
        if self.sizes is not None:
            every = torch.cat((h0, output))
            row = torch.arange(self.rows)
            now = torch.repeat_interleave(self.sizes, self.sizes)
            place = row - torch.repeat_interleave(self.sizes.cumsum(0) - self.sizes, self.sizes)
            if reverse:
                after = torch.cat((self.sizes[1:], self.sizes.new_zeros(1)))
                has = place < torch.repeat_interleave(after, self.sizes)
                index = torch.where(has, row + now + self.batch, place)
            else:
                # The row before, in the numbering that begins with those of h0.
                before = torch.cat((self.sizes.new_full((1,), self.batch), self.sizes[:-1]))
                index = row - torch.repeat_interleave(before, self.sizes) + self.batch
            return every.index_select(0, index.to(output.device))
        grid = self.shaped(output)
        parts = (grid[1:], h0[None]) if reverse else (h0[None], grid[:-1])
        return self.flat(torch.cat(parts))


def _split(
    weights: Sequence[torch.Tensor], has_biases: bool, layer: int, directions: int
) -> tuple[list[torch.Tensor], ...]:
    """w_ih, w_hh and, with biases, b_ih and b_hh of one layer, each a list over directions."""
    count = 4 if has_biases else 2
    first = layer * directions * count
    cells = [weights[first + d * count : first + (d + 1) * count] for d in range(directions)]
    return tuple([list(column) for column in zip(*cells, strict=True)])


# More than 16 sequences, the least that a product has, would spill.
_SEQUENCES = 16


def _config(hidden: int, precision: str) -> Config:
    units = common.power_of_2(hidden, 16, 128)
    warps = 8 if units == 128 or (units >= 32 and precision == "tf32x3") else 4
    return Config({"BLOCK_H": units, "BLOCK_B": _SEQUENCES}, num_warps=warps, num_stages=1)


def _launch(kernel, geometry: _Geometry, tensor: torch.Tensor, arguments: dict) -> None:
    shared = {
        "offsets": tensor if geometry.offsets is None else geometry.offsets,
        "lengths": tensor if geometry.lengths is None else geometry.lengths,
        "B": geometry.batch,
        "T": geometry.steps,
        "stride_t": geometry.stride_t,
        "stride_b": geometry.stride_b,
        "H": geometry.hidden,
        "DIRECTIONS": geometry.directions,
        "PACKED": geometry.sizes is not None,
        # Rounding to 16 bits hides what the short form of tanh loses.
        "EXACT": tensor.dtype is torch.float32,
        "PRECISION": _precision(tensor.dtype),
        "UPCAST": common.INTERPRET,
    }
    config = _config(geometry.hidden, shared["PRECISION"])

    def bind(config: Config):
        grid = (triton.cdiv(geometry.batch, config["BLOCK_B"]), geometry.directions)
        return grid, arguments | shared

    with common.device_guard(tensor):
        common.launch(kernel, [config], (tensor.dtype, geometry.hidden), bind)


def _precision(dtype: torch.dtype) -> str:
    """The `input_precision` of the recurrent products: TF32 only where torch allows it to cuDNN's."""
    if dtype is not torch.float32 or common.INTERPRET:
        return "ieee"
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "tf32x3"


def _loads_ahead(tensor: torch.Tensor) -> bool:
    """Whether the registers hold two steps' gates without spilling, as compiled for each architecture."""
    return common.capability(tensor)[0] < 10 and _precision(tensor.dtype) != "tf32x3"


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32: rounded to 16 bits the gates would lose what the kernel keeps."""
    if a.dtype is torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def forward(
    input: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    batch_sizes: torch.Tensor | None,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    save_for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, h_n, c_n, saved), as the op's schema has them; `output` is laid out as `input` is.

    saved: i, f, g, o, c as (layers, rows, directions, 5, H), then the outputs of all layers but
    the last as (layers - 1, rows, directions * H); (0,) without `save_for_backward`.
    """
    geometry = _Geometry.of(input, c0, batch_sizes, bidirectional)
    rows, hidden, directions = geometry.rows, geometry.hidden, geometry.directions
    block = rows * directions * hidden
    saved = input.new_empty(block * (6 * num_layers - 1) if save_for_backward else 0)
    h_n, c_n = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h0, c0))
    h0, c0 = h0.contiguous(), c0.contiguous()
    features = geometry.flat(input)
    for layer in range(num_layers):
        w_ih, w_hh, *biases = _split(weights, has_biases, layer, directions)
        w_ih = torch.cat(w_ih)
        gates = _product(features, w_ih.t())
        bias = (
            torch.cat([a.float() + b.float() for a, b in zip(*biases, strict=True)])
            if biases
            else gates
        )
        start = block * (5 * num_layers + layer)
        if save_for_backward and layer < num_layers - 1:
            output = saved[start : start + block].view(rows, directions * hidden)
        else:
            output = input.new_empty(rows, directions * hidden)
        own = slice(layer * directions, (layer + 1) * directions)
        if block:
            _launch(
                lstm_forward_kernel,
                geometry,
                features,
                {
                    "gates": gates,
                    "bias": bias,
                    "HAS_BIAS": bool(biases),
                    "weight": torch.stack(w_hh),
                    "h0": h0[own],
                    "c0": c0[own],
                    "output": output,
                    "h_n": h_n[own],
                    "c_n": c_n[own],
                    "activations": saved[5 * block * layer : 5 * block * (layer + 1)]
                    if save_for_backward
                    else output,
                    "SAVED": save_for_backward,
                    "AHEAD": _loads_ahead(features),
                },
            )
        features = output
    return geometry.shaped(features), h_n, c_n, saved


def backward(
    grad_output: torch.Tensor | None,
    grad_h_n: torch.Tensor | None,
    grad_c_n: torch.Tensor | None,
    input: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    batch_sizes: torch.Tensor | None,
    output: torch.Tensor,
    saved: torch.Tensor,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Gradients of (input, h0, c0, weights); (0,), or no list of weights, where `output_mask` is False.

    The kernel walks back through the steps and leaves the gradients of the gates of all of them, from which
    torch's own products make those of weights and input.
    """
    geometry = _Geometry.of(input, c0, batch_sizes, bidirectional)
    rows, hidden, directions = geometry.rows, geometry.hidden, geometry.directions
    block = rows * directions * hidden
    h0, c0 = h0.contiguous(), c0.contiguous()
    grad_h0, grad_c0 = torch.zeros_like(h0), torch.zeros_like(c0)
    grads = {name: None if g is None else g.contiguous()
             for name, g in (("grad_h_n", grad_h_n), ("grad_c_n", grad_c_n))}  # fmt: skip
    above = None if grad_output is None else geometry.flat(grad_output)

    def layer_output(layer: int) -> torch.Tensor:
        start = block * (5 * num_layers + layer)
        return saved[start : start + block].view(rows, directions * hidden)

    grad_weights: list[torch.Tensor] = []
    for layer in reversed(range(num_layers)):
        w_ih, w_hh, *_ = _split(weights, has_biases, layer, directions)
        own = slice(layer * directions, (layer + 1) * directions)
        grad_gates = input.new_empty(rows, directions * 4 * hidden)
        arguments = {
            "grad_output": grad_gates if above is None else above,
            "weight": torch.stack(w_hh),
            "c0": c0[own],
            "activations": saved[5 * block * layer : 5 * block * (layer + 1)],
            "grad_gates": grad_gates,
            "grad_h0": grad_h0[own],
            "grad_c0": grad_c0[own],
            "HAS_OUTPUT": above is not None,
            "HAS_H": grad_h_n is not None,
            "HAS_C": grad_c_n is not None,
        }
        for name, g in grads.items():
            arguments[name] = grad_gates if g is None else g[own]
        if block:
            _launch(lstm_backward_kernel, geometry, grad_gates, arguments)
        if output_mask[3]:
            below = layer_output(layer - 1) if layer else geometry.flat(input)
            top = layer == num_layers - 1
            made = geometry.flat(output) if top else layer_output(layer)
            layers_own = _weight_gradients(geometry, grad_gates, below, made, h0[own], has_biases)
            grad_weights = layers_own + grad_weights
        if layer or output_mask[0]:
            above = grad_gates @ torch.cat(w_ih)
    return (
        geometry.shaped(above) if output_mask[0] else input.new_empty(0),
        grad_h0 if output_mask[1] else input.new_empty(0),
        grad_c0 if output_mask[2] else input.new_empty(0),
        grad_weights,
    )


def _weight_gradients(
    geometry: _Geometry,
    grad_gates: torch.Tensor,
    below: torch.Tensor,
    output: torch.Tensor,
    h0: torch.Tensor,
    has_biases: bool,
) -> list[torch.Tensor]:
    """Of one layer, direction by direction: w_ih, w_hh[, b_ih, b_hh]."""
    gates, hidden = 4 * geometry.hidden, geometry.hidden
    found = []
    for d in range(geometry.directions):
        own = grad_gates[:, d * gates : (d + 1) * gates].t()
        before = geometry.states_before(output[:, d * hidden : (d + 1) * hidden], h0[d], d == 1)
        found += [own @ below, own @ before]
        if has_biases:
            total = own.sum(1)
            found += [total, total.clone()]
    return found
