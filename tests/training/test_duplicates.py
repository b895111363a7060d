"""Near-duplicates: against the definition, at the threshold, in any script, without all pairs."""

import itertools
import os
import subprocess
import sys
import unicodedata
from fractions import Fraction

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.training import duplicates
from lib.training.duplicates import near_duplicates, normalized


def words(text):
    """The definition: letters, digits and their marks; in Chinese and Thai, each character."""
    found, inside = [], False
    for c in unicodedata.normalize("NFKC", text).casefold():
        unspaced = duplicates.UNSPACED.match(c)
        if unicodedata.category(c)[0] == "M":
            if inside:
                found[-1] += c
        elif unicodedata.category(c) == "Cf" and c != "\u200b":
            continue
        elif c.isalnum():
            if inside != "letter" or unspaced:
                found.append("")
            found[-1] += c
            inside = "alone" if unspaced else "letter"
        else:
            inside = False
    return found or [
        some for some in ["".join(unicodedata.normalize("NFKC", text).casefold().split())] if some
    ]


def runs(text, size):
    some = words(text)
    return {tuple(some[i : i + size]) for i in range(max(1, len(some) - size + 1))}


def by_definition(texts, size, jaccard):
    sets = [runs(text, size) for text in texts]
    return [
        (i, j)
        for i, j in itertools.combinations(range(len(texts)), 2)
        if Fraction(len(sets[i] & sets[j]), len(sets[i] | sets[j])) >= Fraction(str(jaccard))
    ]


def pairs(texts, **options):
    return [tuple(pair) for pair in near_duplicates(texts, **options).tolist()]


# ---------------------------------------------------------------- against the definition

SIGNS = st.text(alphabet=st.sampled_from("aAbé ,.-\n\u0301\u00ad\u200b汉字ที่กकि1²"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(SIGNS, SIGNS)
@example("", "?!")
@example("\u0301a", "a \u0301b a")
@example("ที่iPhone 汉字 kana カﾞ", "字 iphone ガ ที่ที")
def test_words_are_those_of_the_definition(one, other):
    """Codes of two texts are equal exactly where the words are."""
    codes, named = (
        [*duplicates.word_codes(one).tolist(), *duplicates.word_codes(other).tolist()],
        words(one) + words(other),
    )
    assert len(codes) == len(named)
    assert [codes.index(code) for code in codes] == [named.index(word) for word in named]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=14).map(" ".join), max_size=7),
    st.integers(1, 4),
    st.sampled_from([0.3, 0.5, 0.7, 0.8, 1.0]),
)
def test_pairs_are_those_of_the_definition(texts, size, jaccard):
    assert pairs(texts, size=size, jaccard=jaccard) == by_definition(texts, size, jaccard)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_copies_with_changes_are_those_of_the_definition(seed):
    """Long texts behind a shared form, cut and changed: some stay near-duplicates."""
    rng = np.random.default_rng(seed)
    form, texts = [f"form{i}" for i in range(40)], []
    for _ in range(4):
        base = [f"w{rng.integers(200)}" for _ in range(rng.integers(30, 120))]
        for _ in range(4):
            changed = list(base)
            for _ in range(rng.integers(0, 4)):
                changed[rng.integers(len(changed))] = "new"
            texts.append(" ".join([*form, *changed[: len(changed) - rng.integers(0, 12)]]))
    assert pairs(texts) == by_definition(texts, 13, 0.8)
    order = rng.permutation(len(texts))
    assert pairs([texts[i] for i in order]) == sorted(
        tuple(sorted((int(np.flatnonzero(order == i)[0]), int(np.flatnonzero(order == j)[0]))))
        for i, j in pairs(texts)
    )


# ---------------------------------------------------------------- by hand


def test_eight_tenths_are_near_and_less_is_not():
    """Runs of one word: ten in all, of which eight or seven are shared."""
    eight, seven = "a b c d e f g h", "a b c d e f g"
    assert pairs([f"{eight} x", f"{eight} y"], size=1) == [(0, 1)]  # 8 of 10
    assert pairs([f"{seven} x", f"{seven} y z"], size=1) == []  # 7 of 10
    assert pairs([f"{eight} x", f"{eight} y z"], size=1) == []  # 8 of 11


