"""Every layout gives the same task; what a source has is looked up; what is wrong is named."""

import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.benchmark import locov1, metrics, search, sources
from lib.benchmark.task import CorpusError
from lib.corpus.pretraining import folder_text

ROOT = Path(__file__).parents[2]
DOCUMENTS = {"d1": "the red fox runs by night", "d2": "Die Füchsin 🦊 schläft", "d3": "owl by day"}
QUERIES = {"q1": "red fox", "q2": "vixen"}
QRELS = {"q1": {"d1": 2, "d3": 1}, "q2": {"d2": 1}}


@pytest.fixture
def beir(task_files):
    """beir(folder, …): the task in BEIR's files, with a grade of 0 and a query of another split."""

    def write(folder, split="test", titles=False, header=True):
        documents = [
            dict(pid=pid, passage=text, title="A title" if titles else "")
            for pid, text in DOCUMENTS.items()
        ]
        queries = [
            dict(qid=qid, query=text, answer_pids={**QRELS[qid], "zero": 0})
            for qid, text in QUERIES.items()
        ]
        task_files(
            folder,
            documents,
            [*queries, dict(qid="q9", query="of another split", answer_pids={})],
            layout="beir",
            split=split,
        )
        if not header:
            path = folder / "qrels" / f"{split}.tsv"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        return folder

    return write


def refused(call, *parts) -> None:
    with pytest.raises(CorpusError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value), error.value


@pytest.mark.parametrize("header", [True, False])
def test_a_beir_folder_is_a_task_with_its_grades(beir, tmp_path, header):
    task = locov1.load("fables", beir(tmp_path / "fables", header=header))
    assert (task.documents, task.queries, task.qrels) == (DOCUMENTS, QUERIES, QRELS)
    assert (
        metrics.ndcg(search.bm25(task.documents, {"q1": "red fox owl"}), {"q1": QRELS["q1"]}) > 0.9
    )


def test_a_folder_of_beir_folders_is_its_tasks_and_a_title_is_a_line(beir, tmp_path):
    (
        beir(tmp_path / "a", "test"),
        beir(tmp_path / "b", "dev", titles=True),
        beir(tmp_path / "b", "train", titles=True),
    )
    assert locov1.splits(tmp_path) == ["train", "validation", "test"]
    assert (
        locov1.tasks(tmp_path, "test"),
        locov1.tasks(tmp_path, "validation"),
        locov1.tasks(tmp_path, "train"),
    ) == (["a"], ["b"], ["b"])
    assert locov1.load("b", tmp_path, "validation").documents["d3"] == "A title\nowl by day"
    refused(lambda: locov1.load("a", tmp_path, "train"), tmp_path, "'a'", "did you mean 'b'")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("q1\td1", (":4:", "tabs")),
        ("q1\td1\tyes", (":4:", "whole number")),
        ("q1 d1 1", (":4:", "tabs")),
    ],
)
def test_a_faulty_judgement_is_named_by_its_line(beir, tmp_path, line, parts):
    beir(tmp_path / "fables")
    path = tmp_path / "fables" / "qrels" / "test.tsv"
    path.write_text("\n".join([*path.read_text().splitlines()[:3], line]) + "\n")
    refused(lambda: locov1.load("fables", tmp_path), path, *parts)


def test_a_judgement_of_a_document_that_is_not_there_is_left_out_and_counted(beir, tmp_path):
    """BEIR's own ArguAna has five of them."""
    whole = locov1.load("fables", beir(tmp_path / "fables").parent)
    path = tmp_path / "fables" / "qrels" / "test.tsv"
    path.write_text(path.read_text() + "q2\tlost\t1\n")
    task = locov1.load("fables", tmp_path)
    assert (task.qrels, task.queries, task.dropped) == (whole.qrels, whole.queries, 1)
    path.write_text("query-id\tcorpus-id\tscore\nq2\tlost\t1\n")
    refused(lambda: locov1.load("fables", tmp_path), "queries.jsonl", "fables has no queries")


