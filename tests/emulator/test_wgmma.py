"""wgmma against the canonical layouts of the PTX ISA, worked out here apart from the emulator."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_instructions import TYPES, registers_of_a, swizzled

from build import HERE, Emulated, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CHUNKS = {"none": 1, "128": 8, "64": 4, "32": 2}  # of 16 bytes in a row of the pattern
CODES = {"none": 0, "128": 1, "64": 2, "32": 3}  # in the descriptor
XOR = {"none": 0, "128": 3, "64": 2, "32": 1}  # as TMA numbers the swizzles
N = 32


@pytest.fixture(scope="module")
def run():
    library = Emulated([HERE / "instruction_kernels.cu"], "race")
    return lambda *args, **how: library.call("run_wgmma", *args, **how)


def lay_out(matrix, k_major, layout, start):
    """Byte image of an operand (rows of M or N, by K) and its descriptor.

    The contiguous axis is cut into rows of the pattern, the other one into groups of 8 rows; both
    strides are larger than they need be.
    """
    flat = matrix if k_major else matrix.T  # (rows, the contiguous axis)
    size = flat.element_size()
    per_chunk = 16 // size
    row_bytes = 16 * CHUNKS[layout]
    group_bytes = 8 * row_bytes
    groups, across = flat.shape[0] // 8, -(-flat.shape[1] * size // row_bytes)
    group_stride = group_bytes * 2  # between groups of 8 rows
    across_stride = group_stride * groups + 1024 if across > 1 or layout == "none" else 0
    image = torch.zeros(start + 8192 * 6, dtype=torch.uint8)
    for row, column in itertools.product(range(flat.shape[0]), range(0, flat.shape[1], per_chunk)):
        step, within = divmod(column * size, row_bytes)
        offset = start + row // 8 * group_stride + row % 8 * row_bytes
        offset = swizzled(offset + step * across_stride + within, XOR[layout])
        chunk = flat[row, column : column + per_chunk].contiguous().view(torch.uint8)
        image[offset : offset + 16] = chunk
    # K-major, swizzled: one row holds all of K. MN-major without swizzle has the strides swapped.
    leading, stride = across_stride, group_stride
    if not k_major and layout == "none":
        leading, stride = group_stride, across_stride
    descriptor = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | CODES[layout] << 62
    descriptor -= (descriptor >> 63) << 64
    return image, descriptor


def check(run, dtype, a_major, b_major, a_layout, b_layout, accumulate=True, registers=False):
    depth = 8 if dtype == torch.float32 else 16
    a, b = torch.randint(-8, 9, (64, depth)).double(), torch.randint(-8, 9, (N, depth)).double()
    c = torch.randint(-99, 99, (64, N)).double()
    b_image, b_descriptor = lay_out(b.to(dtype), b_major == 0, b_layout, 1024)
    a_image, a_descriptor = lay_out(a.to(dtype), a_major == 0, a_layout, len(b_image))
    image = torch.cat([b_image, a_image[len(b_image) :]])
    a_registers = torch.cat([registers_of_a(a[w : w + 16], dtype) for w in range(0, 64, 16)])
    d = torch.empty(128, N // 2)
    places = {}
    for thread, i in itertools.product(range(128), range(N // 2)):
        warp, lane = divmod(thread, 32)
        row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
        places[thread, i] = row, 8 * (i // 4) + 2 * (lane % 4) + i % 2
        d[thread, i] = c[places[thread, i]]
    kind = torch.tensor([TYPES.index(dtype), a_major, b_major, registers])
    run(kind, image, len(image), a_descriptor, b_descriptor, a_registers, accumulate, d)
    expected = a @ b.T + (c if accumulate else 0)
    actual = torch.empty(64, N, dtype=torch.float64)
    for (thread, i), place in places.items():
        actual[place] = d[thread, i]
    assert torch.equal(actual, expected)


PAIRS = [*((layout, layout) for layout in CHUNKS), ("128", "none"), ("64", "32")]


@pytest.mark.parametrize("a_layout, b_layout", [*PAIRS, ("none", "128")])
def test_k_major(run, a_layout, b_layout):
    check(run, torch.bfloat16, 0, 0, a_layout, b_layout)


@pytest.mark.parametrize("layout", CHUNKS)
@pytest.mark.parametrize("a_major, b_major", [(0, 1), (1, 0), (1, 1)])
def test_mn_major(run, a_major, b_major, layout):
    check(run, torch.bfloat16, a_major, b_major, layout, layout)


@pytest.mark.parametrize("layout", ["none", "128"])
@pytest.mark.parametrize("registers", [False, True])
def test_tf32(run, layout, registers):
    check(run, torch.float32, 0, 0, layout, layout, registers=registers)


def test_float16(run):
    check(run, torch.float16, 0, 0, "128", "128")
    check(run, torch.float16, 0, 1, "128", "64", registers=True)


def test_a_in_registers(run):
    check(run, torch.bfloat16, 0, 0, "none", "32", registers=True)


def test_without_accumulation(run):
    check(run, torch.bfloat16, 0, 0, "128", "128", accumulate=False)
