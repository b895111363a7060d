"""Targets: what a teacher reads of a text, the map to the student's width, and what is learned."""

import numpy as np
import pytest
import torch
from toys import FINETUNE, task, tune

from lib.benchmark.encoder import Encoder, unit
from lib.benchmark.rankers import ExternalEncoder
from lib.pipeline.errors import TrainingError
from lib.pipeline.settings import Finetune
from lib.training.gradients import embed
from lib.training.pairs import Pairs
from lib.training.steps import LOSSES
from lib.training.targets import Targets, principal, rotation

WORDS = "red green blue fox hen owl runs sleeps".split()


def bag(texts: list[str]) -> np.ndarray:
    """A teacher's vector of a text: how often it has each of WORDS, and 0.1 for all others."""
    return np.array([[0.1, *(text.split().count(word) for word in WORDS)] for text in texts])


@pytest.fixture
def by_words(tokenizer):
    """by_words(room, function): a teacher that reads windows of `room` tokens."""

    def build(room=3, function=bag):
        return ExternalEncoder(function, function, tokenizer, room + 2, chunk="mean")

    return build


def settings(**changes) -> Finetune:
    options = dict(loss="prototype", documents=3, documents_seen=30, lr=1e-3, embedding_lr=1e-3)
    return Finetune(**FINETUNE | options | changes)


def targets(teacher, pairs, model, **changes) -> Targets:
    student = Encoder(model, pairs.documents.tokenizer, truncate=True)
    return Targets(teacher, pairs, settings(**changes), student, show_progress=False)


# ------------------------------------------------------------------ what a teacher reads


@pytest.mark.parametrize(("length", "windows"), [(8, [0, 1]), (5, [0]), (6, [0, 2])])
def test_the_target_of_a_long_text_is_the_mean_of_the_windows_that_the_student_reads(
    tokenizer, tiny, by_words, length, windows
):
    """Windows of three tokens: "red fox runs" is (1, 0, 0), "green hen sleeps" is (0, 1, 0), and
    "green", which is all of it that a student of six tokens reads, is (0, 0, 1)."""
    vectors = {"red fox runs": 0, "green hen sleeps": 1, "green": 2, "red": 0}
    one_hot = by_words(function=lambda texts: np.eye(3)[[vectors[text] for text in texts]])
    toy = task(documents=1, queries=1)
    toy.documents = {"d0": "red fox runs green hen sleeps"}
    toy.queries = {qid: "red" for qid in toy.queries}
    pairs = Pairs([toy], tokenizer, length)
    given = targets(one_hot, pairs, tiny(max_position_embeddings=length), documents=1)
    d, q = (unit(x.numpy()) for x in given([0], [0]))
    assert d.shape == (1, 16)
    # The query is the first axis; D = 16 dimensions hold all three.
    assert d @ q.T == pytest.approx(1 / np.sqrt(len(windows)), abs=1e-6)


def test_a_retriever_of_the_same_width_gives_its_embeddings_as_they_are(pairs, tiny):
    teacher = tiny(max_position_embeddings=16)
    given = targets(Encoder(teacher, pairs.documents.tokenizer, truncate=True), pairs, tiny())
    rows = [row[:15].tolist() + [row[-1]] if len(row) > 16 else row for row in pairs.documents[[2]]]
    with torch.no_grad():
        expected = embed(teacher, [np.array(row) for row in rows], pairs.pad_id)
    assert given.map is None
    torch.testing.assert_close(given([2], [0])[0], torch.nn.functional.normalize(expected))


# ------------------------------------------------------------------ the map


def test_the_map_keeps_all_cosines_if_the_vectors_fit_and_else_more_than_any_other():
    rng = np.random.default_rng(0)
    inside = unit(rng.normal(size=(50, 8)) @ rng.normal(size=(8, 40)))
    low = inside @ principal(inside, 8)
    np.testing.assert_allclose(low @ low.T, inside @ inside.T, atol=1e-5)
    wide = unit(rng.normal(size=(200, 40)) * 0.8 ** np.arange(40))

    def lost(W):
        return np.square((wide @ W) @ (wide @ W).T - wide @ wide.T).sum()

    others = [np.linalg.qr(rng.normal(size=(40, 8)))[0] for _ in range(20)]
    centred = np.linalg.svd(wide - wide.mean(axis=0))[2][:8].T
    assert lost(principal(wide, 8)) <= min(lost(W) for W in [*others, centred])
    padded = wide @ principal(wide, 50)
    np.testing.assert_allclose(padded @ padded.T, wide @ wide.T, atol=1e-5)


def test_the_rotation_is_found_and_changes_no_cosine():
    rng = np.random.default_rng(1)
    T, R = rng.normal(size=(60, 6)), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    np.testing.assert_allclose(rotation(T, T @ R), R, atol=1e-5)
    turned = T @ rotation(T, rng.normal(size=(60, 6)))
    np.testing.assert_allclose(turned @ turned.T, T @ T.T, atol=1e-4)


# ------------------------------------------------------------------ what is learned


def test_a_student_comes_nearer_to_a_teacher_of_another_width_on_texts_it_has_not_seen(
    tiny, tokenizer, by_words
):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 7)) for _ in range(80)]
    pairs, student = Pairs([task()], tokenizer, 24, texts=texts[:60]), tiny()
    options = dict(documents=3, documents_seen=120, lr=1e-2, pretraining_texts=8, loss="prototype")
    given = targets(by_words(), pairs, student, **options)

    def near():
        return given.cosine(Encoder(student, tokenizer, truncate=True), texts[60:]).mean()

    before = near()
    curve = tune(student, pairs, teacher=given, **options)
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"] and 1 - near() < 0.7 * (1 - before)


def test_texts_without_queries_add_their_distance_and_every_epoch_has_each_once(
    tokenizer, tiny, by_words
):
    texts = ["blue hen", "red owl runs", "the fox sleeps by night", "green day"]
    pairs = Pairs([task()], tokenizer, 24, texts=texts)
    s = settings(pretraining_texts=2)
    given = targets(by_words(), pairs, tiny(), pretraining_texts=2)
    seen = []
    for step in range(2):
        (d, q, target), loss = LOSSES["prototype"](pairs, s, step, given)
        own, extra = d[:3], d[3:]
        seen += [pairs.documents.texts[i] for i in extra]
        x, y = torch.randn(len(d), 16), torch.randn(len(q), 16)
        to_d, to_q = given(d, q)
        gap = [1 - torch.cosine_similarity(*both) for both in ((x, to_d), (y, to_q))]
        by_hand = gap[1].mean() + gap[0][target].mean() + gap[0][3:].mean()
        torch.testing.assert_close(loss(x, y), by_hand)
        assert len(own) == 3 and max(target) < 3
    assert sorted(seen) == sorted(texts)


def test_texts_that_are_not_there_are_asked_for_in_one_line(pairs, tiny, by_words):
    with pytest.raises(TrainingError, match="^pretraining_texts: 2, but there is no text .* to 0$"):
        targets(by_words(), pairs, tiny(), pretraining_texts=2)
