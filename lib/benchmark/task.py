"""What a retrieval task is: documents, queries and judgements.

The ground that sources (where tasks lie), locov1 (tasks as scored) and the
corpus (tasks made here) share.
"""

from dataclasses import dataclass, field

from lib.pipeline.errors import BUILD, CorpusError

__all__ = ["BUILD", "SPLITS", "CorpusError", "Task"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """One retrieval task.

    Attributes:
        documents: {pid: text}.
        queries: {qid: text}; empty for a folder of plain texts, as are the qrels.
        qrels: {qid: {pid: gain}}; the gain is 1 unless judgements are graded.
        evidence: {qid: (pid, start, end)}, fractions of the document's characters; empty if
            nobody knows where the answers stand.
        dropped: documents left out because their passage is null, or because they are judged
            and absent; the queries and judgements that only they answer are left out too.
        source: the name of the other source that `every` took the task from; "" if it is the
            run's own.
    """

    name: str
    split: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    evidence: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    dropped: int = 0
    source: str = ""

    @property
    def own_name(self) -> str:
        """The name that its source gives the task."""
        return self.name.removeprefix(f"{self.source}/") if self.source else self.name
