"""Compare two retrievers on the same queries: paired difference, 95 % interval, p-value, verdict.

    groups(tasks)                       tasks that ask the same question
    queries_where(tasks, depth)         queries whose answer stands deep in its document, or first
    against(values, row, reference)     one row minus another
    detectable(values, row, reference)  the smallest difference that this comparison could have seen
    ablation(profile, key)              the rows of an ablation against its first row
    trained_on_test(profile)            rows trained on test, each with its honest twin
    by_task, on_all_tasks               two rows of a profile on each task, and on all together
    ablation_table(frame, profile, …)   the same as the table of notebooks 07 to 09
    verdict(low, high, expected, …)     whether the paper's sign was found

A retriever trained with several seeds counts with its mean on each query. `values` are lines of
`results.per_query`. Scores and differences are fractions in [0, 1].
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import pandas as pd

from lib.benchmark import statistics
from lib.benchmark.task import Task
from lib.pipeline import params
from lib.report import display, results

REPRODUCES, NOT_HERE = "reproduces", "does not reproduce at this scale"
UNDECIDED, NO_POWER, NO_CLAIM = "undecided", "no power", "no claim"
SMALLER = "undecided, smaller than the paper's"
UNSETTLED = NOT_HERE, UNDECIDED, SMALLER, NO_POWER  # a claim that asks for an answer
FEW = 30  # queries: fewer are no group of their own
WHERE = {"deep": "in the second half", "shallow": "in the first 15 %"}
SCORE = ["ndcg@10", "low", "high"]
TEST_TRAINING = "allow_test_training"
DIFFERENCE = ["difference", "difference_low", "difference_high"]
NOT_MEASURED = (math.nan, math.nan, math.nan)


# ------------------------------------------------------------------ which queries


def groups(tasks: list[str], sources: Mapping[str, str] = {}) -> dict[str, list[str]]:
    """{group: its tasks}: tasks that ask the same question; their queries are averaged together.

    Args:
        sources: {task: its source} of tasks from other sources; each source is a group.
    """
    own = [name for name in tasks if not sources.get(name)]
    grouped = {f"books, {depth}": [name for name in own if book(name, depth)] for depth in WHERE}
    books = sum(grouped.values(), [])
    grouped["natural" if books else "all tasks"] = [name for name in own if name not in books]
    for name in tasks:
        if source := sources.get(name):
            grouped.setdefault(source, []).append(name)
    return {group: names for group, names in grouped.items() if names}


def book(task: str, depth: str) -> bool:
    """True if a task is one of the books made here, deep or shallow: `book_512_deep`."""
    return re.fullmatch(rf"book_\d+_{depth}", task) is not None


class Queries(NamedTuple):
    """Queries that are compared together.

    Attributes:
        on: their name in a table; queries: {(task, qid)}; why: the reason if there are none.
    """

    on: str
    queries: set[tuple[str, str]]
    why: str = ""

    def of(self, values: pd.DataFrame) -> pd.DataFrame:
        """The lines of `results.per_query` about these queries."""
        return values[pd.MultiIndex.from_frame(values[["task", "qid"]]).isin(self.queries)]


def queries_where(tasks: Iterable[Task], depth: str) -> Queries:
    """Queries of the run's own tasks whose answer stands `deep` or `shallow`; `both`; or `every`.

    The name of a book says where its answers stand. In other collections the evidence says it, if
    it is known of FEW queries or more: deep is the second half of the document, shallow its first
    15 %. If it is known of fewer, `deep` and `both` are all queries.
    """
    tasks = [task for task in tasks if not task.source]
    every = Queries("all tasks", {(task.name, qid) for task in tasks for qid in task.queries})
    books = {name: {key for key in every.queries if book(key[0], name)} for name in WHERE}
    if any(books.values()) and depth != "every":
        both = Queries("books", books["deep"] | books["shallow"])
        return both if depth == "both" else Queries(depth, books[depth])
    if depth in ("both", "every"):
        return every
    starts = {
        (task.name, qid): start for task in tasks for qid, (_, start, _) in task.evidence.items()
    }
    deep, name = depth == "deep", f"answer {WHERE[depth]}"
    chosen = {key for key, start in starts.items() if (start >= 0.5 if deep else start <= 0.15)}
    if len(chosen) >= FEW:
        return Queries(name, chosen)
    why = f"it is known of {len(chosen)} queries that their answer stands {WHERE[depth]}"
    unknown = "no evidence is known: nothing says where an answer stands"
    return every if deep else Queries(name, set(), why if starts else unknown)


# ------------------------------------------------------------------ two rows


def against(values: pd.DataFrame, row: str, reference: str) -> tuple[tuple, float, list[float]]:
    """nDCG@10 of a row minus that of a reference; NaN if either has no query.

    Returns:
        (mean, low, high): a 95 % paired bootstrap over queries, which ignores what another seed
        would give; p of this single comparison (paired randomisation test), to be corrected by
        `statistics.holm` if there are several; the difference between each training of the row
        and each of the reference.
    """
    pair = [seeds_mean(values, name).to_dict() for name in (row, reference)]
    if not all(pair):
        return NOT_MEASURED, math.nan, []
    by_seed = each_pair(*(each_seed(values, name) for name in (row, reference)))
    return statistics.paired(*pair), statistics.p_value(*pair), by_seed


def each_pair(scores: dict[int, float], reference: dict[int, float]) -> list[float]:
    """The score of each training of a row minus that of each training of the reference."""
    return [x - y for x in scores.values() for y in reference.values()]


def detectable(values: pd.DataFrame, row: str, reference: str) -> float:
    """The true difference that a comparison of two rows finds with 80 % power; NaN if not run.

    2.80 standard errors over queries and trainings (`statistics.standard_error`). If both rows were
    trained once, it is over queries alone, and another training may need more.
    """
    a, b = (trainings(values, name) for name in (row, reference))
    if a.empty or b.empty:
        return math.nan
    # Seed 0: a row that is not trained here (`params.trainings`), so it has no luck of a seed.
    fixed = [name.columns.tolist() == [0] for name in (a, b)]
    a, b = a.to_numpy().T, b.to_numpy().T
    systems = [a - b] if any(fixed) else [a, b]
    return statistics.detectable(statistics.standard_error(*systems))


def trainings(values: pd.DataFrame, row: str) -> pd.DataFrame:
    """nDCG@10 of a row: a line per (task, qid), in their order, and a column per seed."""
    own = values[values["row"] == row]
    return own.pivot(index=["task", "qid"], columns="seed", values="ndcg@10").sort_index()


def seeds_mean(values: pd.DataFrame, row: str) -> pd.Series:
    """nDCG@10 of each (task, qid), averaged over the seeds of the row."""
    return values[values["row"] == row].groupby(["task", "qid"])["ndcg@10"].mean()


def each_seed(values: pd.DataFrame, row: str) -> dict[int, float]:
    """{seed: nDCG@10 of the row} in the order of params.yaml; {} if it was not run."""
    return values[values["row"] == row].groupby("seed", sort=False)["ndcg@10"].mean().to_dict()


# ------------------------------------------------------------------ an ablation


def compared(profile: str, key: str) -> list[str]:
    """The rows of an ablation that the profile runs; all of them if it does not run this one.

    None of an ablation that other profiles have for themselves.
    """
    every = params.load()["ablations"] | params.rows(profile, "ablations")
    return every.get(key, {"rows": []})["rows"]


def ablation(profile: str, key: str) -> pd.DataFrame:
    """The rows of an ablation against its first row, one line per group of tasks and row.

    Columns: row, tasks, queries (0: not run), seeds (nDCG@10 with each), by_seed (the differences),
    ndcg@10, low, high, difference, difference_low, difference_high, detectable (`detectable`) and
    p, corrected after Holm for all comparisons of the table (NaN for the reference).
    """
    rows = compared(profile, key)
    values = results.per_query(profile, rows)
    values = values[values["reads"] == "all"]
    sources = dict(zip(values["task"], values["source"]))
    lines = [
        {"tasks": group} | compare(values[values["task"].isin(tasks)], row, rows[0])
        for group, tasks in groups(sorted(values["task"].unique()), sources).items()
        for row in rows
    ]
    columns = [
        "row",
        "tasks",
        "queries",
        "seeds",
        "by_seed",
        *SCORE,
        *DIFFERENCE,
        "detectable",
        "p",
    ]
    frame = pd.DataFrame(lines, columns=columns)
    tested = frame["p"].notna()
    frame.loc[tested, "p"] = statistics.holm(frame.loc[tested, "p"].tolist())
    return frame


def compare(values: pd.DataFrame, row: str, reference: str) -> dict:
    """A row's score on these queries, and its difference to the reference unless it is that."""
    own = seeds_mean(values, row)
    line = {"row": row, "queries": len(own), "seeds": each_seed(values, row), "by_seed": []}
    if len(own):
        line |= zip(SCORE, statistics.interval(own.to_numpy()))
    if row != reference:
        gap, line["p"], line["by_seed"] = against(values, row, reference)
        line |= zip(DIFFERENCE, gap)
        line["detectable"] = detectable(values, row, reference)
    return line


