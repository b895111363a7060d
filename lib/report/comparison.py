"""Compare two retrievers on the same queries: difference, 95 % interval, p-value, verdict.

    groups(tasks)                       tasks that ask the same question
    queries_where(tasks, depth)         queries whose answer stands deep in its document, or first
    difference, p_value, by_seed        a row against another
    ablation(profile, key)              the rows of an ablation against its first one
    ablation_table(profile, key, …)     the same as the table of notebooks 07 to 09
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
UNDECIDED = "undecided"
FEW = 30  # queries: fewer are no group of their own
WHERE = {"deep": "in the second half", "shallow": "in the first 15 %"}


# ------------------------------------------------------------------ which queries


def groups(tasks: list[str], sources: Mapping[str, str] = {}) -> dict[str, list[str]]:
    """{group: its tasks}: tasks that ask the same question; their queries are averaged together.

    Args:
        sources: {task: its source} of tasks from other sources; each source is a group.
    """
    own = [name for name in tasks if not sources.get(name)]
    grouped = {f"books, {depth}": [name for name in own if book(name, depth)] for depth in WHERE}
    books = [name for names in grouped.values() for name in names]
    grouped["natural" if books else "all tasks"] = [name for name in own if name not in books]
    for name in tasks:
        if sources.get(name):
            grouped.setdefault(sources[name], []).append(name)
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
    """Queries of the run's own tasks whose answer stands `deep` or `shallow`, or `all` of both.

    Books say it by their name. Other collections say it by their evidence, if it is known of FEW
    queries or more: deep is the second half of the document, shallow its first 15 %. If it is
    known of fewer, `deep` and `all` are all queries.
    """
    tasks = [task for task in tasks if not task.source]
    books = {
        name: {(task.name, qid) for task in tasks if book(task.name, name) for qid in task.queries}
        for name in WHERE
    }
    if any(books.values()):
        every = Queries("books", books["deep"] | books["shallow"])
        return every if depth == "all" else Queries(depth, books[depth])
    every = Queries("all tasks", {(task.name, qid) for task in tasks for qid in task.queries})
    if depth == "all":
        return every
    starts = {
        (task.name, qid): start for task in tasks for qid, (_, start, _) in task.evidence.items()
    }
    chosen = {
        key for key, start in starts.items() if (start >= 0.5 if depth == "deep" else start <= 0.15)
    }
    name = f"answer {WHERE[depth]}"
    if len(chosen) >= FEW:
        return Queries(name, chosen)
    why = f"it is known of {len(chosen)} queries that their answer stands {WHERE[depth]}"
    unknown = "no evidence is known: nothing says where an answer stands"
    return every if depth == "deep" else Queries(name, set(), why if starts else unknown)


# ------------------------------------------------------------------ two rows


def difference(values: pd.DataFrame, row: str, reference: str) -> tuple[float, float, float] | None:
    """(nDCG@10 of row minus that of reference, low, high); None if either has no query.

    The interval is a 95 % paired bootstrap over queries; `by_seed` shows what another seed does.
    """
    pair = sides(values, row, reference)
    return statistics.paired(*pair) if all(pair) else None


def p_value(values: pd.DataFrame, row: str, reference: str) -> float | None:
    """p of a single comparison (paired randomisation test); `statistics.holm` for several."""
    pair = sides(values, row, reference)
    return statistics.p_value(*pair) if all(pair) else None


def by_seed(values: pd.DataFrame, row: str, reference: str) -> list[float]:
    """The difference between each training of the one and each of the other."""
    a, b = (
        values[values["row"].isin(params.repeats(name))]
        .groupby("row", sort=False)["ndcg@10"]
        .mean()
        for name in (row, reference)
    )
    return [float(x - y) for x in a for y in b]


def sides(values: pd.DataFrame, row: str, reference: str) -> list[dict]:
    return [seeds_mean(values, name).to_dict() for name in (row, reference)]


def seeds_mean(values: pd.DataFrame, row: str) -> pd.Series:
    """nDCG@10 of each (task, qid), averaged over the seeds of the row."""
    return (
        values[values["row"].isin(params.repeats(row))].groupby(["task", "qid"])["ndcg@10"].mean()
    )


def seeds(values: pd.DataFrame, row: str) -> int:
    """The number of seeds that the row was trained and evaluated with."""
    return values.loc[values["row"].isin(params.repeats(row)), "row"].nunique()


# ------------------------------------------------------------------ an ablation


def compared(profile: str, key: str) -> list[str]:
    """The rows of an ablation that the profile runs; all of them if it does not run this one."""
    return params.rows(profile, "ablations").get(key, params.load()["ablations"][key])["rows"]


def ablation(profile: str, key: str, reads: str = "all") -> pd.DataFrame:
    """The rows of an ablation against its first row, one line per group of tasks and row.

    Columns: row, tasks, queries, seeds, by_seed, status, ndcg@10, low, high; difference,
    difference_low, difference_high and p, corrected after Holm for all comparisons of the table
    (NaN for the reference).
    """
    rows = compared(profile, key)
    values = results.per_query(profile, rows)
    values = values[values["reads"] == reads]
    sources = dict(zip(values["task"], values["source"]))
    lines = [
        compare(values[values["task"].isin(tasks)], row, rows[0]) | {"tasks": group}
        for group, tasks in groups(sorted(values["task"].unique()), sources).items()
        for row in rows
    ]
    tested = [line for line in lines if "p" in line]
    for line, p in zip(tested, statistics.holm([line["p"] for line in tested])):
        line["p"] = p
    columns = "row tasks queries seeds by_seed status ndcg@10 low high".split()
    return pd.DataFrame(
        lines, columns=[*columns, "difference", "difference_low", "difference_high", "p"]
    )


def compare(values: pd.DataFrame, row: str, reference: str) -> dict:
    """A row's score on these queries, and its difference to the reference unless it is that."""
    own = seeds_mean(values, row)
    line = {"row": row, "queries": len(own), "seeds": seeds(values, row), "by_seed": []}
    line["status"] = "run" if len(own) else results.NOT_RUN
    if len(own):
        line |= dict(zip(("ndcg@10", "low", "high"), statistics.interval(own.to_numpy())))
    if row != reference and (gap := difference(values, row, reference)):
        line |= dict(zip(("difference", "difference_low", "difference_high"), gap))
        line["p"] = p_value(values, row, reference)
        line["by_seed"] = by_seed(values, row, reference)
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
    reference = frame["row"].iloc[0] if len(frame) else ""
    lines = []
    for line in frame.to_dict("records"):
        row, gap = line["row"], [line["difference_low"], line["difference_high"]]
        sign = expected(row)
        judged = verdict(*gap, sign, line["p"], line["by_seed"]) if sign else ""
        score = display.with_interval(line["ndcg@10"], line["low"], line["high"])
        lines.append(
            {"row": results.marked(profile, row)}
            | before(row)
            | {
                "tasks": line["tasks"],
                "nDCG@10": score if line["queries"] else results.NOT_RUN,
                f"minus {reference}": display.with_interval(line["difference"], *gap, signed=True),
                "p, Holm": display.chance(line["p"]),
                "queries": line["queries"],
                "seeds": line["seeds"],
                "seed by seed": display.each_seed(line["by_seed"]),
                "paper": paper(row),
                "the paper's order": judged,
            }
        )
    return pd.DataFrame(lines)


# ------------------------------------------------------------------ in words


def verdict(
    low: float, high: float, expected: int, p: float = 0.0, by_seed: list[float] = ()
) -> str:
    """Has a difference the sign that the paper found, beyond chance?

    Args:
        low, high: the ends of its interval; expected: +1 or -1, the paper's sign.
        p: corrected for the other comparisons of a table; from 0.05 on nothing is decided.
        by_seed: one difference per pair of trainings; seeds that disagree decide nothing.
    """
    if math.isnan(low) or math.isnan(high):
        return results.NOT_RUN
    if p >= 0.05 or by_seed and min(by_seed) <= 0 <= max(by_seed):
        return UNDECIDED
    if expected < 0:
        low, high = -high, -low
    return REPRODUCES if low > 0 else NOT_HERE if high < 0 else UNDECIDED
