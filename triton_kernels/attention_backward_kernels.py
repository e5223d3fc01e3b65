"""The backward kernels of attention: one for key and value, one for query, one for what both need.

Scores are computed anew from the saved log-sum-exp. Nothing is added atomically, so results repeat
bit for bit; the price is that scores are computed once for each kernel.
"""

import triton
import triton.language as tl

from .attention_tile import (
    LOG2E,
    Rows,
    at_head,
    exponent_unit,
    kept,
    key_blocks,
    load_rows,
    locate,
    logits,
    narrow,
    offsets,
    query_blocks,
    row_products,
    rows_of,
    store_rows,
    visible,
)

PADDING = tl.constexpr(128)


@triton.jit
def padded_start(place, sizes, F: tl.constexpr):
    """Where the sequence's rows begin in what the first kernel prepares."""
    start = tl.cast(place.batch, tl.int64) * sizes.rows_batch
    start += tl.cast(place.head, tl.int64) * sizes.rows_head
    if F.VARLEN:
        start += (place.start_q // PADDING + place.batch) * PADDING
    return start


@triton.jit
def padded_rows_of(descriptor, rows, place, sizes, BLOCK_M: tl.constexpr, F: tl.constexpr):
    """What `load_padded` reads from: the sequence's rows, all heads."""
    start = tl.cast(place.batch, tl.int64) * sizes.rows_batch
    if F.VARLEN:
        start += (place.start_q // PADDING + place.batch) * PADDING
    if F.LOADS == "host":
        return descriptor
    elif F.LOADS == "device":
        return tl.make_tensor_descriptor(
            rows + start,
            [sizes.heads, tl.cdiv(place.seqlen_q, PADDING) * PADDING],
            [sizes.rows_head.to(tl.int64), 1],
            [1, BLOCK_M],
        )
    else:
        return rows + start


@triton.jit
def load_padded(view, batch, head, i0, sizes, BLOCK_M: tl.constexpr, F: tl.constexpr):
    """(BLOCK_M,) from row i0 on. Boxes where there are any: pointers cost registers."""
    if F.LOADS == "host":
        return view.load([batch * sizes.heads + head, i0]).reshape(BLOCK_M)
    elif F.LOADS == "device":
        return view.load([head, i0]).reshape(BLOCK_M)
    else:
        start = tl.cast(head, tl.int64) * sizes.rows_head + i0
        return tl.load(view + start + tl.arange(0, BLOCK_M))


@triton.jit
def attention_backward_rows_kernel(
    grad_output,  # Strided (batch, heads, seqlen_q, DV)
    output,
    lse,  # (batch, heads, seqlen_q)
    grad_lse,  # the same, or None
    lse2,  # (batch, heads, padded rows): lse * log2(e), +inf where a row has no weight
    delta,  # the same: sum of grad_output * output, less grad_lse
    sizes,
    terms,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid = tl.program_id(0)
    i0 = pid % sizes.blocks * BLOCK_M
    head = pid // sizes.blocks % sizes.heads
    batch = pid // sizes.blocks // sizes.heads
    place = locate(batch, head, sizes, terms, F)
    if i0 >= tl.cdiv(place.seqlen_q, PADDING) * PADDING:
        return
    i = i0 + tl.arange(0, BLOCK_M)
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    column = tl.arange(0, BLOCK_DV)
    valid = i < place.seqlen_q
    mask = valid[:, None] & (column < F.DV)[None, :]
    product = tl.full((BLOCK_M, BLOCK_DV), 1.0, tl.float32)
    for side in tl.static_range(2):
        tensor = grad_output if side == 0 else output
        base = tensor.pointer + tl.cast(batch, tl.int64) * tensor.batch
        base += (
            tl.cast(head, tl.int64) * tensor.head + tl.cast(place.start_q, tl.int64) * tensor.row
        )
        pointers = base + offsets(i, tensor.row, F)[:, None] + column[None, :]
        product *= tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    row_sum = tl.sum(product, 1)
    flat = tl.cast(batch, tl.int64) * sizes.lse_batch + tl.cast(head, tl.int64) * sizes.lse_head
    flat += place.start_q
    row_lse = tl.load(lse + flat + i, mask=valid, other=float("-inf"))
    if grad_lse is not None:
        row_sum -= tl.load(grad_lse + flat + i, mask=valid, other=0.0)
    weightless = row_lse == float("-inf")
    start = padded_start(place, sizes, F)
    tl.store(lse2 + start + i, tl.where(weightless, float("inf"), row_lse * LOG2E))
    tl.store(delta + start + i, tl.where(weightless, 0.0, row_sum))


@triton.jit
def probabilities(score, lse2, i, j, place, terms, MASKED: tl.constexpr, F: tl.constexpr):
    """Probabilities before dropout, and the derivative of the soft cap."""
    logit, slope = logits(score, i, j, place, terms, F)
    p = tl.exp2(logit * exponent_unit(terms, F) - lse2)
    if MASKED:
        p = tl.where(visible(i, j, place, terms, F), p, 0.0)
    return p, slope


@triton.jit
def score_gradient(p, dp, delta, keep, slope, terms, F: tl.constexpr):
    """Gradient of scale * q . k."""
    if F.DROPOUT:
        dp = tl.where(keep, dp * terms.keep_scale, 0.0)
    ds = p * (dp - delta)
    if F.SOFTCAP:
        ds *= slope
    return ds


@triton.jit
def add_queries(
    dk,  # (BLOCK_N, BLOCK_D)
    dv,  # (BLOCK_N, BLOCK_DV)
    k,  # tiles, or with F.PIECE Rows
    v,
    query_rows,
    grad_rows,
    query,
    grad_output,
    lse2_rows,
    delta_rows,
    place,
    sizes,
    terms,
    kv_head,
    j0,
    first,
    end,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    F: tl.constexpr,
):
    """Query blocks [first, end) of every head of the group."""
    BLOCK_N: tl.constexpr = dk.shape[0]
    j = (j0 + tl.arange(0, BLOCK_N))[:, None]
    count = end - first
    if count > 0:
        tl.assume(count > 0)
        for step in range(count * F.GROUP):
            head = kv_head * F.GROUP
            block = first + step
            here = place
            if F.GROUP > 1:
                head += step // count
                block = first + step % count
                here = at_head(place, head, sizes, terms, F)
            i0 = block * BLOCK_M
            row = i0 + tl.arange(0, BLOCK_M)
            q = load_rows(
                query_rows,
                query,
                place.batch,
                head,
                i0,
                place.seqlen_q,
                BLOCK_M,
                F.D,
                F.BLOCK_D,
                True,
                F,
            )
            do = load_rows(
                grad_rows,
                grad_output,
                place.batch,
                head,
                i0,
                place.seqlen_q,
                BLOCK_M,
                F.DV,
                F.BLOCK_DV,
                True,
                F,
            )
            row_lse2 = load_padded(lse2_rows, place.batch, head, i0, sizes, BLOCK_M, F)
            row_delta = load_padded(delta_rows, place.batch, head, i0, sizes, BLOCK_M, F)
            if F.PIECE > 0:
                rows = Rows(query_rows, query, head, i0, place.seqlen_q)
                score = row_products(k, rows, BLOCK_N, BLOCK_M, F.D, F.BLOCK_D, F)
                rows = Rows(grad_rows, grad_output, head, i0, place.seqlen_q)
                dp = row_products(v, rows, BLOCK_N, BLOCK_M, F.DV, F.BLOCK_DV, F)
            else:
                score = tl.dot(k, q.T, input_precision=F.PRECISION)
                dp = tl.dot(v, do.T, input_precision=F.PRECISION)
            p, slope = probabilities(
                score, row_lse2[None, :], row[None, :], j, here, terms, MASKED, F
            )
            keep = 1
            used = p
            if F.DROPOUT:
                keep = kept(i0, j0, here, sizes, terms, BLOCK_M, BLOCK_N, True)
                used = tl.where(keep, p, 0.0)
            dv = tl.dot(narrow(used, grad_output.pointer, F), do, dv, input_precision=F.PRECISION)
            ds = score_gradient(p, dp, row_delta[None, :], keep, slope, terms, F)
            dk = tl.dot(narrow(ds, query.pointer, F), q, dk, input_precision=F.PRECISION)
    return dk, dv


@triton.jit
def attention_backward_key_kernel(
    query_rows,  # descriptors, or None
    key_rows,
    value_rows,
    grad_rows,
    lse2_rows,
    delta_rows,
    query,  # Strided (batch, heads, seqlen_q, D)
    key,  # (batch, kv heads, seqlen_k, D)
    value,  # (batch, kv heads, seqlen_k, DV)
    grad_output,  # (batch, heads, seqlen_q, DV)
    grad_key,
    grad_value,
    lse2,  # (batch, heads, padded rows)
    delta,
    sizes,
    terms,
    F: tl.constexpr,
    SPLIT: tl.constexpr,  # whether blocks that need no mask have a loop of their own
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of key and value: one program for BLOCK_N keys of a key head."""
    pid = tl.program_id(0)
    kv_heads = sizes.heads // F.GROUP
    j0 = pid % sizes.blocks * BLOCK_N
    kv_head = pid // sizes.blocks % kv_heads
    batch = pid // sizes.blocks // kv_heads
    place = locate(batch, kv_head * F.GROUP, sizes, terms, F)
    if j0 >= place.seqlen_k:
        return
    rows, keys, heads = place.seqlen_q, place.seqlen_k, sizes.heads
    query_rows = rows_of(
        query_rows, query, batch, place.start_q, rows, heads, BLOCK_M, F.D, F.BLOCK_D, F
    )
    grad_rows = rows_of(
        grad_rows, grad_output, batch, place.start_q, rows, heads, BLOCK_M, F.DV, F.BLOCK_DV, F
    )
    key_rows = rows_of(
        key_rows, key, batch, place.start_k, keys, kv_heads, BLOCK_N, F.D, F.BLOCK_D, F
    )
    value_rows = rows_of(
        value_rows, value, batch, place.start_k, keys, kv_heads, BLOCK_N, F.DV, F.BLOCK_DV, F
    )
    lse2_rows = padded_rows_of(lse2_rows, lse2, place, sizes, BLOCK_M, F)
    delta_rows = padded_rows_of(delta_rows, delta, place, sizes, BLOCK_M, F)
    if F.PIECE > 0:
        k = Rows(key_rows, key, kv_head, j0, keys)
        v = Rows(value_rows, value, kv_head, j0, keys)
    else:
        k = load_rows(key_rows, key, batch, kv_head, j0, keys, BLOCK_N, F.D, F.BLOCK_D, True, F)
        v = load_rows(
            value_rows, value, batch, kv_head, j0, keys, BLOCK_N, F.DV, F.BLOCK_DV, True, F
        )
    first, full, full_end, end = query_blocks(j0, place, terms, BLOCK_M, BLOCK_N, F)

    if (F.LEFT or F.RIGHT) and not SPLIT:
        full = end
        full_end = end
    BLOCK_D: tl.constexpr = F.BLOCK_D
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    if F.RIGHT or (F.LEFT and not SPLIT):
        dk, dv = add_queries(
            dk,
            dv,
            k,
            v,
            query_rows,
            grad_rows,
            query,
            grad_output,
            lse2_rows,
            delta_rows,
            place,
            sizes,
            terms,
            kv_head,
            j0,
            first,
            full,
            True,
            BLOCK_M,
            F,
        )
    if SPLIT or not (F.LEFT or F.RIGHT):
        dk, dv = add_queries(
            dk,
            dv,
            k,
            v,
            query_rows,
            grad_rows,
            query,
            grad_output,
            lse2_rows,
            delta_rows,
            place,
            sizes,
            terms,
            kv_head,
            j0,
            full,
            full_end,
            False,
            BLOCK_M,
            F,
        )
    if F.LEFT and SPLIT:
        dk, dv = add_queries(
            dk,
            dv,
            k,
            v,
            query_rows,
            grad_rows,
            query,
            grad_output,
            lse2_rows,
            delta_rows,
            place,
            sizes,
            terms,
            kv_head,
            j0,
            full_end,
            end,
            True,
            BLOCK_M,
            F,
        )
    if F.DROPOUT:
        dv *= terms.keep_scale
    dk *= terms.scale
    store_rows(grad_key, dk, batch, kv_head, place.start_k, j0, keys, F.D, F)
    store_rows(grad_value, dv, batch, kv_head, place.start_k, j0, keys, F.DV, F)


@triton.jit
def add_keys(
    dq,  # (BLOCK_M, BLOCK_D)
    q,  # tiles, or with F.PIECE Rows
    do,
    row_lse2,
    row_delta,
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
    """Key blocks [first, end)."""
    BLOCK_M: tl.constexpr = dq.shape[0]
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    kv_head = place.head // F.GROUP
    if end > first:
        tl.assume(end > first)
        for block in range(first, end):
            j0 = block * BLOCK_N
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            k = load_rows(
                key_rows,
                key,
                place.batch,
                kv_head,
                j0,
                place.seqlen_k,
                BLOCK_N,
                F.D,
                F.BLOCK_D,
                MASKED,
                F,
            )
            if F.PIECE > 0:
                rows = Rows(key_rows, key, kv_head, j0, place.seqlen_k)
                score = row_products(q, rows, BLOCK_M, BLOCK_N, F.D, F.BLOCK_D, F)
                rows = Rows(value_rows, value, kv_head, j0, place.seqlen_k)
                dp = row_products(do, rows, BLOCK_M, BLOCK_N, F.DV, F.BLOCK_DV, F)
            else:
                v = load_rows(
                    value_rows,
                    value,
                    place.batch,
                    kv_head,
                    j0,
                    place.seqlen_k,
                    BLOCK_N,
                    F.DV,
                    F.BLOCK_DV,
                    MASKED,
                    F,
                )
                score = tl.dot(q, k.T, input_precision=F.PRECISION)
                dp = tl.dot(do, v.T, input_precision=F.PRECISION)
            p, slope = probabilities(score, row_lse2[:, None], i, j, place, terms, MASKED, F)
            keep = 1
            if F.DROPOUT:
                keep = kept(i0, j0, place, sizes, terms, BLOCK_M, BLOCK_N, False)
            ds = score_gradient(p, dp, row_delta[:, None], keep, slope, terms, F)
            dq = tl.dot(narrow(ds, key.pointer, F), k, dq, input_precision=F.PRECISION)
    return dq


@triton.jit
def attention_backward_query_kernel(
    query_rows,  # descriptors, or None
    key_rows,
    value_rows,
    grad_rows,
    query,  # Strided (batch, heads, seqlen_q, D)
    key,  # (batch, kv heads, seqlen_k, D)
    value,  # (batch, kv heads, seqlen_k, DV)
    grad_output,  # (batch, heads, seqlen_q, DV)
    grad_query,
    lse2,  # (batch, heads, padded rows)
    delta,
    sizes,
    terms,
    F: tl.constexpr,
    SPLIT: tl.constexpr,  # whether blocks that need no mask have a loop of their own
    TAIL: tl.constexpr,  # whether the last block of keys may be a part
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of the query: one program for BLOCK_M queries of a head."""
    pid = tl.program_id(0)
    i0 = (sizes.blocks - 1 - pid % sizes.blocks) * BLOCK_M
    head = pid // sizes.blocks % sizes.heads
    batch = pid // sizes.blocks // sizes.heads
    place = locate(batch, head, sizes, terms, F)
    if i0 >= place.seqlen_q:
        return
    rows, keys = place.seqlen_q, place.seqlen_k
    heads, kv_heads = sizes.heads, sizes.heads // F.GROUP
    query_rows = rows_of(
        query_rows, query, batch, place.start_q, rows, heads, BLOCK_M, F.D, F.BLOCK_D, F
    )
    grad_rows = rows_of(
        grad_rows, grad_output, batch, place.start_q, rows, heads, BLOCK_M, F.DV, F.BLOCK_DV, F
    )
    key_rows = rows_of(
        key_rows, key, batch, place.start_k, keys, kv_heads, BLOCK_N, F.D, F.BLOCK_D, F
    )
    value_rows = rows_of(
        value_rows, value, batch, place.start_k, keys, kv_heads, BLOCK_N, F.DV, F.BLOCK_DV, F
    )
    if F.PIECE > 0:
        q = Rows(query_rows, query, head, i0, rows)
        do = Rows(grad_rows, grad_output, head, i0, rows)
    else:
        q = load_rows(query_rows, query, batch, head, i0, rows, BLOCK_M, F.D, F.BLOCK_D, True, F)
        do = load_rows(
            grad_rows, grad_output, batch, head, i0, rows, BLOCK_M, F.DV, F.BLOCK_DV, True, F
        )
    start = padded_start(place, sizes, F)
    i = i0 + tl.arange(0, BLOCK_M)
    row_lse2 = tl.load(lse2 + start + i)
    row_delta = tl.load(delta + start + i)
    first, full, full_end, end = key_blocks(i0, place, terms, BLOCK_M, BLOCK_N, F)

    MASKED: tl.constexpr = F.LEFT or F.RIGHT or TAIL
    if MASKED and not SPLIT:
        full = first
        full_end = first
    BLOCK_D: tl.constexpr = F.BLOCK_D
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if F.LEFT and SPLIT:
        dq = add_keys(
            dq,
            q,
            do,
            row_lse2,
            row_delta,
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
    if SPLIT or not MASKED:
        dq = add_keys(
            dq,
            q,
            do,
            row_lse2,
            row_delta,
            key_rows,
            value_rows,
            key,
            value,
            place,
            sizes,
            terms,
            i0,
            full,
            full_end,
            False,
            BLOCK_N,
            F,
        )
    if MASKED:
        dq = add_keys(
            dq,
            q,
            do,
            row_lse2,
            row_delta,
            key_rows,
            value_rows,
            key,
            value,
            place,
            sizes,
            terms,
            i0,
            full_end,
            end,
            True,
            BLOCK_N,
            F,
        )
    store_rows(grad_query, dq * terms.scale, batch, head, place.start_q, i0, rows, F.D, F)
