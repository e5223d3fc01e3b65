"""The kernels of the fused transposed convolution: implicit GEMM by output phase on tensor cores.

Outputs whose row and column agree modulo the strides form a phase: a dense convolution with the
phase's own taps, of which no zero-stuffed input is ever made. The product is taken transposed,
accumulator[channel, pixel] = weight[channel, k] @ input[k, pixel].
"""

import triton
import triton.language as tl


@triton.jit
def first_tap(
    phase, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr
):
    """The first tap that meets the outputs of a phase; TAPS if none does."""
    first = TAPS
    for i in tl.static_range(TAPS):
        r = TAPS - 1 - i
        first = tl.where((phase + PAD - r * DILATION) % STRIDE == 0, r, first)
    return first


@triton.jit
def activate(value, slope, ACTIVATION: tl.constexpr):
    # Comparisons are false for NaN, which so passes.
    if ACTIVATION == "relu":
        return tl.where(value <= 0, 0.0, value)
    elif ACTIVATION == "leaky_relu":
        return tl.where(value > 0, value, value * slope)
    elif ACTIVATION == "sigmoid":
        e = tl.exp(-tl.abs(value))
        return tl.where(value > 0, 1.0, e) / (1.0 + e)
    elif ACTIVATION == "tanh":
        e = tl.exp(-2.0 * tl.abs(value))
        large = (1.0 - e) / (1.0 + e)
        # Near 0 the difference would lose its digits.
        square = value * value
        small = value * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315))))
        large = tl.where(value < 0, -large, large)
        return tl.where(square < 0.01, small, large)
    else:
        return value


