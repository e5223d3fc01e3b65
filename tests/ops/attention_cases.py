"""What the tests of attention share: plain torch written out, inputs, and the comparison."""

from __future__ import annotations

import torch

import pyops
from pyops.reference.attention import dropout_keep
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget

BACKENDS = ("reference", "cpu")


def hidden_keys(seqlen_q, seqlen_k, causal=False, window=None, top_left=False):
    """(seqlen_q, seqlen_k) bool, element by element."""
    left, right = window or (None, None)
    shift = 0 if top_left else seqlen_k - seqlen_q
    ahead = torch.arange(seqlen_k)[None, :] - torch.arange(seqlen_q)[:, None] - shift
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if left is not None:
        hidden = hidden | (ahead < -left)
    if right is not None:
        hidden = hidden | (ahead > right)
    return hidden


def plain(
    query,
    key,
    value,
    *,
    causal=False,
    scale=None,
    bias=None,
    alibi_slopes=None,
    window=None,
    softcap=0.0,
    sinks=None,
    dropout_p=0.0,
    keep=None,
    top_left=False,
):
    """(output, lse) step by step in the inputs' dtype; `keep` is the dropout mask."""
    dtype = query.dtype
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        shift = 0 if top_left else seqlen_k - seqlen_q
        distance = torch.arange(seqlen_q)[:, None] + shift - torch.arange(seqlen_k)
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        scores = scores - (slopes[:, :, None, None] * distance.abs()).to(dtype)
    hidden = hidden_keys(seqlen_q, seqlen_k, causal, window, top_left).expand(scores.shape)
    if bias is not None and bias.dtype == torch.bool:
        hidden = hidden | ~bias
    elif bias is not None:
        scores = scores + bias.to(dtype)
        hidden = hidden | (bias == -torch.inf)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), 3)
    empty = (scores == -torch.inf).all(3, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)  # softmax of nothing but -inf would be NaN
    weights = scores.softmax(3)[..., :seqlen_k].masked_fill(empty, 0.0)
    lse = scores.logsumexp(3).masked_fill(empty[..., 0], -torch.inf)
    if keep is not None:
        weights = weights * keep / (1 - dropout_p)
    return weights @ value, lse


def make_qkv(
    batch=2,
    heads=4,
    seqlen_q=33,
    seqlen_k=None,
    head_dim=16,
    *,
    heads_kv=None,
    v_head_dim=None,
    dtype=torch.float32,
    heads_inside=False,
    seed=0,
):
    """query, key, value; with `heads_inside` they lie in memory as (batch, seqlen, heads, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    heads_kv = heads_kv or heads
    shapes = (
        (batch, heads, seqlen_q, head_dim),
        (batch, heads_kv, seqlen_k, head_dim),
        (batch, heads_kv, seqlen_k, v_head_dim or head_dim),
    )
    made = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if heads_inside:
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]
    return list(made)


def randn(*shape, seed=5, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dropout_mask(shape, dropout_p, seed):
    """What a call with torch.Generator().manual_seed(seed) keeps."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(2**63 - 1, (2,), generator=generator)
    return dropout_keep(state, shape, dropout_p)


def exact(tensor):
    """In float64; what is not floating stays as it is."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double()


def check(query, key, value, *, backend, gradients=True, lse_gradient=False, **options):
    """Compare output, lse and gradients with plain torch by the error budget; the largest ratio.

    options: those of pyops.attention but `generator`, for which there is `seed`.
    """
    seed = options.pop("seed", 7)
    keep = None
    if options.get("dropout_p"):
        shape = (*query.shape[:3], key.shape[2])
        keep = dropout_mask(shape, options["dropout_p"], seed)
    learned = {
        name: options.pop(name)
        for name in ("bias", "sinks")
        if options.get(name) is not None and options[name].is_floating_point()
    }
    names = ("query", "key", "value", *learned)
    tensors = (query, key, value, *learned.values())
    ours = [t.detach().requires_grad_(gradients) for t in tensors]
    lowp = [t.detach().contiguous().requires_grad_(gradients) for t in tensors]
    best = [t.detach().double().contiguous().requires_grad_(gradients) for t in tensors]
    generator = torch.Generator().manual_seed(seed) if keep is not None else None

    def call(function, leaves, **more):
        return function(*leaves[:3], **dict(zip(learned, leaves[3:], strict=True)), **more)

    out, lse = call(
        pyops.attention, ours, backend=backend, return_lse=True, generator=generator, **options
    )
    want, want_lse = call(plain, lowp, keep=keep, **options)
    options64 = {n: exact(v) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    want64, want64_lse = call(plain, best, keep=keep, **options64)
    assert out.shape == want.shape and lse.shape == want_lse.shape
    assert out.dtype == query.dtype and lse.dtype == torch.float32 and lse.is_contiguous()
    assert out.stride() == expected_strides(query, out.shape), (out.stride(), query.stride())
    ratios = [
        assert_within_budget(out, want, want64, OUTPUT_BUDGET, "output"),
        assert_within_budget(lse, want_lse.float(), want64_lse, OUTPUT_BUDGET, "lse"),
    ]
    if gradients:
        grad = randn(*want.shape, seed=1, dtype=query.dtype)
        weight = randn(*lse.shape, seed=2) if lse_gradient else torch.zeros(lse.shape)
        results = []
        for o, s, leaves in ((out, lse, ours), (want, want_lse, lowp), (want64, want64_lse, best)):
            outputs, grads = [o], [grad.to(o.dtype)]
            if lse_gradient:
                outputs.append(s.masked_fill(s.isinf(), 0))
                grads.append(weight.to(s.dtype))
            results.append(torch.autograd.grad(outputs, leaves, grads))
        for name, *triple in zip(names, *results, strict=True):
            if name == "bias" and triple[0].numel() < 8:
                # A few long sums that nearly cancel: how well torch happens to hit each of them is luck.
                atol = torch.finfo(query.dtype).eps * grad.abs().sum().item()
                torch.testing.assert_close(triple[0].double(), triple[2], rtol=0, atol=atol)
            else:
                ratios.append(assert_within_budget(*triple, GRADIENT_BUDGET, f"grad_{name}"))
    return max(ratios)


def lies_heads_inside(tensor):
    """The documented rule for which layout counts as (batch, seqlen, heads, head_dim)."""
    return not tensor.is_contiguous() and tensor.transpose(1, 2).is_contiguous()


def expected_strides(like, shape):
    _, heads, seqlen, d = shape
    if lies_heads_inside(like):
        return (seqlen * heads * d, d, heads * d, 1)
    return (heads * seqlen * d, seqlen * d, d, 1)
