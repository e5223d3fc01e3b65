"""Backend "cuda" of conv_relu_pool2d where there is no GPU: what it refuses and why, its op for TF32."""

from __future__ import annotations

import pytest
import torch

import pyops
from pyops import backends
from pyops.ops import conv_relu_pool
from pyops.reference.conv_relu_pool import ConvPoolSpec

SPEC = ConvPoolSpec((1, 1), (1, 1), (1, 1), 1, "relu", 0.01, "max", (2, 2), (2, 2), (0, 0), False)
DEVICE = torch.device("cuda", 0)


def test_a_cpu_tensor_is_refused_with_the_reason():
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(RuntimeError, match="backend: cuda cannot take this call: .+"):
        pyops.conv_relu_pool2d(x, w, backend="cuda")
    reason = backends.why_not("conv_relu_pool2d", "cuda", "cpu")
    expected = ("without CUDA", "_cuda.so", "no CUDA GPU", "takes cuda tensors")
    assert any(words in reason for words in expected), reason


@pytest.fixture
def refusal(monkeypatch):
    monkeypatch.setattr(backends, "capability", lambda device: (8, 0))

    def ask(x=(2, 16, 32, 32), w=(8, 16, 3, 3), dtype=torch.bfloat16, needs_grad=False, **changes):
        shapes = torch.Size(x), torch.Size(w)
        spec = SPEC._replace(**changes)
        return conv_relu_pool._refusal("cuda", *shapes, dtype, DEVICE, spec, needs_grad)

    return ask


def test_what_the_kernels_cannot_do_is_refused_in_words(refusal, monkeypatch):
    assert refusal() is None
    assert refusal(dtype=torch.float32, needs_grad=True) is None
    assert "float64" in refusal(dtype=torch.float64)
    assert "128 places" in refusal(pool_size=(12, 11), pool_stride=(12, 11))
    assert refusal(pool_size=(8, 16), pool_stride=(8, 16)) is None
    assert "8 places" in refusal(pool="avg", pool_size=(3, 3), needs_grad=True)
    assert "2**30" in refusal(x=(1, 16, 2**30, 8))
    monkeypatch.setattr(backends, "capability", lambda device: (7, 5))
    assert "8.0" in refusal()


def test_both_ops_have_one_schema_and_the_same_rules():
    for suffix in ("", "_backward"):
        exact, tf32 = (
            str(getattr(torch.ops.pyops, f"{op}{suffix}").default._schema).split("(", 1)[1]
            for op in ("conv_relu_pool2d", "conv_relu_pool2d_tf32")
        )
        assert exact == tf32
    x = torch.empty(2, 16, 10, 12, device="meta", requires_grad=True)
    w, b = torch.empty(8, 16, 3, 3, device="meta"), torch.empty(8, device="meta")
    output, codes = torch.ops.pyops.conv_relu_pool2d_tf32(x, w, b, *SPEC.flat(), True)
    assert output.shape == codes.shape == (2, 8, 5, 6)
    output.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("precision", "op"), [("tf32", "_tf32"), ("ieee", "")])
def test_torchs_switch_chooses_the_op(float32_precision, precision, op):
    float32_precision(precision)
    chosen = conv_relu_pool._operator("cuda", torch.float32)
    assert chosen is getattr(torch.ops.pyops, f"conv_relu_pool2d{op}").default
    for backend, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        exact = torch.ops.pyops.conv_relu_pool2d.default
        assert conv_relu_pool._operator(backend, dtype) is exact
