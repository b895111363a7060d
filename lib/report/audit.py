"""Every number that the paper prints, ours beside it, and a verdict.

    paper_cells(profile, tasks, read, accuracy)     a line for each number of data/paper
    cells(name, key, ours, otherwise)               the lines of one table
    Measured(profile, tasks, read)                  our numbers by row, in the paper's unit
    stand_ins(profile)                              the rows that stand for a model of the paper

A number *matches* if it lies in our interval and *differs* if not; it was *not run* if this
machine could measure it, and *cannot run here* if not. A number that was measured on other tasks
or with a smaller model will differ, and the reason says so. (Notebook 12 asks whether the paper's
numbers agree with each other.)
"""

import re
from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd

from lib.benchmark import locov1, statistics
from lib.pipeline import params
from lib.report import comparison, results

CANNOT = "cannot run here"
VERDICTS = ("matches", "differs", results.NOT_RUN, CANNOT)
COLUMNS = ["table", "line", "column", "the paper's", "ours", "verdict", "why"]
LADDER = {f"M2-BERT-{length}": f"reads_{length}" for length in ("128", "2k", "8k", "32k")}
OTHERS = {
    "BGE-Large zero-shot": "bge-large-en",
    "E5-Mistral": "e5-mistral-7b",
    "Jina": "jina-embeddings-v2",
    "OpenAI Ada": "text-embedding-ada-002",
    "Voyage-001": "voyage-01",
    "Cohere v3": "embed-english-v3",
}  # by what the `model` of a baseline contains

# The verdict and the reason of a number that no row measures.
ENDPOINT = "an endpoint that wants a key: a row of baselines with url and key"
NO_MODEL = {
    **dict.fromkeys(("OpenAI Ada", "Voyage-001", "Cohere v3"), ENDPOINT),
    "ColBERTv2": "late interaction: a vector for each token, which no ranker here has",
    "E5-Mistral": "7 billion weights: a row of baselines on a GPU",
    "BGE-Large fine-tuned": "only our own architecture is fine-tuned here",
}
NO_LOCOV1 = "LoCoV1 is not among the sources: evaluate.also: [hub], or a mirror"
NO_ROW = results.NOT_RUN, "no row"
NO_BEIR = results.NOT_RUN, "BEIR's collections: a folder of them in evaluate.also"
NO_MTEB = results.NOT_RUN, "MTEB's data sets; that mteb reads our models, `make interop` tests"
NO_PASSAGES = "passages of Natural Questions; for other models than ours, a row of baselines"
NO_SPLIT = results.NOT_RUN, "this task's split is not among the sources"
SETTING = results.NOT_RUN, "a setting: profile paper takes the same sources"
SECONDS = CANNOT, "seconds of one A100-80GB; operations and this machine's clock are in 10"


# ------------------------------------------------------------------ ours


class Measured:
    """What the rows of a profile scored: (mean, low, high) × 100, or None if that was not run.

    Args:
        tasks: the test tasks of all sources, as `locov1.every` gives them. Those that are LoCoV1's
            by name and size are `real`: {LoCoV1's name: task}.
        read: the table where_read of notebook 11: source, row, asked, bin, ndcg@10, low, high.
    """

    def __init__(self, profile: str, tasks: list[locov1.Task], read: pd.DataFrame):
        scores, values = results.scores(profile), results.over_seeds(results.per_query(profile))
        self.scores, self.values = (
            scores[scores["reads"] == "all"],
            values[values["reads"] == "all"],
        )
        self.rows = set(values["row"])
        self.own = scores.loc[scores["source"] == "", "task"].unique().tolist()
        self.places = read[read["source"] == "the corpus"]
        printed = {
            name: (task.test_queries, task.test_documents) for name, task in locov1.LOCOV1.items()
        }
        self.real = {
            task.own_name: task for task in tasks if size(task) == printed.get(task.own_name)
        }

    def on_task(self, row: str, task: str) -> tuple | None:
        lines = self.scores[(self.scores["row"] == row) & (self.scores["task"] == task)]
        return tuple(100 * value for value in first(lines)) if len(lines) else None

    def on_own(self, row: str) -> tuple | None:
        """On the queries of the profile's own tasks."""
        values = comparison.seeds_mean(self.values[self.values["task"].isin(self.own)], row)
        interval = statistics.interval(values.to_numpy()) if len(values) else ()
        return tuple(100 * np.array(interval)) or None

    def on_average(self, row: str, names: list[str]) -> tuple | None:
        """The mean over real tasks, and its interval over the queries within each."""
        if row not in self.rows:
            return None
        values = self.values[self.values["row"] == row]
        by_task = [values.loc[values["task"] == self.real[name].name, "ndcg@10"] for name in names]
        resampled = [
            statistics.resampled(scores.to_numpy(), statistics.RESAMPLES, i)
            for i, scores in enumerate(by_task)
        ]
        low, high = np.quantile(100 * np.mean(resampled, axis=0), [0.025, 0.975])
        return 100 * np.mean([scores.mean() for scores in by_task]), low, high

    def in_bin(self, row: str, asked: str, label: str) -> tuple | None:
        """Where in a document of the corpus the row reads."""
        lines = self.places[(self.places["row"] == row) & (self.places["asked"] == asked)]
        lines = lines[lines["bin"] == label]
        return first(lines) if len(lines) else None


