"""Argument checks shared by the models."""

import torch


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless `value`, the argument called `name`, is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_size(name: str, value: object) -> tuple[int, int]:
    """A positive integer or a pair of them, height and width, as a pair; ValueError for all else."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in pair):
        raise ValueError(f"{name}: expected a positive integer or a pair of them, got {value!r}")
    return pair[0], pair[1]


def check_images(input: torch.Tensor, in_channels: int, smallest: int = 1) -> None:
    """Raise ValueError unless `input` is (batch, in_channels, height, width) and large enough.

    `smallest` is the least height and width, in pixels, that the architecture does not shrink to
    nothing.
    """
    if input.dim() != 4 or input.shape[1] != in_channels:
        raise ValueError(
            f"input: expected shape (batch, {in_channels}, height, width), got {tuple(input.shape)}"
        )
    if input.shape[2] < smallest or input.shape[3] < smallest:
        raise ValueError(
            f"input: expected height and width of at least {smallest}, "
            f"got {input.shape[2]}x{input.shape[3]}"
        )
