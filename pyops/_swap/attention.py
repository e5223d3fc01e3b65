"""Calls of F.scaled_dot_product_attention, which our op runs with the same arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyops._swap.guard import is_plain_tensor
from pyops._swap.pattern import Pattern
from pyops.ops.sdpa import scaled_dot_product_attention


class _Attention(Pattern):
    """One call by itself: nothing follows it that would fuse."""

    def run(
        self, backend: str | None, function: Any, args: tuple, kwargs: dict, *steps: Any
    ) -> Any:
        given = (*args, *kwargs.values())
        plain = all(
            is_plain_tensor(a) or a.dtype == torch.bool for a in given if torch.is_tensor(a)
        )
        if function in self.function and plain and not torch.jit.is_tracing():
            return scaled_dot_product_attention(*args, **kwargs, backend=backend)
        return function(*args, **kwargs)


class _NoModule(nn.Module):
    """A class that no module of a model has: only functions begin this pattern."""


ATTENTION = _Attention(
    first="attention",
    alone=True,
    module=_NoModule,
    module_call=lambda module, input: {},
    own_method="",
    refusal_of=lambda module: None,
    function=frozenset({F.scaled_dot_product_attention}),
    function_call=lambda **call: call,
    functions={},
    modules={},
    joins=lambda call, settings: False,
    worthwhile=lambda call: True,
    op=scaled_dot_product_attention,
)
