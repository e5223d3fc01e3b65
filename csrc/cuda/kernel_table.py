"""What ptxas made of each CUDA kernel: run by the build, as a wrapper of nvcc and after it.

    kernel_table.py compile OBJECT COMMAND...   run nvcc; fail where ptxas says that it serialised
                                                wgmma; write what each kernel uses to OBJECT.json
    kernel_table.py table OUT PLANS OBJECTS...  join that with the launch sizes that the program PLANS
                                                prints into a C++ table and OUT.json

Occupancy follows from registers, shared memory and threads of a block by the limits of the
architecture (CUDA C++ Programming Guide, "Compute Capabilities").
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# Shared memory of a multiprocessor in bytes, and its most resident threads and blocks.
LIMITS = {80: (164 * 1024, 2048, 32), 86: (100 * 1024, 1536, 16), 89: (100 * 1024, 1536, 24)}
NEWER = (228 * 1024, 2048, 32)  # 9.0, 10.0
REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor; allocated per warp in units
RESERVED = 1024  # bytes of shared memory that the system takes per block

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_object(output: str, command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    # C7510 to C7518 tell of serialised wgmma. C7519, an arrive that ptxas adds, costs nothing.
    serialised = [line for line in log.splitlines() if re.search(r"\(C75(?!19)\d\d\)", line)]
    noise = re.compile(r"ptxas info|bytes stack frame|Function properties|^$")
    for line in log.splitlines():
        if done.returncode or line in serialised or not noise.search(line):
            print(line, file=sys.stderr)
    if done.returncode or serialised:
        return done.returncode or 1
    Path(output + ".json").write_text(json.dumps(parse(log)))
    return 0


def parse(log: str) -> list[dict[str, Any]]:
    """One row a kernel and architecture from the log of `nvcc -Xptxas -v`."""
    rows = []
    for found in _KERNEL.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        row = {"symbol": found["name"], "arch": int(found["arch"])}
        row |= {"registers": int(found["registers"]), "stack": int(found["stack"])}
        row["spills"] = int(found["stores"]) + int(found["loads"])
        row["shared"] = int(shared[1]) if shared else 0
        rows.append(row)
    return rows


def blocks_per_multiprocessor(arch: int, registers: int, shared: int, threads: int) -> int:
    memory, most_threads, most_blocks = LIMITS.get(arch, NEWER)
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    per_block = -(-(shared + RESERVED) // 128) * 128
    by_registers = REGISTERS // per_warp // 4 * 4 // warps  # warps are dealt to four schedulers
    return min(by_registers, memory // per_block, most_threads // (warps * 32), most_blocks)


def table(out: str, plans_program: str, objects: list[str]) -> None:
    plans = launch_plans(plans_program)
    rows = []
    for kernel in [r for o in objects for r in json.loads(Path(o + ".json").read_text())]:
        symbol = kernel.pop("symbol")
        if symbol not in plans:
            raise SystemExit(f"{symbol}: a kernel needs a KernelPlan (kernel_plan.h)")
        threads, shared = plans[symbol]
        kernel["shared"] += shared
        used = {key: kernel[key] for key in ("arch", "registers", "shared")}
        blocks = blocks_per_multiprocessor(**used, threads=threads)
        most_threads = LIMITS.get(kernel["arch"], NEWER)[1]
        occupancy = blocks * threads / most_threads
        rows.append(
            {"kernel": readable(symbol), **kernel, "threads": threads, "occupancy": occupancy}
        )
    rows.sort(key=lambda row: (row["kernel"], row["arch"]))
    Path(out + ".json").write_text(json.dumps(rows, indent=1))
    cells = [", ".join(json.dumps(value) for value in row.values()) for row in rows]
    Path(out).write_text("".join(f"{{{line}}},\n" for line in cells))


def readable(symbol: str) -> str:
    """The kernel's name and template arguments, without namespaces and parameters."""
    name = subprocess.check_output(["c++filt", symbol], text=True).strip()
    name = re.sub(r"(\w+|\(anonymous namespace\))::", "", name.removeprefix("void "))
    return re.sub(r"(?<=[>\w])\(.*", "", name)  # a cast among the arguments follows neither


def launch_plans(program: str) -> dict[str, tuple[int, int]]:
    """Symbol of a kernel -> (threads, bytes of dynamic shared memory).

    The program prints the address of each kernel's stub in itself; nm tells its symbol, which is
    the kernel's own.
    """
    symbols: dict[int, list[str]] = {}
    for line in subprocess.check_output(["nm", "--defined-only", program], text=True).splitlines():
        address, _, name = line.split()
        symbols.setdefault(int(address, 16), []).append(name)
    plans = {}
    for line in subprocess.check_output([program], text=True).splitlines():
        address, threads, shared = line.split()
        for symbol in symbols[int(address, 16)]:
            plans[symbol] = (int(threads), int(shared))
    return plans


if __name__ == "__main__":
    verb, first, *others = sys.argv[1:]
    if verb == "compile":
        raise SystemExit(compile_object(first, others))
    table(first, others[0], others[1:])
