"""The optimizer of pretraining: the authors' decay, and rates of the filters' own."""

import re

import pytest
import torch
from toys import PRETRAIN, learn, weights

from lib.model.m2bert import M2BertForMaskedLM
from lib.pipeline.settings import Pretrain
from lib.training.pretrain import optimizer


def settings(**changes) -> Pretrain:
    options = dict(tokens=1, batch_tokens=1, lr=5e-4, embedding_lr=5e-4)
    return Pretrain(**PRETRAIN | options | changes)


def set_rates(optim, share: float) -> None:
    """As `optim.train` does: a share of each group's peak."""
    for group in optim.param_groups:
        group["lr"] = group["initial_lr"] = group.get("initial_lr", group["lr"])
        group["lr"] *= share


def give_gradients(model, size: float) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, size)


def composers(p, grads, peak, shares, decay, betas=(0.9, 0.98), eps=1e-6):
    """Composer's DecoupledAdamW, step by step in float64.

    p <- (1 - share decay) p - share peak m̂ / (√v̂ + ε): mosaicml/composer,
    composer/optim/decoupled_weight_decay.py.
    """
    p, m, v = p.double(), 0.0, 0.0
    for step, (grad, share) in enumerate(zip(grads, shares), start=1):
        p = p * (1 - share * decay)
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        bias = 1 - betas[0] ** step, 1 - betas[1] ** step
        p = p - share * peak * (m / bias[0]) / ((v / bias[1]) ** 0.5 + eps)
    return p


@pytest.mark.parametrize(
    "lr, embedding_lr, filter_rate", [(5e-4, 5e-4, 1.0), (8e-4, 2e-3, 1.0), (8e-4, 8e-4, 0.25)]
)
def test_decay_is_that_of_composers_decoupled_adamw(tiny, lr, embedding_lr, filter_rate):
    model, decay = tiny(M2BertForMaskedLM), 1e-2  # large enough to be seen
    taps = re.compile(r"(gated|residual)_filter\.(inputs|freq|deltas|back|ahead)")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = dict(lr=lr, embedding_lr=embedding_lr, filter_rate=filter_rate)
    optim = optimizer(model, settings(**rates, weight_decay=decay))
    grads, shares = [0.3, -0.1, 0.2], [0.5, 1.0, 0.25]
    for grad, share in zip(grads, shares):
        give_gradients(model, grad)
        set_rates(optim, share)
        optim.step()
    for name, p in model.named_parameters():
        peak = embedding_lr if "word_embeddings" in name else lr
        peak *= filter_rate if taps.search(name) else 1.0
        expected = composers(before[name], grads, peak, shares, decay)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_the_peak_rate_does_not_scale_the_decay(tiny):
    """Without a gradient, a step at the peak takes 1e-5 of every weight, whatever the rate is."""
    for lr in (5e-4, 8e-4, 1e-2):
        model = tiny(M2BertForMaskedLM).double()
        optim = optimizer(model, settings(lr=lr, embedding_lr=3 * lr))
        before = weights(model)
        give_gradients(model, 0.0)
        optim.step()
        torch.testing.assert_close(weights(model), (1 - 1e-5) * before, rtol=1e-12, atol=0)


def test_in_adamws_units_the_papers_decay_is_a_fiftieth_of_the_weight_times_the_rate(tiny):
    for lr, decay in ((5e-4, 0.02), (8e-4, 0.0125)):
        optim = optimizer(tiny(M2BertForMaskedLM), settings(lr=lr, embedding_lr=lr))
        (group,) = optim.param_groups
        assert group["weight_decay"] == pytest.approx(decay)
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6


def test_intended_groups_give_the_filters_rates_and_decays_of_their_own(tiny):
    model = tiny(M2BertForMaskedLM, num_hidden_layers=2)
    optim = optimizer(model, settings(parameter_groups="intended", embedding_lr=2e-3))
    of = {id(p): group for group in optim.param_groups for p in group["params"]}
    assert len(of) == len(list(model.parameters())) and len(optim.param_groups) == 4
    counts = {"z": 0, "mlp": 0}
    for name, p in model.named_parameters():
        got = of[id(p)]["lr"], of[id(p)]["weight_decay"]
        parts = name.split(".")
        if parts[-1] == "inputs":
            counts["z"] += 1
            assert got == (1e-5, 0.0), name
        elif parts[-1] == "freq" or "back" in parts or "ahead" in parts:
            counts["mlp"] += 1
            assert got == (1e-3, 0.1), name
        else:
            lr = 2e-3 if "word_embeddings" in name else 5e-4
            assert got == pytest.approx((lr, 1e-5 / lr)), name
    # Two layers of two filters: z; the frequencies, and seven tensors of each of two MLPs.
    assert counts == {"z": 4, "mlp": 4 * (1 + 2 * 7)}


def test_a_rate_of_0_leaves_the_weights_alone(text, tiny):
    model = tiny(M2BertForMaskedLM)
    before = weights(model)
    learn(model, text, tokens=400, batch_tokens=200, lr=0.0)
    assert torch.equal(weights(model), before)


def test_parameter_groups_change_what_is_learned(text, tiny):
    models = [tiny(M2BertForMaskedLM) for _ in range(2)]
    for model, groups in zip(models, ("none", "intended")):
        learn(model, text, tokens=600, batch_tokens=200, lr=5e-3, parameter_groups=groups)
    moved = {
        name: (dict(models[1].named_parameters())[name] - p).abs().max().item()
        for name, p in models[0].named_parameters()
    }
    assert moved["model.layers.0.mixer.gated_filter.inputs"] > 1e-3
