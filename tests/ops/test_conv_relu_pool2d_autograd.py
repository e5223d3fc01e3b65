"""Derivatives of conv_relu_pool2d: numerical checks, what is computed, saved and aliased, determinism."""

from __future__ import annotations

import pytest
import torch
from conv_pool_cases import make_inputs, plain
from torch.utils._python_dispatch import TorchDispatchMode

import pyops

OPTIONS = {
    "max": {"padding": 1},
    "max overlapping padded ceil": {
        "padding": 1,
        "pool_size": 3,
        "pool_stride": 2,
        "pool_padding": 1,
        "ceil_mode": True,
    },
    "max leaky": {"activation": "leaky_relu", "negative_slope": 0.3},
    "max leaky slope below 0": {"activation": "leaky_relu", "negative_slope": -0.3},
    "max alone": {"activation": None, "stride": 2, "padding": 1},
    "avg": {"pool": "avg", "padding": 1},
    "avg overlapping padded": {"pool": "avg", "pool_stride": 1, "pool_padding": 1},
    "avg leaky ceil": {"pool": "avg", "activation": "leaky_relu", "ceil_mode": True},
    "avg alone": {"pool": "avg", "activation": None},
    "no pool": {"pool": None},
    "no pool leaky": {"pool": None, "activation": "leaky_relu", "negative_slope": 0.3},
    "no pool leaky slope 0": {"pool": None, "activation": "leaky_relu", "negative_slope": 0.0},
    "no pool leaky slope below 0": {
        "pool": None,
        "activation": "leaky_relu",
        "negative_slope": -0.5,
    },
    "convolution alone": {"pool": None, "activation": None},
    "dilation": {"dilation": (1, 2), "padding": (1, 0)},
    "groups": {"groups": 2, "padding": 1},
    "same": {"padding": "same"},
}
EACH = pytest.mark.parametrize("name", OPTIONS)


def double_leaves(name, bias=True):
    groups = OPTIONS[name].get("groups", 1)
    x, w, b = make_inputs(
        (1, 2, 6, 7), (2, 2 // groups, 3, 3), bias=bias, dtype=torch.float64, seed=5
    )
    return [t.requires_grad_() for t in (x, w, b) if t is not None]


def leaves_of(*shapes, **kwargs):
    return [t.requires_grad_() for t in make_inputs(*shapes, **kwargs) if t is not None]


def op(name, *tensors):
    return pyops.conv_relu_pool2d(*tensors, backend="cpu", **OPTIONS[name])


@EACH
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(name, bias):
    assert torch.autograd.gradcheck(lambda *t: op(name, *t), double_leaves(name, bias))


@EACH
def test_gradgradcheck(name):
    assert torch.autograd.gradgradcheck(lambda *t: op(name, *t), double_leaves(name))


@pytest.mark.parametrize("name", ["max", "avg leaky ceil", "no pool leaky"])
@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["input", "weight", "bias"])
def test_gradgradcheck_with_a_frozen_tensor(name, frozen):
    leaves = double_leaves(name)
    leaves[frozen].requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda *t: op(name, *t), leaves)


def test_third_order():
    """d/dw of |d/dx (sum out^2)|^2, differentiated once more, against plain torch."""
    results = []
    for function in (lambda *t: op("max", *t), lambda *t: plain(*t, padding=1)):
        x, w, b = double_leaves("max")
        first = torch.autograd.grad(function(x, w, b).pow(3).sum(), (x, w), create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), (x, w, b), create_graph=True
        )
        third = torch.autograd.grad(sum(g.square().sum() for g in second), (x, w, b))
        results.append(third)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


