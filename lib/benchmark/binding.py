"""Binding: can an encoder tell two documents of the same words apart?

    facts(tasks, tokenizer)                     names with their summaries, from tasks
    common_words(tasks, tokenizer)              the commonest words, to stand between them
    whole_words(tokenizer)                      words of one token each, to make facts up from
    made_up(words, count)                       names and summaries of words drawn at random
    binding(facts, filler, distance, …)         a task of pairs of such documents
    accuracy(run, task)                         share of queries whose document beats its twin
    by_pair(run, task)                          the same of each document and its twin

A document binds each of K names to a summary that stands `distance` tokens after it; its twin
holds the same names, fillers and summaries, but each summary stands at another name:

    document   name_1 … summary_1   pause   name_2 … summary_2
    its twin   name_1 … summary_2   pause   name_2 … summary_1
    queries    name_1 summary_1, name_2 summary_2   (of the document)
               name_1 summary_2, name_2 summary_1   (of its twin)

Twins hold the same multiset of tokens, so BM25 and a mean of word vectors score them alike: their
accuracy is one half, whatever their words. Each document is its own queries' right one and its
twin's queries' wrong one, so a preference for some documents gains nothing either. Which summary a
name gets is drawn at random: it does not help to know the library.

The pause puts what is not bound further apart than what is. With a pause of P tokens and parts of n
and m tokens, a summary follows its own name after d tokens, the name before that after
2d + P + n + m, and the next name follows the summary after P.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lib.benchmark.task import Task
from lib.pipeline.errors import require

NAME = re.compile(r"[A-Za-z_][\w.]*[A-Za-z0-9]")
SUMMARY_WORDS = 12  # of a summary, its first
TIE = 1e-6  # difference of two scores that counts as none: mean pooling in float32 rounds


class Fact(NamedTuple):
    """A name and what is said of it."""

    name: str
    summary: str


def facts(tasks: Iterable[Task], without: Iterable[Fact] = ()) -> list[Fact]:
    """The names and summaries of the items that the tasks ask for, sorted.

    An item's name, without its module, is the first line of the evidence; its summary is the query.
    No name and no summary is there twice.

    Args:
        without: facts of other splits: their names and summaries are left out.
    """
    found = []
    for task in tasks:
        for qid, (pid, start, end) in task.evidence.items():
            text = task.documents[pid]
            span = text[round(start * len(text)) : round(end * len(text))]
            name = span.strip().partition("\n")[0]
            summary = " ".join(task.queries[qid].split()[:SUMMARY_WORDS])
            if NAME.fullmatch(name):
                found.append(Fact(name.rpartition(".")[2].strip("_"), summary))
    names = {fact.name.lower() for fact in without} | {""}
    summaries = {fact.summary.lower() for fact in without}
    kept = []
    for fact in sorted(set(found)):
        if fact.name.lower() not in names and fact.summary.lower() not in summaries:
            names.add(fact.name.lower())
            summaries.add(fact.summary.lower())
            kept.append(fact)
    return kept


def common_words(tasks: Iterable[Task], tokenizer, count: int = 200) -> list[str]:
    """The `count` commonest words of the tasks' documents that are one token each."""
    counts: Counter[str] = Counter()
    for task in tasks:
        for text in task.documents.values():
            counts.update(re.findall(r"[a-z]+", text.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))[: 4 * count]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [word for word, row in zip(words, ids) if len(row) == 1][:count]


def whole_words(tokenizer) -> list[str]:
    """The lower-case words of three letters or more that are one token each, sorted."""
    known = sorted({word for word in tokenizer.get_vocab() if re.fullmatch("[a-z]{3,}", word)})
    ids = tokenizer(known, add_special_tokens=False)["input_ids"]
    return [word for word, row in zip(known, ids) if len(row) == 1]


