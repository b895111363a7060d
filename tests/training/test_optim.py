"""Optimizer, schedule, training loop and mixed precision."""

import math
import re

import pytest
import torch
from toys import learn, tune, weights

from lib.kernels import support
from lib.model.m2bert import M2BertForMaskedLM
from lib.pipeline.errors import TrainingError
from lib.training import optim as module
from lib.training.optim import optimizer, train, warmup_then_linear
from lib.training.resume import Checkpoints


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


def test_the_taps_of_a_filter_have_a_share_of_the_rate_and_its_gain_the_whole(tiny):
    model = tiny()
    optim = optimizer(model, lr=1e-3, weight_decay=0.1, embedding_lr=1e-2, filter_rate=0.25)
    rates = {id(p): group["lr"] for group in optim.param_groups for p in group["params"]}
    slow = {name for name, p in model.named_parameters() if rates[id(p)] == 2.5e-4}
    taps = re.compile(r"(gated|residual)_filter\.(inputs|freq|deltas|back|ahead)")
    assert slow == {name for name, _ in model.named_parameters() if taps.search(name)}
    assert any("residual_filter" in name for name in slow)


def test_at_a_share_of_0_the_kernels_of_a_filter_stay_as_they_are(tiny):
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim = optimizer(model, lr=1e-2, weight_decay=0.1, filter_rate=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optim.step()
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    taps = re.compile(r"(gated|residual)_filter\.(?!bias)")
    assert same == {name for name in before if taps.search(name)}


def steps(gradient, count: int, *arguments, **options):
    """Train one weight; gradient(step, weight) adds to its gradient and returns the loss."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)

    def line(step: int) -> dict:
        return dict(loss=gradient(step, model.weight), tokens=100)

    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    curve = train(model, optim, [1.0] * count, line, "toys", 5, *arguments, **options)
    return model.weight.item(), curve


def test_a_step_is_the_rate_times_the_clipped_gradient():
    def gradient(step, weight):
        weight.grad = torch.tensor([[0.5 if step else 40.0]])  # clipped to a norm of 1
        return 7.0 - step

    weight, curve = steps(gradient, 2, show_progress=False)
    assert weight == pytest.approx(1 - 0.1 * 1.0 - 0.1 * 0.5, abs=1e-6)
    assert curve == [
        {"step": 0, "tokens": 100, "loss": 7.0, "lr": 0.1},
        {"step": 1, "tokens": 200, "loss": 6.0, "lr": 0.1},
    ]


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights():
    weights = []

    def gradient(step, weight):
        weights.append(weight)
        weight.grad = torch.full((1, 1), math.nan if step == 2 else 0.5)
        return 1.0

    with pytest.raises(TrainingError, match="^toys: the norm of the gradient is nan at step 2 .lr"):
        steps(gradient, 4, show_progress=False)
    assert weights[-1].item() == pytest.approx(0.9, abs=1e-6)


def test_losses_on_a_gpu_are_read_every_fifty_steps_and_the_first_bad_step_is_named(monkeypatch):
    """The loss is a tensor that says when it is read; on a GPU, reading waits for all before it."""
    monkeypatch.setattr(module, "is_remote", lambda value: True)
    reads, taken = [], []

    class Loss(torch.Tensor):
        def item(self):
            reads.append(len(taken))
            return super().item()

    def gradient(step, weight):
        taken.append(step)
        weight.grad = torch.full((1, 1), 0.01)
        return torch.tensor(math.nan if step == bad else step / 7).as_subclass(Loss)

    bad = None
    _, curve = steps(gradient, 120, show_progress=False)
    assert reads == [50] * 50 + [100] * 50 + [120] * 20
    assert [line["loss"] for line in curve] == pytest.approx([i / 7 for i in range(120)])
    assert [line["tokens"] for line in curve] == [100 * (i + 1) for i in range(120)]
    bad = 60
    taken.clear()
    with pytest.raises(TrainingError, match="the loss is nan at step 60 .*seed 5 and step 60"):
        steps(gradient, 120, show_progress=False)
    assert len(taken) == 100


def test_losses_on_a_gpu_are_read_before_a_checkpoint_holds_their_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "is_remote", lambda value: True)
    checkpoints = Checkpoints(tmp_path, "key")
    due = iter([False] * 30 + [True] + [False] * 4 + [True] * 100)
    monkeypatch.setattr(checkpoints, "due", lambda: next(due))

    def gradient(step, weight):
        weight.grad = torch.full((1, 1), 0.01)
        return torch.tensor(math.nan if step == 33 else 1.0)

    with pytest.raises(TrainingError, match="step 33 .* the last checkpoint is .*/key/31$"):
        steps(gradient, 120, checkpoints, show_progress=False)
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["31"]


def test_the_log_has_speed_time_left_loss_and_gradient_at_each_checkpoint(tmp_path, capsys):
    def gradient(step, weight):
        weight.grad = torch.full((1, 1), 0.25)
        return 1.5

    steps(gradient, 4, Checkpoints(tmp_path, "key", minutes=0))
    lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if "2/4" in line]
    assert re.search(r"toys: +50%.*<.*, loss 1.5, gradient 0.25, [\d,]+ tokens/s", lines[-1])


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
