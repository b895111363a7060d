"""The steps of fine-tuning: which texts a step compares, and that no relevant one is a negative."""

from collections import Counter

import numpy as np
import pytest
import torch
from toys import FINETUNE, gradient, judged, task

from lib.pipeline.settings import Finetune
from lib.training import steps as module
from lib.training.gradients import backward
from lib.training.pairs import Pairs
from lib.training.steps import LOSSES

RANKED = ("mnrl", "opl", "contrastive", "triplet")


def chosen(**settings):
    return Finetune(**FINETUNE | dict(documents_seen=1, lr=1.0, embedding_lr=1.0) | settings)


@pytest.fixture
def compared(monkeypatch):
    """compared(tasks, loss, documents, steps, …): pairs, and the right and wrong ones of each step.

    Both are lists of (query, document).
    """

    def run(tasks, loss, documents, steps, hard=(), **settings):
        pairs, found = Pairs(tasks, None, 24), []
        run.masked, run.batches = [], []

        def ids(*embeddings):
            return [rows.argmax(dim=1).tolist() for rows in embeddings]

        def mnrl(q, d, scale, targets, relevant):
            kept = torch.ones(len(q), len(d), dtype=torch.bool) if relevant is None else ~relevant
            kept[torch.arange(len(q)), targets] = False
            right = list(zip(*ids(q, d[targets])))
            q, d = ids(q, d)
            found.append((right, [(q[i], d[j]) for i, j in kept.nonzero().tolist()]))
            run.masked.append(relevant)

        def labelled(q, d, y):
            drawn = list(zip(*ids(q, d)))
            found.append(tuple([p for p, label in zip(drawn, y) if label == k] for k in (1, 0)))

        def triplet(q, d, negatives):
            q, d, negatives = ids(q, d, negatives)
            found.append((list(zip(q, d)), list(zip(q, negatives))))

        with monkeypatch.context() as patch:
            patch.setattr(module, "multiple_negatives_ranking_loss", mnrl)
            patch.setattr(module, "orthogonal_projection_loss", labelled)
            patch.setattr(module, "contrastive_loss", labelled)
            patch.setattr(module, "triplet_loss", triplet)
            s = chosen(loss=loss, documents=documents, **settings)
            d, q = torch.eye(len(pairs.documents)), torch.eye(len(pairs.queries))
            for step in range(steps):
                batch, value = LOSSES[loss](pairs, s, step, dict(hard))
                value(d[batch[0]], q[batch[1]])
                run.batches.append(batch)
        assert len(found) == steps
        return pairs, found

    return run


# ---------------------------------------------------------------- what is never a negative


def crowds(documents):
    """(loss, documents of a step, explicit negatives of MNRL): all of a collection, and one."""
    yield "mnrl", documents, 0
    yield "mnrl", 1, 1
    for loss in RANKED[1:]:
        yield loss, documents, 0
        yield loss, 1, 0


def test_the_second_answer_of_a_query_is_never_its_negative_by_hand(compared):
    """q0 is answered by d1 and d2: of four documents d0 and d3 are left, and both are drawn."""
    task = judged({"q0": ["d1", "d2"], "q1": ["d0"], "q2": ["d3"]})
    for loss, documents, explicit in crowds(4):
        pairs, steps = compared([task], loss, documents, 120, explicit_negatives=explicit)
        d1, d2 = (pairs.documents.texts.index(f"text {pid}") for pid in ("d1", "d2"))
        negatives = {document for _, wrong in steps for query, document in wrong if query == 0}
        assert negatives == set(range(4)) - {d1, d2}, loss
        right = {document for right, _ in steps for query, document in right if query == 0}
        assert right == {d1, d2}


