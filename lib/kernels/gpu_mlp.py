"""The gated MLP on a GPU: both block-diagonal layers, GELU, gate, skip, LayerNorm in one kernel.

Step by step, an MLP moves 3 D + 6 I more numbers for each token, up to two thirds of an encoder's
memory traffic: at the published sizes its activations are 8 times as wide as a token. In this
kernel they never leave the registers. It reads each token from memory once and writes it once; the
weights, which every program reads, come from the cache.

    mlp(h, …)             LayerNorm(h + W_o(GELU(a) · b)), (a, b) = W_g h, without gradients
    mlp_direct(h, …)      the same in torch
    program(…)            the kernel's tile on this machine, or None if the kernel does not agree
                          with torch or is slower; tested once for each shape

The kernel is `gated_mlp` of triton_kernels.py; `lib.efficiency.counts.encoder_costs` counts its
operations and bytes.
Axes: T tokens, D width, I intermediate width (`inner`), K blocks.
"""

import logging
import statistics
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels import gpu, support
from lib.operators.monarch import block_diagonal, paired

TOKENS = (64, 128)  # choices for the tokens per program
STEP = 32  # numbers of a gate that a program holds at a time
WIDEST = 256  # largest width of a block: a program holds the sums of one block in its registers
EPS = 1e-12
log = logging.getLogger(__name__)


def gated_mlp(layer, h: Tensor) -> Tensor | None:
    """y (B, L, D) of an MLP for h (B, L, D), or None if torch has to compute it.

    The kernel needs Triton, blocks that pair, bfloat16 (float32 does not fit into the registers),
    no gradients and a `program`.
    """
    gated, wo, norm = layer.gated_layers, layer.wo, layer.layernorm
    usable = (
        not (layer.training or torch.is_grad_enabled() or torch.is_autocast_enabled(h.device.type))
        and support.runs_triton(h)
        and paired(gated, wo)
        and wo.d_out // len(wo.weight) <= WIDEST
        and h.dtype == gated.weight.dtype == torch.bfloat16
    )
    tile = program(wo.d_out, wo.d_in, len(wo.weight), h.dtype, h.device) if usable else None
    if tile is None:
        return None
    weights = gated.weight, wo.weight, wo.bias, norm.weight, norm.bias
    return mlp(h.flatten(0, 1), *weights, norm.eps, tile).view_as(h)


@cache
def program(width: int, inner: int, blocks: int, dtype: torch.dtype, device) -> int | None:
    """The tokens per program; None: the kernel does not compile, is wrong, or is slower than torch.

    On a GPU the choices and torch are timed at 16,384 tokens in interleaved rounds, and the log
    reports the times. The interpreter takes the first choice that agrees with torch.
    """
    generator = torch.Generator().manual_seed(0)
    gated = blocks, 2 * inner // blocks, width // blocks
    wo = blocks, width // blocks, inner // blocks

    def draw(shape: tuple) -> Tensor:
        numbers = torch.randn(shape, generator=generator)
        return (numbers / shape[-1] ** (0.5 * (len(shape) == 3))).to(device, dtype)

    h, *weights = map(draw, ((max(TOKENS) + 1, width), gated, wo, *[(width,)] * 3))
    with torch.inference_mode():
        exact = mlp_direct(*(tensor.float() for tensor in (h, *weights)), EPS)

        def agrees(tokens: int) -> bool:
            what = f"an MLP of width {width}, {inner} inside and {blocks} blocks, {tokens} tokens"
            ways = lambda: [mlp(h, *weights, EPS, tokens)], lambda: [exact]
            return support.verify(f"{what} per program", dtype, device, *ways, ("y",))

        choices = [tokens for tokens in TOKENS if agrees(tokens)]
        if device.type != "cuda" or not choices:
            return choices[0] if choices else None
        return fastest(h, weights, choices)


def fastest(h: Tensor, weights: list[Tensor], choices: list[int]) -> int | None:
    """The tokens per program with the smallest median time on a GPU; None if torch is faster."""
    x = h[torch.arange(16_384, device=h.device) % len(h)]
    times = {tokens: [] for tokens in (*choices, None)}
    for _ in range(12):
        for tokens in times:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            mlp_direct(x, *weights, EPS) if tokens is None else mlp(x, *weights, EPS, tokens)
            end.record()
            torch.cuda.synchronize()
            times[tokens].append(start.elapsed_time(end))
    medians = {tokens: statistics.median(rounds[2:]) for tokens, rounds in times.items()}
    names = {tokens: f"{tokens} tokens per program" for tokens in choices} | {None: "torch"}
    text = ", ".join(f"{names[tokens]} {ms:.3f}" for tokens, ms in medians.items())
    log.info("an MLP of width %d takes, in ms for 16,384 tokens: %s", h.shape[1], text)
    return min(medians, key=medians.get)


def mlp(h, gated, wo, bias, scale, shift, eps: float, tokens: int = TOKENS[0]) -> Tensor:
    """LayerNorm(h + W_o(GELU(a) · b) + bias), (a, b) = W_g h, (T, D), in h's dtype.

    Args:
        h: (T, D), float32 or bfloat16; all other tensors have its dtype.
        gated, wo: (K, 2I/K, D/K) and (K, D/K, I/K), K even.
        bias: (D,).
        scale, shift, eps: of the LayerNorm, (D,).
        tokens: tokens per program, a power of two, at least 16.
    """
    (T, D), K, inner = h.shape, len(wo), wo.shape[-1] * len(wo)
    parameters = gated, wo, bias, scale, shift
    assert {x.dtype for x in parameters} == {h.dtype} and h.dtype in gpu.TYPES
    assert K % 2 == D % K == 0 and D // K <= WIDEST
    assert wo.shape == (K, D // K, inner // K) and gated.shape == (K, 2 * inner // K, D // K)
    assert {x.shape for x in (bias, scale, shift)} == {(D,)}
    h, out = h.contiguous(), torch.empty_like(h, memory_format=torch.contiguous_format)
    weights = [tensor.contiguous() for tensor in parameters]
    sizes = D, inner, K, max(16, 1 << (D // K - 1).bit_length()), tokens, STEP
    options = gpu.matmul_options(h.dtype, num_warps=8, num_stages=2)
    with gpu.on(h.device):
        if T:
            kernel = gpu.triton_kernels().gated_mlp[(-(-T // tokens),)]
            kernel(h, out, *weights, T, eps, *sizes, **options)
    return out


def mlp_direct(h, gated, wo, bias, scale, shift, eps: float) -> Tensor:
    """`mlp` in torch, step by step."""
    a, b = block_diagonal(h, gated).chunk(2, dim=-1)
    y = h + block_diagonal(F.gelu(a) * b, wo) + bias
    return F.layer_norm(y, scale.shape, scale, shift, eps)
