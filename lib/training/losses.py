"""Losses that turn a pretrained encoder into a retriever.

At 32k tokens a GPU holds one or two documents, so the in-batch negatives that
MNRL ranks against are gone. OPL scores each (query, document) pair by itself.

    multiple_negatives_ranking_loss(q, d)         compares every query with every document
    orthogonal_projection_loss(q, d, y)           compares each query with its own document
    prototype_loss(q, d, teacher_q, teacher_d)    copies a short-context teacher
    contrastive_loss(q, d, y)                     as OPL, but leaves far documents where they are
    triplet_loss(q, d, negatives)                 compares each query's document with a wrong one

Embeddings may have any norm. Shapes that would only broadcast are a ValueError.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section on fine-tuning; the last two as in
        sentence-transformers, with the margins of the authors' script (HazyResearch/m2).
Axes:   B pairs in the batch, N candidate documents, D embedding width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.pipeline.errors import require


def orthogonal_projection_loss(q: Tensor, d: Tensor, y: Tensor) -> Tensor:
    """Move relevant pairs to cosine 1 and irrelevant pairs to cosine 0.

        OPL(q, d, y) = mean_b (cos(q_b, d_b) - y_b)²

    A pair's gradient does not depend on its batch mates, so batch size 1 is
    a legitimate setting rather than a degenerate one.

    Args:
        q, d: query and document embeddings, (B, D).
        y: 1.0 if the document answers the query, else 0.0, (B,).

    Returns:
        Scalar in [0, 4].
    """
    check("one label (B,) per pair of a query and a document", y.shape == q.shape[:1], q, d, y)
    check("one document per query", q.shape == d.shape, q, d)
    return F.mse_loss(F.cosine_similarity(q, d), y.to(q.dtype))


def multiple_negatives_ranking_loss(
    q: Tensor,
    d: Tensor,
    negatives: Tensor | None = None,
    scale: float = 20.0,
    targets: Tensor | None = None,
    relevant: Tensor | None = None,
) -> Tensor:
    """Rank each query's own document above those that do not answer it.

        s_bj = scale · cos(q_b, c_j),  c = d followed by the negatives
        C_b  = {j : j = target_b or not relevant_bj}
        MNRL = mean_b -log ( exp s_b,target_b / Σ_{j ∈ C_b} exp s_bj )

    A query without negatives, in a batch of one pair or if all other
    documents answer it too, adds 0 to the mean, and its gradient is 0.

    Args:
        q: query embeddings, (B, D).
        d: document embeddings, (N, D); d_b answers q_b unless `targets` says otherwise.
        negatives: documents that answer none of the queries, (M, D).
        scale: inverse temperature.
        targets: the document that answers each query, (B,), if queries share documents.
        relevant: documents that answer a query besides its target, (B, N + M) bool, left out of
            its softmax. A target is never left out, whatever its value here.
    """
    if targets is None:
        check(
            "one document per query; pass `targets` if queries share documents",
            len(q) == len(d),
            q,
            d,
        )
        targets = torch.arange(len(q), device=q.device)
    check("one target (B,) per query", targets.shape == q.shape[:1], q, targets)
    candidates = d if negatives is None else torch.cat([d, negatives])  # (N + M, D)
    scores = scale * F.normalize(q, dim=-1) @ F.normalize(candidates, dim=-1).T
    if relevant is not None:
        fits = relevant.shape == scores.shape and relevant.dtype == torch.bool
        check(f"relevant ({relevant.dtype}) is bool (queries, documents)", fits, scores, relevant)
        scores = scores.masked_fill(relevant.scatter(1, targets[:, None], False), -torch.inf)
    return F.cross_entropy(scores, targets)


def prototype_loss(q: Tensor, d: Tensor, teacher_q: Tensor, teacher_d: Tensor) -> Tensor:
    """Keep a long-context student where a short-context teacher already is.

        PL = mean_b [1 - cos(teacher(q_b), student(q_b))] + [1 - cos(teacher(d_b), student(d_b))]

    The paper prints the sum of the cosines; we minimise their distance from 1.
    Its teacher reads the first 128 tokens only. No gradient reaches it.

    Args:
        q, d: the student's embeddings, (B, D).
        teacher_q, teacher_d: the teacher's embeddings of the same texts, (B, D).

    Returns:
        Scalar in [0, 4].
    """
    equal = q.shape == teacher_q.shape and d.shape == teacher_d.shape
    check("student and teacher embed the same texts", equal, q, teacher_q, d, teacher_d)
    return cosine_distance(q, teacher_q) + cosine_distance(d, teacher_d)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_b 1 - cos(teacher_b, student_b): one side of the prototype loss, scalar in [0, 2].

    Args:
        student, teacher: embeddings of the same texts, (B, D). No gradient reaches the teacher.
    """
    return (1 - F.cosine_similarity(student, teacher.detach())).mean()


def contrastive_loss(q: Tensor, d: Tensor, y: Tensor, margin: float = 0.5) -> Tensor:
    """Move relevant pairs to distance 0 and irrelevant pairs beyond the margin.

        D_b = 1 - cos(q_b, d_b)
        CL  = mean_b ½ (y_b D_b² + (1 - y_b) max(0, margin - D_b)²)

    A document that is wrong and far enough, by default at 60° and beyond, has no gradient.

    Source: Hadsell et al. 2006; ContrastiveLoss of sentence-transformers (cosine distance).

    Args:
        q, d: query and document embeddings, (B, D).
        y: 1.0 if the document answers the query, else 0.0, (B,).

    Returns:
        Scalar in [0, 2], for a margin of at most 2.
    """
    check("one label (B,) per pair of a query and a document", y.shape == q.shape[:1], q, d, y)
    check("one document per query", q.shape == d.shape, q, d)
    distance, y = 1 - F.cosine_similarity(q, d), y.to(q.dtype)
    return 0.5 * (y * distance**2 + (1 - y) * F.relu(margin - distance) ** 2).mean()


def triplet_loss(q: Tensor, d: Tensor, negatives: Tensor, margin: float = 0.5) -> Tensor:
    """Bring each query's document nearer than a wrong one, by the margin.

        TL = mean_b max(0, cos(q_b, n_b) - cos(q_b, d_b) + margin)

    A triplet that keeps the margin has no gradient. The loss of no triplet (B = 0) is 0.

    Source: Hermans et al. 2017 (arXiv 1703.07737); TripletLoss of sentence-transformers (cosine
            distance 1 - cos).

    Args:
        q, d: query and document embeddings, (B, D); d_b answers q_b.
        negatives: a document for each query that does not answer it, (B, D).

    Returns:
        Scalar in [0, 2 + margin].
    """
    equal = q.shape == d.shape == negatives.shape
    check("one document and one negative per query", equal, q, d, negatives)
    gap = F.cosine_similarity(q, negatives) - F.cosine_similarity(q, d)
    return F.relu(gap + margin).sum() / max(1, len(q))


def check(rule: str, holds: bool, *tensors: Tensor) -> None:
    """Raise a ValueError with the shapes of the tensors unless the rule holds."""
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    require(holds, f"{rule}: got {shapes}", ValueError)
