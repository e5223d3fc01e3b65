"""What a call costs beside its arithmetic."""

import time

import pytest
import torch
import torch.nn.functional as F

import pyops


@pytest.mark.skipif(
    pyops.backends.why_not("conv_relu_pool2d", "cpu") is not None, reason="no _cpu.so"
)
def test_tiny_call_costs_less_than_twice_eager():
    """On 1x1x8x8, in processor time, the better of several alternating runs of each."""
    input, weight, bias = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 3, 3), torch.randn(1)

    def fused():
        pyops.conv_relu_pool2d(input, weight, bias)

    def eager():
        F.max_pool2d(F.relu(F.conv2d(input, weight, bias)), 2)

    def seconds(function):
        start = time.thread_time()
        for _ in range(500):
            function()
        return time.thread_time() - start

    torch.use_deterministic_algorithms(False)  # filling new memory is no part of either
    with torch.no_grad():
        for _ in range(5):
            runs = [(seconds(fused), seconds(eager)) for _ in range(9)]
            ours, theirs = (min(column) for column in zip(*runs, strict=True))
            if ours < 2 * theirs:
                return
    pytest.fail(f"{ours / 500 * 1e6:.1f} us against eager's {theirs / 500 * 1e6:.1f} us")
