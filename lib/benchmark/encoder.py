"""Texts to vectors: one a text, the same to 1e-6 whatever stands beside it in the batch.

    Encoder(model, tokenizer).encode(texts)      float32 (n, D)
    tokenize(texts, tokenizer, max_length)       the first tokens; tokenize_whole: all of them
    windows(n, size, stride)                     how a long text is read in parts, and `by_windows` what becomes of them

Axes: n texts, D width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from lib.kernels.engine import Engine
from lib.model.m2bert import M2BertPreTrainedModel
from lib.model.tokens import pad, tokenize, tokenize_whole, windows
from lib.pipeline.progress import bar

BATCH_TOKENS = 16_384  # one forward pass at most, padding included
CHUNKS = ("mean", "max", "best")


class TooLong(ValueError):
    """A text longer than its encoder reads; `index` says which."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class Encoder:
    """Embeds texts with a model and its tokenizer.

    Args:
        max_length: tokens to read, specials included; None, or more than the model reads: what the model reads.
        truncate: read the first `max_length` tokens of a longer text and leave the rest.
        chunk: read a longer text whole, in windows of `max_length` tokens, and take, number by number, the `mean` or the
            largest value (`max`) of the windows' embeddings: one vector a text, the chunking baselines of the paper. Or
            keep them all (`best`): a document then scores what its best window scores, at the price of many vectors.
        stride: tokens from the beginning of one window to that of the next; None: side by side.
        precision: float32 | bfloat16, of a model on a CPU (lib/kernels/engine.py); elsewhere the model's own holds.
        engine: of another encoder of this model, with what it has computed; None: a new one.

    Attributes:
        longer: for each text of the last `encode`, whether it was longer than that.
        truncated: how many were.

    Raises:
        ValueError: max_length below 3, an unknown `chunk`, both ways out at once, or a stride that leaves tokens out.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_length: int | None = None,
        truncate: bool = False,
        chunk: str | None = None,
        stride: int | None = None,
        precision: str = "float32",
        engine: Engine | None = None,
    ):
        limit = model.config.max_position_embeddings
        if min(max_length or limit, limit) < 3:
            raise ValueError(
                f"max_length={min(max_length or limit, limit)} leaves no room for a token between [CLS] and [SEP]"
            )
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token: set tokenizer.pad_token to the one the model was trained with"
            )
        if chunk not in (None, *CHUNKS) or chunk and truncate:
            raise ValueError(
                f"truncate={truncate}, chunk={chunk!r}: one of truncate=True, chunk='mean', 'max' and 'best', or none of them"
            )
        self.model, self.tokenizer, self.truncate, self.chunk = (
            model.eval(),
            tokenizer,
            truncate,
            chunk,
        )
        self.max_length = min(max_length or limit, limit)
        tokenizer.truncation_side = (
            "right"  # the beginning is read, whatever a tokenizer's file says
        )
        self.stride = checked_stride(stride, self.max_length - 2, chunk)
        self.longer: list[bool] = []
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={precision!r}: float32 or bfloat16")
        parameter = next(model.parameters())
        self.precision, self.engine = precision, None
        if (
            parameter.device.type == "cpu"
            and parameter.dtype == torch.float32
            and isinstance(model, M2BertPreTrainedModel)
        ):
            self.engine = Engine(model, getattr(torch, precision)) if engine is None else engine
            self.precision = str(self.engine.dtype).removeprefix("torch.")

    @property
    def reads(self) -> int | None:
        """Tokens it reads of a text; None: all."""
        return None if self.chunk else self.max_length

    def reading(self, first_tokens: int) -> "Encoder":
        """The same encoder, reading at most the first so many tokens."""
        return Encoder(
            self.model,
            self.tokenizer,
            min(first_tokens, self.max_length),
            truncate=True,
            precision=self.precision,
            engine=self.engine,
        )

    @property
    def truncated(self) -> int:
        return sum(self.longer)

    def encode(
        self,
        texts: list[str],
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = True,
    ) -> np.ndarray:
        """Embeddings in the order of `texts`, float32, (n, D); unit norm if `normalize`.

        Texts are sorted by length, so a short one never waits for a long neighbour, and 16,384 tokens at most go at a time;
        where texts are padded, at most `batch_size` of them.

        Raises:
            TypeError: an element is no string (its index is named), or `texts` is one string.
            ValueError: a text is longer than `max_length` and nothing was said about that (TooLong), an embedding is not
                finite, or a text has a vector for each window (chunk="best": `encode_documents`); the index is named.
        """
        vectors = merged(
            *self.embedded(texts, batch_size, show_progress), self.chunk
        )  # which refuses several vectors for one text
        return unit(vectors) if normalize else vectors

    def encode_queries(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = False
    ) -> np.ndarray:
        """Unit vectors (n, D); with chunk="best" a query is read up to one window."""
        return (self.reading(self.max_length) if self.chunk == "best" else self).encode(
            texts, batch_size, show_progress=show_progress
        )

    def encode_documents(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (M, D) and the text that each belongs to, (M,), ascending; M = n unless chunk="best"."""
        vectors, owner = self.embedded(texts, batch_size, show_progress)
        return unit(vectors), owner

    def embedded(
        self, texts: list[str], batch_size: int, show_progress: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `encode_documents` gives, as the model gives it: of any norm."""
        texts = texts if isinstance(texts, str) else list(texts)
        ids = self.tokenize(texts)
        if any(self.longer) and not self.truncate and not self.chunk:
            raise TooLong(
                f"text {self.longer.index(True)} is longer than {self.max_length} tokens ({self.truncated} of {len(texts)} are): truncate=True reads "
                "their beginnings, chunk='mean', 'max' or 'best' all of them in windows, lib.model.extend lengthens the model",
                self.longer.index(True),
            )

        def finite(windows: list[list[int]], owner: np.ndarray) -> np.ndarray:
            vectors = self.embed(windows, batch_size, show_progress)
            bad = owner[~np.isfinite(vectors).all(axis=1)]
            if len(bad):
                raise ValueError(
                    f"the embedding of text {bad[0]} is not finite ({len(set(bad))} such): the model's weights are damaged, or too large for 16 bits"
                )
            return vectors

        return by_windows(ids, finite, self.chunk)

    @torch.no_grad()
    def embed(self, ids: list[list[int]], batch_size: int, show_progress: bool) -> np.ndarray:
        """The pooled outputs of rows of ids, float32, (n, D)."""
        config = self.model.config
        vectors = np.zeros((len(ids), config.hidden_size), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        device = next(self.model.parameters()).device
        progress = bar(total=len(ids), desc="encode", show=show_progress)
        fast = (
            self.engine is not None
            and device.type == "cpu"
            and next(self.model.parameters()).dtype == torch.float32
        )
        padded = config.pad_to_max_length and not (fast and config.mask_padding)
        tokens = np.array(
            [config.max_position_embeddings if padded else len(ids[i]) for i in order],
            dtype=np.int64,
        )
        ends, start = tokens.cumsum(), 0
        while start < len(order):
            size = (
                int(np.searchsorted(ends, ends[start] - tokens[start] + BATCH_TOKENS, side="right"))
                - start
                if fast
                else min(batch_size, BATCH_TOKENS // tokens[start])
            )
            batch = order[start : start + max(1, size)]
            start += len(batch)
            if fast:
                vectors[batch] = self.engine([ids[i] for i in batch]).numpy()
            else:
                input_ids, mask = pad([ids[i] for i in batch], self.tokenizer.pad_token_id)
                vectors[batch] = (
                    self.model(input_ids.to(device), mask.to(device))
                    .pooler_output.float()
                    .cpu()
                    .numpy()
                )
            progress.update(len(batch))
        progress.close()
        return vectors

    def tokenize(self, texts: list[str]) -> list[list[list[int]]]:
        """The windows of each text (one, unless `chunk`), [CLS] … [SEP] in each; sets `longer`."""
        if not self.chunk:
            ids, self.longer = tokenize(texts, self.tokenizer, self.max_length)
            return [[row] for row in ids]
        ids = tokenize_whole(texts, self.tokenizer)
        self.longer = [len(row) > self.max_length for row in ids]
        return [
            [
                row[:1] + row[1 + start : 1 + end] + row[-1:]
                for start, end in windows(len(row) - 2, self.max_length - 2, self.stride)
            ]
            for row in ids
        ]


def checked_stride(stride: int | None, size: int, chunk: str | None) -> int:
    if stride is not None and (not chunk or not 1 <= stride <= size):
        raise ValueError(
            f"stride={stride}: "
            + (
                f"from 1 to the window's {size} tokens, or some would be left out"
                if chunk
                else "windows need chunk='mean', 'max' or 'best'"
            )
        )
    return stride or size


def by_windows(
    parts: list[list], embed: Callable, chunk: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of texts that are read in windows, (M, D), and the text that each belongs to, (M,), ascending; M = n unless chunk="best".

    Args:
        parts: the windows of each text, one at least.
        embed: (all windows, the text of each) -> their vectors, (windows, D).
    """
    owner = np.array([i for i, some in enumerate(parts) for _ in some], dtype=np.int64)
    vectors = embed([window for some in parts for window in some], owner)
    return (
        (vectors, owner) if chunk == "best" else (merged(vectors, owner, chunk), np.unique(owner))
    )


def merged(vectors: np.ndarray, owner: np.ndarray, chunk: str | None) -> np.ndarray:
    """One vector a text from those of its windows: their mean or largest values; where each text has one, that one.

    Args:
        vectors: (M, D); owner: (M,), the text of each, ascending from 0 without a gap.
    """
    if not len(owner) or owner[-1] + 1 == len(owner):
        return vectors
    if chunk not in ("mean", "max"):
        raise ValueError(
            f"text {owner[np.flatnonzero(np.diff(owner) == 0)[0]]} has several windows: chunk='best' has a vector for each, encode_documents gives them"
        )
    together = np.add if chunk == "mean" else np.maximum
    found = together.reduceat(vectors, np.searchsorted(owner, np.arange(owner[-1] + 1)))
    return found / np.bincount(owner)[:, None].astype(np.float32) if chunk == "mean" else found


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector over its Euclidean norm."""
    return F.normalize(torch.from_numpy(vectors), dim=-1).numpy()