def test_one_question_under_two_ids_is_one_question_in_one_task_or_in_two(compared):
    asked = {"q0": "Who is  the fox?", "q1": "who is the\nFOX? "}
    one = judged({"q0": ["d0"], "q1": ["d1"], "q2": ["d2"]}, asked)
    two = [judged({"q0": ["d0"], "q2": ["d2"]}, asked), judged({"q1": ["d1"]}, asked, name="u")]
    for tasks in ([one], two):
        for loss, documents, explicit in crowds(3):
            pairs, steps = compared(tasks, loss, documents, 90, explicit_negatives=explicit)
            texts = pairs.documents.texts
            negatives = {
                (pairs.queries.texts[query], texts[document])
                for _, wrong in steps
                for query, document in wrong
            }
            expected = {(asked["q0"], "text d2"), (asked["q1"], "text d2"), ("who t q2", "text d0")}
            # d1 is of another task: a negative in MNRL, or if the own task had none.
            if len(tasks) == 1 or loss == "mnrl" and documents == 3:
                expected.add(("who t q2", "text d1"))
            assert negatives == expected


def test_a_near_identical_text_of_an_answer_is_no_negative_either(compared):
    words = [f"w{i}" for i in range(60)]
    texts = {
        "d0": " ".join(words),
        "d1": " ".join([*words, "copied"]),
        "d2": "a b c",
        "d3": "A, b\nc.",
        "d4": " ".join([*words[:30], *words[:30]]),
    }
    task = judged({f"q{i}": [f"d{i}"] for i in range(5)}, documents=texts)
    for loss, documents, explicit in crowds(5):
        _, steps = compared([task], loss, documents, 120, explicit_negatives=explicit)
        assert {pair for _, wrong in steps for pair in wrong} == {
            (q, d) for q in range(5) for d in range(5) if q != d and {q, d} not in ({0, 1}, {2, 3})
        }


def crowded(seed):
    """Two tasks that share texts and questions, with one to three answers a query.

    Texts are near-duplicates in threes. Numbers are octal: the tests' tokenizer gives 9 an id
    beyond its vocabulary.
    """
    rng = np.random.default_rng(seed)
    words = [[f"w{rng.integers(40):o}" for _ in range(60)] for _ in range(6)]
    texts = {
        f"d{i}": " ".join(words[i] if i < 6 else [*words[i % 3], f"more{i:o}"]) for i in range(12)
    }
    tasks = []
    for name in "ab":
        qrels = {
            f"q{i}": rng.permutation([*texts])[: rng.integers(1, 4)].tolist() for i in range(9)
        }
        tasks.append(
            judged(qrels, {qid: f"who {rng.integers(12):o}" for qid in qrels}, texts, name)
        )
    return tasks


def never(tasks, text):
    """The definition: relevant texts of an equal question, and texts within 0.8 of one of them."""

    def shingles(document):
        words = document.split()
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    relevant = {
        task.documents[pid]
        for task in tasks
        for qid, pids in task.qrels.items()
        if task.queries[qid] == text
        for pid in pids
    }
    documents = {document for task in tasks for document in task.documents.values()}
    return {
        b
        for b in documents
        for a in relevant
        if len(shingles(a) & shingles(b)) >= 0.8 * len(shingles(a) | shingles(b))
    }


@pytest.mark.parametrize("loss", RANKED)
@pytest.mark.parametrize(
    "documents, queries_per_document, negatives", [(1, 0, 3), (2, 1, 1), (5, 3, 2), (16, 0, 2)]
)
def test_no_negative_is_ever_relevant_whatever_the_batch_and_mnrl_uses_all_others(
    compared, loss, documents, queries_per_document, negatives
):
    explicit = negatives % 2
    counts = dict(queries_per_document=queries_per_document, negatives=negatives)
    for seed in range(2):
        tasks = crowded(seed)
        pairs, steps = compared(
            tasks, loss, documents, 40, seeds=[seed], explicit_negatives=explicit, **counts
        )
        queries, texts = pairs.queries.texts, pairs.documents.texts
        excluded = {text: never(tasks, text) for text in queries}
        assert any(len(documents) > 3 for documents in excluded.values())
        assert sum(len(wrong) for _, wrong in steps) > 9
        for (right, wrong), batch in zip(steps, compared.batches):
            assert all(texts[d] in excluded[queries[q]] for q, d in right)
            assert all(texts[d] not in excluded[queries[q]] for q, d in wrong)
            if loss == "mnrl":
                pool = [(q, d) for q, _ in right for d in batch[0]]
                assert sorted(wrong) == sorted(
                    (q, d) for q, d in pool if texts[d] not in excluded[queries[q]]
                )


