"""What every attention kernel does with a tile: where it lies, loads, logits, masks and dropout.

Index tensors `i` (queries) and `j` (keys) broadcast against a tile, so the same code serves scores
(queries, keys) and their transpose.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A (batch, heads, rows, width) tensor with unit last stride, or (rows, heads, width): packed."""

    pointer: Any
    batch: Any  # strides
    head: Any
    row: Any


class Sizes(NamedTuple):
    blocks: Any  # tiles along the sequence that the grid runs over
    heads: Any
    seqlen_q: Any  # the longest of packed sequences
    seqlen_k: Any
    lse_batch: Any  # strides of lse
    lse_head: Any
    rows_batch: Any  # strides of the padded rows that backward prepares
    rows_head: Any


class Terms(NamedTuple):
    """Run-time terms of a score; pointers that are not needed are any pointer."""

    scale: Any
    scale2: Any  # scale * log2(e)
    softcap_scale: Any  # scale / softcap
    softcap2: Any  # softcap * log2(e)
    left: Any  # the window
    right: Any
    alibi_slopes: Any  # (batch, heads)
    alibi_batch: Any
    bias: Any  # (batch, heads, queries, keys)
    bias_batch: Any
    bias_head: Any
    bias_row: Any
    bias_column: Any
    sinks: Any  # (heads,)
    rng_state: Any  # (seed, offset)
    threshold: Any  # of 32 bits: a word below it drops
    keep_scale: Any  # 1 / (1 - dropout_p)
    cu_seqlens_q: Any  # (batch + 1,)
    cu_seqlens_k: Any


class Flags(NamedTuple):
    """What is compiled in."""

    VARLEN: bool
    LOADS: str  # "host" or "device" descriptors, or "pointers"
    FOLDED: bool  # the score needs nothing but a positive scale, which joins the exponent
    SOFTCAP: bool
    ALIBI: bool
    BIAS: str  # "none", "float" or "bool"
    SINKS: bool
    DROPOUT: bool
    LEFT: bool  # bounded by a window
    RIGHT: bool
    TOP_LEFT: bool
    GROUP: int  # query heads per key head
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    PRECISION: str
    PIECE: int  # columns of the head dim that a product of rows takes at a time, 0 for all
    PRECISE: bool  # tanh to float32's last bits
    WIDE: bool  # row offsets in 64 bits
    UPCAST: bool  # the interpreter multiplies no bfloat16


class Rows(NamedTuple):
    """Rows of one head, from `row` on; by pointers."""

    view: Any
    tensor: Any
    head: Any
    row: Any
    rows: Any  # how many there are


class Place(NamedTuple):
    """The sequence and the head a program works on."""

    batch: Any
    head: Any
    start_q: Any  # first row, of packed sequences
    start_k: Any
    seqlen_q: Any
    seqlen_k: Any
    shift: Any  # the diagonal: query i faces key i + shift
    slope: Any  # ALiBi's, * log2(e)
    bias: Any  # of this head
    seed: Any
    offset: Any


@triton.jit
def locate(batch, head, sizes, terms, F: tl.constexpr):
    start_q, start_k = 0, 0
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    if F.VARLEN:
        start_q = tl.load(terms.cu_seqlens_q + batch)
        start_k = tl.load(terms.cu_seqlens_k + batch)
        seqlen_q = tl.load(terms.cu_seqlens_q + batch + 1) - start_q
        seqlen_k = tl.load(terms.cu_seqlens_k + batch + 1) - start_k
    shift = 0 if F.TOP_LEFT else seqlen_k - seqlen_q
    seed, offset = 0, 0
    if F.DROPOUT:
        seed = tl.load(terms.rng_state)
        offset = tl.load(terms.rng_state + 1).to(tl.uint32)
    slope, bias = head_terms(batch, head, terms, F)
    return Place(
        batch,
        head,
        start_q,
        start_k,
        seqlen_q,
        seqlen_k,
        shift,
        slope,
        bias,
        seed,
        offset,
    )


@triton.jit
def head_terms(batch, head, terms, F: tl.constexpr):
    """The head's ALiBi slope and its bias."""
    slope = 0.0
    if F.ALIBI:
        slope = tl.load(terms.alibi_slopes + batch * terms.alibi_batch + head) * LOG2E
    bias = terms.bias
    if F.BIAS != "none":
        bias += batch.to(tl.int64) * terms.bias_batch + head.to(tl.int64) * terms.bias_head
    return slope, bias


@triton.jit
def at_head(place, head, sizes, terms, F: tl.constexpr):
    """The same sequence, another head."""
    slope, bias = head_terms(place.batch, head, terms, F)
    return Place(
        place.batch,
        head,
        place.start_q,
        place.start_k,
        place.seqlen_q,
        place.seqlen_k,
        place.shift,
        slope,
        bias,
        place.seed,
        place.offset,
    )


