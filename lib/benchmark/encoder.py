"""Texts to vectors: one a text, the same to 1e-6 whatever stands beside it in the batch.

    Encoder(model, tokenizer).encode(texts)      float32 (n, D)
    tokenize(texts, tokenizer, max_length)       the first tokens; tokenize_whole: all of them
    windows(n, size, stride)                     how a long text is read in parts, and `by_windows` what becomes of them

Axes: n texts, D width.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels.engine import Engine
from lib.model.m2bert import M2BertPreTrainedModel

CHARACTERS_PER_TOKEN = (
    16  # first guess of how much text can matter; four times as much where it proves too little
)
BATCH_TOKENS = 16_384  # one forward pass at most, padding included
CHUNKS = ("mean", "max", "best")
PIECE = 2**19  # characters tokenised at a time
REACH = 4096  # characters before a cut in which a place for it is looked for
CJK = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)  # as BERT has them


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
                "their beginnings, chunk='mean', 'max' or 'best' all of them in windows, lib.model.m2bert.extend lengthens the model",
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


def windows(n: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) of the windows that read n tokens, `size` at a time, each `stride` after the one before; the last ends at n."""
    return [(start, min(start + size, n)) for start in range(0, max(n - size, 0) + stride, stride)]


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


def tokenize(texts: list[str], tokenizer, max_length: int) -> tuple[list[list[int]], list[bool]]:
    """Ids of each text's first `max_length` tokens, specials included, and whether anything was left out.

    Only as many characters are tokenised as can matter: a million words cost
    no more than the first few thousand.
    """
    check_texts(texts)
    ids: list = [None] * len(texts)
    cut = [False] * len(texts)
    pending, characters = list(range(len(texts))), CHARACTERS_PER_TOKEN * max_length
    while pending:
        again = []
        for some, parts in groups((i, beginning(encodable(texts[i]), characters)) for i in pending):
            # One token more than fits tells a full text from a truncated one.
            encoded = tokenizer(
                parts,
                truncation=True,
                max_length=max_length + 1,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            for i, part, found in zip(some, parts, encoded):
                if len(found) <= max_length and len(part) < len(texts[i]):
                    again.append(i)
                    continue
                cut[i] = len(found) > max_length
                ids[i] = (
                    found[: max_length - 1] + [found[-1]]
                    if cut[i] and max_length > 1
                    else found[:max_length]
                )
        pending, characters = again, characters * 4
    return ids, cut


def tokenize_whole(texts: list[str], tokenizer) -> list[list[int]]:
    """All ids of each text, [CLS] … [SEP], tokenised in pieces that break no word."""
    check_texts(texts)
    first, last = tokenizer("")["input_ids"]

    def pieces() -> Iterator[tuple[int, str]]:
        for i, text in enumerate(map(encodable, texts)):
            while text:
                part = beginning(text, PIECE)
                yield i, part
                text = text[len(part) :]

    ids: list[list[int]] = [[first] for _ in texts]
    for some, parts in groups(pieces()):
        backend = (
            tokenizer.backend_tokenizer
        )  # the tokenizer itself warns of texts longer than the model
        for i, found in zip(some, backend.encode_batch(parts, add_special_tokens=False)):
            ids[i] += found.ids
    return [row + [last] for row in ids]


def check_texts(texts: list[str]) -> None:
    if isinstance(texts, str):
        raise TypeError("a list of texts, not one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {type(text).__name__}, not str")


def groups(parts: Iterable[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    """(numbers, parts) of at most 512 parts and, unless one part alone has more, PIECE characters: a tokenizer needs 500 bytes for each."""
    some, held, size = [], [], 0
    for i, part in parts:
        if held and (len(held) == 512 or size + len(part) > PIECE):
            yield some, held
            some, held, size = [], [], 0
        some.append(i)
        held.append(part)
        size += len(part)
    if held:
        yield some, held


def beginning(text: str, characters: int) -> str:
    """About the first `characters` of a text, cut where no word is read in half; where there is no such place, all of it."""
    if len(text) <= characters:
        return text
    end = max(text.rfind(space, 0, characters + 1) for space in " \n\t")
    if end < max(1, characters - REACH):  # languages without spaces, and odd ones
        end = next(
            (
                i
                for i in range(characters, max(0, characters - REACH), -1)
                if stands_alone(text[i - 1])
            ),
            end,
        )
    return text[:end] if end > 0 else text


@cache
def stands_alone(character: str) -> bool:
    """Whether BERT reads it as a token of its own, or not at all, wherever it stands: white space, punctuation, CJK."""
    code = ord(character)
    return (
        character in "\t\n\r"
        or character in string.punctuation
        or unicodedata.category(character)[0] in "PZ"
        or any(low <= code <= high for low, high in CJK)
    )


def encodable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, for which a tokenizer would refuse the whole batch."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def pad(ids: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (n, longest)."""
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in ids])
    return input_ids, (torch.arange(width) < lengths[:, None]).long()


def bar(total: int, desc: str, show: bool = True):
    """A progress bar on stderr, where executed notebooks do not keep it."""
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, disable=not show, leave=False, mininterval=1)
