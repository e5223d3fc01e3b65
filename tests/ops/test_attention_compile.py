"""attention under torch.compile and torch.export."""

from __future__ import annotations

import io

import pytest
import torch
from attention_cases import make_qkv, randn

import pyops


class Recorder:
    """A torch.compile backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


COMPILED = {
    "plain": {},
    "causal window": {"causal": True, "window": (7, None)},
    "extras": {"bias": True, "sinks": True, "alibi_slopes": True, "softcap": 3.0},
    "lse": {"return_lse": True, "causal": True},
}


def leaves_of(name, seqlen_q=9, seqlen_k=12, batch=2):
    """(query, key, value[, bias, alibi_slopes, sinks]) and a function of them that calls the op."""
    options = dict(COMPILED[name])
    leaves = make_qkv(batch, 4, seqlen_q, seqlen_k, heads_kv=2)
    if options.pop("bias", False):
        del options["sinks"], options["alibi_slopes"]
        leaves += [randn(1, 4, 1, seqlen_k), randn(4).abs(), randn(4)]

    def function(q, k, v, bias=None, slopes=None, sinks=None):
        extras = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
        out = pyops.attention(q.sin(), k, v, backend="cpu", **extras, **options)
        if isinstance(out, tuple):  # with rows that see nothing, whose lse is -inf
            out = out[0] * out[1].masked_fill(out[1].isinf(), 1)[..., None]
        return out

    return [t.requires_grad_(i != 4) for i, t in enumerate(leaves)], function


def assert_same_step(compiled, function, leaves, tolerance=0.0):
    results = []
    for f in (compiled, function):
        copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
        out = f(*copies)
        wanted = [t for t in copies if t.requires_grad]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for got, want in zip(*results, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    recorder = Recorder()
    leaves, function = leaves_of(name)
    compiled = torch.compile(function, backend=recorder, fullgraph=True)
    assert_same_step(compiled, function, leaves)
    assert len([g for g in recorder.graphs if "pyops.attention" in g.code]) == 1


SIZES = [(9, 12), (13, 15), (40, 33), (64, 64), (17, 31)]


@pytest.mark.parametrize(
    "name, dynamic",
    [("plain", True), ("extras", True), ("lse", True), ("causal window", None), ("extras", None)],
)
def test_compile_for_any_length_recompiles_at_most_twice(name, dynamic):
    torch._dynamo.reset()
    recorder = Recorder()
    _, function = leaves_of(name)
    compiled = torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic)
    for sizes in SIZES:
        assert_same_step(compiled, function, leaves_of(name, *sizes)[0])
    assert 1 <= len(recorder.graphs) <= 3, len(recorder.graphs)


@pytest.mark.parametrize("heads_inside", [False, True], ids=["heads outside", "heads inside"])
def test_compile_with_inductor(heads_inside):
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in make_qkv(2, 4, 20, 20, heads_inside=heads_inside)]

    def function(q, k, v):
        return pyops.attention(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(function, fullgraph=True)
    assert_same_step(compiled, function, leaves, tolerance=1e-5)


def test_compile_with_dropout():
    torch._dynamo.reset()
    q, k, v = make_qkv(2, 4, 64, 64, 8)

    def function(v):
        return pyops.attention(q, k, v, dropout_p=0.5, backend="cpu")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    first = compiled(torch.ones_like(v))
    second = compiled(torch.ones_like(v))
    torch.manual_seed(3)
    assert torch.equal(compiled(torch.ones_like(v)), first) and not torch.equal(first, second)
    assert 0.9 < first.mean() < 1.1


class Attention(torch.nn.Module):
    def __init__(self, heads=4):
        super().__init__()
        self.heads, self.qkv = heads, torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        return pyops.attention(q, k, v, causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(strict, dynamic):
    module, x = Attention().eval(), torch.randn(2, 12, 32)
    seqlen = torch.export.Dim("seqlen", min=2, max=512)
    program = torch.export.export(
        module, (x,), dynamic_shapes={"x": {1: seqlen}} if dynamic else None, strict=strict
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert "pyops.attention.default" in targets, targets
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for length in (12, 5, 100) if dynamic else (12,):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(loaded(x), module(x), rtol=1e-6, atol=1e-6)
