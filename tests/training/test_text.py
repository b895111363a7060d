"""Pretraining text: buckets, examples and masks of a step."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import SENTENCES

from lib.pipeline.errors import TrainingError
from lib.training import text as module
from lib.training.text import (
    Examples,
    PretrainingText,
    apportioned,
    bucket_by_length,
    mask_tokens,
)


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


def test_stored_rows_are_views_of_one_array():
    rows = [[5, 6, 7], [8], [], [9, 10]]
    examples = Examples.of(rows)
    assert len(examples) == 4 and [row.tolist() for row in examples] == rows
    assert examples.tokens.dtype == np.int32 and examples.ends.tolist() == [0, 3, 4, 4, 6]
    assert all(np.shares_memory(row, examples.tokens) for row in examples if len(row))
    assert [row.tolist() for row in examples.cut(2, 1, 2)] == [
        [1, 5, 6, 2],
        [1, 7, 8, 2],
        [1, 9, 10, 2],
    ]
    assert len(examples.cut(7, 1, 2)) == 0 == len(Examples.of([]))


def test_variable_examples_end_with_their_text_and_the_others_fill_the_maximum(text, tokenizer):
    ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    lengths = {len(row) for row in text.variable[""]}
    assert min(lengths) >= 10 and max(lengths) == 16 and len(lengths) > 1
    assert {len(row) for row in text.maximum[""]} == {16}
    for examples in (text.variable[""], text.maximum[""]):
        assert all([row[0], row[-1]] == ends for row in examples)
    stream = tokenizer(" ".join(SENTENCES), add_special_tokens=False)["input_ids"] * 6
    inner = np.concatenate([row[1:-1] for row in text.maximum[""]]).tolist()
    # The texts run into each other, and the rest is left over.
    assert inner == stream[: len(inner)] and len(stream) - len(inner) < 14


def test_a_text_shorter_than_ten_tokens_is_no_example(tokenizer):
    short = ["the fox", "the red fox runs by night the red fox"]
    text = PretrainingText.from_texts(short, [], tokenizer, length=16)
    assert [len(row) for row in text.variable[""]] == [11] and text.maximum == {}


@given(st.integers(0, 400), st.integers(1, 9), st.integers(0, 9))
def test_pieces_of_random_widths_are_the_stream_and_leave_less_than_one_of_it(T, least, more):
    stream, most = Examples.of([list(range(T))]), least + more
    pieces = [row.tolist() for row in stream.cut_at_random(least, most, -1, -2)]
    assert all([row[0], row[-1]] == [-1, -2] for row in pieces)
    assert {len(row) - 2 for row in pieces} <= set(range(least, most + 1))
    inner = [token for row in pieces for token in row[1:-1]]
    assert inner == list(range(len(inner))) and T - len(inner) < most


def test_uniform_lengths_are_each_as_frequent_whatever_the_texts_are(tokenizer):
    text = PretrainingText.from_texts(SENTENCES * 400, [], tokenizer, 16, lengths="uniform")
    count = Counter(len(row) for row in text.variable[""])
    expected = count.total() / 7
    assert sorted(count) == [10, 11, 12, 13, 14, 15, 16] and expected > 100
    assert all(abs(n - expected) < 4 * expected**0.5 for n in count.values())
    # Each of these sentences is too short to be an example.
    assert not PretrainingText.from_texts(SENTENCES * 400, [], tokenizer, 16).variable


def stored(sizes: dict[str, int], length: int, first: int) -> dict[str, Examples]:
    """Examples of one length by source; no two rows are equal."""
    stored = {}
    for source, n in sizes.items():
        rows = np.arange(first, first + n)[:, None] * np.ones(length, dtype=int)
        stored[source], first = Examples.of(rows.tolist()), first + n
    return stored


def drawn(text: PretrainingText, steps: range, tokens: int, mixture="mixed", seed=3) -> Counter:
    """How often the steps draw each row, by its first number."""
    return Counter(
        int(row[0])
        for step in steps
        for rows in text.batch(step, seed, tokens, mixture, 0.30)
        for row in rows
    )


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.integers(0, 99))
def test_an_epoch_visits_every_example_once(variable, maximum, tokens, steps):
    """After any step two examples of a stream have been drawn equally often, or once more."""
    text = PretrainingText(
        stored({"": variable}, 10, first=0), stored({"": maximum}, 16, first=1_000), None, 16
    )
    count = drawn(text, range(steps), tokens)
    for first, n in ((0, variable), (1_000, maximum)):
        visits = [count[i] for i in range(first, first + n)]
        assert max(visits) - min(visits) <= 1
    # Steps are of one size on average, and never empty.
    lengths = sum(count[i] * (10 if i < 1_000 else 16) for i in count)
    assert count.total() >= steps
    if tokens > 16 and steps > 50:
        assert lengths == pytest.approx(steps * tokens, rel=0.1)


def test_epochs_differ_in_their_order_and_so_do_seeds():
    text = PretrainingText(stored({"": 50}, 10, first=0), {}, None, 16)

    def order(epoch, seed):
        batches = (
            text.batch(step, seed, 100, "short", 0.3) for step in range(5 * epoch, 5 * epoch + 5)
        )
        return [int(row[0]) for batch in batches for rows in batch for row in rows]

    orders = [order(0, 1), order(1, 1), order(0, 2)]
    assert all(sorted(some) == list(range(50)) for some in orders)
    assert len(set(map(tuple, orders))) == 3


def test_the_mixture_is_that_of_table_2_in_every_thousand_examples():
    """10, 10, 10 % of variable length and 24, 23, 23 % of the maximum, whatever each source has."""
    sizes = {"wikipedia": 70, "c4": 900, "bookcorpus": 40}
    variable, maximum = stored(sizes, 16, first=0), stored(sizes, 16, first=2_000)
    text = PretrainingText(variable, maximum, None, 16)
    starts = {"wikipedia": 0, "c4": 70, "bookcorpus": 970}
    for mixture, expected in {
        "mixed": {"c4": (100, 240), "wikipedia": (100, 230), "bookcorpus": (100, 230)},
        "short": {"c4": (333, 0), "wikipedia": (334, 0), "bookcorpus": (333, 0)},
        "long": {"c4": (0, 343), "wikipedia": (0, 329), "bookcorpus": (0, 328)},
    }.items():
        for steps in (range(0, 20), range(20, 40)):
            count = drawn(text, steps, 50 * 16, mixture)
            for source, shares in expected.items():
                rows = range(starts[source], starts[source] + sizes[source])
                assert tuple(sum(count[i + kind] for i in rows) for kind in (0, 2_000)) == shares


def test_sources_that_the_paper_does_not_name_have_equal_shares():
    text = PretrainingText({}, stored({"c4": 9, "laws": 2}, 16, first=0), None, 16)
    count = drawn(text, range(20), 50 * 16, "long")
    assert sum(count[i] for i in range(9)) == 500 == sum(count[i] for i in (9, 10))


def test_whole_numbers_in_proportion_add_up():
    assert apportioned([0.3, 0.7], 1000) == (300, 700)
    assert apportioned([1, 1, 1], 10) == (4, 3, 3)
    assert apportioned([0.5, 0.26, 0.24], 10) == (5, 3, 2)
    assert apportioned([1.0], 7) == (7,)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=6), st.integers(1, 1000))
def test_apportioned_numbers_are_within_one_of_their_shares(shares, total):
    counts = apportioned(shares, total)
    assert sum(counts) == total
    for share, count in zip(shares, counts):
        assert abs(count - share / sum(shares) * total) < 1 + 1e-6


def test_a_step_is_a_function_of_seed_and_step_alone(text):
    def flat(step, seed):
        batch = text.batch(step, seed, 128, "mixed", 0.3)
        return [row.tolist() for rows in batch for row in rows]

    later = [flat(step, 3) for step in range(5, 15)]  # as after an interruption
    module.permutation.cache_clear()
    module.block.cache_clear()
    assert later == [flat(step, 3) for step in range(15)][5:]
    assert flat(5, 4) != flat(5, 3) != flat(6, 3)


def test_a_step_larger_than_memory_goes_through_in_passes(text, monkeypatch):
    whole = [row.tolist() for group in text.batch(0, 0, 512, "mixed", 0.3) for row in group]
    monkeypatch.setattr(module, "PASS_TOKENS", 48)
    passes = text.batch(0, 0, 512, "mixed", 0.3)
    assert [row.tolist() for group in passes for row in group] == whole and len(passes) > 10
    assert all(len(group) * len(group[0]) <= 48 for group in passes)


def test_a_text_says_which_mixtures_it_can_serve(text, tokenizer):
    """One that passes serves every step; one that does not would have stopped a step."""
    long = "long text that fills 16 tokens"
    short = PretrainingText.from_texts([" ".join(SENTENCES)], ["the fox"], tokenizer, length=16)
    for some, refused in (
        (text, {}),
        (short, {"long": f"no {long}", "mixed": f"no {long}"}),
        (
            PretrainingText({}, text.maximum, tokenizer, 16),
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
                with pytest.raises(AssertionError):
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
