"""Needles in haystacks: does it matter where in a document the answer stands?

    haystacks(tasks, tokenizer, …)      {place: task}: the same needles and the same hay, the
                                        needle on another place each time

A document is 40 passages, and one of them answers its query: the one on place p, counted from 0.
The other 39 were drawn once for each document, so that from one p to the next nothing changes but
the order. An encoder that reads all of a document and uses it evenly finds as much at every p.

Source: the paper's Table 15, which does this with passages of Natural Questions. Ours are the
passages in which the tasks' answers stand.
"""

import numpy as np

from lib.benchmark.bm25 import first_words
from lib.benchmark.task import Task

PLACES = (0, 5, 10, 15, 16, 17, 18, 20, 25, 30, 35, 39)  # the paper's
PASSAGES = 40


def haystacks(
    tasks: list[Task], tokenizer, passage_tokens: int, needles: int, seed: int = 0
) -> dict[int, Task]:
    """For each place a task of `needles` queries and as many documents.

    Args:
        tasks: whose queries with known evidence are asked, those of several tasks alike.
        passage_tokens: of each passage, so many tokens are taken, its first.

    Returns:
        Tasks named `needle_<place>`; none if the tasks know too few passages: one for each needle
        and 39 others.
    """
    query_of: dict[str, str] = {}
    for task in sorted(tasks, key=lambda task: task.name):
        for qid, (pid, start, end) in sorted(task.evidence.items()):
            text = task.documents[pid]
            span = text[round(start * len(text)) : round(end * len(text))]
            passage = " ".join(first_words(span, passage_tokens, tokenizer).split())
            if passage:
                query_of.setdefault(passage, task.queries[qid])
    order = np.random.default_rng(seed).permutation(len(query_of))
    texts = [list(query_of)[i] for i in order]
    asked: dict[str, str] = {}  # one passage a query
    for text in texts:
        if len(asked) < needles and query_of[text] not in asked.values():
            asked[text] = query_of[text]
    hay = [text for text in texts if text not in asked]
    if not needles or len(asked) < needles or len(hay) < PASSAGES - 1:
        return {}
    draws = [
        np.random.default_rng([seed, i]).choice(len(hay), PASSAGES - 1, replace=False)
        for i in range(needles)
    ]
    queries = {f"needle_{i}": query for i, query in enumerate(asked.values())}
    qrels = {f"needle_{i}": {f"hay_{i}": 1} for i in range(needles)}
    by_place = {}
    for place in PLACES:
        documents = {}
        for i, (needle, draw) in enumerate(zip(asked, draws)):
            passages = [hay[j] for j in draw]
            documents[f"hay_{i}"] = "\n".join([*passages[:place], needle, *passages[place:]])
        by_place[place] = Task(f"needle_{place}", "test", documents, queries, qrels)
    return by_place
