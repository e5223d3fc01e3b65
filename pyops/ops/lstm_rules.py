"""What torch needs to know of lstm: fake, autograd to any order, autocast and vmap rules.

One set of rules, registered for every backend's pair of ops (forward and backward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import lstm as reference
from ..reference.lstm import LSTMSpec, lies_batch_major
from . import _registration as registration

_OP = "lstm"
_OPTIONS = len(LSTMSpec._fields)


def _empty_like_layout(input: Tensor, features: Any) -> Tensor:
    """(T, B, features) or (total, features), laid out as the op lays out what belongs to `input`."""
    if lies_batch_major(input):
        steps, batch, _ = input.shape
        return input.new_empty((batch, steps, features)).transpose(0, 1)
    return input.new_empty((*input.shape[:-1], features))


def saved_size(input: Tensor, hidden: Any, num_layers: int, directions: int) -> Any:
    """Elements kept for backward: i, f, g, o, c of every layer, the output of all but the last."""
    rows = input.shape[0] * input.shape[1] if input.dim() == 3 else input.shape[0]
    return rows * directions * hidden * (6 * num_layers - 1)


def _fake_forward(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, save = LSTMSpec(*rest[:-1]), rest[-1]
    directions = 2 if spec.bidirectional else 1
    hidden = c0.shape[2]
    return (
        _empty_like_layout(input, directions * hidden),
        h0.new_empty(h0.shape),
        c0.new_empty(c0.shape),
        input.new_empty((saved_size(input, hidden, spec.num_layers, directions) if save else 0,)),
    )


def _fake_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    mask = rest[-1]
    nothing = (0,)
    return (
        _empty_like_layout(input, input.shape[-1]) if mask[0] else input.new_empty(nothing),
        h0.new_empty(h0.shape if mask[1] else nothing),
        c0.new_empty(c0.shape if mask[2] else nothing),
        [w.new_empty(w.shape) for w in weights] if mask[3] else [],
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, h0, c0, weights, batch_sizes, *rest = inputs
    # False where it was traced with no gradient in sight, as by an export under no_grad.
    ctx.saved = rest[-1]
    ctx.save_for_backward(batch_sizes, input, h0, c0, output[0], output[3], *weights)
    ctx.spec = LSTMSpec(*rest[:-1])
    # Else zeros would be made for the gradient of the buffer of activations, its largest tensor.
    ctx.set_materialize_grads(False)


def _call_backward(
    backward_op: Any, ctx: Any, grads: Sequence[Tensor | None], mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    batch_sizes, input, h0, c0, output, saved, *weights = ctx.saved_tensors
    if not ctx.saved:
        forward_op = registration.forward_op_of(backward_op)
        with torch.no_grad():
            output, _, _, saved = forward_op(input, h0, c0, weights, batch_sizes, *ctx.spec, True)
    return backward_op(
        *grads[:3], input, h0, c0, weights, batch_sizes, output, saved, *ctx.spec, mask
    )


def _backward_of(backward_op: Any) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        asked = ctx.needs_input_grad
        mask = [*asked[:3], any(asked[3])]
        for_tensors: list[Tensor | None] = [None, None, None]
        for_weights: list[Tensor | None] = [None] * len(asked[3])
        if any(mask) and any(grad is not None for grad in grads[:3]):
            results = _call_backward(backward_op, ctx, grads, mask)
            for_tensors = [g if a else None for g, a in zip(results[:3], mask[:3], strict=True)]
            if mask[3]:
                for_weights = [g if a else None for g, a in zip(results[3], asked[3], strict=True)]
        return (*for_tensors, for_weights, *(None,) * (_OPTIONS + 2))

    return backward


class EagerFunction(torch.autograd.Function):
    """The same autograd rule without torch's wrapper for ops registered in Python.

    The public function goes through here in eager mode, through the registered rule everywhere else (compile, export,
    vmap, direct calls of the op).
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        spec: LSTMSpec,
        batch_sizes: Tensor | None,
        input: Tensor,
        h0: Tensor,
        c0: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (input, h0, c0, list(weights), batch_sizes, *spec, True)
        with torch._C._AutoDispatchBelowAutograd():
            results = op(*arguments)
        _save_for_backward(ctx, arguments, results)
        ctx.backward_op = registration.backward_op_of(op)
        return results[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[3:]
        mask = [*asked[:3], any(asked[3:])]
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(asked))
        if torch.is_grad_enabled():  # a graph of the gradients is being built
            results = _call_backward(ctx.backward_op, ctx, grads, mask)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = _call_backward(ctx.backward_op, ctx, grads, mask)
        every = (*results[:3], *(results[3] or (None,) * len(asked[3:])))
        wanted = (grad if a else None for grad, a in zip(every, asked, strict=True))
        return (None, None, None, *wanted)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *grads, input, h0, c0, weights, batch_sizes, _, _ = inputs[:10]
    ctx.save_for_backward(*grads, batch_sizes, input, h0, c0, *weights)
    ctx.spec, ctx.mask = LSTMSpec(*inputs[10:-1]), inputs[-1]
    ctx.set_materialize_grads(False)


