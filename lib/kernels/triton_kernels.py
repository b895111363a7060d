"""The Triton kernels of gpu.py and gpu_mlp.py; the module is imported only to run one of them.

    mix, mix_gradient                 texts of up to 4,096 tokens; a program computes one channel of
                                      one text, or (gradient) of all texts
    mix_gradient_halves               the same gradient in fewer registers
    columns, rows, finish             longer texts: stage 1 on blocks of columns, stage 2 on rows,
                                      and stage 1 backwards
    rows_gradient, finish_gradient    their gradients
    short_gradient                    the backward pass of the short convolution, for all lengths
    gated_mlp                         the MLP that follows the mixer, on a tile of tokens
    gate, gate_gradient               the MLP's activations, on a part of a token, for training

A text lies in a tile (M, R): token n in row n1 = n // R and column n2 = n % R. Its odd-frequency
spectrum has the bins k = k1 + 2M k2, k1 < M:

    stage 1    Z[k1, n2] = Σ_n1 e^{-2πi n1 (k1 + ½) / 2M} x[n1, n2]    (M x M; real to complex)
    twiddle    Z[k1, n2] e^{-2πi n2 (k1 + ½) / N},  N = 2MR            (the table `turn`)
    stage 2    X[k1, k2] = Σ_n2 Z[k1, n2] e^{-2πi n2 k2 / R}           (R x R; for longer texts R1 x
                                                                       R1 and R2 x R2 with twiddle
                                                                       factors `between`)

Every table holds cos and -sin of its angles; `stage` holds the transposes too. A text has `real`
tokens; positions behind them read as zero. There are no atomics: every sum has a fixed order.
DOT is the dtype of a matrix multiplication's operands. EMULATED says that Triton's interpreter
runs, which cannot multiply bfloat16 matrices.

Axes: B texts, D channels, L tokens, (M, R) the tile of H = M R ≥ L, R = R1 R2. Signals are
      (D, B, L), the texts of one channel after one another.
"""

import triton
import triton.language as tl

# ------------------------------------------------------------------ products