def test_mnrl_is_told_of_other_answers_only_where_there_are_some(compared):
    """None is the arithmetic of a batch without them, bit for bit."""
    compared([task()], "mnrl", 6, 5, queries_per_document=3)
    assert compared.masked == [None] * 5
    compared([judged({"q0": ["d1", "d2"], "q1": ["d0"], "q2": ["d3"]})], "mnrl", 2, 40)
    masks = [mask for mask in compared.masked if mask is not None]
    # A batch of q0 twice, with each of its answers, is masked whole.
    assert None in compared.masked and masks and all(mask.all() for mask in masks)


def test_a_query_that_everything_answers_has_no_negative(compared):
    task = judged({"q0": ["d0", "d1", "d2"], "q1": ["d1"]})
    for loss in RANKED:
        _, steps = compared([task], loss, 3, 30, queries_per_document=2)
        assert {query for _, wrong in steps for query, _ in wrong} == {1}
        asked = {query for right, _ in steps for query, _ in right}
        assert asked == ({0, 1} if loss in ("mnrl", "opl") else {1})
    for loss in RANKED[1:]:  # one pair a step: it is left out
        _, steps = compared([task], loss, 1, 60, negatives=2)
        assert {pair for right, _ in steps for pair in right} == {(1, 1)}
        assert {pair for _, wrong in steps for pair in wrong} == {(1, 0), (1, 2)}


# ---------------------------------------------------------------- what a step compares


def tasks_of_two(documents=6, queries=3):
    """Two tasks of equal size without a common text."""
    other = task("u", documents, queries)
    other.documents = {pid: f"{text} of the other" for pid, text in other.documents.items()}
    other.queries = {qid: f"{text} of the other" for qid, text in other.queries.items()}
    return [task("t", documents, queries), other]