def ablation_table(
    frame: pd.DataFrame,
    profile: str,
    before: Callable[[str], dict] = lambda row: {},
    paper: Callable[[str], float] = lambda row: math.nan,
    expected: Callable[[str], int] = lambda row: 0,
) -> pd.DataFrame:
    """An ablation as a table to read: numbers × 100 with intervals, the paper's, the verdict.

    Args:
        frame: of `ablation`.
        before: row -> {column: cell} after its name; paper: row -> the paper's number.
        expected: row -> the paper's sign of its difference to the first row; 0: no claim.
    """
    lines, reference = [], frame["row"].iloc[0] if len(frame) else None
    for line in frame.to_dict("records"):
        row, by_seed = line["row"], line["by_seed"]
        score, gap = ([line[key] for key in keys] for keys in (SCORE, DIFFERENCE))
        sign, seen = expected(row), line["detectable"]
        effect = abs(paper(row) - paper(reference)) / 100
        lines.append(
            {"row": results.marked(profile, row)}
            | before(row)
            | {
                "tasks": line["tasks"],
                "nDCG@10": display.with_interval(*score) if line["queries"] else results.NOT_RUN,
                f"minus {reference}": display.with_interval(*gap, signed=True),
                "p, Holm": display.chance(line["p"]),
                "queries": line["queries"],
                "seeds": seeds_and_spread(line["seeds"]),
                "seed by seed": display.each_seed(by_seed),
                "detectable": display.points(seen),
                "paper": paper(row),
                "the paper's order": (
                    verdict(*gap[1:], sign, line["p"], by_seed, seen, effect) if sign else ""
                ),
            }
        )
    return pd.DataFrame(lines)


