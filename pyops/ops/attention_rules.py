"""What torch needs to know of attention: fake, autograd to any order, autocast and vmap rules.

One set of rules, registered for every backend's pair of ops (forward and backward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import attention as reference
from ..reference.attention import AttentionSpec, compute_dtype, lies_heads_inside
from . import _registration as registration
from .attention_checks import unit_last

_OP = "attention"


def _empty_like_in(layout_of: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Empty (batch, heads, seqlen, d) in the layout of a tensor of that kind."""
    batch, heads, seqlen, d = shape
    if lies_heads_inside(layout_of):
        return layout_of.new_empty((batch, seqlen, heads, d)).transpose(1, 2)
    return layout_of.new_empty(shape)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    return _empty_like_in(query, shape), lse


def _fake_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    mask = rest[-1]
    grads = [
        _empty_like_in(t, tuple(t.shape)) if asked else t.new_empty((0,))
        for t, asked in zip((query, key, value), mask, strict=False)
    ]
    for tensor, asked in ((bias, mask[3]), (sinks, mask[4])):
        if asked and tensor is not None:
            grads.append(tensor.new_empty(tensor.shape))
        else:
            grads.append(query.new_empty((0,), dtype=torch.float32))
    return tuple(grads)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, alibi_slopes, sinks, rng_state, *options = inputs
    ctx.save_for_backward(query, key, value, *output, bias, alibi_slopes, sinks, rng_state)
    ctx.spec = AttentionSpec(*options)


