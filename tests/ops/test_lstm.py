"""Values of lstm: every kernel within the error budget of torch's own LSTM, the options against formulas."""

from __future__ import annotations

import pytest
import torch
from lstm_cases import (
    EACH_BACKEND,
    EACH_KERNEL,
    PACKED,
    check,
    data,
    ours,
    states,
    step,
    theirs,
)
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import pyops
from pyops import backends

# name: (T, B, I, H, options)
CASES = {
    "one step": (1, 5, 3, 8, {}),
    "one sequence": (9, 1, 6, 20, {"num_layers": 2}),
    "hidden 1": (7, 12, 4, 1, {"num_layers": 2, "bidirectional": True}),
    "hidden 7": (6, 9, 5, 7, {"num_layers": 2}),
    "hidden 8": (6, 17, 10, 8, {"num_layers": 2, "batch_first": True}),
    "hidden 16, no biases": (5, 6, 7, 16, {"bias": False, "bidirectional": True}),
    "hidden 33, both ways": (5, 11, 9, 33, {"num_layers": 2, "bidirectional": True}),
    "hidden 127": (3, 13, 31, 127, {"num_layers": 2}),
    "hidden 128, batch first": (4, 20, 28, 128, {"batch_first": True}),
    "three layers": (6, 18, 24, 40, {"num_layers": 3}),
    "hidden 512": (3, 5, 64, 512, {}),
    "wide input": (3, 7, 300, 12, {}),
}
IN_FLOAT16 = ("one step", "hidden 7", "hidden 33, both ways", "wide input")
CASES_AND_DTYPES = [
    *((name, dtype) for name in CASES for dtype in (torch.float32, torch.bfloat16)),
    *((name, torch.float16) for name in IN_FLOAT16),
]


@EACH_KERNEL
@pytest.mark.parametrize("name, dtype", CASES_AND_DTYPES, ids=str)
def test_within_budget(name, dtype, backend):
    steps, batch, features, hidden, options = CASES[name]
    module = theirs(features, hidden, dtype, **options)
    shape = (batch, steps) if module.batch_first else (steps, batch)
    reason = backends.why_not("lstm", backend) or kernel_refusal(backend, hidden, dtype)
    if reason is not None:
        pytest.skip(reason)
    x = data(*shape, features, dtype=dtype)
    check(module, x, states(module, batch), backend=backend)


def kernel_refusal(backend, hidden, dtype):
    """Why a kernel does not take this hidden size and dtype, or None."""
    try:
        weights = [torch.zeros(4 * hidden, s, dtype=dtype) for s in (1, hidden)]
        pyops.lstm(torch.zeros(1, 1, 1, dtype=dtype), None, weights, backend=backend)
    except RuntimeError as error:
        return str(error)
    return None


@EACH_KERNEL
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [PACKED, [3, 3, 3], [5], [1, 1], [6, 1]], ids=str)
def test_packed_within_budget(lengths, bidirectional, backend):
    module = theirs(5, 24, num_layers=2, bidirectional=bidirectional)
    x = data(max(lengths), len(lengths), 5)
    for dtype in (torch.float32, torch.bfloat16):
        module = module.to(dtype)
        check(module, x.to(dtype), states(module, len(lengths)), lengths, backend=backend)


@EACH_BACKEND
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
def test_every_way_to_call(with_states, batch_first, bidirectional, backend):
    """Batched, unbatched, packed sorted and not; with and without initial states."""
    module = theirs(4, 6, num_layers=2, batch_first=batch_first, bidirectional=bidirectional)
    mine = ours(module, backend=backend)
    sequences = [data(n, 4, seed=n) for n in (5, 3, 3, 1)]
    longest = data(5, 4, 4)
    inputs = [
        (longest.transpose(0, 1) if batch_first else longest, 4),
        (longest[:, 0], None),
        (pack_sequence(sequences), 4),
        (pack_sequence(sequences[::-1], enforce_sorted=False), 4),
        (pack_padded_sequence(longest, [2, 5, 1, 5], enforce_sorted=False), 4),
    ]
    for x, batch in inputs:
        hx = states(module, batch) if with_states else None
        got, want = mine(x, hx), module(x, hx)
        assert type(got[0]) is type(want[0])
        if not isinstance(x, torch.Tensor):
            for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
                a, b = getattr(got[0], field), getattr(want[0], field)
                assert (a is None and b is None) or torch.equal(a, b)
            got, want = (got[0].data, got[1]), (want[0].data, want[1])
        torch.testing.assert_close(got, want)


