"""Kernels that are right are clean and right on the emulator, in every order of events."""

from __future__ import annotations

import pytest
import torch

from build import HERE, Emulated, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module", params=["plain", "race"])
def kernels(request):
    return Emulated([HERE / "gemm_kernels.cu"], request.param)


@pytest.mark.parametrize("mode", ["early", "late", "random"])
def test_gemm_with_cp_async_and_mma_sync(kernels, mode):
    a, b = torch.randn(128, 80).bfloat16(), torch.randn(64, 80).bfloat16()
    for seed in range(7):
        c = torch.full((128, 64), float("nan"))
        kernels.call("gemm_ampere", a, b, c, 128, 64, 80, seed=seed, mode=mode)
        torch.testing.assert_close(c, a.float() @ b.float().T)
