"""What is found, and how it is shown: one style, every number with its interval, nothing missing in silence.

    style()                                     call first: one look, and the same bytes for the same figure
    figure(fig, name, out, profile, caption)    an SVG in <out>/report/<profile>/figures
    save_table(frame, name, out, profile, …)    markdown to read, CSV to compute with
    metric(values, stage, row, out, profile)    JSON
    scores, per_query, curves, load_metrics     what the stages have written, by the rows that params.yaml expects
    paired, verdict                             is one row better than another, and does the paper's claim hold
    paper(name)                                 the paper's numbers, data/paper/<name>.csv

    python -m lib.report laptop                 the page: data/report/<profile>/index.html (lib/page.py)

Whatever is drawn is drawn from what was written; a row that has not run is shown as "not run".
"""
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import pandas as pd

from lib import metrics, params

CONTENTS = {"pretrain": ("pretrained", "continued"), "finetune": ("distilled", "retrievers"), "evaluate": ("retrievers", "yardsticks")}
DIGITS = 6


class ReportError(ValueError):
    """Something to be shown is missing or damaged; the message names the file."""


# ------------------------------------------------------------------ writing

def write(path: Path, text: str) -> None:
    """The whole text under its name, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def style() -> None:
    """One look for all figures; SVG that is the same, byte for byte, for the same data."""
    import matplotlib
    import seaborn
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind", font="DejaVu Sans", font_scale=0.85)
    matplotlib.rcParams.update({
        "svg.hashsalt": "loco-workbench", "svg.fonttype": "path", "figure.dpi": 100, "savefig.bbox": "tight",
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium", "axes.titleweight": "bold",
        "legend.frameon": False, "figure.facecolor": "white", "grid.color": "0.9"})
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
        set_matplotlib_formats("svg", metadata={"Date": None})
    except (ImportError, AttributeError):                                  # outside a notebook
        pass


def lengths(profile: str) -> str:
    """Which tokens stand for the paper's, as captions say it."""
    here = [params.length(profile, n) for n in params.PAPER_LENGTHS]
    if tuple(here) == params.PAPER_LENGTHS:
        return f"Profile {profile}: the paper's lengths."
    return (f"Profile {profile}: the paper's {listed(params.PAPER_LENGTHS)} tokens are {listed(here)} here.")


def listed(values) -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} and {last}" if first else last


def place(out: str | Path, profile: str) -> Path:
    return Path(out) / "report" / profile


def figure(fig, name: str, out: str | Path, profile: str, caption: str = "") -> None:
    """Write a matplotlib figure as <out>/report/<profile>/figures/<name>.svg, show it, close it.

    The caption, with the profile and its lengths, becomes the SVG's description: what a screen reader says,
    and what the report prints below it.
    """
    import io

    import matplotlib.pyplot as plt
    caption = f"{caption} {lengths(profile)}".strip()
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": name, "Description": caption})
    plt.close(fig)
    svg = buffer.getvalue()
    write(place(out, profile) / "figures" / f"{name}.svg", svg)
    show(svg, caption, svg=True)


def table(frame: pd.DataFrame, caption: str = "") -> None:
    """Show a frame as a table with its caption above."""
    show(html_table(frame, caption), frame.to_string(index=False))


