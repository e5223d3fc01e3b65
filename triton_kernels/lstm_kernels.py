"""One layer of an LSTM over all its steps: each program holds the recurrent weights and some sequences.

Everything lies transposed, (unit, sequence), so that the weights are the first operand of the products and a
step's state, already in registers, the second. A program never needs another one's state.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """EXACT: to a few units in the last place near zero too, where the quotient alone loses digits."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    far = tl.where(x < 0, -far, far)
    # The quotient of infinities made of NaN.
    far = tl.where(x != x, x, far)
    if EXACT:
        # x + x^3 P(x^2), fitted to |x| <= 0.6: relative error 3e-9.
        z = x * x
        p = -0.005895158741623163
        p = p * z + 0.020795973017811775
        p = p * z - 0.053783830255270004
        p = p * z + 0.13331924378871918
        p = p * z - 0.33333298563957214
        near = x + x * z * p
        return tl.where(size < 0.6, near, far)
    return far


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rows(t, batch, offsets, stride_t, stride_b, PACKED: tl.constexpr):
    """Rows of step t in the tensors that have one row for each step and sequence: int64 (BLOCK_B,)."""
    if PACKED:
        return tl.load(offsets + t) + batch.to(tl.int64)
    return t.to(tl.int64) * stride_t + batch.to(tl.int64) * stride_b


@triton.jit
def _load_gates(at, mask, H: tl.constexpr):
    """The four gates' tiles (BLOCK_H, BLOCK_B) of what the input adds."""
    i = tl.load(at, mask, 0.0)
    f = tl.load(at + H, mask, 0.0)
    g = tl.load(at + 2 * H, mask, 0.0)
    o = tl.load(at + 3 * H, mask, 0.0)
    return i, f, g, o


