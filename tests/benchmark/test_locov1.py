"""A task is the same whatever file it comes from, and a faulty file is named with the way out."""

import shutil
from functools import partial
from pathlib import Path
from statistics import mean

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.benchmark import locov1, metrics, search, sources
from lib.benchmark.task import CorpusError, Task

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "loco-real"
LAYOUTS = ("parquet", "jsonl")

DOCUMENTS = [
    dict(pid="d1", dataset="fables", passage="The fox and the grapes.\r\nSour \u2028 anyway."),
    dict(pid="d2", dataset="fables", passage="Die Füchsin 🦊"),
    dict(pid="d3", dataset="fables", passage=""),
    dict(pid="d1", dataset="tales", passage="another d1"),
]
QUERIES = [
    dict(qid="q1", dataset="fables", query="who left the grapes?", answer_pids=["d1"]),
    dict(qid="q2", dataset="fables", query="vixen", answer_pids=["d2", "d1", "d2"]),
    dict(qid="q1", dataset="tales", query="the other one", answer_pids=["d1"]),
]
EVIDENCE = [
    dict(qid="q1", dataset="fables", pid="d1", start_frac=0.25, end_frac=0.5),
    dict(qid="q2", dataset="fables", pid="d2", start_frac=0.0, end_frac=1.0),
]
FABLES = Task(
    "fables",
    "test",
    {row["pid"]: row["passage"] for row in DOCUMENTS[:3]},
    {"q1": "who left the grapes?", "q2": "vixen"},
    {"q1": {"d1": 1}, "q2": {"d2": 1, "d1": 1}},
)


@pytest.fixture
def write(task_files):
    """write(folder, …): the fables, or other rows, as files of one layout; returns the folder."""

    def fables(
        folder, documents=DOCUMENTS, queries=QUERIES, evidence=None, layout="parquet", split="test"
    ):
        return task_files(folder, documents, queries, evidence, layout, split)

    return fables


def file_of(kind: str, layout: str) -> str:
    return f"{kind}-test.parquet" if layout == "parquet" else f"{kind}/fables_test.jsonl"


def changed(rows, **changes):
    """The rows with a column of the first changed."""
    return [rows[0] | changes, *rows[1:]]


def refused(call, *parts) -> None:
    """A CorpusError of one line that holds every part."""
    with pytest.raises(CorpusError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value), error.value


# ------------------------------------------------------------------ what a task is


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_task_is_its_documents_queries_and_judgements(write, tmp_path, layout):
    """Texts to the character, an answer given twice judged once, nothing of the other task."""
    assert locov1.load("fables", write(tmp_path, layout=layout)) == FABLES
    assert locov1.load("tales", str(tmp_path)) == Task(
        "tales", "test", {"d1": "another d1"}, {"q1": "the other one"}, {"q1": {"d1": 1}}
    )


def test_evidence_says_where_in_a_document_the_answer_lies(write, tmp_path):
    folder = write(
        tmp_path,
        evidence=EVIDENCE
        + [dict(qid="q1", dataset="tales", pid="d1", start_frac=None, end_frac=None)],
    )
    assert locov1.load("fables", folder).evidence == {
        "q1": ("d1", 0.25, 0.5),
        "q2": ("d2", 0.0, 1.0),
    }
    assert locov1.load("tales", folder).evidence == {}  # not known for every query


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_has_its_own_tasks(write, tmp_path, layout):
    for split, rows in (("validation", slice(0, 2)), ("train", slice(2, 3))):
        write(tmp_path, documents=DOCUMENTS, queries=QUERIES[rows], split=split, layout=layout)
    assert locov1.splits(tmp_path) == ["train", "validation"]
    assert locov1.tasks(tmp_path, "train") == ["tales"] and locov1.tasks(
        tmp_path, "validation"
    ) == ["fables"]
    assert locov1.load("tales", tmp_path, "train").split == "train"
    refused(
        lambda: locov1.load("fables", tmp_path),
        tmp_path,
        "no test split",
        "it has train, validation",
    )
    refused(lambda: locov1.tasks(tmp_path), tmp_path, "no test split", "it has train, validation")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tasks_are_sorted(write, tmp_path, layout):
    folder = write(tmp_path, queries=QUERIES[::-1], layout=layout)
    assert locov1.tasks(folder) == ["fables", "tales"] and locov1.splits(folder) == ["test"]


