"""A WordPiece tokenizer that is a function of its training text, and lengths in its word pieces.

make_tokenizer(name, rows, vocabulary)    trained here, or somebody else's
train_tokenizer(texts, vocabulary)        the same from the same texts on every run
lengths(tokenizer, texts)                 word pieces of each text
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from lib.model.tokens import SPECIAL, given_tokenizer, wordpiece
from lib.pipeline.errors import CorpusError

ALPHABET, OFTEN = 1_000, 20  # characters at most, and how often a character must occur
COPIES = 10_000  # of the most frequent word: the trainer takes text, not counts


def make_tokenizer(name: str, rows: list[tuple], vocabulary: int):
    """The tokenizer that `data.tokenizer` names: "embedded", a hub id or a folder.

    An embedded one is trained on all short training texts of the rows (text, source, kind, split)
    and on every fourth long text.

    Raises:
        CorpusError: neither a tokenizer's folder nor an id that can be fetched.
    """
    if name == "embedded":
        short, long = (
            [row[0] for row in rows if row[2:4] == (kind, "train")] for kind in ("short", "long")
        )
        return train_tokenizer(short + long[::4], vocabulary)
    try:
        return given_tokenizer(name)
    except CorpusError as error:
        raise CorpusError(f"{error}; or set data.tokenizer to embedded") from None


def train_tokenizer(texts: Iterable[str], vocabulary: int):
    """A lower-casing WordPiece tokenizer of at most `vocabulary` pieces.

    The library's trainer numbers the `##c` pieces of single characters in hash order. Here they
    have their numbers before it starts, and the model is rebuilt from the finished vocabulary.
    """
    import tokenizers

    words, characters = Counter(), Counter()
    for text in texts:
        words.update(re.findall(r"[^\W_]+|_|[^\w\s]", text.lower()))
    for word, n in words.items():
        characters.update(dict.fromkeys(word, n))
    alphabet = sorted(character for character, n in characters.items() if n >= OFTEN)[:ALPHABET]
    trained = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *(f"##{letter}" for letter in alphabet if letter.isalnum())],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=2,
        show_progress=False,
    )
    trained.train_from_iterator(in_proportion(words, set(alphabet)), trainer)
    return wordpiece(trained.get_vocab())


def in_proportion(words: Counter, alphabet: set[str]) -> Iterator[str]:
    """Each word that occurs twice and has known letters, repeated in proportion to its count."""
    scale = max(1.0, max(words.values(), default=0) / COPIES)
    for word, n in sorted(words.items()):
        if n > 1 and alphabet.issuperset(word):
            yield " ".join([word] * max(1, round(n / scale)))


def lengths(tokenizer, texts: list[str]) -> np.ndarray:
    """Word pieces of each text, without [CLS] and [SEP]; (len(texts),) int64."""
    encode, counts = tokenizer.backend_tokenizer.encode_batch_fast, []
    for start in range(0, len(texts), 4096):
        counts += map(len, encode(texts[start : start + 4096], add_special_tokens=False))
    return np.array(counts, dtype=np.int64)
