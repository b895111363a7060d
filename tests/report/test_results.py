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


def write(values: dict, stage: str, row: str | None, profile: str = "smoke") -> None:
    results.metric(values, stage, row, params.data(profile), profile)


def test_another_seed_has_its_folder_below_that_of_its_row(house):
    places = {
        step: results.folder("out", "smoke", step, f"{row}/seed_18")
        for step, row in (("pretrain", "warm_32k"), ("finetune", "opl"))
    }
    assert places["pretrain"] == Path("out/report/smoke/continue/warm_32k/seed_18")
    assert places["finetune"] == Path("out/report/smoke/finetune/opl/seed_18")


# ------------------------------------------------------------------ metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan")])
def test_a_metric_that_json_cannot_hold_is_refused_and_nothing_is_written(house, bad):
    with pytest.raises(ValueError, match="Out of range float values"):
        write({"validation": {"ndcg@10": [0.5, bad]}}, "finetune", "opl")
    assert not written("finetune").exists()


def test_a_metric_is_rounded_to_six_digits_and_numpy_becomes_python(house):
    exact = {"loss": 2 / 3, "tokens": 36_700_160_000, "small": 1.23456789e-7, "none": None}
    exact |= {"mean": np.float32(0.1), "n": np.int64(3), "done": np.bool_(True), 128: [1 / 3]}
    exact |= {"whole": 3.0}
    write(exact, "finetune", "opl")
    rounded = {"loss": 0.666667, "tokens": 36_700_160_000, "small": 1.23457e-7, "none": None}
    rounded |= {"mean": 0.1, "n": 3, "done": True, "128": [0.333333], "whole": 3.0}
    text = written("finetune/opl/metrics.json").read_text(encoding="utf-8")
    assert json.loads(text) == rounded and '"whole": 3.0\n' in text
    write({"x": 1}, "data", None)
    assert written("data/metrics.json").read_text(encoding="utf-8") == '{\n "x": 1\n}\n'


def test_metrics_come_in_the_order_of_the_design_and_say_who_is_missing(retrievers):
    last = retrievers[-1]
    write({"loss": 0.5, "validation": {"ndcg@10": 0.25}}, "finetune", last)
    write({"loss": 0.75}, "finetune", "alien")
    frame = results.load_metrics("smoke", "finetune")
    status = dict.fromkeys([*params.rows("smoke", "distilled"), *retrievers], "not run")
    status |= {last: "run", "alien": "not in params.yaml"}
    assert list(frame["status"].items()) == list(status.items())
    assert frame.at[last, "validation.ndcg@10"] == 0.25 and frame.at["alien", "loss"] == 0.75
    assert math.isnan(frame.at[retrievers[0], "loss"])


def test_without_any_metric_every_row_is_not_run(house):
    frame = results.load_metrics("smoke", "evaluate")
    assert list(frame.columns) == ["status"] and set(frame["status"]) == {"not run"}


def test_a_row_was_trained_where_it_and_what_it_starts_from_were(house):
    write({"machine": "A", "start": "random weights", "tokens": 5}, "pretrain", "mixed_8k", "study")
    write({"machine": "B", "tokens": 5}, "continue", "warm_32k", "study")
    write({"machine": "B", "tokens": 7}, "finetune", "warm", "study")
    write({"machine": "A", "tokens": 7}, "finetune", "reads_8k", "study")
    rows = ["warm", "reads_8k", "bm25", "cold"]
    assert results.machines("study", rows) == {"A": ["warm", "reads_8k"], "B": ["warm"]}
    assert results.machines("study", ["bm25", "cold"]) == {}


def test_a_learning_rate_stands_beside_those_that_were_tried(retrievers):
    first, second, *others = retrievers
    write({"lr": 1e-3, "trials": []}, "finetune", first)
    scores = results.load_metrics("smoke", "finetune")
    shown = {row: results.learning_rate(scores, row) for row in (*retrievers, "x")}
    assert shown == {first: "0.001"} | dict.fromkeys([second, *others, "x"], "–")
    for lr, text in ((2e-5, "<2e-05"), (1e-3, "0.001"), (5e-3, ">0.005")):
        tried = [{"lr": value, "ndcg@10": 0.5} for value in (1e-3, 2e-5, 5e-3)]
        write({"lr": lr, "trials": tried}, "finetune", second)
        scores = results.load_metrics("smoke", "finetune")
        assert results.learning_rate(scores, second) == f"{text} of 0.001, 2e-05, 0.005"


def test_rows_start_from_the_weights_that_their_first_model_had(house):
    vectors = "the word vectors of package:x"
    write({"start": vectors, "tokens": 5}, "pretrain", "mixed_8k", "study")
    write({"start": vectors, "tokens": 5}, "continue", "warm_32k", "study")
    write({"tokens": 0}, "finetune", "warm", "study")
    write({"start": "random weights", "tokens": 0}, "pretrain", "random_2k", "study")
    write({"tokens": 9}, "finetune", "random_start", "study")
    write({"start": "random weights", "tokens": 0}, "pretrain", "start_32k", "study")
    write({"tokens": 0}, "finetune", "untrained", "study")
    rows = ["warm", "untrained", "random_start", "bm25", "reads_128"]
    assert results.starts("study", rows) == {
        vectors: ["warm"],
        "random weights, with nothing trained": ["untrained"],
        "random weights": ["random_start"],
    }


# ------------------------------------------------------------------ scores, queries, curves


def score(value: float) -> dict:
    interval = {"ndcg@10": value, "low": value - 0.1, "high": value + 0.1}
    return interval | {"queries": 3, "documents": 4, "truncated": 0.5}


