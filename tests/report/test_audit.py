"""Every number of the paper gets a verdict, beside ours if both measure the same."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.benchmark import locov1
from lib.benchmark.locov1 import Task
from lib.pipeline import params
from lib.report import audit, results

ROOT = Path(__file__).parents[2]
READ = pd.DataFrame(columns=["source", "asked", "row", "bin", "n", "ndcg@10", "low", "high"])
UNKNOWN = {"warm_32k": [np.nan] * 3, "cold_32k": [np.nan] * 3}


@pytest.fixture
def printed(house):
    """The paper's tables, in a repository folder without a run."""
    (house / "data").mkdir()
    (house / "data" / "paper").symlink_to(ROOT / "data" / "paper")
    return house


def real(name: str, missing: int = 0, dropped: int = 0) -> Task:
    """A task as large as LoCoV1's own of that name, or `missing` documents smaller."""
    described = locov1.LOCOV1[name]
    count = described.test_documents - missing - dropped
    documents = {f"d{i}": "x" * described.document_characters for i in range(count)}
    queries = {f"q{i}": "y" * described.query_characters for i in range(described.test_queries)}
    return Task(f"hub/{name}", "test", documents, queries, {}, dropped=dropped, source="hub")


def scored(row: str, values: dict[str, list[float]]) -> None:
    """What notebook 06 leaves of a row: nDCG@10 of each query, by task."""
    data = params.data("laptop")
    lines, means = [], {}
    for task, own in values.items():
        source = task.partition("/")[0] if "/" in task else ""
        shared = {"task": task, "source": source, "reads": "all"}
        lines += [shared | {"qid": f"q{i}", "ndcg@10": value} for i, value in enumerate(own)]
        means[task] = {"ndcg@10": float(np.mean(own)), "low": min(own), "high": max(own)}
        means[task] |= {"source": source} if source else {}
    (data / "runs" / row).mkdir(parents=True)
    pd.DataFrame(lines).to_parquet(data / "runs" / row / "per_query.parquet")
    results.metric({"reads_tokens": 1, "scores": {"all": means}}, "evaluate", row, data, "laptop")


def by_cell(frame: pd.DataFrame) -> dict:
    lines = frame.to_dict("records")
    return {(line["table"], line["line"], line["column"]): line for line in lines}


def test_every_number_of_a_table_gets_a_verdict(house):
    (house / "data" / "paper").mkdir(parents=True)
    (house / "data" / "paper" / "table8_loss.csv").write_text(
        "loss,batch,score,source\nmnrl,2,70.4,T\nopl,1,94.7,T\nprototype,2,,T\nx,2,1,T\n"
    )
    ours = {
        ("mnrl", "score"): ((70.0, 69.0, 71.0), "a"),
        ("opl", "score"): ((40.0, 39.0, 41.0), "b"),
        ("x", "score"): (None, "c"),
    }
    lines = audit.cells("table8_loss", "loss", ours, lambda line: ("cannot run here", f"no {line}"))
    told = {(line["line"], line["column"]): (line["verdict"], line["why"]) for line in lines}
    assert told == {
        ("mnrl", "score"): ("matches", "a"),
        ("opl", "score"): ("differs", "b"),
        ("x", "score"): ("not run", "c"),
    } | {
        (name, "batch"): ("cannot run here", f"no {name}")
        for name in "mnrl opl prototype x".split()
    }
    assert list(lines[1].items()) == [
        ("table", "Table 8"),
        ("line", "mnrl"),
        ("column", "score"),
        ("the paper's", "70.4"),
        ("ours", "70.0 [69.0, 71.0]"),
        ("verdict", "matches"),
        ("why", "a"),
    ]
    key, reason = ["loss", "batch"], ("not run", "")
    assert len(audit.cells("table8_loss", key, {}, reason, ["score"])) == 3


def test_without_a_run_nothing_matches_and_every_number_has_its_reason(printed):
    frame = audit.paper_cells("laptop", [], READ, UNKNOWN)
    assert list(frame.columns) == audit.COLUMNS
    assert set(frame["verdict"]) == {"not run", "cannot run here"} and set(frame["ours"]) == {"–"}
    assert (frame["why"].str.len() > 3).all()
    assert not frame.duplicated(["table", "line", "column"]).any()
    numbers = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 21, 22)
    assert set(frame["table"]) == {f"Table {number}" for number in numbers}


