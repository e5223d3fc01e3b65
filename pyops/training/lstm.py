"""LSTM classifiers: of handwritten digits read row by row, and of docstrings by their library."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.data import load_digits, randomly_shifted
from pyops.models.lstm import LSTMClassifier, TextClassifier
from pyops.text import LIBRARIES, load_docstrings
from pyops.training import trainer

PRESETS = ("digits", "text")
EPOCHS = 16


@dataclass(frozen=True)
class Settings:
    """What a run is determined by, besides the machine it runs on."""

    model: str = "lstm"
    preset: str = "digits"
    seed: int = 0
    batch_size: int = 32
    learning_rate: float = 0.004
    hidden_size: int = 128
    num_layers: int = 2  # digits only
    decay: float = 0.85  # of the learning rate, each epoch
    shift: int = 2  # pixels that training images are randomly moved by, at most


@functools.cache
def _docstrings():  # type: ignore[no-untyped-def]  # TextDataset, as load_docstrings says
    return load_docstrings()


class Trainer(trainer.Trainer):
    """Adam on cross-entropy."""

    def __init__(
        self,
        settings: Settings,
        ops: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.of_text = settings.preset == "text"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model: nn.Module
            if self.of_text:
                self.texts = _docstrings()
                model = TextClassifier(
                    self.texts.vocabulary, 64, settings.hidden_size, len(LIBRARIES), softmax=False
                )
            else:
                model = LSTMClassifier(28, settings.hidden_size, settings.num_layers, 10)
        super().__init__(settings, ops, {"model": model}, device, dtype)
        if not self.of_text:
            self.digits = load_digits(28).to(self.device, dtype)
        self.model = self.modules["model"]
        self.optimizers["model"] = torch.optim.Adam(self.model.parameters(), settings.learning_rate)

    @property
    def _train_labels(self) -> Tensor:
        labels = self.texts.train_labels if self.of_text else self.digits.train_labels
        return labels

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._train_labels) // self.settings.batch_size)

    def describe(self) -> str:
        if self.of_text:
            train, test = len(self.texts.train_labels), len(self.texts.test_labels)
            return f"{train} training and {test} test docstrings of {', '.join(LIBRARIES)}"
        train, test = len(self.digits.train_labels), len(self.digits.test_labels)
        return f"{train} training and {test} test images of real digits, read row by row"

    def logits(self, chosen: Tensor, train: bool) -> Tensor:
        """Of the chosen examples; training images are moved at random."""
        if self.of_text:
            part = "train" if train else "test"
            tokens = getattr(self.texts, f"{part}_tokens")[chosen].to(self.device)
            scores: Tensor = self.model(tokens, getattr(self.texts, f"{part}_lengths")[chosen])
            return scores
        images = (self.digits.train_images if train else self.digits.test_images)[chosen]
        if train:
            images = randomly_shifted(images, self.settings.shift, self.order)
        scores = self.model(images[:, 0])
        return scores

    def steps(self) -> Iterator[float]:
        self.model.train()
        optimizer = self.optimizers["model"]
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.decay**self.epoch
        labels = self._train_labels.to(self.device)
        order = torch.randperm(len(labels), generator=self.order)
        for chosen in order.split(self.settings.batch_size):
            loss = F.cross_entropy(self.logits(chosen, train=True), labels[chosen.to(self.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        labels = self.texts.test_labels if self.of_text else self.digits.test_labels.cpu()
        every = torch.arange(len(labels)).split(256)
        guesses = torch.cat([self.logits(chosen, train=False).argmax(1).cpu() for chosen in every])
        return {"test accuracy": (guesses == labels).float().mean().item()}
