"""The error budget: how tests, `pyops check` and benchmarks decide whether a result is right.

A result is right if it is no further from a float64 computation than ``k`` times what plain torch is in the
same dtype (eager, contiguous), plus the rounding of a result of that size. The ratio itself is
returned: near or below 1 is what a good kernel has.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT_BUDGET = 2.0
GRADIENT_BUDGET = 3.0


def error_ratio(out: Tensor, lowp: Tensor, ref64: Tensor) -> float:
    """Largest error of ``out`` over that of ``lowp``, both against ``ref64``, beyond rounding.

    Args:
        out: the result in question; lowp: plain torch's in the same dtype; ref64: the same in
            float64. All of one shape.

    Returns:
        The ratio over finite elements; 0.0 where both are exact to rounding, inf where NaNs or
        infinities stand in other places than in ``lowp``.
    """
    if out.shape != lowp.shape or out.shape != ref64.shape:
        raise AssertionError(
            f"shapes differ: out {tuple(out.shape)}, torch {tuple(lowp.shape)}, "
            f"float64 {tuple(ref64.shape)}"
        )
    if out.numel() == 0:
        return 0.0
    device = out.device  # comparing large results there is much faster than copying them
    out, lowp, ref64 = (t.detach().to(device, torch.float64) for t in (out, lowp, ref64))
    same_nan = torch.equal(out.isnan(), lowp.isnan())
    same_inf = torch.equal(out.isinf(), lowp.isinf()) and torch.equal(
        out[out.isinf()], lowp[lowp.isinf()]
    )
    if not (same_nan and same_inf):
        return float("inf")
    finite = out.isfinite() & ref64.isfinite()
    if not finite.any():
        return 0.0
    error = (out - ref64)[finite].abs().max().item()
    allowed = (lowp - ref64)[finite].abs().max().item()
    if error == 0.0:
        return 0.0
    return error / allowed if allowed > 0 else float("inf")


def rounding(lowp: Tensor, ref64: Tensor) -> float:
    """One rounding of the largest finite value, in the dtype of ``lowp``."""
    finite = ref64[ref64.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return largest * torch.finfo(lowp.dtype).eps


def within_budget(out: Tensor, lowp: Tensor, ref64: Tensor, k: float = OUTPUT_BUDGET) -> bool:
    """Whether max|out - ref64| <= k * max|lowp - ref64| + rounding, NaN and inf in the same places."""
    ratio = error_ratio(out, lowp, ref64)
    if ratio <= k:
        return True
    if not torch.equal(out.isfinite().cpu(), lowp.isfinite().cpu()):
        return False
    finite = out.isfinite().cpu() & ref64.isfinite().cpu()
    out64, lowp64, ref = (t.detach().double().cpu()[finite] for t in (out, lowp, ref64))
    error = (out64 - ref).abs().max().item()
    return error <= k * (lowp64 - ref).abs().max().item() + rounding(lowp, ref)


def assert_within_budget(
    out: Tensor, lowp: Tensor, ref64: Tensor, k: float = OUTPUT_BUDGET, name: str = "result"
) -> float:
    """Assert :func:`within_budget`; returns the error ratio."""
    if out.dtype != lowp.dtype:
        raise AssertionError(f"{name}: dtype {out.dtype}, expected {lowp.dtype}")
    ratio = error_ratio(out, lowp, ref64)
    if not within_budget(out, lowp, ref64, k):
        if not torch.equal(out.isfinite().cpu(), lowp.isfinite().cpu()):
            raise AssertionError(f"{name}: NaN or inf in other places than plain torch has them")
        worst = (out.detach().double().cpu() - ref64.cpu()).abs()
        raise AssertionError(
            f"{name}: error {worst.max().item():.3g} is {ratio:.2f} times plain torch's, budget {k} "
            f"(shape {tuple(out.shape)}, {out.dtype})"
        )
    return ratio
