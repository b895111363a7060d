"""The losses by hand, by their gradients, and against the authors' values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.training.losses import (
    contrastive_loss,
    multiple_negatives_ranking_loss,
    orthogonal_projection_loss,
    prototype_loss,
    triplet_loss,
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    ).requires_grad_()


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=tolerance)


# ---------------------------------------------------------------- orthogonal projection loss


def test_opl_of_two_pairs_by_hand():
    q = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    d = torch.tensor([[3.0, 4.0], [1.0, 1.0]])  # cosines 0.6 and 1/√2, whatever the norms
    loss = orthogonal_projection_loss(q, d, torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(((0.6 - 1) ** 2 + 0.5) / 2)


@pytest.mark.parametrize(
    "angle, label, expected", [(0, 1, 0), (90, 0, 0), (90, 1, 1), (180, 0, 1), (180, 1, 4)]
)
def test_opl_at_the_ends_of_its_range(angle, label, expected):
    q, d = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))]]),
    )
    assert orthogonal_projection_loss(q, d, torch.tensor([float(label)])).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_opl_reproduces_the_reference(golden):
    values = golden("losses")
    a, b = (values[f"opl/input/{name}"].requires_grad_() for name in "ab")
    label = values["opl/input/label"]
    close(torch.cosine_similarity(a, b), values["opl/cosine"])
    loss = orthogonal_projection_loss(a, b, label)
    close(loss, values["opl/float32/loss"])
    grad_a, grad_b = torch.autograd.grad(loss, [a, b])
    close(grad_a, values["opl/float32/grad_a"])
    close(grad_b, values["opl/float32/grad_b"])
    for pair, name in ((0, "1"), (1, "0")):
        assert label[pair] == float(name)
        loss = orthogonal_projection_loss(a[pair:][:1], b[pair:][:1], label[pair:][:1])
        close(loss, values[f"opl/single/{name}/loss"])
        grad_a, grad_b = torch.autograd.grad(loss, [a, b])
        close(grad_a[pair], values[f"opl/single/{name}/grad_a"])
        close(grad_b[pair], values[f"opl/single/{name}/grad_b"])


def test_the_references_bfloat16_cosine_is_the_same_loss_up_to_rounding(golden):
    values = golden("losses")
    a, b = values["opl/input/a"].requires_grad_(), values["opl/input/b"]
    cosine = torch.cosine_similarity(a, b).bfloat16()
    rounded = ((cosine - values["opl/input/label"].bfloat16()) ** 2).mean()
    assert rounded.item() == pytest.approx(values["opl/bfloat16/loss"].item(), rel=0.01)
    (exact,) = torch.autograd.grad(orthogonal_projection_loss(a, b, values["opl/input/label"]), a)
    torch.testing.assert_close(exact, values["opl/bfloat16/grad_a"], rtol=0.02, atol=2e-3)


def test_opl_of_bfloat16_embeddings_keeps_their_type():
    q, d = draw(3, 8).bfloat16(), draw(3, 8, seed=1).bfloat16()
    loss = orthogonal_projection_loss(q, d, torch.tensor([1.0, 0.0, 1.0]))
    assert loss.dtype == torch.bfloat16
    close(
        loss.float(),
        orthogonal_projection_loss(q.float(), d.float(), torch.tensor([1.0, 0.0, 1.0])),
        0.02,
    )


def test_opl_gradient_of_a_pair_by_its_formula():
    """dL/dq = 2 (c - y) (d / |q||d| - c q / |q|²)."""
    q, d = draw(1, 8), draw(1, 8, seed=1)
    for y in (0.0, 1.0):
        (grad,) = torch.autograd.grad(orthogonal_projection_loss(q, d, torch.tensor([y])), q)
        c, norm_q, norm_d = torch.cosine_similarity(q, d).item(), q.norm(), d.norm()
        close(grad, (2 * (c - y) * (d / (norm_q * norm_d) - c * q / norm_q**2)).detach())


def test_opl_gradient_of_a_pair_ignores_its_batch_mates():
    q, d, y = draw(4, 8), draw(4, 8, seed=1), torch.tensor([1.0, 0.0, 0.0, 1.0])
    (crowd,) = torch.autograd.grad(orthogonal_projection_loss(q, d, y), q)
    for pair in range(4):
        (alone,) = torch.autograd.grad(
            orthogonal_projection_loss(q[pair:][:1], d[pair:][:1], y[pair:][:1]), q
        )
        close(crowd[pair] * 4, alone[pair])  # undo the mean over B = 4


def accumulated(loss, model, q, d, parts, *more):
    """The gradient of a model's weight: each part's loss, weighted by its share of the pairs."""
    total = torch.zeros_like(model.weight)
    for some in parts:
        value = loss(model(q[some]), model(d[some]), *(x[some] for x in more))
        total += torch.autograd.grad(value, model.weight)[0] * len(some) / len(q)
    return total


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_accumulated_opl_is_the_gradient_of_the_large_batch(sizes, seed):
    """Any split of the pairs adds up to the whole; float64, so that only a wrong claim fails."""
    B = sum(sizes)
    model = torch.nn.Linear(8, 6, bias=False).double()
    q, d = (
        draw(B, 8, seed=seed, dtype=torch.float64).detach(),
        draw(B, 8, seed=seed + 100, dtype=torch.float64).detach(),
    )
    y = torch.arange(B) % 2.0
    parts = torch.arange(B).split(sizes)
    (whole,) = torch.autograd.grad(orthogonal_projection_loss(model(q), model(d), y), model.weight)
    torch.testing.assert_close(
        accumulated(orthogonal_projection_loss, model, q, d, parts, y.double()),
        whole,
        rtol=1e-12,
        atol=1e-14,
    )


def test_accumulated_mnrl_is_another_gradient():
    """The pairs of a part never meet the others: one pair alone has nothing to rank."""
    model = torch.nn.Linear(8, 6, bias=False).double()
    q, d = (
        draw(4, 8, dtype=torch.float64).detach(),
        draw(4, 8, seed=1, dtype=torch.float64).detach(),
    )
    (whole,) = torch.autograd.grad(
        multiple_negatives_ranking_loss(model(q), model(d)), model.weight
    )
    halves = accumulated(multiple_negatives_ranking_loss, model, q, d, torch.arange(4).split(2))
    singles = accumulated(multiple_negatives_ranking_loss, model, q, d, torch.arange(4).split(1))
    assert (halves - whole).norm() > 0.1 * whole.norm()
    assert singles.abs().max() < 1e-12 < 1e-3 < whole.abs().max()


# ---------------------------------------------------------------- multiple negatives ranking loss


def test_mnrl_of_two_pairs_by_hand():
    q = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    d = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    # cosines: q0 with d0 .6 and d1 0; q1 with d0 .8 and d1 1. scale 2
    expected = (math.log(math.exp(1.2) + 1) - 1.2 + math.log(math.exp(1.6) + math.exp(2)) - 2) / 2
    assert multiple_negatives_ranking_loss(q, d, scale=2.0).item() == pytest.approx(expected)


def test_mnrl_with_explicit_negatives_and_the_default_scale_by_hand():
    q, d, negatives = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.9, 0.19**0.5], [0.0, -1.0]]),
    )
    expected = math.log(math.exp(20) + math.exp(18) + 1) - 20  # cosines 1, .9, 0 times 20
    assert multiple_negatives_ranking_loss(q, d, negatives).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_mnrl_reproduces_the_reference(golden):
    values = golden("losses")
    anchor, positive, negative = (
        values[f"input/{name}"].requires_grad_() for name in ("anchor", "positive", "negative")
    )
    loss = multiple_negatives_ranking_loss(anchor, positive)
    close(loss, values["mnrl/pairs/loss"])
    for grad, name in zip(torch.autograd.grad(loss, [anchor, positive]), ("anchor", "positive")):
        close(grad, values[f"mnrl/pairs/grad_{name}"], 1e-5)
    loss = multiple_negatives_ranking_loss(anchor, positive, negative)
    close(loss, values["mnrl/triplets/loss"])
    for size in (1, 2, 4, 6):
        close(loss, values[f"mnrl/cached_triplets_minibatch{size}/loss"])
    for grad, name in zip(
        torch.autograd.grad(loss, [anchor, positive, negative]), ("anchor", "positive", "negative")
    ):
        close(grad, values[f"mnrl/triplets/grad_{name}"], 1e-5)


def test_mnrl_of_a_lonely_pair_teaches_nothing():
    q, d = draw(1, 8), draw(1, 8, seed=1)
    loss = multiple_negatives_ranking_loss(q, d)
    loss.backward()
    assert loss.item() == 0 and q.grad.abs().max() < 1e-6 and d.grad.abs().max() < 1e-6


def test_mnrl_targets_let_queries_share_a_document():
    """Three queries, two documents: the shared one never is its own query's negative."""
    q, d = draw(3, 8), draw(2, 8, seed=1)
    shared = multiple_negatives_ranking_loss(q, d, targets=torch.tensor([0, 0, 1]))
    one_by_one = [
        multiple_negatives_ranking_loss(q[i:][:1], d[[own]], d[[1 - own]])
        for i, own in enumerate((0, 0, 1))
    ]
    close(shared, torch.stack(one_by_one).mean())
    repeated = multiple_negatives_ranking_loss(
        q, d[[0, 0, 1]]
    )  # what ignoring the identity would give
    assert repeated > shared + 0.1


