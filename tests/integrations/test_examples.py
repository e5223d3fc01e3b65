"""The scripts of docs/examples run from beginning to end."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_masked_lm():
    script = [sys.executable, EXAMPLES / "masked_lm.py", "--steps", "3"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plain, fast = (
        [line[9:] for line in lines if line.startswith(f"  {n}: ")] for n in ("plain", "pyops")
    )
    assert len(plain) == len(fast) == 4
    assert plain == fast and all(line.count("%") == 3 for line in plain)
