"""conv_relu_pool2d's CUDA C++ kernels on an NVIDIA GPU (`make gpu-test`), through the op and the public function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn import grad as nn_grad

import pyops
from pyops.reference.conv_relu_pool import (
    ConvPoolSpec,
    Expansion,
    conv_extents,
    conv_relu_pool2d,
    make_codes,
    stores_codes,
)
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

pytestmark = [pytest.mark.gpu, pytest.mark.proves("conv_relu_pool2d", "cuda")]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def layer(x, w, *, stride=1, padding=1, dilation=1, groups=1, activation="relu", pool="max", size=2, step=None,
          pool_padding=0, ceil_mode=False):  # fmt: skip
    window = ((size, size), (step or size,) * 2, (pool_padding,) * 2, ceil_mode)
    if pool == "none":
        window = ((1, 1), (1, 1), (0, 0), False)
    pairs = ((stride, stride), (padding, padding), (dilation, dilation))
    return x, w, ConvPoolSpec(*pairs, groups, activation, 0.1, pool, *window)


LAYERS = {
    "vgg-1": layer((2, 3, 224, 224), (64, 3, 3, 3)),
    "vgg-2": layer((2, 64, 224, 224), (64, 64, 3, 3)),
    "vgg-4": layer((3, 128, 112, 112), (128, 128, 3, 3)),
    "vgg-7": layer((2, 256, 56, 56), (256, 256, 3, 3)),
    "vgg-13": layer((5, 512, 14, 14), (512, 512, 3, 3)),
    "vgg-no-pool": layer((2, 256, 28, 28), (512, 256, 3, 3), pool="none"),
    "alexnet-1": layer((2, 3, 224, 224), (64, 3, 11, 11), stride=4, padding=2, size=3, step=2),
    "alexnet-2": layer((4, 64, 27, 27), (192, 64, 5, 5), padding=2, size=3, step=2),
    "resnet-stem": layer(
        (2, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3, size=3, step=2, pool_padding=1
    ),
    "resnet-strided": layer((2, 128, 56, 56), (256, 128, 3, 3), stride=2, pool="none"),
    "cifar-average": layer((32, 32, 16, 16), (64, 32, 3, 3), pool="avg"),
    "mnist": layer((64, 1, 28, 28), (32, 1, 3, 3), padding=0),
    "odd": layer((3, 67, 57, 61), (45, 67, 3, 3), ceil_mode=True, activation="leaky_relu"),
    "groups": layer((2, 128, 30, 31), (256, 32, 3, 3), groups=4),
    "dilated": layer((2, 32, 40, 41), (40, 32, 3, 3), dilation=2, stride=2, padding=2),
    "window-3s3": layer((2, 64, 57, 57), (96, 64, 3, 3), size=3),
    "empty": layer((0, 16, 8, 8), (16, 16, 3, 3)),
}


@pytest.fixture(params=["native", "sm_80"], ids=["native", "as-sm80"])
def kernels(request, monkeypatch):
    """The kernels for this GPU, and those that any GPU has."""
    if request.param == "sm_80":
        monkeypatch.setenv("PYOPS_CUDA_ARCH", "80")


@pytest.fixture
def exact(float32_precision):
    float32_precision("ieee")


def make(name, dtype, channels_last=True, device=DEVICE, integers=False, seed=0):
    x_shape, w_shape, _ = LAYERS[name]
    generator = torch.Generator().manual_seed(seed)
    if integers:
        x = torch.randint(-2, 3, x_shape, generator=generator)
        w = torch.randint(-1, 2, w_shape, generator=generator)
        w *= torch.rand(w_shape, generator=generator) < 40 / w[0].numel()  # sums stay small
        b = torch.randint(-3, 4, w_shape[:1], generator=generator)
    else:
        x = torch.randn(x_shape, generator=generator)
        w = torch.randn(w_shape, generator=generator)
        w = w / w[0].numel() ** 0.5
        b = torch.randn(w_shape[:1], generator=generator) / 2
    x, w, b = (t.to(device, dtype) for t in (x, w, b))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x, w, b


def run(x, w, b, spec, with_codes=True, op="conv_relu_pool2d"):
    return getattr(torch.ops.pyops, op)(x, w, b, *spec.flat(), with_codes)


def gradients(grad, x, w, selector, spec, op="conv_relu_pool2d"):
    backward = getattr(torch.ops.pyops, f"{op}_backward")
    return backward(grad, x, w, selector, *spec.flat(), [True] * 3)


def plain_gradients(grad, x, w, selector, spec):
    """Of the convolution, given which elements pass the gradient."""
    expanded = Expansion(selector, spec, conv_extents(x.shape, w.shape, spec)).expand(grad)
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups)
    return (
        nn_grad.conv2d_input(x.shape, w, expanded, *geometry),
        nn_grad.conv2d_weight(x, w.shape, expanded, *geometry),
        expanded.sum((0, 2, 3)),
    )


def check(name, dtype, channels_last):
    """Output within budget of plain torch; the gradients within budget given what passes them."""
    spec = LAYERS[name][2]
    x, w, b = make(name, dtype, channels_last)
    output, codes = run(x, w, b, spec)
    wide = [t.double() for t in (x, w, b)]
    inference, nothing = run(x, w, b, spec, with_codes=False)
    assert nothing.numel() == 0
    low, want = conv_relu_pool2d(x, w, b, spec), conv_relu_pool2d(*wide, spec)
    layout = torch.channels_last if channels_last and x.shape[1] > 1 else torch.contiguous_format
    for result in (output, inference):
        assert_within_budget(result, low, want, name="output")
        assert result.numel() == 0 or result.is_contiguous(memory_format=layout)
    selector = codes if stores_codes(spec) else output
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    results = gradients(grad, x, w, selector, spec)
    low = plain_gradients(grad, x, w, selector, spec)
    want = plain_gradients(grad.double(), *wide[:2], selector, spec)
    for part, *triple in zip(("input", "weight", "bias"), results, low, want, strict=True):
        assert_within_budget(*triple, k=GRADIENT_BUDGET, name=f"grad_{part}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, channels_last, kernels):
    check(name, dtype, channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_exact_float32(name, channels_last, exact):
    check(name, FP32, channels_last)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name not in ("empty", "cifar-average")]
)
def test_bit_for_bit_on_integers(name, dtype, kernels):
    """Sums are exact, ties abound: output, winners and what passes must be torch's."""
    spec = LAYERS[name][2]._replace(negative_slope=0.25)
    x, w, b = make(name, dtype, integers=True)
    for op in ("conv_relu_pool2d", "conv_relu_pool2d_tf32"):
        output, codes = run(x, w, b, spec, op=op)
        wide = [t.double() for t in (x, w, b)]
        want = conv_relu_pool2d(*wide, spec)
        assert want.abs().max() <= 256
        assert torch.equal(output.double(), want.to(dtype).double())
        if stores_codes(spec):
            geometry = (spec.stride, spec.padding, spec.dilation, spec.groups)
            assert torch.equal(codes, make_codes(F.conv2d(*wide, *geometry), spec))


