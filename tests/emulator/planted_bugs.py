"""Mistakes to plant into small_kernels.cu, and what the emulator must say about each.

Bug(kernel, right, wrong, report): `right` stands in the source once and
becomes `wrong`; `report` is a pattern of the report, NUMBERS where only the result
can show it.
"""

from __future__ import annotations

from dataclasses import dataclass

NUMBERS = "Tensor-likes are not close"
RACE = "race: "


@dataclass(frozen=True)
class Bug:
    kernel: str
    right: str
    wrong: str
    report: str


AMPERE = [
    Bug("gemm_ampere", "    sync_threads();\n    load(step", "    load(step", RACE),
    Bug("gemm_ampere", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()", RACE),
    Bug("gemm_ampere", "    cp_async_commit();\n  };", "  };", RACE),
    Bug("gemm_ampere", "load(step + STAGES - 1);", "load(step + STAGES);", RACE),
    Bug("gemm_ampere", "step % STAGES * STAGE) +", "step % (STAGES - 1) * STAGE) +", RACE),
    Bug("gemm_ampere", "half * 8) * 2,", "half * 8) * 2 + 8,", "not aligned to 16"),
    Bug("gemm_ampere", "i < 256; i += 128", "i < 272; i += 128", "outside|" + RACE),
    Bug("gemm_ampere", "step * 16 + half * 8);", "step * 16 + half * 16);", "global access|" + NUMBERS),
    Bug("gemm_ampere", "i < 256; i += 128", "i < 240; i += 128", NUMBERS),
    Bug("gemm_ampere", "lane / 16 * 8) * 2", "lane / 8 % 2 * 8) * 2", NUMBERS),
    Bug("gemm_ampere", "+ 8 * (i / 2)) * n", "+ 8 * (i % 2)) * n", RACE + "|" + NUMBERS),
    Bug("gemm_ampere", "STAGES * 2 * 64 * 24 * 2}", "STAGES * 2 * 64 * 24 * 2 - 32}", "outside"),
    Bug("gemm_ampere", "uint32_t columns[2];", "uint32_t columns[2]; if (lane == 3) continue;",
        "deadlock|other lanes are at"),
]  # fmt: skip
HOPPER = [
    Bug("gemm_hopper", "    fence_mbarrier_init();\n  }\n  sync_threads();\n  if (warp >= 8)",
        "  }\n  sync_threads();\n  if (warp >= 8)", "no fence_mbarrier_init"),
    Bug("gemm_hopper", "  sync_threads();\n  if (warp >= 8)", "  if (warp >= 8)",
        "nothing orders the init|holds no initialised"),
    Bug("gemm_hopper", "mbar_wait(empty + 8 * i, phase ^ 1)", "mbar_wait(empty + 8 * i, phase)",
        r"deadlock:\n  block \(\d, \d, 0\) warp  \d waits for mbarrier 0x[0-9a-f]+, parity 0 at "
        r"mutants-\w+\.cu:\d+ \(32 lanes, mask ffffffff\)"),
    Bug("gemm_hopper", "        mbar_wait(empty + 8 * i, phase ^ 1);\n", "",
        RACE + "|more arrivals"),
    Bug("gemm_hopper", "    mbar_wait(full + 8 * i, phase);\n", "", RACE),
    Bug("gemm_hopper", "mbar_wait(full + 8 * i, phase)", "mbar_wait(full + 8 * i, phase ^ 1)",
        RACE + "|deadlock"),
    Bug("gemm_hopper", "expect_tx(full + 8 * i, 3 * TILE)", "expect_tx(full + 8 * i, 4 * TILE)",
        "deadlock"),
    Bug("gemm_hopper", "expect_tx(full + 8 * i, 3 * TILE)", "expect_tx(full + 8 * i, 2 * TILE)",
        "deadlock|bytes|" + RACE),
    Bug("gemm_hopper", "mbar_init(empty + 8 * i, 8)", "mbar_init(empty + 8 * i, 9)", "deadlock"),
    Bug("gemm_hopper", "mbar_init(empty + 8 * i, 8)", "mbar_init(empty + 8 * i, 4)", RACE),
    Bug("gemm_hopper", "if (lane == 0) mbar_arrive(empty + 8 * i);",
        "if (threadIdx.x % 128 == 0) for (int w = 0; w < 4; ++w) mbar_arrive(empty + 8 * i);", RACE),
    Bug("gemm_hopper", "    wgmma_fence();\n", "", "wgmma_fence"),
    Bug("gemm_hopper", "    wgmma_wait<0>();\n    if", "    if", RACE + "|in flight"),
    Bug("gemm_hopper", "wgmma_wait<0>()", "wgmma_wait<1>()", RACE + "|in flight"),
    Bug("gemm_hopper", "    wgmma_commit();\n", "", RACE + "|in flight"),
    Bug("gemm_hopper", "    wgmma_wait<0>();\n    if (lane == 0) mbar_arrive(empty + 8 * i);",
        "    if (lane == 0) mbar_arrive(empty + 8 * i);\n    wgmma_wait<0>();", RACE),
    Bug("gemm_hopper", "step > 0 || kk > 0", "true", NUMBERS),
    Bug("gemm_hopper", "stage + group * TILE + kk * 32, 0, 1024", "stage + kk * 32, 0, 1024",
        NUMBERS),
    Bug("gemm_hopper", "stage + 2 * TILE + kk * 32, 0, 1024", "stage + 2 * TILE + kk * 32, 0, 512",
        NUMBERS),
    Bug("gemm_hopper", "Swizzle::B128>(stage + 2", "Swizzle::B64>(stage + 2", NUMBERS),
    Bug("gemm_hopper", "  fence_proxy_async_shared();\n", "", "no proxy fence"),
    Bug("gemm_hopper", "  if (group == 0)\n    named_barrier_sync<1, 128>();\n  else\n"
        "    named_barrier_sync<2, 128>();\n", "", RACE),
    Bug("gemm_hopper", "    named_barrier_sync<2, 128>();", "    named_barrier_sync<1, 128>();",
        RACE + "|barrier 1|deadlock"),
    Bug("gemm_hopper", "named_barrier_sync<1, 128>", "named_barrier_sync<1, 160>", "deadlock"),
    Bug("gemm_hopper", "    bulk_wait_read<0>();\n", "", "bulk stores"),
    Bug("gemm_hopper", "    bulk_commit();\n", "", "bulk stores"),
    Bug("gemm_hopper", "(j ^ row % 8) * 16", "j * 16", NUMBERS),
    Bug("gemm_hopper", "{step * 64, column0}", "{step * 64 + 1, column0}", NUMBERS),
    Bug("gemm_hopper", "{column0, row0 + group * 64}", "{column0, row0}", RACE),
    Bug("gemm_hopper", "setmaxnreg_inc<240>", "setmaxnreg_inc<248>", "registers"),
    Bug("gemm_hopper", "&& elect_one()) {", "&& lane < 2) {", "more|deadlock|mbarrier|" + RACE),
    Bug("gemm_hopper", "2) * TILE + 16 * RING}", "2) * TILE + 8 * RING}", "outside"),
    Bug("gemm_hopper", "    wgmma_commit();", "    wgmma_commit();\n    sums[3] *= 2;", "in flight"),
]  # fmt: skip
CLUSTERS = [
    Bug("cluster_sums", "    fence_mbarrier_init();\n    mbar_arrive_expect_tx(loaded",
        "    mbar_arrive_expect_tx(loaded", "no fence_mbarrier_init"),
    Bug("cluster_sums", "  cluster_sync();\n  if (row == 0)", "  sync_threads();\n  if (row == 0)",
        "holds no initialised|nothing orders"),
    Bug("cluster_sums", "expect_tx(loaded, 8192)", "expect_tx(loaded, 4096)",
        "bytes|deadlock|" + RACE),
    Bug("cluster_sums", "static_cast<int>(rank) * 32}, 3)", "static_cast<int>(rank) * 32}, 1)",
        "deadlock|bytes"),
    Bug("cluster_sums", "rows + rank * 4096, &x", "rows, &x", RACE),
    Bug("cluster_sums", "  mbar_wait(loaded, 0);\n", "", RACE),
    Bug("cluster_sums", "  mbar_wait_cluster(arrived, 0);\n", "", RACE),
    Bug("cluster_sums", "map_cluster(arrived, other)", "arrived", "in another block"),
    Bug("cluster_sums", "map_cluster(inbox + 4 * row, other)", "inbox + 4 * row",
        "in another block"),
    Bug("cluster_sums", "  cluster_sync();\n  mirror", "  sync_threads();\n  mirror",
        RACE + "|has ended"),
    Bug("cluster_sums", "  cluster_sync();\n  mirror", "  cluster_arrive();\n  mirror", RACE),
    Bug("cluster_sums", "const uint32_t rank = cluster_rank()", "const uint32_t rank = 0", RACE),
    Bug("last_block_sum", "    __threadfence();\n    *last", "    *last", RACE),
    Bug("last_block_sum", "== gridDim.x - 1;\n    __threadfence();", "== gridDim.x - 1;", RACE),
    Bug("last_block_sum", "    sync_threads();\n  }\n  if (thread", "  }\n  if (thread", RACE),
    Bug("last_block_sum", "x[blockIdx.x * 64 + thread]", "x[blockIdx.x * 64 + thread + 1]",
        "global access"),
    Bug("last_block_sum", "  sync_threads();\n  if (thread == 32", "  if (thread == 32", RACE),
]  # fmt: skip
BUGS = [*AMPERE, *HOPPER, *CLUSTERS]
