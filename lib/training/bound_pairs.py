"""Training on twins: documents that hold the same words and bind them otherwise.

    learn(model, tokenizer, facts, filler, …)    minimise MNRL over documents and their twins

A step draws new documents at one distance (lib/benchmark/binding.py) and ranks each query against
all of them, its own document's twin among them. Word vectors are frozen: the names of another split
are other names, so only what the layers do with words they have not seen can help there.
"""

import numpy as np
import torch
from torch import Tensor, nn

from lib.benchmark.binding import Fact, binding
from lib.model.tokens import tokenize
from lib.pipeline.errors import TrainingError, require
from lib.training.gradients import backward
from lib.training.losses import multiple_negatives_ranking_loss
from lib.training.optim import optimizer, train, warmup_then_linear

MICRO_BATCH_TOKENS = 65_536


def learn(
    model: nn.Module,
    tokenizer,
    facts: list[Fact],
    filler: list[str],
    distances: list[int],
    steps: int,
    pairs: int = 8,
    parts: int = 2,
    lr: float = 3e-4,
    warmup: float = 0.1,
    learns: tuple[str, ...] = ("",),
    seed: int = 0,
    show_progress: bool = True,
) -> list[dict]:
    """Train a retriever on twins, in place; its word vectors stay as they are.

    With `learns` other weights stay, too. In a long document they are what goes wrong first: each
    of its fillers is turned by them, and the mean adds up what all fillers have in common.

    Args:
        facts: of the train split.
        distances: a step draws one of them.
        pairs: documents of a step, without their twins.
        learns: parts of names: a weight learns if its name holds one of them. ("gated_filter",):
            the filter alone, which says what distances count.

    Returns:
        The curve: {"step", "tokens", "loss", "lr"} of each step.

    Raises:
        TrainingError: a document is longer than the model reads, no weight is left to learn, or a
            loss is not finite.
    """
    longest = model.config.max_position_embeddings
    words = model.get_input_embeddings().weight

    def gradient(step: int) -> dict:
        distance = int(np.random.default_rng([seed, step]).choice(distances))
        task = binding(facts, filler, distance, pairs, parts, split="train", seed=seed + step)
        pids = list(task.documents)
        rows, cut = tokenize([*task.documents.values()], tokenizer, longest)
        message = f"documents with parts {distance} tokens apart exceed max_length={longest}"
        require(
            not any(cut), f"{message}: lengthen the model, or take smaller distances", TrainingError
        )
        queries, _ = tokenize([*task.queries.values()], tokenizer, longest)
        targets = torch.tensor(
            [pids.index(pid) for judged in task.qrels.values() for pid in judged]
        )

        def loss(d: Tensor, q: Tensor) -> Tensor:
            return multiple_negatives_ranking_loss(q, d, targets=targets.to(q.device))

        texts = tuple([np.array(row) for row in part] for part in (rows, queries))
        value = backward(model, texts, loss, tokenizer.pad_token_id, MICRO_BATCH_TOKENS)
        return dict(loss=value, tokens=sum(len(row) for part in texts for row in part))

    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(p is not words and any(part in name for part in learns))
    message = f"no weight is named {' or '.join(learns)}: see model.named_parameters()"
    try:
        require(any(p.requires_grad for p in model.parameters()), message, TrainingError)
        optim, shares = optimizer(model, lr, weight_decay=0.0), warmup_then_linear(steps, warmup)
        return train(model, optim, shares, gradient, "binding", seed, None, show_progress)
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(trained[name])
