"""What the Triton kernels compile to, on GPUs that need not be here: ahead of time, by ptxas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.6")

# Shared memory that one block may use, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def report():
    """Every config compiled, and last one that must spill."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_gate.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(report):
    return report[:-1]


def test_all_kernels_on_all_architectures(compiled):
    kernels = {(row["kernel"], row["arch"]) for row in compiled}
    pointers = [
        "conv_relu_pool_forward_gather_kernel",
        "conv_relu_pool_backward_input_kernel",
        "conv_relu_pool_backward_weight_kernel",
        "conv_relu_pool_backward_bias_kernel",
    ]
    boxes = "conv_relu_pool_forward_tma_kernel"
    # Boxes are for GPUs with TMA.
    assert kernels == {(k, arch) for k in pointers for arch in (80, 90, 100)} | {
        (boxes, 90),
        (boxes, 100),
    }


def test_no_spills(report, compiled):
    assert [row for row in compiled if row["spill_bytes"]] == []
    assert report[-1]["spill_bytes"] > 0, "a spill would not be seen"


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_LIMIT[row["arch"]]] == []


def test_wgmma_is_not_serialised(compiled):
    assert [row for row in compiled if row["serialised"]] == []


def test_tensor_cores(compiled):
    """All use them but the bias's sum, and exact float32, which must not."""

    def expected(row):
        return "exact" not in row["case"] and not row["kernel"].endswith("bias_kernel")

    assert [row for row in compiled if row["tensor_cores"] != expected(row)] == []


def test_the_widest_instruction(compiled):
    """wgmma on 90 and tcgen05 on 100, but where fewer than 64 rows make Triton take mma.sync."""
    narrow = [
        (row["case"], row["arch"])
        for row in compiled
        if row["tensor_cores"] and not row["matrix_instructions"]
    ]
    few = ("3 to 64, NCHW, int64", "float16, 24 to 32, average")
    assert set(narrow) <= {(case, arch) for case in few for arch in (90, 100)}