@triton.jit
def matrix(table, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return block(table, ROWS, COLUMNS, COLUMNS)


@triton.jit
def block(table, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A part of a matrix of WIDTH columns; `table` points at its first number."""
    return tl.load(table + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def narrow(x, TYPE: tl.constexpr, EMULATED: tl.constexpr):
    """x rounded to TYPE, to nearest, ties to even; the interpreter alone would truncate."""
    if EMULATED and TYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr, EMULATED: tl.constexpr):
    a, b = narrow(a, DOT, EMULATED), narrow(b, DOT, EMULATED)
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def conj_times(ar, ai, br, bi):
    """conj(a) b."""
    return ar * br + ai * bi, ar * bi - ai * br


@triton.jit
def spread(
    x, stage, M: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EMULATED: tl.constexpr
):
    """Stage 1 of a real tile (M, …)."""
    return dot(matrix(stage, M, M), x, DOT, PRECISION, EMULATED), dot(
        matrix(stage + M * M, M, M), x, DOT, PRECISION, EMULATED
    )


@triton.jit
def gather(
    re,
    im,
    stage,
    M: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The adjoint of `spread`, the real part of stage 1 backwards: the tokens of a tile (M, …)."""
    return dot(matrix(stage + 2 * M * M, M, M), re, DOT, PRECISION, EMULATED) + dot(
        matrix(stage + 3 * M * M, M, M), im, DOT, PRECISION, EMULATED
    )


@triton.jit
def across(
    re,
    im,
    table,
    R: tl.constexpr,
    BACK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """A complex DFT along the rows, (…, R); BACK: the inverse without its factor 1/R."""
    cos, sin = matrix(table, R, R), matrix(table + R * R, R, R)
    a, b = dot(im, sin, DOT, PRECISION, EMULATED), dot(re, sin, DOT, PRECISION, EMULATED)
    if BACK:
        a, b = -a, -b
    return dot(re, cos, DOT, PRECISION, EMULATED) - a, dot(im, cos, DOT, PRECISION, EMULATED) + b


@triton.jit
def down(
    re,
    im,
    table,
    R: tl.constexpr,
    BACK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """A complex DFT along the columns, (R, …); BACK as in `across`."""
    cos, sin = matrix(table, R, R), matrix(table + R * R, R, R)
    a, b = dot(sin, im, DOT, PRECISION, EMULATED), dot(sin, re, DOT, PRECISION, EMULATED)
    if BACK:
        a, b = -a, -b
    return dot(cos, re, DOT, PRECISION, EMULATED) - a, dot(cos, im, DOT, PRECISION, EMULATED) + b


@triton.jit
def forward(
    x,
    stage,
    turn,
    second,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The spectrum of a text in one tile."""
    re, im = spread(x, stage, M, DOT, PRECISION, EMULATED)
    re, im = times(re, im, matrix(turn, M, R), matrix(turn + M * R, M, R))
    return across(re, im, second, R, False, DOT, PRECISION, EMULATED)


@triton.jit
def backward(
    re,
    im,
    stage,
    turn,
    second,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """N / 2 times the signal with this spectrum; its first half."""
    re, im = across(re, im, second, R, True, DOT, PRECISION, EMULATED)
    re, im = conj_times(matrix(turn, M, R), matrix(turn + M * R, M, R), re, im)
    return gather(re, im, stage, M, DOT, PRECISION, EMULATED)


# ------------------------------------------------------------------ signals


@triton.jit
def line(c, b, B, L):
    """Where the numbers of channel c of text b begin in a tensor (…, B, L)."""
    return (tl.cast(c, tl.int64) * B + b) * L


@triton.jit
def short(p, weight, bias, shift, real, b, c, t, B, L):
    """The short convolution of p + shift: channel c at the positions t."""
    text, offset = p + line(c, b, B, L), tl.load(shift + c).to(tl.float32)
    found = tl.load(bias + c).to(tl.float32)
    for tap in tl.static_range(3):
        place = t + (tap - 2)
        x = tl.load(text + place, mask=(place >= 0) & (place < L), other=0.0).to(tl.float32)
        x = tl.where((place >= 0) & (place < real), x + offset, 0.0)
        found += tl.load(weight + 3 * c + tap).to(tl.float32) * x
    return found


@triton.jit
def signal(p, u, dy, weight, bias, shift, real, b, d, t, B, D, L, KIND: tl.constexpr):
    """A real signal to be transformed, channel d of text b at the positions t.

    KIND is gated: x1 v; given: u (both zero behind the real tokens); gated_gradient: dy x2;
    given_gradient: dy.
    """
    if KIND == "gated":
        x = short(p, weight, bias, shift, real, b, d, t, B, L)
        x *= short(p, weight, bias, shift, real, b, 2 * D + d, t, B, L)
        x = tl.where(t < real, x, 0.0)
    elif KIND == "given":
        x = tl.load(u + line(d, b, B, L) + t, mask=t < L, other=0.0).to(tl.float32)
        x = tl.where(t < real, x, 0.0)
    else:
        x = tl.load(dy + line(d, b, B, L) + t, mask=t < L, other=0.0).to(tl.float32)
        if KIND == "gated_gradient":
            x *= short(p, weight, bias, shift, real, b, D + d, t, B, L)
    return x


@triton.jit
def put_gradient(
    found, p, dy, c1, ds, du, weight, bias, shift, real, b, d, t, B, D, L, GATED: tl.constexpr
):
    """Store what a signal's gradient `found` at the positions t implies.

    GATED: ds, the gradients of x1, x2 and v, the short convolution's outputs. Otherwise: du.
    """
    text, inside = line(d, b, B, L), t < L
    found = tl.where(t < real, found, 0.0)
    if GATED:
        TYPE: tl.constexpr = ds.dtype.element_ty
        x = found * short(p, weight, bias, shift, real, b, 2 * D + d, t, B, L)
        tl.store(ds + text + t, x.to(TYPE), mask=inside)
        x = found * short(p, weight, bias, shift, real, b, d, t, B, L)
        tl.store(ds + line(2 * D + d, b, B, L) + t, x.to(TYPE), mask=inside)
        x = tl.load(dy + text + t, mask=inside, other=0.0).to(tl.float32)
        x *= tl.load(c1 + text + t, mask=inside, other=0.0).to(tl.float32)
        tl.store(ds + line(D + d, b, B, L) + t, x.to(TYPE), mask=inside)
    else:
        tl.store(du + text + t, found.to(du.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------ one pass


@triton.jit
def convolved(
    x,
    spectrum,
    stage,
    turn,
    second,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    re, im = forward(x, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
    re, im = times(re, im, matrix(spectrum, M, R), matrix(spectrum + M * R, M, R))
    return backward(re, im, stage, turn, second, M, R, DOT, PRECISION, EMULATED)


@triton.jit(do_not_specialize=["B", "D"])
def mix(
    p,
    u,
    y,
    c1,
    reals,
    weight,
    bias,
    shift,
    spectra,
    stage,
    turn,
    second,
    B,
    D,
    L,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """y = x2 conv(x1 v) + conv(u), one channel of one text.

    KEEP: store c1 = conv(x1 v) too, which the backward pass reads.
    """
    b, d = tl.program_id(0), tl.program_id(1)
    real = tl.load(reals + b)
    t = tl.arange(0, M)[:, None] * R + tl.arange(0, R)[None, :]
    text = line(d, b, B, L)
    spectrum = spectra + d.to(tl.int64) * (2 * M * R)
    x = signal(p, u, u, weight, bias, shift, real, b, d, t, B, D, L, "gated")
    found = convolved(x, spectrum, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
    if KEEP:
        tl.store(c1 + text + t, found.to(c1.dtype.element_ty), mask=t < L)
    found *= short(p, weight, bias, shift, real, b, D + d, t, B, L)
    if RESIDUAL:
        x = signal(p, u, u, weight, bias, shift, real, b, d, t, B, D, L, "given")
        found += convolved(
            x,
            spectrum + D.to(tl.int64) * (2 * M * R),
            stage,
            turn,
            second,
            M,
            R,
            DOT,
            PRECISION,
            EMULATED,
        )
    tl.store(y + text + t, found.to(y.dtype.element_ty), mask=t < L)


@triton.jit(do_not_specialize=["B", "D"])
def mix_gradient(
    p,
    u,
    dy,
    c1,
    ds,
    du,
    reals,
    weight,
    bias,
    shift,
    spectra,
    dspectra,
    stage,
    turn,
    second,
    B,
    D,
    L,
    GATED: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The gradients of one convolution, one channel of all texts.

    dx = conv(dc; conj K),   dK = Σ_b conj(X) dC
    """
    d = tl.program_id(0)
    t = tl.arange(0, M)[:, None] * R + tl.arange(0, R)[None, :]
    SIGNAL: tl.constexpr = "gated" if GATED else "given"
    GRADIENT: tl.constexpr = "gated_gradient" if GATED else "given_gradient"
    base = d.to(tl.int64) * (2 * M * R)
    total_re, total_im = tl.full((M, R), 0.0, tl.float32), tl.full((M, R), 0.0, tl.float32)
    for b in range(B):
        real = tl.load(reals + b)
        x = signal(p, u, dy, weight, bias, shift, real, b, d, t, B, D, L, SIGNAL)
        xr, xi = forward(x, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
        x = signal(p, u, dy, weight, bias, shift, real, b, d, t, B, D, L, GRADIENT)
        re, im = forward(x, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
        xr, xi = conj_times(xr, xi, re, im)
        total_re += xr
        total_im += xi
        re, im = conj_times(
            matrix(spectra + base, M, R), matrix(spectra + base + M * R, M, R), re, im
        )
        found = backward(re, im, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
        put_gradient(found, p, dy, c1, ds, du, weight, bias, shift, real, b, d, t, B, D, L, GATED)
    tl.store(dspectra + base + t, total_re)
    tl.store(dspectra + base + M * R + t, total_im)


# ------------------------------------------------------------------ the gradient in halves


@triton.jit
def nought(real):
    """0, as the compiler cannot know: else it keeps all positions of a loop in registers."""
    return tl.minimum(real, 0).to(tl.int32) * 16


@triton.jit
def forward_half(
    upper,
    lower,
    first,
    stage,
    turn,
    second,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """`forward` of a text in two tiles (M / 2, R): the bins of the M / 2 rows k1 from `first`."""
    H: tl.constexpr = M // 2
    cos, sin = stage + first * M, stage + M * M + first * M
    re = dot(block(cos, H, H, M), upper, DOT, PRECISION, EMULATED)
    re += dot(block(cos + H, H, H, M), lower, DOT, PRECISION, EMULATED)
    im = dot(block(sin, H, H, M), upper, DOT, PRECISION, EMULATED)
    im += dot(block(sin + H, H, H, M), lower, DOT, PRECISION, EMULATED)
    turn += first * R
    re, im = times(re, im, matrix(turn, H, R), matrix(turn + M * R, H, R))
    return across(re, im, second, R, False, DOT, PRECISION, EMULATED)


@triton.jit
def backward_half(
    re,
    im,
    first,
    stage,
    turn,
    second,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The share of M / 2 rows of bins in `backward`: both halves of a text, (M / 2, R) each."""
    H: tl.constexpr = M // 2
    re, im = across(re, im, second, R, True, DOT, PRECISION, EMULATED)
    turn += first * R
    re, im = conj_times(matrix(turn, H, R), matrix(turn + M * R, H, R), re, im)
    cos, sin = stage + 2 * M * M + first, stage + 3 * M * M + first
    upper = dot(block(cos, H, H, M), re, DOT, PRECISION, EMULATED)
    upper += dot(block(sin, H, H, M), im, DOT, PRECISION, EMULATED)
    lower = dot(block(cos + H * M, H, H, M), re, DOT, PRECISION, EMULATED)
    lower += dot(block(sin + H * M, H, H, M), im, DOT, PRECISION, EMULATED)
    return upper, lower


@triton.jit
def gradient_half(
    x0,
    x1,
    g0,
    g1,
    first,
    spectrum,
    stage,
    turn,
    second,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """conj(X) dC of M / 2 rows of bins, and their share of both halves of conv(dc; conj K)."""
    xr, xi = forward_half(x0, x1, first, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
    re, im = forward_half(g0, g1, first, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
    xr, xi = conj_times(xr, xi, re, im)
    spectrum += first * R
    kr, ki = matrix(spectrum, M // 2, R), matrix(spectrum + M * R, M // 2, R)
    re, im = conj_times(kr, ki, re, im)
    upper, lower = backward_half(re, im, first, stage, turn, second, M, R, DOT, PRECISION, EMULATED)
    return xr, xi, upper, lower


@triton.jit(do_not_specialize=["B", "D"])
def mix_gradient_halves(
    p,
    u,
    dy,
    c1,
    ds,
    du,
    reals,
    weight,
    bias,
    shift,
    spectra,
    dspectra,
    stage,
    turn,
    second,
    B,
    D,
    L,
    GATED: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """`mix_gradient` in tiles (M / 2, R): the rows k1 and n1 of a text are taken half by half.

    A whole tile of 4,096 numbers needs far more registers than a program has.
    """
    d, H = tl.program_id(0), M // 2
    SIGNAL: tl.constexpr = "gated" if GATED else "given"
    GRADIENT: tl.constexpr = "gated_gradient" if GATED else "given_gradient"
    tile = tl.arange(0, M // 2)[:, None] * R + tl.arange(0, R)[None, :]
    spectrum = spectra + d.to(tl.int64) * (2 * M * R)
    zero = tl.full((M // 2, R), 0.0, tl.float32)
    re0, im0, re1, im1 = zero, zero, zero, zero
    for b in range(B):
        real = tl.load(reals + b)
        t = tile + nought(real)
        t1 = t + M // 2 * R
        x = signal(p, u, dy, weight, bias, shift, real, b, d, t, B, D, L, SIGNAL)
        x0 = narrow(x, DOT, EMULATED)
        x = signal(p, u, dy, weight, bias, shift, real, b, d, t1, B, D, L, SIGNAL)
        x1 = narrow(x, DOT, EMULATED)
        x = signal(p, u, dy, weight, bias, shift, real, b, d, t, B, D, L, GRADIENT)
        g0 = narrow(x, DOT, EMULATED)
        x = signal(p, u, dy, weight, bias, shift, real, b, d, t1, B, D, L, GRADIENT)
        g1 = narrow(x, DOT, EMULATED)
        re, im, upper, lower = gradient_half(
            x0, x1, g0, g1, 0, spectrum, stage, turn, second, M, R, DOT, PRECISION, EMULATED
        )
        re0 += re
        im0 += im
        re, im, more, rest = gradient_half(
            x0, x1, g0, g1, H, spectrum, stage, turn, second, M, R, DOT, PRECISION, EMULATED
        )
        re1 += re
        im1 += im
        upper += more
        lower += rest
        put_gradient(upper, p, dy, c1, ds, du, weight, bias, shift, real, b, d, t, B, D, L, GATED)
        put_gradient(lower, p, dy, c1, ds, du, weight, bias, shift, real, b, d, t1, B, D, L, GATED)
    to = dspectra + d.to(tl.int64) * (2 * M * R)
    tl.store(to + tile, re0)
    tl.store(to + M // 2 * R + tile, re1)
    tl.store(to + M * R + tile, im0)
    tl.store(to + M * R + M // 2 * R + tile, im1)


# ------------------------------------------------------------------ three passes


@triton.jit(do_not_specialize=["B", "D"])
def columns(
    p,
    u,
    dy,
    planes,
    reals,
    weight,
    bias,
    shift,
    stage,
    turn,
    B,
    D,
    L,
    KIND: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Stage 1 and twiddle factors of BLOCK columns of a signal -> planes (2, B, D, M, R).

    The imaginary plane follows the real one.
    """
    d, b = tl.program_id(1), tl.program_id(2)
    real = tl.load(reals + b)
    place = tl.arange(0, M)[:, None] * R + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    x = signal(p, u, dy, weight, bias, shift, real, b, d, place, B, D, L, KIND)
    re, im = spread(x, stage, M, DOT, PRECISION, EMULATED)
    re, im = times(re, im, tl.load(turn + place), tl.load(turn + M * R + place))
    half = tl.cast(B, tl.int64) * D * (M * R)
    to = planes + (tl.cast(b, tl.int64) * D + d) * (M * R)
    tl.store(to + place, narrow(re, planes.dtype.element_ty, EMULATED))
    tl.store(to + half + place, narrow(im, planes.dtype.element_ty, EMULATED))


@triton.jit
def row_forward(
    planes,
    half,
    tile,
    first,
    between,
    last,
    R1: tl.constexpr,
    R2: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Stage 2 of a row of R1 R2 numbers: n2 = m1 R2 + m2, k2 = q1 + R1 q2."""
    re, im = down(
        tl.load(planes + tile).to(tl.float32),
        tl.load(planes + half + tile).to(tl.float32),
        first,
        R1,
        False,
        DOT,
        PRECISION,
        EMULATED,
    )
    re, im = times(re, im, matrix(between, R1, R2), matrix(between + R1 * R2, R1, R2))
    return across(re, im, last, R2, False, DOT, PRECISION, EMULATED)


@triton.jit
def row_backward(
    re,
    im,
    planes,
    half,
    tile,
    first,
    between,
    last,
    R1: tl.constexpr,
    R2: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    re, im = across(re, im, last, R2, True, DOT, PRECISION, EMULATED)
    re, im = conj_times(matrix(between, R1, R2), matrix(between + R1 * R2, R1, R2), re, im)
    re, im = down(re, im, first, R1, True, DOT, PRECISION, EMULATED)
    tl.store(planes + tile, narrow(re, planes.dtype.element_ty, EMULATED))
    tl.store(planes + half + tile, narrow(im, planes.dtype.element_ty, EMULATED))


@triton.jit(do_not_specialize=["B", "D"])
def rows(
    planes,
    spectra,
    first,
    between,
    last,
    B,
    D,
    M: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Stage 2, times the kernel's spectrum, and back, in place: row k1 of a channel of a text."""
    b, k1, d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    R: tl.constexpr = R1 * R2
    half = tl.cast(B, tl.int64) * D * (M * R)
    tile = tl.arange(0, R1)[:, None] * R2 + tl.arange(0, R2)[None, :]
    planes += (tl.cast(b, tl.int64) * D + d) * (M * R) + k1 * R
    spectrum = spectra + d.to(tl.int64) * (2 * M * R) + k1 * R
    re, im = row_forward(planes, half, tile, first, between, last, R1, R2, DOT, PRECISION, EMULATED)
    re, im = times(re, im, tl.load(spectrum + tile), tl.load(spectrum + M * R + tile))
    row_backward(re, im, planes, half, tile, first, between, last, R1, R2, DOT, PRECISION, EMULATED)


@triton.jit(do_not_specialize=["B", "D"])
def rows_gradient(
    planes,
    gradient,
    spectra,
    dspectra,
    first,
    between,
    last,
    B,
    D,
    M: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The gradient of row k1 of a channel's spectrum over all texts, dK = Σ_b conj(X) dC.

    conj(K) dC replaces dC in `gradient`.
    """
    k1, d = tl.program_id(0), tl.program_id(1)
    R: tl.constexpr = R1 * R2
    half = tl.cast(B, tl.int64) * D * (M * R)
    tile = tl.arange(0, R1)[:, None] * R2 + tl.arange(0, R2)[None, :]
    own = d.to(tl.int64) * (2 * M * R) + k1 * R
    total_re, total_im = tl.full((R1, R2), 0.0, tl.float32), tl.full((R1, R2), 0.0, tl.float32)
    for b in range(B):
        at = (tl.cast(b, tl.int64) * D + d) * (M * R) + k1 * R
        xr, xi = row_forward(
            planes + at, half, tile, first, between, last, R1, R2, DOT, PRECISION, EMULATED
        )
        re, im = row_forward(
            gradient + at, half, tile, first, between, last, R1, R2, DOT, PRECISION, EMULATED
        )
        xr, xi = conj_times(xr, xi, re, im)
        total_re += xr
        total_im += xi
        re, im = conj_times(
            tl.load(spectra + own + tile), tl.load(spectra + own + M * R + tile), re, im
        )
        row_backward(
            re,
            im,
            gradient + at,
            half,
            tile,
            first,
            between,
            last,
            R1,
            R2,
            DOT,
            PRECISION,
            EMULATED,
        )
    tl.store(dspectra + own + tile, total_re)
    tl.store(dspectra + own + M * R + tile, total_im)


@triton.jit
def column_backward(
    planes,
    half,
    place,
    stage,
    turn,
    M: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    re, im = conj_times(
        tl.load(turn + place),
        tl.load(turn + M * R + place),
        tl.load(planes + place).to(tl.float32),
        tl.load(planes + half + place).to(tl.float32),
    )
    return gather(re, im, stage, M, DOT, PRECISION, EMULATED)


@triton.jit(do_not_specialize=["B", "D"])
def finish(
    planes,
    more,
    p,
    y,
    c1,
    reals,
    weight,
    bias,
    shift,
    stage,
    turn,
    B,
    D,
    L,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """BLOCK columns of both signals: stage 1 backwards, the gate, the sum."""
    d, b = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, M)[:, None] * R + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    half = tl.cast(B, tl.int64) * D * (M * R)
    at, to = (tl.cast(b, tl.int64) * D + d) * (M * R), line(d, b, B, L)
    found = column_backward(planes + at, half, place, stage, turn, M, R, DOT, PRECISION, EMULATED)
    if KEEP:
        tl.store(c1 + to + place, found.to(c1.dtype.element_ty), mask=place < L)
    found *= short(p, weight, bias, shift, tl.load(reals + b), b, D + d, place, B, L)
    if RESIDUAL:
        found += column_backward(
            more + at, half, place, stage, turn, M, R, DOT, PRECISION, EMULATED
        )
    tl.store(y + to + place, found.to(y.dtype.element_ty), mask=place < L)


@triton.jit(do_not_specialize=["B", "D"])
def finish_gradient(
    planes,
    p,
    dy,
    c1,
    ds,
    du,
    reals,
    weight,
    bias,
    shift,
    stage,
    turn,
    B,
    D,
    L,
    GATED: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    d, b = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, M)[:, None] * R + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    half = tl.cast(B, tl.int64) * D * (M * R)
    found = column_backward(
        planes + (tl.cast(b, tl.int64) * D + d) * (M * R),
        half,
        place,
        stage,
        turn,
        M,
        R,
        DOT,
        PRECISION,
        EMULATED,
    )
    real = tl.load(reals + b)
    put_gradient(found, p, dy, c1, ds, du, weight, bias, shift, real, b, d, place, B, D, L, GATED)


# ------------------------------------------------------------------ short convolution, backwards


@triton.jit(do_not_specialize=["B"])
def short_gradient(p, ds, dp, reals, weight, shift, sums, B, L, BLOCK: tl.constexpr):
    """The short convolution backwards, channel c of all texts: dp and the sums (C, 5, BLOCK).

    The sums are BLOCK partial sums each of dweight's 3 taps, of dbias and of dshift.
    """
    c = tl.program_id(0)
    w0, w1, w2 = (
        tl.load(weight + 3 * c).to(tl.float32),
        tl.load(weight + 3 * c + 1).to(tl.float32),
        tl.load(weight + 3 * c + 2).to(tl.float32),
    )
    offset = tl.load(shift + c).to(tl.float32)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    s0, s1, s2, s3, s4 = zero, zero, zero, zero, zero
    for b in range(B):
        real, at = tl.load(reals + b), line(c, b, B, L)
        for start in range(0, L, BLOCK):
            t = start + tl.arange(0, BLOCK)
            now = tl.load(ds + at + t, mask=t < L, other=0.0).to(tl.float32)
            one = tl.load(ds + at + t + 1, mask=t + 1 < L, other=0.0).to(tl.float32)
            two = tl.load(ds + at + t + 2, mask=t + 2 < L, other=0.0).to(tl.float32)
            x = tl.load(p + at + t, mask=t < L, other=0.0).to(tl.float32)
            x = tl.where(t < real, x + offset, 0.0)
            found = tl.where(t < real, w2 * now + w1 * one + w0 * two, 0.0)
            tl.store(dp + at + t, found.to(dp.dtype.element_ty), mask=t < L)
            s0 += two * x
            s1 += one * x
            s2 += now * x
            s3 += now
            s4 += found
    to = sums + c.to(tl.int64) * (5 * BLOCK) + tl.arange(0, BLOCK)
    tl.store(to, s0)
    tl.store(to + BLOCK, s1)
    tl.store(to + 2 * BLOCK, s2)
    tl.store(to + 3 * BLOCK, s3)
    tl.store(to + 4 * BLOCK, s4)


# ------------------------------------------------------------------ the MLP


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def weights(table, first, rows, columns, COLUMNS: tl.constexpr, ROW: tl.constexpr):
    """Rows `first + rows` of a matrix with COLUMNS columns, transposed: (columns, rows).

    Columns from COLUMNS on and rows from ROW on are zero.
    """
    return tl.load(
        table + (first + rows)[None, :] * COLUMNS + columns[:, None],
        mask=(rows < ROW)[None, :] & (columns < COLUMNS)[:, None],
        other=0.0,
    )


@triton.jit
def gate(gated, out, I, BLOCK: tl.constexpr, EMULATED: tl.constexpr):  # noqa: E741
    """GELU(a) b of BLOCK of a token's I activations; `gated` holds a and b, (T, 2I)."""
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gated += token * 2 * I
    a = tl.load(gated + i, mask=i < I, other=0.0).to(tl.float32)
    b = tl.load(gated + I + i, mask=i < I, other=0.0).to(tl.float32)
    y = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476)) * b
    tl.store(out + token * I + i, narrow(y, out.dtype.element_ty, EMULATED), mask=i < I)


@triton.jit
def gate_gradient(gated, dy, out, I, BLOCK: tl.constexpr, EMULATED: tl.constexpr):  # noqa: E741
    """The gradients of a and b, (T, 2I), from that of GELU(a) b, (T, I).

    GELU(a) = a Φ(a),   GELU'(a) = Φ(a) + a φ(a), Φ and φ of the normal distribution
    """
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gated += token * 2 * I
    out += token * 2 * I
    a = tl.load(gated + i, mask=i < I, other=0.0).to(tl.float32)
    b = tl.load(gated + I + i, mask=i < I, other=0.0).to(tl.float32)
    slope = tl.load(dy + token * I + i, mask=i < I, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    da = slope * b * (share + a * 0.3989422804014327 * tl.exp(-0.5 * a * a))
    tl.store(out + i, narrow(da, out.dtype.element_ty, EMULATED), mask=i < I)
    db = slope * a * share
    tl.store(out + I + i, narrow(db, out.dtype.element_ty, EMULATED), mask=i < I)


@triton.jit(do_not_specialize=["T"])
def gated_mlp(
    h,
    out,
    gated,
    wo,
    bias,
    scale,
    shift,
    T,
    eps,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 (an axis, as in gpu_mlp.py)
    K: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """out = LayerNorm(h + W_o(GELU(a) b) + bias), (a, b) = W_g h, for TOKENS of T tokens (T, D).

    W ≥ D/K is the width of a block, filled up to a power of two. Blocks k and k + K/2 of W_g,
    (K, 2I/K, D/K), compute gate and value of the activations that blocks 2k and 2k + 1 of W_o,
    (K, D/K, I/K), read. These activations stay in registers, STEP of them at a time.
    """
    F: tl.constexpr = D // K
    H: tl.constexpr = I // K
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row, lane, step = tl.cast(token, tl.int64)[:, None] * D, tl.arange(0, W), tl.arange(0, STEP)
    inside = (token < T)[:, None] & (lane < F)[None, :]
    total = tl.full((TOKENS,), 0.0, tl.float32)
    for k in range(K // 2):
        x = tl.load(h + row + k * F + lane[None, :], mask=inside, other=0.0)
        v = tl.load(h + row + (k + K // 2) * F + lane[None, :], mask=inside, other=0.0)
        for side in range(2):
            block, found = 2 * k + side, tl.full((TOKENS, W), 0.0, tl.float32)
            for j in range(0, H, STEP):
                place = j + step  # inside the input of one block of W_o
                a = dot(
                    x,
                    weights(gated, k * 2 * H + side * H, place, lane, F, H),
                    DOT,
                    PRECISION,
                    EMULATED,
                )
                b = dot(
                    v,
                    weights(gated, (k + K // 2) * 2 * H + side * H, place, lane, F, H),
                    DOT,
                    PRECISION,
                    EMULATED,
                )
                m = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476)) * b
                found += dot(m, weights(wo, block * F, lane, place, H, F), DOT, PRECISION, EMULATED)
            at = block * F + lane
            found += tl.load(bias + at, mask=lane < F, other=0.0).to(tl.float32)[None, :] + tl.load(
                h + row + at[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            found = tl.where(inside, found, 0.0)
            total += tl.reduce(found, 1, add)
            tl.store(
                out + row + at[None, :], narrow(found, out.dtype.element_ty, EMULATED), mask=inside
            )
    tl.debug_barrier()  # the program reads now what its other threads wrote
    mean = (total / D)[:, None]
    spread_out = tl.full((TOKENS,), 0.0, tl.float32)
    for k in range(K):
        x = tl.load(out + row + k * F + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        spread_out += tl.reduce(tl.where(inside, (x - mean) * (x - mean), 0.0), 1, add)
    inverse = (1.0 / tl.sqrt(spread_out / D + eps))[:, None]
    for k in range(K):
        at = k * F + lane
        x = tl.load(out + row + at[None, :], mask=inside, other=0.0).to(tl.float32)
        own, more = (
            tl.load(scale + at, mask=lane < F, other=0.0).to(tl.float32)[None, :],
            tl.load(shift + at, mask=lane < F, other=0.0).to(tl.float32)[None, :],
        )
        tl.store(
            out + row + at[None, :],
            narrow((x - mean) * inverse * own + more, out.dtype.element_ty, EMULATED),
            mask=inside,
        )
