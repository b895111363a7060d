"""Rows of tokens from disk are those that tokenising gives, or are refused."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.model import token_rows, tokens
from lib.pipeline.errors import CorpusError

TEXTS = [
    "",
    "red fox",
    "the owl sleeps by night " * 30,
    "unbelievable \ud800 foxes",
    "red  fox",
    "é",
]


@pytest.fixture
def corpus(tmp_path, tokenizer):
    rows = dict(zip(TEXTS, tokens.tokenize_whole(TEXTS, tokenizer)))
    counts = np.arange(len(tokenizer))
    token_rows.write(tmp_path / "tokens", rows, tokenizer, counts)
    return tmp_path


@pytest.fixture
def other(tokenizer):
    """The same tokenizer in another object, as a model's folder gives it."""
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*TEXTS, "a text that is not kept"]), max_size=6), st.integers(1, 99)
)
def test_rows_from_disk_are_those_that_tokenising_gives(corpus, tokenizer, other, texts, length):
    assert token_rows.known(tokenizer) is None
    expected = tokens.tokenize(texts, tokenizer, length)
    assert tokens.tokenize(texts, token_rows.use(other, corpus), length) == expected
    assert tokens.tokenize_whole(texts, other) == tokens.tokenize_whole(texts, tokenizer)


def test_what_is_kept_is_not_tokenised_again(corpus, other, monkeypatch):
    token_rows.use(other, corpus)
    monkeypatch.setattr(type(other), "__call__", lambda *_, **__: pytest.fail("tokenised"))
    assert [len(row) for row in tokens.tokenize(TEXTS, other, 9)[0]] == [2, 4, 9, 8, 4, 3]


def test_the_rows_of_another_tokenizer_are_not_used(corpus, other):
    other.backend_tokenizer.enable_truncation(5)  # no other tokenizer: each call sets it
    assert token_rows.known(token_rows.use(other, corpus)) is not None
    other.add_tokens("owl sleeps")
    fresh = type(other)(tokenizer_object=other.backend_tokenizer)
    assert token_rows.known(token_rows.use(fresh, corpus)) is None
    assert token_rows.known(token_rows.use(fresh, corpus / "elsewhere")) is None


@pytest.mark.parametrize(
    "name, change",
    [
        ("ids", lambda x: x[:-1]),
        ("ids", lambda x: x + 999),
        ("ends", lambda x: x[::-1]),
        ("texts", lambda x: x[:-1]),
        ("texts", lambda x: x[:, :8]),
    ],
)
def test_damaged_rows_are_refused(corpus, other, name, change):
    path = corpus / f"tokens/{name}.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(CorpusError, match="tokens is damaged: run the stage|tokens is damaged"):
        token_rows.use(other, corpus)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorpusError, match=rf"{name}.npy cannot be read"):
        token_rows.use(other, corpus)


def test_counts_are_those_of_their_tokenizer_alone(corpus, other):
    assert token_rows.counts(other, corpus).tolist() == list(range(len(other)))
    other.add_tokens("owl sleeps")
    fresh = type(other)(tokenizer_object=other.backend_tokenizer)
    for tokenizer, folder in ((fresh, corpus), (other, corpus / "elsewhere")):
        with pytest.raises(CorpusError, match="is of another tokenizer, or was never written"):
            token_rows.counts(tokenizer, folder)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x - 1, lambda x: x.astype(float)])
def test_damaged_counts_are_refused(corpus, other, change):
    path = corpus / "tokens" / "counts.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(CorpusError, match="counts.npy is damaged"):
        token_rows.counts(other, corpus)
    path.unlink()
    with pytest.raises(CorpusError, match="counts.npy cannot be read"):
        token_rows.counts(other, corpus)
