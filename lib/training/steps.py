"""The losses of a fine-tuning step: which texts a step embeds, and the loss of their embeddings.

    LOSSES[name](pairs, settings, step, prepared)    ((documents, queries, target), loss)

`prepared` is what a loss needs beside the pairs: hard negatives (lib/training/negatives.py), or the
teacher's embeddings (lib/training/targets.py). A step is a function of the seed and its number.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.3; contrastive and triplet losses as
        in the authors' code (HazyResearch/m2). Equations: lib/training/losses.py.
Axes:   N documents and Q queries in a batch, D width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lib.pipeline.errors import TrainingError, require
from lib.pipeline.settings import Finetune
from lib.training.gradients import Loss
from lib.training.losses import (
    contrastive_loss,
    cosine_distance,
    multiple_negatives_ranking_loss,
    orthogonal_projection_loss,
    prototype_loss,
    triplet_loss,
)
from lib.training.negatives import Hard
from lib.training.pairs import Pairs
from lib.training.targets import drawn

# (documents, queries) -> the teacher's embeddings of both
Teacher = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]
Step = tuple[tuple[list[int], list[int], list[int]], Loss]


def check(pairs: Pairs, s: Finetune) -> None:
    """Raise a TrainingError, with the way out, if a loss lacks the negatives that it needs."""
    key = "explicit_negatives" if s.loss == "mnrl" else "negatives"
    count, hard = getattr(s, key), s.hard_negatives != "none"
    needed = hard or s.loss in ("contrastive", "triplet") or s.loss == "mnrl" and s.documents == 1
    place = f"documents: {s.documents}, hard_negatives: {s.hard_negatives}, {key}: {count}"
    message = f"loss {s.loss!r} has no negatives ({place}): set {key}: 1 or more"
    require(count or not needed, message, TrainingError)
    of_batch = s.documents > 1 and not (count if s.loss == "mnrl" else hard)
    if count or of_batch and s.loss == "mnrl":
        pairs.check_negatives(s.loss, of_batch)


def ranking(pairs: Pairs, s: Finetune, step: int, hard: Hard) -> Step:
    """MNRL: every query against all documents of the batch, and the negatives of all queries."""
    batch = pairs.batch(step, s.seed, s.documents, s.queries_per_document or None)
    if s.explicit_negatives:
        rng = np.random.default_rng([s.seed, step])
        batch, _ = pairs.extended(batch, s.explicit_negatives, rng, hard)
    relevant = torch.from_numpy(pairs.positives(*batch))
    target = torch.tensor(batch[2])
    masked = bool(relevant.sum() > len(target))  # a query has another answer than its target

    def loss(d: Tensor, q: Tensor) -> Tensor:
        others = relevant.to(d.device) if masked else None
        options = dict(scale=s.scale, targets=target.to(d.device), relevant=others)
        return multiple_negatives_ranking_loss(q, d, **options)

    return batch, loss


def projection(pairs: Pairs, s: Finetune, step: int, hard: Hard) -> Step:
    """OPL: each query with its document, and with each of its negatives."""
    if s.documents == 1:
        return single_pair(orthogonal_projection_loss, 1, pairs, s, step, hard)
    batch, again, wrong = crowd(pairs, s, step, hard)
    rows = torch.arange(len(batch[1]))
    return batch, labelled(orthogonal_projection_loss, batch, rows, again, wrong)


def contrast(pairs: Pairs, s: Finetune, step: int, hard: Hard) -> Step:
    """Contrastive loss: each query with a negative, and as often with its document."""
    if s.documents == 1:
        return single_pair(contrastive_loss, s.negatives, pairs, s, step, hard)
    batch, again, wrong = crowd(pairs, s, step, hard)
    rows = again if len(again) else torch.arange(len(batch[1]))  # without negatives, positives
    return batch, labelled(contrastive_loss, batch, rows, again, wrong)


def triplets(pairs: Pairs, s: Finetune, step: int, hard: Hard) -> Step:
    """Triplet loss: each query with its document and each of its negatives."""
    if s.documents == 1:
        document, query, negative = example(pairs, s, step, 0, hard)
        batch = [document, negative], [query], [0]
        return batch, lambda d, q: triplet_loss(q, d[:1], d[1:])
    batch, again, wrong = crowd(pairs, s, step, hard)
    own = torch.tensor(batch[2])[again]

    def loss(d: Tensor, q: Tensor) -> Tensor:
        rows, right, others = (index.to(d.device) for index in (again, own, wrong))
        return triplet_loss(q[rows], d[right], d[others])

    return batch, loss


# ------------------------------------------------------------------ pairs with negatives


def example(
    pairs: Pairs, s: Finetune, step: int, positives: int, hard: Hard
) -> tuple[int, int, int | None]:
    """(document, query, negative) of a step of one pair; the negative is None in a positive pair.

    An epoch has each pair of a query and its document `positives` times, and one step for each of
    its negatives, all of them shuffled.
    """
    most = s.queries_per_document or None
    kinds = positives, s.negatives
    epoch, document, query, kind = pairs.example(step, s.seed, most, *kinds)
    if kind < positives:
        return document, query, None
    rng = np.random.default_rng([s.seed, epoch, document, query])
    negatives = pairs.negatives(query, document, s.negatives, rng, hard)
    return document, query, negatives[(kind - positives) % len(negatives)]  # of a few, again


def single_pair(function: Callable, positives: int, pairs, s, step, hard: Hard) -> Step:
    """A loss of labelled pairs in a step of one pair."""
    document, query, negative = example(pairs, s, step, positives, hard)
    label = torch.tensor([float(negative is None)])
    batch = [document if negative is None else negative], [query], [0]
    return batch, lambda d, q: function(q, d, label.to(d.device))


def crowd(pairs: Pairs, s: Finetune, step: int, hard: Hard) -> tuple[tuple, Tensor, Tensor]:
    """A batch, and the rows of queries and of documents that are a query and its negative.

    Uniform negatives are documents of the batch, which are embedded anyway; hard ones come on top.
    """
    batch = pairs.batch(step, s.seed, s.documents, s.queries_per_document or None)
    rng = np.random.default_rng([s.seed, step])
    if hard:
        batch, negatives = pairs.extended(batch, s.negatives, rng, hard)
    else:
        negatives = pairs.in_batch_negatives(batch, s.negatives, rng)
    again, wrong = torch.tensor(negatives, dtype=torch.long).reshape(-1, 2).T
    return batch, again, wrong


def labelled(function: Callable, batch: tuple, rows: Tensor, again: Tensor, wrong: Tensor) -> Loss:
    """A loss of labelled pairs: queries `rows` with their documents, then `again` with `wrong`."""
    own = torch.tensor(batch[2])[rows]
    label = torch.cat([torch.ones(len(rows)), torch.zeros(len(wrong))])
    q_rows, d_rows = torch.cat([rows, again]), torch.cat([own, wrong])

    def loss(d: Tensor, q: Tensor) -> Tensor:
        on = d.device
        return function(q[q_rows.to(on)], d[d_rows.to(on)], label.to(on))

    return loss


# ------------------------------------------------------------------ prototypes


def distillation(pairs: Pairs, s: Finetune, step: int, teacher: Teacher) -> Step:
    """Prototype loss: each text against the teacher's embedding of it, with queries or without."""
    (documents, queries, target), texts = drawn(pairs, s, step)
    batch = [*documents, *texts], queries, target
    teacher_d, teacher_q = teacher(*batch[:2])

    def loss(d: Tensor, q: Tensor) -> Tensor:
        own, near_d, near_q = (x.to(d.device) for x in (torch.tensor(target), teacher_d, teacher_q))
        value, n = prototype_loss(q, d[own], near_q, near_d[own]), len(documents)
        return value + cosine_distance(d[n:], near_d[n:]) if texts else value

    return batch, loss


LOSSES = {
    "mnrl": ranking,
    "opl": projection,
    "contrastive": contrast,
    "triplet": triplets,
    "prototype": distillation,
}