@pytest.mark.parametrize("ids", [(1, 2, 3), (1, "2", 3), ("1", 2, "3"), ("1", "2", "3")])
def test_ids_are_strings_whatever_the_file_holds(write, tmp_path, ids):
    documents = [dict(pid=pid, dataset="fables", passage="text") for pid in ids]
    queries = [
        dict(qid=qid, dataset="fables", query="text", answer_pids=[pid])
        for qid, pid in zip(ids, ("1", 2, "3"))
    ]
    task = locov1.load("fables", write(tmp_path, documents, queries, layout="jsonl"))
    assert list(task.documents) == list(task.queries) == ["1", "2", "3"]
    assert task.qrels == {"1": {"1": 1}, "2": {"2": 1}, "3": {"3": 1}}


def test_whole_numbers_in_parquet_are_ids_too(write, tmp_path):
    documents = [dict(pid=pid, dataset="fables", passage="text") for pid in (7, 8)]
    queries = [dict(qid=70, dataset="fables", query="text", answer_pids=[8])]
    evidence = [dict(qid=70, dataset="fables", pid=8, start_frac=0.0, end_frac=0.5)]
    task = locov1.load("fables", write(tmp_path, documents, queries, evidence))
    assert (
        task.qrels == {"70": {"8": 1}}
        and task.documents.keys() == {"7", "8"}
        and task.evidence == {"70": ("8", 0.0, 0.5)}
    )


def test_an_id_keeps_its_zeros(write, tmp_path):
    documents = [dict(pid=pid, dataset="fables", passage="text") for pid in ("007", "7", "7.0")]
    queries = [dict(qid="q", dataset="fables", query="text", answer_pids=["007"])]
    for layout in LAYOUTS:
        assert list(
            locov1.load(
                "fables", write(tmp_path / layout, documents, queries, layout=layout)
            ).documents
        ) == ["007", "7", "7.0"]


def test_numbers_beside_a_gap_are_ids_too(tmp_path):
    """A table with a gap makes floats of whole numbers: 7.0 is the id 7."""
    pq.write_table(
        pa.table({"pid": [7.0, 8.0], "dataset": ["fables"] * 2, "passage": ["a", "b"]}),
        tmp_path / "documents-test.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "qid": [70, 71],
                "dataset": ["fables"] * 2,
                "query": ["a", "b"],
                "answer_pids": [["8"], ["7"]],
            }
        ),
        tmp_path / "queries-test.parquet",
    )
    assert locov1.load("fables", tmp_path).qrels == {"70": {"8": 1}, "71": {"7": 1}}


@pytest.mark.parametrize("kind", ["pid", "qid"])
@pytest.mark.parametrize(
    "layout, id",
    [
        *((layout, id) for layout in LAYOUTS for id in (" 7", "a b", "a\tb", "", "\u00a0")),
        ("jsonl", True),
        ("jsonl", 0.5),
    ],
)
def test_an_id_that_no_run_file_can_hold_is_refused_when_it_is_read(
    write, tmp_path, layout, kind, id
):
    documents = changed(DOCUMENTS, pid=id) if kind == "pid" else DOCUMENTS
    queries = changed(QUERIES, answer_pids=["d2"]) if kind == "pid" else changed(QUERIES, qid=id)
    queries = [row | {"answer_pids": ["d2"]} if row["qid"] == "q2" else row for row in queries]
    refused(
        lambda: locov1.load("fables", write(tmp_path, documents, queries, layout=layout)),
        file_of("documents" if kind == "pid" else "queries", layout),
        "row 1",
        repr(id),
    )


def test_half_a_character_in_an_id_is_refused_when_it_is_read(write, tmp_path):
    path = write(tmp_path, layout="jsonl") / "queries" / "fables_test.jsonl"
    path.write_text(path.read_text().replace('"q1"', '"q\\ud800"'))
    refused(
        lambda: locov1.load("fables", tmp_path),
        "fables_test.jsonl",
        "the id of a query of fables (row 1)",
        "rename it",
    )


