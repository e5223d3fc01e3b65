"""The Hopper convolutions, executed on the CPU by the emulator."""

import functools
from dataclasses import replace

import pytest
import torch
from conv_pool_wgmma_run import Case, Emulated, sources

import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

NAN, INF = float("nan"), float("inf")


def _special(x: torch.Tensor) -> None:
    """NaNs alone and two in a window, infinities in the border and inside."""
    x[0, 0, 3, 4] = NAN
    x[0, 1, 9, 9] = x[0, 1, 8, 8] = NAN
    x[-1, 0, 0, 0] = INF
    x[-1, 1, 6, 11] = -INF


DEEP = {
    "resident": Case((1, 64, 28, 24), 64, whole=True),
    "several images, odd sizes": Case((3, 64, 17, 19), 64),
    "two output blocks": Case((2, 64, 9, 30), 128, padding=2, bias=False, multiprocessors=5),
    "ring": Case((3, 128, 15, 9), 80, multiprocessors=1),
    "ring, remainder of 24 channels": Case(
        (2, 152, 15, 9), 64, activation="leaky_relu", dtype=torch.float16
    ),
    "32 channels, no pool": Case((1, 32, 9, 13), 48, padding=0, pool=False, activation="none"),
    "no pool, leaky": Case((2, 64, 7, 9), 64, pool=False, activation="leaky_relu"),
    "no codes": Case((1, 16, 16, 16), 16, codes=False, dtype=torch.float16),
    "ties": Case((2, 24, 12, 16), 64, whole=True, activation="none"),
    "slope 0": Case((1, 24, 12, 16), 64, whole=True, activation="leaky_relu", slope=0.0),
    "special values": Case((2, 64, 14, 16), 64, edit=_special),
    "one window": Case((1, 64, 2, 2), 64),
}
FIRST = {
    "3 channels": Case((2, 3, 33, 35), 64, whole=True),
    "3 channels, NCHW": Case((2, 3, 33, 35), 64, channels_last=False),
    "3 channels, no padding": Case((1, 3, 33, 40), 40, padding=0, dtype=torch.float16),
    "3 channels, no pool": Case((1, 3, 20, 37), 72, pool=False, activation="leaky_relu"),
    "3 channels to 32": Case((1, 3, 34, 18), 32, activation="none", multiprocessors=1),
    "1 channel": Case((3, 1, 28, 28), 32, padding=0),
    "1 channel, 5x5": Case((1, 1, 28, 28), 64, (5, 5), padding=2, whole=True),
    "1 channel, 2x3": Case((1, 1, 21, 20), 16, (2, 3), activation="leaky_relu"),
    "special values": Case((2, 3, 20, 20), 64, edit=_special),
    "one window": Case((1, 3, 2, 2), 8),
}
REFUSED = {
    "channels": Case((1, 12, 8, 8), 64),
    "output channels": Case((1, 64, 8, 8), 72),
    "kernel": Case((1, 64, 8, 8), 64, (5, 5), padding=2),
    "3 channels, kernel": Case((1, 3, 8, 8), 64, (2, 2), padding=0),
    "NCHW": Case((1, 64, 8, 8), 64, channels_last=False),
    "slope below 0": Case((1, 64, 8, 8), 64, activation="leaky_relu", slope=-0.5),
}


@functools.cache
def kernels() -> Emulated:
    return Emulated(sources(), "race")


@pytest.mark.parametrize("addressing", ["copies", "shifted", "planes"])
@pytest.mark.parametrize("name", DEEP)
def test_deep(name, addressing):
    assert DEEP[name].facts(kernels())[0] == 1
    assert DEEP[name].check(kernels(), addressing, seed=1) <= 2


@pytest.mark.parametrize("name", FIRST)
def test_first_layers(name):
    assert FIRST[name].facts(kernels())[0] == 2
    assert FIRST[name].check(kernels(), seed=1) <= 2


@pytest.mark.parametrize("height, rows", [(14, 14), (16, 16), (28, 28), (32, 32)])
def test_tile_heights(height, rows):
    case = Case((1, 16, height, 16), 16, whole=True, multiprocessors=1)
    assert case.facts(kernels(), "shifted")[1] == rows
    case.check(kernels(), "shifted")


@pytest.mark.parametrize(
    "case, addressing",
    [
        (Case((5, 32, 4, 8), 64, whole=True, multiprocessors=1), "copies"),
        (Case((3, 80, 4, 8), 64, whole=True, multiprocessors=1), "copies"),
        (Case((5, 32, 4, 8), 64, whole=True, multiprocessors=1), "shifted"),
        (Case((3, 3, 4, 8), 64, whole=True, multiprocessors=1), "chosen"),
    ],
    ids=["resident", "ring", "one tile", "first layer"],
)
def test_every_order(case, addressing):
    """Whatever order threads, copies and products take: the same bits, no race, no deadlock."""
    first, codes = case.run(kernels(), addressing, mode="early")
    for seed, mode in [(0, "late"), *((seed, "random") for seed in range(20))]:
        again, codes_again = case.run(kernels(), addressing, seed=seed, mode=mode)
        assert torch.equal(first, again) and torch.equal(codes, codes_again)


def test_base_offset_as_documented():
    """In the emulator's reading of PTX the addressing with base offsets is wrong: one of the two is."""
    with pytest.raises(AssertionError):
        Case((1, 64, 14, 16), 64, whole=True).check(kernels(), "pitch16")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    assert REFUSED[name].facts(kernels())[0] == 0


def test_refuses_misaligned():
    case = DEEP["no codes"]
    x, w, _ = case.tensors()
    facts = torch.zeros(7, dtype=torch.int64)
    arguments = case.sizes(x), 0.0, x.flatten()[1:], w, None, None, 0, facts
    kernels().call("conv_relu_pool_wgmma_facts", *arguments)
    assert facts[0] == 0


@pytest.mark.parametrize(
    "shape, out_channels, rows, grid",
    [
        ((8, 64, 224, 224), 64, 32, 132),
        ((8, 64, 112, 112), 128, 16, 132),
        ((8, 256, 56, 56), 256, 28, 132),
        ((64, 32, 32, 32), 64, 32, 128),
        ((32, 512, 14, 14), 512, 14, 132),
        ((1, 512, 14, 14), 512, 14, 8),
    ],
)
def test_plan(shape, out_channels, rows, grid):
    case = Case((1, 8, 2, 2), out_channels, multiprocessors=132)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(
        memory_format=torch.channels_last
    )
    sizes = replace(case, shape=shape).sizes(x)
    facts = torch.zeros(7, dtype=torch.int64)
    kernels().call("conv_relu_pool_wgmma_facts", sizes, 0.0, None, None, None, None, 1, facts)
    which, planned, tiles_h, tiles_w, works, resident, blocks = facts.tolist()
    assert which == 1 and (planned, blocks) == (rows, grid)
    assert resident == (shape[1] <= 64)
    pairs = -(-shape[0] * tiles_h * tiles_w // 2)
    assert works == pairs * (out_channels // 64)


def test_what_it_does_not_take_is_refused_by_the_launcher_too():
    with pytest.raises(build.EmulatorError, match="does not take 16 to 24 channels"):
        Case((1, 16, 4, 4), 24).run(kernels(), "copies")
