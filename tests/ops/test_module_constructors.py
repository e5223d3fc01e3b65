"""The modules check their options when they are made, and print those that are not the defaults."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyops.nn

CONV, TRANSPOSED = pyops.nn.ConvReLUPool2d, pyops.nn.ConvTranspose2dAct
LSTM, CELL = pyops.nn.LSTM, pyops.nn.LSTMCell

BAD = [
    (CONV, {"activation": "foo"}),
    (CONV, {"pool": "min"}),
    (CONV, {"pool_size": 0}),
    (CONV, {"pool_size": 2.5}),
    (CONV, {"pool_stride": -1}),
    (CONV, {"pool_padding": 2}),
    (CONV, {"negative_slope": "steep"}),
    (CONV, {"ceil_mode": 1}),
    (CONV, {"backend": "cudnn"}),
    (CONV, {"padding_mode": "mirror"}),
    (CONV, {"dilation": 0}),
    (TRANSPOSED, {"activation": "foo"}),
    (TRANSPOSED, {"negative_slope": None}),
    (TRANSPOSED, {"output_padding": 3}),
    (TRANSPOSED, {"padding_mode": "reflect"}),
    (TRANSPOSED, {"backend": 3}),
    (LSTM, {"zoneout": 2.0}),
    (LSTM, {"zoneout": (0.1, "much")}),
    (LSTM, {"layer_norm": 1}),
    (LSTM, {"backend": "cudnn"}),
    (CELL, {"zoneout": -0.1}),
    (CELL, {"backend": "cudnn"}),
]


def make(kind, **options):
    return kind(4, 8, 3, **options) if kind in (CONV, TRANSPOSED) else kind(4, 8, **options)


@pytest.mark.parametrize(("kind", "options"), BAD, ids=str)
def test_bad_options_are_refused_when_the_module_is_made(kind, options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=name.replace("padding_mode", "padding.mode")):
        make(kind, **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (CONV, {}, "stride=(1, 1), activation=relu, pool=max, pool_size=2"),
        (CONV, {"pool": None}, "activation=relu, pool=None"),
        (
            CONV,
            {"activation": "leaky_relu", "negative_slope": 0.2, "pool_stride": 1,
             "pool_padding": 1, "ceil_mode": True, "backend": "cpu"},
            "activation=leaky_relu, negative_slope=0.2, pool=max, pool_size=2, pool_stride=1, "
            "pool_padding=1, ceil_mode=True, backend=cpu",
        ),
        (CONV, {"padding": 1, "padding_mode": "reflect"},
         "padding_mode=reflect, activation=relu, pool=max, pool_size=2"),
        (TRANSPOSED, {}, "stride=(1, 1), activation=relu"),
        (
            TRANSPOSED,
            {"activation": "leaky_relu", "negative_slope": 0.2, "backend": "reference"},
            "activation=leaky_relu, negative_slope=0.2, backend=reference",
        ),
        (LSTM, {"zoneout": 0.1, "backend": "cpu"}, "4, 8, zoneout=0.1"),
        (CELL, {}, "4, 8"),
        (CELL, {"zoneout": 0.1, "backend": "cpu"}, "4, 8, zoneout=0.1"),
    ],
)  # fmt: skip
def test_options_that_are_not_defaults_are_printed(kind, options, words):
    text = repr(make(kind, **options))
    assert text.endswith(f"{words})")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1, 2), "same", "valid"])
@pytest.mark.parametrize("batched", [True, False])
def test_padding_modes_are_those_of_conv2d(mode, padding, batched):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=padding, padding_mode=mode)
    module = CONV(4, 8, 3, padding=padding, padding_mode=mode)
    module.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 9, 10) if batched else torch.randn(4, 9, 10)
    want = nn.functional.max_pool2d(conv(x).relu(), 2)
    torch.testing.assert_close(module(x), want)
    later = CONV(4, 8, 3, padding=padding)
    later.load_state_dict(conv.state_dict())
    later.padding_mode = mode
    torch.testing.assert_close(later(x), want)


def test_a_padding_mode_that_transposed_convolution_does_not_have():
    module = make(TRANSPOSED)
    module.padding_mode = "circular"
    with pytest.raises(ValueError, match="padding_mode: expected 'zeros', got 'circular'"):
        module(torch.randn(1, 4, 5, 5))
