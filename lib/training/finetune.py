"""Fine-tuning: turn a pretrained encoder into a retriever.

    finetune(model, pairs, settings)    minimise MNRL, OPL or the prototype loss, in place
    backward(model, texts, loss, …)     the gradient of any batch in any memory

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.3 and appendix A.3; Gao et al.
        2021 (arXiv 2101.06983) for gradient caching. Losses: lib/training/losses.py.
Axes:   N documents and Q queries in a batch, D width.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from lib.model.tokens import pad
from lib.pipeline.settings import Finetune
from lib.training.losses import (
    multiple_negatives_ranking_loss,
    orthogonal_projection_loss,
    prototype_loss,
)
from lib.training.optim import autocast, optimizer, train, warmup_then_linear
from lib.training.pairs import Pairs, TokenRows
from lib.training.text import bucket_by_length

EXACT = nullcontext()  # float32
Loss = Callable[[Tensor, Tensor], Tensor]  # of documents (N, D) and queries (Q, D)


def budget(settings: Finetune) -> int:
    """The number of documents that fine-tuning embeds."""
    return round(settings.share * settings.documents_seen)


def rate(settings: Finetune) -> float:
    """The share of the learning rates for steps of fewer documents than `lr_documents`."""
    return min(1.0, (settings.documents / settings.lr_documents) ** 0.5)


def finetune(
    model: nn.Module,
    pairs: Pairs,
    settings: Finetune,
    teacher: nn.Module | None = None,
    precision: str = "float32",
    show_progress: bool = True,
) -> list[dict]:
    """Turn an encoder into a retriever, in place.

    A step embeds `settings.documents` documents and up to `queries_per_document` queries of each.

        mnrl        ranks every query against all documents of the step
        opl         takes pairs: a query with its document (label 1) and with `negatives` others
                    of the step (label 0). With `documents: 1`, a step is one pair: a positive,
                    then `negatives` steps with a document drawn from all of `pairs`
        prototype   compares each text with the teacher's embedding of it
        none        leaves the encoder as it is

    A relevant document, or a near-duplicate of one, is never a negative (`Pairs.excluded`). A query
    without negatives adds 0 to the mean of MNRL and is a positive alone in OPL; with
    `documents: 1`, another query replaces it (`Pairs.random_negative`).

    Args:
        teacher: of the prototype loss, in evaluation mode; it reads its own `max_length`.
        precision: of matrix multiplications, float32 or bfloat16 (`optim.autocast`).

    Returns:
        The curve: {"step", "tokens", "loss", "lr"} of each step.

    Raises:
        TrainingError: no query has a negative (before the first step), or a loss is not finite.
    """
    s = settings
    if s.loss == "none" or not budget(s):
        model.eval()
        return []
    if s.loss == "mnrl" or s.negatives:
        pairs.check_negatives(s.loss)
    teach = prototypes(teacher, pairs) if s.loss == "prototype" else None
    context = autocast(next(model.parameters()).device, precision)

    def gradient(step: int) -> dict:
        batch, loss = LOSSES[s.loss](pairs, s, step, teach)
        texts = pairs.documents[batch[0]], pairs.queries[batch[1]]
        value = backward(model, texts, loss, pairs.pad_id, s.micro_batch or None, context)
        return dict(loss=value, tokens=sum(len(row) for rows in texts for row in rows))

    optim = optimizer(model, rate(s) * s.lr, s.weight_decay, rate(s) * s.embedding_lr)
    shares = warmup_then_linear(math.ceil(budget(s) / s.documents), s.warmup)
    return train(model, optim, shares, gradient, f"fine-tuning ({s.loss})", show_progress)


# ------------------------------------------------------------------ losses of a step
# Each returns the batch, (documents, queries, target), and the loss of its embeddings.


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


# ------------------------------------------------------------------ gradients


def embed(
    model: nn.Module, rows: list[np.ndarray], pad_id: int, micro_batch=None, context=EXACT
) -> Tensor:
    """Embeddings (n, D) of n rows of tokens, at most `micro_batch` per forward pass."""
    device = next(model.parameters()).device
    buckets = bucket_by_length([len(row) for row in rows], micro_batch)
    parts = []
    for bucket in buckets:
        ids, mask = pad([rows[i].tolist() for i in bucket], pad_id)
        with context:
            parts.append(model(ids.to(device), mask.to(device)).pooler_output)
    order = torch.tensor([i for bucket in buckets for i in bucket])
    return torch.cat(parts)[order.argsort().to(device)]


def backward(
    model: nn.Module, texts: tuple, loss: Loss, pad_id: int, micro_batch=None, context=EXACT
) -> float:
    """Add the gradient of loss(documents, queries) to the model; return the loss.

    With `micro_batch`, texts are embedded that many at a time and twice: without a graph, for the
    gradient of the loss with respect to each embedding; then with a graph, to carry it into the
    weights. The gradient is that of the whole batch for every loss, and memory that of a part.

    Args:
        texts: documents and queries, rows of tokens each, which go through the model separately:
            their lengths differ a hundredfold.
    """
    if micro_batch is None or sum(map(len, texts)) <= micro_batch:
        value = loss(*(embed(model, rows, pad_id, context=context) for rows in texts))
        value.backward()
        return value.item()
    state = torch.get_rng_state()
    with torch.no_grad():
        vectors = [embed(model, rows, pad_id, micro_batch, context) for rows in texts]
    value = loss(*(part.requires_grad_() for part in vectors))
    value.backward()
    torch.set_rng_state(state)  # the same dropout in the second pass
    for rows, part in zip(texts, vectors):
        for bucket in bucket_by_length([len(row) for row in rows], micro_batch):
            again = embed(model, [rows[i] for i in bucket], pad_id, context=context)
            again.backward(part.grad[bucket])
    return value.item()
