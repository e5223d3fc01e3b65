"""What the tests of lstm share: torch's own LSTM beside ours, inputs, and the comparison."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import pyops
from pyops import backends
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget

# Triton's kernels have tests of their own, in tests/triton.
KERNELS = [name for name in ("cpu",) if backends.why_not("lstm", name, "cpu") is None]
ALL = [*KERNELS, "reference"]
EACH_KERNEL = pytest.mark.parametrize("backend", KERNELS)
EACH_BACKEND = pytest.mark.parametrize("backend", ALL)

PACKED = [9, 4, 7, 1, 7, 2]  # lengths in an order that is not sorted


def theirs(input_size, hidden, dtype=torch.float32, seed=0, **options):
    """A torch.nn.LSTM, its weights drawn from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.LSTM(input_size, hidden, **options).to(dtype)


def ours(module, **options):
    """pyops.nn.LSTM with the configuration and the weights (copied) of a torch.nn.LSTM."""
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    names += ("bidirectional", "proj_size")
    arguments = {name: getattr(module, name) for name in names}
    twin = pyops.nn.LSTM(**arguments, **options, dtype=module.weight_ih_l0.dtype)
    twin.load_state_dict(module.state_dict())
    return twin.train(module.training)


def data(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def states(module, batch, seed=2):
    """(h_0, c_0) for a module; batch None: unbatched."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    middle = () if batch is None else (batch,)
    dtype = module.weight_ih_l0.dtype
    out = module.proj_size or module.hidden_size
    return (
        data(layers, *middle, out, dtype=dtype, seed=seed),
        data(layers, *middle, module.hidden_size, dtype=dtype, seed=seed + 1) / 2,
    )


def step(module, x, hx=None, lengths=None, through=(True, True, True)):
    """Outputs and gradients of one step, in groups: {name: [tensors]}.

    lengths: pack x first. through: which of output, h_n and c_n the gradients flow through.
    """
    dtype = module.weight_ih_l0.dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *(hx or ()))]
    input = leaves[0]
    if lengths is not None:
        input = pack_padded_sequence(input, lengths, module.batch_first, enforce_sorted=False)
    output, (h, c) = module(input, tuple(leaves[1:]) if hx is not None else None)
    if isinstance(output, PackedSequence):
        output = output.data
    generator = torch.Generator().manual_seed(5)
    # Rounded to 8 bits, so that every dtype is given the same.
    seeds = [torch.randn(t.shape, generator=generator).bfloat16().to(dtype) for t in (output, h, c)]
    used = [(t, s) for t, s, on in zip((output, h, c), seeds, through, strict=True) if on]
    parameters = list(module.parameters())
    grads = torch.autograd.grad([t for t, _ in used], [*leaves, *parameters], [s for _, s in used])
    groups = {"output": [output], "h_n": [h], "c_n": [c], "grad_input": [grads[0]]}
    groups["grad_states"] = list(grads[1 : len(leaves)])
    weights = grads[len(leaves) :]
    groups["grad_weights"] = [g for g in weights if g.dim() == 2]
    groups["grad_biases"] = [g for g in weights if g.dim() == 1]
    return groups


def joined(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def check(module, x, hx=None, lengths=None, backend="cpu", few=False, **options):
    """One step of ours against torch's by the error budget; the ratios by name.

    Tensors of one kind are compared together: over a handful of elements the ratio of two
    errors is luck. `few`: there may be only a handful, which then only have to be near.
    """
    exact = theirs(
        module.input_size,
        module.hidden_size,
        torch.float64,
        **{n: getattr(module, n) for n in ("num_layers", "bias", "batch_first", "bidirectional")},
    )
    exact.load_state_dict(module.state_dict())
    runs = [
        step(m, x, hx, lengths, **options) for m in (ours(module, backend=backend), module, exact)
    ]
    ratios = {}
    for name in runs[0]:
        for mine, want in zip(runs[0][name], runs[1][name], strict=True):
            assert mine.shape == want.shape and mine.dtype == want.dtype, name
        if runs[0][name]:
            k = GRADIENT_BUDGET if name.startswith("grad") else OUTPUT_BUDGET
            if few and joined(runs[0][name]).numel() < 200:
                mine, want = joined(runs[0][name]).double(), joined(runs[2][name])
                scale = max(1.0, want.abs().max().item()) * torch.finfo(x.dtype).eps
                torch.testing.assert_close(mine, want, rtol=0, atol=30 * scale)
                continue
            ratios[name] = assert_within_budget(*(joined(r[name]) for r in runs), k, name)
    return ratios


class Calls(TorchDispatchMode):
    """Records every call of a pyops op: (name, args)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyops":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))
