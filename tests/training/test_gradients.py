"""Gradients: the passes of a step change its memory, and not its gradient."""

import pytest
import torch
from toys import gradient

from lib import kernels
from lib.model import device
from lib.operators import long_conv
from lib.training.gradients import backward, embed, passes
from lib.training.losses import multiple_negatives_ranking_loss, orthogonal_projection_loss


def values(loss, target):
    def value(d, q):
        if loss == "mnrl":
            return multiple_negatives_ranking_loss(q, d, targets=target)
        wrong = (target + 1) % 6
        return orthogonal_projection_loss(
            torch.cat([q, q]),
            torch.cat([d[target], d[wrong]]),
            torch.cat([torch.ones(len(q)), torch.zeros(len(q))]),
        )

    return value


@pytest.mark.parametrize("micro", [1, 80])
def test_in_bfloat16_too_parts_give_the_gradient_of_the_whole_batch(pairs, tiny, micro):
    docs, queries, target = pairs.batch(0, 0, 6, 2)
    texts, found = (pairs.documents[docs], pairs.queries[queries]), []
    for most in (None, micro):
        model = tiny().train()
        value, half = values("mnrl", torch.tensor(target)), torch.autocast("cpu", torch.bfloat16)
        backward(model, texts, value, pairs.pad_id, most, half)
        found.append(gradient(model))
    assert torch.cosine_similarity(*found, dim=0) > 0.999


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
@pytest.mark.parametrize("micro", [1, 40, 80])
def test_embedding_in_parts_gives_the_gradient_of_the_whole_batch(pairs, tiny, loss, micro):
    docs, queries, target = pairs.batch(0, 0, 6, 2)
    texts = pairs.documents[docs], pairs.queries[queries]
    gradients, losses = [], []
    for most in (None, micro):
        model = tiny().double()
        value = values(loss, torch.tensor(target))
        losses.append(backward(model, texts, value, pairs.pad_id, most))
        gradients.append(gradient(model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-13)


def test_opl_may_be_accumulated_pair_by_pair_and_mnrl_may_not(pairs, tiny):
    """The mean of single gradients is the batch's: the paper's OPL, batch 1, true batch 32."""
    docs, queries, _ = pairs.batch(0, 0, 4, 1)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0])

    def step(loss, groups):
        model = tiny()
        for group in groups:
            d, q = (
                embed(model, [texts[i] for i in group], pairs.pad_id)
                for texts in (pairs.documents[docs], pairs.queries[queries])
            )
            value = (
                orthogonal_projection_loss(q, d, y[group])
                if loss == "opl"
                else multiple_negatives_ranking_loss(q, d)
            )
            (value * len(group) / 4).backward()
        return gradient(model)

    whole, single = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
    torch.testing.assert_close(step("opl", whole), step("opl", single), rtol=1e-4, atol=2e-6)
    assert step("mnrl", single).abs().max() < 1e-6 < 1e-3 < step("mnrl", whole).abs().max()


def test_dropout_falls_on_the_same_units_in_both_passes(pairs, tiny):
    """Otherwise the gradient of the loss would be carried into another network."""
    docs, queries, target = pairs.batch(0, 0, 6, 1)
    texts = pairs.documents[docs], pairs.queries[queries]
    seen = []
    model = tiny(hidden_dropout_prob=0.5).train()
    model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.pooler_output.detach().clone())
    )
    torch.manual_seed(0)
    backward(model, texts, values("mnrl", torch.tensor(target)), pairs.pad_id, 40)
    half = len(seen) // 2
    assert half > 2 and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:]))


def step(pairs, count=6):
    docs, queries, target = pairs.batch(0, 0, count, 2)
    texts = pairs.documents[docs], pairs.queries[queries]
    return texts, values("mnrl", torch.tensor(target))


@pytest.mark.parametrize("back_end", ["definition", "torch", "auto"])
def test_filters_shared_by_all_passes_give_the_gradient_of_each_pass_by_itself(
    pairs, tiny, back_end
):
    texts, loss = step(pairs)
    options = dict(num_hidden_layers=2, hidden_size=32)
    shared, single = (tiny(**options).double() for _ in range(2))
    with kernels.use(back_end):
        value = backward(shared, texts, loss, pairs.pad_id, 40)
        exact = loss(*(embed(single, rows, pairs.pad_id, 40) for rows in texts))
        exact.backward()
    assert value == pytest.approx(exact.item(), abs=1e-12)
    torch.testing.assert_close(gradient(shared), gradient(single), rtol=1e-9, atol=1e-13)


def test_rows_that_a_gpu_pads_rows_have_the_gradient_of_the_rows(pairs, tiny, monkeypatch):
    """The filters of a step reach as far as its filled rows, where torch does without the kernels.

    On one H200 a row of 31,671 tokens was filled up to 31,680, and its filters were not.
    """
    docs, queries, target = pairs.batch(0, 0, 6, 2)
    texts, found = (pairs.documents[docs], pairs.queries[queries]), []
    assert max(len(row) for row in texts[0]) % 64
    for fills in (False, True):
        monkeypatch.setattr(device, "pads_rows", lambda model, fills=fills: fills)
        model = tiny(max_position_embeddings=100).double()
        backward(model, texts, values("mnrl", torch.tensor(target)), pairs.pad_id, 80)
        found.append(gradient(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)


def test_a_step_computes_its_filters_once_however_many_its_passes(pairs, tiny, monkeypatch):
    computed, whole = [], long_conv.batched_kernels

    def count(filters, length):
        computed.append((len(filters), length))
        return whole(filters, length)

    monkeypatch.setattr(long_conv, "batched_kernels", count)
    monkeypatch.setattr(long_conv.ImplicitFilter, "hidden", None)
    texts, loss = step(pairs)
    assert sum(len(passes(rows, 40)) for rows in texts) > 3
    backward(tiny(num_hidden_layers=2).train(), texts, loss, pairs.pad_id, 40)
    assert computed == [(4, max(map(len, texts[0])))]  # two filters in each of two layers


def test_a_batched_product_computes_the_filters_of_the_definition(tiny):
    model = tiny(num_hidden_layers=2).double()
    filters = [m for m in model.modules() if isinstance(m, long_conv.ImplicitFilter)]
    single = [k for f in filters for k in f.before_decay(f.hidden(20))]
    for batched, kernel in zip(long_conv.batched_kernels(filters, 20), single, strict=True):
        torch.testing.assert_close(batched, kernel, rtol=1e-12, atol=1e-14)


def test_a_second_pass_over_the_same_groups_has_the_bits_of_a_single_one(pairs, tiny):
    """One pass of documents and one of queries, embedded once or twice."""
    texts, loss = step(pairs)
    found = []
    for most in (None, max(len(rows) * max(map(len, rows)) for rows in texts)):
        model = tiny().train()
        value = backward(model, texts, loss, pairs.pad_id, most)
        found.append((value, gradient(model)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
