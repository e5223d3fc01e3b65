"""What every call looks at: where the op may not stand in, the calls run as they were written."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import pyops


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.pool(self.relu(self.conv(x))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.mark.parametrize("place", ["conv", "relu", "pool"])
@pytest.mark.parametrize("style", ["method", "sequential"])
def test_hooks_added_later_are_called(place, style, net, sequential, fused):
    model = net if style == "method" else sequential
    module = dict(zip(("conv", "relu", "pool"), sequential, strict=True)).get(place)
    module = getattr(net, place) if style == "method" else module
    pyops.optimize(model)
    seen = []

    def hook(module, inputs, output):
        seen.append(type(module).__name__)
        return output + 1

    handle = module.register_forward_hook(hook)
    changed = model(X)
    # What comes before the hooked module may still be fused.
    assert len(fused) == {"conv": 0, "relu": 0, "pool": 1}[place]
    assert all(call["pool"] is None for call in fused)
    assert len(seen) == 1
    handle.remove()
    plain = model(X)
    assert len(seen) == 1 and fused[-1]["pool"] == "max"
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize(
    "register",
    [
        lambda module, call: module.register_forward_pre_hook(lambda *arguments: call()),
        lambda module, call: module.register_full_backward_hook(lambda *arguments: call()),
        lambda module, call: module.register_full_backward_pre_hook(lambda *arguments: call()),
        lambda module, call: nn.modules.module.register_module_forward_hook(
            lambda module, *arguments: isinstance(module, nn.Conv2d) and call() or None
        ),
        lambda module, call: nn.modules.module.register_module_forward_pre_hook(
            lambda module, *arguments: isinstance(module, nn.Conv2d) and call() or None
        ),
        lambda module, call: nn.modules.module.register_module_full_backward_hook(
            lambda module, *arguments: isinstance(module, nn.Conv2d) and call() or None
        ),
    ],
    ids=["pre", "backward", "backward pre", "global", "global pre", "global backward"],
)
def test_every_kind_of_hook(register, net, fused):
    pyops.optimize(net)
    seen = []
    handle = register(net.conv, lambda: seen.append(1))
    try:
        net(X.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen == [1]
    assert fused == []
    net(X)
    assert len(fused) == 1


def set_forward(conv):
    conv.forward = lambda x: F.conv2d(x, conv.weight, padding=1) * 2


def halve_slowly(conv):
    parametrizations.weight_norm(conv)
    conv.parametrizations.weight.original0.data.mul_(0.5)


@pytest.mark.parametrize(
    "change",
    [
        set_forward,
        halve_slowly,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: parametrizations.spectral_norm(conv),
        lambda conv: (
            setattr(conv, "padding_mode", "circular")
            or setattr(conv, "_reversed_padding_repeated_twice", [1, 1, 1, 1])
        ),
        lambda conv: setattr(conv, "_conv_forward", lambda x, w, b: F.conv2d(x * 2, w, b)),
        lambda conv: conv.compile(backend="eager"),
        lambda conv: setattr(conv, "__class__", type("Shifted", (nn.Conv2d,), {})),
    ],
    ids=[
        "forward",
        "weight norm",
        "prune",
        "spectral norm",
        "circular",
        "_conv_forward",
        "compile",
        "class",
    ],
)
def test_changed_convolutions_run_as_they_are(change, net, fused):
    pyops.optimize(net)
    change(net.conv)
    expected = net.pool(net.relu(net.conv(X)))
    assert torch.equal(net(X), expected)
    assert fused == []


def test_changes_that_the_op_knows_stay_fused(net, fused):
    pyops.optimize(net)
    net.conv.stride = (2, 1)
    net.conv.weight.data.mul_(-2)
    net.relu = nn.LeakyReLU(0.3)
    net.pool = nn.AvgPool2d(3, ceil_mode=True)
    expected = F.conv2d(X, net.conv.weight, net.conv.bias, stride=(2, 1), padding=1)
    expected = F.avg_pool2d(F.leaky_relu(expected, 0.3), 3, ceil_mode=True)
    torch.testing.assert_close(net(X), expected)
    assert len(fused) == 1


@pytest.mark.parametrize("replacement", [nn.GELU(), nn.Softplus(), nn.Hardtanh(), nn.ReLU6()])
def test_an_activation_exchanged_for_another(replacement, net, fused):
    pyops.optimize(net)
    net.relu = replacement
    assert torch.equal(net(X), net.pool(replacement(net.conv(X))))
    assert fused == []


def test_unbatched_and_other_dtypes(net, fused):
    pyops.optimize(net)
    torch.testing.assert_close(net(X[0]), net(X)[0])
    assert net.double()(X.double()).dtype == torch.float64
    assert net.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    assert len(fused) == 4


@pytest.mark.parametrize("bad", [X[0, 0], X[None], X.double(), X.long(), X.to_sparse()])
def test_input_the_op_does_not_take_gets_torchs_own_error(bad, net):
    with pytest.raises(Exception) as expected:
        net(bad)
    pyops.optimize(net)
    with pytest.raises(expected.type) as got:
        net(bad)
    assert str(got.value) == str(expected.value)


def test_complex_models_get_torchs_own_error(net):
    net.to(torch.complex64)
    pyops.optimize(net)
    with pytest.raises(RuntimeError, match="[Cc]omplex"):
        net(X.to(torch.complex64))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Identity()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(pool, dtype, net, fused):
    net.pool = pool
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(X.to(dtype))
        pyops.optimize(net)
        got = net(X.to(dtype))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    assert len(fused) == 1


def test_train_and_eval_are_looked_up_at_every_call(net):
    pyops.optimize(net)
    assert torch.equal(net(X), net(X))
    net.train()
    assert not torch.equal(net(X), net(X))


def test_the_backend_is_handed_on(net, sequential, fused):
    for model in (net, sequential):
        pyops.optimize(model, backend="reference")
        model(X)
        pyops.optimize(model)
        model(X)
    assert [call["backend"] for call in fused] == ["reference", None] * 2


def test_an_explicit_backend_does_not_fall_back(net):
    pyops.optimize(net, backend="cuda")
    with pytest.raises(RuntimeError, match="backend: cuda cannot take this call"):
        net(X)


@pytest.mark.parametrize("function", [pyops.optimize, pyops.restore])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        function(lambda x: x)
    with pytest.raises(TypeError, match="model: expected"), pyops.optimized("model"):
        pass


@pytest.mark.parametrize(("backend", "error"), [("fastest", ValueError), (3, TypeError)])
def test_bad_backend(backend, error, net):
    with pytest.raises(error, match=r"backend: expected .*got"):
        pyops.optimize(net, backend=backend)
    assert "forward" not in net.__dict__


@pytest.mark.parametrize("style", ["method", "sequential"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_keeps_the_op(style, dynamic, net, sequential):
    model = net if style == "method" else sequential
    expected = model(X)
    pyops.optimize(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    torch.testing.assert_close(compiled(X), expected)
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("conv_relu_pool2d" in name for name in names) == 1
    assert not any("relu" in name or "conv2d" in name for name in names if "pool2d" not in name)


def test_compile_of_functional_style_trains():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.max_pool2d(F.leaky_relu(self.conv(x), 0.1), 2, stride=1).relu()

    model = Functional()
    model(X).square().sum().backward()
    expected = model.conv.weight.grad
    model.zero_grad()
    assert len(pyops.optimize(model).replaced) == 1
    torch.compile(model, fullgraph=True, backend="aot_eager")(X).square().sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, expected)


@pytest.mark.parametrize("style", ["method", "sequential", "shared"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_op(style, strict, net, sequential):
    if style == "shared":  # torch.export traces shared modules by proxies
        net.more = nn.ModuleList([net.conv, net.relu, net.pool])
    model = sequential if style == "sequential" else net
    expected = model(X)
    pyops.optimize(model)
    program = torch.export.export(model, (X,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("pyops.conv_relu_pool2d" in target for target in targets) == 1
    torch.testing.assert_close(program.module()(X), expected)


def test_symbolic_and_jit_traces_are_plain(net, sequential):
    for model in (net, sequential):
        expected = model(X)
        pyops.optimize(model)
        traced = torch.jit.trace(model, X)
        assert "pyops" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(X), expected)
        graph = torch.fx.symbolic_trace(model).graph
        assert sum(node.op == "call_module" for node in graph.nodes) >= 3


def test_torch_func(net):
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(parameters, X)
    pyops.optimize(net)
    for name, gradient in per_sample(parameters, X).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("calls", [20])
def test_concurrent_calls(calls, net, fused):
    from concurrent.futures import ThreadPoolExecutor

    pyops.optimize(net)
    expected = net(X)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: net(X), range(calls)))
    assert all(torch.equal(result, expected) for result in results)
    assert len(fused) == calls + 1


def test_windows_too_large_get_torchs_own_error(net, sequential):
    for model in (net, sequential):
        plain = copy.deepcopy(model)
        pyops.optimize(model)
        for bad in (X[..., :1], X[:, :2]):
            with pytest.raises(RuntimeError) as expected:
                plain(bad)
            with pytest.raises(RuntimeError) as got:
                model(bad)
            assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (nn.Conv2d, [nn.Conv2d(3, 4, 3), nn.ReLU()]),
        (nn.ReLU, [nn.Conv2d(3, 4, 3), nn.ReLU()]),
        (nn.LSTM, [nn.Flatten(1, 2), nn.LSTM(8, 4)]),
        (nn.MultiheadAttention, [nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2)]),
    ],
)
def test_a_forward_put_into_a_class_of_torchs_runs(when, kind, layers, monkeypatch):
    model, calls = nn.Sequential(*layers).eval(), []
    own = kind.forward

    def patched(self, *arguments, **named):
        calls.append(self)
        return own(self, *arguments, **named)

    if when == "after":
        pyops.optimize(model)
    monkeypatch.setattr(kind, "forward", patched)
    if when == "before":
        report = pyops.optimize(model)
        assert report.replaced == [] and len(report.skipped) == 1
    with torch.enable_grad():
        model(X)
    assert len(calls) == 1


def test_exported_programs_say_why_nothing_is_replaced(net):
    program = torch.export.export(net, (X,)).module()
    report = pyops.optimize(program)
    assert report.replaced == []
    assert [(entry.place, entry.pattern) for entry in report.skipped] == [("forward", "conv2d")]
    assert "optimize before exporting" in report.skipped[0].why
