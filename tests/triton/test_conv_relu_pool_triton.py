"""The Triton kernels of conv_relu_pool2d, executed by Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton", "3.6")

from conv_pool_checks import Case, check  # noqa: E402  (after the check that Triton is here)
from pyops.triton_kernels import common, conv_relu_pool  # noqa: E402

pytestmark = pytest.mark.skipif(
    not common.INTERPRET, reason="needs TRITON_INTERPRET=1, set before Triton is imported"
)

BF16, FP16 = torch.bfloat16, torch.float16
BOXES, POINTERS = "conv_relu_pool_forward_tma_kernel", "conv_relu_pool_forward_gather_kernel"

CASES = {
    # By TMA boxes: stride 1, windows of 1, 2 or 3-step-2.
    "boxes": (BOXES, Case((2, 16, 10, 12), (24, 3, 3), dtype=FP16, channels_last=True)),
    "boxes-bf16": (BOXES, Case((1, 24, 8, 9), (20, 3, 3), dtype=BF16)),
    "boxes-tf32-odd": (BOXES, Case((2, 20, 9, 11), (20, 3, 3), bias=False, channels_last=True)),
    "boxes-two-blocks": (BOXES, Case((1, 72, 4, 6), (136, 1, 1), dtype=FP16, padding=(0, 0))),
    "boxes-5x3-dilated": (
        BOXES,
        Case((1, 16, 13, 12), (9, 5, 3), padding=(4, 2), dilation=(2, 3), dtype=FP16),
    ),
    "boxes-3s2": (BOXES, Case((2, 16, 13, 18), (20, 3, 3), dtype=FP16, size=(3, 3))),
    "boxes-3s2-padded-ceil": (
        BOXES,
        Case(
            (1, 16, 14, 17),
            (8, 3, 3),
            dtype=FP16,
            size=(3, 3),
            pool_padding=(1, 1),
            ceil_mode=True,
            channels_last=True,
        ),
    ),
    "boxes-avg-leaky-ceil": (
        BOXES,
        Case(
            (1, 16, 9, 11),
            (20, 3, 3),
            activation="leaky_relu",
            pool="avg",
            ceil_mode=True,
            dtype=BF16,
        ),
    ),
    "boxes-avg-3x2": (
        BOXES,
        Case(
            (1, 16, 9, 12), (8, 3, 3), pool="avg", size=(3, 2), dtype=FP16, activation="leaky_relu"
        ),
    ),
    "boxes-groups-row-window": (
        BOXES,
        Case((1, 32, 6, 10), (12, 3, 3), groups=2, size=(1, 2), step=(1, 2), dtype=FP16),
    ),
    "boxes-no-pool": (BOXES, Case((2, 16, 5, 7), (20, 3, 3), pool="none", dtype=FP16)),
    # By pointers.
    "few-channels": (POINTERS, Case((2, 3, 9, 11), (20, 3, 3))),
    "one-channel-bf16": (POINTERS, Case((3, 1, 12, 12), (18, 3, 3), padding=(0, 0), dtype=BF16)),
    "few-channels-last": (
        POINTERS,
        Case((1, 5, 9, 8), (6, 3, 3), channels_last=True, dtype=FP16, activation="none"),
    ),
    "stem-3s2-padded": (
        POINTERS,
        Case(
            (1, 3, 21, 20),
            (12, 7, 7),
            stride=(2, 2),
            padding=(3, 3),
            size=(3, 3),
            pool_padding=(1, 1),
        ),
    ),
    "unaligned-channels": (POINTERS, Case((1, 19, 7, 8), (17, 3, 3), dtype=FP16)),
    "strided-dilated": (
        POINTERS,
        Case((1, 16, 13, 15), (8, 3, 2), stride=(2, 3), dilation=(2, 1), dtype=FP16),
    ),
    "strided-no-pool": (
        POINTERS,
        Case(
            (2, 16, 9, 9),
            (8, 3, 3),
            stride=(2, 2),
            pool="none",
            activation="leaky_relu",
            dtype=BF16,
        ),
    ),
    "window-3s3": (
        POINTERS,
        Case((1, 16, 10, 11), (8, 3, 3), size=(3, 3), step=(3, 3), dtype=FP16),
    ),
    "window-4x2-apart": (
        POINTERS,
        Case((1, 4, 12, 13), (8, 3, 3), size=(4, 2), step=(5, 3), activation="leaky_relu"),
    ),
    "window-2s1-padded": (
        POINTERS,
        Case((1, 4, 6, 7), (8, 3, 3), size=(2, 2), step=(1, 1), pool_padding=(1, 1), dtype=FP16),
    ),
    "avg-padded-ceil": (
        POINTERS,
        Case(
            (1, 4, 8, 9),
            (8, 3, 3),
            stride=(1, 2),
            pool="avg",
            size=(2, 3),
            step=(2, 2),
            pool_padding=(1, 1),
            ceil_mode=True,
            activation="leaky_relu",
        ),
    ),
    "negative-slope": (
        POINTERS,
        Case((1, 16, 6, 8), (8, 3, 3), activation="leaky_relu", slope=-0.3, dtype=FP16),
    ),
    "negative-slope-no-pool": (
        POINTERS,
        Case((1, 16, 5, 6), (8, 3, 3), activation="leaky_relu", slope=-0.3, pool="none"),
    ),
    "depthwise": (POINTERS, Case((1, 4, 6, 8), (8, 3, 3), groups=4)),
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels run, in order."""
    names = []
    run = common.run

    def recording(kernel, config, bind):
        names.append(kernel.__name__)
        return run(kernel, config, bind)

    monkeypatch.setattr(common, "run", recording)
    return names