# A struct column of parquet has every row's fields in all rows; a map column comes out as pairs;
# a table of floats has not-a-numbers.
GRADES = [{"d1": 2, "d2": None, "d3": 1}, {"d1": None, "d2": 1, "d3": None}]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(GRADES, pa.struct([(pid, pa.int64()) for pid in ("d1", "d2", "d3")])),
        pa.array(
            [
                {pid: float("nan") if gain is None else float(gain) for pid, gain in row.items()}
                for row in GRADES
            ]
        ),
        pa.array(
            [[(pid, gain) for pid, gain in row.items() if gain] for row in GRADES],
            pa.map_(pa.string(), pa.int64()),
        ),
        pa.array([{pid: gain or 0 for pid, gain in row.items()} for row in GRADES]),
    ],
    ids=["struct", "floats", "map", "zeros"],
)
def test_graded_judgements_of_any_column_are_the_same(tmp_path, column):
    pq.write_table(
        pa.table(
            {"pid": ["d1", "d2", "d3"], "dataset": ["fables"] * 3, "passage": ["a", "b", "c"]}
        ),
        tmp_path / "documents-test.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "qid": ["q1", "q2"],
                "dataset": ["fables"] * 2,
                "query": ["a", "b"],
                "answer_pids": column,
            }
        ),
        tmp_path / "queries-test.parquet",
    )
    assert locov1.load("fables", tmp_path).qrels == {"q1": {"d1": 2, "d3": 1}, "q2": {"d2": 1}}


def test_gains_may_stand_in_a_column_of_their_own(tmp_path):
    pq.write_table(
        pa.table({"pid": ["d1", "d2"], "dataset": ["fables"] * 2, "passage": ["a", "b"]}),
        tmp_path / "documents-test.parquet",
    )
    queries = {"qid": ["q1"], "dataset": ["fables"], "query": ["a"], "answer_pids": [["d1", "d2"]]}
    pq.write_table(
        pa.table(queries | {"answer_gains": [[3, 0]]}), tmp_path / "queries-test.parquet"
    )
    assert locov1.load("fables", tmp_path).qrels == {"q1": {"d1": 3}}
    pq.write_table(pa.table(queries | {"answer_gains": [[3]]}), tmp_path / "queries-test.parquet")
    refused(
        lambda: locov1.load("fables", tmp_path),
        "queries-test.parquet",
        "query 'q1' of fables",
        "one gain for each",
    )


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.dictionary(pa.int8(), pa.string()), pa.large_string()]
)
def test_a_task_may_be_named_by_a_number_or_a_category(write, tmp_path, kind):
    write(
        tmp_path,
        [row | {"dataset": "7"} for row in DOCUMENTS[:3]],
        [row | {"dataset": "7"} for row in QUERIES[:2]],
    )
    for name in ("documents-test.parquet", "queries-test.parquet"):
        table = pq.read_table(tmp_path / name)
        pq.write_table(
            table.set_column(
                table.schema.get_field_index("dataset"), "dataset", table["dataset"].cast(kind)
            ),
            tmp_path / name,
        )
    assert locov1.tasks(tmp_path) == ["7"] and locov1.load("7", tmp_path).queries == FABLES.queries


def test_whose_a_task_is_does_not_hang_on_its_name(write, tmp_path):
    """A source may call its own task `BeIR/scifact`."""
    own = write(
        tmp_path / "own",
        [row | {"dataset": "BeIR/scifact"} for row in DOCUMENTS[:3]],
        [row | {"dataset": "BeIR/scifact"} for row in QUERIES[:2]],
    )
    other = write(tmp_path / "other")
    found = {task.name: (task.source, task.own_name) for task in locov1.every(own, [other])}
    assert found == {
        "BeIR/scifact": ("", "BeIR/scifact"),
        "other/fables": ("other", "fables"),
        "other/tales": ("other", "tales"),
    }
    clash = write(
        tmp_path / "clash",
        [row | {"dataset": "other/fables"} for row in DOCUMENTS[:3]],
        [row | {"dataset": "other/fables"} for row in QUERIES[:2]],
    )
    refused(lambda: locov1.every(clash, [other]), "two tasks are called 'other/fables'")


