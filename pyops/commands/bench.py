"""`python -m pyops bench`: speed against plain torch, measured in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pyops import backends
from pyops.bench import PROBLEM_OPS, conv_relu_pool, models, problem, problem_module, shapes
from pyops.bench.report import ResultsFile, Row, geometric_mean, milliseconds, table
from pyops.commands import CommandError, check_writable, device, dtype, positive_float, positive_int

HELP = "measure speed and memory against plain torch, eager and compiled"
DESCRIPTION = f"""\
Measures an op, or inference of whole models, against plain torch: eager and compiled, each in NCHW
and channels_last, in one run. On a CPU all of them take turns. A speed-up is the ratio to the best
of them and is given only beside a passing check: the error is a multiple of plain torch's (budget
2 for outputs, 3 for gradients). "% floor" is the least time at the device's measured peaks, with the
operations of direct convolution, over the time taken: Winograd's algorithm can exceed 100.

shapes of conv_relu_pool, by set or in this notation:
  {shapes.NOTATION.replace("; ", ";" + chr(10) + "  ")}
sets: {", ".join(shapes.SETS)}
"""


DIRECTIONS = {
    "no": ["forward"],
    "yes": ["forward+backward"],
    "both": ["forward", "forward+backward"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("conv_relu_pool", *PROBLEM_OPS, "models"))
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", type=dtype, nargs="+", help="default: float32, on cuda bfloat16 and float32"
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help="sets or shapes (default: all for the device)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=models.MODELS,
        metavar="NAME",
        help=f"of: {', '.join(models.MODELS)}",
    )
    parser.add_argument("--batch", type=positive_int, default=4, help="images (models only)")
    parser.add_argument(
        "--backward",
        choices=("no", "yes", "both"),
        default="no",
        help="forward, forward+backward, or both (default: %(default)s)",
    )
    parser.add_argument(
        "--layout", nargs="+", choices=("nchw", "channels_last"), help="of our input and weight"
    )
    parser.add_argument(
        "--backend", nargs="+", help="default: auto, on cuda every one with kernels for it"
    )
    parser.add_argument(
        "--baselines", nargs="*", choices=("eager", "compile"), default=["eager", "compile"]
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="add the rows to DIR/<what>.json")
    parser.add_argument(
        "--budget", type=positive_float, metavar="SECONDS", help="start no row after this time"
    )
    parser.add_argument(
        "--seconds", type=positive_float, default=2.0, help="of timing a shape (default: 2)"
    )


def run(args: argparse.Namespace) -> int:
    on_cuda = args.device.type == "cuda"
    for backend in args.backend or ():
        if backend != "auto" and backend not in backends.NAMES:
            names = ", ".join(("auto", *backends.NAMES))
            raise CommandError(f"--backend: expected one of {names}, got {backend!r}")
    dtypes = args.dtype or ([torch.bfloat16, torch.float32] if on_cuda else [torch.float32])
    layouts = args.layout or (["channels_last", "nchw"] if on_cuda else ["nchw"])
    if args.out:
        check_writable("--out", args.out)
    results = ResultsFile(args.out / f"{args.what}.json") if args.out else None
    rows = []
    for row in _rows(args, dtypes, layouts):
        if results is not None:
            results.add(row)
        print(progress_line(row), flush=True)
        rows.append(row)
    print("\n" + render(rows))
    if results is not None:
        print(f"\nrows added to {results.path}")
    return 1 if any(row["passed"] is False for row in rows) else 0


def _rows(
    args: argparse.Namespace, dtypes: Sequence[torch.dtype], layouts: Sequence[str]
) -> Iterator[Row]:
    if args.what == "models":
        return models.rows(
            args.models or ["alexnet", "vgg16", "resnet18", "cnn deep"],
            args.batch,
            args.device,
            dtypes,
            layouts,
            "compile" in args.baselines,
            args.budget,
        )
    if args.what in PROBLEM_OPS:
        return _problem_rows(args, dtypes)
    on_cuda = args.device.type == "cuda"
    sets = [name for name in shapes.SETS if name != ("cpu" if on_cuda else "gpu")]
    try:
        selected = shapes.select(args.shapes or sets)
    except ValueError as error:
        raise CommandError(f"--shapes: {error}") from None
    options = conv_relu_pool.Options(
        device=args.device,
        dtypes=dtypes,
        directions=DIRECTIONS[args.backward],
        layouts=layouts,
        backends=args.backend
        or (problem.gpu_backends("conv_relu_pool2d") if on_cuda else ["auto"]),
        baselines=args.baselines,
        seconds_per_row=args.seconds,
        budget=args.budget,
    )
    return conv_relu_pool.rows(selected, options)


def _problem_rows(args: argparse.Namespace, dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """Rows of an op whose module makes problems; --shapes are its sets or cases."""
    module = problem_module(args.what)
    chosen = args.shapes or [
        n for n in module.SETS if not (n == "gpu" and args.device.type == "cpu")
    ]
    cases = [case for name in chosen for case in module.SETS.get(name, (name,))]
    try:
        first = module.problem(cases[0], dtypes[0], torch.device("meta"))
        for case in cases:
            module.problem(case, dtypes[0], torch.device("meta"))
    except ValueError as error:
        raise CommandError(f"--shapes: {error}; sets: {', '.join(module.SETS)}") from None
    options = problem.Options(
        device=args.device,
        directions=DIRECTIONS[args.backward],
        backends=args.backend
        or (problem.gpu_backends(first.op) if args.device.type == "cuda" else ["auto"]),
        compiled="compile" in args.baselines,
        seconds_per_row=args.seconds,
        budget=args.budget,
    )
    problems = (module.problem(c, dtype, args.device) for c in cases for dtype in dtypes)
    return problem.rows(problems, options)


def progress_line(row: Row) -> str:
    name = " ".join(row[k] for k in ("op", "shape", "dtype", "direction", "layout", "backend"))
    if "reason" in row:
        return f"{name}: {row['reason']}"
    speedup = f"{row['speedup']:.2f}x of {row['best_baseline']}" if row["speedup"] else "-"
    return f"{name}: {row['median_ms']:.3g} ms, {speedup if row['passed'] else 'CHECK FAILED'}"


def render(rows: list[Row]) -> str:
    """One line a row, and the geometric means of the speed-ups."""
    baselines = list(dict.fromkeys(name for row in rows for name in row["baselines_ms"]))
    headers = [
        "shape",
        "dtype",
        "direction",
        "layout",
        "backend",
        "ms",
        "20-80%",
        "GFLOP/s",
        "GB/s",
    ]
    headers += ["% floor", "saved MB", "eager's", "error", *baselines, "speed-up"]
    lines = []
    for row in rows:
        head = [row["shape"], row["dtype"], row["direction"], row["layout"], row["backend"]]
        if row["op"].startswith("model"):
            head[0] = f"{row['op'].removeprefix('model ')} {row['shape']}"
        times = [milliseconds(row["baselines_ms"].get(name)) for name in baselines]
        if "reason" in row:
            status = "refused" if row["passed"] is None else "FAILED"
            lines.append([*head, *["-"] * 8, *times, status])
            continue
        errors = [v for v in row["error_ratio"].values() if v is not None]
        lines.append(
            [
                *head,
                milliseconds(row["median_ms"]),
                f"{row['p20_ms']:.3g}-{row['p80_ms']:.3g}",
                _number(row, "gflops"),
                _number(row, "gbytes_per_s"),
                _number(row, "percent_of_floor"),
                _number(row, "saved_bytes", 1e6),
                _number(row, "saved_bytes_eager", 1e6),
                f"{max(errors):.2f}" if errors else "inf",
                *times,
                f"{row['speedup']:.2f}" if row["speedup"] else "-" if row["passed"] else "FAILED",
            ]
        )
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["speedup"]:
            key = (row["dtype"], row["direction"], row["layout"], row["backend"])
            groups.setdefault(key, []).append(row["speedup"])
    summary = [
        [" ".join(key), str(len(v)), f"{geometric_mean(v):.2f}", f"{min(v):.2f}", f"{max(v):.2f}"]
        for key, v in groups.items()
    ]
    text = table(headers, lines)
    if summary:
        means = table(["speed-up over the best", "rows", "geo. mean", "least", "most"], summary)
        text += "\n\n" + means
    return text


def _number(row: Row, key: str, unit: float = 1.0) -> str:
    return "-" if row.get(key) is None else f"{row[key] / unit:.3g}"