def test_mnrl_leaves_a_second_answer_out_by_hand():
    """d0 and d1 answer q0. Ranked against each other they cost log 2, though both are perfect."""
    q, d = (
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]),
    )
    targets, relevant = (
        torch.tensor([0, 2]),
        torch.tensor([[True, True, False], [False, False, False]]),
    )

    def rank(scale, **options):
        return multiple_negatives_ranking_loss(q, d, scale=scale, targets=targets, **options).item()

    assert rank(50.0) == pytest.approx(math.log(2) / 2) and rank(
        50.0, relevant=relevant
    ) == pytest.approx(0, abs=1e-6)
    # cosines: q0 with d0 1, d2 0; q1 with d2 1, d0 and d1 0. scale 2
    assert rank(2.0, relevant=relevant) == pytest.approx(
        (math.log(1 + math.exp(-2)) + math.log(1 + 2 * math.exp(-2))) / 2
    )


@settings(deadline=None, max_examples=30)
@given(B=st.integers(1, 4), N=st.integers(1, 4), M=st.integers(0, 3), seed=st.integers(0, 99))
def test_mnrl_is_that_of_each_query_alone_with_the_documents_that_do_not_answer_it(B, N, M, seed):
    generator = torch.Generator().manual_seed(seed)
    q, d, negatives = (
        draw(n, 8, seed=seed + i, dtype=torch.float64) for i, n in enumerate((B, N, M))
    )
    targets, relevant = (
        torch.randint(N, (B,), generator=generator),
        torch.rand(B, N + M, generator=generator) < 0.5,
    )
    kept = relevant.clone()
    loss = multiple_negatives_ranking_loss(q, d, negatives, targets=targets, relevant=relevant)
    alone = []
    for b, own in enumerate(targets.tolist()):
        left = [j for j in range(N + M) if j != own and not relevant[b, j]]
        alone.append(
            multiple_negatives_ranking_loss(q[b:][:1], d[[own]], torch.cat([d, negatives])[left])
        )
    torch.testing.assert_close(loss, torch.stack(alone).mean(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(loss, [q, d]), torch.autograd.grad(torch.stack(alone).mean(), [q, d])
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.equal(relevant, kept)  # the caller's own


def test_mnrl_of_a_query_that_everything_answers_teaches_nothing():
    q, d = draw(2, 8), draw(3, 8, seed=1)
    loss = multiple_negatives_ranking_loss(
        q, d, targets=torch.tensor([0, 2]), relevant=torch.ones(2, 3, dtype=torch.bool)
    )
    loss.backward()
    assert loss.item() == 0 and q.grad.abs().max() < 1e-6 and d.grad.abs().max() < 1e-6
    half = multiple_negatives_ranking_loss(
        q, d, targets=torch.tensor([0, 2]), relevant=torch.tensor([[True] * 3, [False] * 3])
    )
    close(
        half, multiple_negatives_ranking_loss(q[1:], d[[2]], d[:2]) / 2
    )  # the other one is ranked as ever


def test_mnrl_ignores_norms_and_the_order_of_pairs():
    q, d = draw(5, 8), draw(5, 8, seed=1)
    loss, order = multiple_negatives_ranking_loss(q, d), torch.tensor([3, 0, 4, 1, 2])
    close(multiple_negatives_ranking_loss(7 * q, d * torch.arange(1, 6)[:, None]), loss)
    close(multiple_negatives_ranking_loss(q[order], d[order]), loss)


# ---------------------------------------------------------------- prototype loss


def test_prototype_loss_by_hand():
    q, teacher_q = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])  # cosine .6
    d, teacher_d = torch.tensor([[1.0, 1.0]]), torch.tensor([[-3.0, 3.0]])  # cosine 0
    assert prototype_loss(q, d, teacher_q, teacher_d).item() == pytest.approx(0.4 + 1)
    assert prototype_loss(q, d, 5 * q, d / 2).item() == pytest.approx(0, abs=1e-6)
    assert prototype_loss(q, d, -q, -d).item() == pytest.approx(4)


