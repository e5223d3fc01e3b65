"""The Triton kernels of conv_relu_pool2d, executed by Triton's interpreter on the CPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", "3.6")

from conv_pool_checks import CASES, FP16, Case, check, surrounded  # noqa: E402  (Triton is here)
from pyops.triton_kernels import common, conv_relu_pool  # noqa: E402
from pyops.triton_kernels.conv_relu_pool_geometry import Geometry  # noqa: E402

pytestmark = pytest.mark.skipif(
    not common.INTERPRET, reason="needs TRITON_INTERPRET=1, set before Triton is imported"
)


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


@pytest.mark.parametrize("channels, last", [(64, 668), (3, 2674)], ids=["input", "output"])
def test_int64_is_chosen_by_size(channels, last):
    """2^31 elements of the input, or of the pooled output, less room for a tile."""

    def needs_int64(batch):
        x = torch.empty(batch, channels, 224, 224, device="meta")
        w = torch.empty(64, channels, 3, 3, device="meta")
        one, two = (1, 1), (2, 2)
        geometry = Geometry.of(x, w, one, one, one, 1, "max", two, two, (0, 0), False)
        return geometry.needs_int64

    assert not needs_int64(last - 2)
    assert needs_int64(last + 1)


def integers(*shape, low=-2, high=3, seed=0, dtype=torch.float32):
    """Small whole numbers: sums are exact, so ties are ties in every order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def expected_codes(case, tensors):
    """The codes in plain torch: max_pool2d's index and the sign before activation."""
    bias = tensors[2] if case.bias else None
    before = torch.nn.functional.conv2d(*tensors[:2], bias, *case.conv)
    active = replace(case, pool="none").plain(*tensors)
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
    case = replace(CASES[shape][1], activation=activation, slope=0.5)
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
    changes = {"dtype": torch.float32, "padding": (0, 0), "bias": False}
    case = replace(CASES[shape][1], activation=activation, **changes)
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
    bias = torch.zeros(case.kernel[0], requires_grad=True)
    (plain_bias,) = torch.autograd.grad(case.plain(x, w, bias), bias, grad)
    torch.testing.assert_close(grad_bias, plain_bias)


@pytest.mark.parametrize("name", ["boxes-3s2-padded-ceil", "window-2s1-padded", "window-3s3"])
def test_windows_of_nothing_but_minus_infinity(name):
    """The winner is the first place inside, never one of the padding."""
    old = CASES[name][1]
    case = replace(old, kernel=(8, 1, 1), padding=(0, 0), activation="none", bias=False)
    x = torch.zeros(case.input, dtype=case.dtype)
    x[:, 0] = float("-inf")
    tensors = [x, torch.ones(8, case.input[1], 1, 1, dtype=case.dtype)]
    output, codes = case.forward(tensors)
    assert (output == float("-inf")).all()
    assert torch.equal(codes, expected_codes(case, [t.float() for t in tensors]))


def test_infinite_gradients_reach_only_their_winners():
    case = Case((1, 3, 6, 6), (4, 3, 3), bias=False)
    tensors = case.make("cpu")
    output, codes = case.forward(tensors)
    grad = torch.zeros_like(output)
    grad[0, 1, 0, 0] = float("inf")
    mine = case.backward(grad, tensors, output, codes, (True, False, False))[0]
    leaf = tensors[0].clone().requires_grad_()
    (plain,) = torch.autograd.grad(case.plain(leaf, tensors[1]), leaf, grad)
    assert plain.isinf().any() and plain.isfinite().any()
    assert torch.equal(mine.isfinite(), plain.isfinite())
    assert torch.equal(mine.isnan(), plain.isnan())


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
    assert "float64" in supports(replace(case, dtype=torch.float64))
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
