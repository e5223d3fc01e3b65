"""Optimising and restoring, copies and pickles, and methods without a usable source."""

import copy
import functools
import importlib
import inspect
import linecache
import pickle
import subprocess
import sys
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyops


class Net(nn.Module):
    def __init__(self, convs=2):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x, scale: float = 1.0):
        """Features of x."""
        return self.block(self._stem(x)) * scale

    def _stem(self, x):
        return self.pool(F.relu(self.conv(x)))


X = torch.linspace(-1, 1, 2 * 3 * 10 * 10).reshape(2, 3, 10, 10)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def attributes(model):
    return [(name, list(m.__dict__.items())) for name, m in model.named_modules()]


def assert_untouched(model, before):
    for (name, now), (_, then) in zip(attributes(model), before, strict=True):
        assert [key for key, _ in now] == [key for key, _ in then], name
        assert all(a is b for (_, a), (_, b) in zip(now, then, strict=True)), name


def test_nothing_but_the_methods_changes(net):
    parameters = dict(net.named_parameters())
    keys = list(net.state_dict())
    signature = inspect.signature(net.forward)
    modules = list(net.modules())
    pyops.optimize(net)
    assert type(net) is Net and type(net.block) is nn.Sequential
    assert list(net.modules()) == modules
    assert list(net.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert inspect.signature(net.forward) == signature
    assert net._stem.__qualname__ == "Net._stem"
    assert "_stem" in net.__dict__ and "forward" in net.block.__dict__
    assert "forward" not in net.__dict__  # nothing to replace in it
    assert "forward" not in nn.Sequential(nn.Linear(2, 2)).__dict__


def test_restore_undoes_exactly(net, fused):
    before, expected = attributes(net), net(X)
    pyops.optimize(net)
    assert len(pyops.optimize(net).replaced) == 2
    net(X)
    assert len(fused) == 2
    pyops.restore(net)
    assert_untouched(net, before)
    assert torch.equal(net(X), expected)
    assert len(fused) == 2
    pyops.restore(net)
    assert_untouched(net, before)


def test_optimising_twice_is_like_once(net):
    first = pyops.optimize(net)
    out = net(X)
    second = pyops.optimize(net)
    assert first == second and len(first.replaced) == 2
    assert torch.equal(net(X), out)
    net.conv.register_forward_hook(lambda *arguments: None)
    third = pyops.optimize(net)
    assert [entry.place for entry in third.replaced] == ["block.0"]
    assert third.skipped[0].why == "the convolution has forward hooks"
    assert "_stem" not in net.__dict__


def test_context_manager(net, fused):
    before = attributes(net)
    with pyops.optimized(net) as report:
        net(X)
    assert len(report.replaced) == len(fused) == 2
    assert_untouched(net, before)
    with pytest.raises(KeyError), pyops.optimized(net):
        raise KeyError
    assert_untouched(net, before)


def test_context_manager_in_an_optimised_model(net, fused):
    pyops.optimize(net, backend="reference")
    before = attributes(net)
    with pyops.optimized(net):
        net(X)
    assert_untouched(net, before)
    net(X)
    assert [call["backend"] for call in fused] == [None, None, "reference", "reference"]


def test_deepcopy_is_optimised_and_independent(net, fused):
    expected = net(X)
    pyops.optimize(net)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(X), expected)
    assert len(fused) == 2
    with torch.no_grad():
        twin.conv.weight.zero_()
        twin.conv.bias.fill_(1)
    assert not torch.allclose(twin(X), expected)
    torch.testing.assert_close(net(X), expected)
    pyops.restore(twin)
    assert "_stem" not in twin.__dict__ and "_stem" in net.__dict__


def test_unpickled_models_are_plain_and_can_be_optimised(net, fused):
    expected = net(X)
    pyops.optimize(net)
    loaded = pickle.loads(pickle.dumps(net))
    assert torch.equal(loaded(X), expected)
    assert fused == []
    assert loaded._stem == MethodType(Net._stem, loaded)
    assert len(pyops.optimize(loaded).replaced) == 2
    torch.testing.assert_close(loaded(X), expected)
    assert len(fused) == 2
    loaded = pickle.loads(pickle.dumps(net))
    pyops.restore(loaded)
    assert "_stem" not in loaded.__dict__ and "forward" not in loaded.block.__dict__


def named_differently(self, x):
    return F.relu(self.conv(x))


class Assigned(Net):
    forward = named_differently


def test_a_method_whose_function_has_another_name(fused):
    model = Assigned()
    expected = model(X)
    assert len(pyops.optimize(model).replaced) == 2
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)
    assert len(fused) == 1
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)