def test_judgements_of_nothing_are_named_by_their_file(beir, tmp_path):
    beir(tmp_path / "fables")
    (tmp_path / "fables" / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t0\n"
    )
    refused(lambda: locov1.load("fables", tmp_path), "test.tsv calls no document relevant")


def test_a_collection_one_folder_deeper_is_a_task_too(beir, tmp_path):
    """CQADupStack is a folder of forums."""
    beir(tmp_path / "scifact")
    beir(tmp_path / "cqadupstack" / "android")
    assert locov1.tasks(tmp_path) == ["cqadupstack/android", "scifact"]
    assert locov1.load("cqadupstack/android", tmp_path).queries == QUERIES


def test_hidden_files_are_no_tasks_and_no_text(beir, tmp_path):
    beir(tmp_path / "beir" / "scifact")
    beir(tmp_path / "beir" / ".cache")
    assert locov1.tasks(tmp_path / "beir") == ["scifact"]
    (tmp_path / "lines" / "queries").mkdir(parents=True)
    for name in ("a_test.jsonl", "._a_test.jsonl"):
        (tmp_path / "lines" / "queries" / name).write_text("{}")
    assert locov1.tasks(tmp_path / "lines") == ["a"]
    (tmp_path / "text" / ".git").mkdir(parents=True)
    for name in (".git/x.txt", "._a.txt"):
        (tmp_path / "text" / name).write_bytes(b"\xff")
    (tmp_path / "text" / "a.txt").write_text("\ufeffowl", encoding="utf-8")
    assert [row[:2] for row in folder_text(tmp_path / "text")] == [("owl", "a.txt")]


def test_a_text_that_is_a_number_is_named_as_one(tmp_path):
    refused(
        lambda: locov1.assemble("t", "test", [dict(pid="d", passage=5)], []),
        "document 'd' of t is 5 and no text",
    )


def test_a_folder_of_texts_is_searched_without_queries(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deeper" / ".git").mkdir(parents=True)
    for name, text in {
        "a.txt": "\ufeffred fox",
        "deeper/B.MD": "# owl\r\n",
        "deeper/empty.md": " \n",
        "deeper/.git/x.txt": "hidden",
        "picture.png": "no",
    }.items():
        (folder / name).write_bytes(text.encode())
    assert locov1.tasks(folder) == ["notes"] and locov1.splits(folder) == ["test"]
    task = locov1.load("notes", folder)
    assert (
        task.documents == {"a.txt": "red fox", "deeper/B.MD": "# owl\r\n"}
        and not task.queries
        and not task.qrels
    )
    assert list(search.bm25(task.documents, {"q": "owl"})["q"]) == ["deeper/B.MD"]
    (folder / "latin.txt").write_bytes("Füchsin".encode("latin-1"))
    refused(lambda: locov1.load("notes", folder), "latin.txt", "UTF-8")


def test_what_would_score_a_beir_task_wrongly_is_named(beir, tmp_path):
    folder = beir(tmp_path / "fables")
    whole = {
        path: path.read_text(encoding="utf-8")
        for path in (
            folder / "queries.jsonl",
            folder / "corpus.jsonl",
            folder / "qrels" / "test.tsv",
        )
    }
    queries, corpus, qrels = whole
    queries.write_text(whole[queries].splitlines()[0] + "\n", encoding="utf-8")
    refused(lambda: locov1.load("fables", folder), queries, "'q2' is not there")
    queries.write_text(whole[queries], encoding="utf-8")
    corpus.write_text(
        whole[corpus].replace('"title": "", "text": "owl by day"', '"title": "A", "text": null'),
        encoding="utf-8",
    )
    refused(lambda: locov1.load("fables", folder), corpus, "'d3'", "null passage")
    corpus.write_text(whole[corpus], encoding="utf-8")
    qrels.write_text(whole[qrels] + "q1\td1\t1\n", encoding="utf-8")
    refused(lambda: locov1.load("fables", folder), qrels, "'d1' twice, as 2 and 1")
    qrels.write_text(
        "\ufeff" + "".join(whole[qrels].splitlines(keepends=True)[1:]), encoding="utf-8"
    )
    assert locov1.load("fables", folder).qrels == QRELS  # a byte order mark, no header


def test_a_linked_beir_folder_is_named_as_its_link(beir, tmp_path):
    beir(tmp_path / "elsewhere" / "v1")
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "scifact").symlink_to(tmp_path / "elsewhere" / "v1")
    assert (
        locov1.tasks(tmp_path / "beir") == ["scifact"]
        and locov1.load("scifact", tmp_path / "beir").queries == QUERIES
    )


