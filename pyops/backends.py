"""Which implementation of an op exists here, and which one automatic choice takes and why.

Names: `reference` (plain torch), `cpu` (C++), `triton`, `cuda` (CUDA C++). An explicit backend never
falls back to another one; automatic choice always ends at `reference`, so that it works wherever torch does.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path

import torch

NAMES = ("reference", "cpu", "triton", "cuda")


def _read_proven() -> dict[tuple[str, str, tuple[int, int]], str]:
    rows = json.loads((Path(__file__).parent / "proven.json").read_text())
    return {(r["op"], r["backend"], tuple(r["capability"])): r["results"] for r in rows}


# (op, backend, compute capability) -> the results file of the run that proved it. Automatic choice
# takes no GPU kernel that is not listed here: a kernel enters after `make gpu-test` has passed on
# that architecture and its results are committed under benchmarks/results/ (pyops/bench/proven.py).
PROVEN = _read_proven()

# Ops and the native or Triton backends each has an implementation for.
OPS: dict[str, tuple[str, ...]] = {
    "conv_relu_pool2d": ("cpu", "triton", "cuda"),
    "conv_transpose2d_act": ("cpu", "triton"),
    "linear_act": ("cpu",),
    "attention": ("cpu", "triton"),
    "attention_varlen": ("cpu", "triton"),
    "attention_decode": ("cpu", "triton"),
    "lstm": ("cpu", "triton"),
}

_missing: dict[str, str] = {}  # native library -> why it could not be loaded


def load_native() -> None:
    """Load the native libraries; a missing or failing one is remembered, not raised."""
    folder = Path(__file__).parent
    _load("cpu", folder / "_cpu.so")
    if torch.version.cuda is None:
        _missing["cuda"] = "this torch was built without CUDA"
    else:
        _load("cuda", folder / "_cuda.so")


def _load(name: str, path: Path) -> None:
    if not path.exists():
        _missing[name] = f"{path.name} was not built"
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        _missing[name] = f"{path.name} could not be loaded: {error}"


def schemas_loaded() -> bool:
    """Whether _cpu.so, which holds every op's schema, is there. Without it only `reference` works."""
    return "cpu" not in _missing


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_missing() -> str | None:
    if not schemas_loaded():
        return f"the ops' schemas are missing: {_missing['cpu']}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "Triton needs a GPU (or TRITON_INTERPRET=1 to run its interpreter)"
    return None


def why_not(op: str, backend: str, device_type: str | None = None) -> str | None:
    """None if `backend` of `op` can run here (on that kind of device), else the reason in words."""
    if backend == "reference":
        return None
    if backend not in OPS[op]:
        return f"{op} has no implementation for backend {backend}"
    if backend == "triton":
        reason = _triton_missing()
        if reason is None and device_type not in (None, "cpu" if interpreting() else "cuda"):
            where = "CPU tensors (TRITON_INTERPRET=1)" if interpreting() else "CUDA tensors"
            reason = f"backend triton takes {where} here"
        return reason
    if backend in _missing:
        return _missing[backend]
    if backend == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA GPU that torch can use"
    if device_type not in (None, backend):
        return f"backend {backend} takes {backend} tensors"
    return None


def available(op: str) -> dict[str, str | None]:
    """Every backend's name with None if it can run here, else the reason."""
    return {name: why_not(op, name) for name in NAMES}


def automatic(op: str, device: torch.device) -> tuple[tuple[str, ...], str]:
    """(backends in the order automatic choice tries them, why) for tensors on `device`."""
    if device.type == "cpu":
        reason = why_not(op, "cpu", "cpu")
        if reason is None:
            return ("cpu", "reference"), "compiled kernels for this CPU"
        return ("reference",), reason
    if device.type == "cuda":
        major_minor = capability(device)
        for backend in ("cuda", "triton"):
            results = PROVEN.get((op, backend, major_minor))
            if results and why_not(op, backend, "cuda") is None:
                return (backend, "reference"), f"proven by {results}"
        return ("reference",), f"no kernel is proven on sm_{major_minor[0]}{major_minor[1]} yet"
    return ("reference",), f"no kernels for device {device.type}"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device: (9, 0) is sm_90."""
    return torch.cuda.get_device_capability(device)


def table() -> list[dict[str, str]]:
    """What automatic choice takes for each op, device and dtype, and why: op, device, dtype, backend, why."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = []
    for op in OPS:
        for device in devices:
            for dtype in ("float32", "bfloat16", "float16", "float64"):
                order, why = automatic(op, device)
                backend = order[0]
                if dtype == "float64" and backend != "reference":
                    backend, why = "reference", "float64 kernels are for checking, not for speed"
                row = {
                    "op": op,
                    "device": str(device),
                    "dtype": dtype,
                    "backend": backend,
                    "why": why,
                }
                rows.append(row)
    return rows
