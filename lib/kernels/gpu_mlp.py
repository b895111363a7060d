"""The gated MLP on a GPU: both block-diagonal products, GELU, gate, skip and LayerNorm in one kernel.

Step by step the same moves 3 D + 6 I numbers a token more, up to two thirds of an encoder's traffic: what lies between the two products is 8 times as
wide as a token at the published sizes, and here it never leaves the registers. From memory a token is read once and written once; what a program touches
again, and the weights, which every program needs once more, are left to the cache.

    mlp(h, …)             LayerNorm(h + W_o(GELU(a) · b)), (a, b) = W_g h, without gradients
    mlp_direct(h, …)      the same in torch
    program(…)            how the kernel is run here, if at all: it must give what torch gives, sooner; asked once a shape

The kernel is `gated_mlp` of lib/kernels/triton_kernels.py. What it costs: `lib.efficiency.counts.encoder_costs`.
Axes: T tokens, D width, I intermediate width, K blocks.
"""

import logging
import statistics
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels import gpu, support
from lib.operators.monarch import BlockDiagonalLinear, block_diagonal, paired

TOKENS, STEP = (
    (64, 128),
    32,
)  # tokens of a program, to choose from; numbers of a gate that it holds at a time
WIDEST = 256  # channels of a block, whose sums a program holds in its registers
EPS = 1e-12
log = logging.getLogger(__name__)


def gated_mlp(layer, h: Tensor) -> Tensor | None:
    """y (B, L, D) of an MLP for h (B, L, D); None in training, or without a `program` for it."""
    tokens, norm = h.flatten(0, 1), layer.layernorm
    tile = None if layer.training else fits(tokens, layer.gated_layers, layer.wo)
    if tile is None:
        return None
    weights = layer.gated_layers.weight, layer.wo.weight, layer.wo.bias, norm.weight, norm.bias
    return mlp(tokens, *weights, norm.eps, tile).view_as(h)


def fits(h: Tensor, gated: BlockDiagonalLinear, wo: BlockDiagonalLinear) -> int | None:
    """The `program` for h, if there is one: Triton, blocks that pair, bfloat16 (float32 would not fit into registers), no gradients; None: torch does it."""
    can = (
        not torch.is_grad_enabled()
        and support.runs_triton(h)
        and paired(gated, wo)
        and wo.d_out // len(wo.weight) <= WIDEST
        and h.dtype == gated.weight.dtype == torch.bfloat16
        and not torch.is_autocast_enabled(h.device.type)
    )
    return program(wo.d_out, wo.d_in, len(wo.weight), h.dtype, h.device) if can else None


@cache
def program(
    width: int, inner: int, blocks: int, dtype: torch.dtype, device: torch.device
) -> int | None:
    """How many tokens a program of the kernel takes here; None: it does not compile, does not give what torch gives, or is slower.

    On a GPU all ways take turns at 16,384 tokens, and the log says what they took; in the interpreter the first is taken.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (max(TOKENS) + 1, width),
        (blocks, 2 * inner // blocks, width // blocks),
        (blocks, width // blocks, inner // blocks),
        (width,),
        (width,),
        (width,),
    )
    h, *given = (
        (torch.randn(shape, generator=generator) / shape[-1] ** (0.5 * (len(shape) == 3))).to(
            device, dtype
        )
        for shape in shapes
    )
    with torch.inference_mode():
        exact = mlp_direct(*(tensor.float() for tensor in (h, *given)), EPS)
        good = [
            tokens
            for tokens in TOKENS
            if support.verify(
                f"an MLP of width {width}, {inner} inside and {blocks} blocks, {tokens} tokens a program",
                dtype,
                device,
                lambda: [mlp(h, *given, EPS, tokens)],
                lambda: [exact],
                ("y",),
            )
        ]
        if device.type != "cuda" or not good:
            return good[0] if good else None
        many, taken = h[torch.arange(16_384, device=device) % len(h)], {}
        for _ in range(12):
            for tokens in (*good, None):
                start, end = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                start.record()
                mlp_direct(many, *given, EPS) if tokens is None else mlp(many, *given, EPS, tokens)
                end.record()
                torch.cuda.synchronize()
                taken.setdefault(tokens, []).append(start.elapsed_time(end))
    took = {tokens: statistics.median(some[2:]) for tokens, some in taken.items()}
    log.info(
        "an MLP of width %d takes, in ms for 16,384 tokens: %s",
        width,
        ", ".join(
            f"{'torch' if tokens is None else f'{tokens} tokens a program'} {some:.3f}"
            for tokens, some in took.items()
        ),
    )
    return min(took, key=took.get)


def mlp(
    h: Tensor,
    gated: Tensor,
    wo: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    tokens: int = TOKENS[0],
) -> Tensor:
    """LayerNorm(h + W_o(GELU(a) · b) + bias), (a, b) = W_g h, (T, D), of h's type.

    Args:
        h: (T, D), float32 or bfloat16; the others alike.
        gated, wo: (K, 2I/K, D/K) and (K, D/K, I/K), K even; bias: (D,).
        scale, shift, eps: of the LayerNorm, (D,).
        tokens: that a program takes, a power of two from 16.

    Raises:
        TypeError, ValueError: types or shapes that do not belong together.
    """
    (T, D), K = h.shape, len(wo)
    given = gated, wo, bias, scale, shift
    if {tensor.dtype for tensor in given} != {h.dtype} or h.dtype not in gpu.TYPES:
        raise TypeError(
            f"all of float32 or all of bfloat16: h is {h.dtype}, the weights {', '.join(sorted({str(tensor.dtype) for tensor in given}))}"
        )
    I = wo.shape[-1] * K
    if (
        K % 2
        or D % K
        or wo.shape != (K, D // K, I // K)
        or gated.shape != (K, 2 * I // K, D // K)
        or any(tensor.shape != (D,) for tensor in given[2:])
        or D // K > WIDEST
    ):
        raise ValueError(
            f"for h {(T, D)}, an even number K of blocks and D/K at most {WIDEST}: got {[tuple(tensor.shape) for tensor in given]}"
        )
    options = gpu.products(h.dtype)
    if not options["EMULATED"]:
        options |= {"num_warps": 8, "num_stages": 2}
    h, out = h.contiguous(), torch.empty_like(h, memory_format=torch.contiguous_format)
    weights = [tensor.contiguous() for tensor in given]
    sizes = D, I, K, max(16, 1 << (D // K - 1).bit_length()), tokens, STEP
    with gpu.on(h.device):
        if T:
            kernel = gpu.triton_kernels().gated_mlp[(-(-T // tokens),)]
            kernel(h, out, *weights, T, eps, *sizes, **options)
    return out


def mlp_direct(
    h: Tensor, gated: Tensor, wo: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """The same in torch, step by step."""
    a, b = block_diagonal(h, gated).chunk(2, dim=-1)
    return F.layer_norm(
        h + block_diagonal(F.gelu(a) * b, wo) + bias, scale.shape, scale, shift, eps
    )
