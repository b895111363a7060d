"""Training pairs of queries and documents, and which documents may be negatives of a query.

A document that the qrels call relevant to a query is never its negative, nor is a near-duplicate
of one (lib/training/duplicates.py). A batch is a function of (seed, step) alone.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), appendix A.3 (random negatives).
Axes:   N documents and Q queries in a batch.
"""

import functools
from collections import defaultdict

import numpy as np

from lib.model.tokens import tokenize
from lib.pipeline.errors import TrainingError, require
from lib.training.duplicates import near_duplicates, normalized


class TokenRows:
    """Token ids of texts, cut to `max_length`; a text is tokenised on first use."""

    def __init__(self, texts: list[str], tokenizer, max_length: int):
        self.texts, self.tokenizer, self.max_length = texts, tokenizer, max_length
        self.rows: list[np.ndarray | None] = [None] * len(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, indices: list[int]) -> list[np.ndarray]:
        new = [i for i in dict.fromkeys(indices) if self.rows[i] is None]
        texts = [self.texts[i] for i in new]
        for i, row in zip(new, tokenize(texts, self.tokenizer, self.max_length)[0]):
            self.rows[i] = np.asarray(row, dtype=np.int32)
        return [self.rows[i] for i in indices]


class Pairs:
    """Training pairs, grouped by document: one embedding of a document serves all its queries.

    One text under two ids is one document, and one question under two ids (white space and case
    aside) is one question. `queries_of` maps a document to its queries, `question_of` a query to
    its question; all are indices.

    Args:
        tokenizer: may be None for `check_negatives` alone.
        max_length, query_length: of a document and of a query, in tokens.

    Raises:
        TrainingError: no query has a relevant document.
    """

    def __init__(self, tasks, tokenizer, max_length: int, query_length: int = 64):
        self.pad_id = None if tokenizer is None else tokenizer.pad_token_id
        documents: dict[str, int] = {}
        questions: dict[str, int] = {}
        queries, question_of, queries_of = [], [], defaultdict(list)
        for task in tasks:
            for qid, gains in task.qrels.items():
                relevant = [task.documents[pid] for pid, gain in gains.items() if gain > 0]
                if not relevant:
                    continue
                for text in dict.fromkeys(relevant):
                    queries_of[documents.setdefault(text, len(documents))].append(len(queries))
                query = task.queries[qid]
                queries.append(query)
                question_of.append(questions.setdefault(normalized(query), len(questions)))
        names = ", ".join(task.name for task in tasks) or "no task"
        require(queries, f"no training pairs in {names}", TrainingError)
        self.documents = TokenRows(list(documents), tokenizer, max_length)
        self.queries = TokenRows(queries, tokenizer, query_length)
        self.queries_of = dict(queries_of)
        self.question_of = np.array(question_of, dtype=np.int32)

    def batch(
        self, step: int, seed: int, documents: int, queries_per_document: int | None
    ) -> tuple[list[int], list[int], list[int]]:
        """(documents, queries, target) of a step; documents[target[i]] answers queries[i].

        Every epoch sees every document once, whatever the batch size. At most
        `queries_per_document` queries (None: all) are drawn anew in each epoch.
        """
        chosen, queries, target = [], [], []
        keys = sorted(self.queries_of)
        for position in range(step * documents, (step + 1) * documents):
            epoch, index = divmod(position, len(keys))
            document = keys[permutation(len(keys), seed, epoch)[index]]
            if document in chosen:
                continue  # the batch lies in two epochs and both have it
            rng = np.random.default_rng([seed, epoch, document])
            drawn = rng.permutation(self.queries_of[document])[:queries_per_document]
            target += [len(chosen)] * len(drawn)
            queries += drawn.tolist()
            chosen.append(document)
        return chosen, queries, target

    # -------------------------------------------------------------- negatives

    @functools.cached_property
    def excluded(self) -> dict[int, np.ndarray]:
        """Question -> documents that are never its negatives, ascending.

        These are the relevant documents of all its ids, and their near-duplicates. A question that
        excludes one document only has no entry. The first use takes seconds.
        """
        near = near_duplicates(self.documents.texts)
        near = np.concatenate([near, near[:, ::-1]])
        near = near[np.argsort(near[:, 0], kind="stable")]
        edges = np.searchsorted(near[:, 0], np.arange(len(self.documents) + 1))
        relevant = defaultdict(list)
        for document, queries in self.queries_of.items():
            for question in dict.fromkeys(self.question_of[queries].tolist()):
                relevant[question].append(document)

        @functools.cache  # questions with the same answers share an array
        def with_duplicates(documents: tuple[int, ...]) -> np.ndarray:
            copies = [near[edges[document] : edges[document + 1], 1] for document in documents]
            return np.unique(np.concatenate([documents, *copies])).astype(np.int32)

        excluded = {q: with_duplicates(tuple(documents)) for q, documents in relevant.items()}
        return {q: documents for q, documents in excluded.items() if len(documents) > 1}

    def check_negatives(self, loss: str) -> None:
        """Raise a TrainingError if the loss needs negatives and no query has one."""
        if loss not in ("mnrl", "opl"):
            return
        n, questions = len(self.documents), int(self.question_of.max()) + 1
        many = f"each of {n} documents answers every query or is nearly one that does"
        require(
            n > 1 and (len(self.excluded) < questions or min(map(len, self.excluded.values())) < n),
            f"loss {loss!r} needs documents that do not answer a query, and here are none: "
            f"{many if n > 1 else 'there is 1 document'}; give more documents, or set loss: "
            "prototype or none",
            TrainingError,
        )

    def positives(self, documents: list[int], queries: list[int], target: list[int]) -> np.ndarray:
        """Which documents of a batch are not negatives of its queries, bool (Q, N)."""
        positive = np.arange(len(documents)) == np.array(target)[:, None]
        for row, question in zip(positive, self.question_of[queries].tolist()):
            if question in self.excluded:
                row |= np.isin(documents, self.excluded[question])
        return positive

    def in_batch_negatives(self, batch: tuple, count: int, rng) -> list[tuple[int, int]]:
        """(row of a query, row of a document): `count` negatives for each query that has any."""
        documents, _, target = batch
        return [
            (row, draw_negative(target[row], np.flatnonzero(positive), len(documents), rng))
            for row, positive in enumerate(self.positives(*batch))
            if not positive.all()
            for _ in range(count)
        ]

    def random_negative(self, cycle: int, seed: int, step: int) -> tuple[int, int]:
        """(document, query): the query of the cycle and a document drawn from all its negatives.

        A query without any is replaced by the next one of its document, or of the next documents.
        """
        for later in range(cycle, cycle + 2 * len(self.queries_of)):  # contains a whole epoch
            (answer,), queries, _ = self.batch(later, seed, 1, None)
            for query in queries:
                excluded = self.excluded.get(int(self.question_of[query]), [answer])
                if len(excluded) < len(self.documents):
                    rng = np.random.default_rng([seed, step, 1])
                    return draw_negative(answer, excluded, len(self.documents), rng), query


def draw_negative(answer: int, excluded, n: int, rng: np.random.Generator) -> int:
    """One of n documents that are not excluded, uniformly; the answer is always excluded.

    The draw counts answer + 1, answer + 2, … (mod n) without the excluded ones:
    (answer + 1 + rng.integers(n - 1)) % n if the answer alone is excluded.
    """
    steps = np.sort((np.asarray(excluded) - answer - 1) % n)  # from answer + 1 to each of them
    draw = rng.integers(n - len(steps))
    skipped = np.searchsorted(steps - np.arange(len(steps)), draw, side="right")
    return int((answer + 1 + draw + skipped) % n)


@functools.lru_cache(maxsize=1)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the documents in an epoch."""
    return np.random.default_rng([seed, epoch, n]).permutation(n)