def test_prototype_loss_moves_the_student_and_never_the_teacher():
    q, d, teacher_q, teacher_d = (draw(3, 8, seed=seed) for seed in range(4))
    prototype_loss(q, d, teacher_q, teacher_d).backward()
    assert teacher_q.grad is None and teacher_d.grad is None
    with torch.no_grad():
        nearer = prototype_loss(q - 0.1 * q.grad, d - 0.1 * d.grad, teacher_q, teacher_d)
    assert nearer < prototype_loss(q, d, teacher_q, teacher_d)


# ---------------------------------------------------------------- contrastive and triplet losses


def test_contrastive_loss_of_three_pairs_by_hand():
    q = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    d = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 7.0]])  # cosines .6, .8, 0: distances .4, .2, 1
    y = torch.tensor([1.0, 0.0, 0.0])
    expected = (0.4**2 / 2 + (0.5 - 0.2) ** 2 / 2 + 0) / 3
    assert contrastive_loss(q, d, y).item() == pytest.approx(expected, abs=1e-6)
    wider = (0.4**2 / 2 + (1.5 - 0.2) ** 2 / 2 + (1.5 - 1) ** 2 / 2) / 3
    assert contrastive_loss(q, d, y, margin=1.5).item() == pytest.approx(wider, abs=1e-6)


