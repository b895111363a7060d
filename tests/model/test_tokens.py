"""The tokens of a text's beginning are those of the whole text, and cost no more than they are."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lib.corpus.tokenizer import lengths
from lib.model import tokens
from lib.model.tokens import given_tokenizer


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(st.sampled_from("red fox\n\tun🦊.-é红\ud800"), max_size=60),
    gap=st.sampled_from(
        [
            " ",
            "\n",
            "",
            "unbelievable",
            " unbelievable ",
            "红",
            "红e\u0301",
            "un-",
            "🦊",
            "un\u00a0",
            "un—",
            "un\x0b",
            "un\x85",
            "\u2028",
            "。",
        ]
    ),
    times=st.integers(0, 400),
    max_length=st.integers(3, 12),
    reach=st.sampled_from([8, 40, 4096]),
)
def test_tokenising_the_beginning_gives_the_tokens_of_the_whole(
    tokenizer, text, gap, times, max_length, reach
):
    """Only so many characters are tokenised as can matter, and no word is read in half."""
    text = text + gap * times + text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "REACH", reach)
        ids, cut = tokens.tokenize([text], tokenizer, max_length)
    whole = tokenizer(tokens.encodable(text))["input_ids"]
    assert cut == [len(whole) > max_length]
    assert ids == [whole if not cut[0] else whole[: max_length - 1] + whole[-1:]]


def test_a_word_across_the_first_cut_is_read_whole(tokenizer):
    """The first 16 characters per token end inside a word that would end in other pieces."""
    text = " " * (16 * 8 - 4) + "unbelievable red green blue fox hen owl runs"
    ids, cut = tokens.tokenize([text], tokenizer, 8)
    assert tokenizer.convert_ids_to_tokens(ids[0]) == [
        "[CLS]",
        "un",
        "##believ",
        "##able",
        "red",
        "green",
        "blue",
        "[SEP]",
    ]
    assert cut == [True]


@pytest.mark.parametrize(
    "separator", [" ", "\r", "\u00a0", "\u3000", "\u2028", "—", "。", "红", "."]
)
def test_a_million_words_cost_as_much_as_the_first_few(tokenizer, separator):
    seen = []

    def spy(texts, **options):
        return seen.extend(map(len, texts)) or tokenizer(texts, **options)

    tokens.tokenize([f"fox{separator}" * 1_000_000], spy, 32)
    assert max(seen) <= 16 * 32


@given(n=st.integers(0, 60), size=st.integers(1, 20), stride=st.integers(1, 20))
def test_windows_read_every_token_and_end_with_the_text(n, size, stride):
    stride = min(stride, size)
    found = tokens.windows(n, size, stride)
    assert (
        set().union(*(range(start, end) for start, end in found)) == set(range(n))
        and found[-1][1] == n
    )
    assert all(end - start == size for start, end in found[:-1]) and [
        start for start, _ in found
    ] == [i * stride for i in range(len(found))]
    assert len(found) == 1 or found[-2][1] < n  # none is there for nothing


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(st.sampled_from("red fox\n\tun🦊.-é红한\ud800\u00a0—"), max_size=60), max_size=5
    ),
    piece=st.integers(1, 50),
    reach=st.sampled_from([1, 8, 4096]),
)
def test_pieces_give_the_tokens_of_the_whole(tokenizer, texts, piece, reach):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", piece)
        patch.setattr(tokens, "REACH", reach)
        ids = tokens.tokenize_whole(texts, tokenizer)
        cut, _ = tokens.tokenize(texts, tokenizer, 10**4)
    assert ids == cut == [tokenizer(tokens.encodable(text))["input_ids"] for text in texts]


def test_no_call_of_the_tokenizer_gets_more_than_a_piece(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 1000)
    seen = []

    def spy(texts, **options):
        return seen.append(sum(map(len, texts))) or tokenizer(texts, **options)

    tokens.tokenize(["fox " * n for n in (10, 200, 249, 90, 1, 1000, 3)], spy, 10**4)
    assert (
        max(seen) == 4000 and sorted(seen)[-2] <= 1000 and sum(seen) == 4 * 1553
    )  # a text of 4,000 characters without more goes alone


def test_a_file_that_says_to_cut_and_pad_is_not_obeyed(tokenizer, tmp_path):
    """sentence-transformers' files say so. The lengths of the corpus's documents depended on it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = given_tokenizer(str(tmp_path))
    assert lengths(loaded, ["a b c d e f g h", "a"]).tolist() == [8, 1]
    assert lengths(tokenizer, ["a b c d e f g h", "a"]).tolist() == [8, 1]
