"""The chain transposed conv → batch norm (in eval) → activation, which `conv_transpose2d_act` runs."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyops._swap.activations import (
    RELU_FUNCTIONS,
    RELU_MODULES,
    SQUASHING_FUNCTIONS,
    SQUASHING_MODULES,
)
from pyops._swap.pattern import Pattern, Settings
from pyops.ops.conv_transpose_act import conv_transpose2d_act


def _batch_norm_module(module: Any) -> Settings | None:
    """The affine map that batch norm is once its statistics are fixed; None while it still takes them."""
    if module.training or module.running_mean is None:
        return None
    scale = torch.rsqrt(module.running_var + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    shift = -module.running_mean * scale
    if module.bias is not None:
        shift = shift + module.bias
    return {"scale": scale, "shift": shift}


def _joins(call: Settings, settings: Settings) -> bool:
    if "activation" in settings:
        return call["activation"] is None
    return call["activation"] is None and call.get("scale") is None


def _function_call(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Settings:
    return {
        "input": input,
        "weight": weight,
        "bias": bias,
        "stride": stride,
        "padding": padding,
        "output_padding": output_padding,
        "groups": groups,
        "dilation": dilation,
        "activation": None,
    }


def _module_call(module: Any, input: torch.Tensor) -> Settings:
    return _function_call(
        *(input, module.weight, module.bias, module.stride, module.padding),
        *(module.output_padding, module.groups, module.dilation),
    )


def _worthwhile(call: Settings) -> bool:
    return bool(call["activation"] or call.get("scale") is not None) or _faster_alone(call)


def _faster_alone(call: Settings) -> bool:
    """Before a batch norm in training: where Winograd's kernel was measured faster than torch's convolution."""
    input, weight = call["input"], call["weight"]
    return (
        isinstance(input, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.dim() == weight.dim() == 4
        and len(input) >= 8
        and weight.shape[0] % 32 == weight.shape[1] % 32 == 0
        and tuple(weight.shape[2:]) == (4, 4)
        and call["stride"] in (2, (2, 2))
        and call["padding"] in (1, (1, 1))
        and call["dilation"] in (1, (1, 1))
        and call["groups"] == 1
    )


CONV_TRANSPOSE = Pattern(
    first="conv_transpose",
    module=nn.ConvTranspose2d,
    module_call=_module_call,
    own_method="_output_padding",
    refusal_of=lambda module: None,
    function=frozenset({F.conv_transpose2d, torch.conv_transpose2d}),
    function_call=_function_call,
    functions={**RELU_FUNCTIONS, **SQUASHING_FUNCTIONS},
    modules={
        **RELU_MODULES,
        **SQUASHING_MODULES,
        nn.BatchNorm2d: ("batch_norm", _batch_norm_module),
    },
    joins=_joins,
    worthwhile=_worthwhile,
    op=lambda **call: conv_transpose2d_act(**call),
)
