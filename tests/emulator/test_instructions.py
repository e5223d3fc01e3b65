"""Each instruction against its layout in the PTX ISA, worked out here apart from the emulator."""

from __future__ import annotations

import itertools

import pytest
import torch

from build import HERE, Emulated, EmulatorError, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def run():
    library = Emulated([HERE / "instruction_kernels.cu"], "race")
    return lambda name, *args, **how: library.call(f"run_{name}", *args, **how)


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).flatten()


# ---- matrices of a warp ----


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(run, count, trans):
    # Matrix i, row r: 8 numbers 64 i + 8 r + column, its rows in shared memory in reverse order.
    matrices = torch.arange(64 * count, dtype=torch.int16).view(8 * count, 8)
    image = torch.zeros(1024, dtype=torch.uint8)
    image[: 128 * count] = as_bytes(matrices.flip(0))
    # Only the lanes 0 ... 8 count - 1 give addresses; what the others give is ignored.
    offsets = torch.tensor([16 * (8 * count - 1 - lane) for lane in range(32)])
    out = torch.zeros(32, count, dtype=torch.int32)
    run("ldmatrix", count, trans, image, offsets.int(), out)
    for lane, i in itertools.product(range(32), range(count)):
        row, column = lane // 4, 2 * (lane % 4)
        places = [(column, row), (column + 1, row)] if trans else [(row, column), (row, column + 1)]
        low, high = (64 * i + 8 * r + c for r, c in places)
        assert out[lane, i] == low + (high << 16)


@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix(run, trans):
    numbers = torch.empty(32, 4, dtype=torch.int32)
    expected = torch.empty(4, 8, 8, dtype=torch.int16)
    for lane, i in itertools.product(range(32), range(4)):
        low, high = 100 * lane + 2 * i, 100 * lane + 2 * i + 1
        numbers[lane, i] = low + (high << 16)
        row, column = lane // 4, 2 * (lane % 4)
        for value, c in ((low, column), (high, column + 1)):
            expected[(i, c, row) if trans else (i, row, c)] = value
    image = torch.zeros(512, dtype=torch.uint8)
    run("stmatrix", trans, numbers, (16 * torch.arange(32)).int(), image)
    assert torch.equal(image, as_bytes(expected))


def pack(pairs, dtype):
    """32-bit registers of pairs of numbers, the first in the low half."""
    return torch.tensor(pairs, dtype=torch.float64).to(dtype).view(torch.int16).view(torch.int32)