def test_scores_are_one_line_per_row_reads_and_task(retrievers):
    row, *others = retrievers
    everything = {"qmsum": score(0.5), "qasper": score(0.25)}
    scores = {"all": everything, "first_128": {"qmsum": score(0.125)}}
    write({"reads_tokens": 256, "scores": scores}, "evaluate", row)
    frame = results.scores("smoke")
    assert frame[["row", "reads", "task", "reads_tokens", "ndcg@10"]].values.tolist() == [
        [row, "all", "qmsum", 256, 0.5],
        [row, "all", "qasper", 256, 0.25],
        [row, "first_128", "qmsum", 256, 0.125],
    ]
    assert others and not frame["row"].isin(others).any()


def test_without_results_there_are_columns_and_no_lines(house):
    assert results.scores("smoke").shape == (0, 11) and results.per_query("smoke").shape == (0, 7)
    assert list(results.curves("smoke", "pretrain", ["x"]).columns) == results.CURVES


def test_queries_come_row_by_row_and_rows_without_a_run_have_none(retrievers, scored):
    first, second = retrievers[:2]
    scored("smoke", second, {"qmsum": [0.5, 1.0]})
    assert results.per_query("smoke").values.tolist() == [
        [second, 42, "qmsum", "", "all", "q0", 0.5],
        [second, 42, "qmsum", "", "all", "q1", 1.0],
    ]
    assert results.per_query("smoke", [first]).empty


def test_a_query_has_a_line_for_each_seed_and_their_mean_in_the_order_of_the_file(house, scored):
    scored("study", "bm25", {"tail": [0.1]})
    scored("study", "opl", {"tail": [0.5, 1.0], "book": [0.2]})
    scored("study", "opl", {"tail": [0.25, 0.0], "book": [0.4]}, seed=43)
    every = results.per_query("study", ["opl", "bm25"])
    assert every[["row", "seed"]].drop_duplicates().values.tolist() == [
        ["opl", 42],
        ["opl", 43],
        ["bm25", 0],
    ]
    mean = results.over_seeds(every)
    assert list(mean.columns) == [name for name in results.QUERIES if name != "seed"]
    assert mean[["row", "task", "qid"]].values.tolist() == [
        ["opl", "tail", "q0"],
        ["opl", "tail", "q1"],
        ["opl", "book", "q0"],
        ["bm25", "tail", "q0"],
    ]
    assert mean["ndcg@10"].tolist() == pytest.approx([0.375, 0.5, 0.3, 0.1])
    assert results.over_seeds(results.per_query("smoke")).empty


def test_curves_are_read_as_they_were_written(house):
    curve = pd.DataFrame({"step": [1, 2], "tokens": [4096, 8192], "loss": [8.123456789, 7.5]})
    results.curve(curve, "pretrain", "a", params.data("smoke"), "smoke")
    back = results.curves("smoke", "pretrain", ["a", "missing"])
    assert back.to_dict("list") == {
        "step": [1, 2],
        "tokens": [4096, 8192],
        "loss": [8.12346, 7.5],
        "row": ["a", "a"],
    }


def test_a_long_curve_is_thinned_to_means_of_equal_groups_and_a_short_one_is_not(house):
    steps = np.arange(70_001)
    frame = pd.DataFrame({"step": steps, "tokens": 524_288 * (steps + 1), "loss": steps / 7})
    results.curve(frame, "pretrain", "a", params.data("smoke"), "smoke")
    back = results.curves("smoke", "pretrain", ["a"])
    assert len(back) == 2_000 and back["tokens"].is_monotonic_increasing
    assert back.iloc[[0, -1]]["step"].tolist() == [0, 70_000]
    assert back["tokens"].iloc[-1] == 524_288 * 70_001  # all digits of a whole number
    # 69,999 steps between the two ends are 1,998 groups of 35 or 36: 1 … 36 have the mean 18.5.
    assert back["step"].iloc[1] == 18 and back["loss"].iloc[1] == pytest.approx(18.5 / 7, rel=1e-5)
    assert back["step"].iloc[2] == 54  # of 37 … 71

    frame = frame[:2_000]
    assert results.thinned(frame) is frame
    means = results.thinned(pd.DataFrame({"loss": [9.0, 1.0, 2.0, 3.0, 5.0, 0.0]}), most=4)
    assert means["loss"].tolist() == [9.0, 1.5, 4.0, 0.0]


def test_needles_of_rows_that_have_some(house):
    columns = {"place": [0, 39], "qid": ["n", "n"], "ndcg@10": [0.5, 1.0]}
    labels = {"row": ["opl", "opl"], "seed": [42, 42]}
    for row, lines in (("opl", 2), ("reads_32k", 0)):
        folder = params.data("laptop") / "runs" / row
        folder.mkdir(parents=True)
        pd.DataFrame(columns)[:lines].to_parquet(folder / "needle.parquet")
    assert results.needles("laptop").to_dict("list") == columns | labels
    assert results.needles("smoke").empty


def test_a_row_trained_on_test_says_so_wherever_it_is_named(house):
    splits = {"opl": "test", "mnrl": "train", "prototype_2k": "test", "prototype": "nothing"}
    for row, split in splits.items():
        write({"trained_on": split}, "finetune", row, "study")
    marked = {row: results.marked("study", row) for row in ("opl", "mnrl", "bm25", "prototype")}
    assert marked["opl"] == "opl (trained on test)"
    assert marked["mnrl"] == "mnrl" and marked["bm25"] == "bm25"
    assert marked["prototype"] == "prototype (trained on test)"  # it starts from prototype_2k


# ------------------------------------------------------------------ the paper


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
