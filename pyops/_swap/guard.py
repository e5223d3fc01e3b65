"""What makes it safe to compute a module's result without calling the module."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_internals

from pyops._swap.resolve import is_torchs_own

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
}
_FORWARDS = {
    kind: kind.forward
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and is_torchs_own(kind.forward)
}


def class_of(module: nn.Module) -> type:
    """The class of a module, also where torch.export traces with a proxy of a shared module."""
    kind = type(module)
    bases = kind.__bases__
    return bases[-1] if bases[0].__name__ == "AttrProxy" else kind


def runs_torchs_forward(kind: type) -> bool:
    """Whether a class of torch.nn still has the forward it came with; some tools put in their own."""
    return _FORWARDS.get(kind) is kind.forward  # type: ignore[attr-defined]  # a class of modules


def has_global_hooks() -> bool:
    """Whether there are hooks on the calls of all modules."""
    return module_internals._has_any_global_hook()


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward of its class, if there are no global hooks.

    Runs at every call of a rewritten forward, so it reads attributes and allocates nothing.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or not runs_torchs_forward(class_of(module))
    )


def obstacle(module: nn.Module) -> str | None:
    """In words, what makes `is_untouched` false for `module` itself; None if nothing does."""
    for attribute, name in _HOOKS.items():
        if getattr(module, attribute):
            return f"has {name}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    if not runs_torchs_forward(type(module)):
        return "is of a class whose forward has been replaced"
    return None


def is_plain_tensor(tensor: Any) -> bool:
    """Whether `tensor` is a strided floating-point tensor whose operations nobody redefines.

    The stand-ins that torch.export traces with count as plain: the fused op knows them.
    """
    kind = type(tensor)
    return (
        (
            kind is torch.Tensor
            or kind is nn.Parameter
            or (issubclass(kind, torch.Tensor) and kind.__module__.startswith("torch._subclasses"))
        )
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )
