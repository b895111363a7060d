"""What every training step does: optimizer, learning-rate schedule, update, mixed precision.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), appendix A.3.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lib.kernels import warm_up
from lib.kernels.support import matmul_dtype
from lib.operators.long_conv import ImplicitFilter
from lib.pipeline.errors import TrainingError, require
from lib.pipeline.progress import bar, say
from lib.training import ranks
from lib.training.resume import Checkpoints, signals

MAX_GRAD_NORM = 1.0
READ_EVERY = 50  # steps, of losses on a GPU


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """A context for a model's matrix multiplications in float32 or bfloat16 (torch.autocast).

    On a device without bfloat16 instructions bfloat16 is float32, and the log says so. Weights,
    optimizer states, sums, norms, embeddings and losses are float32 in any case.
    """
    dtype = matmul_dtype(getattr(torch, precision), device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def compile_kernels(model: nn.Module, precision: str, longest: int) -> None:
    """`kernels.warm_up` for the rows of a training: of up to `longest` tokens, with padding."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        lengths = [*range(64, longest, 64), longest]
        warm_up(model, lengths, matmul_dtype(getattr(torch, precision), device))


def optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    embedding_lr: float | None = None,
    filter_rate: float = 1.0,
    **adam,
) -> torch.optim.AdamW:
    """AdamW without decay of vectors (biases, norms, gains) and of the filters' inputs.

    Word embeddings may have a learning rate of their own: few of them occur in a batch. So may the
    implicit filters: `filter_rate` is their share of `lr`. Adam moves every weight of a filter by
    about the rate, so all taps of a kernel move together, and what the tokens have in common is
    added up over all of them: one step changes a long convolution by rate times length.
    """
    embeddings, filters = model.get_input_embeddings().weight, filter_weights(model)
    groups: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        rate = (embedding_lr or lr) if p is embeddings else lr
        rate = filter_rate * lr if name in filters else rate
        decay = weight_decay if p.ndim > 1 and not name.endswith("filter.inputs") else 0.0
        groups.setdefault((rate, decay), []).append(p)
    groups = [dict(params=own, lr=lr, weight_decay=decay) for (lr, decay), own in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, fused=True, **adam)


def filter_weights(model: nn.Module) -> set[str]:
    """Names of the weights that make the taps of the implicit filters."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, ImplicitFilter)
        for name, _ in module.named_parameters()
        if name != "bias"  # the gain on the input is no tap
    }


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


class Curve:
    """The lines of a run's steps, read from the device in groups: to read one, we must wait for it.

    lines      {"step", "tokens" so far, "loss", "lr", …} of the steps that are read
    pending    of those that are not: numbers may be tensors, tokens are the step's, and the norm of
               its gradient is there too
    """

    def __init__(self, name: str, seed: int, lines: list[dict]):
        self.name, self.seed, self.lines, self.pending = name, seed, lines, []
        self.norm, self.started, self.first = math.nan, time.monotonic(), self.tokens()

    def tokens(self) -> int:
        return self.lines[-1]["tokens"] if self.lines else 0

    def ready(self) -> bool:
        """Are the pending lines on the CPU, or READ_EVERY of them?"""
        loss = self.pending[-1]["loss"]
        return len(self.pending) == READ_EVERY or not is_remote(loss)

    def read(self, hint: str = "") -> None:
        """Move the pending lines to `lines`.

        Raises:
            TrainingError: a loss or a gradient is not finite; the message ends with `hint`.
        """
        for line in self.pending:
            line = {k: v.item() if isinstance(v, Tensor) else v for k, v in line.items()}
            self.norm, place = line.pop("norm"), f"step {line['step']}"
            for what, value in (("loss", line["loss"]), ("norm of the gradient", self.norm)):
                batch = f"(lr {line['lr']:.2g}; its batch is that of seed {self.seed} and {place})"
                message = f"{self.name}: the {what} is {value} at {place} {batch}; lower lr{hint}"
                require(math.isfinite(value), message, TrainingError)
            self.lines.append(line | dict(tokens=self.tokens() + line["tokens"]))
        self.pending.clear()

    def summary(self) -> str:
        """Loss, norm of the gradient and speed, for the progress bar."""
        seconds = max(time.monotonic() - self.started, 1e-3)
        speed = (self.tokens() - self.first) / seconds
        loss = self.lines[-1]["loss"]
        return f"loss {loss:.4g}, gradient {self.norm:.3g}, {speed:,.0f} tokens/s"


def is_remote(value: float | Tensor) -> bool:
    """Is it a number that another device may still be computing?"""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def train(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    shares: list[float],
    gradient: Callable[[int], dict],
    name: str,
    seed: int,
    checkpoints: Checkpoints | None = None,
    show_progress: bool = True,
) -> list[dict]:
    """Take a step for each of `shares`, the learning rates as shares of each group's peak.

    gradient(step) adds to the parameters' gradients and returns {"loss", "tokens", …} of the step.
    On a GPU the loss may be a tensor: it is read every READ_EVERY steps and before a checkpoint.

    Args:
        seed: names a step's batch, together with its number, in messages.
        checkpoints: training goes on from the newest one and writes others, the last one at its
            end. SIGINT and SIGTERM (Ctrl-C) write one after the step and then have their effect,
            unless several processes train.

    Returns:
        The curve: {"step", "tokens" so far, "loss", "lr", …} of each step, before its update.

    Raises:
        TrainingError: the loss or the gradient of a step is not finite.
    """
    model.train()
    curve = Curve(name, seed, checkpoints.restore(model, optim) if checkpoints else [])
    peaks, lr = [group["lr"] for group in optim.param_groups], optim.defaults["lr"]
    total, start = len(shares), len(curve.lines)
    shown = show_progress and not ranks.rank()
    caught = signals() if checkpoints and ranks.count() == 1 else nullcontext([])
    with caught as stop, bar(total, name, shown, start) as progress:
        for step in range(start, total):
            for group, peak in zip(optim.param_groups, peaks):
                group["lr"] = peak * shares[step]
            line = gradient(step)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            curve.pending.append(line | dict(step=step, lr=lr * shares[step], norm=norm))
            stopping, due = bool(stop), bool(checkpoints) and checkpoints.due()
            keep = bool(checkpoints) and (due or stopping or step + 1 == total)
            if keep or step + 1 == total or curve.ready():
                curve.read(f"; {checkpoints.last()}" if checkpoints else "")
                progress.set_postfix_str(curve.summary(), refresh=False)
            optim.step()
            optim.zero_grad(set_to_none=True)
            progress.update(1)
            if keep:
                checkpoints.save(model, optim, curve.lines)
            if shown and (due or stopping):
                say(str(progress))  # in a log, all that is seen of the bar
            if stopping:
                say(f"{name}: stopped; {checkpoints.last()}, `make repro` goes on from it")
                break
    model.eval()
    return curve.lines
