"""BM25, the baseline that counts words: no training, no vectors, any language.

Bm25(first_tokens, tokenizer)    ranks documents, reading all of each or its first tokens
bm25(documents, queries)         their ranking in one call
words(text)                      what counts as a word
first_words(text, n)             the text up to its n-th token
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from operator import add

import numpy as np
import regex

from lib.model.tokens import CHARACTERS_PER_TOKEN, beginning, encodable
from lib.pipeline.errors import require

# The most frequent English function words; other languages lose nothing but these.
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)

# Scripts that put no space between words; ー and the marks of kana belong to several of them.
SCRIPTS = (
    "Han Hiragana Katakana Thai Lao Myanmar Khmer Tai_Le New_Tai_Lue Tai_Tham Tai_Viet Javanese "
    "Balinese"
).split()
UNSPACED = "ー" + "".join(rf"\p{{{script}}}" for script in SCRIPTS)
# Seen by nobody, so they neither part a word nor change it: soft hyphen, joiners, variation
# selectors. All but the zero-width space, which writers of those scripts put between words.
IGNORABLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}--\u200b]+", regex.V1)
ASCII_WORD = re.compile(r"\w+", re.ASCII)
# Between ASCII's separators; whatever is beyond ASCII is looked at only then.
CHUNK = re.compile(r"[0-9A-Z_a-z\x80-\U0010ffff]+")
# What may be a word, as it stands in a text: letters and digits of all kinds, their marks, what is
# ignored, and signs that are letters in another form: radicals (⼭, often in PDFs), squares (㎏).
SIGNS = r"\u2e9f\u2ef3\u2f00-\u2fd5\u3200-\u33ff"
RUN = regex.compile(
    rf"[\w\p{{N}}\p{{M}}\p{{Default_Ignorable_Code_Point}}{SIGNS}--\u200b]+", regex.V1
)
# The same once folded: a mark belongs to what stands before it, so no word begins with one.
WORD = regex.compile(r"[\w\p{N}--\p{M}][\w\p{N}\p{M}]*", regex.V1)
UNSPACED_LETTER = rf"[{UNSPACED}--\p{{M}}]"
UNSPACED_FIRST = regex.compile(UNSPACED_LETTER, regex.V1)
UNSPACED_PLAIN = regex.compile(rf"{UNSPACED_LETTER}+", regex.V1)
PARTS = regex.compile(
    rf"(?:{UNSPACED_LETTER}\p{{M}}*)+|(?:[^{UNSPACED}\p{{M}}]\p{{M}}*)+", regex.V1
)
# A grapheme cluster; of a few marks (Burmese aa and visarga) Unicode makes clusters of their own.
CLUSTER = regex.compile(r"\X\p{M}*")
LONGEST_KEPT = 32  # characters of a chunk whose words are kept for its next time


def words(text: str) -> list[str]:
    """Folded Unicode words without function words; of scripts without spaces, pairs of letters.

    Every two neighbouring letters are a pair; a letter is one with its marks (a grapheme cluster).
    How a word is encoded makes no difference: é in one character or two, upper or lower case, full
    or half width, with a soft hyphen or without.
    """
    if text.isascii():
        return [word for word in ASCII_WORD.findall(text.lower()) if word not in STOP_WORDS]
    return [
        part
        for chunk in CHUNK.findall(text)
        for part in ((chunk.lower(),) if chunk.isascii() else parts_of(chunk))
        if part not in STOP_WORDS
    ]


def parts_of(chunk: str) -> tuple[str, ...]:
    """The words of a text without white space; function words too."""
    return kept_parts(chunk) if len(chunk) <= LONGEST_KEPT else folded_parts(chunk)


def folded_parts(chunk: str) -> tuple[str, ...]:
    """`parts_of`, not kept for the chunk's next time."""
    parts: list[str] = []
    for run in RUN.findall(chunk):
        if run.isascii():
            parts.append(run.lower())
        elif UNSPACED_PLAIN.fullmatch(run) and unicodedata.is_normalized("NFKC", run):
            parts += pairs(run)  # most Chinese: nothing to fold
        else:
            # Folded one by one and not as a text, so that Linux™ stays Linux; ﷺ folds to several.
            for word in WORD.findall(folded(run)):
                for part in PARTS.findall(word):
                    parts += pairs(CLUSTER.findall(part)) if UNSPACED_FIRST.match(part) else [part]
    return tuple(parts)


kept_parts = lru_cache(2**15)(folded_parts)


