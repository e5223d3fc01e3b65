"""Modules over the ops: the constructors and state_dicts of torch.nn's. One file an op."""

from .attention import MultiheadAttention
from .conv_relu_pool import ConvReLUPool2d
from .conv_transpose_act import ConvTranspose2dAct
from .linear_act import LinearAct
from .lstm import LSTM, LSTMCell

__all__ = [
    "LSTM",
    "ConvReLUPool2d",
    "ConvTranspose2dAct",
    "LSTMCell",
    "LinearAct",
    "MultiheadAttention",
]
