"""Masked-language pretraining.

    pretrain(model, text, settings)    minimise the MLM loss, in place
    mlm_accuracy(model, text)          share of masked tokens predicted right, on held-out text

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.2 and appendix A.3.
Axes:   B examples in a batch, L tokens.
"""

import math

import numpy as np
import torch
from torch import nn

from lib.benchmark import statistics
from lib.operators.long_conv import filters_once
from lib.pipeline.settings import Pretrain
from lib.training import ranks
from lib.training.optim import autocast, optimizer, train, warmup_then_linear
from lib.training.resume import Checkpoints
from lib.training.text import PretrainingText

ADAM = dict(betas=(0.9, 0.98), eps=1e-6)  # appendix A.3


def pretrain(
    model: nn.Module,
    text: PretrainingText,
    settings: Pretrain,
    precision: str = "float32",
    checkpoints: Checkpoints | None = None,
    show_progress: bool = True,
) -> list[dict]:
    """Pretrain a masked-language model, in place.

    Args:
        text: has what the mixture draws from (`text.check`).
        precision: of matrix multiplications, float32 or bfloat16 (`optim.autocast`).
        checkpoints: to go on from after a stop (`optim.train`).

    Returns:
        The curve: {"step", "tokens", "loss", "accuracy", "lr"} of each step; loss in nats per
        target, accuracy as a share, both before the step's update.

    Raises:
        TrainingError: a loss is not finite.
    """
    s = settings
    device = next(model.parameters()).device
    context = autocast(device, precision)

    def gradient(step: int) -> dict:
        examples = text.batch(step, s.seed, s.batch_tokens, s.mixture, s.variable_share)
        batch = list(text.masked(examples, s.mask_rate, s.seed, step))
        targets = sum(int((labels > 0).sum()) for _, labels, _ in batch)
        loss = correct = 0.0
        mine = ranks.share([ids.numel() for ids, _, _ in batch])
        with filters_once(model, max(ids.shape[1] for ids, _, _ in batch)):
            for ids, labels, mask in (batch[i] for i in mine):
                n = int((labels > 0).sum())
                if n:
                    with context:
                        out = model(ids.to(device), mask.to(device), labels=labels.to(device))
                    (out.loss * n / targets).backward()  # the mean over the step, however bucketed
                    loss += out.loss.item() * n / targets
                    correct += float((out.logits.argmax(-1).cpu() == labels[labels > 0]).sum())
        ranks.add_up(model)
        loss, correct = ranks.total(loss, correct)
        tokens = sum(int(mask.sum()) for _, _, mask in batch)
        return dict(loss=loss, accuracy=correct / max(1, targets), tokens=tokens)

    optim = optimizer(model, s.lr, s.weight_decay, s.embedding_lr, **ADAM)
    shares = warmup_then_linear(math.ceil(s.tokens / s.batch_tokens), s.warmup, s.final_lr)
    return train(model, optim, shares, gradient, "pretraining", s.seed, checkpoints, show_progress)


@torch.no_grad()
def mlm_accuracy(
    model: nn.Module,
    text: PretrainingText,
    batches: int = 8,
    batch_tokens: int = 8192,
    mixture: str = "mixed",
    mask_rate: float = 0.15,
    seed: int = 1,
) -> tuple[float, float, float]:
    """MLM accuracy over a fixed sample: (accuracy, low, high), a 95 % interval over examples.

    The paper validates at a mask rate of 0.15. The interval is that of a ratio of two means, by
    linearisation: an example counts by its number of targets.
    """
    model.eval()
    device = next(model.parameters()).device
    correct, targets = [], []
    for step in range(batches):
        batch = text.batch(step, seed, batch_tokens, mixture, variable_share=0.30)
        for ids, labels, mask in text.masked(batch, mask_rate, seed, step):
            logits = model(ids.to(device), mask.to(device), labels=labels.to(device)).logits
            hits = torch.zeros_like(labels)
            hits[labels > 0] = (logits.argmax(-1).cpu() == labels[labels > 0]).long()
            correct += hits.sum(dim=1).tolist()
            targets += (labels > 0).sum(dim=1).tolist()
    correct, targets = np.array(correct, dtype=float), np.array(targets, dtype=float)
    accuracy = correct.sum() / max(1.0, targets.sum())
    residuals = (correct - accuracy * targets) / max(1.0, targets.mean())
    _, low, high = statistics.interval(accuracy + residuals)
    return float(accuracy), low, high
