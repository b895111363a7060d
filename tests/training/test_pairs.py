"""Training pairs: one document per text, epochs without repetition, uniform negatives."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import judged, task

from lib.pipeline.errors import TrainingError
from lib.training import pairs as module
from lib.training.pairs import Pairs, draw_negative, permutation


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
        pairs.documents.texts == ["same"]
        and pairs.queries_of == {0: [0]}
        and len(pairs.queries) == 1
    )


@given(st.integers(1, 9), st.sets(st.integers(0, 8)), st.data())
def test_a_draw_finds_every_document_that_is_not_excluded_in_the_order_after_the_answer(
    n, excluded, data
):
    answer = data.draw(st.integers(0, n - 1))
    excluded = sorted({b for b in excluded if b < n} | {answer})
    left = [(answer + step) % n for step in range(1, n) if (answer + step) % n not in excluded]
    draws = iter(range(len(left)))

    def integers(most):
        assert most == len(left)
        return next(draws)

    assert [
        draw_negative(answer, excluded, n, SimpleNamespace(integers=integers)) for _ in left
    ] == left


@given(st.integers(2, 60), st.integers(0, 59), st.integers(0, 50))
def test_where_the_answer_alone_is_excluded_the_draw_is_the_plain_one(n, answer, seed):
    expected = (answer % n + 1 + np.random.default_rng(seed).integers(n - 1)) % n
    assert draw_negative(answer % n, [answer % n], n, np.random.default_rng(seed)) == expected
