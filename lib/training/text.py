"""Pretraining text: token streams, the examples of a step, and BERT's masking.

    PretrainingText.from_texts(short, long, tokenizer, length)    two streams of tokens
    text.batch(step, seed, tokens, mixture, variable_share)       the examples of a step
    text.masked(batch, rate, seed, step)                          inputs and labels of MLM
    bucket_by_length(lengths)                                     batches that need little padding

The examples of step t are a function of (seed, t) alone: no shuffle buffer has to be saved.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.2 (mixture); Devlin et al. 2019
        (arXiv 1810.04805), section 3.1 (masking).
Axes:   B examples in a batch, L tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.model.tokens import pad, tokenize
from lib.pipeline.errors import TrainingError, require

PASS_TOKENS = 32_768  # in one forward pass of pretraining; gradients of a larger step are added up


def bucket_by_length(
    lengths: list[int], most_tokens: int | None = None, waste_tokens: int = 2048
) -> list[list[int]]:
    """Indices in buckets of similar length, longest first.

    A bucket holds at most `most_tokens` tokens with padding; a longer text is a bucket of its own.
    A bucket of more than `waste_tokens` tokens, enough to be worth a forward pass, ends before a
    text that is shorter than 0.8 of its longest: at most a fifth of what it holds beyond
    `waste_tokens` is padding.
    """
    buckets: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        bucket = buckets[-1] if buckets else []
        longest = lengths[bucket[0]] if bucket else 0
        wasteful = lengths[i] < 0.8 * longest and len(bucket) * longest > waste_tokens
        full = most_tokens is not None and (len(bucket) + 1) * longest > most_tokens
        if not bucket or full or wasteful:
            buckets.append([])
        buckets[-1].append(i)
    return buckets


def mask_tokens(
    ids: Tensor, mask: Tensor, tokenizer, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's corruption of ids (B, L): each token is a target with probability `rate`.

    80 % of the targets become [MASK], 10 % a random token, and 10 % stay. Special tokens and
    padding (0 in `mask`) are no targets.

    Returns:
        (corrupted ids, labels), both (B, L); labels are -100 except at targets.
    """
    special_ids = tokenizer.all_special_ids
    special = torch.isin(ids, torch.tensor(special_ids))
    target = (torch.rand(ids.shape, generator=generator) < rate) & mask.bool() & ~special
    labels = ids.masked_fill(~target, -100)
    dice = torch.rand(ids.shape, generator=generator)
    corrupted = ids.masked_fill(target & (dice < 0.8), tokenizer.mask_token_id)
    random = torch.randint(len(special_ids), len(tokenizer), ids.shape, generator=generator)
    return torch.where(target & (dice >= 0.8) & (dice < 0.9), random, corrupted), labels


@dataclass
class PretrainingText:
    """Token streams from which examples are drawn.

    variable    a list of examples, one per short text: its first `length` tokens, at least 10
                (the paper's "10 tokens up to the maximum")
    maximum     (N, length): the long texts concatenated, cut every length - 2 tokens, with [CLS]
                and [SEP] around each piece
    """

    variable: list[np.ndarray]
    maximum: np.ndarray
    tokenizer: object
    length: int

    @classmethod
    def from_texts(
        cls, short: list[str], long: list[str], tokenizer, length: int, limit_tokens=math.inf
    ) -> "PretrainingText":
        """Tokenise about `limit_tokens` of the short and of the long texts, in a random order."""

        def rows(texts: list[str], cut: int) -> Iterator[np.ndarray]:
            total = 0
            texts = [texts[i] for i in np.random.default_rng(len(texts)).permutation(len(texts))]
            for start in range(0, len(texts), 256):
                for row in tokenize(texts[start : start + 256], tokenizer, cut)[0]:
                    total += len(row)
                    yield np.asarray(row, dtype=np.int32)
                if total >= limit_tokens:
                    return

        variable = [row for row in rows(short, length) if len(row) >= min(10, length)]
        inner = [row[1:-1] for row in rows(long, 4 * 8192)]
        stream = np.concatenate([*inner, np.empty(0, dtype=np.int32)])
        width = length - 2
        stream = stream[: len(stream) // width * width].reshape(-1, width)
        ends = (0, 0), (tokenizer.cls_token_id, tokenizer.sep_token_id)
        maximum = np.pad(stream, ((0, 0), (1, 1)), constant_values=ends)
        return cls(variable, maximum, tokenizer, length)

    def check(self, mixture: str, name: str) -> None:
        """Raise a TrainingError, before training, if the mixture needs text that is not there."""
        needed = {"short": f"short text of {min(10, self.length)} tokens or more"}
        needed["long"] = f"long text that fills {self.length} tokens"
        available = [k for k, rows in zip(needed, (self.variable, self.maximum)) if len(rows)]
        wanted = [kind for kind in needed if mixture in (kind, "mixed")]
        missing = [needed[kind] for kind in wanted if kind not in available]
        remedies = ["add some to the pretraining text", *(f"set mixture: {k}" for k in available)]
        message = (
            f"{name} has no {' and no '.join(missing)}, which mixture {mixture!r} draws from: "
        )
        require(not missing, message + ", or ".join(remedies), TrainingError)

    def batch(
        self, step: int, seed: int, tokens: int, mixture: str, variable_share: float
    ) -> list[list[np.ndarray]]:
        """The examples of a step, at least `tokens` tokens, in buckets of similar length.

        "short" draws from `variable`, "long" from `maximum`; "mixed" draws from `variable` with
        probability `variable_share`.
        """
        share = {"short": 1.0, "long": 0.0, "mixed": variable_share}[mixture]
        rng = np.random.default_rng([seed, step])
        rows, drawn = [], 0
        while drawn < tokens:
            examples = self.variable if rng.random() < share else self.maximum
            rows.append(examples[rng.integers(len(examples))])
            drawn += len(rows[-1])
        passes = []
        for bucket in bucket_by_length([len(row) for row in rows]):
            most = max(1, PASS_TOKENS // len(rows[bucket[0]]))
            starts = range(0, len(bucket), most)
            passes += [[rows[i] for i in bucket[start : start + most]] for start in starts]
        return passes

    def masked(
        self, batch: list[list[np.ndarray]], rate: float, seed: int, step: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(corrupted ids, labels, mask) of each bucket, all (B, L)."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for rows in batch:
            ids, mask = pad([row.tolist() for row in rows], self.tokenizer.pad_token_id)
            yield *mask_tokens(ids, mask, self.tokenizer, rate, generator), mask
