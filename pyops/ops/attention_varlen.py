"""attention_varlen: attention over sequences packed one after another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import attention_varlen as reference
from ..reference.attention import AttentionSpec
from . import _arguments as arguments
from . import _registration as registration
from . import attention_checks as checks
from ._choice import Plans, settle
from .attention_varlen_rules import EagerFunction

_OP = "attention_varlen"


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyops.attention` for sequences of different lengths, packed without padding.

    Args:
        query: (total_q, heads, head_dim); float32, bfloat16, float16 or float64. Any strides; no copy where
            the last is 1.
        key: (total_k, heads_kv, head_dim); value: (total_k, heads_kv, v_head_dim).
        cu_seqlens_q: (batch + 1,) int32 on query's device: sequence b's queries are rows ``cu_seqlens_q[b]`` to
            ``cu_seqlens_q[b + 1]``. Starts at 0 and never decreases; rows after the last give 0, lse -inf.
        cu_seqlens_k: the same for keys and values.
        max_seqlen_q, max_seqlen_k: length of the longest sequence; None reads it off cu_seqlens (which waits
            for the device).
        alibi_slopes: (heads,) or (batch, heads).

    The other arguments, and what is raised, are those of :func:`pyops.attention`.

    Returns:
        (total_q, heads, v_head_dim); with ``return_lse`` also the log-sum-exp, (heads, total_q). Both differentiable
        in query, key, value and sinks.
    """
    options = (causal, scale, window, softcap, dropout_p, return_lse, deterministic)
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    try:
        facts = arguments.facts(tensors, 5)
    except (AttributeError, RuntimeError):  # not all of them are tensors, or one is nested
        _check_tensors(*tensors)
        raise
    if registration.autocasting(query.device):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (registration.autocast_to(dtype, t) for t in (query, key, value))
        tensors = (query, key, value, *tensors[3:])
        facts = arguments.facts(tensors, 5)
    slopes_grad = alibi_slopes is not None and alibi_slopes.requires_grad
    needs_grad = torch.is_grad_enabled() and (
        (query.requires_grad or key.requires_grad or value.requires_grad or slopes_grad)
        or (sinks is not None and sinks.requires_grad)
    )
    compiling = torch.compiler.is_compiling()
    if compiling:
        plan = _plan(tensors, options, backend, needs_grad)
    else:
        plan = _plans.find(
            (facts, options, backend, needs_grad, slopes_grad),
            options,
            lambda: _plan(tensors, options, backend, needs_grad),
        )
    use, spec = plan
    max_seqlens = (
        _max_seqlen("q", cu_seqlens_q, max_seqlen_q, query.shape[0], use),
        _max_seqlen("k", cu_seqlens_k, max_seqlen_k, key.shape[0], use),
    )
    rng_state = None
    if generator is not None or spec.dropout_p:
        rng_state = checks.draw_rng_state(spec.dropout_p, generator, query.device)
    alibi_slopes, sinks = checks.per_head(alibi_slopes), checks.per_head(sinks)
    use = settle(use, backend)
    cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    if use == "reference":
        output, lse = reference.attention_varlen(
            query, key, value, *cu_seqlens, alibi_slopes, sinks, rng_state, spec
        )
    else:
        packed = map(checks.unit_last, (query, key, value))
        inputs = (*packed, *cu_seqlens, *max_seqlens, alibi_slopes, sinks, rng_state)
        op = checks.operator(_OP, use)
        if compiling or registration.needs_registered_op():
            output, lse = op(*inputs, *spec)
        elif needs_grad:
            output, lse = EagerFunction.apply(op, spec, *inputs)
        else:  # past torch's Python autograd wrapper, which would only find nothing to do
            with torch._C._AutoDispatchBelowAutograd():
                output, lse = op(*inputs, *spec)
    return (output, lse) if return_lse else output


class _Plan(NamedTuple):
    backend: str
    spec: AttentionSpec


_plans = Plans()


def _plan(
    tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str | None, needs_grad: bool
) -> _Plan:
    """Check and normalise everything that does not depend on the tensors' contents."""
    _check_tensors(*tensors)
    query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks = tensors
    checks.check_rank("query", query, ("total_q", "heads", "head_dim"))
    checks.check_rank("key", key, ("total_k", "heads_kv", "head_dim"))
    checks.check_rank("value", value, ("total_k", "heads_kv", "v_head_dim"))
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value: expected key's {key.shape[0]} rows, got {tuple(value.shape)}")
    checks.check_heads(query, key, value, heads=1, key_name="key", value_name="value")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.check_index(name, cu_seqlens, query)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{name}: expected shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}, "
            f"got {tuple(cu_seqlens_k.shape)}"
        )
    heads, batch = query.shape[1], cu_seqlens_q.shape[0] - 1
    checks.check_per_head("alibi_slopes", alibi_slopes, query, heads, batch)
    checks.check_per_head("sinks", sinks, query, heads)
    causal, scale, window, softcap, dropout_p, return_lse, deterministic = options
    checks.is_true_or_false("return_lse", return_lse)
    checks.is_true_or_false("deterministic", deterministic)
    spec = checks.make_spec(query.shape[2], causal, scale, window, softcap, dropout_p)
    involved = (query, key, value, None, alibi_slopes, sinks)
    return _Plan(checks.choose(_OP, involved, spec, backend, needs_grad), spec)


def _check_tensors(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *others: Any
) -> None:
    checks.check_tensors(query=query, key=key, value=value)
    required = (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
    for name, tensor in (*required, *zip(("alibi_slopes", "sinks"), others, strict=True)):
        if not isinstance(tensor, Tensor) and (tensor is not None or "cu" in name):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def _max_seqlen(side: str, cu_seqlens: Tensor, given: Any, total: int, backend: str) -> Any:
    """max_seqlen as given or found; where the values can be read without waiting, they are checked."""
    name = f"max_seqlen_{side}"
    if given is not None and (
        isinstance(given, bool) or not isinstance(given, (int, torch.SymInt))
    ):
        raise TypeError(f"{name}: expected an int or None, got {given!r}")
    if not checks.readable(cu_seqlens) or (
        given is not None and backend != "reference" and cu_seqlens.device.type != "cpu"
    ):
        if given is None:
            raise ValueError(f"{name}: expected an int, as cu_seqlens_{side} cannot be read here")
        return given
    starts = cu_seqlens.tolist()
    lengths = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    if starts[0] != 0 or min(lengths, default=0) < 0 or starts[-1] > total:
        raise ValueError(
            f"cu_seqlens_{side}: expected to start at 0, never to decrease and to end at most at the "
            f"{total} rows there are, got {starts}"
        )
    longest = max(lengths, default=0)
    if given is not None and given < longest:
        raise ValueError(f"{name}: expected at least {longest}, the longest sequence, got {given}")
    return longest if given is None else given
