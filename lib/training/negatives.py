"""Hard negatives: documents that look like an answer and are none.

    mined(model, pairs, settings)    for each query, the best ranked documents of its task

Relevant documents and their near-duplicates are never among them (`Pairs.excluded`).

Source: Karpukhin et al. 2020 (arXiv 2004.04906) for BM25; Xiong et al. 2021 (arXiv 2007.00808) for
        the model itself. The authors of M2-BERT draw at random (HazyResearch/m2, issue 27).
"""

import numpy as np
from torch import nn

from lib.benchmark import metrics
from lib.benchmark.bm25 import bm25
from lib.benchmark.encoder import Encoder
from lib.benchmark.search import search
from lib.pipeline.settings import Finetune
from lib.training.pairs import Pairs

Hard = dict[int, np.ndarray]  # query -> documents, the best first


def mined(model: nn.Module, pairs: Pairs, settings: Finetune, show_progress: bool = True) -> Hard:
    """The `hard_depth` best ranked negatives of each query, among the documents of its task.

        none     {}: negatives are drawn from the whole task
        bm25     by the words of the whole texts
        model    by the encoder as it is now, reading as much as in training

    A query for which nothing is found has no entry. A function of texts, settings and weights.
    """
    s = settings
    if s.hard_negatives == "none":
        return {}
    answer_of = {query: d for d, queries in pairs.queries_of.items() for query in queries}
    k = s.hard_depth + max(map(len, pairs.excluded.values()), default=1)
    rank = by_words(pairs) if s.hard_negatives == "bm25" else by_model(model, pairs, show_progress)
    hard = {}
    for task, members in enumerate(pairs.in_task):
        queries = np.flatnonzero(pairs.task_of == task).tolist()
        run = rank(queries, np.flatnonzero(members).tolist(), k) if queries else {}
        for query, scores in run.items():
            excluded = pairs.excluded.get(int(pairs.question_of[query]), [answer_of[query]])
            best = np.array(metrics.ranking(scores), dtype=np.int64)
            best = best[~np.isin(best, excluded)][: s.hard_depth]
            if len(best):
                hard[query] = best
    return hard


def by_words(pairs: Pairs):
    """rank(queries, documents, k): the run of BM25."""

    def rank(queries: list[int], documents: list[int], k: int) -> dict[int, dict[int, float]]:
        texts = {document: pairs.documents.texts[document] for document in documents}
        return bm25(texts, {query: pairs.queries.texts[query] for query in queries}, k=k)

    return rank


def by_model(model: nn.Module, pairs: Pairs, show_progress: bool):
    """rank(queries, documents, k): the run of the model, which embeds each text once."""
    tokenizer = pairs.documents.tokenizer
    encoder = Encoder(model, tokenizer, pairs.documents.max_length, truncate=True)
    d = encoder.encode(pairs.documents.texts, show_progress=show_progress)
    reader = encoder.limited(pairs.queries.max_length)
    q = reader.encode(pairs.queries.texts, show_progress=show_progress)

    def rank(queries: list[int], documents: list[int], k: int) -> dict[int, dict[int, float]]:
        return search(q[queries], d[documents], queries, documents, k)

    return rank
