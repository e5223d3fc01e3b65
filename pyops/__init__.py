"""Fused kernels for PyTorch: drop-in ops, modules, and a way to swap them into models.

Importing the package loads the native libraries that were built and registers the ops; Triton is
imported only when one of its kernels is called.
"""

from __future__ import annotations

from . import backends

backends.load_native()

# The imports below need the ops defined.
from .ops import attention_decode as _attention_decode  # noqa: E402
from .ops import attention_rules as _attention  # noqa: E402
from .ops import attention_varlen_rules as _attention_varlen  # noqa: E402
from .ops import conv_relu_pool_rules as _conv_relu_pool  # noqa: E402
from .ops import conv_transpose_act_rules as _conv_transpose_act  # noqa: E402
from .ops import linear_act_rules as _linear_act  # noqa: E402
from .ops import lstm_rules as _lstm  # noqa: E402

if backends.schemas_loaded():
    _conv_relu_pool.register()
    _conv_transpose_act.register()
    _linear_act.register()
    _attention.register()
    _attention_varlen.register()
    _attention_decode.register()
    _lstm.register()

from . import nn  # noqa: E402
from .integrations import torch_flash as _torch_flash  # noqa: E402
from .ops.attention import attention, merge_attention  # noqa: E402
from .ops.attention_decode import attention_decode  # noqa: E402
from .ops.attention_varlen import attention_varlen  # noqa: E402
from .ops.conv_relu_pool import conv_relu_pool2d  # noqa: E402
from .ops.conv_transpose_act import conv_transpose2d_act  # noqa: E402
from .ops.linear_act import linear_act  # noqa: E402
from .ops.lstm import lstm  # noqa: E402
from .ops.sdpa import scaled_dot_product_attention  # noqa: E402
from .optimize import optimize, optimized, restore  # noqa: E402

_torch_flash.register()

__version__ = "0.1.0"
__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "backends",
    "conv_relu_pool2d",
    "conv_transpose2d_act",
    "linear_act",
    "lstm",
    "merge_attention",
    "nn",
    "optimize",
    "optimized",
    "restore",
    "scaled_dot_product_attention",
]
