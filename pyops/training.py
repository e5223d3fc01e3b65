"""Training a model on real data, with checkpoints that continue bit for bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import pyops
from pyops.data import Dataset, load_digits, randomly_shifted
from pyops.models.cnn import small_cnn

OPS = ("fast", "reference")
PRESETS = ("mnist", "cifar", "deep")
IMAGE_SIZES = {"mnist": 28, "cifar": 32, "deep": 32}
FORMAT = "pyops training checkpoint"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not belong to what it was given for."""


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
    if settings.model != "cnn":
        raise ValueError(f"model: expected 'cnn', got {settings.model!r}")
    channels = 1 if settings.preset == "mnist" else 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return small_cnn(settings.preset, in_channels=channels)


def dataset(settings: Settings) -> Dataset:
    channels = 1 if settings.preset == "mnist" else 3
    return load_digits(IMAGE_SIZES[settings.preset], channels)


class Trainer:
    """SGD with momentum on cross-entropy; `ops` "fast" swaps in this package's ops."""

    def __init__(
        self,
        settings: Settings,
        ops: str,
        data: Dataset,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if ops not in OPS:
            raise ValueError(f"ops: expected one of {OPS}, got {ops!r}")
        self.settings, self.ops, self.device = settings, ops, torch.device(device)
        self.data = data.to(self.device, dtype)
        self.model = build_model(settings).to(self.device, dtype)
        if ops == "fast":
            pyops.optimize(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), settings.learning_rate, momentum=0.9
        )
        # Its own generator, so that nothing else that draws numbers changes order and shifts.
        self.order = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0
        self.losses: list[float] = []  # one for each step so far

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data.train_labels) // self.settings.batch_size)

    def steps(self) -> Iterator[float]:
        """One pass over the training images, yielding the loss of each step after it is done."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.decay**self.epoch
        order = torch.randperm(len(self.data.train_labels), generator=self.order)
        for chosen in order.to(self.device).split(self.settings.batch_size):
            images = self.data.train_images[chosen]
            logits = self.model(randomly_shifted(images, self.settings.shift, self.order))
            loss = F.cross_entropy(logits, self.data.train_labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()

    def train_epoch(self, on_step: Callable[[int, float], None] | None = None) -> list[float]:
        """One epoch; returns the loss of every step.

        on_step: called after each step with the number of steps done and the step's loss.
        """
        losses = []
        for loss in self.steps():
            losses.append(loss)
            if on_step is not None:
                on_step(len(losses), loss)
        self.epoch += 1
        self.losses += losses
        return losses

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """Fraction of the test images that are classified right."""
        self.model.eval()
        batches = self.data.test_images.split(256)
        guesses = torch.cat([self.model(images).argmax(1) for images in batches])
        return (guesses == self.data.test_labels).float().mean().item()

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint. If interrupted, a file of that name stays as it was."""
        state: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "ops": self.ops,
            "epoch": self.epoch,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "torch_rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def restore(self, checkpoint: dict[str, Any], name: str = "checkpoint") -> None:
        """Continues where `checkpoint`, as `read_checkpoint` returns it, was written."""
        theirs = Settings(**checkpoint["settings"])
        if theirs != self.settings:
            raise CheckpointError(f"{name}: is of {theirs}, not of {self.settings}")
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.order.set_state(checkpoint["order"])
            torch.set_rng_state(checkpoint["torch_rng"])
            if self.device.type == "cuda" and "cuda_rng" in checkpoint:
                torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.device)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{name}: does not fit the model: {error}") from error
        self.epoch, self.losses = checkpoint["epoch"], list(checkpoint["losses"])


_CONTENT = {
    "settings": dict,
    "ops": str,
    "epoch": int,
    "losses": list,
    "model": dict,
    "optimizer": dict,
    "order": torch.Tensor,
    "torch_rng": torch.Tensor,
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what `Trainer.save` wrote, running no code from the file.

    Raises:
        CheckpointError: there is no such file, or it is cut off, damaged or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises a different type for every kind of damage
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint; it may be cut off or damaged ({reason})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of pyops training")
    if state.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint version {FORMAT_VERSION}, got {state.get('version')}"
        )
    for key, kind in _CONTENT.items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(f"{path}: damaged: {key!r} is missing or of the wrong type")
    try:
        Settings(**state["settings"])
    except TypeError as error:
        raise CheckpointError(f"{path}: damaged: settings: {error}") from None
    return state
