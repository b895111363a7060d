"""Documents: packed to their length, and only parts that lie in a zone are asked for."""

import hashlib
from collections import Counter
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import item, names, padded, part

from lib.corpus import documents
from lib.corpus.documents import (
    Document,
    Zone,
    as_parts,
    choose,
    digests,
    pack,
    render,
    spread,
    tail,
)
from lib.corpus.packages import Item, normal, parse

# ---------------------------------------------------------------- packing


@settings(deadline=None, max_examples=200)
@given(
    bodies=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), max_size=20),
    n=st.integers(40, 200),
)
def test_documents_are_consecutive_items_of_at_most_n_tokens_and_none_takes_more_than_half(
    bodies, n
):
    parts = [part(f"x{i}y", *lines) for i, lines in enumerate(bodies)]
    packs = pack(parts, n)
    at = {whole.item.name: i for i, whole in enumerate(parts)}
    order = [at[some.item.name] for packed in packs for some in packed]
    assert order == sorted(set(order))
    for packed in packs:
        assert n // 2 <= sum(some.tokens for some in packed) <= n - 2
        for some in packed:
            whole = parts[at[some.item.name]]
            assert some.tokens <= n // 2 - 1
            assert (
                whole.item.body.startswith(some.item.body)
                and some[1:3] == whole[1:3]
                and some.lines == whole.lines[: len(some.lines)]
            )
            assert len(some.item.body.split()) == sum(some.lines)
        first, last = (at[packed[i].item.name] for i in (0, -1))
        for i in set(range(first, last)) - set(order):  # what is passed over holds next to nothing
            assert sum(documents.cut(parts[i], n // 2 - 1).lines) < documents.BODY_TOKENS // 2


def test_pack_by_hand():
    """64 tokens leave 62: a and b take 26 each, c says too little, d does not fit the last 10.

    e is cut to 31 at most.
    """
    a, b, d, e = part("a", 10, 10), part("b", 10, 10), part("d", 10, 10), part("e", 10, 10, 10, 10)
    packs = pack([a, b, part("c", 7), d, e], 64)
    assert [names(packed) for packed in packs] == ["ab", "de"] and packs[1][1].lines == (10, 10)
    assert pack([e], 64) == []  # less than half of a document is none


def test_the_last_item_is_cut_to_the_room_that_is_left():
    """200 tokens leave 198: a and b take 132, six of c's nine lines fit, the rest is lost."""
    a, b, c, d, e = (part(name, *[10] * n) for name, n in zip("abcde", (8, 4, 9, 8, 4)))
    packs = pack([a, b, c, d, e], 200)
    assert [names(packed) for packed in packs] == ["abc", "de"] and packs[0][2].lines == (10,) * 6


def test_cut_ends_at_a_line():
    whole = part("a", 5, 5, 5)
    assert documents.cut(whole, 21) is whole
    assert (
        documents.cut(whole, 20).lines == (5, 5)
        and len(documents.cut(whole, 20).item.body.split("\n")) == 2
    )
    assert documents.cut(whole, 10).lines == () and documents.cut(whole, 10).item.body == ""
    assert documents.cut(whole, 3).item.body == ""


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(st.sampled_from("red fox\n\t un🦊.-é\u0301红\x00\u200d\u2028[MASK]"), max_size=40),
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
)
def test_the_tokens_of_a_document_are_those_of_its_lines(tokenizer, texts, data):
    """Whatever a line begins with: lengths are added up, never counted on the document."""
    items = [Item("owls", f"owls.f{i}", "the red fox runs", text) for i, text in enumerate(texts)]
    asked = data.draw(st.sets(st.integers(0, len(items) - 1)))
    document = render(as_parts(items, Counter(), tokenizer), asked)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert document.tokens == count(document.text)
    assert document.starts == [count(document.text[:start]) for start, _ in document.spans]


def test_only_a_unique_summary_of_an_item_with_a_body_asks(tokenizer):
    items = [
        item("a", 16),
        item("b", 1),
        item("c", 16, summary="the red fox runs"),
        item("d", 16, summary="The RED fox, runs!"),
        item("e", 16, summary=""),
        item("f", 16, summary="red - fox runs"),
    ]
    count = Counter(normal(some.summary) for some in items)
    assert [some.asks for some in as_parts(items, count, tokenizer)] == [
        True,
        False,
        False,
        False,
        False,
        False,
    ]


# ---------------------------------------------------------------- asking


def test_render_removes_the_summaries_asked_for_and_points_at_each_item():
    parts = [part("a", 3), part("b", 2, 1), part("c", 3)]
    document = render(parts, {1})
    a, b = "a\nFinds the a of everything.\na0 a1 a2", "b\nb0 b1\nb2"
    assert document.text == f"{a}\n\n{b}\n\nc\nFinds the c of everything.\nc0 c1 c2"
    assert [document.text[start:end] for start, end in document.spans] == [
        "a\nFinds the a of everything.\na0 a1 a2",
        "b\nb0 b1\nb2",
        "c\nFinds the c of everything.\nc0 c1 c2",
    ]
    assert document.starts == [0, 9, 13] and document.tokens == 22
    assert render([]) == Document("", [], [], 0)


DEEP, SHALLOW = Zone(0.5, 1.0, 2, after=40), Zone(0.0, 0.15, 2)


def test_choose_by_hand():
    """Eight equal items: two of four in the second half, evenly spaced; two in the first 15 %."""
    parts = [part(name, 24) for name in "abcdefgh"]  # 30 tokens each
    document, chosen = choose(parts, {"deep": DEEP, "shallow": SHALLOW})
    assert chosen == {"deep": [5, 7], "shallow": [0, 1]}
    assert document == render(parts, {0, 1, 5, 7})
    assert all(
        (padded(some.item.summary) in padded(document.text)) == (i not in (0, 1, 5, 7))
        for i, some in enumerate(parts)
    )


def test_what_leaves_its_zone_with_the_summaries_is_not_asked():
    """e begins at 120 of 240; without four summaries before it and its own, at 100 of 215."""
    parts = [part(name, 24, unique=name < "f") for name in "abcdefgh"]
    _, chosen = choose(parts, {"deep": DEEP, "early": Zone(0.0, 0.45, 4)})
    assert chosen == {"deep": [], "early": [0, 1, 2, 3]}


def test_the_second_half_is_counted_in_characters_too():
    """Long words: c begins at half of the tokens and after a third of the characters."""
    parts = [
        part("a", 24),
        part("b", 24),
        part("c", 24, after="x" * 200),
        part("d", 24, after="x" * 200),
    ]
    assert render(parts).starts[2] * 2 == render(parts).tokens
    assert choose(parts, {"deep": Zone(0.5, 1.0, 2)})[1] == {"deep": [3]}


def test_a_part_must_begin_after_so_many_tokens():
    parts = [part(name, 24) for name in "abcd"]
    assert choose(parts, {"deep": Zone(0.5, 1.0, 2, after=60)})[1] == {"deep": [2, 3]}
    assert choose(parts, {"deep": Zone(0.5, 1.0, 2, after=61)})[1] == {"deep": [3]}
    assert choose(parts, {"deep": Zone(0.5, 1.0, 2, after=91)})[1] == {"deep": []}


@pytest.mark.parametrize(
    "left, asked",
    [
        ("\nsee: finds THE (f) of\neverything", [7]),
        ("\nfinds the f of everythings", [5, 7]),
        ("\nrefinds the f of everything", [5, 7]),
    ],
)
def test_a_summary_that_is_left_elsewhere_in_the_document_is_not_asked(left, asked):
    parts = [part(name, 24, after=left if name == "h" else "") for name in "abcdefgh"]
    assert choose(parts, {"deep": DEEP})[1]["deep"] == asked


def test_a_part_asked_for_in_one_zone_serves_the_later_ones():
    parts = [part(name, 24) for name in "abcdefgh"]
    document, chosen = choose(parts, {"deep": Zone(0.5, 1.0, 2), "any": Zone(0.0, 1.0, 3)})
    assert chosen["deep"] == [5, 7] and len(chosen["any"]) == 3 and set(chosen["any"]) > {5, 7}
    assert document == render(parts, set(chosen["any"]))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(), max_size=30), st.integers(0, 40))
