"""What the interpreted and the GPU tests of attention share: cases, plain torch, the comparison."""

from dataclasses import dataclass

import torch
from pyops.triton_kernels import attention, attention_varlen

from pyops.reference.attention import dropout_keep
from pyops.testing import GRADIENT_BUDGET, OUTPUT_BUDGET, assert_within_budget

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAUSAL = (-1, 0)


@dataclass
class Case:
    """Arguments of one call."""

    seqlens: tuple[int, int]  # of queries and keys
    heads: tuple[int, int] = (2, 2)  # of queries and keys
    head_dims: tuple[int, int] = (16, 16)  # of queries and values
    batch: int = 1
    dtype: torch.dtype = FP32
    scale: float | None = None
    softcap: float = 0.0
    window: tuple[int, int] = (-1, -1)
    top_left: bool = False
    alibi: int = 0  # dimensions of the slopes
    sinks: bool = False
    bias: tuple[int, int, int, int] | None = None
    bias_dtype: torch.dtype | None = None  # the query's
    dropout_p: float = 0.0
    heads_inside: bool = False  # (batch, seqlen, heads, head_dim) in memory

    @property
    def options(self) -> tuple:
        """What `forward` takes after its tensors."""
        scale = self.head_dims[0] ** -0.5 if self.scale is None else self.scale
        return (scale, self.softcap, *self.window, self.top_left, self.dropout_p)

    def make(self, device: str, seed: int = 0) -> dict:
        """Every tensor by its name; None for those there are not."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=generator).to(device, dtype)

        def states(heads, seqlen, width):
            if self.heads_inside:
                return randn(self.batch, seqlen, heads, width).transpose(1, 2)
            return randn(self.batch, heads, seqlen, width)

        heads, kv_heads = self.heads
        slopes = (self.batch, heads)[2 - self.alibi :]
        bias = None
        if self.bias is not None:
            bias = randn(*self.bias, dtype=FP32)
            boolean = self.bias_dtype is torch.bool
            bias = bias > -0.5 if boolean else bias.to(self.bias_dtype or self.dtype)
        rng_state = torch.tensor([0x123456789ABCDEF, 2**33 + 77], device=device)
        return {
            "query": states(heads, self.seqlens[0], self.head_dims[0]),
            "key": states(kv_heads, self.seqlens[1], self.head_dims[0]),
            "value": states(kv_heads, self.seqlens[1], self.head_dims[1]),
            "bias": bias,
            "alibi_slopes": randn(*slopes, dtype=FP32).abs() if self.alibi else None,
            "sinks": randn(heads, dtype=FP32) if self.sinks else None,
            "rng_state": rng_state if self.dropout_p else None,
        }

    def plain(self, tensors: dict, dtype: torch.dtype, first: int = 0):
        """(output, lse) step by step: products in `dtype`, the softmax in float32 or float64."""
        query, key, value = (tensors[name].to(dtype) for name in ("query", "key", "value"))
        bias, slopes, sinks = (tensors[name] for name in ("bias", "alibi_slopes", "sinks"))
        wide = torch.float64 if dtype is torch.float64 else FP32
        scale, softcap, left, right, top_left, dropout_p = self.options
        repeat = query.size(1) // key.size(1)
        key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
        score = (query @ key.transpose(2, 3)).to(wide) * scale
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        rows = torch.arange(query.size(2), device=query.device)[:, None]
        columns = torch.arange(key.size(2), device=query.device)
        diagonal = rows + (0 if top_left else key.size(2) - query.size(2))
        if slopes is not None:
            score = score - slopes.to(wide)[..., None, None] * (diagonal - columns).abs()
        hidden = torch.zeros(score.shape, dtype=torch.bool, device=query.device)
        if bias is not None and bias.dtype is torch.bool:
            hidden = hidden | ~bias
        elif bias is not None:
            score = score + bias.to(wide)
        if left >= 0:
            hidden = hidden | (columns < diagonal - left)
        if right >= 0:
            hidden = hidden | (columns > diagonal + right)
        # Masked after the exponential, so that rows of nothing have no NaN in their gradient.
        weight = torch.where(hidden, 0.0, torch.exp(score - score.detach().amax(-1, keepdim=True)))
        top = score.detach().amax(-1)
        total = weight.sum(-1)
        if sinks is not None:
            total = total + torch.exp(sinks.to(wide)[:, None] - top)
        nothing = total == 0
        total = torch.where(nothing, 1.0, total)
        p = weight / total[..., None]
        if tensors["rng_state"] is not None:
            p = p * dropout_keep(tensors["rng_state"], p.shape, dropout_p, first) / (1 - dropout_p)
        lse = torch.where(nothing, float("-inf"), top + torch.log(total))
        return p.to(dtype) @ value, lse

    def forward(self, tensors: dict):
        return attention.forward(*tensors.values(), *self.options)

    def backward(self, tensors, grad_output, grad_lse, output, lse, mask=None):
        query, key, value, *others = tensors.values()
        graded = self.bias is not None and self.bias_dtype is not torch.bool
        mask = mask or (True, True, True, graded, self.sinks)
        return attention.backward(
            grad_output, grad_lse, query, key, value, output, lse, *others, *self.options, mask
        )


CASES = {
    "plain": Case((40, 40)),
    "one-query": Case((1, 67), window=CAUSAL, heads=(4, 2)),
    "one-key": Case((67, 1), head_dims=(8, 8)),
    "bf16": Case((35, 50), heads=(1, 1), dtype=BF16, head_dims=(32, 32), window=CAUSAL),
    "fp16-heads-inside": Case((50, 35), dtype=FP16, head_dims=(16, 32), heads_inside=True),
    "causal-long-keys": Case((37, 66), head_dims=(24, 8), window=CAUSAL, heads=(2, 1), batch=2),
    # The first rows see nothing.
    "causal-short-keys": Case((66, 37), window=CAUSAL, heads=(2, 1)),
    "causal-top-left": Case((40, 66), heads=(1, 1), window=CAUSAL, top_left=True),
    # Loads by pointers, with columns to mask.
    "odd-head-dims": Case((34, 45), heads=(1, 1), head_dims=(13, 7), window=CAUSAL),
    "head-dim-1": Case((20, 33), heads=(1, 1), head_dims=(1, 1), dtype=FP16),
    "window": Case((70, 70), heads=(1, 1), window=(9, 3)),
    "window-left": Case((60, 68), heads=(1, 1), window=(20, -1), dtype=FP16),
    # One key more or less would be another number of whole blocks, at either end, in every kernel.
    "window-at-block-ends": Case((70, 84), window=(60, 0), heads=(1, 1)),
    "window-nothing": Case((64, 20), heads=(1, 1), window=(3, 5)),
    # The head dim in pieces, the last of them partly masked.
    "fp32-pieces": Case((34, 45), heads=(2, 1), head_dims=(75, 40), window=CAUSAL),
    "fp32-pieces-bias": Case((34, 45), heads=(1, 1), head_dims=(40, 70), bias=(1, 1, 34, 45)),
    "fp32-pieces-heads-inside": Case((20, 33), head_dims=(33, 33), heads_inside=True),
    # The backward kernels have one loop from 64 on.
    "wide-window": Case((50, 60), window=(12, 4), head_dims=(64, 64), dtype=FP16, heads=(1, 1)),
    "softcap": Case((40, 50), heads=(1, 1), softcap=2.0, window=CAUSAL),
    "softcap-fp16": Case((33, 40), heads=(1, 1), softcap=20.0, scale=3.0, dtype=FP16),
    "alibi": Case((40, 50), alibi=1, window=CAUSAL),
    "alibi-batch": Case((30, 20), alibi=2, batch=2, heads=(2, 1)),
    "sinks": Case((40, 20), sinks=True, window=CAUSAL, heads=(4, 2)),
    "bias": Case((34, 45), bias=(1, 2, 34, 45)),
    "bias-heads": Case((34, 45), bias=(2, 1, 34, 45), batch=2, dtype=BF16, window=CAUSAL),
    "bias-keys-fp32": Case((34, 45), bias=(1, 1, 1, 45), dtype=FP16, bias_dtype=FP32, batch=2),
    "bias-rows": Case((34, 45), bias=(1, 2, 34, 1), softcap=3.0, window=CAUSAL),
    "bias-bool": Case((34, 45), bias=(2, 1, 34, 45), bias_dtype=torch.bool, batch=2),
    "bias-bool-padding": Case((34, 45), bias=(2, 1, 1, 45), bias_dtype=torch.bool, batch=2),
    "dropout": Case((40, 50), dropout_p=0.3, heads=(2, 1), batch=2),
    "dropout-causal-bias": Case(
        (33, 33), heads=(1, 1), dropout_p=0.5, window=CAUSAL, bias=(1, 1, 33, 33)
    ),
    "negative-scale": Case((33, 40), heads=(1, 1), scale=-0.7, sinks=True),
    "zero-scale": Case((33, 40), heads=(1, 1), scale=0.0, window=CAUSAL),
    "everything": Case(
        (34, 24),
        heads=(2, 1),
        batch=2,
        softcap=4.0,
        window=(20, 6),
        alibi=1,
        sinks=True,
        bias=(2, 1, 34, 24),
        dropout_p=0.2,
    ),
}


def gradients(case: Case, tensors: dict, dtype: torch.dtype, grad_output, grad_lse):
    """Plain torch's output, lse and gradients by name."""
    leaves = {
        name: t.detach().to(torch.float64 if dtype is torch.float64 else t.dtype).requires_grad_()
        for name, t in tensors.items()
        if t is not None
        and t.is_floating_point()
        and name in ("query", "key", "value", "bias", "sinks")
    }
    output, lse = case.plain(tensors | leaves, dtype)
    seen = lse.isfinite()
    total = (output * grad_output.to(output.dtype)).sum()
    if grad_lse is not None:
        total = total + (lse[seen] * grad_lse.to(lse.dtype)[seen]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return output.detach(), lse.detach(), dict(zip(leaves, grads, strict=True))


def check(case: Case, device: str, tensors: dict | None = None, grad_lse: bool = True) -> dict:
    """Output, lse and every gradient within the error budget; returns the error ratios."""
    tensors = tensors or case.make(device)
    output, lse = case.forward(tensors)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator).to(device, case.dtype)
    grad_row = torch.randn(lse.shape, generator=generator).to(device) if grad_lse else None
    wide, wide_lse, wide_grads = gradients(case, tensors, torch.float64, grad_output, grad_row)
    low, low_lse, low_grads = gradients(case, tensors, case.dtype, grad_output, grad_row)
    assert lse.dtype is FP32 and lse.is_contiguous()
    heads_inside = case.heads_inside and output.numel() > 0
    assert (output.transpose(1, 2) if heads_inside else output).is_contiguous()
    ratios = {"output": assert_within_budget(output, low, wide, OUTPUT_BUDGET, "output")}
    assert torch.equal(lse.isinf(), wide_lse.isinf())
    ratios["lse"] = assert_within_budget(lse, low_lse.float(), wide_lse, OUTPUT_BUDGET, "lse")
    grads = case.backward(tensors, grad_output, grad_row, output, lse)
    for name, grad in zip(("query", "key", "value", "bias", "sinks"), grads, strict=True):
        if name not in wide_grads:
            assert grad.shape == (0,)
            continue
        assert grad.shape == tensors[name].shape and grad.dtype is tensors[name].dtype
        ratios[name] = assert_within_budget(
            grad, low_grads[name], wide_grads[name], GRADIENT_BUDGET, f"grad_{name}"
        )
    return ratios