def first(lines: pd.DataFrame) -> tuple[float, float, float]:
    return tuple(lines.iloc[0][["ndcg@10", "low", "high"]].to_numpy(float))


def size(task: locov1.Task) -> tuple[int, int]:
    """(queries, documents), null passages included."""
    return len(task.queries), len(task.documents) + task.dropped


def stand_ins(profile: str) -> dict[str, list[str]]:
    """{model of the paper: the rows that stand for it, best first}; windows: "<model>, chunks"."""
    baselines = params.rows(profile, "baselines")
    found = {model: [row] for model, row in LADDER.items()}
    for model, name in OTHERS.items():
        known = {row: own for row, own in baselines.items() if name in own.get("model", "")}
        found[model] = [row for row, own in known.items() if not own.get("chunk")]
        found[f"{model}, chunks"] = [row for row, own in known.items() if own.get("chunk")]
    for row, own in params.rows(profile, "published").items():  # the authors' weights go first
        length = re.search("-(128|2k|8k|32k)-", own["checkpoint"].lower())
        found.setdefault(f"M2-BERT-{length and length[1]}", []).insert(0, row)
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
    otherwise: tuple[str, str] | Callable,
    columns: list[str] | None = None,
) -> list[dict]:
    """Every number of a table of the paper, ours beside it, and a verdict: one of VERDICTS.

    Args:
        name: of data/paper/<name>.csv; key: the column or columns that name its lines.
        ours: {(line, column): ((mean, low, high), why)}, in the paper's unit; None in place of
            the three: that cell was not run.
        otherwise: the verdict and the reason of a cell that `ours` does not hold, or a function
            of its line that gives them.
        columns: the columns that hold numbers of the paper; None: all that are numeric.
    """
    frame, key = results.paper(name), [key] if isinstance(key, str) else key
    numeric = [column for column in frame.select_dtypes("number").columns if column not in key]
    label, lines = name.partition("_")[0].replace("table", "Table "), []
    for _, row in frame.iterrows():
        line = ", ".join(str(row[column]) for column in key)
        for column in columns or numeric:
            if pd.isna(row[column]):
                continue
            paper, (values, why) = float(row[column]), ours.get((line, column), (None, None))
            if why is None:
                verdict, why = otherwise(line) if callable(otherwise) else otherwise
            elif values is None:
                verdict = results.NOT_RUN
            else:
                verdict = "matches" if values[1] <= paper <= values[2] else "differs"
            number = "–" if values is None else "{:.1f} [{:.1f}, {:.1f}]".format(*values)
            cell = label, line, column, f"{paper:g}", number, verdict, why
            lines.append(dict(zip(COLUMNS, cell)))
    return lines


def why_not(model: str) -> tuple[str, str]:
    """The verdict and the reason if no row has a number for a model of the paper."""
    model = model.partition(", ")[0]
    if model in NO_MODEL:
        return CANNOT, NO_MODEL[model]
    row = ", and a row of baselines" if model.startswith(("BGE", "Jina")) else ""
    return results.NOT_RUN, NO_LOCOV1 + row


