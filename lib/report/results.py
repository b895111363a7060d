"""What is found, shown and kept: one look for figures and tables, and numbers that later stages read.

    style()                                   at the top of a notebook
    figure(fig, name, out, profile, caption)  an SVG in a stage's folder of the report, and the figure in the notebook
    save_table(frame, name, …)                the same for a table: .md to read, .csv to compute with
    table(frame, caption)                     a table in the notebook only
    metric(…), curve(…)                       numbers for later stages
    load_metrics, scores, per_query, curves   numbers of earlier ones; a row that has none is shown as "not run"
    paper(name)                               what the paper printed

Equal numbers give equal bytes: no date, no random id, no path. Figures are drawn from the written
numbers. Scores are fractions in [0, 1]; what people read is multiplied by 100.
Every notebook depends on this file. What compares rows is in lib/report/comparison.py, the
paper's numbers beside ours in lib/report/audit.py, and the report's pages are made by lib/report/site.py.
"""

import json
import math
import re
from collections.abc import Iterable
from html import escape
from io import StringIO
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


# ------------------------------------------------------------------ figures


def style() -> None:
    """One look for all figures: colour-blind-safe colours, bundled fonts, SVG with the same bytes every time."""
    import seaborn

    seaborn.set_theme(
        style="ticks",
        palette="colorblind",
        font="DejaVu Sans",
        font_scale=0.9,
        rc={
            "axes.grid": True,
            "grid.color": "0.92",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "figure.dpi": 100,
            "svg.hashsalt": "lib.report.results",
            "svg.fonttype": "path",
            "savefig.facecolor": "white",
        },
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None and hasattr(get_ipython(), "kernel"):
        set_matplotlib_formats("svg", metadata={"Date": None})


def svg(fig, title: str, caption: str) -> str:
    """The figure as SVG, with a title and a description for those who cannot see it."""
    stream = StringIO()
    fig.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    attributes, end, rest = (
        stream.getvalue().partition("<svg ")[2].partition(">")
    )  # without the DOCTYPE, which names a file on the web
    return f'<?xml version="1.0" encoding="utf-8"?>\n<svg {attributes} role="img"{end}\n <title>{escape(title)}</title>\n <desc>{escape(caption)}</desc>{rest}'


def figure(fig, name: str, out, profile: str, caption: str) -> None:
    """Write <name>.svg with its caption inside, and show both in the notebook.

    Args:
        name: the figure's path in the report: a stage, its row if it has rows, and a name,
            such as `data/bm25_ladder` or `lesson/losses/lesson_losses`.
    """
    import matplotlib.pyplot as plt

    caption = f"{caption} {note(profile)}"
    path = folder(out, profile) / f"{name}.svg"
    picture = svg(fig, path.stem.replace("_", " "), caption)
    files.write(path, picture)
    plt.close(fig)
    show({"image/svg+xml": picture, "text/plain": f"figure {path.stem}: {caption}"})
    show({"text/markdown": f"*{caption}*", "text/plain": ""})


def note(profile: str) -> str:
    """Which profile, on which collection if it is not the embedded one, and which lengths stand for the paper's: the end of every caption."""
    there = {paper: params.length(profile, paper) for paper in params.PAPER_LENGTHS}
    on = collection(profile)
    profile = f"{profile} on {on}" if on else profile
    if all(paper == here for paper, here in there.items()):
        return f"Profile {profile}, the paper's own lengths."
    return f"Profile {profile}: {listed([f'{here:,}' for here in there.values()])} tokens stand for the paper's {listed([f'{paper:,}' for paper in there])}."


def collection(profile: str) -> str:
    """What the profile's collection is called: LoCoV1, LongEmbed, or the name of its folder; "" for the embedded one."""
    source = params.settings(profile, "data")["source"]
    return {"embedded": "", "hub": "LoCoV1", "longembed": "LongEmbed"}.get(
        source, Path(source).name
    )


def label(name: str, most: int = 32) -> str:
    """A name from outside as a figure takes it: of bounded length, a dollar no formula, and in the legend whatever it begins with."""
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return re.sub(r"^_", " _", name.replace("$", r"\$"))


# ------------------------------------------------------------------ tables


def table(frame: pd.DataFrame, caption: str) -> None:
    """Show a table in the notebook; the index is not shown."""
    cells = formatted(frame)
    numeric = [pd.api.types.is_numeric_dtype(frame.iloc[:, i]) for i in range(frame.shape[1])]
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td align="{"right" if right else "left"}">{escape(cell)}</td>'
            for cell, right in zip(row, numeric)
        )
        + "</tr>"
        for row in cells
    )
    html = f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    show({"text/html": html, "text/plain": markdown(frame, caption)})