class Calls(TorchDispatchMode):
    """Records every call of a pyops op: (name, args)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyops":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("pool", ["max", "avg", None])
@pytest.mark.parametrize(
    "wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]
)
def test_only_what_is_asked_for_is_computed(channels, pool, wanted):
    x, w, b = make_inputs((2, channels, 8, 8), (8, channels, 3, 3))
    every = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(
        pyops.conv_relu_pool2d(*every, pool=pool, backend="cpu").sum(), every
    )
    leaves = [t.requires_grad_(bool(asked)) for t, asked in zip((x, w, b), wanted, strict=True)]
    with Calls() as calls:
        pyops.conv_relu_pool2d(*leaves, pool=pool, backend="cpu").sum().backward()
    names = [name for name, _ in calls.seen]
    assert names == ["conv_relu_pool2d", "conv_relu_pool2d_backward"]
    assert list(calls.seen[1][1][-1]) == [bool(asked) for asked in wanted]
    for leaf, asked, want in zip(leaves, wanted, expected, strict=True):
        if asked:
            torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1), (1, 0)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_only_what_autograd_grad_is_asked_for_is_computed(create_graph, wanted, bias):
    """Everything requires gradients, as in a penalty on those of the images; leaves and what comes of them."""
    x, w, b = (t.requires_grad_() for t in make_inputs((2, 8, 8, 8), (8, 8, 3, 3)))
    for inputs in ((x, w), (x * 1, w * 1)):
        out = pyops.conv_relu_pool2d(*inputs, b if bias else None, backend="cpu").square().sum()
        with Calls() as calls:
            got = torch.autograd.grad(
                out, [inputs[i] for i in wanted], create_graph=create_graph, retain_graph=True
            )
        (mask,) = [args[-1] for name, args in calls.seen if name.endswith("_backward")]
        assert list(mask) == [i in wanted for i in range(3)]
        every = torch.autograd.grad(out, inputs)
        assert all(torch.equal(g, every[i]) for g, i in zip(got, wanted, strict=True))


def test_what_the_op_returns_for_what_is_not_asked_for():
    x, w, b = make_inputs((2, 3, 8, 8), (8, 3, 3, 3))
    spec = (1, 1, 0, 0, 1, 1, 1, "relu", 0.01, "max", 2, 2, 2, 2, 0, 0, False)
    out, codes = torch.ops.pyops.conv_relu_pool2d(x, w, b, *spec, True)
    results = torch.ops.pyops.conv_relu_pool2d_backward(
        torch.ones_like(out), x, w, codes, *spec, [False, True, False]
    )
    assert [tuple(r.shape) for r in results] == [(0,), (8, 3, 3, 3), (0,)]


def saved_by(function):
    """Runs it; [(storage address, bytes)] of what autograd saved, each storage once."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return out, saved


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_training_saves_input_weight_and_codes_only(pool):
    x, w, b = leaves_of((2, 16, 12, 12), (8, 16, 3, 3))
    out, saved = saved_by(lambda: pyops.conv_relu_pool2d(x, w, b, pool=pool, backend="cpu"))
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, w)}
    codes = {address: size for address, size in saved.items() if address not in sizes}
    assert set(sizes) <= set(saved)
    assert list(codes.values()) == [out.numel()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
def test_inference_saves_nothing_and_makes_no_codes(mode):
    x, w, b = make_inputs((2, 16, 12, 12), (8, 16, 3, 3))
    if mode is not None:
        w.requires_grad_()
    with (mode or torch.enable_grad)(), Calls() as calls:
        out, saved = saved_by(lambda: pyops.conv_relu_pool2d(x, w, b, backend="cpu"))
    assert not saved and not out.requires_grad
    assert [args[-1] for _, args in calls.seen] == [False]
    with torch.no_grad():
        _, codes = torch.ops.pyops.conv_relu_pool2d(*calls.seen[0][1])
    assert codes.numel() == 0


def test_first_vgg_block_saves_less_than_half_of_eager():
    parameters = [
        t.requires_grad_()
        for shapes in (((1, 3, 1, 1), (64, 3, 3, 3)), ((1, 64, 1, 1), (64, 64, 3, 3)))
        for t in make_inputs(*shapes)[1:]
    ]
    x = torch.randn(1, 3, 64, 64)

    def block(last):
        hidden = plain(x, *parameters[:2], padding=1, pool=None)
        return last(hidden, *parameters[2:], padding=1)

    fused, saved = saved_by(lambda: block(pyops.conv_relu_pool2d))
    eager, eager_saved = saved_by(lambda: block(plain))
    torch.testing.assert_close(fused, eager)
    assert sum(saved.values()) < 0.5 * sum(eager_saved.values())


@EACH
def test_nothing_aliases_and_nothing_is_overwritten(name):
    leaves = double_leaves(name)
    before = [t.detach().clone() for t in leaves]
    out = op(name, *leaves)
    grad = torch.randn_like(out)
    grad_before, out_before = grad.clone(), out.detach().clone()
    grads = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad)
    addresses = [t.untyped_storage().data_ptr() for t in (*leaves, out, grad, *grads, *again)]
    assert len(set(addresses)) == len(addresses)
    assert all(torch.equal(t, kept) for t, kept in zip(leaves, before, strict=True))
    assert torch.equal(grad, grad_before) and torch.equal(out, out_before)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("victim", ["input", "weight"])
