"""The gated MLP on a GPU: both block-diagonal layers, GELU, gate, skip, LayerNorm in one kernel.

Step by step, an MLP moves 3 D + 6 I more numbers for each token, up to two thirds of an encoder's
memory traffic: at the published sizes its activations are 8 times as wide as a token. In this
kernel they never leave the registers. It reads each token from memory once and writes it once; the
weights, which every program reads, come from the cache.

    mlp(h, …)             LayerNorm(h + W_o(GELU(a) · b)), (a, b) = W_g h, without gradients
    mlp_direct(h, …)      the same in torch
    program(…)            the kernel's tile on this machine, or None if the kernel does not agree
                          with torch or is slower; tested once for each shape
    gate(ab), gate_direct(ab)   GELU(a) · b with gradients: training keeps (a, b) alone

The kernels are `gated_mlp`, `gate` and `gate_gradient` of triton_kernels.py;
`lib.efficiency.counts.encoder_costs` counts the operations and bytes of the first.
Axes: T tokens, D width, I intermediate width (`inner`), K blocks.
"""

from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lib.kernels import choices, gpu, support
from lib.operators.monarch import block_diagonal, paired

TOKENS = (64, 128)  # choices for the tokens per program
STEP = 32  # numbers of a gate that a program holds at a time
WIDEST = 256  # largest width of a block: a program holds the sums of one block in its registers
EPS = 1e-12


def gated_mlp(layer, h: Tensor) -> Tensor | None:
    """y (B, L, D) of an MLP for h (B, L, D), or None if torch has to compute it.

    The kernel needs Triton, blocks that pair, bfloat16 (float32 does not fit into the registers),
    no gradients and a `program`. In training `gate` is a kernel.
    """
    if layer.training or torch.is_grad_enabled():
        return trained_mlp(layer, h)
    gated, wo, norm = layer.gated_layers, layer.wo, layer.layernorm
    usable = (
        not torch.is_autocast_enabled(h.device.type)
        and support.runs_triton(h)
        and h.dtype == gated.weight.dtype
    )
    tokens = tile(layer, h.dtype, h.device) if usable else None
    if tokens is None:
        return None
    weights = gated.weight, wo.weight, wo.bias, norm.weight, norm.bias
    return mlp(h.flatten(0, 1), *weights, norm.eps, tokens).view_as(h)


def trained_mlp(layer, h: Tensor) -> Tensor | None:
    """`MLP.definition` with `gate`; None if the kernel is not supported here."""
    if not (support.runs_triton(h) and gate_is_supported(support.compute_dtype(h), h.device)):
        return None
    y = layer.dropout(gate(layer.gated_layers(h).flatten(0, 1)))
    return layer.layernorm(h + layer.wo(y).view_as(h))


def tile(layer, dtype: torch.dtype, device: torch.device) -> int | None:
    """The tokens per program of a layer; None: the kernel does not serve it."""
    wo, blocks = layer.wo, len(layer.wo.weight)
    fits = paired(layer.gated_layers, wo) and wo.d_out // blocks <= WIDEST
    if dtype != torch.bfloat16 or not fits:
        return None
    return program(wo.d_out, wo.d_in, blocks, dtype, device)


@cache
def program(width: int, inner: int, blocks: int, dtype: torch.dtype, device) -> int | None:
    """The tokens per program; None: the kernel does not compile, is wrong, or is slower than torch.

    On a GPU the choices and torch are timed at 16,384 tokens. The interpreter takes the first
    choice that agrees with torch.
    """
    what = f"an MLP of width {width}, {inner} inside and {blocks} blocks"
    find = partial(tested, what, width, inner, blocks, dtype, device)
    return choices.remembered(f"{what}, {dtype}", device, TOKENS, find)


def tested(what: str, width: int, inner: int, blocks: int, dtype, device) -> int | None:
    """`program` without a memory."""
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
            ways = lambda: [mlp(h, *weights, EPS, tokens)], lambda: [exact]
            name = f"{what}, {tokens} tokens per program"
            return support.verify(name, dtype, device, *ways, ("y",))

        good = [tokens for tokens in TOKENS if agrees(tokens)]
        if device.type != "cuda" or not good:
            return good[0] if good else None
        x = h[torch.arange(16_384, device=device) % len(h)]
        ways = {f"{n} tokens per program": partial(mlp, x, *weights, EPS, n) for n in good}
        ways["torch"] = partial(mlp_direct, x, *weights, EPS)
        best = support.fastest(f"{what}, 16,384 tokens,", ways)
        return dict(zip(ways, good)).get(best)


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


# ------------------------------------------------------------------ the gate, in training


def gate(ab: Tensor) -> Tensor:
    """GELU(a) · b, (T, I), of ab (T, 2I), float32 or bfloat16; it can be differentiated once."""
    return Gate.apply(ab)


def gate_direct(ab: Tensor) -> Tensor:
    """`gate` in torch."""
    a, b = ab.chunk(2, dim=-1)
    return F.gelu(a) * b


class Gate(torch.autograd.Function):
    """`gate` with gradients; torch would keep GELU(a), too, and join the gradients by a copy."""

    @staticmethod
    def forward(ctx, ab: Tensor) -> Tensor:
        ab = ab.contiguous()
        ctx.save_for_backward(ab)
        y = ab.new_empty(len(ab), ab.shape[1] // 2)
        launch("gate", y, ab, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (ab,) = ctx.saved_tensors
        dab = torch.empty_like(ab)
        launch("gate_gradient", dy, ab, dy.contiguous(), dab)
        return dab


def launch(kernel: str, y: Tensor, *pointers: Tensor) -> None:
    """Run a kernel on parts of the rows of y."""
    (T, inner), emulated = y.shape, support.interpreted()
    block = min(1024, max(16, 1 << (inner - 1).bit_length()))
    with gpu.on(y.device):
        if y.numel():
            run = getattr(gpu.triton_kernels(), kernel)[(T, -(-inner // block))]
            run(*pointers, inner, BLOCK=block, EMULATED=emulated)


@cache
def gate_is_supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `gate` agrees with torch here and is faster."""
    if dtype not in gpu.TYPES:
        return False
    generator = torch.Generator().manual_seed(0)

    def trial(T: int, inner: int) -> tuple:
        """Functions that compute y and the gradient, by the kernel and by torch."""
        ab, dy = (torch.randn(T, n, generator=generator).to(device) for n in (2 * inner, inner))

        def results(function, dtype: torch.dtype) -> list[Tensor]:
            with torch.enable_grad():
                leaf = ab.detach().to(dtype).requires_grad_()
                y = function(leaf)
            return [y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))]

        return tuple(partial(results, function) for function in (gate, gate_direct))

    def find() -> bool:
        ours, torchs = trial(3, 1040)
        ways = partial(ours, dtype), partial(torchs, torch.float32)
        agrees = support.verify("the gate of an MLP", dtype, device, *ways, ("y", "dab"))
        if not agrees or device.type != "cuda":
            return agrees
        ours, torchs = (partial(way, dtype) for way in trial(8192, 3072))
        return support.fastest("the gate of an MLP", {"ours": ours, "torch": torchs}) == "ours"

    return bool(choices.remembered(f"the gate of an MLP, {dtype}", device, (True,), find))
