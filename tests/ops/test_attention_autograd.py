"""Derivatives of attention: numerical checks, what is computed, saved and aliased, memory, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import BACKENDS, make_qkv, plain, randn
from torch.utils._python_dispatch import TorchDispatchMode

import pyops
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal, more queries than keys": {"causal": True, "seqlen_q": 6, "seqlen_k": 3},
    "window": {"window": (1, 1)},
    "softcap": {"softcap": 1.5, "scale": 0.9},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.1])},
    "boolean mask": {"bias": randn(2, 1, 4, 5) > -0.5},
    "dropout": {"dropout_p": 0.4},
    "everything": {"causal": True, "window": (2, None), "softcap": 2.0, "dropout_p": 0.25},
}
EACH = pytest.mark.parametrize("name", OPTIONS)


def double_leaves(name):
    options = dict(OPTIONS[name])
    size = options.pop("seqlen_q", 4), options.pop("seqlen_k", 5)
    q, k, v = (t.double() for t in make_qkv(2, 2, *size, 3, heads_kv=1, v_head_dim=2))
    tensors = [q, k, v, randn(2).double()]
    if "bias" not in options:
        tensors.append(randn(1, 2, 1, size[1]).double())
    return [t.requires_grad_() for t in tensors], options


def op(options):
    """output and lse (its infinities as 0) of (query, key, value, sinks[, bias])."""

    def call(query, key, value, sinks, *bias):
        more = dict(zip(("bias",), bias, strict=False))
        if options.get("dropout_p"):
            more["generator"] = torch.Generator().manual_seed(11)
        output, lse = pyops.attention(
            query, key, value, sinks=sinks, return_lse=True, **options, **more
        )
        return output, lse.masked_fill(lse.isinf(), 0)

    return call


@EACH
def test_gradcheck(name):
    leaves, options = double_leaves(name)
    assert torch.autograd.gradcheck(op(options), leaves)


@EACH
def test_gradgradcheck(name):
    leaves, options = double_leaves(name)
    assert torch.autograd.gradgradcheck(op(options), leaves, fast_mode=True)


def test_gradcheck_without_sinks_of_empty_rows():
    q, k, v = (t.double().requires_grad_() for t in make_qkv(1, 2, 6, 3, 4))

    def call(*tensors):
        out, lse = pyops.attention(*tensors, causal=True, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("name", ["causal", "everything", "boolean mask"])
def test_second_and_third_order_of_the_kernels(name):
    """Gradient penalties: d |d f / d (q, k, v)|^2, and once more, within the budget."""
    leaves64, options = double_leaves(name)
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"), (None, None)):
        leaves = [t.detach().to(dtype or torch.float64).requires_grad_() for t in leaves64]
        out, lse = op({**options, "backend": backend})(*leaves)
        loss = out.pow(3).sum() + lse.square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(norm, leaves, create_graph=True)
        norm = sum(g.square().sum() for g in second)
        results.append((*second, *torch.autograd.grad(norm, leaves)))
    for got, lowp, exact in zip(*results, strict=True):
        got, lowp, exact = (t.flatten() for t in (got, lowp, exact))
        scale = exact.abs().max() * torch.finfo(torch.float32).eps * 32
        assert (got - exact).abs().max() <= GRADIENT_BUDGET * (lowp - exact).abs().max() + scale
        assert exact.any()


class Calls(TorchDispatchMode):
    """Records every call of a pyops op (name, args), and the largest tensor that any op returns."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "pyops":
            self.seen.append((func._opname, args))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    "wanted", [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
    + [(1, 1, 1, 0, 0), (0, 1, 1, 0, 1), (1, 1, 1, 1, 1)],
    ids=str,
)  # fmt: skip
def test_only_what_is_asked_for_is_computed(wanted):
    tensors = (*make_qkv(2, 4, 20, 30), randn(4, 20, 30), randn(4))

    def run(leaves):
        q, k, v, bias, sinks = leaves
        return pyops.attention(q, k, v, bias=bias, sinks=sinks, backend="cpu").sum()

    every = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(run(every), every)
    leaves = [t.clone().requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
    with Calls() as calls:
        run(leaves).backward()
    assert [name for name, _ in calls.seen] == ["attention", "attention_backward"]
    assert list(calls.seen[1][1][-1]) == [bool(asked) for asked in wanted]
    for leaf, asked, want in zip(leaves, wanted, expected, strict=True):
        if asked:
            torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-5)
        else:
            assert leaf.grad is None
    results = torch.ops.pyops.attention_backward(*calls.seen[1][1])
    full = [t.shape for t in (*tensors[:3], tensors[3][None], tensors[4])]
    assert [r.shape for r in results] == [
        s if w else (0,) for s, w in zip(full, wanted, strict=True)
    ]