# ------------------------------------------------------------------ the paper's protocol


def trained_on_test(profile: str) -> dict[str, str]:
    """{row with `allow_test_training: always`: the row that differs in this word alone, or ""}."""
    rows = {
        row: params.settings(profile, "finetune", row) for row in params.rows(profile, "retrievers")
    }
    rest = {row: own | {TEST_TRAINING: None} for row, own in rows.items()}
    on_test = [row for row, own in rows.items() if own[TEST_TRAINING] == "always"]
    return {
        row: next((name for name in rows if name not in on_test and rest[name] == rest[row]), "")
        for row in on_test
    }


def by_task(profile: str, row: str, reference: str) -> pd.DataFrame:
    """nDCG@10 of two rows on each of the run's own tasks, then on the queries of all of them.

    Columns: task, queries (0: not run), the two rows with intervals, their difference, the same
    seed by seed.
    """
    values = own_tasks(profile, row, reference)
    names = sorted(values["task"].unique())
    lines = []
    for name, tasks in [*((name, [name]) for name in names), ("all tasks", names)]:
        chosen = values[values["task"].isin(tasks)]
        own, other = (compare(chosen, one, reference) for one in (row, reference))
        lines.append(
            {
                "task": name,
                "queries": own["queries"],
                **{results.marked(profile, of["row"]): shown(of, SCORE) for of in (other, own)},
                "difference": shown(own, DIFFERENCE, signed=True),
                "seed by seed": display.each_seed(own["by_seed"]),
            }
        )
    return pd.DataFrame(lines)


