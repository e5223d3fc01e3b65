"""attention_decode: few queries against a key/value cache, contiguous or paged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import attention_decode as reference
from ..reference.attention import AttentionSpec, compute_dtype, lies_heads_inside
from . import _arguments as arguments
from . import _registration as registration
from . import attention_checks as checks
from ._choice import Plans

_OP = "attention_decode"


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = False,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append to a key/value cache, rotate, and attend to all that is in it.

    Sequence b attends to its first ``cache_seqlens[b] + seqlen_new`` keys, less those before ``cache_leftpad[b]``;
    the last query's diagonal is the last of them. There is no gradient.

    Args:
        query: (batch, heads, seqlen_q, head_dim); float32, bfloat16, float16 or float64.
        key_cache: (batch, heads_kv, capacity, head_dim), or with ``block_table`` (blocks, heads_kv, block_size,
            head_dim); written to where ``key`` is given.
        value_cache: the same with v_head_dim.
        key: (batch, heads_kv, seqlen_new, head_dim) or None: written to positions ``cache_seqlens[b]`` onwards.
        value: (batch, heads_kv, seqlen_new, v_head_dim), None where ``key`` is.
        cache_seqlens: (batch,) int32 or an int: how much of the cache was filled before this call; None means
            all of it, and then nothing can be appended.
        cache_leftpad: (batch,) int32: positions before it hold nothing and are not seen; None means 0.
        block_table: (batch, max_blocks) int32: the blocks of each sequence in order; entries after the last
            that is needed are not looked at.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2): query and key are rotated by their positions before
            they meet. With ``causal`` or ``window`` query t stands at ``cache_seqlens[b] + t``, else all stand
            at ``cache_seqlens[b]``.
        rotary_interleaved: rotate dimensions (0, 1), (2, 3), ... instead of (0, rotary_dim / 2), ...
        num_splits: among how many parts of the keys the work is split; 0 chooses. Results of different numbers
            differ by rounding only.

    The other arguments are those of :func:`pyops.attention`.

    Returns:
        (batch, heads, seqlen_q, v_head_dim) in the layout of ``query``; with ``return_lse`` also the log-sum-exp,
        (batch, heads, seqlen_q).

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what was expected and what came; nothing
            has been written then. On a GPU the values of ``cache_seqlens``, ``cache_leftpad`` and
            ``block_table`` are not checked.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient Memory Management for
    Large Language Model Serving with PagedAttention", 2023.
    """
    if isinstance(cache_seqlens, int) and isinstance(query, Tensor) and query.dim() == 4:
        cache_seqlens = torch.full(
            (query.shape[0],), cache_seqlens, dtype=torch.int32, device=query.device
        )
    tensors: tuple[Any, ...] = (
        *(query, key_cache, value_cache, key, value, cache_seqlens, cache_leftpad, block_table),
        *(rotary_cos, rotary_sin, alibi_slopes, sinks),
    )
    options = (rotary_interleaved, causal, scale, window, softcap, num_splits, return_lse)
    try:
        facts = arguments.facts(tensors, 3)
    except (AttributeError, RuntimeError):  # not all of them are tensors, or one is nested
        _check_tensors(*tensors)
        raise
    if registration.autocasting(query.device):
        # The caches are what they are: what meets them takes their dtype.
        for i in (0, 3, 4):
            if tensors[i] is not None:
                tensors = (*tensors[:i], tensors[i].to(key_cache.dtype), *tensors[i + 1 :])
        facts = arguments.facts(tensors, 3)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("query: attention_decode has no gradient; call it under torch.no_grad()")
    if torch.compiler.is_compiling():
        plan = _plan(tensors, options, backend)
    else:
        plan = _plans.find(
            (facts, options, backend), options, lambda: _plan(tensors, options, backend)
        )
    use, spec = plan
    query, _, _, key, value, *indices_and_tables = tensors[:10]
    inputs: tuple[Any, ...] = (
        *(checks.unit_last(query), key_cache, value_cache),
        *(None if t is None else checks.unit_last(t) for t in (key, value)),
        *(None if t is None else t.contiguous() for t in indices_and_tables),
        rotary_interleaved,
        *(checks.per_head(alibi_slopes), checks.per_head(sinks)),
    )
    if use == "reference":
        _check_values(spec, *inputs[:9])
        output, lse = reference.attention_decode(*(*inputs, spec))
    else:
        windows = (spec.window_left, spec.window_right)
        op = checks.operator(_OP, use)
        output, lse = op(*inputs, spec.scale, spec.softcap, *windows, num_splits)
    return (output, lse) if return_lse else output


