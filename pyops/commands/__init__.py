"""Subcommands of `python -m pyops`: each module has `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from pyops import files


class CommandError(Exception):
    """Something the user can put right; printed as one line on stderr, exit code 2."""


def positive_int(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def seed(text: str) -> int:
    """An argparse type: what torch.Generator takes."""
    value = int(text) if text.removeprefix("-").isdecimal() else 2**64
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(
            f"expected an integer of at least -2**63 and below 2**64, got {text!r}"
        )
    return value


def check_writable(option: str, folder: Path) -> None:
    """Refuse an `option` whose folder cannot be written to, before the work whose results go there."""
    try:
        files.check_writable(folder)
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"{option}: cannot write to {folder}: {reason}") from None


def device(text: str) -> torch.device:
    """An argparse type: a torch.device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"no such device: {text} (CUDA devices here: {torch.cuda.device_count()})"
        )
    return found


def dtype(text: str) -> torch.dtype:
    """An argparse type: float32, bfloat16, float16 or float64."""
    names = ("float32", "bfloat16", "float16", "float64")
    if text not in names:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
    found: torch.dtype = getattr(torch, text)
    return found


class Progress:
    """A bar on stderr; shows nothing where stderr is no terminal."""

    WIDTH = 30

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.shown = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        if self.shown:
            filled = self.WIDTH * done // max(self.total, 1)
            bar = "#" * filled + "." * (self.WIDTH - filled)
            sys.stderr.write(f"\r\033[K{self.label} [{bar}] {done}/{self.total} {note}")
            sys.stderr.flush()

    def loss(self, done: int, loss: float) -> None:
        self.update(done, f"loss {loss:.4f}")

    def close(self) -> None:
        if self.shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
