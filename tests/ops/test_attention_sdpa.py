"""pyops.scaled_dot_product_attention against torch's, and the kernels behind torch's own."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from attention_cases import make_qkv, randn
from test_attention_autograd import Calls
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyops
from pyops.integrations import torch_flash
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

MASK = randn(5, 7) > 0
MASK[2] = False  # a row that sees nothing
# shapes of query, key, value (None: key's) and options
CASES = {
    "plain": ((2, 4, 5, 8), (2, 4, 7, 8), None, {}),
    "causal": ((2, 4, 5, 8), (2, 4, 7, 8), None, {"is_causal": True}),
    "causal, more queries": ((2, 4, 9, 8), (2, 4, 7, 8), None, {"is_causal": True}),
    "boolean mask": ((2, 4, 5, 8), (2, 4, 7, 8), None, {"attn_mask": MASK}),
    "mask and causal": ((2, 4, 5, 8), (2, 4, 7, 8), None, {"attn_mask": MASK, "is_causal": True}),
    "float mask": ((2, 4, 5, 8), (2, 4, 7, 8), None, {"attn_mask": randn(2, 1, 5, 7)}),
    "mask of keys": ((2, 4, 5, 8), (2, 4, 7, 8), None, {"attn_mask": randn(2, 1, 1, 7)}),
    "mask of -inf": (
        *((2, 4, 5, 8), (2, 4, 7, 8), None),
        {"attn_mask": torch.zeros(5, 7).masked_fill(~MASK, -torch.inf)},
    ),
    "scale": ((2, 4, 5, 8), (2, 4, 7, 8), None, {"scale": 0.1}),
    "other value size": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3), {}),
    "grouped": ((2, 4, 5, 8), (2, 2, 7, 8), None, {"enable_gqa": True, "is_causal": True}),
    "grouped, all different": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8), {"enable_gqa": True}),
    "two dimensions": ((5, 8), (7, 8), None, {"attn_mask": MASK}),
    "three dimensions": ((4, 5, 8), (4, 7, 8), None, {"attn_mask": randn(4, 5, 7)}),
    "three, one mask": ((4, 5, 8), (4, 7, 8), None, {"attn_mask": MASK}),
    "three, grouped": ((4, 5, 8), (2, 7, 8), None, {"enable_gqa": True}),
    "five dimensions": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), None, {"is_causal": True}),
    "five, mask": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), None, {"attn_mask": randn(2, 1, 1, 5, 7)}),
    "five, mask of four": (
        (2, 3, 4, 5, 8),
        (2, 3, 4, 7, 8),
        None,
        {"attn_mask": randn(3, 1, 5, 7)},
    ),
    "five, mask for all": (
        *((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), None),
        {"attn_mask": randn(1, 1, 4, 5, 7)},
    ),
    "five, broadcast": ((2, 3, 4, 5, 8), (2, 1, 4, 7, 8), (1, 3, 4, 7, 8), {}),
    "one head of keys": ((2, 4, 5, 8), (2, 1, 7, 8), None, {}),
    "one head of queries": ((2, 1, 5, 8), (2, 4, 7, 8), None, {}),
    "one head of values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8), {}),
    "one batch of keys": ((2, 4, 5, 8), (1, 4, 7, 8), None, {}),
    "one batch of queries": ((1, 4, 5, 8), (2, 4, 7, 8), None, {}),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), None, {}),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), None, {}),
    "large head_dim": ((1, 2, 5, 300), (1, 2, 7, 300), None, {}),
}
NOT_OURS = ("grouped, all different", "no keys", "no queries", "large head_dim")


def run(function, tensors, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return out, *torch.autograd.grad(out, leaves, randn(*out.shape).to(out.dtype))


def tensors_of(name):
    q, k, v, options = CASES[name]
    v = k if v is None else v
    return [randn(*shape, seed=i) for i, shape in enumerate((q, k, v))], options


def doubled(options):
    mask = options.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        return options
    return {**options, "attn_mask": mask.double()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_torch(name, dtype):
    tensors, options = tensors_of(name)
    tensors = [t.to(dtype) for t in tensors]
    with Calls() as calls:
        ours = run(pyops.scaled_dot_product_attention, tensors, **options)
    assert [n for n, _ in calls.seen] == (
        [] if name in NOT_OURS else ["attention", "attention_backward"]
    )
    if name == "mask and causal":  # torch's flash attention takes both, its math does not
        options = {"attn_mask": MASK & torch.ones(5, 7, dtype=torch.bool).tril()}
    with sdpa_kernel(SDPBackend.MATH):
        theirs = run(F.scaled_dot_product_attention, tensors, **options)
        exact = run(
            F.scaled_dot_product_attention, [t.double() for t in tensors], **doubled(options)
        )
    assert_within_budget(ours[0], theirs[0], exact[0])
    for got, lowp, best in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        if dtype == torch.bfloat16 and lowp.numel() < 500:
            continue  # how well torch happens to round a few elements is luck
        assert_within_budget(got, lowp, best, GRADIENT_BUDGET)


def test_signature_is_torchs_and_a_backend():
    *names, last = inspect.signature(pyops.scaled_dot_product_attention).parameters.values()
    assert last.name == "backend" and last.kind is last.KEYWORD_ONLY and last.default is None
    names = [parameter.name for parameter in names]
    documented = F.scaled_dot_product_attention.__doc__.split("(", 1)[1].split(")", 1)[0]
    assert names == [part.split("=")[0].strip() for part in documented.split(",")]
    q, k, v = make_qkv()
    args = (q, k, v, None, 0.0, True)
    torch.testing.assert_close(
        pyops.scaled_dot_product_attention(*args), F.scaled_dot_product_attention(*args)
    )


def test_backend():
    tensors = make_qkv()
    seen = []
    for backend in ("cpu", "reference"):
        with Calls() as calls:
            out = pyops.scaled_dot_product_attention(*tensors, backend=backend)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors))
        seen.append([name for name, _ in calls.seen])
    assert seen == [["attention_plain"], []]
    with pytest.raises(ValueError, match="backend: .*gpu"):
        pyops.scaled_dot_product_attention(*tensors, backend="gpu")


@pytest.mark.parametrize(
    "change",
    [
        {"key": randn(2, 2, 7, 8), "value": randn(2, 2, 7, 8)},
        {"key": randn(2, 3, 7, 8), "value": randn(2, 3, 7, 8), "enable_gqa": True},
        {"key": randn(2, 4, 7, 9)},
        {"key": randn(2, 4, 7, 8).double()},
        {"attn_mask": randn(5, 6)},
        {"attn_mask": randn(7)},
        {"attn_mask": randn(3, 1, 1, 5, 7)},
        {"attn_mask": randn(5, 7).double()},
        {"attn_mask": randn(5, 7).int()},
        {"dropout_p": 1.5},
        {"query": randn(2, 4, 5, 8).int(), "key": randn(2, 4, 7, 8).int()},
        {"query": randn(3, 4, 5, 8)},
    ],
    ids=lambda change: " ".join(change),
)
def test_torchs_own_errors(change):
    q, k, v = randn(2, 4, 5, 8), randn(2, 4, 7, 8), randn(2, 4, 7, 8)
    arguments = {"query": q, "key": k, "value": v, **change}
    raised = []
    for function in (pyops.scaled_dot_product_attention, F.scaled_dot_product_attention):
        with pytest.raises((RuntimeError, IndexError, TypeError)) as caught:
            function(**arguments)
        raised.append((type(caught.value), str(caught.value).splitlines()[0]))
    assert raised[0] == raised[1]


def test_dropout():
    q, k, v = make_qkv(2, 4, 64, 64)
    v = torch.ones_like(v)
    torch.manual_seed(1)
    first = pyops.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    second = pyops.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(pyops.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second) and 0.9 < first.mean() < 1.1
    assert not pyops.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


def test_gradient_of_the_mask():
    tensors, mask = make_qkv(2, 4, 20, 30), randn(4, 20, 30)
    ours, theirs = (
        run(lambda q, k, v, m, f=f: f(q, k, v, attn_mask=m), (*tensors, mask))
        for f in (pyops.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_autocast_and_compile():
    torch._dynamo.reset()
    q, k, v = make_qkv(2, 4, 20, 20)

    def function(q, k, v):
        return pyops.scaled_dot_product_attention(q.sin(), k, v, is_causal=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = function(q, k, v), F.scaled_dot_product_attention(q.sin(), k, v, is_causal=True)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


registry = pytest.mark.skipif(
    not hasattr(torch_attention, "register_flash_attention_impl"), reason="torch has no registry"
)


@pytest.fixture
def activated(monkeypatch):
    """For each call of an overridden op, whether our kernels took it."""
    taken, takes = [], torch_flash._takes

    def record(*arguments):
        taken.append(takes(*arguments))
        return taken[-1]

    monkeypatch.setattr(torch_flash, "_takes", record)
    torch_attention.activate_flash_attention_impl("pyops")
    yield taken
    torch_attention.restore_flash_attention_impl(_raise_warn=False)


FLASH = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": randn(33, 40) > 0},
    "float mask": {"attn_mask": randn(1, 1, 33, 40)},
    "empty row": {"attn_mask": (torch.arange(33) != 3)[:, None].expand(33, 40)},
    "scale": {"scale": 0.1},
}


def flash_qkv(dtype=torch.float32, heads_inside=False):
    return make_qkv(2, 4, 33, 40, 16, dtype=dtype, heads_inside=heads_inside)


@registry
@pytest.mark.parametrize(
    "name, heads_inside, compiled",
    [
        *((name, heads_inside, False) for name in FLASH for heads_inside in (False, True)),
        ("causal", True, True),
        ("float mask", False, True),
    ],
)
def test_torchs_function_on_our_kernels(name, heads_inside, compiled, activated):
    torch._dynamo.reset()
    tensors, options = flash_qkv(heads_inside=heads_inside), FLASH[name]
    function = F.scaled_dot_product_attention
    if compiled:
        function = torch.compile(lambda *t, **o: F.scaled_dot_product_attention(*t, **o))
    ours = run(function, tensors, **options)
    assert activated == [True, True]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = run(F.scaled_dot_product_attention, tensors, **options)
        exact = run(
            F.scaled_dot_product_attention, [t.double() for t in tensors], **doubled(options)
        )
    for got, lowp, best in zip(ours, theirs, exact, strict=True):
        assert_within_budget(got, lowp, best, GRADIENT_BUDGET)


@registry
def test_registry_names_us_and_undoes_us(activated):
    tensors = flash_qkv()
    assert "pyops" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() == "pyops"
    first = run(F.scaled_dot_product_attention, tensors)
    torch_attention.restore_flash_attention_impl()
    stock = run(F.scaled_dot_product_attention, tensors)
    assert activated == [True, True]
    torch.testing.assert_close(first, stock, rtol=1e-4, atol=1e-5)
    torch_attention.activate_flash_attention_impl("pyops")
    run(F.scaled_dot_product_attention, tensors)
    assert activated == [True] * 4


@registry
def test_what_the_kernels_do_not_take_goes_to_torchs(activated):
    tensors = [t.double() for t in flash_qkv()]
    ours = run(F.scaled_dot_product_attention, tensors)
    assert activated == [False, False]
    torch_attention.restore_flash_attention_impl()
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours, run(F.scaled_dot_product_attention, tensors), strict=True)
    )


@registry
def test_results_of_the_overridden_ops_have_the_promised_strides(activated):
    for permute in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)):
        back = [permute.index(i) for i in range(4)]
        tensors = [t.permute(permute).contiguous().permute(back) for t in flash_qkv()]
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(*tensors)
        metas = op(*(t.to("meta") for t in tensors))
        assert [t.stride() for t in (out, lse)] == [t.stride() for t in metas]
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        rest = (*tensors, out, lse)
        grads = backward(out, *rest, 0.0, False)
        metas = backward(out.to("meta"), *(t.to("meta") for t in rest), 0.0, False)
        assert [t.stride() for t in grads] == [t.stride() for t in metas]
