"""BM25 by hand, in any script, of the first so many tokens."""

import math
import re
import unicodedata
from itertools import accumulate

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.benchmark import bm25 as bm25_module
from lib.benchmark import metrics
from lib.benchmark.bm25 import Bm25, bm25, first_words, words
from lib.model.tokens import encodable


def test_bm25_by_hand():
    """Lucene's form: the sum over words of idf · tf.

    idf = ln(1 + (N - n + .5) / (n + .5)), tf = f / (f + 1.2 (.25 + .75 |d| / mean|d|)).
    """
    documents = {"a": "fox fox hen", "b": "Hen!", "c": "owl owl owl owl"}
    run = bm25(documents, {"q": "the FOX, hen", "r": "hen hen", "s": "wolf"})
    length = (3 + 1 + 4) / 3

    def idf(n):
        return math.log(1 + (3 - n + 0.5) / (n + 0.5))

    def tf(f, words):
        return f / (f + 1.2 * (0.25 + 0.75 * words / length))

    assert run["q"] == pytest.approx(
        {"a": idf(1) * tf(2, 3) + idf(2) * tf(1, 3), "b": idf(2) * tf(1, 1)}, rel=1e-5
    )
    assert run["r"] == pytest.approx(
        {"b": 2 * idf(2) * tf(1, 1), "a": 2 * idf(2) * tf(1, 3)}, rel=1e-5
    )
    assert list(run["r"]) == ["b", "a"]
    assert run["s"] == {}


def test_bm25_reads_scripts_without_spaces_by_pairs_of_characters():
    assert words("The red Füchsin, 红狐狸 and 猫! ひらがなABC") == [
        "red",
        "füchsin",
        "红狐",
        "狐狸",
        "猫",
        "ひら",
        "らが",
        "がな",
        "abc",
    ]
    assert words("ПРИВЕТ мир") == ["привет", "мир"]
    assert (
        first_words("红狐狸在夜里 red fox", 3) == "红狐狸在夜里"
        and first_words("red 红狐狸 fox", 3) == "red 红狐狸"
        and first_words("a red fox", 2) == "a red"
    )
    documents = {"a": "一只红狐狸在夜里奔跑", "b": "绿色的母鸡睡觉", "c": "猫头鹰"}
    assert list(bm25(documents, {"q": "红狐狸"})["q"]) == ["a"] and list(
        bm25(documents, {"q": "母鸡"})["q"]
    ) == ["b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
        ("తెలుగు, ಕನ್ನಡ; മലയാളം", ["తెలుగు", "ಕನ್ನಡ", "മലയാളം"]),
        ("كِتَابٌ كَبِيرٌ", ["كِتَابٌ", "كَبِيرٌ"]),
        ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
        ("བོད་སྐད", ["བོད", "སྐད"]),
        ("Tie\u0302\u0301ng Vie\u0323\u0302t", ["tiếng", "việt"]),
        ("q\u0308x 1\u20e3", ["q\u0308x", "1\u20e3"]),  # marks that no letter is composed with
    ],
)
def test_marks_belong_to_their_letter(text, expected):
    assert words(text) == [unicodedata.normalize("NFC", word) for word in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ภาษาไทย", ["ภา", "าษ", "ษา", "าไ", "ไท", "ทย"]),
        ("ที่นี่", ["ที่นี่"]),  # two letters with two marks each
        ("မြန်မာ", ["မြန်", "န်မာ"]),
        ("ខ្មែរ", None),
        ("ພາສາລາວ", None),
        ("ᦅᧄᦺᦑᦟᦹᧉ", None),
        ("ꦧꦱꦗꦮ", None),
        ("น้ำดำ", ["น้ำดำ"]),
        ("ຄໍາ", ["ຄຳ"]),
        ("か\u3099き\u3099く", ["がぎ", "ぎく"]),
        ("人々の", ["人々", "々の"]),
        ("コーヒー", ["コー", "ーヒ", "ヒー"]),
        ("ก็", ["ก็"]),
    ],
)
def test_pairs_are_made_of_letters_with_their_marks(text, expected):
    letters = regex.findall(r"\X\p{M}*", unicodedata.normalize("NFC", text))
    assert words(text) == (expected or [a + b for a, b in zip(letters, letters[1:])])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cafe\u0301", "café"),
        ("STRASSE", "straße"),
        ("ΟΔΟΣ", "οδος"),
        ("ὈΔΌΣ", "ὀδός"),
        ("İ", "i\u0307"),
        ("ＢＭ２５＿ｆｏｘ", "bm25_fox"),
        ("ｶﾞｷﾞｸﾞｰ", "ガギグー"),
        ("ﬁsh", "fish"),
        ("ſ", "S"),
        ("\u212b", "å"),
        ("ΐ", "Ϊ\u0301"),
        ("ᾳ", "ΑΙ"),
        ("Ⅷ", "viii"),
        ("한국어", unicodedata.normalize("NFD", "한국어")),
        ("ﻛﺘﺎﺏ", "كتاب"),
        ("\uf900", "\u8c48"),
        ("⼭⽔", "山水"),
        ("10㎏", "10kg"),
        ("㈱㌔", "株 キロ"),
        ("hy\u00adphen", "hyphen"),
        ("می\u200cخواهم", "میخواهم"),
        ("क्\u200dष", "क्ष"),
        ("word\u2060joiner", "wordjoiner"),
        ("\ufefffox\ufeff", "fox"),
        ("葛\U000e0100城市", "葛城市"),
        ("vs\ufe0f", "vs"),
        ("a\u034fb", "ab"),
        ("ｔｈｅ fox", "fox"),
        ("Linux™", "linux"),
    ],
)
def test_how_a_word_is_encoded_makes_no_difference(one, other):
    assert words(one) == words(other) != []
    run = bm25({"a": one, "b": "hen"}, {"1": one, "2": other})
    assert run["1"] == run["2"] and run["1"].keys() == {"a"}


