"""The demo's other families: LSTM, Transformer and GAN, each trained with plain torch and with the fast ops."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch

from pyops import training
from pyops.bench.agreement import judge
from pyops.bench.report import finite, table
from pyops.commands import Progress
from pyops.testing import GRADIENT_BUDGET

COMPARED_STEPS = 5
PLAIN, FAST = "reference", "fast"


@dataclass(frozen=True)
class Family:
    """What the demo trains, for how long, and what it must reach: `figure` at least or at most `goal`."""

    preset: str
    epochs: int
    figure: str
    goal: float
    at_least: bool = True


FAMILIES = {
    "lstm": Family("digits", 8, "test accuracy", 0.90),
    "transformer": Family("lm", 4, "test loss, nats a byte", 2.8, at_least=False),
    "gan": Family("dcgan28", 8, "sample accuracy", 0.5),
}


def train(name: str, seed: int, epochs: int | None = None) -> dict[str, Any]:
    """Both trained from the same seed, epoch by epoch in turns; and how far their first losses are from float64."""
    family, task = FAMILIES[name], training.task(name)
    settings = task.Settings(preset=family.preset, seed=seed)
    trainers = {ops: task.Trainer(settings, ops) for ops in (PLAIN, FAST)}
    seconds = dict.fromkeys(trainers, 0.0)
    for epoch in range(epochs or family.epochs):
        for ops, trainer in trainers.items():
            progress = Progress(f"{name}, epoch {epoch + 1}, {ops:9}", trainer.steps_per_epoch)
            start = time.perf_counter()
            trainer.train_epoch(progress.loss)
            seconds[ops] += time.perf_counter() - start
            progress.close()
    fast, plain, wide = (
        torch.tensor(list(itertools.islice(t.steps(), COMPARED_STEPS)), dtype=dtype)
        for t, dtype in (
            (task.Trainer(settings, FAST), torch.float32),
            (task.Trainer(settings, PLAIN), torch.float32),
            (task.Trainer(settings, PLAIN, dtype=torch.float64), torch.float64),
        )
    )
    verdict = judge(fast, plain, wide, GRADIENT_BUDGET)
    return {
        "family": name,
        "preset": family.preset,
        "data": trainers[FAST].describe(),
        "figure": family.figure,
        "goal": family.goal,
        "error_ratio": finite(verdict.ratio),
        "losses_within_budget": verdict.passed,
        **{
            ops: {
                "figure": trainer.evaluate()[family.figure],
                "losses": trainer.losses,
                "seconds": seconds[ops],
            }
            for ops, trainer in trainers.items()
        },
    }


def checks(trained: list[dict[str, Any]]) -> dict[str, bool]:
    found = {}
    for row in trained:
        family = FAMILIES[row["family"]]
        bound = "at least" if family.at_least else "at most"
        for ops in (PLAIN, FAST):
            value = row[ops]["figure"]
            found[f"{row['family']}: {family.figure} with {ops} ops {bound} {family.goal:g}"] = (
                value >= family.goal if family.at_least else value <= family.goal
            )
        found[f"{row['family']}: losses of the first {COMPARED_STEPS} steps"] = row[
            "losses_within_budget"
        ]
    return found


def render(trained: list[dict[str, Any]]) -> str:
    headers = ["training", "figure", "plain torch", "fast ops", "plain, s", "fast, s", "gain"]
    lines = []
    for row in trained:
        plain, fast = row[PLAIN], row[FAST]
        ratio = row["error_ratio"]
        lines.append(
            [
                f"{row['family']} {row['preset']}",
                row["figure"],
                f"{plain['figure']:.3f}",
                f"{fast['figure']:.3f}",
                f"{plain['seconds']:.1f}",
                f"{fast['seconds']:.1f}",
                f"{plain['seconds'] / fast['seconds']:.2f}x",
                "inf" if ratio is None else f"{ratio:.2f}",
                "yes" if row["losses_within_budget"] else "NO",
            ]
        )
    return table([*headers, "first losses' error ratio", "within budget"], lines)
