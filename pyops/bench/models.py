"""Whole models with the fast ops swapped in, against the same models in plain torch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops
from pyops.bench import harness
from pyops.bench.agreement import Verdict, judge, worst
from pyops.bench.report import Row, finite, first_line
from pyops.models import cnn
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET


@dataclass(frozen=True)
class ModelCase:
    """How to build a model, and what image it is checked and timed on."""

    build: Callable[[], nn.Module]
    channels: int
    small: int  # height and width for checking
    usual: int  # height and width for timing
    classes: int = 1000

    def images(self, batch: int, size: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, self.channels, size, size, generator=generator)


MODELS: dict[str, ModelCase] = {
    "cnn mnist": ModelCase(lambda: cnn.small_cnn("mnist"), 1, 28, 28, 10),
    "cnn cifar": ModelCase(lambda: cnn.small_cnn("cifar"), 3, 32, 32, 10),
    "cnn deep": ModelCase(lambda: cnn.small_cnn("deep"), 3, 32, 32, 10),
    "cnn cifar, avg pool": ModelCase(lambda: cnn.small_cnn("cifar", pool="avg"), 3, 32, 32, 10),
    "alexnet": ModelCase(cnn.AlexNet, 3, 95, 224),
    "vgg11": ModelCase(cnn.vgg11, 3, 64, 224),
    "vgg16": ModelCase(cnn.vgg16, 3, 64, 224),
    "resnet18": ModelCase(cnn.resnet18, 3, 64, 224),
    "resnet50": ModelCase(cnn.resnet50, 3, 64, 224),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model in eval mode, with the parameters that `seed` gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name].build().eval()


def outcome(model: nn.Module, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """The logits; with labels also the loss and every parameter's gradient."""
    if labels is None:
        with torch.no_grad():
            return {"output": model(images)}
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {
        "output": logits.detach(),
        "loss": loss.detach(),
        **{f"grad {n}": g for n, g in zip(names, gradients, strict=True)},
    }


class ModelAgreement:
    """A plain model, the same one optimized, and in float64: `verdicts` compares their results."""

    def __init__(self, plain: nn.Module) -> None:
        self.plain = plain
        self.fast = copy.deepcopy(plain)
        self.report = pyops.optimize(self.fast)
        self.wide = copy.deepcopy(plain).double()

    def verdicts(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Verdict]:
        """Of "output" and, where there are labels, "loss" and "gradient".

        Each is the median over the batches (images, labels or None). Where rounding decides which
        element of a pool window wins, gradients of two right implementations differ by far more
        than rounding; that is rare, and a batch that it happens in does not decide the median.
        """
        found: dict[str, list[Verdict]] = {}
        for images, labels in batches:
            expected = outcome(self.wide, images.double(), labels)
            plain = outcome(self.plain, images, labels)
            kinds: dict[str, list[Verdict]] = {}
            for name, value in outcome(self.fast, images, labels).items():
                kind = "gradient" if name.startswith("grad ") else name
                budget = GRADIENT_BUDGET if kind == "gradient" else OUTPUT_BUDGET
                verdict = judge(value, plain[name], expected[name], budget)
                kinds.setdefault(kind, []).append(verdict)
            for kind, verdicts in kinds.items():
                found.setdefault(kind, []).append(worst(verdicts))
        return {kind: median(verdicts) for kind, verdicts in found.items()}


def median(verdicts: Sequence[Verdict]) -> Verdict:
    """The middle one, failures counting as larger than all that passed."""
    return sorted(verdicts, key=lambda v: (not v.passed, v.ratio))[len(verdicts) // 2]


def measure_inference(
    name: str,
    batch: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    layouts: Sequence[str] = ("nchw", "channels_last"),
    compiled: bool = True,
    seconds: float = 5.0,
) -> list[Row]:
    """Rows (one a layout) of a model's inference with the fast ops, with plain torch's beside."""
    case = MODELS[name]
    model = build(name).to(device, dtype)
    images = case.images(batch, case.usual).to(device, dtype)
    pair = ModelAgreement(model)
    verdict = pair.verdicts([(images, None)])["output"]
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, str] = {}
    del pair.wide
    for layout in layouts:
        placed = images.to(memory_format=formats[layout])
        plain = copy.deepcopy(model)
        # mypy does not know this overload of Module.to, the documented one for layouts
        plain.to(memory_format=formats[layout])  # type: ignore[call-overload]
        fast = copy.deepcopy(plain)
        pyops.optimize(fast)
        calls[f"fast {layout}"] = _inference(fast, placed)
        calls[f"eager {layout}"] = _inference(plain, placed)
        if compiled:
            call = _inference(torch.compile(plain, dynamic=False), placed)
            try:
                call()
            except Exception as error:  # a missing compiler must not end the benchmark
                errors[f"compile {layout}"] = first_line(error)
            else:
                calls[f"compile {layout}"] = call
    timings = harness.time_interleaved(calls, device, seconds)
    torch._dynamo.reset()
    baselines = {n: t for n, t in timings.items() if not n.startswith("fast ")}
    best = min(baselines, key=lambda n: baselines[n].median)
    rows = []
    for layout in layouts:
        timing = timings[f"fast {layout}"]
        rows.append(
            {
                "op": f"model {name}",
                "shape": "x".join(map(str, images.shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "direction": "forward",
                "layout": layout,
                "backend": "auto",
                "replaced": len(pair.report.replaced),
                "skipped": len(pair.report.skipped),
                "error_ratio": {"output": finite(verdict.ratio)},
                "passed": verdict.passed,
                "median_ms": timing.median * 1e3,
                "p20_ms": timing.p20 * 1e3,
                "p80_ms": timing.p80 * 1e3,
                "samples": timing.samples,
                "peak_bytes": harness.peak_bytes(calls[f"fast {layout}"], device),
                "baselines_ms": {n: t.median * 1e3 for n, t in baselines.items()},
                "baseline_errors": errors,
                "best_baseline": best,
                "speedup": baselines[best].median / timing.median if verdict.passed else None,
            }
        )
    return rows


def _inference(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return model(images)

    return forward


def rows(
    names: Sequence[str],
    batch: int,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    layouts: Sequence[str],
    compiled: bool,
    budget: float | None,
) -> Iterator[Row]:
    """Yields the rows of each model and dtype until time is up."""
    start = time.monotonic()
    environment = harness.environment(device)
    for name in names:
        for dtype in dtypes:
            if budget is not None and time.monotonic() - start > budget:
                return
            for row in measure_inference(
                name, batch, device, dtype=dtype, layouts=layouts, compiled=compiled
            ):
                yield {**row, **environment, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
