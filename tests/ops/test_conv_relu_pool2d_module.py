"""The module ConvReLUPool2d: state_dict, copies, moves; and calls from several threads at once."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from conv_pool_cases import make_inputs

import pyops
from pyops.nn import ConvReLUPool2d
from pyops.ops import conv_relu_pool


def test_module_state_dict_goes_to_conv2d_and_back():
    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    module = ConvReLUPool2d(4, 8, 3, padding=1, backend="cpu")
    assert list(module.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 4, 10, 10)
    module(x)
    module.load_state_dict(conv.state_dict())
    want = torch.nn.functional.max_pool2d(conv(x).relu(), 2)
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
    other = ConvReLUPool2d(4, 8, 3, padding=1)
    conv.load_state_dict(other.state_dict())
    assert torch.equal(conv.weight, other.weight) and torch.equal(conv.bias, other.bias)
    assert list(ConvReLUPool2d(4, 8, 3, bias=False).state_dict()) == ["weight"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_module_copies(how):
    options = {"pool": "avg", "pool_size": (2, 1), "activation": "leaky_relu", "ceil_mode": True}
    module = ConvReLUPool2d(4, 8, 3, padding="valid", **options)
    x = torch.randn(2, 4, 11, 11)
    expected = module(x)
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert torch.equal(copied(x), expected) and repr(copied) == repr(module)
    with torch.no_grad():
        copied.weight.zero_()
    assert torch.equal(module(x), expected) and not torch.equal(copied(x), expected)


def test_module_moves_between_dtypes_and_devices():
    module = ConvReLUPool2d(4, 8, 3, dtype=torch.bfloat16)
    assert module(torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert module.double()(torch.randn(1, 4, 8, 8).double()).dtype == torch.float64
    meta = ConvReLUPool2d(4, 8, 3, device="meta")
    assert meta(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 8, 3, 3)
    assert "pool=max, pool_size=2" in repr(meta)


def test_several_threads_on_a_cold_cache():
    """Eight threads, each first to meet its own shape, forward and backward at the same time."""
    cases = [make_inputs((2, c, 12 + c, 14), (2 * c, c, 3, 3), seed=c) for c in (3, 5, 16, 32)] * 2
    expected = []
    for case in cases:
        leaves = [t.clone().requires_grad_() for t in case]
        out = pyops.conv_relu_pool2d(*leaves, padding=1, backend="cpu")
        expected.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    conv_relu_pool._plans.clear()
    barrier, wrong = threading.Barrier(len(cases)), []

    def work(index):
        try:
            barrier.wait()
            for _ in range(5):
                leaves = [t.clone().requires_grad_() for t in cases[index]]
                out = pyops.conv_relu_pool2d(*leaves, padding=1, backend="cpu")
                results = (out, *torch.autograd.grad(out.sum(), leaves))
                for got, want in zip(results, expected[index], strict=True):
                    assert torch.equal(got, want)
        except BaseException as error:
            wrong.append((index, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
