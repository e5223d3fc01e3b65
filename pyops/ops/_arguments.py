"""Checks of Python arguments, with messages that name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least `least`, as a pair."""
    both = (value, value) if isinstance(value, (int, torch.SymInt)) else value
    is_pair = (
        isinstance(both, (tuple, list))
        and len(both) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) for v in both)
    )
    if isinstance(both, (tuple, list)) and len(both) == 1 and isinstance(both[0], int):
        both, is_pair = (both[0], both[0]), True
    if not is_pair or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if min(both) < least or max(both) >= 2**31:
        raise ValueError(f"{name}: expected at least {least} and below 2**31, got {value!r}")
    return (both[0], both[1])


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def floating_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected dtype float32, bfloat16, float16 or float64, got {value.dtype}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided (dense) tensor, got layout {value.layout}")


def like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`value` must have the dtype and device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected {other_name}'s device {other.device}, got {value.device}"
        )
