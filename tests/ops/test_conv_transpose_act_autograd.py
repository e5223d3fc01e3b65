"""Derivatives of conv_transpose2d_act: numerical checks, what is computed and saved, gradient penalties."""

from __future__ import annotations

import pytest
import torch
from conv_transpose_cases import NAMES, fast, make_inputs, plain
from torch.utils._python_dispatch import TorchDispatchMode

import pyops

ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", None])
GEOMETRIES = {
    "stride 2": {"stride": 2, "padding": 1, "output_padding": 1},
    "groups": {"groups": 2, "padding": (1, 0)},
    "dilation": {"dilation": (2, 1), "stride": (1, 2)},
}


def double_leaves(options, vectors="bst", activation="tanh"):
    groups = options.get("groups", 1)
    tensors = make_inputs(
        *((1, 2, 3, 2), (2, 2 // groups, 3, 2)),
        groups=groups,
        vectors=vectors,
        dtype=torch.float64,
        seed=5,
    )
    return [None if t is None else t.requires_grad_() for t in tensors]


def check_numerically(tensors, **options):
    """gradcheck and gradgradcheck of those tensors that are there and want gradients."""
    present = [i for i, t in enumerate(tensors) if t is not None]

    def function(*given):
        full = list(tensors)
        for i, t in zip(present, given, strict=True):
            full[i] = t
        return fast(*full, negative_slope=0.2, **options)

    leaves = [tensors[i] for i in present]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@ACTIVATIONS
@pytest.mark.parametrize("name", GEOMETRIES)
def test_numerical_derivatives(name, activation):
    options = GEOMETRIES[name]
    check_numerically(double_leaves(options), activation=activation, **options)


@pytest.mark.parametrize("vectors", ["", "b", "s", "t", "bs", "st"])
def test_numerical_derivatives_without_some_vectors(vectors):
    options = GEOMETRIES["stride 2"]
    check_numerically(double_leaves(options, vectors), activation="sigmoid", **options)


@pytest.mark.parametrize("frozen", range(5), ids=NAMES)
def test_numerical_derivatives_with_a_frozen_tensor(frozen):
    options = GEOMETRIES["groups"]
    tensors = double_leaves(options)
    tensors[frozen].requires_grad_(False)
    check_numerically(tensors, activation="tanh", **options)


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_numerical_derivatives_of_one_tensor(wanted):
    options = GEOMETRIES["stride 2"]
    tensors = double_leaves(options)
    for i, t in enumerate(tensors):
        t.requires_grad_(i == wanted)
    check_numerically(tensors, activation="tanh", **options)


def test_third_order():
    results = []
    options = {"stride": 2, "padding": 1, "activation": "tanh"}
    for function in (fast, plain):
        leaves = double_leaves(options)
        out = function(*leaves, **options)
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total, leaves, create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), leaves)
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


@pytest.mark.parametrize(
    "wanted",
    [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
    + [(1, 1, 1, 0, 0), (0, 0, 1, 1, 1), (1, 1, 1, 1, 1)],
)
def test_only_what_is_asked_for_is_computed(wanted):
    tensors = make_inputs((2, 5, 6, 6), (5, 9, 4, 4))
    options = {"stride": 2, "padding": 1, "activation": "tanh"}
    every = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(fast(*every, **options).sum(), every)
    for t, asked in zip(tensors, wanted, strict=True):
        t.requires_grad_(bool(asked))
    with Calls() as calls:
        fast(*tensors, **options).sum().backward()
    assert [name for name, _ in calls.seen] == [
        "conv_transpose2d_act",
        "conv_transpose2d_act_backward",
    ]
    assert list(calls.seen[1][1][-1]) == [bool(asked) for asked in wanted]
    for leaf, asked, want in zip(tensors, wanted, expected, strict=True):
        assert (leaf.grad is not None) == bool(asked)
        if asked:
            torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("vectors", ["bst", "t", "s"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, -1), (-1,)])
