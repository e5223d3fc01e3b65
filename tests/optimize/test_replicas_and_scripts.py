"""Replicas of DataParallel run on their own weights; what torch.jit has compiled is left alone."""

import copy

import pytest
import torch
from torch import nn

import pyops

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self._head(x)

    def _head(self, x):
        return self.pool(self.conv(x).relu())


def replicate(module, weights):
    """As nn.parallel.replicate does on each device: copies without parameters, then tensors as attributes."""
    replicas = {name: m._replicate_for_data_parallel() for name, m in module.named_modules()}
    for name, replica in replicas.items():
        prefix = f"{name}." if name else ""
        for key in replica._modules:
            replica._modules[key] = replicas[prefix + key]
        for key in module.get_submodule(name)._parameters:
            setattr(replica, key, weights.get(prefix + key))
    return replicas[""]


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (Net(), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), 1),
        (nn.Sequential(nn.Flatten(1, 2), nn.LSTM(8, 4)), 0),
    ],
)
def test_replicas_run_on_their_own_weights(model, calls, fused):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5).add_(0.1)

    def output(module):
        out = module(X)
        return out[0] if isinstance(out, tuple) else out

    expected, before = output(other), output(model)
    pyops.optimize(model)
    replica = replicate(model, dict(other.state_dict()))
    torch.testing.assert_close(output(replica), expected)
    assert len(fused) == calls
    torch.testing.assert_close(output(model), before)
    replica = replicate(copy.deepcopy(model), dict(other.state_dict()))
    torch.testing.assert_close(output(replica), expected)
    pyops.restore(model)
    assert "_replicate_for_data_parallel" not in model.__dict__


def test_a_users_own_replication_stays():
    model = Net()
    own = model._replicate_for_data_parallel = lambda: "mine"
    assert len(pyops.optimize(model).replaced) == 1
    assert model._replicate_for_data_parallel() == "mine"
    pyops.restore(model)
    assert model._replicate_for_data_parallel is own


@pytest.mark.parametrize(
    "compiled",
    [torch.jit.script, lambda m: torch.jit.trace(m, X)],
    ids=["scripted", "traced"],
)
def test_what_torch_jit_compiled_is_skipped_and_named(compiled, fused):
    net = compiled(Net())
    expected = net(X)
    why = "compiled by torch.jit, it has no Python source"
    report = pyops.optimize(net)
    assert report.replaced == []
    assert [(entry.place, entry.why) for entry in report.skipped] == [("forward", why)]
    assert torch.equal(net(X), expected)
    pyops.restore(net)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), net)
    report = pyops.optimize(model)
    assert [entry.place for entry in report.replaced] == ["0"]
    assert (report.skipped[-1].place, report.skipped[-1].why) == ("2.forward", why)
    assert len(report.skipped) == 1
    assert model(X).shape == expected.shape and len(fused) == 1


def test_a_static_forward_is_left_as_it_is():
    class Static(nn.Module):
        @staticmethod
        def forward(x):
            return torch.conv2d(x, torch.ones(2, 3, 1, 1)).relu()

    model = Static()
    report = pyops.optimize(model)
    assert report.replaced == []
    assert torch.equal(model(X), Static()(X))
