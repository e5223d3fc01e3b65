"""Any geometry hypothesis can think of, on every instruction set this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conv_pool_cases import assert_right, check, make_inputs, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyops
from pyops import _C
from pyops.testing import OUTPUT_BUDGET

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")

FIXED = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def sizes(most, least=1):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def calls(draw):
    """(input shape, weight shape, options, dtype, channels_last, bias, with gradients, seed)."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 5, 16, 20]))
    out_channels = groups * draw(st.sampled_from([1, 2, 3, 7, 16, 33]))
    kernel = draw(st.one_of(st.just((3, 3)), sizes(5)))
    dilation = draw(st.one_of(st.just((1, 1)), sizes(3)))
    stride = draw(st.one_of(st.just((1, 1)), sizes(3)))
    same = stride == (1, 1) and draw(st.integers(0, 5)) == 0
    padding = "same" if same else draw(sizes(3, least=0))
    pool = draw(st.sampled_from(["max", "max", "max", "avg", None]))
    size = draw(st.one_of(st.just((2, 2)), sizes(2 if pool == "avg" else 4)))
    pool_stride = draw(st.one_of(st.none(), sizes(3)))
    pool_padding = (draw(st.integers(0, size[0] // 2)), draw(st.integers(0, size[1] // 2)))
    # The least input that gives one window, and some more.
    extent = []
    for i in (0, 1):
        span = dilation[i] * (kernel[i] - 1) + 1
        conv = size[i] if pool else 1
        pad = span - 1 if same else 2 * padding[i]
        extent.append(max(1, (conv - 1) * stride[i] + span - pad) + draw(st.integers(0, 14)))
    activation = draw(st.sampled_from(["relu", "relu", "leaky_relu", None]))
    options = {
        "groups": groups,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "activation": activation,
        "negative_slope": draw(st.sampled_from([0.01, 0.5, 0.0, -0.25])),
        "pool": pool,
        "pool_size": size,
        "pool_stride": pool_stride,
        "pool_padding": pool_padding,
        "ceil_mode": draw(st.booleans()),
    }
    dtype = draw(
        st.sampled_from(
            [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
        )
    )
    return (
        (draw(st.integers(1, 3)), channels, *extent),
        (out_channels, channels // groups, *kernel),
        options,
        dtype,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )  # fmt: skip


@FIXED
@given(calls())
def test_outputs_of_any_call(call):
    x_shape, w_shape, options, dtype, channels_last, bias, seed = call
    x, w, b = make_inputs(
        x_shape, w_shape, bias=bias, dtype=dtype, channels_last=channels_last, seed=seed
    )
    out = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
    exact = plain(x.double(), w.double(), None if b is None else b.double(), **options)
    assert out.shape == exact.shape
    if out.numel() >= 200:  # the ratio of two errors over a handful of elements says little
        lowp = plain(x.contiguous(), w, b, **options)
        assert_right(out, lowp, exact, OUTPUT_BUDGET, "output")
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact, rtol=4 * eps, atol=30 * eps)


@settings(FIXED, max_examples=100)
@given(calls())
def test_gradients_of_any_call(call):
    """Exactly, in integers: no rounding, and ties everywhere."""
    x_shape, w_shape, options, dtype, channels_last, bias, seed = call
    x, w, b = make_inputs(
        x_shape, w_shape, bias=bias, dtype=torch.float32, channels_last=channels_last, seed=seed
    )
    tensors = [t.mul(2).round().clamp(-2, 2) for t in (x, w, b) if t is not None]
    options = {**options, "negative_slope": round(options["negative_slope"] * 4) / 4}
    results = []
    for function, extra in ((pyops.conv_relu_pool2d, {"backend": "cpu"}), (plain, {})):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
        out = function(*leaves, **options, **extra)
        weights = torch.arange(out.numel()).view(out.shape).remainder(5) * 12.0 - 24
        results.append((out, *torch.autograd.grad(out, leaves, weights)))
    for ours, theirs in zip(*results, strict=True):
        if options["pool"] == "avg":
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
        else:
            assert torch.equal(ours, theirs)


def compact_grid():
    """What runs in a process of its own under each instruction set: prints the largest ratio."""
    torch.set_num_threads(2)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels_last in (False, True):
            for c, k, size, kernel, options in (
                (1, 32, 20, 3, {}),
                (3, 33, 20, 3, {"padding": 1}),
                (32, 64, 15, 3, {"padding": 1}),
                (20, 24, 14, 3, {}),
                (6, 20, 17, 5, {"padding": 2, "stride": 2}),
                (16, 16, 18, 1, {"pool": "avg"}),
                (24, 24, 18, 3, {"padding": 1, "groups": 24}),
                (8, 16, 19, 3, {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}),
                (4, 12, 14, 3, {"pool": None, "activation": "leaky_relu", "groups": 2}),
            ):
                shapes = (3, c, size, size + 1), (k, c // options.get("groups", 1), kernel, kernel)
                x, w, b = make_inputs(*shapes, dtype=dtype, channels_last=channels_last)
                worst = max(worst, check(x, w, b, **options))
    print(_C.active_isa(), worst)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(isa):
    if not _C.cpu_features()[isa]:
        pytest.skip(f"this CPU has no {isa}")
    run = subprocess.run(
        [sys.executable, "-c", f"import {Path(__file__).stem} as m; m.compact_grid()"],
        env={**os.environ, "PYOPS_CPU_ISA": isa, "PYTHONPATH": path_for_children()},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == isa


def path_for_children():
    here = str(Path(__file__).parent)
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