@triton.jit
def lstm_forward_kernel(
    gates,  # (rows, DIRECTIONS, 4 H) float32: W_ih x
    bias,  # (DIRECTIONS, 4 H) float32: the sum of both, if HAS_BIAS
    weight,  # (DIRECTIONS, 4 H, H): W_hh
    h0,  # (DIRECTIONS, B, H)
    c0,  # (DIRECTIONS, B, H)
    offsets,  # (T,) int64: first row of each step, if PACKED
    lengths,  # (B,) int32: steps of each sequence, if PACKED
    output,  # (rows, DIRECTIONS, H)
    h_n,  # (DIRECTIONS, B, H)
    c_n,  # (DIRECTIONS, B, H)
    activations,  # (rows, DIRECTIONS, 5, H): i, f, g, o, c, if SAVED
    B,
    T,
    stride_t,  # rows from step to step and
    stride_b,  # from sequence to sequence, unless PACKED
    H: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SAVED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    AHEAD: tl.constexpr,  # load the next step's gates during this one
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    direction = tl.program_id(1)
    unit = tl.arange(0, BLOCK_H)
    batch = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = (unit < H)[:, None] & (batch < B)[None, :]

    # (unit, k), zero beyond H
    at = weight + direction * 4 * H * H + unit[:, None] * H + unit[None, :]
    square = (unit < H)[:, None] & (unit < H)[None, :]
    w_i = tl.load(at, square, 0.0)
    w_f = tl.load(at + H * H, square, 0.0)
    w_g = tl.load(at + 2 * H * H, square, 0.0)
    w_o = tl.load(at + 3 * H * H, square, 0.0)

    b_i, b_f, b_g, b_o = 0.0, 0.0, 0.0, 0.0
    if HAS_BIAS:
        own = bias + direction * 4 * H + unit[:, None]
        b_i, b_f, b_g, b_o = _load_gates(own, (unit < H)[:, None], H)

    state = (direction * B + batch).to(tl.int64)[None, :] * H + unit[:, None]
    h = tl.load(h0 + state, mask, 0.0)
    c = tl.load(c0 + state, mask, 0.0).to(tl.float32)
    steps = T + tl.zeros((BLOCK_B,), tl.int32)
    if PACKED:
        steps = tl.load(lengths + batch, batch < B, 0)

    if AHEAD:
        first = tl.where(direction == 0, 0, T - 1)
        rows = _rows(first, batch, offsets, stride_t, stride_b, PACKED) * DIRECTIONS + direction
        tile = gates + rows[None, :] * (4 * H) + unit[:, None]
        n_i, n_f, n_g, n_o = _load_gates(tile, mask & (first < steps)[None, :], H)
    for step in range(T):
        t = tl.where(direction == 0, step, T - 1 - step)
        rows = _rows(t, batch, offsets, stride_t, stride_b, PACKED) * DIRECTIONS + direction
        running = mask & (t < steps)[None, :]
        if AHEAD:
            i, f, g, o = n_i, n_f, n_g, n_o
            if step + 1 < T:
                # The next step's, on their way during this one.
                t = tl.where(direction == 0, step + 1, T - 2 - step)
                later = _rows(t, batch, offsets, stride_t, stride_b, PACKED)
                later = later * DIRECTIONS + direction
                tile = gates + later[None, :] * (4 * H) + unit[:, None]
                n_i, n_f, n_g, n_o = _load_gates(tile, mask & (t < steps)[None, :], H)
        else:
            tile = gates + rows[None, :] * (4 * H) + unit[:, None]
            i, f, g, o = _load_gates(tile, running, H)

        i = _sigmoid(_product(w_i, h, PRECISION, UPCAST) + i + b_i)
        f = _sigmoid(_product(w_f, h, PRECISION, UPCAST) + f + b_f)
        g = _tanh(_product(w_g, h, PRECISION, UPCAST) + g + b_g, EXACT)
        o = _sigmoid(_product(w_o, h, PRECISION, UPCAST) + o + b_o)
        new_c = f * c + i * g
        new_h = (o * _tanh(new_c, EXACT)).to(h.dtype)
        tl.store(output + rows[None, :] * H + unit[:, None], new_h, running)
        if SAVED:
            kept = activations + rows[None, :] * (5 * H) + unit[:, None]
            tl.store(kept, i.to(h.dtype), running)
            tl.store(kept + H, f.to(h.dtype), running)
            tl.store(kept + 2 * H, g.to(h.dtype), running)
            tl.store(kept + 3 * H, o.to(h.dtype), running)
            tl.store(kept + 4 * H, new_c.to(h.dtype), running)
        # A sequence that has ended, or backwards not begun, keeps its state.
        h = tl.where(running, new_h, h)
        c = tl.where(running, new_c, c)
    tl.store(h_n + state, h, mask)
    tl.store(c_n + state, c.to(h.dtype), mask)


@triton.jit
def lstm_backward_kernel(
    grad_output,  # (rows, DIRECTIONS, H), if HAS_OUTPUT
    grad_h_n,  # (DIRECTIONS, B, H), if HAS_H
    grad_c_n,  # (DIRECTIONS, B, H), if HAS_C
    weight,  # (DIRECTIONS, 4 H, H)
    c0,  # (DIRECTIONS, B, H)
    activations,  # (rows, DIRECTIONS, 5, H)
    offsets,  # (T,) int64, if PACKED
    lengths,  # (B,) int32, if PACKED
    grad_gates,  # (rows, DIRECTIONS, 4 H): of the sums before the activations
    grad_h0,  # (DIRECTIONS, B, H)
    grad_c0,  # (DIRECTIONS, B, H)
    B,
    T,
    stride_t,
    stride_b,
    H: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_C: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    direction = tl.program_id(1)
    unit = tl.arange(0, BLOCK_H)
    batch = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = (unit < H)[:, None] & (batch < B)[None, :]

    # (k, unit): transposed
    at = weight + direction * 4 * H * H + unit[None, :] * H + unit[:, None]
    square = (unit < H)[:, None] & (unit < H)[None, :]
    w_i = tl.load(at, square, 0.0)
    w_f = tl.load(at + H * H, square, 0.0)
    w_g = tl.load(at + 2 * H * H, square, 0.0)
    w_o = tl.load(at + 3 * H * H, square, 0.0)

    state = (direction * B + batch).to(tl.int64)[None, :] * H + unit[:, None]
    first_c = tl.load(c0 + state, mask, 0.0).to(tl.float32)
    dh = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    dc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    if HAS_H:
        dh = tl.load(grad_h_n + state, mask, 0.0).to(tl.float32)
    if HAS_C:
        dc = tl.load(grad_c_n + state, mask, 0.0).to(tl.float32)
    steps = T + tl.zeros((BLOCK_B,), tl.int32)
    if PACKED:
        steps = tl.load(lengths + batch, batch < B, 0)

    for step in range(T):
        # Against the order of the forward pass; `before` is the step whose state this one began with.
        t = tl.where(direction == 0, T - 1 - step, step)
        before = tl.where(direction == 0, t - 1, t + 1)
        rows = _rows(t, batch, offsets, stride_t, stride_b, PACKED) * DIRECTIONS + direction
        running = mask & (t < steps)[None, :]
        kept = activations + rows[None, :] * (5 * H) + unit[:, None]
        i = tl.load(kept, running, 0.0).to(tl.float32)
        f = tl.load(kept + H, running, 0.0).to(tl.float32)
        g = tl.load(kept + 2 * H, running, 0.0).to(tl.float32)
        o = tl.load(kept + 3 * H, running, 0.0).to(tl.float32)
        c = tl.load(kept + 4 * H, running, 0.0).to(tl.float32)
        has_before = running & ((before >= 0) & (before < steps))[None, :]
        inside = tl.minimum(tl.maximum(before, 0), T - 1)
        earlier = _rows(inside, batch, offsets, stride_t, stride_b, PACKED) * DIRECTIONS + direction
        earlier_c = tl.load(
            activations + earlier[None, :] * (5 * H) + 4 * H + unit[:, None], has_before, 0.0
        )
        old_c = tl.where(has_before, earlier_c.to(tl.float32), first_c)
        total = dh
        if HAS_OUTPUT:
            own = tl.load(grad_output + rows[None, :] * H + unit[:, None], running, 0.0)
            total += own.to(tl.float32)

        shown = _tanh(c, EXACT)
        d_o = (total * shown * o * (1.0 - o)).to(w_i.dtype)
        dc_now = dc + total * o * (1.0 - shown * shown)
        d_i = (dc_now * g * i * (1.0 - i)).to(w_i.dtype)
        d_f = (dc_now * old_c * f * (1.0 - f)).to(w_i.dtype)
        d_g = (dc_now * i * (1.0 - g * g)).to(w_i.dtype)
        into = grad_gates + rows[None, :] * (4 * H) + unit[:, None]
        tl.store(into, d_i, running)
        tl.store(into + H, d_f, running)
        tl.store(into + 2 * H, d_g, running)
        tl.store(into + 3 * H, d_o, running)
        new_dh = _product(w_i, d_i, PRECISION, UPCAST) + _product(w_f, d_f, PRECISION, UPCAST)
        new_dh += _product(w_g, d_g, PRECISION, UPCAST)
        new_dh += _product(w_o, d_o, PRECISION, UPCAST)
        dh = tl.where(running, new_dh, dh)
        dc = tl.where(running, dc_now * f, dc)
    tl.store(grad_h0 + state, dh.to(w_i.dtype), mask)
    tl.store(grad_c0 + state, dc.to(w_i.dtype), mask)
