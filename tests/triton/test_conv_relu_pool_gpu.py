"""The Triton kernels of conv_relu_pool2d on an NVIDIA GPU (`make gpu-test`)."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", "3.6")

from conv_pool_checks import (  # noqa: E402  (Triton is here)
    BF16,
    CASES,
    FP16,
    Case,
    check,
    expand,
    gradients_given,
    surrounded,
)
from pyops.triton_kernels import common  # noqa: E402

from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.proves("conv_relu_pool2d", "triton"),
    pytest.mark.skipif(common.INTERPRET, reason="runs compiled, not interpreted"),
]

ALEXNET = {"size": (3, 3), "step": (2, 2)}
LAYERS = {
    "vgg-1": Case((2, 3, 224, 224), (64, 3, 3)),
    "vgg-2": Case((2, 64, 224, 224), (64, 3, 3)),
    "vgg-4": Case((3, 128, 112, 112), (128, 3, 3)),
    "vgg-7": Case((2, 256, 56, 56), (256, 3, 3)),
    "vgg-13": Case((5, 512, 14, 14), (512, 3, 3)),
    "vgg-no-pool": Case((2, 256, 28, 28), (512, 3, 3), pool="none"),
    "alexnet-1": Case((2, 3, 224, 224), (64, 11, 11), stride=(4, 4), padding=(2, 2), **ALEXNET),
    "alexnet-2": Case((4, 64, 27, 27), (192, 5, 5), padding=(2, 2), **ALEXNET),
    "alexnet-5": Case((4, 256, 13, 13), (256, 3, 3), **ALEXNET),
    "resnet-stem": Case(
        (2, 3, 224, 224), (64, 7, 7), stride=(2, 2), padding=(3, 3), pool_padding=(1, 1), **ALEXNET
    ),
    "resnet-strided": Case((2, 128, 56, 56), (256, 3, 3), stride=(2, 2), pool="none"),
    "cifar-average": Case((32, 32, 16, 16), (64, 3, 3), pool="avg"),
    "mnist": Case((64, 1, 28, 28), (32, 3, 3), padding=(0, 0)),
    "odd": Case((3, 67, 57, 61), (45, 3, 3), ceil_mode=True, activation="leaky_relu"),
    "groups": Case((2, 128, 30, 31), (256, 3, 3), groups=4),
    "window-3s3": Case((2, 64, 57, 57), (96, 3, 3), size=(3, 3), step=(3, 3)),
}


@pytest.fixture
def exact(float32_precision):
    float32_precision("ieee")


@pytest.fixture
def tf32(float32_precision):
    float32_precision("tf32")


@pytest.fixture
def untuned(monkeypatch):
    """The first config; tests that mean others take them themselves."""
    monkeypatch.setattr(common, "_autotune", False)


def check_layer(case: Case) -> None:
    """Output within budget of plain torch; the gradients within budget given the codes.

    Given, since in 16 bits plain torch itself often sends a gradient to another winner.
    """
    tensors = case.make("cuda")
    output, codes = case.forward(tensors)
    wide = [t.double() for t in tensors]
    reference = case.plain(*wide)
    assert_within_budget(output, case.plain(*tensors), reference, OUTPUT_BUDGET, "output")
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to("cuda", case.dtype)
    grads = case.backward(grad, tensors, output, codes)
    conv = torch.nn.functional.conv2d(*wide, *case.conv)
    if not codes.numel():
        codes = ((output > 0) | (case.activation == "none")).to(torch.uint8)
    expanded = expand(case, grad, codes, conv.shape)
    low = gradients_given(case, tensors, expanded)
    exact = gradients_given(case, wide, expanded)
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, mine, low_grad, exact_grad in zip(names, grads, low, exact, strict=True):
        assert_within_budget(mine, low_grad, exact_grad, GRADIENT_BUDGET, name)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_small(name, dtype, channels_last, exact, untuned):
    case = replace(CASES[name][1], dtype=dtype, channels_last=channels_last)
    tensors = case.make("cuda")
    tensors[0] = surrounded(tensors[0])
    check(case, "cuda", backward=dtype is torch.float32, tensors=tensors)
    if dtype is not torch.float32:
        check_layer(replace(case, bias=True))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, channels_last, untuned):
    check_layer(replace(LAYERS[name], dtype=dtype, channels_last=channels_last))


@pytest.mark.parametrize("name", ["vgg-1", "vgg-13", "alexnet-2", "odd", "resnet-strided"])
def test_layers_in_exact_float32(name, exact, untuned):
    check_layer(LAYERS[name])


@pytest.mark.parametrize("choice", [1, 2])
@pytest.mark.parametrize("name", ["vgg-1", "vgg-2", "vgg-4", "alexnet-1", "alexnet-2", "odd"])
def test_every_config(name, choice, monkeypatch):
    monkeypatch.setattr(
        common, "choose", lambda kernel, configs, key, bind: configs[min(choice, len(configs) - 1)]
    )
    check_layer(replace(LAYERS[name], dtype=BF16, channels_last=True))


@pytest.mark.parametrize("name", ["vgg-1", "vgg-4", "alexnet-2", "odd", "resnet-strided"])
def test_tf32(name, tf32, untuned):
    """Within what rounding both operands to 11 bits can do."""
    case = replace(LAYERS[name], channels_last=True, activation="none", pool="none")
    tensors = case.make("cuda")
    wide = [t.double() for t in tensors]
    magnitudes = [t.abs() for t in wide]
    bound = 2.0**-9
    output, codes = case.forward(tensors)
    error = (output - case.plain(*wide)).abs()
    assert (error <= bound * case.plain(*magnitudes)).all()
    assert error.max() > 0
    grad = torch.randn_like(output)
    grads = case.backward(grad, tensors, output, codes)
    exact = gradients_given(case, wide, grad.double())
    limits = gradients_given(case, magnitudes, grad.double().abs())
    for mine, wanted, limit in zip(grads, exact, limits, strict=True):
        assert ((mine - wanted).abs() <= bound * limit).all()


@pytest.mark.parametrize("name", ["vgg-2", "alexnet-2", "odd"])
def test_repeats_bit_for_bit(name):
    case = replace(LAYERS[name], dtype=BF16, channels_last=True)
    tensors = case.make("cuda")
    output, codes = case.forward(tensors)
    grad = torch.randn_like(output)
    first = case.backward(grad, tensors, output, codes)
    for _ in range(3):
        again, again_codes = case.forward(tensors)
        assert torch.equal(again, output) and torch.equal(again_codes, codes)
        grads = case.backward(grad, tensors, output, codes)
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


@pytest.mark.parametrize("name", ["vgg-2", "alexnet-2", "mnist"])
def test_cuda_graph(name, monkeypatch):
    """Captured without tuning, which would wait for the device, and replayed on other values."""
    monkeypatch.setattr(common, "_chosen", {})
    monkeypatch.setattr(common, "_autotune", False)
    case = replace(LAYERS[name], dtype=BF16, channels_last=True)
    tensors = case.make("cuda")
    output, codes = case.forward(tensors)
    grad = torch.randn_like(output)
    case.backward(grad, tensors, output, codes)
    monkeypatch.setattr(common, "_autotune", True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, codes = case.forward(tensors)
        grads = case.backward(grad, tensors, output, codes)
    assert not common._chosen
    for held, other in zip(tensors, case.make("cuda", seed=7), strict=True):
        held.copy_(other)
    graph.replay()
    monkeypatch.setattr(common, "_autotune", False)
    plain, plain_codes = case.forward(tensors)
    assert torch.equal(output, plain) and torch.equal(codes, plain_codes)
    plain_grads = case.backward(grad, tensors, plain, plain_codes)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


def test_current_stream(untuned):
    """The input is ready only on the stream that is current."""
    case = replace(LAYERS["vgg-4"], dtype=BF16, channels_last=True)
    tensors = case.make("cuda")
    expected, _ = case.forward(tensors)
    late = torch.zeros_like(tensors[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(tensors[0])
        output, _ = case.forward([late, *tensors[1:]])
    stream.synchronize()
    assert torch.equal(output, expected)


def test_tuned_is_the_same(monkeypatch):
    monkeypatch.setattr(common, "_chosen", {})
    case = replace(LAYERS["vgg-7"], dtype=BF16, channels_last=True)
    tensors = case.make("cuda")
    monkeypatch.setattr(common, "_autotune", True)
    tuned, _ = case.forward(tensors)
    assert common._chosen
    monkeypatch.setattr(common, "_autotune", False)
    plain, _ = case.forward(tensors)
    torch.testing.assert_close(tuned, plain, rtol=2**-7, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [64, 3], ids=["boxes", "pointers"])
def test_more_than_2_31_elements(channels, untuned):
    """The last images of a batch whose offsets pass 32 bits equal the same images on their own."""
    images = (2**31 // (channels * 224 * 224)) + 24
    needed = 2 * images * channels * 224 * 224 * 5 + images * 112 * 112 * 64 * 12
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    case = Case((images, channels, 224, 224), (64, 3, 3), dtype=BF16, channels_last=True)
    x = torch.empty(case.input, device="cuda", dtype=BF16, memory_format=torch.channels_last)
    x.normal_()
    w, b = replace(case, input=(1, channels, 1, 1)).make("cuda")[1:]
    output, codes = case.forward([x, w, b])
    grad = torch.ones_like(output)
    grads = case.backward(grad, [x, w, b], output, codes)
    few = x[-3:].contiguous(memory_format=torch.channels_last)
    last, last_codes = case.forward([few, w, b])
    torch.testing.assert_close(output[-3:], last, rtol=2**-7, atol=1e-2)
    assert (codes[-3:] == last_codes).float().mean() > 0.999
    some = case.backward(
        grad[-3:],
        [few, w, b],
        last,
        codes[-3:].contiguous(memory_format=torch.channels_last),
        (True, False, False),
    )[0]
    torch.testing.assert_close(grads[0][-3:], some, rtol=2**-7, atol=1e-2)
    # The sums over all pixels, from the codes alone.
    passed = ((codes & 128) != 0).sum((0, 2, 3)).double()
    torch.testing.assert_close(grads[2].double(), passed, rtol=2**-7, atol=0)
    assert grads[1].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(untuned):
    case = replace(LAYERS["vgg-2"], dtype=BF16, channels_last=True)
    tensors = case.make("cuda:1")
    assert torch.cuda.current_device() == 0
    output, codes = case.forward(tensors)
    grads = case.backward(output, tensors, output, codes)
    assert output.device == grads[0].device == torch.device("cuda:1")
    assert_within_budget(output, case.plain(*tensors), case.plain(*(t.double() for t in tensors)))
