"""Arguments that are numbers without being Python's: NumPy's, and those that torch takes in modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conv_pool_cases import make_inputs
from torch import nn

import pyops

X, W, B = make_inputs((2, 6, 10, 10), (8, 6, 3, 3))
TRANSPOSED = W.transpose(0, 1).contiguous()


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_numpy_numbers_are_taken(backend):
    one, two = np.int64(1), np.int32(2)
    slope = np.float32(0.125)
    got = pyops.conv_relu_pool2d(
        *(X, W, B), stride=one, padding=(one, two), dilation=[one], groups=one,
        activation="leaky_relu", negative_slope=slope, pool_size=two, backend=backend,
    )  # fmt: skip
    want = pyops.conv_relu_pool2d(
        *(X, W, B), padding=(1, 2), activation="leaky_relu", negative_slope=0.125, backend=backend
    )
    assert torch.equal(got, want)
    options = {"activation": "leaky_relu", "backend": backend}
    got = pyops.conv_transpose2d_act(
        X, TRANSPOSED, stride=two, groups=one, negative_slope=slope, **options
    )
    want = pyops.conv_transpose2d_act(X, TRANSPOSED, stride=2, negative_slope=0.125, **options)
    assert torch.equal(got, want)


def test_the_lstm_takes_numpy_numbers():
    module = nn.LSTM(6, 5, 2)
    x = X[:, :, 0].transpose(1, 2)
    weights = [getattr(module, name) for name in module._flat_weights_names]
    got = pyops.lstm(x, None, weights, num_layers=np.int64(2), dropout=np.float32(0.0))[0]
    torch.testing.assert_close(got, module(x)[0])


REFUSED = {
    "stride in a list": ({"stride": [True]}, TypeError),
    "padding in a tuple": ({"padding": (True,)}, TypeError),
    "padding pair": ({"padding": (1, True)}, TypeError),
    "padding bool": ({"padding": True}, TypeError),
    "stride NumPy bool": ({"stride": np.bool_(True)}, TypeError),
    "stride empty": ({"stride": ()}, TypeError),
    "stride NumPy float": ({"stride": np.float32(1)}, TypeError),
    "dilation tensor": ({"dilation": torch.tensor(1)}, TypeError),
    "groups bool": ({"groups": True}, TypeError),
    "negative_slope bool": ({"negative_slope": True}, TypeError),
    "negative_slope tensor": ({"negative_slope": torch.tensor(0.1)}, TypeError),
    "negative_slope beyond any float": ({"negative_slope": 10**400}, ValueError),
    "negative_slope beyond float32": ({"negative_slope": -1e300}, ValueError),
    "input nested": ({"input": torch.nested.nested_tensor([X[0], X[1]])}, TypeError),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("op", [pyops.conv_relu_pool2d, pyops.conv_transpose2d_act])
def test_refused_naming_the_argument(op, what):
    changed, exception = REFUSED[what]
    weight = W if op is pyops.conv_relu_pool2d else TRANSPOSED
    with pytest.raises(exception, match=rf"^{what.split()[0]}: expected "):
        op(**{"input": X, "weight": weight, "activation": "leaky_relu", **changed})


def test_a_slope_that_only_float64_holds():
    got = pyops.conv_relu_pool2d(
        X.double(), W.double(), activation="leaky_relu", negative_slope=1e300, pool=None
    )
    assert got.min() < -1e298 and got.isfinite().all()


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(6, 8, 3, stride=np.int64(1)), nn.ReLU(), nn.MaxPool2d(np.int64(2))],
        [nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(torch.tensor(2))],
        [nn.Conv2d(6, 8, 3), nn.LeakyReLU(np.float32(0.1))],
        [nn.Conv2d(6, 8, 3), nn.LeakyReLU(torch.tensor(0.1)), nn.AvgPool2d(2)],
        [nn.Conv2d(6, 8, 3), nn.LeakyReLU(True)],
        [nn.ConvTranspose2d(6, 8, 3, stride=np.int64(2)), nn.LeakyReLU(np.float64(0.1))],
    ],
    ids=str,
)
def test_optimised_models_go_on_working(layers):
    model = nn.Sequential(*layers)
    plain = copy.deepcopy(model)
    pyops.optimize(model)
    torch.testing.assert_close(model(X), plain(X))


def test_nested_tensors_are_refused_by_attention_and_lstm():
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 3, 4)])
    with pytest.raises(TypeError, match="^query: expected a strided .dense. tensor, got a nested"):
        pyops.attention(nested, nested, nested)
    with pytest.raises(TypeError, match="^input: expected a strided .dense. tensor, got a nested"):
        pyops.lstm(nested, None, list(nn.LSTM(4, 4).parameters()))
    padded = torch.nested.to_padded_tensor(pyops.scaled_dot_product_attention(*[nested] * 3), 0.0)
    assert padded.shape == (2, 2, 3, 4)  # torch's own
