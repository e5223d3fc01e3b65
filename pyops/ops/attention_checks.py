"""Checks and choices that attention, attention_varlen and attention_decode share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack

from ..reference.attention import AttentionSpec
from . import _arguments as arguments
from . import _choice

MOST_HEAD_DIM = 256  # of the kernels; the reference takes any
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensors(**tensors: Tensor) -> None:
    """Floating tensors, each like the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        arguments.floating_tensor(name, tensor)
        if name != first_name:
            arguments.like(name, tensor, first_name, first)


def check_rank(name: str, tensor: Tensor, dimensions: tuple[str, ...]) -> None:
    if tensor.dim() != len(dimensions):
        raise ValueError(
            f"{name}: expected {len(dimensions)} dimensions ({', '.join(dimensions)}), "
            f"got {tuple(tensor.shape)}"
        )


def check_heads(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, key_name: str, value_name: str
) -> None:
    """Heads (at dimension `heads`) and head dims (the last) of tensors whose other sizes are checked."""
    if query.shape[-1] < 1 or value.shape[-1] < 1:
        name, tensor = ("query", query) if query.shape[-1] < 1 else (value_name, value)
        raise ValueError(f"{name}: expected a head_dim of at least 1, got {tuple(tensor.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{key_name}: expected query's head_dim {query.shape[-1]}, got {tuple(key.shape)}"
        )
    if value.shape[heads] != key.shape[heads]:
        raise ValueError(
            f"{value_name}: expected {key_name}'s {key.shape[heads]} heads, got {tuple(value.shape)}"
        )
    heads_q, heads_kv = query.shape[heads], key.shape[heads]
    if heads_kv < 1 or heads_q % heads_kv:
        raise ValueError(
            f"{key_name}: expected a number of heads that divides query's {heads_q}, got {heads_kv}"
        )


def check_per_head(
    name: str, tensor: Any, query: Tensor, heads: int, batch: int | None = None
) -> None:
    """alibi_slopes or sinks: (heads,), or with `batch` also (batch, heads); float32 or query's dtype."""
    if tensor is None:
        return
    arguments.floating_tensor(name, tensor)
    if tensor.dtype not in (torch.float32, query.dtype):
        raise TypeError(
            f"{name}: expected dtype float32 or query's {query.dtype}, got {tensor.dtype}"
        )
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected query's device {query.device}, got {tensor.device}")
    shapes = [(heads,)] if batch is None else [(heads,), (batch, heads)]
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def check_index(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype int32, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected query's device {query.device}, got {tensor.device}")


def readable(tensor: Tensor) -> bool:
    """Whether the tensor's values can be looked at now: not a fake, traced or mapped one."""
    return (
        type(tensor) is Tensor
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and get_interpreter_stack() is None
    )


def per_head(tensor: Tensor | None) -> Tensor | None:
    """As the ops take it: contiguous float32 (float64 where everything is, for the reference)."""
    if tensor is None:
        return None
    return tensor.contiguous() if tensor.dtype == torch.float64 else tensor.float().contiguous()


def unit_last(tensor: Tensor) -> Tensor:
    """The tensor itself where the elements of a head lie together, else a copy."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() leaves empty ones


def is_true_or_false(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def make_spec(
    head_dim: int,
    causal: Any,
    scale: Any,
    window: Any,
    softcap: Any,
    dropout_p: Any,
    top_left: bool = False,
) -> AttentionSpec:
    """The options, checked and normalised."""
    is_true_or_false("causal", causal)
    scale = head_dim**-0.5 if scale is None else arguments.number("scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    softcap = arguments.number("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 (none) or a positive number, got {softcap!r}")
    dropout_p = arguments.number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p!r}")
    left, right = _window(window)
    return AttentionSpec(scale, softcap, left, 0 if causal else right, top_left, dropout_p)


def _window(window: Any) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected None or a pair (left, right), got {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"window: expected ints or None (unlimited), got {window!r}")
        if side is not None and not 0 <= side < 2**31:
            raise ValueError(
                f"window: expected at least 0 and below 2**31, or None (unlimited), got {window!r}"
            )
    left, right = (-1 if side is None else side for side in window)
    return left, right


def choose(
    op: str,
    tensors: tuple[Tensor | None, ...],  # query, key, value, bias, alibi_slopes, sinks
    spec: AttentionSpec,
    backend: str | None,
    needs_grad: bool,
) -> str:
    """The backend of this call: the one asked for, or the best that takes it."""
    query = tensors[0]
    assert query is not None
    empty = any(t is not None and t.numel() == 0 for t in tensors)
    return (
        _choice.choose(
            op,
            query.device,
            backend,
            refusal=lambda name: _refusal(op, name, tensors, spec, needs_grad),
            passed_over=lambda name: empty,
        )
        or "reference"
    )


def _refusal(
    op: str,
    backend: str,
    tensors: tuple[Tensor | None, ...],
    spec: AttentionSpec,
    needs_grad: bool,
) -> str | None:
    """Why `backend` cannot take this call at all, or None."""
    if backend == "reference":
        return None
    query, _, value, _, alibi_slopes, _ = tensors
    assert query is not None and value is not None
    if query.dtype not in KERNEL_DTYPES:
        return f"it takes float32, bfloat16 and float16, got {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MOST_HEAD_DIM:
        most = max(query.shape[-1], value.shape[-1])
        return f"it takes a head_dim of at most {MOST_HEAD_DIM}, got {most}"
    if needs_grad and alibi_slopes is not None and alibi_slopes.requires_grad:
        return "alibi_slopes have no gradient there; detach() them"
    if backend == "triton":
        on_meta = (
            None
            if t is None
            else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for t in tensors
        )
        return _triton_module(op).supports(*on_meta, spec, needs_grad)
    return None


def _triton_module(op: str) -> Any:
    from importlib import import_module

    return import_module(f"..triton_kernels.{op}", __package__)


def operator(op: str, backend: str) -> Any:
    return getattr(torch.ops.pyops, f"{op}_triton" if backend == "triton" else op).default


def draw_rng_state(dropout_p: float, generator: Any, device: torch.device) -> Tensor | None:
    """(2,) int64: seed and offset of the dropout mask, or None where nothing is dropped."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator: expected query's device {device}, got a generator of {generator.device}"
        )
    if dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (2,), generator=generator, device=device)
