"""Training models on real data, with this package's ops or plain torch.

One module a model: each has `PRESETS`, `EPOCHS` (the default), `Settings` (a frozen dataclass) and `Trainer`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from pyops.training.checkpoint import CheckpointError, read_checkpoint
from pyops.training.trainer import OPS, Trainer, TrainingError, check_settings

MODELS = ("cnn", "lstm", "transformer", "gan")

__all__ = [
    "MODELS",
    "OPS",
    "CheckpointError",
    "Trainer",
    "TrainingError",
    "check_settings",
    "read_checkpoint",
    "task",
]


def task(model: str) -> ModuleType:
    """The module that trains `model`, one of MODELS."""
    if model not in MODELS:
        raise ValueError(f"model: expected one of {MODELS}, got {model!r}")
    return importlib.import_module(f"pyops.training.{model}")
