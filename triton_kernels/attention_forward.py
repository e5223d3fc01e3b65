"""Attention's forward pass: the launcher."""

import torch
import triton

from . import common
from .attention_call import Call, set_allocator
from .attention_configs import forward_configs
from .attention_forward_kernels import attention_forward_kernel
from .common import Config


def run_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
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
