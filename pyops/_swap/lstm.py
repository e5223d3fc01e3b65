"""nn.LSTM: a guarded forward for the instance, which calls the fused op."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from pyops._swap.guard import class_of, is_plain_tensor, runs_torchs_forward
from pyops._swap.report import Run
from pyops.nn import lstm as modules
from pyops.ops.lstm import lstm


def rewrite(module: nn.Module, run: Run) -> Callable | None:
    """The forward that calls the op, if `module` can have one; reports on it."""
    if not isinstance(module, nn.LSTM):
        return None
    place = run.names[id(module)] or type(module).__name__
    if type(module) is not nn.LSTM:
        why = f"the LSTM is a {type(module).__name__}, not exactly nn.LSTM"
    elif not runs_torchs_forward(nn.LSTM):
        why = "nn.LSTM has a forward that is not torch's"
    elif module.proj_size:
        why = "no kernel has a projection (proj_size)"
    else:
        run.replaced(place, ["lstm"])
        return _guarded_forward(run.backend)
    run.skipped(place, ["lstm"], why)
    return None


def _weights(module: nn.LSTM) -> list[Any]:
    """As they are now, which torch.func.functional_call and old weight norms make differ from call to call."""
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _takes(module: nn.LSTM, input: Any, hx: Any, weights: list[Any]) -> bool:
    """Whether the op may stand in for this call.

    Hooks need no look: they run around forward, whoever's it is.
    """
    if class_of(module) is not nn.LSTM or not runs_torchs_forward(nn.LSTM):
        return False
    if module.proj_size or torch.jit.is_tracing():
        return False
    data = input.data if isinstance(input, PackedSequence) else input
    tensors = [data, *weights]
    if hx is not None:
        if not isinstance(hx, tuple) or len(hx) != 2:
            return False
        tensors += hx
    if not all(map(is_plain_tensor, tensors)):
        return False
    # Mixed dtypes are right only where autocast casts them; torch's own error otherwise.
    dtype = data.dtype
    return torch.is_autocast_enabled(data.device.type) or all(t.dtype is dtype for t in tensors)


@functools.cache
def _guarded_forward(backend: str | None) -> Callable:
    def forward(self: nn.LSTM, input: Any, hx: Any = None) -> Any:
        weights = _weights(self)
        if not _takes(self, input, hx, weights):
            return nn.LSTM.forward(self, input, hx)

        def call(data: torch.Tensor, states: Any, batch_sizes: torch.Tensor | None) -> Any:
            return lstm(
                data,
                states,
                weights,
                num_layers=self.num_layers,
                bidirectional=self.bidirectional,
                batch_first=self.batch_first,
                dropout=self.dropout,
                training=self.training,
                batch_sizes=batch_sizes,
                backend=backend,
            )

        return modules.run(call, input, hx)

    return forward