@pytest.mark.parametrize(
    "angle, label, expected",
    [(0, 1, 0), (90, 1, 0.5), (180, 1, 2), (0, 0, 0.125), (60, 0, 0), (90, 0, 0), (180, 0, 0)],
)
def test_contrastive_loss_at_the_ends_of_its_range(angle, label, expected):
    q = torch.tensor([[1.0, 0.0]])
    d = torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))]])
    loss = contrastive_loss(q, d, torch.tensor([float(label)]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_contrastive_gradient_is_that_of_half_opl_for_a_positive_and_none_beyond_the_margin():
    q, d, y = draw(1, 8), draw(1, 8, seed=1), torch.tensor([1.0])
    (ours,) = torch.autograd.grad(contrastive_loss(q, d, y), q)
    (opl,) = torch.autograd.grad(orthogonal_projection_loss(q, d, y), q)
    close(ours, opl / 2)
    far, near = draw(1, 8), draw(1, 8).detach()
    opposite = (near - 2 * far).detach()  # near is far: the cosine of the other one is -1
    (none,) = torch.autograd.grad(contrastive_loss(far, opposite, torch.zeros(1)), far)
    assert torch.equal(none, torch.zeros_like(none))


def test_triplet_loss_of_three_triplets_by_hand():
    q = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0]])
    d = torch.tensor([[3.0, 4.0], [0.0, 1.0], [3.0, 4.0]])  # cosines .6, 1, .6
    negatives = torch.tensor([[4.0, 3.0], [6.0, 0.0], [0.0, 2.0]])  # .8, 0, 0
    # .8 - .6 + .5 = .7, and two that keep the margin
    assert triplet_loss(q, d, negatives).item() == pytest.approx(0.7 / 3, abs=1e-6)
    wider = (0.8 - 0.6 + 1 + 0 + 0 - 0.6 + 1) / 3
    assert triplet_loss(q, d, negatives, margin=1.0).item() == pytest.approx(wider, abs=1e-6)


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_triplet_loss_is_a_hinge_on_two_cosines_and_ignores_norms(margin):
    q, d, negatives = (draw(6, 8, seed=seed, dtype=torch.float64) for seed in range(3))
    loss = triplet_loss(q, d, negatives, margin)
    gap = torch.cosine_similarity(q, negatives) - torch.cosine_similarity(q, d) + margin
    assert loss.item() == pytest.approx(sum(max(0.0, value) for value in gap.tolist()) / 6)
    close(triplet_loss(3 * q, d / 2, 5 * negatives, margin), loss)
    (grad,) = torch.autograd.grad(loss, q)
    assert torch.equal(grad.abs().sum(dim=1) > 0, gap > 0)  # no pull once the margin is kept


