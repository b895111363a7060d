"""Pretraining text: buckets, examples and masks of a step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import SENTENCES

from lib.pipeline.errors import TrainingError
from lib.training import text as module
from lib.training.text import PretrainingText, bucket_by_length, mask_tokens


def test_texts_are_bucketed_if_padding_would_cost_more_than_another_pass():
    assert bucket_by_length([100, 10, 100, 95, 9], waste_tokens=250) == [[0, 2, 3], [1, 4]]
    assert bucket_by_length([100, 10, 100], waste_tokens=1_000) == [
        [0, 2, 1]
    ]  # too little to be worth it
    assert bucket_by_length([5, 5, 5, 5, 5], most_tokens=14) == [[0, 1], [2, 3], [4]]
    assert bucket_by_length([9, 5, 5], most_tokens=8) == [[0], [1], [2]]  # too long: alone
    assert bucket_by_length([]) == []


@given(st.lists(st.integers(1, 5_000), max_size=60), st.none() | st.integers(1, 20_000))
def test_every_text_is_in_one_bucket_and_none_is_too_large(lengths, most):
    groups = bucket_by_length(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    if most:
        assert all(len(g) == 1 or len(g) * lengths[g[0]] <= most for g in groups)
    for group in groups:
        padded = len(group) * lengths[group[0]]
        assert padded - sum(lengths[i] for i in group) <= 2048 + 0.2 * padded
    assert all(lengths[group[0]] == max(lengths[i] for i in group) for group in groups)


def test_variable_examples_end_with_their_text_and_the_others_fill_the_maximum(text, tokenizer):
    assert {row[0] for row in text.variable} == {tokenizer.cls_token_id} and {
        row[-1] for row in text.variable
    } == {tokenizer.sep_token_id}
    assert (
        all(10 <= len(row) <= 16 for row in text.variable)
        and len({len(row) for row in text.variable}) > 1
    )
    assert text.maximum.shape[1] == 16
    assert (text.maximum[:, 0] == tokenizer.cls_token_id).all() and (
        text.maximum[:, -1] == tokenizer.sep_token_id
    ).all()
    stream = tokenizer(" ".join(SENTENCES), add_special_tokens=False)["input_ids"] * 6
    inner = text.maximum[:, 1:-1].flatten().tolist()
    assert (
        inner == stream[: len(inner)] and len(stream) - len(inner) < 14
    )  # run into each other, the rest left over


def test_a_text_shorter_than_ten_tokens_is_no_example(tokenizer):
    text = PretrainingText.from_texts(
        ["the fox", "the red fox runs by night the red fox"], [], tokenizer, length=16
    )
    assert [len(row) for row in text.variable] == [11] and len(text.maximum) == 0


def test_three_tenths_of_the_examples_are_variable(text):
    def share(mixture):
        rows = [
            row
            for step in range(200)
            for group in text.batch(step, 0, 256, mixture, 0.30)
            for row in group
        ]
        variable = set(map(id, text.variable))
        return np.mean([id(row) in variable for row in rows]), len(rows)

    found, n = share("mixed")
    assert abs(found - 0.30) < 4 * math.sqrt(0.3 * 0.7 / n)
    assert share("short")[0] == 1 and share("long")[0] == 0


def test_a_step_is_a_function_of_seed_and_step_alone(text):
    def flat(step, seed):
        return [
            row.tolist() for group in text.batch(step, seed, 128, "mixed", 0.3) for row in group
        ]

    later = [flat(step, 3) for step in range(5, 15)]  # as after an interruption
    assert later == [flat(step, 3) for step in range(15)][5:]
    assert flat(5, 4) != flat(5, 3) != flat(6, 3)
    assert sum(len(row) for row in flat(0, 0)) >= 128 > sum(len(row) for row in flat(0, 0)) - 16


def test_a_step_larger_than_memory_goes_through_in_passes(text, monkeypatch):
    whole = [row.tolist() for group in text.batch(0, 0, 512, "mixed", 0.3) for row in group]
    monkeypatch.setattr(module, "PASS_TOKENS", 48)
    passes = text.batch(0, 0, 512, "mixed", 0.3)
    assert [row.tolist() for group in passes for row in group] == whole and len(passes) > 10
    assert all(len(group) * len(group[0]) <= 48 for group in passes)


def test_a_text_says_which_mixtures_it_can_serve(text, tokenizer):
    """One that passes serves every draw; one that does not would have stumbled at some draw."""
    long = "long text that fills 16 tokens"
    short = PretrainingText.from_texts([" ".join(SENTENCES)], ["the fox"], tokenizer, length=16)
    for some, refused in (
        (text, {}),
        (short, {"long": f"no {long}", "mixed": f"no {long}"}),
        (
            PretrainingText([], text.maximum, tokenizer, 16),
            {
                "short": "no short text of 10 tokens or more",
                "mixed": "no short text of 10 tokens or more",
            },
        ),
        (
            PretrainingText.from_texts([], [], tokenizer, 16),
            {
                "short": "no short text",
                "long": f"no {long}",
                "mixed": f"no short text of 10 tokens or more and no {long}",
            },
        ),
    ):
        for mixture in ("short", "long", "mixed"):
            if mixture in refused:
                with pytest.raises(TrainingError, match=refused[mixture]):
                    some.check(mixture, "it")
                with pytest.raises((ValueError, IndexError)):
                    some.batch(0, 0, 512, mixture, 0.3)
            else:
                some.check(mixture, "it")
                assert some.batch(0, 0, 512, mixture, 0.3)


def test_masking_has_its_rate_and_berts_proportions(tokenizer):
    special = tokenizer.all_special_ids
    ids = torch.randint(
        len(special), len(tokenizer), (64, 512), generator=torch.Generator().manual_seed(0)
    )
    ids[:, 0], ids[:, 400:] = tokenizer.cls_token_id, tokenizer.pad_token_id
    real = torch.ones_like(ids)
    real[:, 400:] = 0
    hidden, labels = mask_tokens(ids, real, tokenizer, 0.30, torch.Generator().manual_seed(1))
    target = labels != -100
    n = int(target.sum())
    assert not target[:, 0].any() and not target[:, 400:].any()
    assert torch.equal(labels[target], ids[target]) and torch.equal(hidden[~target], ids[~target])
    assert abs(n / (64 * 399) - 0.30) < 4 * math.sqrt(0.21 / (64 * 399))
    masked = (hidden[target] == tokenizer.mask_token_id).float().mean()
    kept = (hidden[target] == ids[target]).float().mean()
    assert abs(masked - 0.8) < 4 * math.sqrt(0.16 / n) and abs(
        kept - 0.1 - 0.1 / (len(tokenizer) - len(special))
    ) < 4 * math.sqrt(0.09 / n)
    assert not torch.isin(
        hidden[target & (hidden != tokenizer.mask_token_id)], torch.tensor(special)
    ).any()
