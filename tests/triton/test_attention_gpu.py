"""The Triton kernels of attention on an NVIDIA GPU (`make gpu-test`)."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", "3.6")

from attention_checks import (  # noqa: E402  (Triton is here)
    BF16,
    CASES,
    CAUSAL,
    FP16,
    FP32,
    Case,
    check,
    check_varlen,
)
from attention_decode_checks import (  # noqa: E402
    DECODE_CASES,
    DecodeCase,
    check_decode,
)
from pyops.triton_kernels import attention_call, common  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.proves("attention", "triton"),
    pytest.mark.skipif(common.INTERPRET, reason="runs compiled, not interpreted"),
]

DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
SEQLENS = [
    (1, 1),
    (1, 239),
    (239, 1),
    (3, 799),
    (799, 3),
    (113, 203),
    (203, 113),
    (64, 128),
    (127, 512),
    (128, 217),
    (256, 511),
    (384, 256),
    (512, 512),
    (1024, 1024),
    (1023, 1024),
    (1024, 1023),
    (2048, 2048),
]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_small(name, dtype):
    check(replace(CASES[name], dtype=dtype), "cuda")


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 59, 64, 80, 96, 111, 128, 192, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [(-1, -1), CAUSAL, (100, 30)], ids=["full", "causal", "window"])
def test_head_dims(head_dim, heads, window, dtype):
    check(Case((300, 413), heads, (head_dim, head_dim), 2, dtype, window=window), "cuda")


@pytest.mark.parametrize("seqlens", [s for s in SEQLENS if s != (1, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [(-1, -1), CAUSAL, (70, 0)], ids=["full", "causal", "window"])
def test_seqlens(seqlens, head_dim, window):
    check(Case(seqlens, (4, 2), (head_dim, head_dim), 2, BF16, window=window), "cuda")


@DTYPES
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (111, 59), (192, 128), (256, 256)])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 15.0, "window": CAUSAL},
        {"alibi": 2, "window": CAUSAL},
        {"sinks": True, "window": (128, 0)},
        {"bias": (1, 4, 300, 413)},
        {"bias": (2, 1, 300, 413), "bias_dtype": torch.bool},
        {"bias": (1, 1, 1, 413), "bias_dtype": FP32},
        {"dropout_p": 0.17, "window": CAUSAL},
        {"bias": (2, 4, 300, 413), "dropout_p": 0.3, "softcap": 20.0, "sinks": True, "alibi": 1},
        {"heads_inside": True, "window": CAUSAL},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(options, head_dims, dtype):
    check(Case((300, 413), (4, 2), head_dims, 2, dtype, **options), "cuda")


@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("window", [(-1, -1), CAUSAL], ids=["full", "causal"])
def test_float32(head_dim, window, float32_precision):
    """Three TF32 products where torch does not allow one."""
    float32_precision("ieee")
    check(Case((200, 300), (4, 2), (head_dim, head_dim), 2, window=window), "cuda")


@DTYPES
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (111, 59)])
@pytest.mark.parametrize("window", [(-1, -1), CAUSAL, (100, 0)], ids=["full", "causal", "window"])
def test_packed(head_dims, window, dtype):
    case = Case((1, 1), (4, 2), head_dims, dtype=dtype, window=window, sinks=True)
    lengths = [(300, 413), (0, 5), (129, 128), (1, 700), (513, 513), (128, 2)]
    check_varlen(case, "cuda", lengths, tail=37)


@pytest.mark.parametrize("splits", [0, 1, 3, 64])
@pytest.mark.parametrize("name", DECODE_CASES)
def test_decode_small(name, splits):
    check_decode(DECODE_CASES[name], "cuda", splits)


@DTYPES
@pytest.mark.parametrize("page", [0, 16, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode(head_dim, page, dtype):
    case = DecodeCase((5000, 1, 8190, 0), new=2, seqlen_q=2, capacity=8192, heads=(16, 2))
    case = replace(case, head_dims=(head_dim,) * 2, page=page, rotary=head_dim // 2, dtype=dtype)
    check_decode(replace(case, window=CAUSAL), "cuda", 0)


REPEATED = Case((1000, 1100), (8, 2), (128, 128), 2, BF16, window=CAUSAL, dropout_p=0.1)


def results(case: Case, tensors: dict) -> tuple:
    output, lse = case.forward(tensors)
    return output, lse, *case.backward(tensors, output, lse, output, lse)


def test_250_repeats_bit_for_bit():
    tensors = REPEATED.make("cuda")
    first = results(REPEATED, tensors)
    for _ in range(250):
        assert all(
            torch.equal(a, b) for a, b in zip(first, results(REPEATED, tensors), strict=True)
        )


def test_cuda_graph():
    """Captured and replayed on other values."""
    tensors = REPEATED.make("cuda")
    results(REPEATED, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(REPEATED, tensors)
    for name, other in REPEATED.make("cuda", seed=7).items():
        if other is not None:
            tensors[name].copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, results(REPEATED, tensors), strict=True))


def test_current_stream():
    """The query is ready only on the stream that is current."""
    tensors = REPEATED.make("cuda")
    expected = results(REPEATED, tensors)
    late = torch.zeros_like(tensors["query"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(tensors["query"])
        got = results(REPEATED, tensors | {"query": late})
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_pointers_within_budget(monkeypatch):
    monkeypatch.setattr(attention_call, "takes_boxes", lambda tensor: False)
    check(replace(REPEATED, seqlens=(500, 600)), "cuda")


@pytest.mark.slow
def test_more_than_2_31_elements():
    """Rows of a head whose offsets pass 32 bits equal the same rows in a small tensor."""
    seqlen, heads = 2**31 // (64 * 128) + 1024, 64
    if torch.cuda.mem_get_info()[0] < seqlen * heads * 128 * 2 * 4:
        pytest.skip("needs more free GPU memory")
    big = torch.zeros(1, seqlen, heads, 128, device="cuda", dtype=BF16).transpose(1, 2)
    last = torch.randn(1, heads, 512, 128, device="cuda", dtype=BF16)
    big[:, :, -512:] = last
    case = Case((seqlen, 512), (heads, heads), (128, 128), dtype=BF16, window=(40, 0))
    small = replace(case, seqlens=(512, 512))
    tensors = small.make("cuda", seed=1) | {"query": big}
    output, lse = case.forward(tensors)
    wanted, wanted_lse = small.forward(tensors | {"query": last})
    assert torch.equal(output[:, :, -512:], wanted) and torch.equal(lse[:, :, -512:], wanted_lse)
    grads = case.backward(tensors, output, None, output, lse)
    small_grads = small.backward(tensors | {"query": last}, wanted, None, wanted, wanted_lse)
    assert torch.equal(grads[0][:, :, -512:], small_grads[0])
    torch.testing.assert_close(grads[1], small_grads[1], rtol=2**-7, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    assert torch.cuda.current_device() == 0
    check(replace(REPEATED, seqlens=(200, 300)), "cuda:1")
    check_varlen(Case((1, 1), head_dims=(64, 64), dtype=BF16), "cuda:1", [(100, 120), (3, 40)])
