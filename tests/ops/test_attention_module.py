"""pyops.nn.MultiheadAttention against torch's, within the error budget of the latter."""

import copy
import itertools

import pytest
import torch

from pyops import nn
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

E, H, N, L, S = 24, 3, 4, 9, 13
CONSTRUCTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "other widths": {"kdim": 10, "vdim": 14, "batch_first": True},
    "no bias": {"bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def pair(**options):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = nn.MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(options, batched=True):
    torch.manual_seed(1)
    sizes = [(L, E), (S, options.get("kdim", E)), (S, options.get("vdim", E))]
    if not batched:
        return [torch.randn(size) for size in sizes]
    first = options.get("batch_first", False)
    return [torch.randn((N, n, d) if first else (n, N, d)) for n, d in sizes]


def compare(ours, theirs, tensors, **call):
    """Output and gradients of inputs and parameters."""
    results = []
    for module, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        module = copy.deepcopy(module).to(dtype)
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        wide = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                for k, v in call.items()}  # fmt: skip
        output, weights = module(*leaves, **wide)
        grads = torch.autograd.grad(output.sum(0).square().sum(), [*leaves, *module.parameters()])
        results.append((output, weights, grads))
    (out, weights, grads), (lowp, their_weights, lowp_grads), (ref, _, ref_grads) = results
    assert_within_budget(out, lowp, ref)
    assert (weights is None) == (their_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, their_weights)
    for a, b, c in zip(grads, lowp_grads, ref_grads, strict=True):
        assert_within_budget(a, b, c, GRADIENT_BUDGET)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_like_torch(name, need_weights):
    options = CONSTRUCTIONS[name]
    compare(*pair(**options), inputs(options), need_weights=need_weights)


def test_state_dict_and_attributes_are_torchs():
    ours, theirs = pair(kdim=10, vdim=14)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(ours, torch.nn.MultiheadAttention)


MASKS = {
    "bool": torch.rand(L, S, generator=torch.Generator().manual_seed(2)) > 0.7,
    "float": torch.randn(L, S, generator=torch.Generator().manual_seed(3)),
    "of each head": torch.rand(N * H, L, S, generator=torch.Generator().manual_seed(4)) > 0.7,
    None: None,
}
PADDING = torch.arange(S) >= torch.tensor([5, 13, 9, 12])[:, None]
PADDINGS = {"bool": PADDING, "float": PADDING.float() * -2, None: None}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("mask, padding", list(itertools.product(MASKS, PADDINGS)))
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(mask, padding, batch_first):
    options = {"batch_first": batch_first}
    compare(
        *pair(**options),
        inputs(options),
        need_weights=False,
        attn_mask=MASKS[mask],
        key_padding_mask=PADDINGS[padding],
    )


@pytest.mark.parametrize("padded", [False, True])
def test_causal_self_attention(padded):
    ours, theirs = pair(batch_first=True)
    x = inputs({"batch_first": True})[0]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L)
    call = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    if padded:
        call["key_padding_mask"] = torch.zeros(N, L).masked_fill(
            torch.arange(L) >= torch.tensor([4, 9, 7, 5])[:, None], -torch.inf
        )
    compare(ours, theirs, [x, x, x], **call)
    with pytest.raises(RuntimeError, match="is_causal"):
        ours(x, x, x, need_weights=False, is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first):
    options = {"batch_first": batch_first}
    tensors = inputs(options, batched=False)
    compare(*pair(**options), tensors, need_weights=False, key_padding_mask=PADDING[0])


def test_packed_projection_of_one_tensor():
    """The product of all three projections at once, which other arguments do not take."""
    ours, theirs = pair()
    x = inputs({})[0]
    torch.testing.assert_close(
        ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0]
    )


def test_dropout_in_training_only():
    ours, theirs = pair(dropout=0.6)
    tensors = inputs({})
    still = ours.eval()(*tensors, need_weights=False)[0]
    torch.testing.assert_close(still, theirs.eval()(*tensors, need_weights=False)[0])
    ours.train()
    torch.manual_seed(0)
    first = ours(*tensors, need_weights=False)[0]
    torch.manual_seed(0)
    assert torch.equal(first, ours(*tensors, need_weights=False)[0])
    assert not torch.allclose(first, still, atol=1e-2)


def test_wrong_shapes_are_torchs_errors():
    ours, theirs = pair()
    query, key, value = inputs({})
    for bad in ((query[..., :20], key, value), (query, key[:, :2], value), (query, key, value[:5])):
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            theirs(*bad, need_weights=False)
        with pytest.raises(type(caught.value)):
            ours(*bad, need_weights=False)
