"""Pretraining text: stored tokens, the examples of a step, and BERT's masking.

    PretrainingText.from_texts(short, long, tokenizer, length)    the examples, as stored tokens
    text.batch(step, seed, tokens, mixture, variable_share)       the examples of a step
    text.masked(batch, rate, seed, step)                          inputs and labels of MLM
    bucket_by_length(lengths)                                     batches that need little padding

The examples of step t are a function of (seed, t) alone, and every epoch visits each example once:
no shuffle buffer has to be saved.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), section 4.2 and Table 2 (mixture); Devlin et
        al. 2019 (arXiv 1810.04805), section 3.1 (masking).
Axes:   B examples in a batch, L tokens.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lib.model.tokens import pad, tokenize
from lib.pipeline.errors import TrainingError, require

PASS_TOKENS = 32_768  # in one forward pass of pretraining; gradients of a larger step are added up
BLOCK = 1_000  # examples in which the mixture is exact
LONGEST = 4 * 8192  # tokens of a text before it is concatenated with others
# Table 2: the examples of each source, of a hundred. Other sources have equal shares.
TABLE_2 = {
    "short": {"c4": 10, "wikipedia": 10, "bookcorpus": 10},
    "long": {"c4": 24, "wikipedia": 23, "bookcorpus": 23},
}


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


@dataclass(frozen=True)
class Examples:
    """Rows of tokens, one after another; row i is tokens[ends[i] : ends[i + 1]].

    tokens: int32 (T,). ends: int64 (n + 1,), the first is 0.
    """

    tokens: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[list[int]]) -> "Examples":
        tokens, ends = array("i"), array("q", [0])
        for row in rows:
            tokens.extend(row)
            ends.append(len(tokens))
        return cls(np.asarray(tokens, dtype=np.int32), np.asarray(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)  # which ends a loop over the rows
        return self.tokens[self.ends[i] : self.ends[i + 1]]

    def cut(self, width: int, first: int, last: int) -> "Examples":
        """All tokens cut every `width`, between the ids `first` and `last`; the rest is left."""
        n = len(self.tokens) // width
        stream = self.tokens[: n * width].reshape(n, width)
        rows = np.pad(stream, ((0, 0), (1, 1)), constant_values=((0, 0), (first, last)))
        return Examples(rows.ravel(), np.arange(n + 1) * (width + 2))

    def cut_at_random(self, least: int, most: int, first: int, last: int) -> "Examples":
        """As `cut`, with widths that are drawn uniformly from `least` to `most`."""
        rng = np.random.default_rng([len(self.tokens), least, most])
        widths = rng.integers(least, most, len(self.tokens) // max(1, least), endpoint=True)
        ends = np.cumsum(widths)
        ends = ends[ends <= len(self.tokens)]
        pieces = np.split(self.tokens[: ends[-1] if len(ends) else 0], ends[:-1])
        return Examples.of([first, *piece, last] for piece in pieces if len(piece))


@lru_cache(maxsize=16)
def permutation(n: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """The order of a stream's n examples in an epoch."""
    rng = np.random.default_rng([seed, stream, epoch, n])
    return rng.permutation(np.arange(n, dtype=np.int32))


@lru_cache(maxsize=4)
def block(counts: tuple[int, ...], seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A block of examples, in random order: the stream of each, and its place among the stream's.

    Stream k has counts[k] of the block's examples.
    """
    rng = np.random.default_rng([seed, number, *counts])
    streams = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    places = np.empty_like(streams)
    for stream, count in enumerate(counts):
        places[streams == stream] = np.arange(count)
    return streams, places


def apportioned(shares: list[float], total: int) -> tuple[int, ...]:
    """Whole numbers in the proportion of `shares`, which add up to `total` (largest remainders)."""
    exact = np.array(shares) / sum(shares) * total
    counts = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return tuple(counts.tolist())


def composition(streams: list[tuple[float, Examples]]) -> tuple[tuple[int, ...], list[float]]:
    """Of each stream, its examples in a block of BLOCK, and their mean length in tokens."""
    lengths = [len(examples.tokens) / len(examples) for _, examples in streams]
    return apportioned([share for share, _ in streams], BLOCK), lengths


@dataclass
class PretrainingText:
    """The examples that pretraining draws from, by source.

    variable    an example per short text: its first `length` tokens, at least 10 (the paper's "10
                tokens up to the maximum"); or, with `lengths: uniform`, the short texts of a source
                concatenated and cut into pieces of 10 to `length` tokens, each length as often
    maximum     the long texts of a source concatenated, cut every length - 2 tokens, with [CLS] and
                [SEP] around each piece
    """

    variable: dict[str, Examples]
    maximum: dict[str, Examples]
    tokenizer: object
    length: int

    @classmethod
    def from_texts(
        cls,
        short: list[str] | dict[str, list[str]],
        long: list[str] | dict[str, list[str]],
        tokenizer,
        length: int,
        limit_tokens=math.inf,
        lengths: str = "natural",
    ) -> "PretrainingText":
        """Tokenise the short and the long texts of each source, in a random order.

        Args:
            short, long: the texts by source; a list if there is one source.
            limit_tokens: of each kind; about as many are read, an equal part of each source.
            lengths: of the variable examples, natural or uniform.
        """
        short, long = (texts if isinstance(texts, dict) else {"": texts} for texts in (short, long))

        def rows(texts: list[str], cut: int, limit: float) -> Iterator[list[int]]:
            total = 0
            texts = [texts[i] for i in np.random.default_rng(len(texts)).permutation(len(texts))]
            for start in range(0, len(texts), 256):
                for row in tokenize(texts[start : start + 256], tokenizer, cut)[0]:
                    total += len(row)
                    yield row
                if total >= limit:
                    return

        ends = tokenizer.cls_token_id, tokenizer.sep_token_id
        least = min(10, length)

        def variable(texts: list[str]) -> Examples:
            limit = limit_tokens / len(short)
            if lengths == "uniform":
                inner = Examples.of(row[1:-1] for row in rows(texts, LONGEST, limit))
                return inner.cut_at_random(least - 2, length - 2, *ends)
            return Examples.of(row for row in rows(texts, length, limit) if len(row) >= least)

        def maximum(texts: list[str]) -> Examples:
            found = rows(texts, LONGEST, limit_tokens / len(long))
            return Examples.of(row[1:-1] for row in found).cut(length - 2, *ends)

        parts = [
            {source: examples for source, texts in sources.items() if len(examples := make(texts))}
            for make, sources in ((variable, short), (maximum, long))
        ]
        return cls(*parts, tokenizer, length)

    def check(self, mixture: str, name: str) -> None:
        """Raise a TrainingError, before training, if the mixture needs text that is not there."""
        needed = {"short": f"short text of {min(10, self.length)} tokens or more"}
        needed["long"] = f"long text that fills {self.length} tokens"
        available = [k for k, sources in zip(needed, (self.variable, self.maximum)) if sources]
        wanted = [kind for kind in needed if mixture in (kind, "mixed")]
        missing = [needed[kind] for kind in wanted if kind not in available]
        remedies = ["add some to the pretraining text", *(f"set mixture: {k}" for k in available)]
        message = (
            f"{name} has no {' and no '.join(missing)}, which mixture {mixture!r} draws from: "
        )
        require(not missing, message + ", or ".join(remedies), TrainingError)

    def streams(self, mixture: str, variable_share: float) -> list[tuple[float, Examples]]:
        """(share, examples) of each stream of a mixture, that is, of each kind of each source."""
        share = {"short": 1.0, "long": 0.0, "mixed": variable_share}[mixture]
        kinds = (("short", share, self.variable), ("long", 1 - share, self.maximum))
        streams = []
        for kind, part, sources in kinds:
            known = sources.keys() <= TABLE_2[kind].keys()
            weights = [TABLE_2[kind][source] if known else 1 for source in sources]
            assert sources or not part, f"no {kind} text: `check` says so before training"
            shares = [part * weight / sum(weights) for weight in weights]
            streams += [pair for pair in zip(shares, sources.values()) if part]
        return streams

    def tokens_of_step(self, tokens: int, mixture: str, variable_share: float) -> float:
        """Tokens of a step of `batch`, the mean over all steps."""
        counts, lengths = composition(self.streams(mixture, variable_share))
        return max(tokens, np.dot(counts, lengths) / BLOCK)

    def batch(
        self, step: int, seed: int, tokens: int, mixture: str, variable_share: float
    ) -> list[list[np.ndarray]]:
        """The examples of a step, in buckets of similar length.

        A step has at least one example; the mean over all steps is `tokens` tokens, or that of an
        example if it is more (`tokens_of_step`). "short" draws
        from `variable`, "long" from `maximum`, and "mixed" from both: each BLOCK examples hold
        `variable_share` of variable ones, and each source's share of Table 2. A stream is drawn
        without replacement: its next epoch begins, in another order, after its last example.
        """
        streams = self.streams(mixture, variable_share)
        counts, lengths = composition(streams)
        per_step = max(1.0, tokens * BLOCK / np.dot(counts, lengths))
        rows = []
        for number in range(int(step * per_step), int((step + 1) * per_step)):
            nth, place = divmod(number, BLOCK)
            stream, rank = (values[place] for values in block(counts, seed, nth))
            examples = streams[stream][1]
            epoch, index = divmod(nth * counts[stream] + int(rank), len(examples))
            rows.append(examples[permutation(len(examples), seed, int(stream), epoch)[index]])
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
