"""BM25, the yardstick that reads words: no training, no vectors, any language.

    bm25(documents, queries)         a run, of the whole text or of its first tokens
    Bm25(first_tokens, tokenizer)    the same as a ranker of tasks, beside encoders
    words(text)                      what counts as a word
    first_words(text, n)             the text up to its n-th token
"""
import re

import numpy as np

from lib.encoder import CHARACTERS_PER_TOKEN, beginning, encodable

# The most frequent English function words; other languages lose nothing but these.
STOP_WORDS = frozenset("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with".split())
WORD = re.compile(r"\w+")


# Scripts that put no space between words: kana, CJK, Thai, Lao, Burmese, Khmer.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
PARTS = re.compile(f"[{UNSPACED}]+|[^{UNSPACED}]+")


def words(text: str) -> list[str]:
    """Lower-cased Unicode words without function words; of scripts without spaces, every two neighbouring characters."""
    return [part for word in WORD.findall(text.lower()) for part in parts_of(word) if part not in STOP_WORDS]


def parts_of(word: str) -> list[str]:
    if word.isascii():
        return [word]
    return [pair for part in PARTS.findall(word)
            for pair in ([part[i : i + 2] for i in range(max(1, len(part) - 1))] if re.match(f"[{UNSPACED}]", part) else [part])]


def first_words(text: str, n: int, tokenizer=None) -> str:
    """The text up to its n-th token: BM25's own words (function words count), or the pieces of a given tokenizer."""
    if tokenizer is None:
        end, count = None, 0
        for match in WORD.finditer(text):
            if count and count + len(parts_of(match[0])) > n:
                break
            end, count = match.end(), count + len(parts_of(match[0]))
            if count >= n:
                break
        return text[:end] if end is not None else text
    text, characters = encodable(text), CHARACTERS_PER_TOKEN * n
    while True:
        part = beginning(text, characters)
        offsets = tokenizer(part, truncation=True, max_length=n, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) == n or len(part) == len(text):
            return part[: offsets[-1][1]] if offsets else ""
        characters *= 4


def bm25(documents: dict[str, str], queries: dict[str, str], first_tokens: int | None = None, tokenizer=None,
         k: int = 1000) -> dict[str, dict[str, float]]:
    """The run of Okapi BM25 (Lucene's form, k1 = 1.2, b = 0.75) over lower-cased words, function words left out.

    Args:
        first_tokens: read only so many tokens of each document; queries are never cut.
        tokenizer: whose pieces `first_tokens` counts; None: BM25's own words.

    Returns:
        run[qid][pid] = score, matching documents only.

    Raises:
        ValueError: no documents, an empty query (named), or first_tokens or k below 1.
        TypeError: a query or document is no string (named).
    """
    import bm25s
    if not documents:
        raise ValueError("no documents to search")
    if k < 1 or first_tokens is not None and first_tokens < 1:
        raise ValueError(f"k={k}, first_tokens={first_tokens}: both count from 1")
    for name, texts in (("query", queries), ("document", documents)):
        for id, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{name} {id} is {type(text).__name__}, not str")
    for qid, query in queries.items():
        if not query.strip():
            raise ValueError(f"query {qid} is empty")
    if first_tokens is not None:
        documents = {pid: first_words(text, first_tokens, tokenizer) for pid, text in documents.items()}
    columns = sorted(documents, reverse=True)
    vocabulary: dict[str, int] = {}
    corpus = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(documents[pid])] for pid in columns]
    if not vocabulary:
        return {qid: {} for qid in queries}
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    index.index((corpus, vocabulary), show_progress=False)
    run = {}
    for qid, query in queries.items():
        known = [vocabulary[word] for word in words(query) if word in vocabulary]
        if not known:
            run[qid] = {}
            continue
        scores = index.get_scores(known)
        best = np.argsort(-scores, kind="stable")[: min(k, len(columns))]
        run[qid] = {columns[i]: float(scores[i]) for i in best if scores[i] > 0}
    return run


class Bm25:
    """BM25 as `retrieve.rank` takes it.

    Args:
        first_tokens: read only so many of each document; None: everything.
        tokenizer: whose pieces these are; None: words.

    Attributes:
        longer: for each document of the last task, whether it had more.
    """

    def __init__(self, first_tokens: int | None = None, tokenizer=None):
        self.reads, self.tokenizer, self.longer = first_tokens, tokenizer, []

    def reading(self, first_tokens: int) -> "Bm25":
        """The same, reading at most so many tokens."""
        return Bm25(min(first_tokens, self.reads or first_tokens), self.tokenizer)

    def run(self, documents: dict[str, str], queries: dict[str, str], k: int) -> dict[str, dict[str, float]]:
        read = documents if self.reads is None else {pid: first_words(text, self.reads, self.tokenizer) for pid, text in documents.items()}
        self.longer = [len(read[pid].rstrip()) < len(encodable(text).rstrip()) for pid, text in documents.items()]
        return bm25(read, queries, k=k)