def test_the_embedded_corpus_is_that_of_the_designs_profile(write, tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(lambda: locov1.load("fables"), tmp_path / "data" / "corpus", "make repro")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "corpus")
    assert (
        locov1.load("fables") == FABLES
        and locov1.tasks() == ["fables", "tales"]
        and locov1.splits() == ["test"]
    )


# ------------------------------------------------------------------ defects of rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([*DOCUMENTS, DOCUMENTS[0]], ("'d1'", "twice", "rows 1 and 4", "make ids unique")),
        (changed(DOCUMENTS, passage=None), ("'d1'", "null passage", "row 1", "drop_null=True")),
        ([*DOCUMENTS, dict(pid=None, dataset="fables", passage="text")], ("row 4",)),
    ],
    ids=["id twice", "null passage", "null id"],
)
def test_a_faulty_document_is_named_by_file_and_row(write, tmp_path, layout, rows, parts):
    write(tmp_path, documents=rows, layout=layout)
    refused(lambda: locov1.load("fables", tmp_path), file_of("documents", layout), *parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([*QUERIES, QUERIES[0]], ("'q1'", "twice", "make ids unique")),
        (changed(QUERIES, query=""), ("'q1'", "is empty", "give it a text, or take it out")),
        (changed(QUERIES, query=" \n\u3000"), ("'q1'", "is empty")),
        (changed(QUERIES, query=None), ("'q1'", "is empty")),
        (changed(QUERIES, answer_pids=[]), ("'q1'", "no answer_pids", "judge it, or take it out")),
        (changed(QUERIES, answer_pids=None), ("'q1'", "no answer_pids")),
        (changed(QUERIES, qid=None), ("fables",)),
    ],
    ids=["id twice", "empty", "blank", "null", "no answers", "null answers", "null id"],
)
def test_a_faulty_query_is_named_by_its_file(write, tmp_path, layout, rows, parts):
    write(tmp_path, queries=rows, layout=layout)
    refused(lambda: locov1.load("fables", tmp_path), file_of("queries", layout), *parts)


def test_a_task_without_documents_or_queries_is_an_error(write, tmp_path):
    refused(
        lambda: locov1.load("fables", write(tmp_path, documents=DOCUMENTS[3:])),
        file_of("documents", "parquet"),
        "fables",
        "no documents",
    )
    for kind in ("documents", "queries"):
        folder = write(tmp_path / kind, layout="jsonl")
        (folder / file_of(kind, "jsonl")).write_text("\n")
        refused(
            partial(locov1.load, "fables", folder),
            folder / file_of(kind, "jsonl"),
            f"no {kind}",
            "fetch the file again",
        )