@pytest.mark.parametrize("name", ["vgg-1", "vgg-4", "alexnet-2", "odd", "resnet-strided"])
def test_tf32(name):
    """Within what rounding both operands to 11 bits can do, and not exact."""
    x, w, b = make(name, FP32)
    spec = LAYERS[name][2]._replace(activation="none")
    wide = [t.double() for t in (x, w, b)]
    output, codes = run(x, w, b, spec, op="conv_relu_pool2d_tf32")
    error = (output - conv_relu_pool2d(*wide, spec)).abs()
    magnitude = conv_relu_pool2d(*(t.abs() for t in wide), spec)
    assert (error <= 2.0**-10 * magnitude).all() and error.max() > 2.0**-20 * magnitude.max()
    grad = torch.randn_like(output)
    selector = codes if stores_codes(spec) else output
    results = gradients(grad, x, w, selector, spec, op="conv_relu_pool2d_tf32")
    wants = plain_gradients(grad.double(), *wide[:2], selector, spec)
    limits = plain_gradients(grad.double().abs(), *(t.abs() for t in wide[:2]), selector, spec)
    for result, want, limit in zip(results, wants, limits, strict=True):
        assert ((result - want).abs() <= 2.0**-10 * limit).all()


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_torchs_switch_for_tf32_decides(precision, float32_precision):
    float32_precision(precision)
    x, w, b = make("vgg-4", FP32)
    spec = LAYERS["vgg-4"][2]
    op = "conv_relu_pool2d_tf32" if precision == "tf32" else "conv_relu_pool2d"
    output = pyops.conv_relu_pool2d(x, w, b, padding=1, backend="cuda")
    assert torch.equal(output, run(x, w, b, spec, with_codes=False, op=op)[0])


