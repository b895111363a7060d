"""The sequence mixer on a GPU: everything between a layer's projections in one pass over memory, products of small matrices inside.

An FFT library reads and writes every signal several times and leaves a GPU's matrix units idle. Here a text of up to 4,096 tokens
is read once and written once; its Fourier transform is two products with DFT matrices (a Monarch decomposition, as in FlashFFTConv).
Longer texts take three passes. The kernels are lib/kernels/triton_kernels.py, in Triton, as lib/kernels/mixer.cpp is what a CPU runs; the MLP's is used by lib/kernels/gpu_mlp.py.

    mix(p, u, …)            x2 · conv(x1 v; k1) + conv(u; k2), (x1, x2, v) = short_conv(p), with gradients
    mix_direct(p, u, …)     the same in torch, by lib/operators/long_conv.py
    spectra(gated, …)       the kernels of both convolutions as `mix` wants them, with gradients
    works(…), trusted(…)    whether the kernels compile here and give what torch gives, asked once a kind of input
    flops(…), traffic(…)    what a token costs in a layer's `mix`, counted; encoder_costs(…), in a whole encoder

Odd frequencies: a text x of at most H tokens has the spectrum

    X[k] = Σ_n x[n] e^{-2πi n (k + ½) / N},    N = 2H,    X[N-1-k] = conj X[k]

which real signals halve into exactly H complex numbers; no bin is special, and the zeros that keep a convolution from wrapping around
take part in no product. What wraps changes its sign, so the taps that look ahead are stored negated. In bfloat16 the operands of a product are rounded to it and sums
are float32: against float64 the output's cosine is 0.99998 or more from 4,096 to 131,072 tokens (random texts, in Triton's interpreter).

Source: Fu et al. 2023 (FlashFFTConv, arXiv 2311.05908) for a convolution as matrix products; the arrangement is ours.
Axes:   B texts, D channels, L tokens, H = M · R1 · R2 ≥ L, S signals (gated, residual). Everything stays (B, D, L).
"""

import logging
import math
import os
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lib.kernels import cpu
from lib.operators.long_conv import circular_kernel, long_conv, short_conv

ONE_PASS = 4096  # tokens that a program holds in its registers; half of that before compute capability 9, whose products take both operands from there
LONGEST = 128 * ONE_PASS  # M of stage 1 at most 128
COLUMNS = 32  # that a program of the first and last of three passes takes
TYPES = (torch.float32, torch.bfloat16)
REAL = WeakTensorKeyDictionary()
log = logging.getLogger(__name__)


# ------------------------------------------------------------------ where it can be used


def fits(u: Tensor, weight: Tensor) -> bool:
    """Whether `mix` can be tried: there is Triton for u, and its type is float32 or bfloat16."""
    mixed = torch.is_autocast_enabled(u.device.type)
    dtype = cpu.number_type(u)
    return (
        available(u)
        and u.shape[-1] <= LONGEST
        and dtype in TYPES
        and (mixed or weight.dtype == dtype)
    )


def available(u: Tensor) -> bool:
    """Whether u is on a GPU (or TRITON_INTERPRET=1), Triton is installed and LOCO_NATIVE is not 0."""
    return (
        (u.device.type == "cuda" or u.device.type == "cpu" and interpreted())
        and os.environ.get("LOCO_NATIVE", "1") != "0"
        and installed()
    )


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def real_tokens(mask: Tensor) -> Tensor | None:
    """(B, 1, L) of 0 and 1 -> how many ones each text begins with, int64 (B,); None: a hole, there is more behind padding.

    One wait for the GPU a mask, not one a layer.
    """
    version = 0 if mask.is_inference() else mask._version
    if mask not in REAL or REAL[mask][0] != version:
        with torch.inference_mode(False):  # a later pass with gradients may see this mask too
            whole = bool((mask[..., 1:] <= mask[..., :-1]).all())
            REAL[mask] = version, mask[:, 0].sum(dim=1).long() if whole else None
    return REAL[mask][1]


