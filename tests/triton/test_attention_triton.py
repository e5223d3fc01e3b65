"""The Triton kernels of attention, executed by Triton's interpreter on the CPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", "3.6")

from attention_checks import (  # noqa: E402  (Triton is here)
    BF16,
    CASES,
    CAUSAL,
    FP16,
    Case,
    check,
    check_varlen,
)
from attention_decode_checks import (  # noqa: E402
    DECODE_CASES,
    check_decode,
)
from conv_pool_checks import surrounded  # noqa: E402
from pyops.triton_kernels import (  # noqa: E402
    attention,
    attention_call,
    attention_decode,
    common,
)

pytestmark = [
    pytest.mark.skipif(
        not common.INTERPRET, reason="needs TRITON_INTERPRET=1, set before Triton is imported"
    ),
    # NumPy's opinion of exponents of -inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def fenced(monkeypatch):
    """Every tensor that a launcher allocates lies between fences, which nothing may overwrite."""
    fences = []
    new_empty = torch.Tensor.new_empty

    def fenced_empty(self, *shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return new_empty(self, *shape, dtype=dtype or self.dtype, device=device)
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        held = new_empty(self, count + 128, dtype=dtype or self.dtype).fill_(float("nan"))
        fences.append((held, count))
        return held[64 : 64 + count].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced_empty)
    yield
    assert fences
    for held, count in fences:
        assert held[:64].isnan().all() and held[64 + count :].isnan().all()


@pytest.fixture
def launched(monkeypatch):
    """The flags of the kernels run, by the kernels' names."""
    seen = {}
    run = common.run

    def recording(kernel, config, bind):
        seen[kernel.__name__] = bind(config)[1].get("F")
        return run(kernel, config, bind)

    monkeypatch.setattr(common, "run", recording)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_within_budget_and_bounds(name, fenced):
    case = CASES[name]
    tensors = {
        name: surrounded(t) if t is not None and t.is_floating_point() else t
        for name, t in case.make("cpu").items()
    }
    check(case, "cpu", tensors)


