"""Fine-tuning: what is learned, what is refused, and validation that leaves no trace."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toys import FINETUNE, judged, task, tune, weights

from lib.benchmark import metrics
from lib.benchmark.encoder import Encoder
from lib.benchmark.search import rank
from lib.model.twins import MIXERS
from lib.pipeline.errors import TrainingError
from lib.pipeline.settings import Finetune
from lib.training import pairs as module
from lib.training.finetune import RIDGE, SPREAD, budget, choose, evaluation_steps, finetune, whiten
from lib.training.gradients import embed
from lib.training.pairs import Pairs
from lib.training.resume import Checkpoints


@pytest.mark.parametrize(
    ("loss", "mixer"),
    [(loss, "long_conv") for loss in ("mnrl", "opl", "contrastive", "triplet")]
    + [("mnrl", mixer) for mixer in MIXERS],
)
def test_fine_tuning_moves_the_right_document_up(pairs, tiny, loss, mixer):
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

    model = tiny(mixer=mixer)
    before = mean_rank(model)
    curve = tune(
        model, pairs, documents_seen=600, documents=6, lr=5e-3, loss=loss, queries_per_document=3
    )
    assert len(curve) == 100 and mean_rank(model) < 0.5 * before


def test_a_whitened_pooler_centres_the_texts_and_levels_their_variances(pairs, tiny):
    def in_front_of_tanh(model):
        rows = [pairs.documents, pairs.queries]
        with torch.no_grad():
            texts = [embed(model, own[[i]], pairs.pad_id) for own in rows for i in range(len(own))]
        return torch.cat(texts).double().atanh()

    model = tiny(pooling="mean")
    with torch.no_grad():
        model.model.pooler.weight.copy_(0.1 * torch.eye(16))
        model.model.pooler.bias.zero_()
    v = torch.linalg.eigvalsh(torch.cov((in_front_of_tanh(model) / 0.1).T)).clamp(min=0)
    whiten(model, pairs)
    z = in_front_of_tanh(model)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(16).double(), atol=1e-5, rtol=0)
    level = v / (v + RIDGE * v.mean())
    found = torch.linalg.eigvalsh(torch.cov(z.T))
    torch.testing.assert_close(found / found[-1], level / level[-1], atol=2e-3, rtol=0)
    assert z.std() == pytest.approx(SPREAD, rel=1e-3)
    assert v[0] < 0.05 * v[-1]  # they were not level before


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
    with pytest.raises(ValidationError, match="'triplet', 'prototype' or 'none'"):
        tune(model, pairs, documents_seen=60, documents=6, lr=1.0, loss="ranknet")


def test_the_same_pairs_in_the_same_order_give_the_same_bits(pairs, tiny):
    def run(seed):
        model = tiny()
        tune(
            model, pairs, documents_seen=24, documents=4, lr=1e-3, seed=seed, micro_batch_tokens=40
        )
        return weights(model)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


# ---------------------------------------------------------------- negatives


@pytest.mark.parametrize("loss", ["mnrl", "opl", "contrastive", "triplet"])
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
    options = dict(documents_seen=8, lr=1e-3, explicit_negatives=int(documents == 1))
    with pytest.raises(TrainingError, match=f"{needs}.*{way_out}"):
        tune(model, pairs, documents=documents, loss=loss, **options)
    assert torch.equal(weights(model), before)
    assert pairs.documents.rows == [None] * len(pairs.documents)
    untokenised = Pairs([judged(qrels, documents=texts)], None, 0)
    with pytest.raises(TrainingError, match="needs documents that do not answer a query"):
        untokenised.check_negatives(loss)
    assert len(tune(model, pairs, loss="prototype", documents=1, teacher=tiny(), **options)) == 8


def test_a_document_that_answers_nothing_is_a_negative_unless_negatives_are_of_the_batch(
    tokenizer, tiny
):
    task = judged({"q0": ["d0"], "q1": ["d0"]})
    task.documents["d1"] = "the green hen"
    options = dict(documents_seen=4, lr=1e-3)
    for loss, documents, explicit in (("opl", 1, 0), ("mnrl", 1, 1), ("mnrl", 2, 1)):
        pairs = Pairs([task], tokenizer, 24)
        curve = tune(
            tiny(), pairs, loss=loss, documents=documents, explicit_negatives=explicit, **options
        )
        assert any(line["loss"] > 0 for line in curve)
    for loss in ("mnrl", "opl"):
        with pytest.raises(TrainingError, match="there is 1 document"):
            tune(tiny(), pairs, loss=loss, documents=2, **options)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(loss="mnrl", documents=1), "documents: 1, .* set explicit_negatives: 1 or more"),
        (
            dict(loss="mnrl", documents=2, hard_negatives="bm25"),
            "hard_negatives: bm25, .* set explicit_negatives: 1 or more",
        ),
        (dict(loss="triplet", documents=2, negatives=0), "'triplet' .* set negatives: 1 or more"),
        (dict(loss="contrastive", documents=1, negatives=0), "set negatives: 1 or more"),
    ],
)
def test_a_loss_without_the_negatives_that_it_needs_is_refused_with_the_way_out(
    pairs, tiny, settings, message
):
    with pytest.raises(TrainingError, match=message):
        tune(tiny(), pairs, documents_seen=4, lr=1e-3, **settings)


def test_opl_without_negatives_learns_from_positives_alone(pairs, tiny):
    for documents in (1, 3):
        curve = tune(
            tiny(), pairs, loss="opl", documents=documents, documents_seen=6, negatives=0, lr=1e-4
        )
        assert len(curve) == 6 / documents and "excluded" not in vars(pairs)


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


# ---------------------------------------------------------------- validation in between


def test_evaluations_are_evenly_spread_and_begin_before_the_first_step():
    assert evaluation_steps(10, 5) == {0, 2, 4, 6, 8}
    assert evaluation_steps(7, 2) == {0, 3}
    assert evaluation_steps(2, 10) == {0, 1} and evaluation_steps(9, 0) == set()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_validation_adds_its_score_to_the_curve_and_changes_no_bit(pairs, tiny, tokenizer, dropout):
    held_out = judged(
        {"q0": ["d0"], "q1": ["d1"], "q2": ["d2"]},
        {"q0": "red fox", "q1": "green hen", "q2": "blue owl"},
        {"d0": "the red fox runs", "d1": "the green hen sleeps", "d2": "the blue owl by night"},
    )
    options = dict(documents_seen=18, documents=3, lr=5e-3, loss="mnrl")
    seen = []

    def train(**settings):
        torch.manual_seed(0)
        model = tiny(hidden_dropout_prob=dropout)

        def ndcg():
            torch.rand(3)  # a generator that moves
            ranking = rank(Encoder(model, tokenizer), [held_out], show_progress=False)
            seen.append(metrics.ndcg(ranking["t"][0], held_out.qrels))
            return seen[-1]

        return tune(model, pairs, evaluate=ndcg, **options, **settings), weights(model)

    curve, moved = train(evaluations=3)
    plain, same = train()
    assert torch.equal(moved, same) and len(seen) == 3
    scores = [line.pop("ndcg@10", None) for line in curve]
    assert scores[::2] == seen and scores[1::2] == [None] * 3
    assert curve == plain


# ---------------------------------------------------------------- the learning rate

TRIED = FINETUNE | dict(
    documents=3, documents_seen=24, lr=1e-3, embedding_lr=1e-2, seeds=[7, 8], evaluations=5
)


def tried(*rates: float, **changes) -> Finetune:
    return Finetune(**TRIED | {"lr_choices": list(rates)} | changes)


def test_a_trial_has_its_rate_a_share_of_the_documents_and_the_first_seed():
    settings = tried(2e-4, 4e-3, share=0.5, trial_share=0.25)
    trial = settings.trial(2e-4)
    assert (trial.lr, trial.embedding_lr) == (2e-4, pytest.approx(2e-3))  # ten times, as in the row
    assert trial.seeds == [7] and trial.evaluations == 0 and trial.lr_choices == []
    assert budget(settings) == 12 and budget(trial) == 3
    unchanged = settings.model_dump().keys() - {"lr", "embedding_lr", "share", "seeds"}
    unchanged -= {"evaluations", "lr_choices"}
    assert all(getattr(trial, key) == getattr(settings, key) for key in unchanged)


@pytest.mark.parametrize(
    "scores, best, at_edge",
    [
        ((0.1, 0.3, 0.2), 1e-3, False),
        ((0.1, 0.2, 0.3), 1e-2, True),
        ((0.3, 0.2, 0.1), 1e-4, True),
        ((0.2, 0.3, 0.3), 1e-3, False),  # of equal ones the smaller rate
        ((0.2, 0.1, None), 1e-4, True),  # None: not finite
    ],
)
def test_the_rate_that_is_best_on_validation_is_taken(scores, best, at_edge):
    by_rate = dict(zip((1e-2, 1e-4, 1e-3), (scores[2], scores[0], scores[1])))

    def score(settings):
        if by_rate[settings.lr] is None:
            raise TrainingError(f"not finite at {settings.lr:g}")
        return by_rate[settings.lr]

    choice = choose(tried(*by_rate), score)
    assert choice.trials == by_rate and choice.at_edge is at_edge
    assert (choice.settings.lr, choice.settings.embedding_lr) == (best, pytest.approx(10 * best))
    assert choice.settings.seeds == [7, 8] and budget(choice.settings) == 24


def test_without_choices_nothing_is_tried_and_without_a_score_nothing_is_chosen():
    def score(settings):
        raise TrainingError(f"not finite at {settings.lr:g}")

    for settings in (tried(), tried(1e-4, 1e-3, loss="none"), tried(1e-4, 1e-3, share=0.0)):
        assert choose(settings, score) == (settings, {})
        assert not choose(settings, score).at_edge
    with pytest.raises(TrainingError, match="not finite at 0.0001"):
        choose(tried(1e-4, 1e-3), score)


def test_a_choice_that_was_stopped_goes_on_to_the_same_bits(pairs, tiny, tmp_path):
    """The first trial is done and the second is stopped; the row is trained as if by hand."""
    taken = []

    def train(settings, checkpoints=None):
        torch.manual_seed(settings.seed)
        model = tiny(hidden_dropout_prob=0.1)
        curve = finetune(model, pairs, settings, checkpoints=checkpoints, show_progress=False)
        return model, curve

    def run(folder, stop_at=None):
        def score(settings):
            if settings.lr == stop_at:
                raise KeyboardInterrupt
            kept = Checkpoints(folder, f"{settings.lr:g}", minutes=0) if folder else None
            before = len(list(folder.glob(f"{settings.lr:g}/*"))) if folder else 0
            model, curve = train(settings, kept)
            taken.append((settings.lr, before > 0))
            return float(weights(model).std())  # some number that the training decides

        return choose(tried(1e-3, 5e-3, 1e-2, trial_share=0.5), score)

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=5e-3)
    taken.clear()
    assert run(tmp_path) == whole
    assert taken == [(1e-3, True), (5e-3, False), (1e-2, False)]
    by_hand = Finetune(**TRIED | {"lr": whole.settings.lr, "embedding_lr": 10 * whole.settings.lr})
    assert torch.equal(weights(train(whole.settings)[0]), weights(train(by_hand)[0]))
