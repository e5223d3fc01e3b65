"""What `pyops.optimize` finds in a model, and that the numbers stay."""

import functools

import pytest
import torch
from optimize_layers import Layers
from torch import Tensor, nn
from torch.nn import functional as F

import pyops
from pyops import models

FULL = ["conv → relu → max_pool"]


class NestedFunctions(Layers):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


class NestedModules(Layers):
    def forward(self, x):
        return self.pool(self.inplace(self.conv(x))) + 1


class Assignments(Layers):
    def forward(self, x):
        x = self.conv(x)
        x = self.relu(x)
        x = self.pool(x)
        return x.flatten(1)


class OwnNames(Layers):
    def forward(self, x):
        features: Tensor = self.conv(x)
        positive = F.relu(features, inplace=True)
        pooled = F.max_pool2d(positive, kernel_size=(2, 2), stride=2)
        return pooled * x.mean()


class Methods(Layers):
    def forward(self, x):
        y = self.conv(x)
        return torch.max_pool2d(y.relu(), 3, 2, 1, 1, True)


class ChainedMethods(Layers):
    def forward(self, x):
        return self.pool(self.conv(x).relu_()).flatten(1).sum(1)


class FunctionalConvolution(Layers):
    def forward(self, x):
        weight = self.conv.weight
        return self.pool(torch.relu(F.conv2d(x, weight, self.conv.bias, stride=2)))


class Leaky(Layers):
    def forward(self, x):
        return self.average(self.leaky(self.conv(x)))


class LeakyFunction(Layers):
    def forward(self, x):
        return F.avg_pool2d(F.leaky_relu(self.conv(x), 0.3), 2, ceil_mode=True)


class PoolThenRelu(Layers):
    def forward(self, x):
        return F.relu(self.pool(self.conv(x)))


class NoPool(Layers):
    def forward(self, x):
        return self.relu(self.conv(x)).mean((2, 3))


class NoActivation(Layers):
    def forward(self, x):
        return self.average(self.conv(x))


class AttributeFunction(Layers):
    def forward(self, x):
        return self.identity(self.pool(self.activation(self.conv(x))))


class Loop(Layers):
    def forward(self, x):
        for conv in self.convs:
            x = self.pool(F.relu(conv(x)))
        return x


class ZippedLoop(Layers):
    def forward(self, x):
        for index, (conv, pool) in enumerate(zip(self.convs, self.pools)):  # noqa: B905 (as written)
            x = pool(F.relu(conv(x)))
            x = x + index
        return x


class Branches(Layers):
    def forward(self, x):
        if x.shape[-1] > 4:
            x = self.conv(x)
            x = F.relu(x)
        else:
            x = self.pool(self.relu(self.conv(x)))
        return x


class ChainInsideChain(Layers):
    def forward(self, x):
        return self.pool(F.relu(self.conv2(self.pool(F.relu(self.conv(x))))))


class InsideALambda(Layers):
    def forward(self, x):
        return (lambda image: self.pool(F.relu(self.conv(image))))(x)


class Helper(Layers):
    def forward(self, x):
        return self._features(x).sum((2, 3))

    def _features(self, x, scale=2.0):
        return self.pool(F.relu(self.conv(x))) * scale


class Base(Layers):
    def forward(self, x):
        return self.pool(F.relu(self.conv(x)))


class CallsSuper(Base):
    def forward(self, x, *, offset=0.25):
        return super().forward(x) + F.relu(self.convs[0](x)).mean() + offset


class Decorated(Layers):
    @torch.enable_grad()
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.pool(F.relu(self.conv(x)))


def with_closure(scale):
    def forward(self, x):
        return self.pool(F.relu(self.conv(x))) * scale

    return type("WithClosure", (Layers,), {"forward": forward})


WithClosure = with_closure(3.0)


