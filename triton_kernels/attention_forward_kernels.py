"""The forward kernel of attention: one program for BLOCK_M queries of a head.

Online softmax (Milakov and Gimelshein 2018; Dao 2023) over the keys from the last to the first. The
product with the values lags a step behind the scores: that of block j runs while the softmax of
block j - 1 is computed, whose probabilities are carried to the next step.
"""

import triton
import triton.language as tl

from .attention_tile import (
    LN2,
    LOG2E,
    Rows,
    exponent_unit,
    kept,
    key_blocks,
    load_rows,
    locate,
    logits,
    narrow,
    row_products,
    rows_of,
    store_rows,
    visible,
)


@triton.jit
def scores(
    q,  # (BLOCK_M, BLOCK_D), or with F.PIECE Rows
    key_rows,
    key,
    place,
    j0,
    BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    if F.PIECE > 0:
        k = Rows(key_rows, key, place.head // F.GROUP, j0, place.seqlen_k)
        return row_products(q, k, BLOCK_M, BLOCK_N, F.D, F.BLOCK_D, F)
    else:
        k = load_rows(
            key_rows,
            key,
            place.batch,
            place.head // F.GROUP,
            j0,
            place.seqlen_k,
            BLOCK_N,
            F.D,
            F.BLOCK_D,
            BOUNDED,
            F,
        )
        return tl.dot(q, k.T, input_precision=F.PRECISION)


@triton.jit
def soften(
    score,  # (BLOCK_M, BLOCK_N)
    top,  # (BLOCK_M,), running maximum of the logits
    total,  # (BLOCK_M,), running sum of the probabilities
    place,
    sizes,
    terms,
    i0,
    j0,
    MASKED: tl.constexpr,
    F: tl.constexpr,
):
    """Probabilities (after dropout) of keys from j0 on, what rescales those before, new sums."""
    BLOCK_M: tl.constexpr = score.shape[0]
    BLOCK_N: tl.constexpr = score.shape[1]
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    logit, _ = logits(score, i, j, place, terms, F)
    if MASKED:
        logit = tl.where(visible(i, j, place, terms, F), logit, float("-inf"))
    unit = exponent_unit(terms, F)
    new_top = tl.maximum(top, tl.max(logit, 1))
    reference = new_top
    if MASKED or F.BIAS != "none":
        # A row that has seen nothing: -inf - -inf would be NaN.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(logit * unit - (reference * unit)[:, None])
    rescale = tl.exp2((top - reference) * unit)
    total = total * rescale + tl.sum(p, 1)
    if F.DROPOUT:
        p = tl.where(kept(i0, j0, place, sizes, terms, BLOCK_M, BLOCK_N, False), p, 0.0)
    return p, rescale, new_top, total


@triton.jit
def add_values(
    acc,  # (BLOCK_M, BLOCK_DV)
    p,  # (BLOCK_M, BLOCK_N)
    rescale,  # (BLOCK_M,)
    value_rows,
    value,
    place,
    j0,
    BOUNDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    v = load_rows(
        value_rows,
        value,
        place.batch,
        place.head // F.GROUP,
        j0,
        place.seqlen_k,
        BLOCK_N,
        F.DV,
        F.BLOCK_DV,
        BOUNDED,
        F,
    )
    acc = acc * rescale[:, None]
    return tl.dot(narrow(p, value.pointer, F), v, acc, input_precision=F.PRECISION)


@triton.jit
def walk(
    acc,
    p,
    rescale,
    top,
    total,
    q,
    key_rows,
    value_rows,
    key,
    value,
    place,
    sizes,
    terms,
    i0,
    first,
    end,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """Blocks end - 1 down to first; on entry and on exit the last block's values are still due."""
    for step in range(end - first):
        j0 = (end - 1 - step) * BLOCK_N
        score = scores(q, key_rows, key, place, j0, MASKED, acc.shape[0], BLOCK_N, F)
        # Block j + 1 may be the last one.
        acc = add_values(acc, p, rescale, value_rows, value, place, j0 + BLOCK_N, True, BLOCK_N, F)
        p, rescale, top, total = soften(score, top, total, place, sizes, terms, i0, j0, MASKED, F)
    return acc, p, rescale, top, total


@triton.jit
def attention_forward_kernel(
    query_rows,  # descriptors, or None
    key_rows,
    value_rows,
    query,  # Strided (batch, heads, seqlen_q, D)
    key,  # (batch, kv heads, seqlen_k, D)
    value,  # (batch, kv heads, seqlen_k, DV)
    output,  # (batch, heads, seqlen_q, DV)
    lse,  # (batch, heads, seqlen_q), float32
    sizes,
    terms,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last blocks of a head, which see most under a causal mask, come first.
    pid = tl.program_id(0)
    block = sizes.blocks - 1 - pid % sizes.blocks
    head = pid // sizes.blocks % sizes.heads
    batch = pid // sizes.blocks // sizes.heads
    place = locate(batch, head, sizes, terms, F)
    i0 = block * BLOCK_M
    if i0 >= place.seqlen_q:
        return
    kv_heads = sizes.heads // F.GROUP
    query_rows = rows_of(
        query_rows,
        query,
        batch,
        place.start_q,
        place.seqlen_q,
        sizes.heads,
        BLOCK_M,
        F.D,
        F.BLOCK_D,
        F,
    )
    key_rows = rows_of(
        key_rows, key, batch, place.start_k, place.seqlen_k, kv_heads, BLOCK_N, F.D, F.BLOCK_D, F
    )
    value_rows = rows_of(
        value_rows,
        value,
        batch,
        place.start_k,
        place.seqlen_k,
        kv_heads,
        BLOCK_N,
        F.DV,
        F.BLOCK_DV,
        F,
    )
    if F.PIECE > 0:
        q = Rows(query_rows, query, head, i0, place.seqlen_q)
    else:
        q = load_rows(
            query_rows, query, batch, head, i0, place.seqlen_q, BLOCK_M, F.D, F.BLOCK_D, True, F
        )
    first, full, full_end, end = key_blocks(i0, place, terms, BLOCK_M, BLOCK_N, F)

    unit = exponent_unit(terms, F)
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if F.SINKS:
        # A key of this logit and no value, seen before all others.
        sink = tl.load(terms.sinks + head) * LOG2E / unit
        top = tl.zeros((BLOCK_M,), tl.float32) + sink
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    if end > first:
        j0 = (end - 1) * BLOCK_N
        score = scores(q, key_rows, key, place, j0, True, BLOCK_M, BLOCK_N, F)
        p, rescale, top, total = soften(score, top, total, place, sizes, terms, i0, j0, True, F)
        last = end - 1
        if F.RIGHT:
            masked = tl.minimum(full_end, last)
            acc, p, rescale, top, total = walk(
                acc,
                p,
                rescale,
                top,
                total,
                q,
                key_rows,
                value_rows,
                key,
                value,
                place,
                sizes,
                terms,
                i0,
                masked,
                last,
                True,
                BLOCK_N,
                F,
            )
            last = masked
        full = tl.minimum(full, last)
        acc, p, rescale, top, total = walk(
            acc,
            p,
            rescale,
            top,
            total,
            q,
            key_rows,
            value_rows,
            key,
            value,
            place,
            sizes,
            terms,
            i0,
            full,
            last,
            False,
            BLOCK_N,
            F,
        )
        if F.LEFT:
            acc, p, rescale, top, total = walk(
                acc,
                p,
                rescale,
                top,
                total,
                q,
                key_rows,
                value_rows,
                key,
                value,
                place,
                sizes,
                terms,
                i0,
                first,
                full,
                True,
                BLOCK_N,
                F,
            )
        acc = add_values(
            acc, p, rescale, value_rows, value, place, first * BLOCK_N, True, BLOCK_N, F
        )

    scale = 1 / total
    if F.DROPOUT:
        scale = terms.keep_scale / total
    # A row that saw nothing.
    nothing = total == 0
    acc = tl.where(nothing[:, None], 0.0, acc * scale[:, None])
    store_rows(output, acc, batch, head, place.start_q, i0, place.seqlen_q, F.DV, F)
    i = i0 + tl.arange(0, BLOCK_M)
    lse += tl.cast(batch, tl.int64) * sizes.lse_batch + tl.cast(head, tl.int64) * sizes.lse_head
    tl.store(
        lse + place.start_q + i,
        (top * unit + tl.log2(total)) * LN2,
        mask=i < place.seqlen_q,
    )