def made_up(
    words: list[str], count: int, seed: int = 0, of_name: int = 2, of_summary: int = 4
) -> list[Fact]:
    """Facts of words drawn at random, none twice in a fact: nothing but their order tells them.

    Raises:
        WorkbenchError: there are fewer words than a fact has.
    """
    n = of_name + of_summary
    message = f"{len(words)} words for facts of {n}: take a larger vocabulary, or shorter facts"
    require(len(words) >= n, message)
    rng = np.random.default_rng(seed)
    drawn = ([words[i] for i in rng.choice(len(words), n, replace=False)] for _ in range(count))
    return [Fact(" ".join(row[:of_name]), " ".join(row[of_name:])) for row in drawn]


def binding(
    facts: list[Fact],
    filler: list[str],
    distance: int,
    pairs: int,
    parts: int = 2,
    pause: int | None = None,
    split: str = "test",
    seed: int = 0,
) -> Task:
    """A task of `pairs` documents and their twins, `2 · pairs · parts` queries.

    Args:
        facts: of the split.
        filler: words of one token each (`common_words`).
        distance: tokens between the last one of a name and the first one of its summary.
        parts: K, the names of a document.
        pause: tokens between a summary and the next name; None: as many as `distance`.

    Returns:
        A task named `binding_<distance>`; the evidence of a query is its name, its summary and what
        stands between them.

    Raises:
        WorkbenchError: there are fewer facts than a document has parts, or no filler.
    """
    require(parts >= 2, f"a document of {parts} part has no twin: parts must be 2 or more")
    message = f"{len(facts)} facts for documents of {parts}: build the corpus from more packages"
    require(len(facts) >= parts, message)
    require(filler, "no filler: give the words that stand between a name and its summary")
    pause = distance if pause is None else pause
    rng = np.random.default_rng([seed, distance])
    documents, queries, qrels, evidence = {}, {}, {}, {}

    def words(n: int) -> str:
        return " ".join(filler[i] for i in rng.integers(len(filler), size=n))

    for pair in range(pairs):
        drawn = [facts[i] for i in rng.choice(len(facts), parts, replace=False)]
        names = [fact.name for fact in drawn]
        order = rng.permutation(parts)
        gaps, pauses = [words(distance) for _ in drawn], [words(pause) for _ in drawn]
        for side in range(2):
            pid, text = f"pair_{pair}_{side}", ""
            summaries = [drawn[i].summary for i in np.roll(order, side)]
            spans = []
            for name, gap, summary, rest in zip(names, gaps, summaries, pauses):
                bound = joined(name, gap, summary)
                spans.append((len(text), len(text) + len(bound)))
                text += joined(bound, rest) + "\n"
            documents[pid] = text = text.rstrip()
            for i, (name, summary, (start, end)) in enumerate(zip(names, summaries, spans)):
                qid = f"{pid}_{i}"
                queries[qid] = joined(name, summary)
                qrels[qid] = {pid: 1}
                evidence[qid] = pid, start / len(text), end / len(text)
    return Task(f"binding_{distance}", split, documents, queries, qrels, evidence)


def joined(*texts: str) -> str:
    return " ".join(filter(None, texts))


def twin(pid: str) -> str:
    """The id of the document that holds the same words."""
    pair, side = pid.rsplit("_", 1)
    return f"{pair}_{1 - int(side)}"


def accuracy(run: dict[str, dict[str, float]], task: Task, tie: float = TIE) -> float:
    """The share of queries whose document scores higher than its twin; a tie counts one half.

    A document that the run leaves out has score 0.
    """
    return float(by_pair(run, task, tie).mean())


def by_pair(run: dict[str, dict[str, float]], task: Task, tie: float = TIE) -> np.ndarray:
    """`accuracy` of each document and its twin, (pairs,): their queries share words, pairs none.

    An interval is one over pairs (lib/benchmark/statistics.py).
    """
    points: dict[str, list[float]] = {}
    for qid, judged in task.qrels.items():
        (pid,) = judged
        margin = run[qid].get(pid, 0.0) - run[qid].get(twin(pid), 0.0)
        point = 0.5 if abs(margin) <= tie else float(margin > 0)
        points.setdefault(pid.rpartition("_")[0], []).append(point)
    return np.array([np.mean(own) for own in points.values()])
