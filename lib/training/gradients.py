"""The gradient of a step in any memory: forward passes of a bounded number of tokens.

    embed(model, rows, pad_id)               embeddings of rows of tokens
    backward(model, texts, loss, pad_id)     the gradient of a loss of embeddings

Source: Gao et al. 2021 (arXiv 2101.06983) for gradient caching.
Axes:   N documents and Q queries in a batch, D width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from lib.model.tokens import pad
from lib.operators.long_conv import filters_once
from lib.training.text import bucket_by_length

EXACT = nullcontext()  # float32
Loss = Callable[[Tensor, Tensor], Tensor]  # of documents (N, D) and queries (Q, D)
Rows = Sequence[np.ndarray]


def embed(
    model: nn.Module, rows: Rows, pad_id: int, most_tokens: int | None = None, context=EXACT
) -> Tensor:
    """Embeddings (n, D) of n rows of tokens, in passes of at most `most_tokens` with padding."""
    buckets = passes(rows, most_tokens)
    parts = [embed_pass(model, rows, bucket, pad_id, context) for bucket in buckets]
    order = torch.tensor([i for bucket in buckets for i in bucket])
    return torch.cat(parts)[order.argsort().to(parts[0].device)]


def passes(rows: Rows, most_tokens: int | None = None) -> list[list[int]]:
    """The rows of each forward pass, by length (`bucket_by_length`)."""
    return bucket_by_length([len(row) for row in rows], most_tokens)


def embed_pass(model: nn.Module, rows: Rows, bucket: list[int], pad_id: int, context) -> Tensor:
    """Embeddings of some rows, in one forward pass."""
    device = next(model.parameters()).device
    ids, mask = pad([rows[i].tolist() for i in bucket], pad_id)
    with context:
        return model(ids.to(device), mask.to(device)).pooler_output


def backward(
    model: nn.Module,
    texts: tuple[Rows, Rows],
    loss: Loss,
    pad_id: int,
    most_tokens: int | None = None,
    context=EXACT,
) -> float:
    """Add the gradient of loss(documents, queries) to the model; return the loss.

    If all passes hold more than `most_tokens` tokens, each text is embedded twice: without a graph,
    for the gradient of the loss with respect to each embedding; then with a graph, to carry it into
    the weights. The gradient is that of the whole batch for every loss, and memory that of a pass.

    Args:
        texts: documents and queries, rows of tokens each, which go through the model separately:
            their lengths differ a hundredfold.
        most_tokens: of a pass, with padding; a longer text is a pass of its own. None: no limit.
    """
    with filters_once(model, max(len(row) for rows in texts for row in rows)):
        if most_tokens is None or padded_tokens(texts) <= most_tokens:
            value = loss(*(embed(model, rows, pad_id, context=context) for rows in texts))
            value.backward()
            return value.item()
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            vectors = [embed(model, rows, pad_id, most_tokens, context) for rows in texts]
        # The generators are where they were: the second pass draws the same dropout.
        value = loss(*(part.requires_grad_() for part in vectors))
        value.backward()
        for rows, part in zip(texts, vectors):
            for bucket in passes(rows, most_tokens):
                again = embed_pass(model, rows, bucket, pad_id, context)
                again.backward(part.grad[bucket])
    return value.item()


def padded_tokens(texts: tuple[Rows, Rows]) -> int:
    """The number of tokens of a step, with padding."""
    return sum(len(bucket) * len(rows[bucket[0]]) for rows in texts for bucket in passes(rows))
