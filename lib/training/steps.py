"""The losses of a fine-tuning step: which texts a step embeds, and the loss of their embeddings.

    LOSSES[name](pairs, settings, step, teach)    ((documents, queries, target), loss)

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.3. Equations:
        lib/training/losses.py.
Axes:   N documents and Q queries in a batch, D width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lib.pipeline.settings import Finetune
from lib.training.gradients import Loss, embed
from lib.training.losses import (
    multiple_negatives_ranking_loss,
    orthogonal_projection_loss,
    prototype_loss,
)
from lib.training.pairs import Pairs, TokenRows


def ranking(pairs: Pairs, s: Finetune, step: int, _) -> tuple[tuple, Loss]:
    """MNRL: every query against all documents of the batch."""
    batch = pairs.batch(step, s.seed, s.documents, s.queries_per_document)
    relevant = torch.from_numpy(pairs.positives(*batch))
    target = torch.tensor(batch[2])
    masked = bool(relevant.sum() > len(target))  # a query has another answer than its target

    def loss(d: Tensor, q: Tensor) -> Tensor:
        others = relevant.to(d.device) if masked else None
        options = dict(scale=s.scale, targets=target.to(d.device), relevant=others)
        return multiple_negatives_ranking_loss(q, d, **options)

    return batch, loss


def projection(pairs: Pairs, s: Finetune, step: int, _) -> tuple[tuple, Loss]:
    """OPL: each query with its document, and with negatives of the batch."""
    if s.documents == 1:
        return single_projection(pairs, s, step)
    batch = pairs.batch(step, s.seed, s.documents, s.queries_per_document)
    rng = np.random.default_rng([s.seed, step])
    negatives = pairs.in_batch_negatives(batch, s.negatives, rng)
    again, wrong = ([pair[i] for pair in negatives] for i in (0, 1))

    def loss(d: Tensor, q: Tensor) -> Tensor:
        labels = torch.cat([torch.ones(len(q)), torch.zeros(len(wrong))]).to(d.device)
        documents = torch.cat([d[torch.tensor(batch[2]).to(d.device)], d[wrong]])
        return orthogonal_projection_loss(torch.cat([q, q[again]]), documents, labels)

    return batch, loss


def single_projection(pairs: Pairs, s: Finetune, step: int) -> tuple[tuple, Loss]:
    """OPL with batch size 1: a positive pair, then `negatives` negative ones."""
    cycle, phase = divmod(step, 1 + s.negatives)
    batch = pairs.batch(cycle, s.seed, 1, 1)
    if phase:
        document, query = pairs.random_negative(cycle, s.seed, step)
        batch = [document], [query], [0]
    label = torch.tensor([0.0 if phase else 1.0])
    return batch, lambda d, q: orthogonal_projection_loss(q, d, label.to(d.device))


def distillation(pairs: Pairs, s: Finetune, step: int, teach: Callable) -> tuple[tuple, Loss]:
    """Prototype loss: each text against the teacher's embedding of it."""
    batch = pairs.batch(step, s.seed, s.documents, s.queries_per_document)
    teacher_d, teacher_q = teach(*batch[:2])

    def loss(d: Tensor, q: Tensor) -> Tensor:
        target = torch.tensor(batch[2]).to(d.device)
        return prototype_loss(q, d[target], teacher_q, teacher_d[target])

    return batch, loss


def prototypes(teacher: nn.Module, pairs: Pairs) -> Callable:
    """A function from (documents, queries) to the teacher's embeddings of their first tokens."""
    most, tokenizer = teacher.config.max_position_embeddings, pairs.documents.tokenizer
    documents = TokenRows(pairs.documents.texts, tokenizer, most)
    queries = TokenRows(pairs.queries.texts, tokenizer, min(most, pairs.queries.max_length))

    @torch.no_grad()
    def teach(d: list[int], q: list[int]) -> tuple[Tensor, Tensor]:
        return embed(teacher, documents[d] + queries[q], pairs.pad_id).split([len(d), len(q)])

    return teach


LOSSES = {"mnrl": ranking, "opl": projection, "prototype": distillation}
