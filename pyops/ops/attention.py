"""attention: softmax(scale * query @ key^T + ...) @ value in memory linear in the sequence length.

The public function checks its arguments, takes a backend and calls that backend's op. The fake, autograd,
autocast and vmap rules, the same for all backends, are in attention_rules.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..reference import attention as reference
from ..reference.attention import AttentionSpec
from . import _arguments as arguments
from . import _registration as registration
from . import attention_checks as checks
from ._choice import Plans, settle
from .attention_rules import EagerFunction

_OP = "attention"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
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
    """Scaled dot-product attention with everything that is added to its scores, in one pass.

    Row i's diagonal is key ``i + seqlen_k - seqlen_q``: the last query sees the last key. The score of query i and key
    j is ``scale * query_i . key_j``, then capped, then lowered by ALiBi, then the bias is added. A row with
    nothing to attend to gives 0, lse -inf (its sink, if there are sinks) and gradients 0.

    Args:
        query: (batch, heads, seqlen_q, head_dim); float32, bfloat16, float16 or float64. Any strides; no
            copy where the last is 1.
        key: (batch, heads_kv, seqlen_k, head_dim), dtype and device of ``query``; heads_kv divides
            heads, and query head h uses key/value head ``h // (heads // heads_kv)``.
        value: (batch, heads_kv, seqlen_k, v_head_dim).
        causal: no key after the diagonal.
        scale: factor of the scores; None means ``head_dim ** -0.5``.
        bias: broadcastable to (batch, heads, seqlen_q, seqlen_k): added to the scores (query's dtype or float32),
            or bool, True where query and key may meet.
        alibi_slopes: (heads,) or (batch, heads), float32 or query's dtype: slope times the distance from the
            diagonal is taken off the scores.
        window: (left, right): at most so many keys before and after the diagonal; None is unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 leaves them.
        sinks: (heads,), float32 or query's dtype: one more logit a row, with no value.
        dropout_p: probability in [0, 1) with which a weight is dropped, the others scaled by ``1 / (1 - dropout_p)``.
        generator: where the seed of the dropout mask is drawn; None is torch's default for the device.
        return_lse: return (output, lse).
        deterministic: accepted for other interfaces' sake; results never depend on anything but the inputs.
        backend: None takes the fastest one proven for these arguments on this device and falls back
            to ``"reference"``; ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` never fall back.

    Returns:
        (batch, heads, seqlen_q, v_head_dim) in ``query``'s dtype, in memory as (batch, seqlen_q, heads, v_head_dim) if
        ``query`` lies so; with ``return_lse`` also the natural log of each row's sum of exponentials before
        dropout, (batch, heads, seqlen_q), float32 (float64 for float64). Both differentiable to any order in
        query, key, value, bias and sinks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: an explicit ``backend`` does not exist here or does not take these arguments.

    Source: Dao, "FlashAttention-2", 2023; Press et al., "Train Short, Test Long", 2021 (ALiBi); Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011 (the dropout mask, drawn anew in backward).
    """
    if (
        bias is alibi_slopes is window is sinks is generator is None
        and type(softcap) is type(dropout_p) is float
        and softcap == dropout_p == 0
        and return_lse is False
        and deterministic is True
        and (backend is None or backend == "cpu")
    ):
        plain = plain_attention(query, key, value, causal, scale, False)
        if plain is not None:
            return plain
    options = (causal, scale, window, softcap, dropout_p, return_lse, deterministic)
    output, lse = _attention(
        (query, key, value, bias, alibi_slopes, sinks), options, generator, backend
    )
    return (output, lse) if return_lse else output


def plain_attention(
    query: Any, key: Any, value: Any, causal: Any, scale: Any, top_left: bool
) -> Tensor | None:
    """The output of a call without options, gradients or lse by the C++ kernel, or None where it is another call.

    A small problem takes as long as its call does, so only what the kernel itself cannot see is asked here. What
    its own checks refuse is called again the long way, whose errors name the argument. With `top_left`, torch's
    diagonal, all have the same heads, as torch expects by default.
    """
    if (
        torch.compiler.is_compiling()
        or not (causal is True or causal is False)
        or not (scale is None or type(scale) is float)
        or not registration.only_values_matter(query, key, value)
        or query.dtype not in checks.KERNEL_DTYPES
        or not backends.schemas_loaded()
    ):
        return None
    try:
        if top_left and (
            query.dim() != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]
        ):
            return None
        return torch.ops.pyops.attention_plain.default(query, key, value, scale, causal, top_left)
    except RuntimeError:
        return None


def top_left_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, lse) with torch's diagonal, which starts at the first key instead of ending at the last."""
    options = (causal, scale, None, 0.0, dropout_p, True, True, True)
    return _attention((query, key, value, bias, None, None), options, None, backend)


def _attention(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    generator: Any,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    try:
        facts = arguments.facts(tensors, 3)
    except (AttributeError, RuntimeError):  # not all of them are tensors, or one is nested
        _check_tensors(*tensors)
        raise
    query, key, value, bias, alibi_slopes, sinks = tensors
    if registration.autocasting(query.device):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (registration.autocast_to(dtype, t) for t in (query, key, value))
        if bias is not None and bias.dtype != torch.float32:
            bias = registration.autocast_to(dtype, bias)
        tensors = (query, key, value, bias, alibi_slopes, sinks)
        facts = arguments.facts(tensors, 3)
    wanted = (
        *(query.requires_grad, key.requires_grad, value.requires_grad),
        bias is not None and bias.requires_grad,
        alibi_slopes is not None and alibi_slopes.requires_grad,
        sinks is not None and sinks.requires_grad,
    )
    needs_grad = torch.is_grad_enabled() and any(wanted)
    compiling = torch.compiler.is_compiling()
    if compiling:
        plan = _plan(tensors, options, backend, needs_grad)
    else:
        plan = _plans.find(
            (facts, options, backend, needs_grad, wanted[4]),
            options,
            lambda: _plan(tensors, options, backend, needs_grad),
        )
    use, spec = plan
    rng_state = None
    if generator is not None or spec.dropout_p:
        rng_state = checks.draw_rng_state(spec.dropout_p, generator, query.device)
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    alibi_slopes, sinks = checks.per_head(alibi_slopes), checks.per_head(sinks)
    use = settle(use, backend)
    if use == "reference":
        return reference.attention(query, key, value, bias, alibi_slopes, sinks, rng_state, spec)
    query, key, value = checks.unit_last(query), checks.unit_last(key), checks.unit_last(value)
    inputs = (query, key, value, bias, alibi_slopes, sinks, rng_state)
    op = checks.operator(_OP, use)
    if compiling or registration.needs_registered_op():
        return op(*inputs, *spec)
    if needs_grad:
        return EagerFunction.apply(op, spec, *inputs)
    # past torch's Python autograd wrapper, which would only find nothing to do
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs, *spec)


class _Plan(NamedTuple):
    backend: str
    spec: AttentionSpec


_plans = Plans()


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    backend: str | None,
    needs_grad: bool,
) -> _Plan:
    """Check and normalise everything that does not depend on the tensors' contents."""
    _check_tensors(*tensors)
    query, key, value, bias, alibi_slopes, sinks = tensors
    checks.check_rank("query", query, ("batch", "heads", "seqlen_q", "head_dim"))
    checks.check_rank("key", key, ("batch", "heads_kv", "seqlen_k", "head_dim"))
    checks.check_rank("value", value, ("batch", "heads_kv", "seqlen_k", "v_head_dim"))
    batch, heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            raise ValueError(
                f"{name}: expected query's batch size {batch}, got {tuple(tensor.shape)}"
            )
    if value.shape[2] != seqlen_k:
        raise ValueError(f"value: expected key's seqlen {seqlen_k}, got {tuple(value.shape)}")
    checks.check_heads(query, key, value, heads=1, key_name="key", value_name="value")
    if bias is not None:
        _check_bias(bias, query, (batch, heads, seqlen_q, seqlen_k))
    checks.check_per_head("alibi_slopes", alibi_slopes, query, heads, batch)
    checks.check_per_head("sinks", sinks, query, heads)
    causal, scale, window, softcap, dropout_p, return_lse, deterministic, *top_left = options
    checks.is_true_or_false("return_lse", return_lse)
    checks.is_true_or_false("deterministic", deterministic)
    spec = checks.make_spec(head_dim, causal, scale, window, softcap, dropout_p, bool(top_left))
    return _Plan(checks.choose(_OP, tensors, spec, backend, needs_grad), spec)


def _check_tensors(
    query: Any, key: Any, value: Any, bias: Any, alibi_slopes: Any, sinks: Any
) -> None:
    checks.check_tensors(query=query, key=key, value=value)
    for name, tensor in (("bias", bias), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(tensor).__name__}")


def _check_bias(bias: Tensor, query: Tensor, full: tuple[int, int, int, int]) -> None:
    if bias.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"bias: expected dtype bool, float32 or query's {query.dtype}, got {bias.dtype}"
        )
    if bias.device != query.device:
        raise ValueError(f"bias: expected query's device {query.device}, got {bias.device}")
    if bias.layout != torch.strided:
        raise TypeError(f"bias: expected a strided (dense) tensor, got layout {bias.layout}")
    fits = bias.dim() <= 4 and all(
        size == 1 or size == whole
        for size, whole in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias: expected a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = {full}, "
            f"got {tuple(bias.shape)}"
        )


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over several sets of keys from attention over each of them.

    Args:
        outs: outputs, each (..., v_head_dim), all of one shape and dtype; a sequence, or stacked in one tensor.
        lses: their log-sum-exps, each (...), natural log.

    Returns:
        (output in ``outs``'s dtype, lse in ``lses``'s). Differentiable in both. Rows that no part attends to
        give 0 and -inf.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"lses: expected one for each of outs and at least one, got {len(lses)} for {len(outs)}"
        )
    for name, parts in (("outs", outs), ("lses", lses)):
        for part in parts:
            arguments.floating_tensor(name, part)
            if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
                raise ValueError(
                    f"{name}: expected one shape and dtype, got {tuple(parts[0].shape)} {parts[0].dtype} "
                    f"and {tuple(part.shape)} {part.dtype}"
                )
    if outs[0].shape[:-1] != lses[0].shape:
        raise ValueError(
            f"lses: expected shape {tuple(outs[0].shape[:-1])}, got {tuple(lses[0].shape)}"
        )
    weights, lse = reference.softmax_with_lse(torch.stack(tuple(lses), -1))
    weighted = torch.stack(tuple(outs)).to(weights.dtype) * weights.movedim(-1, 0)[..., None]
    return weighted.sum(0).to(outs[0].dtype), lse
