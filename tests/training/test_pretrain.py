"""Pretraining: what a step does, and what stops it."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toys import SENTENCES, learn, weights

from lib import kernels
from lib.model import device
from lib.model.m2bert import M2BertForMaskedLM
from lib.model.twins import MIXERS
from lib.pipeline.errors import TrainingError
from lib.training import pretrain as pretraining
from lib.training import text as module
from lib.training.pretrain import mlm_accuracy, seed_dropout
from lib.training.text import PretrainingText


def test_how_a_step_is_bucketed_does_not_change_its_gradient(text, tiny, monkeypatch):
    """The loss is the mean over the step's targets, in buckets or each example alone."""
    curves, models = [], []
    for most in (None, 1):
        model = tiny(M2BertForMaskedLM)
        monkeypatch.setattr(
            module,
            "bucket_by_length",
            lambda lengths, _=None, most=most: (
                [[i] for i in range(len(lengths))] if most else [list(range(len(lengths)))]
            ),
        )
        # Masks are drawn bucket by bucket: mask the same tokens by masking none at random.
        monkeypatch.setattr(
            module,
            "mask_tokens",
            lambda ids, real, tokenizer, rate, generator: (
                ids,
                torch.where((torch.arange(ids.shape[1]) % 3 == 1) & real.bool(), ids, -100),
            ),
        )
        curves.append(learn(model, text, tokens=128, batch_tokens=128, lr=1e-3))
        models.append(weights(model))
    assert curves[0][0]["loss"] == pytest.approx(curves[1][0]["loss"], abs=1e-5)
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=2e-4)


