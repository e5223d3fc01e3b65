"""`python -m pyops demo`: trains and runs real networks with plain torch and with the fast ops."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from pyops.bench import harness, models
from pyops.bench.agreement import Verdict, judge
from pyops.bench.report import finite, table, write_atomically
from pyops.commands import CommandError, Progress, check_writable, demo_families, positive_int, seed
from pyops.commands.demo_plot import plot
from pyops.data import Dataset
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET
from pyops.training import cnn

HELP = "train a CNN, an LSTM, a Transformer and a GAN both ways, and run large CNNs"
DESCRIPTION = """\
Trains the small CNN on scikit-learn's handwritten digits, once with plain torch and once with the
fast ops from the same seed, and runs AlexNet, VGG-16 and ResNet-18 both ways. Compares accuracy,
losses, logits, gradients, time and memory; then an LSTM on the same digits, a byte language model on
Python's documentation and a GAN of digits. Writes a plot and summary.json.
Exit code 1 if the CNN's accuracy is below 97%, another figure misses its goal or something lies
outside the error budget.
"""
ACCURACY_GOAL = 0.97
COMPARED_STEPS = 10
COMPARED_BATCHES = 5
COMPARED_IMAGES = 16
INFERENCE = {"alexnet": 4, "vgg16": 1, "resnet18": 4}  # images at a time
BUDGET = (
    f"(budget: {OUTPUT_BUDGET:g} times plain torch's error, {GRADIENT_BUDGET:g} times for gradients "
    "and training losses, plus one rounding)"
)
PLAIN, FAST = "reference", "fast"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    parser.add_argument("--epochs", type=positive_int, default=16, help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--families", nargs="*", choices=demo_families.FAMILIES,
        default=list(demo_families.FAMILIES), help="trained beside the CNN",
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="*", choices=INFERENCE, default=list(INFERENCE), help="for inference"
    )


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out: {args.out} is not a folder")
    check_writable("--out", args.out)
    settings = cnn.Settings(seed=args.seed)
    data = cnn.dataset(settings)
    print(
        f"{len(data.train_labels)} training and {len(data.test_labels)} test images of real "
        f"digits, 28x28; seed {args.seed}, {args.epochs} epochs"
    )
    trained = train_both(settings, data, args.epochs)
    agreement = compare_training(settings, data)
    print("\n" + render_training(trained, agreement))

    inference = [compare_inference(name) for name in args.models]
    if inference:
        print("\n" + render_inference(inference))

    families = [demo_families.train(name, args.seed) for name in args.families]
    if families:
        print("\n" + demo_families.render(families))

    checks = collect_checks(trained, agreement, inference) | demo_families.checks(families)
    summary = {
        **harness.environment(torch.device("cpu")),
        "seed": args.seed,
        "epochs": args.epochs,
        "training": trained,
        "agreement": {name: finite(verdict.ratio) for name, verdict in agreement.items()},
        "inference": inference,
        "families": families,
        "checks": checks,
        "seconds": time.perf_counter() - start,
    }
    write_atomically(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot(trained, inference, args.out / "demo.png")
    failed = [name for name, passed in checks.items() if not passed]
    print(f"\nwrote {args.out / 'demo.png'} and {args.out / 'summary.json'}")
    print(
        f"{'FAILED: ' + '; '.join(failed) if failed else 'all checks passed'}, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if failed else 0


def train_both(settings: cnn.Settings, data: Dataset, epochs: int) -> dict[str, Any]:
    """Trains with each kind of ops; the epochs take turns, so that both see the same machine."""
    trainers = {ops: cnn.Trainer(settings, ops, data=data) for ops in (PLAIN, FAST)}
    seconds: dict[str, list[float]] = {ops: [] for ops in trainers}
    saved = {ops: _saved_bytes(trainer, data) for ops, trainer in trainers.items()}
    for epoch in range(epochs):
        for ops, trainer in trainers.items():
            progress = Progress(f"epoch {epoch + 1}, {ops:9}", trainer.steps_per_epoch)
            start = time.perf_counter()
            trainer.train_epoch(progress.loss)
            seconds[ops].append(time.perf_counter() - start)
            progress.close()
    return {
        ops: {
            "losses": trainer.losses,
            "test_accuracy": trainer.evaluate()["test accuracy"],
            "epoch_seconds": seconds[ops],
            "median_epoch_seconds": harness.summarize(seconds[ops]).median,
            "saved_for_backward_bytes": saved[ops],
        }
        for ops, trainer in trainers.items()
    }


def _saved_bytes(trainer: cnn.Trainer, data: Dataset) -> int:
    images = data.train_images[: trainer.settings.batch_size]
    trainer.model.train()
    parameters = tuple(trainer.model.parameters())
    return harness.saved_for_backward(lambda: trainer.model(images), exclude=parameters)[1]


def compare_training(settings: cnn.Settings, data: Dataset) -> dict[str, Verdict]:
    """Errors as multiples of plain torch's, against float64.

    Logits, loss and gradients at the initial weights and after an epoch; and the losses of the
    first steps of training, beside which a run in float64 goes along. Later steps are not compared
    one by one: training amplifies a difference in the last bit until two runs are unrelated.
    """
    batches = [
        (data.test_images[i : i + COMPARED_IMAGES], data.test_labels[i : i + COMPARED_IMAGES])
        for i in range(0, COMPARED_BATCHES * COMPARED_IMAGES, COMPARED_IMAGES)
    ]
    found: dict[str, Verdict] = {}
    trainer = cnn.Trainer(settings, PLAIN, data=data)
    for when in ("initial weights", "after one epoch"):
        verdicts = models.ModelAgreement(trainer.model).verdicts(batches)
        found |= {f"{name}, {when}": verdict for name, verdict in verdicts.items()}
        if when == "initial weights":
            trainer.train_epoch()
    fast, plain, wide = (
        torch.tensor(list(itertools.islice(t.steps(), COMPARED_STEPS)), dtype=dtype)
        for t, dtype in (
            (cnn.Trainer(settings, FAST, data=data), torch.float32),
            (cnn.Trainer(settings, PLAIN, data=data), torch.float32),
            (cnn.Trainer(settings, PLAIN, dtype=torch.float64, data=data), torch.float64),
        )
    )
    found[f"losses of the first {COMPARED_STEPS} steps"] = judge(fast, plain, wide, GRADIENT_BUDGET)
    return found


def compare_inference(name: str) -> dict[str, Any]:
    batch = INFERENCE[name]
    progress = Progress(f"inference of {name}", 1)
    progress.update(0)
    row = models.measure_inference(
        name, batch, torch.device("cpu"), layouts=("nchw",), compiled=False, seconds=4.0
    )[0]
    progress.close()
    return {"model": name, "batch": batch, **row}


def render_training(trained: dict[str, Any], agreement: dict[str, Verdict]) -> str:
    plain, fast = trained[PLAIN], trained[FAST]
    times = [t["median_epoch_seconds"] for t in (plain, fast)]
    saved = [t["saved_for_backward_bytes"] for t in (plain, fast)]
    lines = [
        ["test accuracy", f"{plain['test_accuracy']:.2%}", f"{fast['test_accuracy']:.2%}", ""],
        ["last loss", f"{plain['losses'][-1]:.4f}", f"{fast['losses'][-1]:.4f}", ""],
        ["epoch, s (median)", f"{times[0]:.3f}", f"{times[1]:.3f}", _times(times)],
        ["saved for backward, MB", *(f"{b / 1e6:.2f}" for b in saved), _times(saved)],
    ]
    compared = [
        [name, f"{verdict.ratio:.2f}", "yes" if verdict.passed else "NO"]
        for name, verdict in agreement.items()
    ]
    return "\n\n".join(
        (
            table(["training", "plain torch", "fast ops", "gain"], lines),
            table(["error over plain torch's", "ratio", "within budget"], compared) + "\n" + BUDGET,
        )
    )


def render_inference(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        eager = row["baselines_ms"]["eager nchw"]
        lines.append(
            [
                row["model"],
                str(row["batch"]),
                str(row["replaced"]),
                f"{eager:.1f}",
                f"{row['median_ms']:.1f}",
                _times([eager, row["median_ms"]]),
                f"{row['error_ratio']['output']:.2f}",
                "yes" if row["passed"] else "NO",
            ]
        )
    headers = ["inference", "images", "swapped", "plain torch, ms", "fast ops, ms", "gain"]
    return table([*headers, "error ratio", "within budget"], lines)


def _times(pair: list[float]) -> str:
    return f"{pair[0] / pair[1]:.2f}x"


def collect_checks(
    trained: dict[str, Any], agreement: dict[str, Verdict], inference: list[dict[str, Any]]
) -> dict[str, bool]:
    checks = {
        f"accuracy with {ops} ops at least {ACCURACY_GOAL:.0%}": t["test_accuracy"] >= ACCURACY_GOAL
        for ops, t in trained.items()
    }
    checks |= {f"error of {name}": verdict.passed for name, verdict in agreement.items()}
    return checks | {f"logits of {row['model']}": row["passed"] for row in inference}
