"""The claims of data/paper/claims.yaml, each with our number and a verdict.

    paper_map(profile, tasks)   a line for each claim: ours, interval, p-value, verdict
    entries()                   the claims themselves

A claim about nDCG@10 compares two rows on the same queries. Its p-value is corrected after Holm
for all such claims that have an expected sign. The warm start's accuracy has no p-value, and the
needle's stands alone.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from lib.benchmark import statistics
from lib.benchmark.task import Task
from lib.pipeline import params
from lib.report import comparison, display, results
from lib.report.comparison import NOT_MEASURED

ABSENT = "no row of this profile, or not run"
ON_TEST = "trained on the pairs that it would be tested on, so its score proves nothing"
START = 0, 39  # the needle's first place, and its last


class Evidence(NamedTuple):
    """What was measured for a claim.

    Attributes:
        ours: (difference, low, high); p, by_seed, detectable: see `comparison.verdict`.
        cells: cells of the map that differ from the claim's own words.
        missing: the reason if nothing was measured; always: `next` is shown whatever the verdict.
    """

    ours: tuple[float, float, float] = NOT_MEASURED
    p: float = math.nan
    by_seed: list[float] = []
    detectable: float = math.nan
    cells: dict = {}
    missing: str = ""
    always: bool = False


def entries() -> list[dict]:
    """The claims as data/paper/claims.yaml lists them; none in a folder without it."""
    from ruamel.yaml import YAML

    path = params.root() / "data" / "paper" / "claims.yaml"
    return YAML(typ="safe", pure=True).load(path) if path.is_file() else []


def paper_map(profile: str, tasks: Iterable[Task]) -> pd.DataFrame:
    """Every claim beside our number: one line per claim, in the order of claims.yaml."""
    tasks, claims = list(tasks), entries()
    evidence = [MEASURES[claim.get("measured", "ndcg")](claim, profile, tasks) for claim in claims]
    tested = [
        i
        for i, claim in enumerate(claims)
        if "measured" not in claim and claim["expected"] and not math.isnan(evidence[i].p)
    ]
    for i, p in zip(tested, statistics.holm([evidence[i].p for i in tested])):
        evidence[i] = evidence[i]._replace(p=p)
    return pd.DataFrame(map(line, claims, evidence))


def line(claim: dict, evidence: Evidence) -> dict:
    """A line of the map."""
    ours, p, by_seed, detectable, cells, missing, always = evidence
    run, expected = not math.isnan(ours[0]), claim.get("expected", 0)
    verdict = comparison.verdict(*ours[1:], expected, p, by_seed, detectable, effect(claim))
    cells = {
        "claim": claim["claim"],
        "paper": claim["paper"],
        "notebook": claim.get("notebook", "–"),
        "rows": claim.get("rows", "–"),
        "on": claim.get("on", "–"),
        "ours": display.with_interval(*ours, signed=True) if run else results.NOT_RUN,
        "n": 0,
        "seeds": "–",
        "seed by seed": display.each_seed(by_seed),
        "detectable": display.points(detectable),
        "the paper's": claim.get("printed", "–"),
        "p, Holm": display.chance(p),
        "verdict": verdict,
    } | cells
    unsettled = verdict in comparison.UNSETTLED
    answer = claim.get("next", "") if unsettled or always else missing or "–"
    return cells | {"tried, and what would settle it": answer}


def effect(claim: dict) -> float:
    """The size of the paper's own difference, a fraction; NaN if the paper gives none."""
    printed = str(claim.get("printed", ""))
    return abs(float(printed)) / 100 if re.fullmatch(r"[-+]?\d+(\.\d+)?", printed) else math.nan


# ------------------------------------------------------------------ measures


def ndcg(claim: dict, profile: str, tasks: list[Task]) -> Evidence:
    """The first row minus the second on the claim's queries."""
    rows, queries = claim["rows"], comparison.queries_where(tasks, claim["on"])
    every = results.per_query(profile, rows)
    on_test = [row for row in rows if results.trained_on_test(profile, row)]
    values = queries.of(every[(every["reads"] == "all") & ~every["row"].isin(on_test)])
    ours, p, by_seed = comparison.against(values, *rows)
    detectable = comparison.detectable(values, *rows)
    seeds = [comparison.each_seed(values, row) for row in rows]
    absent = [row for row in rows if not (every["row"] == row).any()]
    reasons = {ABSENT: absent, ON_TEST: on_test}
    missing = "; ".join(f"{' and '.join(names)}: {why}" for why, names in reasons.items() if names)
    cells = {
        "rows": " − ".join(results.marked(profile, row) for row in rows),
        "on": queries.on,
        "n": 0 if math.isnan(ours[0]) else len(comparison.seeds_mean(values, rows[0])),
        "seeds": ", ".join(map(comparison.seeds_and_spread, seeds)),
    }
    missing = missing if queries.queries else queries.why
    return Evidence(ours, p, by_seed, detectable, cells, missing)


