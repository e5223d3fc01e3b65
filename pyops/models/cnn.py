"""Convolutional networks in plain torch.nn: the classic small ones here, the large ones beside.

Nothing in this package uses the ops of pyops: `pyops.optimize` swaps them in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyops.models.alexnet import AlexNet
from pyops.models.checks import check_count, check_images, check_size
from pyops.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet50
from pyops.models.vgg import VGG, vgg11, vgg16

__all__ = [
    "VGG",
    "AlexNet",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "SmallCNN",
    "resnet18",
    "resnet50",
    "small_cnn",
    "vgg11",
    "vgg16",
]


class SmallCNN(nn.Module):
    """Two or three 3x3 convolutions with ReLU and 2x2 pooling, then two dense layers.

    Args:
        channels: output channels of the convolutions, two or three of them.
        hidden: width of the hidden dense layer.
        image_size: height and width of the images in pixels, an int or a pair.
        in_channels: channels of the images.
        num_classes: width of the output, (batch, num_classes).
        padding: zeros added on each side before each convolution, in pixels.
        pool: "max" or "avg".
        pool_last: whether the third convolution is pooled as well.

    Raises:
        ValueError: an argument is out of range, or the images are too small for the layers;
            forward: the input is not (batch, in_channels, height, width) of `image_size`.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        hidden: int,
        image_size: int | tuple[int, int],
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        padding: int = 1,
        pool: str = "max",
        pool_last: bool = True,
    ):
        super().__init__()
        if not isinstance(channels, (tuple, list)) or len(channels) not in (2, 3):
            raise ValueError(f"channels: expected two or three numbers, got {channels!r}")
        if pool not in ("max", "avg"):
            raise ValueError(f'pool: expected "max" or "avg", got {pool!r}')
        for name, value in (
            *(("channels", count) for count in channels),
            ("hidden", hidden),
            ("in_channels", in_channels),
            ("num_classes", num_classes),
        ):
            check_count(name, value)
        if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
            raise ValueError(f"padding: expected a non-negative integer, got {padding!r}")
        height, width = check_size("image_size", image_size)
        self.in_channels = in_channels
        self.image_size = (height, width)

        self.pool = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=padding)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, padding=padding)
        self.conv3 = (
            nn.Conv2d(channels[1], channels[2], 3, padding=padding) if channels[2:] else None
        )
        self.pool3 = self.pool if pool_last else nn.Identity()
        pooled = [True, True, pool_last][: len(channels)]
        rows, columns = (self._length_after(size, pooled, padding) for size in self.image_size)
        if rows < 1 or columns < 1:
            smallest = 1
            while self._length_after(smallest, pooled, padding) < 1:
                smallest += 1
            raise ValueError(
                f"image_size: expected height and width of at least {smallest}, "
                f"got {height}x{width}"
            )
        self.fc1 = nn.Linear(channels[-1] * rows * columns, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    @staticmethod
    def _length_after(length: int, pooled: list[bool], padding: int) -> int:
        """Height or width that is left of `length` after the convolutions and pools."""
        for pool in pooled:
            length += 2 * padding - 2
            length = length // 2 if pool else length
            if length < 1:
                return 0
        return length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.in_channels)
        if x.shape[2:] != self.image_size:
            raise ValueError(
                f"input: expected height and width {self.image_size}, got {tuple(x.shape[2:])}"
            )
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        if self.conv3 is not None:
            x = self.pool3(F.relu(self.conv3(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        return self.fc2(x)

    @classmethod
    def cifar(
        cls, *, image_size: int | tuple[int, int] = 32, in_channels: int = 3, **options: Any
    ) -> SmallCNN:
        """Colour images: convolutions of 32 and 64 channels, each pooled, and 128 features."""
        return cls((32, 64), 128, image_size, in_channels=in_channels, **options)

    @classmethod
    def mnist(
        cls, *, image_size: int | tuple[int, int] = 28, in_channels: int = 1, **options: Any
    ) -> SmallCNN:
        """Digits: 32 pooled, 64 pooled, 64 channels, all without padding, and 64 features."""
        options = {"padding": 0, "pool_last": False, **options}
        return cls((32, 64, 64), 64, image_size, in_channels=in_channels, **options)

    @classmethod
    def deep(
        cls, *, image_size: int | tuple[int, int] = 32, in_channels: int = 3, **options: Any
    ) -> SmallCNN:
        """Colour images: 32, 64 and 128 channels, each pooled, and 128 features."""
        return cls((32, 64, 128), 128, image_size, in_channels=in_channels, **options)


def small_cnn(preset: str, **options: Any) -> SmallCNN:
    """`SmallCNN` of the preset "cifar", "mnist" or "deep"; `options` replace what it sets.

    Raises:
        ValueError: unknown preset, or what `SmallCNN` raises.
    """
    presets = {"cifar": SmallCNN.cifar, "mnist": SmallCNN.mnist, "deep": SmallCNN.deep}
    if not isinstance(preset, str) or preset not in presets:
        raise ValueError(f"preset: expected one of {sorted(presets)}, got {preset!r}")
    return presets[preset](**options)
