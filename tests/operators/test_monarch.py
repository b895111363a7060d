"""Block-diagonal layers against the matrices they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.operators.monarch import (
    BlockDiagonalLinear,
    block_diagonal,
    block_diagonal_dense,
    block_diagonal_in_place,
    monarch_dense,
)


def test_two_blocks_by_hand():
    weight = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # two blocks, 2 inputs and 1 output each
    assert block_diagonal_dense(weight).tolist() == [[1, 2, 0, 0], [0, 0, 3, 4]]
    assert block_diagonal(torch.tensor([1.0, 10.0, 100.0, 1000.0]), weight).tolist() == [
        21.0,
        4300.0,
    ]


@settings(deadline=None, max_examples=50)
@given(
    blocks=st.integers(1, 5),
    fan_in=st.integers(1, 6),
    fan_out=st.integers(1, 6),
    missing=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_block_diagonal_equals_its_dense_matrix(blocks, fan_in, fan_out, missing, seed):
    generator = torch.Generator().manual_seed(seed)
    missing = min(missing, blocks - 1)  # the last inputs do not exist and count as zeros
    width = blocks * fan_in - missing
    if width < 1:
        return
    weight = torch.randn(blocks, fan_out, fan_in, generator=generator)
    x = torch.randn(2, 3, width, generator=generator)
    torch.testing.assert_close(
        block_diagonal(x, weight), x @ block_diagonal_dense(weight)[:, :width].T
    )


@pytest.mark.parametrize(
    "case, d_in, d_out", [("blockdiag_div", 12, 20), ("blockdiag_nondiv", 10, 7)]
)
def test_layer_reproduces_the_reference(golden, case, d_in, d_out):
    values = golden("primitives")
    layer = BlockDiagonalLinear(d_in, d_out, blocks=4)
    layer.load_state_dict({name: values[f"{case}/{name}"] for name in ("weight", "bias")})
    torch.testing.assert_close(layer(values[f"{case}/x"]), values[f"{case}/y"])


def test_gradients_equal_those_of_the_dense_layer():
    layer = BlockDiagonalLinear(10, 7, blocks=4).double()
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    dense = block_diagonal_dense(layer.weight)[:7, :10]
    grown = torch.autograd.grad((layer(x) ** 2).sum(), [x, layer.weight])
    full = torch.autograd.grad(((x @ dense.T + layer.bias) ** 2).sum(), [x, layer.weight])
    for ours, theirs in zip(grown, full):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 12)])
@pytest.mark.parametrize("blocks, fan_out", [(4, 6), (4, 2), (1, 5), (12, 1)])
def test_written_in_place_it_is_the_same_with_its_gradients(shape, blocks, fan_out):
    """What a GPU runs, here in float64."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(blocks, fan_out, 12 // blocks, dtype=torch.float64, requires_grad=True)
    y, expected = block_diagonal_in_place(x, weight), block_diagonal(x, weight)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, (x, weight), dy) for out in (y, expected))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_in_place_takes_views_and_one_gradient_alone():
    x, weight = torch.randn(3, 8, 5).transpose(1, 2), torch.randn(4, 3, 2, requires_grad=True)
    dense = block_diagonal_dense(weight)
    torch.testing.assert_close(block_diagonal_in_place(x, weight), x @ dense.T)
    (ours,) = torch.autograd.grad(block_diagonal_in_place(x, weight).square().sum(), weight)
    (theirs,) = torch.autograd.grad((x @ dense.T).square().sum(), weight)
    torch.testing.assert_close(ours, theirs)
    (slope,) = torch.autograd.grad(
        block_diagonal_in_place(x.requires_grad_(), weight).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_in_place_follows_autocast_as_torch_does():
    x, weight = torch.randn(6, 8), torch.randn(4, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = block_diagonal_in_place(x, weight), block_diagonal(x, weight)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_a_transposed_view_gives_the_same_as_its_copy():
    layer, x = BlockDiagonalLinear(8, 8), torch.randn(3, 8, 5).transpose(1, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_blocks_divide_the_weights(blocks):
    layer = BlockDiagonalLinear(16, 32, blocks, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 16 * 32 // blocks
    assert layer.bias is None


# Bounds of the published 80M model's two layers.
@pytest.mark.parametrize("d_in, d_out, bound", [(768, 6144, 0.0722), (3072, 768, 0.0361)])
def test_initial_weights_fill_the_published_range(d_in, d_out, bound):
    torch.manual_seed(0)
    layer = BlockDiagonalLinear(d_in, d_out, blocks=4)
    assert layer.weight.abs().max().item() == pytest.approx(bound, abs=1e-4)
    assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert layer.bias.abs().max().item() == pytest.approx(d_out**-0.5, rel=0.02)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_monarch_is_two_block_diagonals_around_transpositions(n):
    """Apply it to a vector as a grid: R mixes each row, L each column. No matrix is formed."""
    left, right = torch.randn(n, n, n), torch.randn(n, n, n)
    x = torch.randn(n * n)
    grid = torch.stack([right[i] @ row for i, row in enumerate(x.reshape(n, n))])  # R, row by row
    grid = torch.stack(
        [left[j] @ column for j, column in enumerate(grid.T)]
    ).T  # P L P, column by column
    torch.testing.assert_close(
        monarch_dense(left, right) @ x, grid.reshape(-1), rtol=1e-4, atol=1e-5
    )


def test_monarch_of_identities_is_the_identity_and_one_of_ones_sees_everything():
    eye = torch.eye(3).expand(3, 3, 3)
    assert torch.equal(monarch_dense(eye, eye), torch.eye(9))
    assert torch.equal(monarch_dense(torch.ones(3, 3, 3), torch.ones(3, 3, 3)), torch.ones(9, 9))
    assert (
        monarch_dense(eye, torch.ones(3, 3, 3)) == 0
    ).any()  # one factor alone leaves most pairs apart


def test_monarch_reaches_matrices_no_block_diagonal_can():
    """The Fourier matrix of size 4 is a Monarch matrix up to its inputs' order (Cooley, Tukey)."""
    n = 2
    omega = torch.exp(torch.tensor(-2j * torch.pi / n**2))
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.complex64)
    # x[2a + b] sits at grid cell (b, a): rows are transformed, twiddled, then columns.
    right = torch.stack([torch.diag(omega ** torch.tensor([0.0, b])) @ two for b in (0.0, 1.0)])
    left = torch.stack([two, two])
    order = torch.tensor([0, 2, 1, 3])
    fourier = omega ** torch.outer(torch.arange(4.0), torch.arange(4.0))
    torch.testing.assert_close(monarch_dense(left, right), fourier[:, order], rtol=1e-4, atol=1e-5)


def test_misfits_are_refused_with_their_numbers():
    weight = torch.randn(4, 2, 3)
    for width in (8, 13):
        with pytest.raises(AssertionError, match=f"{width} inputs do not fit 4 blocks of 3"):
            block_diagonal(torch.randn(1, width), weight)
    for blocks in (0, 9):
        with pytest.raises(ValueError, match=f"{blocks} blocks for 8 inputs"):
            BlockDiagonalLinear(8, 16, blocks)
