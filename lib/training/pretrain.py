"""Masked-language pretraining.

    pretrain(model, text, settings)    minimise the MLM loss, in place
    optimizer(model, settings)         AdamW with the authors' decay
    mlm_accuracy(model, text)          share of masked tokens predicted right, on held-out text

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.2 and appendix A.3; the authors'
        bert/yamls/pretrain, bert/main.py and bert/src/mm/hyena_utils.py (HazyResearch/m2, 7d359e8).
Axes:   B examples in a batch, L tokens.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.benchmark import statistics
from lib.model.device import padded_length, sent, to_device
from lib.operators.long_conv import filters_once
from lib.pipeline.settings import Pretrain
from lib.training import ranks
from lib.training.gradients import EXACT, unread
from lib.training.optim import (
    autocast,
    compile_kernels,
    filter_weights,
    train,
    warmup_then_linear,
)
from lib.training.resume import Checkpoints
from lib.training.text import PretrainingText

ADAM = dict(betas=(0.9, 0.98), eps=1e-6)  # appendix A.3
LOGITS = {"cpu": 2**21, "gpu": 2**27}  # computed at a time
# Rate and decay that the authors intend for the filters, from Hyena: of the inputs z, and of the
# MLPs with their sine frequencies. Hyena's decay is torch's: the rate times 0.1 of a weight a step.
INTENDED = {
    r"_filter\.inputs$": dict(lr=1e-5, weight_decay=0.0),
    r"_filter\.(freq$|back\.|ahead\.)": dict(lr=1e-3, weight_decay=0.1),
}


def optimizer(model: nn.Module, settings: Pretrain) -> torch.optim.AdamW:
    """AdamW with the decay of the authors' DecoupledAdamW, which the peak rate does not scale.

        w <- w - (rate / peak) weight_decay w - rate Adam(gradient)

    torch's AdamW takes rate · decay of a weight, so a group's decay here is weight_decay / peak.
    Every weight decays, biases and norms too; word embeddings have a rate of their own.

    Args:
        settings: the filters learn at `filter_rate` times the rate (why: `optim.optimizer`). With
            `parameter_groups: intended` they have the rates and decays of INTENDED instead. The
            authors set them, and lose them when they copy the layers.

    Source: mosaicml/composer, composer/optim/decoupled_weight_decay.py; Loshchilov and Hutter 2019
            (arXiv 1711.05101).
    """
    s, intended = settings, INTENDED if settings.parameter_groups == "intended" else {}
    embeddings, filters = model.get_input_embeddings().weight, filter_weights(model)

    def options(name: str, p: nn.Parameter) -> dict:
        pattern = next((pattern for pattern in intended if re.search(pattern, name)), None)
        lr = s.embedding_lr if p is embeddings else s.lr
        lr = s.filter_rate * lr if name in filters else lr
        return intended.get(pattern, dict(lr=lr, weight_decay=s.weight_decay / lr if lr else 0.0))

    groups: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        groups.setdefault(tuple(options(name, p).items()), []).append(p)
    groups = [dict(shared, params=parameters) for shared, parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=s.lr, fused=True, **ADAM)


@contextmanager
def dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Drop `share` of the activations in training; afterwards what the model dropped before."""
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in modules]
    try:
        for module in modules:
            module.p = share
        yield
    finally:
        for module, p in zip(modules, before):
            module.p = p