def test_one_key():
    """The output is the value, and no score matters but to lse: no error to be measured against."""
    case = Case((1, 1))
    tensors = case.make("cpu")
    output, lse = case.forward(tensors)
    torch.testing.assert_close(output, tensors["value"])
    grads = case.backward(tensors, torch.ones_like(output), torch.ones_like(lse), output, lse)
    expected = tensors["key"] / 4, tensors["query"] / 4, torch.ones_like(output)
    for grad, wanted in zip(grads[:3], expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("name", ["plain", "fp16-heads-inside", "odd-head-dims"])
def test_boxes_where_alignment_allows(name, launched):
    case = CASES[name]
    tensors = case.make("cpu")
    output, _ = case.forward(tensors)
    case.backward(tensors, output, None, *case.forward(tensors))
    expected = "pointers" if name == "odd-head-dims" else "host"
    assert {flags.LOADS for flags in launched.values()} == {expected}
    assert len(launched) == 4


@pytest.mark.parametrize("name", ["plain", "bf16", "everything"])
def test_pointers_equal_boxes(name, monkeypatch):
    case = CASES[name]
    tensors = case.make("cpu")

    def results():
        output, lse = case.forward(tensors)
        return output, lse, *case.backward(tensors, torch.ones_like(output), lse * 0, output, lse)

    boxes = results()
    monkeypatch.setattr(attention_call, "takes_boxes", lambda tensor: False)
    pointers = results()
    monkeypatch.setattr(common, "INT32_LIMIT", 2**20)
    wide = results()
    for other in (pointers, wide):
        assert all(torch.equal(a, b) for a, b in zip(boxes, other, strict=True))


def test_int64_is_chosen_by_size():
    def wide(seqlen, heads):
        q = torch.empty(1, seqlen, heads, 128, device="meta", dtype=BF16).transpose(1, 2)
        options = attention_call.Options(1.0, 0.0, -1, -1, False, 0.0)
        return attention_call.Call(q, q, q, options, None, None, None, None, None).flags().WIDE

    assert not wide(2**17, 64) and wide(2**18, 64)


VARLEN = {
    "plain": (Case((1, 1)), [(40, 33), (5, 60), (17, 17)]),
    "empty-ones": (Case((1, 1), window=CAUSAL, sinks=True), [(0, 9), (20, 0), (33, 40), (0, 0)]),
    "causal-groups": (Case((1, 1), heads=(4, 2), window=CAUSAL, dtype=BF16), [(34, 20), (9, 50)]),
    "window-sinks": (Case((1, 1), window=(9, 2), sinks=True), [(40, 40), (20, 35)]),
    "odd": (Case((1, 1), head_dims=(13, 7), alibi=2, softcap=3.0), [(20, 30), (33, 5)]),
    # Longer than what the rows that backward prepares are padded to.
    "long": (Case((1, 1), heads=(1, 1)), [(140, 5), (150, 6)]),
    "dropout": (Case((1, 1), dropout_p=0.4), [(20, 30), (33, 5)]),
}


@pytest.mark.parametrize("name", VARLEN)
def test_packed_sequences_as_one_by_one(name, fenced):
    case, lengths = VARLEN[name]
    check_varlen(case, "cpu", lengths, tail=3)


# How many programs share a row hardly depends on the case: every case in parts, few of them otherwise.
@pytest.mark.parametrize(
    "name, splits",
    [
        *((name, 3) for name in DECODE_CASES),
        *((name, 0) for name in ("causal-append", "paged-rotary", "options")),
        *((name, 1) for name in ("empty-cache", "many-rows")),
    ],
)
def test_decode(name, splits, fenced):
    check_decode(DECODE_CASES[name], "cpu", splits)


def test_splits():
    assert attention_decode.choose_splits(1, 1000, 132) == 128
    assert attention_decode.choose_splits(64, 1000, 132) == 5
    assert attention_decode.choose_splits(64, 8, 132) == 2
    assert attention_decode.choose_splits(1000, 1000, 132) == 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in whole numbers; Salmon et al., 2011."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b % 2**32, a >> 32 ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_dropout_is_philox_word_by_word():
    """Equal scores and the identity for values show the mask itself."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    case = Case((5, 19), head_dims=(16, 19), batch=2, dropout_p=0.4)
    tensors = case.make("cpu")
    tensors["query"].zero_()
    tensors["value"] = torch.eye(19).expand(2, 2, 19, 19).contiguous()
    output, _ = case.forward(tensors)
    seed, offset = tensors["rng_state"].tolist()
    key = [seed % 2**32, seed >> 32]
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (2, 2, 5, 19))).tolist():
        word = philox([j // 4, i, b * 2 + h, offset % 2**32], key)[j % 4]
        expected = word >= round(0.4 * 2**32)
        assert (output[b, h, i, j] > 0) == expected
    torch.testing.assert_close(
        output[output > 0], torch.tensor(1 / 19 / 0.6).expand(output.shape)[output > 0]
    )


@pytest.mark.parametrize("name", ["causal-short-keys", "window-nothing", "bias-bool"])
def test_rows_that_see_nothing(name):
    case = CASES[name]
    tensors = case.make("cpu")
    if name == "bias-bool":
        tensors["bias"][0, :, 3] = False
    output, lse = case.forward(tensors)
    nothing = lse == float("-inf")
    assert nothing.any() and not nothing.all()
    assert (output[nothing] == 0).all()
    # Whatever comes in for those rows, nothing of it goes on.
    grad_output = torch.where(nothing[..., None], float("inf"), torch.ones_like(output))
    grad_output[nothing] = 1e30
    grad_lse = torch.where(nothing, float("nan"), 0.0)
    grads = case.backward(tensors, grad_output, grad_lse, output, lse)
    assert (grads[0][nothing] == 0).all()
    assert all(grad.isfinite().all() for grad in grads[:3])


def test_infinite_scores_are_nan_as_in_torch():
    case = Case((20, 40))
    tensors = case.make("cpu")
    tensors["query"][0, 0, 3, 0] = float("inf")
    tensors["key"][0, 1, 7, 0] = float("nan")
    output, _ = case.forward(tensors)
    plain, _ = case.plain(tensors, torch.float32)
    assert plain.isnan().any() and not plain.isnan().all()
    assert torch.equal(output.isnan(), plain.isnan())


def test_strange_strides():
    """Gaps between rows, a start off 16-byte alignment, one key head for all, expanded gradients."""
    case = Case((20, 40), dtype=FP16, heads=(4, 4), window=CAUSAL)
    tensors = case.make("cpu")
    tensors["key"] = tensors["key"][:, :1].expand(1, 4, 40, 16)
    dense = {name: t.contiguous() if t is not None else None for name, t in tensors.items()}
    output, lse = case.forward(dense)
    ones = torch.ones(()).half().expand(output.shape)
    grads = case.backward(dense, ones.contiguous(), None, output, lse)
    gaps = torch.full((1, 4, 40, 24), float("nan"), dtype=FP16)
    gaps[:, :, ::2, :16] = dense["query"]
    shifted = torch.empty(dense["value"].numel() + 1, dtype=FP16)[1:].view_as(dense["value"])
    shifted.copy_(dense["value"])
    strange = tensors | {"query": gaps[:, :, ::2, :16], "value": shifted}
    again, again_lse = case.forward(strange)
    assert torch.equal(again, output) and torch.equal(again_lse, lse)
    others = case.backward(strange, ones, None, output, lse)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    assert others[0].is_contiguous()


@pytest.mark.parametrize("wanted", range(5))
def test_only_what_is_asked(wanted, launched):
    case = Case((20, 24), bias=(1, 1, 20, 24), sinks=True)
    tensors = case.make("cpu")
    output, lse = case.forward(tensors)
    all_grads = case.backward(tensors, output, None, output, lse)
    launched.clear()
    mask = tuple(index == wanted for index in range(5))
    grads = case.backward(tensors, output, None, output, lse, mask)
    assert [grad.shape != (0,) for grad in grads] == list(mask)
    assert torch.equal(grads[wanted], all_grads[wanted])
    assert len(launched) == (1 if wanted == 4 else 2)


def test_sums_of_the_bias_gradient_in_parts(monkeypatch):
    """However many programs share a sum."""
    case = Case((20, 20), bias=(1, 1, 1, 20), batch=2)
    ratios = []
    for count in (1, 4, 50):
        monkeypatch.setattr(common, "multiprocessors", lambda tensor, count=count: count)
        ratios.append(check(case, "cpu")["bias"])
    assert len(ratios) == 3


@pytest.mark.parametrize("seqlens", [(5, 0), (0, 5), (0, 0)])
def test_no_queries_or_no_keys(seqlens):
    case = Case(seqlens, sinks=True)
    tensors = case.make("cpu")
    output, lse = case.forward(tensors)
    assert (output == 0).all()
    assert torch.equal(lse, tensors["sinks"][:, None].expand_as(lse))
    grads = case.backward(tensors, output, torch.ones_like(lse), output, lse)
    assert all((grad == 0).all() for grad in grads[:3])
    # lse is the sink.
    torch.testing.assert_close(grads[4], torch.full((2,), float(seqlens[0])))


def test_repeats_bit_for_bit():
    case = CASES["everything"]
    tensors = case.make("cpu")
    output, lse = case.forward(tensors)
    first = case.backward(tensors, output, lse, output, lse)
    again, again_lse = case.forward(tensors)
    assert torch.equal(output, again) and torch.equal(lse, again_lse)
    second = case.backward(tensors, output, lse, output, lse)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_supports():
    def supports(dtype=BF16, head_dim=64, value_dim=64, device="meta", key_dtype=None):
        q = torch.empty(1, 2, 4, head_dim, dtype=dtype, device=device)
        k = q.to(key_dtype or dtype)
        v = torch.empty(1, 2, 4, value_dim, dtype=dtype, device=device)
        return attention.supports(q, k, v, None, None, None, (1.0, 0.0, -1, -1, False, 0.0), True)

    assert supports() is None
    assert supports(head_dim=1, value_dim=256) is None
    assert "float64" in supports(dtype=torch.float64)
    assert "float16" in supports(key_dtype=FP16)
    assert "256" in supports(head_dim=257)
    assert "256" in supports(value_dim=300)
    with torch._subclasses.FakeTensorMode():
        assert supports(device="cpu") is None
    assert supports(device="cpu") is None


def test_a_large_batch_of_heads_is_one_launch():
    """The grid has one dimension: the others stop at 65535."""
    case = replace(Case((1, 1)), heads=(1, 1), batch=40)
    tensors = case.make("cpu")
    output, _ = case.forward(tensors)
    torch.testing.assert_close(output, tensors["value"])
