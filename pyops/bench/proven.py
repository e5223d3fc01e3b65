"""What GPU runs have proven, for automatic choice: pyops/proven.json from benchmarks/results/*/gpu-test.json.

`make gpu-test` writes gpu-test.json. Commit it under benchmarks/results/<device>/, then run
`python -m pyops.bench.proven`, and commit what changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROVEN = ROOT / "pyops" / "proven.json"


def summary(outcomes: dict[tuple[str, str], dict[str, int]], **facts: Any) -> dict[str, Any]:
    """The content of gpu-test.json: `outcomes` counts, for each op and backend, "passed", "failed", "skipped"."""
    rows = [{"op": op, "backend": b, **counts} for (op, b), counts in sorted(outcomes.items())]
    return facts | {"outcomes": rows}


def collect(root: Path) -> list[dict[str, Any]]:
    """Each op and backend that passed all of its GPU tests, with the capability and the results file."""
    rows = []
    for path in sorted(root.glob("benchmarks/results/*/gpu-test.json")):
        run = json.loads(path.read_text())
        for row in run["outcomes"]:
            if row.get("passed", 0) > 0 and row.get("failed", 0) == 0:
                proof = {key: row[key] for key in ("op", "backend")}
                results = path.relative_to(root).as_posix()
                rows.append(proof | {"capability": run["capability"], "results": results})
    return rows


if __name__ == "__main__":
    PROVEN.write_text(json.dumps(collect(ROOT), indent=1) + "\n")