def test_a_number_of_our_own_stands_beside_the_papers_with_the_corpus_named(printed):
    # What is of another source is not ours.
    scored("opl", {"book_1_deep": [0.9, 1.0], "notes": [0.9, 1.0], "other/qmsum": [0.0, 0.0]})
    line = ["the corpus", "length of the answer", "reads_32k", "below 2k", 10, 100.0, 100.0, 100.0]
    read = pd.DataFrame([line], columns=READ.columns)
    found = by_cell(audit.paper_cells("laptop", [], read, UNKNOWN | {"warm_32k": [0.3, 0.2, 0.9]}))
    opl = found["Table 8", "opl", "score"]
    assert opl["ours"].startswith("95.0 [9") and opl["verdict"] == "matches"
    assert opl["why"].startswith("opl: our own tasks") and "laptop" in opl["why"]
    assert found["Table 8", "mnrl", "score"]["verdict"] == "not run"
    assert found["Table 7", "warm", "mlm_accuracy"]["ours"] == "30.0 [20.0, 90.0]"
    assert found["Table 7", "cold", "mlm_accuracy"]["ours"] == "–"
    assert found["Table 22", "M2-BERT-32k", "below 2k"]["ours"] == "100.0 [100.0, 100.0]"
    assert found["Table 22", "M2-BERT-32k", "2k to 8k"]["ours"] == "–"


def test_only_a_task_of_the_papers_size_is_the_papers_task(printed):
    scored("reads_128", {"hub/qmsum": [0.5, 0.5], "hub/qasper_title": [0.5, 0.5]})
    tasks = [real("qmsum", dropped=2), real("qasper_title", missing=1)]
    assert audit.Measured("laptop", tasks, READ).real == {"qmsum": tasks[0]}
    found = by_cell(audit.paper_cells("laptop", tasks, READ, UNKNOWN))
    qmsum = found["Table 13", "M2-BERT-128", "qmsum"]
    assert qmsum["ours"] == "50.0 [50.0, 50.0]"
    assert qmsum["why"].startswith("reads_128 on the real qmsum; not the paper's weights")
    assert found["Table 13", "M2-BERT-128", "qasper_title"]["verdict"] == "not run"
    assert found["Table 13", "M2-BERT-128", "average"]["ours"] == "–"
    assert found["Table 10", "qmsum", "test_documents"]["verdict"] == "matches"
    assert found["Table 10", "qasper_title", "test_documents"]["verdict"] == "not run"


def test_an_average_is_over_tasks_whatever_their_size(printed):
    tasks, names = [real("qmsum"), real("qasper_title")], ["qmsum", "qasper_title"]
    scored("bm25", {"hub/qmsum": [1.0] * 9, "hub/qasper_title": [0.0]})
    measured = audit.Measured("laptop", tasks, READ)
    assert measured.on_average("bm25", names) == pytest.approx((50.0, 50.0, 50.0))
    assert measured.on_average("opl", names) is None


def test_the_authors_weights_stand_before_ours_and_windows_beside_the_beginning(house):
    ours = {model: [row] for model, row in audit.LADDER.items()} | {"BM25": ["bm25"]}
    assert {model: rows for model, rows in audit.stand_ins("laptop").items() if rows} == ours
    text = (house / "params.yaml").read_text(encoding="utf-8")
    published = "published: &published"
    theirs = "\n  theirs: {checkpoint: togethercomputer/m2-bert-80M-32k-retrieval}"
    bge = "{model: BAAI/bge-large-en-v1.5"
    for old, new in (
        (f"{published} {{}}", published + theirs),
        ("\nbaselines:\n", f"\nbaselines:\n  bge: {bge}}}\n  bge_chunks: {bge}, chunk: best}}\n"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (house / "params.yaml").write_text(text, encoding="utf-8")
    found = audit.stand_ins("laptop")
    assert found["M2-BERT-32k"] == ["theirs", "reads_32k"] and found["M2-BERT-2k"] == ["reads_2k"]
    assert found["BGE-Large zero-shot"] == ["bge"]
    assert found["BGE-Large zero-shot, chunks"] == ["bge_chunks"]
