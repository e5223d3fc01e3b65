"""Transposed convolution, batch norm in eval and activation swapped into generators."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyops
from pyops._swap import conv_transpose
from pyops.models.gan import DCGANDiscriminator, DCGANGenerator


@pytest.fixture
def fused(monkeypatch):
    """The options of each fused call."""
    calls, original = [], conv_transpose.conv_transpose2d_act

    def counting(**call):
        calls.append(call)
        return original(**call)

    monkeypatch.setattr(conv_transpose, "conv_transpose2d_act", counting)
    return calls


def generator():
    torch.manual_seed(0)
    model = DCGANGenerator(28, 12, 8)
    for module in model.modules():  # statistics that are not those of a new module
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def test_eval_folds_batch_norm(fused):
    model, noise = generator().eval(), torch.randn(3, 12)
    plain = model(noise)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = pyops.optimize(model)
    patterns = [e.pattern for e in report.replaced]
    chain = "conv_transpose → batch_norm → relu"
    assert patterns == [chain, chain, "conv_transpose → tanh"]
    torch.testing.assert_close(model(noise), plain, rtol=1e-4, atol=1e-5)
    assert [c["activation"] for c in fused] == ["relu", "relu", "tanh"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    pyops.restore(model)
    assert torch.equal(model(noise), plain)


def test_training_is_bitwise_unfused_around_batch_norm(fused):
    model, noise = generator().train(), torch.randn(3, 12)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    plain = model(noise)
    after = {k: v.clone() for k, v in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    pyops.optimize(model)
    out = model(noise)
    assert [c["activation"] for c in fused] == ["tanh"]
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, after[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "batch", "alone"), [(32, 8, 1), (32, 7, 0), (24, 8, 0)])
def test_training_takes_convolutions_alone_where_winograd_does(fused, width, batch, alone):
    torch.manual_seed(0)
    model, noise = DCGANGenerator(28, 12, width).train(), torch.randn(batch, 12)
    parameters = list(model.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = model(noise)
    plain = [out, *torch.autograd.grad(out.square().sum(), parameters)]
    model.load_state_dict(before)
    pyops.optimize(model)
    out = model(noise)
    assert [c["activation"] for c in fused] == [None] * alone + ["tanh"]
    found = [out, *torch.autograd.grad(out.square().sum(), parameters)]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_gradients_reach_every_parameter(fused):
    model, noise = generator().eval(), torch.randn(3, 12)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model(noise).square().sum(), parameters)
    pyops.optimize(model)
    found = torch.autograd.grad(model(noise).square().sum(), parameters)
    assert len(fused) == 3
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.weight = nn.Parameter(torch.randn(4, 2, 2, 2))

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.up(x)), 0.2)
        x = F.conv_transpose2d(x, self.weight, stride=2)
        return x.sigmoid()


def test_functional_style(fused):
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(2, 3, 5, 5)
    plain = model(x)
    report = pyops.optimize(model)
    assert {e.pattern for e in report.replaced} == {
        "conv_transpose → batch_norm → leaky_relu",
        "conv_transpose → sigmoid",
    }
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
    assert [c["activation"] for c in fused] == ["leaky_relu", "sigmoid"]


def test_output_size_and_hooks_stay_torchs(fused):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.ReLU()), torch.randn(2, 3, 5, 5)
    pyops.optimize(model)
    seen = []
    handle = model[0].register_forward_hook(lambda *a: seen.append(1))
    model(x)
    assert seen == [1] and not fused
    handle.remove()
    model(x)
    assert seen == [1] and len(fused) == 1


def test_discriminator_runs_its_convolutions_fused():
    model, images = DCGANDiscriminator(28, 8), torch.randn(2, 1, 28, 28)
    plain = model(images)
    report = pyops.optimize(model)
    assert [e.pattern for e in report.replaced] == ["conv → leaky_relu"] * 2
    torch.testing.assert_close(model(images), plain)