def _double_backward(
    ctx: Any,
    grad_input: Tensor | None,
    grad_h0: Tensor | None,
    grad_c0: Tensor | None,
    grad_weights: list[Tensor | None],
) -> tuple[Any, ...]:
    """Differentiates the gradients of the reference, computed anew: plain torch, so that it holds to any order.

    It keeps the activations of every step as autograd does, and takes the reference's time.
    """
    *cotangents, batch_sizes, input, h0, c0 = ctx.saved_tensors[:7]
    weights = list(ctx.saved_tensors[7:])
    asked = ctx.needs_input_grad
    build = torch.is_grad_enabled()
    with torch.enable_grad():
        # Leaves of a graph of this call alone, still joined to the outer one where that is built.
        leaves = [
            t.view_as(t) if build and t.requires_grad else t.detach().requires_grad_()
            for t in (input, h0, c0, *weights)
        ]
        seeds = [
            None if t is None
            else t.view_as(t) if build and t.requires_grad
            else t.detach().requires_grad_()
            for t in cotangents
        ]  # fmt: skip
        outputs = reference.lstm(leaves[0], leaves[1], leaves[2], leaves[3:], batch_sizes, ctx.spec)
        given = [(o, s) for o, s in zip(outputs, seeds, strict=True) if s is not None]
        first = torch.autograd.grad(
            [o for o, _ in given],
            leaves,
            [s for _, s in given],
            create_graph=True,
            allow_unused=True,
        )
        incoming = (grad_input, grad_h0, grad_c0, *(grad_weights or (None,) * len(weights)))
        computed = (*ctx.mask[:3], *(ctx.mask[3],) * len(weights))
        joined = [
            (f, g)
            for f, g, made in zip(first, incoming, computed, strict=True)
            if made and f is not None and f.requires_grad and g is not None
        ]
        wanted = [t for t in (*seeds, *leaves) if t is not None]
        second = (
            torch.autograd.grad(
                [f for f, _ in joined],
                wanted,
                [g for _, g in joined],
                create_graph=build,
                allow_unused=True,
            )
            if joined
            else (None,) * len(wanted)
        )
    found = dict(zip(map(id, wanted), second, strict=True))
    tensors = [None if t is None else found[id(t)] for t in (*seeds, *leaves)]
    for_tensors = [t if a else None for t, a in zip(tensors[:6], asked[:6], strict=True)]
    for_weights = [t if a else None for t, a in zip(tensors[6:], asked[6], strict=True)]
    # batch_sizes, output, saved, the options and the mask
    return (*for_tensors, for_weights, *(None,) * (3 + _OPTIONS + 1))


def _vmap_forward(op: Any) -> Any:
    """Fold a batch of inputs and states into the batch of the op; for anything else, one call a sample."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        input, h0, c0, weights, batch_sizes, *rest = args
        mapped_weights = any(d is not None for d in in_dims[3])
        # The buffer for backward does not come apart into samples.
        if mapped_weights or batch_sizes is not None or rest[-1]:
            results = registration.each_sample(op, info.batch_size, in_dims, args)
            return results, (0,) * len(results)
        joined = [
            torch.stack(registration.samples(t, d, info.batch_size), 1)
            for t, d in zip((input, h0, c0), in_dims[:3], strict=True)
        ]
        *results, saved = op(*(t.flatten(1, 2) for t in joined), weights, None, *rest)
        sizes = joined[0].shape[1:3]
        return (*(r.unflatten(1, sizes) for r in results), saved), (1, 1, 1, None)

    return rule


def _vmap_backward(op: Any) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = registration.each_sample(op, info.batch_size, in_dims, args)
        return results, (0, 0, 0, [0] * len(results[3]))

    return rule


RULES = registration.Rules(
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save_for_backward=_save_for_backward,
    backward_of=_backward_of,
    save_for_double_backward=_save_for_double_backward,
    double_backward=_double_backward,
    vmap_forward=_vmap_forward,
    vmap_backward=_vmap_backward,
    autocast_arguments=4,
)


def _triton_forward(*args: Any) -> Any:
    from ..triton_kernels import lstm as kernels

    return kernels.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from ..triton_kernels import lstm as kernels

    return kernels.backward(*args)


def register() -> None:
    """Register the rules, and Triton's pair of ops. Called once, where _cpu.so brought the schemas."""
    registration.register_pair(_OP, RULES, _triton_forward, _triton_backward)
