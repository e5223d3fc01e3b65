"""Every planted bug is reported, in every order of events."""

from __future__ import annotations

import functools
import hashlib
import re

import pytest
from kernel_checks import CHECKS
from planted_bugs import BUGS, Bug

from build import HERE, OUT, Emulated, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TOGETHER = 8  # mutants of a library: most of the time goes into headers and linking


def mutated(bug: Bug, number: int) -> str:
    """The source with a bug, in a namespace of its own, with the number behind the entries' names."""
    include, source = (HERE / "small_kernels.cu").read_text().split('#include "launch.cuh"\n')
    assert source.count(bug.right) == 1, "the place to plant it in has changed"
    source = source.replace(bug.right, bug.wrong)
    source = re.sub(
        r'extern "C" const char\* (\w+)\(', rf'extern "C" const char* \1_{number}(', source
    )
    return f"namespace mutant_{number} {{\n{source}\n}}\n"


@functools.cache
def mutants(first: int) -> Emulated:
    """Library of the bugs first, first + 1, ..."""
    chosen = list(enumerate(BUGS))[first : first + TOGETHER]
    source = '#include "launch.cuh"\n' + "".join(mutated(bug, number) for number, bug in chosen)
    path = OUT / f"mutants-{hashlib.sha256(source.encode()).hexdigest()[:16]}.cu"
    if not path.is_file():
        OUT.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return Emulated([path], "race")


class Mutant:
    """Calls the entries of one mutant."""

    def __init__(self, number: int) -> None:
        self.number = number

    def call(self, name: str, *args: object, **how: object) -> None:
        first = self.number // TOGETHER * TOGETHER
        mutants(first).call(f"{name}_{self.number}", *args, **how)


@pytest.mark.parametrize("number", range(len(BUGS)))
def test_planted_bug_is_reported(number: int):
    bug = BUGS[number]
    for seed in range(3):
        with pytest.raises(AssertionError) as caught:
            CHECKS[bug.kernel](Mutant(number), seed=seed)
        assert re.search(bug.report, str(caught.value)), (bug, str(caught.value))
