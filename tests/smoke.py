"""A short proof that an installed wheel works: run by hand or by CI as a script, outside the checkout."""

import torch

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
    print(f"1 passed, 0 failed (torch {torch.__version__}, {pyops.__file__})")


if __name__ == "__main__":
    main()
