"""What both forward kernels do with a tile once its convolution is summed: activation, pooling,
codes, the store.

Tiles are (output channels, pixels), and the pixels are ordered so that the window's elements meet
within a thread.
"""

import triton
import triton.language as tl


@triton.jit
def activate(value, slope, ACTIVATION: tl.constexpr):
    # The comparison is false for NaN, which so passes.
    if ACTIVATION == "relu":
        return tl.where(value <= 0, 0.0, value)
    elif ACTIVATION == "leaky_relu":
        return tl.where(value > 0, value, value * slope)
    else:
        return value


@triton.jit
def passes(value, ACTIVATION: tl.constexpr):
    """Whether the gradient passes whole; of a value before activation or, if slope >= 0, after."""
    if ACTIVATION == "relu":
        return (value <= 0) == 0
    elif ACTIVATION == "leaky_relu":
        return value > 0
    else:
        return tl.full(value.shape, 1, tl.int1)


@triton.jit
def fold(
    first,
    second,
    first_code,
    second_code,
    shift: tl.constexpr,
    POOL: tl.constexpr,
    CODED: tl.constexpr,
):
    """Joins two parts of a window, `second` lying `shift` places further in row-major order."""
    if POOL == "max":
        if CODED:
            # The first of equals wins, and the last NaN.
            later = (second > first) | (second != second)
            value = tl.where(later, second, first)
            code = tl.where(later, second_code + shift, first_code)
        else:
            value = tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)
            code = first_code
    else:
        value = first + second
        code = first_code | (second_code << shift)
    return value, code


@triton.jit
def place_codes(value, ACTIVATION: tl.constexpr, POOL: tl.constexpr):
    """The code of a window of one element: place 0, or where sums keep one per place, its pass bit."""
    if POOL == "max":
        return tl.zeros(value.shape, tl.int32)
    else:
        return passes(value, ACTIVATION).to(tl.int32)


@triton.jit
def following(value, AXIS: tl.constexpr):
    """Each element's right neighbour along the axis; the last one's is itself."""
    SIZE: tl.constexpr = value.shape[AXIS]
    index = tl.minimum(tl.arange(0, SIZE) + 1, SIZE - 1)
    for axis in tl.static_range(len(value.shape)):
        if axis != AXIS:
            index = tl.expand_dims(index, axis)
    return tl.gather(value, tl.broadcast_to(index, value.shape), AXIS)


@triton.jit
def finish_windows(
    value,  # (BN, A * Y * STEP_H * X * STEP_W), the accumulator: A * Y * X windows
    shift,  # (BN, 1), the bias
    slope,
    inside,  # (A * Y * STEP_H * X * STEP_W,), needed where CLIPPED
    CLIPPED: tl.constexpr,
    A: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
    CODED: tl.constexpr,
):
    """Bias, activation and pooling: the windows' values and codes, (BN, A * Y * X).

    Windows are 1 or 2 each way, each STEP_H x STEP_W block of the tile being one; or 3 with a step
    of 2, when a window takes in the edge of the next block and the last one along an axis is not
    valid.
    """
    BN: tl.constexpr = value.shape[0]
    # Rounding is monotonic, so bias and activation can follow the maximum, on fewer values.
    LATE: tl.constexpr = POOL == "max" and not CODED
    if not LATE:
        value = activate(value + shift, slope, ACTIVATION)
    if CLIPPED:
        value = tl.where(inside[None, :], value, float("-inf") if POOL == "max" else 0.0)
    if STEP_W == 2:
        even, odd = tl.split(value.reshape(BN, A * Y * STEP_H * X, 2))
        even_code = place_codes(even, ACTIVATION, POOL)
        odd_code = place_codes(odd, ACTIVATION, POOL)
        value, code = fold(even, odd, even_code, odd_code, 1, POOL, CODED)
        if WINDOW_W == 3:
            edge = following(even.reshape(BN, A * Y * STEP_H, X), 2)
            edge = edge.reshape(BN, A * Y * STEP_H * X)
            edge_code = place_codes(edge, ACTIVATION, POOL)
            value, code = fold(value, edge, code, edge_code, 2, POOL, CODED)
    else:
        code = place_codes(value, ACTIVATION, POOL)
    if STEP_H == 2:
        even, odd = tl.split(value.reshape(BN, A * Y, 2, X).permute(0, 1, 3, 2))
        even_code, odd_code = tl.split(code.reshape(BN, A * Y, 2, X).permute(0, 1, 3, 2))
        value, code = fold(even, odd, even_code, odd_code, WINDOW_W, POOL, CODED)
        if WINDOW_H == 3:
            edge = following(even.reshape(BN, A, Y, X), 2).reshape(BN, A * Y, X)
            edge_code = even_code
            if CODED:
                edge_code = following(even_code.reshape(BN, A, Y, X), 2).reshape(BN, A * Y, X)
            value, code = fold(value, edge, code, edge_code, 2 * WINDOW_W, POOL, CODED)
    value = value.reshape(BN, A * Y * X)
    code = code.reshape(BN, A * Y * X)
    if POOL == "max" and CODED:
        code |= passes(value, ACTIVATION).to(tl.int32) << 7
    if LATE:
        value = activate(value + shift, slope, ACTIVATION)
    return value, code