def test_a_zero_width_space_parts_words():
    assert words("red\u200bfox") == ["red", "fox"]
    assert words("ภาษา\u200bไทย") == ["ภา", "าษ", "ษา", "ไท", "ทย"]
    assert first_words("ภาษา\u200bไทย", 3) == "ภาษา"


def test_what_is_no_letter_makes_no_word():
    assert words("☀\ufe0f \u0301 \u00ad\u200d ™ “” … ゛ \ud800 \u3164") == []
    assert first_words("☀\ufe0f red fox", 1) == "☀\ufe0f red"
    assert (
        words("a≠b x½ ﷺ!")
        == words("a=\u0338b x1⁄2 صلى الله عليه وسلم")
        == ["b", "x1", "2", "صلى", "الله", "عليه", "وسلم"]
    )


# Letters, marks, signs, ignorable and separating characters of many scripts,
# and any character at all.
ODD = (
    "aZé\u0301\u0308\u0323\u0338\u0345Åß Σςİı_-.=≠½™①⼭㎏ｶﾞ＿がか\u3099゛人々ー"
    "한각\u1100\u1161क\u094dषकिதாะที่ำក\u17d2មမ\u103c\u102cαᾳ"
    "\u00ad\u200b\u200c\u200d\u2060\ufeff\ufe0f\u034f\u3164"
)
ANY = st.text(st.one_of(st.sampled_from(ODD), st.characters()), max_size=30)


