"""Hard negatives by hand and against the definition; never an answer, never a copy of one."""

import numpy as np
import pytest
import torch
from toys import FINETUNE, judged, task, tune, weights

from lib.pipeline.settings import Finetune
from lib.training.gradients import embed
from lib.training.negatives import mined
from lib.training.pairs import Pairs


def chosen(kind, depth=50):
    changes = dict(hard_negatives=kind, hard_depth=depth, documents=1, documents_seen=1)
    return Finetune(**FINETUNE | dict(lr=1.0, embedding_lr=1.0) | changes)


def foxes(tokenizer=None):
    """Query 0 asks for the red fox; d1 and d2 share words with it, d1 more of them; d3 none.

    d4 is nearly d0. The other task has the same words in d5.
    """
    one = judged(
        {"q0": ["d0"], "q1": ["d3"]},
        {"q0": "red fox runs", "q1": "unbelievable"},
        {"d0": "the red fox runs by night", "d3": "green hens"},
    )
    one.documents |= {
        "d1": "red fox",
        "d2": "blue fox by day and by night with owls",
        "d4": "The red FOX runs, by night",
    }
    other = judged({"q2": ["d5"]}, {"q2": "red fox runs"}, {"d5": "red fox runs"}, "other")
    return Pairs([one, other], tokenizer, 24)


def test_bm25_finds_documents_of_the_task_that_share_words_and_no_copy_of_an_answer():
    pairs = foxes()
    texts = pairs.documents.texts
    hard = mined(None, pairs, chosen("bm25"))
    assert [texts[d] for d in hard[0]] == ["red fox", "blue fox by day and by night with owls"]
    assert [texts[d] for d in mined(None, pairs, chosen("bm25", depth=1))[0]] == ["red fox"]
    assert set(hard) == {0}  # nothing has the words of query 1; query 2 has one document, its own


def test_by_default_nothing_is_mined():
    assert mined(None, foxes(), chosen("none")) == {}


def test_the_model_finds_the_nearest_by_cosine(tokenizer, tiny):
    pairs, model = foxes(tokenizer), tiny()
    hard = mined(model, pairs, chosen("model"), show_progress=False)
    with torch.no_grad():
        d, q = (
            torch.nn.functional.normalize(
                embed(model, rows[list(range(len(rows)))], pairs.pad_id).double()
            )
            for rows in (pairs.documents, pairs.queries)
        )
    for query, excluded in ((0, [0, 4]), (1, [1])):
        excluded = pairs.excluded.get(int(pairs.question_of[query]), excluded)
        members = np.flatnonzero(pairs.in_task[pairs.task_of[query]])
        others = [int(i) for i in members if i not in excluded]
        assert hard[query].tolist() == sorted(others, key=lambda i: -float(q[query] @ d[i]))
    assert 2 not in hard


@pytest.mark.parametrize("kind", ["bm25", "model"])
def test_no_hard_negative_answers_its_query_and_mining_twice_gives_the_same(tokenizer, tiny, kind):
    pairs = Pairs([task(), task("again", 8, 2)], tokenizer, 24)
    first, second = (mined(tiny(), pairs, chosen(kind), False) for _ in range(2))
    assert len(first) == len(pairs.queries) == 34
    for document, queries in pairs.queries_of.items():
        for query in queries:
            assert document not in first[query]
            assert pairs.in_task[pairs.task_of[query]][first[query]].all()
            assert first[query].tolist() == second[query].tolist()


@pytest.mark.parametrize("kind", ["bm25", "model"])
@pytest.mark.parametrize("loss", ["opl", "mnrl"])
def test_training_with_hard_negatives_is_another_one_and_the_same_each_time(
    tokenizer, tiny, kind, loss
):
    def run(hard):
        model, pairs = tiny(), Pairs([task()], tokenizer, 24)
        options = dict(explicit_negatives=1, hard_negatives=hard, hard_depth=1)
        tune(model, pairs, documents_seen=8, documents=1, lr=1e-3, loss=loss, **options)
        return weights(model)

    assert torch.equal(run(kind), run(kind)) and not torch.equal(run(kind), run("none"))
