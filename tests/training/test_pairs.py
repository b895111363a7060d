"""Training pairs: one document per text, epochs without repetition, uniform negatives."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import judged, task

from lib.pipeline.errors import TrainingError
from lib.training import pairs as module
from lib.training.pairs import Pairs, permutation, shuffled


def test_one_text_under_two_ids_is_one_document_so_no_false_negative(tokenizer):
    pairs = Pairs([task(same=("d1", "d4")), task("again", same=("d1", "d4"))], tokenizer, 24)
    assert len(pairs.documents) == 5
    # Two documents, two tasks, three queries each.
    shared = next(d for d, queries in pairs.queries_of.items() if len(queries) == 12)
    docs, queries, target = pairs.batch(0, 0, 5, 12)
    assert sorted(docs) == list(range(5)) and target.count(docs.index(shared)) == 12


@settings(max_examples=30)
@given(batch=st.integers(1, 9), seed=st.integers(0, 5))
def test_an_epoch_sees_every_document_once_whatever_the_batch(batch, seed):
    pairs = object.__new__(Pairs)
    pairs.queries_of = {i: [10 * i, 10 * i + 1] for i in range(7)}
    seen = []
    for step in range(7):  # batch epochs
        docs, queries, target = pairs.batch(step, seed, batch, 2)
        assert [q // 10 for q in queries] == [docs[t] for t in target]
        assert len(set(docs)) == len(docs) == len(set(target))
        seen += docs
    # A batch that lies in two epochs has no document twice.
    epochs = [sorted(permutation(7, seed, epoch)) for epoch in range(batch)]
    assert all(epoch == list(range(7)) for epoch in epochs) and len(seen) <= 7 * batch
    if 7 % batch == 0:
        assert sorted(seen) == sorted(list(range(7)) * batch)


def test_pairs_of_the_next_steps_do_not_depend_on_those_before(pairs):
    later = [pairs.batch(step, 1, 4, 2) for step in range(3, 9)]  # over the seams of epochs
    assert [pairs.batch(step, 1, 4, 2) for step in range(9)][3:] == later


def test_a_text_is_tokenised_when_it_is_first_asked_for_and_once(pairs, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module,
        "tokenize",
        lambda texts, tokenizer, length: (
            asked.extend(texts) or ([[2, len(text), 3] for text in texts], None)
        ),
    )
    first, second = pairs.documents[[3, 1, 3]], pairs.documents[[1, 0]]
    assert asked == [pairs.documents.texts[i] for i in (3, 1, 0)]
    assert (
        first[0] is first[2]
        and first[1] is second[0]
        and first[1].tolist() == [2, len(pairs.documents.texts[1]), 3]
    )


def test_texts_are_cut_and_no_pair_is_an_error(tokenizer):
    rows = Pairs([task()], tokenizer, 8).documents[[0, 1, 2, 3, 4, 5]]
    assert [len(row) for row in rows] == [8] * 6
    empty = SimpleNamespace(name="empty", documents={}, queries={}, qrels={})
    with pytest.raises(TrainingError, match="no training pairs in empty"):
        Pairs([empty], tokenizer, 8)


def test_an_answer_under_two_ids_of_one_text_is_asked_for_once_and_a_judged_zero_is_no_answer(
    tokenizer,
):
    task = judged({"q0": ["d0", "d1", "d2"]}, documents={"d0": "same", "d1": "same"})
    task.qrels["q0"]["d2"] = 0
    task.qrels["q1"] = {"d2": 0}
    pairs = Pairs([task], tokenizer, 24)
    assert (
        pairs.documents.texts == ["same", "text d2"]
        and pairs.queries_of == {0: [0]}
        and len(pairs.queries) == 1
    )


# ---------------------------------------------------------------- negatives


def test_documents_that_answer_nothing_come_last_and_leave_the_batches_as_they_were(tokenizer):
    answering, more = task(), task()
    more.documents = {"new0": "blue fox", **more.documents, "new1": "red owl"}
    few, all_of_them = (Pairs([one], tokenizer, 24) for one in (answering, more))
    assert all_of_them.documents.texts == [*few.documents.texts, "blue fox", "red owl"]
    for step in range(6):
        assert few.batch(step, 3, 4, 2) == all_of_them.batch(step, 3, 4, 2)
    drawn = all_of_them.negatives(0, 0, 7, np.random.default_rng(0), {})
    assert sorted(drawn) == [1, 2, 3, 4, 5, 6, 7]


def two_tasks():
    """Documents 0 and 1 of task a, 1 and 2 of task b; 3 is b's too and answers nothing.

    Query 0 asks for document 0, 1 for both of task a, 2 for document 2.
    """
    a = judged({"q0": ["d0"], "q1": ["d0", "d1"]}, name="a")
    b = judged({"q2": ["d2"]}, name="b")
    b.documents |= {"d1": "text d1", "d3": "text d3"}
    return Pairs([a, b], None, 24)


def test_negatives_are_of_the_task_or_of_any_if_it_has_none():
    pairs, rng = two_tasks(), np.random.default_rng(0)
    assert pairs.documents.texts == [f"text d{i}" for i in range(4)]
    assert pairs.in_task.tolist() == [[True, True, False, False], [False, True, True, True]]

    def drawn(query, answer, hard=()):
        return sorted(pairs.negatives(query, answer, 9, rng, dict(hard)))

    assert drawn(0, 0) == [1] and drawn(2, 2) == [1, 3]
    assert drawn(1, 0) == drawn(1, 1) == [2, 3]  # all of task a answer it
    assert drawn(2, 2, {2: np.array([3])}) == [3]


def test_a_draw_is_distinct_and_uniform():
    pairs, counts = Pairs([task()], None, 24), np.zeros(6, dtype=int)
    for seed in range(600):
        drawn = pairs.negatives(0, 0, 2, np.random.default_rng(seed), {})
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    assert counts[0] == 0  # the answer; the others: 240 ± 12
    assert np.abs(counts[1:] - 240).max() < 60


def test_negatives_of_a_batch_are_of_the_task_or_of_any_if_the_batch_has_none():
    pairs, rng = two_tasks(), np.random.default_rng(0)

    def drawn(*batch):
        return pairs.in_batch_negatives(batch, 9, rng)

    # Rows: query 0 with its document, query 2 with its own.
    assert sorted(drawn([0, 2], [0, 2], [0, 1])) == [(0, 1), (1, 0)]
    assert sorted(drawn([0, 2, 1], [0, 2], [0, 1])) == [(0, 2), (1, 2)]
    assert drawn([0, 1], [1, 1], [0, 1]) == []


def test_a_batch_is_extended_by_documents_that_it_does_not_have():
    pairs, rng = two_tasks(), np.random.default_rng(0)
    batch, negatives = pairs.extended(([2, 0], [2, 0], [0, 1]), 9, rng, {})
    documents, queries, target = batch
    assert documents[:2] == [2, 0] and sorted(documents) == [0, 1, 2, 3]
    assert (queries, target) == ([2, 0], [0, 1])
    found = [(row, documents[place]) for row, place in negatives]
    assert sorted(found) == [(0, 1), (0, 3), (1, 1)]


def test_a_query_that_every_document_answers_is_left_out_of_the_pairs_with_negatives():
    pairs = Pairs([judged({"q0": ["d0", "d1"], "q1": ["d1"], "q2": ["d0", "d1"]})], None, 24)
    assert pairs.queries_of == {0: [0, 2], 1: [0, 1, 2]} and pairs.with_negatives == {1: [1]}
    examples = {pairs.example(step, 0, None, 1, 1)[1:] for step in range(2)}
    assert examples == {(1, 1, 0), (1, 1, 1)}
    assert {pairs.example(step, 0, None, 1, 0)[1:] for step in range(5)} == {
        (document, query, 0) for document, queries in pairs.queries_of.items() for query in queries
    }


@given(st.integers(0, 4), st.integers(0, 2), st.integers(0, 3), st.integers(0, 9))
def test_an_epoch_has_every_kind_of_every_pair_once(most, positives, negatives, seed):
    pairs = object.__new__(Pairs)
    pairs.queries_of = pairs.with_negatives = {i: [*range(3 * i, 4 * i + 1)] for i in range(5)}
    kinds = positives + negatives or 1
    counts = {i: min(most or 9, i + 1) for i in range(5)}
    n = sum(counts.values()) * kinds
    for epoch in range(2):
        steps = [
            pairs.example(step, seed, most or None, kinds - negatives, negatives)
            for step in range(epoch * n, (epoch + 1) * n)
        ]
        assert len(set(steps)) == n and {step[0] for step in steps} == {epoch}
        for document, count in counts.items():
            asked = {(query, kind) for _, d, query, kind in steps if d == document}
            assert len(asked) == count * kinds
            assert {query for query, _ in asked} <= {*pairs.queries_of[document]}
            drawn = shuffled(pairs.queries_of[document], seed, epoch, document)
            assert {query for query, _ in asked} == {*drawn[:count]}  # as in `batch`
