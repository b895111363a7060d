"""Every claim of the paper has its line, its verdict, and the number that the paper printed."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.benchmark.task import Task
from lib.pipeline import params
from lib.report import claims, comparison, results

ROOT = Path(__file__).parents[2]
TASKS = [
    Task(f"book_512_{depth}", "test", {"d": "x"}, {f"q{i}": "y" for i in range(40)}, {})
    for depth in ("deep", "shallow")
]
# What the claims of each table are differences of: (column of names, first, second, column).
PRINTED = {
    "reads_more_than_128": ("table13_locov1", "model", "M2-BERT-32k", "M2-BERT-128", "average"),
    "reads_more_than_2k": ("table13_locov1", "model", "M2-BERT-32k", "M2-BERT-2k", "average"),
    "reads_more_than_8k": ("table13_locov1", "model", "M2-BERT-32k", "M2-BERT-8k", "average"),
    "beats_bm25": ("table3_locov1", "model", "M2-BERT-32k", "BM25", "score"),
    "mixture_short": ("table6_mixture", "mixture", "mixed", "short", "score"),
    "mixture_long": ("table6_mixture", "mixture", "mixed", "long", "score"),
    "warm_start_accuracy": ("table7_warm_start", "start", "warm", "cold", "mlm_accuracy"),
    "opl_beats_mnrl": ("table8_loss", "loss", "opl", "mnrl", "score"),
    "mnrl_beats_prototype": ("table8_loss", "loss", "mnrl", "prototype", "score"),
}


@pytest.fixture
def printed(house):
    """The paper's tables, and counted operations, in a repository folder without a run."""
    (house / "data").mkdir()
    (house / "data" / "paper").symlink_to(ROOT / "data" / "paper")
    counts = {"tokens": [32768], "GFLOP, twin / M2-BERT": [11.8]}
    for profile in ("laptop", "study"):
        folder = results.source(profile, "efficiency")
        folder.mkdir(parents=True)
        pd.DataFrame(counts).to_csv(folder / "efficiency_counts.csv", index=False)
    return house


def values(value: float, alternating: float = 0.0) -> dict[str, list[float]]:
    """nDCG@10 on both tasks: one value, every second query a little higher."""
    return {task.name: [value + alternating * (i % 2) for i in range(40)] for task in TASKS}


def lines(profile: str = "laptop") -> dict[str, dict]:
    table = claims.paper_map(profile, TASKS).to_dict("records")
    return {entry["id"]: line for entry, line in zip(claims.entries(), table)}


def test_every_claim_has_an_id_of_its_own_and_what_its_measure_needs(printed):
    entries = claims.entries()
    assert len({entry["id"] for entry in entries}) == len(entries) > 20
    for entry in entries:
        assert entry.get("measured", "ndcg") in claims.MEASURES
        if "measured" not in entry:
            assert len(entry["rows"]) == 2 and entry["expected"] in (-1, 0, 1)
            assert entry["on"] in ("deep", "shallow", "both", "every")
            assert not entry["expected"] or entry["next"]


def test_the_papers_numbers_are_those_of_its_tables(printed):
    entries = {entry["id"]: entry for entry in claims.entries()}
    for name, (table, key, first, second, column) in PRINTED.items():
        values = results.paper(table).set_index(key)[column]
        assert entries[name]["printed"] == f"{values[first] - values[second]:+.1f}"
    needle = results.paper("table15_needle").query("model == 'M2-BERT-32k'").set_index("position")
    fade = needle.at["39", "score"] - needle.at["0", "score"]
    assert entries["needle_fades"]["printed"] == f"{fade:+.1f}"


def test_without_a_run_nothing_is_decided_and_the_reason_stands(printed):
    for name, line in lines().items():
        assert line["verdict"] == (
            "same direction, other quantity" if name.startswith("cheap") else "not run"
        )
        assert line["tried, and what would settle it"] not in ("", "–")
    assert lines()["beats_bm25"]["tried, and what would settle it"].startswith("reads_32k and bm25")


def test_a_claim_is_decided_by_its_interval_its_p_value_and_its_sign(printed, scored):
    scored("laptop", "reads_32k", values(0.5, 0.1))
    scored("laptop", "reads_8k", values(0.4))
    scored("laptop", "bm25", values(0.6, 0.1))
    scored("laptop", "bag", values(0.3))
    table = lines()
    ours = table["reads_more_than_8k"]
    assert ours["ours"].startswith("+15.0 [+1") and ours["n"] == 40
    assert ours["verdict"] == "reproduces" and ours["tried, and what would settle it"] == "–"
    assert table["beats_bm25"]["ours"] == "-10.0 [-10.0, -10.0]"
    assert table["beats_bm25"]["verdict"] == comparison.NOT_HERE
    assert table["beats_bm25"]["tried, and what would settle it"].startswith("a bag of embeddings")
    assert table["beats_bag"]["verdict"] == "no claim" and table["beats_bag"]["p, Holm"] != "–"


