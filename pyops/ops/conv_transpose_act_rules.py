"""What torch needs to know of conv_transpose2d_act: fake, autograd to any order, autocast and vmap rules.

One set of rules, registered for every backend's pair of ops (forward and backward).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.conv_transpose_act import ConvTransposeSpec, damp, damping_slope, output_extents
from . import _registration as registration

_OP = "conv_transpose2d_act"
_SPEC = len(ConvTransposeSpec._fields)


def lies_channels_last(tensor: Tensor) -> bool:
    """The op's rule for the format of its results; csrc/cpu/conv_transpose_act.cpp has the same."""
    return tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()


def _empty_dense(like: Tensor, shape: tuple[Any, ...], channels_last: bool) -> Tensor:
    n, c, h, w = shape
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return like.new_empty_strided(shape, strides)


def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *rest: Any,
) -> Tensor:
    spec = ConvTransposeSpec(*rest)
    size = output_extents(input.shape, weight.shape, spec)
    shape = (input.shape[0], weight.shape[1] * spec.groups, *size)
    return _empty_dense(input, shape, lies_channels_last(input))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    output: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    mask = rest[-1]
    channels = weight.shape[1] * ConvTransposeSpec(*rest[:-1]).groups
    return (
        _empty_dense(input, tuple(input.shape), lies_channels_last(input))
        if mask[0]
        else input.new_empty((0,)),
        weight.new_empty(weight.shape if mask[1] else (0,)),
        *(weight.new_empty((channels if wanted else 0,)) for wanted in mask[2:]),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, scale, _, *rest = inputs
    ctx.save_for_backward(input, weight, bias, scale, output)
    ctx.spec = ConvTransposeSpec(*rest)


def _backward_of(backward_op: Any) -> Any:
    def backward(
        ctx: Any, grad_output: Tensor, mask: list[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:5]) if mask is None else mask
        if grad_output is None or not any(mask):
            return (None,) * (5 + _SPEC)
        grads = backward_op(grad_output, *ctx.saved_tensors, *ctx.spec, mask)
        wanted = (grad if asked else None for grad, asked in zip(grads, mask, strict=True))
        return (*wanted, *(None,) * _SPEC)

    return backward


class EagerFunction(torch.autograd.Function):
    """The same autograd rule without torch's wrapper for ops registered in Python.

    That wrapper costs about 100 µs a call; the public function goes through here in eager mode, through the
    registered rule everywhere else (compile, export, vmap, direct calls of the op).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        op: Any,
        spec: ConvTransposeSpec,
    ) -> Tensor:
        tensors = (input, weight, bias, scale, shift)
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*tensors, *spec)
        # Without an activation no derivative reads the output: as `.data` it may be changed in place.
        kept = output.data if spec.activation == "none" else output
        _save_for_backward(ctx, (*tensors, *spec), kept)
        ctx.backward_op = registration.backward_op_of(op)
        ctx.given = tuple(t is not None for t in tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...]
        mask = registration.gradients_wanted(ctx, ctx.given)
        if torch.is_grad_enabled():  # a graph of the gradients is being built
            grads = _backward_of(ctx.backward_op)(ctx, grad_output, mask)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = _backward_of(ctx.backward_op)(ctx, grad_output, mask)
        return (*grads[:5], None, None)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, mask = inputs
    ctx.save_for_backward(*tensors[:6])
    ctx.spec, ctx.mask = ConvTransposeSpec(*tensors[6:]), mask


def _sum_weights(products: Tensor, groups: int) -> Tensor:
    """(C, K / groups, kernel_h, kernel_w) summed to (K,)."""
    return products.sum((2, 3)).unflatten(0, (groups, -1)).sum(1).flatten()


def _scale_weights(weight: Tensor, scale: Tensor | None, groups: int) -> Tensor:
    if scale is None:
        return weight
    by = scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return weight * by.reshape(*weight.shape[:2], 1, 1)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Plain torch throughout, so that it is differentiable in turn.

    The backward op's results, with du = grad_output * D(output), conv the transposed convolution, dgrad and
    wgrad its (bilinear) gradients:
        dx = dgrad(du, w * scale), dw = scale * wgrad(x, du), db = scale * sum(du), dshift = sum(du),
        dscale = <w, wgrad(x, du)> + b * sum(du)
    and their inner product with the incoming gradients (gx, gw, gb, gs, gt) is <du, M> with
        M = conv(gx, w * scale) + conv(x, V) + gb * scale + gs * b + gt,  V = gw * scale + gs * w.
    """
    grad_output, input, weight, bias, scale, output = ctx.saved_tensors
    spec, mask = ctx.spec, ctx.mask
    gx, gw, gb, gs, gt = (g if asked else None for g, asked in zip(grads, mask, strict=True))
    need_g, need_x, need_w, need_b, need_s, need_y = ctx.needs_input_grad[:6]
    groups = spec.groups
    geometry = (spec.stride, spec.padding, spec.output_padding, groups, spec.dilation)
    scaled = _scale_weights(weight, scale, groups)

    def plus(*terms: Tensor | None) -> Tensor | None:
        present = [t for t in terms if t is not None]
        return sum(present[1:], present[0]) if present else None

    def times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return a if b is None else None if a is None else a * b

    direction = plus(  # V
        None if gw is None else _scale_weights(gw, scale, groups),
        None if gs is None else _scale_weights(weight, gs, groups),
    )
    du = damp(grad_output, output, spec)

    def gradients(x: Tensor, w: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            *(du, x, w, None, spec.stride, spec.padding, spec.dilation, True),
            *(spec.output_padding, groups, [*wanted, False]),
        )[:2]

    result: list[Tensor | None] = [None] * 6
    if need_g or need_y:
        channels = plus(times(gb, scale), None if bias is None else times(gs, bias), gt)
        total = plus(
            None if gx is None else F.conv_transpose2d(gx, scaled, None, *geometry),
            None if direction is None else F.conv_transpose2d(input, direction, None, *geometry),
        )
        if channels is not None:
            spread = channels.view(-1, 1, 1)
            total = spread.expand_as(grad_output) if total is None else total + spread
        slope = damping_slope(output, spec)
        if total is not None:
            result[0] = damp(total, output, spec) if need_g else None
            result[5] = grad_output * total * slope if need_y and slope is not None else None
    if need_x and direction is not None:
        result[1] = gradients(input, direction, (True, False))[0]
    of_gx = of_input = None
    if gx is not None and (need_w or need_s):
        of_gx = gradients(gx, weight, (False, True))[1]
    if (gs is not None and need_w) or (gw is not None and need_s):
        of_input = gradients(input, weight, (False, True))[1]
    if need_w:
        result[2] = plus(
            None if of_gx is None else _scale_weights(of_gx, scale, groups),
            None if gs is None or of_input is None else _scale_weights(of_input, gs, groups),
        )
    sums = du.sum((0, 2, 3)) if need_b or need_s else None
    if need_b:
        result[3] = times(gs, sums)
    if need_s:
        result[4] = plus(
            None if of_gx is None else _sum_weights(weight * of_gx, groups),
            None if gw is None or of_input is None else _sum_weights(gw * of_input, groups),
            None if gb is None else times(gb, sums),
        )
    return (*result, *(None,) * (_SPEC + 1))


def _vmap_of(op: Any, folds: bool) -> Any:
    """Where it `folds` (forward), a batch over the images joins that of the op; for all else, one call a sample."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if folds and all(d is None for d in in_dims[1:]):
            images = args[0].movedim(in_dims[0], 0)
            return op(images.flatten(0, 1), *args[1:]).unflatten(0, images.shape[:2]), 0
        results = registration.each_sample(op, info.batch_size, in_dims, args)
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)

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
    autocast_arguments=5,
)


def _triton_forward(*args: Any) -> Any:
    from ..triton_kernels import conv_transpose_act as kernels

    return kernels.forward(*args[:5], ConvTransposeSpec(*args[5:]))


def _triton_backward(*args: Any) -> Any:
    from ..triton_kernels import conv_transpose_act as kernels

    return kernels.backward(*args[:6], ConvTransposeSpec(*args[6:-1]), args[-1])


def register() -> None:
    """Register the rules, and Triton's pair of ops. Called once, where _cpu.so brought the schemas."""
    registration.register_pair(_OP, RULES, _triton_forward, _triton_backward)