def check_varlen(case: Case, device: str, lengths: list[tuple[int, int]], tail: int = 0) -> None:
    """Sequences of these lengths, and rows of none after them, equal the dense op one by one."""
    lengths_q, lengths_k = zip(*lengths, strict=True)
    totals = sum(lengths_q) + tail, sum(lengths_k) + tail
    options = case.options
    whole = Case(totals, case.heads, case.head_dims, 1, case.dtype).make(device, seed=3)
    query, key, value = (whole[name][0].transpose(0, 1) for name in ("query", "key", "value"))
    # A neighbour's values must not leak, not even times zero.
    for tensor in (query, key, value):
        tensor[tensor.size(0) - tail :] = float("nan")
    extra = Case((1, 1), case.heads, batch=len(lengths), alibi=case.alibi, sinks=case.sinks)
    extra = extra.make(device, seed=4)
    rng_state = case.make(device)["rng_state"]
    ends = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lengths_q, lengths_k)]
    given = (*ends, max(lengths_q), max(lengths_k), extra["alibi_slopes"], extra["sinks"])
    output, lse = attention_varlen.forward(query, key, value, *given, rng_state, *options)
    generator = torch.Generator().manual_seed(5)
    grad_output = torch.randn(output.shape, generator=generator).to(device, case.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(device)
    mask = (True, True, True, case.sinks)
    grads = attention_varlen.backward(
        grad_output, grad_lse, query, key, value, output, lse, *given, rng_state, *options, mask
    )
    assert output.shape == (totals[0], case.heads[0], case.head_dims[1])
    used = sum(lengths_q), sum(lengths_k)
    assert (output[used[0] :] == 0).all() and (lse[:, used[0] :] == float("-inf")).all()
    assert (grads[0][used[0] :] == 0).all()
    assert (grads[1][used[1] :] == 0).all() and (grads[2][used[1] :] == 0).all()
    sink_gradients = [[], []]
    for b, (n, m) in enumerate(lengths):
        rows = slice(sum(lengths_q[:b]), sum(lengths_q[: b + 1]))
        keys = slice(sum(lengths_k[:b]), sum(lengths_k[: b + 1]))
        if n == 0:
            assert (grads[1][keys] == 0).all() and (grads[2][keys] == 0).all()
            continue
        mine = output[rows], lse[:, rows], grads[0][rows], grads[1][keys], grads[2][keys]
        if m == 0:
            assert (mine[0] == 0).all() and (mine[2] == 0).all()
            assert torch.equal(mine[1].isfinite(), torch.full_like(mine[1], case.sinks).bool())
            continue
        alone = {
            "query": query[rows].transpose(0, 1)[None],
            "key": key[keys].transpose(0, 1)[None],
            "value": value[keys].transpose(0, 1)[None],
            "bias": None,
            "alibi_slopes": extra["alibi_slopes"],
            "sinks": extra["sinks"],
            "rng_state": rng_state,
        }
        if case.alibi == 2:
            alone["alibi_slopes"] = extra["alibi_slopes"][b]
        one = _Numbered(**{**case.__dict__, "seqlens": (n, m), "batch": 1})
        one.number = b
        upstream = grad_output[rows].transpose(0, 1)[None], grad_lse[:, rows][None]
        low, low_lse, low_grads = gradients(one, alone, case.dtype, *upstream)
        wide, wide_lse, wide_grads = gradients(one, alone, torch.float64, *upstream)
        results = {"output": (mine[0], low, wide)}
        for name, grad in zip(("query", "key", "value"), mine[2:], strict=True):
            results[name] = (grad, low_grads[name], wide_grads[name])
        for name, (got, low_one, wide_one) in results.items():
            got = got.transpose(0, 1)[None]
            assert_within_budget(got, low_one, wide_one, GRADIENT_BUDGET, f"{name} of {b}")
        assert_within_budget(mine[1][None], low_lse.float(), wide_lse, OUTPUT_BUDGET, f"lse of {b}")
        if case.sinks:
            sink_gradients[0].append(low_grads["sinks"])
            sink_gradients[1].append(wide_grads["sinks"])
    if case.sinks and all(m for n, m in lengths if n):
        low_sum, wide_sum = (torch.stack(g).sum(0) for g in sink_gradients)
        assert_within_budget(grads[3], low_sum.float(), wide_sum, GRADIENT_BUDGET, "grad_sinks")


class _Numbered(Case):
    """A sequence of a batch: its dropout counts from its own number on."""

    number = 0

    def plain(self, tensors: dict, dtype: torch.dtype, first: int = 0):
        return super().plain(tensors, dtype, self.number)