@triton.jit
def rows_of(
    descriptor,
    tensor,
    batch,
    start,
    rows,
    heads,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    F: tl.constexpr,
):
    """What `load_rows` reads from: `rows` rows of one sequence, all heads."""
    base = tensor.pointer
    if F.LOADS != "host":
        base += tl.cast(batch, tl.int64) * tensor.batch + tl.cast(start, tl.int64) * tensor.row
    if F.LOADS == "host":
        return descriptor
    elif F.LOADS == "device":
        return tl.make_tensor_descriptor(
            base,
            # A sequence of no rows is never read, but has a descriptor.
            [heads, tl.maximum(rows, 1), WIDTH],
            [tensor.head.to(tl.int64), tensor.row.to(tl.int64), 1],
            [1, BLOCK, BLOCK_WIDTH],
        )
    else:
        return base


@triton.jit
def load_rows(
    view,
    tensor,
    batch,
    head,
    row,
    rows,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BOUNDED: tl.constexpr,
    F: tl.constexpr,
):
    """(BLOCK, BLOCK_WIDTH) from `row` on, zeros past the end; BOUNDED: it may pass the last row."""
    if F.LOADS == "host":
        tile = view.load([batch, head, row, 0]).reshape(BLOCK, BLOCK_WIDTH)
    elif F.LOADS == "device":
        tile = view.load([head, row, 0]).reshape(BLOCK, BLOCK_WIDTH)
    else:
        index = row + tl.arange(0, BLOCK)
        column = tl.arange(0, BLOCK_WIDTH)
        offset = offsets(index, tensor.row, F)[:, None] + column[None, :]
        pointers = view + tl.cast(head, tl.int64) * tensor.head + offset
        if BOUNDED and WIDTH != BLOCK_WIDTH:
            tile = tl.load(
                pointers, mask=(index < rows)[:, None] & (column < WIDTH)[None, :], other=0.0
            )
        elif BOUNDED:
            tile = tl.load(pointers, mask=(index < rows)[:, None], other=0.0)
        elif WIDTH != BLOCK_WIDTH:
            tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    if F.UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def row_products(
    x,  # Rows
    y,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    F: tl.constexpr,
):
    """(BLOCK_X, BLOCK_Y): rows times rows, F.PIECE columns at a time.

    Whole float32 tiles are held as their TF32 parts, which at head dim 128 is more than there are registers.
    """
    STEP: tl.constexpr = min(F.PIECE, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for first in range(0, BLOCK_WIDTH, STEP):
        a = load_columns(x, first, BLOCK_X, STEP, WIDTH, F)
        b = load_columns(y, first, BLOCK_Y, STEP, WIDTH, F)
        total = tl.dot(a, b.T, total, input_precision=F.PRECISION)
    return total


@triton.jit
def load_columns(
    x, first, BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr
):
    index = x.row + tl.arange(0, BLOCK)
    column = first + tl.arange(0, STEP)
    base = x.view + tl.cast(x.head, tl.int64) * x.tensor.head
    pointers = base + offsets(index, x.tensor.row, F)[:, None] + column[None, :]
    mask = (index < x.rows)[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(
    tensor,
    tile,
    batch,
    head,
    start,
    row,
    rows,
    WIDTH: tl.constexpr,
    F: tl.constexpr,
):
    """Stores the tile's rows before `rows`, of a sequence that starts at row `start`."""
    index = row + tl.arange(0, tile.shape[0])
    column = tl.arange(0, tile.shape[1])
    base = tensor.pointer + tl.cast(batch, tl.int64) * tensor.batch
    base += tl.cast(head, tl.int64) * tensor.head + tl.cast(start, tl.int64) * tensor.row
    mask = (index < rows)[:, None] & (column < WIDTH)[None, :]
    pointers = base + offsets(index, tensor.row, F)[:, None] + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def offsets(index, stride, F: tl.constexpr):
    if F.WIDE:
        index = index.to(tl.int64)
    return index * stride


@triton.jit
def narrow(tile, pointer, F: tl.constexpr):
    """Rounds to the dtype that is multiplied."""
    tile = tile.to(pointer.dtype.element_ty)
    if F.UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh with an absolute error of 1e-7; PRECISE: a relative one."""
    value = 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)
    if PRECISE:
        # Cephes' minimax polynomial below 0.625, where the other form cancels.
        z = x * x
        series = -5.70498872745e-3
        series = series * z + 2.06390887954e-2
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        value = tl.where(tl.abs(x) < 0.625, x + x * z * series, value)
    return value


@triton.jit
def exponent_unit(terms, F: tl.constexpr):
    """What a logit is multiplied by to be an exponent of two."""
    if F.FOLDED:
        return terms.scale2
    else:
        return 1.0


@triton.jit
def logits(score, i, j, place, terms, F: tl.constexpr):
    """Logits, in units of `exponent_unit`, and the derivative of the soft cap."""
    slope = 1.0
    if F.FOLDED:
        logit = score
    elif F.SOFTCAP:
        capped = tanh(score * terms.softcap_scale, F.PRECISE)
        logit = capped * terms.softcap2
        slope = 1 - capped * capped
    else:
        logit = score * terms.scale2
    if F.ALIBI:
        logit -= place.slope * tl.abs(i + place.shift - j).to(tl.float32)
    if F.BIAS != "none":
        pointers = place.bias + offsets(i, terms.bias_row, F) + offsets(j, terms.bias_column, F)
        inside = (i < place.seqlen_q) & (j < place.seqlen_k)
        bias = tl.load(pointers, mask=inside, other=0)
        if F.BIAS == "bool":
            logit = tl.where(bias != 0, logit, float("-inf"))
        else:
            logit += bias.to(tl.float32) * LOG2E
    return logit, slope


@triton.jit
def visible(i, j, place, terms, F: tl.constexpr):
    # Joining the bounds, or leaving out one that is known to hold, spills more.
    seen = j < place.seqlen_k
    if F.RIGHT:
        seen = seen & (j <= i + (place.shift + terms.right))
    if F.LEFT:
        seen = seen & (j >= i + (place.shift - terms.left))
    return seen


@triton.jit
def kept(i0, j0, place, sizes, terms, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which of the M x N probabilities from (i0, j0) on dropout keeps; j0 is a multiple of 4.

    One Philox call gives four words, those of four neighbouring keys.
    """
    i = i0 + tl.arange(0, M)
    quarter = j0 // 4 + tl.arange(0, N // 4)
    if TRANSPOSED:
        shape: tl.constexpr = (N // 4, M)
        row = tl.broadcast_to(i[None, :], shape)
        column = tl.broadcast_to(quarter[:, None], shape)
    else:
        shape: tl.constexpr = (M, N // 4)
        row = tl.broadcast_to(i[:, None], shape)
        column = tl.broadcast_to(quarter[None, :], shape)
    lane = tl.zeros(shape, tl.int32) + (place.batch * sizes.heads + place.head)
    offset = tl.zeros(shape, tl.uint32) + place.offset
    w0, w1, w2, w3 = tl.philox(place.seed, column, row, lane, offset)
    threshold = tl.cast(terms.threshold, tl.uint32)
    w0, w1 = (w0 >= threshold).to(tl.int8), (w1 >= threshold).to(tl.int8)
    w2, w3 = (w2 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if TRANSPOSED:
        return words.permute(0, 2, 3, 1).reshape(N, M) != 0
    else:
        return words.reshape(M, N) != 0


@triton.jit
def key_blocks(i0, place, terms, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Blocks of keys that queries [i0, i0 + BLOCK_M) see: first, first and last full ones, end.

    Blocks [first, full) and [full_end, end) need a mask, those between do not.
    """
    low, high = 0, place.seqlen_k
    full_low, full_high = 0, place.seqlen_k
    if F.RIGHT:
        high = tl.minimum(high, i0 + BLOCK_M + place.shift + terms.right)
        full_high = tl.minimum(full_high, i0 + place.shift + terms.right + 1)
    if F.LEFT:
        low = tl.maximum(low, i0 + place.shift - terms.left)
        full_low = tl.maximum(full_low, i0 + BLOCK_M - 1 + place.shift - terms.left)
    first = low // BLOCK_N
    end = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK_N), first)
    full_end = tl.minimum(tl.maximum(tl.maximum(full_high, 0) // BLOCK_N, first), end)
    full = tl.minimum(tl.maximum(tl.cdiv(full_low, BLOCK_N), first), full_end)
    return first, full, full_end, end


@triton.jit
def query_blocks(j0, place, terms, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Blocks of queries that see keys [j0, j0 + BLOCK_N), as `key_blocks`.

    Queries past the end need no mask, since backward's padded rows give them no weight.
    """
    low, high = 0, place.seqlen_q
    full_low, full_high = 0, place.seqlen_q
    if F.RIGHT:
        low = tl.maximum(low, j0 - place.shift - terms.right)
        full_low = tl.maximum(full_low, j0 + BLOCK_N - 1 - place.shift - terms.right)
    if F.LEFT:
        high = tl.minimum(high, j0 + BLOCK_N - place.shift + terms.left)
        full_high = tl.minimum(full_high, j0 - place.shift + terms.left + 1)
    first = low // BLOCK_M
    end = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK_M), first)
    full_end = end
    if F.LEFT:
        full_end = tl.minimum(tl.maximum(tl.maximum(full_high, 0) // BLOCK_M, first), end)
    full = tl.minimum(tl.maximum(tl.cdiv(full_low, BLOCK_M), first), full_end)
    return first, full, full_end, end
