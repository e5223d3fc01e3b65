"""The Triton kernels of lstm, executed by Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton", "3.6")

from lstm_checks import CASES, check, inputs, models, run  # noqa: E402  (Triton is here)
from pyops.triton_kernels import common, lstm  # noqa: E402

pytestmark = pytest.mark.skipif(
    not common.INTERPRET, reason="needs TRITON_INTERPRET=1, set before Triton is imported"
)


IN_BFLOAT16 = ("one step", "hidden 16, two blocks", "hidden 64", "packed, both ways")


@pytest.mark.parametrize(
    "name, dtype",
    [*((n, torch.float32) for n in CASES), *((n, torch.bfloat16) for n in IN_BFLOAT16)],
    ids=str,
)
def test_within_budget(name, dtype):
    check(CASES[name], dtype, "cpu")


def test_the_widest_in_float16():
    check((2, 3, 5, 128, {}, None), torch.float16, "cpu")


@pytest.mark.parametrize(
    "name, through",
    [
        ("packed", (True, False, False)),
        ("packed, both ways", (False, True, False)),
        ("packed, both ways", (False, False, True)),
        ("hidden 7, both ways", (False, False, True)),
    ],
    ids=str,
)
def test_gradients_through_one_result(name, through):
    check(CASES[name], torch.float32, "cpu", through)


@pytest.mark.parametrize("name", ["hidden 7, both ways", "packed, both ways"])
def test_nothing_is_read_or_written_outside(name, monkeypatch):
    """Inputs lie in NaN, and what a launcher allocates lies between fences that stay."""
    steps, batch, features, hidden, options, lengths = CASES[name]
    mine, plain, _ = models(features, hidden, torch.float32, "cpu", options)
    x, hx = inputs(steps, batch, features, hidden, options, torch.float32, "cpu")
    want = run(plain, x, hx, lengths)
    fences = []

    def fenced(tensor):
        held = torch.full((tensor.numel() + 256,), float("nan"))
        fences.append((held, tensor.numel()))
        return held[128 : 128 + tensor.numel()].view(tensor.shape)

    launch = lstm._launch

    def inside(kernel, geometry, tensor, arguments):
        originals = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        moved = {k: fenced(v).copy_(v) for k, v in originals.items()}
        launch(kernel, geometry, tensor, {**arguments, **moved})
        for key, value in originals.items():
            value.copy_(moved[key])

    monkeypatch.setattr(lstm, "_launch", inside)
    got = run(mine, x, hx, lengths)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    assert fences
    for held, count in fences:
        assert held[:128].isnan().all() and held[128 + count :].isnan().all()


def test_bits_repeat():
    case = CASES["packed, both ways"]
    mine, *_ = models(*case[2:4], torch.float32, "cpu", case[4])
    x, hx = inputs(*case[:5], torch.float32, "cpu")
    first, second = (run(mine, x, hx, case[5]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_launch_a_layer(monkeypatch):
    names = []
    launch = common.run

    def recording(kernel, config, bind):
        names.append(kernel.__name__)
        launch(kernel, config, bind)

    monkeypatch.setattr(common, "run", recording)
    case = CASES["hidden 7, both ways"]
    mine, *_ = models(*case[2:4], torch.float32, "cpu", case[4])
    run(mine, *inputs(*case[:5], torch.float32, "cpu"), None)
    assert names == ["lstm_forward_kernel"] * 2 + ["lstm_backward_kernel"] * 2


@pytest.mark.parametrize("exact", [True, False])
def test_values_beyond_saturation(exact):
    """Infinities saturate and NaN spreads within its own sequence only."""
    dtype = torch.float32 if exact else torch.bfloat16
    mine, plain, _ = models(3, 5, dtype, "cpu", {})
    for value in (float("inf"), float("-inf"), float("nan"), 1e30):
        x, hx = inputs(4, 6, 3, 5, {}, dtype, "cpu")
        x[1, 2, 0] = value
        got, want = mine(x, hx)[0], plain(x, hx)[0]
        torch.testing.assert_close(got, want, equal_nan=True, rtol=0.02, atol=0.02)
        assert got[:, :2].isfinite().all()


@pytest.mark.parametrize(
    "hidden, dtype, words",
    [
        (129, torch.bfloat16, "more than 128 units"),
        (65, torch.float32, "more than 64 units"),
        (8, torch.float64, "has no Triton kernel"),
    ],
)
def test_what_it_does_not_take(hidden, dtype, words):
    assert words in lstm.supports(hidden, dtype)


def test_what_it_takes():
    assert lstm.supports(128, torch.bfloat16) is None
    assert lstm.supports(128, torch.float16) is None
    assert lstm.supports(64, torch.float32) is None
