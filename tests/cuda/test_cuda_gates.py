"""What the compiled CUDA kernels must look like: no spills, planned resources, tensor cores in use."""

from __future__ import annotations

import collections
import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pyops

LIBRARY = Path(pyops.__file__).parent / "_cuda.so"
MOST_BYTES = 60 * 2**20

# Kernel's name -> (most registers, least part of a multiprocessor's threads resident, matrix instruction).
# FFMA stands for exact float32; None: no arithmetic to speak of.
PLAN = {
    "conv_relu_pool_forward_mma_kernel": (152, 0.125, "HMMA"),
    "conv_relu_pool_forward_fma_kernel": (128, 0.25, "FFMA"),
    "conv_relu_pool_grad_input_kernel": (128, 0.1875, "HMMA"),
    "conv_relu_pool_grad_weight_kernel<float, (Product)1, false>": (216, 0.125, "FFMA"),
    "conv_relu_pool_grad_weight_kernel<float, (Product)1, true>": (224, 0.125, "FFMA"),
    "conv_relu_pool_grad_weight_kernel": (168, 0.1875, "HMMA"),
    "conv_relu_pool_expand_kernel": (48, 0.625, None),
    "conv_relu_pool_flip_kernel": (48, 0.625, None),
    "conv_relu_pool_grad_bias_kernel": (56, 0.5, None),
    "conv_relu_pool_sum_parts_kernel": (32, 1.0, None),
    "conv_relu_pool_wgmma_kernel": (168, 0.1875, "HGMMA"),
    "conv_relu_pool_wgmma_stem_kernel": (128, 0.25, "HGMMA"),
}


@pytest.fixture(scope="module")
def kernels():
    rows = importlib.import_module("pyops._C").cuda_kernels()
    if not rows:
        pytest.skip("no CUDA kernels were built (nvcc was not there, or PYOPS_CUDA=0)")
    return rows


def plan_of(name: str) -> str:
    """The entry that is for this kernel: its own, or that of all instances of its template."""
    return name if name in PLAN else name.split("<")[0]


def test_every_kernel_has_a_plan(kernels):
    assert {plan_of(row["kernel"]) for row in kernels} == set(PLAN)


def test_no_kernel_spills(kernels):
    spilling = [row for row in kernels if row["spill_bytes"] or row["stack_bytes"]]
    assert spilling == []


def test_registers_and_occupancy_are_as_planned(kernels):
    beyond = [
        row
        for row in kernels
        if row["registers"] > PLAN[plan_of(row["kernel"])][0]
        or row["occupancy"] < PLAN[plan_of(row["kernel"])][1]
    ]
    assert beyond == []


def test_shared_memory_fits(kernels):
    most = {80: 163 * 1024, 90: 227 * 1024}
    for row in kernels:
        assert row["shared_bytes"] <= most.get(row["arch"], 227 * 1024), row


def test_binary_is_small(kernels):
    assert LIBRARY.stat().st_size < MOST_BYTES


@pytest.fixture(scope="module")
def instructions(kernels):
    """(kernel's name, architecture) -> how often each instruction occurs in it, for every kernel."""
    spec = importlib.util.find_spec("triton")
    tool = spec and Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not tool.exists() or not shutil.which("c++filt"):
        pytest.skip("this needs binutils and Triton's cuobjdump")
    counts: dict[tuple[str, int], collections.Counter] = {}
    command = [tool, "-sass", LIBRARY]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as dump:
        arch, current = 0, collections.Counter()
        for line in dump.stdout:
            if found := re.search(r"code for sm_(\d+)", line):
                arch = int(found[1])
            elif found := re.search(r"Function : (\w+)", line):
                current = counts.setdefault((found[1], arch), collections.Counter())
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line):
                current[found[1]] += 1
    symbols = "\n".join(symbol for symbol, _ in counts)
    names = subprocess.check_output(["c++filt"], input=symbols, text=True).splitlines()
    return {
        (re.sub(r"(\w+|\(anonymous namespace\))::", "", name), arch): count
        for name, ((_, arch), count) in zip(names, counts.items(), strict=True)
    }


def test_matrix_kernels_use_the_tensor_cores(instructions, kernels):
    assert len(kernels) == len(instructions)
    for (name, arch), count in instructions.items():
        key = next(key for key in PLAN if name.removeprefix("void ").startswith(key))
        matrix = PLAN[key][2]
        if matrix == "HGMMA":
            assert count["HGMMA"] > 0 and count["HMMA"] == 0, (name, arch, count)
        elif matrix == "HMMA":
            # An inner loop in FFMA would have ten times as many.
            assert 0 < count["HMMA"] >= count["FFMA"], (name, arch, count)
        elif matrix == "FFMA":
            # Exact float32 must not be rounded to TF32.
            assert count["FFMA"] > 0 and count["HMMA"] == count["HGMMA"] == 0, (name, arch, count)


def test_no_kernel_touches_local_memory(instructions):
    for key, count in instructions.items():
        assert count["LDL"] == count["STL"] == 0, (key, count)
