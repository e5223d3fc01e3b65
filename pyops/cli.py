"""The command line: `python -m pyops {info,check,bench,train,demo}`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import pyops
from pyops.bench.report import ResultsError
from pyops.commands import CommandError, bench, check, demo, info, train
from pyops.training import CheckpointError, TrainingError

COMMANDS = {"info": info, "check": check, "bench": bench, "train": train, "demo": demo}
EXIT_CODES = "exit codes: 0 all right, 1 a check or a training run failed, 2 wrong usage or input"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyops",
        description="Fast ops for PyTorch: what is there, is it right, is it fast.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"pyops {pyops.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. Usage errors raise SystemExit(2), as in argparse."""
    args = make_parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except (CommandError, CheckpointError, ResultsError, ModuleNotFoundError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        message = " ".join(str(error).split())
        print(f"pyops {args.command}: error: {message}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"pyops {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pyops {args.command}: interrupted", file=sys.stderr)
        return 130
