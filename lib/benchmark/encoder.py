"""Encode texts as vectors. A text's vector does not depend on its batch (to within 1e-6).

    Encoder(model, tokenizer).encode(texts)      float32 (n, D)
    by_windows(parts, embed, chunk)              the vectors of texts that are read in windows

Axes: n texts, M vectors, D width.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from lib.kernels import support
from lib.kernels.engine import Engine
from lib.model.device import to_device
from lib.model.m2bert import M2BertForRetrieval
from lib.model.tokens import pad, tokenize, tokenize_whole, windows
from lib.pipeline.errors import require
from lib.pipeline.progress import bar

BATCH_TOKENS = 16_384  # one forward pass at most, padding included
BLOCK = 2**16  # rows sorted by length at a time
CHUNKS = ("mean", "max", "best")


class TooLong(ValueError):
    """A text longer than its encoder reads; `index` says which."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class Encoder:
    """Embeds texts with a model and its tokenizer.

    Args:
        max_length: tokens to read, specials included; at most, and by default, the model's limit.
        truncate: read the first `max_length` tokens of a longer text and leave the rest.
        chunk: read a longer text whole, in windows of `max_length` tokens. `mean` and `max` reduce
            the windows' embeddings to one vector per text, dimension by dimension: the paper's
            chunking baselines. `best` keeps them all: a document then scores what its best window
            scores, at the price of many vectors.
        stride: tokens from the beginning of one window to that of the next; None: side by side.
        precision: float32 | bfloat16, of a model on a CPU (lib/kernels/engine.py); on other
            devices the model keeps its own.
        engine: of another encoder of this model, with what it has computed; None: a new one.

    Attributes:
        longer: longer[i] is True if text i of the last call exceeded `max_length` tokens.

    Raises:
        ValueError: max_length below 3, an unknown `chunk`, `chunk` with `truncate`, a stride that
            leaves tokens out, or a tokenizer without a padding token.
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
        self.max_length = min(max_length or limit, limit)
        room = f"max_length={self.max_length} leaves no room for a token between [CLS] and [SEP]"
        require(self.max_length > 2, room, ValueError)
        unpadded = "the tokenizer has no padding token: set tokenizer.pad_token to the model's"
        require(tokenizer.pad_token_id is not None, unpadded, ValueError)
        choice = f"truncate={truncate}, chunk={chunk!r}: truncate=True, or chunk one of {CHUNKS}"
        require(chunk in (None, *CHUNKS) and not (chunk and truncate), choice, ValueError)
        tokenizer.truncation_side = "right"  # the beginning is read, whatever its file says
        self.model, self.tokenizer = model.eval(), tokenizer
        self.truncate, self.chunk = truncate, chunk
        self.stride = checked_stride(stride, self.max_length - 2, chunk)
        self.longer: list[bool] = []
        self.precision, self.engine = precision, engine
        if self.on_cpu and isinstance(model, M2BertForRetrieval):
            dtype = support.matmul_dtype(getattr(torch, precision), torch.device("cpu"))
            self.precision = str(dtype).removeprefix("torch.")
            if engine is None and model.config.mixer == "long_conv":  # the only one that it knows
                self.engine = Engine(model, dtype)

    @property
    def on_cpu(self) -> bool:
        """Whether the model is in float32 on a CPU, as the engine needs it."""
        parameter = next(self.model.parameters())
        return parameter.device.type == "cpu" and parameter.dtype == torch.float32

    @property
    def context_length(self) -> int | None:
        """Tokens of a text that the encoder reads; None: all."""
        return None if self.chunk else self.max_length

    def limited(self, first_tokens: int) -> "Encoder":
        """The same encoder with a context of at most `first_tokens`."""
        length, engine = min(first_tokens, self.max_length), self.engine
        options = dict(truncate=True, precision=self.precision, engine=engine)
        return Encoder(self.model, self.tokenizer, length, **options)

    def encode(
        self, texts: list[str], batch_size: int = 32, normalize=True, show_progress=True
    ) -> np.ndarray:
        """Embeddings in the order of `texts`, float32, (n, D); unit norm if `normalize`.

        Texts are sorted by length, so that a short one never waits for a long neighbour, and a
        batch has at most 16,384 tokens; of padded texts, at most `batch_size`.

        Raises:
            TypeError: an element is no string, or `texts` is one string.
            ValueError: a text is longer than `max_length` without `truncate` or `chunk` (TooLong),
                an embedding is not finite, or a text has a vector for each window (chunk="best":
                use `encode_documents`).
        """
        vectors, _ = self.embedded(texts, batch_size, show_progress)
        if self.chunk == "best" and any(self.longer):
            way = "chunk='best' has a vector for each, encode_documents gives them"
            raise ValueError(f"text {self.longer.index(True)} has several windows: {way}")
        return unit(vectors) if normalize else vectors

    def encode_queries(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = False
    ) -> np.ndarray:
        """Unit vectors (n, D); with chunk="best" a query is read up to one window."""
        encoder = self.limited(self.max_length) if self.chunk == "best" else self
        return encoder.encode(texts, batch_size, show_progress=show_progress)

    def encode_documents(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (M, D) and the text of each, (M,), ascending; M = n unless chunk="best"."""
        vectors, owner = self.embedded(texts, batch_size, show_progress)
        return unit(vectors), owner

    def embedded(
        self, texts: list[str], batch_size: int, show_progress: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_documents`, vectors of any norm."""
        texts = texts if isinstance(texts, str) else list(texts)
        ids = self.tokenize(texts)
        if any(self.longer) and not self.truncate and not self.chunk:
            index = self.longer.index(True)
            raise TooLong(
                f"text {index} is longer than {self.max_length} tokens ({sum(self.longer)} of "
                f"{len(texts)} are): truncate=True reads their beginnings, chunk='mean', 'max' or "
                "'best' all of them in windows, lib.model.extend lengthens the model",
                index,
            )

        embed = partial(self.embed, batch_size=batch_size, show_progress=show_progress)
        vectors, owner = by_windows(ids, embed, self.chunk)
        bad = np.unique(owner[~np.isfinite(vectors).all(axis=1)])
        if len(bad):
            reason = f"({len(bad)} such): the model's weights are damaged, or too large for 16 bits"
            raise ValueError(f"the embedding of text {bad[0]} is not finite {reason}")
        return vectors, owner

    def embed(self, ids: list[list[int]], batch_size: int, show_progress: bool) -> np.ndarray:
        """The pooled outputs of rows of ids, float32, (n, D)."""
        vectors = np.zeros((len(ids), self.model.config.hidden_size), dtype=np.float32)
        progress = bar(total=len(ids), desc="encode", show=show_progress)
        for batch in self.batches(lengths_of(ids), batch_size):
            vectors[batch] = self.forward([ids[i] for i in batch])
            progress.update(len(batch))
        progress.close()
        return vectors

    def batches(self, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """The rows of each forward pass, the longest rows first; a function of the lengths alone.

        The last bits of a vector depend on the batch that its row is in. Therefore rows are sorted
        BLOCK at a time: whoever embeds a block alone (`lib.benchmark.shards`) has the same batches.

        Args:
            lengths: of the rows in tokens, int64, (n,).
        """
        batches = []
        for first in range(0, len(lengths), BLOCK):
            order = first + np.argsort(-lengths[first : first + BLOCK], kind="stable")
            tokens, start = self.read_tokens(lengths[order]), 0
            ends = tokens.cumsum()
            while start < len(order):
                if self.fast:
                    most = ends[start] - tokens[start] + BATCH_TOKENS
                    size = int(np.searchsorted(ends, most, side="right")) - start
                else:
                    size = min(batch_size, BATCH_TOKENS // tokens[start])
                batches.append(order[start : start + max(1, size)])
                start += len(batches[-1])
        return batches

    def read_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """The tokens that a forward pass reads of rows of these lengths, (n,)."""
        config = self.model.config
        if config.pad_to_max_length and not (self.fast and config.mask_padding):
            return np.full_like(lengths, config.max_position_embeddings)
        return lengths

    @property
    def fast(self) -> bool:
        """Whether the engine embeds, which pads nothing."""
        return self.engine is not None and self.on_cpu

    @torch.no_grad()
    def forward(self, ids: list[list[int]]) -> np.ndarray:
        """The pooled outputs of one batch, float32, (n, D)."""
        if self.fast:
            return self.engine(ids).numpy()
        pad_id = self.tokenizer.pad_token_id
        tensors = to_device(*pad(ids, pad_id), pad_id, self.model)
        rounded = self.on_cpu and self.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            return self.model(*tensors).pooler_output.float().cpu().numpy()

    def tokenize(self, texts: list[str]) -> list[list[list[int]]]:
        """The windows of each text (one, unless `chunk`), [CLS] … [SEP] in each; sets `longer`."""
        if not self.chunk:
            ids, self.longer = tokenize(texts, self.tokenizer, self.max_length)
            return [[row] for row in ids]
        ids, size = tokenize_whole(texts, self.tokenizer), self.max_length - 2
        self.longer = [len(row) > self.max_length for row in ids]
        parts = [windows(len(row) - 2, size, self.stride) for row in ids]
        return [
            [row[:1] + row[1 + start : 1 + end] + row[-1:] for start, end in part]
            for row, part in zip(ids, parts)
        ]


def lengths_of(ids: list[list[int]]) -> np.ndarray:
    return np.array([len(row) for row in ids], dtype=np.int64)


def checked_stride(stride: int | None, size: int, chunk: str | None, error=ValueError) -> int:
    way = f"from 1 to the window's {size} tokens, or some would be left out"
    way = way if chunk else "windows need chunk='mean', 'max' or 'best'"
    require(stride is None or chunk and 1 <= stride <= size, f"stride={stride}: {way}", error)
    return stride or size


def by_windows(
    parts: list[list], embed: Callable, chunk: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of texts that are read in windows, (M, D), and the text of each, (M,), ascending.

    Args:
        parts: the windows of each text, one at least.
        embed: all windows -> their vectors, (windows, D).
        chunk: mean | max, of a text's windows dimension by dimension, so M = n | best, all of them.
    """
    owner = np.array([i for i, part in enumerate(parts) for _ in part], dtype=np.int64)
    vectors = embed([window for part in parts for window in part])
    if chunk == "best" or len(owner) == len(parts):
        return vectors, owner
    starts = np.searchsorted(owner, np.arange(len(parts)))
    if chunk == "max":
        return np.maximum.reduceat(vectors, starts), owner[starts]
    sums, windows = np.add.reduceat(vectors, starts), np.bincount(owner)
    return sums / windows[:, None].astype(np.float32), owner[starts]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector over its Euclidean norm."""
    return F.normalize(torch.from_numpy(vectors), dim=-1).numpy()