def save_table(frame: pd.DataFrame, name: str, out: str | Path, profile: str, caption: str = "") -> None:
    """Write <out>/report/<profile>/tables/<name>.md (for people, with the caption) and .csv (for programs), and show it."""
    caption = f"{caption} {lengths(profile)}".strip()
    folder = place(out, profile) / "tables"
    write(folder / f"{name}.md", f"{caption}\n\n{markdown(frame)}")
    write(folder / f"{name}.csv", frame.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n"))
    table(frame, caption)


def cell(value) -> str:
    """One value as people read it: no trailing zeros, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column)


def values(column: pd.Series) -> list:
    return [item.item() if hasattr(item, "item") else item for item in column]


def markdown(frame: pd.DataFrame) -> str:
    """A GitHub table; bars inside cells are escaped."""
    columns = [values(frame[name]) for name in frame.columns]
    rows = [[cell(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in zip(*columns)]
    head = "| " + " | ".join(str(name) for name in frame.columns) + " |"
    rule = "|" + "|".join("---:" if numeric(frame[name]) else "---" for name in frame.columns) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def html_table(frame: pd.DataFrame, caption: str = "") -> str:
    from html import escape
    right = [numeric(frame[name]) for name in frame.columns]
    head = "".join(f"<th scope=\"col\"{' class=\"n\"' if r else ''}>{escape(str(name))}</th>" for name, r in zip(frame.columns, right))
    body = "".join("<tr>" + "".join(f"<td{' class=\"n\"' if r else ''}>{escape(cell(value))}</td>" for value, r in zip(row, right)) + "</tr>\n"
                   for row in zip(*[values(frame[name]) for name in frame.columns]))
    return f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def show(content: str, plain: str, svg: bool = False) -> None:
    """Display where there is a notebook; print nowhere else."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return
    if get_ipython() is not None:
        display({"image/svg+xml" if svg else "text/html": content, "text/plain": plain}, raw=True)


def rounded(value):
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ReportError(f"a metric is {value}: the stage that made it is broken")
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return rounded(value.item()) if hasattr(value, "item") else value


def metric(content: dict, stage: str, row: str | None, out: str | Path, profile: str) -> None:
    """Write metrics/<stage>/<row>.json, or metrics/<stage>.json where a stage has no rows; 6 significant digits.

    Raises:
        ReportError: a value is not finite.
    """
    where = Path("metrics") / (f"{stage}.json" if row is None else f"{stage}/{row}.json")
    write(place(out, profile) / where, json.dumps(rounded(content), indent=1, ensure_ascii=False) + "\n")


def curve(frame: pd.DataFrame, name: str, out: str | Path, profile: str) -> None:
    """Write curves/<name>.csv; 5 significant digits."""
    write(place(out, profile) / "curves" / f"{name}.csv", frame.to_csv(index=False, float_format="%.5g", lineterminator="\n"))


# ------------------------------------------------------------------ reading

def results(profile: str) -> Path:
    """Where the pipeline wrote a profile's results; for a finished profile other than the default, the copy that came back."""
    return place(params.data(profile), profile)


def load_metrics(profile: str, stage: str) -> dict[str, dict | None]:
    """{row: its metrics, or None where it has not run}, in the order of params.yaml.

    Args:
        stage: pretrain, finetune (with distilled rows) or evaluate (with yardsticks).
    """
    found = {}
    for name in (row for name in CONTENTS[stage] for row in params.rows(profile, name)):
        path = results(profile) / "metrics" / stage / f"{name}.json"
        found[name] = read(path) if path.is_file() else None
    return found


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ReportError(f"{path} is damaged: delete it and run `make repro` again") from None


def missing(profile: str, stage: str = "evaluate") -> list[str]:
    """Rows that params.yaml expects and that have no result."""
    return [row for row, found in load_metrics(profile, stage).items() if found is None]


def extras(profile: str, stage: str = "evaluate") -> list[str]:
    """Results of rows that params.yaml no longer holds."""
    folder = results(profile) / "metrics" / stage
    return sorted(path.stem for path in folder.glob("*.json") if path.stem not in load_metrics(profile, stage))


def scores(profile: str) -> pd.DataFrame:
    """All test scores, one a line: row, reads, task, ndcg@10, low, high, queries, documents, truncated.

    reads: `all` the row can, or `first_128`: the tokens that stand for the paper's 128.
    """
    lines = [dict(row=row, reads=reads, task=task, **found)
             for row, content in load_metrics(profile, "evaluate").items() if content
             for reads, tasks in content["scores"].items() for task, found in tasks.items()]
    return pd.DataFrame(lines, columns=["row", "reads", "task", "ndcg@10", "low", "high", "queries", "documents", "truncated"])


def per_query(profile: str, rows) -> pd.DataFrame:
    """nDCG@10 of every query: row, reads, task, qid, ndcg@10. Rows that have not run are absent."""
    parts = []
    for row in rows:
        path = params.data(profile) / "runs" / row / "per_query.parquet"
        if path.is_file():
            parts.append(pd.read_parquet(path).assign(row=row))
    columns = ["row", "reads", "task", "qid", "ndcg@10"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def curves(profile: str, stage: str, rows) -> pd.DataFrame:
    """Loss curves of rows, one step a line: row, step, tokens, loss, …"""
    parts = []
    for row in rows:
        path = results(profile) / "curves" / f"{stage}-{row}.csv"
        if path.is_file():
            parts.append(pd.read_csv(path).assign(row=row))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["row", "step", "tokens", "loss", "lr"])


def paper(name: str) -> pd.DataFrame:
    """The paper's numbers: data/paper/<name>.csv, each with its source.

    Raises:
        ReportError: there is no such table; those that are there are named.
    """
    folder = params.root() / "data" / "paper"
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise ReportError(f"{path.relative_to(params.root())} does not exist; there are {', '.join(sorted(p.stem for p in folder.glob('*.csv')))}")
    return pd.read_csv(path)


# ------------------------------------------------------------------ judging

def paired(profile: str, row: str, reference: str, task: str | list[str], reads: str = "all") -> tuple[float, float, float]:
    """(nDCG@10 of row minus that of reference, low, high): 95 % bootstrap over the queries of one task, or of several pooled.

    Raises:
        ReportError: one of the two has not run on the task.
    """
    tasks = [task] if isinstance(task, str) else list(task)
    found = per_query(profile, [row, reference])
    found = found[found["task"].isin(tasks) & (found["reads"] == reads)]
    sides = {}
    for name in (row, reference):
        some = found[found["row"] == name]
        if some.empty:
            raise ReportError(f"{name} has not run on {', '.join(tasks)}: make repro ARGS=evaluate@{name}")
        sides[name] = {f"{t} {q}": value for t, q, value in zip(some["task"], some["qid"], some["ndcg@10"])}
    return metrics.paired(sides[row], sides[reference])


def verdict(low: float, high: float, expected_sign: int = 1) -> str:
    """Does a difference have the sign that the paper found, beyond chance? In words, from the interval's two ends."""
    if expected_sign < 0:
        low, high = -high, -low
    if low > 0:
        return "reproduces at this scale"
    if high < 0:
        return "does not reproduce at this scale"
    return "undecided at this scale"


def with_interval(value: float, low: float, high: float) -> str:
    """`39.4 [36.1, 42.8]`: nDCG × 100."""
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main(arguments: list[str]) -> int:
    from lib import page
    try:
        if len(arguments) != 1:
            raise ReportError("usage: python -m lib.report PROFILE")
        page.build(arguments[0])
    except (ReportError, params.ParamsError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
