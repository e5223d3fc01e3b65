"""Rows of results: kept in a JSON file as they come, and printed as a table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from pyops.files import replacing

Row = dict[str, Any]

SCHEMA = 1
KEY = ("op", "shape", "dtype", "direction", "layout", "backend", "device", "torch", "threads")


class ResultsError(ValueError):
    """A results file that cannot be read or added to."""


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by a file holding `text`, or, when interrupted, leaves it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


class ResultsFile:
    """A JSON file `{"schema": 1, "rows": [...]}`, complete and valid after every added row.

    Rows of earlier runs stay; a row with the same `KEY` fields takes the place of the old one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[Row] = []
        if self.path.exists():
            self.rows = read_rows(self.path)

    def add(self, row: Row) -> None:
        key = [row.get(k) for k in KEY]
        self.rows = [r for r in self.rows if [r.get(k) for k in KEY] != key] + [row]
        text = json.dumps({"schema": SCHEMA, "rows": self.rows}, indent=1, allow_nan=False)
        write_atomically(self.path, text + "\n")


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a results file. Raises ResultsError if it is none."""
    try:
        content = json.loads(Path(path).read_text())
        rows, schema = content["rows"], content["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a results file ({error})") from None
    if schema != SCHEMA or not isinstance(rows, list):
        raise ResultsError(f"{path}: expected results of schema {SCHEMA}, got schema {schema!r}")
    return rows


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need; cells that look like numbers are set to the right."""
    widths = [max(len(str(line[i])) for line in [headers, *rows]) for i in range(len(headers))]
    right = [all(_is_number(r[i]) for r in rows) and bool(rows) for i in range(len(headers))]

    def line(cells: list[str]) -> str:
        out = (
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)
        )
        return "  ".join(out).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, rows)])


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+.\de]*[x%]?|inf|nan|refused|FAILED", cell) is not None


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