def _gradients(
    ctx: Any, backward_op: Any, grad_output: Tensor | None, grad_lse: Tensor | None, first: int
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, alibi_slopes, sinks; `first` is query's place among the inputs."""
    needs = ctx.needs_input_grad[first : first + 6]
    mask = [*needs[:4], needs[5]]
    if needs[4]:
        raise RuntimeError("alibi_slopes: have no gradient in this backend; detach() them")
    if (grad_output is None and grad_lse is None) or not any(mask):
        return (None,) * 6
    if grad_output is None:
        grad_output = torch.zeros_like(ctx.saved_tensors[3])
    grad_output = unit_last(grad_output)
    grads = backward_op(grad_output, grad_lse, *ctx.saved_tensors, *ctx.spec, mask)
    dq, dk, dv, dbias, dsinks = (
        grad if asked else None for grad, asked in zip(grads, mask, strict=True)
    )
    return dq, dk, dv, dbias, None, dsinks


def _backward_of(backward_op: Any) -> Any:
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads = _gradients(ctx, backward_op, grad_output, grad_lse, 0)
        return (*grads, None, *(None,) * len(ctx.spec))

    return backward


def eager_function(
    save_for_backward: Callable[..., None], gradients: Callable[..., tuple[Tensor | None, ...]]
) -> Any:
    """The same autograd rule without torch's wrapper for ops registered in Python.

    That wrapper costs about 100 µs a call; the public function goes through here in eager mode, through the
    registered rule everywhere else (compile, export, vmap, direct calls of the op).
    """

    class EagerFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, op: Any, spec: AttentionSpec, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs, *spec)
            save_for_backward(ctx, (*inputs, *spec), output)
            ctx.set_materialize_grads(False)
            ctx.backward_op = registration.backward_op_of(op)
            return output

        @staticmethod
        def backward(
            ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            arguments = (ctx, ctx.backward_op, grad_output, grad_lse, 2)
            grads: tuple[Tensor | None, ...]
            if torch.is_grad_enabled():  # a graph of the gradients is being built
                grads = gradients(*arguments)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    grads = gradients(*arguments)
            return (None, None, *grads, None)

    return EagerFunction


EagerFunction = eager_function(_save_for_backward, _gradients)


def second_order(
    forward: Callable[..., tuple[Tensor, Tensor]],
    incoming: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    mask: Sequence[bool],
    wanted: Sequence[bool],
    grads_of_grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Differentiate the backward of `forward` by doing it again in plain torch.

    Args:
        forward: inputs -> (output, lse), differentiable to any order.
        incoming: grad_output, grad_lse. inputs: what `forward` takes.
        mask: which inputs' gradients the backward returned. wanted: of which of (*incoming, *inputs) a
            gradient is asked for. grads_of_grads: one for each input.

    Returns:
        The gradients of (*incoming, *inputs), None where not wanted.
    """
    higher = torch.is_grad_enabled()  # the result itself is to be differentiated

    def start(tensor: Tensor | None) -> Any:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        if higher and tensor.requires_grad:
            return tensor.view_as(tensor)
        return tensor.detach().requires_grad_()

    with torch.enable_grad():
        all_starts = [start(t) for t in (*incoming, *inputs)]
        started, leaves = all_starts[: len(incoming)], all_starts[len(incoming) :]
        results = forward(*leaves)
        used = [(r, g) for r, g in zip(results, started, strict=True) if g is not None]
        first = torch.autograd.grad(
            [r for r, _ in used],
            [leaf for leaf, asked in zip(leaves, mask, strict=True) if asked],
            [g for _, g in used],
            create_graph=True,
            materialize_grads=True,
        )
        second = iter(
            torch.autograd.grad(
                first,
                [t for t, asked in zip(all_starts, wanted, strict=True) if asked],
                [g for g, asked in zip(grads_of_grads, mask, strict=True) if asked],
                create_graph=higher,
                allow_unused=True,
            )
        )
        return [next(second) if asked else None for asked in wanted]


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, grad_lse, query, key, value, _, _, *rest = inputs
    ctx.save_for_backward(grad_output, grad_lse, query, key, value, *rest[:4])
    ctx.spec, ctx.mask = AttentionSpec(*rest[4:-1]), rest[-1]


def _double_backward(ctx: Any, *grads_of_grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, grad_lse, query, key, value, bias, alibi_slopes, sinks, rng_state = (
        ctx.saved_tensors
    )
    needs = ctx.needs_input_grad
    if needs[8]:
        raise RuntimeError("alibi_slopes: have no gradient in this backend; detach() them")

    def forward(q: Tensor, k: Tensor, v: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention(q, k, v, b, alibi_slopes, s, rng_state, ctx.spec)

    # output and lse are functions of the inputs: what would flow into them flows on to the inputs.
    dgo, dlse, dq, dk, dv, dbias, dsinks = second_order(
        forward,
        (grad_output, grad_lse),
        (query, key, value, bias, sinks),
        ctx.mask,
        (*needs[:5], needs[7], needs[9]),
        grads_of_grads,
    )
    none_for_spec = (None,) * (len(ctx.spec) + 1)
    return (dgo, dlse, dq, dk, dv, None, None, dbias, None, dsinks, None, *none_for_spec)


_SHARED = ("sinks", "rng_state")  # by all of a batch


def _vmap_of(op: Any, names: tuple[str, ...]) -> Any:
    """Fold the mapped dimension into the batch; where results are summed over the batch, one call a sample."""
    tensors = len(names)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        given, rest = dict(zip(names, args, strict=False)), args[tensors:]
        dims = dict(zip(names, in_dims, strict=False))
        sums = "grad_output" in names and any(rest[-1][3:])
        # Folded, the samples of one dropout seed would get other masks than each of them alone.
        if sums or given["rng_state"] is not None or any(dims[n] is not None for n in _SHARED):
            results = registration.each_sample(op, info.batch_size, in_dims, args)
            return results, (0,) * len(results)
        query, dim = given["query"], dims["query"]
        batch = query.shape[0 if dim is None else int(dim == 0)]
        folded = (_fold(n, t, dims[n], info.batch_size, batch) for n, t in given.items())
        results = tuple(
            r.expand(info.batch_size, 0)
            if r.dim() == 1
            else r.unflatten(0, (info.batch_size, batch))
            for r in op(*folded, *rest)
        )
        return results, (0,) * len(results)

    return rule


def _fold(
    name: str, tensor: Tensor | None, dim: int | None, samples: int, batch: int
) -> Tensor | None:
    """(samples, batch, ...) as (samples * batch, ...); what all samples share stays as it is."""
    if tensor is None or name in _SHARED:
        return tensor
    if dim is None and (name == "alibi_slopes" and tensor.dim() == 1):
        return tensor
    if dim is None and (name == "bias" and tensor.shape[0] == 1):
        return tensor
    spread = tensor.expand(samples, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    if name == "alibi_slopes" and spread.dim() == 2:
        spread = spread[:, None]
    if name in ("alibi_slopes", "bias"):
        spread = spread.expand(samples, batch, *spread.shape[2:])
    return spread.flatten(0, 1)


_FORWARD_TENSORS = ("query", "key", "value", "bias", "alibi_slopes", "sinks", "rng_state")
_BACKWARD_TENSORS = (
    *("grad_output", "grad_lse", "query", "key", "value", "output", "lse"),
    *("bias", "alibi_slopes", "sinks", "rng_state"),
)


RULES = registration.Rules(
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save_for_backward=_save_for_backward,
    backward_of=_backward_of,
    save_for_double_backward=_save_for_double_backward,
    double_backward=_double_backward,
    vmap_forward=lambda op: _vmap_of(op, _FORWARD_TENSORS),
    vmap_backward=lambda op: _vmap_of(op, _BACKWARD_TENSORS),
    autocast_arguments=3,
)


def _triton_forward(*args: Any) -> Any:
    from ..triton_kernels import attention as kernels

    return kernels.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from ..triton_kernels import attention as kernels

    return kernels.backward(*args)


def register() -> None:
    """Register the rules, and Triton's pair of ops. Called once, where _cpu.so brought the schemas."""
    registration.register_pair(_OP, RULES, _triton_forward, _triton_backward)
    torch.library.register_fake("pyops::attention_plain", lambda *args: _fake_forward(*args)[0])
