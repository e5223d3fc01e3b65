"""What every training run has: epochs, losses, and a state that continues bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import pyops
from pyops.training.checkpoint import CheckpointError, write_checkpoint

OPS = ("fast", "reference")


def check_settings(settings: Any, presets: tuple[str, ...]) -> None:
    """Raise ValueError, naming the setting, unless each is of its default's type and in range."""
    for field in fields(settings):
        name, value = field.name, getattr(settings, field.name)
        default: Any = field.default
        kind: Any = type(default)
        if type(value) is not kind:
            raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
        if name == "seed":  # what torch.Generator takes
            in_range = -(2**63) <= value < 2**64
        else:
            least = 0 if name == "shift" else 1 if kind is int else 1e-30
            in_range = kind is str or least <= value < 2**31
        if not in_range:
            raise ValueError(f"{name}: out of range: {value!r}")
    if settings.preset not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {settings.preset!r}")


class TrainingError(ArithmeticError):
    """A run that cannot go on: its loss or weights are no longer finite."""


class Trainer:
    """One run; `ops` "fast" swaps in this package's ops.

    A subclass fills in `describe`, `steps` and `evaluate`.

    Attributes:
        settings: the task's frozen dataclass; what the run is determined by, besides the machine.
        modules: what is trained, by name. Their initial parameters depend on the seed alone.
        optimizers: by name.
        order: draws the order of the data and whatever else is random in it.
        epoch: epochs done.
        losses: one for each step so far.
    """

    def __init__(
        self,
        settings: Any,
        ops: str,
        modules: dict[str, nn.Module],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if ops not in OPS:
            raise ValueError(f"ops: expected one of {OPS}, got {ops!r}")
        self.settings, self.ops, self.device = settings, ops, torch.device(device)
        self.modules = {name: m.to(self.device, dtype) for name, m in modules.items()}
        if ops == "fast":
            for module in self.modules.values():
                pyops.optimize(module)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.order = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0
        self.losses: list[float] = []

    @property
    def steps_per_epoch(self) -> int:
        raise NotImplementedError

    def describe(self) -> str:
        """The data, in a few words."""
        raise NotImplementedError

    def steps(self) -> Iterator[float]:
        """One epoch, yielding the loss of each step after it is done."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Figures on data held back, by name; a name that ends in "accuracy" is a fraction."""
        raise NotImplementedError

    def sample(self) -> str | None:
        """Something the trained model makes, to look at; None if there is no such thing."""
        return None

    def write_pictures(self, folder: Path) -> list[Path]:
        """Writes what there is to see after this epoch; returns the files."""
        return []

    def train_epoch(self, on_step: Callable[[int, float], None] | None = None) -> list[float]:
        """One epoch; returns the loss of every step.

        What dropout draws depends on the seed and the epoch alone; torch's own state stays as it was.
        on_step: called after each step with the number of steps done and the step's loss.

        Raises:
            TrainingError: the loss or a weight is no longer finite.
        """
        losses: list[float] = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((self.settings.seed * 1_000_003 + self.epoch) % 2**64)
            for loss in self.steps():
                if not math.isfinite(loss):
                    self._diverged(f"in step {len(losses) + 1} the loss is {loss}")
                losses.append(loss)
                if on_step is not None:
                    on_step(len(losses), loss)
        for name, module in self.modules.items():
            if not all(tensor.isfinite().all() for tensor in module.parameters()):
                self._diverged(f"the weights of the {name} are no longer finite")
        self.epoch += 1
        self.losses += losses
        return losses

    def _diverged(self, what: str) -> NoReturn:
        raise TrainingError(
            f"epoch {self.epoch + 1}, {self.ops} ops: {what}; a smaller learning rate than "
            f"{self.settings.learning_rate:g} may help"
        )

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint. If interrupted, a file of that name stays as it was."""
        content: dict[str, Any] = {
            "settings": asdict(self.settings),
            "ops": self.ops,
            "epoch": self.epoch,
            "losses": self.losses,
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "order": self.order.get_state(),
        }
        write_checkpoint(path, content)

    def restore(self, checkpoint: dict[str, Any], name: str = "checkpoint") -> None:
        """Continues where `checkpoint`, as `read_checkpoint` returns it, was written."""
        if checkpoint["settings"] != asdict(self.settings):
            raise CheckpointError(
                f"{name}: is of {checkpoint['settings']}, not of {asdict(self.settings)}"
            )
        try:
            for key, module in self.modules.items():
                module.load_state_dict(checkpoint["modules"][key])
            for key, optimizer in self.optimizers.items():
                optimizer.load_state_dict(checkpoint["optimizers"][key])
                for parameter, state in optimizer.state.items():
                    for value in filter(torch.is_tensor, state.values()):
                        if value.dim() and value.shape != parameter.shape:
                            raise ValueError(f"{key}'s optimizer is of other shapes")
            self.order.set_state(checkpoint["order"])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{name}: does not fit the model: {error}") from error
        self.epoch, self.losses = checkpoint["epoch"], list(checkpoint["losses"])
