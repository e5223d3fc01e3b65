"""Attention in Triton: the entry points, each taking its schema's arguments."""

import torch
import triton

from . import common
from .attention_backward import backward, varlen_backward
from .attention_call import Call, Options, Packed, set_allocator
from .attention_configs import forward_configs
from .attention_decode import decode
from .attention_forward_kernels import attention_forward_kernel
from .common import Config

__all__ = ["backward", "decode", "forward", "supports", "varlen_backward", "varlen_forward"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """None if the Triton kernels take these tensors (of any of the ops), else a sentence saying why
    not. Looks at shapes, dtypes and devices only, so fake and meta tensors do.
    """
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        return (
            "the Triton kernels take float32, bfloat16 and float16, query, key and value alike, "
            f"not {query.dtype}, {key.dtype} and {value.dtype}"
        )
    widest = max(query.size(-1), value.size(-1))
    if not 1 <= widest <= MAX_HEAD_DIM or min(query.size(-1), value.size(-1)) < 1:
        return f"the Triton kernels take head dims from 1 to {MAX_HEAD_DIM}, not {widest}"
    if query.device.type == "cpu" and not common.INTERPRET:
        return "the Triton kernels need a GPU (or TRITON_INTERPRET=1)"
    return None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(score) @ value and the scores' log-sum-exp.

    query: (batch, heads, seqlen_q, head_dim), key: (batch, kv_heads, seqlen_k, head_dim), value:
    (batch, kv_heads, seqlen_k, value_dim), any strides with unit last one; bias: float or bool,
    expanded to (batch, heads, seqlen_q, seqlen_k); alibi_slopes: float32, (heads,) or (batch,
    heads); sinks: float32, (heads,); rng_state: int64 (seed, offset). The output is in the query's
    layout and dtype; lse is float32, (batch, heads, seqlen_q).
    """
    options = Options(scale, softcap, window_left, window_right, top_left, dropout_p)
    return _forward(Call(query, key, value, options, None, bias, alibi_slopes, sinks, rng_state))


def varlen_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` of packed sequences: query (total_q, heads, head_dim), key and value (total_k,
    kv_heads, ...), sequence b from cu_seqlens[b] to cu_seqlens[b + 1]; lse is (heads, total_q).

    Rows past the last sequence give 0 and -inf. The grid is that of the longest sequences, so that
    the device need not be asked.
    """
    options = Options(scale, softcap, window_left, window_right, top_left, dropout_p)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _forward(Call(query, key, value, options, packed, None, alibi_slopes, sinks, rng_state))


def _forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = call.query, call.key, call.value
    flags = call.flags()
    output = call.like(query, value.size(-1))
    lse = query.new_empty(call.lse_shape, dtype=torch.float32)
    if call.packed:
        output.zero_()
        lse.fill_(float("-inf"))
    if output.numel() == 0 or call.seqlen_q == 0 or call.batch == 0:
        return output, lse
    terms = call.terms()

    def bind(config: Config):
        block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
        blocks = triton.cdiv(call.seqlen_q, block_m)
        arguments = {
            "query_rows": call.descriptor(query, block_m, flags.BLOCK_D, flags),
            "key_rows": call.descriptor(key, block_n, flags.BLOCK_D, flags),
            "value_rows": call.descriptor(value, block_n, flags.BLOCK_DV, flags),
            "query": call.strided(query),
            "key": call.strided(key),
            "value": call.strided(value),
            "output": call.strided(output),
            "lse": lse,
            "sizes": call.sizes(blocks),
            "terms": terms,
            "F": flags,
        }
        return (blocks * call.heads * call.batch,), arguments

    configs = forward_configs(flags, query.dtype, common.capability(query), call.seqlen_q)
    with common.device_guard(query):
        set_allocator(flags)
        common.launch(attention_forward_kernel, configs, (query.dtype, flags), bind)
    return output, lse
