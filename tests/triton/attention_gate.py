"""Compiles the attention kernels for GPUs that need not be here; run as a program, as compile_gate.

`python attention_gate.py table` writes what docs/kernels/attention_triton.md shows: every case.
"""

import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass

import torch
from compile_gate import _compile as compile_launch
from compile_gate import _recorded as recorded
from pyops.triton_kernels import attention, attention_decode, attention_varlen, common


@dataclass(frozen=True)
class Case:
    head_dim: int = 128
    value_dim: int | None = None
    heads: int = 16
    kv_heads: int = 16
    seqlen_q: int = 2048
    seqlen_k: int = 2048
    dtype: torch.dtype = torch.bfloat16
    bias: torch.dtype | None = None
    alibi: bool = False
    sinks: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    window: tuple[int, int] = (-1, -1)
    varlen: bool = False
    decode: bool = False
    wide: bool = False  # offsets past 32 bits

    def launches(self, backward: bool, record: list) -> None:
        """Calls the launchers; those of the direction in question stay in `record`."""

        def meta(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        batch, value_dim = 4, self.value_dim or self.head_dim
        slopes = meta(self.heads, dtype=torch.float32) if self.alibi else None
        sinks = meta(self.heads, dtype=torch.float32) if self.sinks else None
        rng_state = meta(2, dtype=torch.int64) if self.dropout_p else None
        options = (self.head_dim**-0.5, self.softcap, *self.window)
        if self.decode:
            query = meta(batch, self.heads, self.seqlen_q, self.head_dim)
            key, value = (meta(batch, self.kv_heads, 1, d) for d in (self.head_dim, value_dim))
            caches = (meta(900, self.kv_heads, 64, d) for d in (self.head_dim, value_dim))
            lengths, table = meta(batch, dtype=torch.int32), meta(batch, 99, dtype=torch.int32)
            rotary = meta(8192, self.head_dim // 2), meta(8192, self.head_dim // 2), False
            new = (key, value, lengths, None, table)
            attention_decode.decode(query, *caches, *new, *rotary, slopes, sinks, *options, 0)
            return
        options = (*options, False, self.dropout_p)
        if self.varlen:
            query = meta(batch * self.seqlen_q, self.heads, self.head_dim)
            key = meta(batch * self.seqlen_k, self.kv_heads, self.head_dim)
            value = meta(batch * self.seqlen_k, self.kv_heads, value_dim)
            lengths = meta(batch + 1, dtype=torch.int32)
            extra = (lengths, lengths, self.seqlen_q, self.seqlen_k, slopes, sinks, rng_state)
            ops, mask = attention_varlen, (True, True, True, self.sinks)
        else:
            rows = 2**31 // self.head_dim if self.wide else 0
            query = meta(batch, self.heads, self.seqlen_q + rows, self.head_dim)
            query = query[:, :, : self.seqlen_q] if not self.wide else query
            key = meta(batch, self.kv_heads, self.seqlen_k, self.head_dim)
            value = meta(batch, self.kv_heads, self.seqlen_k, value_dim)
            bias = None
            if self.bias is not None:
                bias = meta(1, self.heads, self.seqlen_q, self.seqlen_k, dtype=self.bias)
            extra = (bias, slopes, sinks, rng_state)
            graded = self.bias is not None and self.bias is not torch.bool
            ops, mask = attention, (True, True, True, graded, self.sinks)
        output, lse = ops.forward(query, key, value, *extra, *options)
        if backward:
            record.clear()
            given = (output, None, query, key, value, output, lse)
            ops.backward(*given, *extra, *options, mask)


CAUSAL = (-1, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "128": Case(),
    "128 causal": Case(window=CAUSAL),
    "64 causal": Case(64, window=CAUSAL),
    "256 causal": Case(256, window=CAUSAL),
    "128 packed, grouped, window": Case(kv_heads=4, window=(256, 0), varlen=True),
    "128 soft cap, window, sinks": Case(softcap=30.0, window=(256, 0), sinks=True),
    "128 bias, dropout": Case(bias=BF16, dropout_p=0.1),
    "64 float16 bool bias, ALiBi": Case(64, dtype=FP16, bias=torch.bool, alibi=True),
    "111, value 59, causal": Case(111, 59, window=CAUSAL),
    "256 float32 causal": Case(256, dtype=FP32, window=CAUSAL),
    "128 float32 bias, dropout": Case(dtype=FP32, bias=FP32, dropout_p=0.1),
    "64 float32 soft cap, window, sinks": Case(
        64, dtype=FP32, softcap=30.0, window=(256, 0), sinks=True
    ),
    "256 float32 decode": Case(256, heads=32, kv_heads=8, seqlen_q=1, dtype=FP32, decode=True),
    "one key": Case(64, heads=1, kv_heads=1, seqlen_q=1, seqlen_k=1, window=(1, 1)),
    "128 decode, paged": Case(heads=32, kv_heads=8, seqlen_q=1, window=CAUSAL, decode=True),
}
MORE = {
    "64": Case(64),
    "256": Case(256),
    "256 dropout, causal": Case(256, dropout_p=0.1, window=CAUSAL),
    "256 bias": Case(256, bias=torch.float32),
    "256 window": Case(256, window=(256, 0)),
    "256 soft cap, causal": Case(256, softcap=30.0, window=CAUSAL),
    "250 causal": Case(250, window=CAUSAL),
    "250 bias, dropout": Case(250, bias=BF16, dropout_p=0.1),
    "128 packed causal": Case(window=CAUSAL, varlen=True),
    "128 packed": Case(varlen=True),
    "128 packed dropout": Case(varlen=True, dropout_p=0.1),
    "128 window": Case(window=(256, 256)),
    "128 ALiBi, causal": Case(alibi=True, window=CAUSAL),
    "128 dropout, causal": Case(dropout_p=0.1, window=CAUSAL),
    "128 bias": Case(bias=BF16),
    "128 bool bias": Case(bias=torch.bool),
    "111 bias, dropout, window": Case(111, bias=BF16, dropout_p=0.1, window=(99, 0)),
    "111 soft cap, causal": Case(111, softcap=30.0, window=CAUSAL),
    "59 window": Case(59, window=(64, 0)),
    "59 dropout, bias": Case(59, dropout_p=0.1, bias=BF16),
    "64 window": Case(64, window=(256, 0)),
    "64 packed causal": Case(64, window=CAUSAL, varlen=True),
    "64 packed ALiBi, causal": Case(64, alibi=True, window=CAUSAL, varlen=True),
    "64 soft cap, causal": Case(64, softcap=30.0, window=CAUSAL),
    "64 dropout, causal": Case(64, dropout_p=0.1, window=CAUSAL),
    "64 bias, dropout": Case(64, dropout_p=0.1, bias=BF16),
    "32 causal": Case(32, window=CAUSAL),
    "32 dropout": Case(32, dropout_p=0.1),
    "192, value 128, causal": Case(192, 128, window=CAUSAL),
    "40 queries": Case(seqlen_q=40, window=CAUSAL),
    "64 float32 causal": Case(64, dtype=FP32, window=CAUSAL),
    "128 float32 causal": Case(dtype=FP32, window=CAUSAL),
    "16 float32 bias, dropout": Case(16, dtype=FP32, bias=FP32, dropout_p=0.1),
    "64 float32 bias, dropout": Case(64, dtype=FP32, bias=FP32, dropout_p=0.1),
    "256 float32 bias, dropout": Case(256, dtype=FP32, bias=FP32, dropout_p=0.1),
    "128 float32 packed, grouped, window": Case(
        dtype=FP32, kv_heads=4, window=(256, 0), varlen=True
    ),
    "111 float32, value 59, packed": Case(111, 59, dtype=FP32, kv_heads=4, varlen=True),
    "256 float32 soft cap, window, sinks": Case(
        256, dtype=FP32, softcap=30.0, window=(256, 0), sinks=True
    ),
    "128 float32 ALiBi, causal": Case(dtype=FP32, alibi=True, window=CAUSAL),
    "128 float32 decode": Case(heads=32, kv_heads=8, seqlen_q=1, dtype=FP32, decode=True),
    "256 decode": Case(256, heads=32, kv_heads=8, seqlen_q=2, decode=True),
}
# On 80 all loads are by pointers.
FLOAT32 = tuple(name for name, case in (CASES | MORE).items() if case.dtype is FP32)
ELSEWHERE = ("128 causal", "128 decode, paged", *FLOAT32)
FORWARD_ONLY = ("one key", *(name for name, case in (CASES | MORE).items() if case.decode))

# What their backward adds to the other gated cases' is left to the table.
GATED_FORWARD_ONLY = ("64 causal", "128 soft cap, window, sinks")


def jobs(archs: list[int], names, forward_only=FORWARD_ONLY) -> list[tuple[int, str, bool]]:
    """(architecture, case, whether backward)."""
    return [
        (arch, name, backward)
        for backward in (True, False)
        for arch in archs
        for name in names
        if (arch == 90 or name in ELSEWHERE) and not (backward and name in forward_only)
    ]


def compile_case(job: tuple[int, str, bool]) -> list[dict]:
    arch, name, backward = job
    record = []
    with recorded(arch, record):
        (CASES | MORE)[name].launches(backward, record)
    return [
        asdict(compile_launch(name, arch, kernel, config, bind))
        for kernel, configs, bind in record
        for config in configs
    ]


def compile_spilling() -> dict:
    """A tile too large for its warps, to see that a spill is seen."""
    record = []
    with recorded(90, record):
        CASES["128"].launches(False, record)
    ((kernel, _, bind),) = record
    config = common.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=4, num_stages=2)
    return asdict(compile_launch("spilling", 90, kernel, config, bind))


def main(arguments: list[str]) -> None:
    """Writes the list of all that was compiled as JSON."""
    wanted = (CASES, (*FORWARD_ONLY, *GATED_FORWARD_ONLY))
    if arguments == ["table"]:
        wanted = ([*CASES, *MORE], FORWARD_ONLY)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(compile_case, jobs([80, 90, 100], *wanted), chunksize=1)
    json.dump([row for rows in results for row in rows] + [compile_spilling()], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
