"""Modules over the ops: the constructors and state_dicts of torch.nn's. One file an op."""

from .conv_relu_pool import ConvReLUPool2d

__all__ = ["ConvReLUPool2d"]
