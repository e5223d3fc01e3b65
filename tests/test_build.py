"""setup.py's switch for CUDA: it fails loudly rather than build something else; what the build tells of kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    return subprocess.run(
        [*command, "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_cuda_wanted_but_impossible_fails(tmp_path: Path) -> None:
    result = build(tmp_path, PYOPS_CUDA="1", CUDA_HOME=str(tmp_path), PATH=str(tmp_path))
    assert result.returncode != 0
    assert "PYOPS_CUDA=1" in result.stderr and "nvcc was not found" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_unknown_switch_is_named(tmp_path: Path) -> None:
    result = build(tmp_path, PYOPS_CUDA="maybe")
    assert result.returncode != 0
    assert "PYOPS_CUDA: expected auto, 0 or 1, got 'maybe'" in result.stderr


@pytest.fixture
def kernel_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc" / "cuda"))
    import kernel_table

    return kernel_table


# Of `nvcc -Xptxas -v` (13.0).
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes smem
ptxas info    : Compile time = 2.070 ms
"""


def test_ptxas_log_becomes_a_row(kernel_table) -> None:
    row = {"symbol": "_Z1fv", "arch": 90, "registers": 168, "stack": 8, "spills": 16, "shared": 16}
    assert kernel_table.parse(LOG + LOG.replace("sm_90a", "sm_80")) == [row, row | {"arch": 80}]


@pytest.mark.parametrize(
    ("message", "allowed"),
    [
        ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async serialized", False),
        ("ptxas info    : (C7519) Potential Performance Loss: an arrive was inserted", True),
    ],
)
def test_serialised_wgmma_stops_the_build(kernel_table, tmp_path, capfd, message, allowed) -> None:
    out = str(tmp_path / "x.o")
    code = f"print({LOG + message!r})"
    status = kernel_table.compile_object(out, [sys.executable, "-c", code])
    assert (status == 0) is allowed
    assert Path(out + ".json").exists() is allowed
    assert ("C7510" in capfd.readouterr().err) is not allowed


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        (90, 168, 0, 384, 1),  # registers: 3 blocks of 128 threads would fit
        (90, 128, 0, 256, 2),
        (90, 32, 0, 256, 8),  # threads
        (90, 32, 100 * 1024, 128, 2),  # shared memory
        (80, 32, 100 * 1024, 128, 1),
        (90, 16, 0, 32, 32),  # blocks
    ],
)
def test_occupancy(kernel_table, arch, registers, shared, threads, blocks) -> None:
    assert kernel_table.blocks_per_multiprocessor(arch, registers, shared, threads) == blocks
