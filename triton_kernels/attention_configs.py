"""Tile shapes of the attention kernels.

One config a case, so that the same inputs give the same bits in every process: another block of
keys rounds differently.
"""

import torch

from .attention_tile import Flags
from .common import INTERPRET, Config, power_of_2


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, maxnreg=None) -> Config:
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return Config(constants, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


def forward_configs(
    flags: Flags, dtype: torch.dtype, capability: tuple[int, int], seqlen_q: int
) -> list[Config]:
    width = max(flags.BLOCK_D, flags.BLOCK_DV)
    if INTERPRET:
        return [_config(32, 16, 4, 1)]
    if dtype is torch.float32:
        return [_config(32, 32, 8, 1)]
    heavy = flags.BIAS != "none" or flags.DROPOUT
    if flags.LOADS == "pointers":
        if width <= 128:
            return [_config(64, 64 if width <= 64 and not heavy else 32, 8 if heavy else 4, 2)]
        return [_config(64, 16, 8, 2)]
    if seqlen_q <= 64:
        return [_config(64, 64 if width <= 128 else 32, 4, 2)]
    if width <= 64:
        # 128 registers let two programs share a multiprocessor.
        plain = flags.FOLDED and not (flags.LEFT or flags.DROPOUT)
        return [_config(128, 64, 8, 3, 128 if plain else None)]
    if width <= 128:
        small = heavy or flags.SOFTCAP or (flags.LEFT and flags.VARLEN)
        if flags.BIAS != "none" and flags.DROPOUT:
            return [_config(128, 32, 8, 2)]
        return [_config(128, 64 if small else 128, 8, 2)]
    return [_config(128, 32 if heavy else 64, 8, 2)]


def _backward(block_m: int, block_n: int, num_warps: int, num_stages: int, split=True) -> Config:
    config = _config(block_m, block_n, num_warps, num_stages)
    config.constants["SPLIT"] = split
    return config


def key_configs(flags: Flags, dtype: torch.dtype) -> list[Config]:
    width = max(flags.BLOCK_D, flags.BLOCK_DV)
    if INTERPRET:
        return [_backward(16, 32, 4, 1, width < 64)]
    heavy = flags.BIAS != "none" or flags.DROPOUT
    if dtype is torch.float32:
        block_n = 16 if heavy and width > 128 else 32
        return [_backward(16 if heavy or width > 64 else 32, block_n, 8, 1, False)]
    if flags.LOADS == "pointers":
        if width <= 64:
            return [_backward(32 if heavy else 64, 64, 8 if heavy else 4, 2, not heavy)]
        return [_backward(32, 64, 8, 1 if width > 128 else 2, False)]
    if width <= 64:
        return [_backward(64, 128, 8, 2, not heavy)]
    # Two loops of the largest tiles would spill.
    if width <= 128:
        if flags.BIAS != "none" and flags.DROPOUT:
            return [_backward(32, 64, 8, 2, False)]
        small = heavy or flags.SOFTCAP or flags.VARLEN
        return [_backward(32 if small else 64, 128, 8, 2, False)]
    return [_backward(32, 64, 8, 2, False)]


def query_configs(flags: Flags, dtype: torch.dtype) -> list[Config]:
    width = max(flags.BLOCK_D, flags.BLOCK_DV)
    if INTERPRET:
        return [_backward(32, 16, 4, 1, width < 64)]
    heavy = flags.BIAS != "none" or flags.DROPOUT
    if dtype is torch.float32:
        return [_backward(32, 32 if width <= 128 else 16, 8, 1, False)]
    if flags.LOADS == "pointers":
        if width <= 64:
            return [_backward(64, 64, 4, 2)]
        return [_backward(64, 32, 8 if width > 128 or heavy else 4, 1 if width > 128 else 2, False)]
    if width <= 64:
        return [_backward(128, 64, 8, 1 if heavy else 2)]
    if width <= 128:
        if heavy:
            return [_backward(128, 64, 8, 1, False)]
        return [_backward(128, 64 if flags.SOFTCAP else 128, 8, 2)]
    return [_backward(128, 32, 8, 2, False)]


def bias_configs(flags: Flags, dtype: torch.dtype) -> list[Config]:
    if INTERPRET:
        return [_config(16, 16, 4, 1)]
    if dtype is torch.float32:
        return [_config(32, 32, 8, 1)]
    return [_config(64, 64, 8, 1)]


def decode_configs(flags: Flags, dtype: torch.dtype, rows: int) -> list[Config]:
    """`rows`: queries of all heads that share a key head."""
    width = max(flags.BLOCK_D, flags.BLOCK_DV)
    if INTERPRET:
        return [_config(16, 16, 4, 1)]
    block_m = power_of_2(rows, 16, 64 if width <= 128 else 32)
    if dtype is torch.float32:
        return [_config(16, 32, 4, 2) if width <= 128 else _config(16, 16, 8, 1)]
    return [_config(block_m, 64 if width <= 128 else 32, 4, 3)]
