"""Compiles lstm's Triton kernels for GPUs that need not be here, as compile_gate.py does for convolutions.

Run as a program of its own, without Triton's interpreter.
"""

import json
import sys
from dataclasses import asdict

import torch
from compile_gate import _compile, _recorded
from pyops.triton_kernels import common, lstm

# name: (architectures, hidden, dtype, TF32, options)
CASES = {
    "bfloat16, 128": ((80, 90, 100), 128, torch.bfloat16, True, {}),
    "float16, 64, both ways, packed": (
        *((90,), 64, torch.float16, True),
        {"packed": True, "two": True},
    ),
    "bfloat16, 7": ((80,), 7, torch.bfloat16, True, {}),
    "TF32, 64": ((80, 90, 100), 64, torch.float32, True, {}),
    "float32, 64": ((80, 100), 64, torch.float32, False, {}),
    "float32, 20": ((80,), 20, torch.float32, False, {}),
}


def launches_of(arch, hidden, dtype, tf32, packed=False, two=False):
    """What forward and backward of one layer launch: (kernel, configs, bind)."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    directions = 2 if two else 1

    def empty(*shape):
        return torch.empty(shape, device="meta", dtype=dtype)

    shapes = [(4 * hidden, 64), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
    weights = [empty(*shape) for shape in shapes * directions]
    states = [empty(directions, 64, hidden) for _ in range(2)]
    sizes = torch.full((50,), 64) if packed else None
    x = empty(3200, 64) if packed else empty(50, 64, 64)
    options = (True, 1, two)
    launches = []
    with _recorded(arch, launches):
        output, h, c, saved = lstm.forward(x, *states, weights, sizes, *options, True)
        lstm.backward(
            *(output, h, c, x, *states, weights, sizes, output, saved, *options, [True] * 4)
        )
    return launches


def main():
    """Writes the list of all that was compiled as JSON, and last one that must spill."""
    rows = []
    for name, (archs, *case, options) in CASES.items():
        for arch in archs:
            for kernel, configs, bind in launches_of(arch, *case, **options):
                rows.append(asdict(_compile(name, arch, kernel, configs[0], bind)))
    kernel, (config, *_), bind = launches_of(90, 128, torch.bfloat16, True)[0]
    few = common.Config({**config.constants, "BLOCK_B": 64}, num_warps=4, num_stages=1)
    rows.append(asdict(_compile("spilling", 90, kernel, few, bind)))
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
