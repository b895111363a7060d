"""Rows are compared on the same queries, with their seeds; a verdict needs more than chance."""

import math

import numpy as np
import pandas as pd
import pytest

from lib.benchmark import statistics
from lib.benchmark.locov1 import Task
from lib.pipeline import params
from lib.report import comparison, results


@pytest.mark.parametrize(
    "low, high, expected, said",
    [
        (0.1, 0.3, 1, "reproduces"),
        (-0.3, -0.1, 1, "does not reproduce at this scale"),
        (-0.1, 0.3, 1, "undecided"),
        (0.1, 0.3, -1, "does not reproduce at this scale"),
        (-0.3, -0.1, -1, "reproduces"),
        (0.0, 0.3, 1, "undecided"),
        (math.nan, 0.3, 1, "not run"),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(low, high, expected, said):
    assert comparison.verdict(low, high, expected) == said


def test_an_ablation_compares_on_the_same_queries_and_names_who_is_missing(house):
    reference, *others = params.rows("laptop", "ablations")["loss"]["rows"]
    data = params.data("laptop")
    for row, shift in ((reference, 0.0), (others[0], 0.25)):
        (data / "runs" / row).mkdir(parents=True)
        pd.DataFrame(
            [
                {
                    "task": "book_256_deep",
                    "source": "",
                    "reads": reads,
                    "qid": f"q{i}",
                    "ndcg@10": value + shift,
                }
                for reads in ("all", "first_128")
                for i, value in enumerate((0.0, 0.25, 0.5))
            ]
        ).to_parquet(data / "runs" / row / "per_query.parquet")
    frame = comparison.ablation("laptop", "loss").set_index("row")
    assert set(frame["tasks"]) == {"books, deep"}
    assert frame.at[reference, "ndcg@10"] == 0.25 and math.isnan(frame.at[reference, "difference"])
    assert frame.loc[
        others[0], ["ndcg@10", "difference", "difference_low", "difference_high", "queries"]
    ].tolist() == [0.5, 0.25, 0.25, 0.25, 3]  # every query gained the same
    assert set(frame.loc[others[1:], "status"]) == {"not run"}
    assert (
        frame.at[others[0], "p"] == pytest.approx(0.25, abs=0.02) and frame["p"].notna().sum() == 1
    )  # three queries cannot prove more


def test_p_values_of_an_ablation_are_corrected_for_each_other(house):
    """Three comparisons: the smallest p is multiplied by three, and none is below its raw value."""
    reference, *others = params.rows("laptop", "ablations")["loss"]["rows"]
    data, rng = params.data("laptop"), np.random.default_rng(0)
    base = rng.random(40)
    for i, row in enumerate((reference, *others[:3])):
        (data / "runs" / row).mkdir(parents=True)
        noise = 0.2 * rng.standard_normal(40) + 0.03 * i
        pd.DataFrame(
            {
                "task": "book_256_deep",
                "source": "",
                "reads": "all",
                "qid": [f"q{n}" for n in range(40)],
                "ndcg@10": base + (noise if i else 0),
            }
        ).to_parquet(data / "runs" / row / "per_query.parquet")
    values, frame = (
        results.per_query("laptop"),
        comparison.ablation("laptop", "loss").set_index("row"),
    )
    raw = [comparison.p_value(values, row, reference) for row in others[:3]]
    assert (
        frame.loc[others[:3], "p"].tolist() == pytest.approx(statistics.holm(raw))
        and max(raw) < 1
        and min(frame.loc[others[:3], "p"]) == pytest.approx(3 * min(raw))
    )


def seeded(row: str, values: list[float]) -> None:
    place = params.data("laptop") / "runs" / row
    place.mkdir(parents=True)
    pd.DataFrame(
        {
            "task": "book_256_deep",
            "source": "",
            "reads": "all",
            "qid": [f"q{n}" for n in range(len(values))],
            "ndcg@10": values,
        }
    ).to_parquet(place / "per_query.parquet")


def test_rows_that_differ_in_the_seed_alone_are_one_row_trained_twice(house):
    """Each query has the mean of both trainings; each pair of trainings has a difference."""
    assert (
        params.repeats("opl") == params.repeats("opl_again") == ["opl", "opl_again"]
        and params.repeats("bm25") == ["bm25"]
        and params.repeats("prototype") == ["prototype"]
    )
    (
        seeded("mnrl_2", [0.2, 0.4, 0.6]),
        seeded("mnrl_2_again", [0.4, 0.4, 0.4]),
        seeded("opl", [0.5, 0.7, 0.9]),
        seeded("opl_again", [0.1, 0.1, 0.1]),
    )
    values = results.per_query("laptop", ["mnrl_2", "opl"])
    assert values["row"].nunique() == 4
    assert (
        comparison.seeds_mean(values, "mnrl_2").tolist() == pytest.approx([0.3, 0.4, 0.5])
        and comparison.seeds(values, "opl") == 2
    )
    assert comparison.difference(values, "opl", "mnrl_2")[0] == pytest.approx(
        0.0
    ) and comparison.by_seed(values, "opl", "mnrl_2") == pytest.approx([0.3, 0.3, -0.3, -0.3])
    line = comparison.ablation("laptop", "loss").set_index("row").loc["opl"]
    assert (
        line["seeds"] == 2
        and line["by_seed"] == pytest.approx([0.3, 0.3, -0.3, -0.3])
        and line["queries"] == 3
    )


def test_seeds_that_disagree_decide_nothing():
    assert (
        comparison.verdict(0.1, 0.2, 1, by_seed=[0.1, 0.2]) == "reproduces"
        and comparison.verdict(0.1, 0.2, 1, by_seed=[0.3, -0.01]) == "undecided"
    )
    assert comparison.verdict(-0.2, -0.1, 1, by_seed=[-0.1]) == comparison.NOT_HERE


def test_what_is_not_certain_among_many_comparisons_is_undecided():
    assert (
        comparison.verdict(0.1, 0.2, 1, p=0.06) == "undecided"
        and comparison.verdict(0.1, 0.2, 1, p=0.04) == "reproduces"
    )
    assert comparison.verdict(math.nan, math.nan, 1, p=0.06) == "not run"


# ------------------------------------------------------------------ which queries are compared


def task(name, queries, evidence=(), source=""):
    return Task(
        name,
        "test",
        {"d": "text"},
        {f"q{i}": "text" for i in range(queries)},
        {},
        {f"q{i}": ("d", start, 1.0) for i, start in enumerate(evidence)},
        source=source,
    )


def test_books_say_by_their_name_where_their_answers_stand():
    tasks = [
        task("book_8_deep", 3, [0.0] * 3),
        task("book_8_shallow", 2),
        task("tail", 5),
        task("x/book_8_deep", 9, source="x"),
    ]
    assert comparison.queries_where(tasks, "deep") == (
        "deep",
        {("book_8_deep", f"q{i}") for i in range(3)},
        "",
    )
    assert comparison.queries_where(tasks, "shallow") == (
        "shallow",
        {("book_8_shallow", f"q{i}") for i in range(2)},
        "",
    )
    assert (
        comparison.queries_where(tasks, "all").on == "books"
        and len(comparison.queries_where(tasks, "all").queries) == 5
    )


def test_elsewhere_the_evidence_says_it_and_where_there_is_none_the_reason_stands():
    known = [task("book_description", 90, [0.1] * 30 + [0.3] * 10 + [0.5] * 30)]
    assert comparison.queries_where(known, "deep") == (
        "answer in the second half",
        {("book_description", f"q{i}") for i in range(40, 70)},
        "",
    )
    assert comparison.queries_where(known, "shallow") == (
        "answer in the first 15 %",
        {("book_description", f"q{i}") for i in range(30)},
        "",
    )
    assert (
        comparison.queries_where(known, "all").on == "all tasks"
        and len(comparison.queries_where(known, "all").queries) == 90
    )
    few, none = [task("qmsum", 9, [0.1, 0.9])], [task("qmsum", 9)]
    for tasks in (few, none):
        assert comparison.queries_where(tasks, "deep") == (
            "all tasks",
            {("qmsum", f"q{i}") for i in range(9)},
            "",
        )
        assert not comparison.queries_where(tasks, "shallow").queries
    assert (
        comparison.queries_where(few, "shallow").why
        == "it is known of 1 queries that their answer stands in the first 15 %"
    )
    assert comparison.queries_where(none, "shallow").why.startswith("no evidence is known")


def test_lines_of_queries_are_found_by_task_and_query():
    values = pd.DataFrame([("a", "q0"), ("a", "q1"), ("b", "q0")], columns=["task", "qid"])
    assert comparison.Queries("", {("a", "q1"), ("b", "q0"), ("b", "q1")}).of(
        values
    ).index.tolist() == [1, 2]
    assert (
        comparison.Queries("", set()).of(values).empty
        and comparison.Queries("", {("a", "q0")}).of(values[:0]).empty
    )


def test_tasks_of_other_sources_are_groups_by_their_source_and_not_by_their_name():
    tasks = ["BeIR/scifact", "book_8_deep", "hub/qmsum", "hub/a/b"]
    assert comparison.groups(tasks, {"hub/qmsum": "hub", "hub/a/b": "hub"}) == {
        "books, deep": ["book_8_deep"],
        "natural": ["BeIR/scifact"],
        "hub": ["hub/qmsum", "hub/a/b"],
    }
    assert comparison.groups(["book_description", "BeIR/x"]) == {
        "all tasks": ["book_description", "BeIR/x"]
    }
