"""The Triton kernels of conv_transpose2d_act: run by Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", "3.6")

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from conv_transpose_cases import check, fast, make_inputs  # noqa: E402  (the path is set above)
from pyops.triton_kernels import common  # noqa: E402  (Triton is here)
from pyops.triton_kernels import conv_transpose_act as kernels  # noqa: E402

from pyops.reference.conv_transpose_act import ConvTransposeSpec  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
interpreted = pytest.mark.skipif(
    not common.INTERPRET, reason="needs TRITON_INTERPRET=1, set before Triton is imported"
)

# (input shape, weight shape, dtype, channels_last, options)
CASES = {
    "k4 s2 p1": ((2, 20, 4, 5), (20, 18, 4, 4), F32, False, {"stride": 2, "padding": 1}),
    "k4 s2 p1 bf16": ((2, 33, 4, 4), (33, 40, 4, 4), BF16, True, {"stride": 2, "padding": 1}),
    "k3 s2 op1, tanh": (
        *((1, 16, 5, 4), (16, 3, 3, 3), F16, False),
        {"stride": 2, "padding": 1, "output_padding": 1, "activation": "tanh"},
    ),
    "from 1x1, sigmoid": ((9, 20, 1, 1), (20, 17, 4, 4), F32, True, {"activation": "sigmoid"}),
    "two blocks of channels": ((1, 130, 2, 3), (130, 136, 2, 2), F16, True, {"stride": 2}),
    "groups, leaky": (
        *((2, 12, 4, 5), (12, 6, 3, 2), F32, False),
        {"groups": 3, "stride": (1, 2), "activation": "leaky_relu", "negative_slope": 0.2},
    ),
    "dilation": ((1, 5, 4, 5), (5, 4, 3, 3), F32, True, {"dilation": (2, 3), "stride": (3, 2)}),
    "phases without taps": (
        *((1, 4, 3, 4), (4, 8, 2, 4), F32, False),
        {"stride": 2, "dilation": 2, "output_padding": 1, "activation": "tanh"},
    ),
    "stride over kernel": ((1, 4, 3, 3), (4, 8, 2, 2), F32, True, {"stride": 5}),
}


def inputs_of(name, **kwargs):
    x_shape, w_shape, dtype, channels_last, options = CASES[name]
    groups = options.get("groups", 1)
    return make_inputs(
        x_shape, w_shape, groups=groups, dtype=dtype, channels_last=channels_last, **kwargs
    )


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_within_budget(name):
    check(inputs_of(name), backend="triton", **CASES[name][4])


@interpreted
@pytest.mark.parametrize("vectors", ["", "b", "s", "t"])
def test_without_some_vectors(vectors):
    tensors = inputs_of("k4 s2 p1", vectors=vectors)
    check(tensors, backend="triton", activation=None, **CASES["k4 s2 p1"][4])


@interpreted
@pytest.mark.parametrize("name", ["k4 s2 p1", "dilation"])
def test_nothing_outside_the_tensors_is_read_or_written(name, monkeypatch):
    """Inputs lie among NaNs, and what a launcher allocates between fences."""
    options = CASES[name][4]
    expected = fast(*inputs_of(name), backend="triton", **options)

    def surrounded(t):
        held = t.new_full((t.numel() + 128,), float("nan"))
        return held[64:-64].as_strided(t.shape, t.stride()).copy_(t)

    fences, empty = [], torch.empty

    def fenced(size, *, dtype, device, memory_format):
        like = empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        held = empty(like.numel() + 128, dtype=dtype).fill_(7.0)
        fences.append(held)
        return held[64:-64].as_strided(like.shape, like.stride())

    leaves = [surrounded(t).requires_grad_() for t in inputs_of(name)]
    monkeypatch.setattr(torch, "empty", fenced)
    out = fast(*leaves, backend="triton", **options)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(out, expected) and all(g.isfinite().all() for g in grads)
    assert len(fences) == 3  # output, the gradient before the activation, its sums
    assert all((f[:64] == 7).all() and (f[-64:] == 7).all() for f in fences)


@interpreted
@pytest.mark.parametrize("name", ["k4 s2 p1", "groups, leaky"])
def test_int64_offsets_equal_int32(name, monkeypatch):
    def results():
        leaves = [t.requires_grad_() for t in inputs_of(name)]
        out = fast(*leaves, backend="triton", **CASES[name][4])
        return out, *torch.autograd.grad(out.sum(), leaves)

    narrow = results()
    monkeypatch.setattr(common, "INT32_LIMIT", 0)
    assert all(torch.equal(a, b) for a, b in zip(narrow, results(), strict=True))


@interpreted
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
def test_nan_and_inf(activation):
    x, w = make_inputs((1, 3, 4, 4), (3, 5, 4, 4), vectors="")[:2]
    x[0, 0, 1, 1], x[0, 1, 2, 3], x[0, 2, 0, 0] = float("nan"), float("inf"), float("-inf")
    options = {"stride": 2, "padding": 1, "activation": activation}
    got = fast(x, w, backend="triton", **options)
    want = fast(x, w, backend="reference", **options)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


@interpreted
def test_empty_batch():
    x, *rest = inputs_of("k4 s2 p1")
    leaves = [t.requires_grad_() for t in (x[:0], *rest)]
    out = fast(*leaves, backend="triton", stride=2, padding=1)
    assert out.shape == (0, 18, 8, 10)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, leaves, strict=True))


def spec_of(stride=2, padding=1, activation="relu"):
    return ConvTransposeSpec(*(stride,) * 2, *(padding,) * 2, 0, 0, 1, 1, 1, activation, 0.2)


def test_supports():
    shapes = (2, 4, 5, 5), (4, 8, 4, 4)
    assert kernels.supports(*shapes, BF16, spec_of()) is None
    assert "float64" in kernels.supports(*shapes, torch.float64, spec_of())
    assert "gelu" in kernels.supports(*shapes, F32, spec_of(activation="gelu"))
    assert "64" in kernels.supports(shapes[0], (4, 8, 65, 4), F32, spec_of())


# ---- compiled ahead of time for GPUs that need not be here

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# name: (architectures, then as in CASES)
COMPILED = {
    "256 to 128": ((80, 90, 100), (64, 256, 8, 8), (256, 128, 4, 4), BF16, True, {}),
    "256 to 128, NCHW, float16": ((90, 100), (64, 256, 8, 8), (256, 128, 4, 4), F16, False, {}),
    "128 to 64, TF32": ((80, 100), (64, 128, 16, 16), (128, 64, 4, 4), F32, True, {}),
    "64 to 3, tanh": ((90,), (64, 64, 32, 32), (64, 3, 4, 4), BF16, True, {"activation": "tanh"}),
    "100 to 512": (
        *((80,), (64, 100, 1, 1), (100, 512, 4, 4), BF16, True),
        {"stride": 1, "padding": 0},
    ),
    "k3 s2, uneven phases": ((90,), (64, 64, 16, 16), (64, 64, 3, 3), BF16, True, {}),
    "exact float32, sigmoid": (
        *((80,), (64, 64, 8, 8), (64, 32, 4, 4), F32, True),
        {"activation": "sigmoid", "precise": True},
    ),
}


def compile_all() -> list[dict]:
    """Every config of the forward kernel, and the backward's own kernel, as JSON rows."""
    from compile_gate import _compile, _recorded

    rows = []
    for case, (archs, x_shape, w_shape, dtype, channels_last, given) in COMPILED.items():
        for arch in archs:
            options = dict(given)
            precise = options.pop("precise", False)
            torch.backends.cudnn.conv.fp32_precision = "ieee" if precise else "tf32"
            layout = torch.channels_last if channels_last else torch.contiguous_format
            x = torch.empty(x_shape, device="meta", dtype=dtype, memory_format=layout)
            w = torch.empty(w_shape, device="meta", dtype=dtype)
            vector = torch.empty(w_shape[1], device="meta", dtype=dtype)
            launches = []
            run = common.run
            with _recorded(arch, launches):
                common.run = lambda k, c, b, to=launches: to.append((k, [c], b))
                out = kernels.forward(x, w, None, vector, vector, spec_of(**options))
                kernels.backward(
                    *(out, x, w, None, vector, out, spec_of(**options)),
                    (False, False, True, False, True),
                )
                common.run = run
            for kernel, configs, bind in launches:
                for config in configs:
                    rows.append(vars(_compile(case, arch, kernel, config, bind)))
    return rows


@pytest.fixture(scope="module")
def compiled():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    here = str(Path(__file__).parent)
    code = (
        f"import sys, json; sys.path.insert(0, {here!r})\n"
        f"import {Path(__file__).stem} as m\n"
        "print(json.dumps(m.compile_all()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_compiled_kernels(compiled):
    names = {(row["kernel"], row["case"], row["arch"]) for row in compiled}
    both = ("conv_transpose_act_forward_kernel", "conv_transpose_act_gradient_kernel")
    assert names == {
        (k, case, arch) for k in both for case in COMPILED for arch in COMPILED[case][0]
    }
    assert [row for row in compiled if row["spill_bytes"]] == []
    assert [row for row in compiled if row["serialised"]] == []
    assert [row for row in compiled if row["shared"] > SHARED_LIMIT[row["arch"]]] == []


def test_compiled_kernels_use_tensor_cores(compiled):
    """Where there is a product and float32 need not be exact; wgmma where there are 64 channels."""
    for row in compiled:
        product = "forward" in row["kernel"] and "exact" not in row["case"]
        assert row["tensor_cores"] == product, row
        if product and row["arch"] == 90 and "to 3" not in row["case"]:
            assert row["matrix_instructions"], row