class _Plan(NamedTuple):
    backend: str
    spec: AttentionSpec


_plans = Plans()


def _plan(tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str | None) -> _Plan:
    """Check and normalise everything that does not depend on the tensors' contents."""
    _check_tensors(*tensors)
    (query, key_cache, value_cache, key, value, cache_seqlens, cache_leftpad) = tensors[:7]
    block_table, rotary_cos, rotary_sin, alibi_slopes, sinks = tensors[7:]
    first = "batch" if block_table is None else "blocks"
    third = "capacity" if block_table is None else "block_size"
    checks.check_rank("query", query, ("batch", "heads", "seqlen_q", "head_dim"))
    checks.check_rank("key_cache", key_cache, (first, "heads_kv", third, "head_dim"))
    checks.check_rank("value_cache", value_cache, (first, "heads_kv", third, "v_head_dim"))
    batch, heads, _, head_dim = query.shape
    if block_table is None and key_cache.shape[0] != batch:
        raise ValueError(
            f"key_cache: expected query's batch size {batch}, got {tuple(key_cache.shape)}"
        )
    for size in (0, 2):
        if value_cache.shape[size] != key_cache.shape[size]:
            raise ValueError(
                f"value_cache: expected key_cache's {first} and {third}, {tuple(key_cache.shape)}, "
                f"got {tuple(value_cache.shape)}"
            )
    checks.check_heads(
        query, key_cache, value_cache, heads=1, key_name="key_cache", value_name="value_cache"
    )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:  # a copy could not be written to
            raise ValueError(f"{name}: expected a last stride of 1, got strides {cache.stride()}")
    _check_new(query, key_cache, value_cache, key, value, cache_seqlens)
    for name, index in (("cache_seqlens", cache_seqlens), ("cache_leftpad", cache_leftpad)):
        if index is not None:
            checks.check_index(name, index, query)
            if tuple(index.shape) != (batch,):
                raise ValueError(f"{name}: expected shape ({batch},), got {tuple(index.shape)}")
    if block_table is not None:
        checks.check_index("block_table", block_table, query)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"block_table: expected shape ({batch}, max_blocks), got {tuple(block_table.shape)}"
            )
    _check_rotary(query, rotary_cos, rotary_sin, cache_seqlens)
    checks.check_per_head("alibi_slopes", alibi_slopes, query, heads, batch)
    checks.check_per_head("sinks", sinks, query, heads)
    rotary_interleaved, causal, scale, window, softcap, num_splits, return_lse = options
    checks.is_true_or_false("rotary_interleaved", rotary_interleaved)
    checks.is_true_or_false("return_lse", return_lse)
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits: expected an int, got {num_splits!r}")
    if num_splits < 0:
        raise ValueError(f"num_splits: expected 0 (automatic) or more, got {num_splits}")
    spec = checks.make_spec(head_dim, causal, scale, window, softcap, 0.0)
    involved = (query, key_cache, value_cache, None, alibi_slopes, sinks)
    return _Plan(checks.choose(_OP, involved, spec, backend, False), spec)


_NAMES = (
    *("query", "key_cache", "value_cache", "key", "value", "cache_seqlens", "cache_leftpad"),
    *("block_table", "rotary_cos", "rotary_sin", "alibi_slopes", "sinks"),
)


def _check_tensors(*tensors: Any) -> None:
    given = dict(zip(_NAMES, tensors, strict=True))
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in _NAMES[:3]):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    same = ("query", "key_cache", "value_cache", "key", "value")
    checks.check_tensors(**{n: given[n] for n in same if given[n] is not None})


def _check_new(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache_seqlens: Tensor | None,
) -> None:
    if key is None or value is None:
        if key is not value:
            missing, there = ("key", "value") if key is None else ("value", "key")
            raise ValueError(f"{missing}: expected a tensor where {there} is given, got None")
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected where the new key is to go, got None")
    seqlen_new = key.shape[2] if key.dim() == 4 else 0
    for name, new, cache in (("key", key, key_cache), ("value", value, value_cache)):
        expected = (query.shape[0], cache.shape[1], seqlen_new, cache.shape[3])
        if tuple(new.shape) != expected:
            raise ValueError(
                f"{name}: expected (batch, heads_kv, seqlen_new, head_dim) of the cache, {expected}, "
                f"got {tuple(new.shape)}"
            )