def registers_of_a(a, dtype):
    """(rows 16 x 16, or 16 x 8 of tf32) as each lane's four registers."""
    registers = torch.empty(32, 4, dtype=torch.int32)
    for lane, i in itertools.product(range(32), range(4)):
        group, within = divmod(lane, 4)
        row = group + 8 * (i % 2)
        if dtype == torch.float32:
            registers[lane, i] = a[row, within + 4 * (i // 2)].float().view(torch.int32)
        else:
            column = 2 * within + 8 * (i // 2)
            registers[lane, i] = pack(a[row, column : column + 2].tolist(), dtype)[0]
    return registers


TYPES = [torch.bfloat16, torch.float16, torch.float32]  # the last: tf32


@pytest.mark.parametrize("dtype", TYPES)
def test_mma_sync(run, dtype):
    depth = 8 if dtype == torch.float32 else 16
    a, b = torch.randint(-8, 9, (16, depth)).double(), torch.randint(-8, 9, (depth, 8)).double()
    c = torch.randint(-99, 99, (16, 8)).double()
    columns, sums = torch.empty(32, 2, dtype=torch.int32), torch.empty(32, 4)
    places = {}
    for lane in range(32):
        group, within = divmod(lane, 4)
        for i in range(2):
            if dtype == torch.float32:
                columns[lane, i] = b[within + 4 * i, group].float().view(torch.int32)
            else:
                row = 2 * within + 8 * i
                columns[lane, i] = pack(b[row : row + 2, group].tolist(), dtype)[0]
        for i in range(4):
            places[lane, i] = group + 8 * (i // 2), 2 * within + i % 2
            sums[lane, i] = c[places[lane, i]]
    run("mma", TYPES.index(dtype), registers_of_a(a, dtype), columns, sums)
    expected = c + a @ b
    for (lane, i), place in places.items():
        assert sums[lane, i] == expected[place]


def test_tf32_drops_the_low_13_bits(run):
    one = torch.tensor(1.0 + 2**-11).view(torch.int32)
    a = torch.zeros(32, 4, dtype=torch.int32)
    b, d = torch.zeros(32, 2, dtype=torch.int32), torch.zeros(32, 4)
    a[0, 0] = b[0, 0] = one  # a[0, 0], b[0, 0]
    run("mma", 2, a, b, d)
    assert d[0, 0] == 1.0


# ---- copies ----


@pytest.mark.parametrize("mode", ["early", "late"])
def test_cp_async_fills_with_zeros(run, mode):
    data = torch.randint(1, 255, (32, 16), dtype=torch.uint8)
    valid = torch.tensor([lane % 17 for lane in range(32)], dtype=torch.int32)
    image = torch.full((32, 16), 255, dtype=torch.uint8)
    run("cp_async", data, valid, image, mode=mode)
    kept = torch.arange(16) < valid[:, None]
    assert torch.equal(image, torch.where(kept, data, 0))


def swizzled(offset, swizzle):
    """Where TMA puts the byte `offset` of a box: bits 4... XOR as many bits from 7 on."""
    return offset ^ ((offset >> 7) & (0, 1, 3, 7)[swizzle]) << 4


def box_of(tensor, at, box, steps):
    """(innermost first) what a load brings, zeros outside."""
    shape = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    out = torch.zeros(list(reversed(shape)), dtype=tensor.dtype)
    inside = []
    for place in itertools.product(*(range(n) for n in shape)):
        index = [a + p * s for a, p, s in zip(at, place, steps, strict=True)]
        if all(0 <= i < n for i, n in zip(index, reversed(tensor.shape), strict=True)):
            out[tuple(reversed(place))] = tensor[tuple(reversed(index))]
            inside.append((tuple(reversed(index)), tuple(reversed(place))))
    return out, inside


def tma(run, direction, tensor, at, box, steps, swizzle, image):
    rank = tensor.dim()
    size = tensor.element_size()
    pad = [1] * (5 - rank)
    strides = [s * size for s in reversed(tensor.stride()[:-1])]
    described = [rank, size, swizzle, *reversed(tensor.shape), *pad, *strides, *([16] * (5 - rank))]
    described += [*box, *pad, *steps, *pad]
    numbers = torch.tensor(described)
    at = torch.tensor(at, dtype=torch.int32)
    run("tma", direction, tensor, numbers, at, image.numel(), image)


ONES = (1, 1, 1, 1, 1)
BOXES = [  # shape, at, box, steps (innermost first), swizzle
    ((64,), (8,), (16,), (1,), 0),
    ((6, 64), (32, 1), (32, 4), (1, 1), 0),
    ((6, 64), (-8, -1), (32, 4), (1, 1), 0),
    ((6, 64), (48, 4), (32, 4), (1, 1), 0),
    ((20, 64), (0, 0), (64, 16), (1, 1), 3),
    ((20, 32), (0, -3), (32, 16), (1, 1), 2),
    ((20, 16), (0, 0), (16, 16), (1, 1), 1),
    ((9, 10, 16), (0, -1, 1), (8, 7, 6), (1, 2, 2), 0),
    ((9, 10, 64), (0, -1, 1), (64, 7, 6), (1, 2, 2), 3),
    ((2, 3, 4, 5, 16), (0, -1, 1, 0, 1), (16, 4, 2, 3, 2), (1, 1, 1, 1, 1), 0),
]


@pytest.mark.parametrize("shape, at, box, steps, swizzle", BOXES)
@pytest.mark.parametrize("mode", ["early", "late"])
def test_tma_load(run, shape, at, box, steps, swizzle, mode):
    tensor = torch.arange(1, torch.Size(shape).numel() + 1).to(torch.int16).view(torch.bfloat16)
    tensor = tensor.view(shape)
    expected, _ = box_of(tensor, at, box, steps)
    flat = as_bytes(expected)
    image = torch.zeros_like(flat)
    tma(lambda *args: run(*args, mode=mode), 0, tensor, at, box, steps, swizzle, image)
    places = torch.tensor([swizzled(offset, swizzle) for offset in range(len(flat))])
    assert torch.equal(image[places], flat)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape, at, box, steps, swizzle", [b for b in BOXES if len(b[0]) < 3])
def test_tma_store_drops_what_is_outside(run, shape, at, box, steps, swizzle, add):
    before = torch.randint(-9, 9, shape).float()
    if swizzle:  # 4 bytes an element: half as many in the span
        box = (box[0] // 2, *box[1:])
    tensor = before.clone()
    _, inside = box_of(tensor, at, box, steps)
    source = torch.randint(-9, 9, list(reversed(box))).float()
    flat = as_bytes(source)
    places = torch.tensor([swizzled(offset, swizzle) for offset in range(len(flat))])
    image = torch.empty_like(flat)
    image[places] = flat
    tma(run, 2 if add else 1, tensor, at, box, steps, swizzle, image)
    for index, place in inside:
        before[index] = source[place] + (before[index] if add else 0)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    "shape, box, steps, swizzle",
    [
        ((4, 63), (8, 4), (1, 1), 0),  # rows of 126 bytes
        ((4, 64), (4, 4), (1, 1), 0),  # 8 bytes across
        ((4, 64), (8, 257), (1, 1), 0),
        ((4, 128), (128, 4), (1, 1), 3),  # wider than the swizzle
        ((4, 64), (8, 4), (1, 9), 0),
    ],
)
def test_tensor_maps_that_the_driver_refuses(run, shape, box, steps, swizzle):
    image = torch.zeros(8192, dtype=torch.uint8)
    with pytest.raises(EmulatorError, match="cuTensorMapEncodeTiled refused"):
        tma(run, 0, torch.zeros(shape, dtype=torch.bfloat16), (0, 0), box, steps, swizzle, image)


def test_bulk_copies(run):
    data, out, total = torch.randn(64), torch.zeros(64), torch.ones(64)
    for mode in ("early", "late", "random"):
        run("bulk", data, out, total, mode=mode)
    assert torch.equal(out, data)
    torch.testing.assert_close(total, 1 + 3 * data)


# ---- barriers ----


def test_mbarrier_phases(run):
    out = torch.full((10,), -1, dtype=torch.int32)
    run("mbarrier", torch.zeros(4), out, mode="late")
    # Past parity 1 when fresh; the first phase over after two arrivals; the second only with its
    # bytes, and then past parity 1 again.
    assert out.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 1]


def test_warp_instructions(run):
    out = torch.zeros(64, 4, dtype=torch.int32)
    run("warp", out)
    for thread, (neighbour, fifth, elected, warp) in enumerate(out.tolist()):
        lane = thread % 32
        assert neighbour == thread ^ 1 and fifth == thread - lane + 5
        assert warp == thread // 32 and elected == (lane == 0)


def test_named_barriers_and_distributed_shared_memory(run):
    for seed in range(8):
        out = torch.zeros(4, dtype=torch.int32)
        run("barriers", out, seed=seed)
        assert out.tolist() == [21, 28, 28, 21]


@pytest.mark.parametrize("mode", ["early", "late", "random"])
def test_copies_between_blocks_of_a_cluster(run, mode):
    data = torch.randn(64)
    for seed in range(4):
        sums = torch.zeros(2, 32)
        run("cluster_copies", data, sums, seed=seed, mode=mode)
        assert torch.equal(sums, (data[:32] + data[32:]).expand(2, 32))


REPORTS = {
    1: "A registers of a wgmma were overwritten",
    2: "accumulators overlap others in flight",
    3: "warps . and . of the warpgroup issue different operations",
}


@pytest.mark.parametrize("mode", ["early", "late"])
def test_registers_of_wgmmas_in_flight(run, mode):
    out = torch.ones(128)
    run("flights", 0, out, mode=mode)
    assert torch.equal(out, torch.zeros(128))
    for bug, report in REPORTS.items():
        with pytest.raises(EmulatorError, match=report):
            run("flights", bug, out, mode=mode)


def test_arithmetic(run):
    x = torch.tensor([0.5, 2.0, -3.0, 1e-40, float("inf"), float("-inf"), float("nan"), 1 + 2**-11])
    out = torch.empty(len(x), 7)
    run("arithmetic", x, out, len(x))
    larger = torch.maximum(x, torch.tensor(1.0))  # NaN stays
    flushed = torch.where(x.abs() < 2.0**-126, 0.0, x)
    torch.testing.assert_close(out[:, 0], larger, equal_nan=True)
    torch.testing.assert_close(out[:, 1], larger, equal_nan=True)
    expectations = [flushed.exp2(), flushed.log2(), 1 / flushed, x.tanh()]
    for column, expected in enumerate(expectations, 2):
        torch.testing.assert_close(out[:, column], expected, equal_nan=True)
    # Nearest in 10 bits of fraction, ties away from zero.
    assert out[7, 6] == 1 + 2**-10 and out[1, 6] == 2.0 and out[6, 6].isnan()