def test_unaligned_and_odd_strides(kernels):
    spec = LAYERS["vgg-4"][2]
    x, w, b = make("vgg-4", BF16)
    want, codes = run(x, w, b, spec)
    shifted = torch.empty(x.numel() + 1, device=DEVICE, dtype=BF16)[1:].as_strided(
        x.shape, x.stride()
    )
    shifted.copy_(x)
    wide = torch.empty(*x.shape[:3], x.shape[3] + 5, device=DEVICE, dtype=BF16)
    wide.fill_(float("nan"))
    wide[..., 2:-3] = x
    for view in (shifted, wide[..., 2:-3], x.contiguous()):
        output, others = run(view, w, b, spec)
        torch.testing.assert_close(output, want, rtol=2**-7, atol=1e-2)
        assert (others == codes).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", ["vgg-2", "alexnet-2", "odd"])
def test_repeats_bit_for_bit(name, dtype, kernels):
    x, w, b = make(name, dtype)
    spec = LAYERS[name][2]
    output, codes = run(x, w, b, spec)
    grad = torch.randn_like(output)
    first = gradients(grad, x, w, codes, spec)
    for _ in range(3):
        again, again_codes = run(x, w, b, spec)
        assert torch.equal(again, output) and torch.equal(again_codes, codes)
        grads = gradients(grad, x, w, codes, spec)
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


def test_backward_takes_no_memory_for_the_gradient_before_the_pool(kernels):
    x = torch.randn(32, 64, 112, 112, device=DEVICE, dtype=BF16)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device=DEVICE, dtype=BF16)
    spec = layer(x.shape, w.shape)[2]
    output, codes = run(x, w, None, spec)
    grad = torch.randn_like(output)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(grad, x, w, codes, spec)
    # That gradient is as large as x, and so is the result; the rest are parts of the weight's.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * x.nbytes