def test_changing_a_saved_tensor_in_place_raises(victim):
    x, w, b = leaves_of((2, 3, 8, 8), (8, 3, 3, 3))
    out = pyops.conv_relu_pool2d(x, w, b, backend="cpu").sum()
    with torch.no_grad():
        (x if victim == "input" else w).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_changing_the_saved_output_in_place_raises():
    x, w, b = leaves_of((2, 3, 8, 8), (8, 3, 3, 3))
    out = pyops.conv_relu_pool2d(x, w, b, pool=None, backend="cpu")
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_pooled_output_and_bias_may_be_changed_in_place():
    x, w, b = leaves_of((2, 3, 8, 8), (8, 3, 3, 3))
    expected = torch.autograd.grad(pyops.conv_relu_pool2d(x, w, b, backend="cpu").sum(), (x, w, b))
    out = pyops.conv_relu_pool2d(x, w, b, backend="cpu").add_(1)
    with torch.no_grad():
        b.zero_()
    got = torch.autograd.grad(out.sum(), (x, w, b))
    assert all(torch.equal(a, c) for a, c in zip(got, expected, strict=True))


def test_gradients_accumulate_over_several_backward_calls():
    x, w, b = leaves_of((2, 32, 12, 12), (32, 32, 3, 3))
    out = pyops.conv_relu_pool2d(x, w, b, padding=1, backend="cpu").sum()
    out.backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, w, b)]
    out.backward()
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip((x, w, b), once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "channels, out_channels, options",
    [
        (1, 32, {}),
        (3, 32, {"padding": 1}),
        (40, 64, {"padding": 1}),
        (8, 16, {"pool_size": 3, "pool_stride": 2}),
        (24, 24, {"groups": 24, "padding": 1}),
        (16, 16, {"pool": "avg"}),
    ],
)
def test_bits_repeat_over_runs_and_thread_counts(
    channels, out_channels, options, channels_last, dtype
):
    w_shape = (out_channels, channels // options.get("groups", 1), 3, 3)
    x, w, b = leaves_of((6, channels, 28, 28), w_shape, dtype=dtype, channels_last=channels_last)
    grad = torch.randn(plain(x, w, b, **options).shape).to(dtype)
    # Windows that overlap, groups and averages are differentiated by torch's own convolution,
    # whose sums depend on the number of threads.
    own = options in ({}, {"padding": 1})
    first = {}
    for threads in (1, 2, 2, 1, 3, 3):
        torch.set_num_threads(threads)
        out = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options)
        grads = torch.autograd.grad(out, (x, w, b), grad)
        assert torch.equal(out, first.setdefault("output", out)), threads
        wanted = first.setdefault("gradients" if own else threads, grads)
        for name, got, want in zip(("dx", "dw", "db"), grads, wanted, strict=True):
            assert torch.equal(got, want), (name, threads)


def test_gradient_penalty_step_equals_plain_torch():
    """A discriminator's step with a penalty on the norm of its input gradient (WGAN-GP)."""
    losses = []
    for function in (pyops.conv_relu_pool2d, plain):
        torch.manual_seed(1)
        shapes = [((1, 3, 1, 1), (8, 3, 3, 3)), ((1, 8, 1, 1), (12, 8, 3, 3))]
        weights = [make_inputs(*s, dtype=torch.float64)[1].requires_grad_() for s in shapes]
        head = torch.randn(12 * 4 * 4, dtype=torch.float64)
        optimizer = torch.optim.SGD(weights, lr=1e-2)
        history = []
        for _ in range(3):
            x = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
            options = {"padding": 1, "activation": "leaky_relu", "negative_slope": 0.2}
            extra = {"backend": "cpu"} if function is pyops.conv_relu_pool2d else {}
            hidden = function(x, weights[0], **options, pool="avg", **extra)
            hidden = function(hidden, weights[1], **options, pool="max", **extra)
            score = hidden.flatten(1) @ head
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            loss = score.mean() + 10 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack([*history, *(w.detach().square().sum() for w in weights)]))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    assert losses[0][0] != losses[0][2]
