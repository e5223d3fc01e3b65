"""The Triton kernels of lstm on an NVIDIA GPU (`make gpu-test`)."""

import pytest
import torch

pytest.importorskip("triton", "3.6")

from lstm_checks import CASES, check, inputs, models, run  # noqa: E402  (Triton is here)
from pyops.triton_kernels import common  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.proves("lstm", "triton"),
    pytest.mark.skipif(common.INTERPRET, reason="runs compiled, not interpreted"),
]

LONG = {
    "digits": (28, 64, 28, 128, {"num_layers": 2}, None),
    "H128, T100": (100, 64, 128, 128, {"num_layers": 2}, None),
    "both ways": (50, 100, 40, 96, {"num_layers": 2, "bidirectional": True}, None),
    "wide batch": (10, 4096, 16, 32, {"batch_first": True}, None),
    "packed": (60, 40, 20, 100, {"bidirectional": True}, [60, *range(1, 40)]),
}


@pytest.fixture
def exact(float32_precision):
    """cuDNN and the products around the kernels in full float32."""
    float32_precision("ieee")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_small(name, dtype, exact):
    check(CASES[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_long(name, dtype):
    check(LONG[name], dtype, "cuda")


def test_long_in_float32(exact):
    check((100, 64, 40, 64, {"num_layers": 2}, None), torch.float32, "cuda")


def test_bits_repeat():
    case = LONG["both ways"]
    mine, *_ = models(*case[2:4], torch.bfloat16, "cuda", case[4])
    x, hx = inputs(*case[:5], torch.bfloat16, "cuda")
    first = run(mine, x, hx, None)
    for _ in range(5):
        again = run(mine, x, hx, None)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_stream_and_a_graph():
    mine, *_ = models(28, 128, torch.bfloat16, "cuda", {})
    x, hx = inputs(28, 64, 28, 128, {}, torch.bfloat16, "cuda")
    with torch.no_grad():
        want = mine(x, hx)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = mine(x, hx)[0]
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(other, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = mine(x, hx)[0]
        x.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(captured, mine(x, hx)[0])
