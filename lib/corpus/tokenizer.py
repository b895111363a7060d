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


def make_tokenizer(name: str, rows: list[tuple[str, str, str, str]], vocabulary: int):
    """The tokenizer that `data.tokenizer` names: "embedded", a hub id or a folder.

    Raises:
        CorpusError: neither a tokenizer's folder nor an id that can be fetched.
    """
    if name == "embedded":
        return train_tokenizer(training_text(rows), vocabulary)
    try:
        return given_tokenizer(name)
    except CorpusError as error:
        raise CorpusError(f"{error}; or set data.tokenizer to embedded") from None


def training_text(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    """All short training texts and every fourth long one, of rows (text, source, kind, split)."""
    by_kind = {"short": [], "long": []}
    for text, _, kind, split in rows:
        if split == "train":
            by_kind[kind].append(text)
    yield from by_kind["short"]
    yield from by_kind["long"][::4]


def train_tokenizer(texts: Iterable[str], vocabulary: int):
    """A lower-casing WordPiece tokenizer of at most `vocabulary` pieces.

    The library's trainer numbers the `##c` pieces of single characters in hash order. Here they are
    handed in, numbered, and the model is rebuilt from the finished vocabulary.
    """
    import tokenizers

    words = Counter()
    for text in texts:
        words.update(re.findall(r"[^\W_]+|_|[^\w\s]", text.lower()))
    alphabet = frequent_characters(words)
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


def frequent_characters(words: Counter) -> list[str]:
    """The alphabet: characters that are frequent enough, in the order of their code points."""
    characters = Counter()
    for word, n in words.items():
        for character in set(word):
            characters[character] += n
    return sorted(character for character, n in characters.items() if n >= OFTEN)[:ALPHABET]


def in_proportion(words: Counter, alphabet: set[str]) -> Iterator[str]:
    """Each word that occurs twice and has known letters, repeated in proportion to its count."""
    scale = max(1.0, words.most_common(1)[0][1] / COPIES) if words else 1.0
    for word, n in sorted(words.items()):
        if n > 1 and alphabet.issuperset(word):
            yield " ".join([word] * max(1, round(n / scale)))


def lengths(tokenizer, texts: list[str]) -> np.ndarray:
    """Word pieces of each text, without [CLS] and [SEP]; (len(texts),) int64."""
    backend = tokenizer.backend_tokenizer
    encode = getattr(backend, "encode_batch_fast", backend.encode_batch)
    counts = []
    for start in range(0, len(texts), 4096):
        encodings = encode(texts[start : start + 4096], add_special_tokens=False)
        counts += [len(encoding) for encoding in encodings]
    return np.array(counts, dtype=np.int64)