def test_only_what_autograd_grad_is_asked_for_is_computed(wanted, vectors, create_graph):
    """Everything requires gradients; some of the vectors are missing. -1: the last that is there."""
    made = make_inputs((2, 5, 6, 6), (5, 9, 4, 4), vectors=vectors)
    tensors = [None if t is None else t.requires_grad_() for t in made]
    last = max(i for i, t in enumerate(tensors) if t is not None)
    places = [last if i == -1 else i for i in wanted]
    for inputs in (tensors, [None if t is None else t * 1 for t in tensors]):
        out = fast(*inputs, stride=2, padding=1, activation="tanh").square().sum()
        asked = [inputs[i] for i in places]
        with Calls() as calls:
            got = torch.autograd.grad(out, asked, create_graph=create_graph, retain_graph=True)
        (mask,) = [args[-1] for name, args in calls.seen if name.endswith("_backward")]
        assert list(mask) == [i in places for i in range(5)]
        every = torch.autograd.grad(out, [t for t in inputs if t is not None])
        by_place = dict(zip((i for i, t in enumerate(inputs) if t is not None), every, strict=True))
        assert all(torch.equal(g, by_place[i]) for g, i in zip(got, places, strict=True))


def test_what_is_saved():
    """Input, output and parameters: neither the convolution nor the affine map's result."""
    tensors = [t.requires_grad_() for t in make_inputs((2, 5, 8, 8), (5, 9, 4, 4))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = fast(*tensors, stride=2, padding=1, activation="tanh")
    of_output_size = [t for t in saved if t.shape == out.shape]
    assert len(of_output_size) == 1 and of_output_size[0].data_ptr() == out.data_ptr()
    assert sum(t.numel() for t in saved) == out.numel() + sum(t.numel() for t in tensors[:4])


def test_no_graph_where_none_is_wanted():
    tensors = [t.requires_grad_() for t in make_inputs((2, 5, 8, 8), (5, 9, 4, 4))]
    with torch.no_grad():
        assert not fast(*tensors).requires_grad
    assert not fast(*(t.detach() for t in tensors)).requires_grad


def generator_and_critic(op):
    """Two layers each; the generator's transposed convolutions by `op`."""
    generator = [
        *make_inputs((1, 6, 1, 1), (6, 12, 4, 4), vectors="b", seed=1)[1:3],
        *make_inputs((1, 12, 1, 1), (12, 2, 4, 4), vectors="b", seed=2)[1:3],
    ]
    critic = [
        torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(3)) / 6,
        torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(4)) / 11,
    ]
    parameters = [t.requires_grad_() for t in (*generator, *critic)]

    def generate(z):
        hidden = op(z, *generator[:2], activation="leaky_relu", negative_slope=0.2)
        return op(hidden, *generator[2:], stride=2, padding=1, activation="tanh")

    def judge(images):
        hidden = pyops.conv_relu_pool2d(
            *(images, critic[0]),
            stride=2,
            padding=1,
            pool=None,
            activation="leaky_relu",
            negative_slope=0.2,
        )
        return torch.nn.functional.conv2d(hidden, critic[1]).flatten()

    return generate, judge, parameters


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "path length"])
def test_training_step_with_a_gradient_penalty(penalty):
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(4, 6, 1, 1, generator=generator)
    real = torch.randn(4, 2, 8, 8, generator=generator)
    mix = torch.rand(4, 1, 1, 1, generator=generator)
    results = []
    for op in (fast, plain):
        generate, judge, parameters = generator_and_critic(op)
        latent = z.clone().requires_grad_()
        images = generate(latent)
        if penalty == "path length":  # through the generator twice
            (slope,) = torch.autograd.grad((images * real).sum(), latent, create_graph=True)
        else:
            at = images * mix + real * (1 - mix) if penalty == "wgan-gp" else real.requires_grad_()
            (slope,) = torch.autograd.grad(judge(at).sum(), at, create_graph=True)
        norms = slope.flatten(1).norm(dim=1)
        loss = judge(images).mean() - judge(real).mean()
        loss = loss + 10 * (norms if penalty == "r1" else norms - 1).square().mean()
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in parameters)))
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_an_output_without_activation_may_be_changed_in_place():
    """As torch's may: y = block(x); y += skip."""
    x, w = torch.randn(8, 32, 4, 4), torch.randn(32, 32, 4, 4, requires_grad=True)
    out = pyops.conv_transpose2d_act(x, w, stride=2, padding=1, activation=None, backend="cpu")
    out += 1
    (ours,) = torch.autograd.grad(out.sum(), w)
    plain = torch.nn.functional.conv_transpose2d(x, w, stride=2, padding=1)
    torch.testing.assert_close(ours, torch.autograd.grad(plain.sum(), w)[0], rtol=1e-4, atol=1e-3)
