"""What the tests of lstm's Triton kernels share, interpreted and on a GPU."""

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyops
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget

# name: (T, B, I, H, options, lengths)
CASES = {
    "one step": (1, 3, 4, 20, {}, None),
    "one sequence": (5, 1, 4, 20, {"num_layers": 2}, None),
    "hidden 1": (4, 19, 3, 1, {}, None),
    "hidden 7, both ways": (4, 5, 3, 7, {"num_layers": 2, "bidirectional": True}, None),
    "hidden 16, two blocks": (3, 21, 6, 16, {"batch_first": True}, None),
    "hidden 33, no biases": (3, 6, 5, 33, {"bias": False, "batch_first": True}, None),
    "hidden 64": (3, 17, 8, 64, {"num_layers": 2}, None),
    "packed": (6, 5, 4, 12, {"num_layers": 2}, [2, 6, 1, 6, 4]),
    "packed, both ways": (6, 19, 4, 9, {"bidirectional": True}, [*range(1, 7)] * 3 + [6]),
}


def run(lstm, x, hx, lengths, through=(True, True, True)):
    """Outputs and gradients of one step, in groups by name."""
    dtype = lstm.weight_ih_l0.dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *hx)]
    input = leaves[0]
    if lengths is not None:
        input = pack_padded_sequence(input, lengths, lstm.batch_first, enforce_sorted=False)
    output, states = lstm(input, tuple(leaves[1:]))
    output = output.data if isinstance(output, PackedSequence) else output
    results = (output, *states)
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in results]
    used = [(t, s) for t, s, on in zip(results, seeds, through, strict=True) if on]
    parameters = list(lstm.parameters())
    grads = torch.autograd.grad([t for t, _ in used], [*leaves, *parameters], [s for _, s in used])
    groups = {"output": [output], "states": states, "grad_input": grads[:1]}
    groups["grad_states"] = grads[1:3]
    groups["grad_weights"] = [g for g in grads[3:] if g.dim() == 2]
    groups["grad_biases"] = [g for g in grads[3:] if g.dim() == 1]
    flat = {k: [t.detach().flatten() for t in v] for k, v in groups.items() if len(v)}
    return {name: torch.cat(tensors) for name, tensors in flat.items()}


def models(input_size, hidden, dtype, device, options):
    """(ours on Triton, torch's, torch's in float64) with equal weights."""
    torch.manual_seed(0)
    plain = torch.nn.LSTM(input_size, hidden, **options).to(device, dtype)
    exact = torch.nn.LSTM(input_size, hidden, **options).to(device, torch.float64)
    ours = pyops.nn.LSTM(input_size, hidden, **options, backend="triton").to(device, dtype)
    for other in (exact, ours):
        other.load_state_dict(plain.state_dict())
    return ours, plain, exact


def inputs(steps, batch, features, hidden, options, dtype, device):
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    generator = torch.Generator().manual_seed(1)
    shape = (batch, steps) if options.get("batch_first") else (steps, batch)
    shapes = ((*shape, features), (layers, batch, hidden), (layers, batch, hidden))
    x, h, c = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return x, (h, c)


def check(case, dtype, device, through=(True, True, True)):
    """Output and gradients within budget of torch's own LSTM."""
    steps, batch, features, hidden, options, lengths = case
    every = models(features, hidden, dtype, device, options)
    x, hx = inputs(steps, batch, features, hidden, options, dtype, device)
    mine, plain, exact = (run(m, x, hx, lengths, through) for m in every)
    for name in mine:
        k = GRADIENT_BUDGET if name.startswith("grad") else OUTPUT_BUDGET
        assert_within_budget(mine[name], plain[name], exact[name], k, name)
