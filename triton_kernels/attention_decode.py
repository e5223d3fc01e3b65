"""Attention of a few queries against a cache of keys and values: the launchers."""

from dataclasses import replace

import torch
import triton

from . import common
from .attention_call import Call, Options, supports
from .attention_configs import decode_configs
from .attention_decode_kernels import (
    attention_decode_append_kernel,
    attention_decode_combine_kernel,
    attention_decode_kernel,
)
from .attention_tile import Strided
from .common import Config

__all__ = ["decode", "supports"]

MAX_SPLITS = 128


def decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    rotary_interleaved: bool,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, lse) of query (batch, heads, seqlen_q, head_dim) over the cache's keys.

    Caches: (batch, kv_heads, capacity, ...), or with block_table (batch, pages), int32, (pages in
    all, kv_heads, page size, ...). cache_seqlens: int32 (batch,), the keys filled before key and
    value (batch, kv_heads, new, ...) are written behind them, None for the whole capacity.
    cache_leftpad: int32 (batch,), the keys at the start that are not seen. rotary_cos
    and rotary_sin (positions, rotated / 2) turn new keys and queries. num_splits 0 chooses by the
    shapes; splits are joined in their order, so a number gives the same bits every time.
    """
    options = Options(scale, softcap, window_left, window_right, False, 0.0)
    call = Call(query, key_cache, value_cache, options, None, None, alibi_slopes, sinks, None)
    page = key_cache.size(2) if block_table is not None else 0
    capacity = block_table.size(1) * page if block_table is not None else key_cache.size(2)
    output = call.like(query, value_cache.size(-1))
    lse = query.new_empty(call.lse_shape, dtype=torch.float32)
    table = query if block_table is None else block_table
    cache = {
        "cache_seqlens": query if cache_seqlens is None else cache_seqlens,
        "block_table": table,
        "table_row": table.stride(0),
        "capacity": capacity,
        "HAS_SEQLENS": cache_seqlens is not None,
        "PAGE": page,
    }
    with common.device_guard(query):
        rotary = (rotary_cos, rotary_sin, rotary_interleaved)
        if key is not None:
            _append(call, key, key_cache, cache, rotary, 1)
            _append(call, value, value_cache, cache, None, 1)
        if output.numel() == 0:
            return output, lse
        if rotary_cos is not None:
            rotated = torch.empty_like(query, memory_format=torch.contiguous_format)
            # Without a diagonal all queries stand at the first new position.
            step = int(window_left >= 0 or window_right >= 0)
            _append(call, query, rotated, cache, rotary, step, into_cache=False)
            call = replace(call, query=rotated)
        appended = 0 if key is None else key.size(2)
        _attend(call, cache, cache_leftpad, appended, num_splits, output, lse)
    return output, lse


def _append(call, source, destination, cache, rotary, step, into_cache=True) -> None:
    if source.numel() == 0:
        return
    source = source if source.stride(-1) == 1 else source.contiguous()
    batch, heads, seqlen, width = source.shape
    cos, sin, interleaved = rotary if rotary and rotary[0] is not None else (None, None, False)
    any_pointer = call.query
    block_t = common.power_of_2(seqlen, 1, 16)
    blocks = triton.cdiv(seqlen, block_t)

    def bind(config: Config):
        arguments = cache | {
            "source": call.strided(source),
            "destination": call.strided(destination),
            "cos": any_pointer if cos is None else cos,
            "sin": any_pointer if sin is None else sin,
            "cos_row": 0 if cos is None else cos.stride(0),
            "sin_row": 0 if sin is None else sin.stride(0),
            "heads": heads,
            "seqlen": seqlen,
            "blocks": blocks,
            "step": step,
            "WIDTH": width,
            "HALF": 0 if cos is None else cos.size(1),
            "INTERLEAVED": interleaved,
            "INTO_CACHE": into_cache,
            "BLOCK_D": common.power_of_2(width, 16, 256),
        }
        return (blocks * heads * batch,), arguments

    config = Config({"BLOCK_T": block_t}, num_warps=4 if block_t > 4 else 1, num_stages=1)
    common.launch(attention_decode_append_kernel, [config], (), bind)


def _attend(call, cache, cache_leftpad, appended, num_splits, output, lse) -> None:
    query, options = call.query, call.options
    flags = call.flags()._replace(
        LOADS="pointers",
        FOLDED=options.scale > 0 and options.softcap <= 0 and call.alibi_slopes is None,
    )
    rows = flags.GROUP * call.seqlen_q
    (config,) = decode_configs(flags, query.dtype, rows)
    blocks = triton.cdiv(rows, config["BLOCK_M"])
    programs = blocks * call.kv_heads * call.batch
    splits = num_splits or choose_splits(
        programs, triton.cdiv(cache["capacity"], config["BLOCK_N"]), common.multiprocessors(query)
    )
    splits = min(splits, MAX_SPLITS)
    partial, partial_lse = output, lse
    if splits > 1:
        shape = (*call.query.shape[:3], output.size(-1))
        partial = query.new_empty((splits, *shape), dtype=torch.float32)
        partial_lse = query.new_empty((splits, *shape[:3]), dtype=torch.float32)
    first = partial[0] if splits > 1 else output

    def bind(config: Config):
        arguments = cache | {
            "query": call.strided(query),
            "key_cache": call.strided(call.key),
            "value_cache": call.strided(call.value),
            "output": Strided(partial, *first.stride()[:3]),
            "output_split": first.numel() if splits > 1 else 0,
            "lse": partial_lse,
            "lse_split": lse.numel(),
            "cache_leftpad": cache_leftpad,
            "appended": appended,
            "splits": splits,
            "sizes": call.sizes(blocks),
            "terms": call.terms(capacity=cache["capacity"]),
            "F": flags,
        }
        return (programs * splits,), arguments

    common.launch(attention_decode_kernel, [config], (), bind)
    if splits > 1:
        _combine(call, partial, partial_lse, output, lse, splits, flags)


def choose_splits(programs: int, key_blocks: int, multiprocessors: int) -> int:
    """Splits that give each multiprocessor two programs, of four blocks of keys or more."""
    wanted = triton.cdiv(2 * multiprocessors, programs)
    return max(1, min(wanted, triton.cdiv(key_blocks, 4), MAX_SPLITS))


def _combine(call, partial, partial_lse, output, lse, splits, flags) -> None:
    def bind(config: Config):
        arguments = {
            "partial": partial,
            "partial_lse": partial_lse,
            "output": call.strided(output),
            "lse": lse,
            "rows": lse.numel(),
            "splits": splits,
            "heads": call.heads,
            "seqlen_q": call.seqlen_q,
            "DV": flags.DV,
            "SPLITS": triton.next_power_of_2(splits),
            "BLOCK_DV": flags.BLOCK_DV,
        }
        return (lse.numel(),), arguments

    config = Config({"CHUNK": 8}, num_warps=4 if flags.BLOCK_DV > 64 else 1, num_stages=1)
    common.launch(attention_decode_combine_kernel, [config], (), bind)