def _check_rotary(
    query: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
) -> None:
    if rotary_cos is None or rotary_sin is None:
        if rotary_cos is not rotary_sin:
            missing, there = (
                ("rotary_cos", "rotary_sin") if rotary_cos is None else ("rotary_sin", "rotary_cos")
            )
            raise ValueError(f"{missing}: expected a tensor where {there} is given, got None")
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected the positions to rotate by, got None")
    for name, table in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        arguments.floating_tensor(name, table)
        if table.dtype not in (torch.float32, query.dtype):
            raise TypeError(
                f"{name}: expected dtype float32 or query's {query.dtype}, got {table.dtype}"
            )
        if table.device != query.device:
            raise ValueError(f"{name}: expected query's device {query.device}, got {table.device}")
        fits = table.dim() == 2 and 1 <= table.shape[1] <= query.shape[3] // 2
        if not fits or table.shape != rotary_cos.shape:
            raise ValueError(
                f"{name}: expected (positions, rotary_dim / 2) with at most {query.shape[3] // 2} columns, "
                f"the same for both, got {tuple(table.shape)}"
            )
    if rotary_cos.dtype != rotary_sin.dtype:
        raise TypeError(
            f"rotary_sin: expected rotary_cos's dtype {rotary_cos.dtype}, got {rotary_sin.dtype}"
        )


def _check_values(
    spec: AttentionSpec,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
) -> None:
    """What the reference would trip over half-way; the native kernels have the same checks in C++."""
    block_size = key_cache.shape[2]
    capacity = block_size if block_table is None else block_table.shape[1] * block_size
    appended = 0 if key is None else key.shape[2]
    filled = [capacity] * query.shape[0] if cache_seqlens is None else cache_seqlens.tolist()
    leftpad = [0] * query.shape[0] if cache_leftpad is None else cache_leftpad.tolist()
    # Without a diagonal all queries stand at the first new position.
    apart = query.shape[2] if spec.window_left >= 0 or spec.window_right >= 0 else 1
    whose = "cache's" if block_table is None else "block_table's"
    for b, length in enumerate(filled):
        if length < 0 or length + appended > capacity:
            raise ValueError(
                f"cache_seqlens: expected at least 0 and room for {appended} more within the {whose} "
                f"{capacity}, got {length} for sequence {b}"
            )
        if not 0 <= leftpad[b] <= length + appended:
            raise ValueError(
                f"cache_leftpad: expected from 0 to the sequence's {length + appended} keys, got "
                f"{leftpad[b]} for sequence {b}"
            )
        if rotary_cos is not None:
            last = length + max(appended, apart)
            if last > rotary_cos.shape[0]:
                raise ValueError(
                    f"rotary_cos: expected at least {last} positions, got {rotary_cos.shape[0]}"
                )
        if block_table is not None:
            needed = block_table[b, : -(-(length + appended) // block_size)]
            if needed.numel() and not 0 <= int(needed.min()) <= int(needed.max()) < len(key_cache):
                raise ValueError(
                    f"block_table: expected blocks from 0 to {len(key_cache) - 1}, got {needed.tolist()} "
                    f"for sequence {b}"
                )


def _fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, seqlen_q = query.shape[:3]
    d = value_cache.shape[3]
    lse = query.new_empty((batch, heads, seqlen_q), dtype=compute_dtype(query.dtype))
    if lies_heads_inside(query):
        return query.new_empty((batch, seqlen_q, heads, d)).transpose(1, 2), lse
    return query.new_empty((batch, heads, seqlen_q, d)), lse


def _triton_decode(*args: Any) -> Any:
    from ..triton_kernels import attention_decode as kernels

    return kernels.decode(*args)


def register() -> None:
    """Register the fake rule, and Triton's op. Called once, where _cpu.so brought the schemas."""
    registration.define_like(f"{_OP}_triton", _OP, _triton_decode)
    for op in (_OP, f"{_OP}_triton"):
        torch.library.register_fake(f"pyops::{op}", _fake)
