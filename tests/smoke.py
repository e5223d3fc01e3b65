"""A short proof that an installed wheel works: run by hand or by CI as a script, outside the checkout."""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import pyops
from pyops import backends


def main() -> None:
    assert backends.why_not("conv_relu_pool2d", "cpu") is None, backends.available(
        "conv_relu_pool2d"
    )
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        for channels, out_channels in ((3, 32), (32, 64), (20, 24)):
            input = torch.randn(2, channels, 20, 20, dtype=dtype, requires_grad=True)
            weight = torch.randn(out_channels, channels, 3, 3, dtype=dtype) / channels
            weight.requires_grad_()
            bias = torch.randn(out_channels, dtype=dtype, requires_grad=True)
            results = []
            for backend in ("cpu", "reference"):
                out = pyops.conv_relu_pool2d(input, weight, bias, padding=1, backend=backend)
                grads = torch.autograd.grad(out.float().square().sum(), (input, weight, bias))
                results.append((out, *grads))
            for fast, plain in zip(*results, strict=True):
                # In 16 bits two elements of a window may round to the same value, and then another one wins.
                if dtype == torch.float32 or fast is results[0][0]:
                    scale = plain.abs().max()
                    assert (fast - plain).abs().max() <= tolerance * scale, (
                        dtype,
                        channels,
                        out_channels,
                    )
    module = pyops.nn.ConvReLUPool2d(3, 8, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(compiled(x), module(x))
    cuda_library()
    further_ops()
    print(f"1 passed, 0 failed (torch {torch.__version__}, {pyops.__file__})")


def cuda_library() -> None:
    """Where torch is a CUDA build, _cuda.so loads and registers, GPU or not."""
    library = Path(pyops.__file__).parent / "_cuda.so"
    if torch.version.cuda is None:
        return
    if not library.exists():
        assert os.environ.get("PYOPS_CUDA") != "1", f"{library} was not built"
        return
    reason = backends.why_not("conv_relu_pool2d", "cuda")
    assert reason is None or "GPU" in reason, reason
    for op in ("conv_relu_pool2d", "conv_relu_pool2d_tf32"):
        for name in (op, f"{op}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyops::{name}", "CUDA"), name
    print(f"{library.name} registers its kernels ({reason or 'and can run them'})")


def further_ops() -> None:
    """Each against plain torch, with the gradient of its input."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    query, key, value = torch.randn(3, 2, 4, 33, 40).requires_grad_()
    lstm = torch.nn.LSTM(10, 20, 2)
    weight = torch.randn(8, 6, 4, 4)
    images = torch.randn(2, 8, 7, 7, requires_grad=True)
    steps = torch.randn(7, 3, 10, requires_grad=True)
    pairs = [
        (
            query,
            pyops.attention(query, key, value, causal=True, backend="cpu"),
            F.scaled_dot_product_attention(query, key, value, is_causal=True),
        ),
        (steps, pyops.lstm(steps, None, lstm._flat_weights, num_layers=2, backend="cpu")[0], lstm(steps)[0]),
        (
            images,
            pyops.conv_transpose2d_act(images, weight, stride=2, padding=1, backend="cpu"),
            F.relu(F.conv_transpose2d(images, weight, stride=2, padding=1)),
        ),
    ]  # fmt: skip
    for leaf, fast, plain in pairs:
        close(fast, plain)
        close(*(torch.autograd.grad(out.square().sum(), leaf)[0] for out in (fast, plain)))


if __name__ == "__main__":
    main()
