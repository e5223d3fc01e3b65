"""Bad arguments raise and say which argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from attention_cases import make_qkv, randn

import pyops

Q, K, V = make_qkv(2, 4, 6, 10, 8, heads_kv=2)
BACKENDS = pytest.mark.parametrize("backend", [None, "cpu", "reference"])

# what is wrong: (arguments changed, exception, words of the message)
BAD = {
    "query not a tensor": ({"query": [1.0]}, TypeError, ["query", "Tensor", "list"]),
    "key None": ({"key": None}, TypeError, ["key", "Tensor", "NoneType"]),
    "value a number": ({"value": 1.0}, TypeError, ["value", "Tensor", "float"]),
    "bias a list": ({"bias": [0.0]}, TypeError, ["bias", "Tensor", "list"]),
    "sinks a number": ({"sinks": 0.0}, TypeError, ["sinks", "Tensor", "float"]),
    "query of rank 3": ({"query": Q[0]}, ValueError, ["query", "4 dimensions", "(4, 6, 8)"]),
    "key of rank 5": ({"key": K[None]}, ValueError, ["key", "4 dimensions", "(1, 2, 2, 10, 8)"]),
    "value of rank 2": ({"value": V[0, 0]}, ValueError, ["value", "4 dimensions", "(10, 8)"]),
    "batch of key": ({"key": K[:1]}, ValueError, ["key", "batch size 2", "(1, 2, 10, 8)"]),
    "batch of value": ({"value": V[:1]}, ValueError, ["value", "batch size 2", "(1, 2, 10, 8)"]),
    "head_dim": ({"key": K[..., :7]}, ValueError, ["key", "head_dim 8", "(2, 2, 10, 7)"]),
    "head_dim 0": (
        {"query": Q[..., :0], "key": K[..., :0]},
        ValueError,
        ["query", "at least 1", "(2, 4, 6, 0)"],
    ),
    "value head_dim 0": ({"value": V[..., :0]}, ValueError, ["value", "at least 1"]),
    "seqlen": ({"value": V[:, :, :9]}, ValueError, ["value", "seqlen 10", "(2, 2, 9, 8)"]),
    "heads not a divisor": (
        {"key": K[:, [0, 1, 1]], "value": V[:, [0, 1, 1]]},
        ValueError,
        ["key", "divides", "4", "3"],
    ),
    "no key heads": ({"key": K[:, :0], "value": V[:, :0]}, ValueError, ["key", "divides", "0"]),
    "heads of value": ({"value": V[:, :1]}, ValueError, ["value", "2 heads", "(2, 1, 10, 8)"]),
    "integers": ({"query": Q.long()}, TypeError, ["query", "float32", "int64"]),
    "complex": ({"value": V.cfloat()}, TypeError, ["value", "float32", "complex64"]),
    "dtype of key": ({"key": K.double()}, TypeError, ["key", "float32", "float64"]),
    "dtype of value": ({"value": V.half()}, TypeError, ["value", "float32", "float16"]),
    "device of key": ({"key": K.to("meta")}, ValueError, ["key", "cpu", "meta"]),
    "sparse": ({"query": Q.to_sparse()}, TypeError, ["query", "strided", "sparse_coo"]),
    "bias size": ({"bias": randn(6, 9)}, ValueError, ["bias", "(2, 4, 6, 10)", "(6, 9)"]),
    "bias heads": ({"bias": randn(2, 1, 1)}, ValueError, ["bias", "broadcasts", "(2, 1, 1)"]),
    "bias rank": ({"bias": randn(1, 2, 4, 6, 10)}, ValueError, ["bias", "(1, 2, 4, 6, 10)"]),
    "bias dtype": ({"bias": randn(6, 10).half()}, TypeError, ["bias", "bool", "float16"]),
    "bias of integers": ({"bias": randn(6, 10).int()}, TypeError, ["bias", "bool", "int32"]),
    "bias device": ({"bias": randn(6, 10).to("meta")}, ValueError, ["bias", "cpu", "meta"]),
    "slopes size": ({"alibi_slopes": randn(3)}, ValueError, ["alibi_slopes", "(4,)", "(3,)"]),
    "slopes rank": ({"alibi_slopes": randn(4, 2)}, ValueError, ["alibi_slopes", "(2, 4)"]),
    "slopes dtype": ({"alibi_slopes": randn(4).half()}, TypeError, ["alibi_slopes", "float16"]),
    "sinks size": ({"sinks": randn(2)}, ValueError, ["sinks", "(4,)", "(2,)"]),
    "sinks rank": ({"sinks": randn(2, 4)}, ValueError, ["sinks", "(4,)", "(2, 4)"]),
    "sinks dtype": ({"sinks": randn(4).long()}, TypeError, ["sinks", "int64"]),
    "sinks device": ({"sinks": randn(4).to("meta")}, ValueError, ["sinks", "cpu", "meta"]),
    "causal": ({"causal": 1}, TypeError, ["causal", "bool", "1"]),
    "return_lse": ({"return_lse": "yes"}, TypeError, ["return_lse", "bool", "yes"]),
    "deterministic": ({"deterministic": None}, TypeError, ["deterministic", "bool", "None"]),
    "scale text": ({"scale": "8"}, TypeError, ["scale", "number", "8"]),
    "scale infinite": ({"scale": float("inf")}, ValueError, ["scale", "finite", "inf"]),
    "scale NaN": ({"scale": float("nan")}, ValueError, ["scale", "finite", "nan"]),
    "softcap below 0": ({"softcap": -1.0}, ValueError, ["softcap", "positive", "-1.0"]),
    "softcap NaN": ({"softcap": float("nan")}, ValueError, ["softcap", "nan"]),
    "softcap None": ({"softcap": None}, TypeError, ["softcap", "number", "None"]),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, ["dropout_p", "[0, 1)", "1.0"]),
    "dropout below 0": ({"dropout_p": -0.1}, ValueError, ["dropout_p", "[0, 1)", "-0.1"]),
    "dropout NaN": ({"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan"]),
    "dropout bool": ({"dropout_p": True}, TypeError, ["dropout_p", "number", "True"]),
    "window below 0": ({"window": (-1, 0)}, ValueError, ["window", "at least 0", "(-1, 0)"]),
    "window right below 0": ({"window": (3, -2)}, ValueError, ["window", "at least 0", "-2"]),
    "window of one": ({"window": (3,)}, TypeError, ["window", "pair", "(3,)"]),
    "window an int": ({"window": 3}, TypeError, ["window", "pair", "3"]),
    "window of floats": ({"window": (3.0, 1.0)}, TypeError, ["window", "ints", "3.0"]),
    "window of bools": ({"window": (True, 1)}, TypeError, ["window", "ints", "True"]),
    "window huge": ({"window": (2**31, 0)}, ValueError, ["window", "2**31"]),
    "generator": ({"generator": 5}, TypeError, ["generator", "Generator", "int"]),
    "unknown backend": ({"backend": "cudnn"}, ValueError, ["backend", "cpu", "triton", "cudnn"]),
}


@BACKENDS
@pytest.mark.parametrize("what", BAD)
def test_bad_argument(what, backend):
    changed, exception, words = BAD[what]
    arguments = {"query": Q, "key": K, "value": V, "backend": backend, **changed}
    with pytest.raises(exception) as caught:
        pyops.attention(**arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_explicit_backend_never_falls_back(backend):
    reason = pyops.backends.why_not("attention", backend, "cpu")
    if reason is None:
        pytest.skip(f"{backend} runs on CPU tensors here")
    with pytest.raises(RuntimeError) as caught:
        pyops.attention(Q, K, V, backend=backend)
    assert backend in str(caught.value) and reason in str(caught.value)


def test_float64_with_the_kernels():
    with pytest.raises(RuntimeError, match="backend: cpu .* float32, bfloat16 and float16"):
        pyops.attention(Q.double(), K.double(), V.double(), backend="cpu")


def test_what_was_refused_once_is_refused_again():
    """Checks are remembered with the plan; a failure leaves nothing behind."""
    for _ in range(3):
        with pytest.raises(ValueError, match="heads"):
            pyops.attention(Q, K[:, :1], V)
        assert pyops.attention(Q, K, V).shape == Q.shape


# Direct calls of the op, past the public function's checks.
FORWARD = {
    "query": Q,
    "key": K,
    "value": V,
    "bias": None,
    "alibi_slopes": None,
    "sinks": None,
    "rng_state": None,
    "scale": 0.3,
    "softcap": 0.0,
    "window_left": -1,
    "window_right": -1,
    "top_left": False,
    "dropout_p": 0.0,
}
BAD_DIRECT = {
    "query of rank 3": ({"query": Q[0]}, "query"),
    "batch": ({"key": K[:1]}, "key"),
    "heads": ({"key": K[:, [0, 1, 1]], "value": V[:, [0, 1, 1]]}, "key"),
    "heads of value": ({"value": V[:, :1]}, "value"),
    "head_dim": ({"key": K[..., :7]}, "key"),
    "head_dim over 256": (
        {"query": randn(2, 4, 6, 257), "key": randn(2, 2, 10, 257)},
        "query|head_dim",
    ),
    "seqlen": ({"value": V[:, :, :9]}, "value"),
    "dtype of key": ({"key": K.half()}, "key"),
    "integers": ({"query": Q.int(), "key": K.int(), "value": V.int()}, "query"),
    "bias shape": ({"bias": randn(2, 4, 6, 9)}, "bias"),
    "bias rank": ({"bias": randn(6, 10)}, "bias"),
    "bias dtype": ({"bias": randn(2, 4, 6, 10).half()}, "bias"),
    "slopes": ({"alibi_slopes": randn(3)}, "alibi_slopes"),
    "slopes dtype": ({"alibi_slopes": randn(4).double()}, "alibi_slopes"),
    "sinks": ({"sinks": randn(3)}, "sinks"),
    "softcap": ({"softcap": -1.0}, "softcap"),
    "window": ({"window_left": -2}, "window_left"),
    "dropout without a seed": ({"dropout_p": 0.5}, "rng_state"),
    "dropout of 1": ({"dropout_p": 1.0, "rng_state": torch.tensor([1, 2])}, "dropout_p"),
    "seed of one": ({"dropout_p": 0.5, "rng_state": torch.tensor([1])}, "rng_state"),
    "seed of floats": ({"dropout_p": 0.5, "rng_state": torch.ones(2)}, "rng_state"),
    "last stride": ({"query": randn(2, 4, 8, 6).transpose(2, 3)}, "query"),
}


@pytest.mark.parametrize("what", BAD_DIRECT)
def test_direct_call_of_the_op(what):
    changed, words = BAD_DIRECT[what]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pyops.attention(*{**FORWARD, **changed}.values())


BAD_BACKWARD = {
    "grad_output shape": ({"grad_output": randn(2, 4, 6, 7)}, "grad_output"),
    "grad_output rank": ({"grad_output": randn(4, 6, 8)}, "grad_output"),
    "grad_output dtype": ({"grad_output": randn(2, 4, 6, 8).half()}, "grad_output"),
    "grad_lse shape": ({"grad_lse": randn(2, 4, 5)}, "grad_lse"),
    "output shape": ({"output": randn(2, 4, 6, 9)}, "output"),
    "lse shape": ({"lse": randn(2, 4, 7)}, "lse"),
    "lse dtype": ({"lse": randn(2, 4, 6).half()}, "lse"),
    "key": ({"key": K[:, :, :9]}, "key|value"),
    "bias asked for, not given": ({"output_mask": [True] * 4 + [False]}, "bias"),
    "sinks asked for, not given": ({"output_mask": [True] * 3 + [False, True]}, "sinks"),
    "mask too short": ({"output_mask": [True] * 4}, "output_mask|mask"),
}


@pytest.mark.parametrize("what", BAD_BACKWARD)
def test_direct_call_of_the_backward_op(what):
    changed, words = BAD_BACKWARD[what]
    out, lse = torch.ops.pyops.attention(*FORWARD.values())
    given = {
        "grad_output": torch.ones_like(out),
        "grad_lse": None,
        "query": Q,
        "key": K,
        "value": V,
    }
    given.update(output=out, lse=lse, **{k: v for k, v in FORWARD.items() if k not in given})
    given["output_mask"] = [True, True, True, False, False]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pyops.attention_backward(*{**given, **changed}.values())


MERGED = randn(2, 4, 6, 8), randn(2, 4, 6)


@pytest.mark.parametrize(
    "outs, lses, exception, words",
    [
        ([], [], ValueError, ["lses", "at least one"]),
        ([MERGED[0]] * 2, [MERGED[1]], ValueError, ["lses", "1 for 2"]),
        ([MERGED[0], 1.0], [MERGED[1]] * 2, TypeError, ["outs", "Tensor", "float"]),
        ([MERGED[0], MERGED[0][:1]], [MERGED[1]] * 2, ValueError, ["outs", "(1, 4, 6, 8)"]),
        ([MERGED[0]] * 2, [MERGED[1], MERGED[1].half()], ValueError, ["lses", "float16"]),
        ([MERGED[0]], [MERGED[1][:, :3]], ValueError, ["lses", "(2, 4, 6)", "(2, 3, 6)"]),
    ],
)
def test_merge_attention(outs, lses, exception, words):
    with pytest.raises(exception) as caught:
        pyops.merge_attention(outs, lses)
    for word in words:
        assert word in str(caught.value)
