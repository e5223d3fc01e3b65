"""Bad arguments raise and say which argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from lstm_cases import KERNELS, data
from torch.nn.utils.rnn import pack_padded_sequence

import pyops

X = data(5, 3, 4)
H0, C0 = data(2, 3, 6), data(2, 3, 6)
SHAPES = [(24, 4), (24, 6), (24,), (24,)]
SHAPES += [(24, 6), (24, 6), (24,), (24,)]
WEIGHTS = [data(*shape) for shape in SHAPES]
PACKED = {"input": data(7, 4), "batch_sizes": torch.tensor([3, 3, 1])}


def changed(place, value):
    return [value if i == place else w for i, w in enumerate(WEIGHTS)]


def states(*shapes):
    return tuple(torch.zeros(shape) for shape in shapes)


# what is wrong: (arguments changed, exception, words of the message)
BAD = {
    "input not a tensor": ({"input": [1.0]}, TypeError, ["input", "Tensor", "list"]),
    "input None": ({"input": None}, TypeError, ["input", "Tensor", "NoneType"]),
    "hx a tensor": ({"hx": H0}, TypeError, ["hx", "pair", "Tensor"]),
    "hx of three": ({"hx": (H0, C0, C0)}, TypeError, ["hx", "pair", "3"]),
    "hx of None": ({"hx": (H0, None)}, TypeError, ["hx[1]", "Tensor", "NoneType"]),
    "weights a tensor": ({"weights": WEIGHTS[0]}, TypeError, ["weights", "list", "Tensor"]),
    "weight None": ({"weights": changed(2, None)}, TypeError, ["weights[2]", "NoneType"]),
    "input of rank 1": ({"input": X[0, 0]}, ValueError, ["input", "2 or 3", "(4,)"]),
    "input of rank 4": ({"input": X[None]}, ValueError, ["input", "2 or 3", "(1, 5, 3, 4)"]),
    "no steps": ({"input": X[:0]}, ValueError, ["input", "one time step", "(0, 3, 4)"]),
    "no steps, batch first": (
        {"input": X[:, :0], "batch_first": True, "hx": None},
        ValueError,
        ["input", "one time step", "(5, 0, 4)"],
    ),
    "no features": ({"input": X[..., :0]}, ValueError, ["input", "one feature", "(5, 3, 0)"]),
    "features": ({"input": X[..., :3]}, ValueError, ["weights[0] (weight_ih_l0)", "(24, 3)", "(24, 4)"]),
    "integers": ({"input": X.long()}, TypeError, ["input", "float32", "int64"]),
    "complex": ({"input": X.cfloat()}, TypeError, ["input", "float32", "complex64"]),
    "sparse": ({"input": X.to_sparse()}, TypeError, ["input", "strided", "sparse_coo"]),
    "input dtype": ({"input": X.double()}, TypeError, ["weights[0]", "float64", "float32"]),
    "input device": ({"input": X.to("meta")}, ValueError, ["weights[0]", "meta", "cpu"]),
    "hx dtype": ({"hx": (H0, C0.half())}, TypeError, ["hx[1]", "float32", "float16"]),
    "hx device": ({"hx": (H0.to("meta"), C0)}, ValueError, ["hx[0]", "cpu", "meta"]),
    "too few weights": ({"weights": WEIGHTS[:7]}, ValueError, ["weights", "2 (4 with biases", "7 tensors"]),
    "missing biases": (
        {"weights": [*WEIGHTS[:2], *WEIGHTS[4:]]},
        ValueError,
        ["weights[2] (weight_hr_l0", "3 tensors a layer and direction", "6 in all", "(24, 6)"],
    ),
    "no weights": ({"weights": []}, ValueError, ["weights", "0 tensors"]),
    "directions": (
        {"bidirectional": True, "num_layers": 1},
        ValueError,
        ["weights[4] (weight_ih_l0_reverse)", "(24, 4)", "(24, 6)"],
    ),
    "w_ih not of four gates": (
        {"weights": changed(0, WEIGHTS[0][:23])},
        ValueError,
        ["weight_ih_l0", "4 * hidden_size", "(23, 4)"],
    ),
    "w_ih rank": ({"weights": changed(0, WEIGHTS[2])}, ValueError, ["weight_ih_l0", "(24,)"]),
    "w_hh": (
        {"weights": changed(5, WEIGHTS[5][:, :5])},
        ValueError,
        ["weights[5] (weight_hh_l1)", "(24, 6)", "(24, 5)"],
    ),
    "w_ih of the next layer": ({"weights": changed(4, WEIGHTS[0])}, ValueError, ["weight_ih_l1", "(24, 6)", "(24, 4)"]),
    "bias": ({"weights": changed(3, WEIGHTS[3][:20])}, ValueError, ["weights[3] (bias_hh_l0)", "(24,)", "(20,)"]),
    "bias rank": ({"weights": changed(2, WEIGHTS[3][None])}, ValueError, ["bias_ih_l0", "(1, 24)"]),
    "projection too wide": (
        {"weights": [WEIGHTS[0], WEIGHTS[1], data(6, 6)], "num_layers": 1, "hx": None},
        ValueError,
        ["weight_hr_l0", "proj_size", "1 to 5", "(6, 6)"],
    ),
    "h_0 layers": ({"hx": (H0[:1], C0)}, ValueError, ["hx[0] (h_0)", "(2, 3, 6)", "(1, 3, 6)"]),
    "h_0 batch": ({"hx": (H0[:, :2], C0)}, ValueError, ["hx[0] (h_0)", "(2, 3, 6)", "(2, 2, 6)"]),
    "c_0 hidden": ({"hx": (H0, C0[..., :5])}, ValueError, ["hx[1] (c_0)", "(2, 3, 6)", "(2, 3, 5)"]),
    "states unbatched, input not": (
        {"hx": (H0[:, 0], C0[:, 0])},
        ValueError,
        ["hx[0]", "(2, 3, 6)", "(2, 6)"],
    ),
    "input unbatched, states not": ({"input": X[:, 0]}, ValueError, ["hx[0]", "(2, 6)", "(2, 3, 6)"]),
    "batch_first forgotten": (
        {"hx": states((2, 5, 6), (2, 5, 6))},
        ValueError,
        ["hx[0]", "(2, 3, 6)", "(2, 5, 6)"],
    ),
    "num_layers 0": ({"num_layers": 0}, ValueError, ["num_layers", "at least 1", "0"]),
    "num_layers float": ({"num_layers": 2.0}, TypeError, ["num_layers", "int", "2.0"]),
    "num_layers bool": ({"num_layers": True}, TypeError, ["num_layers", "int", "True"]),
    "bidirectional": ({"bidirectional": 1}, TypeError, ["bidirectional", "bool", "1"]),
    "batch_first": ({"batch_first": "no"}, TypeError, ["batch_first", "bool", "no"]),
    "training": ({"training": None}, TypeError, ["training", "bool", "None"]),
    "layer_norm": ({"layer_norm": 1.0}, TypeError, ["layer_norm", "bool", "1.0"]),
    "layer_norm's weights": ({"layer_norm": True}, ValueError, ["weights", "4 more for layer_norm"]),
    "dropout below 0": ({"dropout": -0.1}, ValueError, ["dropout", "between 0 and 1", "-0.1"]),
    "dropout over 1": ({"dropout": 1.5}, ValueError, ["dropout", "between 0 and 1", "1.5"]),
    "dropout text": ({"dropout": "0"}, TypeError, ["dropout", "number", "'0'"]),
    "zoneout over 1": ({"zoneout": (0.1, 2.0)}, ValueError, ["zoneout", "between 0 and 1"]),
    "zoneout of three": ({"zoneout": (0, 0, 0)}, TypeError, ["zoneout", "pair", "(0, 0, 0)"]),
    "zoneout bool": ({"zoneout": True}, TypeError, ["zoneout", "number", "True"]),
    "batch_sizes a list": ({**PACKED, "batch_sizes": [3, 3, 1]}, TypeError, ["batch_sizes", "list"]),
    "batch_sizes dtype": (
        {**PACKED, "batch_sizes": PACKED["batch_sizes"].int()},
        TypeError,
        ["batch_sizes", "int64", "int32"],
    ),
    "batch_sizes device": (
        {**PACKED, "batch_sizes": PACKED["batch_sizes"].to("meta")},
        TypeError,
        ["batch_sizes", "CPU", "meta"],
    ),
    "batch_sizes rank": (
        {**PACKED, "batch_sizes": PACKED["batch_sizes"][None]},
        ValueError,
        ["batch_sizes", "(steps,)", "(1, 3)"],
    ),
    "batch_sizes empty": (
        {**PACKED, "batch_sizes": PACKED["batch_sizes"][:0]},
        ValueError,
        ["batch_sizes", "one step", "(0,)"],
    ),
    "batch_sizes grow": (
        {**PACKED, "batch_sizes": torch.tensor([1, 3, 3])},
        ValueError,
        ["batch_sizes", "never grow", "[1, 3, 3]"],
    ),
    "batch_sizes with 0": (
        {**PACKED, "batch_sizes": torch.tensor([4, 3, 0])},
        ValueError,
        ["batch_sizes", "positive", "[4, 3, 0]"],
    ),
    "batch_sizes sum": (
        {**PACKED, "batch_sizes": torch.tensor([3, 3, 2])},
        ValueError,
        ["batch_sizes", "sum of 7", "8"],
    ),
    "packed input of rank 3": (
        {"batch_sizes": torch.tensor([3, 2])},
        ValueError,
        ["input", "2 dimensions", "(5, 3, 4)"],
    ),
    "packed states": (
        {**PACKED, "hx": (H0[:, :2], C0)},
        ValueError,
        ["hx[0]", "(2, 3, 6)", "(2, 2, 6)"],
    ),
    "unknown backend": ({"backend": "cudnn"}, ValueError, ["backend", "cpu", "triton", "cudnn"]),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference", *KERNELS])
@pytest.mark.parametrize("what", BAD)
def test_bad_argument(what, backend):
    different, exception, words = BAD[what]
    sound = {"input": X, "hx": (H0, C0), "weights": WEIGHTS, "num_layers": 2, "backend": backend}
    with pytest.raises(exception) as caught:
        pyops.lstm(**{**sound, **different})
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_good_arguments():
    """What the cases above differ from is right."""
    arguments = {"hx": (H0, C0), "weights": WEIGHTS, "num_layers": 2}
    assert pyops.lstm(X, **arguments)[0].shape == (5, 3, 6)
    assert pyops.lstm(**PACKED, **arguments)[0].shape == (7, 6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "options, words",
    [
        ({"proj_size": 3}, "projection is only in the reference"),
        ({"layer_norm": True}, "layer_norm and zoneout are only in the reference"),
        ({"zoneout": 0.1}, "layer_norm and zoneout are only in the reference"),
        ({"dtype": torch.float64}, "float64 is only in the reference"),
    ],
    ids=str,
)
def test_explicit_kernels_never_fall_back(options, words, backend):
    module = pyops.nn.LSTM(4, 6, backend=backend, **options)
    with pytest.raises(RuntimeError, match=f"backend: {backend} cannot take this call: .*{words}"):
        module(X.to(module.weight_ih_l0.dtype))
    module.backend = None
    assert module(X.to(module.weight_ih_l0.dtype))[0].shape == (5, 3, options.get("proj_size", 6))


def test_missing_backends_are_named():
    with pytest.raises(RuntimeError, match="backend: cuda cannot take this call: .*cuda"):
        pyops.lstm(X, None, WEIGHTS, num_layers=2, backend="cuda")


def test_sequences_of_length_0_are_refused_as_torch_refuses_them():
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(X, [5, 0, 2], enforce_sorted=False)


def test_modules_raise_likewise():
    with pytest.raises(ValueError, match="input: expected 1 or 2 dimensions"):
        pyops.nn.LSTMCell(4, 6)(X)
    with pytest.raises(ValueError, match=r"weights\[0\] \(weight_ih_l0\): expected shape"):
        pyops.nn.LSTMCell(4, 6)(X[0, :, :3])
    with pytest.raises(ValueError, match=r"hx\[1\] \(c_0\): expected shape \(1, 3, 6\)"):
        pyops.nn.LSTMCell(4, 6)(X[0], (H0[0], C0[0, :2]))
    for wrong, exception in (
        ({"hidden_size": 0}, ValueError),
        ({"hidden_size": 2.5}, TypeError),
        ({"num_layers": 0}, ValueError),
        ({"dropout": 2}, ValueError),
        ({"bias": 1}, TypeError),
        ({"proj_size": 6}, ValueError),
    ):
        with pytest.raises(exception):
            pyops.nn.LSTM(**{"input_size": 4, "hidden_size": 6, **wrong})


def test_activations_left_out_are_computed_again():
    weights = [w.clone().requires_grad_() for w in WEIGHTS]
    grads = [
        torch.autograd.grad(
            torch.ops.pyops.lstm(X, H0, C0, weights, None, True, 2, False, save)[0].sum(), weights
        )
        for save in (False, True)
    ]
    assert all(map(torch.equal, *grads))


# Direct calls of the ops, past the public function's checks: an error, never a crash.
DIRECT = {
    "input": X,
    "h0": H0,
    "c0": C0,
    "weights": WEIGHTS,
    "batch_sizes": None,
    "has_biases": True,
    "num_layers": 2,
    "bidirectional": False,
    "save_for_backward": True,
}
BAD_DIRECT = {
    "input rank": {"input": X[0, 0]},
    "input dtype": {"input": X.double()},
    "integers": {"input": X.int()},
    "features": {"input": X[..., :3]},
    "h0 shape": {"h0": H0[:1]},
    "h0 rank": {"h0": H0[0]},
    "c0 dtype": {"c0": C0.half()},
    "c0 shape": {"c0": C0[..., :5]},
    "weights count": {"weights": WEIGHTS[:5]},
    "no weights": {"weights": []},
    "has_biases": {"has_biases": False},
    "layers": {"num_layers": 1},
    "layers 0": {"num_layers": 0},
    "layers below 0": {"num_layers": -1},
    "directions": {"bidirectional": True},
    "w_hh": {"weights": changed(1, WEIGHTS[1][:, :5])},
    "bias": {"weights": changed(2, WEIGHTS[2][:23])},
    "weight dtype": {"weights": changed(4, WEIGHTS[4].bfloat16())},
    "batch_sizes of a dense input": {"batch_sizes": torch.tensor([3, 2])},
    "batch_sizes grow": {"input": PACKED["input"], "batch_sizes": torch.tensor([1, 3, 3])},
    "batch_sizes sum": {"input": PACKED["input"], "batch_sizes": torch.tensor([3, 3, 3])},
    "batch_sizes of another batch": {
        "input": PACKED["input"],
        "batch_sizes": torch.tensor([2, 2, 2, 1]),
    },
    "batch_sizes dtype": {"input": PACKED["input"], "batch_sizes": torch.tensor([3, 3, 1.0])},
    "batch_sizes below 0": {"input": PACKED["input"], "batch_sizes": torch.tensor([3, 3, 2, -1])},
}


@pytest.mark.skipif("cpu" not in KERNELS, reason="no _cpu.so")
@pytest.mark.parametrize("what", BAD_DIRECT)
def test_direct_call_of_the_op(what):
    with pytest.raises(RuntimeError, match="expected|got"):
        torch.ops.pyops.lstm(*{**DIRECT, **BAD_DIRECT[what]}.values())


@pytest.mark.skipif("cpu" not in KERNELS, reason="no _cpu.so")
@pytest.mark.parametrize(
    "wrong",
    [
        {"grad_output": torch.ones(5, 3, 5)},
        {"grad_output": torch.ones(5, 3, 6).double()},
        {"grad_h_n": torch.ones(2, 3, 5)},
        {"grad_c_n": torch.ones(1, 3, 6)},
        {"output": torch.ones(5, 3, 5)},
        {"saved": torch.ones(7)},
        {"saved": torch.empty(0)},
        {"input": X[..., :3]},
        {"weights": WEIGHTS[:4]},
        {"output_mask": [True]},
    ],
    ids=lambda wrong: f"{next(iter(wrong))}",
)
def test_direct_call_of_the_backward_op(wrong):
    output, _, _, saved = torch.ops.pyops.lstm(*DIRECT.values())
    sound = {
        "grad_output": torch.ones_like(output),
        "grad_h_n": None,
        "grad_c_n": None,
        **{k: v for k, v in DIRECT.items() if k in ("input", "h0", "c0", "weights", "batch_sizes")},
        "output": output,
        "saved": saved,
        **{k: v for k, v in DIRECT.items() if k in ("has_biases", "num_layers", "bidirectional")},
        "output_mask": [True] * 4,
    }
    torch.ops.pyops.lstm_backward(*sound.values())
    with pytest.raises(RuntimeError, match="expected|got"):
        torch.ops.pyops.lstm_backward(*{**sound, **wrong}.values())
