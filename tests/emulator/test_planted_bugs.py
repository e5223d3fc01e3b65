"""Every planted bug is reported, in every order of events."""

from __future__ import annotations

import re

import pytest
from kernel_checks import CHECKS
from planted_bugs import BUGS, Bug

from build import HERE, Emulated, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.kernel}:{bug.wrong or bug.right}")
def test_planted_bug_is_reported(bug: Bug, tmp_path):
    source = (HERE / "small_kernels.cu").read_text()
    assert source.count(bug.right) == bug.times, "the place to plant it in has changed"
    mutant = tmp_path / "mutant.cu"
    mutant.write_text(source.replace(bug.right, bug.wrong))
    kernels = Emulated([mutant], "race")
    for seed in range(3):
        with pytest.raises(AssertionError) as caught:
            CHECKS[bug.kernel](kernels, seed=seed)
        assert re.search(bug.report, str(caught.value)), caught.value
