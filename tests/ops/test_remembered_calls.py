"""A checked call is remembered by the types of its options, too: True is no 1, though they are equal."""

from __future__ import annotations

import pytest
import torch

import pyops

X = torch.randn(1, 2, 4, 4)
CALLS = {
    "conv_transpose2d_act": (
        lambda value: pyops.conv_transpose2d_act(X, torch.randn(2, 3, 3, 3), stride=value),
        "stride: expected an int",
    ),
    "linear_act": (
        lambda value: pyops.linear_act(X, torch.randn(3, 4), negative_slope=value),
        "negative_slope: expected",
    ),
    "attention": (lambda value: pyops.attention(X, X, X, softcap=value), "softcap: expected"),
    "attention_varlen": (
        lambda value: pyops.attention_varlen(
            *(X[0],) * 3, *(torch.tensor([0, 2], dtype=torch.int32),) * 2, softcap=value
        ),
        "softcap: expected",
    ),
    "attention_decode": (
        lambda value: pyops.attention_decode(X[:, :, :1], X, X, softcap=value),
        "softcap: expected",
    ),
    "lstm": (
        lambda value: pyops.lstm(
            torch.randn(3, 1, 2),
            None,
            [torch.randn(8, 2), torch.randn(8, 2)],
            num_layers=value,
            bidirectional=False,
            batch_first=False,
            dropout=0.0,
            training=False,
        ),
        "num_layers: expected an int",
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_true_is_refused_after_the_same_call_with_one(op):
    call, message = CALLS[op]
    call(1)
    with pytest.raises(TypeError, match=message):
        call(True)
