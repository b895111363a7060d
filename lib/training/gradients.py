"""The gradient of a step in any memory: forward passes of a bounded number of tokens.

    embed(model, rows, pad_id)               embeddings of rows of tokens
    backward(model, texts, loss, pad_id)     the gradient of a loss of embeddings

Source: Gao et al. 2021 (arXiv 2101.06983) for gradient caching.
Axes:   N documents and Q queries in a batch, D width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from lib.model.device import padded_length, to_device
from lib.model.tokens import pad
from lib.operators.long_conv import filters_once
from lib.training import ranks
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
    ids, mask = to_device(*pad([rows[i].tolist() for i in bucket], pad_id), pad_id, model)
    with context:
        return model(ids, mask).pooler_output


def backward(
    model: nn.Module,
    texts: tuple[Rows, Rows],
    loss: Loss,
    pad_id: int,
    most_tokens: int | None = None,
    context=EXACT,
) -> float | Tensor:
    """Add the gradient of loss(documents, queries) to the model; return the loss.

    A step is cut into passes, and each process takes its share (lib/training/ranks.py). The loss
    sees the embeddings of all passes, whose gradients then go into the weights pass by pass. If a
    process's share holds more than `most_tokens` tokens, it embeds each text twice, first without
    a graph: the gradient is that of the whole batch for every loss, and memory that of a pass.

    Args:
        texts: documents and queries, rows of tokens each, which go through the model separately:
            their lengths differ a hundredfold.
        most_tokens: of a pass, with padding; a longer text is a pass of its own. None: no limit.
    """
    weights = model.get_input_embeddings().weight
    plan = [(rows, bucket) for rows in texts for bucket in passes(rows, cut(texts, most_tokens))]
    sizes = [len(bucket) * len(rows[bucket[0]]) for rows, bucket in plan]
    mine = ranks.share(sizes)
    twice = most_tokens is not None and sum(sizes[i] for i in mine) > most_tokens
    state = torch.random.fork_rng([weights.device] if weights.is_cuda else [])

    def embedded(i: int) -> Tensor:
        return embed_pass(model, *plan[i], pad_id, context)

    longest = max(len(row) for rows in texts for row in rows)
    with filters_once(model, padded_length(longest, model)):
        with state if twice else EXACT, torch.set_grad_enabled(not twice):
            parts = {i: embedded(i) for i in mine}
        vectors = []
        for rows in texts:
            own = [i for i in mine if plan[i][0] is rows]
            places = [plan[i][1] for i in own]
            whole = ranks.gather([parts[i] for i in own], places, len(rows), weights)
            vectors.append(whole.requires_grad_())
        value = loss(*vectors)
        value.backward()
        for i in mine:  # the generators are where they were: a second pass draws the same dropout
            vector = vectors[0] if plan[i][0] is texts[0] else vectors[1]
            (embedded(i) if twice else parts.pop(i)).backward(vector.grad[plan[i][1]])
    ranks.add_up(model)
    return unread(value)


def unread(value: Tensor) -> float | Tensor:
    """A number; on a GPU it stays there, so that nobody waits for it (`optim.train`)."""
    return value.detach() if value.is_cuda else value.item()


def cut(texts: tuple[Rows, Rows], most_tokens: int | None) -> int | None:
    """The most tokens of a pass: with several processes, at most a process's share of the step."""
    if ranks.count() == 1:
        return most_tokens
    share = math.ceil(sum(len(row) for rows in texts for row in rows) / ranks.count())
    return share if most_tokens is None else min(share, most_tokens)
