"""`python -m pyops train`: trains a model on real data, with fast or plain ops."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from pyops import training
from pyops.commands import CommandError, Progress, device, positive_float, positive_int

HELP = "train a model on real data, with fast or plain ops"
DESCRIPTION = """\
Trains a model on scikit-learn's handwritten digits and prints its accuracy on images held back.
With --checkpoint the state is written after every epoch; --resume continues from such a file,
bit for bit as if the run had not been interrupted, and goes on writing to it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Defaults are None: a resumed run takes what is not given from its checkpoint.
    parser.add_argument("model", choices=("cnn",), help="the model to train")
    parser.add_argument(
        "--preset", choices=training.PRESETS, help="architecture of the cnn (default: mnist)"
    )
    parser.add_argument(
        "--ops", choices=training.OPS, help="this package's ops or plain torch (default: fast)"
    )
    parser.add_argument(
        "--epochs", type=positive_int, default=16, help="epochs in all (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of weights and order of the data (default: 0)")
    parser.add_argument("--batch-size", type=positive_int, help="images a step (default: 32)")
    parser.add_argument("--learning-rate", type=positive_float, help="default: 0.05")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the state here")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue from this state")


def run(args: argparse.Namespace) -> int:
    checkpoint = training.read_checkpoint(args.resume) if args.resume else None
    target = args.checkpoint or args.resume
    if args.checkpoint and args.checkpoint.exists() and args.checkpoint != args.resume:
        raise CommandError(
            f"{args.checkpoint}: exists and is not overwritten; continue it with --resume, "
            "or remove it"
        )
    if target and not target.resolve().parent.is_dir():
        raise CommandError(f"{target}: its folder does not exist")

    settings = _settings(args, checkpoint)
    ops = args.ops or (checkpoint["ops"] if checkpoint else "fast")
    data = training.dataset(settings)
    trainer = training.Trainer(settings, ops, data, args.device)
    print(
        f"{settings.model}, preset {settings.preset}, {ops} ops, seed {settings.seed}, "
        f"{len(data.train_labels)} training and {len(data.test_labels)} test images"
    )
    if checkpoint is not None:
        trainer.restore(checkpoint, str(args.resume))
        print(f"resumed from {args.resume} after epoch {trainer.epoch}")

    while trainer.epoch < args.epochs:
        progress = Progress(f"epoch {trainer.epoch + 1}/{args.epochs}", trainer.steps_per_epoch)
        start = time.perf_counter()
        losses = trainer.train_epoch(progress.loss)
        seconds = time.perf_counter() - start
        progress.close()
        if target:
            trainer.save(target)
        print(
            f"epoch {trainer.epoch}/{args.epochs}: loss {sum(losses) / len(losses):.4f}, "
            f"test accuracy {trainer.test_accuracy():.2%}, {seconds:.2f} s",
            flush=True,
        )
    print(f"test accuracy after {trainer.epoch} epochs: {trainer.test_accuracy():.2%}")
    return 0


def _settings(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> training.Settings:
    """The settings asked for, filled up from the checkpoint, which they must not contradict."""
    names = [f.name for f in fields(training.Settings) if hasattr(args, f.name)]
    asked = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if checkpoint is None:
        return training.Settings(**asked)
    for name, value in asked.items():
        if checkpoint["settings"][name] != value:
            raise training.CheckpointError(
                f"{args.resume}: was written with {name.replace('_', '-')} "
                f"{checkpoint['settings'][name]}, not {value}"
            )
    return training.Settings(**checkpoint["settings"])
