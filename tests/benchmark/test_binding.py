"""Two documents of the same words: only what is bound to what tells them apart."""

from collections import Counter

import numpy as np
import pytest
import torch

from lib.benchmark import binding, search
from lib.benchmark.binding import Fact
from lib.benchmark.task import Task
from lib.pipeline.errors import WorkbenchError

FILLER = ["the", "by"]
FACTS = [
    Fact(name, summary)
    for name, summary in zip(
        ("fox", "hen_s", "owl", "unbelievable", "red_fox"),
        ("Runs by night.", "sleeps the day", "red green", "blue", "a fox runs by the hen"),
    )
]


def tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("distance, parts, pause", [(0, 2, None), (8, 2, 3), (16, 3, None)])
def test_twins_hold_the_same_tokens_and_bind_them_otherwise(tokenizer, distance, parts, pause):
    task = binding.binding(FACTS, FILLER, distance, pairs=6, parts=parts, pause=pause)
    assert len(task.documents) == 12 and len(task.queries) == 12 * parts
    for pid, text in task.documents.items():
        twin = task.documents[binding.twin(pid)]
        assert text != twin
        assert Counter(tokens(tokenizer, text)) == Counter(tokens(tokenizer, twin))
        own, other = (
            {task.queries[qid] for qid, judged in task.qrels.items() if id in judged}
            for id in (pid, binding.twin(pid))
        )
        assert len(own) == parts and not own & other


@pytest.mark.parametrize("distance", [0, 1, 8, 300])
def test_bound_parts_stand_exactly_so_many_tokens_apart(tokenizer, distance):
    task = binding.binding(FACTS, FILLER, distance, pairs=5)
    facts = {(fact.name, other.summary) for fact in FACTS for other in FACTS}
    for qid, (pid, start, end) in task.evidence.items():
        text = task.documents[pid]
        span = text[round(start * len(text)) : round(end * len(text))]
        name = span.partition(" ")[0]
        summary = task.queries[qid].removeprefix(name + " ")
        assert (name, summary) in facts and span.endswith(summary)
        between = len(tokens(tokenizer, span)) - len(tokens(tokenizer, f"{name} {summary}"))
        assert between == distance and task.qrels[qid] == {pid: 1}


def test_parts_that_are_not_bound_stand_further_apart(tokenizer):
    task = binding.binding(FACTS, FILLER, 20, pairs=8)
    for pid, text in task.documents.items():
        first, second = text.split("\n")
        bound, name = first.removesuffix(" by").removesuffix(" the"), second.split()[0]
        assert len(tokens(tokenizer, first)) >= 20 + 20 and bound and name
        spans = sorted(span[1:] for span in task.evidence.values() if span[0] == pid)
        pause = text[round(spans[0][1] * len(text)) : round(spans[1][0] * len(text))]
        assert len(tokens(tokenizer, pause)) == 20


def test_counting_words_is_at_chance_whatever_they_weigh(tokenizer):
    task = binding.binding(FACTS, FILLER, 8, pairs=10, parts=3)
    ((run, _),) = search.rank(search.Bm25(), [task]).values()
    assert binding.accuracy(run, task) == 0.5
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(len(tokenizer), 16), dim=-1)

    def bag(text):
        return torch.nn.functional.normalize(vectors[tokens(tokenizer, text)].mean(0), dim=0)

    documents = {pid: bag(text) for pid, text in task.documents.items()}
    run = {
        qid: {pid: float(bag(query) @ d) for pid, d in documents.items()}
        for qid, query in task.queries.items()
    }
    assert binding.accuracy(run, task) == 0.5


