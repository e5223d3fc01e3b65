"""setup.py's switch for CUDA: it fails loudly rather than build something else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    environment = os.environ | {"PYOPS_CUDA": cuda}
    return subprocess.run(
        [*command, "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(
    any((ROOT / "csrc/cuda").glob("*.cu")), reason="there are CUDA kernels to build"
)
def test_cuda_wanted_but_impossible_fails(tmp_path: Path) -> None:
    result = build(tmp_path, "1")
    assert result.returncode != 0
    assert "PYOPS_CUDA=1" in result.stderr and "no CUDA C++ kernels" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_unknown_switch_is_named(tmp_path: Path) -> None:
    result = build(tmp_path, "maybe")
    assert result.returncode != 0
    assert "PYOPS_CUDA: expected auto, 0 or 1, got 'maybe'" in result.stderr
