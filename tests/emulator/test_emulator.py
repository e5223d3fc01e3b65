"""Kernels that are right are clean and right on the emulator, in every order of events."""

from __future__ import annotations

import pytest
from kernel_checks import CHECKS

from build import HERE, Emulated, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module", params=["plain", "race"])
def kernels(request):
    return Emulated([HERE / "small_kernels.cu"], request.param)


@pytest.mark.parametrize("mode", ["early", "late", "random"])
@pytest.mark.parametrize("name", CHECKS)
def test_right_kernels_are_clean(kernels, name, mode):
    for seed in range(7):
        CHECKS[name](kernels, seed=seed, mode=mode)


def test_concurrent_blocks(kernels):
    for seed in range(7):
        CHECKS["last_block_sum"](kernels, seed=seed, resident=3)