def all_words(text: str) -> list[str]:
    """Function words too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25_module, "STOP_WORDS", frozenset())
        return words(text)


@settings(deadline=None, max_examples=400)
@given(text=ANY)
def test_composed_and_decomposed_texts_have_the_same_words(text):
    found = all_words(text)
    assert (
        all_words(unicodedata.normalize("NFC", text))
        == all_words(unicodedata.normalize("NFD", text))
        == found
    )
    assert all(
        word and not regex.match(r"\p{M}", word) and not re.search(r"\s", word) for word in found
    )


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(
        st.one_of(
            st.characters(min_codepoint=0xFF01, max_codepoint=0xFFEF),
            st.characters(max_codepoint=127),
        ),
        max_size=30,
    )
)
def test_full_and_half_width_texts_have_the_same_words(text):
    assert all_words(unicodedata.normalize("NFKC", text)) == all_words(text)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(max_codepoint=127), max_size=40))
def test_words_of_ascii_are_runs_of_letters_digits_and_underscores(text):
    assert (
        all_words(text)
        == re.findall("[a-z0-9_]+", text.lower())
        == all_words(text + " ’")[: len(all_words(text))]
    )


@settings(deadline=None, max_examples=400)
@given(text=ANY, n=st.integers(1, 12))
def test_the_first_words_are_those_of_the_whole_text(text, n):
    """A beginning of the text as it stands: the words that fit, at least the first stretch."""
    part, found = first_words(text, n), all_words(text)
    kept = all_words(part)
    assert text.startswith(part) and found[: len(kept)] == kept
    sums = list(accumulate(len(all_words(match[0])) for match in bm25_module.RUN.finditer(text)))
    first = next((count for count in sums if count), 0)
    assert len(kept) == max([count for count in sums if count <= n and count] or [first])


def test_letters_of_unspaced_scripts_are_clusters_of_one_character():
    """Where nothing is to fold and no mark stands, pairs are taken without looking for clusters."""
    letters = [
        character
        for character in map(chr, range(0x110000))
        if bm25_module.UNSPACED_PLAIN.match(character)
        and unicodedata.is_normalized("NFKC", character)
    ]
    assert len(letters) > 90_000 and regex.findall(r"\X", "".join(letters)) == letters
    assert bm25_module.folded("".join(letters)) == "".join(letters)


def test_bm25_reads_only_the_first_words():
    documents = {"a": "the red fox, the owl", "b": "owl by night"}
    assert bm25(documents, {"q": "owl"})["q"].keys() == {"a", "b"}
    assert bm25(documents, {"q": "owl"}, first_tokens=4)["q"].keys() == {"b"}
    assert bm25(documents, {"q": "owl"}, first_tokens=5)["q"].keys() == {"a", "b"}
    assert bm25(documents, {"q": "fox"}, first_tokens=2)["q"] == {}
    # a cut document is a shorter document: the same run as on the texts cut by hand
    cut = {"a": "the red fox", "b": "owl by night"}
    assert bm25(documents, {"q": "fox night"}, first_tokens=3) == bm25(cut, {"q": "fox night"})


def test_a_document_has_more_where_a_word_is_left():
    ranker = Bm25(2)
    ranker.run(
        {"a": "red fox.\n", "b": "red fox ☀\ufe0f!", "c": "red fox owl", "d": "red", "e": "..."},
        {"q": "fox"},
        10,
    )
    assert ranker.longer == [False, False, True, False, False]


def test_bm25_reads_only_the_first_pieces_of_a_tokenizer(tokenizer):
    documents = {
        "a": "unbelievable red fox",
        "b": "red fox unbelievable",
    }  # un ##believ ##able red fox
    queries = {"q": "fox", "r": "unbelievable"}

    def run(n):
        return {qid: set(scores) for qid, scores in bm25(documents, queries, n, tokenizer).items()}

    assert run(5) == {"q": {"a", "b"}, "r": {"a", "b"}}
    assert run(4) == {"q": {"b"}, "r": {"a"}}  # b ends in "unbeliev", which is another word
    assert run(1) == {"q": set(), "r": set()}


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(st.sampled_from("red fox\n\tun🦊.-é红\ud800"), max_size=80),
    times=st.integers(1, 12),
    n=st.integers(1, 9),
)
def test_the_first_pieces_are_those_of_the_whole_text(tokenizer, text, times, n):
    text = text * times
    part = first_words(text, n, tokenizer)
    assert encodable(text).startswith(part)
    offsets = tokenizer(encodable(text), add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
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
