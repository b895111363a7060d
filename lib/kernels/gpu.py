"""The sequence mixer on a GPU: all steps between a layer's projections in one pass over memory.

An FFT library reads and writes every signal several times and leaves a GPU's matrix units idle.
The kernels (triton_kernels.py) read a text of up to 4,096 tokens once and write it once. They
compute its Fourier transform as two matrix multiplications with small DFT matrices, a Monarch
decomposition as in FlashFFTConv. Longer texts take three passes.

    mix(p, u, …)          x2 · conv(x1 v; k1) + conv(u; k2), (x1, x2, v) = short_conv(p)
    mix_direct(p, u, …)   the same in torch, by lib/operators/long_conv.py
    spectra(gated, …)     the spectra of both convolutions' kernels, which `mix` reads
    is_supported(…)       whether the kernels compile and agree with torch; tested per shape class

The transform has odd frequencies. A text x of at most H tokens has the spectrum

    X[k] = Σ_n x[n] e^{-2πi n (k + ½) / N},    N = 2H,    X[N-1-k] = conj X[k]

The spectrum of a real signal is therefore exactly H complex numbers, no bin is special, and the
zeros that keep a convolution from wrapping around cost no multiplication. A tap that wraps around
changes its sign, so the taps that look ahead are stored negated. In bfloat16 a matrix
multiplication rounds its operands to bfloat16 and sums in float32: the output's cosine with
float64 is at least 0.99998 from 4,096 to 131,072 tokens (random texts, Triton's interpreter).

Source: Fu et al. 2023 (FlashFFTConv, arXiv 2311.05908) for a convolution as matrix multiplications;
        the arrangement is ours.
Axes:   B texts, D channels, L tokens, H = M · R1 · R2 ≥ L, S signals (gated, residual).
        Activations are (B, D, L); in memory they are (D, B, L).
"""

import math
from functools import cache, lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from lib.kernels import choices, support
from lib.kernels.tiles import TILE, in_groups
from lib.operators import shared
from lib.operators.long_conv import circular_kernel, long_conv, short_conv

# Tokens that one program holds in its registers; half as many before compute capability 9, where a
# matrix multiplication reads both operands from registers.
ONE_PASS = 4096
LONGEST = 128 * ONE_PASS  # stage 1 has M at most 128
TYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
TIMED = 32_768  # tokens in a batch that is timed
SHARE = 4  # spectra may fill 1/SHARE of a GPU's memory
_kept = WeakKeyDictionary()  # layer -> (length and versions, spectra, weights)
# A fused optimizer does not change the version of a weight.
register_optimizer_step_post_hook(lambda *_: _kept.clear())


def sequence_mixer(layer, u: Tensor, mask: Tensor | None) -> Tensor | None:
    """y (B, L, D) of u (B, L, D); None without a GPU, or if the kernels are not supported here."""
    L, dtype = u.shape[1], support.compute_dtype(u)
    same_dtype = torch.is_autocast_enabled(u.device.type) or layer.in_linear.weight.dtype == dtype
    if not (support.runs_triton(u) and same_dtype):
        return None
    real = None if mask is None else support.real_tokens(mask)
    if mask is not None and real is None:
        return None
    if not serves(layer, L, dtype, torch.is_grad_enabled()):
        return None
    # Signals lie in memory as (channels, B, L), so that each projection is one matrix product of
    # views, forward and backward; u alone is transposed.
    B, short, columns = len(u), layer.short_filter, u.to(dtype).flatten(0, 1).t()  # (D, B L)
    p = torch.mm(layer.in_linear.weight, columns)  # (3D, B L); `mix` adds the bias
    p, u = (x.unflatten(1, (B, L)).transpose(0, 1) for x in (p, columns.contiguous()))
    y = mix(p, u, short.weight, short.bias, layer_spectra(layer, L), real, layer.in_linear.bias)
    return layer.out_linear(y.transpose(0, 1).flatten(1).t()).unflatten(0, (B, L))


