"""Numbers are read back as they were written, and what is missing is called so."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.pipeline import params
from lib.report import results

ROOT = Path(__file__).parents[2]
PAPER = sorted((ROOT / "data" / "paper").glob("*.csv"))


@pytest.fixture
def retrievers(house) -> list[str]:
    return list(params.rows("smoke", "retrievers"))


def written(name: str) -> Path:
    return results.source("smoke") / name


# ------------------------------------------------------------------ metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan")])
def test_a_metric_that_json_cannot_hold_is_refused_and_nothing_is_written(house, bad):
    with pytest.raises(ValueError, match=r"finetune/opl/metrics\.json: a value is NaN or infinite"):
        results.metric(
            {"validation": {"ndcg@10": [0.5, bad]}},
            "finetune",
            "opl",
            params.data("smoke"),
            "smoke",
        )
    assert not written("finetune").exists()


def test_a_metric_is_rounded_to_six_digits_and_numpy_becomes_python(house):
    values = {
        "loss": 2 / 3,
        "tokens": 36_700_160_000,
        "small": 1.23456789e-7,
        "none": None,
        "mean": np.float32(0.1),
        "n": np.int64(3),
        "done": np.bool_(True),
        128: [1 / 3],
    }
    results.metric(values, "finetune", "opl", params.data("smoke"), "smoke")
    assert json.loads(written("finetune/opl/metrics.json").read_text(encoding="utf-8")) == {
        "loss": 0.666667,
        "tokens": 36_700_160_000,
        "small": 1.23457e-7,
        "none": None,
        "mean": 0.1,
        "n": 3,
        "done": True,
        "128": [0.333333],
    }
    results.metric({"x": 1}, "data", None, params.data("smoke"), "smoke")
    assert written("data/metrics.json").read_text(encoding="utf-8") == '{\n "x": 1\n}\n'


def test_metrics_come_in_the_order_of_the_design_and_say_who_is_missing(retrievers):
    last = retrievers[-1]
    results.metric(
        {"loss": 0.5, "validation": {"ndcg@10": 0.25}},
        "finetune",
        last,
        params.data("smoke"),
        "smoke",
    )
    results.metric({"loss": 0.75}, "finetune", "alien", params.data("smoke"), "smoke")
    frame = results.load_metrics("smoke", "finetune")
    expected = [*params.rows("smoke", "distilled"), *retrievers]
    assert list(frame.index) == [*expected, "alien"]
    assert frame["status"].to_dict() == {
        **dict.fromkeys(expected, "not run"),
        last: "run",
        "alien": "not in params.yaml",
    }
    assert frame.at[last, "validation.ndcg@10"] == 0.25 and frame.at["alien", "loss"] == 0.75
    assert math.isnan(frame.at[retrievers[0], "loss"])


def test_without_any_metric_every_row_is_not_run(house):
    frame = results.load_metrics("smoke", "evaluate")
    assert list(frame.columns) == ["status"] and set(frame["status"]) == {"not run"}


# ------------------------------------------------------------------ scores, queries, curves


def score(value: float) -> dict:
    return {
        "ndcg@10": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "queries": 3,
        "documents": 4,
        "truncated": 0.5,
    }


def test_scores_are_one_line_per_row_reads_and_task(retrievers):
    row, *others = retrievers
    results.metric(
        {
            "reads_tokens": 256,
            "scores": {
                "all": {"qmsum": score(0.5), "qasper": score(0.25)},
                "first_128": {"qmsum": score(0.125)},
            },
        },
        "evaluate",
        row,
        params.data("smoke"),
        "smoke",
    )
    frame = results.scores("smoke")
    assert frame[["row", "reads", "task", "reads_tokens", "ndcg@10"]].values.tolist() == [
        [row, "all", "qmsum", 256, 0.5],
        [row, "all", "qasper", 256, 0.25],
        [row, "first_128", "qmsum", 256, 0.125],
    ]
    assert others and not frame["row"].isin(others).any()


def test_without_results_there_are_columns_and_no_lines(house):
    assert results.scores("smoke").shape == (0, 11) and results.per_query("smoke").shape == (0, 6)
    assert list(results.curves("smoke", "pretrain", ["x"]).columns) == [
        "row",
        "step",
        "tokens",
        "loss",
        "lr",
        "accuracy",
    ]


def queries(row: str, values: dict[str, list[float]], reads: str = "all") -> None:
    """runs/<row>/per_query.parquet with the queries q0, q1, … of each task."""
    lines = [
        {"task": task, "source": "", "reads": reads, "qid": f"q{i}", "ndcg@10": value}
        for task, own in values.items()
        for i, value in enumerate(own)
    ]
    place = params.data("smoke") / "runs" / row
    place.mkdir(parents=True)
    pd.DataFrame(lines).to_parquet(place / "per_query.parquet")


def test_queries_come_row_by_row_and_rows_without_a_run_have_none(retrievers):
    first, second = retrievers[:2]
    queries(second, {"qmsum": [0.5, 1.0]})
    assert results.per_query("smoke").values.tolist() == [
        [second, "qmsum", "", "all", "q0", 0.5],
        [second, "qmsum", "", "all", "q1", 1.0],
    ]
    assert results.per_query("smoke", [first]).empty


def test_curves_are_read_as_they_were_written(house):
    curve = pd.DataFrame(
        {
            "step": [1, 2],
            "tokens": [4096, 8192],
            "loss": [8.123456789, 7.5],
            "lr": [1e-4, 2e-4],
            "accuracy": [0.0, 0.25],
        }
    )
    results.curve(curve, "pretrain", "a", params.data("smoke"), "smoke")
    back = results.curves("smoke", "pretrain", ["a", "missing"])
    assert (
        set(back["row"]) == {"a"}
        and back["loss"].tolist() == [8.12346, 7.5]
        and back["tokens"].tolist() == [4096, 8192]
    )


def test_needles_of_rows_that_have_some(house):
    for row, values in (("opl", [0.5, 1.0]), ("reads_32k", [])):
        (params.data("laptop") / "runs" / row).mkdir(parents=True)
        pd.DataFrame(
            {"place": [0, 39][: len(values)], "qid": ["n"] * len(values), "ndcg@10": values}
        ).to_parquet(params.data("laptop") / "runs" / row / "needle.parquet")
    assert results.needles("laptop").to_dict("list") == {
        "place": [0, 39],
        "qid": ["n", "n"],
        "ndcg@10": [0.5, 1.0],
        "row": ["opl", "opl"],
    }
    assert results.needles("smoke").empty


def test_a_row_trained_on_test_says_so_wherever_it_is_named(house):
    for row, split in (
        ("opl", "test"),
        ("mnrl", "train"),
        ("prototype_32k", "test"),
        ("prototype", "nothing"),
    ):
        results.metric({"trained_on": split}, "finetune", row, params.data("laptop"), "laptop")
    assert [results.marked("laptop", row) for row in ("opl", "mnrl", "bm25")] == [
        "opl (trained on test)",
        "mnrl",
        "bm25",
    ]
    assert (
        results.marked("laptop", "prototype") == "prototype (trained on test)"
    )  # through what it starts from


# ------------------------------------------------------------------ the paper


def test_an_unknown_table_of_the_paper_is_answered_with_those_there_are(house):
    (house / "data" / "paper").mkdir(parents=True)
    for name in ("table8_loss", "table3_locov1"):
        (house / "data" / "paper" / f"{name}.csv").write_text(
            "loss,score,source\nopl,94.7,Table 8\n"
        )
    with pytest.raises(
        FileNotFoundError,
        match=r"data/paper holds no table9\.csv; it has table3_locov1, table8_loss$",
    ):
        results.paper("table9")
    assert results.paper("table8_loss")["score"].tolist() == [94.7]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_number_of_the_paper_is_finite_and_has_a_source(path):
    frame = pd.read_csv(path)
    assert len(frame) and frame["source"].str.match(r"Tables? \d").all()
    numbers = frame.select_dtypes("number").to_numpy(dtype=float)
    assert not np.isinf(numbers).any()
    assert np.isfinite(numbers).any(axis=1).all()  # a line may lack a number, not all of them
    assert not frame.duplicated(list(frame.columns[:2])).any()


def test_the_papers_averages_are_those_of_its_own_tasks():
    """Table 13 prints twelve scores and their mean; Table 3 prints another mean (94.7)."""
    frame = pd.read_csv(ROOT / "data" / "paper" / "table13_locov1.csv").set_index("model")
    tasks = frame.columns.difference(["max_length", "average", "source"])
    assert len(tasks) == 12
    assert round(frame.loc["M2-BERT-32k", tasks].astype(float).mean(), 1) == 91.1
