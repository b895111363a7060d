"""Search: texts to vectors, vectors to rankings, rankings to numbers.

    Encoder(model, tokenizer).encode(texts)    one vector a text, whatever the batch
    search(q, d, …)                            exact cosine search, one tie rule
    rank(encoder, tasks)                       both, for several tasks
    bm25(documents, queries)                   the yardstick that reads words
    write_run, read_run                        TREC run files, recomputable by trec_eval
    evaluate(task, run)                        nDCG@10 with its interval

A `run` is run[query_id][doc_id] = score; ties are broken by document id,
descending, as trec_eval does.
Axes: n texts, N documents, Q queries, D width.
"""
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib import metrics

CHARACTERS_PER_TOKEN = 16       # first guess of how much text can matter; doubled where it proves too little
BATCH_TOKENS = 16_384           # one forward pass at most, padding included


class Encoder:
    """Embeds texts with a model and its tokenizer, reading each text's first `max_length` tokens.

    Attributes:
        truncated: how many texts of the last `encode` were longer than that.
    """

    def __init__(self, model, tokenizer, max_length: int | None = None):
        limit = model.config.max_position_embeddings
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length = min(max_length or limit, limit)
        self.truncated = 0

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int = 32, normalize: bool = True, show_progress: bool = True) -> np.ndarray:
        """Embeddings in the order of `texts`, float32, (n, D); unit norm if `normalize`.

        Texts are sorted by length, so a short one never waits for a long
        neighbour; at most `batch_size` texts and 16,384 tokens go at a time.

        Raises:
            TypeError: an element is no string; its index is named.
        """
        width = self.model.config.hidden_size
        ids = self.tokenize(texts)
        vectors = np.zeros((len(texts), width), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: (-len(ids[i]), i))
        device = next(self.model.parameters()).device
        progress = bar(total=len(texts), desc="encode", show=show_progress)
        while order:
            longest = len(ids[order[0]])
            size = max(1, min(batch_size, BATCH_TOKENS // longest))
            batch, order = order[:size], order[size:]
            input_ids, mask = pad([ids[i] for i in batch], self.tokenizer.pad_token_id)
            pooled = self.model(input_ids.to(device), mask.to(device)).pooler_output.float()
            vectors[batch] = (F.normalize(pooled, dim=-1) if normalize else pooled).cpu().numpy()
            progress.update(len(batch))
        progress.close()
        return vectors

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids, [CLS] … [SEP], cut to `max_length`; sets `truncated`."""
        ids, cut = tokenize(texts, self.tokenizer, self.max_length)
        self.truncated = int(sum(cut))
        return ids


def tokenize(texts: list[str], tokenizer, max_length: int) -> tuple[list[list[int]], list[bool]]:
    """Ids of each text's first `max_length` tokens, specials included, and whether anything was left out.

    Only as many characters are tokenised as can matter: a million words cost
    no more than the first few thousand.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {type(text).__name__}, not str")
    # A lone surrogate is not encodable text; the tokenizer would refuse the whole batch.
    texts = [text.encode("utf-8", "replace").decode("utf-8") if re.search("[\ud800-\udfff]", text) else text for text in texts]
    ids: list = [None] * len(texts)
    cut = [False] * len(texts)
    pending, characters = list(range(len(texts))), CHARACTERS_PER_TOKEN * max_length
    while pending:
        again = []
        for start in range(0, len(pending), 512):
            some = pending[start : start + 512]
            # One token more than fits tells a full text from a truncated one.
            encoded = tokenizer([texts[i][:characters] for i in some], truncation=True, max_length=max_length + 1,
                                padding=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
            for i, found in zip(some, encoded):
                if len(found) <= max_length and len(texts[i]) > characters:
                    again.append(i)
                    continue
                cut[i] = len(found) > max_length
                ids[i] = found[: max_length - 1] + [found[-1]] if cut[i] and max_length > 1 else found[:max_length]
        pending, characters = again, characters * 4
    return ids, cut


def pad(ids: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (n, longest)."""
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in ids])
    return input_ids, (torch.arange(width) < lengths[:, None]).long()


def bar(total: int, desc: str, show: bool = True):
    """A progress bar on stderr, where executed notebooks do not keep it."""
    from tqdm import tqdm
    return tqdm(total=total, desc=desc, disable=None if show else True, leave=False, mininterval=1)


def search(queries: np.ndarray, documents: np.ndarray, qids: list[str], pids: list[str], k: int = 1000) -> dict[str, dict[str, float]]:
    """Exact inner-product search: the run of the k best documents of each query.

    Args:
        queries: (Q, D), documents: (N, D); normalised, the score is the cosine.

    Raises:
        ValueError: ids and vectors disagree in number, or a vector is not finite.
    """
    if len(queries) != len(qids) or len(documents) != len(pids):
        raise ValueError(f"one id per vector: got {len(qids)} ids for {len(queries)} queries, {len(pids)} for {len(documents)} documents")
    for name, ids, vectors in (("query", qids, queries), ("document", pids, documents)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(f"the vector of {name} {ids[bad[0]]} is not finite ({len(bad)} such): the model or its input is broken")
    # Columns in descending order of id and a stable sort: ties come out by trec_eval's rule.
    columns = sorted(range(len(pids)), key=pids.__getitem__, reverse=True)
    ordered = torch.from_numpy(np.ascontiguousarray(documents[columns]))
    k, run = min(k, len(pids)), {}
    block = max(1, 32_000_000 // max(1, len(pids)))
    for start in range(0, len(qids), block):
        scores = torch.from_numpy(np.ascontiguousarray(queries[start : start + block])) @ ordered.T        # (block, N)
        best, where = scores.sort(dim=1, descending=True, stable=True)
        for qid, values, places in zip(qids[start : start + block], best[:, :k].tolist(), where[:, :k].tolist()):
            run[qid] = {pids[columns[place]]: value for value, place in zip(values, places)}
    return run


def rank(encoder: Encoder, tasks: list, batch_size: int = 32, show_progress: bool = True) -> dict[str, tuple[dict, int]]:
    """{task name: (run, documents longer than the encoder reads)}; documents that tasks share are embedded once."""
    texts = sorted({text for task in tasks for text in task.documents.values()})
    place = {text: i for i, text in enumerate(texts)}
    long = [cut for start in range(0, len(texts), 512) for cut in tokenize(texts[start : start + 512], encoder.tokenizer, encoder.max_length)[1]]
    vectors = encoder.encode(texts, batch_size, show_progress=show_progress)
    ranked = {}
    for task in tasks:
        pids, qids = list(task.documents), list(task.queries)
        columns = [place[task.documents[pid]] for pid in pids]
        queries = encoder.encode([task.queries[qid] for qid in qids], batch_size, show_progress=False)
        ranked[task.name] = search(queries, vectors[columns], qids, pids), sum(long[i] for i in columns)
    return ranked


# The most frequent English function words; other languages lose nothing but these.
STOP_WORDS = frozenset("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with".split())
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return [word for word in WORD.findall(text.lower()) if word not in STOP_WORDS]


def first_words(text: str, n: int, tokenizer=None) -> str:
    """The text up to its n-th token: BM25's own words, or the pieces of a given tokenizer."""
    if tokenizer is None:
        end = None
        for count, match in enumerate(WORD.finditer(text), start=1):
            end = match.end()
            if count == n:
                break
        return text[:end] if end is not None else text
    characters = CHARACTERS_PER_TOKEN * n
    while True:
        offsets = tokenizer(text[:characters], truncation=True, max_length=n, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) == n or len(text) <= characters:
            return text[: offsets[-1][1]] if offsets else text[:0]
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
        ValueError: no documents, or an empty query (named).
    """
    import bm25s
    if not documents:
        raise ValueError("no documents to search")
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


def evaluate(task, run: dict, k: int = 10) -> dict:
    """{"ndcg@k", "low", "high", "queries", "documents"}: the mean over queries and its 95 % bootstrap interval."""
    values = metrics.ndcg(run, task.qrels, k=k, per_query=True)
    mean, low, high = metrics.interval(list(values.values()))
    return {f"ndcg@{k}": round(mean, 6), "low": round(low, 6), "high": round(high, 6),
            "queries": len(values), "documents": len(task.documents)}


def write_run(run: dict, path: str | Path, tag: str = "lib", k: int = 1000) -> None:
    """A TREC run file: `qid Q0 pid rank score tag`, ids as they are (JSON-quoted where they hold white space)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for qid, scores in run.items():
        for rank, pid in enumerate(metrics.ranking(scores)[:k], start=1):
            lines.append(f"{quote(qid)} Q0 {quote(pid)} {rank} {np.float32(scores[pid])!s} {tag}\n")
    write_atomic(path, "".join(lines))


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """The run of a file written by `write_run`, or by any TREC tool."""
    run: dict = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            parts = line.split(" ") if '"' not in line else re.findall(r'"(?:[^"\\]|\\.)*"|\S+', line)
            parts = line.split() if len(parts) != 6 else parts
            if len(parts) != 6:
                raise ValueError(f"{path}:{number}: a run line has six fields (qid Q0 pid rank score tag), got {len(parts)}")
            run.setdefault(unquote(parts[0]), {})[unquote(parts[2])] = float(parts[4])
    return run


def quote(name: str) -> str:
    return json.dumps(name) if re.search(r'\s|^"|^$', name) else name


def unquote(name: str) -> str:
    return json.loads(name) if name.startswith('"') else name


def write_atomic(path: Path, text: str) -> None:
    """The whole text under its name, or nothing."""
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
