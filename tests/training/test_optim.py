"""Optimizer, schedule and mixed precision."""

import pytest
import torch
from toys import learn, tune, weights

from lib.kernels import support
from lib.model.m2bert import M2BertForMaskedLM
from lib.training.optim import optimizer, warmup_then_linear


def test_the_rate_rises_to_its_peak_then_falls_in_a_line():
    shares = warmup_then_linear(10, 0.2, final=0.1)
    assert shares[:3] == [0.5, 1.0, 1.0] and shares[-1] == pytest.approx(0.1 + 0.9 / 8)
    assert all(a - b == pytest.approx(0.9 / 8) for a, b in zip(shares[2:], shares[3:]))
    assert warmup_then_linear(1, 0.06) == [1.0]


def test_vectors_and_the_filters_inputs_are_not_decayed_and_words_have_a_rate_of_their_own(tiny):
    model = tiny()
    optim = optimizer(model, lr=1e-3, weight_decay=0.1, embedding_lr=1e-2)
    of = {id(p): group for group in optim.param_groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        decayed = p.ndim > 1 and not name.endswith("filter.inputs")
        assert (of[id(p)]["weight_decay"] > 0) == decayed, name
        assert of[id(p)]["lr"] == (1e-2 if "word_embeddings" in name else 1e-3), name


@pytest.mark.parametrize("what", ["pretrain", "finetune"])
def test_bfloat16_trains_the_same_model_up_to_rounding(text, pairs, tiny, monkeypatch, what):
    """Losses and weight changes agree up to rounding, and weights stay float32."""
    monkeypatch.setattr(support, "multiplies_bfloat16", lambda: True)
    curves, moves = [], []
    for precision in ("float32", "bfloat16"):
        model = tiny(M2BertForMaskedLM) if what == "pretrain" else tiny()
        before = weights(model)
        options = dict(precision=precision)
        curves.append(
            learn(model, text, tokens=2_000, batch_tokens=200, lr=1e-3, **options)
            if what == "pretrain"
            else tune(
                model,
                pairs,
                documents_seen=60,
                documents=6,
                lr=1e-3,
                queries_per_document=3,
                **options,
            )
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        moves.append(weights(model) - before)
    exact, half = ([line["loss"] for line in curve] for curve in curves)
    assert half != exact and half == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(*moves, dim=0) > 0.95


def test_without_bfloat16_instructions_training_is_float32_and_the_log_says_so(
    monkeypatch, caplog, text, tiny
):
    monkeypatch.setattr(support, "multiplies_bfloat16", lambda: False)
    models = []
    for precision in ("float32", "bfloat16"):
        models.append(tiny(M2BertForMaskedLM))
        learn(models[-1], text, tokens=600, batch_tokens=200, lr=1e-3, precision=precision)
    assert torch.equal(*map(weights, models))
    assert [record.message for record in caplog.records] == [
        "this processor has no bfloat16 products: float32 instead, which is faster here and more "
        "exact"
    ]