@pytest.fixture
def fenced(monkeypatch):
    """Every tensor that a launcher allocates lies between fences, which nothing may overwrite."""
    fences = []
    empty = torch.empty

    def allocate(size, strides, dtype):
        count = 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
        held = empty(count + 128, dtype=dtype)
        fill = float("nan") if dtype.is_floating_point else 77
        held.fill_(fill)
        fences.append((held, count, fill))
        return held[64 : 64 + count].as_strided(size, strides)

    def fenced_empty(size, *, dtype, device, memory_format=torch.contiguous_format):
        like = empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        return allocate(like.shape, like.stride(), dtype)

    def fenced_strided(size, strides, *, dtype, device):
        return allocate(size, strides, dtype)

    monkeypatch.setattr(torch, "empty", fenced_empty)
    monkeypatch.setattr(torch, "empty_strided", fenced_strided)
    yield
    assert fences
    for held, count, fill in fences:
        for fence in (held[:64], held[64 + count :]):
            intact = fence.isnan() if fill != fill else fence == fill
            assert intact.all(), "a kernel wrote outside its tensor"


def surrounded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides within a storage that is otherwise NaN; still aligned to 16 bytes."""
    size = tensor.numel()
    held = torch.full((size + 1024,), float("nan"), dtype=tensor.dtype)
    inside = held[512 : 512 + size].as_strided(tensor.shape, tensor.stride())
    inside.copy_(tensor)
    return inside


@pytest.mark.parametrize("name", CASES)
def test_within_budget_and_bounds(name, launched, fenced):
    kernel, case = CASES[name]
    tensors = [surrounded(t) for t in case.make("cpu")]
    check(case, "cpu", tensors=tensors)
    assert set(launched[:2]) == {kernel}


@pytest.mark.parametrize("name", ["boxes-3s2-padded-ceil", "few-channels", "avg-padded-ceil"])
def test_int64_offsets_equal_int32(name, monkeypatch):
    _, case = CASES[name]
    tensors = case.make("cpu")

    def results():
        output, codes = case.forward(tensors)
        return output, codes, *case.backward(torch.ones_like(output), tensors, output, codes)

    narrow = results()
    monkeypatch.setattr(common, "INT32_LIMIT", 0)
    wide = results()
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_int64_is_chosen_by_size():
    def geometry(batch):
        x = torch.empty(batch, 64, 224, 224, device="meta")
        w = torch.empty(64, 64, 3, 3, device="meta")
        pair = (1, 1)
        from pyops.triton_kernels.conv_relu_pool_geometry import Geometry

        return Geometry.of(x, w, pair, pair, pair, 1, "max", (2, 2), (2, 2), (0, 0), False)

    assert not geometry(600).needs_int64
    assert geometry(670).needs_int64


def integers(*shape, low=-2, high=3, seed=0, dtype=torch.float32):
    """Small whole numbers: sums are exact, so ties are ties in every order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def expected_codes(case, tensors):
    """The codes in plain torch: max_pool2d's index and the sign before activation."""
    bias = tensors[2] if case.bias else None
    before = torch.nn.functional.conv2d(*tensors[:2], bias, *case.conv)
    after = case.plain(*tensors) if case.pool == "none" else None
    active = Case(**{**case.__dict__, "pool": "none"}).plain(*tensors)
    del after
    _, index = torch.nn.functional.max_pool2d(
        active,
        case.size,
        case.step,
        case.pool_padding,
        ceil_mode=case.ceil_mode,
        return_indices=True,
    )
    width = before.shape[3]
    rows = torch.arange(index.shape[2])[:, None] * case.step[0] - case.pool_padding[0]
    columns = torch.arange(index.shape[3]) * case.step[1] - case.pool_padding[1]
    place = (index // width - rows) * case.size[1] + index % width - columns
    winner = before.flatten(2).gather(2, index.flatten(2)).view_as(index)
    passes = {"relu": ~(winner <= 0), "leaky_relu": winner > 0, "none": winner == winner}
    whole = (
        passes[case.activation] if case.activation != "none" else torch.ones_like(place, dtype=bool)
    )
    return (place + 128 * whole).to(torch.uint8)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
@pytest.mark.parametrize(
    "shape", ["boxes", "boxes-3s2-padded-ceil", "few-channels", "window-2s1-padded", "window-3s3"]
)
def test_ties_go_to_the_first(shape, activation):
    case = Case(**{**CASES[shape][1].__dict__, "activation": activation, "slope": 0.5})
    x = integers(*case.input, dtype=case.dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    w = integers(*case.make("cpu")[1].shape, low=-1, high=2, seed=1, dtype=case.dtype)
    tensors = [x, w, integers(case.kernel[0], seed=2, dtype=case.dtype)][: 3 if case.bias else 2]
    output, codes = case.forward(tensors)
    exact = [t.float() for t in tensors]
    assert torch.equal(output.float(), case.plain(*exact))
    assert torch.equal(codes, expected_codes(case, exact))


@pytest.mark.parametrize("shape", ["boxes", "boxes-3s2", "few-channels", "window-3s3"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_nan_and_infinity(shape, activation):
    base = CASES[shape][1]
    case = Case(
        **{
            **base.__dict__,
            "activation": activation,
            "dtype": torch.float32,
            "padding": (0, 0),
            "bias": False,
        }
    )
    x = torch.randn(case.input, generator=torch.Generator().manual_seed(3))
    x[0, 0, 1, 1] = float("nan")
    x[0, 1, 4, 5] = float("inf")
    x[-1, 2, 6, 2] = float("-inf")
    w = torch.randn(case.make("cpu")[1].shape, generator=torch.Generator().manual_seed(4))
    output, codes = case.forward([x, w])
    plain = case.plain(x, w)
    assert plain.isnan().any() and plain.isinf().any()
    assert torch.equal(output.isnan(), plain.isnan())
    assert torch.equal(output.isinf(), plain.isinf())
    # The gradient of a window with a NaN goes where torch sends it.
    assert torch.equal(codes, expected_codes(case, [x, w]))
    grad = torch.ones_like(output)
    grad_bias = case.backward(grad, [x, w], output, codes, (False, False, True))[2]
    before = torch.nn.functional.conv2d(x, w, None, *case.conv).requires_grad_()
    bypass = Case(**{**case.__dict__, "input": tuple(before.shape)})
    bypass.kernel, bypass.groups = (before.shape[1], 1, 1), before.shape[1]
    one = torch.ones(before.shape[1], 1, 1, 1)
    bypass.stride = bypass.dilation = (1, 1)
    (expanded,) = torch.autograd.grad(bypass.plain(before, one), before, grad)
    torch.testing.assert_close(grad_bias, expanded.sum((0, 2, 3)))


def test_infinite_gradients_reach_only_their_winners():
    case = Case((1, 3, 6, 6), (4, 3, 3), bias=False)
    tensors = case.make("cpu")
    output, codes = case.forward(tensors)
    grad = torch.zeros_like(output)
    grad[0, 1, 0, 0] = float("inf")
    mine = case.backward(grad, tensors, output, codes, (True, False, False))[0]
    leaf = tensors[0].clone().requires_grad_()
    (plain,) = torch.autograd.grad(case.plain(leaf, tensors[1]), leaf, grad)
    assert torch.equal(mine.isfinite()[..., 4:, 4:], plain.isfinite()[..., 4:, 4:])
    assert mine[..., 4:, 4:].abs().max() == 0


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked(mask, launched):
    case = CASES["few-channels"][1]
    tensors = case.make("cpu")
    output, codes = case.forward(tensors)
    launched.clear()
    results = case.backward(torch.ones_like(output), tensors, output, codes, mask)
    assert len(launched) == 1
    assert [r.shape != (0,) for r in results] == list(mask)
    assert all(r.dtype is case.dtype for r in results)


def test_repeats_bit_for_bit():
    case = CASES["few-channels"][1]
    tensors = case.make("cpu")
    output, codes = case.forward(tensors)
    grad = torch.randn_like(output)
    first = case.backward(grad, tensors, output, codes)
    second = case.backward(grad, tensors, output, codes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strange_strides():
    """A slice with gaps, an input one element off 16-byte alignment, an expanded gradient."""
    case = Case((1, 16, 6, 8), (8, 3, 3), dtype=FP16)
    x, w, b = case.make("cpu")
    plain, _ = case.forward([x, w, b])
    gaps = torch.zeros(1, 16, 12, 8, dtype=FP16)
    gaps[:, :, ::2] = x
    assert torch.equal(case.forward([gaps[:, :, ::2], w, b])[0], plain)
    shifted = torch.zeros(x.numel() + 1, dtype=FP16)[1:].view(1, 6, 8, 16).permute(0, 3, 1, 2)
    shifted.copy_(x)
    output, codes = case.forward([shifted, w, b])
    torch.testing.assert_close(output.contiguous(), plain)
    grad = torch.ones((), dtype=FP16).expand(output.shape)
    dense = case.backward(grad.contiguous(), [shifted, w, b], output, codes)
    expanded = case.backward(grad, [shifted, w, b], output, codes)
    assert all(torch.equal(a, b) for a, b in zip(dense, expanded, strict=True))


def test_empty_batch():
    case = Case((0, 3, 6, 6), (4, 3, 3))
    tensors = case.make("cpu")
    output, codes = case.forward(tensors)
    assert output.shape == codes.shape == (0, 4, 3, 3)
    grads = case.backward(output, tensors, output, codes)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert all((g == 0).all() for g in grads)


def supports(case: Case, device="meta", **changes):
    out, *taps = case.kernel
    options = {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
        "activation": case.activation,
        "pool": case.pool,
        "pool_size": case.size,
        "pool_stride": case.step,
        "pool_padding": case.pool_padding,
        "ceil_mode": case.ceil_mode,
    }
    x = torch.empty(case.input, dtype=case.dtype, device=device)
    w = torch.empty(out, case.input[1] // case.groups, *taps, dtype=case.dtype, device=device)
    return conv_relu_pool.supports(x, w, **{**options, **changes})


def test_supports():
    assert all(supports(case) is None for _, case in CASES.values())
    case = CASES["few-channels"][1]
    assert "float64" in supports(Case(**{**case.__dict__, "dtype": torch.float64}))
    assert "128" in supports(case, pool_size=(12, 11))
    assert "8 places" in supports(case, pool="avg", pool_size=(3, 3))
    assert "tanh" in supports(case, activation="tanh")
    with torch._subclasses.FakeTensorMode():
        assert supports(case, device="cpu") is None


def test_tuning_takes_the_fastest_once_and_never_while_capturing(monkeypatch):
    configs = [common.Config({"BM": size}) for size in (16, 32, 64)]
    timed = []

    def time(kernel, config, bind):
        timed.append(config["BM"])
        return {16: 3.0, 32: 1.0, 64: 2.0}[config["BM"]]

    class Kernel:
        __name__ = "kernel"

    capturing = True
    monkeypatch.setattr(common, "INTERPRET", False)
    monkeypatch.setattr(common, "_autotune", True)
    monkeypatch.setattr(common, "_chosen", {})
    monkeypatch.setattr(common, "_time", time)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def chosen(key):
        return common.choose(Kernel(), configs, key, None)["BM"]

    assert chosen(("a",)) == 16 and not timed
    capturing = False
    assert chosen(("a",)) == 32 and timed == [16, 32, 64]
    assert chosen(("a",)) == 32 and len(timed) == 3
    assert chosen(("b",)) == 32 and len(timed) == 6
    capturing = True
    assert chosen(("b",)) == 32 and len(timed) == 6
    monkeypatch.setattr(common, "_autotune", False)
    assert chosen(("a",)) == 16