def test_1_and_the_string_1_are_the_same_id_twice(write, tmp_path):
    documents = [dict(pid=pid, dataset="fables", passage="text") for pid in (1, 2, "1")]
    refused(
        lambda: locov1.load("fables", write(tmp_path, documents, layout="jsonl")),
        "'1'",
        "twice",
        "rows 1 and 3",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("answers", [["d9"], ["d1", "d9", "d8", ""], [None]])
def test_a_judgement_of_a_missing_document_is_an_error(write, tmp_path, layout, answers):
    """It would lower the ideal ranking without a word."""
    write(tmp_path, queries=changed(QUERIES, answer_pids=answers), layout=layout)
    first = str(next(pid for pid in answers if pid != "d1"))
    refused(
        lambda: locov1.load("fables", tmp_path),
        tmp_path,
        "'q1'",
        repr(first),
        "take the judgement out",
    )


def test_answers_that_are_one_string_are_not_read_letter_by_letter(write, tmp_path):
    documents = [dict(pid=pid, dataset="fables", passage="text") for pid in ("d", "1", "d1", "d2")]
    refused(
        lambda: locov1.load(
            "fables", write(tmp_path, documents, changed(QUERIES, answer_pids="d1"), layout="jsonl")
        ),
        "'q1'",
        "answer_pids",
    )


@pytest.mark.parametrize(
    "span",
    [
        dict(end_frac=1.01),
        dict(start_frac=-0.01),
        dict(start_frac=0.6),
        dict(start_frac=float("nan")),
        dict(end_frac=None),
        dict(pid="d9"),
        dict(pid="d2"),
    ],
    ids=[
        "past the end",
        "before the start",
        "backwards",
        "nan",
        "half known",
        "of no document",
        "of a document that is no answer",
    ],
)
def test_evidence_outside_a_document_that_answers_is_an_error(write, tmp_path, span):
    write(tmp_path, evidence=changed(EVIDENCE, **span))
    refused(
        lambda: locov1.load("fables", tmp_path),
        "evidence-test.parquet",
        "'q1'",
        "correct or delete the evidence file",
    )


# ------------------------------------------------------------------ null passages


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drop_null_leaves_a_document_out_with_the_queries_only_it_answers(write, tmp_path, layout):
    folder = write(
        tmp_path,
        documents=[*DOCUMENTS, dict(pid="d4", dataset="fables", passage=None)],
        queries=[
            *QUERIES,
            dict(qid="q3", dataset="fables", query="nothing", answer_pids=["d4"]),
            dict(qid="q4", dataset="fables", query="both", answer_pids=["d4", "d3"]),
        ],
        layout=layout,
    )
    task = locov1.load("fables", folder, drop_null=True)
    assert task.documents == FABLES.documents and task.dropped == 1
    assert (
        task.qrels == FABLES.qrels | {"q4": {"d3": 1}} and task.queries.keys() == task.qrels.keys()
    )
    refused(lambda: locov1.load("fables", folder), "'d4'")  # only when asked for


def test_drop_null_leaves_out_the_evidence_in_it(write, tmp_path):
    evidence = [
        EVIDENCE[0],
        dict(qid="q2", dataset="fables", pid="d2", start_frac=0.0, end_frac=1.0),
    ]
    write(tmp_path, documents=[DOCUMENTS[0], DOCUMENTS[1] | dict(passage=None)], evidence=evidence)
    task = locov1.load("fables", tmp_path, drop_null=True)
    assert task.qrels == {"q1": {"d1": 1}, "q2": {"d1": 1}} and task.evidence == {
        "q1": ("d1", 0.25, 0.5)
    }


def test_a_task_of_nothing_but_null_passages_is_an_error(write, tmp_path):
    folder = write(
        tmp_path, documents=[row | dict(passage=None) for row in DOCUMENTS], layout="jsonl"
    )
    refused(
        lambda: locov1.load("fables", folder, drop_null=True),
        file_of("documents", "jsonl"),
        "no documents",
    )


# ------------------------------------------------------------------ defects of files


def test_what_is_no_folder_or_holds_nothing_says_what_to_put_there(tmp_path):
    (tmp_path / "file").touch()
    for source in (tmp_path / "nowhere", tmp_path / "file"):
        for call in (
            partial(locov1.load, "fables", source),
            partial(locov1.tasks, source),
            partial(locov1.splits, source),
        ):
            refused(call, source, "no folder", "documents-<split>.parquet")
    (tmp_path / "empty").mkdir()
    for call in (
        lambda: locov1.load("fables", tmp_path / "empty"),
        lambda: locov1.tasks(tmp_path / "empty"),
        lambda: locov1.splits(tmp_path / "empty"),
    ):
        refused(
            call,
            tmp_path / "empty",
            "holds no task",
            "documents-<split>.parquet",
            "documents/<task>_<split>.jsonl",
        )


def test_an_unknown_split_or_task_is_answered_with_the_known_ones(write, tmp_path):
    for layout in LAYOUTS:
        folder = write(tmp_path / layout, layout=layout)
        refused(
            partial(locov1.load, "fabels", folder),
            folder,
            "'fabels'",
            "did you mean 'fables'?",
            "fables, tales",
        )
        refused(partial(locov1.load, "fables", folder, "dev"), "'dev'", "train, validation, test")
        refused(partial(locov1.tasks, folder, "dev"), "'dev'", "train, validation, test")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["documents", "queries"])
