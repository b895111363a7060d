"""Fine-tuning: memory never changes the gradient, and no relevant document is a negative."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toys import judged, task, tune, weights

from lib.pipeline.errors import TrainingError
from lib.training import finetune
from lib.training import pairs as module
from lib.training import steps as losses_of_steps
from lib.training.gradients import embed
from lib.training.losses import orthogonal_projection_loss
from lib.training.pairs import Pairs


def test_opl_at_batch_one_takes_a_positive_then_its_negatives(pairs, tiny, monkeypatch):
    steps = []

    def spy(q, d, y):
        steps.append((len(q), len(d), y.tolist()))
        return orthogonal_projection_loss(q, d, y)

    monkeypatch.setattr(losses_of_steps, "orthogonal_projection_loss", spy)
    tune(tiny(), pairs, documents_seen=8, documents=1, lr=1e-4, loss="opl", negatives=3)
    assert steps == [(1, 1, [1.0]), (1, 1, [0.0]), (1, 1, [0.0]), (1, 1, [0.0])] * 2


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
def test_fine_tuning_moves_the_right_document_up(pairs, tiny, loss):
    def mean_rank(model):
        with torch.no_grad():
            d, q = (
                embed(model, rows[list(range(len(rows)))], pairs.pad_id)
                for rows in (pairs.documents, pairs.queries)
            )
            cosine = (
                torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(d, dim=1).T
            )
        answer_of = {q: d for d, queries in pairs.queries_of.items() for q in queries}
        answers = torch.tensor([answer_of[q] for q in range(len(pairs.queries))])
        return (cosine > cosine.gather(1, answers[:, None])).sum(dim=1).float().mean().item()

    model = tiny()
    before = mean_rank(model)
    curve = tune(
        model, pairs, documents_seen=600, documents=6, lr=5e-3, loss=loss, queries_per_document=3
    )
    assert len(curve) == 100 and mean_rank(model) < 0.5 * before


def test_the_prototype_loss_brings_a_student_to_its_teacher_and_leaves_the_teacher_alone(
    pairs, tiny
):
    teacher, student = tiny(max_position_embeddings=16).eval(), tiny(num_hidden_layers=2)
    before = weights(teacher)
    curve = tune(
        student,
        pairs,
        documents_seen=600,
        documents=6,
        lr=3e-3,
        loss="prototype",
        teacher=teacher,
    )
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert torch.equal(weights(teacher), before) and all(
        p.grad is None for p in teacher.parameters()
    )


def test_none_leaves_the_encoder_as_it_is_and_an_unknown_loss_is_named(pairs, tiny):
    model = tiny()
    before = copy.deepcopy(weights(model))
    assert tune(model, pairs, documents_seen=60, documents=6, lr=1.0, loss="none") == []
    assert torch.equal(weights(model), before)
    with pytest.raises(ValidationError, match="'opl', 'mnrl', 'prototype' or 'none'"):
        tune(model, pairs, documents_seen=60, documents=6, lr=1.0, loss="triplet")


def test_the_same_pairs_in_the_same_order_give_the_same_bits(pairs, tiny):
    def run(seed):
        model = tiny()
        tune(
            model, pairs, documents_seen=24, documents=4, lr=1e-3, seed=seed, micro_batch_tokens=40
        )
        return weights(model)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


# ---------------------------------------------------------------- negatives


@pytest.fixture
def compared(tiny, tokenizer, monkeypatch):
    """compared(tasks, loss, documents, …): the pairs, and the positives and negatives of each step.

    Both are lists of (query, document).
    """

    def run(tasks, loss, documents, steps, **options):
        pairs, found = Pairs(tasks, tokenizer, 24), []
        n = len(pairs.documents)
        pairs.documents.rows = [np.array([i]) for i in range(n)]
        pairs.queries.rows = [np.array([n + i]) for i in range(len(pairs.queries))]

        def mnrl(q, d, scale, targets, relevant):
            q, d = q.argmax(dim=1) - n, d.argmax(dim=1)
            kept = torch.ones(len(q), len(d), dtype=torch.bool) if relevant is None else ~relevant
            kept[torch.arange(len(q)), targets] = False
            found.append(
                (
                    list(zip(q.tolist(), d[targets].tolist())),
                    [(int(q[i]), int(d[j])) for i, j in kept.nonzero()],
                )
            )
            masked.append(relevant)
            return torch.zeros(())

        def opl(q, d, y):
            drawn = list(zip((q.argmax(dim=1) - n).tolist(), d.argmax(dim=1).tolist()))
            found.append(
                (
                    [pair for pair, label in zip(drawn, y) if label],
                    [pair for pair, label in zip(drawn, y) if not label],
                )
            )
            return torch.zeros(())

        def backward(model, texts, value, *_):
            numbers = (torch.tensor([int(row[0]) for row in rows]) for rows in texts)
            size = n + len(pairs.queries)
            return value(*(torch.nn.functional.one_hot(i, size).float() for i in numbers)).item()

        masked = run.masked = []
        with monkeypatch.context() as patch:
            patch.setattr(losses_of_steps, "multiple_negatives_ranking_loss", mnrl)
            patch.setattr(losses_of_steps, "orthogonal_projection_loss", opl)
            patch.setattr(finetune, "backward", backward)
            tune(
                tiny(),
                pairs,
                documents_seen=steps * documents,
                documents=documents,
                lr=1e-3,
                loss=loss,
                **options,
            )
        assert len(found) == steps
        return pairs, found

    return run


def test_the_second_answer_of_a_query_is_never_its_negative_by_hand(compared):
    """q0 is answered by d1 and d2: of four documents d0 and d3 are left, and both are drawn."""
    task = judged({"q0": ["d1", "d2"], "q1": ["d0"], "q2": ["d3"]})
    for loss, documents in (("opl", 1), ("opl", 4), ("mnrl", 4), ("mnrl", 3)):
        pairs, steps = compared([task], loss, documents, 200)
        d1, d2 = (pairs.documents.texts.index(f"text {pid}") for pid in ("d1", "d2"))
        negatives = {document for _, wrong in steps for query, document in wrong if query == 0}
        assert negatives == set(range(4)) - {d1, d2}, loss
        assert {document for right, _ in steps for query, document in right if query == 0} == {
            d1,
            d2,
        }


def test_one_question_under_two_ids_is_one_question_in_one_task_or_in_two(compared):
    asked = {"q0": "Who is  the fox?", "q1": "who is the\nFOX? "}
    one = judged({"q0": ["d0"], "q1": ["d1"], "q2": ["d2"]}, asked)
    two = [judged({"q0": ["d0"], "q2": ["d2"]}, asked), judged({"q1": ["d1"]}, asked, name="u")]
    for tasks in ([one], two):
        for loss, documents in (("opl", 1), ("opl", 3), ("mnrl", 3)):
            pairs, steps = compared(tasks, loss, documents, 60)
            texts = pairs.documents.texts
            negatives = {
                (pairs.queries.texts[query], texts[document])
                for _, wrong in steps
                for query, document in wrong
            }
            assert negatives == {
                (asked["q0"], "text d2"),
                (asked["q1"], "text d2"),
                ("who t q2", "text d0"),
                ("who t q2", "text d1"),
            }


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
    for loss, documents in (("opl", 1), ("opl", 5), ("mnrl", 5)):
        _, steps = compared([task], loss, documents, 200)
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


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
@pytest.mark.parametrize(
    "documents, queries_per_document, negatives", [(1, 1, 3), (2, 1, 1), (5, 3, 2), (16, 9, 2)]
)
def test_no_negative_is_ever_relevant_whatever_the_batch_and_mnrl_uses_all_others(
    compared, loss, documents, queries_per_document, negatives
):
    for seed in range(4):
        tasks = crowded(seed)
        pairs, steps = compared(
            tasks,
            loss,
            documents,
            24,
            queries_per_document=queries_per_document,
            negatives=negatives,
            seed=seed,
        )
        queries, texts = pairs.queries.texts, pairs.documents.texts
        excluded = {text: never(tasks, text) for text in queries}
        negatives_seen = sum(len(wrong) for _, wrong in steps)
        assert any(len(documents) > 3 for documents in excluded.values())
        assert negatives_seen > 9 or loss == "mnrl" and documents == 1
        for right, wrong in steps:
            assert all(texts[d] in excluded[queries[q]] for q, d in right)
            assert all(texts[d] not in excluded[queries[q]] for q, d in wrong)
            if loss == "mnrl":
                batch = {d for _, d in right}
                pool = [(q, d) for q, _ in right for d in batch]
                assert sorted(wrong) == sorted(
                    (q, d) for q, d in pool if texts[d] not in excluded[queries[q]]
                )


@pytest.mark.parametrize(
    "documents, queries_per_document, negatives", [(1, 1, 3), (2, 1, 1), (6, 3, 2), (7, 2, 1)]
)
def test_with_one_answer_a_query_the_draws_are_the_plain_ones(
    compared, documents, queries_per_document, negatives
):
    """If the answer alone is excluded, the draws are those written out here."""
    pairs, steps = compared(
        [task()],
        "opl",
        documents,
        30,
        queries_per_document=queries_per_document,
        negatives=negatives,
        seed=7,
    )
    N = len(pairs.documents)
    for step, (right, wrong) in enumerate(steps):
        if documents == 1:
            cycle, phase = divmod(step, 1 + negatives)
            (answer,), (query,), _ = pairs.batch(cycle, 7, 1, 1)
            drawn = int((answer + 1 + np.random.default_rng([7, step, 1]).integers(N - 1)) % N)
            assert (right, wrong) == (([], [(query, drawn)]) if phase else ([(query, answer)], []))
            continue
        docs, queries, target = pairs.batch(step, 7, documents, queries_per_document)
        rng, n = np.random.default_rng([7, step]), len(docs)
        drawn = [docs[(i + 1 + rng.integers(n - 1)) % n] for i in target for _ in range(negatives)]
        assert right == [(query, docs[i]) for query, i in zip(queries, target)]
        assert wrong == list(zip(np.repeat(queries, negatives).tolist(), drawn))


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
    for loss in ("mnrl", "opl"):
        _, steps = compared([task], loss, 3, 30, queries_per_document=2)
        assert all(query == 1 for _, wrong in steps for query, _ in wrong) and all(
            len(right) >= 3 for right, _ in steps
        )
        assert any(wrong for _, wrong in steps)
    # One pair a step: another query replaces it, so that every positive has its negatives.
    _, steps = compared([task], "opl", 1, 60, negatives=2)
    assert [len(wrong) for _, wrong in steps] == [0, 1, 1] * 20
    assert {query for right, _ in steps for query, _ in right} == {0, 1}
    assert {pair for _, wrong in steps for pair in wrong} == {(1, 0), (1, 2)}


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize(
    "qrels, texts, why",
    [
        ({"q0": ["d0"], "q1": ["d0"]}, {}, "there is 1 document"),
        (
            {"q0": ["d0"], "q1": ["d1"]},
            {"d0": "The fox", "d1": "the fox."},
            "each of 2 documents answers every query or is nearly one that does",
        ),
        ({"q0": ["d0", "d1"], "q1": ["d1", "d0"]}, {}, "each of 2 documents"),
    ],
)
def test_without_any_negative_nothing_is_trained(
    tokenizer, tiny, loss, documents, qrels, texts, why
):
    pairs, model = Pairs([judged(qrels, documents=texts)], tokenizer, 24), tiny()
    before = weights(model)
    needs = f"^loss '{loss}' needs documents that do not answer a query, and here are none: {why}"
    way_out = "; give more documents, or set loss: prototype or none$"
    with pytest.raises(TrainingError, match=f"{needs}.*{way_out}"):
        tune(model, pairs, documents_seen=8, documents=documents, lr=1e-3, loss=loss)
    assert torch.equal(weights(model), before)
    assert pairs.documents.rows == [None] * len(pairs.documents)
    untokenised = Pairs([judged(qrels, documents=texts)], None, 0)
    with pytest.raises(TrainingError, match="needs documents that do not answer a query"):
        untokenised.check_negatives(loss)
    pairs.check_negatives("none")
    options = dict(documents_seen=8, documents=1, lr=1e-3)
    assert len(tune(model, pairs, loss="prototype", teacher=tiny(), **options)) == 8


def test_texts_are_compared_once_and_only_for_a_loss_that_has_negatives(
    tokenizer, tiny, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        module,
        "near_duplicates",
        lambda texts: asked.append(len(texts)) or np.empty((0, 2), dtype=np.int64),
    )
    pairs = Pairs([task()], tokenizer, 24)
    options = dict(documents_seen=6, documents=2, lr=1e-3)
    tune(tiny(), pairs, loss="none", **options)
    tune(tiny(), pairs, loss="prototype", teacher=tiny(), **options)
    assert asked == []
    for loss in ("mnrl", "opl"):
        tune(tiny(), pairs, loss=loss, **options)
    assert asked == [6] and pairs.excluded == {}


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
def test_in_parts_too_the_other_answers_are_left_out(tokenizer, tiny, loss):
    found = []
    for micro in (65_536, 1, 60):
        model = tiny()
        curve = tune(
            model,
            Pairs(crowded(1), tokenizer, 24),
            documents_seen=15,
            documents=5,
            lr=1e-4,
            loss=loss,
            queries_per_document=3,
            micro_batch_tokens=micro,
        )
        found.append((weights(model), [line["loss"] for line in curve]))
    for moved, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], abs=1e-5)
        torch.testing.assert_close(moved, found[0][0], rtol=0, atol=2e-4)