def seed_dropout(settings: Pretrain, step: int, number: int) -> None:
    """Whatever ran before, and whichever process takes the pass, it drops the same units."""
    if settings.dropout:
        state = np.random.SeedSequence([settings.seed, step, number]).generate_state(1, np.uint32)
        torch.manual_seed(int(state[0]))


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
    context, pad_id = autocast(device, precision), text.tokenizer.pad_token_id

    def gradient(step: int) -> dict:
        examples = text.batch(step, s.seed, s.batch_tokens, s.mixture, s.variable_share)
        batch = list(text.masked(examples, s.mask_rate, s.seed, step))
        targets = sum(int((labels > 0).sum()) for _, labels, _ in batch)
        loss = correct = 0.0
        mine = ranks.share([ids.numel() for ids, _, _ in batch])
        longest = max(ids.shape[1] for ids, _, _ in batch)
        with filters_once(model, padded_length(longest, model)):
            for number in mine:
                seed_dropout(s, step, number)
                of_pass, hits = backward(model, *batch[number], pad_id, targets, context)
                loss, correct = loss + unread(of_pass), correct + unread(hits)
        ranks.add_up(model)
        loss, correct = ranks.total(loss, correct)
        tokens = sum(int(mask.sum()) for _, _, mask in batch)
        return dict(loss=loss, accuracy=correct / max(1, targets), tokens=tokens)

    compile_kernels(model, precision, text.length)
    optim = optimizer(model, s)
    steps = 0
    if s.tokens:  # a text of which nothing is read need not be there
        per_step = text.tokens_of_step(s.batch_tokens, s.mixture, s.variable_share)
        steps = math.ceil(s.tokens / per_step)
    shares = warmup_then_linear(steps, s.warmup, s.final_lr)
    with dropout(model, s.dropout):
        return train(
            model, optim, shares, gradient, "pretraining", s.seed, checkpoints, show_progress
        )


def backward(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    mask: Tensor,
    pad_id: int,
    targets: int,
    context=EXACT,
) -> tuple[Tensor, Tensor]:
    """Add a pass's part of the gradient of a step's loss to a masked-language model.

    The head, most of a small model's cost, takes LOGITS logits at a time, of which it keeps none:
    its gradient goes down to the hidden states chunk by chunk, and from there once.

    Args:
        ids, labels, mask: (B, L), of `PretrainingText.masked`.
        targets: of the whole step: its loss is their mean, and 0 if there are none.

    Returns:
        The pass's part of the loss, and the number of targets predicted right.
    """
    rows, columns = (labels > 0).nonzero(as_tuple=True)
    places = torch.stack([rows, columns, labels[rows, columns]])
    ids, mask = to_device(ids, mask, pad_id, model)
    rows, columns, wanted = sent(places, ids.device)
    with context:
        hidden = model.model(ids, mask).last_hidden_state[rows, columns]
    size = logits_at_a_time(model)
    loss, hits = hidden.new_zeros(2, dtype=torch.float32)
    gradients = []
    for x, y in zip(hidden.detach().split(size), wanted.split(size)):
        x = x.requires_grad_()
        with context:
            logits = model.head(x)
        part = F.cross_entropy(logits.float(), y, reduction="sum") / max(1, targets)
        part.backward()
        gradients.append(x.grad)
        with torch.no_grad():
            loss, hits = loss + part, hits + (logits.argmax(-1) == y).sum()
    hidden.backward(torch.cat(gradients))
    return loss, hits


def logits_at_a_time(model: nn.Module) -> int:
    """The number of positions whose logits are computed together."""
    weights = model.get_input_embeddings().weight
    return max(1, LOGITS["cpu" if weights.device.type == "cpu" else "gpu"] // len(weights))


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
    most = logits_at_a_time(model)
    for step in range(batches):
        batch = text.batch(step, seed, batch_tokens, mixture, variable_share=0.30)
        for ids, labels, mask in text.masked(batch, mask_rate, seed, step):
            hidden = model.model(ids.to(device), mask.to(device)).last_hidden_state
            parts = hidden[(labels > 0).to(device)].split(most)
            guesses = torch.cat([model.head(part).argmax(-1) for part in parts]).cpu()
            hits = torch.zeros_like(labels)
            hits[labels > 0] = (guesses == labels[labels > 0]).long()
            correct += hits.sum(dim=1).tolist()
            targets += (labels > 0).sum(dim=1).tolist()
    correct, targets = np.array(correct, dtype=float), np.array(targets, dtype=float)
    accuracy = correct.sum() / max(1.0, targets.sum())
    residuals = (correct - accuracy * targets) / max(1.0, targets.mean())
    _, low, high = statistics.interval(accuracy + residuals)
    return float(accuracy), low, high
