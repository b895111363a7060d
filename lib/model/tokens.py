"""Texts to tokens: tokenizers from files, and how much of a text a model reads.

load_tokenizer(folder)                    a corpus's tokenizer; given_tokenizer(name): anybody's
tokenize(texts, tokenizer, max_length)    each text's first tokens; tokenize_whole: all of them
windows(n, size, stride)                  the windows in which a long text is read
beginning(text, characters)               a text's first characters, cut between words
pad(ids, pad_id)                          rows of ids as one tensor with its mask
"""

import re
import string
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.model import places, token_rows
from lib.pipeline.errors import BUILD, CorpusError, require

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
# Characters tokenised for each token wanted; four times as many if they give too few tokens.
CHARACTERS_PER_TOKEN = 16
PIECE = 2**19  # characters tokenised at a time
REACH = 4096  # characters before a cut that are searched for a space
CJK = re.compile(  # as in BERT's own tokenizer
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


# ------------------------------------------------------------------ tokenizers


def load_tokenizer(folder: str | Path):
    """The tokenizer of a corpus: tokenizer.json in `folder` or in its subfolder tokenizer/.

    The tokenizers trained here have the ids [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4.

    Raises:
        CorpusError: tokenizer.json is missing, damaged, or lacks a special token.
    """
    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        path = Path(folder, "tokenizer", "tokenizer.json")
    require(path.is_file(), f"{path} is missing: {BUILD}")
    try:
        tokenizer = read_tokenizer(path.parent)
    except Exception as error:  # the library's own, JSON's, KeyError
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        message = f"{path} cannot be read ({reason}): fetch it again, or {BUILD}"
        raise CorpusError(message) from None
    unset = {name: piece for name, piece in NAMES.items() if getattr(tokenizer, name) is None}
    require_special(path, unset.values(), tokenizer.get_vocab())
    tokenizer.add_special_tokens(unset)
    tokenizer.model_max_length = 10**9  # of another model; a longer text is no reason to warn
    return tokenizer


def read_tokenizer(folder: Path):
    """The tokenizer of a folder with tokenizer.json, without AutoTokenizer's seconds of imports.

    Many files say to cut texts after some tokens, and to pad them. Here the caller decides.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def given_tokenizer(name: str):
    """The tokenizer of a folder with tokenizer.json or vocab.txt, of `package:<name>` or a hub id.

    Raises:
        CorpusError: `name` is no tokenizer's folder or package, and no id that can be fetched.
    """
    name = str(places.of(name, CorpusError))
    folder, vocab = Path(name), Path(name, "vocab.txt")
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    if vocab.is_file():
        try:
            pieces = vocab.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            message = f"{vocab} is not UTF-8 text: it should be bert-base-uncased's"
            raise CorpusError(message) from None
        require_special(vocab, SPECIAL, pieces)
        return wordpiece({piece: number for number, piece in enumerate(pieces)})
    here = folder.is_dir() or name.count("/") > 1
    message = f"{folder} has neither vocab.txt nor tokenizer.json: put bert-base-uncased's there"
    require(not here, message)
    return hub_tokenizer(name)


def require_special(path: Path, needed: Iterable[str], pieces) -> None:
    absent = [piece for piece in needed if piece not in pieces]
    require(not absent, f"{path} has no {', '.join(absent)}: it should be bert-base-uncased's")


def hub_tokenizer(name: str):
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from transformers import AutoTokenizer

    try:
        if not isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str):
            # Asks once; AutoTokenizer asks for most of a minute.
            get_hf_file_metadata(hf_hub_url(name, "tokenizer_config.json"))
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub's, the network's, the library's own
        raise CorpusError(
            f"tokenizer {name!r} is no folder here and cannot be loaded from the hub "
            f"({type(error).__name__}): put its vocab.txt into a folder and name that folder as "
            "the tokenizer"
        ) from None


def wordpiece(vocab: dict[str, int]):
    """The tokenizer of BERT (uncased) over a given vocabulary."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {piece: vocab[piece] for piece in sorted(vocab, key=vocab.get)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(piece, vocab[piece]) for piece in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES, model_max_length=10**9)


# ------------------------------------------------------------------ ids


def tokenize(texts: list[str], tokenizer, max_length: int) -> tuple[list[list[int]], list[bool]]:
    """The ids of each text's first `max_length` tokens, specials included, and whether it was cut.

    Characters that cannot reach the first tokens are not tokenised: a text of a million words costs
    no more than its first few thousand.

    Raises:
        TypeError: `texts` is one string, or an element is no string (the message has its index).
    """
    check_texts(texts)
    options = dict(padding=False, return_attention_mask=False, return_token_type_ids=False)
    ids: list = [None] * len(texts)
    cut = [False] * len(texts)

    def take(i: int, row: list[int]) -> None:
        cut[i] = len(row) > max_length
        keep_last = cut[i] and max_length > 1
        ids[i] = row[: max_length - 1] + [row[-1]] if keep_last else row[:max_length]

    pending, characters = [], CHARACTERS_PER_TOKEN * max_length
    for i, row in enumerate(kept_rows(texts, tokenizer, max_length)):
        pending.append(i) if row is None else take(i, row)
    while pending:
        again = []
        beginnings = ((i, beginning(encodable(texts[i]), characters)) for i in pending)
        for numbers, parts in groups(beginnings):
            # One token more than fits tells a full text from a truncated one.
            encoded = tokenizer(parts, truncation=True, max_length=max_length + 1, **options)
            for i, part, row in zip(numbers, parts, encoded["input_ids"]):
                if len(row) <= max_length and len(part) < len(texts[i]):
                    again.append(i)
                else:
                    take(i, row)
        pending, characters = again, characters * 4
    return ids, cut


def tokenize_whole(texts: list[str], tokenizer) -> list[list[int]]:
    """All ids of each text, [CLS] … [SEP], tokenised in pieces that break no word."""
    check_texts(texts)
    first, last = tokenizer("")["input_ids"]
    kept = list(kept_rows(texts, tokenizer))

    def pieces() -> Iterator[tuple[int, str]]:
        for i, text in enumerate(map(encodable, texts)):
            while text and kept[i] is None:
                part = beginning(text, PIECE)
                yield i, part
                text = text[len(part) :]

    ids: list[list[int]] = [[first] for _ in texts]
    backend = tokenizer.backend_tokenizer  # which warns of no text longer than the model
    for numbers, parts in groups(pieces()):
        for i, encoding in zip(numbers, backend.encode_batch(parts, add_special_tokens=False)):
            ids[i] += encoding.ids
    return [whole or row + [last] for whole, row in zip(kept, ids)]


def kept_rows(
    texts: list[str], tokenizer, max_length: int | None = None
) -> Iterator[list[int] | None]:
    """The rows that are kept on disk: whole, or one token longer than `max_length`; else None."""
    rows = token_rows.known(tokenizer)
    for text in texts:
        row = None if rows is None else rows.get(text)
        if row is not None and max_length is not None and len(row) > max_length + 1:
            row = np.append(row[:max_length], row[-1])
        yield None if row is None else row.tolist()


def check_texts(texts: list[str]) -> None:
    require(not isinstance(texts, str), "a list of texts, not one text", TypeError)
    for i, text in enumerate(texts):
        require(isinstance(text, str), f"text {i} is {type(text).__name__}, not str", TypeError)


def groups(parts: Iterable[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Batches (numbers, parts) of at most 512 parts and PIECE characters; a longer part is alone.

    The limit is for memory: a tokenizer needs 500 bytes for each character.
    """
    numbers, held, size = [], [], 0
    for i, part in parts:
        if held and (len(held) == 512 or size + len(part) > PIECE):
            yield numbers, held
            numbers, held, size = [], [], 0
        numbers.append(i)
        held.append(part)
        size += len(part)
    if held:
        yield numbers, held


def beginning(text: str, characters: int) -> str:
    """About the first `characters` of a text, cut between words; the whole text if it has none."""
    if len(text) <= characters:
        return text
    end = max(text.rfind(space, 0, characters + 1) for space in " \n\t")
    if end < max(1, characters - REACH):  # languages without spaces, and odd ones
        cuts = range(characters, max(0, characters - REACH), -1)
        end = next((i for i in cuts if stands_alone(text[i - 1])), end)
    return text[:end] if end > 0 else text


@cache
def stands_alone(character: str) -> bool:
    """Whether BERT makes a character a token of its own, or drops it, in every context.

    True for white space, punctuation and CJK.
    """
    return (
        character in f"\t\n\r{string.punctuation}"
        or unicodedata.category(character)[0] in "PZ"
        or CJK.match(character) is not None
    )


def encodable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, since a tokenizer refuses a batch that has one."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def windows(n: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) of windows over n tokens, `size` long, `stride` apart; the last ends at n."""
    return [(start, min(start + size, n)) for start in range(0, max(n - size, 0) + stride, stride)]


def pad(ids: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (n, length of the longest row)."""
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in ids])
    return input_ids, (torch.arange(width) < lengths[:, None]).long()
