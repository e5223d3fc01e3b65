"""Checkpoints of a training run: written whole or not at all, refused when damaged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pyops.files import replacing

FORMAT = "pyops training checkpoint"
FORMAT_VERSION = 2
_CONTENT = {
    "settings": dict,
    "ops": str,
    "epoch": int,
    "losses": list,
    "modules": dict,
    "optimizers": dict,
    "order": torch.Tensor,
}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not belong to what it was given for."""


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes `content`. If interrupted, a file of that name stays as it was."""
    with replacing(Path(path)) as file:
        torch.save({"format": FORMAT, "version": FORMAT_VERSION, **content}, file)


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
    for key in ("modules", "optimizers"):
        if not all(isinstance(value, dict) for value in state[key].values()):
            raise CheckpointError(f"{path}: damaged: {key!r} holds something that is no state")
    if isinstance(state["epoch"], bool) or state["epoch"] < 0:
        raise CheckpointError(f"{path}: damaged: 'epoch' is {state['epoch']}")
    if not all(isinstance(loss, float) and math.isfinite(loss) for loss in state["losses"]):
        raise CheckpointError(f"{path}: damaged: 'losses' holds something that is no loss")
    return state
