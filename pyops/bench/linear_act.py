"""Dense layer problems: those of the GANs, against plain torch."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyops
from pyops.bench.problem import Problem

NOTATION = "BATCHxIN->OUT:activation (relu, leaky_relu, tanh, sigmoid, none)"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETS: dict[str, tuple[str, ...]] = {
    "gan": ("64x128->784:tanh", "256x128->784:tanh", "64x100->128:leaky_relu", "64x128->1:sigmoid"),
}
SETS["gpu"] = SETS["gan"]
CHECKS = (
    ("5x17->150:tanh", True),
    ("64x128->784:tanh", False),
    ("3x9->20:relu", True),
    ("3x9->20:leaky_relu", False),
    ("7x30->11:sigmoid", False),
    ("4x16->8:none", False),
)


def problem(notation: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    match = re.fullmatch(r"(\d+)x(\d+)->(\d+):(relu|leaky_relu|tanh|sigmoid|none)", notation)
    if match is None or "0" in match.groups():
        raise ValueError(f"expected {NOTATION}, got {notation!r}")
    batch, width, out = map(int, match.groups()[:3])
    activation = None if match[4] == "none" else match[4]
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "input": torch.randn(batch, width, generator=generator),
        "weight": torch.randn(out, width, generator=generator) * width**-0.5,
        "bias": torch.randn(out, generator=generator),
    }
    inputs = {name: t.to(device, dtype) for name, t in inputs.items()}

    def ours(backend: str | None, **tensors: Any) -> Tensor:
        return pyops.linear_act(**tensors, activation=activation, backend=backend)

    def plain(**tensors: Any) -> Tensor:
        y = F.linear(**tensors)
        if activation == "leaky_relu":
            return F.leaky_relu(y)
        return y if activation is None else getattr(torch, activation)(y)

    flops = 2.0 * batch * width * out
    nbytes = float(sum(t.numel() for t in inputs.values()) + batch * out) * dtype.itemsize
    return Problem(
        *("linear_act", notation, inputs, ours, plain),
        flops=flops,
        nbytes=nbytes,
        backward_flops=2 * flops,
        backward_nbytes=2 * nbytes,
    )