def test_spread_takes_so_many_in_order_and_apart(things, count):
    places = spread(list(range(len(things))), count)
    assert len(places) == min(count, len(things)) and spread(things, count) == [
        things[i] for i in places
    ]
    gaps = np.diff([-1, *places, len(things)])
    assert (gaps > 0).all() and (
        count >= len(things) or count == 0 or max(gaps[1:-1], default=1) <= -(-len(things) // count)
    )


# ---------------------------------------------------------------- digest and tail


def test_digests_are_24_items_dealt_by_a_hash_whatever_their_order():
    parts = [part(f"f{i}", 60) for i in range(60)] + [part("short", 53), part("long", 1495)]
    dealt = digests(parts)
    assert [len(packed) for packed in dealt] == [24, 24]
    drawn = [some.item.name for packed in dealt for some in packed]
    assert len(set(drawn)) == 48 and not {"short", "long"} & set(drawn)
    assert (
        drawn
        == sorted(drawn, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        != sorted(drawn)
    )
    assert digests(parts[::-1]) == dealt
    assert digests(parts[:23]) == []


def definition(name: str, indent: str = "", doc: str = "") -> str:
    """A function; the words of its docstring are no code."""
    lines = [
        f"def {name}(self):",
        f'    """Finds the {doc or name} of everything.',
        "",
        "    More of it.",
        '    """',
        "    return 1",
    ]
    return "".join(f"{indent}{line}".rstrip() + "\n" for line in lines) + "\n\n"


def ended(
    *parts: str, count: Counter | None = None, size: int = 6000
) -> tuple[Document, str] | None:
    filler = "".join(f"value_{i} = {i}\n" for i in range(size // 15))
    module = parse("owls", PurePosixPath("owls/sight.py"), "".join(parts) + filler)
    return tail(module, count or Counter(normal(some.summary) for some in module.items))


def test_tail_asks_for_the_last_three_items_and_points_at_their_code():
    document, query = ended(definition("a"), "x = 1\n", *map(definition, "bcd"))
    assert (
        query == "Finds the b of everything. Finds the c of everything. Finds the d of everything."
    )
    assert '"""' not in document.text and "everything" not in document.text
    ((start, end),) = document.spans
    assert (
        document.text[start:].startswith("def b(self):")
        and document.text[:start].endswith("return 1\n\nx = 1\n")
        and end == len(document.text)
    )


def test_tail_points_at_the_method_of_the_class_that_is_asked_for():
    """Every class has a method `see`; the one asked for is the last."""
    classes = [
        f"class {name}:\n"
        + "".join(
            definition(method, "    ", doc=f"{method} {name}") for method in ("see", "hunt", "rest")
        )
        for name in ("Hen", "Owl")
    ]
    document, query = ended(*classes)
    assert query.startswith("Finds the see Owl of everything.")
    assert "class Owl" in document.text[: document.spans[0][0]]


@pytest.mark.parametrize(
    "parts, options",
    [
        (list(map(definition, "ab")), {}),
        ([*map(definition, "abc"), "# finds the B, of everything\n"], {}),
        ([*map(definition, "abc")], dict(size=3000)),
        ([*map(definition, "abc")], dict(count=Counter({"finds the b of everything": 2}))),
    ],
    ids=["two items", "a summary in a comment", "too short", "a summary twice"],
)
def test_a_module_without_three_findable_items_has_no_tail(parts, options):
    assert ended(*parts, **options) is None
