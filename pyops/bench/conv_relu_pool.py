"""conv_relu_pool2d against plain torch: eager and compiled, NCHW and channels_last, in one run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import pyops
from pyops.bench import agreement, harness
from pyops.bench.problem import is_refusal
from pyops.bench.report import Row, finite, first_line
from pyops.bench.shapes import ConvShape

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BASELINES = ("eager", "compile")


@dataclass(frozen=True)
class Options:
    """What to measure: see `python -m pyops bench conv_relu_pool --help`."""

    device: torch.device
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    directions: Sequence[str] = ("forward",)
    layouts: Sequence[str] = ("nchw",)
    backends: Sequence[str] = ("auto",)
    baselines: Sequence[str] = BASELINES
    seconds_per_row: float = 2.0
    budget: float | None = None


def rows(shapes: Sequence[ConvShape], options: Options) -> Iterator[Row]:
    """Yields a row for each shape, dtype, direction, layout and backend, until time is up."""
    start = time.monotonic()
    environment = harness.environment(options.device)
    for shape in shapes:
        for dtype in options.dtypes:
            for direction in options.directions:
                if options.budget is not None and time.monotonic() - start > options.budget:
                    return
                for row in measure(shape, dtype, direction, options):
                    yield {**row, **environment, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def measure(shape: ConvShape, dtype: torch.dtype, direction: str, options: Options) -> list[Row]:
    """The rows of one shape: checks each implementation, then times all in turns."""
    backward = direction == "forward+backward"
    inputs = agreement.make_inputs(shape, dtype, options.device)
    reference = agreement.Agreement(shape, inputs, backward)
    ours = {
        (backend, layout): functools.partial(
            pyops.conv_relu_pool2d,
            backend=None if backend == "auto" else backend,
            **shape.op_arguments,
        )
        for backend in options.backends
        for layout in options.layouts
    }
    verdicts, without = {}, {}
    for key, fn in ours.items():
        try:
            verdicts[key] = reference.verdicts(fn, LAYOUTS[key[1]])
        except Exception as error:  # one that fails must not keep the others from being measured
            refused = key[0] != "auto" and is_refusal(error)
            without[key] = {"passed": None if refused else False, "reason": first_line(error)}

    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for (backend, layout), fn in ours.items():
        if (backend, layout) in verdicts:
            calls[backend, layout] = bind(fn, inputs, LAYOUTS[layout], backward)
    saved = {key: _saved_bytes(fn, inputs, key[1]) for key, fn in ours.items() if key in verdicts}
    plain = agreement.chain(shape)
    baseline_calls, baseline_errors = _baselines(plain, inputs, backward, options)
    calls.update(baseline_calls)
    timings = harness.time_interleaved(calls, options.device, options.seconds_per_row)
    torch._dynamo.reset()  # so that no run of shapes meets the recompile limit

    baselines = {" ".join(key): timings[key] for key in baseline_calls}
    best = min(baselines, key=lambda name: baselines[name].median) if baselines else None
    floor, flops, nbytes = _floor(shape, dtype, backward, options.device)
    common: Row = {
        "op": "conv_relu_pool2d",
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "floor_ms": floor * 1e3,
        "baselines_ms": {name: t.median * 1e3 for name, t in baselines.items()},
        "baseline_errors": baseline_errors,
        "best_baseline": best,
        "saved_bytes_eager": _saved_bytes(plain, inputs, "nchw"),
    }
    found = []
    for backend, layout in ours:
        row: Row = {**common, "backend": backend, "layout": layout}
        if (backend, layout) in without:
            found.append({**row, **without[backend, layout], "speedup": None})
            continue
        timing, verdict = timings[backend, layout], verdicts[backend, layout]
        passed = agreement.worst(verdict.values()).passed
        row |= {
            "passed": passed,
            "error_ratio": {name: finite(v.ratio) for name, v in verdict.items()},
            "median_ms": timing.median * 1e3,
            "p20_ms": timing.p20 * 1e3,
            "p80_ms": timing.p80 * 1e3,
            "samples": timing.samples,
            "gflops": flops / timing.median / 1e9,
            "gbytes_per_s": nbytes / timing.median / 1e9,
            "percent_of_floor": 100 * floor / timing.median,
            "saved_bytes": saved[backend, layout],
            "peak_bytes": harness.peak_bytes(calls[backend, layout], options.device),
            # No speed-up of something that gives other numbers.
            "speedup": baselines[best].median / timing.median if best and passed else None,
        }
        found.append(row)
    return found


def bind(
    fn: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    layout: torch.memory_format,
    backward: bool,
) -> Callable[[], object]:
    """A call without arguments: the forward, or with it all three gradients."""
    x, weight, bias = inputs
    x, weight = x.to(memory_format=layout), weight.to(memory_format=layout)
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return fn(x, weight, bias)

        return forward
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    grad_output = torch.randn_like(fn(*leaves))

    def forward_backward() -> object:
        return torch.autograd.grad(fn(*leaves), leaves, grad_output)

    return forward_backward


def _baselines(
    plain: agreement.ConvFunction, inputs: tuple[Tensor, ...], backward: bool, options: Options
) -> tuple[dict[tuple[str, str], Callable[[], object]], dict[str, str]]:
    """Eager and compiled torch in both layouts, warmed up; and which of them failed, and how."""
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    errors: dict[str, str] = {}
    on_cuda = options.device.type == "cuda"
    for layout, memory_format in LAYOUTS.items():
        if "eager" in options.baselines:
            calls["eager", layout] = bind(plain, inputs, memory_format, backward)
        if "compile" in options.baselines:
            modes = ["default"]
            if on_cuda and layout == "channels_last":
                modes.append("max-autotune-no-cudagraphs")
            for mode in modes:
                key = ("compile", layout if mode == "default" else "max-autotune")
                compiled = torch.compile(plain, dynamic=False, fullgraph=True, mode=mode)
                try:
                    call = bind(compiled, inputs, memory_format, backward)
                    call()
                except Exception as error:  # a missing compiler must not end the benchmark
                    errors[" ".join(key)] = first_line(error)
                else:
                    calls[key] = call
    return calls, errors


def _saved_bytes(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], layout: str) -> int:
    x, weight, bias = inputs
    memory_format = LAYOUTS[layout]
    x = x.to(memory_format=memory_format).detach().requires_grad_()
    parameters = [
        weight.to(memory_format=memory_format).detach().requires_grad_(),
        bias.detach().requires_grad_(),
    ]
    return harness.saved_for_backward(lambda: fn(x, *parameters), exclude=tuple(parameters))[1]


def _floor(
    shape: ConvShape, dtype: torch.dtype, backward: bool, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of the floor, and the operations and bytes that the row's rates refer to.

    The operations are those of direct convolution, so Winograd's can undercut the floor. In the
    backward only elements that can carry gradient count.
    """
    peaks = harness.measured_peaks(device, dtype)
    size = {name: count * dtype.itemsize for name, count in shape.elements.items()}
    flops, nbytes = float(shape.conv_flops), float(sum(size.values()))
    if backward:
        flops += 2 * shape.conv_flops * shape.gradient_density
        codes = shape.elements["output"]
        # again the input, the weight and the output's gradient; the three gradients are written
        nbytes += codes + 2 * (size["input"] + size["weight"]) + size["output"] + codes
        nbytes += size["bias"]
    return peaks.floor(flops, nbytes), flops, nbytes
