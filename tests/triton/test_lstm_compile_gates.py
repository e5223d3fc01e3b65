"""What lstm's Triton kernels compile to, on GPUs that need not be here: ahead of time, by ptxas."""

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
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)]),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, here / "lstm_compile_gate.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout[done.stdout.index("[{") :])


def test_all_kernels_on_all_architectures(report):
    found = {(row["kernel"], row["arch"]) for row in report}
    kernels = ("lstm_forward_kernel", "lstm_backward_kernel")
    assert found == {(kernel, arch) for kernel in kernels for arch in SHARED_LIMIT}
    assert len(report) == 11 * 2 + 1


def test_no_spills(report):
    assert [row for row in report[:-1] if row["spill_bytes"]] == []
    assert report[-1]["spill_bytes"] > 0, "a spill would not be seen"


def test_weights_stay_in_shared_memory(report):
    """All four gates' weights fit, and are there (but where tensor memory or registers hold them)."""
    for row in report[:-1]:
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], row
        if row["case"] == "bfloat16, 128":
            assert row["shared"] >= 128 * 1024, row


def test_tensor_cores_and_no_serialised_wgmma(report):
    assert [row for row in report[:-1] if not row["tensor_cores"]] == []
    assert [row for row in report[:-1] if row["serialised"]] == []
    wide = [r for r in report[:-1] if r["case"] == "bfloat16, 128"]
    assert all(row["matrix_instructions"] for row in wide)
