"""Is one row better than another? On the same queries, its seeds averaged, and said in words.

    groups(tasks)                          tasks that ask the same question, whose queries are averaged together
    asked(tasks, where)                    the queries whose answer stands deep in its document, or first
    difference, p_value, by_seed           one row against another: with its interval, by chance, training by training
    ablation(profile, key)                 the rows of an ablation against its first one, as a frame
    verdict(low, high, expected, …)        whether the paper's sign is there

`values` are lines of `report.per_query`. Scores and differences are fractions in [0, 1]; what is written is × 100.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd

from lib.benchmark import statistics
from lib.pipeline import params
from lib.report import results

NOT_HERE = "does not reproduce at this scale"
FEW = 30  # queries: fewer are no group of their own
WHERE = {"deep": "in the second half", "shallow": "in the first 15 %"}


def groups(tasks: list[str], sources: Mapping[str, str] = {}) -> dict[str, list[str]]:
    """Tasks that ask the same question, by the name of the question; their queries are averaged together.

    Args:
        sources: {task: the name of its source}, of tasks of other sources than the run's own; each source is a group.
    """
    own = [name for name in tasks if not sources.get(name)]
    found = {
        f"books, {depth}": [name for name in own if book(name, depth)]
        for depth in ("deep", "shallow")
    }
    books = [name for names in found.values() for name in names]
    found["natural" if books else "all tasks"] = [name for name in own if name not in books]
    for name in tasks:
        if sources.get(name):
            found.setdefault(sources[name], []).append(name)
    return {group: names for group, names in found.items() if names}


def book(task: str, depth: str) -> bool:
    """Whether a task is one of the books made here, deep or shallow: `book_512_deep`."""
    return re.fullmatch(rf"book_\d+_{depth}", task) is not None


class Asked(NamedTuple):
    """Queries that are compared together.

    Attributes:
        on: what they are called in a table; queries: {(task, qid)}; why: where there is none, the reason.
    """

    on: str
    queries: set[tuple[str, str]]
    why: str = ""

    def of(self, values: pd.DataFrame) -> pd.DataFrame:
        """The lines of `report.per_query` that are about these queries."""
        return values[pd.MultiIndex.from_frame(values[["task", "qid"]]).isin(self.queries)]


def asked(tasks: Iterable, where: str) -> Asked:
    """The queries of the run's own tasks whose answer stands `deep` or `shallow` in its document, or `all` of these two.

    Of the books, their tasks say it. Of other collections the evidence does, where it is known of FEW queries at least:
    deep from half of the document on, shallow in its first 15 %. Where it is known of fewer, deep and all are all queries.

    Args:
        tasks: of lib.benchmark.locov1.
    """
    tasks = [task for task in tasks if not task.source]
    books = {
        depth: {
            (task.name, qid) for task in tasks if book(task.name, depth) for qid in task.queries
        }
        for depth in ("deep", "shallow")
    }
    if any(books.values()):
        return (
            Asked("books", books["deep"] | books["shallow"])
            if where == "all"
            else Asked(where, books[where])
        )
    everything = Asked("all tasks", {(task.name, qid) for task in tasks for qid in task.queries})
    begins = {
        (task.name, qid): start for task in tasks for qid, (_, start, _) in task.evidence.items()
    }
    found = {
        "deep": {key for key, start in begins.items() if start >= 0.5},
        "shallow": {key for key, start in begins.items() if start <= 0.15},
    }
    if where == "all":
        return everything
    if len(found[where]) >= FEW:
        return Asked(f"answer {WHERE[where]}", found[where])
    why = (
        f"it is known of {len(found[where])} queries that their answer stands {WHERE[where]}"
        if begins
        else "no evidence is known: nothing says where an answer stands"
    )
    return everything if where == "deep" else Asked(f"answer {WHERE[where]}", set(), why)


# ------------------------------------------------------------------ two rows


def difference(values: pd.DataFrame, row: str, reference: str) -> tuple[float, float, float] | None:
    """(nDCG@10 of row minus that of reference, low, high): 95 % paired bootstrap over their queries; None where one has none.

    Of a row that was trained with several seeds each query has the mean. The interval is over queries: what another
    seed does, `by_seed` shows.

    Args:
        values: lines of `report.per_query`, of the tasks and reads that are to be compared.
    """
    pair = sides(values, row, reference)
    return statistics.paired(*pair) if all(pair) else None


def p_value(values: pd.DataFrame, row: str, reference: str) -> float | None:
    """How probable so large a difference is between equally good rows, alone among comparisons (`statistics.holm` for several)."""
    pair = sides(values, row, reference)
    return statistics.p_value(*pair) if all(pair) else None


def by_seed(values: pd.DataFrame, row: str, reference: str) -> list[float]:
    """The same difference between each training of the one and each of the other."""
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
    """With how many seeds the row was trained and evaluated."""
    return values.loc[values["row"].isin(params.repeats(row)), "row"].nunique()


# ------------------------------------------------------------------ an ablation


def compared(profile: str, key: str) -> list[str]:
    """The rows of an ablation: those that the profile runs, or, where it runs none, all of them, to be shown as not run."""
    return params.rows(profile, "ablations").get(key, params.load()["ablations"][key])["rows"]


def ablation(profile: str, key: str, reads: str = "all") -> pd.DataFrame:
    """The rows of an ablation against its first row, one line per row and group of tasks.

    Columns: row, tasks, ndcg@10, low, high, queries, seeds; difference, difference_low, difference_high, by_seed and p,
    corrected after Holm for all comparisons of the table (none for the reference); status.
    """
    rows = compared(profile, key)
    values = results.per_query(profile, rows)
    values = values[values["reads"] == reads]
    lines = []
    for group, tasks in groups(
        sorted(values["task"].unique()), dict(zip(values["task"], values["source"]))
    ).items():
        some = values[values["task"].isin(tasks)]
        for row in rows:
            own = seeds_mean(some, row)
            line = {
                "row": row,
                "tasks": group,
                "queries": len(own),
                "seeds": seeds(some, row),
                "by_seed": [],
                "status": "run" if len(own) else results.NOT_RUN,
            }
            if len(own):
                line |= dict(zip(("ndcg@10", "low", "high"), statistics.interval(own.to_numpy())))
            if row != rows[0] and (found := difference(some, row, rows[0])):
                line |= dict(zip(("difference", "difference_low", "difference_high"), found)) | {
                    "p": p_value(some, row, rows[0]),
                    "by_seed": by_seed(some, row, rows[0]),
                }
            lines.append(line)
    compared_lines = [line for line in lines if "p" in line]
    for line, p in zip(compared_lines, statistics.holm([line["p"] for line in compared_lines])):
        line["p"] = p
    return pd.DataFrame(
        lines,
        columns=[
            "row",
            "tasks",
            "ndcg@10",
            "low",
            "high",
            "queries",
            "seeds",
            "difference",
            "difference_low",
            "difference_high",
            "by_seed",
            "p",
            "status",
        ],
    )


# ------------------------------------------------------------------ in words


def verdict(
    low: float, high: float, expected: int, p: float = 0.0, by_seed: list[float] = ()
) -> str:
    """Has a difference the sign that the paper found, beyond chance? In words, from the two ends of its interval.

    Args:
        expected: +1 or -1, the paper's sign.
        p: corrected for the other comparisons of a table; from 0.05 on nothing is decided, whatever the interval says.
        by_seed: the difference between each training of the one and each of the other; seeds that disagree decide nothing.
    """
    if math.isnan(low) or math.isnan(high):
        return results.NOT_RUN
    if p >= 0.05 or by_seed and min(by_seed) <= 0 <= max(by_seed):
        return "undecided"
    if expected < 0:
        low, high = -high, -low
    return "reproduces" if low > 0 else NOT_HERE if high < 0 else "undecided"
