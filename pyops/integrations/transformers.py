"""Hugging Face transformers: after :func:`register`, `attn_implementation="pyops"` runs attention on our kernels.

For models that choose their attention by transformers' AttentionInterface. The mask function is that of its "sdpa"
implementation: without one, padded batches would go unmasked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.attention import attention
from ..ops.sdpa import scaled_dot_product_attention

NAME = "pyops"


def register() -> None:
    """Make "pyops" an attention implementation of transformers; again is as good as once.

    Raises:
        ModuleNotFoundError: transformers is not installed, or too old (it takes 4.53).
    """
    attention_interface, mask_interface = _interfaces()
    attention_interface.register(NAME, attention_forward)
    mask_interface.register(NAME, mask_interface()["sdpa"])


def unregister() -> None:
    """Take the name away again; models set to it no longer run until they are set to another."""
    for interface in _interfaces():
        interface._global_mapping.pop(NAME, None)


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ModuleNotFoundError(
            "pyops.integrations.transformers needs transformers 4.53 or later (pip install transformers)"
        ) from error
    return AttentionInterface, AttentionMaskInterface


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention functions.

    Args:
        module: whose ``is_causal`` counts where the argument is None; True where it has none.
        query: (batch, heads, seqlen_q, head_dim).
        key, value: (batch, heads_kv, seqlen_k, head_dim); heads_kv divides heads, nothing is repeated.
        attention_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k): bool, True where attended, or added
            to the scores. It has the causal order and the window in it; only without one are they applied here.
        position_bias: added to the scores, with a gradient.
        s_aux: (heads,): attention sinks, with a gradient.

    Returns:
        (output (batch, seqlen_q, heads, v_head_dim), None): there are no attention weights to return.
    """
    if kwargs.get("output_attentions"):
        from transformers.utils import logging

        logging.get_logger(__name__).warning_once(
            '`output_attentions=True` needs the attention implementation "eager"; "pyops" has no weights to return.'
        )
    plain = not softcap and s_aux is None
    if plain and backends.automatic("attention", query.device)[0][0] == "reference":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        added: Any = {} if position_bias is None else {"position_bias": position_bias}
        options: Any = (attention_mask, dropout, scaling, is_causal)
        return sdpa_attention_forward(module, query, key, value, *options, **added)
    seqlen_q = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and seqlen_q > 1
    if causal and key.shape[2] > seqlen_q:  # the empty places of a static cache, at its first use
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
        position_bias = None if position_bias is None else position_bias[..., :seqlen_q]
    seqlen_k = key.shape[2]
    if causal and seqlen_k < seqlen_q:  # the diagonal starts at the first key
        attention_mask = query.new_ones((seqlen_q, seqlen_k), dtype=torch.bool).tril()
        causal = False
    window = None
    if sliding_window is not None and attention_mask is None and seqlen_k > sliding_window:
        window = (sliding_window - 1, sliding_window - 1)
    if plain and position_bias is None and window is None:
        output: Any = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=True
        )
    else:
        output = attention(
            query,
            key,
            value,
            causal=causal,
            scale=scaling,
            bias=_bias(attention_mask, position_bias),
            window=window,
            softcap=softcap or 0.0,
            sinks=s_aux,
            dropout_p=dropout,
        )
    return output.transpose(1, 2).contiguous(), None


def _bias(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, -torch.inf)
    return mask + position_bias
