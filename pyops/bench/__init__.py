"""Problems to check and to measure: one module an op, and what they share."""

from __future__ import annotations

import importlib
from types import ModuleType

# Ops whose module has SETS (name -> cases), DTYPES, CHECKS ((case, part of --quick), ...) and
# problem(case, dtype, device) -> Problem, which raises ValueError for a case it cannot read.
PROBLEM_OPS: tuple[str, ...] = ("attention", "lstm", "conv_transpose_act", "linear_act")


def problem_module(op: str) -> ModuleType:
    return importlib.import_module(f"pyops.bench.{op}")
