"""A launch that fails names the kernel and its sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc" / "cuda"


def test_launch_failure_names_kernel_and_sizes(tmp_path):
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    program = tmp_path / "launch_failure"
    source = HERE / "launch_failure.cu"
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-I", CSRC, source, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0
    assert "some_kernel (grid 7x1x1, block 2048x1x1" in done.stdout
    message = done.stdout.split("): ")[1]
    assert "no CUDA-capable device" in message or "invalid" in message or "driver" in message
