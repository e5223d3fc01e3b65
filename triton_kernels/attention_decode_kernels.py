"""The kernels of attention_decode: appending to the cache, attention over parts of the keys, and
joining the parts.
"""

import triton
import triton.language as tl

from .attention_tile import LN2, LOG2E, Place, exponent_unit, logits, narrow, visible


@triton.jit
def cache_offsets(cache, batch, head, position, valid, block_table, table_row, PAGE: tl.constexpr):
    """Where in the cache the positions' rows of one head start; PAGE: keys a page, 0 if not paged."""
    if PAGE > 0:
        table = block_table + tl.cast(batch, tl.int64) * table_row
        page = tl.load(table + position // PAGE, mask=valid, other=0).to(tl.int64)
        offset = page * cache.batch + (position % PAGE).to(tl.int64) * cache.row
    else:
        offset = tl.cast(batch, tl.int64) * cache.batch + position.to(tl.int64) * cache.row
    return offset + tl.cast(head, tl.int64) * cache.head


@triton.jit
def filled_keys(cache_seqlens, batch, capacity, HAS_SEQLENS: tl.constexpr):
    if HAS_SEQLENS:
        return tl.load(cache_seqlens + batch)
    else:
        return capacity


@triton.jit
def attention_decode_append_kernel(
    source,  # Strided (batch, heads, seqlen, WIDTH)
    destination,  # the cache, or with INTO_CACHE false as source
    cos,  # (positions, HALF)
    sin,
    cos_row,  # their strides
    sin_row,
    cache_seqlens,  # (batch,)
    block_table,  # (batch, pages)
    table_row,
    capacity,
    heads,
    seqlen,
    blocks,
    step,  # how far apart the positions of neighbouring rows are: 1, or 0
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,  # half the rotated dimensions, 0 without rotation
    INTERLEAVED: tl.constexpr,
    HAS_SEQLENS: tl.constexpr,
    INTO_CACHE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotates BLOCK_T rows of a head and stores them, behind the cache's filled part if INTO_CACHE."""
    pid = tl.program_id(0)
    head = pid // blocks % heads
    batch = pid // blocks // heads
    row = pid % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    filled = filled_keys(cache_seqlens, batch, capacity, HAS_SEQLENS)
    valid = row < seqlen
    mask = valid[:, None] & (column < WIDTH)[None, :]
    base = source.pointer + tl.cast(batch, tl.int64) * source.batch
    base += tl.cast(head, tl.int64) * source.head + (row.to(tl.int64) * source.row)[:, None]
    tile = tl.load(base + column[None, :], mask=mask, other=0.0)
    if HALF > 0:
        turned = column < 2 * HALF
        if INTERLEAVED:
            index = column // 2
            partner = column ^ 1
            second = column % 2 == 1
        else:
            index = column % HALF
            partner = tl.where(column < HALF, column + HALF, column - HALF)
            second = column >= HALF
        pair = valid[:, None] & turned[None, :]
        position = (filled + step * row).to(tl.int64)
        c = tl.load(cos + (position * cos_row)[:, None] + index[None, :], mask=pair, other=1.0)
        s = tl.load(sin + (position * sin_row)[:, None] + index[None, :], mask=pair, other=0.0)
        other = tl.load(base + partner[None, :], mask=pair, other=0.0).to(tl.float32)
        other = tl.where(second[None, :], other, -other)
        rotated = tile.to(tl.float32) * c.to(tl.float32) + other * s.to(tl.float32)
        tile = tl.where(turned[None, :], rotated, tile.to(tl.float32))
    if INTO_CACHE:
        position = filled + row
        # Seqlens that lie on the device are not checked: nothing is written past the cache.
        valid = valid & (position < capacity)
        offset = cache_offsets(
            destination, batch, head, position, valid, block_table, table_row, PAGE
        )
        mask = valid[:, None] & (column < WIDTH)[None, :]
    else:
        offset = tl.cast(batch, tl.int64) * destination.batch
        offset += tl.cast(head, tl.int64) * destination.head + row.to(tl.int64) * destination.row
    pointers = destination.pointer + offset[:, None] + column[None, :]
    tl.store(pointers, tile.to(destination.pointer.dtype.element_ty), mask=mask)


@triton.jit
def attention_decode_kernel(
    query,  # Strided (batch, heads, seqlen_q, D)
    key_cache,  # Strided (batch or pages, kv heads, capacity or page, D)
    value_cache,
    output,  # Strided (batch, heads, seqlen_q, DV), one for each split
    output_split,  # their strides
    lse,  # (splits, batch, heads, seqlen_q)
    lse_split,
    cache_seqlens,  # (batch,)
    cache_leftpad,  # the same, or None
    block_table,  # (batch, pages)
    table_row,
    capacity,
    appended,
    splits,
    sizes,
    terms,
    F: tl.constexpr,
    HAS_SEQLENS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows, each a query of one of the heads that share a key head, over a split of the keys."""
    pid = tl.program_id(0)
    kv_heads = sizes.heads // F.GROUP
    split = pid // sizes.blocks % splits
    kv_head = pid // sizes.blocks // splits % kv_heads
    batch = pid // sizes.blocks // splits // kv_heads
    row = pid % sizes.blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < F.GROUP * sizes.seqlen_q
    head = tl.minimum(kv_head * F.GROUP + row // sizes.seqlen_q, sizes.heads - 1)
    i = row % sizes.seqlen_q
    seqlen_k = tl.minimum(
        filled_keys(cache_seqlens, batch, capacity, HAS_SEQLENS) + appended, capacity
    )
    shift = seqlen_k - sizes.seqlen_q
    slope = 0.0
    if F.ALIBI:
        slopes = terms.alibi_slopes + batch * terms.alibi_batch
        slope = (tl.load(slopes + head) * LOG2E)[:, None]
    place = Place(batch, kv_head, 0, 0, sizes.seqlen_q, seqlen_k, shift, slope, terms.bias, 0, 0)

    # The blocks of keys that any of the queries sees, and of those this split's.
    low, high = 0, seqlen_k
    padding = 0
    if cache_leftpad is not None:
        padding = tl.load(cache_leftpad + batch)
        low = padding
    if F.LEFT:
        low = tl.maximum(shift - terms.left, low)
    if F.RIGHT:
        high = tl.minimum(high, sizes.seqlen_q + shift + terms.right)
    first = low // BLOCK_N
    count = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK_N) - first, 0)
    share = tl.cdiv(count, splits)
    begin = first + split * share
    end = tl.minimum(begin + share, first + count)

    BLOCK_D: tl.constexpr = F.BLOCK_D
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    column = tl.arange(0, BLOCK_D)
    value_column = tl.arange(0, BLOCK_DV)
    base = tl.cast(batch, tl.int64) * query.batch + head.to(tl.int64) * query.head
    base += i.to(tl.int64) * query.row
    q = tl.load(
        query.pointer + base[:, None] + column[None, :],
        mask=valid[:, None] & (column < F.D)[None, :],
        other=0.0,
    )
    q = narrow(q, query.pointer, F)
    unit = exponent_unit(terms, F)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if F.SINKS:
        # The first split's, or it would count more than once.
        sink = tl.load(terms.sinks + head) * LOG2E / unit
        top = tl.where(split == 0, sink, float("-inf"))
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for block in range(begin, end):
        position = block * BLOCK_N + tl.arange(0, BLOCK_N)
        present = (position < seqlen_k) & (position >= padding)
        offset = cache_offsets(
            key_cache, batch, kv_head, position, present, block_table, table_row, PAGE
        )
        k = tl.load(
            key_cache.pointer + offset[:, None] + column[None, :],
            mask=present[:, None] & (column < F.D)[None, :],
            other=0.0,
        )
        offset = cache_offsets(
            value_cache, batch, kv_head, position, present, block_table, table_row, PAGE
        )
        v = tl.load(
            value_cache.pointer + offset[:, None] + value_column[None, :],
            mask=present[:, None] & (value_column < F.DV)[None, :],
            other=0.0,
        )
        score = tl.dot(q, narrow(k, key_cache.pointer, F).T, input_precision=F.PRECISION)
        j = position[None, :]
        logit, _ = logits(score, i[:, None], j, place, terms, F)
        seen = visible(i[:, None], j, place, terms, F)
        if cache_leftpad is not None:
            seen = seen & (j >= padding)
        logit = tl.where(seen, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logit * unit - (reference * unit)[:, None])
        rescale = tl.exp2((top - reference) * unit)
        total = total * rescale + tl.sum(p, 1)
        acc *= rescale[:, None]
        p = narrow(p, value_cache.pointer, F)
        acc = tl.dot(p, narrow(v, value_cache.pointer, F), acc, input_precision=F.PRECISION)
        top = new_top

    acc = tl.where((total == 0)[:, None], 0.0, acc / total[:, None])
    base = split.to(tl.int64) * output_split + tl.cast(batch, tl.int64) * output.batch
    base += head.to(tl.int64) * output.head + i.to(tl.int64) * output.row
    tl.store(
        output.pointer + base[:, None] + value_column[None, :],
        acc.to(output.pointer.dtype.element_ty),
        mask=valid[:, None] & (value_column < F.DV)[None, :],
    )
    base = split.to(tl.int64) * lse_split + tl.cast(batch, tl.int64) * sizes.lse_batch
    base += head.to(tl.int64) * sizes.lse_head + i
    tl.store(lse + base, (top * unit + tl.log2(total)) * LN2, mask=valid)


@triton.jit
def attention_decode_combine_kernel(
    partial,  # (splits, rows, DV), float32
    partial_lse,  # (splits, rows)
    output,  # Strided (batch, heads, seqlen_q, DV)
    lse,  # (rows,)
    rows,
    splits,
    heads,
    seqlen_q,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least splits
    CHUNK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Joins the splits of one row, weighted by their shares of the sum, in their order."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    logs = tl.load(
        partial_lse + part.to(tl.int64) * rows + row, mask=part < splits, other=float("-inf")
    )
    logs *= LOG2E
    top = tl.max(logs, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logs - reference), 0)
    column = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, splits, CHUNK):
        near = start + tl.arange(0, CHUNK)
        base = near.to(tl.int64) * rows + row
        log = tl.load(partial_lse + base, mask=near < splits, other=float("-inf")) * LOG2E
        mask = (near < splits)[:, None] & (column < DV)[None, :]
        tile = tl.load(partial + base[:, None] * DV + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(tile * tl.exp2(log - reference)[:, None], 0)
    acc = tl.where(total == 0, 0.0, acc / total)
    i = row % seqlen_q
    head = row // seqlen_q % heads
    batch = row // seqlen_q // heads
    base = output.pointer + batch * output.batch + head * output.head + i * output.row
    tl.store(base + column, acc.to(output.pointer.dtype.element_ty), mask=column < DV)
    tl.store(lse + row, (top + tl.log2(total)) * LN2)
