"""The gradient of a batch in any memory, by gradient caching.

    embed(model, rows, pad_id)               embeddings of rows of tokens
    backward(model, texts, loss, pad_id)     the gradient of a loss of embeddings

Source: Gao et al. 2021 (arXiv 2101.06983).
Axes:   N documents and Q queries in a batch, D width.
"""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from lib.model.tokens import pad
from lib.training.text import bucket_by_length

EXACT = nullcontext()  # float32
Loss = Callable[[Tensor, Tensor], Tensor]  # of documents (N, D) and queries (Q, D)


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
