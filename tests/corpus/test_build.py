"""The corpus: an answer lies where its task says and nowhere else, and the same text gives the same bytes."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.benchmark import locov1
from lib.corpus import build
from lib.corpus.build import (
    CorpusError,
    Document,
    Part,
    Tables,
    Zone,
    choose,
    digests,
    kept,
    pack,
    render,
    spread,
    tail,
)
from lib.corpus.packages import Item, Module, Shingles, normal, parse

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "loco-real"

SMALL = dict(
    packages=3, files_per_package=40, vocabulary=1024, books=[512, 1024], show_progress=False
)
CONTENT = "85ea4fe99953cb29e45527c6ef17edfe3448a2149a82cba696d0d988791d1f3d"
READ = ("networkx", "numpy", "pandas", "tokenizers")  # what the content of SMALL is made of, and by


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, manifest) of three packages' documentation."""
    folder = tmp_path_factory.mktemp("built") / "corpus"
    return folder, build.build(folder, **SMALL)


@pytest.fixture(scope="module")
def tasks(small):
    """Every task of every split, as the rest of the project loads it."""
    folder, _ = small
    return [
        locov1.load(name, folder, split)
        for split in build.SPLITS
        for name in locov1.tasks(folder, split)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def padded(text: str) -> str:
    """Normalised, so that `in` compares whole words."""
    return f" {normal(text)} "


def item(name: str, *lines: int, summary: str | None = None) -> Item:
    """An item whose body has so many words a line, none of which another item has."""
    words = iter(range(sum(lines)))
    body = "\n".join(" ".join(f"{name}{next(words)}" for _ in range(n)) for n in lines)
    return Item(
        "owls", name, f"Finds the {name} of everything." if summary is None else summary, body
    )


def part(
    name: str, *lines: int, summary: str | None = None, unique: bool = True, after: str = ""
) -> Part:
    """A part where every word is one token: one for the name, five for the summary, and those of its lines."""
    made = item(name, *lines, summary=summary)
    return Part(made._replace(body=made.body + after), 1, len(made.summary.split()), lines, unique)


def names(parts: list[Part]) -> str:
    return "".join(part.item.name for part in parts)


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
            assert sum(build.cut(parts[i], n // 2 - 1).lines) < build.BODY_TOKENS // 2


def test_pack_by_hand():
    """64 tokens leave 62: a and b take 26 each, c says too little, d does not fit the last 10; e is cut to 31 at most."""
    a, b, d, e = part("a", 10, 10), part("b", 10, 10), part("d", 10, 10), part("e", 10, 10, 10, 10)
    packs = pack([a, b, part("c", 7), d, e], 64)
    assert [names(packed) for packed in packs] == ["ab", "de"] and packs[1][1].lines == (10, 10)
    assert pack([e], 64) == []  # less than half of a document is none


def test_the_last_item_is_cut_to_the_room_that_is_left():
    """200 tokens leave 198: a and b take 132, six of c's nine lines fit, and the rest of c begins no document."""
    a, b, c, d, e = (part(name, *[10] * n) for name, n in zip("abcde", (8, 4, 9, 8, 4)))
    packs = pack([a, b, c, d, e], 200)
    assert [names(packed) for packed in packs] == ["abc", "de"] and packs[0][2].lines == (10,) * 6


def test_cut_ends_at_a_line():
    whole = part("a", 5, 5, 5)
    assert build.cut(whole, 21) is whole
    assert (
        build.cut(whole, 20).lines == (5, 5)
        and len(build.cut(whole, 20).item.body.split("\n")) == 2
    )
    assert build.cut(whole, 10).lines == () and build.cut(whole, 10).item.body == ""
    assert build.cut(whole, 3).item.body == ""


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
    document = render(build.as_parts(items, Counter(), tokenizer), asked)
    count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
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
    assert [some.asks for some in build.as_parts(items, count, tokenizer)] == [
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
    assert (
        document.text
        == "a\nFinds the a of everything.\na0 a1 a2\n\nb\nb0 b1\nb2\n\nc\nFinds the c of everything.\nc0 c1 c2"
    )
    assert [document.text[start:end] for start, end in document.spans] == [
        "a\nFinds the a of everything.\na0 a1 a2",
        "b\nb0 b1\nb2",
        "c\nFinds the c of everything.\nc0 c1 c2",
    ]
    assert document.starts == [0, 9, 13] and document.tokens == 22
    assert render([]) == Document("", [], [], 0)


DEEP, SHALLOW = Zone(0.5, 1.0, 2, after=40), Zone(0.0, 0.15, 2)


def test_choose_by_hand():
    """Eight equal items: four begin in the second half, of which two evenly spaced; two in the first 15 %."""
    parts = [part(name, 24) for name in "abcdefgh"]  # 30 tokens each
    document, chosen = choose(parts, {"deep": DEEP, "shallow": SHALLOW})
    assert chosen == {"deep": [5, 7], "shallow": [0, 1]}
    assert document == render(parts, {0, 1, 5, 7})
    assert all(
        (padded(some.item.summary) in padded(document.text)) == (i not in (0, 1, 5, 7))
        for i, some in enumerate(parts)
    )


def test_what_leaves_its_zone_with_the_summaries_is_not_asked():
    """e begins in the middle, at 120 of 240; without four summaries before it and its own, at 100 of 215."""
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


def test_kept_takes_documents_that_answer_first():
    chosen = [
        {"deep": d, "shallow": s}
        for d, s in (([], []), ([1], []), ([], [0]), ([], []), ([1], [0]), ([], [0]))
    ]
    found = [(None, some, None) for some in chosen]
    keep = lambda most: kept(found, ["deep", "shallow"], most)
    assert keep(None) == keep(6) == keep(9) == [0, 1, 2, 3, 4, 5]
    assert (
        keep(2) == [1, 4]
        and keep(4) == [1, 2, 4, 5]
        and keep(5) == [1, 2, 3, 4, 5]
        and keep(0) == []
    )
    assert len(keep(1)) == 1 and set(keep(1)) < {1, 4}
    assert len(keep(3)) == 3 and set(keep(3)) > {1, 4}


def found(*bodies: str) -> list[tuple[Document, dict[str, list[int]], list[str]]]:
    """Documents of two items; the second answers the task deep, the first shallow."""
    result = []
    for number, body in enumerate(bodies):
        document = Document(f"head{number} {body}", [(0, 5), (6, 6 + len(body))], [0, 1], 9)
        result.append(
            (
                document,
                {"deep": [1], "shallow": [0]},
                [f"the head number {number} of it", f"the tail number {number} of it"],
            )
        )
    return result


def test_tasks_on_one_collection_share_ids_and_texts_and_evidence_is_a_share_of_characters():
    tables = Tables()
    tables.add("book", "test", found("owls see", "hens do not"), None, None)
    assert tables.documents["test"] == [
        (f"book_test_Passage_{i}", task, text)
        for i, text in enumerate(["head0 owls see", "head1 hens do not"])
        for task in ("deep", "shallow")
    ]
    assert tables.queries["test"][1] == (
        "deep_test_Query_1",
        "deep",
        "the tail number 1 of it",
        ["book_test_Passage_1"],
    )
    assert tables.evidence["test"][:2] == [
        ("deep_test_Query_0", "deep", "book_test_Passage_0", 6 / 14, 1.0),
        ("deep_test_Query_1", "deep", "book_test_Passage_1", 6 / 17, 1.0),
    ]
    assert not tables.documents["train"] and not tables.documents["validation"]


@pytest.mark.parametrize(
    "split, asked", [("train", [0, 1, 2]), ("validation", [0, 2]), ("test", [0, 2])]
)
def test_a_query_that_another_document_holds_is_asked_in_training_only(split, asked):
    """Whole words count, not their punctuation."""
    tables = Tables()
    tables.add(
        "book",
        split,
        found(
            "owls see", "hens do not", "The TAIL: number 1\nof it! the tail number 0 of its kind"
        ),
        None,
        None,
    )
    assert [query for _, task, query, _ in tables.queries[split] if task == "deep"] == [
        f"the tail number {i} of it" for i in asked
    ]
    assert len(tables.documents[split]) == 6  # it stays as a distractor


def test_limits_hold_and_a_task_that_nobody_asks_has_no_documents():
    tables = Tables()
    some = [
        (document, {"deep": [1] if i % 2 else [], "shallow": []}, queries)
        for i, (document, _, queries) in enumerate(found(*"abcdefghij"))
    ]
    tables.add("book", "test", some, 6, 3)
    assert Counter(task for _, task, _ in tables.documents["test"]) == {"deep": 6}
    assert len(tables.queries["test"]) == len(tables.evidence["test"]) == 3
    assert {pid for *_, pids in tables.queries["test"] for pid in pids} <= {
        pid for pid, *_ in tables.documents["test"]
    }
    answering = [text for _, _, text in tables.documents["test"] if int(text[4]) % 2]
    assert len(answering) == 5  # all that answer, and one that does not
    tables.add("none", "test", [], 6, 3)
    assert len(tables.documents["test"]) == 6


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
    return f'{indent}def {name}(self):\n{indent}    """Finds the {doc or name} of everything.\n\n{indent}    More of it.\n{indent}    """\n{indent}    return 1\n\n\n'


def ended(*parts: str, count: Counter = Counter(), size: int = 6000) -> tuple[Document, str] | None:
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


# ---------------------------------------------------------------- the corpus of three packages


def test_every_designed_task_is_there(small):
    made = small[1]["tasks"]
    held_out = {
        f"{family}_{depth}"
        for family in ("book_512", "book_1024", "page")
        for depth in ("deep", "shallow")
    } | {"tail", "digest"}
    assert made.keys() == held_out | {"book_512_any", "book_1024_any"}
    for name, splits in made.items():
        assert splits.keys() == ({"train"} if name.endswith("_any") else {"validation", "test"})


def test_no_query_is_left_in_a_document(tasks):
    """Normalised, whole words: not in its own, and outside training in no other of its task."""
    for task in tasks:
        plain = {pid: padded(text) for pid, text in task.documents.items()}
        for qid, query in task.queries.items():
            for pid in task.qrels[qid] if task.split == "train" else plain:
                assert padded(query) not in plain[pid], (task.name, qid, pid)


def test_queries_are_unique_and_no_split_asks_anothers(tasks):
    asked = {split: set() for split in build.SPLITS}
    for task in tasks:
        plain = [normal(query) for query in task.queries.values()]
        assert len(set(plain)) == len(plain), task.name
        assert all(len(query.split()) >= 4 for query in plain)
        asked[task.split] |= set(plain)
    assert not any(
        asked[a] & asked[b]
        for a, b in (("train", "validation"), ("train", "test"), ("validation", "test"))
    )


def test_splits_share_no_document_and_hardly_a_sentence(small, tasks):
    """Half of a document's runs of eight words is what near-duplicates share; pretraining text is training text."""
    texts = {
        split: {text for task in tasks if task.split == split for text in task.documents.values()}
        for split in build.SPLITS
    }
    texts["train"] |= {
        text
        for kind in ("short", "long")
        for split in ("train", "validation")
        for text in build.pretraining(small[0], kind, split)
    }
    shingles = Shingles()
    runs = {
        split: {text: shingles.of(normal(text)) for text in some} for split, some in texts.items()
    }
    for a, b in (("validation", "train"), ("test", "train"), ("test", "validation")):
        assert not texts[a] & texts[b]
        others = np.unique(
            np.concatenate([*runs[b].values(), np.array([2**64 - 1], dtype=np.uint64)])
        )
        assert (
            max(
                (others[np.searchsorted(others, found)] == found).mean()
                for found in runs[a].values()
            )
            < 0.5
        )


ZONES = {
    "book_512_deep": (0.5, 1),
    "book_512_shallow": (0, 0.15),
    "book_1024_deep": (0.5, 1),
    "book_1024_shallow": (0, 0.15),
    "page_deep": (0.6, 1),
    "page_shallow": (0, 0.2),
}


def test_evidence_is_one_item_of_its_document_and_lies_in_its_zone(small, tasks):
    tokenizer = build.load_tokenizer(small[0])
    for task in tasks:
        assert task.evidence.keys() == task.queries.keys()
        low, high = ZONES.get(task.name, (0, 1))
        for qid, (pid, start_frac, end_frac) in task.evidence.items():
            assert (
                [pid] == list(task.qrels[qid])
                and low <= start_frac <= high
                and start_frac < end_frac <= 1
            )
            text = task.documents[pid]
            start, end = (round(share * len(text)) for share in (start_frac, end_frac))
            if task.name == "tail":
                assert re.match(r"[ \t]*(async def|def|class) \w", text[start:]) and end == len(
                    text
                )
                continue
            assert (
                re.match(r"[\w.]+\n\S?", text[start:end])
                and text[:start].endswith("\n\n" if start else "")
                and text[end:].startswith("\n\n" if end < len(text) else "")
            )
            if task.name.endswith("_deep"):
                n = int(task.name.split("_")[1]) if task.name.startswith("book") else 0
                assert len(tokenizer(text[:start], add_special_tokens=False)["input_ids"]) >= n // 2


def test_a_books_documents_fit_n_tokens_and_are_the_same_in_its_tasks(small, tasks):
    tokenizer = build.load_tokenizer(small[0])
    books = [task for task in tasks if task.name.startswith("book")]
    for task in books:
        n = int(task.name.split("_")[1])
        tokens = build.lengths(tokenizer, list(task.documents.values())) + 2
        assert tokens.max() <= n and tokens.min() >= n // 3 and np.median(tokens) > 0.7 * n
    texts = {(task.name, task.split): task.documents for task in books}
    for (name, split), documents in texts.items():
        if name.endswith("_deep"):
            assert documents == texts[name.replace("deep", "shallow"), split]


def test_test_queries_and_documents_are_limited_and_training_is_not(small):
    manifest = build.build(
        small[0].with_name("limited"),
        **SMALL
        | dict(
            test_documents=5,
            test_queries=4,
            validation_documents=5,
            validation_queries=3,
            queries_per_document=1,
            natural=["page_deep"],
        ),
    )
    assert manifest["tasks"].keys() == {name for name in ZONES if name != "page_shallow"} | {
        "book_512_any",
        "book_1024_any",
    }
    for name, splits in manifest["tasks"].items():
        for split, some in splits.items():
            if split == "train":
                assert (
                    some["queries"]
                    <= some["documents"]
                    == small[1]["tasks"][name]["train"]["documents"]
                )
            else:
                assert (
                    some["documents"] == 5
                    and some["queries"] <= {"test": 4, "validation": 3}[split]
                )


def test_the_manifest_counts_and_hashes_what_is_there(small, tasks):
    folder, manifest = small
    there = files(folder)
    assert json.loads(there.pop("manifest.json")) == manifest
    assert manifest["files"] == {
        name: hashlib.sha256(raw).hexdigest() for name, raw in there.items()
    }
    assert (
        manifest["packages"] == {name: version(name) for name in ("networkx", "numpy", "pandas")}
        and manifest["absent"] == []
    )
    for task in tasks:
        assert manifest["tasks"][task.name][task.split] == {
            "documents": len(task.documents),
            "queries": len(task.queries),
        }
    for kind, counts in manifest["pretraining"].items():
        texts = build.pretraining(folder, kind) + build.pretraining(folder, kind, "validation")
        assert counts == {"texts": len(texts), "characters": sum(map(len, texts))} and texts
    assert manifest["vocabulary"] == len(build.load_tokenizer(folder)) == 1024


def test_pretraining_text_keeps_whole_sources_for_validation(small):
    table = pq.read_table(small[0] / "pretrain.parquet").to_pydict()
    split_of = {}
    for source, split in zip(table["source"], table["split"]):
        assert split_of.setdefault(source, split) == split
    assert 0 < list(split_of.values()).count("validation") < len(split_of) / 10
    with pytest.raises(CorpusError, match="'tall': one of short, long"):
        build.pretraining(small[0], "tall")
    with pytest.raises(CorpusError, match="'test': one of train, validation"):
        build.pretraining(small[0], "short", "test")


# ---------------------------------------------------------------- the same bytes


def test_a_second_build_gives_the_same_bytes_and_leaves_nothing_of_the_first(small, tmp_path):
    folder = tmp_path / "corpus"
    build.build(folder, **SMALL | dict(packages=("networkx",), books=[256], files_per_package=20))
    assert "documents-train.parquet" in files(folder)
    (folder / "old.parquet").touch()
    build.build(folder, **SMALL)
    assert files(folder) == files(small[0])
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def elsewhere(code: str, seed: int, **changes) -> str:
    """What Python prints with another hash seed."""
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)} | changes
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=changes.get("HOME", ROOT),
    ).stdout


def test_another_process_gives_the_same_bytes(small, tmp_path):
    """Another hash seed, path, time zone, locale, home, umask and number of threads."""
    folder = tmp_path / "räum lich" / "corpus"
    folder.parent.mkdir()
    elsewhere(
        f"import os; os.umask(0o77); from lib.corpus import build as corpus; corpus.build({str(folder)!r}, **{SMALL!r})",
        12345,
        TZ="Pacific/Chatham",
        LC_ALL="C",
        HOME=str(folder.parent),
        RAYON_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    assert files(folder) == files(small[0])


def test_the_same_versions_give_the_same_content_on_every_machine(small):
    locked = dict(
        re.findall(r"(?m)^([a-z0-9-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text())
    )
    others = [
        f"{name} {version(name)}, not {locked[name]}"
        for name in READ
        if version(name) != locked[name]
    ]
    if others:
        pytest.skip(f"versions differ from requirements.lock: {'; '.join(others)}")
    assert small[1]["content"] == CONTENT, (
        "the corpus has changed, and the versions are those of requirements.lock: if lib/corpus/build.py, lib/corpus/packages.py or the lock were changed "
        f"on purpose, store the new hash; otherwise the text of {', '.join(READ[:3])} depends on this machine or its Python"
    )


def test_a_tokenizer_is_a_function_of_its_text():
    """The library's trainer gives another vocabulary in every process."""
    code = (
        "import json; from pathlib import Path; from lib.corpus import build as corpus; texts = [path.read_text() for path in sorted(Path('lib').glob('*.py'))[:6]];"
        "print(json.dumps([corpus.train_tokenizer(some, 600).get_vocab() for some in (texts, texts[::-1])], sort_keys=True))"
    )
    first, *others = (json.loads(elsewhere(code, seed)) for seed in (0, 1, 2))
    assert first[0] == first[1] and others == [
        first,
        first,
    ]  # nor does the order of the texts matter
    assert sorted(first[0].values()) == list(range(600))
    assert [first[0][piece] for piece in build.SPECIAL] == [0, 1, 2, 3, 4]


def test_a_trained_tokenizer_reads_as_bert_does(tmp_path):
    tokenizer = build.train_tokenizer(
        ["The owl sees the owls, and the hen sees nothing. " * 30], 80
    )
    assert (
        tokenizer.decode(tokenizer("The OWL, sees!")["input_ids"])
        == "[CLS] the owl, sees [UNK] [SEP]"
    )  # no ! in the text
    assert (
        tokenizer("owl", "hen", return_token_type_ids=True)["token_type_ids"].count(1) == 2
        and len(tokenizer("")["input_ids"]) == 2
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for folder in (tmp_path, tmp_path / "tokenizer"):
        assert build.load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    assert build.load_tokenizer(tmp_path)("The owls").input_ids == tokenizer("The owls").input_ids
    with pytest.raises(
        CorpusError, match=r"nothing/tokenizer/tokenizer.json is missing: build it with"
    ):
        build.load_tokenizer(tmp_path / "nothing")


# ---------------------------------------------------------------- pretraining text


def test_readmes_that_repeat_a_held_out_document_are_left_out():
    def module(name: str) -> Module:
        return Module(
            "owls",
            name,
            name,
            [item(f"{name}x", 40)],
            "",
            [f"{name} says something in a comment, " * 8],
        )

    modules = {"train": [module("a")], "validation": [module("b")], "test": [module("c")]}
    quote = lambda module: (
        f"# From the pages\n{modules[module][0].items[0].body} and so on and on it goes" + "."
    )
    fresh = "# Fresh\n" + " ".join(f"word{i}" for i in range(40))
    rows = build.embedded_text(
        modules,
        {"owls": "\n".join([quote("test"), fresh, quote("validation")]), "hens": quote("train")},
    )
    assert {source for _, source, _, _ in rows} == {"a", "owls", "hens"}
    assert [text for text, source, _, _ in rows if source == "owls"] == [fresh]
    assert {kind for _, _, kind, _ in rows} == {"short"}


def test_pages_and_sources_are_long_and_docstrings_and_comments_are_short():
    page = Module(
        "owls",
        "owls.a",
        "owls",
        [item("b", 500), item("c", 500), item("d", 2)],
        "x = 1\n" * 1000,
        ["A comment. " * 30, "brief"],
    )
    rows = build.embedded_text({"train": [page], "validation": [], "test": []}, {})
    assert [(len(text) > build.LONG, kind) for text, _, kind, _ in rows] == [
        (False, "short")
    ] * 3 + [(True, "long")] * 2
    assert rows[3][0] == "\n\n".join(some.text() for some in page.items) and rows[4][0] == page.code


def test_a_folder_of_text_is_read_whole_in_the_order_of_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    pq.write_table(pa.table({"text": ["one", " \n"], "source": ["s", "t"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["two"]}), tmp_path / "c.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "source": 7}\n')
    (tmp_path / "deep" / "e.txt").write_text("é" * 5000, encoding="utf-8")
    (tmp_path / "README.md").write_text("not text")
    rows = build.folder_text(tmp_path)
    assert [(text[:5], source, kind) for text, source, kind, _ in rows] == [
        ("three", "a.jsonl#0", "short"),
        ("four", "7", "short"),
        ("one", "s", "short"),
        ("two", "c.parquet#0", "short"),
        ("ééééé", "deep/e.txt", "long"),
    ]
    assert [split for *_, split in rows].count(
        "validation"
    ) == 1  # of four short ones; one long one alone is not divided


def test_a_share_of_the_texts_is_held_out_whatever_the_sources_are_called():
    many = [(f"text {i}", f"source {i}") for i in range(2000)]
    assert [row[3] for row in build.as_rows(many)] == [
        build.held_out(source) for _, source in many
    ]  # by sources, where there are enough
    for sources in (lambda i: "corpus", lambda i: f"half {i % 2}", lambda i: f"tenth {i % 10}"):
        for texts in (
            [f"text {i}" for i in range(400)],
            [f"{i} " * 3000 for i in range(60)],
            ["a", "b"],
        ):
            splits = [
                split
                for *_, split in build.as_rows([(text, sources(i)) for i, text in enumerate(texts)])
            ]
            assert 1 <= splits.count("validation") <= max(1, len(texts) / 10) and "train" in splits
            assert splits == [
                split
                for *_, split in build.as_rows([(text, sources(i)) for i, text in enumerate(texts)])
            ]


def test_each_kind_holds_out_and_equal_texts_go_together():
    rows = build.as_rows(
        [
            (text, "one")
            for text in [
                *["same"] * 50,
                *(f"short {i}" for i in range(9)),
                *(f"{i} " * 3000 for i in range(5)),
            ]
        ]
    )
    for kind in ("short", "long"):
        assert {split for _, _, own, split in rows if own == kind} == {"train", "validation"}
    assert len({split for text, *_, split in rows if text == "same"}) == 1
    assert {split for *_, split in build.as_rows([("alone", "one")])} == {"train"}


@pytest.fixture
def hub(monkeypatch):
    """hub(load): `datasets` with another load_dataset."""

    def install(load):
        monkeypatch.setitem(
            sys.modules,
            "datasets",
            SimpleNamespace(load_dataset=load, exceptions=SimpleNamespace(DatasetsError=OSError)),
        )

    return install


def test_the_hubs_text_is_streamed_up_to_a_limit_and_sentences_are_joined(hub):
    hub(
        lambda name, *arguments, **options: (
            {"text": f"{name.partition('/')[0]} {i}"}
            for i in range(600 if options["streaming"] else 0)
        )
    )
    rows = build.hub_text(2)
    assert [source for _, source, _, _ in rows] == [
        "c4#0",
        "c4#1",
        "wikipedia#0",
        "wikipedia#1",
        "bookcorpus#0",
        "bookcorpus#1",
    ]
    assert (
        rows[1][0] == "allenai 1"
        and rows[5][0].split("\n")[0] == "bookcorpus 256"
        and len(rows[5][0].split("\n")) == 256
    )
    assert len(build.hub_text(1000)) == 600 + 600 + 3


# ---------------------------------------------------------------- another source

DOCUMENTS = {"a": "red fox runs by night", "b": "green hen sleeps", "c": "blue owl"}
QUERIES = {"1": ("fox", ["a"]), "2": ("who sleeps", ["b", "c"])}


def table(
    folder: Path, split: str = "test", passages=DOCUMENTS, queries=QUERIES, evidence: bool = True
) -> Path:
    """A mirror in parquet."""
    folder.mkdir(exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "pid": list(passages),
                "dataset": ["toy"] * len(passages),
                "passage": list(passages.values()),
            }
        ),
        folder / f"documents-{split}.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "qid": list(queries),
                "dataset": ["toy"] * len(queries),
                "query": [query for query, _ in queries.values()],
                "answer_pids": [answers for _, answers in queries.values()],
            }
        ),
        folder / f"queries-{split}.parquet",
    )
    if evidence:
        pq.write_table(
            pa.table(
                {
                    "qid": ["1"],
                    "dataset": ["toy"],
                    "pid": ["a"],
                    "start_frac": [0.25],
                    "end_frac": [0.5],
                }
            ),
            folder / f"evidence-{split}.parquet",
        )
    return folder


def lines(folder: Path, name: str = "toy", split: str = "test") -> Path:
    """The same in the hub's files."""
    for kind, rows in (
        ("documents", [dict(pid=pid, passage=text) for pid, text in DOCUMENTS.items()]),
        (
            "queries",
            [
                dict(qid=qid, query=query, answer_pids=answers)
                for qid, (query, answers) in QUERIES.items()
            ],
        ),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{name}_{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return folder


def vocabulary(folder: Path, pieces: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789."
    (folder / "vocab.txt").write_text(
        "\n".join(
            [
                *build.SPECIAL,
                *letters,
                *("##" + letter for letter in letters),
                *(f"word{i}" for i in range(pieces)),
            ]
        )
        + "\n"
    )
    return folder


@pytest.fixture
def other(tmp_path):
    """Settings of a build from folders: a mirror, a text and a vocabulary, which a test may spoil."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The red fox runs by night. " * 20)
    return dict(
        source=str(table(tmp_path / "mirror")),
        pretraining=str(tmp_path / "text"),
        tokenizer=str(vocabulary(tmp_path / "vocabulary")),
        show_progress=False,
    )


def test_a_mirror_in_parquet_comes_out_as_it_went_in(other, tmp_path):
    table(
        tmp_path / "mirror",
        "train",
        passages={"x": "a hen"},
        queries={"9": ("hen", ["x"])},
        evidence=False,
    )
    manifest = build.build(tmp_path / "corpus", **other)
    assert manifest["tasks"] == {
        "toy": {"train": {"documents": 1, "queries": 1}, "test": {"documents": 3, "queries": 2}}
    }
    assert manifest["packages"] == {} and manifest["vocabulary"] == 5 + 2 * 37
    task = locov1.load("toy", tmp_path / "corpus")
    assert task == locov1.load("toy", tmp_path / "mirror")
    assert (task.documents, task.evidence) == (DOCUMENTS, {"1": ("a", 0.25, 0.5)}) and task.qrels[
        "2"
    ] == {"b": 1, "c": 1}
    assert locov1.load("toy", tmp_path / "corpus", "train").queries == {"9": "hen"}
    assert build.load_tokenizer(tmp_path / "corpus").convert_tokens_to_ids(list(build.SPECIAL)) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_mirror_in_jsonl_comes_out_as_it_went_in(other, tmp_path):
    lines(lines(tmp_path / "lines"), "other")
    lines(tmp_path / "lines", "toy", "validation")
    manifest = build.build(tmp_path / "corpus", **other | dict(source=str(tmp_path / "lines")))
    assert {name: set(splits) for name, splits in manifest["tasks"].items()} == {
        "toy": {"validation", "test"},
        "other": {"test"},
    }
    for name in ("toy", "other"):
        assert locov1.load(name, tmp_path / "corpus") == locov1.load(name, tmp_path / "lines")
    assert locov1.load("other", tmp_path / "corpus").documents == DOCUMENTS


def test_a_graded_mirror_comes_out_as_it_went_in(other, tmp_path, task_files):
    documents = [dict(pid=pid, dataset="graded", passage=text) for pid, text in DOCUMENTS.items()]
    queries = [
        dict(qid="1", dataset="graded", query="fox", answer_pids={"a": 2, "b": 1, "c": 0}),
        dict(qid="2", dataset="graded", query="hen", answer_pids={"b": 1}),
    ]
    source = task_files(tmp_path / "graded", documents, queries, layout="beir")
    build.build(tmp_path / "corpus", **other | dict(source=str(source)))
    assert locov1.load("graded", tmp_path / "corpus") == locov1.load("graded", source)
    assert locov1.load("graded", tmp_path / "corpus").qrels == {
        "1": {"a": 2, "b": 1},
        "2": {"b": 1},
    }


def test_pretraining_text_and_tokenizer_of_ones_own(other, tmp_path):
    build.build(tmp_path / "corpus", **other | dict(tokenizer="embedded", vocabulary=100))
    assert build.pretraining(tmp_path / "corpus", "short", build.held_out("a.txt")) == [
        "The red fox runs by night. " * 20
    ]
    assert {"fox", "night"} < build.load_tokenizer(tmp_path / "corpus").get_vocab().keys()
    build.build(
        tmp_path / "again", **other | dict(tokenizer=str(tmp_path / "corpus" / "tokenizer"))
    )
    first, again = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("corpus", "again")
    )
    assert again["content"] == first["content"]


def test_berts_own_files_give_a_tokenizer_that_pads_and_masks(tmp_path):
    """tokenizer.json and a configuration that names no special tokens: what the hub has for bert-base-uncased."""
    build.make_tokenizer(str(vocabulary(tmp_path / "bert")), [], 0).save_pretrained(
        tmp_path / "hub"
    )
    (tmp_path / "hub" / "tokenizer_config.json").write_text(
        '{"do_lower_case": true, "model_max_length": 512}'
    )
    tokenizer = build.make_tokenizer(str(tmp_path / "hub"), [], 0)
    assert [
        tokenizer.pad_token,
        tokenizer.unk_token,
        tokenizer.cls_token,
        tokenizer.sep_token,
        tokenizer.mask_token,
    ] == list(build.SPECIAL)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real sets are not beside the project")
def test_real_sets_load_with_their_counts():
    assert set(locov1.splits(REAL)) == set(build.SPLITS)
    task = locov1.load("qmsum", REAL)
    assert (len(task.queries), len(task.documents)) == (272, 272)
    assert all(len(pids) == 1 for pids in task.qrels.values())


# ---------------------------------------------------------------- what cannot be used


def spoil(name: str, text: str | bytes):
    """A build whose pretraining text has a file more."""

    def change(folder: Path) -> dict:
        path = folder / "text" / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return {}

    return change


def parquet(columns: dict, cut: int | None = None):
    def change(folder: Path) -> dict:
        path = folder / "text" / "b.parquet"
        pq.write_table(pa.table(columns), path)
        path.write_bytes(path.read_bytes()[:cut])
        return {}

    return change


def tokens(name: str, text: str | bytes):
    """A build with another tokenizer folder."""

    def change(folder: Path) -> dict:
        (folder / "tokens").mkdir()
        (folder / "tokens" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return dict(tokenizer=str(folder / "tokens"))

    return change


def emptied(folder: Path) -> dict:
    (folder / "text" / "a.txt").write_text(" \n")
    return {}


def no_test_split(folder: Path) -> dict:
    for path in list((folder / "mirror").iterdir()):
        path.rename(path.with_name(path.name.replace("test", "train")))
    return {}


def occupied(folder: Path) -> dict:
    (folder / "corpus").mkdir()
    (folder / "corpus" / "thesis.tex").touch()
    return {}


UNUSABLE = [
    (
        lambda folder: dict(natural=["page_deep", "tial"]),
        ["unknown task 'tial'", "page_deep, page_shallow, tail, digest"],
    ),
    (lambda folder: dict(books=[1024, 100]), ["books: 100 tokens", "512"]),
    (
        lambda folder: dict(source="embedded", packages=("no-such-owls",)),
        ["no-such-owls", "requirements.lock"],
    ),
    (occupied, ["corpus holds something else", "no manifest.json", "another folder"]),
    (
        lambda folder: dict(source=str(folder / "nowhere")),
        ["nowhere is no folder", "documents-<split>.parquet"],
    ),
    (no_test_split, ["mirror has no test split", "queries-test.parquet"]),
    (
        lambda folder: table(folder / "mirror", passages=DOCUMENTS | {"b": None}) and {},
        ["documents-test.parquet", "document 'b' of toy has a null passage"],
    ),
    (
        lambda folder: dict(pretraining=str(folder / "nowhere")),
        ["nowhere is no folder", "data.pretraining"],
    ),
    (emptied, ["text has no text", "a column `text`"]),
    (spoil("b.txt", "é".encode("latin-1")), ["text/b.txt: is not UTF-8"]),
    (spoil("b.jsonl", '{"text": "é"}\n'.encode("latin-1")), ["text/b.jsonl:1:", "no JSON object"]),
    (spoil("b.jsonl", '{"text": "owl"}\n{"text": null}\n'), ["text/b.jsonl: text 2 is null"]),
    (spoil("b.jsonl", '{"text": "owl"}\n\n{"text": "ow'), ["text/b.jsonl:3:", "no JSON object"]),
    (spoil("b.jsonl", '{"text": "owl"}\n{"txt": "owl"}\n'), ["text/b.jsonl:2: has no text"]),
    (spoil("b.jsonl", '{"text": "owl"}\n["owl"]\n'), ["text/b.jsonl:2: has no text"]),
    (spoil("b.jsonl", "[" * 100_000), ["text/b.jsonl:1:", "no JSON object"]),
    (spoil("b.parquet", b""), ["text/b.parquet cannot be read"]),
    (parquet({"text": ["owl"] * 9}, cut=-40), ["text/b.parquet cannot be read", "fetch it again"]),
    (parquet({"txt": ["owl"]}), ["text/b.parquet has no column text"]),
    (parquet({"text": ["owl", None]}), ["text/b.parquet: text 2 is null"]),
    (parquet({"text": [1, 2]}), ["text/b.parquet: text 1 is int"]),
    (
        lambda folder: dict(tokenizer=str(folder / "nowhere")),
        ["nowhere has neither vocab.txt nor tokenizer.json"],
    ),
    (
        lambda folder: dict(tokenizer=str(folder / "text")),
        ["text has neither vocab.txt nor tokenizer.json"],
    ),
    (tokens("vocab.txt", "[PAD]\n[UNK]\n[CLS]\nowl\n"), ["tokens/vocab.txt has no [SEP], [MASK]"]),
    (tokens("vocab.txt", ""), ["tokens/vocab.txt has no [PAD], [UNK]"]),
    (tokens("vocab.txt", "é\n".encode("latin-1")), ["tokens/vocab.txt", "UTF-8"]),
    (tokens("tokenizer.json", '{"version": "1.0", "trunc'), ["tokens", "tokenizer.json"]),
    (tokens("tokenizer.json", "{}"), ["tokens", "tokenizer.json"]),
]


@pytest.mark.parametrize("change, parts", UNUSABLE, ids=[parts[0] for _, parts in UNUSABLE])
def test_what_cannot_be_used_is_named_in_one_line_and_nothing_is_written(
    other, tmp_path, change, parts
):
    options = other | change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorpusError) as error:
        build.build(tmp_path / "corpus", **options)
    assert "\n" not in str(error.value)
    for some in parts:
        assert some in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lone_surrogate_is_replaced_or_named(other, tmp_path):
    """JSON can spell half a character, which no file can hold."""
    spoil("b.jsonl", '{"text": "the red \\ud800 fox"}\n')(tmp_path)
    try:
        build.build(tmp_path / "corpus", **other)
    except CorpusError as error:
        assert "b.jsonl" in str(error)
    else:
        assert "the red \ufffd fox" in [
            *build.pretraining(tmp_path / "corpus", "short"),
            *build.pretraining(tmp_path / "corpus", "short", "validation"),
        ]


def test_a_lone_surrogate_of_a_mirror_is_replaced_or_named(other, tmp_path):
    path = lines(tmp_path / "lines") / "documents" / "toy_test.jsonl"
    path.write_text(path.read_text().replace("blue owl", "blue \\ud800 owl"))
    try:
        build.build(tmp_path / "corpus", **other | dict(source=str(tmp_path / "lines")))
    except CorpusError as error:
        assert "toy_test.jsonl" in str(error) or "'c'" in str(error)
    else:
        assert locov1.load("toy", tmp_path / "corpus").documents["c"] == "blue \ufffd owl"


def test_a_folder_that_is_named_like_a_file_is_no_text(other, tmp_path):
    (tmp_path / "text" / "old.txt").mkdir()
    assert len(build.folder_text(tmp_path / "text")) == 1


def test_without_a_network_the_hub_is_named_with_the_way_out(hub, monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    hub(offline)
    with pytest.raises(
        CorpusError,
        match=r"^allenai/c4 cannot be read from the hub \(ConnectionError: no network\): .*data.pretraining a folder",
    ):
        build.hub_text(1)
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda name, **options: asked.append(options) or offline(),
    )
    for answer in (
        offline,
        lambda *_: None,
    ):  # the hub does not answer; or it does, and then breaks off
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
        with pytest.raises(
            CorpusError,
            match="tokenizer 'bert-base-uncased' is no folder here .*vocab.txt.*set data.tokenizer to embedded",
        ):
            build.make_tokenizer("bert-base-uncased", [], 0)
    assert asked == [
        {"trust_remote_code": False}
    ]  # of the second only: it would ask for most of a minute


# ---------------------------------------------------------------- writing


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def old(other, tmp_path):
    """A corpus that is there, and the settings of the next, which has another text."""
    build.build(tmp_path / "corpus", **other)
    (tmp_path / "text" / "b.txt").write_text("And another.")
    return files(tmp_path / "corpus")


def refused(other, tmp_path, old) -> str:
    """The message of a build that fails and leaves all as it was."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CorpusError) as error:
        build.build(tmp_path / "corpus", **other)
    assert files(tmp_path / "corpus") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(error.value)


def test_a_corpus_that_cannot_take_its_place_leaves_the_old_one(other, tmp_path, old, monkeypatch):
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, full)
    assert "corpus cannot be written (No space left on device)" in refused(other, tmp_path, old)


def test_a_failure_at_the_last_step_leaves_the_old_corpus(other, tmp_path, old, monkeypatch):
    """The draft fails to take the folder's name, once; what is moved aside before may move back."""
    failed = []

    def once(move):
        def moved(source, target, **options):
            if Path(target) == tmp_path / "corpus" and not failed:
                failed.append(source)
                full()
            move(source, target, **options)

        return moved

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, once(getattr(os, name)))
    refused(other, tmp_path, old)
    assert len(failed) == 1


@pytest.mark.parametrize("name", ["save", "counts"])
def test_a_full_disk_leaves_the_old_corpus_and_no_draft(other, tmp_path, old, monkeypatch, name):
    monkeypatch.setattr(build, name, full)
    assert "No space left on device" in refused(other, tmp_path, old)


@pytest.mark.parametrize("limit", [100, 20_000], ids=["tables", "tokenizer"])
def test_a_file_that_cannot_grow_leaves_the_old_corpus_and_no_draft(other, tmp_path, limit):
    """The system's own refusal, which the libraries that write report in their own ways."""
    vocabulary(
        tmp_path / "vocabulary", pieces=5_000
    )  # its tokenizer.json has 100 kB, the tables have less than one
    build.build(tmp_path / "corpus", **other)
    old = files(tmp_path / "corpus")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        error = pytest.raises(CorpusError, build.build, tmp_path / "corpus", **other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value)
    assert files(tmp_path / "corpus") == old and not list(tmp_path.glob(".corpus*"))


def test_an_interrupted_write_leaves_the_old_corpus_and_no_draft(other, tmp_path, old, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path / "corpus", **other)
    assert files(tmp_path / "corpus") == old and not list(tmp_path.glob(".corpus*"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_no_write_permission_names_the_folder(other, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(CorpusError, match="shut/corpus cannot be written .Permission denied"):
        build.build(tmp_path / "shut" / "corpus", **other)


def test_a_file_in_the_folders_place_stays(other, tmp_path):
    (tmp_path / "corpus").write_text("mine")
    with pytest.raises(CorpusError, match="corpus"):
        build.build(tmp_path / "corpus", **other)
    assert (tmp_path / "corpus").read_text() == "mine" and not list(tmp_path.glob(".corpus*"))


def test_an_empty_folder_and_missing_parents_are_welcome(other, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "far" / "away"):
        build.build(folder, **other)
        assert (folder / "manifest.json").is_file() and (folder.stat().st_mode & 0o777) == 0o755
    shutil.rmtree(tmp_path / "far")
