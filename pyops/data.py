"""Real data for training: scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Dataset:
    """Images (count, channels, height, width), float32 in [0, 1]; labels (count,), int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Dataset:
        """The same with the images in `dtype`, all on `device`."""
        return Dataset(
            self.train_images.to(device, dtype),
            self.train_labels.to(device),
            self.test_images.to(device, dtype),
            self.test_labels.to(device),
        )


def load_digits(image_size: int = 28, channels: int = 1) -> Dataset:
    """The 1797 digits bundled with scikit-learn, 8x8 enlarged bilinearly to `image_size`.

    The split into 80% for training and 20% for testing holds the same share of every digit in
    both, and is always the same. `channels` repeats the grey image.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)
    images = F.interpolate(images, size=image_size, mode="bilinear", align_corners=False)
    images = images.expand(-1, channels, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    train, test = model_selection.train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, stratify=digits.target, random_state=0
    )
    return Dataset(images[train], labels[train], images[test], labels[test])


def randomly_shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels each way, zeros coming in at the edges.

    images: (count, channels, height, width), any dtype and device; generator: on the CPU.
    """
    count, _, height, width = images.shape
    down, right = (
        torch.randint(2 * most + 1, (count, 1), generator=generator).to(images.device)
        for _ in range(2)
    )
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    each = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (most,) * 4).permute(0, 2, 3, 1)
    moved = padded[each, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()
