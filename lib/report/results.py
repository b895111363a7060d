"""The numbers that stages write and that later stages read.

    metric(values, stage, row, …), curve(frame, stage, row, …)   written
    load_metrics, scores, per_query, needles, curves             read; a missing row is "not run"
    over_seeds(values)                                           each query's mean over the seeds
    machines, starts                                             where rows were trained, from what
    marked, trained_on_test                                      rows whose scores prove nothing
    paper(name)                                                  the numbers that the paper printed

Each stage owns one folder: data/report/<profile>/<stage>/, or <stage>/<row>/ if it has rows.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from lib.pipeline import files, params

NOT_RUN = "not run"
# What kind of step -> the stages that take it, each with the table of its rows.
STAGES = {
    "pretrain": {"pretrain": "pretrained", "continue": "continued"},
    "finetune": {"distill": "distilled", "finetune": "retrievers"},
    "evaluate": {"evaluate": "evaluated", "baseline": "baselines"},
}
SCORES = "row reads task source reads_tokens ndcg@10 low high queries documents truncated".split()
SCORE = "ndcg@10"
QUERIES = ["row", "seed", "task", "source", "reads", "qid", SCORE]
NEEDLES = ["row", "seed", "place", "qid", SCORE]
CURVE_LINES = 2_000  # of a curve on disk, at most
CURVES = ["row", "step", "tokens", "loss", "lr", "accuracy"]


# ------------------------------------------------------------------ places


def folder(out, profile: str, step: str = "", row: str | None = None) -> Path:
    """<out>/report/<profile>, or the folder of a stage in it: <stage>, or <stage>/<row>.

    Args:
        step: a stage, or a kind of step (a key of STAGES) that the row's stage takes.
    """
    profile_folder = Path(out) / "report" / profile
    if row is None:
        return profile_folder / step
    design, tables = params.load_for(profile), STAGES.get(step, {})
    name = row.partition("/")[0]  # of another seed: `params.trainings`
    return profile_folder / next((s for s in tables if name in design[tables[s]]), step) / row


def source(profile: str, step: str = "", row: str | None = None) -> Path:
    """The folder of a profile's own report, or of a stage in it."""
    return folder(params.data(profile), profile, step, row)


def rows(profile: str, step: str) -> list[str]:
    """The rows that the stages of a step run, in the order of params.yaml."""
    return [row for table in STAGES[step].values() for row in params.rows(profile, table)]


# ------------------------------------------------------------------ written


def csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def metric(values: dict, stage: str, row: str | None, out, profile: str) -> None:
    """Write metrics.json, six significant digits a number; NaN and infinity are a ValueError."""
    exact = json.dumps(values, allow_nan=False, default=np.generic.item)
    rounded = json.loads(exact, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    content = json.dumps(rounded, indent=1, ensure_ascii=False) + "\n"
    files.write(folder(out, profile, stage, row) / "metrics.json", content)


def curve(frame: pd.DataFrame, stage: str, row: str, out, profile: str) -> None:
    """Write curve.csv in the folder of a row, one line per step (`thinned`)."""
    files.write(folder(out, profile, stage, row) / "curve.csv", csv(thinned(frame)))


def thinned(frame: pd.DataFrame, most: int = CURVE_LINES) -> pd.DataFrame:
    """A curve of at most `most` lines: the first and last, and means of equal groups between them.

    Whole numbers (steps, tokens) stay whole. A shorter curve is returned as it is.
    """
    if len(frame) <= most:
        return frame
    inner = frame.iloc[1:-1]
    group = np.arange(len(inner)) * (most - 2) // len(inner)
    means = inner.groupby(group).mean()
    curve = pd.concat([frame.iloc[:1], means, frame.iloc[-1:]], ignore_index=True)
    whole = frame.select_dtypes("integer").columns
    return curve.assign(**{name: curve[name].round().astype(np.int64) for name in whole})


# ------------------------------------------------------------------ read


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_metrics(profile: str, step: str) -> pd.DataFrame:
    """The metrics of a step, one line per row, in the order of params.yaml.

    Nested values become columns with dotted names (`validation.ndcg@10`). The column `status` is
    "run", or "not run" for a row of params.yaml without metrics, or "not in params.yaml" for
    metrics of a row that has left it.
    """
    written = {
        path.parent.name: read_json(path)
        for stage in STAGES[step]
        for path in source(profile, stage).glob("*/metrics.json")
    }
    expected = rows(profile, step)
    status = {row: "run" if row in written else NOT_RUN for row in expected}
    status |= dict.fromkeys(sorted(written.keys() - {*expected}), "not in params.yaml")
    lines = [written.get(row, {}) | {"row": row, "status": text} for row, text in status.items()]
    frame = pd.json_normalize(lines) if lines else pd.DataFrame(columns=["row", "status"])
    return frame.set_index("row")


def scores(profile: str) -> pd.DataFrame:
    """The scores of every row: a line per row, reads and task; source is "" for the run's own."""
    lines = []
    for row in rows(profile, "evaluate"):
        values = read_json(source(profile, "evaluate", row) / "metrics.json")
        for reads, tasks in values.get("scores", {}).items():
            shared = {"row": row, "reads": reads, "reads_tokens": values["reads_tokens"]}
            lines += [shared | {"task": task, "source": ""} | own for task, own in tasks.items()]
    return pd.DataFrame(lines, columns=SCORES)


def trainings_of(profile: str, row: str) -> list[dict]:
    """The metrics of a row's training, then of those of the rows that it starts from."""
    design = params.load_for(profile)
    if row not in params.trained(design):
        return []
    chain = params.ancestors(design, row)
    steps = ["pretrain" if "length" in own else "finetune" for _, own in chain]
    paths = [source(profile, step, name) for step, (name, _) in zip(steps, chain)]
    return [read_json(path / "metrics.json") for path in paths]


def machines(profile: str, rows: Iterable[str]) -> dict[str, list[str]]:
    """{kind of machine (`lib.model.device.kind`): the rows that have a training on it}."""
    found: dict[str, list[str]] = {}
    for row in rows:
        kinds = {own["machine"] for own in trainings_of(profile, row) if "machine" in own}
        for kind in sorted(kinds):
            found.setdefault(kind, []).append(row)
    return found


def starts(profile: str, rows: Iterable[str]) -> dict[str, list[str]]:
    """{what the weights of the first model were: the rows that start from it}, of rows that ran."""
    found: dict[str, list[str]] = {}
    for row in rows:
        *tuned, first = trainings_of(profile, row) or [{}]
        if "start" in first:
            seen = sum(own.get("tokens", 0) for own in (*tuned, first))
            untrained = "" if seen else ", with nothing trained"
            found.setdefault(first["start"] + untrained, []).append(row)
    return found


def learning_rate(metrics: pd.DataFrame, row: str) -> str:
    """`0.001 of 0.0003, 0.001`: the rate of a row, and those that were tried on validation.

    < or > mark the smallest and the largest one tried: beyond it a better one may lie. –: not run.

    Args:
        metrics: `load_metrics(profile, "finetune")`.
    """
    own = metrics.loc[row] if row in metrics.index else {}
    if pd.isna(own.get("lr")):
        return "–"
    trials = own.get("trials")
    tried = [trial["lr"] for trial in trials] if isinstance(trials, list) else []
    if not tried:
        return f"{own['lr']:g}"
    edge = {min(tried): "<", max(tried): ">"}.get(own["lr"], "")
    return f"{edge}{own['lr']:g} of {', '.join(f'{lr:g}' for lr in tried)}"


def marked(profile: str, row: str) -> str:
    """The row's name, and a note if it was trained on the test split."""
    return f"{row} (trained on test)" if trained_on_test(profile, row) else row


def trained_on_test(profile: str, row: str) -> bool:
    """Whether a row, or one that it starts from, was trained on the test split."""
    models, name = params.trained(params.load_for(profile)), row
    while name is not None:
        metrics = read_json(source(profile, "finetune", name) / "metrics.json")
        if metrics.get("trained_on") == "test":
            return True
        name = models.get(name, {}).get("pretrained")
    return False


def stacked(paths: dict[Path, dict], columns: list[str]) -> pd.DataFrame:
    """{path: columns to add to its table} under each other; only `columns` if there is no file."""
    frames = [
        (pd.read_csv if path.suffix == ".csv" else pd.read_parquet)(path).assign(**labels)
        for path, labels in paths.items()
        if path.is_file()
    ]
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def per_query(profile: str, names: list[str] | None = None) -> pd.DataFrame:
    """nDCG@10 of every query: row, seed, task, source, reads, qid, ndcg@10.

    Rows that were not run have no lines; `load_metrics` names them.
    """
    return of_seeds(profile, names, "per_query.parquet", QUERIES)


def needles(profile: str) -> pd.DataFrame:
    """The scores of the needle task: row, seed, place, qid, ndcg@10."""
    return of_seeds(profile, None, "needle.parquet", NEEDLES)


def of_seeds(profile: str, names: list[str] | None, file: str, columns: list[str]) -> pd.DataFrame:
    """One file of each ranking of these rows (None: of all rows)."""
    runs = params.data(profile) / "runs"
    paths = {
        runs / place / file: {"row": row, "seed": seed}
        for row in (rows(profile, "evaluate") if names is None else names)
        for seed, place in params.trainings(profile, row).items()
    }
    return stacked(paths, columns)[columns]


def over_seeds(values: pd.DataFrame) -> pd.DataFrame:
    """The lines of `per_query` or `needles`, one for each query: its mean over seeds."""
    keys = [name for name in values.columns if name not in ("seed", SCORE)]
    return values.groupby(keys, sort=False, as_index=False)[SCORE].mean()


def curves(profile: str, step: str, names: Iterable[str]) -> pd.DataFrame:
    """Training curves of the first seeds: row, step, tokens, loss, lr, accuracy."""
    paths = {source(profile, step, row) / "curve.csv": {"row": row} for row in names}
    return stacked(paths, CURVES)


def paper(name: str) -> pd.DataFrame:
    """A table of numbers that the paper printed, each line with its source."""
    return pd.read_csv(params.root() / "data" / "paper" / f"{name}.csv")