@EACH_BACKEND
def test_batch_of_none(backend):
    module = theirs(4, 6, num_layers=2, bidirectional=True)
    results = [
        step(m, data(3, 0, 4), states(module, 0)) for m in (module, ours(module, backend=backend))
    ]
    for name, want in results[0].items():
        for a, b in zip(results[1][name], want, strict=True):
            assert a.shape == b.shape and torch.equal(a, b), name


@EACH_BACKEND
def test_layout_follows_the_input(backend):
    """(B, T, I) in, contiguous (B, T, H) out; the gradient of the input likewise."""
    for batch_first in (True, False):
        module = ours(theirs(4, 6, batch_first=batch_first), backend=backend)
        x = data(5, 3, 4).requires_grad_()
        output, _ = module(x)
        assert output.is_contiguous()
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert grad.is_contiguous() or backend == "reference"


@EACH_BACKEND
@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.stack([t, t * 7], -1)[..., 0],
        lambda t: t.flip(0).flip(0) if t.dim() < 3 else t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        lambda t: t[:1].expand(t.shape),
    ],
    ids=["every other", "permuted", "offset by one", "expanded"],
)  # fmt: skip
def test_strides(change, backend):
    """Inputs, states and weights in any strides give what contiguous ones give, gradients too."""
    module = theirs(6, 8, num_layers=2)
    x, hx = data(5, 4, 6), states(module, 4)
    weights = [p.detach() for p in module.parameters()]
    grad = data(5, 4, 8, seed=9)
    results = []
    for tidy in (False, True):
        leaves = [change(t.clone()) for t in (x, *hx, *weights)]
        leaves = [(t.contiguous() if tidy else t).requires_grad_() for t in leaves]
        output, (h, c) = pyops.lstm(
            leaves[0], tuple(leaves[1:3]), leaves[3:], num_layers=2, backend=backend
        )
        seeds = [t.contiguous() if tidy else t for t in (change(grad), change(h.detach()))]
        results.append((output, h, c, *torch.autograd.grad((output, h), leaves, seeds)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@EACH_KERNEL
def test_tied_weights_and_one_tensor_as_both_states(backend):
    """A weight that serves both layers gets the sum of its two gradients."""
    module = theirs(8, 8)
    results = []
    for own in (True, False):
        weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
        state = data(2, 3, 8).requires_grad_()
        x = data(4, 3, 8).requires_grad_()
        leaves = [x, state, *weights]
        if own:
            output, (h, _) = pyops.lstm(
                x, (state, state), [*weights, *weights], num_layers=2, backend=backend
            )
        else:
            output, h, _ = torch.lstm(
                x, (state, state), [*weights, *weights], True, 2, 0.0, False, False, False
            )
        results.append(torch.autograd.grad((output * output).sum() + h.sum(), leaves))
    torch.testing.assert_close(*results)


@EACH_BACKEND
def test_dropout_between_layers_draws_torchs_masks(backend):
    """In training, the same masks for the same seed; none after the last layer, none in eval."""
    module = theirs(5, 40, num_layers=3, dropout=0.5, bidirectional=True)
    mine = ours(module, backend=backend)
    x = data(6, 4, 5)
    runs = []
    for m in (mine, module):
        torch.manual_seed(3)
        runs.append(step(m, x, states(module, 4)))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name])
    torch.testing.assert_close(mine.eval()(x), module.eval()(x))
    assert not torch.allclose(mine.train()(x)[0], mine.eval()(x)[0])
    one = ours(theirs(5, 6, num_layers=1), backend=backend)
    one.dropout = 1.0
    torch.testing.assert_close(one.train()(x), one.eval()(x))


@pytest.mark.parametrize("dropout", [0.0, 1.0])
@EACH_BACKEND
def test_dropout_extremes(dropout, backend):
    module = theirs(5, 6, num_layers=2, dropout=dropout)
    torch.testing.assert_close(ours(module, backend=backend)(data(4, 3, 5)), module(data(4, 3, 5)))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_projection(backend, lengths, bidirectional):
    module = theirs(5, 8, torch.float64, num_layers=2, proj_size=3, bidirectional=bidirectional)
    x, hx = data(9, 6, 5), states(module, 6)
    runs = [step(m, x, hx, lengths) for m in (ours(module, backend=backend), module)]
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name])


def normalised(values, gain):
    deviation = values - values.mean(-1, keepdim=True)
    return gain * deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_layer_norm_is_its_formula():
    module = pyops.nn.LSTM(5, 6, layer_norm=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    w, x = dict(module.named_parameters()), data(7, 3, 5, dtype=torch.float64)
    h, c = (s[0] for s in states(module, 3))
    output, (h_n, c_n) = module(x, (h[None], c[None]))
    for t in range(7):
        gates = normalised(x[t] @ w["weight_ih_l0"].T, w["weight_ln_ih_l0"]) + w["bias_ih_l0"]
        gates = gates + normalised(h @ w["weight_hh_l0"].T, w["weight_ln_hh_l0"]) + w["bias_hh_l0"]
        i, f, g, o = gates.split(6, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        shown = normalised(c, w["weight_ln_c_l0"]) + w["bias_ln_c_l0"]
        h = torch.sigmoid(o) * torch.tanh(shown)
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c))