def on_all_tasks(profile: str, row: str, reference: str) -> tuple[float, float, float]:
    """(difference, low, high) of two rows on the queries of all the run's own tasks; or NaN."""
    return against(own_tasks(profile, row, reference), row, reference)[0]


def own_tasks(profile: str, *rows: str) -> pd.DataFrame:
    """`results.per_query` of rows on the run's own tasks, reading everything they read."""
    values = results.per_query(profile, list(rows))
    return values[(values["reads"] == "all") & (values["source"] == "")]


def shown(line: dict, keys: list[str], signed: bool = False) -> str:
    return display.with_interval(*(line.get(key, math.nan) for key in keys), signed=signed)


# ------------------------------------------------------------------ in words


def seeds_and_spread(scores: dict[int, float]) -> str:
    """How many seeds a row has, and their spread × 100: `1`, `2 (range 0.8)`, `3 (SD 0.5)`."""
    apart = statistics.spread(scores)
    kind = "range" if "range" in apart else "SD"
    number = apart.get("range", apart.get("deviation"))
    return f"{len(scores)} ({kind} {100 * number:.1f})" if apart else f"{len(scores)}"


def finding(line: dict) -> str:
    """The verdict on a question of our own, of a line of `ablation`: ahead, behind or undecided.

    By the rule of `verdict`, with no expectation of the paper; "" for the reference.
    """
    if math.isnan(line["difference"]):
        return ""
    said = verdict(line["difference_low"], line["difference_high"], 1, line["p"], line["by_seed"])
    return {REPRODUCES: "ahead", NOT_HERE: "behind"}.get(said, said)


def verdict(
    low: float,
    high: float,
    expected: int,
    p: float = math.nan,
    by_seed: list[float] = (),
    detectable: float = math.nan,
    printed: float = math.nan,
) -> str:
    """Has a difference the sign that the paper found, beyond chance?

    Where this is undecided, the size of the paper's own difference says what is known. If the
    comparison could not have seen it, there was no power. If it could, and the whole interval and
    all pairs of trainings lie below it, counted in the paper's direction, ours is smaller: it may
    have the other sign, and then any size.

    Args:
        low, high: the ends of its interval; expected: +1 or -1, the paper's sign; 0: no claim.
        p: corrected for the other comparisons of a table; from 0.05 on nothing is decided.
        by_seed: one difference per pair of trainings; seeds that disagree decide nothing.
        detectable: the smallest difference that the comparison could have seen; NaN: not known.
        printed: the paper's own difference; NaN if it gives none.
    """
    if math.isnan(low) or math.isnan(high):
        return results.NOT_RUN
    if not expected:
        return NO_CLAIM
    if expected < 0:
        low, high, by_seed = -high, -low, [-value for value in by_seed]
    if p < 0.05 or math.isnan(p):
        if low > 0 and min(by_seed, default=low) > 0:
            return REPRODUCES
        if high < 0 and max(by_seed, default=high) < 0:
            return NOT_HERE
    if detectable > abs(printed):
        return NO_POWER
    return SMALLER if max([high, *by_seed]) < abs(printed) else UNDECIDED
