"""`python -m pyops check`: every op and model against its reference, over a grid."""

from __future__ import annotations

import argparse
import functools
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import pyops
from pyops import backends
from pyops.bench import PROBLEM_OPS, problem, problem_module, shapes
from pyops.bench.agreement import Agreement, Verdict, make_inputs, worst
from pyops.bench.conv_relu_pool import LAYOUTS
from pyops.bench.models import MODELS, ModelAgreement, build
from pyops.bench.report import first_line, table
from pyops.commands import device

HELP = "compare every op and model with its reference, numerically"
DESCRIPTION = """\
Compares outputs and gradients of every op, in each backend that can run here, and of every model
with the ops swapped in, with float64. The error is given as a multiple of the error that plain
torch makes in the same dtype and NCHW; the budget is 2 for outputs and 3 for gradients. Backend
"reference" is plain torch, shown for comparison; its own errors in channels_last fail no check, nor
do they where automatic choice takes it.
"""

# (notation of pyops.bench.shapes, part of --quick)
GRID = (
    ("2x3x20->16:p1", True),
    ("2x32x17->48:p1", True),
    ("2x1x15->8", True),
    ("1x20x9x14->18:k5,p2,max3s2p1", True),
    ("2x16x11->24:k1", True),
    ("3x12x13->20:s2,p1,avg2", True),
    ("2x8x12->12:p1,g4,leaky,nopool", True),
    ("2x64x16->64:p1", False),
    ("1x160x10->96:p1", False),
    ("2x33x19x23->31:p1", False),
    ("1x512x6->64:p1", False),
    ("2x24x18->24:p1,g24", False),
    ("2x10x21->14:p2,d2", False),
    ("1x3x67->32:k11,s4,p2,max3s2", False),
    ("1x3x46->32:k7,s2,p3,max3s2p1", False),
    ("2x9x16->10:k1x7,avg3s2p1", False),
    ("2x16x14->16:p1,noact", False),
    ("4x16x2->16:p1", False),
)
QUICK_MODELS = ("cnn mnist", "cnn cifar", "alexnet", "resnet18")
GRADIENTS_OF = ("cnn mnist", "cnn cifar", "cnn deep", "cnn cifar, avg pool")


@dataclass
class Result:
    """One comparison: ratios to plain torch's error, or the reason why there is none."""

    what: str
    case: str
    dtype: str
    layout: str
    backend: str
    output: float = 0.0
    gradient: float = 0.0
    status: str = "ok"  # ok, FAILED, refused, or torch: plain torch compared with itself
    reason: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a part of the grid, in seconds")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--verbose", action="store_true", help="print every case, not the worst")
    parser.add_argument(
        "--only", choices=("ops", "models"), help="check ops or models only (default: both)"
    )


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    results: list[Result] = []
    if args.only != "models":
        results += check_ops(args.device, args.quick)
        for op in PROBLEM_OPS:
            results += check_problems(op, args.device, args.quick)
    if args.only != "ops":
        results += check_models(args.device, args.quick)
    excuse_plain_torch(results)
    print(render(results, args.verbose))
    failed = [r for r in results if r.status == "FAILED"]
    for r in failed:
        detail = r.reason or f"output {r.output:.2f}, gradients {r.gradient:.2f}"
        print(f"FAILED: {r.what}, {r.case}, {r.dtype}, {r.layout}, backend {r.backend}: {detail}")
    seconds = time.perf_counter() - start
    passed, refused = (sum(r.status == s for r in results) for s in ("ok", "refused"))
    print(
        f"{passed} of {passed + len(failed)} comparisons within budget, {refused} not supported "
        f"by the backend asked for, {seconds:.1f} s"
    )
    return 1 if failed else 0


def excuse_plain_torch(results: list[Result]) -> None:
    """Where automatic choice took plain torch it has plain torch's errors, to the last digit."""
    plain = {
        (r.what, r.case, r.dtype, r.layout): (r.output, r.gradient)
        for r in results
        if r.backend == "reference" and r.status == "torch"
    }
    for r in results:
        if r.backend == "auto" and r.status == "FAILED":
            found = plain.get((r.what, r.case, r.dtype, r.layout))
            if found == (r.output, r.gradient):
                r.status = "torch"


