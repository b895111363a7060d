"""BM25 by hand, in any script, of the first so many tokens."""
import math

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from lib import metrics
from lib.bm25 import bm25, first_words, words
from lib.encoder import encodable


def test_bm25_by_hand():
    """Lucene's form: idf = ln(1 + (N - n + .5) / (n + .5)), tf part = f / (f + 1.2 (.25 + .75 |d| / mean|d|))."""
    documents = {"a": "fox fox hen", "b": "Hen!", "c": "owl owl owl owl"}
    run = bm25(documents, {"q": "the FOX, hen", "r": "hen hen", "s": "wolf"})
    length = (3 + 1 + 4) / 3
    idf = lambda n: math.log(1 + (3 - n + 0.5) / (n + 0.5))
    part = lambda f, words: f / (f + 1.2 * (0.25 + 0.75 * words / length))
    assert run["q"] == pytest.approx({"a": idf(1) * part(2, 3) + idf(2) * part(1, 3), "b": idf(2) * part(1, 1)}, rel=1e-5)
    assert run["r"] == pytest.approx({"b": 2 * idf(2) * part(1, 1), "a": 2 * idf(2) * part(1, 3)}, rel=1e-5)
    assert list(run["r"]) == ["b", "a"]
    assert run["s"] == {}


def test_bm25_reads_scripts_without_spaces_by_pairs_of_characters():
    assert words("The red Füchsin, 红狐狸 and 猫! ひらがなABC") == ["red", "füchsin", "红狐", "狐狸", "猫", "ひら", "らが", "がな", "abc"]
    assert words("ПРИВЕТ мир") == ["привет", "мир"]
    assert first_words("红狐狸在夜里 red fox", 3) == "红狐狸在夜里" and first_words("red 红狐狸 fox", 3) == "red 红狐狸" and first_words("a red fox", 2) == "a red"
    documents = {"a": "一只红狐狸在夜里奔跑", "b": "绿色的母鸡睡觉", "c": "猫头鹰"}
    assert list(bm25(documents, {"q": "红狐狸"})["q"]) == ["a"] and list(bm25(documents, {"q": "母鸡"})["q"]) == ["b"]


def test_bm25_reads_only_the_first_words():
    documents = {"a": "the red fox, the owl", "b": "owl by night"}
    assert bm25(documents, {"q": "owl"})["q"].keys() == {"a", "b"}
    assert bm25(documents, {"q": "owl"}, first_tokens=4)["q"].keys() == {"b"}
    assert bm25(documents, {"q": "owl"}, first_tokens=5)["q"].keys() == {"a", "b"}
    assert bm25(documents, {"q": "fox"}, first_tokens=2)["q"] == {}
    # a cut document is a shorter document: the same run as on the texts cut by hand
    cut = {"a": "the red fox", "b": "owl by night"}
    assert bm25(documents, {"q": "fox night"}, first_tokens=3) == bm25(cut, {"q": "fox night"})


def test_bm25_reads_only_the_first_pieces_of_a_tokenizer(tokenizer):
    documents = {"a": "unbelievable red fox", "b": "red fox unbelievable"}     # un ##believ ##able red fox
    run = lambda n: {qid: set(found) for qid, found in bm25(documents, {"q": "fox", "r": "unbelievable"}, n, tokenizer).items()}
    assert run(5) == {"q": {"a", "b"}, "r": {"a", "b"}}
    assert run(4) == {"q": {"b"}, "r": {"a"}}                                  # b ends in "unbeliev", which is another word
    assert run(1) == {"q": set(), "r": set()}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("red fox\n\tun🦊.-é红\ud800"), max_size=80), times=st.integers(1, 12), n=st.integers(1, 9))
def test_the_first_pieces_are_those_of_the_whole_text(tokenizer, text, times, n):
    text = text * times
    part = first_words(text, n, tokenizer)
    assert encodable(text).startswith(part)
    offsets = tokenizer(encodable(text), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(part) == (offsets[:n][-1][1] if offsets else 0)


def test_bm25_keeps_the_k_best_and_breaks_ties_by_id():
    documents = {f"d{i}": "fox hen" for i in range(9)} | {"best": "fox"}
    run = bm25(documents, {"q": "fox"}, k=4)["q"]
    assert list(run) == ["best", "d8", "d7", "d6"] == metrics.ranking(run)


def test_bm25_of_wordless_documents_finds_nothing():
    assert bm25({"a": "...", "b": ""}, {"q": "fox"}) == {"q": {}}
    assert bm25({"a": "fox", "b": ""}, {"q": "fox"})["q"].keys() == {"a"}
    assert bm25({"a": "fox"}, {"q": "the of ?"}) == {"q": {}}


def test_bm25_refuses_what_it_cannot_search():
    with pytest.raises(ValueError, match="no documents"):
        bm25({}, {"q": "fox"})
    with pytest.raises(ValueError, match="query q is empty"):
        bm25({"a": "fox"}, {"p": "fox", "q": "  "})
    with pytest.raises(TypeError, match="document b is NoneType"):
        bm25({"a": "fox", "b": None}, {"q": "fox"})
    with pytest.raises(TypeError, match="query q is float"):
        bm25({"a": "fox"}, {"q": math.nan})
    for options in (dict(first_tokens=0), dict(k=0)):
        with pytest.raises(ValueError, match="count from 1"):
            bm25({"a": "fox"}, {"q": "fox"}, **options)
