"""Checks of Python arguments, with messages that name the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch

from .. import backends

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def integer(name: str, value: Any) -> Any:
    """An int, or what stands for one, such as NumPy's integers; no bool and no tensor, whose value may change."""
    if isinstance(value, torch.SymInt) or type(value) is int:
        return value
    try:
        if isinstance(value, (bool, torch.Tensor)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least `least`, as a pair."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    try:
        first, last = integer(name, both[0]), integer(name, both[-1])
        if len(both) > 2:
            raise TypeError
    except (IndexError, TypeError):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}") from None
    if min(first, last) < least or max(first, last) >= 2**31:
        raise ValueError(f"{name}: expected at least {least} and below 2**31, got {value!r}")
    return first, last


def number(name: str, value: Any) -> float:
    """A real number, NumPy's as well; no bool."""
    if isinstance(value, bool) or not isinstance(
        value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
    ):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name}: expected a number that a float can hold, got {value!r}"
        ) from None


def slope(name: str, value: Any, dtype: torch.dtype) -> float:
    """A factor for tensors of `dtype`, which kernels hold in float32 unless that is float64."""
    found = number(name, value)
    largest = torch.finfo(torch.float32).max
    if dtype != torch.float64 and largest < abs(found) < math.inf:
        raise ValueError(f"{name}: expected at most {largest} in size for {dtype}, got {value!r}")
    return found


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def backend(value: Any) -> None:
    """None or the name of a backend, there or not."""
    if value is not None:
        one_of("backend", value, backends.NAMES)


def facts_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Everything of a tensor that checks and choices depend on; AttributeError where it is something else."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def facts(tensors: tuple[Any, ...], required: int) -> tuple[Any, ...]:
    """The facts of each; only those after the first `required` may be None."""
    return tuple(
        None if t is None and i >= required else facts_of(t) for i, t in enumerate(tensors)
    )


def floating_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a strided (dense) tensor, got a nested one")
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
