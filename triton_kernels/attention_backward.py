"""Attention's backward pass: the launchers."""

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import common
from .attention_backward_bias_kernel import attention_backward_bias_kernel
from .attention_backward_kernels import (
    attention_backward_key_kernel,
    attention_backward_query_kernel,
    attention_backward_rows_kernel,
)
from .attention_call import (
    LOG2E,
    ROW_PADDING,
    Call,
    set_allocator,
    takes_boxes,
    unit_stride,
)
from .attention_configs import bias_configs, key_configs, query_configs
from .attention_tile import Flags
from .common import Config


def run_backward(
    call: Call,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    mask: tuple[bool, bool, bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value, bias = call.query, call.key, call.value, call.bias
    empty = query.new_empty(0)
    grads = [
        call.like(tensor, tensor.size(-1)) if wanted else empty
        for tensor, wanted in zip((query, key, value), mask[:3], strict=True)
    ]
    grad_bias, grad_sinks = empty, query.new_empty(0, dtype=torch.float32)
    reduced = [] if bias is None else [size == 1 for size in bias.shape]
    if mask[3]:
        grad_bias = bias.new_empty(bias.shape)
    nothing = query.numel() == 0 or key.numel() == 0 or call.seqlen_q == 0 or call.seqlen_k == 0
    # Rows of no sequence.
    for grad in (*grads, grad_bias):
        if nothing or call.packed:
            grad.zero_()
    if query.numel() == 0 or call.seqlen_q == 0 or call.batch == 0:
        if mask[4]:
            grad_sinks = torch.zeros_like(call.sinks)
        return (*grads, grad_bias, grad_sinks)

    grad_output = unit_stride(grad_output)
    if takes_boxes(query) and not takes_boxes(grad_output):
        grad_output = grad_output.contiguous()
    flags = call.flags(grad_output)
    with common.device_guard(query):
        set_allocator(flags)
        lse2, delta = _rows(call, flags, grad_output, grad_lse, output, lse)
        shared = {
            "query": call.strided(query),
            "key": call.strided(key),
            "value": call.strided(value),
            "grad_output": call.strided(grad_output),
            "lse2": lse2,
            "delta": delta,
            "terms": call.terms(),
            "F": flags,
        }
        if not nothing and (mask[1] or mask[2]):
            _key(call, flags, shared, grad_output, grads)
        if not nothing and mask[0]:
            _query(call, flags, shared, grad_output, grads[0])
        if not nothing and mask[3]:
            _bias(call, flags, shared, grad_output, grad_bias, reduced)
        if mask[4]:
            # A sink is a key whose value is zero.
            weights = torch.exp2(call.sinks[:, None] * LOG2E - lse2)
            grad_sinks = -(weights * delta).sum(-1)
            if not call.packed:
                grad_sinks = grad_sinks.sum(0)
    return (*grads, grad_bias, grad_sinks)


def _rows(call, flags, grad_output, grad_lse, output, lse) -> tuple[torch.Tensor, torch.Tensor]:
    """log2(e) * lse and delta, padded so that blocks of rows need no mask."""
    shape = (call.heads, call.padded_rows)
    shape = shape if call.packed else (call.batch, *shape)
    lse2 = call.query.new_empty(shape, dtype=torch.float32)
    delta = torch.empty_like(lse2)
    if call.packed:
        # Between sequences lie rows that are nobody's.
        lse2.fill_(float("inf"))
        delta.zero_()

    def bind(config: Config):
        blocks = triton.cdiv(call.seqlen_q, ROW_PADDING) * ROW_PADDING // config["BLOCK_M"]
        arguments = {
            "grad_output": call.strided(grad_output),
            "output": call.strided(output),
            "lse": lse,
            "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
            "lse2": lse2,
            "delta": delta,
            "sizes": call.sizes(blocks),
            "terms": call.terms(),
            "F": flags,
        }
        return (blocks * call.heads * call.batch,), arguments

    wide = 32 if grad_output.itemsize == 2 else 16
    block = 64 if flags.BLOCK_DV <= 128 else wide
    configs = [Config({"BLOCK_M": block}, num_warps=4, num_stages=1)]
    common.launch(attention_backward_rows_kernel, configs, (flags,), bind)
    return lse2, delta


def _descriptors(call, flags, grad_output, config: Config) -> dict:
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    return {
        "query_rows": call.descriptor(call.query, block_m, flags.BLOCK_D, flags),
        "key_rows": call.descriptor(call.key, block_n, flags.BLOCK_D, flags),
        "value_rows": call.descriptor(call.value, block_n, flags.BLOCK_DV, flags),
        "grad_rows": call.descriptor(grad_output, block_m, flags.BLOCK_DV, flags),
    }


def _padded_descriptor(rows: torch.Tensor, block: int, flags: Flags):
    if flags.LOADS != "host":
        return None
    rows = rows.flatten(0, 1)
    return TensorDescriptor(rows, list(rows.shape), [rows.size(1), 1], [1, block])


def _key(call, flags, shared, grad_output, grads) -> None:
    # The kernel makes both; one that is not asked for goes nowhere.
    grad_key, grad_value = (
        grad if grad.numel() else call.like(tensor, tensor.size(-1))
        for grad, tensor in zip(grads[1:], (call.key, call.value), strict=True)
    )

    def bind(config: Config):
        blocks = triton.cdiv(call.seqlen_k, config["BLOCK_N"])
        arguments = shared | _descriptors(call, flags, grad_output, config)
        arguments |= {
            "lse2_rows": _padded_descriptor(shared["lse2"], config["BLOCK_M"], flags),
            "delta_rows": _padded_descriptor(shared["delta"], config["BLOCK_M"], flags),
            "grad_key": call.strided(grad_key),
            "grad_value": call.strided(grad_value),
            "sizes": call.sizes(blocks),
        }
        return (blocks * call.kv_heads * call.batch,), arguments

    configs = key_configs(flags, call.query.dtype)
    common.launch(attention_backward_key_kernel, configs, (call.query.dtype, flags), bind)


def _query(call, flags, shared, grad_output, grad_query) -> None:
    def bind(config: Config):
        blocks = triton.cdiv(call.seqlen_q, config["BLOCK_M"])
        arguments = shared | _descriptors(call, flags, grad_output, config)
        arguments |= {
            "grad_query": call.strided(grad_query),
            "sizes": call.sizes(blocks),
            "TAIL": call.packed is not None or call.seqlen_k % config["BLOCK_N"] != 0,
        }
        return (blocks * call.heads * call.batch,), arguments

    configs = query_configs(flags, call.query.dtype)
    common.launch(attention_backward_query_kernel, configs, (call.query.dtype, flags), bind)


def _bias(call, flags, shared, grad_output, grad_bias, reduced) -> None:
    (config,) = bias_configs(flags, call.query.dtype)
    blocks = (
        call.batch,
        call.heads,
        triton.cdiv(call.seqlen_q, config["BLOCK_M"]),
        triton.cdiv(call.seqlen_k, config["BLOCK_N"]),
    )
    tiles = math.prod(1 if sums else count for sums, count in zip(reduced, blocks, strict=True))
    terms = math.prod(count if sums else 1 for sums, count in zip(reduced, blocks, strict=True))
    # A few programs a multiprocessor, in parts of four tiles or more.
    wanted = triton.cdiv(4 * common.multiprocessors(call.query), tiles)
    per_part = max(triton.cdiv(terms, wanted), min(terms, 4))
    parts = triton.cdiv(terms, per_part)
    dtype = torch.float32 if parts > 1 else grad_bias.dtype
    partial = grad_bias.new_empty((parts, *grad_bias.shape), dtype=dtype)
    names = ("SUM_BATCH", "SUM_HEAD", "SUM_ROW", "SUM_COLUMN")

    def bind(config: Config):
        arguments = shared | _descriptors(call, flags, grad_output, config)
        arguments |= {
            "grad_bias": partial,
            "sizes": call.sizes(0),
            "batches": call.batch,
            "tiles": per_part,
            **dict(zip(names, reduced, strict=True)),
        }
        return (tiles * parts,), arguments

    common.launch(attention_backward_bias_kernel, [config], (flags,), bind)
    grad_bias.copy_(partial.sum(0) if parts > 1 else partial[0])
