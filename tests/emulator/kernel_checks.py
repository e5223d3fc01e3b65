"""Runs the kernels of small_kernels.cu, each against plain torch."""

from __future__ import annotations

import torch

from build import Emulated


def check_gemm_ampere(kernels: Emulated, **how: object) -> None:
    a, b = torch.randn(128, 80).bfloat16(), torch.randn(64, 80).bfloat16()
    c = torch.full((128, 64), float("nan"))
    kernels.call("gemm_ampere", a, b, c, 128, 64, 80, **how)
    torch.testing.assert_close(c, a.float() @ b.float().T)


def check_gemm_hopper(kernels: Emulated, **how: object) -> None:
    m, n, k = 136, 72, 320  # partial boxes; the ring goes round
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    kernels.call("gemm_hopper", a, b, c, m, n, k, **how)
    torch.testing.assert_close(c, (a.float() @ b.float().T).bfloat16())


def check_cluster_sums(kernels: Emulated, **how: object) -> None:
    x = torch.randn(3 * 64, 32)
    sums, mirror = torch.full((2, 3, 2, 64), float("nan"))
    kernels.call("cluster_sums", x, sums, mirror, 3, **how)
    expected = x.view(3, 1, 64, 32).sum(-1).expand(3, 2, 64)
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(mirror, expected.flip(-1))


def check_last_block_sum(kernels: Emulated, **how: object) -> None:
    x, partial, total = torch.randn(5 * 64), torch.full((5,), float("nan")), torch.zeros(1)
    kernels.call("last_block_sum", x, partial, torch.zeros(1, dtype=torch.int32), total, 5, **how)
    torch.testing.assert_close(total[0], x.sum())


CHECKS = {
    "gemm_ampere": check_gemm_ampere,
    "gemm_hopper": check_gemm_hopper,
    "cluster_sums": check_cluster_sums,
    "last_block_sum": check_last_block_sum,
}
