"""For test_address_sanitizer.py, in a process that preloads AddressSanitizer: the kernels of
small_kernels.cu as they are, then with bugs that it must see."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from kernel_checks import CHECKS

from build import HERE, Emulated

BUGS = [  # kernel, right, wrong
    ("gemm_ampere", "= sums[j][i];", "= sums[j + k / 80][i];"),
    ("last_block_sum", "dim3(64), dim3(1), 260}", "dim3(64), dim3(1), 256}"),
    ("last_block_sum", "= x[blockIdx.x * 64 + thread]", "= x[blockIdx.x * 64 + thread + 1]"),
]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    kernels = Emulated([HERE / "small_kernels.cu"], "asan")
    for name, check in CHECKS.items():
        print(f"clean {name}", file=sys.stderr, flush=True)
        check(kernels, check_bounds=False)
    source = (HERE / "small_kernels.cu").read_text()
    for _, right, wrong in BUGS:
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    mutant = folder / "mutants.cu"
    mutant.write_text(source)
    kernels = Emulated([mutant], "asan")
    for name in sorted({name for name, *_ in BUGS}):
        print(f"bug {name}", file=sys.stderr, flush=True)
        with contextlib.suppress(AssertionError):  # the numbers are wrong, too
            CHECKS[name](kernels, check_bounds=False)
    print("end", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
