"""The chain linear → tanh, which `linear_act` runs; its other activations gain nothing on torch's own."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyops._swap.activations import IDENTITY, TANH_FUNCTIONS, TANH_MODULES
from pyops._swap.pattern import Pattern, Settings
from pyops.ops.linear_act import linear_act


def _function_call(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Settings:
    return {"input": input, "weight": weight, "bias": bias, "activation": None}


def _module_call(module: Any, input: torch.Tensor) -> Settings:
    return _function_call(input, module.weight, module.bias)


LINEAR = Pattern(
    first="linear",
    module=nn.Linear,
    module_call=_module_call,
    own_method="",
    refusal_of=lambda module: None,
    function=frozenset({F.linear}),
    function_call=_function_call,
    functions=TANH_FUNCTIONS,
    modules={**TANH_MODULES, nn.Identity: ("identity", lambda module: IDENTITY)},
    joins=lambda call, settings: call["activation"] is None,
    worthwhile=lambda call: bool(call["activation"]),
    op=lambda **call: linear_act(**call),
    images=False,
    common=True,
)