@triton.jit
def load_channel_vector(pointer, channels, valid, GIVEN: tl.constexpr, otherwise: tl.constexpr):
    if GIVEN:
        return tl.load(pointer + channels, mask=valid, other=otherwise).to(tl.float32)[:, None]
    else:
        return otherwise


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def conv_transpose_act_forward_kernel(
    input,  # (N, H, W, GROUPS * C)
    weight,  # (R, S, K, C)
    bias,  # (K,); so are scale and shift
    scale,
    shift,
    output,  # (N, K, P, Q) in either format
    slope,
    N,
    H,
    W,
    K,
    P,
    Q,
    C: tl.constexpr,  # input channels a group
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
    # From one tap of a phase to its next, and how far the input then lies back.
    TAP_STEP_H: tl.constexpr,
    TAP_STEP_W: tl.constexpr,
    BACK_H: tl.constexpr,
    BACK_W: tl.constexpr,
    PHASES_H: tl.constexpr,
    PHASES_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,  # pixels of one phase
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    OUT_BLOCKS: tl.constexpr = (GROUP_K + BN - 1) // BN
    CHANNEL_BLOCKS: tl.constexpr = (C + BK - 1) // BK
    # The taps of a phase, where all phases have as many: then ptxas can count the loop.
    EVEN: tl.constexpr = (
        (TAP_STEP_H == STRIDE_H)
        & (TAP_STEP_W == STRIDE_W)
        & (R % TAP_STEP_H == 0)
        & (S % TAP_STEP_W == 0)
    )
    EVEN_STEPS: tl.constexpr = (R // TAP_STEP_H) * (S // TAP_STEP_W) * CHANNEL_BLOCKS

    # Phases run fastest: the blocks that write the same cache lines follow each other.
    pid = tl.program_id(0)
    fw = pid % PHASES_W
    rest = pid // PHASES_W
    fh = rest % PHASES_H
    rest = rest // PHASES_H
    out_block = rest % OUT_BLOCKS
    rest = rest // OUT_BLOCKS
    group = rest % GROUPS
    block = rest // GROUPS
    if WIDE:
        block = block.to(tl.int64)
        group = group.to(tl.int64)

    rows = (P + STRIDE_H - 1) // STRIDE_H  # of the largest phase
    columns = (Q + STRIDE_W - 1) // STRIDE_W
    m = block * BM + tl.arange(0, BM)
    n = m // (rows * columns)
    i = m // columns % rows
    j = m % columns
    p = i * STRIDE_H + fh
    q = j * STRIDE_W + fw
    inside = (n < N) & (p < P) & (q < Q)

    r0 = first_tap(fh, R, STRIDE_H, PAD_H, DILATION_H)
    s0 = first_tap(fw, S, STRIDE_W, PAD_W, DILATION_W)
    # The input under the first tap; exact, so floor and truncation agree.
    h0 = i + (fh + PAD_H - r0 * DILATION_H) // STRIDE_H
    w0 = j + (fw + PAD_W - s0 * DILATION_W) // STRIDE_W
    across = tl.maximum((S - s0 + TAP_STEP_W - 1) // TAP_STEP_W, 0)
    if EVEN:
        across = S // TAP_STEP_W
        steps = EVEN_STEPS
    else:
        down = tl.maximum((R - r0 + TAP_STEP_H - 1) // TAP_STEP_H, 0)
        steps = down * across * CHANNEL_BLOCKS

    k = tl.arange(0, BK)
    local = out_block * BN + tl.arange(0, BN)
    channel_valid = local < GROUP_K
    channels = group * GROUP_K + local
    image = n * H * W * (C * GROUPS) + group * C
    accumulator = tl.zeros((BN, BM), tl.float32)
    for step in range(steps):
        tap = step // CHANNEL_BLOCKS
        a = tap // across
        b = tap % across
        c = step % CHANNEL_BLOCKS * BK + k
        h = h0 - a * BACK_H
        w = w0 - b * BACK_W
        met = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixels = tl.load(
            input + (image + (h * W + w) * (C * GROUPS))[None, :] + c[:, None],
            mask=met[None, :] & (c < C)[:, None],
            other=0.0,
        )
        place = (r0 + a * TAP_STEP_H) * S + s0 + b * TAP_STEP_W
        weights = tl.load(
            weight + ((place * K + channels) * C)[:, None] + c[None, :],
            mask=channel_valid[:, None] & (c < C)[None, :],
            other=0.0,
        )
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weights = weights.to(tl.float32)
        accumulator = tl.dot(weights, pixels, accumulator, input_precision=PRECISION)

    value = accumulator + load_channel_vector(bias, channels, channel_valid, HAS_BIAS, 0.0)
    value = value * load_channel_vector(scale, channels, channel_valid, HAS_SCALE, 1.0)
    value = value + load_channel_vector(shift, channels, channel_valid, HAS_SHIFT, 0.0)
    value = activate(value, slope, ACTIVATION)
    if CHANNELS_LAST:
        offset = (((n * P + p) * Q + q) * K)[None, :] + channels[:, None]
    else:
        offset = (n * K * P * Q + p * Q + q)[None, :] + (channels * (P * Q))[:, None]
    mask = channel_valid[:, None] & inside[None, :]
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["PIXELS"])
def conv_transpose_act_gradient_kernel(
    grad_output,  # (N, K, PIXELS) at the strides below; so are output and grad
    output,
    grad,
    sums,  # (N, pixel blocks, K)
    slope,
    K,
    PIXELS,
    channel_stride,
    pixel_stride,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """The gradient before the activation, told by its output, and its sums over a block of pixels."""
    n = tl.program_id(0)
    if WIDE:
        n = n.to(tl.int64)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    pixels = tl.program_id(2) * BP + tl.arange(0, BP)
    valid = (channels < K)[:, None] & (pixels < PIXELS)[None, :]
    offset = (channels * channel_stride)[:, None] + (pixels * pixel_stride)[None, :]
    offset += n * K * PIXELS
    g = tl.load(grad_output + offset, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(output + offset, mask=valid, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        g = tl.where(y <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(y > 0, g, g * slope)
    elif ACTIVATION == "tanh":
        g = g * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        g = g * (y * (1.0 - y))
    tl.store(grad + offset, g.to(grad.dtype.element_ty), mask=valid)
    row = n * tl.num_programs(2) + tl.program_id(2)
    tl.store(sums + row * K + channels, tl.sum(g, 1), mask=channels < K)
