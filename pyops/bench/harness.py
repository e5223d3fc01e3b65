"""Timing, measured device peaks, memory saved for backward, and the machine's description."""

from __future__ import annotations

import functools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

WARMUP_CALLS = 2
MIN_ROUNDS = 7
MAX_ROUNDS = 101
MIN_SAMPLE_SECONDS = 2e-4  # shorter calls are repeated inside one sample


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: median and 20/80 percentiles over `samples` samples."""

    median: float
    p20: float
    p80: float
    samples: int


def summarize(seconds: list[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], len(seconds))
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(statistics.median(seconds), cuts[1], cuts[7], len(seconds))


Key = TypeVar("Key", bound=Hashable)


def time_interleaved(
    candidates: Mapping[Key, Callable[[], object]], device: torch.device, seconds: float = 2.0
) -> dict[Key, Timing]:
    """Times every candidate for about `seconds` in all.

    On a CPU the candidates take turns in an order drawn anew each round, so that a machine that
    slows down slows all of them alike, and none always finds what the same other one left in the
    caches. On a GPU each call is timed with device
    events after a flush of the L2 cache, in three rounds over the candidates.
    """
    if device.type == "cuda":
        return _time_cuda(candidates, seconds)
    repeats, calls_of_round = {}, 0.0
    for name, fn in candidates.items():
        for _ in range(WARMUP_CALLS):
            fn()
        start = time.perf_counter()
        fn()
        once = time.perf_counter() - start
        repeats[name] = max(1, min(1000, round(MIN_SAMPLE_SECONDS / max(once, 1e-7))))
        calls_of_round += once * repeats[name]
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / max(calls_of_round, 1e-6))))
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    order, names = random.Random(0), list(candidates)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            fn, count = candidates[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                fn()
            samples[name].append((time.perf_counter() - start) / count)
    return {name: summarize(s) for name, s in samples.items()}


def _time_cuda(candidates: Mapping[Key, Callable[[], object]], seconds: float) -> dict[Key, Timing]:
    from triton.testing import do_bench

    rounds = 3
    share_ms = max(5.0, 1000 * seconds / (rounds * len(candidates)) / 2)
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, fn in candidates.items():
            times = do_bench(fn, warmup=share_ms, rep=share_ms, return_mode="all")
            samples[name] += [t / 1000 for t in times]
    return {name: summarize(s) for name, s in samples.items()}


def saved_for_backward(
    fn: Callable[[], object], exclude: tuple[torch.Tensor, ...] = ()
) -> tuple[object, int]:
    """Runs `fn`; returns its result and the bytes that autograd keeps for the backward.

    Each storage counts once, and as a whole, however many saved tensors view it. Storages of
    `exclude` (parameters, which exist anyway) do not count.
    """
    storages: dict[int, int] = {}
    excluded = {t.untyped_storage().data_ptr() for t in exclude}
    alive = []  # a freed storage's address could be taken again by another one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    return result, sum(storages.values())


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int | None:
    """Device memory that one call takes beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


@dataclass(frozen=True)
class Peaks:
    """What this device reached: FLOP/s in a large matrix product, bytes/s in a large copy."""

    flops: float
    bandwidth: float

    def floor(self, flops: float, nbytes: float) -> float:
        """Seconds that no implementation doing these operations and transfers can undercut."""
        return max(flops / self.flops, nbytes / self.bandwidth)


@functools.cache
def measured_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = time_interleaved(
        {"mm": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}, device, 1.0
    )
    # p20, since this stands for the device's best and not for its usual speed
    return Peaks(2 * size**3 / timings["mm"].p20, 2 * source.numel() / timings["copy"].p20)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, object]:
    """What a row's figures depend on besides the code: versions, device, threads."""
    import pyops

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    env: dict[str, object] = {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "pyops": pyops.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        env["cuda"] = torch.version.cuda
        env["cudnn"] = torch.backends.cudnn.version()
        env["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return env