def pairs(letters: Sequence[str]) -> list[str]:
    """Every two neighbours as one word; a single letter is a word."""
    return list(map(add, letters, letters[1:])) or list(letters)


def folded(run: str) -> str:
    """One spelling of all that differ in encoding, case, width or ignored characters.

        NFKC(fold(NFKC(fold(NFD(x))))): Unicode's compatibility caseless match (chapter 3, D146)

    But the vowel am of Thai and Lao stays one letter, as it is written; NFKC makes two of it.
    """
    run = unicodedata.normalize("NFD", IGNORABLE.sub("", run)).casefold()
    run = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", run).casefold())
    return run.replace("\u0e4d\u0e32", "\u0e33").replace("\u0ecd\u0eb2", "\u0eb3")


def first_words(text: str, n: int, tokenizer=None) -> str:
    """The text up to its n-th token.

    Tokens are BM25's own words (function words count), or the word pieces of a given tokenizer.
    """
    if tokenizer is None:
        end, count = None, 0
        for match in RUN.finditer(text):
            size = len(parts_of(match[0]))
            if count and count + size > n:
                break
            end, count = match.end() if size else end, count + size
            if count >= n:
                break
        return text[:end] if end is not None else text
    text, characters = encodable(text), CHARACTERS_PER_TOKEN * n
    while True:
        part = beginning(text, characters)
        options = dict(truncation=True, max_length=n, return_offsets_mapping=True)
        offsets = tokenizer(part, add_special_tokens=False, **options)["offset_mapping"]
        if len(offsets) == n or len(part) == len(text):
            return part[: offsets[-1][1]] if offsets else ""
        characters *= 4


def bm25(documents: dict, queries: dict, first_tokens=None, tokenizer=None, k: int = 1000) -> dict:
    """The run of Okapi BM25; arguments as of `Bm25` and `Bm25.run`."""
    return Bm25(first_tokens, tokenizer).run(documents, queries, k)


class Bm25:
    """Okapi BM25 (Lucene's form, k1 = 1.2, b = 0.75) over `words`, as `search.rank` takes it.

    Args:
        first_tokens: read only so many tokens of each document; None: all. Queries are never cut.
        tokenizer: whose tokens `first_tokens` counts; None: BM25's own words.

    Attributes:
        longer: longer[i] is True if document i of the last run had more tokens.
    """

    def __init__(self, first_tokens: int | None = None, tokenizer=None):
        self.context_length, self.tokenizer, self.longer = first_tokens, tokenizer, []

    def limited(self, first_tokens: int) -> "Bm25":
        """BM25 with a context of at most `first_tokens`."""
        return Bm25(min(first_tokens, self.context_length or first_tokens), self.tokenizer)

    def run(self, documents: dict[str, str], queries: dict[str, str], k: int = 1000) -> dict:
        """run[qid][pid] = score of the k best documents that match.

        Raises:
            ValueError: no documents, or an empty query (named).
            TypeError: a query or document is no string (named).
        """
        import bm25s

        require(documents, "no documents to rank", ValueError)
        check_texts(documents, queries)
        read = documents
        if self.context_length is not None:
            limits = self.context_length, self.tokenizer
            read = {pid: first_words(text, *limits) for pid, text in documents.items()}
        self.longer = [self.more(text, len(read[pid].rstrip())) for pid, text in documents.items()]
        columns = sorted(read, reverse=True)
        vocabulary: dict[str, int] = {}
        corpus = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words(read[pid])]
            for pid in columns
        ]
        index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        if vocabulary:
            index.index((corpus, vocabulary), show_progress=False)
        run: dict[str, dict[str, float]] = {}
        for qid, query in queries.items():
            known = [vocabulary[word] for word in words(query) if word in vocabulary]
            scores = index.get_scores(known) if known else np.zeros(0)
            best = np.argsort(-scores, kind="stable")[:k]
            run[qid] = {columns[i]: float(scores[i]) for i in best if scores[i] > 0}
        return run

    def more(self, text: str, end: int) -> bool:
        """Whether a word (with a tokenizer: a character) stands after `end` characters."""
        if self.tokenizer is None:
            return any(parts_of(match[0]) for match in RUN.finditer(text, end))
        return end < len(encodable(text).rstrip())


def check_texts(documents: dict[str, str], queries: dict[str, str], task: str = "") -> None:
    """Refuse a query or document that is no string (TypeError) and an empty query (ValueError)."""
    for name, texts in (("query", queries), ("document", documents)):
        for id, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{task}{name} {id} is {type(text).__name__}, not str")
            require(name == "document" or text.strip(), f"{task}query {id} is empty", ValueError)