def test_half_a_task_names_the_missing_file(write, tmp_path, layout, kind):
    write(tmp_path, layout=layout)
    (tmp_path / file_of(kind, layout)).unlink()
    refused(
        lambda: locov1.load("fables", tmp_path),
        tmp_path / file_of(kind, layout),
        "is missing",
        "a mirror has" if layout == "jsonl" else "fetch it",
    )


@pytest.mark.parametrize("kind", ["documents", "queries", "evidence"])
def test_a_damaged_parquet_file_is_named(write, tmp_path, kind):
    """Cut anywhere, empty, or something else altogether."""
    path = write(tmp_path, evidence=EVIDENCE) / f"{kind}-test.parquet"
    whole = path.read_bytes()
    for content in (
        *(whole[:n] for n in (0, 3, 4, 11, len(whole) // 2, len(whole) - 1)),
        whole[:-8] + b"\xff" * 4 + b"PAR1",
        b"<html>404</html>" * 9,
    ):
        path.write_bytes(content)
        refused(
            lambda: locov1.load("fables", tmp_path),
            path,
            "cannot be read",
            "delete it and fetch it again",
        )


def test_a_parquet_file_whose_text_is_damaged_is_named(write, tmp_path):
    """Parquet has no checksum: a flipped bit may leave bytes that are no text."""
    path = write(tmp_path) / "documents-test.parquet"
    pq.write_table(pa.Table.from_pylist(DOCUMENTS), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"grapes", b"gr\xffpes"))
    refused(lambda: locov1.load("fables", tmp_path), path, "delete it and fetch it again")


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("documents", "dataset"),
        ("documents", "pid"),
        ("documents", "passage"),
        ("queries", "qid"),
        ("queries", "query"),
        ("queries", "answer_pids"),
        ("evidence", "end_frac"),
    ],
)
def test_a_missing_column_is_named_with_those_needed(write, tmp_path, kind, column):
    path = write(tmp_path, evidence=EVIDENCE) / f"{kind}-test.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    refused(
        lambda: locov1.load("fables", tmp_path), path, f"no column {column}", "it needs dataset, "
    )


@pytest.mark.parametrize("kind", ["documents", "queries"])
def test_a_cut_off_jsonl_line_is_named_by_number(write, tmp_path, kind):
    """Cut at every byte of the last line, inside a letter too."""
    path = (
        write(
            tmp_path,
            layout="jsonl",
            queries=[QUERIES[0], QUERIES[1] | dict(query="Füchsin"), QUERIES[2]],
        )
        / kind
        / "fables_test.jsonl"
    )
    rows = path.read_bytes().splitlines(keepends=True)[:2]  # the second holds a letter of two bytes
    for n in range(1, len(rows[1]) - 1):
        path.write_bytes(rows[0] + rows[1][:n])
        refused(lambda: locov1.load("fables", tmp_path), f"{path}:2: ", "fetch it again")


@pytest.mark.parametrize("line", ['{"pid": "d1"}', "[1, 2]", "null", '"d1"', "42"])
def test_a_jsonl_line_that_is_no_row_is_named_by_number(write, tmp_path, line):
    path = write(tmp_path, layout="jsonl") / "documents" / "fables_test.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    refused(
        lambda: locov1.load("fables", tmp_path),
        f"{path}:5: ",
        "passage",
        "a line needs pid, passage",
    )


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch):
    """hub(documents, queries): load_dataset answers with these rows; hub.calls: its arguments."""

    def serve(documents=DOCUMENTS, queries=QUERIES):
        def load_dataset(name, split=None, trust_remote_code=False, **options):
            assert not trust_remote_code
            serve.calls.append((name, split))
            return datasets.Dataset.from_list(
                {sources.HUB_DOCUMENTS: documents, sources.HUB_QUERIES: queries}[name]
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["test"])

    serve.calls = []
    datasets.disable_progress_bars()
    return serve