def save_table(frame: pd.DataFrame, name: str, out, profile: str, caption: str) -> None:
    """Write <name>.md (rounded, with the caption) and <name>.csv (six digits), and show the table.

    Args:
        name: the table's path in the report, as for `figure`.
    """
    caption = f"{caption} {note(profile)}"
    files.write(folder(out, profile) / f"{name}.md", markdown(frame, caption))
    files.write(folder(out, profile) / f"{name}.csv", csv(frame))
    table(frame, caption)


def csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def markdown(frame: pd.DataFrame, caption: str) -> str:
    """A pipe table below its caption."""

    def line(cells) -> str:
        return (
            "| "
            + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
            + " |"
        )

    numeric = [
        "--:" if pd.api.types.is_numeric_dtype(frame.iloc[:, i]) else "---"
        for i in range(frame.shape[1])
    ]
    return (
        "\n".join(
            [
                caption,
                "",
                line(frame.columns),
                "|" + "|".join(numeric) + "|",
                *map(line, formatted(frame)),
            ]
        )
        + "\n"
    )


def formatted(frame: pd.DataFrame) -> list[list[str]]:
    """The cells as text: a column's numbers with the decimals it needs (four at most), thousands apart, – for what is missing."""
    columns = []
    for i in range(frame.shape[1]):
        values = frame.iloc[:, i].tolist()
        numbers = [
            value
            for value in values
            if isinstance(value, (float, np.floating)) and math.isfinite(value)
        ]
        decimals = next(
            d
            for d in range(5)
            if d == 4 or all(abs(value - round(value, d)) < 1e-9 for value in numbers)
        )
        columns.append([text(value, decimals) for value in values])
    return [list(row) for row in zip(*columns)]


def text(value, decimals: int) -> str:
    if (
        value is None
        or value is pd.NA
        or isinstance(value, (float, np.floating))
        and math.isnan(value)
    ):
        return "–"
    if isinstance(value, (bool, np.bool_, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return f"{value:,.{decimals}f}" if isinstance(value, (float, np.floating)) else str(value)


def with_interval(value: float, low: float, high: float, signed: bool = False) -> str:
    """A fraction × 100 with its interval: `39.4 [36.1, 42.8]`, signed `+2.0 [-1.1, +5.2]`; – where there is none."""
    if any(number is None or math.isnan(number) for number in (value, low, high)):
        return "–"
    form = "{:+.1f}" if signed else "{:.1f}"
    return f"{form} [{form}, {form}]".format(100 * value, 100 * low, 100 * high)


def show(bundle: dict[str, str]) -> None:
    """Display in the notebook; outside of one, print the text."""
    try:
        from IPython import get_ipython

        inside = get_ipython() is not None
    except ImportError:
        inside = False
    if inside:
        from IPython.display import display

        display(bundle, raw=True)
    elif bundle["text/plain"]:
        print(bundle["text/plain"])


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ------------------------------------------------------------------ numbers, written


def folder(out, profile: str, step: str = "", row: str | None = None) -> Path:
    """<out>/report/<profile>, or the folder of a stage in it: <stage>, or <stage>/<row>.

    Args:
        step: a stage, or a kind of step (a key of STAGES) that the row's stage takes.
    """
    place = Path(out) / "report" / profile
    if row is None:
        return place / step
    design = params.load()
    stages = [stage for stage, table in STAGES.get(step, {}).items() if row in design[table]]
    return place / (stages[0] if stages else step) / row


def rounded(value):
    """Floats to six significant digits, through dicts and lists; numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return float(f"{value:.6g}") if isinstance(value, float) else value


def metric(values: dict, stage: str, row: str | None, out, profile: str) -> None:
    """Write metrics.json in the folder of a stage, or of its row.

    Raises:
        ValueError: a number that is not finite, which JSON cannot hold.
    """
    path = folder(out, profile, stage, row) / "metrics.json"
    try:
        content = json.dumps(rounded(values), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError:
        name = path.relative_to(folder(out, profile))
        raise ValueError(f"{name}: a value is NaN or infinite in {values}") from None
    files.write(path, content)


def curve(frame: pd.DataFrame, stage: str, row: str, out, profile: str) -> None:
    """Write curve.csv in the folder of a row, one line per step."""
    files.write(folder(out, profile, stage, row) / "curve.csv", csv(frame))


# ------------------------------------------------------------------ numbers, read


def source(profile: str, step: str = "", row: str | None = None) -> Path:
    """The folder of a profile's own report, or of a stage in it."""
    return folder(params.data(profile), profile, step, row)


def rows(profile: str, step: str) -> list[str]:
    """The rows that the stages of a step run, in the order of params.yaml."""
    return [row for table in STAGES[step].values() for row in params.rows(profile, table)]


def load_metrics(profile: str, stage: str) -> pd.DataFrame:
    """The metrics of a stage, one line a row, in the order of params.yaml.

    Nested values become columns with dotted names (`validation.ndcg@10`). The column `status` is "run", or "not run" for
    a row of params.yaml without metrics, or "not in params.yaml" for metrics of a row that has left it.
    """
    expected = rows(profile, stage)
    paths = [
        path for name in STAGES[stage] for path in source(profile, name).glob("*/metrics.json")
    ]
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(paths, key=lambda path: path.parent.name)
    }
    lines = [
        {**flat(found.get(row, {})), "row": row, "status": "run" if row in found else NOT_RUN}
        for row in expected
    ]
    lines += [
        {**flat(values), "row": row, "status": "not in params.yaml"}
        for row, values in found.items()
        if row not in expected
    ]
    return pd.DataFrame(
        lines,
        columns=list(dict.fromkeys(["row", "status", *(key for line in lines for key in line)])),
    ).set_index("row")


def flat(values: dict, prefix: str = "") -> dict:
    flattened = {}
    for key, value in values.items():
        flattened |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flattened


def scores(profile: str) -> pd.DataFrame:
    """What evaluation wrote, one line per row, reads and task: source ("" for the run's own), ndcg@10, low, high, queries, documents, truncated."""
    lines = []
    for row in rows(profile, "evaluate"):
        path = source(profile, "evaluate", row) / "metrics.json"
        if not path.is_file():
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            {
                "row": row,
                "reads": reads,
                "task": task,
                "source": "",
                "reads_tokens": values["reads_tokens"],
                **score,
            }
            for reads, tasks in values["scores"].items()
            for task, score in tasks.items()
        ]
    return pd.DataFrame(
        lines,
        columns=[
            "row",
            "reads",
            "task",
            "source",
            "reads_tokens",
            "ndcg@10",
            "low",
            "high",
            "queries",
            "documents",
            "truncated",
        ],
    )


