"""The gated MLP on a GPU: both block-diagonal products, GELU, gate, skip and LayerNorm in one kernel, which reads a token once and writes it once.

Step by step the same moves 3 D + 6 I numbers a token more, three quarters of an encoder's traffic: what lies between the two products is 8 times as
wide as a token at the published sizes, and here it never leaves the registers.

    mlp(h, …)             LayerNorm(h + W_o(GELU(a) · b)), (a, b) = W_g h, without gradients
    mlp_direct(h, …)      the same in torch
    works(…)              whether the kernel compiles here and gives what torch gives, asked once a shape

The kernel is `gated_mlp` of lib/monarch_kernels.py. What it costs: `monarch_conv.encoder_costs`.
Axes: T tokens, D width, I intermediate width, K blocks.
"""
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import monarch_conv
from lib.monarch import BlockDiagonalLinear, block_diagonal, paired

TOKENS, STEP = 64, 32           # tokens of a program; numbers of a gate that it holds at a time. More of either spills registers on an H100 at the published sizes
WIDEST = 256                    # channels of a block, whose sums a program holds in its registers


def fits(h: Tensor, gated: BlockDiagonalLinear, wo: BlockDiagonalLinear) -> bool:
    """Whether `mlp` should be used: Triton for h, blocks that pair, bfloat16 (float32 would not fit into registers), no gradients; and that it works here."""
    return (not torch.is_grad_enabled() and monarch_conv.available(h) and paired(gated, wo) and wo.d_out // len(wo.weight) <= WIDEST and h.dtype == gated.weight.dtype == torch.bfloat16
            and not torch.is_autocast_enabled(h.device.type) and works(wo.d_out, wo.d_in, len(wo.weight), h.dtype, h.device))


@cache
def works(width: int, inner: int, blocks: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel for such layers can be trusted here: as many random tokens as one program takes, and one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS + 1, width), (blocks, 2 * inner // blocks, width // blocks), (blocks, width // blocks, inner // blocks), (width,), (width,), (width,)
    given = [(torch.randn(shape, generator=generator) / shape[-1] ** (0.5 * (len(shape) == 3))).to(device, dtype) for shape in shapes]
    with torch.inference_mode():
        return monarch_conv.trusted(f"an MLP of width {width}, {inner} inside and {blocks} blocks", dtype, device,
                                    lambda: [mlp(*given, 1e-12)], lambda: [mlp_direct(*(tensor.float() for tensor in given), 1e-12)], ("y",))


def mlp(h: Tensor, gated: Tensor, wo: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(h + W_o(GELU(a) · b) + bias), (a, b) = W_g h, (T, D), of h's type.

    Args:
        h: (T, D), float32 or bfloat16; the others alike.
        gated, wo: (K, 2I/K, D/K) and (K, D/K, I/K), K even; bias: (D,).
        scale, shift, eps: of the LayerNorm, (D,).

    Raises:
        TypeError, ValueError: types or shapes that do not belong together.
    """
    (T, D), K = h.shape, len(wo)
    given = gated, wo, bias, scale, shift
    if {tensor.dtype for tensor in given} != {h.dtype} or h.dtype not in monarch_conv.TYPES:
        raise TypeError(f"all of float32 or all of bfloat16: h is {h.dtype}, the weights {', '.join(sorted({str(tensor.dtype) for tensor in given}))}")
    I = wo.shape[-1] * K
    if K % 2 or D % K or wo.shape != (K, D // K, I // K) or gated.shape != (K, 2 * I // K, D // K) or any(tensor.shape != (D,) for tensor in given[2:]) or D // K > WIDEST:
        raise ValueError(f"for h {(T, D)}, an even number K of blocks and D/K at most {WIDEST}: got {[tuple(tensor.shape) for tensor in given]}")
    kernels, how = monarch_conv.launch(h.dtype)
    if not monarch_conv.interpreted():
        how = how | {"num_warps": 8, "num_stages": 2}
    h, out = h.contiguous(), torch.empty_like(h, memory_format=torch.contiguous_format)
    with monarch_conv.on(h.device):
        if T:
            kernels.gated_mlp[(-(-T // TOKENS),)](h, out, *(tensor.contiguous() for tensor in given), T, eps, D, I, K, max(16, 1 << (D // K - 1).bit_length()), TOKENS, STEP, **how)
    return out


def mlp_direct(h: Tensor, gated: Tensor, wo: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The same in torch, step by step."""
    a, b = block_diagonal(h, gated).chunk(2, dim=-1)
    return F.layer_norm(h + block_diagonal(F.gelu(a) * b, wo) + bias, scale.shape, scale, shift, eps)