@cache
def works(
    L: int, dtype: torch.dtype, device: torch.device, residual: bool, gradients: bool
) -> bool:
    """Whether the kernels for such texts can be trusted here: two random texts of two channels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    real = torch.tensor([L, max(1, L // 2)], device=device)
    taps = lambda: (draw(2, L) / math.sqrt(L), draw(2, L) / math.sqrt(L), draw(2))
    kernels = taps(), taps() if residual else None
    parts = draw(2, 6, L).to(dtype), draw(2, 2, L).to(dtype), draw(6, 1, 3), draw(6), draw(6)
    slope = draw(2, 2, L)

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        with torch.set_grad_enabled(gradients):
            leaves = [
                tensor.to(dtype if i < 2 else torch.float32).requires_grad_(gradients)
                for i, tensor in enumerate(parts)
            ]
            y = function(
                *leaves[:4], spectra(*kernels, L) if function is mix else kernels, real, leaves[4]
            )
        return [
            y.detach(),
            *(torch.autograd.grad(y, leaves, slope.to(y.dtype)) if gradients else ()),
        ]

    return trusted(
        f"the sequence mixer of {L} tokens",
        dtype,
        device,
        lambda: results(mix, dtype),
        lambda: results(mix_direct, torch.float32),
        ("y", "dp", "du", "dweight", "dbias", "dshift"),
    )


def trusted(
    what: str, dtype: torch.dtype, device: torch.device, ours, theirs, names: tuple[str, ...]
) -> bool:
    """Whether kernels compile here, and give what torch gives: `ours()` and `theirs()` are lists of tensors with those names.

    A GPU that nobody tried may refuse a kernel; the log says so once, and torch does the work.
    """
    try:
        with torch.autocast(device.type, enabled=False):
            for name, found, exact in zip(names, ours(), theirs()):
                error = float(
                    torch.linalg.vector_norm(found.float() - exact.float())
                    / torch.linalg.vector_norm(exact.float())
                )
                if not error < (
                    0.02 if dtype == torch.bfloat16 else 0.005
                ):  # torch's own may be in tf32
                    raise RuntimeError(f"{name} is wrong: its error is {error:.2g} of its size")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may throw
        log.warning(
            "lib/kernels/triton_kernels.py is not used for %s in %s on %s (%s: %s): torch does it, with the same results",
            what,
            dtype,
            device,
            type(error).__name__,
            " ".join(str(error).split())[:300],
        )
        return False
    log.info("lib/kernels/triton_kernels.py is used for %s in %s on %s", what, dtype, device)
    return True


def alike(L: int, device: torch.device) -> int:
    """The length that stands for L in `works`: the same kernels, and rows that are as well aligned."""
    return math.prod(factors(L, device)) - (0 if L % 16 == 0 else 1)


# ------------------------------------------------------------------ sizes and tables


@cache
def factors(L: int, device: torch.device = torch.device("cpu")) -> tuple[int, int, int]:
    """(M, R1, R2), powers of two with M · R1 · R2 ≥ L and the fewest operations, 8 M + 16 (R1 + R2) a token; R1 is 1 where one pass will do.

    A matrix product of a GPU wants 16 rows and columns at least, so that H is 256 for any shorter text.

    Raises:
        ValueError: more tokens than the kernels are made for.
    """
    if not 1 <= L <= LONGEST:
        raise ValueError(f"{L} tokens: from 1 to {LONGEST}")
    H = max(256, 1 << (L - 1).bit_length())
    powers = [1 << bits for bits in range(4, 8)]
    limit = (
        ONE_PASS // 2
        if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9
        else ONE_PASS
    )
    if H <= limit:
        ways = [(M, 1, H // M) for M in powers if 16 <= H // M <= 64]
    else:
        ways = [
            (M, R1, H // M // R1) for M in powers for R1 in powers[:3] if 16 <= H // M // R1 <= R1
        ]
    return min(ways, key=lambda way: (8 * way[0] + 16 * (way[1] * (way[1] > 1) + way[2]), way[0]))


@lru_cache(maxsize=16)
def tables(L: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """cos and -sin of each step's angles, (2, rows, columns): matrices in `dtype`, turns in float32. Stage 1, (4, M, M): transposed, too."""
    M, R1, R2 = factors(L, device)
    R = R1 * R2

    def table(rows: int, columns: int, place, period: int, kind: torch.dtype) -> Tensor:
        i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
        angle = 2 * math.pi / period * (place(i, j) % period).double()  # whole numbers first: exact
        return torch.stack([angle.cos(), -angle.sin()]).to(kind).to(device)

    made = {
        "stage": table(M, M, lambda k1, n1: n1 * (2 * k1 + 1), 4 * M, dtype),
        "turn": table(M, R, lambda k1, n2: n2 * (2 * k1 + 1), 4 * M * R, torch.float32),
        "last": table(R2, R2, lambda n2, k2: n2 * k2, R2, dtype),
    }
    made["stage"] = torch.cat([made["stage"], made["stage"].mT])
    if R1 > 1:
        made |= {
            "first": table(R1, R1, lambda m1, q1: m1 * q1, R1, dtype),
            "between": table(R1, R2, lambda q1, m2: m2 * q1, R, torch.float32),
        }
    return made