def test_the_hub_gives_the_same_task_as_a_folder(hub):
    hub()
    assert locov1.load("fables", "hub") == FABLES
    assert set(hub.calls) == {
        ("hazyresearch/LoCoV1-Documents", "test"),
        ("hazyresearch/LoCoV1-Queries", "test"),
    }
    assert locov1.tasks("hub") == ["fables", "tales"] and locov1.splits("hub") == ["test"]
    refused(
        lambda: locov1.load("fabels", "hub"),
        sources.HUB_QUERIES,
        "'fabels'",
        "did you mean 'fables'?",
    )


def test_the_hubs_null_passages_are_left_out_unless_asked_not_to(hub):
    hub(
        documents=[*DOCUMENTS, dict(pid="d4", dataset="fables", passage=None)],
        queries=[*QUERIES, dict(qid="q3", dataset="fables", query="nothing", answer_pids=["d4"])],
    )
    task = locov1.load("fables", "hub")
    assert task.qrels == FABLES.qrels and task.dropped == 1
    refused(
        lambda: locov1.load("fables", "hub", drop_null=False),
        sources.HUB_DOCUMENTS,
        "'d4'",
        "drop_null",
    )


def test_a_faulty_query_of_the_hub_is_named_by_its_data_set(hub):
    hub(queries=changed(QUERIES, query=""))
    refused(lambda: locov1.load("fables", "hub"), sources.HUB_QUERIES, "'q1'", "is empty")


class TransportError(Exception):
    """As the HTTP client's own are: of no family that Python knows."""


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("no route to host"),
        TimeoutError(),
        datasets.exceptions.DatasetNotFoundError("gone"),
        TransportError("403 Forbidden"),
        ValueError("Unknown split \"train\".\nShould be one of ['test']."),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hub_that_fails_is_named_with_the_way_out(monkeypatch, failure):
    def load_dataset(*args, **options):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    for call in (
        lambda: locov1.load("fables", "hub", "train"),
        lambda: locov1.tasks("hub", "train"),
    ):
        refused(
            call,
            "hazyresearch/LoCoV1-",
            "(train)",
            type(failure).__name__,
            "documents/<task>_<split>.jsonl",
        )


def test_in_offline_mode_the_hub_is_not_asked(no_network, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(
        lambda: locov1.load("fables", "hub"),
        sources.HUB_QUERIES,
        "without a network",
        "documents/<task>_<split>.jsonl",
    )
    assert no_network == ([], [])


def test_without_a_network_nobody_waits_for_retries(no_network, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    refused(
        lambda: locov1.load("fables", "hub"),
        "hazyresearch/LoCoV1-",
        "without a network",
        "documents/<task>_<split>.jsonl",
    )
    asked, waited = no_network
    assert len(asked) <= 2 and not waited


# ------------------------------------------------------------------ the real thing

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real task files")


@needs_real
def test_the_real_qmsum_has_the_papers_size():
    """Table 10: 272 queries of 430 characters, 272 documents of 58,129."""
    task = locov1.load("qmsum", REAL)
    assert len(task.queries) == len(task.documents) == 272
    assert round(mean(map(len, task.queries.values())), 1) == 430.0
    assert round(mean(map(len, task.documents.values())), 1) == 58_128.6
    assert task.evidence
    for qid, (pid, start, end) in task.evidence.items():
        assert task.qrels[qid] == {pid: 1} and 0 <= start < end <= 1


@needs_real
def test_every_real_task_loads():
    for split in locov1.splits(REAL):
        for name in locov1.tasks(REAL, split):
            task = locov1.load(name, REAL, split)
            assert task.queries.keys() == task.qrels.keys() >= task.evidence.keys()


@needs_real
@pytest.mark.parametrize(
    ("name", "expected"), [("qmsum_dedup", 0.900), ("textbook_summary", 0.985)]
)
def test_bm25_on_a_real_task_scores_what_was_measured_elsewhere(name, expected):
    """The figures beside the data are another implementation's."""
    task = locov1.load(name, REAL)
    assert metrics.ndcg(search.bm25(task.documents, task.queries), task.qrels) == pytest.approx(
        expected, abs=0.02
    )