def test_a_short_text_is_near_to_its_own_words_alone():
    twelve = " ".join("abcdefghijkl")
    assert pairs(
        [
            twelve,
            twelve.upper().replace(" ", ",\n"),
            twelve + " m",
            twelve[:-2],
            "",
            "  ",
            "?!",
            "? !",
            "a",
            "b",
        ]
    ) == [(0, 1), (4, 5), (6, 7)]
    assert pairs([]) == pairs(["alone"]) == []


def test_nearness_is_no_chain():
    """A ~ B and B ~ C, but not A ~ C."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    first, second, third = (
        " ".join(letters[i : i + 20]) for i in (0, 2, 4)
    )  # share 18 of 22, then 16 of 24
    assert pairs([first, second, third], size=1) == [(0, 1), (1, 2)]


# ---------------------------------------------------------------- scripts


def test_a_script_without_spaces_is_compared_by_its_characters():
    chinese = "".join(chr(0x4E00 + 7 * i) for i in range(200))
    thai = "".join("กขคงจฉชซ"[i % 8] + "\u0e34\u0e48"[: i % 3] + "นมยรล"[i % 5] for i in range(120))
    for text in (chinese, thai):
        changed = text[:100] + "X" + text[101:]
        assert pairs([text, changed, text[::-1]]) == [
            (0, 1)
        ]  # as whole "words" they would share nothing


def test_marks_make_words_and_encodings_do_not():
    assert pairs(["कि कु के", "का को कै", "क क क"]) == []  # without their vowel signs one and the same
    assert pairs(["Caf\u00e9 STRASSE ﬁn", "cafe\u0301 straße fin", "cafe strasse fin"]) == [(0, 1)]
    assert pairs(["data\u00adbase in ｆｕｌｌ width", "database in full width"]) == [(0, 1)]
    assert pairs(["half a \ud800 pair", "half a pair", "\udc00"]) == [(0, 1)]


def test_a_question_is_the_same_up_to_white_space_case_and_encoding():
    assert (
        normalized(" Who\n is\u00a0the FOX? ")
        == normalized("who is the fox?")
        != normalized("who is the fox")
    )
    assert normalized("Caf\u00e9") == normalized("CAFE\u0301") != normalized("cafe")


# ---------------------------------------------------------------- cost, and the same anywhere


def test_a_form_that_all_share_compares_nobody(monkeypatch):
    """2,000 texts share 300 words: a common shingle would make 2 million candidate pairs."""
    form = " ".join(f"form{i}" for i in range(300))
    texts = [form + " " + " ".join(f"w{60 * n + i}" for i in range(60)) for n in range(2_000)]
    texts.append(texts[7] + " again")
    merged, sort = [], np.sort
    monkeypatch.setattr(
        duplicates.np,
        "sort",
        lambda *arguments, **options: merged.append(1) or sort(*arguments, **options),
    )
    assert pairs(texts) == [(7, 2_000)]
    assert len(merged) < 10


def test_very_many_runs_are_sampled_and_the_estimate_finds_what_is_clear(monkeypatch):
    rng = np.random.default_rng(0)
    base = [" ".join(f"w{rng.integers(5_000)}" for _ in range(600)) for _ in range(20)]
    copies = [text + " with a few words more at the end of it all and then one" for text in base]
    halves = [
        text[: len(text) // 2] + " " + base[i - 1][: len(text) // 2] for i, text in enumerate(base)
    ]
    short = ["a short one", "A short one."]
    texts = base + copies + halves + short
    clear = [(i, 20 + i) for i in range(20)] + [(60, 61)]
    assert pairs(texts) == clear
    monkeypatch.setattr(duplicates, "MOST_SHINGLES", 6_000)
    sets = duplicates.shingles(texts, 13)
    assert 3_000 < sum(map(len, sets)) <= 6_000 and all(len(codes) for codes in sets)
    assert pairs(texts) == clear
    whole = [duplicates.shingles([text], 13)[0] for text in texts]
    limit = max(codes[-1] for codes in sets if len(codes) > 1)
    assert all(
        np.array_equal(codes, full[: max(1, np.searchsorted(full, limit, "right"))])
        for codes, full in zip(sets, whole)
    )


def test_codes_are_the_same_on_every_machine_and_in_every_process():
    assert duplicates.word_codes("The red fox").tolist() == [
        2175652522180920138,
        4180359565708635316,
        15159603104389917082,
    ]
    program = """
from lib.training import duplicates
print(duplicates.shingles(['The red fox', 'x ' * 20], 13))
"""
    out = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(out) == 1 and "dtype=uint64" in out.pop()
