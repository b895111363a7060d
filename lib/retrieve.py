"""Search: texts to vectors, vectors to rankings, rankings to numbers.

    Encoder(model, tokenizer).encode(texts)    one vector a text, whatever the batch
    search(q, d, …)                            exact search with torch or faiss, one tie rule
    rank(encoder, tasks)                       both, for several tasks
    bm25(documents, queries)                   the yardstick that reads words
    write_run, read_run                        TREC run files, recomputable by trec_eval
    evaluate(task, run)                        nDCG@10 with its interval

A `run` is run[query_id][doc_id] = score; ties are broken by document id,
descending, as trec_eval does.
Axes: n texts, N documents, Q queries, D width.
"""
import json
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib import files, metrics

CHARACTERS_PER_TOKEN = 16       # first guess of how much text can matter; four times as much where it proves too little
BATCH_TOKENS = 16_384           # one forward pass at most, padding included
PIECE = 2**19                   # characters tokenised at a time
REACH = 4096                    # characters before a cut in which a place for it is looked for
CJK = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F))     # as BERT has them
SCORES = 32_000_000             # held at a time: 128 MB
BACKENDS = ("auto", "torch", "faiss")


class Encoder:
    """Embeds texts with a model and its tokenizer.

    Args:
        max_length: tokens to read, specials included; None, or more than the model reads: what the model reads.
        truncate: read the first `max_length` tokens of a longer text and leave the rest.
        chunk: mean | max: read a longer text whole, in windows of `max_length` tokens side by side, and take the mean or
            the largest value of the windows' embeddings, number by number (the chunking baselines of the paper).

    Attributes:
        longer: for each text of the last `encode`, whether it was longer than that.
        truncated: how many were.

    Raises:
        ValueError: max_length below 3, an unknown `chunk`, or both ways out at once.
    """

    def __init__(self, model, tokenizer, max_length: int | None = None, truncate: bool = False, chunk: str | None = None):
        limit = model.config.max_position_embeddings
        if min(max_length or limit, limit) < 3:
            raise ValueError(f"max_length={min(max_length or limit, limit)} leaves no room for a token between [CLS] and [SEP]")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token to the one the model was trained with")
        if chunk not in (None, "mean", "max") or chunk and truncate:
            raise ValueError(f"truncate={truncate}, chunk={chunk!r}: one of truncate=True, chunk='mean' and chunk='max', or none of them")
        self.model, self.tokenizer, self.truncate, self.chunk = model.eval(), tokenizer, truncate, chunk
        self.max_length = min(max_length or limit, limit)
        self.longer: list[bool] = []

    @property
    def truncated(self) -> int:
        return sum(self.longer)

    def encode(self, texts: list[str], batch_size: int = 32, normalize: bool = True, show_progress: bool = True) -> np.ndarray:
        """Embeddings in the order of `texts`, float32, (n, D); unit norm if `normalize`.

        Texts are sorted by length, so a short one never waits for a long neighbour; at most `batch_size` texts and
        16,384 tokens go at a time.

        Raises:
            TypeError: an element is no string (its index is named), or `texts` is one string.
            ValueError: a text is longer than `max_length` and nothing was said about that, or an embedding is not finite;
                the index is named.
        """
        texts = texts if isinstance(texts, str) else list(texts)
        ids = self.tokenize(texts)
        if any(self.longer) and not self.truncate and not self.chunk:
            raise ValueError(f"text {self.longer.index(True)} is longer than {self.max_length} tokens ({self.truncated} of {len(texts)} are): truncate=True reads "
                             "their beginnings, chunk='mean' or 'max' all of them in windows, lib.model.extend lengthens the model")
        owner = [i for i, windows in enumerate(ids) for _ in windows]
        vectors = self.embed([window for windows in ids for window in windows], batch_size, show_progress)
        if len(vectors) > len(texts):
            owner, together = np.array(owner), np.add if self.chunk == "mean" else np.maximum
            vectors = together.reduceat(vectors, np.searchsorted(owner, np.arange(len(texts))))
            if self.chunk == "mean":
                vectors /= np.bincount(owner)[:, None].astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(f"the embedding of text {bad[0]} is not finite ({len(bad)} such): the model's weights are damaged, or too large for 16 bits")
        return F.normalize(torch.from_numpy(vectors), dim=-1).numpy() if normalize else vectors

    @torch.no_grad()
    def embed(self, ids: list[list[int]], batch_size: int, show_progress: bool) -> np.ndarray:
        """The pooled outputs of rows of ids, float32, (n, D)."""
        config = self.model.config
        vectors = np.zeros((len(ids), config.hidden_size), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        device = next(self.model.parameters()).device
        progress = bar(total=len(ids), desc="encode", show=show_progress)
        while order:
            longest = config.max_position_embeddings if config.pad_to_max_length else len(ids[order[0]])
            size = max(1, min(batch_size, BATCH_TOKENS // longest))
            batch, order = order[:size], order[size:]
            input_ids, mask = pad([ids[i] for i in batch], self.tokenizer.pad_token_id)
            vectors[batch] = self.model(input_ids.to(device), mask.to(device)).pooler_output.float().cpu().numpy()
            progress.update(len(batch))
        progress.close()
        return vectors

    def tokenize(self, texts: list[str]) -> list[list[list[int]]]:
        """The windows of each text (one, unless `chunk`), [CLS] … [SEP] in each; sets `longer`."""
        if not self.chunk:
            ids, self.longer = tokenize(texts, self.tokenizer, self.max_length)
            return [[row] for row in ids]
        ids = tokenize_whole(texts, self.tokenizer)
        self.longer, step = [len(row) > self.max_length for row in ids], self.max_length - 2
        return [[row[:1] + row[start : min(start + step, len(row) - 1)] + row[-1:] for start in range(1, max(2, len(row) - 1), step)] for row in ids]


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
            encoded = tokenizer(parts, truncation=True, max_length=max_length + 1, padding=False,
                                return_attention_mask=False, return_token_type_ids=False)["input_ids"]
            for i, part, found in zip(some, parts, encoded):
                if len(found) <= max_length and len(part) < len(texts[i]):
                    again.append(i)
                    continue
                cut[i] = len(found) > max_length
                ids[i] = found[: max_length - 1] + [found[-1]] if cut[i] and max_length > 1 else found[:max_length]
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
        backend = tokenizer.backend_tokenizer                              # the tokenizer itself warns of texts longer than the model
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
    if end < max(1, characters - REACH):                                   # languages without spaces, and odd ones
        end = next((i for i in range(characters, max(0, characters - REACH), -1) if stands_alone(text[i - 1])), end)
    return text[:end] if end > 0 else text


@cache
def stands_alone(character: str) -> bool:
    """Whether BERT reads it as a token of its own, or not at all, wherever it stands: white space, punctuation, CJK."""
    code = ord(character)
    return (character in "\t\n\r" or character in string.punctuation or unicodedata.category(character)[0] in "PZ"
            or any(low <= code <= high for low, high in CJK))


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


def search(queries: np.ndarray, documents: np.ndarray, qids: list[str], pids: list[str], k: int = 1000,
           backend: str = "auto") -> dict[str, dict[str, float]]:
    """Exact inner-product search: the run of the k best documents of each query.

        score(q, d) = Σ_i q_i d_i, summed in float64, rounded to float32;  ties by id, descending

    Float32 sums differ in their last bits from library to library, and last
    bits decide ties. So the backend only nominates: every document whose score
    could be among the k best. These are scored again, by one formula.

    Args:
        queries: (Q, D), documents: (N, D), float32; normalised, the score is the cosine.
        k: how many at most.
        backend: torch | faiss | auto (faiss where it is installed). The run is the same.

    Raises:
        ValueError: ids and vectors disagree in number or in D, an id comes twice, a vector is not finite, or k < 1.
        ImportError: faiss is asked for and absent.
    """
    queries, documents = (np.ascontiguousarray(vectors, dtype=np.float32) for vectors in (queries, documents))
    if len(queries) != len(qids) or len(documents) != len(pids):
        raise ValueError(f"one id per vector: got {len(qids)} ids for {len(queries)} queries, {len(pids)} for {len(documents)} documents")
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"vectors are (n, D) with one D: got {queries.shape} for queries, {documents.shape} for documents")
    if k < 1 or backend not in BACKENDS:
        raise ValueError(f"k={k}, backend={backend!r}: k from 1, backend one of {', '.join(BACKENDS)}")
    for name, ids, vectors in (("query", qids, queries), ("document", pids, documents)):
        places: dict[str, int] = {}
        for place, id in enumerate(ids):
            if places.setdefault(id, place) != place:
                raise ValueError(f"{name} {id} comes twice, at {places[id]} and {place}")
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(f"the vector of {name} {ids[bad[0]]} is not finite ({len(bad)} such): the model or its input is broken")
    # Columns in descending order of id: among equals, the first column wins.
    columns = sorted(range(len(pids)), key=pids.__getitem__, reverse=True)
    documents = documents[columns]
    nominate = nomination(documents, backend)
    N, D = documents.shape
    k, m, run = min(k, N), min(k, N) + 32, {qid: {} for qid in qids}
    # Twice the rounding error of a float32 sum of D products, per unit of |q|, and as much again for safety.
    doubt = 4 * D * 2.0**-24 * np.linalg.norm(documents, axis=1).max(initial=0)
    pending, block = list(range(len(qids))) if N else [], max(1, SCORES // max(1, N))
    while pending:
        again = []
        for start in range(0, len(pending), block):
            some = pending[start : start + block]
            found = nominate(queries[some], m) if m < N else [(None, np.arange(N))] * len(some)
            for i, (scores, where) in zip(some, found):
                if m < N and scores[-1] >= scores[k - 1] - doubt * np.linalg.norm(queries[i]):
                    again.append(i)                                        # there may be more where these came from
                    continue
                exact = (documents[where].astype(np.float64) * queries[i].astype(np.float64)).sum(axis=1).astype(np.float32)
                best = np.lexsort((where, -exact))[:k]
                run[qids[i]] = {pids[columns[where[j]]]: float(exact[j]) for j in best}
        pending, m = again, 4 * m
    return run


def nomination(documents: np.ndarray, backend: str):
    """A function (queries, m) -> for each query, the m largest float32 scores, descending, and their columns."""
    if backend != "torch":
        try:
            import faiss
        except ImportError as error:
            if backend == "faiss":
                raise ImportError(f"backend='faiss' needs faiss ({error}): install faiss-cpu or faiss-gpu, or use backend='torch'") from None
        else:
            index = faiss.IndexFlatIP(documents.shape[1])
            index.add(documents)
            return lambda queries, m: zip(*index.search(queries, m))
    table = torch.from_numpy(documents).T
    return lambda queries, m: zip(*(part.numpy() for part in (torch.from_numpy(queries) @ table).topk(m)))


def rank(encoder: Encoder, tasks: list, batch_size: int = 32, show_progress: bool = True, k: int = 1000) -> dict[str, tuple[dict, int]]:
    """{task name: (run of the k best, documents longer than the encoder reads)}; documents that tasks share are embedded once.

    Raises:
        ValueError: an empty query, or a document longer than an encoder reads that was told nothing about it; task and id are named.
        TypeError: a query or document is no string.
    """
    for task in tasks:
        for kind, some in (("query", task.queries), ("document", task.documents)):
            for id, text in some.items():
                if not isinstance(text, str):
                    raise TypeError(f"{task.name}: {kind} {id} is {type(text).__name__}, not str")
                if kind == "query" and not text.strip():
                    raise ValueError(f"{task.name}: query {id} is empty")
    texts = sorted({text for task in tasks for text in task.documents.values()})
    place = {text: i for i, text in enumerate(texts)}
    if not encoder.truncate and not encoder.chunk:
        encoder.tokenize(texts)
        for task in tasks:
            for pid, text in task.documents.items():
                if encoder.longer[place[text]]:
                    raise ValueError(f"{task.name}: document {pid} is longer than {encoder.max_length} tokens: give the Encoder truncate=True or chunk='mean'")
    vectors, longer = encoder.encode(texts, batch_size, show_progress=show_progress), encoder.longer
    ranked = {}
    for task in tasks:
        pids, qids = list(task.documents), list(task.queries)
        columns = [place[task.documents[pid]] for pid in pids]
        queries = encoder.encode([task.queries[qid] for qid in qids], batch_size, show_progress=False)
        run = search(queries, vectors[columns], qids, pids, k + 1)
        ranked[task.name] = without_itself(run, task.qrels, k), sum(longer[i] for i in columns)
    return ranked


def without_itself(run: dict, qrels: dict, k: int) -> dict:
    """The k best of each query, without the document that has the query's own id and is not judged relevant: BEIR's rule, where queries are documents too."""
    return {qid: dict([(pid, score) for pid, score in found.items() if pid != qid or qrels.get(qid, {}).get(pid, 0) > 0][:k]) for qid, found in run.items()}


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


def longer_than(task, n: int | None, tokenizer) -> int:
    """How many documents of a task have more than n tokens."""
    return 0 if n is None else sum(tokenize(list(task.documents.values()), tokenizer, n + 2)[1])


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


MEASURES = {"ndcg@10": (metrics.ndcg, 10), "recall@100": (metrics.recall, 100), "precision@10": (metrics.precision, 10), "mrr@10": (metrics.mrr, 10),
            "map": (metrics.average_precision, 1000)}


def per_query(run: dict, qrels: dict) -> dict[str, dict[str, float]]:
    """{measure: {query: value}} of the measures in MEASURES; a judged query that the run lacks scores 0."""
    return {name: measure(run, qrels, k, per_query=True) for name, (measure, k) in MEASURES.items()}


def evaluate(task, run: dict) -> dict:
    """What the run is worth: the means of MEASURES, and of nDCG@10 the 95 % bootstrap interval over queries (low, high).

    Also: queries, documents; missing, the judged queries for which the run ranks nothing (they score 0); and, where
    scores tie so that the order among equals matters, ties: the lowest and highest nDCG@10 any order gives.
    """
    values = per_query(run, task.qrels)
    mean, low, high = metrics.interval(list(values["ndcg@10"].values()))
    worst, best = metrics.ndcg_range(run, task.qrels, k=10)
    result = {"ndcg@10": mean, "low": low, "high": high, **{name: sum(some.values()) / len(some) for name, some in values.items() if name != "ndcg@10"}}
    result = {name: round(value, 6) for name, value in result.items()}
    result |= {"queries": len(task.qrels), "documents": len(task.documents), "missing": len(metrics.missing(run, task.qrels))}
    return result | ({"ties": [round(worst, 6), round(best, 6)]} if best - worst > 1e-9 else {})


def write_run(run: dict, path: str | Path, tag: str = "lib", k: int = 1000) -> None:
    """A TREC run file: `qid Q0 pid rank score tag`, ids as they are (JSON-quoted where they hold white space).

    Scores are float32, as trec_eval reads them. A query without documents has no line.

    Raises:
        ValueError: a score that is not finite, or a tag that is no single word.
    """
    if not re.fullmatch(r"\S+", tag):
        raise ValueError(f"tag {tag!r}: one word")
    lines = []
    for qid, scores in run.items():
        for rank, pid in enumerate(metrics.ranking(scores)[:k], start=1):
            score = np.float32(scores[pid])
            if not np.isfinite(score):
                raise ValueError(f"query {qid}: the score of {pid} is {score}")
            lines.append(f"{quote(qid)} Q0 {quote(pid)} {rank} {score!s} {tag}\n")
    files.write(path, "".join(lines))


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """The run of a file written by `write_run`, or by any TREC tool; scores are rounded to float32.

    Raises:
        ValueError: a line that is no run line, or a document ranked twice; path and line are named.
    """
    run: dict = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            parts = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', line) if '"' in line else line.rstrip("\n").split(" ")
            parts = line.split() if len(parts) != 6 else parts
            try:
                if len(parts) != 6:
                    raise ValueError(f"a run line has six fields (qid Q0 pid rank score tag), got {len(parts)}")
                qid, pid, score = unquote(parts[0]), unquote(parts[2]), float(np.float32(parts[4]))
                if not np.isfinite(score):
                    raise ValueError(f"the score is {parts[4]}")
                if pid in run.setdefault(qid, {}):
                    raise ValueError(f"query {qid} ranks {pid} twice")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            run[qid][pid] = score
    return run


def quote(name: str) -> str:
    return json.dumps(name) if re.search(r'\s|^"|^$', name) else name


def unquote(name: str) -> str:
    return json.loads(name) if name.startswith('"') else name
