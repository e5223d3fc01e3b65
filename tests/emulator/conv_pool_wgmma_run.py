"""Runs the Hopper convolutions in the emulator, and says what they must give."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from build import HERE, ROOT, Emulated
from pyops.reference.conv_relu_pool import ConvPoolSpec, make_codes
from pyops.testing import assert_within_budget

CUDA = ROOT / "csrc" / "cuda"
ENTRY = HERE / "conv_relu_pool_wgmma_entry.cpp"
ADDRESSINGS = {"chosen": -1, "copies": 0, "shifted": 1, "pitch16": 2, "planes": 3}
ACTIVATIONS = ("none", "relu", "leaky_relu")


def sources(folder: Path = CUDA) -> list[Path]:
    return [ENTRY, *sorted(folder.glob("conv_relu_pool_wgmma*.cu"))]


@dataclass
class Case:
    """A call of the op: what it is given, and what must come back."""

    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    padding: int = 1
    activation: str = "relu"
    slope: float = 0.1
    pool: bool = True
    codes: bool = True
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    multiprocessors: int = 3
    whole: bool = False  # small whole numbers: every sum exact, many of them equal
    edit: object = field(default=None, repr=False)  # called with the input before it is used

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.shape, generator=generator)
        w = torch.randn((self.out_channels, self.shape[1], *self.kernel), generator=generator)
        b = torch.randn(self.out_channels, generator=generator)
        if self.whole:
            x, w, b = x.round(), (w / 2).round(), b.round()
        else:
            w /= w[0].numel() ** 0.5
        if self.edit is not None:
            self.edit(x)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(self.dtype), w.to(self.dtype), b.to(self.dtype) if self.bias else None

    def plain(self, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the sums before the activation."""
        sums = F.conv2d(x, w, b, padding=self.padding)
        out = sums
        if self.activation == "relu":
            out = F.relu(out)
        elif self.activation == "leaky_relu":
            out = F.leaky_relu(out, self.slope)
        return (F.max_pool2d(out, 2) if self.pool else out), sums

    def sizes(self, x: Tensor) -> Tensor:
        settings = [ACTIVATIONS.index(self.activation), int(self.pool)]
        settings += [int(self.dtype is torch.float16), self.multiprocessors]
        paddings = (self.padding, self.padding)
        return torch.tensor(
            [*self.shape, self.out_channels, *self.kernel, *paddings, *settings, *x.stride()]
        )

    def facts(self, kernels: Emulated, addressing: str = "copies") -> list[int]:
        """0 neither kernel, 1 deep, 2 first layers; rows, tiles_h, tiles_w, works, resident, grid."""
        x, w, _ = self.tensors()
        facts = torch.zeros(7, dtype=torch.int64)
        kernels.call(
            "conv_relu_pool_wgmma_facts",
            *(self.sizes(x), float(self.slope), x, w, None, None),
            *(max(ADDRESSINGS[addressing], 0), facts),
        )
        return facts.tolist()

    def run(
        self, kernels: Emulated, addressing: str = "chosen", **options
    ) -> tuple[Tensor, Tensor | None]:
        """Output and codes, as (batch, channels, height, width)."""
        x, w, b = self.tensors()
        height, width = (
            (extent + 2 * self.padding - kernel + 1) // (2 if self.pool else 1)
            for extent, kernel in zip(self.shape[2:], self.kernel, strict=True)
        )
        lying = (self.shape[0], height, width, self.out_channels)
        out = torch.full(lying, float("nan"), dtype=self.dtype)
        codes = None
        if self.codes and self.pool:
            codes = torch.full(lying, 77, dtype=torch.uint8)
        kernels.call(
            "conv_relu_pool_wgmma",
            *(self.sizes(x), float(self.slope), x, w.permute(0, 2, 3, 1).contiguous(), b),
            *(out, codes, ADDRESSINGS[addressing]),
            **options,
        )
        return out.permute(0, 3, 1, 2), None if codes is None else codes.permute(0, 3, 1, 2)

    def check(self, kernels: Emulated, addressing: str = "chosen", **options) -> float:
        """Compares with float64; the error ratio."""
        out, codes = self.run(kernels, addressing, **options)
        x, w, b = self.tensors()
        wide = [None if t is None else t.double() for t in (x, w, b)]
        reference, sums = self.plain(*wide)
        if self.edit is not None:
            # torch's own convolution in 16 bits makes NaN of an infinity where it pads channels.
            x, w, b = (None if t is None else t.float() for t in (x, w, b))
        lowp = self.plain(x, w, b)[0].to(self.dtype)
        ratio = assert_within_budget(out.contiguous(), lowp.contiguous(), reference)
        if codes is not None:
            # Sums in float32 decide otherwise than in float64 only where they are nearly equal.
            off = codes != make_codes(sums, self.spec())
            assert not (off.any() if self.whole else off.double().mean() > 1e-3), (
                f"{int(off.sum())} of {off.numel()} codes differ"
            )
        return ratio

    def spec(self) -> ConvPoolSpec:
        one, two = (1, 1), (2, 2)
        padding = (self.padding, self.padding)
        return ConvPoolSpec(
            *(one, padding, one, 1, self.activation, self.slope), *("max", two, two, (0, 0), False)
        )