@pytest.mark.parametrize(
    ("kind", "patterns"),
    [
        (NestedFunctions, FULL),
        (NestedModules, FULL),
        (Assignments, FULL),
        (OwnNames, FULL),
        (Methods, FULL),
        (ChainedMethods, FULL),
        (FunctionalConvolution, FULL),
        (Leaky, ["conv → leaky_relu → avg_pool"]),
        (LeakyFunction, ["conv → leaky_relu → avg_pool"]),
        (PoolThenRelu, ["conv → max_pool → relu"]),
        (NoPool, ["conv → relu"]),
        (NoActivation, ["conv → avg_pool"]),
        (AttributeFunction, FULL),
        (Loop, FULL * 2),
        (ZippedLoop, [*FULL, "conv → relu → avg_pool"]),
        (Branches, ["conv → relu", *FULL]),
        (ChainInsideChain, FULL * 2),
        (InsideALambda, FULL),
        (Helper, FULL),
        (CallsSuper, ["conv → relu"]),
        (Decorated, FULL),
        (WithClosure, FULL),
    ],
)
def test_found_and_numerically_the_same(kind, patterns, fused, assert_same_results):
    torch.manual_seed(0)
    report = assert_same_results(kind(), torch.randn(2, 3, 13, 14))
    assert [entry.pattern for entry in report.replaced] == patterns
    assert report.skipped == []
    assert len(fused) == (1 if kind is Branches else len(patterns))


@pytest.mark.parametrize("last", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Identity()])
def test_sequential(last, fused, assert_same_results):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Identity(),
        nn.ReLU(inplace=True),
        last,
        nn.Sequential(nn.Conv2d(8, 4, 3, groups=4), nn.LeakyReLU()),
        nn.Flatten(),
    )
    report = assert_same_results(model, torch.randn(2, 3, 12, 12))
    end = {nn.MaxPool2d: " → max_pool", nn.AvgPool2d: " → avg_pool"}.get(type(last), "")
    assert [(entry.place, entry.pattern) for entry in report.replaced] == [
        ("0", f"conv → relu{end}"),
        ("4.0", "conv → leaky_relu"),
    ]
    assert len(fused) == 2


def test_sequential_subclass_with_a_forward_of_its_own(fused):
    class Doubled(nn.Sequential):
        def forward(self, input):
            return super().forward(input) * 2

    model = Doubled(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(1, 3, 6, 6)
    expected = model(x)
    assert pyops.optimize(model).replaced == []
    assert torch.equal(model(x), expected)
    assert fused == []


@pytest.mark.parametrize("nan", [False, True], ids=["finite", "nan"])
@pytest.mark.parametrize("order", ["relu, pool", "pool, relu"])
def test_ties_nan_and_zero_gradients_are_exact(order, nan, assert_same_results):
    """Small integers make every sum exact, so equal means equal, wherever the maximum is tied."""
    torch.manual_seed(0)
    layers = [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3), *(layers if order == "relu, pool" else layers[::-1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    x = torch.randint(-1, 2, (2, 2, 11, 11)).float()
    if nan:
        x[1, 0, 4, 5] = float("nan")

    def step():
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        out = model(leaf)
        out.backward(torch.arange(out.numel()).reshape(out.shape) % 7.0)
        grads = [leaf.grad, model[0].bias.grad]
        # torch also multiplies the NaN by the zero gradients of windows' losers; here they are skipped.
        return [out, *grads] if nan else [out, *grads, model[0].weight.grad]

    expected = step()
    assert len(pyops.optimize(model).replaced) == 1
    for ours, theirs in zip(step(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("build", "image", "replaced"),
    [
        (functools.partial(models.small_cnn, "cifar"), (3, 32, 32), 2),
        (functools.partial(models.small_cnn, "mnist"), (1, 28, 28), 3),
        (functools.partial(models.small_cnn, "deep", pool="avg"), (3, 32, 32), 3),
        (lambda: models.AlexNet().features, (3, 63, 65), 5),
        (lambda: models.VGG(((8,), (12,), (16, 16))).features, (3, 32, 33), 4),
    ],
)
def test_models(build, image, replaced, fused, assert_same_results):
    torch.manual_seed(0)
    report = assert_same_results(build(), torch.randn(2, *image))
    assert len(report.replaced) == replaced == len(fused)
    assert report.skipped == []


def test_the_report_prints_as_a_table():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
            self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.head(self.stem(x))

    lines = str(pyops.optimize(Model())).splitlines()
    assert lines[0].split() == ["place", "pattern", "why"]
    assert lines[1].split() == ["replaced", "stem.0", "conv", "→", "relu", "→", "max_pool"]
    assert lines[2].startswith("skipped   head.0  conv → BatchNorm2d")
    assert lines[2].endswith("would change the parameters")
    assert len(lines) == 3
    assert str(pyops.optimize(nn.Linear(2, 2))) == "nothing to replace"
