"""What the interpreted and the GPU tests of the Triton conv_relu_pool share: cases and the comparison."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget
from pyops.triton_kernels import conv_relu_pool


@dataclass
class Case:
    """Arguments of one call; `input` is (batch, channels, height, width), `kernel` (out, R, S)."""

    input: tuple[int, int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "relu"
    slope: float = 0.1
    pool: str = "max"
    size: tuple[int, int] = (2, 2)
    step: tuple[int, int] = (2, 2)
    pool_padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    bias: bool = True

    @property
    def conv(self) -> tuple:
        return (self.stride, self.padding, self.dilation, self.groups)

    @property
    def options(self) -> tuple:
        """What `forward` and `backward` take after their tensors."""
        pooling = (self.pool, self.size, self.step, self.pool_padding, self.ceil_mode)
        return (*self.conv, self.activation, self.slope, *pooling)

    def make(self, device: str, seed: int = 0) -> list[torch.Tensor]:
        """input, weight and, if there is one, bias."""
        generator = torch.Generator().manual_seed(seed)
        out, *taps = self.kernel
        fan_in = self.input[1] // self.groups * taps[0] * taps[1]
        x = torch.randn(self.input, generator=generator)
        w = torch.randn(out, self.input[1] // self.groups, *taps, generator=generator)
        made = [x, w / fan_in**0.5]
        if self.bias:
            made.append(torch.randn(out, generator=generator) / 2)
        made = [t.to(device, self.dtype) for t in made]
        if self.channels_last:
            made[0] = made[0].contiguous(memory_format=torch.channels_last)
        return made

    def plain(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None):
        """The same in plain torch."""
        y = F.conv2d(x, w, b, *self.conv)
        if self.activation == "relu":
            y = F.relu(y)
        elif self.activation == "leaky_relu":
            y = F.leaky_relu(y, self.slope)
        if self.pool == "none":
            return y
        pool = F.max_pool2d if self.pool == "max" else F.avg_pool2d
        return pool(y, self.size, self.step, self.pool_padding, ceil_mode=self.ceil_mode)

    def forward(self, tensors: list[torch.Tensor], with_codes: bool = True):
        bias = tensors[2] if self.bias else None
        return conv_relu_pool.forward(*tensors[:2], bias, *self.options, with_codes)

    def backward(self, grad_output, tensors, output, codes, mask=(True, True, True)):
        # What the op saves: the codes, or the output where it is as good.
        saved = codes if codes.numel() else output
        return conv_relu_pool.backward(grad_output, *tensors[:2], saved, *self.options, mask)


def gradients(case: Case, tensors: list[torch.Tensor], grad_output: torch.Tensor):
    """Plain torch's output and gradients in the dtype of `tensors`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = case.plain(*leaves)
    return output.detach(), torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def check(case: Case, device: str, backward: bool = True, tensors: list | None = None) -> None:
    """Forward, with and without codes, and every gradient, within the error budget."""
    tensors = tensors or case.make(device)
    output, codes = case.forward(tensors)
    inference, nothing = case.forward(tensors, with_codes=False)
    exact = [t.double() for t in tensors]
    reference = case.plain(*exact)
    low = case.plain(*tensors)
    assert output.shape == reference.shape
    assert nothing.shape == (0,) and nothing.dtype is torch.uint8
    last = tensors[0].stride(1) == 1 and tensors[0].shape[1] > 1 and not tensors[0].is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    for result in (output, inference):
        assert result.is_contiguous(memory_format=layout)
        assert_within_budget(result, low, reference, OUTPUT_BUDGET, "output")
    if codes.numel():
        assert codes.dtype is torch.uint8
        assert codes.shape == output.shape and codes.stride() == output.stride()
    if not backward:
        return
    grad_output = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32
    ).to(device, case.dtype)
    mine = case.backward(grad_output, tensors, output, codes)
    assert mine[0].is_contiguous(memory_format=layout) and mine[1].is_contiguous()
    _, low = gradients(case, tensors, grad_output)
    _, reference = gradients(case, exact, grad_output)
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, grad, low_grad, exact_grad in zip(names, mine, low, reference, strict=False):
        assert_within_budget(grad, low_grad, exact_grad, GRADIENT_BUDGET, name)
