"""optimize and nn.LSTM: the guarded forward, what it leaves alone, restoring, copies, compile."""

import copy
import pickle
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, rnn

import pyops
from pyops._swap import lstm as swap
from pyops.testing import GRADIENT_BUDGET, assert_within_budget


class Tagger(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, **options)
        self.fc = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x, hx=None):
        output, state = self.lstm(x, hx)
        return self.fc(output), state


X = torch.linspace(-1, 1, 6 * 4 * 5).reshape(6, 4, 5)
HX = (torch.linspace(-1, 1, 32).reshape(1, 4, 8), torch.linspace(1, -1, 32).reshape(1, 4, 8))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tagger()


@pytest.fixture
def called(monkeypatch):
    """A list that grows by the options of every call of the op that an optimised model makes."""
    calls = []
    op = swap.lstm

    def counting(*arguments, **options):
        calls.append(options)
        return op(*arguments, **options)

    monkeypatch.setattr(swap, "lstm", counting)
    return calls


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_same_results(options, packed, called):
    torch.manual_seed(0)
    model = Tagger(**options)
    runs = []
    for dtype, fast in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        twin = copy.deepcopy(model).to(dtype)
        if fast:
            report = pyops.optimize(twin)
            assert [(e.place, e.pattern) for e in report.replaced] == [("lstm", "lstm")]
            assert str(report).splitlines()[1].split() == ["replaced", "lstm", "lstm"]
        x = X.to(dtype).requires_grad_()
        if packed:
            lengths = [3, 4, 1, 2] if options.get("batch_first") is None else [4, 2, 1, 3, 4, 1]
            input = rnn.pack_padded_sequence(
                x, lengths, options.get("batch_first", False), enforce_sorted=False
            )
            output, (h, _) = twin.lstm(input)
            assert isinstance(output, rnn.PackedSequence)
            output = output.data
        else:
            output, (h, _) = twin(x)
        loss = output.square().sum() + h.sum()
        runs.append((output, h, *torch.autograd.grad(loss, [x, *twin.lstm.parameters()])))
    assert len(called) == 1
    for index, triple in enumerate(zip(*runs, strict=True)):
        assert_within_budget(*triple, **({"k": GRADIENT_BUDGET} if index > 1 else {}))


def test_a_model_that_is_an_lstm():
    lone = nn.LSTM(5, 8)
    want = lone(X, HX)
    report = pyops.optimize(lone)
    assert [entry.place for entry in report.replaced] == ["LSTM"]
    torch.testing.assert_close(lone(X, HX), want)
    torch.testing.assert_close(lone(X[:, 0]), nn.LSTM.forward(lone, X[:, 0]))


def test_options_are_read_at_every_call(model, called):
    pyops.optimize(model)
    model.train(False)
    model(X)
    model.train(True)
    model.lstm.dropout = 0.3
    model(X)
    assert [(c["training"], c["dropout"]) for c in called] == [(False, 0.0), (True, 0.3)]


def test_restore_and_context_manager(model, called):
    before, want = dict(model.lstm.__dict__), model(X)
    with pyops.optimized(model):
        assert "forward" in model.lstm.__dict__
        model(X)
    assert len(called) == 1
    assert model.lstm.__dict__ == before
    first = pyops.optimize(model)
    assert pyops.optimize(model) == first
    pyops.restore(model)
    assert model.lstm.__dict__ == before
    torch.testing.assert_close(model(X), want, rtol=0, atol=0)
    assert len(called) == 1


def test_type_parameters_and_state_dict_stay(model):
    keys, parameters = list(model.state_dict()), list(model.parameters())
    pyops.optimize(model)
    assert type(model.lstm) is nn.LSTM and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_deepcopy_is_optimised_and_independent(model, called):
    pyops.optimize(model)
    want = model(X)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(X), want, rtol=0, atol=0)
    assert len(called) == 2 and twin.lstm.forward.__self__ is twin.lstm
    with torch.no_grad():
        twin.lstm.weight_hh_l0.zero_()
    torch.testing.assert_close(model(X), want, rtol=0, atol=0)
    assert not torch.equal(twin(X)[0], want[0])


def test_unpickled_models_are_plain_and_can_be_optimised(model, called):
    want = model(X)
    pyops.optimize(model)
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(X), want, rtol=0, atol=0)
    assert called == [] and loaded.lstm.forward == MethodType(nn.LSTM.forward, loaded.lstm)
    assert len(pyops.optimize(loaded).replaced) == 1
    torch.testing.assert_close(loaded(X), want)
    assert len(called) == 1


