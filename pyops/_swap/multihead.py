"""nn.MultiheadAttention and torch's Transformer layers: guarded forwards that reach the fused op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops._swap.guard import class_of, is_plain_tensor, runs_torchs_forward
from pyops._swap.report import Run
from pyops.nn import attention


def rewrite(module: nn.Module, run: Run) -> Callable | None:
    """The forward that reaches the op, for a module of torch's that has one; reports on it."""
    if isinstance(module, nn.MultiheadAttention):
        return _rewrite_attention(module, run)
    if type(module) is nn.TransformerEncoderLayer and runs_torchs_forward(type(module)):
        return _encoder_layer_forward  # its attention is reported on by itself
    return None


def _rewrite_attention(module: nn.MultiheadAttention, run: Run) -> Callable | None:
    place = run.names[id(module)] or type(module).__name__
    if type(module) is not nn.MultiheadAttention:
        why = f"it is a {type(module).__name__}, not exactly nn.MultiheadAttention"
    elif not runs_torchs_forward(nn.MultiheadAttention):
        why = "nn.MultiheadAttention has a forward that is not torch's"
    elif module.bias_k is not None or module.add_zero_attn:
        why = "it adds keys and values of its own (add_bias_kv, add_zero_attn)"
    else:
        run.replaced(place, ["attention"])
        return _attention_forward(run.backend)
    run.skipped(place, ["attention"], why)
    return None


@functools.cache
def _attention_forward(backend: str | None) -> Callable:
    def forward(
        self: nn.MultiheadAttention,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        tensors = (query, key, value, *(p for p in self.parameters(recurse=False)))
        taken = (
            class_of(self) is nn.MultiheadAttention
            and runs_torchs_forward(nn.MultiheadAttention)
            and not torch.jit.is_tracing()
            and all(map(is_plain_tensor, tensors))
            and attention.takes(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
            )
        )
        if taken:
            output = attention.attend(
                self, query, key, value, key_padding_mask, attn_mask, is_causal, backend
            )
            return output, None
        return nn.MultiheadAttention.forward(
            *(self, query, key, value, key_padding_mask, need_weights, attn_mask),
            *(average_attn_weights, is_causal),
        )

    return forward


def _encoder_layer_forward(
    self: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """As torch's, without its shortcut for inference, which never calls the attention module."""
    if src.is_nested:  # nn.TransformerEncoder makes it of a padded batch, in inference
        padded = src.to_padded_tensor(0.0)
        lengths = src._nested_tensor_size()[:, 0].to(src.device)
        inside = torch.arange(padded.shape[1], device=src.device) < lengths[:, None]
        output = self(padded, src_key_padding_mask=~inside)
        return torch._nested_tensor_from_mask(output, inside, mask_check=False)
    src_key_padding_mask = F._canonical_mask(
        mask=src_key_padding_mask,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(src_mask),
        other_name="src_mask",
        target_type=src.dtype,
    )
    src_mask = F._canonical_mask(
        mask=src_mask,
        mask_name="src_mask",
        other_type=None,
        other_name="",
        target_type=src.dtype,
        check_other=False,
    )
    x = src
    if self.norm_first:
        x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
    normed: Tensor = self.norm2(x + self._ff_block(x))
    return normed