def check_ops(place: torch.device, quick: bool) -> list[Result]:
    """conv_relu_pool2d over the grid: dtypes, layouts, and backends that can run here."""
    op = "conv_relu_pool2d"
    usable = [n for n in backends.NAMES if backends.why_not(op, n, place.type) is None]
    results = []
    for notation, in_quick in GRID:
        if quick and not in_quick:
            continue
        shape = shapes.parse(notation)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            reference = Agreement(shape, make_inputs(shape, dtype, place), backward=True)
            for layout, memory_format in LAYOUTS.items():
                for backend in (None, *usable):
                    name = str(dtype).removeprefix("torch.")
                    result = Result(op, notation, name, layout, backend or "auto")
                    try:
                        call = functools.partial(
                            pyops.conv_relu_pool2d, backend=backend, **shape.op_arguments
                        )
                        _note(result, reference.verdicts(call, memory_format))
                    except Exception as error:
                        _note_error(result, error)
                    results.append(result)
    return results


def check_problems(op: str, place: torch.device, quick: bool) -> list[Result]:
    """An op over its module's grid: dtypes, and backends that can run here."""
    module = problem_module(op)
    results = []
    for case, in_quick in module.CHECKS:
        if quick and not in_quick:
            continue
        for dtype in module.DTYPES:
            one = module.problem(case, dtype, place)
            agreement = problem.Agreement(one, backward=bool(one.differentiable))
            usable = [n for n in backends.NAMES if backends.why_not(one.op, n, place.type) is None]
            if backends.interpreting():  # minutes a case; tests/triton checks what it can show
                usable = [n for n in usable if n != "triton"]
            for backend in (None, *usable):
                name = str(dtype).removeprefix("torch.")
                result = Result(one.op, case, name, "-", backend or "auto")
                try:
                    _note(result, agreement.verdicts(functools.partial(one.ours, backend=backend)))
                except Exception as error:
                    _note_error(result, error)
                results.append(result)
    return results


def check_models(place: torch.device, quick: bool) -> list[Result]:
    """Each model with the ops swapped in: logits, and for the small ones loss and gradients."""
    results = []
    for name in QUICK_MODELS if quick else MODELS:
        case, trains = MODELS[name], name in GRADIENTS_OF
        batches: list[tuple[Tensor, Tensor | None]] = []
        for seed in range(3 if trains else 1):
            images = case.images(2, case.small, seed).to(place)
            labels = torch.arange(2, device=place) % case.classes
            batches.append((images, labels if trains else None))
        size = "x".join(map(str, batches[0][0].shape))
        result = Result(f"model {name}", size, "float32", "nchw", "auto")
        try:
            pair = ModelAgreement(build(name).to(place))
            _note(result, pair.verdicts(batches))
            result.case += f", {len(pair.report.replaced)} swapped"
        except Exception as error:
            _note_error(result, error)
        results.append(result)
    return results


def _note(result: Result, verdicts: dict[str, Verdict]) -> None:
    gradients = [v for name, v in verdicts.items() if name.startswith("grad")]
    outputs = [v for name, v in verdicts.items() if not name.startswith("grad")]
    result.output = worst(outputs).ratio
    result.gradient = worst(gradients).ratio if gradients else math.nan
    if result.backend == "reference":
        result.status = "torch"
    else:
        result.status = "ok" if worst(outputs + gradients).passed else "FAILED"


def _note_error(result: Result, error: Exception) -> None:
    # An explicit backend may refuse what it does not support; automatic choice may not.
    explicit = result.backend not in ("auto", "reference")
    result.status = "refused" if explicit and problem.is_refusal(error) else "FAILED"
    result.output = result.gradient = math.nan
    result.reason = first_line(error)


def render(results: list[Result], verbose: bool) -> str:
    """A line for every case, or for all cases of an op, dtype, layout and backend together."""
    headers = ["what", "dtype", "layout", "backend", "cases", "output /2", "gradients /3"]
    headers += ["worst case" if not verbose else "case", "result"]
    groups: dict[tuple, list[Result]] = {}
    for index, r in enumerate(results):
        key = (r.what, r.dtype, r.layout, r.backend, index if verbose else 0)
        groups.setdefault(key, []).append(r)
    lines = []
    for (what, dtype, layout, backend, _), group in groups.items():
        done = [r for r in group if not math.isnan(r.output)]
        worst = max(done or group, key=lambda r: (r.status == "FAILED", r.output))
        gradients = [r.gradient for r in done if not math.isnan(r.gradient)]
        statuses = {r.status for r in group}
        status = next(s for s in ("FAILED", "ok", "torch", "refused") if s in statuses)
        lines.append(
            [
                what,
                dtype,
                layout,
                backend,
                f"{len(done)} of {len(group)}",
                f"{max(r.output for r in done):.2f}" if done else "-",
                f"{max(gradients):.2f}" if gradients else "-",
                worst.case,
                status,
            ]
        )
    return table(headers, lines)
