"""torch.jit.trace records the registered ops: its check passes, graphs can be saved, loaded and trained."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import pyops
import pyops.nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        x = self.project(x)
        return pyops.attention(x, x, x, causal=True)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = pyops.nn.LSTM(8, 4, backend="cpu")

    def forward(self, x):
        return self.lstm(x[0])[0]


MODULES = {
    "conv_relu_pool2d": pyops.nn.ConvReLUPool2d(3, 4, 3, padding=1, backend="cpu"),
    "conv_transpose2d_act": pyops.nn.ConvTranspose2dAct(3, 4, 3, backend="cpu"),
    "linear_act": pyops.nn.LinearAct(8, 4, activation="tanh", backend="cpu"),
    "attention": Attention(),
    "lstm": Recurrent(),
}


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("grad", [True, False])
def test_traces_hold_the_op_and_train(op, grad):
    module = MODULES[op]
    x = torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, x)
    assert f"pyops::{op}" in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    other = torch.randn(2, 3, 8, 8)
    want = module(other)
    wanted = torch.autograd.grad(want.square().sum(), list(module.parameters()))
    for graph in (traced, loaded):
        got = graph(other)
        assert torch.equal(got, want)
        grads = torch.autograd.grad(got.square().sum(), list(graph.parameters()))
        torch.testing.assert_close(grads, wanted)
        with torch.no_grad():
            torch.testing.assert_close(graph(other), want)
