"""What registering an op for torch takes beyond its kernels, shared by all ops and backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack

_libraries: list[torch.library.Library] = []  # registrations live as long as these


def define_like(op: str, other: str, implementation: Callable[..., Any]) -> None:
    """Define `pyops::<op>` with the schema of `pyops::<other>`, as an opaque op on CPU and CUDA."""
    schema = str(getattr(torch.ops.pyops, other).default._schema).split("(", 1)[1]
    library = torch.library.Library("pyops", "FRAGMENT")
    library.define(f"{op}({schema}")
    for key in ("CPU", "CUDA"):
        library.impl(op, implementation, key)
    _libraries.append(library)


def register_autocast(op: str, tensor_arguments: int) -> None:
    """Under autocast, cast the first `tensor_arguments` arguments as torch casts a convolution's.

    Each is a tensor, None or a list of tensors.
    """
    overload = getattr(torch.ops.pyops, op).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*args: Any, device_type: str = device_type, keyset: Any = keyset) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            cast = [
                None if a is None
                else [autocast_to(dtype, t) for t in a] if isinstance(a, (list, tuple))
                else autocast_to(dtype, a)
                for a in args[:tensor_arguments]
            ]  # fmt: skip
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return overload(*cast, *args[tensor_arguments:])

        library = torch.library.Library("pyops", "IMPL", key)
        library.impl(op, cast_and_call)
        _libraries.append(library)


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; torch refuses the question for some kinds."""
    return (
        torch._C._is_any_autocast_enabled()  # nearly always False, and five times as quick to ask
        and device.type in ("cpu", "cuda")
        and torch.is_autocast_enabled(device.type)
    )


def autocast_to(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as autocast hands it on: floating tensors but float64 ones are cast."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def needs_plain_torch() -> bool:
    """Inside jvp, grad, ... of torch.func or forward-mode AD only plain torch has the derivatives."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    stack = get_interpreter_stack()
    return stack is not None and any(i.key() != TransformType.Vmap for i in stack)
