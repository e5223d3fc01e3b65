"""LSTM problems, against torch.nn.LSTM."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

import pyops
from pyops.bench.problem import Problem

NOTATION = "IxHxLxBxT[:option,...] (input features, hidden size, layers, batch, steps); options: bi, nobias"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETS: dict[str, tuple[str, ...]] = {
    "cpu": ("10x8x2x32x20", "128x128x2x64x100", "28x128x2x64x28", "512x512x1x16x100"),
    "odd": ("20x7x1x32x30", "33x127x2x16x40", "64x100x1x1x50", "128x128x2x1x100", "1x1x1x8x50"),
    "bidirectional": ("64x64x1x32x50:bi", "128x128x2x16x50:bi"),
    "gpu": (
        *("28x128x2x64x28", "128x128x2x64x100", "128x128x1x256x512", "256x256x6x10x512"),
        *("512x512x1x16x100", "768x768x1x16x1024", "1024x1024x1x64x256"),
    ),
}
CHECKS = (
    ("10x8x2x5x7", True),
    ("5x7x1x3x11", True),
    ("16x32x2x17x9:bi", True),
    ("12x16x1x1x20", True),
    ("9x33x1x6x5:nobias", False),
    ("28x128x2x16x28", False),
    ("3x1x1x2x4", False),
)


def problem(notation: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    sizes, _, rest = notation.partition(":")
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)x(\d+)", sizes)
    options = set(filter(None, rest.split(",")))
    if match is None or options - {"bi", "nobias"}:
        raise ValueError(f"expected IxHxLxBxT[:bi,nobias], got {notation!r}")
    features, hidden, layers, batch, steps = (int(g) for g in match.groups())
    if 0 in (features, hidden, layers, batch, steps):
        raise ValueError(f"expected sizes of at least 1, got {notation!r}")
    directions, biased = 1 + ("bi" in options), "nobias" not in options
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input": torch.randn(steps, batch, features, generator=generator)}
    for layer in range(layers):
        width = features if layer == 0 else directions * hidden
        for direction in range(directions):
            shapes: dict[str, tuple[int, ...]]
            shapes = {"w_ih": (4 * hidden, width), "w_hh": (4 * hidden, hidden)}
            if biased:
                shapes |= {"b_ih": (4 * hidden,), "b_hh": (4 * hidden,)}
            for name, shape in shapes.items():
                values = (2 * torch.rand(shape, generator=generator) - 1) * hidden**-0.5
                inputs[f"{name}_{layer}_{direction}"] = values
    inputs = {name: t.to(device, dtype) for name, t in inputs.items()}

    def ours(input: Tensor, backend: str | None, **weights: Tensor) -> Any:
        output, (h, c) = pyops.lstm(
            *(input, None, list(weights.values())),
            num_layers=layers,
            bidirectional=directions == 2,
            backend=backend,
        )
        return output, h, c

    state = torch.zeros(layers * directions, batch, hidden, device=device)

    def plain(input: Tensor, **weights: Tensor) -> Any:
        """What torch.nn.LSTM calls."""
        zeros = state.to(input.dtype)
        return torch.lstm(
            *(input, (zeros, zeros), list(weights.values()), biased, layers),
            *(0.0, False, directions == 2, False),
        )

    baselines: dict[str, Any] = {}
    if device.type == "cuda":  # one buffer of weights, as the module keeps them for cuDNN
        module = nn.LSTM(features, hidden, layers, biased, bidirectional=directions == 2)
        module = module.to(device, dtype)

        def flattened(input: Tensor, **weights: Tensor) -> Any:
            return module(input)[0]

        baselines["nn.LSTM"] = flattened
    rows = layers * directions * batch * steps
    gates = sum(t.shape[0] * t.shape[1] for n, t in inputs.items() if n.startswith("w_"))
    flops = 2.0 * gates * batch * steps
    nbytes = sum(t.numel() for t in inputs.values()) + rows * hidden
    return Problem(
        *("lstm", notation, inputs, ours, plain),
        baselines=baselines,
        flops=flops,
        nbytes=float(nbytes * dtype.itemsize),
        backward_flops=2 * flops,
        # gates and cell states come back, gradients of everything go out
        backward_nbytes=float((nbytes + 6 * rows * hidden) * dtype.itemsize),
        compiled=steps <= 30,  # compiling more steps takes minutes
    )
