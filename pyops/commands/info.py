"""`python -m pyops info`: what is there, and which backend automatic choice takes and why."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from importlib import metadata
from typing import Any

import torch

import pyops
from pyops import backends
from pyops.bench.harness import device_name
from pyops.bench.report import table

HELP = "versions, libraries, devices, and which backend is taken for which op and why"
DESCRIPTION = HELP[0].upper() + HELP[1:] + "."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=1) if args.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as plain data."""
    facts: dict[str, Any] = {
        "versions": {
            "pyops": pyops.__version__,
            "torch": torch.__version__,
            "torch's CUDA": torch.version.cuda,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "cpu": {"name": device_name(torch.device("cpu")), "threads": torch.get_num_threads()},
        "gpus": [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
                "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
            }
            for i in range(torch.cuda.device_count())
        ],
    }
    try:
        _C = importlib.import_module("pyops._C")
    except ImportError as error:
        facts["build"] = None
        facts["build_missing"] = f"pyops._C could not be loaded: {error}"
    else:
        facts["build"] = _C.build_info()
        facts["cuda_kernels"] = _C.cuda_kernels()
        facts["cpu"] |= {"features": _C.cpu_features(), "active_isa": _C.active_isa()}
    facts["backends"] = {op: backends.available(op) for op in backends.OPS}
    facts["automatic"] = backends.table()
    return facts


def _version(module: str) -> str | None:
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None


def render(facts: dict[str, Any]) -> str:
    cpu = facts["cpu"]
    lines = ["versions"]
    lines += [f"  {name:14}{version or 'none'}" for name, version in facts["versions"].items()]
    lines += ["", "build"]
    if facts["build"] is None:
        lines.append(f"  {facts['build_missing']}")
    else:
        lines += [f"  {name:22}{value}" for name, value in facts["build"].items()]
    lines += ["", "devices", f"  CPU  {cpu['name']}, {cpu['threads']} threads"]
    if "features" in cpu:
        features = ", ".join(f"{n} {'yes' if has else 'no'}" for n, has in cpu["features"].items())
        lines.append(f"       {features}; in use: {cpu['active_isa']}")
    for index, gpu in enumerate(facts["gpus"]):
        lines.append(
            f"  GPU {index}: {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        )
    if not facts["gpus"]:
        lines.append("  GPU  none that torch can use")
    for op, available in facts["backends"].items():
        lines += ["", f"backends of {op}"]
        lines += [f"  {name:12}{reason or 'available'}" for name, reason in available.items()]
    cells = [
        [r[k] for k in ("op", "device", "dtype", "backend", "why")] for r in facts["automatic"]
    ]
    lines += ["", "automatic choice", table(["op", "device", "dtype", "backend", "why"], cells)]
    if facts.get("cuda_kernels"):
        lines += ["", "CUDA kernels", _kernel_table(facts["cuda_kernels"])]
    return "\n".join(lines)


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    """What each kernel uses on each architecture that it was compiled for."""
    header = ["kernel", "sm", "registers", "spills, B", "shared, KB", "threads", "occupancy"]
    cells = [
        [
            *(k["kernel"], str(k["arch"]), str(k["registers"]), str(k["spill_bytes"])),
            *(f"{k['shared_bytes'] / 1024:.0f}", str(k["threads"]), f"{k['occupancy']:.0%}"),
        ]
        for k in kernels
    ]
    return table(header, cells)
