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

import torch
from torch import Tensor

from lib.pipeline.errors import BUILD, CorpusError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Characters tokenised for each token wanted; four times as many if they give too few tokens.
CHARACTERS_PER_TOKEN = 16
PIECE = 2**19  # characters tokenised at a time
REACH = 4096  # characters before a cut that are searched for a space
CJK = (  # as in BERT's own tokenizer
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


# ------------------------------------------------------------------ tokenizers


def load_tokenizer(folder: str | Path):
    """The tokenizer of a corpus: tokenizer.json in `folder` or in its subfolder tokenizer/.

    The tokenizers trained here have the ids [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4.

    Raises:
        CorpusError: tokenizer.json is missing, damaged, or lacks a special token.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    path = folder if (folder / "tokenizer.json").is_file() else folder / "tokenizer"
    if not (path / "tokenizer.json").is_file():
        raise CorpusError(f"{path}/tokenizer.json is missing: {BUILD}")
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library's own, JSON's, KeyError
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise CorpusError(
            f"{path}/tokenizer.json cannot be read ({reason}): fetch it again, or {BUILD}"
        ) from None
    unset = {name: piece for name, piece in names.items() if getattr(tokenizer, name) is None}
    require_special(path / "tokenizer.json", unset.values(), tokenizer.get_vocab())
    tokenizer.add_special_tokens(unset)
    return tokenizer


def given_tokenizer(name: str):
    """The tokenizer of a folder with tokenizer.json or vocab.txt, or of a hub id.

    Raises:
        CorpusError: `name` is no tokenizer's folder, and no id that can be fetched.
    """
    folder = Path(name)
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    if (folder / "vocab.txt").is_file():
        try:
            pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise CorpusError(
                f"{folder}/vocab.txt is not UTF-8 text: it should be bert-base-uncased's"
            ) from None
        pieces = pieces[:-1] if not pieces[-1] else pieces
        require_special(folder / "vocab.txt", SPECIAL, pieces)
        return wordpiece({piece: number for number, piece in enumerate(pieces)})
    if folder.is_dir() or name.count("/") > 1:
        raise CorpusError(
            f"{folder} has neither vocab.txt nor tokenizer.json: put bert-base-uncased's there"
        )
    return hub_tokenizer(name)


def require_special(path: Path, needed: Iterable[str], pieces) -> None:
    absent = [piece for piece in needed if piece not in pieces]
    if absent:
        raise CorpusError(f"{path} has no {', '.join(absent)}: it should be bert-base-uncased's")


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
            f"({type(error).__name__}): put its vocab.txt into a folder and name that folder "
            "as the tokenizer"
        ) from None


def wordpiece(vocab: dict[str, int]):
    """The tokenizer of BERT (uncased) over a given vocabulary."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {piece: vocab[piece] for piece in sorted(vocab, key=vocab.get)}, unk_token="[UNK]"
        )
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(piece, vocab[piece]) for piece in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=10**9,
    )


# ------------------------------------------------------------------ ids


def tokenize(texts: list[str], tokenizer, max_length: int) -> tuple[list[list[int]], list[bool]]:
    """The ids of each text's first `max_length` tokens, specials included, and whether it was cut.

    Characters that cannot reach the first tokens are not tokenised: a text of a million words costs
    no more than its first few thousand.

    Raises:
        TypeError: `texts` is one string, or an element is no string (the message has its index).
    """
    check_texts(texts)
    ids: list = [None] * len(texts)
    cut = [False] * len(texts)
    pending, characters = list(range(len(texts))), CHARACTERS_PER_TOKEN * max_length
    while pending:
        again = []
        beginnings = ((i, beginning(encodable(texts[i]), characters)) for i in pending)
        for numbers, parts in groups(beginnings):
            # One token more than fits tells a full text from a truncated one.
            encoded = tokenizer(
                parts,
                truncation=True,
                max_length=max_length + 1,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            for i, part, row in zip(numbers, parts, encoded):
                if len(row) <= max_length and len(part) < len(texts[i]):
                    again.append(i)
                    continue
                cut[i] = len(row) > max_length
                keep_last = cut[i] and max_length > 1
                ids[i] = row[: max_length - 1] + [row[-1]] if keep_last else row[:max_length]
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
    backend = tokenizer.backend_tokenizer  # which warns of no text longer than the model
    for numbers, parts in groups(pieces()):
        for i, encoding in zip(numbers, backend.encode_batch(parts, add_special_tokens=False)):
            ids[i] += encoding.ids
    return [row + [last] for row in ids]


def check_texts(texts: list[str]) -> None:
    if isinstance(texts, str):
        raise TypeError("a list of texts, not one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {type(text).__name__}, not str")


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
    code = ord(character)
    return (
        character in "\t\n\r"
        or character in string.punctuation
        or unicodedata.category(character)[0] in "PZ"
        or any(low <= code <= high for low, high in CJK)
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
