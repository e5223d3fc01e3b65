"""Counts calls of the fused op, and compares a model with itself unoptimised."""

import copy

import pytest
import torch

import pyops
from pyops._swap import conv_pool
from pyops.testing import GRADIENT_BUDGET, assert_within_budget


@pytest.fixture
def fused(monkeypatch):
    """A list that grows by the arguments of every fused call a rewritten forward makes."""
    calls = []
    op = conv_pool.conv_relu_pool2d

    def counting(**arguments):
        calls.append(arguments)
        return op(**arguments)

    monkeypatch.setattr(conv_pool, "conv_relu_pool2d", counting)
    return calls


def _run(model, x, seed=0):
    """Output, and gradients of the input and of every parameter, of one step."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x)
    results = {"output": out.detach()}
    if out.requires_grad:
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        (out * weights).sum().backward()
        results["input"] = x.grad
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[name] = parameter.grad.clone()
    return results


@pytest.fixture
def assert_same_results():
    """check(model, x) optimises, compares outputs and gradients, and returns the report."""

    def check(model, x):
        plain = _run(copy.deepcopy(model), x)
        exact = _run(copy.deepcopy(model).double(), x.double())
        report = pyops.optimize(model)
        ours = _run(model, x)
        assert ours.keys() == plain.keys()
        for name, result in ours.items():
            budget = {} if name == "output" else {"k": GRADIENT_BUDGET}
            assert_within_budget(result, plain[name], exact[name], name=name, **budget)
        return report

    return check
