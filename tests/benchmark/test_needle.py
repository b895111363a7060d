"""Haystacks that differ in nothing but the place of the needle."""

import pytest

from lib.benchmark import metrics, needle, search
from lib.benchmark.task import Task


@pytest.fixture
def task():
    """Sixty documents, each with a word of its own in the middle that its query asks for."""
    word = ["".join("abcdefghij"[int(digit)] for digit in f"{i:02d}") * 2 for i in range(60)]
    documents = {f"d{i}": f"hen hen {word[i]} by night owl" for i in range(60)}
    queries = {f"q{i}": f"red {word[i]}" for i in range(60)}
    start, end = len("hen hen "), len("hen hen aaaa by night")
    return Task(
        "toy",
        "test",
        documents,
        queries,
        {f"q{i}": {f"d{i}": 1} for i in range(60)},
        {
            f"q{i}": (f"d{i}", start / len(documents["d0"]), end / len(documents["d0"]))
            for i in range(60)
        },
    )


def test_only_the_place_changes(task, tokenizer):
    found = needle.haystacks([task], tokenizer, passage_tokens=50, needles=9)
    assert tuple(found) == needle.PLACES and all(
        len(one.documents) == len(one.queries) == 9 for one in found.values()
    )
    first = found[0]
    for place, one in found.items():
        assert one.queries == first.queries and one.qrels == first.qrels
        for qid, judged in one.qrels.items():
            (pid,) = judged
            passages = one.documents[pid].split("\n")
            word = one.queries[qid].split()[1]
            assert (
                len(passages) == 40 == len(set(passages)) and passages[place] == f"{word} by night"
            )
            assert passages[:place] + passages[place + 1 :] == first.documents[pid].split("\n")[1:]


def test_no_hay_answers_a_query_and_a_word_count_does_not_care_where(task, tokenizer):
    found = needle.haystacks([task], tokenizer, passage_tokens=50, needles=20)
    words = [query.split()[1] for query in found[0].queries.values()]
    for text in found[0].documents.values():
        assert sum(word in text.split() for word in words) == 1
    ranked = search.rank(search.Bm25(), list(found.values()))
    assert {metrics.ndcg(ranked[one.name][0], one.qrels) for one in found.values()} == {1.0}


def test_passages_are_cut_and_the_draw_is_the_seeds(task, tokenizer):
    one = needle.haystacks([task], tokenizer, passage_tokens=4, needles=3)
    assert all(
        len(passage.split()) == 1
        for text in one[0].documents.values()
        for passage in text.split("\n")
    )  # a word of four letters
    assert one == needle.haystacks([task], tokenizer, passage_tokens=4, needles=3)
    assert (
        one[0].queries
        != needle.haystacks([task], tokenizer, passage_tokens=4, needles=3, seed=1)[0].queries
    )


@pytest.mark.parametrize("needles, there", [(21, True), (22, False), (0, False)])
def test_too_few_passages_make_no_task(task, tokenizer, needles, there):
    assert bool(needle.haystacks([task], tokenizer, 50, needles)) is there
    assert (
        needle.haystacks(
            [Task("t", "test", {"d": "fox"}, {"q": "fox"}, {"q": {"d": 1}})], tokenizer, 50, 1
        )
        == {}
    )


def test_two_queries_of_one_text_are_asked_once(task, tokenizer):
    same = Task(
        "toy",
        "test",
        task.documents,
        task.queries | {"q1": task.queries["q0"]},
        task.qrels,
        task.evidence,
    )
    for seed in range(5):
        asked = list(needle.haystacks([same], tokenizer, 50, 20, seed)[0].queries.values())
        assert len(set(asked)) == 20