def test_zoneout_expected_values_in_eval():
    module = pyops.nn.LSTM(5, 6, zoneout=(0.3, 0.6), dtype=torch.float64).eval()
    x = data(4, 3, 5, dtype=torch.float64)
    cell = torch.nn.LSTMCell(5, 6, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    h = c = torch.zeros(3, 6, dtype=torch.float64)
    output, (_, c_n) = module(x)
    for t in range(4):
        new_h, new_c = cell(x[t], (h, c))
        h, c = 0.3 * h + 0.7 * new_h, 0.6 * c + 0.4 * new_c
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(c_n[0], c)


def test_zoneout_keeps_units_with_its_probability_in_training():
    torch.manual_seed(0)
    module = pyops.nn.LSTM(3, 50, zoneout=(0.2, 0.7))
    x = data(40, 30, 3)
    output, _ = module(x)
    kept = (output[1:] == output[:-1]).double().mean().item()
    assert abs(kept - 0.2) < 4 * (0.2 * 0.8 / output[1:].numel()) ** 0.5
    one = pyops.nn.LSTM(3, 200, zoneout=(0.0, 0.7))
    _, (_, c_n) = one(x[:1], (torch.ones(1, 30, 200), torch.ones(1, 30, 200)))
    kept = (c_n == 1).double().mean().item()
    assert abs(kept - 0.7) < 4 * (0.7 * 0.3 / 6000) ** 0.5
    frozen = pyops.nn.LSTM(3, 5, zoneout=1.0)
    output, _ = frozen(x, (torch.ones(1, 30, 5), torch.ones(1, 30, 5)))
    assert output.eq(1).all()


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"zoneout": (0.2, 0.4)}], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_options_in_packed_sequences(options, bidirectional):
    """As one sequence after the other."""
    module = pyops.nn.LSTM(5, 6, 2, bidirectional=bidirectional, dtype=torch.float64, **options)
    module.eval()
    x, hx = data(9, 6, 5, dtype=torch.float64), states(module, 6)
    packed = pack_padded_sequence(x, PACKED, enforce_sorted=False)
    output, (h, c) = module(packed, hx)
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
    for index, length in enumerate(PACKED):
        own = tuple(s[:, index : index + 1] for s in hx)
        alone, (h_alone, c_alone) = module(x[:length, index : index + 1], own)
        torch.testing.assert_close(output[:length, index], alone[:, 0])
        torch.testing.assert_close((h[:, index], c[:, index]), (h_alone[:, 0], c_alone[:, 0]))


@EACH_BACKEND
def test_values_beyond_saturation(backend):
    """Infinite inputs saturate gates and NaN stays NaN, as in torch; only where it belongs."""
    module = theirs(3, 5)
    for value in (float("inf"), float("-inf"), float("nan"), 1e30):
        x = data(4, 6, 3)
        x[1, 2, 0] = value
        got, want = ours(module, backend=backend)(x), module(x)
        torch.testing.assert_close(got, want, equal_nan=True)
        assert got[0][:, :2].isfinite().all() and got[0][:1].isfinite().all()


def test_automatic_choice():
    module = theirs(3, 5)
    x = data(4, 2, 3)
    reasons = backends.available("lstm")
    if reasons["cpu"] is None:
        with torch.no_grad():
            automatic = ours(module)(x)
            chosen = ours(module, backend="cpu")(x)
        assert torch.equal(automatic[0], chosen[0])
    wide = module.double()
    torch.testing.assert_close(ours(wide)(x.double()), wide(x.double()))


def test_weights_are_read_anew_at_every_call():
    """No copy of a weight survives a call: writes that no version counter sees count too."""
    module = theirs(3, 5)
    mine = ours(module)
    x = data(4, 2, 3)
    mine(x)
    for parameter, other in zip(mine.parameters(), module.parameters(), strict=True):
        parameter.data.mul_(2)
        other.data.mul_(2)
        torch.testing.assert_close(mine(x), module(x))
    mine.weight_hh_l0 = torch.nn.Parameter(torch.zeros(20, 5))
    module.weight_hh_l0 = torch.nn.Parameter(torch.zeros(20, 5))
    torch.testing.assert_close(mine(x), module(x))
