"""What registering an op for torch takes beyond its kernels, shared by all ops and backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Rules:
    """What torch needs to know of a pair of ops, `<op>` and `<op>_backward`, whatever backend runs it.

    `backward_of`, `vmap_forward` and `vmap_backward` make the rule from the op that it calls.
    """

    fake_forward: Callable[..., Any]
    fake_backward: Callable[..., Any]
    save_for_backward: Callable[..., None]
    backward_of: Callable[[Any], Callable[..., Any]]
    save_for_double_backward: Callable[..., None]
    double_backward: Callable[..., Any]
    vmap_forward: Callable[[Any], Callable[..., Any]]
    vmap_backward: Callable[[Any], Callable[..., Any]]
    autocast_arguments: int  # how many of the forward's first arguments autocast casts


def register_rules(op: str, rules: Rules) -> None:
    """Register the rules for `pyops::<op>` and `pyops::<op>_backward`."""
    forward, backward = f"pyops::{op}", f"pyops::{op}_backward"
    forward_op = getattr(torch.ops.pyops, op).default
    backward_op = getattr(torch.ops.pyops, f"{op}_backward").default
    torch.library.register_fake(forward, rules.fake_forward)
    torch.library.register_fake(backward, rules.fake_backward)
    torch.library.register_autograd(
        forward, rules.backward_of(backward_op), setup_context=rules.save_for_backward
    )
    torch.library.register_autograd(
        backward, rules.double_backward, setup_context=rules.save_for_double_backward
    )
    torch.library.register_vmap(forward, rules.vmap_forward(forward_op))
    torch.library.register_vmap(backward, rules.vmap_backward(backward_op))
    register_autocast(op, rules.autocast_arguments)


def register_pair(
    op: str, rules: Rules, triton_forward: Callable[..., Any], triton_backward: Callable[..., Any]
) -> None:
    """Define Triton's pair of ops like `pyops::<op>`'s and register the rules for both pairs."""
    define_like(f"{op}_triton", op, triton_forward)
    define_like(f"{op}_triton_backward", f"{op}_backward", triton_backward)
    for each in (op, f"{op}_triton"):
        register_rules(each, rules)


def samples(value: Any, dims: Any, size: int) -> list[Any]:
    """What each of `size` samples has of an argument that vmap maps over along `dims`, or does not (None)."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        each = [samples(t, d, size) for t, d in zip(value, dims, strict=True)]
        return [list(own) for own in zip(*each, strict=True)]
    if isinstance(value, torch.Tensor) and dims is not None:
        return list(value.unbind(dims))
    return [value] * size


def each_sample(op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """vmap by one call a sample: the results stacked along dimension 0, a tensor or a tuple as the op's."""
    columns = [samples(a, d, size) for a, d in zip(args, in_dims, strict=True)]
    if size == 0:
        raise RuntimeError(f"vmap: {op} maps nothing but inputs over a dimension of size 0")
    calls = [op(*own) for own in zip(*columns, strict=True)]
    if isinstance(calls[0], torch.Tensor):
        return torch.stack(calls)
    return tuple(
        [torch.stack(w) for w in zip(*column, strict=True)]
        if isinstance(column[0], list)
        else torch.stack(column)
        for column in zip(*calls, strict=True)
    )


def backward_op_of(op: Any) -> Any:
    """`pyops::<op>_backward` of `pyops::<op>`."""
    name = op._schema.name.removeprefix("pyops::")
    return getattr(torch.ops.pyops, f"{name}_backward").default


def forward_op_of(backward_op: Any) -> Any:
    """`pyops::<op>` of `pyops::<op>_backward`."""
    name = backward_op._schema.name.removeprefix("pyops::").removesuffix("_backward")
    return getattr(torch.ops.pyops, name).default


def gradients_wanted(ctx: Any, given: Sequence[bool]) -> list[bool]:
    """For a Function's first arguments, of which `given` are tensors: is this backward pass after their gradients?

    `ctx.needs_input_grad` is also true of what requires gradients but was not asked for, as the weights are
    not where torch.autograd.grad takes a penalty's gradient of the images alone.
    """
    nodes = iter(ctx.next_functions)  # one for each tensor
    pairs = zip(given, ctx.needs_input_grad, strict=False)
    return [is_given and _executes(next(nodes)[0]) and needs for is_given, needs in pairs]


def _executes(node: Any) -> bool:
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # how it says that torch.autograd.grad was asked for this leaf
        return True


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


# torch.compile asks it as it traces, within the transforms that it traces, and keeps the answer;
# what torch._dynamo.assume_constant_result does, without importing torch._dynamo.
needs_plain_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def only_values_matter(*tensors: Any) -> bool:
    """Whether a call is of plain tensors on the CPU, with no gradient, cast, transform, trace or compiler at work."""
    wanted = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not torch.Tensor or not tensor.is_cpu:
            return False
        if wanted and tensor.requires_grad:
            return False
    return (
        not torch._C._is_any_autocast_enabled()
        and get_interpreter_stack() is None
        and not torch._C._is_tracing()
        and torch.autograd.forward_ad._current_level < 0
    )


def needs_registered_op() -> bool:
    """Under vmap and torch.jit.trace a call must be one op that they know, not a function in Python."""
    return get_interpreter_stack() is not None or torch._C._is_tracing()