def saved_by(function):
    """Runs it; {storage address: bytes} of what autograd saved, each storage once."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return out, saved


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_training_saves_the_inputs_the_output_and_lse_only(dropout_p):
    leaves = [t.requires_grad_() for t in make_qkv(2, 4, 64, 96)]
    out, saved = saved_by(lambda: pyops.attention(*leaves, dropout_p=dropout_p, backend="cpu"))
    inputs = {t.untyped_storage().data_ptr() for t in (*leaves, out)}
    assert inputs <= set(saved)
    rest = sorted(size for address, size in saved.items() if address not in inputs)
    lse = 2 * 4 * 64 * 4
    assert rest == ([16, lse] if dropout_p else [lse])  # the seed and its offset, not a mask


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
def test_inference_saves_nothing(mode):
    q, k, v = make_qkv()
    if mode is not None:
        q.requires_grad_()
    with (mode or torch.enable_grad)():
        out, saved = saved_by(lambda: pyops.attention(q, k, v, backend="cpu"))
    assert not saved and not out.requires_grad


LONG = 4096
LONG_OPTIONS = {
    "causal": {"causal": True},
    "dropout": {"dropout_p": 0.1, "window": (64, 0)},
    "bias of keys": {"bias": (1, 1, 1, LONG), "window": (64, 0)},
    "alibi and softcap": {"alibi_slopes": (1,), "softcap": 4.0, "window": (64, 0)},
    "sinks": {"sinks": (1,), "causal": True},
}


def long_step(name, seqlen=LONG):
    options = dict(LONG_OPTIONS[name])
    for key in ("bias", "alibi_slopes", "sinks"):
        if key in options:
            shape = (min(size, seqlen) for size in options[key])
            options[key] = randn(*shape).requires_grad_(key != "alibi_slopes")
    leaves = [t.requires_grad_() for t in make_qkv(1, 1, seqlen, seqlen, 8)]
    pyops.attention(*leaves, backend="cpu", **options).sum().backward()


@pytest.mark.parametrize("name", LONG_OPTIONS)
def test_no_tensor_is_quadratic_in_the_sequence_length(name):
    with Calls() as calls:
        long_step(name, 1024)
    assert [op for op, _ in calls.seen] == ["attention", "attention_backward"]
    assert calls.largest == 1024 * 8 * 4


MEASURE = """
import resource, torch
import test_attention_autograd as m
torch.set_num_threads(1)
for name in m.LONG_OPTIONS:
    m.long_step(name, 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in m.LONG_OPTIONS:
    m.long_step(name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_square():
    """Forward and backward in a process of their own; the scores of the one head alone would be 64 MiB."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kibibytes = int(run.stdout)
    assert kibibytes < LONG * LONG / 1024 / 2, (
        kibibytes
    )  # an eighth of them: a byte for every other score


def test_saved_bytes_grow_linearly():
    sizes = []
    for seqlen in (128, 256, 512):
        leaves = [t.requires_grad_() for t in make_qkv(1, 2, seqlen, seqlen, 16)]
        _, saved = saved_by(lambda t=leaves: pyops.attention(*t, dropout_p=0.1, backend="cpu"))
        sizes.append(sum(saved.values()) - 16)
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 4 * sizes[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_aliases_and_nothing_is_overwritten(backend):
    q, k, v = make_qkv(2, 4, 9, 12)
    leaves = [t.requires_grad_() for t in (q, k, v, randn(2, 4, 9, 12), randn(4))]
    before = [t.detach().clone() for t in leaves]
    out, lse = pyops.attention(
        *leaves[:3], bias=leaves[3], sinks=leaves[4], return_lse=True, backend=backend
    )
    grad = torch.randn_like(out)
    kept = [t.detach().clone() for t in (grad, out, lse)]
    grads = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad)
    addresses = [t.untyped_storage().data_ptr() for t in (*leaves, out, lse, grad, *grads, *again)]
    assert len(set(addresses)) == len(addresses)
    assert all(torch.equal(t, b) for t, b in zip(leaves, before, strict=True))
    assert all(torch.equal(t, b) for t, b in zip((grad, out, lse), kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("victim", ["query", "key", "value", "output", "lse", "bias", "sinks"])
def test_changing_a_saved_tensor_in_place_raises(victim):
    tensors = dict(zip(("query", "key", "value"), make_qkv(), strict=True))
    tensors.update(bias=randn(4, 33, 33), sinks=randn(4))
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    out, lse = pyops.attention(**tensors, return_lse=True, backend="cpu")
    tensors.update(output=out, lse=lse)
    with torch.no_grad():
        tensors[victim].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradient_of_lse_alone_and_of_both():
    leaves = [t.requires_grad_() for t in make_qkv(2, 4, 20, 31, heads_kv=2)]
    weight, grad = randn(2, 4, 20), randn(2, 4, 20, 16, seed=6)
    out, lse = pyops.attention(*leaves, return_lse=True, backend="cpu")
    alone = torch.autograd.grad(lse, leaves, weight, retain_graph=True)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    both = torch.autograd.grad((out, lse), leaves, (grad, weight), retain_graph=True)
    for a, b, c in zip(alone, first, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-5)
    assert not alone[2].any()  # lse does not depend on value
    want = torch.autograd.grad(plain(*leaves)[1], leaves[:2], weight)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(plain(*exact_leaves)[1], exact_leaves[:2], weight.double())
    for got, lowp, best in zip(alone[:2], want, exact, strict=True):
        assert_within_budget(got, lowp, best, GRADIENT_BUDGET)
    expanded = torch.autograd.grad(lse.sum(), leaves)
    ones = torch.autograd.grad(plain(*leaves)[1].sum(), leaves[:2])
    torch.testing.assert_close(expanded[:2], ones, rtol=1e-4, atol=1e-5)


REPEATED = {
    "causal gqa": ({"causal": True}, torch.float32, 2),
    "bfloat16": ({"window": (30, 10)}, torch.bfloat16, 4),
    "everything": (
        {"bias": (4, 1, 90), "sinks": (4,), "dropout_p": 0.2, "softcap": 3.0},
        torch.float32,
        1,
    ),
}


def repeated_step(name):
    options, dtype, heads_kv = REPEATED[name]
    leaves = make_qkv(1, 4, 70, 90, 32, heads_kv=heads_kv, dtype=dtype)
    options = dict(options)
    for i, key in enumerate(("bias", "sinks")):
        if key in options:
            options[key] = randn(*options[key], seed=i).requires_grad_()
    leaves = [t.requires_grad_() for t in leaves]
    everything = [*leaves, *(options[k] for k in ("bias", "sinks") if k in options)]
    grad = randn(1, 4, 70, 32, dtype=dtype)

    def step():
        out, lse = pyops.attention(
            *leaves,
            return_lse=True,
            backend="cpu",
            generator=torch.Generator().manual_seed(3),
            **options,
        )
        return (out, lse, *torch.autograd.grad(out, everything, grad))

    return step


@pytest.mark.parametrize("name", REPEATED)
def test_250_repeats_are_equal_to_the_bit(name):
    torch.use_deterministic_algorithms(False)  # which would fill what is not yet written
    step = repeated_step(name)
    first = step()
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@pytest.mark.parametrize("name", REPEATED)
def test_threads_do_not_change_a_bit(name):
    step, first = repeated_step(name), None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results = step()
        first = results if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), threads


def test_slopes_with_a_gradient_go_to_the_reference():
    q, k, v = make_qkv(1, 2, 6, 7, 4)
    slopes = torch.tensor([0.3, 0.2], requires_grad=True)
    (grad,) = torch.autograd.grad(pyops.attention(q, k, v, alibi_slopes=slopes).sum(), slopes)
    (want,) = torch.autograd.grad(plain(q, k, v, alibi_slopes=slopes)[0].sum(), slopes)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="backend: cpu .* alibi_slopes"):
        pyops.attention(q, k, v, alibi_slopes=slopes, backend="cpu")
    spec = (0.5, 0.0, -1, -1, False, 0.0)
    out, _ = torch.ops.pyops.attention(q.requires_grad_(), k, v, None, slopes, None, None, *spec)
    with pytest.raises(RuntimeError, match="alibi_slopes"):
        out.sum().backward()