def why_not_truncated(line: str) -> tuple[str, str]:
    return NO_BEIR if line.startswith("BEIR") else why_not(line.partition(", ")[2])


def why_not_found(line: str) -> tuple[str, str]:
    known = line.startswith(("M2", "BGE", "Jina"))
    return (results.NOT_RUN, NO_PASSAGES) if known else why_not(line)


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
    ours = {}
    for model, row in rows.items():
        weights = "; not the paper's weights: trained here, on other text" if row in trained else ""
        for task, real in measured.real.items():
            why = f"{row} on the real {task}{weights}"
            ours[model, task] = measured.on_task(row, real.name), why
    named = [task for task in results.paper(name).columns if task in locov1.LOCOV1]
    names = named or list(locov1.LOCOV1)
    for model, row in rows.items() if set(names) <= measured.real.keys() else ():
        average = measured.on_average(row, names), f"{row}, mean of {len(names)} tasks"
        if name == "table3_locov1" and model.endswith(", chunks"):  # lines in the other tables
            ours[model.removesuffix(", chunks"), "score_chunks"] = average
        else:
            ours |= {(model, column): average for column in ("average", "score")}
    return cells(name, "model", ours, why_not, columns)


def own_scores(
    profile: str, measured: Measured, rows: dict[str, str], accuracy: dict[str, list[float]]
) -> dict:
    """Our cells, as for `cells`, on other tasks than the paper's; rows: {model: a row}."""
    note = f"our own tasks and encoders of minutes (profile {profile}): "
    note += "compare differences, not numbers"
    trained = {name: name for name in ("short", "long", "mixed")}
    trained |= {"mnrl": "mnrl_2", "prototype": "prototype", "opl": "opl"}
    ours = {}
    for line, row in trained.items():
        ours[line, "score"] = measured.on_own(row), f"{row}: {note}"
    for start in ("warm", "cold"):
        values = tuple(100 * np.array(accuracy[f"{start}_32k"]))
        values = None if np.isnan(values[0]) else values
        ours[start, "mlm_accuracy"] = values, f"{start}_32k, held-out text: {note}"
    for place in results.needles(profile)["place"].unique():
        values = measured.in_bin("reads_32k", "needle, its place", place)
        why = f"reads_32k on passages of our corpus: {note}"
        ours[f"M2-BERT-32k, {place}", "score"] = values, why
    lengths = results.paper("table22_document_length").columns.drop(["model", "source"])
    for (model, row), length in product(rows.items(), lengths):
        ours[model, length] = measured.in_bin(row, "length of the answer", length), f"{row}: {note}"
    return ours


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
    rows = {model: names[0] for model, names in stand_ins(profile).items() if names}
    sizes = {
        (name, column): (value, "counted in the real task")
        for name, task in measured.real.items()
        for column, value in counted(task).items()
    }
    ladder = {model: row for model, row in rows.items() if row in trained}
    ours, models = own_scores(profile, measured, ladder, accuracy), (measured, rows, trained)
    lengths = ["128", "2048", "8192", "32768"]
    lines = [
        cells("table1_truncation", ["benchmark", "model"], {}, why_not_truncated, ["score"]),
        cells("table2_pretraining_mixture", "examples", {}, SETTING),
        locov1_cells("table3_locov1", *models),
        cells("table4_beir", "model", {}, NO_BEIR, ["score"]),
        cells("table5_efficiency", "model", {}, SECONDS, lengths),
        cells("table6_mixture", "mixture", ours, NO_ROW),
        cells("table7_warm_start", "start", ours, NO_ROW),
        cells("table8_loss", "loss", ours, NO_ROW, ["score"]),
        cells("table9_mteb", "task", {}, NO_MTEB),
        cells("table10_tasks", "task", sizes, NO_SPLIT),
        cells("table12_beir", "task", {}, NO_BEIR),
        locov1_cells("table13_locov1", *models, [*locov1.LOCOV1, "average"]),
        cells("table15_needle", ["model", "position"], ours, why_not_found),
        cells("table16_20_mteb", ["kind", "task"], {}, NO_MTEB),
        locov1_cells("table21_locov0", *models),
        cells("table22_document_length", "model", ours, why_not),
    ]
    return pd.DataFrame([line for table in lines for line in table])