@pytest.mark.parametrize("name", ["vgg-2", "alexnet-2", "mnist"])
def test_cuda_graph(name, kernels):
    """Captured, and replayed on other values."""
    x, w, b = make(name, BF16)
    spec = LAYERS[name][2]
    grad = torch.randn_like(run(x, w, b, spec)[0])
    gradients(grad, x, w, run(x, w, b, spec)[1], spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, codes = run(x, w, b, spec)
        grads = gradients(grad, x, w, codes, spec)
    for held, other in zip((x, w, b), make(name, BF16, seed=7), strict=True):
        held.copy_(other)
    graph.replay()
    want, want_codes = run(x, w, b, spec)
    assert torch.equal(output, want) and torch.equal(codes, want_codes)
    wants = gradients(grad, x, w, want_codes, spec)
    assert all(torch.equal(a, b) for a, b in zip(grads, wants, strict=True))


def test_current_stream(kernels):
    """The input is ready only on the stream that is current."""
    x, w, b = make("vgg-4", BF16)
    spec = LAYERS["vgg-4"][2]
    want, _ = run(x, w, b, spec)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        output, _ = run(late, w, b, spec)
    stream.synchronize()
    assert torch.equal(output, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(kernels):
    x, w, b = make("vgg-2", BF16, device="cuda:1")
    spec = LAYERS["vgg-2"][2]
    assert torch.cuda.current_device() == 0
    output, codes = run(x, w, b, spec)
    grads = gradients(output, x, w, codes, spec)
    assert output.device == grads[0].device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    here, _ = run(*(t.to("cuda:0") for t in (x, w, b)), spec)
    assert torch.equal(output.cpu(), here.cpu())


def test_out_of_memory_leaves_the_process_usable():
    x, w, b = make("vgg-2", BF16)
    spec = LAYERS["vgg-2"][2]
    want, _ = run(x, w, b, spec)
    many = x[:1].expand(2**20, -1, -1, -1)  # 6 TB of output
    with pytest.raises(torch.OutOfMemoryError):
        run(many, w, b, spec)
    again, _ = run(x, w, b, spec)
    assert torch.equal(again, want)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_public_function_trains(dtype):
    """Autograd, modules and torch.compile through backend="cuda"."""
    x, w, b = (t.requires_grad_() for t in make("vgg-7", dtype))
    spec = LAYERS["vgg-7"][2]
    output = pyops.conv_relu_pool2d(x, w, b, padding=1, backend="cuda")
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, (x, w, b), grad)
    op = "conv_relu_pool2d"
    if dtype == FP32 and torch.backends.cudnn.conv.fp32_precision == "tf32":
        op += "_tf32"
    wants = gradients(grad, x, w, run(x, w, b, spec, op=op)[1], spec, op=op)
    assert all(torch.equal(a, b) for a, b in zip(grads, wants, strict=True))
    compiled = torch.compile(
        lambda *tensors: pyops.conv_relu_pool2d(*tensors, padding=1, backend="cuda"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x, w, b), output)


@pytest.mark.parametrize("op", ["conv_relu_pool2d", "conv_relu_pool2d_tf32"])
def test_opcheck(op):
    x, w, b = make("vgg-13", FP32)
    spec = LAYERS["vgg-13"][2]
    arguments = (x.requires_grad_(), w, b, *spec.flat(), True)
    torch.library.opcheck(getattr(torch.ops.pyops, op).default, arguments)


def test_what_it_refuses():
    x, w, b = make("mnist", FP32)
    with pytest.raises(RuntimeError, match="float64"):
        pyops.conv_relu_pool2d(x.double(), w.double(), b.double(), backend="cuda")
    with pytest.raises(RuntimeError, match="128 places"):
        pyops.conv_relu_pool2d(x, w, b, pool_size=13, backend="cuda")
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        run(x.double(), w.double(), b.double(), LAYERS["mnist"][2])


@pytest.mark.slow
@pytest.mark.parametrize("channels", [64, 3])
def test_more_than_2_31_elements(channels, kernels):
    """The last images of a batch whose offsets pass 32 bits equal the same images on their own."""
    images = (2**31 // (channels * 224 * 224)) + 24
    needed = images * (2 * channels * 224 * 224 * 4 + 112 * 112 * 64 * 8 + 224 * 224 * 64 * 2)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    spec = LAYERS["vgg-2"][2]
    shape = (images, channels, 224, 224)
    x = torch.empty(shape, device=DEVICE, dtype=BF16, memory_format=torch.channels_last).normal_()
    w = torch.randn(64, channels, 3, 3, device=DEVICE, dtype=BF16) / (9 * channels) ** 0.5
    output, codes = run(x, w, None, spec)
    few = x[-3:].contiguous(memory_format=torch.channels_last)
    last, last_codes = run(few, w, None, spec)
    assert torch.equal(output[-3:], last) and torch.equal(codes[-3:], last_codes)
    grads = gradients(output, x, w, codes, spec)
    some = gradients(last, few, w, last_codes, spec)
    assert torch.equal(grads[0][-3:], some[0])
    assert grads[1].isfinite().all()
