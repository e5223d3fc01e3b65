"""The gradient of attention's bias, reduced over the dimensions in which the bias is broadcast."""

import triton
import triton.language as tl

from .attention_backward_kernels import padded_start, probabilities
from .attention_tile import Rows, kept, load_rows, locate, row_products, rows_of


@triton.jit
def attention_backward_bias_kernel(
    query_rows,  # descriptors, or None
    key_rows,
    value_rows,
    grad_rows,
    query,  # Strided (batch, heads, seqlen_q, D)
    key,  # (batch, kv heads, seqlen_k, D)
    value,  # (batch, kv heads, seqlen_k, DV)
    grad_output,  # (batch, heads, seqlen_q, DV)
    grad_bias,  # (parts, batch, heads, seqlen_q, seqlen_k), 1 where summed
    lse2,  # (batch, heads, padded rows)
    delta,
    sizes,
    terms,
    batches,
    tiles,  # that a part sums, at most
    F: tl.constexpr,
    SUM_BATCH: tl.constexpr,
    SUM_HEAD: tl.constexpr,
    SUM_ROW: tl.constexpr,
    SUM_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for a part of the sum of a tile. Parts and what they sum come in a fixed order."""
    row_blocks = tl.cdiv(sizes.seqlen_q, BLOCK_M)
    column_blocks = tl.cdiv(sizes.seqlen_k, BLOCK_N)
    # How many of each the result keeps, and how many go into one sum.
    kept_columns, columns = (1, column_blocks) if SUM_COLUMN else (column_blocks, 1)
    kept_rows, rows = (1, row_blocks) if SUM_ROW else (row_blocks, 1)
    kept_heads, heads = (1, sizes.heads) if SUM_HEAD else (sizes.heads, 1)
    kept_batches, summed_batches = (1, batches) if SUM_BATCH else (batches, 1)

    pid = tl.program_id(0)
    own_column = pid % kept_columns
    own_row = pid // kept_columns % kept_rows
    rest = pid // kept_columns // kept_rows
    own_head = rest % kept_heads
    own_batch = rest // kept_heads % kept_batches
    part = rest // kept_heads // kept_batches
    total = columns * rows * heads * summed_batches

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, total)):
        j0 = (own_column + tile % columns) * BLOCK_N
        i0 = (own_row + tile // columns % rows) * BLOCK_M
        rest = tile // columns // rows
        head = own_head + rest % heads
        batch = own_batch + rest // heads
        acc += bias_tile(
            query_rows,
            key_rows,
            value_rows,
            grad_rows,
            query,
            key,
            value,
            grad_output,
            lse2,
            delta,
            batch,
            head,
            i0,
            j0,
            sizes,
            terms,
            BLOCK_M,
            BLOCK_N,
            F,
        )

    flat = tl.cast((part * kept_batches + own_batch) * kept_heads + own_head, tl.int64)
    row = own_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = own_column * BLOCK_N + tl.arange(0, BLOCK_N)
    length = 1 if SUM_ROW else sizes.seqlen_q
    width = 1 if SUM_COLUMN else sizes.seqlen_k
    if SUM_ROW:
        acc = tl.sum(acc, 0)[None, :]
        row = tl.zeros((1,), tl.int32)
    if SUM_COLUMN:
        acc = tl.sum(acc, 1)[:, None]
        column = tl.zeros((1,), tl.int32)
    pointers = grad_bias + ((flat * length + row.to(tl.int64)) * width)[:, None] + column[None, :]
    mask = (row < length)[:, None] & (column < width)[None, :]
    tl.store(pointers, acc.to(grad_bias.dtype.element_ty), mask=mask)


@triton.jit
def bias_tile(
    query_rows,
    key_rows,
    value_rows,
    grad_rows,
    query,
    key,
    value,
    grad_output,
    lse2,
    delta,
    batch,
    head,
    i0,
    j0,
    sizes,
    terms,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) of the gradient of one head's scores."""
    place = locate(batch, head, sizes, terms, F)
    rows, keys, kv_head = sizes.seqlen_q, sizes.seqlen_k, head // F.GROUP
    kv_heads = sizes.heads // F.GROUP
    query_rows = rows_of(query_rows, query, batch, 0, rows, sizes.heads, BLOCK_M, F.D, F.BLOCK_D, F)
    grad_rows = rows_of(
        grad_rows, grad_output, batch, 0, rows, sizes.heads, BLOCK_M, F.DV, F.BLOCK_DV, F
    )
    key_rows = rows_of(key_rows, key, batch, 0, keys, kv_heads, BLOCK_N, F.D, F.BLOCK_D, F)
    value_rows = rows_of(value_rows, value, batch, 0, keys, kv_heads, BLOCK_N, F.DV, F.BLOCK_DV, F)
    if F.PIECE > 0:
        q = Rows(query_rows, query, head, i0, rows)
        k = Rows(key_rows, key, kv_head, j0, keys)
        score = row_products(q, k, BLOCK_M, BLOCK_N, F.D, F.BLOCK_D, F)
        do = Rows(grad_rows, grad_output, head, i0, rows)
        v = Rows(value_rows, value, kv_head, j0, keys)
        dp = row_products(do, v, BLOCK_M, BLOCK_N, F.DV, F.BLOCK_DV, F)
    else:
        q = load_rows(query_rows, query, batch, head, i0, rows, BLOCK_M, F.D, F.BLOCK_D, True, F)
        k = load_rows(key_rows, key, batch, kv_head, j0, keys, BLOCK_N, F.D, F.BLOCK_D, True, F)
        do = load_rows(
            grad_rows, grad_output, batch, head, i0, rows, BLOCK_M, F.DV, F.BLOCK_DV, True, F
        )
        v = load_rows(
            value_rows, value, batch, kv_head, j0, keys, BLOCK_N, F.DV, F.BLOCK_DV, True, F
        )
        score = tl.dot(q, k.T, input_precision=F.PRECISION)
        dp = tl.dot(do, v.T, input_precision=F.PRECISION)
    row = i0 + tl.arange(0, BLOCK_M)
    start = padded_start(place, sizes, F)
    row_lse2 = tl.load(lse2 + start + row)
    row_delta = tl.load(delta + start + row)
    i, j = row[:, None], (j0 + tl.arange(0, BLOCK_N))[None, :]
    p, _ = probabilities(score, row_lse2[:, None], i, j, place, terms, True, F)
    if F.DROPOUT:
        keep = kept(i0, j0, place, sizes, terms, BLOCK_M, BLOCK_N, False)
        dp = tl.where(keep, dp * terms.keep_scale, 0.0)
    return p * (dp - row_delta[:, None])
