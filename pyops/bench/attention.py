"""Attention problems: dense, packed sequences and decoding, against torch's scaled_dot_product_attention."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyops
from pyops.bench.problem import Problem

NOTATION = """\
BxHxSxD[:option,...] (batch, query heads, query length, head dim); options: causal; kvN (key/value heads);
kN (key length); vN (value's head dim); wN or wLxR (window); bias; mask; alibi; softcap; sinks;
varlen (B packed sequences of lengths S/2 to S); decode (a cache of kN keys)"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LENGTHS, _DIMS = (128, 512, 2048), (64, 128)
SETS: dict[str, tuple[str, ...]] = {
    "full": tuple(f"1x8x{s}x{d}" for s in _LENGTHS for d in _DIMS),
    "causal": tuple(f"1x8x{s}x{d}:causal" for s in _LENGTHS for d in _DIMS),
    "short": ("32x8x10x16", "32x8x10x16:causal", "64x4x28x32", "8x12x64x64"),
    "window": ("1x8x2048x64:w128", "1x8x2048x64:causal,w128x0"),
    "options": (
        *("2x8x512x59", "2x8x512x111", "2x8x512x256", "2x8x512x64:v128"),
        *("2x8x512x64:kv2", "2x8x512x64:kv1,causal", "2x8x512x64:mask", "2x8x512x64:bias"),
        *("2x8x512x64:alibi,causal", "2x8x512x64:softcap", "2x8x512x64:sinks,causal"),
        *("2x8x113x64:k203", "2x8x799x64:k3", "1x1x2048x64"),
    ),
    "varlen": ("8x8x512x64:varlen", "8x8x512x64:varlen,causal"),
    "decode": (
        "1x32x1x128:decode,kv8,k4096",
        "8x32x1x128:decode,kv8,k2048",
        "4x8x4x64:decode,k512",
    ),
    "gpu": (
        *(f"{16384 // s}x16x{s}x128{c}" for s in (512, 2048, 8192, 16384) for c in ("", ":causal")),
        *(f"{16384 // s}x32x{s}x64{c}" for s in (512, 2048, 8192, 16384) for c in ("", ":causal")),
        *("2x8x8192x256", "2x8x8192x256:causal", "2x32x8192x128:causal,kv8"),
        *("2x16x8192x128:causal,w1024x0", "8x16x2048x128:varlen,causal"),
        *("16x32x1x128:decode,kv8,k8192", "1x32x1x128:decode,kv8,k65536"),
    ),
}
CHECKS = (
    ("2x4x64x64", True),
    ("2x4x113x64:k203,causal", True),
    ("1x6x70x59:kv2", True),
    ("2x2x40x32:k24,causal", True),
    ("1x4x100x64:w16", True),
    ("1x4x96x48:bias", True),
    ("2x4x65x64:mask", True),
    ("1x8x80x64:alibi,causal,kv1", False),
    ("1x4x64x128:softcap", False),
    ("1x4x64x64:sinks,causal", True),
    ("1x2x33x256", False),
    ("1x2x33x1:v3", False),
    ("3x4x50x64:varlen,causal", True),
    ("2x8x1x64:decode,kv2,k130", True),
    ("2x4x3x40:decode,k70,causal", False),
)


@dataclass(frozen=True)
class Case:
    """Sizes and options of a notation."""

    batch: int
    heads: int
    seqlen_q: int
    head_dim: int
    heads_kv: int
    seqlen_k: int
    head_dim_v: int
    window: tuple[int, int] | None
    flags: frozenset[str]


_FLAGS = ("causal", "bias", "mask", "alibi", "softcap", "sinks", "varlen", "decode")


def parse(notation: str) -> Case:
    """Raises ValueError for what is not in NOTATION."""
    sizes, _, rest = notation.partition(":")
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", sizes)
    if match is None:
        raise ValueError(f"expected BxHxSxD[:option,...], got {notation!r}")
    batch, heads, seqlen, head_dim = (int(g) for g in match.groups())
    numbers = {"kv": heads, "k": seqlen, "v": head_dim}
    window = None
    flags = set()
    for option in filter(None, rest.split(",")):
        value = re.fullmatch(r"(kv|k|v)(\d+)", option)
        band = re.fullmatch(r"w(\d+)(?:x(\d+))?", option)
        if option in _FLAGS:
            flags.add(option)
        elif value:
            numbers[value[1]] = int(value[2])
        elif band:
            window = (int(band[1]), int(band[2] or band[1]))
        else:
            raise ValueError(f"unknown option {option!r} in {notation!r}")
    if 0 in (batch, heads, seqlen, head_dim, *numbers.values()) or heads % numbers["kv"]:
        raise ValueError(f"sizes of {notation!r} do not fit together")
    return Case(
        *(batch, heads, seqlen, head_dim, numbers["kv"], numbers["k"], numbers["v"]),
        *(window, frozenset(flags)),
    )


def problem(notation: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    case = parse(notation)
    make = functools.partial(_randn, dtype, device, torch.Generator().manual_seed(seed))
    if "varlen" in case.flags:
        return _varlen(notation, case, make, device)
    if "decode" in case.flags:
        return _decode(notation, case, make, device)
    b, h, s, d = case.batch, case.heads, case.seqlen_q, case.head_dim
    inputs = {
        "query": make(b, h, s, d),
        "key": make(b, case.heads_kv, case.seqlen_k, d),
        "value": make(b, case.heads_kv, case.seqlen_k, case.head_dim_v),
    }
    leaves: tuple[str, ...] = ("query", "key", "value")
    if "bias" in case.flags:
        inputs["bias"] = make(1, h, s, case.seqlen_k)
        leaves += ("bias",)
    if "mask" in case.flags:
        # every row keeps its first key
        inputs["bias"] = (make(b, 1, s, case.seqlen_k) > 0).index_fill(
            -1, torch.zeros(1, dtype=torch.long, device=device), True
        )
    if "sinks" in case.flags:
        inputs["sinks"] = make(h).float()
        leaves += ("sinks",)
    options: dict[str, Any] = {"causal": "causal" in case.flags, "window": case.window}
    if "alibi" in case.flags:
        options["alibi_slopes"] = torch.tensor([2.0 ** (-8 * (i + 1) / h) for i in range(h)]).to(
            device
        )
    if "softcap" in case.flags:
        options["softcap"] = 5.0
    pairs = _visible(case, device).sum().item() * b * h if device.type != "meta" else 0
    matmul = 2.0 * pairs * (d + case.head_dim_v)
    nbytes = sum(t.numel() * t.element_size() for t in inputs.values())
    nbytes += b * h * s * case.head_dim_v * dtype.itemsize
    plain = functools.partial(_sdpa if _has_sdpa(case) else _explicit, case, options)
    return Problem(
        *("attention", notation, inputs),
        functools.partial(pyops.attention, **options),
        plain,
        baselines=_sdpa_backends(case, options, device),
        compiled_baselines=_flex(case, device),
        leaves=leaves,
        flops=matmul,
        nbytes=nbytes,
        backward_flops=2.5 * matmul,
        backward_nbytes=2.0 * nbytes,
    )


def _randn(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator, *size: int
) -> Tensor:
    return torch.randn(size, generator=generator).to(device, dtype)


def _visible(case: Case, device: torch.device | str) -> Tensor:
    """(seqlen_q, seqlen_k), True where a query sees a key; aligned at the bottom right."""
    i = torch.arange(case.seqlen_q, device=device)[:, None] + case.seqlen_k - case.seqlen_q
    j = torch.arange(case.seqlen_k, device=device)
    seen = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=device)
    if "causal" in case.flags:
        seen &= j <= i
    if case.window is not None:
        seen &= (j >= i - case.window[0]) & (j <= i + case.window[1])
    return seen


def _has_sdpa(case: Case) -> bool:
    """Whether torch's function has these options, be it through a mask."""
    return not case.flags & {"softcap", "sinks"} and bool(_visible(case, "cpu").any(1).all())


def _sdpa(
    case: Case,
    options: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    square = case.seqlen_q == case.seqlen_k and case.window is None
    causal = options["causal"] and square and bias is None and "alibi" not in case.flags
    mask = bias
    if (options["causal"] or case.window) and not causal:
        mask = _visible(case, query.device)
    if "alibi" in case.flags:
        distance = _distance(case, query.device)
        penalty = -options["alibi_slopes"].to(query.dtype)[:, None, None] * distance
        mask = penalty if mask is None else penalty.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, enable_gqa=case.heads != case.heads_kv
    )


# Those that torch has kernels for, by device; "eager" is the one that torch itself chooses.
_SDPA_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        *(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
        *(SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
    ),
}


def _sdpa_backends(
    case: Case, options: dict[str, Any], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """torch's function on each of its kernels, and the same in single steps; none where it lacks the options."""
    if not _has_sdpa(case):
        return {}

    def on(backend: SDPBackend, **inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(case, options, **inputs)

    functions: dict[str, Callable[..., Any]] = {
        f"sdpa {backend.name.lower()}": functools.partial(on, backend)
        for backend in _SDPA_BACKENDS.get(device.type, ())
    }
    return functions | {"steps": functools.partial(_explicit, case, options)}


def _distance(case: Case, device: torch.device) -> Tensor:
    i = torch.arange(case.seqlen_q, device=device)[:, None] + case.seqlen_k - case.seqlen_q
    return (i - torch.arange(case.seqlen_k, device=device)).abs()


def _explicit(
    case: Case,
    options: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scores, softmax and product one after the other, with everything torch's function lacks."""
    group = case.heads // case.heads_kv
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * case.head_dim**-0.5
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    seen = _visible(case, query.device)
    if bias is not None:
        seen, scores = (seen & bias, scores) if bias.dtype == torch.bool else (seen, scores + bias)
    if "alibi" in case.flags:
        slopes = options["alibi_slopes"].to(scores.dtype)[:, None, None]
        scores = scores - slopes * _distance(case, query.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ value
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value


def _flex(case: Case, device: torch.device) -> dict[str, Callable[..., Any]]:
    """FlexAttention, where it has these options. (On the CPU it has no backward.)"""
    if case.flags - {"causal"} or device.type == "meta":
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if case.flags or case.window is not None:
        shift, window = case.seqlen_k - case.seqlen_q, case.window
        causal = "causal" in case.flags

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            visible = j <= i + shift if causal else j >= 0
            if window is not None:
                visible = visible & (j >= i + shift - window[0]) & (j <= i + shift + window[1])
            return visible

        sizes = (None, None, case.seqlen_q, case.seqlen_k)
        mask = create_block_mask(seen, *sizes, device=device.type)

    def flex(query: Tensor, key: Tensor, value: Tensor) -> Any:
        gqa = case.heads != case.heads_kv
        return compiled(query, key, value, block_mask=mask, enable_gqa=gqa)

    return {"flex": flex}


def _varlen(
    notation: str, case: Case, make: Callable[..., Tensor], device: torch.device
) -> Problem:
    steps = max(case.batch - 1, 1)
    lengths = [case.seqlen_q - case.seqlen_q // 2 * i // steps for i in range(case.batch)]
    ends = [sum(lengths[:i]) for i in range(case.batch + 1)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    causal, total, d = "causal" in case.flags, ends[-1], case.head_dim
    inputs = {
        "query": make(total, case.heads, d),
        "key": make(total, case.heads_kv, d),
        "value": make(total, case.heads_kv, case.head_dim_v),
    }

    def ours(query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Any:
        longest = max(lengths)
        return pyops.attention_varlen(
            *(query, key, value, cu_seqlens, cu_seqlens, longest, longest),
            causal=causal,
            backend=backend,
        )

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call a sequence."""
        parts = []
        for i, length in enumerate(lengths):
            rows = slice(ends[i], ends[i] + length)
            q, k, v = (t[rows].transpose(0, 1)[None] for t in (query, key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=case.heads != case.heads_kv
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths) * case.heads
    matmul = 2.0 * pairs * (d + case.head_dim_v)
    nbytes = sum(t.numel() * t.element_size() for t in inputs.values()) * 4 / 3
    return Problem(
        *("attention_varlen", notation, inputs, ours, plain),
        flops=matmul,
        nbytes=nbytes,
        backward_flops=2.5 * matmul,
        backward_nbytes=2 * nbytes,
        compiled=False,
    )


def _decode(
    notation: str, case: Case, make: Callable[..., Tensor], device: torch.device
) -> Problem:
    causal, filled = "causal" in case.flags, case.seqlen_k
    inputs = {
        "query": make(case.batch, case.heads, case.seqlen_q, case.head_dim),
        "key": make(case.batch, case.heads_kv, filled, case.head_dim),
        "value": make(case.batch, case.heads_kv, filled, case.head_dim_v),
    }

    def ours(query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Any:
        return pyops.attention_decode(query, key, value, causal=causal, backend=backend)

    plain = functools.partial(_sdpa if _has_sdpa(case) else _explicit, case, {"causal": causal})
    pairs = case.batch * case.heads * case.seqlen_q * filled
    return Problem(
        *("attention_decode", notation, inputs, ours, plain),
        leaves=(),
        flops=2.0 * pairs * (case.head_dim + case.head_dim_v),
        nbytes=sum(t.numel() * t.element_size() for t in inputs.values()),
    )
