"""Rows are compared on the same queries, with their seeds; a verdict needs more than chance."""

import math

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from lib.benchmark import statistics
from lib.benchmark.task import Task
from lib.pipeline import params
from lib.report import comparison, results

BOOK = "book_256_deep"


@pytest.mark.parametrize(
    "low, high, expected, verdict",
    [
        (0.1, 0.3, 1, "reproduces"),
        (-0.3, -0.1, 1, "does not reproduce at this scale"),
        (-0.1, 0.3, 1, "undecided"),
        (0.1, 0.3, -1, "does not reproduce at this scale"),
        (-0.3, -0.1, -1, "reproduces"),
        (0.0, 0.3, 1, "undecided"),
        (0.1, 0.3, 0, "no claim"),
        (math.nan, 0.3, 1, "not run"),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(low, high, expected, verdict):
    assert comparison.verdict(low, high, expected) == verdict


def test_an_ablation_compares_on_the_same_queries_and_names_who_is_missing(scored):
    reference, other, *missing = params.rows("laptop", "ablations")["start"]["rows"]
    scored("laptop", reference, {BOOK: [0.0, 0.25, 0.5]}, reads=("all", "first_128"))
    scored("laptop", other, {BOOK: [0.25, 0.5, 0.75]}, reads=("all", "first_128"))
    frame = comparison.ablation("laptop", "start").set_index("row")
    assert set(frame["tasks"]) == {"books, deep"}
    assert frame.at[reference, "ndcg@10"] == 0.25 and math.isnan(frame.at[reference, "difference"])
    columns = ["ndcg@10", *comparison.DIFFERENCE, "queries"]
    assert frame.loc[other, columns].tolist() == [0.5, 0.25, 0.25, 0.25, 3]  # all gained the same
    assert frame.at[other, "p"] == pytest.approx(0.25, abs=0.02)  # three queries prove no more
    assert frame["p"].notna().sum() == 1
    table = comparison.ablation_table(frame.reset_index(), "laptop").set_index("row")
    assert set(table.loc[missing, "nDCG@10"]) == {"not run"}


def test_p_values_of_an_ablation_are_corrected_for_each_other(scored):
    """Three comparisons: the smallest p is multiplied by three, and none is below its raw value."""
    reference, *others = params.rows("study", "ablations")["loss"]["rows"]
    rng = np.random.default_rng(0)
    base = rng.random(40)
    for i, row in enumerate((reference, *others[:3])):
        noise = 0.2 * rng.standard_normal(40) + 0.03 * i
        scored("study", row, {BOOK: base + (noise if i else 0)})
    values = results.per_query("study")
    raw = [comparison.against(values, row, reference)[1] for row in others[:3]]
    p = comparison.ablation("study", "loss").set_index("row").loc[others[:3], "p"].tolist()
    assert p == pytest.approx(statistics.holm(raw)) and max(raw) < 1
    assert min(p) == pytest.approx(3 * min(raw))


def test_each_query_has_the_mean_over_seeds_and_each_pair_of_seeds_a_difference(scored):
    scored("study", "mnrl_2", {BOOK: [0.2, 0.4, 0.6]})
    scored("study", "mnrl_2", {BOOK: [0.4, 0.4, 0.4]}, seed=43)
    scored("study", "opl", {BOOK: [0.5, 0.7, 0.9]})
    scored("study", "opl", {BOOK: [0.1, 0.1, 0.1]}, seed=43)
    values = results.per_query("study", ["mnrl_2", "opl"])
    assert comparison.each_seed(values, "opl") == pytest.approx({42: 0.7, 43: 0.1})
    assert comparison.seeds_mean(values, "mnrl_2").tolist() == pytest.approx([0.3, 0.4, 0.5])
    (mean, _, _), _, by_seed = comparison.against(values, "opl", "mnrl_2")
    assert mean == pytest.approx(0.0) and by_seed == pytest.approx([0.3, 0.3, -0.3, -0.3])
    frame = comparison.ablation("study", "loss")
    line = frame.set_index("row").loc["opl"]
    assert line["by_seed"] == by_seed and line["queries"] == 3
    table = comparison.ablation_table(frame, "study").set_index("row")
    assert table.loc[["opl", "mnrl_2", "mnrl"], "seeds"].tolist() == [
        "2 (range 60.0)",
        "2 (range 0.0)",
        "0",
    ]
    assert table.at["opl", "seed by seed"] == "+30.0, +30.0, -30.0, -30.0"


def test_two_seeds_compare_as_two_rows_of_one_seed_did(scored):
    """Against the definition, on numbers of no pattern: the bits of two rows put together."""
    rng = np.random.default_rng(1)
    drawn = {(row, seed): rng.random(50) for row in ("opl", "mnrl_2") for seed in (42, 43)}
    for (row, seed), values in drawn.items():
        scored("study", row, {BOOK: values[:30], "tail": values[30:]}, seed=seed)
    keys = [(BOOK, f"q{i}") for i in range(30)] + [("tail", f"q{i}") for i in range(20)]
    means = [
        {
            key: (drawn[row, 42][i] + drawn[row, 43][i]) / 2
            for i, key in sorted(enumerate(keys), key=lambda pair: pair[1])
        }
        for row in ("opl", "mnrl_2")
    ]
    values = results.per_query("study", ["mnrl_2", "opl"])
    gap, p, by_seed = comparison.against(values, "opl", "mnrl_2")
    assert gap == statistics.paired(*means) and p == statistics.p_value(*means)
    pairs = [drawn["opl", a].mean() - drawn["mnrl_2", b].mean() for a in (42, 43) for b in (42, 43)]
    assert by_seed == pytest.approx(pairs, abs=1e-15)


def test_seeds_are_counted_with_their_spread():
    scores = [{}, {42: 0.5}, {42: 0.5, 43: 0.53}, {1: 0.5, 2: 0.6, 3: 0.7}]
    texts = ["0", "1", "2 (range 3.0)", "3 (SD 10.0)"]
    assert [comparison.seeds_and_spread(by_seed) for by_seed in scores] == texts


def test_seeds_that_disagree_decide_nothing():
    assert comparison.verdict(0.1, 0.2, 1, by_seed=[0.1, 0.2]) == "reproduces"
    assert comparison.verdict(0.1, 0.2, 1, by_seed=[0.3, -0.01]) == "undecided"
    assert comparison.verdict(-0.2, -0.1, 1, by_seed=[-0.1]) == comparison.NOT_HERE


def test_what_is_not_certain_among_many_comparisons_is_undecided():
    assert comparison.verdict(0.1, 0.2, 1, p=0.06) == "undecided"
    assert comparison.verdict(0.1, 0.2, 1, p=0.04) == "reproduces"
    assert comparison.verdict(math.nan, math.nan, 1, p=0.06) == "not run"


def test_what_could_not_have_been_seen_is_said():
    """No power: the paper's own difference is smaller than what the comparison finds."""
    undecided = dict(low=-0.1, high=0.3, expected=1)
    assert comparison.verdict(**undecided, detectable=0.28, printed=0.2) == "no power"
    assert comparison.verdict(**undecided, detectable=0.28, printed=-0.3) == "undecided"
    assert comparison.verdict(**undecided, detectable=0.28, printed=-0.31) == comparison.SMALLER
    assert comparison.verdict(**undecided, detectable=0.28) == "undecided"  # the paper gives none
    seen = dict(low=0.1, high=0.3, expected=1, detectable=0.28, printed=0.2)
    assert comparison.verdict(**seen) == "reproduces"  # found, so it could be
    assert comparison.verdict(**seen, by_seed=[0.3, -0.1]) == "no power"
    assert comparison.verdict(**seen, p=0.2) == "no power"


def test_an_interval_below_the_papers_difference_says_that_ours_is_smaller():
    """No sign is found, but all that the interval and the seeds leave open is smaller."""
    level = dict(low=-0.01, high=0.02, detectable=0.03, printed=0.1)
    assert comparison.verdict(**level, expected=1) == comparison.SMALLER
    assert comparison.verdict(**level, expected=1, by_seed=[0.09, -0.09]) == comparison.SMALLER
    assert comparison.verdict(**level, expected=1, by_seed=[0.11, -0.09]) == "undecided"
    # The same with the paper's sign turned: now the other end may be as large as the paper's.
    far = dict(low=-0.12, high=0.02, detectable=0.03, printed=-0.1)
    assert comparison.verdict(**far, expected=-1) == "undecided"
    assert comparison.verdict(**far, expected=1) == comparison.SMALLER
    assert comparison.verdict(0.0, 0.0, -1, 1.0, [0.0], 0.0, -0.812) == comparison.SMALLER
    # Of one sign, but not certain among many comparisons.
    assert comparison.verdict(0.01, 0.02, 1, 0.2, [], 0.03, 0.1) == comparison.SMALLER


@pytest.mark.parametrize(
    "low, high, p, by_seed, said",
    [
        (0.1, 0.3, 0.01, [0.2, 0.1], "ahead"),
        (-0.3, -0.1, 0.01, [-0.2], "behind"),
        (0.1, 0.3, 0.06, [0.2], "undecided"),
        (0.1, 0.3, 0.01, [0.3, -0.1], "undecided"),
        (math.nan, math.nan, math.nan, math.nan, ""),
    ],
)
def test_a_question_of_our_own_is_decided_by_the_same_rule(low, high, p, by_seed, said):
    line = {"difference": (low + high) / 2, "p": p, "by_seed": by_seed}
    assert comparison.finding(line | {"difference_low": low, "difference_high": high}) == said


def test_an_ablation_that_only_other_profiles_have_compares_nothing(house):
    assert comparison.compared("laptop", "of_another_profile") == []
    frame = comparison.ablation("laptop", "of_another_profile")
    assert frame.empty and comparison.ablation_table(frame, "laptop").empty


def test_a_row_that_is_not_trained_adds_no_seeds_to_what_is_detectable(scored):
    rng = np.random.default_rng(2)
    opl, fixed = rng.random((2, 40)) + [[0.0], [0.2]], rng.random(40)
    for seed, values in zip((42, 43), opl):
        scored("study", "opl", {BOOK: values}, seed=seed)
    scored("study", "bm25", {BOOK: fixed})
    scored("study", "mnrl", {BOOK: fixed})
    values = results.per_query("study", ["opl", "bm25", "mnrl"])
    order = np.argsort([f"q{i}" for i in range(40)])
    error = statistics.standard_error((opl - fixed)[:, order])
    assert comparison.detectable(values, "opl", "bm25") == pytest.approx(2.8016 * error, rel=1e-4)
    assert comparison.detectable(values, "bm25", "opl") == pytest.approx(2.8016 * error, rel=1e-4)
    trained = comparison.detectable(values, "opl", "mnrl")
    assert trained > 1.2 * 2.8 * error  # the other row's seed is unknown, and varies as much
    assert math.isnan(comparison.detectable(values, "opl", "reads_2k"))


def test_a_real_difference_of_the_detectable_size_gets_its_verdict():
    """In most of many experiments: intervals, p-value and agreeing seeds ask for a little more."""
    found, rng = [], np.random.default_rng(3)
    for _ in range(40):
        query = rng.normal(0.5, 0.2, 60)
        rows = query + 0.1 * rng.normal(size=(2, 1, 60)) + 0.05 * rng.normal(size=(2, 3, 60))
        error = statistics.standard_error(*rows)
        rows[0] += statistics.detectable(np.sqrt(2 * (0.1**2 + 0.05**2 / 3) / 60))
        keys = [str(i) for i in range(60)]
        a, b = (dict(zip(keys, own.mean(axis=0))) for own in rows)
        _, low, high = statistics.paired(a, b, resamples=500)
        p = statistics.p_value(a, b, resamples=500)
        by_seed = [x.mean() - y.mean() for x in rows[0] for y in rows[1]]
        found.append(comparison.verdict(low, high, 1, p, by_seed, error, 1.0))
    assert found.count("reproduces") >= 26 and {*found} <= {"reproduces", comparison.SMALLER}


# ------------------------------------------------------------------ which queries are compared


def task(name: str, queries: int, starts=(), source: str = "") -> Task:
    texts = {f"q{i}": "text" for i in range(queries)}
    evidence = {f"q{i}": ("d", start, 1.0) for i, start in enumerate(starts)}
    return Task(name, "test", {"d": "text"}, texts, {}, evidence, source=source)


def numbered(name: str, *qids: int) -> set[tuple[str, str]]:
    return {(name, f"q{i}") for i in range(*qids)}


def test_the_name_of_a_book_says_where_its_answers_stand():
    deep, shallow = task("book_8_deep", 3, [0.0] * 3), task("book_8_shallow", 2)
    tasks = [deep, shallow, task("tail", 5), task("x/book_8_deep", 9, source="x")]
    asked = {on: comparison.queries_where(tasks, on) for on in ("deep", "shallow", "both", "every")}
    assert asked["deep"] == ("deep", numbered("book_8_deep", 3), "")
    assert asked["shallow"] == ("shallow", numbered("book_8_shallow", 2), "")
    assert asked["both"].on == "books" and len(asked["both"].queries) == 5
    assert asked["every"].on == "all tasks" and len(asked["every"].queries) == 10


def test_elsewhere_the_evidence_says_it_and_where_there_is_none_the_reason_stands():
    name = "book_description"
    known = [task(name, 90, [0.1] * 30 + [0.3] * 10 + [0.5] * 30)]
    deep, shallow = (comparison.queries_where(known, on) for on in ("deep", "shallow"))
    assert deep == ("answer in the second half", numbered(name, 40, 70), "")
    assert shallow == ("answer in the first 15 %", numbered(name, 30), "")
    assert comparison.queries_where(known, "both") == ("all tasks", numbered(name, 90), "")
    few, none = [task("qmsum", 9, [0.1, 0.9])], [task("qmsum", 9)]
    reasons = ["it is known of 1 queries that their answer stands in the first 15 %"]
    reasons += ["no evidence is known: nothing says where an answer stands"]
    for tasks, reason in zip((few, none), reasons):
        assert comparison.queries_where(tasks, "deep") == ("all tasks", numbered("qmsum", 9), "")
        assert comparison.queries_where(tasks, "shallow")[1:] == (set(), reason)


def test_lines_of_queries_are_found_by_task_and_query():
    values = pd.DataFrame([("a", "q0"), ("a", "q1"), ("b", "q0")], columns=["task", "qid"])
    some = comparison.Queries("", {("a", "q1"), ("b", "q0"), ("b", "q1")})
    assert some.of(values).index.tolist() == [1, 2] and some.of(values[:0]).empty
    assert comparison.Queries("", set()).of(values).empty


def test_tasks_of_other_sources_are_groups_by_their_source_and_not_by_their_name():
    tasks = ["BeIR/scifact", "book_8_deep", "hub/qmsum", "hub/a/b"]
    assert comparison.groups(tasks, {"hub/qmsum": "hub", "hub/a/b": "hub"}) == {
        "books, deep": ["book_8_deep"],
        "natural": ["BeIR/scifact"],
        "hub": ["hub/qmsum", "hub/a/b"],
    }
    names = ["book_description", "BeIR/x"]
    assert comparison.groups(names) == {"all tasks": names}


# ------------------------------------------------------------------ the paper's protocol


def test_a_row_trained_on_test_stands_beside_the_row_that_differs_in_this_word_alone(house):
    design = YAML().load(house / "params.yaml")
    own = design["rows"]["study"]["retrievers"]
    assert comparison.trained_on_test("study") == {"trained_on_test": "reads_2k"}
    assert comparison.trained_on_test("laptop") == {}
    own["trained_on_test_alone"] = own["trained_on_test"] | {"seeds": [1]}
    YAML().dump(design, house / "params.yaml")
    assert comparison.trained_on_test("study")["trained_on_test_alone"] == ""


def test_two_rows_are_compared_on_each_task_and_on_all_queries(scored):
    scored("study", "trained_on_test", {"a": [1.0, 1.0], "b": [0.5] * 6})
    scored("study", "reads_2k", {"a": [0.0, 0.0], "b": [0.5] * 6})
    place = "finetune", "trained_on_test", params.data("study"), "study"
    results.metric({"trained_on": "test"}, *place)
    table = comparison.by_task("study", "trained_on_test", "reads_2k").set_index("task")
    assert table["queries"].to_dict() == {"a": 2, "b": 6, "all tasks": 8}
    assert table["difference"]["a"] == "+100.0 [+100.0, +100.0]"
    assert table["difference"]["b"] == "+0.0 [+0.0, +0.0]"
    assert table["difference"]["all tasks"].startswith("+25.0 [")  # of queries: 2 of 8 gain 100
    assert table["reads_2k"]["a"] == "0.0 [0.0, 0.0]"
    assert comparison.on_all_tasks("study", "trained_on_test", "reads_2k")[0] == 0.25
    assert "trained_on_test (trained on test)" in table  # every number of such a row is marked


def test_a_row_that_was_not_run_is_compared_nowhere(scored):
    scored("study", "reads_2k", {"a": [0.5, 1.0]})
    table = comparison.by_task("study", "trained_on_test", "reads_2k").set_index("task")
    assert table["queries"].to_dict() == {"a": 0, "all tasks": 0}
    assert set(table["difference"]) == {"–"} and table["reads_2k"]["a"].startswith("75.0")
