"""What `pyops.optimize` leaves alone: it says why, and nothing changes."""

import pytest
import torch
from optimize_layers import Layers
from torch import nn
from torch.nn import functional as F

import pyops
from pyops import models

FULL = "conv → relu → max_pool"


class SecondUser(Layers):
    def forward(self, x):
        y = self.conv(x)
        z = F.relu(y)
        return z + y


class SecondUserOfTheActivation(Layers):
    def forward(self, x):
        y = F.relu(self.conv(x))
        z = self.pool(y)
        return z.sum() + y


class CapturedIntermediate(Layers):
    def forward(self, x):
        y = self.conv(x)
        z = F.relu(y)
        return z + (lambda: y)()


class UsedInTheNextRound(Layers):
    def forward(self, x):
        total = 0
        for step in range(2):
            if step:
                total = total + y.sum()  # noqa: F821 (bound in the round before)
            y = self.conv(x)
            z = F.relu(y)
            total = total + z
        return total


class PastABreak(Layers):
    def forward(self, x):
        for _ in range(2):
            y = self.conv(x)
            z = F.relu(y)
            if z.sum() > 0:
                break
            y = x
        return y + z


class ChangedInPlace(Layers):
    def forward(self, x):
        y = self.conv(x)
        z = F.relu(y)
        y += 1
        return z


class UsedTwiceInOneStatement(Layers):
    def forward(self, x):
        y = self.conv(x)
        return F.relu(y) - y


class ReadByLocals(Layers):
    def forward(self, x):
        y = self.conv(x)
        z = F.relu(y)
        return z + locals()["y"]


class RestoredByAHandler(Layers):
    def forward(self, x):
        try:
            x = self.conv(x)
            x = F.relu(x, self.missing)
        except AttributeError:
            pass
        return x


class OtherEffectsBetween(Layers):
    def forward(self, x):
        y = self.conv(x)
        noise = torch.rand(())
        return F.relu(y) * noise


class ArgumentWithEffects(Layers):
    def forward(self, x):
        return F.leaky_relu(self.conv(x), torch.rand(()).item())


class NormBetween(Layers):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv(x)
        x = self.norm(x)
        return self.pool(self.relu(x))


class OtherActivation(Layers):
    def forward(self, x):
        return self.pool(F.gelu(self.conv(x)))


class Indices(Layers):
    def forward(self, x):
        pooled, indices = F.max_pool2d(self.conv(x), 2, return_indices=True)
        return pooled + indices


@pytest.mark.parametrize(
    ("kind", "replaced", "skipped", "why"),
    [
        (SecondUser, None, "conv → relu", "`y` is used again on line"),
        (SecondUserOfTheActivation, "conv → relu", FULL, "`y` is used again on line"),
        (CapturedIntermediate, None, "conv → relu", "`y` is shared with another scope"),
        (UsedInTheNextRound, None, "conv → relu", "`y` may be used again"),
        (UsedTwiceInOneStatement, None, "conv → relu", "`y` is used again on line"),
        (ReadByLocals, None, "conv → F.relu", "F.relu follows, but not where"),
        (RestoredByAHandler, None, "conv → F.relu", "F.relu follows, but not where"),
        (OtherEffectsBetween, None, "conv → F.relu", "F.relu follows, but not where"),
        (ArgumentWithEffects, None, "conv → F.leaky_relu", "follows, but not where"),
        (NormBetween, None, "conv → BatchNorm2d", "self.norm follows; folding it"),
        (Indices, None, "conv → max_pool", "no fused form of this max_pool"),
        (PastABreak, None, "conv → relu", "`y` may be used again"),
        (ChangedInPlace, None, "conv → relu", "`y` is used again on line"),
        (OtherActivation, None, "conv → F.gelu", "F.gelu follows, which does not fuse"),
    ],
)
def test_left_alone(kind, replaced, skipped, why, fused):
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(1)
    expected = model(x)
    report = pyops.optimize(model)
    assert [entry.pattern for entry in report.replaced] == ([replaced] if replaced else [])
    (entry,) = report.skipped
    assert (entry.place, entry.pattern) == ("conv", skipped)
    assert why in entry.why
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)
    assert len(fused) == len(report.replaced)


@pytest.mark.parametrize(
    ("layers", "replaced", "skipped"),
    [
        ([nn.AvgPool2d(2), nn.ReLU()], ["conv → avg_pool"], "relu does not fuse after"),
        ([nn.MaxPool2d(2), nn.LeakyReLU()], ["conv → max_pool"], "leaky_relu does not fuse after"),
        ([nn.ReLU(), nn.ReLU()], ["conv → relu"], "relu does not fuse after"),
        (
            [nn.ReLU(), nn.MaxPool2d(2, dilation=2)],
            ["conv → relu"],
            "no fused form of this max_pool",
        ),
        ([nn.ReLU(), nn.MaxPool2d(2, return_indices=True)], ["conv → relu"], "no fused form"),
        ([nn.LeakyReLU(-0.1)], [], "no fused form of this leaky_relu"),
        (
            [nn.AvgPool2d(3, padding=1, count_include_pad=False)],
            [],
            "no fused form of this avg_pool",
        ),
        ([nn.AvgPool2d(2, divisor_override=3)], [], "no fused form of this avg_pool"),
        ([nn.AvgPool2d(2, count_include_pad=False)], ["conv → avg_pool"], None),
        ([nn.BatchNorm2d(4), nn.ReLU()], [], "folding it into the convolution"),
        ([nn.Dropout(0.5), nn.ReLU()], [], "1 follows, which does not fuse"),
        ([], [], "no activation or pool follows"),
    ],
)
def test_semantics_the_op_does_not_have(layers, replaced, skipped, fused):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers)
    x = torch.randn(2, 3, 9, 9)
    torch.manual_seed(1)
    expected = model(x)
    report = pyops.optimize(model)
    assert [entry.pattern for entry in report.replaced] == replaced
    assert len(report.skipped) == (skipped is not None)
    if skipped:
        assert skipped in report.skipped[0].why
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)
    assert len(fused) == len(replaced)


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        (type("Mine", (nn.Conv2d,), {})(3, 4, 3), "is a Mine, not exactly nn.Conv2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "is a ParametrizedConv2d"),
    ],
)
def test_unusual_convolutions(conv, why, fused):
    model = nn.Sequential(conv, nn.ReLU())
    x = torch.randn(1, 3, 6, 6)
    expected = model(x)
    report = pyops.optimize(model)
    assert report.replaced == []
    assert why in report.skipped[0].why
    assert torch.equal(model(x), expected)
    assert fused == []


def test_resnet_is_left_as_it_is_and_says_why(fused):
    model = models.resnet18(num_classes=4).eval()
    x = torch.randn(1, 3, 40, 40)
    expected = model(x)
    report = pyops.optimize(model)
    assert report.replaced == []
    assert len(report.skipped) == 20
    stem = report.skipped[0]
    assert (stem.place, stem.pattern) == ("conv1", "conv → BatchNorm2d")
    assert "folding it into the convolution would change the parameters" in stem.why
    assert torch.equal(model(x), expected)
