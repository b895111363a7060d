"""Fine-tuning: turn a pretrained encoder into a retriever.

    finetune(model, pairs, settings)    minimise MNRL, OPL or the prototype loss, in place

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.3 and appendix A.3. Batches and
        losses of a step: lib/training/steps.py. Gradients: lib/training/gradients.py.
"""

import math

from torch import nn

from lib.pipeline.settings import Finetune
from lib.training.gradients import backward
from lib.training.optim import autocast, optimizer, train, warmup_then_linear
from lib.training.pairs import Pairs
from lib.training.resume import Checkpoints
from lib.training.steps import LOSSES, prototypes


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
    checkpoints: Checkpoints | None = None,
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
        checkpoints: to go on from after a stop (`optim.train`).

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
        value = backward(model, texts, loss, pairs.pad_id, s.micro_batch_tokens, context)
        return dict(loss=value, tokens=sum(len(row) for rows in texts for row in rows))

    optim = optimizer(model, rate(s) * s.lr, s.weight_decay, rate(s) * s.embedding_lr)
    shares = warmup_then_linear(math.ceil(budget(s) / s.documents), s.warmup)
    name = f"fine-tuning ({s.loss})"
    return train(model, optim, shares, gradient, name, s.seed, checkpoints, show_progress)
