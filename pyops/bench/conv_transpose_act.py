"""Transposed convolution problems: the layers of DCGAN generators, against plain torch."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyops
from pyops.bench.problem import Problem

NOTATION = (
    "NxCxH[xW]->K[:option,...]; options: kN (kernel), sN (stride), pN (padding), oN (output padding), dN, gN, "
    "affine, relu, leaky, tanh, sigmoid, channels_last"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GENERATOR28 = ("64x100x1->128:k7,affine,relu", "64x128x7->64:k4,s2,p1,affine,relu")
SETS: dict[str, tuple[str, ...]] = {
    "dcgan28": (*_GENERATOR28, "64x64x14->1:k4,s2,p1,tanh"),
    "dcgan64": (
        *("64x100x1->512:k4,affine,relu", "64x512x4->256:k4,s2,p1,affine,relu"),
        *("64x256x8->128:k4,s2,p1,affine,relu", "64x128x16->64:k4,s2,p1,affine,relu"),
        "64x64x32->3:k4,s2,p1,tanh",
    ),
    "other": (
        *("8x24x17->20:k3,s2,p1,o1,relu", "4x16x19x23->30:k5,p2,leaky", "4x32x14->32:k4,s2,p1,g4"),
        *("8x64x28->64:k2,s2,relu", "4x20x15->12:k3,d2,sigmoid"),
    ),
}
SETS["gpu"] = (*SETS["dcgan28"], *SETS["dcgan64"])
CHECKS = (
    ("3x20x5->12:k4,s2,p1,affine,relu", True),
    ("2x10x1->16:k7,affine,relu", True),
    ("2x16x7->1:k4,s2,p1,tanh", True),
    ("2x8x9x6->10:k3,s2,p1,o1,leaky", True),
    ("2x8x9->12:k3,d2,g4,sigmoid", False),
    ("2x12x6->12:k5,p2,affine,channels_last", False),
)


def problem(notation: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    sizes, _, rest = notation.partition(":")
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:x(\d+))?->(\d+)", sizes)
    if match is None:
        raise ValueError(f"expected NxCxH[xW]->K[:option,...], got {notation!r}")
    batch, channels, height, width, out = (int(g or match[3]) for g in match.groups())
    numbers = {"k": 3, "s": 1, "p": 0, "o": 0, "d": 1, "g": 1}
    flags: set[str] = set()
    for option in filter(None, rest.split(",")):
        value = re.fullmatch(r"([kspodg])(\d+)", option)
        if value:
            numbers[value[1]] = int(value[2])
        elif option in ("affine", "relu", "leaky", "tanh", "sigmoid", "channels_last"):
            flags.add(option)
        else:
            raise ValueError(f"unknown option {option!r} in {notation!r}")
    groups, kernel = numbers["g"], numbers["k"]
    if (
        0 in (batch, channels, height, width, out, kernel, groups)
        or channels % groups
        or out % groups
    ):
        raise ValueError(f"sizes of {notation!r} do not fit together")
    generator = torch.Generator().manual_seed(seed)
    fan_in = max(channels // groups * (kernel // numbers["s"]) ** 2, 1)
    inputs = {
        "input": torch.randn(batch, channels, height, width, generator=generator),
        "weight": torch.randn(channels, out // groups, kernel, kernel, generator=generator)
        * fan_in**-0.5,
    }
    if "affine" in flags:
        inputs["scale"] = 1 + 0.2 * torch.randn(out, generator=generator)
        inputs["shift"] = torch.randn(out, generator=generator)
    else:
        inputs["bias"] = torch.randn(out, generator=generator)
    inputs = {name: t.to(device, dtype) for name, t in inputs.items()}
    if "channels_last" in flags:
        inputs["input"] = inputs["input"].contiguous(memory_format=torch.channels_last)
    activation: str | None = next(
        (f for f in ("relu", "leaky", "tanh", "sigmoid") if f in flags), None
    )
    activation = "leaky_relu" if activation == "leaky" else activation
    geometry: dict[str, Any] = {
        "stride": numbers["s"],
        "padding": numbers["p"],
        "output_padding": numbers["o"],
        "groups": groups,
        "dilation": numbers["d"],
    }

    def ours(input: Tensor, weight: Tensor, backend: str | None, **vectors: Any) -> Tensor:
        return pyops.conv_transpose2d_act(
            input, weight, **vectors, **geometry, activation=activation, negative_slope=0.2, backend=backend
        )  # fmt: skip

    def plain(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, **affine: Tensor
    ) -> Tensor:
        out = F.conv_transpose2d(input, weight, bias, **geometry)
        if affine:
            out = out * affine["scale"][:, None, None] + affine["shift"][:, None, None]
        if activation == "leaky_relu":
            return F.leaky_relu(out, 0.2)
        return out if activation is None else getattr(torch, activation)(out)

    def channels_last(input: Tensor, weight: Tensor, **vectors: Any) -> Tensor:
        return plain(input.contiguous(memory_format=torch.channels_last), weight, **vectors)

    extent = [
        (n - 1) * numbers["s"] - 2 * numbers["p"] + numbers["d"] * (kernel - 1) + numbers["o"] + 1
        for n in (height, width)
    ]
    if min(extent) < 1:
        raise ValueError(f"{notation!r} has no output")
    # torch checks the rest: an output padding must be below stride or dilation
    if numbers["o"] >= max(numbers["s"], numbers["d"]):
        raise ValueError(f"output padding of {notation!r} is not below stride or dilation")
    flops = 2.0 * batch * channels * height * width * kernel**2 * out // groups
    nbytes = sum(t.numel() for t in inputs.values()) + batch * out * extent[0] * extent[1]
    return Problem(
        *("conv_transpose2d_act", notation, inputs, ours, plain),
        baselines={"channels_last": channels_last},
        flops=flops,
        nbytes=float(nbytes * dtype.itemsize),
        backward_flops=2 * flops,
        backward_nbytes=2.0 * nbytes * dtype.itemsize,
    )
