"""What the interpreted and the GPU tests of the kernels share: cases and the comparison."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pyops.triton_kernels import conv_relu_pool

from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget


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
    # Enough pixels for the weight gradient to be summed in parts, the last one shorter.
    "pixels-in-parts": (POINTERS, Case((4, 1, 19, 19), (8, 3, 3))),
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


def surrounded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides, as aligned, within a storage that is otherwise NaN."""
    size = tensor.numel()
    held = torch.full((size + 1024,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inside = held[512 : 512 + size].as_strided(tensor.shape, tensor.stride())
    inside.copy_(tensor)
    return inside


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


def expand(case: Case, grad_output: torch.Tensor, codes: torch.Tensor, conv: torch.Size):
    """The gradient before pooling that the codes tell, place by place; float64."""
    expanded = grad_output.new_zeros(conv, dtype=torch.float64)
    grad = grad_output.double()
    blocked = case.slope if case.activation == "leaky_relu" else 0.0
    if case.pool == "none":
        return torch.where(codes & 1 != 0, grad, grad * blocked) if codes.numel() else grad
    device = grad.device
    tops = torch.arange(codes.shape[2], device=device) * case.step[0] - case.pool_padding[0]
    lefts = torch.arange(codes.shape[3], device=device) * case.step[1] - case.pool_padding[1]
    heights = (tops + case.size[0]).clamp(max=conv[2] + case.pool_padding[0]) - tops
    widths = (lefts + case.size[1]).clamp(max=conv[3] + case.pool_padding[1]) - lefts
    for place in range(case.size[0] * case.size[1]):
        rows, columns = tops + place // case.size[1], lefts + place % case.size[1]
        inside_rows = (rows >= 0) & (rows < conv[2])
        inside_columns = (columns >= 0) & (columns < conv[3])
        if case.pool == "max":
            here, whole = (codes & 127) == place, codes >= 128
            part = torch.where(whole, grad, grad * blocked) * here
        else:
            whole = (codes >> place) & 1 != 0
            part = torch.where(whole, grad, grad * blocked) / (heights[:, None] * widths)
        part = part[:, :, inside_rows][..., inside_columns]
        expanded[:, :, rows[inside_rows][:, None], columns[inside_columns]] += part
    return expanded


def gradients_given(case: Case, tensors, expanded: torch.Tensor):
    """Gradients of the convolution alone, in the dtype of `tensors`."""
    x, w = tensors[:2]
    expanded = expanded.to(x.dtype)
    grads = [
        torch.nn.grad.conv2d_input(x.shape, w, expanded, *case.conv),
        torch.nn.grad.conv2d_weight(x, w.shape, expanded, *case.conv),
    ]
    return [*grads, expanded.sum((0, 2, 3))][: len(tensors)]
