"""What torch needs to know of attention_varlen: fake, autograd to any order, autocast and vmap rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import attention_varlen as reference
from ..reference.attention import AttentionSpec, compute_dtype
from . import _registration as registration
from .attention_checks import unit_last
from .attention_rules import eager_function, second_order

_OP = "attention_varlen"


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    total, heads = query.shape[:2]
    lse = query.new_empty((heads, total), dtype=compute_dtype(query.dtype))
    return query.new_empty((total, heads, value.shape[2])), lse


def _fake_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    mask = rest[-1]
    sizes = [t.shape if m else (0,) for t, m in zip((query, key, value), mask, strict=False)]
    heads = query.shape[1] if mask[3] else 0
    grad_sinks = query.new_empty((heads,), dtype=torch.float32)
    return (*(query.new_empty(size) for size in sizes), grad_sinks)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_q, cu_k, max_q, max_k, alibi_slopes, sinks, rng_state, *options = inputs
    ctx.save_for_backward(*(query, key, value, *output, cu_q, cu_k), alibi_slopes, sinks, rng_state)
    ctx.max_seqlens, ctx.spec = (max_q, max_k), AttentionSpec(*options)


def _gradients(
    ctx: Any, backward_op: Any, grad_output: Tensor | None, grad_lse: Tensor | None, first: int
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, four without one, alibi_slopes and sinks."""
    needs = ctx.needs_input_grad[first : first + 9]
    mask = [*needs[:3], needs[8]]
    if needs[7]:
        raise RuntimeError("alibi_slopes: have no gradient in this backend; detach() them")
    if (grad_output is None and grad_lse is None) or not any(mask):
        return (None,) * 9
    saved = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(saved[3])
    grads = backward_op(
        unit_last(grad_output), grad_lse, *saved[:7], *ctx.max_seqlens, *saved[7:], *ctx.spec, mask
    )
    dq, dk, dv, dsinks = (grad if asked else None for grad, asked in zip(grads, mask, strict=True))
    return dq, dk, dv, None, None, None, None, None, dsinks


def _backward_of(backward_op: Any) -> Any:
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads = _gradients(ctx, backward_op, grad_output, grad_lse, 0)
        return (*grads, None, *(None,) * len(ctx.spec))

    return backward


EagerFunction = eager_function(_save_for_backward, _gradients)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, grad_lse, query, key, value, _, _, cu_q, cu_k, _, _, *rest = inputs
    ctx.save_for_backward(grad_output, grad_lse, query, key, value, cu_q, cu_k, *rest[:3])
    ctx.spec, ctx.mask = AttentionSpec(*rest[3:-1]), rest[-1]


def _double_backward(ctx: Any, *grads_of_grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, grad_lse, query, key, value, cu_q, cu_k, alibi_slopes, sinks, rng_state = (
        ctx.saved_tensors
    )
    needs = ctx.needs_input_grad

    def forward(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention_varlen(q, k, v, cu_q, cu_k, alibi_slopes, s, rng_state, ctx.spec)

    dgo, dlse, dq, dk, dv, dsinks = second_order(
        forward,
        (grad_output, grad_lse),
        (query, key, value, sinks),
        ctx.mask,
        (*needs[:5], needs[12]),
        grads_of_grads,
    )
    return (dgo, dlse, dq, dk, dv, *(None,) * 7, dsinks, None, *(None,) * (len(ctx.spec) + 1))


def _vmap_of(op: Any) -> Any:
    """One call a sample: packed sequences have no dimension to fold another one into."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
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
    vmap_forward=_vmap_of,
    vmap_backward=_vmap_of,
    autocast_arguments=3,
)


def _triton_forward(*args: Any) -> Any:
    from ..triton_kernels import attention_varlen as kernels

    return kernels.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from ..triton_kernels import attention_varlen as kernels

    return kernels.backward(*args)


def register() -> None:
    """Register the rules, and Triton's pair of ops. Called once, where _cpu.so brought the schemas."""
    registration.register_pair(_OP, RULES, _triton_forward, _triton_backward)
