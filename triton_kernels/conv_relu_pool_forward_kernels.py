"""The forward kernels of the fused convolution, activation and pooling: implicit GEMM on tensor
cores.

Both compute the transposed product: accumulator[channel, pixel] = weight[channel, k] @ input[k,
pixel]. `conv_relu_pool_forward_tma_kernel` loads boxes of a channels_last input by TMA;
`conv_relu_pool_forward_gather_kernel` takes every other case by pointers.
"""

import triton
import triton.language as tl

from .conv_relu_pool_tile import (
    activate,
    box_start,
    box_windows,
    clamp_places,
    finish_windows,
    load_bias,
    passes,
    store_pooled,
    window_size,
)


@triton.jit(do_not_specialize=["P", "Q", "PO", "QO", "N", "TILES_H", "TILES_W"])
def conv_relu_pool_forward_tma_kernel(
    input_desc,  # (N, H, W, C), boxes (TN, TH, TW, BK)
    weight_desc,  # (R * S * K, C), boxes (BN, BK)
    bias,  # (K,)
    output,  # (N, K, PO, QO) in either format
    codes,
    slope,
    N,
    K,
    P,
    Q,
    PO,
    QO,
    TILES_H,
    TILES_W,
    C: tl.constexpr,  # channels a group
    GROUP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POOL: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLIPPED: tl.constexpr,
    CODED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    M: tl.constexpr = TN * TH * TW
    Y: tl.constexpr = TH // POOL_STRIDE_H
    X: tl.constexpr = TW // POOL_STRIDE_W
    ROWS: tl.constexpr = (TH - WINDOW_H) // POOL_STRIDE_H + 1
    COLUMNS: tl.constexpr = (TW - WINDOW_W) // POOL_STRIDE_W + 1
    CHANNEL_BLOCKS: tl.constexpr = (C + BK - 1) // BK
    OUT_BLOCKS: tl.constexpr = (GROUP_K + BN - 1) // BN

    # Blocks of output channels run fastest, so that neighbours share the input box in the L2 cache.
    pid = tl.program_id(0)
    out_block = pid % OUT_BLOCKS
    rest = pid // OUT_BLOCKS
    group = rest % GROUPS
    rest = rest // GROUPS
    n0, i0, j0 = box_start(rest, TILES_H, TILES_W, TN, ROWS, COLUMNS)
    p0 = i0 * POOL_STRIDE_H - POOL_PAD_H
    q0 = j0 * POOL_STRIDE_W - POOL_PAD_W
    k0 = group * GROUP_K + out_block * BN

    # The trip count is a constant: ptxas serialises the wgmma of a loop that it cannot count.
    accumulator = tl.zeros((BN, M), tl.float32)
    for step in range(R * S * CHANNEL_BLOCKS):
        tap = step // CHANNEL_BLOCKS
        c0 = (step % CHANNEL_BLOCKS) * BK
        h0 = p0 + (tap // S) * DILATION_H - PAD_H
        w0 = q0 + (tap % S) * DILATION_W - PAD_W
        # Outside the image TMA fills in zeros, which is the padding.
        pixels = input_desc.load([n0, h0, w0, group * C + c0]).reshape(M, BK)
        weights = weight_desc.load([tap * K + k0, c0])
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weights = weights.to(tl.float32)
        accumulator = tl.dot(weights, pixels.T, accumulator, input_precision=PRECISION)

    channels = k0 + tl.arange(0, BN)
    channel_valid = out_block * BN + tl.arange(0, BN) < GROUP_K
    m = tl.arange(0, M)
    p = p0 + m // TW % TH
    q = q0 + m % TW
    value, code = finish_windows(
        accumulator,
        load_bias(bias, channels, channel_valid, HAS_BIAS),
        slope,
        (p >= 0) & (p < P) & (q >= 0) & (q < Q),
        CLIPPED,
        TN,
        Y,
        X,
        POOL_STRIDE_H,
        POOL_STRIDE_W,
        WINDOW_H,
        WINDOW_W,
        ACTIVATION,
        POOL,
        CODED,
    )
    n, i, j, valid = box_windows(n0, i0, j0, N, PO, QO, TN, Y, X, ROWS, COLUMNS)
    if POOL == "avg":
        places = window_size(
            i,
            j,
            P,
            Q,
            WINDOW_H,
            WINDOW_W,
            POOL_STRIDE_H,
            POOL_STRIDE_W,
            POOL_PAD_H,
            POOL_PAD_W,
        )
        value = value / places[None, :]
    if POOL == "max" and CODED and POOL_PAD_H + POOL_PAD_W > 0:
        code = clamp_places(
            code, i, j, WINDOW_W, POOL_STRIDE_H, POOL_STRIDE_W, POOL_PAD_H, POOL_PAD_W
        )
    store_pooled(
        output,
        codes,
        value,
        code,
        channels,
        channel_valid,
        n,
        i,
        j,
        valid,
        K,
        PO,
        QO,
        CHANNELS_LAST,
        CODED,
        WIDE,
    )


@triton.jit
def gather_product(
    input,
    weight,  # (K, R * S * C), channels fastest
    image,  # (M,) offset of each pixel's image and group
    h0,  # (M,) input row of the pixel's first tap
    w0,
    inside,  # (M,)
    H,
    W,
    row_stride,
    column_stride,
    channel_stride,
    weight_row,  # (BN,) offset of each output channel's weights
    channel_valid,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The convolution at M pixels by pointers: (BN, M), float32."""
    CHANNEL_BLOCKS: tl.constexpr = (C + BK - 1) // BK
    STEPS: tl.constexpr = (R * S * C + BK - 1) // BK if FLAT else R * S * CHANNEL_BLOCKS
    corner = image + h0 * row_stride + w0 * column_stride
    k = tl.arange(0, BK)
    accumulator = tl.zeros((weight_row.shape[0], h0.shape[0]), tl.float32)
    for step in range(STEPS):
        if FLAT:
            flat = step * BK + k
            c = flat % C
            r = flat // (C * S) * DILATION_H
            s = flat // C % S * DILATION_W
            h = h0[None, :] + r[:, None]
            w = w0[None, :] + s[:, None]
            k_valid = flat < R * S * C
            offset = c * channel_stride + r * row_stride + s * column_stride
            pixel_offset = corner[None, :] + offset[:, None]
            valid = inside[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        else:
            tap = step // CHANNEL_BLOCKS
            c = (step % CHANNEL_BLOCKS) * BK + k
            flat = tap * C + c
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            h = h0 + r
            w = w0 + s
            k_valid = c < C
            start = corner + (r * row_stride + s * column_stride)
            pixel_offset = start[None, :] + (c * channel_stride)[:, None]
            valid = (inside & (h >= 0) & (h < H) & (w >= 0) & (w < W))[None, :]
        pixels = tl.load(input + pixel_offset, mask=valid & k_valid[:, None], other=0.0)
        weights = tl.load(
            weight + weight_row[:, None] + flat[None, :],
            mask=channel_valid[:, None] & k_valid[None, :],
            other=0.0,
        )
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weights = weights.to(tl.float32)
        accumulator = tl.dot(weights, pixels, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "PO", "QO", "TILES_H", "TILES_W"])
def conv_relu_pool_forward_gather_kernel(
    input,  # (N, GROUPS * C, H, W) in either format
    weight,  # (K, R * S * C), channels fastest
    bias,  # (K,)
    output,  # (N, K, PO, QO) in either format
    codes,
    slope,
    N,
    H,
    W,
    K,
    P,
    Q,
    PO,
    QO,
    TILES_H,
    TILES_W,
    C: tl.constexpr,  # channels a group
    GROUP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POOL: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLIPPED: tl.constexpr,
    CODED: tl.constexpr,
    INPUT_CHANNELS_LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    # A tile is BM windows in order ("run"), a box of TN x TH x TW pixels ("box"), or one place of
    # each of BM windows, the places following each other ("place").
    TILE: tl.constexpr,
    FLAT: tl.constexpr,  # whether taps and channels are one reduction axis, for few channels
    BM: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    OUT_BLOCKS: tl.constexpr = (GROUP_K + BN - 1) // BN

    pid = tl.program_id(0)
    out_block = pid % OUT_BLOCKS
    rest = pid // OUT_BLOCKS
    group = rest % GROUPS
    block = rest // GROUPS
    if WIDE:
        block = block.to(tl.int64)
        group = group.to(tl.int64)

    if TILE == "box":
        Y: tl.constexpr = TH // POOL_STRIDE_H
        X: tl.constexpr = TW // POOL_STRIDE_W
        ROWS: tl.constexpr = (TH - WINDOW_H) // POOL_STRIDE_H + 1
        COLUMNS: tl.constexpr = (TW - WINDOW_W) // POOL_STRIDE_W + 1
        n0, i0, j0 = box_start(block, TILES_H, TILES_W, TN, ROWS, COLUMNS)
        m = tl.arange(0, TN * TH * TW)
        n = n0 + m // (TH * TW)
        p = i0 * POOL_STRIDE_H - POOL_PAD_H + m // TW % TH
        q = j0 * POOL_STRIDE_W - POOL_PAD_W + m % TW
    else:
        # (windows / X, window row, X, window column): there both mma layouts keep a window within
        # one thread.
        X: tl.constexpr = 16 if BM >= 16 else BM
        TILE_H: tl.constexpr = WINDOW_H if TILE == "run" else 1
        TILE_W: tl.constexpr = WINDOW_W if TILE == "run" else 1
        m = tl.arange(0, BM * TILE_H * TILE_W)
        index = block * BM + m // (TILE_W * X * TILE_H) * X + m // TILE_W % X
        n = index // (PO * QO)
        p = index // QO % PO * POOL_STRIDE_H - POOL_PAD_H + m // (TILE_W * X) % TILE_H
        q = index % QO * POOL_STRIDE_W - POOL_PAD_W + m % TILE_W
    image = n * H * W * (C * GROUPS)
    image += group * C if INPUT_CHANNELS_LAST else group * C * H * W
    if INPUT_CHANNELS_LAST:
        row_stride = W * (C * GROUPS)
        column_stride = C * GROUPS
        channel_stride = 1
    else:
        row_stride = W
        column_stride = 1
        channel_stride = H * W
        if WIDE:
            channel_stride = channel_stride.to(tl.int64)

    channels = out_block * BN + tl.arange(0, BN)
    channel_valid = channels < GROUP_K
    channels += group * GROUP_K
    weight_row = channels.to(tl.int64) if WIDE else channels
    weight_row = weight_row * (R * S * C)
    shift = load_bias(bias, channels, channel_valid, HAS_BIAS)

    if TILE != "place":
        inside = (n < N) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        accumulator = gather_product(
            input,
            weight,
            image,
            p * STRIDE_H - PAD_H,
            q * STRIDE_W - PAD_W,
            inside,
            H,
            W,
            row_stride,
            column_stride,
            channel_stride,
            weight_row,
            channel_valid,
            C,
            R,
            S,
            DILATION_H,
            DILATION_W,
            FLAT,
            BK,
            PRECISION,
            UPCAST,
        )
        value, code = finish_windows(
            accumulator,
            shift,
            slope,
            inside,
            CLIPPED,
            TN if TILE == "box" else BM // X,
            Y if TILE == "box" else 1,
            X,
            POOL_STRIDE_H if TILE == "box" else WINDOW_H,
            POOL_STRIDE_W if TILE == "box" else WINDOW_W,
            WINDOW_H,
            WINDOW_W,
            ACTIVATION,
            POOL,
            CODED,
        )
    else:
        value = tl.full((BN, BM), float("-inf") if POOL == "max" else 0.0, tl.float32)
        code = tl.zeros((BN, BM), tl.int32)
        for place in range(WINDOW_H * WINDOW_W):
            y = p + place // WINDOW_W
            x = q + place % WINDOW_W
            inside = (n < N) & (y >= 0) & (y < P) & (x >= 0) & (x < Q)
            accumulator = gather_product(
                input,
                weight,
                image,
                y * STRIDE_H - PAD_H,
                x * STRIDE_W - PAD_W,
                inside,
                H,
                W,
                row_stride,
                column_stride,
                channel_stride,
                weight_row,
                channel_valid,
                C,
                R,
                S,
                DILATION_H,
                DILATION_W,
                FLAT,
                BK,
                PRECISION,
                UPCAST,
            )
            element = accumulator + shift
            # Taken before activation, so that a negative slope is no special case.
            through = passes(element, ACTIVATION).to(tl.int32)
            element = activate(element, slope, ACTIVATION)
            if POOL == "max":
                # The window's first element within the image wins even if it is -inf.
                first = (y == tl.maximum(p, 0)) & (x == tl.maximum(q, 0))
                later = (element > value) | (element != element) | first[None, :]
                later = later & inside[None, :]
                value = tl.where(later, element, value)
                code = tl.where(later, place + (through << 7), code)
            else:
                value += tl.where(inside[None, :], element, 0.0)
                code |= tl.where(inside[None, :], through << place, 0)

    if TILE == "box":
        n, i, j, valid = box_windows(n0, i0, j0, N, PO, QO, TN, Y, X, ROWS, COLUMNS)
    else:
        index = block * BM + tl.arange(0, BM)
        n = index // (PO * QO)
        i = index // QO % PO
        j = index % QO
        valid = n < N
    if POOL == "avg":
        places = window_size(
            i,
            j,
            P,
            Q,
            WINDOW_H,
            WINDOW_W,
            POOL_STRIDE_H,
            POOL_STRIDE_W,
            POOL_PAD_H,
            POOL_PAD_W,
        )
        value = value / places[None, :]
    if POOL == "max" and CODED and POOL_PAD_H + POOL_PAD_W > 0:
        code = clamp_places(
            code, i, j, WINDOW_W, POOL_STRIDE_H, POOL_STRIDE_W, POOL_PAD_H, POOL_PAD_W
        )
    store_pooled(
        output,
        codes,
        value,
        code,
        channels,
        channel_valid,
        n,
        i,
        j,
        valid,
        K,
        PO,
        QO,
        CHANNELS_LAST,
        CODED,
        WIDE,
    )
