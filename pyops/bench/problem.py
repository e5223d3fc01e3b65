"""One call of an op on given inputs: compared with float64, timed against plain torch.

Each op's `pyops/bench/<op>.py` makes problems; checking, timing and rows are the same for all of them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyops import backends
from pyops.bench import harness
from pyops.bench.agreement import Verdict, judge, worst
from pyops.bench.report import Row, finite, first_line
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET

DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Problem:
    """What to call and with what.

    Attributes:
        op: its name in `pyops.backends.OPS`.
        case: shape and options in words or notation; with op and dtype it names a row.
        inputs: tensors by name; all in the dtype and on the device in question.
        ours: takes `inputs` as keyword arguments and `backend`; returns a tensor or several.
        plain: the same in plain torch: the accuracy reference and, in float64, what is right.
        baselines: further functions to be timed, by name ("sdpa", ...); `plain` is timed as "eager".
        compiled_baselines: those that are torch.compile's.
        wide: replaces `plain` for float64 inputs, where torch has no such thing.
        leaves: names of inputs with gradients; default: all floating-point ones.
        flops: operations of the forward; backward_flops: of the backward.
        nbytes: bytes that the forward must move; backward_nbytes: the backward.
        compiled: whether `plain` through torch.compile is a baseline.
    """

    op: str
    case: str
    inputs: Mapping[str, Tensor]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    compiled_baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    wide: Callable[..., Any] | None = None
    leaves: tuple[str, ...] | None = None
    flops: float = 0.0
    nbytes: float = 0.0
    backward_flops: float = 0.0
    backward_nbytes: float = 0.0
    compiled: bool = True

    @property
    def differentiable(self) -> tuple[str, ...]:
        if self.leaves is not None:
            return self.leaves
        return tuple(n for n, t in self.inputs.items() if t.is_floating_point())

    @property
    def some(self) -> Tensor:
        """An input that has the dtype and the device of the problem."""
        return next(t for t in self.inputs.values() if t.is_floating_point())

    def bind(self, fn: Callable[..., Any], backward: bool) -> Callable[[], Any]:
        """A call without arguments: the forward, or with it the gradients of all leaves."""
        if not backward:

            def forward() -> Any:
                with torch.no_grad():
                    return fn(**self.inputs)

            return forward
        inputs, leaves = self._with_leaves(self.inputs)
        grads = _like(_tensors(fn(**inputs)))

        def forward_backward() -> Any:
            return torch.autograd.grad(_tensors(fn(**inputs)), leaves, grads)

        return forward_backward

    def outcome(
        self, fn: Callable[..., Any], inputs: Mapping[str, Tensor], backward: bool
    ) -> dict[str, Tensor]:
        """Results by name: "output" or "output 0", ...; with `backward` "grad_<name>"."""
        if not backward:
            with torch.no_grad():
                return _named(_tensors(fn(**inputs)))
        inputs, leaves = self._with_leaves(inputs)
        outputs = _tensors(fn(**inputs))
        grads = torch.autograd.grad(outputs, leaves, _like(outputs), allow_unused=True)
        found = _named([t.detach() for t in outputs])
        for name, leaf, grad in zip(self.differentiable, leaves, grads, strict=True):
            found[f"grad_{name}"] = torch.zeros_like(leaf) if grad is None else grad
        return found

    def _with_leaves(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        made = {
            n: t.detach().requires_grad_() if n in self.differentiable else t
            for n, t in inputs.items()
        }
        return made, [made[n] for n in self.differentiable]


class Agreement:
    """Compares implementations of one problem with float64, measured by plain torch's own error."""

    def __init__(self, problem: Problem, backward: bool) -> None:
        self.problem, self.backward = problem, backward
        wide = {n: t.double() if t.is_floating_point() else t for n, t in problem.inputs.items()}
        self.expected = problem.outcome(problem.wide or problem.plain, wide, backward)
        self.plain = problem.outcome(problem.plain, problem.inputs, backward)

    def verdicts(self, fn: Callable[..., Any]) -> dict[str, Verdict]:
        found = self.problem.outcome(fn, self.problem.inputs, self.backward)
        return {
            name: judge(
                value,
                self.plain[name],
                self.expected[name],
                GRADIENT_BUDGET if name.startswith("grad_") else OUTPUT_BUDGET,
            )
            for name, value in found.items()
        }


@dataclass(frozen=True)
class Options:
    """What to measure: see `python -m pyops bench --help`."""

    device: torch.device
    directions: Sequence[str] = ("forward",)
    backends: Sequence[str] = ("auto",)
    compiled: bool = True
    seconds_per_row: float = 2.0
    budget: float | None = None


