"""What a student is trained to have: its teacher's embeddings of the same texts.

    Targets(teacher, pairs, settings, student)    targets(documents, queries), of `pairs`
    principal(vectors, width)                     the linear map that keeps cosines best
    rotation(targets, embeddings)                 the rotation of targets towards embeddings
    drawn(pairs, settings, step)                  the texts of a step

A text is cut where the student's reading ends, and the teacher reads the cut text in its own way: a
retriever or a baseline its first tokens (the paper's prototype loss: 128 of them), a baseline with
`chunk: mean` all of it, in windows, whose mean unit vector is the target. The student reads it in
one pass. Every text of a row's training is embedded before the first step.

What counts are the cosines between texts. So a baseline's vectors x, of another width and in axes
of their own, become x W R: W keeps these cosines as well as D dimensions can, and R, which changes
none of them, turns the targets to where the student is before training. A student that starts from
its teacher's word vectors then begins near them, and learns nothing twice.

Axes: N texts, D0 width of the teacher, D of the student.
"""

import math

import numpy as np
import torch
from torch import Tensor

from lib.benchmark.bm25 import first_words
from lib.benchmark.encoder import Encoder, unit
from lib.pipeline.settings import Finetune
from lib.training.pairs import Pairs, TokenRows

SAMPLE = 1_000  # documents that the rotation is computed from


def budget(settings: Finetune) -> int:
    """The number of documents that fine-tuning embeds, without explicit and hard negatives."""
    return round(settings.share * settings.documents_seen)


def steps(settings: Finetune) -> int:
    """The number of steps of fine-tuning."""
    return math.ceil(budget(settings) / settings.documents)


def drawn(pairs: Pairs, s: Finetune, step: int) -> tuple[tuple, list[int]]:
    """The batch of a step of distilling, and its texts without queries."""
    batch = pairs.batch(step, s.seed, s.documents, s.queries_per_document or None)
    return batch, pairs.unpaired(step, s.seed, s.pretraining_texts)


class Targets:
    """The teacher's embeddings of the texts that a row's training draws.

    Attributes:
        map: W R, (D0, D); None: a retriever of the student's width gives the targets as they are.

    Args:
        teacher: an encoder, as lib/benchmark/teachers.py makes it.
        student: the encoder before training, which reads as much as in training.

    Raises:
        TrainingError: `pretraining_texts` of a corpus that has none.
    """

    def __init__(
        self, teacher, pairs: Pairs, settings: Finetune, student: Encoder, show_progress=True
    ):
        self.teacher, self.pairs, self.show_progress = teacher, pairs, show_progress
        self.map = None
        chosen = [drawn(pairs, settings, step) for step in range(steps(settings))]
        documents = sorted({i for (d, _, _), texts in chosen for i in [*d, *texts]})
        queries = sorted({i for (_, q, _), _ in chosen for i in q})
        vectors = self.of_documents(cut(pairs.documents, documents))
        of_queries = self.of_queries(cut(pairs.queries, queries))
        width = student.model.config.hidden_size
        if not isinstance(teacher, Encoder) or vectors.shape[1] != width:
            W = principal(np.concatenate([vectors, of_queries]), width)
            texts = [pairs.documents.texts[i] for i in documents[:SAMPLE]]
            embeddings, _ = student.encode_documents(texts, show_progress=show_progress)
            self.map = W @ rotation(vectors[:SAMPLE] @ W, embeddings)
            vectors, of_queries = vectors @ self.map, of_queries @ self.map
        self.documents = dict(zip(documents, torch.from_numpy(vectors)))
        self.queries = dict(zip(queries, torch.from_numpy(of_queries)))

    def __call__(self, documents: list[int], queries: list[int]) -> tuple[Tensor, Tensor]:
        """The targets of a step's documents (N, D) and queries (Q, D)."""
        return (
            torch.stack([self.documents[i] for i in documents]),
            torch.stack([self.queries[i] for i in queries]),
        )

    def of_documents(self, texts: list[str]) -> np.ndarray:
        """Targets of any documents, in the student's width once `map` is known, (N, D)."""
        vectors, owner = self.teacher.encode_documents(texts, show_progress=self.show_progress)
        assert len(owner) == len(texts), "one vector for each text: chunk is not best"
        return vectors if self.map is None else vectors @ self.map

    def of_queries(self, texts: list[str]) -> np.ndarray:
        vectors = self.teacher.encode_queries(texts, show_progress=self.show_progress)
        return vectors if self.map is None else vectors @ self.map

    def cosine(self, student: Encoder, texts: list[str]) -> np.ndarray:
        """The cosine of documents' embeddings by a student (`Encoder`) with their targets, (N,)."""
        read = [first_words(text, student.max_length - 2, student.tokenizer) for text in texts]
        targets = unit(self.of_documents(read))
        own, _ = student.encode_documents(texts, show_progress=self.show_progress)
        return (own * targets).sum(axis=1)


def cut(rows: TokenRows, indices: list[int]) -> list[str]:
    """The part of each text that the student reads: the text up to its last token."""
    room = rows.max_length - 2  # beside [CLS] and [SEP]
    return [first_words(rows.texts[i], room, rows.tokenizer) for i in indices]


def principal(vectors: np.ndarray, width: int) -> np.ndarray:
    """W (D0, D), for targets x W of unit vectors x (N, D0).

        W = the D eigenvectors of Xᵀ X with the largest eigenvalues

    No map to D dimensions leaves a smaller part of the inner products X Xᵀ (Eckart and Young 1936),
    which are cosines here. The mean is not taken off: it is part of every cosine. A wider student
    (D > D0) has zeros in the dimensions that its teacher lacks.
    """
    X = vectors.astype(np.float64)
    _, axes = np.linalg.eigh(X.T @ X)
    W = axes[:, ::-1][:, :width]
    largest = np.abs(W).argmax(axis=0)
    W = W * np.sign(
        W[largest, np.arange(W.shape[1])]
    )  # a column's sign is free: its largest is > 0
    return np.pad(W, ((0, 0), (0, width - W.shape[1]))).astype(np.float32)


def rotation(targets: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """R (D, D), orthogonal, with the largest Σ_n <t_n R, e_n> (orthogonal Procrustes problem).

        R = U Vᵀ,  U S Vᵀ = Tᵀ E  (singular value decomposition)

    Args:
        targets, embeddings: of the same texts, (N, D).

    Source: Schönemann 1966 (Psychometrika 31).
    """
    U, _, Vt = np.linalg.svd(targets.astype(np.float64).T @ embeddings)
    return (U @ Vt).astype(np.float32)