def test_rows_that_a_gpu_pads_rows_teach_what_the_rows_teach(text, tiny, monkeypatch):
    longest = {max(len(row) for row in bucket) for bucket in text.batch(0, 0, 64, "short", 0.3)}
    assert max(longest) % 64
    models = []
    for fills in (False, True):
        monkeypatch.setattr(device, "pads_rows", lambda model, fills=fills: fills)
        models.append(tiny(M2BertForMaskedLM, max_position_embeddings=100))
        learn(models[-1], text, tokens=128, batch_tokens=64, mixture="short", lr=1e-3)
    torch.testing.assert_close(*map(weights, models), rtol=0, atol=2e-4)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_head_in_chunks_has_the_loss_and_gradient_of_the_whole(text, tiny, monkeypatch, rows):
    ids, labels, mask = next(text.masked(text.batch(0, 1, 200, "mixed", 0.3), 0.3, 1, 0))
    whole, model = tiny(M2BertForMaskedLM), tiny(M2BertForMaskedLM)
    monkeypatch.setattr(pretraining, "LOGITS", {"cpu": rows * model.config.vocab_size})
    n = int((labels > 0).sum())
    assert n > 6
    out = whole(ids, mask, labels=labels)
    (out.loss / 2).backward()
    loss, hits = pretraining.backward(model, ids, labels, mask, 0, targets=2 * n)
    assert loss.item() == pytest.approx(out.loss.item() / 2, rel=1e-6)
    assert int(hits) == int((out.logits.argmax(-1) == labels[labels > 0]).sum())
    for (name, expected), found in zip(whole.named_parameters(), model.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_pass_without_targets_adds_nothing(text, tiny):
    ids, labels, mask = next(text.masked(text.batch(0, 1, 200, "mixed", 0.3), 0.0, 1, 0))
    model = tiny(M2BertForMaskedLM)
    assert [float(x) for x in pretraining.backward(model, ids, labels, mask, 0, 9)] == [0.0, 0.0]
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_step_without_targets_has_loss_0_and_leaves_the_gradient_at_0(text, tiny):
    """Nothing was masked: the step of a text of three tokens and a rate of 0.15 may be one."""
    model = tiny(M2BertForMaskedLM)
    curve = learn(model, text, tokens=64, batch_tokens=32, mask_rate=0.0, lr=1e-3)
    assert [line["loss"] for line in curve] == [0.0, 0.0]
    assert [line["accuracy"] for line in curve] == [0.0, 0.0]


def test_a_pass_reads_nothing_back_from_its_device(text, tiny, monkeypatch):
    """On the device "meta" there is nothing to read: whatever waits for a GPU raises there."""
    ids, labels, mask = next(text.masked(text.batch(0, 1, 200, "mixed", 0.3), 0.3, 1, 0))
    mask[0, 9:], labels[0, 9:] = 0, -100
    model = tiny(M2BertForMaskedLM).to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it has none there
    with kernels.use("definition"):
        loss, hits = pretraining.backward(model, ids, labels, mask, 0, targets=9)
    assert loss.is_meta and hits.is_meta
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_the_budget_holds_where_one_example_has_more_tokens_than_a_step(text, tiny):
    for budget in (800, 3_000):
        curve = learn(tiny(M2BertForMaskedLM), text, tokens=budget, batch_tokens=10, lr=1e-3)
        assert budget / 2 < curve[-1]["tokens"] < 2 * budget


@pytest.mark.parametrize("mixer", ["long_conv", *MIXERS])
def test_pretraining_learns_and_counts_tokens_not_seconds(text, tiny, mixer):
    model = tiny(M2BertForMaskedLM, mixer=mixer)
    curve = learn(model, text, tokens=12_000, batch_tokens=200, lr=5e-3)
    assert len(curve) == 60 and curve[-1]["tokens"] >= 12_000
    assert np.mean([line["loss"] for line in curve[-5:]]) < 0.8 * np.mean(
        [line["loss"] for line in curve[:5]]
    )
    assert not model.training


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_model(text, tiny):
    def run(seed):
        model = tiny(M2BertForMaskedLM)
        learn(model, text, tokens=600, batch_tokens=200, lr=1e-3, seeds=[seed])
        return weights(model)

    first, second, other = run(1), run(1), run(2)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_loss_that_is_not_finite_stops_at_its_step_with_a_way_out(text, tiny):
    model = tiny(M2BertForMaskedLM)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(TrainingError, match=r"pretraining: the loss is nan at step 0 .*lower lr"):
        learn(model, text, tokens=1_000, batch_tokens=200, lr=1e-3)


def test_a_mixture_without_its_text_is_refused(tokenizer, tiny):
    text = PretrainingText.from_texts([" ".join(SENTENCES)], [], tokenizer, length=16)
    line = (
        "has no long text that fills 16 tokens, which mixture 'mixed' draws from: add some to the "
        "pretraining text, or set mixture: short$"
    )
    with pytest.raises(TrainingError, match=f"^the training text {line}"):
        text.check("mixed", "the training text")
    assert learn(tiny(M2BertForMaskedLM), text, tokens=0, batch_tokens=50, lr=1e-3) == []


def test_accuracy_is_the_share_of_masked_tokens_and_its_interval_holds_it(text, tiny, monkeypatch):
    """Against the definition: the largest logit of the whole head, at each masked position."""
    model = tiny(M2BertForMaskedLM)
    learn(model, text, tokens=4000, batch_tokens=200, lr=1e-2)
    monkeypatch.setattr(pretraining, "LOGITS", {"cpu": 3 * model.config.vocab_size})
    accuracy, low, high = mlm_accuracy(model, text, batches=3, batch_tokens=400)
    right = []
    for step in range(3):
        batch = text.batch(step, 1, 400, "mixed", variable_share=0.30)
        for ids, labels, mask in text.masked(batch, 0.15, 1, step):
            guesses = model(ids, mask).logits.argmax(-1)
            right.append((guesses == labels)[labels > 0])
    assert accuracy == pytest.approx(torch.cat(right).float().mean().item())
    assert 0 <= low < accuracy < high


def test_dropout_drops_in_training_only_and_leaves_the_model_as_it_was(text, tiny):
    model = tiny(M2BertForMaskedLM)
    shares = []
    ids = torch.arange(5, 15)[None]
    forward = model.model.forward

    def watched(*arguments, **options):
        modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        shares.append([(module.p, module.training) for module in modules])
        return forward(*arguments, **options)

    model.model.forward = watched
    learn(model, text, tokens=400, batch_tokens=200, lr=1e-3, dropout=0.1)
    assert len(shares) > 0 and all(row == [(0.1, True)] * 2 for row in shares)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.0, 0.0]


def test_dropout_is_a_function_of_seed_step_and_pass(text, tiny, monkeypatch):
    """Whatever drew from torch's generator before; other units in other passes and steps."""

    def run(noise, dropout=0.1, seed=5):
        model = tiny(M2BertForMaskedLM)
        torch.manual_seed(noise)
        learn(model, text, tokens=600, batch_tokens=200, lr=1e-3, dropout=dropout, seeds=[seed])
        return weights(model)

    first, again = run(noise=1), run(noise=2)
    assert torch.equal(first, again) and not torch.equal(first, run(noise=1, dropout=0.0))
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for seed, step, number in itertools.product((1, 2), (0, 1), (0, 1)):
        seed_dropout(SimpleNamespace(seed=seed, dropout=0.1), step, number)
    seed_dropout(SimpleNamespace(seed=1, dropout=0.0), 0, 0)
    assert len(seeds) == len(set(seeds)) == 8