@pytest.mark.parametrize(
    "loss, positives, negatives", [("opl", 1, 3), ("contrastive", 3, 3), ("triplet", 3, 3)]
)
def test_an_epoch_of_single_pairs_asks_each_query_with_its_document_and_distinct_negatives(
    compared, loss, positives, negatives
):
    """36 queries; in a step of the triplet loss both kinds of pair are one."""
    steps_of_query = 3 if loss == "triplet" else positives + negatives
    options = dict(negatives=negatives, queries_per_document=0)
    pairs, steps = compared(tasks_of_two(), loss, 1, 2 * 36 * steps_of_query, **options)
    answer = {query: d for d, queries in pairs.queries_of.items() for query in queries}
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        right, wrong = (Counter(pair for step in epoch for pair in step[kind]) for kind in (0, 1))
        assert right == {pair: positives for pair in answer.items()}
        assert len(wrong) == 36 * negatives and set(wrong.values()) == {1}
        assert all(pairs.in_task[pairs.task_of[query], d] for query, d in wrong)
    assert steps[: len(steps) // 2] != steps[len(steps) // 2 :]


def test_positive_and_negative_pairs_are_mixed_and_each_is_a_function_of_its_step(compared):
    options = dict(negatives=3, queries_per_document=0)
    _, steps = compared(tasks_of_two(), "opl", 1, 144, **options)
    assert all(len(right) + len(wrong) == 1 for right, wrong in steps)
    positive = np.array([len(right) for right, _ in steps])
    gaps = np.diff(np.flatnonzero(positive))
    assert positive.sum() == 36 and gaps.min() == 1 and gaps.max() > 6  # no cycle of 4 steps
    queries = [(right + wrong)[0][0] for right, wrong in steps]
    assert sum(a == b for a, b in zip(queries, queries[1:])) < 20  # no cycle of one query
    pairs, s = Pairs(tasks_of_two(), None, 24), chosen(loss="opl", documents=1, **options)
    again = [LOSSES["opl"](pairs, s, step, {})[0] for step in reversed(range(144))]
    assert again[::-1] == compared.batches


def test_with_few_queries_of_a_document_an_epoch_has_other_ones_than_the_next(compared):
    pairs, steps = compared(tasks_of_two(), "opl", 1, 2 * 24, queries_per_document=1)
    epochs = [{right[0] for right, _ in steps[i : i + 24] if right} for i in (0, 24)]
    assert all({d for _, d in epoch} == set(range(12)) for epoch in epochs)
    assert len(epochs[0]) == len(epochs[1]) == 12 and epochs[0] != epochs[1]


def test_in_a_batch_negatives_are_distinct_and_of_the_task_while_it_has_some(compared):
    options = dict(negatives=3, queries_per_document=2)
    for loss in RANKED[1:]:
        pairs, steps = compared(tasks_of_two(), loss, 5, 20, **options)
        tasks = [set(np.flatnonzero(members).tolist()) for members in pairs.in_task]
        for (right, wrong), (documents, queries, target) in zip(steps, compared.batches):
            assert len(set(wrong)) == len(wrong)
            expected = []
            for query, answer in zip(queries, target):
                others = {*documents} - {documents[answer]}
                near = others & tasks[pairs.task_of[query]] or others
                drawn = {d for q, d in wrong if q == query}
                assert drawn <= near and len(drawn) == min(3, len(near))
                copies = 1 if loss == "opl" else len(drawn)
                expected += [(query, documents[answer])] * copies
            assert sorted(right) == sorted(expected)


def test_explicit_negatives_are_ranked_by_every_query_and_embedded_once(compared):
    pairs, steps = compared([task()], "mnrl", 2, 30, explicit_negatives=2, queries_per_document=3)
    plain = Pairs([task()], None, 24)
    for step, ((right, wrong), batch) in enumerate(zip(steps, compared.batches)):
        documents, queries, target = batch
        assert len(set(documents)) == len(documents) > 2
        assert (documents[:2], queries, target) == plain.batch(step, 42, 2, 3)
        assert len(right) == 6 and len(wrong) == 6 * (len(documents) - 1)


def test_without_explicit_negatives_mnrl_has_the_documents_of_the_batch_alone(compared):
    compared(tasks_of_two(), "mnrl", 4, 10, negatives=7)
    plain = Pairs(tasks_of_two(), None, 24)
    assert compared.batches == [plain.batch(step, 42, 4, 1) for step in range(10)]


@pytest.mark.parametrize("loss", RANKED)
@pytest.mark.parametrize("documents", [1, 3])
def test_hard_negatives_are_drawn_from_those_that_were_mined(compared, loss, documents):
    """Query 3i + j of document i has the next two documents; query 0 draws from all."""
    hard = {q: np.array([(q // 3 + 1) % 6, (q // 3 + 2) % 6]) for q in range(1, 18)}
    options = dict(negatives=2, explicit_negatives=2, queries_per_document=0)
    _, steps = compared([task()], loss, documents, 800, hard, **options)
    drawn = {pair for _, wrong in steps for pair in wrong}
    pool = {(q, d) for q, documents in hard.items() for d in documents.tolist()}
    everything = {(0, d) for d in range(1, 6)}
    assert drawn >= pool | everything
    assert drawn == pool | everything or loss == "mnrl"  # ranks those of all queries


# ---------------------------------------------------------------- any memory


@pytest.mark.parametrize("loss", RANKED)
@pytest.mark.parametrize("documents, hard", [(1, False), (5, False), (5, True)])
def test_in_parts_a_step_has_the_gradient_of_the_whole(tokenizer, tiny, loss, documents, hard):
    pairs = Pairs(crowded(1), tokenizer, 24)
    options = dict(queries_per_document=3, negatives=2, explicit_negatives=2)
    s = chosen(loss=loss, documents=documents, **options)
    mined = {
        query: np.setdiff1d(range(12), pairs.excluded.get(int(question), [answer]))[:4]
        for answer, queries in pairs.queries_of.items()
        for query, question in zip(queries, pairs.question_of[queries])
    }
    found = []
    for most in (None, 1):
        model, values = tiny().double(), []
        for step in range(2):
            batch, loss_of = LOSSES[loss](pairs, s, step, mined if hard else {})
            texts = pairs.documents[batch[0]], pairs.queries[batch[1]]
            values.append(float(backward(model, texts, loss_of, pairs.pad_id, most)))
        found.append((gradient(model), values))
    (whole, values), (parts, same) = found
    assert whole.abs().max() > 1e-3 and same == pytest.approx(values, abs=1e-12)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-13)