def serves(layer, length: int, dtype: torch.dtype, gradients: bool) -> bool:
    """Whether the kernels compute a layer of texts of `length` tokens on its device."""
    weight, residual = layer.short_filter.weight, layer.residual_filter is not None
    if length > LONGEST or dtype not in TYPES:
        return False
    shape = shape_class(length, weight.device), dtype, weight.device, residual, gradients
    return is_supported(*shape, weight.dtype)


def layer_spectra(layer, length: int) -> Tensor:
    """`spectra` of a layer's filters for texts of `length` tokens.

    In `eval` and without gradients the spectra of one length are kept until a weight changes, if
    all kept spectra fill at most a quarter of the GPU's memory.
    """
    filters = [layer.gated_filter, layer.residual_filter]
    filters = [filter for filter in filters if filter is not None]
    if torch.is_grad_enabled() or shared.active():
        H = math.prod(
            factors(length, layer.in_linear.weight.device)
        )  # of all lengths that share it
        taps = min(H, layer.gated_filter.max_length) if shared.active() else length

        def compute() -> tuple[Tensor]:
            return (torch.stack([spectrum(*f(taps), f.bias, H) for f in filters]),)

        return shared.once((layer, "spectra", H), compute)[0]
    weights = [weight for filter in filters for weight in filter.parameters()]
    versions = [(w.data_ptr(), support.version(w)) for w in weights]
    now = length, versions
    if layer in _kept and _kept[layer][0] == now:
        return _kept[layer][1]
    _kept.pop(layer, None)
    hidden = [(filter, filter.hidden(length)) for filter in filters]

    def channels_of(channels: slice) -> Tensor:
        return torch.stack(
            [spectrum(*f.taps(h, channels), f.bias[channels], length) for f, h in hidden]
        )

    D = len(layer.gated_filter.bias)
    table = in_groups(channels_of, D, max(1, TILE // (4 * length)), dim=1)
    if not layer.training and room_for(table):
        # An entry holds the weights, so that no other tensor can take their addresses.
        _kept[layer] = now, table, weights
    return table


def room_for(table: Tensor) -> bool:
    """Whether the kept spectra and this table fill at most a quarter of the GPU's memory."""
    if table.device.type != "cuda":
        return True
    kept = sum(entry[1].nbytes for entry in _kept.values() if entry[1].device == table.device)
    total = torch.cuda.get_device_properties(table.device).total_memory
    return SHARE * (kept + table.nbytes) <= total


@cache
def is_supported(
    L: int,
    dtype: torch.dtype,
    device: torch.device,
    residual: bool,
    gradients: bool,
    weights: torch.dtype = torch.float32,
) -> bool:
    """Whether the kernels agree with torch here and are faster, tested on random texts.

    Args:
        L: a `shape_class`.
        dtype: of the signals.
        gradients: whether the backward pass is tested too.
        weights: the dtype of the weights that the kernels read.
    """
    what = f"the sequence mixer of {L} tokens"
    given = L, device, residual, gradients, weights

    def find() -> bool:
        ours, torchs = trial(2, 4, dtype, *given)
        names = "y", "dp", "du", "dweight", "dbias", "dshift"
        agrees = support.verify(what, dtype, device, ours, torchs, names)
        if not agrees or device.type != "cuda":
            return agrees
        ours, torchs = trial(max(1, TIMED // L), 64, dtype, *given)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return support.fastest(what, {"our kernels": ours, "torch": torchs}) == "our kernels"

    parts = "with" if residual else "without", "with" if gradients else "without"
    question = "{}, {}, weights {}, {} residual, {} gradients"
    question = question.format(what, dtype, weights, *parts)
    return bool(choices.remembered(question, device, (True,), find))


def trial(B: int, D: int, dtype, L: int, device, residual: bool, gradients: bool, weights) -> tuple:
    """Two functions that mix B random texts of D channels, with the kernels and with torch.

    Each returns y and, with `gradients`, the gradients of p, u, weight, bias and shift.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def taps() -> tuple:
        return draw(D, L) / math.sqrt(L), draw(D, L) / math.sqrt(L), draw(D)

    real = torch.linspace(L, max(1, L // 2), B, device=device).long()
    kernels = taps(), taps() if residual else None
    signals = [draw(n, B, L).to(dtype).transpose(0, 1) for n in (3 * D, D)]
    parameters = [draw(3 * D, 1, 3), draw(3 * D), draw(3 * D)]  # weight, bias, shift
    inputs = [*signals, *(parameter.to(weights) for parameter in parameters)]
    slope = draw(D, B, L).transpose(0, 1)

    def results(function, table, inputs: list) -> list[Tensor]:
        with torch.set_grad_enabled(gradients):
            leaves = [tensor.detach().requires_grad_(gradients) for tensor in inputs]
            y = function(*leaves[:4], table, real, leaves[4])
        if not gradients:
            return [y]
        slopes = slope.to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, slopes, materialize_grads=True)]

    wide = [tensor.float() for tensor in inputs]
    return (
        lambda: results(mix, spectra(*kernels, L), inputs),
        lambda: results(mix_direct, kernels, wide),
    )


def shape_class(L: int, device: torch.device) -> int:
    """The length that stands for L in `is_supported`: same kernels, same alignment of the rows."""
    return math.prod(factors(L, device)) - (0 if L % 16 == 0 else 1)


@cache
def factors(L: int, device: torch.device = CPU) -> tuple[int, int, int]:
    """(M, R1, R2): the powers of two with M · R1 · R2 ≥ L and the fewest operations.

    A token costs 8 M + 16 (R1 + R2) operations. R1 is 1 if one pass suffices. A GPU multiplies
    matrices of at least 16 rows and columns, so H is at least 256. L is at most LONGEST.
    """
    assert 1 <= L <= LONGEST
    H = max(256, 1 << (L - 1).bit_length())
    powers = [1 << bits for bits in range(4, 8)]
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    if H <= (ONE_PASS if capability >= 9 else ONE_PASS // 2):
        ways = [(M, 1, H // M) for M in powers if 16 <= H // M <= 64]
    else:
        ways = [(M, R, H // M // R) for M in powers for R in powers[:3]]
        ways = [way for way in ways if 16 <= way[2] <= 64]
    # Triton 3.6 and 3.7 misuse the matrix units of compute capability 9 for tiles of 64 rows and
    # fewer than 64 columns: garbage or an illegal access on an H200 (triton-lang/triton#11366).
    ways = [(M, R1, R2) for M, R1, R2 in ways if not (R1 if R1 > 1 else M) >= 64 > R2]
    return min(ways, key=lambda way: (8 * way[0] + 16 * (way[1] * (way[1] > 1) + way[2]), way[0]))


@lru_cache(maxsize=16)
def tables(L: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """cos and -sin of the angles of each step, (2, rows, columns).

    The DFT matrices are in `dtype`, the twiddle factors ("twiddle", "between") in float32. "stage",
    (4, M, M), holds both matrices and their transposes.
    """
    M, R1, R2 = factors(L, device)
    R = R1 * R2

    def table(rows: int, columns: int, step, period: int, dtype: torch.dtype) -> Tensor:
        i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
        angle = 2 * math.pi / period * (step(i, j) % period).double()  # exact: integers first
        return torch.stack([angle.cos(), -angle.sin()]).to(dtype).to(device)

    matrices = {
        "stage": table(M, M, lambda k1, n1: n1 * (2 * k1 + 1), 4 * M, dtype),
        "twiddle": table(M, R, lambda k1, n2: n2 * (2 * k1 + 1), 4 * M * R, torch.float32),
        "last": table(R2, R2, lambda n2, k2: n2 * k2, R2, dtype),
    }
    matrices["stage"] = torch.cat([matrices["stage"], matrices["stage"].mT])
    if R1 > 1:
        matrices["first"] = table(R1, R1, lambda m1, q1: m1 * q1, R1, dtype)
        matrices["between"] = table(R1, R2, lambda q1, m2: m2 * q1, R, torch.float32)
    return matrices


# ------------------------------------------------------------------ spectra


def spectra(gated: tuple, residual: tuple | None, L: int) -> Tensor:
    """2/N times the odd-frequency spectra of the long kernels, for texts of L tokens.

    Args:
        gated, residual: (taps back, taps ahead or None, gain) of a filter; taps (D, L) or longer,
            gain (D,).

    Returns:
        float32 (S, D, 2, H): real and imaginary parts, bins in the order of the Triton kernels.
    """
    return torch.stack([spectrum(*filter, L) for filter in (gated, residual) if filter is not None])


def spectrum(back: Tensor, ahead: Tensor | None, gain: Tensor, L: int) -> Tensor:
    """The spectrum of one long kernel, (D, 2, H).

    A complex FFT of half the size computes the even bins; the odd ones are their conjugates:

        X[2j] = Σ_{n<H} (K[n] - i K[n+H]) e^{-πi n / N} e^{-2πi nj / H}
    """
    M, R1, R2 = factors(L, back.device)
    H, D = M * R1 * R2, len(back)
    taps = circular_kernel(
        back[:, :L].float(), None if ahead is None else ahead[:, :L].float(), gain.float(), 2 * H
    )
    first, second = taps.chunk(2, dim=1)  # the second half looks ahead, and changes its sign
    angle = torch.arange(H, device=taps.device, dtype=torch.float64) * (-math.pi / (2 * H))
    twiddle = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    # k = k1 + 2M k2. The FFT gives the bins of even k1, at j = k1/2 + M k2.
    even = torch.fft.fft(torch.complex(first, second) * twiddle).view(D, R1 * R2, M) / H
    odd = even.flip(1, 2)[..., : M // 2].conj()  # N-1-k is even if k is odd
    bins = torch.stack([even[..., : M // 2], odd], dim=-1).flatten(2)  # (D, k2, k1)
    # k2 = q1 + R1 q2 -> (D, k1, q1, q2)
    bins = bins.view(D, R2, R1, M).permute(0, 3, 2, 1).reshape(D, H)
    return torch.stack([bins.real, bins.imag], dim=1)


# ------------------------------------------------------------------ the mixer


def mix(p, u, weight, bias, table, real=None, shift=None) -> Tensor:
    """y = x2 · conv(x1 · v) + conv(u), (B, D, L), where (x1, x2, v) = short_conv(p + shift).

    Args:
        p: (B, 3D, L), float32 or bfloat16. p and u lie in memory as (3D, B, L) and (D, B, L), or
            they are copied; y lies there so too.
        u: (B, D, L), of p's dtype, which y has too.
        weight, bias: of the short convolution, (3D, 1, 3) and (3D,).
        table: `spectra` for L, (S, D, 2, H). S = 1: no residual convolution.
        real: the number of tokens of each text, int64 (B,). The positions behind them are padding:
            p + shift, x1 · v and u are 0 there. None: no padding.
        shift: the projection's bias, (3D,), which saves a pass over p. None: no bias.
    """
    B, D, L = u.shape
    assert p.dtype == u.dtype and u.dtype in TYPES and table.dtype == torch.float32
    assert p.shape == (B, 3 * D, L)
    assert table.shape[1:] == (D, 2, math.prod(factors(L, u.device)))
    real = torch.full((B,), L, device=u.device) if real is None else real
    shift = torch.zeros(3 * D, device=u.device) if shift is None else shift
    return Mix.apply(p, u, weight, bias, table, real, shift)


def mix_direct(p, u, weight, bias, kernels: tuple, real=None, shift=None) -> Tensor:
    """`mix` in torch. `kernels` is (gated, residual or None), each as `spectra` takes it."""
    mask = torch.ones_like(u[:, :1])
    if real is not None:
        mask = (torch.arange(u.shape[-1], device=u.device) < real[:, None])[:, None].to(u.dtype)
    p, u = (p if shift is None else p + shift[:, None]) * mask, u * mask
    x1, x2, v = short_conv(p, weight, bias).chunk(3, dim=1)
    y = x2 * long_conv(x1 * v * mask, *kernels[0])
    return y if kernels[1] is None else y + long_conv(u, *kernels[1])


class Mix(torch.autograd.Function):
    """`mix` with gradients.

    The backward pass keeps the inputs and c1 = conv(x1 v), (B, D, L). In bfloat16 keeping c1 costs
    4 bytes of traffic for each number; computing c1 again would add a fourth transform to three.
    """

    @staticmethod
    def forward(ctx, p, u, weight, bias, table, real, shift):
        p, u = channels_first(p), channels_first(u)
        rest = [tensor.contiguous() for tensor in (weight, bias, table, real, shift)]
        weight, bias, table, real, shift = rest
        (D, B, L), (M, R1, R2) = u.shape, factors(u.shape[-1], u.device)
        keep, residual, y = any(ctx.needs_input_grad), len(table) > 1, torch.empty_like(u)
        c1 = torch.empty_like(u) if keep else y
        short, dft = (real, weight, bias, shift), tables(L, u.dtype, u.device)
        with on(u.device):
            if R1 == 1:
                matrices = dft["stage"], dft["twiddle"], dft["last"]
                sizes = B, D, L, residual, keep, M, R2
                launch("mix", (B, D), M * R2, (p, u, y, c1, *short, table, *matrices), sizes)
            else:
                kinds = ("gated", "given")[: len(table)]
                planes = [first_passes(p, u, u, short, kind) for kind in kinds]
                matrices = dft["first"], dft["between"], dft["last"]
                for part, half in zip(planes, table):
                    launch("rows", (B, M, D), R1 * R2, (part, half, *matrices), (B, D, M, R1, R2))
                width = columns(M)
                pointers = planes[0], planes[-1], p, y, c1, *short, dft["stage"], dft["twiddle"]
                sizes = B, D, L, residual, keep, M, R1 * R2, width
                launch("finish", (R1 * R2 // width, D, B), M * width, pointers, sizes)
        if keep:
            ctx.save_for_backward(p, u, *rest, c1)
        return y.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        p, u, weight, bias, table, real, shift, c1 = ctx.saved_tensors
        dy, (D, B, L) = channels_first(dy), u.shape
        M, R1, R2 = factors(L, u.device)
        ds, dtable = torch.empty_like(p), torch.empty_like(table)
        du = torch.zeros_like(u) if len(table) == 1 else torch.empty_like(u)
        short, dft = (real, weight, bias, shift), tables(L, u.dtype, u.device)
        width = columns(M)
        with on(u.device):
            for gated, half, dhalf in zip((True, False), table, dtable):
                if R1 == 1:
                    kernel = "mix_gradient_halves" if in_halves(M * R2) else "mix_gradient"
                    matrices = dft["stage"], dft["twiddle"], dft["last"]
                    pointers = p, u, dy, c1, ds, du, *short, half, dhalf, *matrices
                    launch(kernel, (D,), M * R2, pointers, (B, D, L, gated, M, R2))
                    continue
                kinds = ("gated", "gated_gradient") if gated else ("given", "given_gradient")
                planes, gradient = (first_passes(p, u, dy, short, kind) for kind in kinds)
                matrices = dft["first"], dft["between"], dft["last"]
                pointers = planes, gradient, half, dhalf, *matrices
                launch("rows_gradient", (M, D), R1 * R2, pointers, (B, D, M, R1, R2))
                matrices = dft["stage"], dft["twiddle"]
                pointers = gradient, p, dy, c1, ds, du, *short, *matrices
                sizes = B, D, L, gated, M, R1 * R2, width
                launch("finish_gradient", (R1 * R2 // width, D, B), M * width, pointers, sizes)
            block = min(1024, max(16, 1 << (L - 1).bit_length()))
            dp, sums = torch.empty_like(p), torch.empty(3 * D, 5, block, device=u.device)
            pointers = p, ds, dp, real, weight, shift, sums, B, L, block
            triton_kernels().short_gradient[(3 * D,)](*pointers, num_warps=4)
        sums = sums.sum(dim=-1)  # (3D, 5)
        dweight = sums[:, :3].reshape(weight.shape).to(weight.dtype)
        dbias, dshift = sums[:, 3].to(bias.dtype), sums[:, 4].to(shift.dtype)
        return dp.transpose(0, 1), du.transpose(0, 1), dweight, dbias, dtable, None, dshift


def channels_first(x: Tensor) -> Tensor:
    """(B, C, L) as (C, B, L), a view if x already lies in memory so."""
    return x.transpose(0, 1).contiguous()


def in_halves(tile: int) -> bool:
    """Whether the gradient takes a tile of this size half by half, for fewer spilled registers."""
    return tile > 2048


def first_passes(p: Tensor, u: Tensor, dy: Tensor, short: tuple, kind: str) -> Tensor:
    """A signal after stage 1, (2, B, D, M, R), in u's dtype, to which the next step rounds it."""
    (D, B, L), (M, R1, R2) = u.shape, factors(u.shape[-1], u.device)
    dft, width = tables(L, u.dtype, u.device), columns(M)
    planes = torch.empty(2, B, D, M, R1 * R2, dtype=u.dtype, device=u.device)
    pointers = p, u, dy, planes, *short, dft["stage"], dft["twiddle"]
    sizes = B, D, L, kind, M, R1 * R2, width
    launch("columns", (R1 * R2 // width, D, B), M * width, pointers, sizes)
    return planes


def columns(M: int) -> int:
    """Columns per program in the first and last of three passes; `factors` says why 64."""
    return 64 if M >= 64 else 32


def launch(kernel: str, grid: tuple, tile: int, pointers: tuple, sizes: tuple) -> None:
    """Run a kernel of triton_kernels.py; each of its programs holds `tile` numbers."""
    # One stage: prefetched loads would fill the shared memory.
    options = matmul_options(pointers[0].dtype, num_warps=warps(tile, pointers[0]), num_stages=1)
    getattr(triton_kernels(), kernel)[grid](*pointers, *sizes, **options)


def warps(tile: int, signal: Tensor) -> int:
    """Warps per program, if a program holds `tile` numbers of a signal (…, L).

    Measured on an H200 in bfloat16: at 128 tokens one warp is 2.4 times as fast as four forward and
    2.1 times backward; at 1,024 tokens two warps are 1.4 times as fast forward. If 16 does not
    divide L, Triton 3.6 miscompiles two warps at 300 and 1,000 tokens.
    """
    if signal.dtype == torch.float32 or signal.shape[-1] % 16:
        return 8 if tile > 1024 else 4
    return next((count for most, count in ((256, 1), (1024, 2), (2048, 4)) if tile <= most), 8)


def matmul_options(dtype: torch.dtype, **compiler: int) -> dict:
    """A Triton kernel's options: matrix multiplications of this dtype, and the compiler's options.

    A float32 multiplication is three in tf32: matrix units have no exact float32, and at 4,096
    tokens the compiler takes two minutes for exact multiplications.
    """
    import triton.language as tl

    narrow, emulated = dtype == torch.bfloat16, support.interpreted()
    return {
        "DOT": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "tf32" if narrow else "tf32x3",
        "EMULATED": emulated,
        **({} if emulated else compiler),
    }


def triton_kernels():
    """The module lib/kernels/triton_kernels.py; importing it needs Triton."""
    from lib.kernels import triton_kernels

    return triton_kernels


def on(device: torch.device):
    """A context in which `device` is the current GPU, on which Triton launches."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