def marked(profile: str, row: str) -> str:
    """The row's name, and beside it that it was trained on what it is tested on, where that is so."""
    chain = [row]
    models = {name: own for table in params.MODELS for name, own in params.load()[table].items()}
    while (before := models.get(chain[-1], {}).get("pretrained")) is not None:
        chain.append(before)
    paths = [source(profile, "finetune", name) / "metrics.json" for name in chain]
    return (
        f"{row} (trained on test)"
        if any(
            json.loads(path.read_text(encoding="utf-8")).get("trained_on") == "test"
            for path in paths
            if path.is_file()
        )
        else row
    )


def per_query(profile: str, names: list[str] | None = None) -> pd.DataFrame:
    """nDCG@10 of every query: row, task, source ("" for the run's own), reads, qid, ndcg@10. Rows that were not run have no lines (load_metrics names them); those that are the same with another seed come along."""
    if names is None:
        names = rows(profile, "evaluate")
    parts = []
    for row in dict.fromkeys(repeat for name in names for repeat in params.repeats(name)):
        path = params.data(profile) / "runs" / row / "per_query.parquet"
        if path.is_file():
            parts.append(pd.read_parquet(path).assign(row=row))
    columns = ["row", "task", "source", "reads", "qid", "ndcg@10"]
    return (
        pd.concat(parts)[columns].reset_index(drop=True) if parts else pd.DataFrame(columns=columns)
    )


def needles(profile: str) -> pd.DataFrame:
    """What became of the needle task: row, place, qid, ndcg@10. Rows that were not run, or whose tasks had no needles, have no lines."""
    parts = []
    for row in rows(profile, "evaluate"):
        path = params.data(profile) / "runs" / row / "needle.parquet"
        if path.is_file() and len(found := pd.read_parquet(path)):
            parts.append(found.assign(row=row))
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=["place", "qid", "ndcg@10", "row"])
    )


def curves(profile: str, stage: str, names: Iterable[str]) -> pd.DataFrame:
    """Training curves under each other: row, step, tokens, loss, lr, accuracy.

    A row that was not run has no lines.
    """
    parts = []
    for name in names:
        path = source(profile, stage, name) / "curve.csv"
        if path.is_file():
            parts.append(pd.read_csv(path).assign(row=name))
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=["row", "step", "tokens", "loss", "lr", "accuracy"])
    )


def paper(name: str) -> pd.DataFrame:
    """A table of numbers that the paper printed, each line with its source.

    Raises:
        FileNotFoundError: there is none of that name; the message lists what there is.
    """
    place = params.root() / "data" / "paper"
    if not (place / f"{name}.csv").is_file():
        raise FileNotFoundError(
            f"data/paper holds no {name}.csv; it has {', '.join(sorted(path.stem for path in place.glob('*.csv')))}"
        )
    return pd.read_csv(place / f"{name}.csv")