def test_no_triplet_is_a_loss_of_zero_with_a_gradient_of_zero():
    q = draw(2, 8)
    loss = triplet_loss(q[:0], draw(0, 8), draw(0, 8))
    (grad,) = torch.autograd.grad(loss, q)
    assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))


# ---------------------------------------------------------------- what is refused


def test_zero_vectors_give_finite_losses_and_gradients():
    q, d = torch.zeros(2, 4, requires_grad=True), draw(2, 4)
    for loss in (
        orthogonal_projection_loss(q, d, torch.ones(2)),
        multiple_negatives_ranking_loss(q, d),
        prototype_loss(q, d, d, d),
        contrastive_loss(q, d, torch.tensor([1.0, 0.0])),
        triplet_loss(q, d, d.flip(0)),
    ):
        (grad,) = torch.autograd.grad(loss, q)
        assert loss.isfinite() and grad.isfinite().all()


def test_disagreeing_inputs_are_refused_with_their_shapes():
    q, d = draw(3, 8), draw(4, 8)
    with pytest.raises(ValueError, match=r"one document per query: got \(3, 8\), \(4, 8\)"):
        orthogonal_projection_loss(q, d, torch.ones(3))
    with pytest.raises(ValueError, match=r"one label .*\(3, 1\)$"):  # would broadcast to 3 x 3
        orthogonal_projection_loss(q, d[:3], torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"\(3, 8\), \(3, 1\)"):  # would broadcast to 8
        orthogonal_projection_loss(q, d[:3, :1], torch.ones(3))
    with pytest.raises(ValueError, match=r"pass `targets` .*\(3, 8\), \(4, 8\)"):
        multiple_negatives_ranking_loss(q, d)
    with pytest.raises(ValueError, match=r"one target \(B,\) per query: got \(3, 8\), \(2,\)"):
        multiple_negatives_ranking_loss(q, d, targets=torch.tensor([0, 1]))
    for relevant in (
        torch.zeros(3, 3, dtype=torch.bool),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(3, 4),
    ):  # the last would be no mask
        shape = ", ".join(map(str, relevant.shape))
        message = rf"relevant \({relevant.dtype}\) is bool .*: got \(3, 4\), \({shape},?\)$"
        with pytest.raises(ValueError, match=message):
            multiple_negatives_ranking_loss(
                q, d, targets=torch.tensor([0, 1, 2]), relevant=relevant
            )
    with pytest.raises(ValueError, match=r"\(3, 8\), \(4, 8\)"):
        prototype_loss(q, d, d, d)
    with pytest.raises(ValueError, match=r"one document per query: got \(3, 8\), \(4, 8\)"):
        contrastive_loss(q, d, torch.ones(3))
    with pytest.raises(ValueError, match=r"one label .*\(3, 1\)$"):
        contrastive_loss(q, d[:3], torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"one negative per query: .*\(3, 8\), \(1, 8\)$"):
        triplet_loss(q, d[:3], d[:1])  # would broadcast
