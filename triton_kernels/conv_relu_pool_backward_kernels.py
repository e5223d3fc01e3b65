"""The backward kernels of the fused convolution, activation and pooling.

The gradient before pooling is never written: each tile of it is expanded in registers from the
pooled gradient and the codes of the forward pass. Sums over pixels are split into parts of a fixed
order, so results repeat bit for bit.
"""

import triton
import triton.language as tl

from .conv_relu_pool_tile import passes, window_size


@triton.jit
def expand_gradient(
    grad_output,  # (N, PO, QO, K)
    codes,  # (N, PO, QO, K), the output where BY_OUTPUT
    slope,
    n,  # (pixels,)
    p,  # (pixels,) rows of the convolution's output
    q,
    pixel_valid,
    channels,  # (channels,)
    channel_valid,
    K,
    P,
    Q,
    PO,
    QO,
    ACTIVATION: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
    POOL: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
):
    """The gradient of the convolution's output at those pixels: (channels, pixels), float32."""
    OVERLAP_H: tl.constexpr = (WINDOW_H + POOL_STRIDE_H - 1) // POOL_STRIDE_H
    OVERLAP_W: tl.constexpr = (WINDOW_W + POOL_STRIDE_W - 1) // POOL_STRIDE_W
    total = tl.zeros((channels.shape[0], p.shape[0]), tl.float32)
    for overlap in tl.static_range(OVERLAP_H * OVERLAP_W):
        i = (p + POOL_PAD_H) // POOL_STRIDE_H - overlap // OVERLAP_W
        j = (q + POOL_PAD_W) // POOL_STRIDE_W - overlap % OVERLAP_W
        y = p + POOL_PAD_H - i * POOL_STRIDE_H
        x = q + POOL_PAD_W - j * POOL_STRIDE_W
        inside = pixel_valid & (i >= 0) & (i < PO) & (j >= 0) & (j < QO)
        if WINDOW_H < OVERLAP_H * POOL_STRIDE_H:
            inside = inside & (y < WINDOW_H)
        if WINDOW_W < OVERLAP_W * POOL_STRIDE_W:
            inside = inside & (x < WINDOW_W)
        place = y * WINDOW_W + x
        offset = (((n * PO + i) * QO + j) * K)[None, :] + channels[:, None]
        mask = inside[None, :] & channel_valid[:, None]
        gradient = tl.load(grad_output + offset, mask=mask, other=0.0).to(tl.float32)
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
            gradient = gradient / places[None, :]
        if POOL == "max" or ACTIVATION != "none":
            code = tl.load(codes + offset, mask=mask, other=0)
            # Selected, not multiplied: an infinite gradient that does not pass must not become NaN.
            if BY_OUTPUT:
                through = passes(code.to(tl.float32), ACTIVATION)
                blocked = through == 0
            elif POOL == "max":
                code = code.to(tl.int32)
                through = code == (place | 128)[None, :]
                blocked = code == place[None, :]
            else:
                through = ((code.to(tl.int32) >> place[None, :]) & 1) != 0
                blocked = through == 0
            if ACTIVATION == "leaky_relu":
                gradient = tl.where(blocked, gradient * slope, gradient)
                through = through | blocked
            gradient = tl.where(through, gradient, 0.0)
        total += gradient
    return total


