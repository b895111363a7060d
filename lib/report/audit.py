"""Every number that the paper prints, ours beside it, and what became of it.

    paper_cells(profile, tasks, read, accuracy)     a line for each number of data/paper
    cells(name, key, ours, otherwise)               the lines of one table
    Measured(profile, tasks, read)                  our numbers by row, in the paper's unit
    stand_ins(profile)                              the rows that stand for a model of the paper

A number *matches* if it lies in our interval and *differs* if not; it was *not run* if it could
have been here, and *cannot run here* if it could not. Measured on other tasks or by a smaller
model it will differ, and the reason says so.
(Whether the paper's numbers agree with each other is the question of notebook 12.)
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from lib.benchmark import locov1, statistics
from lib.pipeline import params
from lib.report import comparison, results

CANNOT = "cannot run here"
VERDICTS = ("matches", "differs", results.NOT_RUN, CANNOT)
LADDER = {
    "M2-BERT-128": "reads_128",
    "M2-BERT-2k": "reads_2k",
    "M2-BERT-8k": "reads_8k",
    "M2-BERT-32k": "reads_32k",
}
OTHERS = {
    "BGE-Large zero-shot": "bge-large-en",
    "E5-Mistral": "e5-mistral-7b",
    "Jina": "jina-embeddings-v2",
    "OpenAI Ada": "text-embedding-ada-002",
    "Voyage-001": "voyage-01",
    "Cohere v3": "embed-english-v3",
}  # by what the `model` of a baseline contains


# ------------------------------------------------------------------ ours


class Measured:
    """What the rows of a profile scored: (mean, low, high) × 100, or None where that was not run.

    Args:
        tasks: the test tasks of all sources, as `locov1.every` gives them. Those that are LoCoV1's
            by name and size are `real`: {LoCoV1's name: task}.
        read: the table where_read of notebook 11: source, row, asked, bin, ndcg@10, low, high.
    """

    def __init__(self, profile: str, tasks: list[locov1.Task], read: pd.DataFrame):
        scores, values = results.scores(profile), results.per_query(profile)
        self.scores, self.values, self.read = (
            scores[scores["reads"] == "all"],
            values[values["reads"] == "all"],
            read,
        )
        self.rows, self.own = (
            set(values["row"]),
            scores.loc[scores["source"] == "", "task"].unique().tolist(),
        )
        printed = {
            name: (described.test_queries, described.test_documents)
            for name, described in locov1.LOCOV1.items()
        }
        self.real = {
            task.own_name: task for task in tasks if size(task) == printed.get(task.own_name)
        }

    def on_task(self, row: str, task: str) -> tuple | None:
        found = self.scores[(self.scores["row"] == row) & (self.scores["task"] == task)]
        return (
            None
            if found.empty
            else tuple(100 * found.iloc[0][["ndcg@10", "low", "high"]].to_numpy(float))
        )

    def on_own(self, row: str) -> tuple | None:
        """On the queries of the profile's own tasks, each averaged over the row's seeds."""
        some = comparison.seeds_mean(self.values[self.values["task"].isin(self.own)], row)
        return tuple(100 * np.array(statistics.interval(some.to_numpy()))) if len(some) else None

    def on_average(self, row: str, names: list[str]) -> tuple | None:
        """The mean over real tasks, and its interval over the queries within each."""
        if row not in self.rows:
            return None
        some = self.values[self.values["row"] == row]
        each = [some.loc[some["task"] == self.real[name].name, "ndcg@10"] for name in names]
        draws = 100 * np.mean(
            [
                statistics.resampled(values.to_numpy(), statistics.RESAMPLES, i)
                for i, values in enumerate(each)
            ],
            axis=0,
        )
        return 100 * np.mean([values.mean() for values in each]), *np.quantile(
            draws, [0.025, 0.975]
        )

    def in_bin(self, row: str, asked: str, label) -> tuple | None:
        """Where in a document of the corpus the row reads."""
        found = self.read[
            (self.read["row"] == row)
            & (self.read["source"] == "the corpus")
            & (self.read["asked"] == asked)
            & (self.read["bin"] == label)
        ]
        return (
            None
            if found.empty
            else tuple(found.iloc[0][["ndcg@10", "low", "high"]].to_numpy(float))
        )


def size(task: locov1.Task) -> tuple[int, int]:
    """(queries, documents), null passages included."""
    return len(task.queries), len(task.documents) + task.dropped


def stand_ins(profile: str) -> dict[str, list[str]]:
    """{model of the paper: the rows that stand for it, best first}; windows: "<model>, chunks"."""
    baselines = params.rows(profile, "baselines")
    found = {model: [row] for model, row in LADDER.items()}
    for model, name in OTHERS.items():
        known = {row: own for row, own in baselines.items() if name in own.get("model", "")}
        found |= {
            model: [row for row, own in known.items() if not own.get("chunk")],
            f"{model}, chunks": [row for row, own in known.items() if own.get("chunk")],
        }
    for row, own in params.rows(
        profile, "published"
    ).items():  # the authors' weights stand before ours
        length = next(
            (
                length
                for length in ("128", "2k", "8k", "32k")
                if f"-{length}-" in own["checkpoint"].lower()
            ),
            None,
        )
        found.setdefault(f"M2-BERT-{length}", []).insert(0, row)
    return found | {"BM25": [row for row, own in baselines.items() if own == {}]}


def counted(task: locov1.Task) -> dict[str, tuple]:
    """The size of a real task, by the columns of the paper's Table 10, give or take rounding."""
    queries, documents = size(task)
    values = {
        "test_queries": queries,
        "test_documents": documents,
        "query_characters": np.mean([len(text) for text in task.queries.values()]),
        "document_characters": np.mean([len(text) for text in task.documents.values()]),
    }
    return {column: (value, value - 0.5, value + 0.5) for column, value in values.items()}


# ------------------------------------------------------------------ beside the paper's


def cells(
    name: str,
    key: str | list[str],
    ours: dict,
    otherwise: Callable,
    columns: list[str] | None = None,
) -> list[dict]:
    """Every number of a table of the paper, ours beside it, and a verdict: one of VERDICTS.

    Args:
        name: of data/paper/<name>.csv; key: the column or columns that name its lines.
        ours: {(line, column): ((mean, low, high), why)}, in the paper's unit; None in place of
            the three: that cell was not run. `matches`: the paper's number lies in the interval.
        otherwise: (line, column) -> the verdict and the reason of a cell that `ours` does not hold.
        columns: which columns hold numbers of the paper; None: all that are numeric.
    """
    frame, key = results.paper(name), [key] if isinstance(key, str) else key
    lines = []
    for _, row in frame.iterrows():
        label = ", ".join(str(row[column]) for column in key)
        for column in columns or [
            column for column in frame.select_dtypes("number").columns if column not in key
        ]:
            if pd.isna(row[column]):
                continue
            found, why = ours.get((label, column), (None, None))
            if why is None:
                verdict, why = otherwise(label, column)
            else:
                verdict = (
                    results.NOT_RUN
                    if found is None
                    else "matches"
                    if found[1] <= float(row[column]) <= found[2]
                    else "differs"
                )
            lines.append(
                {
                    "table": name.partition("_")[0].replace("table", "Table "),
                    "line": label,
                    "column": column,
                    "the paper's": f"{float(row[column]):g}",
                    "ours": "–" if found is None else "{:.1f} [{:.1f}, {:.1f}]".format(*found),
                    "verdict": verdict,
                    "why": why,
                }
            )
    return lines


def why_not(model: str) -> tuple[str, str]:
    """The verdict and the reason where no row has a number for a model of the paper."""
    model = model.partition(", ")[0]
    if model in ("OpenAI Ada", "Voyage-001", "Cohere v3"):
        return CANNOT, "an endpoint that wants a key: a row of baselines with url and key"
    if model == "ColBERTv2":
        return CANNOT, "late interaction: a vector for each token, which no ranker here has"
    if model == "E5-Mistral":
        return CANNOT, "7 billion weights: a row of baselines on a GPU"
    if model == "BGE-Large fine-tuned":
        return CANNOT, "only our own architecture is fine-tuned here"
    return results.NOT_RUN, "LoCoV1 is not among the sources: evaluate.also: [hub], or a mirror" + (
        ", and a row of baselines" if model.startswith(("BGE", "Jina")) else ""
    )


def always(verdict: str, why: str) -> Callable:
    return lambda *_: (verdict, why)


def locov1_cells(
    name: str,
    measured: Measured,
    rows: dict[str, str],
    trained: set[str],
    columns: list[str] | None = None,
) -> list[dict]:
    """The lines of a table of models on LoCoV1's tasks, or on their average.

    Args:
        rows: {model of the paper: the row that stands for it}; trained: rows trained here.
    """
    ours = {
        (model, task): (
            measured.on_task(row, measured.real[task].name),
            f"{row} on the real {task}"
            + ("; not the paper's weights: trained here, on other text" if row in trained else ""),
        )
        for model, row in rows.items()
        for task in measured.real
    }
    names = [task for task in results.paper(name).columns if task in locov1.LOCOV1] or list(
        locov1.LOCOV1
    )
    if set(names) <= measured.real.keys():
        for model, row in rows.items():
            average = measured.on_average(row, names), f"{row}, mean of {len(names)} tasks"
            if name == "table3_locov1" and model.endswith(
                ", chunks"
            ):  # a column there, lines elsewhere
                ours[model.removesuffix(", chunks"), "score_chunks"] = average
            else:
                ours |= {(model, column): average for column in ("average", "score")}
    return cells(name, "model", ours, lambda model, _: why_not(model), columns)


def paper_cells(
    profile: str, tasks: list[locov1.Task], read: pd.DataFrame, accuracy: dict[str, list[float]]
) -> pd.DataFrame:
    """Each number that the paper prints: table, line, column, the paper's, ours, verdict, why.

    Args:
        tasks, read: as for `Measured`.
        accuracy: {"warm_32k": (mean, low, high) of the MLM accuracy, "cold_32k": …}; NaN if that
            row was not run.
    """
    measured, trained = Measured(profile, tasks, read), set(params.rows(profile, "retrievers"))
    rows = {model: found[0] for model, found in stand_ins(profile).items() if found}
    note = f"our own tasks and encoders of minutes (profile {profile}): "
    note += "compare differences, not numbers"
    beir, mteb = (
        always(results.NOT_RUN, "BEIR's collections: a folder of them in evaluate.also"),
        always(
            results.NOT_RUN, "MTEB's data sets; that mteb reads our models, `make interop` tests"
        ),
    )
    no_row = always(results.NOT_RUN, "no row")
    buckets = [
        column
        for column in results.paper("table22_document_length").columns
        if column not in ("model", "source")
    ]

    def on_own(**of_line: str) -> dict:
        return {
            (line, "score"): (measured.on_own(row), f"{row}: {note}")
            for line, row in of_line.items()
        }

    guessed = {
        (kind, "mlm_accuracy"): (
            tuple(100 * np.array(accuracy[row])) if accuracy[row][0] == accuracy[row][0] else None,
            f"{row}, held-out text: {note}",
        )
        for kind, row in (("warm", "warm_32k"), ("cold", "cold_32k"))
    }
    sized = {
        (name, column): (value, "counted in the real task")
        for name, task in measured.real.items()
        for column, value in counted(task).items()
    }
    needle = {
        (f"M2-BERT-32k, {place}", "score"): (
            measured.in_bin("reads_32k", "needle, its place", place),
            f"reads_32k on passages of our corpus: {note}",
        )
        for place in results.needles(profile)["place"].unique()
    }
    by_length = {
        (model, bucket): (measured.in_bin(row, "length of the answer", bucket), f"{row}: {note}")
        for model, row in rows.items()
        if row in trained
        for bucket in buckets
    }
    passages = always(
        results.NOT_RUN,
        "passages of Natural Questions; for other models than ours, a row of baselines",
    )
    return pd.DataFrame(
        [
            *cells(
                "table1_truncation",
                ["benchmark", "model"],
                {},
                lambda line, _: (
                    beir() if line.startswith("BEIR") else why_not(line.partition(", ")[2])
                ),
                ["score"],
            ),
            *cells(
                "table2_pretraining_mixture",
                "examples",
                {},
                always(results.NOT_RUN, "a setting: profile paper takes the same sources"),
            ),
            *locov1_cells("table3_locov1", measured, rows, trained),
            *cells("table4_beir", "model", {}, beir, ["score"]),
            *cells(
                "table5_efficiency",
                "model",
                {},
                always(
                    CANNOT,
                    "seconds of one A100-80GB; operations and this machine's clock are in 10",
                ),
                ["128", "2048", "8192", "32768"],
            ),
            *cells(
                "table6_mixture",
                "mixture",
                on_own(short="short_2k_mlm", long="long_2k_mlm", mixed="reads_2k"),
                no_row,
            ),
            *cells("table7_warm_start", "start", guessed, no_row),
            *cells(
                "table8_loss",
                "loss",
                on_own(mnrl="mnrl_2", prototype="prototype", opl="opl"),
                no_row,
                ["score"],
            ),
            *cells("table9_mteb", "task", {}, mteb),
            *cells(
                "table10_tasks",
                "task",
                sized,
                always(results.NOT_RUN, "this task's split is not among the sources"),
            ),
            *cells("table12_beir", "task", {}, beir),
            *locov1_cells("table13_locov1", measured, rows, trained, [*locov1.LOCOV1, "average"]),
            *cells(
                "table15_needle",
                ["model", "position"],
                needle,
                lambda line, _: (
                    passages() if line.startswith(("M2", "BGE", "Jina")) else why_not(line)
                ),
            ),
            *cells("table16_20_mteb", ["kind", "task"], {}, mteb),
            *locov1_cells("table21_locov0", measured, rows, trained),
            *cells("table22_document_length", "model", by_length, lambda model, _: why_not(model)),
        ]
    )