def test_a_reader_of_bindings_is_right_and_a_liking_for_documents_is_at_chance():
    task = binding.binding(FACTS, FILLER, 0, pairs=10, parts=3)
    reader = {
        qid: {pid: float(f"\n{query}" in f"\n{text}") for pid, text in task.documents.items()}
        for qid, query in task.queries.items()
    }
    assert binding.accuracy(reader, task) == 1.0
    rng = np.random.default_rng(0)
    liked = {pid: rng.random() for pid in task.documents}
    assert binding.accuracy({qid: liked for qid in task.queries}, task) == 0.5
    assert binding.accuracy({qid: {} for qid in task.queries}, task) == 0.5


def test_pairs_are_scored_one_by_one():
    """Two pairs: of the first, one query of four is right; of the second, three, and one ties."""
    task = binding.binding(FACTS, FILLER, 0, pairs=2)
    margins = {"pair_0": [1, -1, -1, -1], "pair_1": [1, 1, 1, 0]}
    run = {}
    for qid, judged in task.qrels.items():
        (pid,) = judged
        run[qid] = {pid: float(margins[pid[:6]].pop(0)), binding.twin(pid): 0.0}
    assert binding.by_pair(run, task).tolist() == [1 / 4, 3.5 / 4]
    assert binding.accuracy(run, task) == 9 / 16


def test_made_up_facts_are_words_of_one_token_that_no_other_part_of_the_fact_has(tokenizer):
    words = binding.whole_words(tokenizer)
    assert {"the", "fox", "owl"} <= set(words) and words == sorted(words)
    assert all(len(tokens(tokenizer, word)) == 1 for word in words)
    facts = binding.made_up(words, 20, seed=3)
    assert facts == binding.made_up(words, 20, seed=3) != binding.made_up(words, 20)
    for fact in facts:
        parts = fact.name.split(), fact.summary.split()
        assert list(map(len, parts)) == [2, 4] and len({*parts[0], *parts[1]}) == 6
    with pytest.raises(WorkbenchError, match="5 words for facts of 6: take a larger vocabulary"):
        binding.made_up(words[:5], 1)


def test_the_seed_draws_the_task():
    first, again = (binding.binding(FACTS, FILLER, 8, 4) for _ in range(2))
    assert first == again and first != binding.binding(FACTS, FILLER, 8, 4, seed=1)


@pytest.fixture
def corpus():
    """Two tasks: an item `red.Fox`, one whose name is no name, and the same item again."""
    text = "red.Fox\nruns by night\nred.owl\nsleeps\ndef hen(\nby day"
    spans = [(0, 21), (22, 36), (37, len(text))]
    evidence = {
        f"q{i}": ("d", start / len(text), end / len(text)) for i, (start, end) in enumerate(spans)
    }
    queries = {"q0": "Runs by night", "q1": "sleeps the day", "q2": "blue"}
    qrels = {qid: {"d": 1} for qid in queries}
    task = Task("toy", "train", {"d": text}, queries, qrels, evidence)
    return [task, task]


def test_facts_are_names_without_modules_and_their_summaries_once(corpus):
    expected = [Fact("Fox", "Runs by night"), Fact("owl", "sleeps the day")]
    assert binding.facts(corpus) == expected


@pytest.mark.parametrize("known", [Fact("FOX", "other"), Fact("other", "runs BY night")])
def test_splits_share_neither_a_name_nor_a_summary(corpus, known):
    assert binding.facts(corpus, without=[known]) == [Fact("owl", "sleeps the day")]


def test_common_words_are_one_token_each_commonest_first(corpus, tokenizer):
    document = "the the the unbelievable unbelievable by by night"
    task = Task("toy", "train", {"d": document}, {}, {})
    assert binding.common_words([task], tokenizer, 2) == ["the", "by"]


@pytest.mark.parametrize(
    "facts, filler, parts, message",
    [
        (FACTS, FILLER, 1, "1 part has no twin"),
        (FACTS, FILLER, 6, "5 facts for documents of 6"),
        (FACTS, [], 2, "no filler"),
    ],
)
def test_what_makes_no_task_is_said(facts, filler, parts, message):
    with pytest.raises(WorkbenchError, match=message):
        binding.binding(facts, filler, 8, 1, parts)