@triton.jit
def opaque(value):
    """The same float32 value, of unknown origin to the compiler.

    On Blackwell it takes a product that a tensor of 8 bits (the codes) went into for one of low
    precision, whatever `input_precision` says.
    """
    return tl.inline_asm_elementwise(
        "mov.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "PO", "QO"])
def conv_relu_pool_backward_input_kernel(
    grad_output,  # (N, PO, QO, K)
    codes,  # (N, PO, QO, K), the output where BY_OUTPUT
    weight,  # (GROUPS * C, R * S * GROUP_K), output channels fastest
    grad_input,  # (N, GROUPS * C, H, W) in either format
    slope,
    N,
    H,
    W,
    K,
    P,
    Q,
    PO,
    QO,
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
    BY_OUTPUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,  # pixels
    BN: tl.constexpr,  # input channels
    BK: tl.constexpr,  # output channels
):
    CHANNEL_BLOCKS: tl.constexpr = (C + BN - 1) // BN
    OUT_BLOCKS: tl.constexpr = (GROUP_K + BK - 1) // BK

    pid = tl.program_id(0)
    channel_block = pid % CHANNEL_BLOCKS
    rest = pid // CHANNEL_BLOCKS
    group = rest % GROUPS
    rest = rest // GROUPS
    # A tile holds pixels of one residue of the stride, since those share their taps.
    residue = rest % (STRIDE_H * STRIDE_W)
    block = rest // (STRIDE_H * STRIDE_W)
    if WIDE:
        block = block.to(tl.int64)
    residue_h = residue // STRIDE_W
    residue_w = residue % STRIDE_W
    rows = (H + STRIDE_H - 1) // STRIDE_H
    columns = (W + STRIDE_W - 1) // STRIDE_W
    index = block * BM + tl.arange(0, BM)
    n = index // (rows * columns)
    h = residue_h + index // columns % rows * STRIDE_H
    w = residue_w + index % columns * STRIDE_W
    pixel_valid = (n < N) & (h < H) & (w < W)

    channels = channel_block * BN + tl.arange(0, BN)
    channel_valid = channels < C
    channels += group * C
    weight_row = channels.to(tl.int64) if WIDE else channels
    weight_row = weight_row * (R * S * GROUP_K)

    accumulator = tl.zeros((BN, BM), tl.float32)
    for step in range(R * S * OUT_BLOCKS):
        tap = step // OUT_BLOCKS
        k = (step % OUT_BLOCKS) * BK + tl.arange(0, BK)
        k_valid = k < GROUP_K
        r = tap // S
        s = tap % S
        # Whether this tap meets the residue at all.
        meets = ((residue_h + PAD_H - r * DILATION_H) % STRIDE_H == 0) & (
            (residue_w + PAD_W - s * DILATION_W) % STRIDE_W == 0
        )
        if meets:
            y = h + PAD_H - r * DILATION_H
            x = w + PAD_W - s * DILATION_W
            p = y // STRIDE_H
            q = x // STRIDE_W
            gradient = expand_gradient(
                grad_output,
                codes,
                slope,
                n,
                p,
                q,
                pixel_valid & (y >= 0) & (p < P) & (x >= 0) & (q < Q),
                group * GROUP_K + k,
                k_valid,
                K,
                P,
                Q,
                PO,
                QO,
                ACTIVATION,
                BY_OUTPUT,
                POOL,
                WINDOW_H,
                WINDOW_W,
                POOL_STRIDE_H,
                POOL_STRIDE_W,
                POOL_PAD_H,
                POOL_PAD_W,
            ).to(weight.dtype.element_ty)
            weights = tl.load(
                weight + weight_row[:, None] + (tap * GROUP_K + k)[None, :],
                mask=channel_valid[:, None] & k_valid[None, :],
                other=0.0,
            )
            if EXACT:
                gradient = opaque(gradient)
            if UPCAST:
                gradient = gradient.to(tl.float32)
                weights = weights.to(tl.float32)
            accumulator = tl.dot(weights, gradient, accumulator, input_precision=PRECISION)

    if WIDE:
        channels = channels.to(tl.int64)
    if CHANNELS_LAST:
        offset = (((n * H + h) * W + w) * (C * GROUPS))[None, :] + channels[:, None]
    else:
        offset = (n * (C * GROUPS) * H * W + h * W + w)[None, :] + (channels * (H * W))[:, None]
    tl.store(
        grad_input + offset,
        accumulator.to(grad_input.dtype.element_ty),
        mask=channel_valid[:, None] & pixel_valid[None, :],
    )


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "PO", "QO", "part_blocks"])
def conv_relu_pool_backward_weight_kernel(
    grad_output,  # (N, PO, QO, K)
    codes,  # (N, PO, QO, K), the output where BY_OUTPUT
    input,  # (N, GROUPS * C, H, W) in either format
    partial,  # (parts, K, R * S * C) float32
    slope,
    part_blocks,  # pixel blocks a part
    N,
    H,
    W,
    K,
    P,
    Q,
    PO,
    QO,
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
    BY_OUTPUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,  # pixels
    BN: tl.constexpr,  # output channels
    BF: tl.constexpr,  # taps and input channels
):
    FLAT: tl.constexpr = R * S * C
    OUT_BLOCKS: tl.constexpr = (GROUP_K + BN - 1) // BN
    FLAT_BLOCKS: tl.constexpr = (FLAT + BF - 1) // BF

    pid = tl.program_id(0)
    out_block = pid % OUT_BLOCKS
    rest = pid // OUT_BLOCKS
    flat_block = rest % FLAT_BLOCKS
    rest = rest // FLAT_BLOCKS
    group = rest % GROUPS
    part = rest // GROUPS
    if WIDE:
        part = part.to(tl.int64)

    k = out_block * BN + tl.arange(0, BN)
    k_valid = k < GROUP_K
    k += group * GROUP_K
    flat = flat_block * BF + tl.arange(0, BF)
    flat_valid = flat < FLAT
    c = flat % C
    tap_h = flat // (C * S) * DILATION_H - PAD_H
    tap_w = flat // C % S * DILATION_W - PAD_W
    if CHANNELS_LAST:
        flat_offset = (tap_h * W + tap_w) * (C * GROUPS) + group * C + c
    else:
        channel = group * C + c
        if WIDE:
            channel = channel.to(tl.int64)
        flat_offset = channel * (H * W) + tap_h * W + tap_w

    # A part is never empty; ptxas serialises the wgmma of a loop that might not run.
    tl.assume(part_blocks > 0)
    accumulator = tl.zeros((BN, BF), tl.float32)
    for block in range(part_blocks):
        index = (part * part_blocks + block) * BM + tl.arange(0, BM)
        n = index // (P * Q)
        p = index // Q % P
        q = index % Q
        pixel_valid = n < N
        gradient = expand_gradient(
            grad_output,
            codes,
            slope,
            n,
            p,
            q,
            pixel_valid,
            k,
            k_valid,
            K,
            P,
            Q,
            PO,
            QO,
            ACTIVATION,
            BY_OUTPUT,
            POOL,
            WINDOW_H,
            WINDOW_W,
            POOL_STRIDE_H,
            POOL_STRIDE_W,
            POOL_PAD_H,
            POOL_PAD_W,
        ).to(input.dtype.element_ty)
        h = (p * STRIDE_H)[:, None] + tap_h[None, :]
        w = (q * STRIDE_W)[:, None] + tap_w[None, :]
        if CHANNELS_LAST:
            corner = ((n * H + p * STRIDE_H) * W + q * STRIDE_W) * (C * GROUPS)
        else:
            corner = n * (C * GROUPS) * H * W + p * STRIDE_H * W + q * STRIDE_W
        valid = pixel_valid[:, None] & flat_valid[None, :]
        valid = valid & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixels = tl.load(input + corner[:, None] + flat_offset[None, :], mask=valid, other=0.0)
        if EXACT:
            gradient = opaque(gradient)
        if UPCAST:
            gradient = gradient.to(tl.float32)
            pixels = pixels.to(tl.float32)
        accumulator = tl.dot(gradient, pixels, accumulator, input_precision=PRECISION)

    row = part * K + k
    offset = (row.to(tl.int64) * FLAT)[:, None] + flat[None, :]
    tl.store(partial + offset, accumulator, mask=k_valid[:, None] & flat_valid[None, :])


