"""The small CNNs on handwritten digits: SGD with momentum on cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pyops.data import Dataset, load_digits, randomly_shifted
from pyops.models.cnn import small_cnn
from pyops.training import trainer

PRESETS = ("mnist", "cifar", "deep")
EPOCHS = 16
IMAGE_SIZES = {"mnist": 28, "cifar": 32, "deep": 32}


@dataclass(frozen=True)
class Settings:
    """What a run is determined by, besides the machine it runs on."""

    model: str = "cnn"
    preset: str = "mnist"
    seed: int = 0
    batch_size: int = 32
    learning_rate: float = 0.05
    decay: float = 0.85  # of the learning rate, each epoch
    shift: int = 2  # pixels that training images are randomly moved by, at most


def build_model(settings: Settings) -> nn.Module:
    """The model in plain torch, its parameters determined by the seed alone."""
    channels = 1 if settings.preset == "mnist" else 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return small_cnn(settings.preset, in_channels=channels)


def dataset(settings: Settings) -> Dataset:
    channels = 1 if settings.preset == "mnist" else 3
    return load_digits(IMAGE_SIZES[settings.preset], channels)


class Trainer(trainer.Trainer):
    def __init__(
        self,
        settings: Settings,
        ops: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        data: Dataset | None = None,
    ) -> None:
        super().__init__(settings, ops, {"model": build_model(settings)}, device, dtype)
        self.data = (data or dataset(settings)).to(self.device, dtype)
        self.model = self.modules["model"]
        self.optimizers["model"] = torch.optim.SGD(
            self.model.parameters(), settings.learning_rate, momentum=0.9
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data.train_labels) // self.settings.batch_size)

    def describe(self) -> str:
        train, test = len(self.data.train_labels), len(self.data.test_labels)
        return f"{train} training and {test} test images of real digits"

    def steps(self) -> Iterator[float]:
        self.model.train()
        optimizer = self.optimizers["model"]
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.decay**self.epoch
        order = torch.randperm(len(self.data.train_labels), generator=self.order)
        for chosen in order.to(self.device).split(self.settings.batch_size):
            images = self.data.train_images[chosen]
            logits = self.model(randomly_shifted(images, self.settings.shift, self.order))
            loss = F.cross_entropy(logits, self.data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        batches = self.data.test_images.split(256)
        guesses = torch.cat([self.model(images).argmax(1) for images in batches])
        return {"test accuracy": (guesses == self.data.test_labels).float().mean().item()}
