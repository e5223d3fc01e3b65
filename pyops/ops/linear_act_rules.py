"""What torch needs to know of linear_act: fake, autograd to any order, autocast and vmap rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.linear_act import LinearActSpec, activation_backward
from . import _registration as registration

_OP = "linear_act"


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *spec: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *spec = inputs
    ctx.save_for_backward(input, weight, output)
    ctx.spec = LinearActSpec(*spec)


def _gradients(ctx: Any, grad_output: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """Plain torch throughout, so that it is differentiable in turn."""
    input, weight, output = ctx.saved_tensors
    grad = activation_backward(grad_output, output, ctx.spec)
    rows = grad.reshape(-1, weight.shape[0])
    return (
        (rows @ weight).view(input.shape) if mask[0] else None,
        rows.t() @ input.reshape(-1, weight.shape[1]) if mask[1] else None,
        rows.sum(0) if mask[2] else None,
    )


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad_output, list(ctx.needs_input_grad[:3])), None, None)


class EagerFunction(torch.autograd.Function):
    """The same autograd rule without torch's wrapper for ops registered in Python, which costs about 100 µs a call."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, spec: LinearActSpec
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output: Tensor = torch.ops.pyops.linear_act.default(input, weight, bias, *spec)
        _save_for_backward(ctx, (input, weight, bias, *spec), output)
        ctx.given = (True, True, bias is not None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad_output, registration.gradients_wanted(ctx, ctx.given)), None)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, int]:
    op = torch.ops.pyops.linear_act.default
    if all(d is None for d in in_dims[1:]):
        return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    return registration.each_sample(op, info.batch_size, in_dims, args), 0


def register() -> None:
    """Register the rules. Called once, where _cpu.so brought the schema."""
    name = f"pyops::{_OP}"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward, setup_context=_save_for_backward)
    torch.library.register_vmap(name, _vmap)
    registration.register_autocast(_OP, 3)