@triton.jit(do_not_specialize=["N", "P", "Q", "PO", "QO", "part_blocks"])
def conv_relu_pool_backward_bias_kernel(
    grad_output,  # (N, PO, QO, K)
    codes,  # (N, PO, QO, K), the output where BY_OUTPUT
    partial,  # (parts, K) float32
    slope,
    part_blocks,  # blocks of pooled pixels a part
    N,
    K,
    P,
    Q,
    PO,
    QO,
    POOL: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,  # pooled pixels
    BN: tl.constexpr,  # channels
):
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    k_valid = k < K
    part = tl.program_id(1)
    if WIDE:
        part = part.to(tl.int64)
    total = tl.zeros((BM, BN), tl.float32)
    for block in range(part_blocks):
        index = (part * part_blocks + block) * BM + tl.arange(0, BM)
        mask = (index < N * PO * QO)[:, None] & k_valid[None, :]
        offset = (index * K)[:, None] + k[None, :]
        gradient = tl.load(grad_output + offset, mask=mask, other=0.0).to(tl.float32)
        if POOL == "avg":
            i = index // QO % PO
            j = index % QO
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
            gradient = gradient / places[:, None]
            y = i * POOL_STRIDE_H - POOL_PAD_H
            x = j * POOL_STRIDE_W - POOL_PAD_W
            rows = tl.minimum(y + WINDOW_H, P) - tl.maximum(y, 0)
            columns = tl.minimum(x + WINDOW_W, Q) - tl.maximum(x, 0)
            real = (rows * columns).to(tl.float32)[:, None]
            if ACTIVATION == "none":
                gradient = gradient * real
            else:
                code = tl.load(codes + offset, mask=mask, other=0).to(tl.int32)
                through = tl.zeros((BM, BN), tl.int32)
                for place in tl.static_range(WINDOW_H * WINDOW_W):
                    through += (code >> place) & 1
                share = through.to(tl.float32)
                if ACTIVATION == "leaky_relu":
                    share += (real - share) * slope
                # An infinite gradient that passes nowhere gives 0.
                gradient = tl.where(share == 0, 0.0, gradient * share)
        elif ACTIVATION != "none":
            code = tl.load(codes + offset, mask=mask, other=0)
            if BY_OUTPUT:
                through = passes(code.to(tl.float32), ACTIVATION)
            else:
                through = ((code.to(tl.int32) >> (7 if POOL == "max" else 0)) & 1) != 0
            damped = gradient * slope if ACTIVATION == "leaky_relu" else 0.0
            gradient = tl.where(through, gradient, damped)
        total += gradient
    offset = (part * K + k).to(tl.int64)
    tl.store(partial + offset, tl.sum(total, axis=0), mask=k_valid)
