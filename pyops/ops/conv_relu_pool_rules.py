"""What torch needs to know of conv_relu_pool2d: fake, autograd to any order, autocast and vmap rules.

One set of rules, registered for every backend's pair of ops (forward and backward).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as nn_grad

from ..reference.conv_relu_pool import (
    ConvPoolSpec,
    Expansion,
    conv_extents,
    pool_extents,
    stores_codes,
)
from . import _registration as registration

_OP = "conv_relu_pool2d"


def lies_channels_last(tensor: Tensor) -> bool:
    """The op's rule for the format of its results; csrc/cpu/conv_relu_pool.cpp has the same."""
    return tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()


def _empty_dense(
    like: Tensor, shape: tuple[Any, ...], channels_last: bool, dtype: torch.dtype
) -> Tensor:
    n, c, h, w = shape
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return like.new_empty_strided(shape, strides, dtype=dtype)


def _fake_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    spec, with_codes = ConvPoolSpec.from_flat(rest[:-1]), rest[-1]
    out_size = pool_extents(conv_extents(input.shape, weight.shape, spec), spec)
    shape = (input.shape[0], weight.shape[0], *out_size)
    channels_last = lies_channels_last(input)
    output = _empty_dense(input, shape, channels_last, input.dtype)
    if with_codes and stores_codes(spec):
        return output, _empty_dense(input, shape, channels_last, torch.uint8)
    return output, input.new_empty((0,), dtype=torch.uint8)


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, codes: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mask = rest[-1]
    nothing = (0,)
    return (
        _empty_dense(input, tuple(input.shape), lies_channels_last(input), input.dtype)
        if mask[0]
        else input.new_empty(nothing),
        weight.new_empty(weight.shape) if mask[1] else weight.new_empty(nothing),
        weight.new_empty((weight.shape[0],)) if mask[2] else weight.new_empty(nothing),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, *rest = inputs
    spec, with_codes = ConvPoolSpec.from_flat(rest[:-1]), rest[-1]
    ctx.flat = rest[:-1]
    # Traced where no gradient was in sight, as by an export under no_grad, and asked for one now.
    ctx.without_codes = stores_codes(spec) and not with_codes
    if ctx.without_codes:
        ctx.save_for_backward(input, weight, bias)
        return
    by_output = not stores_codes(spec) and spec.activation != "none"
    ctx.save_for_backward(input, weight, output[0] if by_output else output[1])


def _backward_of(backward_op: Any) -> Any:
    def backward(
        ctx: Any, grad_output: Tensor, _: Any, mask: list[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:3]) if mask is None else mask
        if grad_output is None or not any(mask):
            return (None,) * (4 + len(ctx.flat))
        input, weight, selector = ctx.saved_tensors
        if ctx.without_codes:  # what was saved instead is the bias
            forward_op = registration.forward_op_of(backward_op)
            with torch.no_grad():
                _, selector = forward_op(input, weight, selector, *ctx.flat, True)
        grads = backward_op(grad_output, input, weight, selector, *ctx.flat, mask)
        wanted = (grad if asked else None for grad, asked in zip(grads, mask, strict=True))
        return (*wanted, *(None,) * (len(ctx.flat) + 1))

    return backward


class EagerFunction(torch.autograd.Function):
    """The same autograd rule without torch's wrapper for ops registered in Python.

    That wrapper costs about 100 µs a call; the public function goes through here in eager mode, through the
    registered rule everywhere else (compile, export, vmap, direct calls of the op).
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, op: Any, flat: tuple[Any, ...]
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(input, weight, bias, *flat, True)
        _save_for_backward(ctx, (input, weight, bias, *flat, True), output)
        ctx.backward_op = registration.backward_op_of(op)
        ctx.given = (True, True, bias is not None)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...]
        mask = registration.gradients_wanted(ctx, ctx.given)
        if torch.is_grad_enabled():  # a graph of the gradients is being built
            grads = _backward_of(ctx.backward_op)(ctx, grad_output, None, mask)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = _backward_of(ctx.backward_op)(ctx, grad_output, None, mask)
        return (*grads[:3], None, None)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, input, weight, selector, *rest = inputs
    ctx.save_for_backward(grad_output, input, weight, selector)
    ctx.flat_length = len(rest) - 1
    ctx.spec, ctx.mask = ConvPoolSpec.from_flat(rest[:-1]), rest[-1]


def _double_backward(
    ctx: Any, grad_dx: Tensor, grad_dw: Tensor, grad_db: Tensor
) -> tuple[Tensor | None, ...]:
    """Plain torch throughout, so that it is differentiable in turn.

    With E the (linear) expansion of grad_output, dx = convT(E, w), dw = corr(x, E), db = sum(E); their inner
    product with the incoming gradients is <E, conv(grad_dx, w) + conv(x, grad_dw) + grad_db>.
    """
    grad_output, input, weight, selector = ctx.saved_tensors
    spec, mask = ctx.spec, ctx.mask
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups)
    expansion = Expansion(selector, spec, conv_extents(input.shape, weight.shape, spec))
    for_grad = for_input = for_weight = None
    if ctx.needs_input_grad[0]:
        before = []
        if mask[0]:
            before.append(F.conv2d(grad_dx, weight, None, *geometry))
        if mask[1]:
            before.append(F.conv2d(input, grad_dw, None, *geometry))
        total = functools.reduce(torch.add, before) if before else None
        if mask[2]:
            spread = grad_db.view(1, -1, 1, 1)
            size = (*grad_output.shape[:2], *expansion.conv_size)
            total = spread.expand(size) if total is None else total + spread
        for_grad = None if total is None else expansion.reduce(total)
    expanded = expansion.expand(grad_output)
    if ctx.needs_input_grad[1] and mask[1]:
        for_input = nn_grad.conv2d_input(input.shape, grad_dw, expanded, *geometry)
    if ctx.needs_input_grad[2] and mask[0]:
        for_weight = nn_grad.conv2d_weight(grad_dx, weight.shape, expanded, *geometry)
    return (for_grad, for_input, for_weight, None, *(None,) * (ctx.flat_length + 1))


def _vmap_of(op: Any, folds: bool) -> Any:
    """Where it `folds` (forward), a batch over the images joins that of the op; for all else, one call a sample."""

    def rule(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if folds and all(d is None for d in in_dims[1:]):
            images = args[0].movedim(in_dims[0], 0)
            sizes = images.shape[:2]
            images = images.flatten(0, 1)
            results = tuple(
                r.unflatten(0, sizes) if r.dim() == 4
                else r.expand(info.batch_size, *r.shape)
                for r in op(images, *args[1:])
            )  # fmt: skip
        else:
            results = registration.each_sample(op, info.batch_size, in_dims, args)
        return results, (0,) * len(results)

    return rule


RULES = registration.Rules(
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save_for_backward=_save_for_backward,
    backward_of=_backward_of,
    save_for_double_backward=_save_for_double_backward,
    double_backward=_double_backward,
    vmap_forward=lambda op: _vmap_of(op, folds=True),
    vmap_backward=lambda op: _vmap_of(op, folds=False),
    autocast_arguments=3,
)


def _triton_forward(*args: Any) -> Any:
    from ..triton_kernels import conv_relu_pool as kernels

    spec = ConvPoolSpec.from_flat(args[3:-1])
    return kernels.forward(*args[:3], *spec, args[-1])


def _triton_backward(*args: Any) -> Any:
    from ..triton_kernels import conv_relu_pool as kernels

    spec = ConvPoolSpec.from_flat(args[4:-1])
    return kernels.backward(*args[:4], *spec, args[-1])


def register() -> None:
    """Register the rules, and Triton's pair of ops. Called once, where _cpu.so brought the schemas."""
    registration.register_pair(_OP, RULES, _triton_forward, _triton_backward)
    registration.register_rules(f"{_OP}_tf32", RULES)