def test_a_row_that_was_trained_on_test_decides_no_claim(printed, scored):
    scored("laptop", "reads_32k", values(0.5, 0.1))
    scored("laptop", "reads_8k", values(0.4))
    results.metric({"trained_on": "test"}, "finetune", "reads_32k", "data", "laptop")
    line = lines()["reads_more_than_8k"]
    assert line["ours"] == line["verdict"] == "not run" and line["n"] == 0
    assert line["tried, and what would settle it"] == f"reads_32k: {claims.ON_TEST}"


def test_the_needles_places_are_compared_query_by_query(printed, scored):
    scored("study", "reads_32k", values(0.5))
    runs = params.data("study") / "runs" / "reads_32k"
    needles = [(place, f"n{i}", 1.0 - place / 39) for place in (0, 20, 39) for i in range(12)]
    pd.DataFrame(needles, columns=["place", "qid", "ndcg@10"]).to_parquet(runs / "needle.parquet")
    line = lines("study")["needle_fades"]
    assert line["ours"] == "-100.0 [-100.0, -100.0]" and line["n"] == 12
    assert line["verdict"] == "reproduces" and line["the paper's"] == "-81.2"
    assert (line["seeds"], line["seed by seed"]) == ("1", "–")
    (runs / "seed_43").mkdir()
    flat = [(place, qid, 0.5) for place, qid, _ in needles]
    columns = ["place", "qid", "ndcg@10"]
    pd.DataFrame(flat, columns=columns).to_parquet(runs / "seed_43" / "needle.parquet")
    line = lines("study")["needle_fades"]
    assert line["ours"] == "-50.0 [-50.0, -50.0]" and line["n"] == 12
    assert (line["seeds"], line["seed by seed"]) == ("2", "-100.0, +0.0")
    # One of the two trainings shows nothing: 2.80 times the root of 0.5 / 2 is more than 81.2.
    assert (line["verdict"], line["detectable"]) == ("no power", "140.1")


def test_a_comparison_that_could_not_have_seen_the_papers_difference_has_no_power(printed, scored):
    rng = np.random.default_rng(0)
    for row, noise in (("reads_32k", 0.3), ("reads_8k", 0.3), ("reads_128", 0.01)):
        tasks = {task.name: 0.5 + noise * rng.standard_normal(40) for task in TASKS}
        scored("laptop", row, tasks)
    line = lines()["reads_more_than_8k"]  # the paper: +4.2
    assert float(line["detectable"]) > 4.2 and line["verdict"] == "no power"
    assert line["tried, and what would settle it"] not in ("", "–")
    line = lines()["reads_more_than_128"]  # +21.0, which 40 queries would have shown
    assert float(line["detectable"]) < 21 and line["verdict"] == comparison.SMALLER


def test_the_papers_difference_is_read_as_a_number_where_it_is_one(printed):
    sizes = {entry["id"]: claims.effect(entry) for entry in claims.entries()}
    assert sizes["opl_beats_mnrl"] == pytest.approx(0.243)
    assert sizes["needle_fades"] == pytest.approx(0.812)
    assert math.isnan(sizes["cheaper_than_transformer"]) and math.isnan(sizes["reading_control"])


def test_accuracies_are_compared_end_against_end(printed):
    for stage, row, mean in (("pretrain", "cold_32k", 0.1), ("continue", "warm_32k", 0.3)):
        accuracy = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
        metrics = {"mlm_accuracy_validation": accuracy}
        results.metric(metrics, stage, row, params.data("study"), "study")
    line = lines("study")["warm_start_accuracy"]
    assert line["ours"] == "+20.0 [+10.0, +30.0]" and line["verdict"] == "reproduces"
    assert line["detectable"] == "14.3"  # 2.80 / 1.96 of half the interval
    assert (line["seeds"], line["seed by seed"]) == ("1, 1", "–")
    assert math.isnan(claims.mlm_accuracy("study", "mixed_2k")[0])


def test_accuracies_of_several_seeds_that_disagree_decide_nothing(printed):
    """The interval says +5, and one pair of seeds says the contrary."""
    for stage, row, by_seed in (
        ("pretrain", "cold_32k", {17: 0.10, 18: 0.12, 19: 0.11}),
        ("continue", "warm_32k", {17: 0.18, 18: 0.19, 19: 0.11}),
    ):
        mean = sum(by_seed.values()) / 3
        accuracy = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "by_seed": by_seed}
        metrics = {"mlm_accuracy_validation": accuracy}
        results.metric(metrics, stage, row, params.data("study"), "study")
    assert claims.mlm_by_seed("study", "warm_32k") == {17: 0.18, 18: 0.19, 19: 0.11}
    assert claims.mlm_by_seed("study", "mixed_2k") == {}
    metrics = {"mlm_accuracy_validation": {"mean": 0.3, "low": 0.2, "high": 0.4}}
    left_over = results.source("study", "pretrain", "row_of_old")  # it has left params.yaml
    left_over.mkdir(parents=True)
    (left_over / "metrics.json").write_text(json.dumps(metrics))
    assert claims.mlm_by_seed("study", "row_of_old") == {}
    line = lines("study")["warm_start_accuracy"]
    assert line["ours"] == "+5.0 [+3.0, +7.0]"  # the paper: +29.1
    assert line["verdict"] == "undecided, smaller than the paper's"
    assert line["seeds"] == "3 (SD 4.4), 3 (SD 1.0)" and "-1.0" in line["seed by seed"]
