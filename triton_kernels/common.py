"""What every Triton launcher shares: configs, their choice, and the device's traits."""

import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

# Decided when a kernel is decorated, as Triton itself does.
INTERPRET = triton.knobs.runtime.interpret

# Offsets up to here are computed in 32 bits; tests lower it to force 64.
INT32_LIMIT = 2**31 - 1

# PYOPS_AUTOTUNE=0 always takes the first config of the list.
_autotune = os.environ.get("PYOPS_AUTOTUNE", "1") != "0"
_chosen: dict[Hashable, int] = {}  # the place in the list of configs
_tuning = threading.Lock()


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel: its block sizes and the launch options."""

    constants: dict[str, Any] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # registers a thread may use

    def __getitem__(self, name: str) -> Any:
        return self.constants[name]


# Given a config: the grid and the kernel's arguments, block sizes excluded.
Bind = Callable[[Config], tuple[tuple[int, ...], dict[str, Any]]]


def launch(kernel: Any, configs: Sequence[Config], key: tuple[Hashable, ...], bind: Bind) -> None:
    """Runs `kernel` on the current device and stream with the best of `configs` for the shape class
    `key`.

    The first config is the heuristic choice. It is taken as it is under the interpreter, while a
    CUDA graph is being captured and when PYOPS_AUTOTUNE=0; otherwise the first call of a shape
    class times them all.
    """
    run(kernel, choose(kernel, configs, key, bind), bind)


def run(kernel: Any, config: Config, bind: Bind) -> None:
    grid, arguments = bind(config)
    kernel[grid](
        **arguments,
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        # Its default has differed between Triton versions.
        enable_fp_fusion=True,
    )


def choose(kernel: Any, configs: Sequence[Config], key: tuple[Hashable, ...], bind: Bind) -> Config:
    if len(configs) == 1 or INTERPRET or not _autotune:
        return configs[0]
    key = (kernel.__name__, torch.cuda.current_device(), *key)
    chosen = _chosen.get(key)
    if chosen is not None:
        return configs[chosen]
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    with _tuning:
        if key not in _chosen:
            times = [_time(kernel, config, bind) for config in configs]
            _chosen[key] = times.index(min(times))
        return configs[_chosen[key]]


def _time(kernel: Any, config: Config, bind: Bind) -> float:
    try:
        return triton.testing.do_bench(lambda: run(kernel, config, bind), warmup=5, rep=20)
    except triton.OutOfResources:
        return float("inf")


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """The compute capability of the tensor's device; (8, 0) for one that is no GPU."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)


def multiprocessors(tensor: torch.Tensor) -> int:
    if not tensor.is_cuda:
        return 4
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a result shaped after this 4-D tensor is channels_last; not if it could be either."""
    return tensor.stride(1) == 1 and tensor.size(1) > 1 and not tensor.is_contiguous()


def tf32_allowed() -> bool:
    """Whether torch allows TF32 in float32 convolutions."""
    # This getter understands both of torch's APIs; cudnn.allow_tf32 raises once the newer one was
    # used.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def conv_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of tl.dot: TF32 only where torch allows it."""
    return "tf32" if dtype is torch.float32 and tf32_allowed() and not INTERPRET else "ieee"


def needs_int64(*sizes: int) -> bool:
    """Whether an offset into something of one of these sizes, or a tile past it, needs 64 bits."""
    return max(sizes) > INT32_LIMIT - 2**20


def power_of_2(value: int, low: int, high: int) -> int:
    """The smallest power of two that is at least `value`, held between `low` and `high`."""
    return max(low, min(high, triton.next_power_of_2(max(value, 1))))