@pytest.mark.parametrize("gain", ["2", True, 1.5])
def test_a_grade_that_is_no_whole_number_is_named(gain):
    with pytest.raises(CorpusError, match="query 'q' of t grades 'd' with"):
        locov1.assemble(
            "t",
            "test",
            [dict(pid="d", passage="x")],
            [dict(qid="q", query="x", answer_pids={"d": gain})],
        )


def test_notes_in_a_folder_called_documents_are_texts(tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.md").write_text("owl")
    assert list(locov1.load(tmp_path.name, tmp_path).documents) == ["documents/a.md"]
    refused(
        lambda: locov1.load("qmsum", tmp_path),
        "a folder of texts: no parquet, jsonl or BEIR task is there",
    )


def test_a_folder_of_nothing_says_what_it_needs(tmp_path):
    refused(
        lambda: locov1.tasks(tmp_path),
        tmp_path,
        "corpus.jsonl",
        "queries/<task>_<split>.jsonl",
        ".txt",
    )


# ------------------------------------------------------------------ the hub


@pytest.fixture
def served(monkeypatch):
    """served(tables): load_dataset and get_dataset_split_names answer from `tables`.

    tables: {(name, configuration, split): rows}.
    """

    def serve(tables):
        def load_dataset(name, config=None, split=None, trust_remote_code=False):
            assert not trust_remote_code
            return datasets.Dataset.from_list(tables[name, config, split])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(
            datasets,
            "get_dataset_split_names",
            lambda name: [split for other, _, split in tables if other == name],
        )
        monkeypatch.setattr(sources, "reachable", lambda name: True)

    return serve


def test_the_splits_of_the_hub_are_discovered(served):
    rows = (
        [dict(qid="q1", dataset="fables", query="fox", answer_pids=["d1"])],
        [dict(pid="d1", dataset="fables", passage="red fox")],
    )
    served(
        {
            (name, None, split): rows[name == sources.HUB_DOCUMENTS]
            for name in (sources.HUB_QUERIES, sources.HUB_DOCUMENTS)
            for split in ("test", "train")
        }
    )
    assert locov1.splits("hub") == ["train", "test"]
    assert locov1.load("fables", "hub", "train").queries == {"q1": "fox"}


def test_a_split_that_the_hub_lacks_is_said_to_be_lacking(served):
    rows = (
        [dict(qid="q1", dataset="fables", query="fox", answer_pids=["d1"])],
        [dict(pid="d1", dataset="fables", passage="red fox")],
    )
    served(
        {
            (name, None, "test"): rows[name == sources.HUB_DOCUMENTS]
            for name in (sources.HUB_QUERIES, sources.HUB_DOCUMENTS)
        }
    )
    refused(lambda: locov1.load("fables", "hub", "train"), "has no train split: it has test")
    refused(lambda: locov1.training_split("hub"), "has no train split", "allow_test_training: true")
    assert locov1.training_split("hub", allow_test_training=True) == "test"


@pytest.mark.parametrize(
    ("there", "allowed", "split"),
    [
        (["train", "test"], False, "train"),
        (["train", "test"], True, "train"),
        (["train", "validation", "test"], "always", "test"),
        (["test"], "always", "test"),
    ],
)
def test_a_row_is_trained_on_test_beside_a_train_split_only_if_it_always_is(there, allowed, split):
    assert locov1.training_split("mine", allowed, there) == split


def test_longembed_comes_through_the_same_door(served):
    def part(kind, length=None):
        more = {} if length is None else {"context_length": length}
        return {
            "corpus": [dict(doc_id=f"d{length}", text=f"red fox {length}", **more)],
            "queries": [dict(qid=f"q{length}", text="fox", **more)],
            "qrels": [dict(qid=f"q{length}", doc_id=f"d{length}", **more)],
        }[kind]

    served(
        {
            (sources.LONGEMBED, "needle", kind): part(kind, 256) + part(kind, 512)
            for kind in ("corpus", "queries", "qrels")
        }
        | {
            (sources.LONGEMBED, "qmsum", kind): part(kind)
            for kind in ("corpus", "queries", "qrels")
        }
    )
    assert locov1.load("needle_512", "longembed").qrels == {"q512": {"d512": 1}}
    assert locov1.load("qmsum", "longembed").documents == {"dNone": "red fox None"}
    assert len(locov1.tasks("longembed")) == 4 + 2 * 8
    refused(lambda: locov1.load("needle", "longembed"), "dwzhu/LongEmbed", "did you mean 'needle_")
    refused(lambda: locov1.tasks("longembed", "train"), "no train split", "it has test")


# ------------------------------------------------------------------ the paper's twelve


def test_the_twelve_tasks_are_the_papers_table_10():
    printed = pd.read_csv(ROOT / "data" / "paper" / "table10_tasks.csv").set_index("task")
    assert set(printed.index) == set(locov1.LOCOV1) and len(locov1.LOCOV1) == 12
    for name, described in locov1.LOCOV1.items():
        for column in (
            "domain",
            "train_queries",
            "train_documents",
            "test_queries",
            "test_documents",
            "query_characters",
            "document_characters",
        ):
            assert printed.at[name, column] == getattr(described, column), (name, column)


def test_a_task_of_600_million_characters_stays_under_two_gigabytes(tmp_path):
    """10,000 documents of 60,000 characters, half of the file another task; in its own process."""
    schema = pa.schema([("pid", pa.string()), ("dataset", pa.string()), ("passage", pa.string())])
    with pq.ParquetWriter(tmp_path / "documents-test.parquet", schema, compression="zstd") as file:
        for start in range(0, 20_000, 500):
            file.write_table(
                pa.table(
                    [
                        [f"d{i}" for i in range(start, start + 500)],
                        ["big" if i % 2 else "other" for i in range(start, start + 500)],
                        [f"{i} " + "lorem ipsum " * 5000 for i in range(start, start + 500)],
                    ],
                    schema=schema,
                )
            )
    pq.write_table(
        pa.Table.from_pylist([dict(qid="q", dataset="big", query="lorem", answer_pids=["d1"])]),
        tmp_path / "queries-test.parquet",
    )
    code = f"""if True:
        import resource
        from lib.benchmark import locov1
        documents = locov1.load("big", {str(tmp_path)!r}).documents
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(len(documents), len(documents["d1"]), peak)"""
    n, characters, peak = map(
        int,
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
        ).stdout.split(),
    )
    assert (n, characters) == (10_000, 60_002) and peak * (
        1 if sys.platform == "darwin" else 1024
    ) < 2e9


def test_several_sources_stand_beside_each_other_by_their_names(task_files, tmp_path):
    def source(place, name):
        return task_files(
            place,
            [dict(pid="a", dataset=name, passage="red fox")],
            [dict(qid="1", dataset=name, query="fox", answer_pids=["a"])],
            layout="jsonl",
        )

    own, other = source(tmp_path / "own", "foxes"), source(tmp_path / "mirror", "qmsum")
    assert [
        task.name
        for task in locov1.every(own, [other, str(source(tmp_path / "third", "foxes")) + "/"])
    ] == ["foxes", "mirror/qmsum", "third/foxes"]
    with pytest.raises(CorpusError, match="are both called mirror: rename one"):
        locov1.every(own, [other, source(tmp_path / "deeper" / "mirror", "x")])
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("red fox")
    with pytest.raises(
        CorpusError, match="notes has texts and no queries, so nothing in it can be scored"
    ):
        locov1.every(own, [notes])