def accuracy(claim: dict, profile: str, tasks: list[Task]) -> Evidence:
    """MLM accuracy of two pretrained models: the ends of the intervals against each other.

    The result is wider than an interval of paired differences, never narrower. What is detectable
    follows from half its width, as if that were 1.96 standard errors: too large if a row has two or
    three seeds, whose interval is Student's.
    """
    rows = claim["rows"]
    (a, a_low, a_high), (b, b_low, b_high) = (mlm_accuracy(profile, row) for row in rows)
    missing = f"{rows[1]}: {ABSENT}" if math.isnan(a - b) else ""
    seeds = [mlm_by_seed(profile, row) for row in rows]
    named = ", ".join(map(comparison.seeds_and_spread, seeds))
    cells = {"rows": " − ".join(rows), "seeds": named}
    low, high = a_low - b_high, a_high - b_low
    detectable = statistics.detectable((high - low) / 2 / 1.96)
    by_seed = comparison.each_pair(*seeds)
    ours = a - b, low, high
    return Evidence(ours, by_seed=by_seed, detectable=detectable, cells=cells, missing=missing)


def mlm_accuracy(profile: str, row: str) -> tuple[float, float, float]:
    """(mean, low, high) of a pretrained row on held-out text; NaN if it was not run."""
    found = held_out(profile, row)
    return tuple(found.get(part, math.nan) for part in ("mean", "low", "high"))


def mlm_by_seed(profile: str, row: str) -> dict[int, float]:
    """{seed: MLM accuracy of its model} of a pretrained row; {} if it was not run."""
    found = held_out(profile, row)
    if not found:
        return {}
    first, *_ = params.trainings(profile, row)
    by_seed = found.get("by_seed", {first: found["mean"]})
    return {int(seed): value for seed, value in by_seed.items()}


def held_out(profile: str, row: str) -> dict:
    """MLM accuracy of a pretrained row of params.yaml as its stage wrote it; {} if not run."""
    if row not in results.rows(profile, "pretrain"):
        return {}
    metrics = results.read_json(results.source(profile, "pretrain", row) / "metrics.json")
    return metrics.get("mlm_accuracy_validation", {})


def needle(claim: dict, profile: str, tasks: list[Task]) -> Evidence:
    """nDCG@10 of reads_32k with the needle in the last place, minus that in the first."""
    scores = results.needles(profile)
    seeds = scores[(scores["row"] == "reads_32k") & scores["place"].isin(START)]
    mine = results.over_seeds(seeds)
    if mine.empty:
        few = "it is known of too few queries where their answer stands"
        missing = few if scores.empty else f"reads_32k: {ABSENT}"
        return Evidence(cells={"the paper's": "–"}, missing=missing)
    places = mine.pivot(index="qid", columns="place", values="ndcg@10")
    first, last = (places[place].to_dict() for place in START)
    means = seeds.pivot_table(index="seed", columns="place", values="ndcg@10", sort=False)
    by_seed = (means[START[1]] - means[START[0]]).tolist()
    cells = {"n": len(places), "seeds": str(len(by_seed))}
    p = statistics.p_value(last, first)
    by_place = seeds.pivot(index=["place", "qid"], columns="seed", values="ndcg@10").sort_index()
    fall = (by_place.loc[START[1]] - by_place.loc[START[0]]).to_numpy().T  # (seeds, queries)
    detectable = statistics.detectable(statistics.standard_error(fall))
    ours = statistics.paired(last, first)
    return Evidence(ours, p, by_seed, detectable, cells, always=True)


def counted(claim: dict, profile: str, tasks: list[Task]) -> Evidence:
    """Operations of the Transformer twin divided by ours, at 32,768 tokens."""
    path = results.source(profile, "efficiency") / "efficiency_counts.csv"
    ratio = pd.read_csv(path).set_index("tokens").at[32768, "GFLOP, twin / M2-BERT"]
    cells = {"ours": f"{ratio:.1f} times", "verdict": "same direction, other quantity"}
    return Evidence(cells=cells, always=True)


def nothing(claim: dict, profile: str, tasks: list[Task]) -> Evidence:
    return Evidence(cells={"the paper's": "see data/paper"}, always=True)


MEASURES = {measure.__name__: measure for measure in (ndcg, accuracy, needle, counted, nothing)}