@triton.jit
def clamp_places(
    code,  # (BN, windows)
    i,  # (windows,)
    j,
    WINDOW_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
):
    """Moves a winner in the padding, which only windows of nothing but -inf have, to the inside."""
    place = code & 127
    y = tl.maximum(place // WINDOW_W, (POOL_PAD_H - i * POOL_STRIDE_H)[None, :])
    x = tl.maximum(place % WINDOW_W, (POOL_PAD_W - j * POOL_STRIDE_W)[None, :])
    return (code & 128) | (y * WINDOW_W + x).to(tl.int32)


@triton.jit
def window_size(
    i,
    j,
    P,
    Q,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
):
    """What an average divides by: the window's places within the padded input."""
    rows = tl.minimum(WINDOW_H, P + 2 * POOL_PAD_H - i * POOL_STRIDE_H)
    columns = tl.minimum(WINDOW_W, Q + 2 * POOL_PAD_W - j * POOL_STRIDE_W)
    # At least 1 for a masked window beyond the end, so that it divides 0 by no 0.
    return (tl.maximum(rows, 1) * tl.maximum(columns, 1)).to(tl.float32)


@triton.jit
def load_bias(bias, channels, channel_valid, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(bias + channels, mask=channel_valid, other=0.0).to(tl.float32)[:, None]
    else:
        return 0.0


@triton.jit
def store_pooled(
    output,
    codes,
    value,  # (BN, pixels)
    code,  # (BN, pixels)
    channels,  # (BN,)
    channel_valid,
    n,  # (pixels,)
    i,
    j,
    pixel_valid,
    K,
    PO,
    QO,
    CHANNELS_LAST: tl.constexpr,
    CODED: tl.constexpr,
    WIDE: tl.constexpr,
):
    if WIDE:
        n = n.to(tl.int64)
        channels = channels.to(tl.int64)
    if CHANNELS_LAST:
        offset = (((n * PO + i) * QO + j) * K)[None, :] + channels[:, None]
    else:
        offset = (n * K * PO * QO + i * QO + j)[None, :] + (channels * (PO * QO))[:, None]
    mask = channel_valid[:, None] & pixel_valid[None, :]
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=mask)
    if CODED:
        tl.store(codes + offset, code.to(tl.uint8), mask=mask)


@triton.jit
def box_start(
    rest,
    TILES_H,
    TILES_W,
    TN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Image, row and column of the first window of a tile that is a box."""
    j0 = rest % TILES_W * COLUMNS
    rest = rest // TILES_W
    i0 = rest % TILES_H * ROWS
    n0 = rest // TILES_H * TN
    return n0, i0, j0


@triton.jit
def box_windows(
    n0,
    i0,
    j0,
    N,
    PO,
    QO,
    TN: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Image, row and column of each window of a box, and whether it is valid: (TN * Y * X,) each.

    Of the Y x X windows of an image only ROWS x COLUMNS are whole; the others belong to the next
    box.
    """
    window = tl.arange(0, TN * Y * X)
    y = window // X % Y
    x = window % X
    n = n0 + window // (Y * X)
    valid = (y < ROWS) & (x < COLUMNS) & (n < N) & (i0 + y < PO) & (j0 + x < QO)
    return n, i0 + y, j0 + x, valid