# ------------------------------------------------------------------ spectra


def spectra(gated: tuple, residual: tuple | None, L: int) -> Tensor:
    """2/N times the odd-frequency spectra of the kernels for texts of L tokens, float32 (S, D, 2, H): real and imaginary parts in the kernels' order.

    Args:
        gated, residual: (taps back, taps ahead or None, gain), (D, L) or longer, and (D,).
    """
    return torch.stack(
        [spectrum(*kernels, L) for kernels in (gated, residual) if kernels is not None]
    )


def spectrum(back: Tensor, ahead: Tensor | None, gain: Tensor, L: int) -> Tensor:
    """One of them, (D, 2, H).

    Half of the bins by a complex FFT of half the size, the others are their conjugates:

        X[2j] = Σ_{n<H} (K[n] - i K[n+H]) e^{-πi n / N} e^{-2πi nj / H}
    """
    M, R1, R2 = factors(L, back.device)
    H, D = M * R1 * R2, len(back)
    taps = circular_kernel(
        back[:, :L].float(), None if ahead is None else ahead[:, :L].float(), gain.float(), 2 * H
    )
    first, second = taps.chunk(2, dim=1)  # what looks ahead is in the second, and changes its sign
    angle = torch.arange(H, device=taps.device, dtype=torch.float64) * (-math.pi / (2 * H))
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    even = (
        torch.fft.fft(torch.complex(first, second) * turn).view(D, R1 * R2, M) / H
    )  # k = k1 + 2M k2: k1 even, j = k1/2 + M k2
    odd = even.flip(1, 2)[..., : M // 2].conj()  # N-1-k is even where k is odd
    whole = torch.stack([even[..., : M // 2], odd], dim=-1).flatten(2)  # (D, k2, k1)
    whole = (
        whole.view(D, R2, R1, M).permute(0, 3, 2, 1).reshape(D, H)
    )  # k2 = q1 + R1 q2 -> (D, k1, q1, q2)
    return torch.stack([whole.real, whole.imag], dim=1)


# ------------------------------------------------------------------ the mixer


def mix(
    p: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    table: Tensor,
    real: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """y = x2 · conv(x1 · v) + conv(u), (B, D, L), of u's type; (x1, x2, v) = short_conv(p + shift).

    Args:
        p: (B, 3D, L), float32 or bfloat16; u: (B, D, L), alike.
        weight: of the short convolution, (3D, 1, 3); bias: (3D,).
        table: `spectra` for L, (S, D, 2, H); S = 1: no second convolution.
        real: tokens of each text, int64 (B,); what follows is padding: p + shift, x1 · v and u are 0 there. None: all.
        shift: added to p, (3D,): the projection's bias, which then costs no pass of its own. None: nothing.

    Raises:
        TypeError, ValueError: types or shapes that do not belong together.
    """
    B, D, L = u.shape
    if p.dtype != u.dtype or u.dtype not in TYPES:
        raise TypeError(f"p is {p.dtype}, u {u.dtype}: both float32 or both bfloat16")
    H = math.prod(factors(L, u.device))
    if p.shape != (B, 3 * D, L) or table.shape[1:] != (D, 2, H) or table.dtype != torch.float32:
        raise ValueError(
            f"u is {tuple(u.shape)}, so p is {(B, 3 * D, L)} and the spectra float32 {('S', D, 2, H)}: got {tuple(p.shape)} and {table.dtype} {tuple(table.shape)}"
        )
    real = torch.full((B,), L, device=u.device) if real is None else real
    shift = torch.zeros(3 * D, device=u.device) if shift is None else shift
    return Mix.apply(p, u, weight, bias, table, real, shift)


def mix_direct(
    p: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernels: tuple,
    real: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The same in torch. `kernels`: (gated, residual or None) as for `spectra`."""
    mask = (
        torch.ones_like(u[:, :1])
        if real is None
        else (torch.arange(u.shape[-1], device=u.device) < real[:, None])[:, None].to(u.dtype)
    )
    p, u = (p if shift is None else p + shift[:, None]) * mask, u * mask
    x1, x2, v = short_conv(p, weight, bias).chunk(3, dim=1)
    y = x2 * long_conv(x1 * v * mask, *kernels[0])
    return y if kernels[1] is None else y + long_conv(u, *kernels[1])


class Mix(torch.autograd.Function):
    """`mix` with gradients. Kept for the backward pass are the inputs and conv(x1 v), (B, D, L): 4 bytes of traffic a number in bfloat16, where making it anew is a fourth transform beside three."""

    @staticmethod
    def forward(
        ctx,
        p: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        table: Tensor,
        real: Tensor,
        shift: Tensor,
    ) -> Tensor:
        kernels, how = launch(u.dtype, u.shape[-1])
        p, u, weight, bias, table, real, shift = (
            tensor.contiguous() for tensor in (p, u, weight, bias, table, real, shift)
        )
        B, D, L = u.shape
        (M, R1, R2), own = factors(L, u.device), tables(L, u.dtype, u.device)
        keep, residual, y = any(ctx.needs_input_grad), len(table) > 1, torch.empty_like(u)
        c1 = torch.empty_like(u) if keep else y
        with on(u.device):
            if R1 == 1:
                kernels.mix[(B, D)](
                    p,
                    u,
                    y,
                    c1,
                    real,
                    weight,
                    bias,
                    shift,
                    table,
                    own["stage"],
                    own["turn"],
                    own["last"],
                    D,
                    L,
                    residual,
                    keep,
                    M,
                    R2,
                    **how,
                )
            else:
                planes = [
                    first_passes(kernels, how, p, u, u, weight, bias, shift, real, kind)
                    for kind in ("gated", "given")[: len(table)]
                ]
                for part, half in zip(planes, table):
                    kernels.rows[(B, M, D)](
                        part,
                        part[0].numel(),
                        half,
                        own["first"],
                        own["between"],
                        own["last"],
                        D,
                        M,
                        R1,
                        R2,
                        **how,
                    )
                kernels.finish[(R1 * R2 // COLUMNS, D, B)](
                    planes[0],
                    planes[-1],
                    planes[0][0].numel(),
                    p,
                    y,
                    c1,
                    real,
                    weight,
                    bias,
                    shift,
                    own["stage"],
                    own["turn"],
                    D,
                    L,
                    residual,
                    keep,
                    M,
                    R1 * R2,
                    COLUMNS,
                    **how,
                )
        if keep:
            ctx.save_for_backward(p, u, weight, bias, table, real, shift, c1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        p, u, weight, bias, table, real, shift, c1 = ctx.saved_tensors
        kernels, how = launch(u.dtype, u.shape[-1])
        dy, (B, D, L) = dy.contiguous(), u.shape
        (M, R1, R2), own = factors(L, u.device), tables(L, u.dtype, u.device)
        ds, du, dtable = (
            torch.empty_like(p),
            torch.zeros_like(u) if len(table) == 1 else torch.empty_like(u),
            torch.empty_like(table),
        )
        short = (real, weight, bias, shift)
        with on(u.device):
            for gated, half, dhalf in zip((True, False), table, dtable):
                if R1 == 1:
                    kernels.mix_gradient[(D,)](
                        p,
                        u,
                        dy,
                        c1,
                        ds,
                        du,
                        *short,
                        half,
                        dhalf,
                        own["stage"],
                        own["turn"],
                        own["last"],
                        B,
                        D,
                        L,
                        gated,
                        M,
                        R2,
                        **how,
                    )
                    continue
                kinds = ("gated", "gated_gradient") if gated else ("given", "given_gradient")
                planes, gradient = (
                    first_passes(kernels, how, p, u, dy, weight, bias, shift, real, kind)
                    for kind in kinds
                )
                kernels.rows_gradient[(M, D)](
                    planes,
                    gradient,
                    planes[0].numel(),
                    half,
                    dhalf,
                    own["first"],
                    own["between"],
                    own["last"],
                    B,
                    D,
                    M,
                    R1,
                    R2,
                    **how,
                )
                kernels.finish_gradient[(R1 * R2 // COLUMNS, D, B)](
                    gradient,
                    gradient[0].numel(),
                    p,
                    dy,
                    c1,
                    ds,
                    du,
                    *short,
                    own["stage"],
                    own["turn"],
                    D,
                    L,
                    gated,
                    M,
                    R1 * R2,
                    COLUMNS,
                    **how,
                )
            block = min(1024, max(16, 1 << (L - 1).bit_length()))
            dp, sums = torch.empty_like(p), torch.empty(3 * D, 5, block, device=u.device)
            kernels.short_gradient[(3 * D,)](
                p, ds, dp, real, weight, shift, sums, B, 3 * D, L, block, num_warps=4
            )
        sums = sums.sum(dim=-1)  # (3D, 5)
        return (
            dp,
            du,
            sums[:, :3].reshape(weight.shape).to(weight.dtype),
            sums[:, 3].to(bias.dtype),
            dtable,
            None,
            sums[:, 4].to(shift.dtype),
        )


def first_passes(
    kernels,
    how: dict,
    p: Tensor,
    u: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    real: Tensor,
    kind: str,
) -> Tensor:
    """A signal after stage 1, (2, B, D, M, R), in its own type: in bfloat16 the next product would round it so in any case."""
    B, D, L = u.shape
    (M, R1, R2), own = factors(L, u.device), tables(L, u.dtype, u.device)
    planes = torch.empty(2, B, D, M, R1 * R2, dtype=u.dtype, device=u.device)
    kernels.columns[(R1 * R2 // COLUMNS, D, B)](
        p,
        u,
        dy,
        planes,
        planes[0].numel(),
        real,
        weight,
        bias,
        shift,
        own["stage"],
        own["turn"],
        D,
        L,
        kind,
        M,
        R1 * R2,
        COLUMNS,
        **how,
    )
    return planes


def launch(dtype: torch.dtype, L: int | None = None) -> tuple:
    """lib/kernels/triton_kernels.py, and what every launch is given; of a transform of L tokens, how many threads too."""
    import triton.language as tl

    from lib.kernels import triton_kernels

    narrow, emulated = dtype == torch.bfloat16, interpreted()
    # Float32 as three products in tf32: exact ones have no matrix unit, and at 4,096 tokens they keep the compiler busy for two minutes.
    how = {
        "DOT": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "tf32" if narrow else "tf32x3",
        "EMULATED": emulated,
    }
    # One stage: loads that run ahead would fill the shared memory.
    return triton_kernels, how if emulated or L is None else how | {
        "num_warps": 8 if math.prod(factors(L)) > 1024 else 4,
        "num_stages": 1,
    }


def on(device: torch.device):
    """Triton launches on the current GPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


# ------------------------------------------------------------------ counts


def flops(L: int, channels: int, signals: int = 2, backward: bool = False) -> dict[str, float]:
    """Operations a token of one layer's `mix`, a multiply-add counted as 2. Texts fill H tokens whatever they hold.

    products     S D (H/L) (4 M + 8 (R1 + R2)) a transform: two of them forward, three backward
    pointwise    S D (H/L) 6 for each turn and each spectrum; 21 D for the short convolution and the gates, backward 74 D
    """
    M, R1, R2 = factors(L)
    fill = M * R1 * R2 / L
    inner, turns = (R2, 1) if R1 == 1 else (R1 + R2, 2)
    transforms, spectra_read = (3, 2) if backward else (2, 1)
    short = (
        74 if backward else 21
    )  # backward: x2, and x1 and v twice, 30; gates 5; the short convolution's adjoint 39
    return {
        "products": signals * channels * fill * transforms * (4 * M + 8 * inner),
        "pointwise": signals * channels * fill * 6 * (transforms * turns + spectra_read)
        + short * channels,
    }


def traffic(
    L: int,
    channels: int,
    signals: int = 2,
    batch: int = 1,
    size: int = 2,
    gradients: bool = False,
    backward: bool = False,
) -> dict[str, float]:
    """Bytes a token of one layer's `mix` to and from memory, if all that a program reads twice it finds in a cache the second time.

    Args:
        size: bytes of a number, 2 in bfloat16. gradients: whether conv(x1 v) is written too.

        texts      forward p 3, u 1, y 1 (and c1 1); backward p 3, u 1, dy 2, c1 1, ds 3, du 1, and p, ds, dp 9 in the short convolution; times D
        planes     three passes alone: 8 a signal forward, 12 backward, and 2 more rows of p backward; times D H/L
        spectra    8 S D H/L, read once for all texts of a batch, backward written once more
    """
    M, R1, R2 = factors(L)
    fill, residual = M * R1 * R2 / L, signals - 1
    if backward:
        numbers = 3 + 1 + 1 + 3 + residual * 3 + 9 + (2 if R1 > 1 else 0)
    else:
        numbers = 3 + residual + 1 + (1 if gradients else 0)
    return {
        "texts": size * channels * numbers,
        "planes": 0.0 if R1 == 1 else size * channels * fill * signals * (12 if backward else 8),
        "spectra": 8 * signals * channels * fill * (2 if backward else 1) / batch,
    }


def encoder_costs(config, L: int, batch: int = 1) -> dict[str, tuple[float, float]]:
    """(operations, bytes) a token of all layers of an encoder without gradients, bfloat16, part by part.

    mixer          `mix`
    projections    8 D² operations; u is transposed (2 D numbers) and read, p written, y read, the output written, and 4 D² weights a batch
    mlp            6 W I operations, W the next power of two from D / K; read D, write D, and 3 D I / K weights a batch (lib/kernels/gpu_mlp.py), which the cache gives to each of its programs
    """
    D, I, K, N, S = (
        config.hidden_size,
        config.intermediate_size,
        config.mlp_blocks,
        config.num_hidden_layers,
        2 if config.residual_long_conv else 1,
    )
    tokens = batch * L
    return {
        "mixer": (N * sum(flops(L, D, S).values()), N * sum(traffic(L, D, S, batch).values())),
        "projections": (N * 8.0 * D**2, N * 2 * (8 * D + 4 * D**2 / tokens)),
        "mlp": (
            N * 6.0 * (1 << (D // K - 1).bit_length()) * I,
            N * 2 * (2 * D + 3 * D * I / K / tokens),
        ),
    }
