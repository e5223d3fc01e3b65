"""AddressSanitizer sees registers, shared and global memory overrun, and no false alarm."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from build import HERE, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
REPORTS = {
    "gemm_ampere": ["stack-buffer-overflow"],
    "last_block_sum": ["use-after-poison", "heap-buffer-overflow"],
}


def test_address_sanitizer(tmp_path):
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    options = "detect_leaks=0:halt_on_error=0:detect_stack_use_after_return=0"
    environment = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": options}
    done = subprocess.run(
        [sys.executable, str(HERE / "address_sanitizer_run.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr.endswith("end\n"), done.stderr
    clean, *bugs = re.split(r"^bug ", done.stderr, flags=re.MULTILINE)
    assert "ERROR: AddressSanitizer" not in clean
    assert clean.count("clean") == 4
    assert len(bugs) == len(REPORTS)
    for bug in bugs:
        for report in REPORTS[bug.splitlines()[0]]:
            assert f"AddressSanitizer: {report}" in bug, bug
