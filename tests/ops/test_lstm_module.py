"""The modules LSTM and LSTMCell: state_dict, attributes, copies, threads, overhead; and any call at all."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lstm_cases import EACH_BACKEND, EACH_KERNEL, KERNELS, check, data, ours, states, theirs

import pyops
from pyops.ops import lstm as public


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"proj_size": 3}],
    ids=str,
)
def test_state_dict_and_attributes_are_torchs(options):
    module = theirs(4, 6, **options)
    mine = pyops.nn.LSTM(4, 6, **options)
    assert list(mine.state_dict()) == list(module.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in module.named_parameters()]
    mine.load_state_dict(module.state_dict())
    module.load_state_dict(pyops.nn.LSTM(4, 6, **options).state_dict())
    names = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    for name in (*names, "bidirectional", "proj_size"):
        assert getattr(mine, name) == getattr(module, name)
    assert repr(mine) == repr(module)
    shapes = [[w.shape for w in cell] for cell in mine.all_weights]
    assert shapes == [[w.shape for w in cell] for cell in module.all_weights]
    mine.flatten_parameters()


def test_initialisation_is_torchs():
    torch.manual_seed(5)
    mine = pyops.nn.LSTM(4, 6, 2)
    torch.manual_seed(5)
    module = torch.nn.LSTM(4, 6, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(mine.parameters(), module.parameters(), strict=True)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyops.nn.LSTM(4, 6, dropout=0.5)
    assert any("num_layers greater than 1" in str(w.message) for w in caught)


def test_parameters_of_layer_norm():
    module = pyops.nn.LSTM(4, 6, 2, bidirectional=True, layer_norm=True)
    extra = set(module.state_dict()) - set(
        theirs(4, 6, num_layers=2, bidirectional=True).state_dict()
    )
    assert extra == {
        f"{name}_l{layer}{suffix}"
        for name in ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")
        for layer in (0, 1)
        for suffix in ("", "_reverse")
    }
    assert module.weight_ln_ih_l1.eq(1).all() and module.bias_ln_c_l0_reverse.eq(0).all()
    with torch.no_grad():
        module.weight_ln_c_l0.zero_()
    module.reset_parameters()
    assert module.weight_ln_c_l0.eq(1).all()
    assert "layer_norm=True" in repr(module)
    module(data(3, 2, 4))[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    module = pyops.nn.LSTM(4, 6, 2, dropout=0.25, batch_first=True, zoneout=0.1).eval()
    x = data(3, 5, 4)
    want = module(x)
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert repr(copied) == repr(module)
    torch.testing.assert_close(copied(x), want, rtol=0, atol=0)
    with torch.no_grad():
        copied.weight_hh_l1.zero_()
    assert torch.equal(module(x)[0], want[0]) and not torch.equal(copied(x)[0], want[0])


def test_moves_between_dtypes():
    module = pyops.nn.LSTM(4, 6, dtype=torch.bfloat16)
    assert module(data(3, 2, 4).bfloat16())[0].dtype == torch.bfloat16
    assert module.double()(data(3, 2, 4).double())[0].dtype == torch.float64


@EACH_BACKEND
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_cell_is_torchs(batched, bias, backend):
    cell = torch.nn.LSTMCell(4, 6, bias=bias)
    mine = pyops.nn.LSTMCell(4, 6, bias=bias, backend=backend)
    mine.load_state_dict(cell.state_dict())
    assert repr(mine) == repr(cell)
    x, hx = data(5, 4), (data(5, 6, seed=2), data(5, 6, seed=3))
    if not batched:
        x, hx = x[0], (hx[0][0], hx[1][0])
    results = []
    for m in (mine, cell):
        leaves = [t.clone().requires_grad_() for t in (x, *hx)]
        h, c = m(leaves[0], tuple(leaves[1:]))
        loss = h.square().sum() + c.sum()
        results.append((h, c, *torch.autograd.grad(loss, [*leaves, *m.parameters()])))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(mine(x), cell(x))


def test_cell_step_by_step_is_the_layer():
    module = ours(theirs(4, 6))
    cell = pyops.nn.LSTMCell(4, 6)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    x = data(5, 3, 4)
    output, last = module(x)
    state = None
    for t in range(5):
        state = cell(x[t], state)
        torch.testing.assert_close(state[0], output[t])
    torch.testing.assert_close(state, (last[0][0], last[1][0]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"layer_norm": True}, {"zoneout": (0.2, 0.4)}, {"layer_norm": True, "zoneout": 0.1}],
    ids=str,
)
def test_cell_with_options_is_the_layer(options, bias):
    """Every parameter different from its first value, gradients of all of them, drawn masks included."""
    module = pyops.nn.LSTM(4, 6, bias=bias, dtype=torch.float64, **options)
    cell = pyops.nn.LSTMCell(4, 6, bias=bias, dtype=torch.float64, **options)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(data(*parameter.shape, dtype=torch.float64, seed=20 + i) / 4)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    x, hx = data(4, 3, 4, dtype=torch.float64), states(module, 3)
    for training in (False, True):
        results = []
        for one in (module.train(training), cell.train(training)):
            torch.manual_seed(3)
            state = hx if one is module else (hx[0][0], hx[1][0])
            if one is module:
                output, (h, c) = one(x, state)
                h, c = h[0], c[0]
            else:
                shown = [state := one(x_t, state) for x_t in x]
                output, (h, c) = torch.stack([h for h, _ in shown]), state
            loss = output.square().sum() + c.sum()
            results.append((output, h, c, *torch.autograd.grad(loss, list(one.parameters()))))
        torch.testing.assert_close(*results)
    assert repr(cell).removeprefix("LSTMCell") == repr(module).removeprefix("LSTM")


def test_norms_of_a_cell_start_and_restart_at_one():
    cell = pyops.nn.LSTMCell(4, 6, layer_norm=True, dtype=torch.float64)
    sizes = {"weight_ln_ih": 24, "weight_ln_hh": 24, "weight_ln_c": 6, "bias_ln_c": 6}
    extra = set(cell.state_dict()) - set(torch.nn.LSTMCell(4, 6).state_dict())
    assert extra == set(sizes)
    for restarted in (False, True):
        if restarted:
            with torch.no_grad():
                for name in sizes:
                    getattr(cell, name).fill_(7)
            cell.reset_parameters()
        for name, size in sizes.items():
            value = getattr(cell, name)
            expected = value.new_full((size,), float(name != "bias_ln_c"))
            assert torch.equal(value, expected)
    h, c = cell(data(5, 4, dtype=torch.float64))
    (h.sum() + c.square().sum()).backward()
    assert h.dtype == torch.float64
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


@EACH_KERNEL
def test_several_threads_on_a_cold_cache(backend):
    """Each first to meet its own shape, forward and backward at the same time."""
    modules = [ours(theirs(4, h, num_layers=2), backend=backend) for h in (3, 8, 20, 33)]
    inputs = [data(5, b, 4) for b in (1, 3, 8, 17)]

    def run(i):
        output, _ = modules[i](inputs[i])
        return output, *torch.autograd.grad(output.square().sum(), list(modules[i].parameters()))

    expected = [run(i) for i in range(4)]
    public._plans.clear()
    barrier, wrong = threading.Barrier(4), []

    def work(i):
        try:
            barrier.wait()
            for _ in range(5):
                for got, want in zip(run(i), expected[i], strict=True):
                    assert torch.equal(got, want)
        except BaseException as error:
            wrong.append((i, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif("cpu" not in KERNELS, reason="no _cpu.so")
def test_tiny_call_costs_no_more_than_torchs():
    """One step of a small layer, in processor time, the better of several alternating runs of each."""
    torch.set_num_threads(1)
    module = theirs(4, 6, num_layers=1)
    mine, x = ours(module), data(1, 1, 4)

    def seconds(function):
        start = time.thread_time()
        for _ in range(200):
            function(x)
        return time.thread_time() - start

    torch.use_deterministic_algorithms(False)  # filling new memory is no part of either
    with torch.no_grad():
        for _ in range(5):
            runs = [(seconds(mine), seconds(module)) for _ in range(7)]
            fast, slow = (min(column) for column in zip(*runs, strict=True))
            if fast < slow:
                return
    pytest.fail(f"{fast / 200 * 1e6:.1f} us against torch's {slow / 200 * 1e6:.1f} us")


FIXED = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def calls(draw):
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    hidden = draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 33, 48, 65]))
    sizes = (draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 40)))
    lengths = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, sizes[0]), min_size=sizes[1], max_size=sizes[1]))
        lengths[draw(st.integers(0, sizes[1] - 1))] = sizes[0]
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    through = draw(st.sampled_from([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]))
    return options, hidden, sizes, lengths, dtype, through, draw(st.integers(0, 2**16))


@EACH_KERNEL
@FIXED
@given(calls())
def test_any_call(backend, call):
    """Values and gradients within budget; over few elements against float64 to a few roundings."""
    options, hidden, (steps, batch, features), lengths, dtype, through, seed = call
    module = theirs(features, hidden, dtype, seed, **options)
    shape = (batch, steps) if options["batch_first"] else (steps, batch)
    x = data(*shape, features, dtype=dtype, seed=seed)
    hx = states(module, batch, seed)
    check(module, x, hx, lengths, backend=backend, through=through, few=True)
