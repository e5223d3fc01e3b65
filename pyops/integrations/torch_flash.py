"""torch's registry of flash attention implementations: `torch.nn.attention.activate_flash_attention_impl("pyops")`.

While active, torch's own scaled_dot_product_attention runs on our kernels wherever it chooses its flash
attention for the CPU; `torch.nn.attention.restore_flash_attention_impl()` undoes it. What our kernels do not take there
(float64, dropout, empty sizes, head dims above 256) goes to torch's kernels as before. On CUDA nothing is
replaced: no kernel of ours is proven there yet.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.attention
from torch import Tensor

from .. import backends
from ..ops.attention_checks import MOST_HEAD_DIM, unit_last
from ..reference.attention import AttentionSpec, lies_heads_inside

NAME = "pyops"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Make the name known; nothing changes before it is activated."""
    add = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if add is not None and backends.why_not("attention", "cpu") is None:
        add(NAME, register_fn=Override)


class Override:
    """Our kernels in place of torch's on the CPU until :meth:`remove`."""

    def __init__(self) -> None:
        names = (_FORWARD, f"{_FORWARD}_backward")
        self._stock, self._stock_backward = (
            torch.library.get_kernel(getattr(torch.ops.aten, name).default, "CPU") for name in names
        )
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL", "CPU")
        with warnings.catch_warnings():  # that a kernel is replaced is the point
            warnings.filterwarnings("ignore", "[\\s\\S]*Overriding a previously registered kernel")
            for name, implementation in zip(names, (self._forward, self._backward), strict=True):
                self._library.impl(name, implementation, with_keyset=True, allow_override=True)

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None

    def _forward(
        self,
        keyset: torch._C.DispatchKeySet,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _takes(query, value, dropout_p, attn_mask):
            return self._stock.call_boxed(
                keyset, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        output, lse = torch.ops.pyops.attention.default(
            *map(unit_last, (query, key, value)),
            *(_four_dimensions(attn_mask), None, None, None),
            *_spec(query, is_causal, scale),
        )
        if (
            attn_mask is not None
        ):  # torch has 0 where a row sees nothing, and its backward counts on it
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        if not (query.is_contiguous() or lies_heads_inside(query)):
            output = torch.empty_like(query).copy_(output)
        return output, _heads_inside(lse)

    def _backward(
        self,
        keyset: torch._C.DispatchKeySet,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _takes(query, value, dropout_p, attn_mask):
            return self._stock_backward.call_boxed(
                *(keyset, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal),
                attn_mask=attn_mask,
                scale=scale,
            )
        dq, dk, dv, _, _ = torch.ops.pyops.attention_backward.default(
            *(unit_last(grad_out), None, *map(unit_last, (query, key, value, out))),
            logsumexp.contiguous(),
            *(_four_dimensions(attn_mask), None, None, None),
            *_spec(query, is_causal, scale),
            [True, True, True, False, False],
        )
        return _heads_inside(dq), _heads_inside(dk), _heads_inside(dv)


def _takes(query: Tensor, value: Tensor, dropout_p: float, attn_mask: Tensor | None) -> bool:
    return (
        query.dtype in _DTYPES
        and dropout_p == 0
        and query.numel() > 0 < value.numel()
        and max(query.shape[3], value.shape[3]) <= MOST_HEAD_DIM
        and (attn_mask is None or attn_mask.dtype in (torch.bool, torch.float32, query.dtype))
    )


def _spec(query: Tensor, is_causal: bool, scale: float | None) -> AttentionSpec:
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return AttentionSpec(scale, 0.0, -1, 0 if is_causal else -1, True, 0.0)


def _four_dimensions(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _heads_inside(tensor: Tensor) -> Tensor:
    """With the strides that torch's meta function promises: (batch, seqlen, heads, ...) in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
