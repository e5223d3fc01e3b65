"""What the Triton kernels of attention compile to, on GPUs that need not be here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.6")

# Shared memory that one block may use, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Two registers in the loop over the diagonal, of few turns, so that two programs share a multiprocessor.
SPILL_KNOWN = {("64 causal", "attention_forward_kernel"): 16}


@pytest.fixture(scope="module")
def report():
    """Every case compiled, and last one that must spill."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("attention_gate.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(report):
    return report[:-1]


def test_all_kernels(compiled):
    kernels = {(row["kernel"], row["arch"]) for row in compiled}
    everywhere = ("forward", "backward_rows", "backward_key", "backward_query", "decode")
    joining = {(f"attention_decode_{name}_kernel", 90) for name in ("append", "combine")}
    wanted = {(f"attention_{name}_kernel", arch) for name in everywhere for arch in (80, 90, 100)}
    assert kernels >= wanted | joining | {("attention_backward_bias_kernel", 90)}


def test_no_spills(report, compiled):
    spilling = [
        row
        for row in compiled
        if row["spill_bytes"] > SPILL_KNOWN.get((row["case"], row["kernel"]), 0)
    ]
    assert spilling == []
    assert report[-1]["spill_bytes"] > 0, "a spill would not be seen"


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_LIMIT[row["arch"]]] == []


def test_wgmma_is_not_serialised(compiled):
    assert [row for row in compiled if row["serialised"]] == []


def test_tensor_cores(compiled):
    """wgmma on 90 and tcgen05 on 100, but for decoding and float32, whose few rows fit mma.sync alone."""
    no_products = ("rows_kernel", "append_kernel", "combine_kernel")
    for row in compiled:
        assert row["tensor_cores"] == (not row["kernel"].endswith(no_products)), row
        few_rows = "decode" in row["kernel"] or "float32" in row["case"]
        if row["tensor_cores"] and not few_rows:
            assert row["matrix_instructions"] > 0, row


def test_boxes(compiled):
    """TMA wherever rows are whole multiples of 16 bytes and short enough to be held whole."""
    for row in compiled:
        matrix = row["kernel"].endswith(("forward_kernel", "key_kernel", "query_kernel"))
        aligned = row["arch"] >= 90 and not re.search("111|float32", row["case"])
        assert row["boxes"] == (matrix and aligned) or row["kernel"].endswith("bias_kernel"), row
