"""Fused kernels for PyTorch: drop-in ops, modules, and a way to swap them into models.

Importing the package loads the native libraries that were built and registers the ops; Triton is
imported only when one of its kernels is called.
"""

from __future__ import annotations

from . import backends

backends.load_native()

# The imports below need the ops defined.
from .ops import conv_relu_pool_rules as _conv_relu_pool  # noqa: E402
from .ops import lstm_rules as _lstm  # noqa: E402

if backends.schemas_loaded():
    _conv_relu_pool.register()
    _lstm.register()

from . import nn  # noqa: E402
from .ops.conv_relu_pool import conv_relu_pool2d  # noqa: E402
from .ops.lstm import lstm  # noqa: E402
from .optimize import optimize, optimized, restore  # noqa: E402

__version__ = "0.1.0"
__all__ = ["backends", "conv_relu_pool2d", "lstm", "nn", "optimize", "optimized", "restore"]
