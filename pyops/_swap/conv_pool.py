"""The chain conv → activation → pool, which `conv_relu_pool2d` runs."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyops._swap.activations import RELU_FUNCTIONS, RELU_MODULES
from pyops._swap.pattern import Pattern, Settings
from pyops.ops.conv_relu_pool import conv_relu_pool2d


def _max_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Settings | None:
    if return_indices or dilation not in (1, (1, 1), [1, 1]):
        return None
    return _pool("max", kernel_size, stride, padding, ceil_mode)


def _max_pool2d_in_torch(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Settings | None:
    return _max_pool2d(kernel_size, stride, padding, dilation, ceil_mode)


def _avg_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Settings | None:
    padded = padding not in (0, (0, 0), [0, 0])
    if divisor_override is not None or (padded and not count_include_pad):
        return None
    return _pool("avg", kernel_size, stride, padding, ceil_mode)


def _pool(pool: str, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> Settings:
    return {
        "pool": pool,
        "pool_size": kernel_size,
        "pool_stride": stride or None,  # torch takes () for "as the window"
        "pool_padding": padding,
        "ceil_mode": ceil_mode,
    }


def _max_pool_module(module: Any) -> Settings | None:
    return _max_pool2d(
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
        module.return_indices,
    )


def _avg_pool_module(module: Any) -> Settings | None:
    return _avg_pool2d(
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


def _joins(call: Settings, settings: Settings) -> bool:
    pool = call.get("pool")
    if "activation" in settings:
        # After the pool only ReLU over a maximum commutes, in ties and gradients too: the place
        # of a positive maximum stays, and any other gets no gradient. LeakyReLU can make two
        # different negative values equal by rounding, which moves the first maximum.
        return call["activation"] is None and (
            pool is None or (pool == "max" and settings["activation"] == "relu")
        )
    return pool is None or "pool" not in settings


def _function_call(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Settings:
    return {
        "input": input,
        "weight": weight,
        "bias": bias,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": None,
        "pool": None,
    }


def _module_call(module: Any, input: torch.Tensor) -> Settings:
    return _function_call(
        *(input, module.weight, module.bias),
        *(module.stride, module.padding, module.dilation, module.groups),
    )


def _refusal(module: Any) -> str | None:
    return None if module.padding_mode == "zeros" else f"padding_mode is {module.padding_mode!r}"


CONV_POOL = Pattern(
    first="conv",
    module=nn.Conv2d,
    module_call=_module_call,
    own_method="_conv_forward",  # a known way to change the padding
    refusal_of=_refusal,
    function=frozenset({F.conv2d, torch.conv2d}),
    function_call=_function_call,
    functions={
        **RELU_FUNCTIONS,
        F.max_pool2d: ("max_pool", _max_pool2d),
        torch.max_pool2d: ("max_pool", _max_pool2d_in_torch),
        F.avg_pool2d: ("avg_pool", _avg_pool2d),
    },
    modules={
        **RELU_MODULES,
        nn.MaxPool2d: ("max_pool", _max_pool_module),
        nn.AvgPool2d: ("avg_pool", _avg_pool_module),
    },
    joins=_joins,
    worthwhile=lambda call: bool(call["activation"] or call["pool"]),
    op=lambda **call: conv_relu_pool2d(**call),
)
