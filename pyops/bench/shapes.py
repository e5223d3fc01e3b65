"""Convolution layers to measure, and the short notation they are named by."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

NOTATION = (
    "NxCxHxW->K:options (W may be left out if equal to H); options, joined by commas: "
    "k5 or k1x7 kernel, s2 stride, p1 padding, d2 dilation, g4 groups, leaky or noact, "
    "max3s2p1 or avg2 pooling, nopool; without them a 3x3 kernel, ReLU, 2x2 max pooling"
)


@dataclass(frozen=True)
class ConvShape:
    """One conv + activation + pool. `str()` gives its notation, `parse` reads it."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    activation: str | None = "relu"
    pool: str | None = "max"
    pool_size: int = 2
    pool_stride: int = 2
    pool_padding: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.in_channels, self.out_channels, self.stride, self.groups) < 1:
            raise ValueError(f"{self}: sizes, stride and groups must be positive")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"{self}: groups must divide both channel counts")
        if min(self.conv_size + self.out_size) < 1:
            raise ValueError(f"{self}: the input is too small for its windows")

    @property
    def conv_size(self) -> tuple[int, int]:
        h, w = (
            (size + 2 * self.padding - self.dilation * (k - 1) - 1) // self.stride + 1
            for size, k in zip((self.height, self.width), self.kernel, strict=True)
        )
        return h, w

    @property
    def out_size(self) -> tuple[int, int]:
        if self.pool is None:
            return self.conv_size
        h, w = (
            (size + 2 * self.pool_padding - self.pool_size) // self.pool_stride + 1
            for size in self.conv_size
        )
        return h, w

    @property
    def op_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `pyops.conv_relu_pool2d`."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
            "pool": self.pool,
            "pool_size": self.pool_size,
            "pool_stride": self.pool_stride,
            "pool_padding": self.pool_padding,
        }

    @property
    def conv_flops(self) -> int:
        """Operations of the direct convolution, at those pixels that some pool window reads."""
        reach = (
            self.conv_size
            if self.pool is None
            else tuple(
                min(c, (o - 1) * self.pool_stride + self.pool_size - self.pool_padding)
                for o, c in zip(self.out_size, self.conv_size, strict=True)
            )
        )
        taps = self.kernel[0] * self.kernel[1] * self.in_channels // self.groups
        return 2 * self.batch * self.out_channels * reach[0] * reach[1] * taps

    @property
    def gradient_density(self) -> float:
        """Fraction of the convolution's outputs that can carry gradient: one in each max window."""
        if self.pool != "max":
            return 1.0
        pixels = self.conv_size[0] * self.conv_size[1]
        return min(1.0, self.out_size[0] * self.out_size[1] / pixels)

    @property
    def elements(self) -> dict[str, int]:
        """How many elements input, weight, bias and output hold."""
        taps = self.kernel[0] * self.kernel[1] * self.in_channels // self.groups
        return {
            "input": self.batch * self.in_channels * self.height * self.width,
            "weight": self.out_channels * taps,
            "bias": self.out_channels,
            "output": self.batch * self.out_channels * self.out_size[0] * self.out_size[1],
        }

    def __str__(self) -> str:
        size = f"{self.height}" if self.height == self.width else f"{self.height}x{self.width}"
        options = []
        if self.kernel != (3, 3):
            h, w = self.kernel
            options.append(f"k{h}" if h == w else f"k{h}x{w}")
        for letter, name in _NUMBERS.items():
            if getattr(self, name) != _DEFAULTS[name]:
                options.append(f"{letter}{getattr(self, name)}")
        if self.activation != "relu":
            options.append("leaky" if self.activation else "noact")
        if self.pool is None:
            options.append("nopool")
        elif (self.pool, self.pool_size, self.pool_stride, self.pool_padding) != ("max", 2, 2, 0):
            pool = f"{self.pool}{self.pool_size}"
            pool += f"s{self.pool_stride}" if self.pool_stride != self.pool_size else ""
            pool += f"p{self.pool_padding}" if self.pool_padding else ""
            options.append(pool)
        head = f"{self.batch}x{self.in_channels}x{size}->{self.out_channels}"
        return head + (":" + ",".join(options) if options else "")


_NUMBERS = {"s": "stride", "p": "padding", "d": "dilation", "g": "groups"}
_DEFAULTS = {f.name: f.default for f in fields(ConvShape)}


