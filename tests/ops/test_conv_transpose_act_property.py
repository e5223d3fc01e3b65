"""Any geometry hypothesis can think of, on every instruction set this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conv_transpose_cases import assert_right, check, fast, make_inputs, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyops import _C
from pyops.testing import OUTPUT_BUDGET

FIXED = settings(
    max_examples=80,
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
    """(input shape, weight shape, options, dtype, channels_last, vectors, seed)."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 5, 16, 20]))
    group_out = draw(st.sampled_from([1, 2, 3, 7, 16, 33]))
    kernel = draw(st.one_of(st.just((4, 4)), sizes(5)))
    stride = draw(st.one_of(st.just((2, 2)), sizes(4)))
    dilation = draw(st.one_of(st.just((1, 1)), sizes(3)))
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    size, padding = [], []
    for i in (0, 1):
        size.append(draw(st.integers(1, 12)))
        full = (size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + extra[i] + 1
        padding.append(draw(st.integers(0, min(4, (full - 1) // 2))))
    options = {
        "groups": groups,
        "stride": stride,
        "padding": tuple(padding),
        "output_padding": extra,
        "dilation": dilation,
        "activation": draw(st.sampled_from(["relu", "leaky_relu", "tanh", "sigmoid", None])),
        "negative_slope": draw(st.sampled_from([0.01, 0.5, 0.0])),
    }
    return (
        (draw(st.sampled_from([1, 2, 9])), channels, *size),
        (channels, group_out, *kernel),
        options,
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])),
        draw(st.booleans()),
        draw(st.sampled_from(["", "b", "st", "bst"])),
        draw(st.integers(0, 2**16)),
    )


@FIXED
@given(calls())
def test_outputs_of_any_call(call):
    x_shape, w_shape, options, dtype, channels_last, vectors, seed = call
    tensors = make_inputs(
        x_shape,
        w_shape,
        groups=options["groups"],
        vectors=vectors,
        dtype=dtype,
        channels_last=channels_last,
        seed=seed,
    )
    # Halves: their sums are exact, so that no example is about the order of a sum.
    tensors = [None if t is None else t.mul(2).round().div(2) for t in tensors]
    out = fast(*tensors, **options)
    exact = plain(*(None if t is None else t.double() for t in tensors), **options)
    assert out.shape == exact.shape
    if out.numel() >= 1000:  # the ratio of two errors over few elements says little
        tensors[0] = tensors[0].contiguous()
        assert_right(out, plain(*tensors, **options), exact, OUTPUT_BUDGET, "output")
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact, rtol=4 * eps, atol=60 * eps)


@settings(FIXED, max_examples=40)
@given(calls())
def test_gradients_of_any_call(call):
    """Exactly, in integers: no rounding, and pre-activations of 0 everywhere."""
    x_shape, w_shape, options, _, channels_last, vectors, seed = call
    tensors = make_inputs(
        x_shape,
        w_shape,
        groups=options["groups"],
        vectors=vectors,
        channels_last=channels_last,
        seed=seed,
    )
    tensors = [None if t is None else t.mul(2).round().clamp(-2, 2) for t in tensors]
    options = {**options, "negative_slope": round(options["negative_slope"] * 4) / 4}
    smooth = options["activation"] in ("tanh", "sigmoid")
    results = []
    for function in (fast, plain):
        given_tensors = [
            None if t is None else t.clone(memory_format=torch.preserve_format).requires_grad_()
            for t in tensors
        ]
        leaves = [t for t in given_tensors if t is not None]
        out = function(*given_tensors, **options)
        weights = torch.arange(out.numel()).view(out.shape).remainder(5) * 4.0 - 8
        results.append((out, *torch.autograd.grad(out, leaves, weights)))
    for ours, theirs in zip(*results, strict=True):
        if smooth:
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)
        else:
            assert torch.equal(ours, theirs)


def compact_grid():
    """What runs in a process of its own under each instruction set: prints the largest ratio."""
    torch.set_num_threads(2)
    worst = 0.0
    for dtype, channels_last in (
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float16, False),
    ):
        for c, k, size, kernel, batch, options in (
            (20, 35, 4, 4, 16, {"stride": 2, "padding": 1, "activation": "tanh"}),
            (33, 40, 12, 4, 2, {"stride": 2, "padding": 1}),
            (16, 3, 20, 4, 2, {"stride": 2, "padding": 1, "activation": "sigmoid"}),
            (12, 60, 9, 3, 2, {"groups": 3, "stride": 3, "activation": "leaky_relu"}),
            (24, 24, 9, 3, 2, {"groups": 24, "stride": (1, 3), "padding": 1}),
        ):
            tensors = make_inputs(
                (batch, c, size, size + 1),
                (c, k // options.get("groups", 1), kernel, kernel),
                groups=options.get("groups", 1),
                dtype=dtype,
                channels_last=channels_last,
            )
            worst = max(worst, check(tensors, **options))
    print(_C.active_isa(), worst)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(isa):
    if not _C.cpu_features()[isa]:
        pytest.skip(f"this CPU has no {isa}")
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", f"import {Path(__file__).stem} as m; m.compact_grid()"],
        env={**os.environ, "PYOPS_CPU_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == isa
