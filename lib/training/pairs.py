"""Training pairs of queries and documents, and which documents may be negatives of a query.

A document that the qrels call relevant to a query is never its negative, nor is a near-duplicate
of one (lib/training/duplicates.py). A batch is a function of (seed, step) alone.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), appendix A.3 (random negatives), and the
        authors' code (HazyResearch/m2): of the query's own task, distinct.
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
    aside) is one question. All of these are indices; documents that answer nothing come last.

    Attributes:
        queries_of: document -> its queries; a document that answers none has no entry.
        question_of: query -> its question.
        task_of: query -> its task; in_task: bool (tasks, documents).

    Args:
        tokenizer: may be None for `check_negatives` alone.
        max_length, query_length: of a document and of a query, in tokens.
        texts: more documents, of no task and without queries (`unpaired`).

    Raises:
        TrainingError: no query has a relevant document.
    """

    def __init__(self, tasks, tokenizer, max_length: int, query_length: int = 64, texts=()):
        self.pad_id = None if tokenizer is None else tokenizer.pad_token_id
        documents: dict[str, int] = {}
        questions: dict[str, int] = {}
        queries, question_of, task_of, queries_of = [], [], [], defaultdict(list)
        for number, task in enumerate(tasks):
            for qid, gains in task.qrels.items():
                relevant = [task.documents[pid] for pid, gain in gains.items() if gain > 0]
                if not relevant:
                    continue
                for text in dict.fromkeys(relevant):
                    queries_of[documents.setdefault(text, len(documents))].append(len(queries))
                query = task.queries[qid]
                queries.append(query)
                task_of.append(number)
                question_of.append(questions.setdefault(normalized(query), len(questions)))
        names = ", ".join(task.name for task in tasks) or "no task"
        require(queries, f"no training pairs in {names}", TrainingError)
        members = [
            [documents.setdefault(text, len(documents)) for text in task.documents.values()]
            for task in tasks
        ]
        self.without_queries = [documents.setdefault(text, len(documents)) for text in texts]
        self.in_task = np.zeros((len(members), len(documents)), dtype=bool)
        for row, indices in zip(self.in_task, members):
            row[indices] = True
        self.documents = TokenRows(list(documents), tokenizer, max_length)
        self.queries = TokenRows(queries, tokenizer, query_length)
        self.queries_of = dict(queries_of)
        self.question_of = np.array(question_of, dtype=np.int32)
        self.task_of = np.array(task_of, dtype=np.int32)

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
            drawn = shuffled(self.queries_of[document], seed, epoch, document)
            drawn = drawn[:queries_per_document]
            target += [len(chosen)] * len(drawn)
            queries += drawn
            chosen.append(document)
        return chosen, queries, target

    def example(
        self, step: int, seed: int, queries_per_document: int | None, positives: int, negatives: int
    ) -> tuple[int, int, int, int]:
        """(epoch, document, query, kind) of a step of one pair.

        An epoch is a random order of the kinds 0 … positives + negatives - 1 of all pairs: of a
        document and each of its queries, or `queries_per_document` of them, drawn anew in each
        epoch. If there are negatives, a query that has none is left out.
        """
        queries_of, kinds = self.queries_of, positives + negatives
        if negatives:
            queries_of = self.with_negatives
        documents = list(queries_of)
        ends = np.cumsum([len(queries[:queries_per_document]) for queries in queries_of.values()])
        n = int(ends[-1]) * kinds
        epoch, index = divmod(step, n)
        pair, kind = divmod(int(permutation(n, seed, epoch)[index]), kinds)
        i = int(np.searchsorted(ends, pair, side="right"))
        drawn = shuffled(queries_of[documents[i]], seed, epoch, documents[i])
        return epoch, documents[i], drawn[:queries_per_document][pair - ends[i]], kind

    def unpaired(self, step: int, seed: int, count: int) -> list[int]:
        """`count` of the texts without queries; every epoch has each of them once."""
        texts, chosen = self.without_queries, []
        message = f"pretraining_texts: {count}, but there is no text without queries: set it to 0"
        require(texts or not count, message, TrainingError)
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, len(texts))
            chosen.append(texts[permutation(len(texts), seed, epoch)[index]])
        return list(dict.fromkeys(chosen))

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

    @functools.cached_property
    def with_negatives(self) -> dict[int, list[int]]:
        """`queries_of` without queries that every document answers."""
        n, excluded = len(self.documents), self.excluded
        kept = {
            document: [q for q in queries if len(excluded.get(int(self.question_of[q]), [0])) < n]
            for document, queries in self.queries_of.items()
        }
        return {document: queries for document, queries in kept.items() if queries}

    def check_negatives(self, loss: str, of_batch: bool = False) -> None:
        """Raise a TrainingError if no query has a negative.

        Args:
            of_batch: negatives are documents of the batch, so they answer another query.
        """
        n, questions = len(self.queries_of if of_batch else self.documents), self.question_of.max()
        excluded = [np.searchsorted(documents, n) for documents in self.excluded.values()]
        many = f"each of {n} documents answers every query or is nearly one that does"
        require(
            n > 1 and (len(excluded) <= questions or min(excluded) < n),
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
        """(row of a query, row of a document): up to `count` distinct negatives of each query.

        They are of the query's task, or of any task if the batch has none of its own.
        """
        if not count:
            return []
        documents, queries, _ = batch
        negative = ~self.positives(*batch)
        near = negative & self.in_task[np.ix_(self.task_of[queries], documents)]
        return [
            (row, int(document))
            for row, some in enumerate(np.where(near.any(axis=1, keepdims=True), near, negative))
            for document in draw(np.flatnonzero(some), count, rng)
        ]

    def negatives(
        self, query: int, answer: int, count: int, rng, hard: dict[int, np.ndarray]
    ) -> list[int]:
        """Up to `count` distinct documents that do not answer the query, drawn uniformly.

        They are of its hard negatives; if it has none, of its task; else of any task.
        """
        excluded = self.excluded.get(int(self.question_of[query]), [answer])
        if query in hard:
            return draw(hard[query], count, rng)
        free = np.ones(len(self.documents), dtype=bool)
        free[excluded] = False
        near = free & self.in_task[self.task_of[query]]
        return draw(np.flatnonzero(near if near.any() else free), count, rng)

    def extended(
        self, batch: tuple, count: int, rng, hard: dict[int, np.ndarray]
    ) -> tuple[tuple, list[tuple[int, int]]]:
        """The batch and, after its own documents, up to `count` negatives of each query.

        Returns:
            The larger batch, and (row of a query, row of a document) of each negative.
        """
        documents, queries, target = batch
        row_of = {document: row for row, document in enumerate(documents)}
        negatives = [
            (row, row_of.setdefault(document, len(row_of)))
            for row, query in enumerate(queries)
            for document in self.negatives(query, documents[target[row]], count, rng, hard)
        ]
        return (list(row_of), queries, target), negatives


def draw(candidates: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the candidates (all, if there are fewer), uniformly and without repetition."""
    return rng.choice(candidates, min(count, len(candidates)), replace=False).tolist()


def shuffled(queries: list[int], seed: int, epoch: int, document: int) -> list[int]:
    """The order of a document's queries in an epoch."""
    return np.random.default_rng([seed, epoch, document]).permutation(queries).tolist()


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the documents in an epoch."""
    return np.random.default_rng([seed, epoch, n]).permutation(n)