def parse(text: str) -> ConvShape:
    """Reads the notation. Raises ValueError naming what it could not read."""
    head = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:x(\d+))?->(\d+)(?::(.*))?", text.strip())
    if head is None:
        raise ValueError(f"cannot read the shape {text!r}; expected {NOTATION}")
    batch, channels, height, width, out_channels, options = head.groups()
    values: dict[str, Any] = {}
    for option in filter(None, (options or "").split(",")):
        if m := re.fullmatch(r"k(\d+)(?:x(\d+))?", option):
            values["kernel"] = (int(m[1]), int(m[2] or m[1]))
        elif m := re.fullmatch(r"([spdg])(\d+)", option):
            values[_NUMBERS[m[1]]] = int(m[2])
        elif m := re.fullmatch(r"(max|avg)(\d+)(?:s(\d+))?(?:p(\d+))?", option):
            values |= {"pool": m[1], "pool_size": int(m[2]), "pool_stride": int(m[3] or m[2])}
            values["pool_padding"] = int(m[4] or 0)
        elif option in _WORDS:
            values |= _WORDS[option]
        else:
            raise ValueError(f"unknown option {option!r} in {text!r}; expected {NOTATION}")
    sizes = (int(height), int(width or height))
    return ConvShape(int(batch), int(channels), *sizes, int(out_channels), **values)


_WORDS: dict[str, dict[str, Any]] = {
    "noact": {"activation": None},
    "leaky": {"activation": "leaky_relu"},
    "nopool": {"pool": None, "pool_size": 1, "pool_stride": 1, "pool_padding": 0},
}

# Ordered so that a run cut short has measured the most telling ones.
SETS: dict[str, tuple[str, ...]] = {
    # Small classifiers on small images, and the pooled layers of VGG at several depths.
    "cpu": (
        "1x64x224->64:p1",
        "64x32x16->64:p1",
        "64x3x32->32:p1",
        "1x256x56->256:p1",
        "64x1x28->32",
        "1x512x14->512:p1",
        "64x32x13->64",
        "1x128x112->128:p1",
        "8x64x224->64:p1",
    ),
    "gpu": (
        "64x64x224->64:p1",
        "64x3x224->64:p1",
        "64x128x112->128:p1",
        "128x3x224->96:k11,s4,max3s2",
        "64x256x56->256:p1",
        "64x512x28->512:p1",
        "64x512x14->512:p1",
        "1024x3x32->32:p1",
        "1024x32x16->64:p1",
        "64x1x28->32",
    ),
    # What no kernel was tuned for.
    "untuned": (
        "4x17x61->29:p1",
        "4x48x45->80:k5,p2",
        "8x64x56->128:k1",
        "4x32x57->64:s2,p1",
        "4x64x40->96:p1,g4",
        "4x96x33->96:p1,g96",
        "2x24x64->40:p2,d2",
        "4x20x50x37->36:k1x7,max3s2p1",
        "8x16x40->24:p1,avg2",
        "3x40x35->72:p1,leaky,nopool",
        "2x3x97->21:k7,s2,p3,max3s2p1",
    ),
    "alexnet": (
        "1x3x224->64:k11,s4,p2,max3s2",
        "1x64x27->192:k5,p2,max3s2",
        "1x192x13->384:p1,nopool",
        "1x384x13->256:p1,nopool",
        "1x256x13->256:p1,max3s2",
    ),
    "vgg16": (
        "1x3x224->64:p1,nopool",
        "1x64x224->64:p1",
        "1x64x112->128:p1,nopool",
        "1x128x112->128:p1",
        "1x128x56->256:p1,nopool",
        "1x256x56->256:p1,nopool",
        "1x256x56->256:p1",
        "1x256x28->512:p1,nopool",
        "1x512x28->512:p1,nopool",
        "1x512x28->512:p1",
        "1x512x14->512:p1,nopool",
        "1x512x14->512:p1",
    ),
    # With batch-norm folded into the weights, as in inference.
    "resnet18": (
        "1x3x224->64:k7,s2,p3,max3s2p1",
        "1x64x56->64:p1,nopool",
        "1x64x56->128:s2,p1,nopool",
        "1x128x28->128:p1,nopool",
        "1x128x28->256:s2,p1,nopool",
        "1x256x14->256:p1,nopool",
        "1x256x14->512:s2,p1,nopool",
        "1x512x7->512:p1,nopool",
    ),
}


def select(names: list[str]) -> list[ConvShape]:
    """Shapes of the named sets and of notations, in order, each once."""
    texts = [text for name in names for text in SETS.get(name, (name,))]
    return list(dict.fromkeys(parse(text) for text in texts))
