"""Fine-tuning: turn a pretrained encoder into a retriever.

    finetune(model, pairs, settings)    minimise a loss of pairs, in place
    choose(settings, score)             the learning rate that is best on validation
    whiten(model, pairs)                a pooler that spreads the texts in all directions

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.3 and appendix A.3. Batches and
        losses of a step: lib/training/steps.py. Gradients: lib/training/gradients.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from lib.pipeline.errors import TrainingError
from lib.pipeline.settings import Finetune
from lib.training import ranks
from lib.training.gradients import backward
from lib.training.negatives import mined
from lib.training.optim import autocast, compile_kernels, optimizer, train, warmup_then_linear
from lib.training.pairs import Pairs
from lib.training.resume import Checkpoints
from lib.training.steps import LOSSES, Teacher, check
from lib.training.targets import budget, steps


def rate(settings: Finetune) -> float:
    """The share of the learning rates for steps of fewer documents than `lr_documents`."""
    return min(1.0, (settings.documents / settings.lr_documents) ** 0.5)


def finetune(
    model: nn.Module,
    pairs: Pairs,
    settings: Finetune,
    teacher: Teacher | None = None,
    precision: str = "float32",
    checkpoints: Checkpoints | None = None,
    show_progress: bool = True,
    evaluate: Callable[[], float] | None = None,
) -> list[dict]:
    """Turn an encoder into a retriever, in place.

    A step embeds `settings.documents` documents and up to `queries_per_document` queries of each.

        mnrl         ranks every query against all documents of the step, and against
                     `explicit_negatives` more of each query
        opl          takes pairs: a query with its document (label 1) and with `negatives` others
                     (label 0)
        contrastive  the same pairs, but as many with label 1 as with label 0
        triplet      takes a query, its document and a negative, `negatives` times
        prototype    compares each text with the teacher's embedding of it
        none         leaves the encoder as it is

    With `documents: 1`, a step of opl, contrastive or triplet is one pair or triplet, in random
    order, and its negative is a document of the query's task. With more documents, negatives are
    documents of the step, or beside them hard ones (lib/training/negatives.py).

    A relevant document, or a near-duplicate of one, is never a negative (`Pairs.excluded`). A query
    without negatives adds 0 to the mean of MNRL and is a positive alone in OPL; with
    `documents: 1`, and in the other losses, it is left out.

    Args:
        teacher: of the prototype loss: its embeddings of the texts of `pairs` (`Targets`).
        precision: of matrix multiplications, float32 or bfloat16 (`optim.autocast`).
        checkpoints: to go on from after a stop (`optim.train`).
        evaluate: returns nDCG@10 of the model on validation; called before `settings.evaluations`
            of the steps, the first one of them. The training's bits do not depend on it.

    Returns:
        The curve: {"step", "tokens", "loss", "lr"} of each step, and "ndcg@10" of the model before
        that step where it was evaluated.

    Raises:
        TrainingError: no query has a negative (before the first step), or a loss is not finite.
    """
    s = settings
    if s.loss == "none" or not budget(s):
        model.eval()
        return []
    if s.whiten:
        whiten(model, pairs)
    prepared = teacher
    if s.loss != "prototype":
        check(pairs, s)
        prepared = mined(model, pairs, s, show_progress)  # before a checkpoint is restored
    context = autocast(next(model.parameters()).device, precision)
    shares = warmup_then_linear(steps(s), s.warmup)
    evaluated = evaluation_steps(len(shares), s.evaluations) if evaluate else ()

    def gradient(step: int) -> dict:
        scores = {"ndcg@10": undisturbed(model, evaluate)} if step in evaluated else {}
        batch, loss = LOSSES[s.loss](pairs, s, step, prepared)
        texts = pairs.documents[batch[0]], pairs.queries[batch[1]]
        value = backward(model, texts, loss, pairs.pad_id, s.micro_batch_tokens, context)
        return dict(loss=value, tokens=sum(len(row) for rows in texts for row in rows)) | scores

    compile_kernels(model, precision, s.longest(model.config.max_position_embeddings))
    rates = rate(s) * s.lr, s.weight_decay, rate(s) * s.embedding_lr, s.filter_rate
    optim = optimizer(model, *rates)
    name = f"fine-tuning ({s.loss})"
    return train(model, optim, shares, gradient, name, s.seed, checkpoints, show_progress)


# ------------------------------------------------------------------ the pooler


RIDGE = 0.1  # of the mean variance
SPREAD = 0.3  # standard deviation in front of tanh, which is nearly linear there
SAMPLE = 800, 200  # documents and queries


def whiten(model: nn.Module, pairs: Pairs) -> None:
    """Let the pooler centre and whiten the texts of `pairs`, in place.

        embedding = tanh(a (C + r I)^-1/2 (m - mu))

    m is a text's mean hidden state, mu and C its mean and covariance over a sample, r a tenth of
    the mean variance, a such that the standard deviation is 0.3. An encoder that guesses hidden
    words puts what is common to all texts into a few directions of large variance: its cosines are
    alike, and a small rate does not get them apart. No label is used.

    Source: Su et al. 2021 (arXiv 2103.15316), without the ridge.
    """
    pooler, seen = model.model.pooler, []
    rows = [
        row
        for texts, count in zip((pairs.documents, pairs.queries), SAMPLE)
        for row in texts[sorted({len(texts) * i // count for i in range(count)})]
    ]
    hook = pooler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        for row in rows:
            model(torch.as_tensor(row, dtype=torch.int64, device=pooler.weight.device)[None])
        hook.remove()
        m = torch.cat(seen)  # (n, D)
        mean, covariance = m.mean(dim=0), torch.cov(m.T)
        variances, axes = torch.linalg.eigh(covariance)
        ridge = RIDGE * variances.mean()
        W = axes @ torch.diag((variances.clamp(min=0) + ridge) ** -0.5) @ axes.T
        W *= SPREAD / ((m - mean) @ W).std()
        pooler.weight.copy_(W)
        pooler.bias.copy_(-W @ mean)


# ------------------------------------------------------------------ the learning rate


class Choice(NamedTuple):
    """The learning rate of a row.

    Attributes:
        settings: those that the row is trained with.
        trials: {rate: nDCG@10 on validation, or None if the trial's loss was not finite}, in the
            order of `lr_choices`; {} if no rate was tried.
    """

    settings: Finetune
    trials: dict[float, float | None]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest one that was tried."""
        return bool(self.trials) and self.settings.lr in (min(self.trials), max(self.trials))


def choose(settings: Finetune, score: Callable[[Finetune], float]) -> Choice:
    """Train a trial at each of `lr_choices`, and take the rate that is best on validation.

    Each loss and batch size has a best rate of its own; two losses at one rate differ in how well
    it suits them. The test split has no part in the choice. Of equal scores the smaller rate is
    taken.

    Args:
        score: trains a model with the settings of a trial (`Finetune.trial`), and returns its
            nDCG@10 on validation.

    Raises:
        TrainingError: no trial could be trained; the reason is that of the first one.
    """
    if settings.loss == "none" or not budget(settings) or not settings.lr_choices:
        return Choice(settings, {})
    trials, problems = {}, []
    for lr in settings.lr_choices:
        try:
            trials[lr] = float(score(settings.trial(lr)))
        except TrainingError as error:
            trials[lr] = None
            problems.append(error)
    known = {lr: value for lr, value in trials.items() if value is not None}
    if not known:
        raise problems[0]
    best = min(known, key=lambda lr: (-known[lr], lr))
    return Choice(settings.at(float(ranks.told(repr(best)))), trials)


# ------------------------------------------------------------------ validation in between


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """The steps before which the model is evaluated, evenly spread and beginning with step 0."""
    return {steps * i // evaluations for i in range(evaluations)}


def undisturbed(model: nn.Module, evaluate: Callable[[], float]) -> float:
    """evaluate(), with the generators and the mode of the model restored."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    training = model.training
    with torch.random.fork_rng(list(devices)), torch.no_grad():
        value = float(evaluate())
    model.train(training)
    return value