def test_saved_model_loads_in_a_process_without_this_package(tmp_path, monkeypatch):
    source = inspect.getsource(Net)
    (tmp_path / "saved_net.py").write_text(
        f"from torch import nn\nfrom torch.nn import functional as F\n\n\n{source}"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("saved_net").Net()
    assert len(pyops.optimize(model).replaced) == 2
    torch.save(model, tmp_path / "net.pt")
    torch.save({"x": X, "out": model(X)}, tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "sys.path.insert(0, '')\n"  # even under PYTHONSAFEPATH
        "model = torch.load('net.pt', weights_only=False)\n"
        "expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(model(expected['x']), expected['out'])\n"
        "assert not any(name.partition('.')[0] == 'pyops' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


def test_state_dicts_go_both_ways(net):
    other = Net()
    pyops.optimize(net)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(X), other(X))
    other.conv.weight.data.mul_(2)
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(net(X), other(X))


def test_shared_submodules(fused):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
            self.second = self.first
            self.pool = nn.MaxPool2d(2)
            self.conv = self.first[0]

        def forward(self, x):
            return self.pool(F.relu(self.conv(self.second(self.first(x)))))

    model = Twice()
    expected = model(X)
    before = attributes(model)
    report = pyops.optimize(model)
    assert [(entry.place, entry.pattern) for entry in report.replaced] == [
        ("first.0", "conv → relu → max_pool"),
        ("first.0", "conv → relu"),
    ]
    torch.testing.assert_close(model(X), expected)
    assert len(fused) == 3
    pyops.restore(model)
    assert_untouched(model, before)


def test_a_forward_of_the_users_stays(net):
    net.block.forward = MethodType(lambda self, x: x + 1, net.block)
    net._stem = functools.partial(Net._stem, net)
    before, expected = attributes(net), net(X)
    report = pyops.optimize(net)
    assert report.replaced == []
    assert [(entry.place, entry.why) for entry in report.skipped] == [
        ("block.forward", "set on this instance")
    ]
    assert torch.equal(net(X), expected)
    pyops.restore(net)
    assert_untouched(net, before)


def test_a_wrapper_put_around_ours_survives_restore(net):
    pyops.optimize(net)
    wrapped = functools.partial(net.block.forward)
    net.block.forward = wrapped
    pyops.restore(net)
    assert net.block.forward is wrapped


def exec_class():
    body = "def forward(self, x):\n    return F.relu(self.conv(x))\n"
    members = {}
    exec(compile(body, "<generated>", "exec"), {"F": F}, members)
    return type("Generated", (Net,), members)


class Callable_:
    def __call__(self, x):
        return x


def opaque(function):
    """A decorator that calls what it wraps through an attribute, so not through one cell."""

    @functools.wraps(function)
    def wrapper(*arguments):
        return wrapper.__wrapped__(*arguments)

    return wrapper


class Opaque(Net):
    @opaque
    def forward(self, x):
        return F.relu(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (exec_class(), "its source is not available"),
        (type("NotAFunction", (Net,), {"forward": Callable_()}), "it is not a Python function"),
        (Opaque, "its decorator cannot be put around another function"),
    ],
)
def test_without_a_usable_source(kind, why):
    model = kind()
    expected = model(X)
    report = pyops.optimize(model)
    assert [(entry.place, entry.why) for entry in report.skipped] == [("forward", why)]
    assert [entry.place for entry in report.replaced] == ["block.0"]
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("edit", ["another body", "not Python at all", "same body, moved"])
def test_a_file_edited_since_its_import(edit, tmp_path, monkeypatch):
    header = "from torch import nn\nfrom torch.nn import functional as F\n\n\n"
    body = (
        "class Edited(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 4, 3)\n\n"
        "    def forward(self, x):\n"
        "        return F.relu(self.conv(x))\n"
    )
    path = tmp_path / f"edited_{edit.replace(' ', '_').replace(',', '')}.py"
    path.write_text(header + body)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module(path.stem).Edited()
    expected = model(X)
    new = {
        "another body": header + body.replace("F.relu(self.conv(x))", "F.relu(self.conv(x)) * 2"),
        "not Python at all": "class Edited(\n",
        "same body, moved": header + "\n\n" + body,
    }[edit]
    path.write_text(new)
    linecache.checkcache(str(path))
    report = pyops.optimize(model)
    assert report.replaced == []
    assert len(report.skipped) == 1 and report.skipped[0].why.startswith("its source ")
    assert torch.equal(model(X), expected)


def test_rewriting_keeps_what_is_not_code():
    shift = 1.0

    class Rich(Net):
        def forward(self, x, *rest, power=2, **options: int):
            """Documented."""
            y = F.relu(self.conv(x)) ** power + shift
            return y, rest, options, __class__

        forward.note = "kept"

    model = Rich()
    expected = model(X, 1, power=3, key=4)
    pyops.optimize(model)
    assert "forward" in model.__dict__
    got = model(X, 1, power=3, key=4)
    torch.testing.assert_close(got[0], expected[0])
    assert got[1:] == expected[1:] == ((1,), {"key": 4}, Rich)
    ours, theirs = model.forward.__func__, Rich.forward
    for name in ("__doc__", "__annotations__", "__qualname__", "__kwdefaults__", "note"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.__globals__ is theirs.__globals__
    shift = 5.0  # the cell is shared, not copied
    torch.testing.assert_close(model(X, power=3)[0], expected[0] + 4)


def test_tracebacks_point_into_the_users_file(net):
    class Failing(Net):
        def forward(self, x):
            x = F.relu(self.conv(x))
            raise KeyError("here")

    model = Failing()
    pyops.optimize(model)
    assert "forward" in model.__dict__
    with pytest.raises(KeyError) as error:
        model(X)
    frame = error.traceback[-1]
    assert str(frame.path) == __file__
    assert frame.lineno == Failing.forward.__code__.co_firstlineno + 1
