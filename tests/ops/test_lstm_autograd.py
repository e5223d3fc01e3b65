"""Derivatives of lstm: the rules in float64, what is computed, saved and aliased, determinism."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lstm_cases import EACH_KERNEL, KERNELS, PACKED, Calls, check, data, ours, states, step, theirs
from torch.nn.utils.rnn import pack_padded_sequence

import pyops
from pyops.ops import _registration as registration
from pyops.ops import lstm_rules
from pyops.reference import lstm as reference
from pyops.reference.lstm import LSTMSpec

pytestmark = pytest.mark.skipif(not KERNELS, reason="no kernel of lstm here")


@pytest.fixture(scope="module")
def oracle():
    """A pair of ops with lstm's rules whose kernels are the reference, so that they take float64.

    The rules, which are what is shared by all backends, are thus checked numerically.
    """

    def forward(input, h0, c0, weights, batch_sizes, *rest):
        results = reference.lstm(input, h0, c0, weights, batch_sizes, LSTMSpec(*rest[:-1]))
        # The inputs' gates are not worth keeping: backward runs everything again.
        hidden, directions = c0.shape[2], 2 if rest[2] else 1
        size = lstm_rules.saved_size(input, hidden, rest[1], directions) if rest[-1] else 0
        return (*(r.clone() for r in results), input.new_zeros(size))

    def backward(*args):
        # In another thread, since this one is below autograd here.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(differentiate, *args).result()

    def differentiate(grad_output, grad_h, grad_c, input, h0, c0, weights, batch_sizes, *rest):
        leaves = [t.detach().requires_grad_() for t in (input, h0, c0, *weights)]
        outs = reference.lstm(*leaves[:3], leaves[3:], batch_sizes, LSTMSpec(*rest[2:-1]))
        given = [(o, g) for o, g in zip(outs, (grad_output, grad_h, grad_c), strict=True)
                 if g is not None]  # fmt: skip
        grads = torch.autograd.grad(
            [o for o, _ in given], leaves, [g for _, g in given], materialize_grads=True
        )
        mask = rest[-1]
        three = [g.clone() if m else g.new_empty(0) for g, m in zip(grads, mask[:3], strict=False)]
        return (*three, [g.clone() for g in grads[3:]] if mask[3] else [])

    if not hasattr(torch.ops.pyops, "lstm_oracle"):
        registration.define_like("lstm_oracle", "lstm", forward)
        registration.define_like("lstm_oracle_backward", "lstm_backward", backward)
        registration.register_rules("lstm_oracle", lstm_rules.RULES)
    return torch.ops.pyops.lstm_oracle.default


def double_leaves(layers=1, bidirectional=False, bias=True, batch=2):
    module = theirs(2, 2, torch.float64, num_layers=layers, bidirectional=bidirectional, bias=bias)
    leaves = [data(3, batch, 2, dtype=torch.float64), *states(module, batch), *module.parameters()]
    return [t.detach().requires_grad_() for t in leaves], (bias, layers, bidirectional)


RULES = pytest.mark.parametrize(
    "options",
    [{}, {"layers": 2, "bidirectional": True}, {"bias": False}],
    ids=["one layer", "two layers both ways", "no biases"],
)


@RULES
@pytest.mark.parametrize("how", ["registered", "eager"])
def test_gradcheck_of_the_rules(oracle, options, how):
    leaves, spec = double_leaves(**options)

    def function(input, h0, c0, *weights):
        if how == "registered":
            return oracle(input, h0, c0, list(weights), None, *spec, True)[:3]
        return lstm_rules.EagerFunction.apply(
            oracle, LSTMSpec(*spec), None, input, h0, c0, *weights
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("how", ["registered", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradgradcheck_of_the_rules(oracle, how, packed):
    leaves, spec = double_leaves(layers=2, batch=1 if not packed else 2)
    sizes = None
    if packed:
        leaves[0] = data(3, 2, dtype=torch.float64).requires_grad_()
        sizes = torch.tensor([2, 1])

    def function(input, h0, c0, *weights):
        if how == "registered":
            return oracle(input, h0, c0, list(weights), sizes, *spec, True)[:3]
        return lstm_rules.EagerFunction.apply(
            oracle, LSTMSpec(*spec), sizes, input, h0, c0, *weights
        )

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", ["input", "states", "weights"])
def test_gradgradcheck_with_something_frozen(oracle, frozen):
    leaves, spec = double_leaves()
    places = {"input": [0], "states": [1, 2], "weights": list(range(3, len(leaves)))}[frozen]
    for place in places:
        leaves[place].requires_grad_(False)

    def function(input, h0, c0, *weights):
        return lstm_rules.EagerFunction.apply(
            oracle, LSTMSpec(*spec), None, input, h0, c0, *weights
        )[0]

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_third_order(oracle):
    results = []
    for ops in (True, False):
        leaves, spec = double_leaves()
        function = (
            (lambda *t, s=spec: lstm_rules.EagerFunction.apply(oracle, LSTMSpec(*s), None, *t)[0])
            if ops
            else lambda *t, s=spec: reference.lstm(*t[:3], t[3:], None, LSTMSpec(*s))[0]
        )
        value = function(*leaves).pow(2).sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        results.append(grads)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        assert got.any()


@EACH_KERNEL
def test_gradient_penalty(backend):
    """Second order through a kernel: its own first gradients, the reference's second."""
    module = theirs(3, 5, num_layers=2, bidirectional=True)
    results = []
    for m in (ours(module, backend=backend), ours(module, backend="reference")):
        x = data(4, 3, 3).requires_grad_()
        (slope,) = torch.autograd.grad(m(x)[0].sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        results.append(torch.autograd.grad(penalty, list(m.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert any(g.any() for g in results[0])


@EACH_KERNEL
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "through",
    [(True, False, False), (False, True, False), (False, False, True), (False, True, True)],
    ids=["output", "h_n", "c_n", "both states"],
)
def test_gradients_through_some_results(through, lengths, bidirectional, backend):
    module = theirs(4, 12, num_layers=2, bidirectional=bidirectional)
    x, hx = data(9, 6, 4), states(module, 6)
    check(module, x, hx, lengths, backend=backend, through=through)
    mine = ours(module, backend=backend)
    with Calls() as calls:
        step(mine, x, hx, lengths, through=through)
    assert [g is not None for g in calls.seen[1][1][:3]] == list(through)


@EACH_KERNEL
@pytest.mark.parametrize("asked", ["input", "h0", "c0", "one weight", "weights", "states", "all"])
def test_only_what_is_asked_for_is_computed(asked, backend):
    module = theirs(4, 6)
    names = ["input", "h0", "c0", *(f"w{i}" for i in range(4))]
    wanted = {
        "one weight": {"w1"},
        "weights": set(names[3:]),
        "states": {"h0", "c0"},
        "all": set(names),
    }.get(asked, {asked})

    def leaves(every):
        tensors = (data(5, 3, 4), *states(module, 3), *(p.detach() for p in module.parameters()))
        return [
            t.clone().requires_grad_(every or name in wanted)
            for name, t in zip(names, tensors, strict=True)
        ]

    def run(tensors):
        output, _ = pyops.lstm(tensors[0], tuple(tensors[1:3]), tensors[3:], backend=backend)
        output.square().sum().backward()

    full, some = leaves(True), leaves(False)
    run(full)
    with Calls() as calls:
        run(some)
    stem = "lstm" if backend == "cpu" else "lstm_triton"
    assert [name for name, _ in calls.seen] == [stem, f"{stem}_backward"]
    mask = [name in wanted for name in names[:3]] + [bool(wanted & set(names[3:]))]
    assert list(calls.seen[1][1][-1]) == mask
    for name, got, want in zip(names, some, full, strict=True):
        if name in wanted:
            torch.testing.assert_close(got.grad, want.grad)
        else:
            assert got.grad is None


def saved_by(function):
    """Runs it; {storage address: bytes} of what autograd saved."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = function()
    return results, saved


@EACH_KERNEL
@pytest.mark.parametrize("layers", [1, 2])
def test_training_saves_less_than_torch(layers, backend):
    """Six values an element of the output (five in one layer), beside inputs, weights and output."""
    module = theirs(32, 32, num_layers=layers)
    mine = ours(module, backend=backend)
    x = data(20, 16, 32).requires_grad_()
    (output, _), saved = saved_by(lambda: mine(x))
    _, torchs = saved_by(lambda: module(x))
    held = output.untyped_storage().nbytes() * (6 * layers - 1)
    given = sum(t.untyped_storage().nbytes() for t in (x, output, *mine.parameters()))
    state = 4 * layers * 16 * 32
    assert sum(saved.values()) == held + given + state
    assert sum(saved.values()) < 0.6 * sum(torchs.values())


@EACH_KERNEL
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
def test_inference_saves_nothing(mode, backend):
    mine = ours(theirs(4, 6), backend=backend)
    if mode is None:
        mine.requires_grad_(False)
    with (mode or torch.enable_grad)(), Calls() as calls:
        (output, _), saved = saved_by(lambda: mine(data(5, 3, 4)))
    assert not saved and not output.requires_grad
    assert [args[-1] for _, args in calls.seen] == [False]


@EACH_KERNEL
def test_nothing_aliases_and_nothing_is_overwritten(backend):
    module = theirs(4, 6, num_layers=2, bidirectional=True)
    leaves = [data(5, 3, 4), *states(module, 3), *(p.detach().clone() for p in module.parameters())]
    leaves = [t.requires_grad_() for t in leaves]
    before = [t.detach().clone() for t in leaves]

    output, (h, c) = pyops.lstm(
        leaves[0], tuple(leaves[1:3]), leaves[3:], num_layers=2, bidirectional=True, backend=backend
    )
    results = (output, h, c)
    kept = [t.detach().clone() for t in results]
    seeds = [torch.randn_like(t) for t in results]
    seeds_before = [t.clone() for t in seeds]
    grads = torch.autograd.grad(results, leaves, seeds, retain_graph=True)
    again = torch.autograd.grad(results, leaves, seeds)
    tensors = (*leaves, *results, *seeds, *grads, *again)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    for pairs in ((leaves, before), (results, kept), (seeds, seeds_before), (grads, again)):
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("victim", ["input", "h0", "c0", "weight", "output"])
@EACH_KERNEL
def test_changing_a_saved_tensor_in_place_raises(victim, backend):
    module = theirs(4, 6)
    h0, c0 = (t.requires_grad_() for t in states(module, 3))
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = data(5, 3, 4).requires_grad_()
    output, _ = pyops.lstm(x, (h0, c0), weights, backend=backend)
    loss = output.sum()
    tensors = {"input": x, "h0": h0, "c0": c0, "weight": weights[1], "output": output}
    with torch.no_grad():
        tensors[victim].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EACH_KERNEL
def test_backward_twice(backend):
    mine = ours(theirs(4, 6), backend=backend)
    loss = mine(data(5, 3, 4))[0].square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in mine.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(mine.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.skipif("cpu" not in KERNELS, reason="no _cpu.so")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "steps, batch, hidden, options, lengths",
    [
        (12, 1, 40, {}, None),
        (10, 37, 64, {"num_layers": 2}, None),
        (6, 5, 33, {"num_layers": 2, "bidirectional": True}, None),
        (3, 70, 128, {"batch_first": True}, None),
        (9, 6, 24, {"num_layers": 2, "bidirectional": True}, PACKED),
    ],
)
def test_bits_repeat_over_runs_and_thread_counts(steps, batch, hidden, options, lengths, dtype):
    module = ours(theirs(16, hidden, dtype, **options), backend="cpu")
    shape = (batch, steps) if module.batch_first else (steps, batch)
    x, hx = data(*shape, 16, dtype=dtype), states(module, batch)
    first = None
    for threads in (1, 2, 2, 1, 3):
        torch.set_num_threads(threads)
        results = [t for group in step(module, x, hx, lengths).values() for t in group]
        first = first or results
        for got, want in zip(results, first, strict=True):
            assert torch.equal(got, want), threads


@EACH_KERNEL
def test_training_follows_torch(backend):
    """Eight steps of SGD end where torch's end."""
    module = theirs(6, 16, num_layers=2)
    finals = []
    for m in (ours(module, backend=backend), module):
        head = torch.nn.Linear(16, 1)
        torch.nn.init.constant_(head.weight, 0.1)
        torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD([*m.parameters(), *head.parameters()], lr=0.5)
        for seed in range(8):
            x = data(5, 10, 6, seed=seed)
            loss = (head(m(x)[0][-1]).squeeze(1) - x.mean((0, 2))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        finals.append([loss.detach(), *(p.detach().clone() for p in m.parameters())])
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-5)


@EACH_KERNEL
def test_packed_gradient_is_that_of_each_sequence_alone(backend):
    module = theirs(3, 5, bidirectional=True)
    mine = ours(module, backend=backend)
    x = data(9, 6, 3).requires_grad_()
    output, (h, c) = mine(pack_padded_sequence(x, PACKED, enforce_sorted=False))
    (packed,) = torch.autograd.grad(output.data.square().sum() + h.sum() + c.sum(), x)
    for index, length in enumerate(PACKED):
        own = x[:length, index].detach().requires_grad_()
        output, (h, c) = module(own)
        (alone,) = torch.autograd.grad(output.square().sum() + h.sum() + c.sum(), own)
        torch.testing.assert_close(packed[:length, index], alone)
        assert not packed[length:, index].any()
