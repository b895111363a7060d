"""What every training step does: optimizer, learning-rate schedule, update, mixed precision.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), appendix A.3.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lib.kernels.support import matmul_dtype
from lib.pipeline.errors import TrainingError, require
from lib.pipeline.progress import bar

MAX_GRAD_NORM = 1.0


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """A context for a model's matrix multiplications in float32 or bfloat16 (torch.autocast).

    On a device without bfloat16 instructions bfloat16 is float32, and the log says so. Weights,
    optimizer states, sums, norms, embeddings and losses are float32 in any case.
    """
    dtype = matmul_dtype(getattr(torch, precision), device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def optimizer(
    model: nn.Module, lr: float, weight_decay: float, embedding_lr: float | None = None, **adam
) -> torch.optim.AdamW:
    """AdamW without decay of vectors (biases, norms, gains) and of the filters' inputs.

    Word embeddings may have a learning rate of their own: few of them occur in a batch.
    """
    embeddings = model.get_input_embeddings().weight
    decayed, rest = [], []
    for name, p in model.named_parameters():
        if p is not embeddings:
            matrix = p.ndim > 1 and not name.endswith("filter.inputs")
            (decayed if matrix else rest).append(p)
    groups = [
        dict(params=decayed, weight_decay=weight_decay),
        dict(params=rest, weight_decay=0.0),
        dict(params=[embeddings], weight_decay=weight_decay, lr=embedding_lr or lr),
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True, **adam)


def warmup_then_linear(steps: int, warmup: float, final: float = 0.0) -> list[float]:
    """The learning rate of each step as a share of the peak.

    It rises to 1 over the first `warmup` (a share) of the steps and falls linearly to `final`.
    """
    rise = max(1, round(warmup * steps))
    fall = max(1, steps - rise)
    return [
        (step + 1) / rise if step < rise else final + (1 - final) * (steps - step) / fall
        for step in range(steps)
    ]


def train(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    shares: list[float],
    gradient: Callable[[int], dict],
    name: str,
    show_progress: bool = True,
) -> list[dict]:
    """Take a step for each of `shares`, the learning rates as shares of each group's peak.

    gradient(step) adds to the parameters' gradients and returns {"loss", "tokens", …} of the step.

    Returns:
        The curve: {"step", "tokens" so far, "loss", "lr", …} of each step, before its update.

    Raises:
        TrainingError: the loss of a step is not finite.
    """
    model.train()
    curve, tokens, lr = [], 0, optim.defaults["lr"]
    peaks = [group["lr"] for group in optim.param_groups]
    progress = bar(total=len(shares), desc=name, show=show_progress)
    for step, share in enumerate(shares):
        line = gradient(step)
        before = f"step {step} (lr {optim.param_groups[0]['lr']:.2g})"
        message = f"{name}: the loss is {line['loss']} at {before}; lower lr"
        require(math.isfinite(line["loss"]), message, TrainingError)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for group, peak in zip(optim.param_groups, peaks):
            group["lr"] = peak * share
        optim.step()
        optim.zero_grad(set_to_none=True)
        tokens += line["tokens"]
        curve.append(line | dict(step=step, tokens=tokens, lr=lr * share))
        progress.update(1)
    progress.close()
    model.eval()
    return curve