def test_hooks_run_and_may_change_results(model, called):
    pyops.optimize(model)
    seen = []
    model.lstm.register_forward_pre_hook(lambda m, args: seen.append("before"))
    model.lstm.register_forward_hook(lambda m, args, out: (out[0] * 0, out[1]))
    output, _ = model(X)
    torch.testing.assert_close(output, model.fc.bias.expand(6, 4, 3))
    assert seen == ["before"] and len(called) == 1


def test_moving_and_changing_weights(model, called):
    pyops.optimize(model)
    want = copy.deepcopy(model)
    pyops.restore(want)
    with torch.no_grad():
        for m in (model, want):
            m.lstm.weight_hh_l0.mul_(-2)
            m.lstm.bias_ih_l0 = nn.Parameter(torch.ones(32))
    torch.testing.assert_close(model(X), want(X))
    torch.testing.assert_close(model.double()(X.double()), want.double()(X.double()))
    own = {name: value.float() * 2 for name, value in want.state_dict().items()}
    results = [torch.func.functional_call(m.float(), own, (X,)) for m in (model, want)]
    torch.testing.assert_close(*results)
    assert len(called) == 3


class Loud(nn.LSTM):
    """Inherits forward, but a subclass may mean anything."""


class Subclassed(torch.Tensor):
    pass


def skipped_because(module):
    model = nn.Sequential(module)
    report = pyops.optimize(model)
    assert report.replaced == []
    return [entry.why for entry in report.skipped]


def test_left_alone():
    assert skipped_because(Loud(5, 8)) == ["the LSTM is a Loud, not exactly nn.LSTM"]
    assert skipped_because(nn.LSTM(5, 8, proj_size=3)) == ["no kernel has a projection (proj_size)"]
    normed = parametrizations.weight_norm(nn.LSTM(5, 8), "weight_hh_l0")
    assert skipped_because(normed) == ["the LSTM is a ParametrizedLSTM, not exactly nn.LSTM"]
    own = nn.LSTM(5, 8)
    own.forward = lambda x: x
    assert skipped_because(own) == ["set on this instance"]
    assert skipped_because(nn.GRU(5, 8)) == []
    ours = pyops.nn.LSTM(5, 8)
    assert skipped_because(ours) == []


def test_calls_that_run_as_written(model, called):
    """Tensor subclasses, wrong dtypes, parametrizations and tracing go to torch's own forward."""
    pyops.optimize(model)
    want = copy.deepcopy(model)
    pyops.restore(want)
    torch.testing.assert_close(model(X.as_subclass(Subclassed)), want(X.as_subclass(Subclassed)))
    with pytest.raises(ValueError, match="RNN input dtype"):
        model(X.double())
    with pytest.raises(TypeError):
        model.lstm()
    traced = torch.jit.trace(model, (X,), check_trace=False)
    assert "aten::lstm" in str(traced.inlined_graph)
    parametrizations.weight_norm(model.lstm, "weight_hh_l0")
    parametrizations.weight_norm(want.lstm, "weight_hh_l0")
    torch.testing.assert_close(model(X), want(X))
    assert called == []


def test_autocast(model, called):
    want = copy.deepcopy(model)
    pyops.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = model(X, HX)[0], want(X, HX)[0]
    assert got.dtype == plain.dtype == torch.bfloat16 and len(called) == 1
    exact, _ = want.double()(X.double(), tuple(s.double() for s in HX))
    assert_within_budget(got, plain, exact)


@pytest.mark.parametrize("allow", [False, True], ids=["default", "allow_rnn"])
def test_compile(model, allow):
    """The op is in a graph; in the model's own only where dynamo is told to enter an nn.LSTM."""
    torch._dynamo.reset()
    want = model(X)
    pyops.optimize(model)
    graphs = []

    def recorder(graph, inputs):
        graphs.append(graph.code)
        return graph

    with torch._dynamo.config.patch(allow_rnn=allow):
        compiled = torch.compile(model, backend=recorder, fullgraph=allow)
        torch.testing.assert_close(compiled(X), want)
    (code,) = [code for code in graphs if "pyops.lstm" in code]
    assert ("linear" in code) == allow


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(model, strict):
    want = model(X)
    pyops.optimize(model)
    program = torch.export.export(model, (X,), strict=strict)
    assert "pyops.lstm.default" in {str(node.target) for node in program.graph.nodes}
    assert {"lstm.weight_hh_l0", "fc.bias"} <= set(program.state_dict)
    torch.testing.assert_close(program.module()(X), want)
