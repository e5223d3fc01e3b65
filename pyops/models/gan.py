"""Generative adversarial networks in plain torch.nn: a dense pair and a DCGAN pair.

Generators map noise (batch, latent_dim) to images in [-1, 1]; discriminators map images to the
probability (batch, 1) that they are real, `logits` to what comes before the sigmoid. With
`num_classes` both take labels (batch,), int64, as well.

Sources: Goodfellow et al., "Generative Adversarial Networks", 2014; Radford et al., "Unsupervised
Representation Learning with Deep Convolutional GANs", 2016; labels by projection: Miyato and Koyama, 2018.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.models.checks import check_count, check_images

__all__ = ["DCGANDiscriminator", "DCGANGenerator", "DenseDiscriminator", "DenseGenerator"]

IMAGE_SIZES = (28, 64)


class _Generator(nn.Module):
    """Noise, with the label's one-hot vector behind it, through `layers`."""

    layers: nn.Sequential

    def __init__(self, latent_dim: int, num_classes: int | None) -> None:
        super().__init__()
        check_count("latent_dim", latent_dim)
        if num_classes is not None:
            check_count("num_classes", num_classes)
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.code_size = latent_dim + (num_classes or 0)

    def code(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        if noise.dim() != 2 or noise.shape[1] != self.latent_dim:
            raise ValueError(
                f"noise: expected shape (batch, {self.latent_dim}), got {tuple(noise.shape)}"
            )
        _check_labels(labels, self.num_classes, noise.shape[0])
        if labels is None or self.num_classes is None:
            return noise
        return torch.cat([noise, F.one_hot(labels, self.num_classes).to(noise.dtype)], 1)


class _Discriminator(nn.Module):
    """Features through `score`; a label adds the inner product with its embedding."""

    def __init__(self, num_features: int, num_classes: int | None) -> None:
        super().__init__()
        if num_classes is not None:
            check_count("num_classes", num_classes)
        self.num_classes = num_classes
        self.score = nn.Linear(num_features, 1)
        if num_classes is not None:
            self.embedding = nn.Embedding(num_classes, num_features)

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def logits(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, 1): what `forward` puts through the sigmoid."""
        _check_labels(labels, self.num_classes, images.shape[0])
        features = self.features(images)
        score: Tensor = self.score(features)
        if labels is not None:
            score = score + (self.embedding(labels) * features).sum(1, keepdim=True)
        return score

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.sigmoid(self.logits(images, labels))


class DenseGenerator(_Generator):
    """One hidden layer with dropout, then tanh: (batch, latent_dim) to (batch, 1, size, size).

    Args:
        latent_dim: width of the noise; hidden: of the hidden layer; dropout: probability.
        image_size: height and width of the images, in pixels.
        num_classes: with it, labels are wanted.
    """

    def __init__(
        self,
        latent_dim: int = 100,
        hidden: int = 128,
        dropout: float = 0.5,
        image_size: int = 28,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(latent_dim, num_classes)
        check_count("hidden", hidden)
        check_count("image_size", image_size)
        self.image_size = image_size
        self.layers = nn.Sequential(
            nn.Linear(self.code_size, hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(hidden, image_size**2),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        size = self.image_size
        images: Tensor = self.layers(self.code(noise, labels))
        return images.view(-1, 1, size, size)


class DenseDiscriminator(_Discriminator):
    """One hidden layer with dropout, then a sigmoid; arguments as for :class:`DenseGenerator`."""

    def __init__(
        self,
        hidden: int = 128,
        dropout: float = 0.5,
        image_size: int = 28,
        num_classes: int | None = None,
    ) -> None:
        check_count("hidden", hidden)
        check_count("image_size", image_size)
        super().__init__(hidden, num_classes)
        self.image_size = image_size
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(image_size**2, hidden), nn.LeakyReLU(0.2), nn.Dropout(dropout)
        )

    def features(self, images: Tensor) -> Tensor:
        _check_size(images, 1, self.image_size)
        features: Tensor = self.layers(images)
        return features


class DCGANGenerator(_Generator):
    """Transposed convolutions with batch norm and ReLU, tanh at the end.

    Args:
        image_size: 28 (grown 1, 7, 14, 28) or 64 (1, 4, 8, 16, 32, 64), in pixels.
        latent_dim: width of the noise.
        width: channels before the last layer; each layer before it has twice as many.
        channels: of the images.
        num_classes: with it, labels are wanted.
    """

    def __init__(
        self,
        image_size: int = 28,
        latent_dim: int = 100,
        width: int = 64,
        channels: int = 1,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(latent_dim, num_classes)
        _check_image_size(image_size)
        check_count("width", width)
        check_count("channels", channels)
        first, doublings = (7, 2) if image_size == 28 else (4, 4)
        layers: list[nn.Module] = []
        before = self.code_size
        for step in range(doublings):
            out = width << (doublings - 1 - step)
            kernel, stride, padding = (first, 1, 0) if step == 0 else (4, 2, 1)
            layers += [
                nn.ConvTranspose2d(before, out, kernel, stride, padding, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            before = out
        layers += [nn.ConvTranspose2d(before, channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.layers(self.code(noise, labels)[:, :, None, None])
        return images


class DCGANDiscriminator(_Discriminator):
    """Strided convolutions with LeakyReLU; arguments as for :class:`DCGANGenerator`."""

    def __init__(
        self,
        image_size: int = 28,
        width: int = 64,
        channels: int = 1,
        num_classes: int | None = None,
    ) -> None:
        _check_image_size(image_size)
        check_count("width", width)
        check_count("channels", channels)
        last, halvings = (7, 2) if image_size == 28 else (4, 4)
        super().__init__((width << (halvings - 1)) * last**2, num_classes)
        self.image_size, self.channels = image_size, channels
        layers: list[nn.Module] = []
        before = channels
        for step in range(halvings):
            layers += [nn.Conv2d(before, width << step, 4, 2, 1), nn.LeakyReLU(0.2)]
            before = width << step
        self.layers = nn.Sequential(*layers)

    def features(self, images: Tensor) -> Tensor:
        _check_size(images, self.channels, self.image_size)
        features: Tensor = self.layers(images)
        return features.flatten(1)


def _check_image_size(size: int) -> None:
    if size not in IMAGE_SIZES:
        raise ValueError(f"image_size: expected 28 or 64, got {size!r}")


def _check_size(images: Tensor, channels: int, size: int) -> None:
    check_images(images, channels)
    if tuple(images.shape[2:]) != (size, size):
        raise ValueError(
            f"input: expected images of {size}x{size}, got {images.shape[2]}x{images.shape[3]}"
        )


def _check_labels(labels: Tensor | None, num_classes: int | None, batch: int) -> None:
    if (labels is None) != (num_classes is None):
        wanted = "none" if num_classes is None else f"classes below {num_classes}"
        raise ValueError(f"labels: expected {wanted}, got {'none' if labels is None else 'some'}")
    if labels is not None and (labels.dtype != torch.int64 or tuple(labels.shape) != (batch,)):
        raise ValueError(
            f"labels: expected int64 of shape ({batch},), got {labels.dtype} {tuple(labels.shape)}"
        )
