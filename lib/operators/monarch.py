"""Structured matrices: a dense layer's work for a fraction of its weights.

A dense layer of width D costs D² weights. A Monarch matrix of order 2 is a product of two
block-diagonal matrices with a transposition between them, and costs 2 D √D. M2-BERT's MLPs use the
simplest member of the family, a single block-diagonal factor: K blocks, D² / K weights, no mixing
between blocks.

    block_diagonal(x, weight)      what the model runs
    block_diagonal_in_place(…)     the same on a GPU, where a copy of the activations costs more
    block_diagonal_dense(weight)   the same matrix written out, zeros included
    monarch_dense(left, right)     the full Monarch product, for notebooks and tests
    paired(gated, out)             whether two such layers form a gated MLP block by block

Source: Fu et al. 2023 (Monarch Mixer, arXiv 2310.12109) and Saad-Falcon et al.
        2024 (arXiv 2402.07440v3); layout of the weights as in the published files.
Axes:   K blocks, I input width, O output width.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def block_diagonal_dense(weight: Tensor) -> Tensor:
    """The block-diagonal matrix in full: (K, O/K, I/K) -> (O, I). The definition."""
    return torch.block_diag(*weight)


def block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """y = blockdiag(W_0 … W_{K-1}) x, without forming the zeros.

    Args:
        x: (…, I). If K does not divide I, x is padded with zeros to K · ceil(I/K).
        weight: (K, ceil(O/K), ceil(I/K)).

    Returns:
        (…, K · ceil(O/K)); the caller cuts it to O.
    """
    blocks, _, fan_in = weight.shape
    missing = blocks * fan_in - x.shape[-1]
    assert 0 <= missing < blocks, f"{x.shape[-1]} inputs do not fit {blocks} blocks of {fan_in}"
    if missing:
        x = F.pad(x, (0, missing))
    if x.is_cuda:
        return block_diagonal_in_place(x, weight)
    flat = x.reshape(-1, blocks, fan_in).transpose(0, 1)  # (K, n, I/K)
    y = torch.bmm(flat, weight.transpose(1, 2))  # (K, n, O/K)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)  # (…, O)


def block_diagonal_in_place(x: Tensor, weight: Tensor) -> Tensor:
    """`block_diagonal` without a copy of x, y or their gradients, which torch.bmm transposes.

    Args:
        x: (…, I), I = K · (columns of a block). Under autocast x and weight are cast to its dtype.
        weight: (K, O/K, I/K).

    Returns:
        (…, O). It can be differentiated once.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    y = InPlaceBlocks.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight)
    return y.view(*x.shape[:-1], -1)


class InPlaceBlocks(torch.autograd.Function):
    """y_k = W_k x_k of rows x (n, I); every product is written where it belongs in y (n, O).

    dx_k = W_k^T dy_k,   dW_k = Σ_n dy_k x_k^T
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        K, fan_out, _ = weight.shape
        y = x.new_empty(len(x), K * fan_out)
        torch.bmm(by_block(x, K), weight.mT, out=by_block(y, K))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x, weight), dy, dx, dweight = ctx.saved_tensors, dy.contiguous(), None, None
        K = len(weight)
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            torch.bmm(by_block(dy, K), weight, out=by_block(dx, K))
        if ctx.needs_input_grad[1]:
            dweight = torch.bmm(by_block(dy, K).mT, by_block(x, K))
        return dx, dweight


def by_block(rows: Tensor, blocks: int) -> Tensor:
    """The part of each block, (K, n, width / K), of rows (n, width); a view."""
    return rows.unflatten(1, (blocks, -1)).transpose(0, 1)


def monarch_dense(left: Tensor, right: Tensor) -> Tensor:
    """M = P L P R for n = K²: two block-diagonal factors around the transposition P.

    P sends index (i, j) of a K x K grid to (j, i), so R mixes within the rows and L within the
    columns: after both, every output has seen every input.

    Args:
        left, right: (K, K, K), the blocks of L and R.

    Returns:
        (K², K²).
    """
    n = len(left)
    identity = torch.eye(n * n, dtype=left.dtype, device=left.device)
    transpose = identity.reshape(n, n, -1).transpose(0, 1).reshape(n * n, -1)
    return transpose @ block_diagonal_dense(left) @ transpose @ block_diagonal_dense(right)


class BlockDiagonalLinear(nn.Module):
    """A linear layer whose weight is K blocks on a diagonal: K times fewer weights.

    Initialised as the published models are: weights U(-s, s) with s = √(K / d_in), the dense
    layer's Kaiming bound times √K, as K times fewer inputs add up; bias U(-1/√d_out, 1/√d_out).
    """

    def __init__(self, d_in: int, d_out: int, blocks: int = 4, bias: bool = True):
        super().__init__()
        if not 1 <= blocks <= min(d_in, d_out):
            raise ValueError(
                f"{blocks} blocks for {d_in} inputs and {d_out} outputs: between 1 and the smaller "
                "of the two"
            )
        self.d_in, self.d_out = d_in, d_out
        shape = blocks, math.ceil(d_out / blocks), math.ceil(d_in / blocks)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = math.sqrt(self.weight.shape[0] / self.d_in)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.d_out), 1 / math.sqrt(self.d_out))

    def forward(self, x: Tensor) -> Tensor:  # (…, d_in)
        y = block_diagonal(x, self.weight)[..., : self.d_out]  # (…, d_out)
        return y if self.bias is None else y + self.bias


def paired(gated: BlockDiagonalLinear, out: BlockDiagonalLinear) -> bool:
    """Whether two layers form a gated MLP block by block.

    Blocks k and k + K/2 of `gated` then compute gate and value of the activations that blocks 2k
    and 2k + 1 of `out` read.
    """
    K = len(gated.weight)
    return (
        K == len(out.weight)
        and K % 2 == 0
        and gated.d_out == 2 * out.d_in
        and not any(n % K for layer in (gated, out) for n in (layer.d_in, layer.d_out))
    )