def rows(problems: Iterable[Problem], options: Options) -> Iterator[Row]:
    """Yields a row for each problem, direction and backend, until time is up."""
    start = time.monotonic()
    environment = harness.environment(options.device)
    for problem in problems:
        for direction in options.directions:
            if direction == "forward+backward" and not problem.differentiable:
                continue
            if options.budget is not None and time.monotonic() - start > options.budget:
                return
            for row in measure(problem, direction, options):
                yield {**row, **environment, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def measure(problem: Problem, direction: str, options: Options) -> list[Row]:
    """The rows of one problem: checks each backend, then times all candidates in turns."""
    backward = direction == "forward+backward"
    agreement = Agreement(problem, backward)
    ours = {
        name: functools.partial(problem.ours, backend=None if name == "auto" else name)
        for name in options.backends
    }
    verdicts: dict[str, dict[str, Verdict]] = {}
    without: dict[str, Row] = {}
    for name, fn in ours.items():
        try:
            verdicts[name] = agreement.verdicts(fn)
        except Exception as error:  # one that fails must not keep the others from being measured
            refused = name != "auto" and is_refusal(error)
            without[name] = {"passed": None if refused else False, "reason": first_line(error)}
    calls = {("pyops", name): problem.bind(ours[name], backward) for name in verdicts}
    baselines, errors = _baselines(problem, backward, options)
    calls |= {("torch", name): call for name, call in baselines.items()}
    timings = harness.time_interleaved(calls, options.device, options.seconds_per_row)
    torch._dynamo.reset()  # so that no run of problems meets the recompile limit

    theirs = {name: timings["torch", name] for name in baselines}
    best = min(theirs, key=lambda name: theirs[name].median) if theirs else None
    flops = problem.flops + (problem.backward_flops if backward else 0)
    nbytes = problem.nbytes + (problem.backward_nbytes if backward else 0)
    some = problem.some
    floor = harness.measured_peaks(options.device, some.dtype).floor(flops, nbytes)
    common: Row = {
        "op": problem.op,
        "shape": problem.case,
        "dtype": str(some.dtype).removeprefix("torch."),
        "direction": direction,
        "layout": "-",
        "floor_ms": floor * 1e3,
        "baselines_ms": {name: t.median * 1e3 for name, t in theirs.items()},
        "baseline_errors": errors,
        "best_baseline": best,
        "saved_bytes_eager": saved_bytes(problem, problem.plain) if backward else None,
    }
    found = []
    for name, fn in ours.items():
        row: Row = {**common, "backend": name}
        if name in without:
            found.append({**row, **without[name], "speedup": None})
            continue
        timing, verdict = timings["pyops", name], verdicts[name]
        passed = worst(verdict.values()).passed
        row |= {
            "passed": passed,
            "error_ratio": {key: finite(v.ratio) for key, v in verdict.items()},
            "median_ms": timing.median * 1e3,
            "p20_ms": timing.p20 * 1e3,
            "p80_ms": timing.p80 * 1e3,
            "samples": timing.samples,
            "gflops": flops / timing.median / 1e9,
            "gbytes_per_s": nbytes / timing.median / 1e9,
            "percent_of_floor": 100 * floor / timing.median,
            "saved_bytes": saved_bytes(problem, fn) if backward else None,
            "peak_bytes": harness.peak_bytes(calls["pyops", name], options.device),
            # No speed-up of something that gives other numbers.
            "speedup": theirs[best].median / timing.median if best and passed else None,
        }
        found.append(row)
    return found


def saved_bytes(problem: Problem, fn: Callable[..., Any]) -> int:
    """Bytes that autograd keeps for the backward of `fn`, its inputs included."""
    inputs, _ = problem._with_leaves(problem.inputs)
    return harness.saved_for_backward(lambda: fn(**inputs))[1]


def gpu_backends(op: str) -> list[str]:
    """Those with kernels, named, since automatic choice takes none that is not proven yet."""
    names = [n for n in backends.NAMES if n != "reference"]
    return [n for n in names if backends.why_not(op, n, "cuda") is None] or ["auto"]


def is_refusal(error: Exception) -> bool:
    """Whether an explicit backend says that it is not here or does not take the arguments."""
    return isinstance(error, RuntimeError) and str(error).startswith("backend: ")


def _baselines(
    problem: Problem, backward: bool, options: Options
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Plain torch, eager and compiled, and the problem's own; and which failed, and how."""
    functions = {"eager": problem.plain, **problem.baselines}
    if options.compiled:
        functions |= problem.compiled_baselines
    if options.compiled and problem.compiled:
        functions["compile"] = torch.compile(problem.plain, dynamic=False, fullgraph=True)
        if options.device.type == "cuda":
            mode = "max-autotune-no-cudagraphs"
            functions[mode] = torch.compile(problem.plain, dynamic=False, mode=mode)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, str] = {}
    for name, fn in functions.items():
        try:
            call = problem.bind(fn, backward)
            call()
        except Exception as error:  # what torch refuses, or a missing compiler
            errors[name] = first_line(error)
        else:
            calls[name] = call
    return calls, errors


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def _named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    if len(tensors) == 1:
        return {"output": tensors[0]}
    return {f"output {i}": t for i, t in enumerate(tensors)}


def _like(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients for these outputs: always the same numbers, however wide the dtype."""
    made = []
    for i, out in enumerate(outputs):
        generator = torch.Generator().manual_seed(i + 1)
        grad = torch.randn(out.shape, generator=generator).bfloat16()
        made.append(grad.to(out.device, out.dtype))
    return made
