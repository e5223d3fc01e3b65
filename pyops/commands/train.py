"""`python -m pyops train`: trains a model on real data, with fast or plain ops."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from pyops import training
from pyops.commands import (
    CommandError,
    Progress,
    check_writable,
    device,
    positive_float,
    positive_int,
    seed,
)
from pyops.training.trainer import Trainer

HELP = "train a model on real data, with fast or plain ops"
DESCRIPTION = """\
Trains a model on real data that comes with installed packages and prints figures on data held back.
With --ops both, plain torch and the fast ops train side by side from the same seed.
With --checkpoint the state is written after every epoch; --resume continues from such a file,
bit for bit as if the run had not been interrupted, and goes on writing to it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Defaults are None: a resumed run takes what is not given from its checkpoint.
    parser.add_argument("model", choices=training.MODELS, help="the model to train")
    parser.add_argument("--preset", help="variant of the model; the error names what there is")
    parser.add_argument(
        "--ops",
        choices=(*training.OPS, "both"),
        help="this package's ops, plain torch, or both side by side (default: fast)",
    )
    parser.add_argument("--epochs", type=positive_int, help="epochs in all")
    parser.add_argument("--seed", type=seed, help="of weights and order of the data (default: 0)")
    parser.add_argument("--batch-size", type=positive_int, help="examples a step")
    parser.add_argument("--learning-rate", type=positive_float)
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for pictures (gan; default: train-gan)"
    )
    parser.add_argument(
        "--picture-every", type=positive_int, default=4, metavar="N", help="epochs (default: 4)"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the state here")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue from this state")


def run(args: argparse.Namespace) -> int:
    task = training.task(args.model)
    checkpoint = training.read_checkpoint(args.resume) if args.resume else None
    target = args.checkpoint or args.resume
    if args.checkpoint and args.checkpoint.exists() and args.checkpoint != args.resume:
        raise CommandError(
            f"{args.checkpoint}: exists and is not overwritten; continue it with --resume, "
            "or remove it"
        )
    if target and not target.resolve().parent.is_dir():
        raise CommandError(f"{target}: its folder does not exist")
    if target:
        check_writable("--checkpoint" if args.checkpoint else "--resume", target.resolve().parent)
    if target and args.ops == "both":
        raise CommandError("--ops both: a checkpoint holds one run; train them one by one")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out: {args.out} is not a folder")
    folder = args.out or Path(f"train-{args.model}")
    if args.out or args.model == "gan":
        check_writable("--out", folder)
    if args.preset is not None and args.preset not in task.PRESETS:
        raise CommandError(
            f"--preset: expected one of {', '.join(task.PRESETS)}, got {args.preset!r}"
        )

    settings = _settings(args, task, checkpoint)
    ops = args.ops or (checkpoint["ops"] if checkpoint else "fast")
    names = ("reference", "fast") if ops == "both" else (ops,)
    try:
        trainers = {name: task.Trainer(settings, name, args.device) for name in names}
    except ValueError as error:  # of settings that are each in range, but not together
        if checkpoint is None:
            raise
        raise training.CheckpointError(f"{args.resume}: damaged: {error}") from None
    first = trainers[names[0]]
    print(
        f"{settings.model}, preset {settings.preset}, {' and '.join(names)} ops, "
        f"seed {settings.seed}, {first.describe()}"
    )
    if checkpoint is not None:
        first.restore(checkpoint, str(args.resume))
        print(f"resumed from {args.resume} after epoch {first.epoch}")

    epochs = args.epochs or task.EPOCHS
    while first.epoch < epochs:
        for name, trainer in trainers.items():
            _train_epoch(trainer, epochs, f" {name:9}" if ops == "both" else "")
        if target:
            first.save(target)
        if first.epoch % args.picture_every == 0 or first.epoch == epochs:
            files = [f for trainer in trainers.values() for f in trainer.write_pictures(folder)]
            if files:
                print(f"wrote {', '.join(map(str, files))}")
    for name, trainer in trainers.items():
        figures = _figures(trainer)
        print(f"{name} ops after {trainer.epoch} epochs: {figures}")
        sample = trainer.sample()
        if sample is not None:
            print(sample)
    return 0


def _train_epoch(trainer: Trainer, epochs: int, who: str) -> None:
    label = f"epoch {trainer.epoch + 1}/{epochs}{who}"
    progress = Progress(label, trainer.steps_per_epoch)
    start = time.perf_counter()
    try:
        losses = trainer.train_epoch(progress.loss)
    finally:
        progress.close()
    seconds = time.perf_counter() - start
    loss = sum(losses) / len(losses)
    print(f"{label}: loss {loss:.4f}, {_figures(trainer)}, {seconds:.2f} s", flush=True)


def _figures(trainer: Trainer) -> str:
    return ", ".join(
        f"{name} {value:.2%}" if name.endswith("accuracy") else f"{name} {value:.4g}"
        for name, value in trainer.evaluate().items()
    )


def _settings(args: argparse.Namespace, task: Any, checkpoint: dict[str, Any] | None) -> Any:
    """The settings asked for, filled up from the checkpoint, which they must not contradict."""
    names = [f.name for f in fields(task.Settings) if hasattr(args, f.name)]
    asked = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if checkpoint is None:
        return task.Settings(**asked)
    for name, value in asked.items():
        theirs = checkpoint["settings"].get(name)
        if theirs != value:
            raise training.CheckpointError(
                f"{args.resume}: was written with {name.replace('_', '-')} {theirs}, not {value}"
            )
    try:
        settings = task.Settings(**checkpoint["settings"])
        training.check_settings(settings, task.PRESETS)
        return settings
    except (TypeError, ValueError) as error:
        raise training.CheckpointError(f"{args.resume}: damaged: settings: {error}") from None
