"""Pretraining text: what comes from where, how long it is, and what is held out."""

import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parts import item

from lib.benchmark.sources import pretraining_sources, pretraining_texts
from lib.corpus import pretraining
from lib.corpus.build import COLUMNS, save
from lib.corpus.packages import Module
from lib.corpus.pretraining import (
    CorpusError,
    as_rows,
    cut_rows,
    embedded_text,
    folder_text,
    hub_text,
)
from lib.corpus.tokenizer import make_tokenizer


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

    def quote(split: str) -> str:
        return f"# From the pages\n{modules[split][0].items[0].body} and so on and on it goes."

    fresh = "# Fresh\n" + " ".join(f"word{i}" for i in range(40))
    rows = embedded_text(
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
    rows = embedded_text({"train": [page], "validation": [], "test": []}, {})
    assert [(len(text) > pretraining.LONG, kind) for text, _, kind, _ in rows] == [
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
    rows = folder_text(tmp_path)
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
    assert [row[3] for row in as_rows(many)] == [
        pretraining.held_out(source) for _, source in many
    ]  # by sources, where there are enough
    for sources in (lambda i: "corpus", lambda i: f"half {i % 2}", lambda i: f"tenth {i % 10}"):
        for texts in (
            [f"text {i}" for i in range(400)],
            [f"{i} " * 3000 for i in range(60)],
            ["a", "b"],
        ):
            splits = [
                split for *_, split in as_rows([(text, sources(i)) for i, text in enumerate(texts)])
            ]
            assert 1 <= splits.count("validation") <= max(1, len(texts) / 10) and "train" in splits
            assert splits == [
                split for *_, split in as_rows([(text, sources(i)) for i, text in enumerate(texts)])
            ]


def test_each_kind_holds_out_and_equal_texts_go_together():
    rows = as_rows(
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
    assert {split for *_, split in as_rows([("alone", "one")])} == {"train"}


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
    rows = hub_text(2)
    names = ["c4", "wikipedia", "bookcorpus"]
    for kind, part in (("short", rows[:6]), ("long", rows[6:])):
        assert [(row[1], row[2], row[4]) for row in part] == [
            (f"{name}#{i}", kind, name) for name in names for i in range(2)
        ]
    sentences = rows[5][0].split("\n")
    assert rows[1][0] == "allenai 1" and len(sentences) == 120 and sentences[0] == "bookcorpus 120"
    assert len(hub_text(1000)) == 2 * (600 + 600 + 5)


def test_a_document_of_several_datasets_is_of_both_kinds_cut_as_the_authors_cut_it():
    """text[:4000] of variable length, text[:8000] of the maximum: bert/src/convert_dataset.py."""
    documents = [("ab" * 100, "c4#0"), ("ab" * 3000, "c4#1"), ("ab" * 9000, "wiki#0")]
    rows = cut_rows(documents, ["c4", "c4", "wiki"])
    sizes = [(kind, dataset, len(text)) for text, _, kind, _, dataset in rows]
    assert sizes == [
        ("short", "c4", 200),
        ("short", "c4", 4000),
        ("short", "wiki", 4000),
        ("long", "c4", 200),
        ("long", "c4", 6000),
        ("long", "wiki", 8000),
    ]
    assert all(text == ("ab" * 4000)[: len(text)] for text, *_ in rows)


def test_no_dataset_is_without_held_out_text_and_no_document_is_in_two_splits():
    names = [f"{dataset}#{i}" for dataset in ("c4", "wiki", "books") for i in range(300)]
    rows = cut_rows([(f"text of {name}", name) for name in names], [name[:2] for name in names])
    split_of = {}
    for _, source, _, split, _ in rows:
        assert split_of.setdefault(source, split) == split
    for dataset in ("c4", "wi", "bo"):
        splits = [split for *_, split, own in rows if own == dataset]
        assert len(splits) == 600 and 0 < splits.count("validation") < 60


def test_texts_come_back_from_their_file_by_dataset(tmp_path):
    names = [f"{dataset}#{i}" for dataset in ("c4", "wiki") for i in range(3)]
    rows = cut_rows([(name, name) for name in names], [name[:-2] for name in names])
    for some, expected in ((rows, {"c4", "wiki"}), ([row[:4] for row in rows], {""})):
        save(tmp_path / "pretrain.parquet", some, COLUMNS["pretrain"])
        for kind in ("short", "long"):
            train, held = (
                pretraining_sources(tmp_path, kind, split) for split in ("train", "validation")
            )
            assert train.keys() == held.keys() == expected
            assert sorted(sum([*train.values(), *held.values()], [])) == names
            assert pretraining_texts(tmp_path, kind) == sum(train.values(), [])
    rows = cut_rows([("an owl " * 30, "a"), ("a hen " * 30, "b")], ["birds", "hens"])
    assert {"owl", "hen"} <= make_tokenizer("embedded", rows, 50).get_vocab().keys()


def test_each_of_several_subfolders_is_a_dataset(tmp_path):
    for name in ("c4", "books/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text(f'{{"text": "a {name}"}}\n{{"text": "b"}}\n')
    rows = folder_text(tmp_path)
    assert [(text, source, kind, dataset) for text, source, kind, _, dataset in rows] == [
        (text, f"{folder}/a.jsonl#{i}", kind, dataset)
        for kind in ("short", "long")
        for folder, dataset in (("books/deep", "books"), ("c4", "c4"))
        for i, text in enumerate([f"a {folder}", "b"])
    ]
    (tmp_path / "notes.txt").write_text("A file beside the subfolders.")
    assert {len(row) for row in folder_text(tmp_path)} == {4}  # one source, as ever
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "c4" / "a.jsonl").write_text("\n")
    assert {len(row) for row in folder_text(tmp_path)} == {4}  # one subfolder has no text


def test_a_folder_that_is_named_like_a_file_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("The red fox runs by night.")
    (tmp_path / "old.txt").mkdir()
    assert len(folder_text(tmp_path)) == 1


def test_without_a_network_the_hub_is_named_with_the_way_out(hub):
    def offline(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    hub(offline)
    with pytest.raises(
        CorpusError,
        match=r"^allenai/c4 cannot be read from the hub \(ConnectionError: no network\): "
        r".*data.pretraining a folder",
    ):
        hub_text(1)
