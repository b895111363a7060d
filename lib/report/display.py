"""How results look: one style for figures, one form for tables and numbers.

    style()                                          at the top of a notebook
    figure(fig, name, out, profile, caption)         writes an SVG, and shows it
    save_table(frame, name, out, profile, caption)   writes .md to read and .csv to compute with
    table(frame, caption)                            shows a table in the notebook only
    with_interval, each_seed, chance                 numbers as text

Equal numbers give equal bytes: no date, no random id, no path. Scores are fractions in [0, 1];
what people read is multiplied by 100. A `name` is a path in the report: a stage, its row if it
has rows, and a name, such as `data/bm25_ladder` or `lesson/losses/lesson_losses`.
"""

import math
import re
from collections.abc import Iterable
from html import escape
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

from lib.pipeline import files, params
from lib.report import results

STYLE = {
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 100,
    "svg.hashsalt": "lib.report.results",  # ids in a figure are drawn from this name
    "svg.fonttype": "path",
    "savefig.facecolor": "white",
}


# ------------------------------------------------------------------ figures


def style() -> None:
    """Set one look for all figures: colour-blind-safe colours, bundled fonts, reproducible SVG."""
    import seaborn
    from IPython import get_ipython

    seaborn.set_theme(
        style="ticks", palette="colorblind", font="DejaVu Sans", font_scale=0.9, rc=STYLE
    )
    if hasattr(get_ipython(), "kernel"):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def figure(fig, name: str, out, profile: str, caption: str) -> None:
    """Write <name>.svg with its caption inside, close the figure, and show both."""
    import matplotlib.pyplot as plt

    caption = " ".join([caption, *remarks(name, profile)])
    path, stream = results.folder(out, profile) / f"{name}.svg", StringIO()
    fig.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    # The DOCTYPE names a file on the web, and stays out; a title and a description come in.
    attributes, end, rest = stream.getvalue().partition("<svg ")[2].partition(">")
    picture = (
        f'<?xml version="1.0" encoding="utf-8"?>\n<svg {attributes} role="img"{end}\n'
        f" <title>{escape(path.stem.replace('_', ' '))}</title>\n"
        f" <desc>{escape(caption)}</desc>{rest}"
    )
    files.write(path, picture)
    show({"image/svg+xml": picture, "text/plain": f"figure {path.stem}: {caption}"})
    show({"text/markdown": f"*{caption}*", "text/plain": ""})


def remarks(name: str, profile: str) -> list[str]:
    """What a caption ends with; of what shows rows, also what they start from and where they ran.

    Args:
        name: of the figure or table, a path in the report.
    """
    stage, *row = name.split("/")[:-1] or [""]
    shown = []
    if stage == "overview":
        shown = list(params.rows(profile, "retrievers"))
    elif stage == "ablation":
        shown = params.rows(profile, "ablations").get(row[0], {"rows": []})["rows"]
    texts = origin(results.starts(profile, shown)), machine(results.machines(profile, shown))
    return [text for text in (*texts, note(profile)) if text]


def origin(starts: dict[str, list[str]]) -> str:
    """From which weights rows start, and whose idea that is; "" if no row has run.

    Args:
        starts: of `results.starts`.
    """
    if not starts:
        return ""
    text = f"Encoders start from {by_rows(starts)}."
    if any("word vectors" in start for start in starts):
        text += " Word vectors are ours: the paper's encoders start from random weights."
    return text


def machine(kinds: dict[str, list[str]]) -> str:
    """On which kind of machine rows were trained; a warning if it was more than one."""
    if len(kinds) < 2:
        return "".join(f"Trained on {kind}." for kind in kinds)
    part = "which may be a part of a difference"
    return f"Trained on several kinds of machine, {part}: {by_rows(kinds)}."


def by_rows(found: dict[str, list[str]]) -> str:
    """`a`, or `d (row, row); a (the others)`: of the largest group, the rows are not listed."""
    *others, (most, _) = sorted(found.items(), key=lambda item: len(item[1]))
    listed = [f"{what} ({', '.join(rows)})" for what, rows in others]
    return "; ".join([*listed, f"{most} (the others)"]) if others else most


def note(profile: str) -> str:
    """The end of every caption: the profile, its collection unless embedded, and its lengths."""
    name = f"{profile} on {source}" if (source := collection(profile)) else profile
    paper = listed(params.PAPER_LENGTHS)
    here = listed(params.length(profile, length) for length in params.PAPER_LENGTHS)
    if here == paper:
        return f"Profile {name}, the paper's own lengths."
    return f"Profile {name}: {here} tokens stand for the paper's {paper}."


def listed(numbers: Iterable[int]) -> str:
    *first, last = (f"{n:,}" for n in numbers)
    return f"{', '.join(first)} and {last}"


def collection(profile: str) -> str:
    """The name of the profile's collection: LoCoV1, LongEmbed, its folder's; "" if embedded."""
    source = params.settings(profile, "data")["source"]
    known = {"embedded": "", "hub": "LoCoV1", "longembed": "LongEmbed"}
    return known.get(source, Path(source).name)


def label(name: str, most: int = 32) -> str:
    """A name from outside, safe in a figure: bounded, no formula, and never left out of a legend.

    matplotlib reads `$…$` as a formula, and leaves names that begin with `_` out of legends.
    """
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return re.sub(r"^_", " _", name.replace("$", r"\$"))


# ------------------------------------------------------------------ tables


def table(frame: pd.DataFrame, caption: str) -> None:
    """Show a table in the notebook, without its index."""
    sides = ["right" if right else "left" for right in numeric(frame)]
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    rows = (
        "".join(f'<td align="{side}">{escape(cell)}</td>' for cell, side in zip(cells, sides))
        for cells in formatted(frame)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    html = (
        f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )
    show({"text/html": html, "text/plain": markdown(frame, caption)})


def save_table(frame: pd.DataFrame, name: str, out, profile: str, caption: str) -> None:
    """Write <name>.md (rounded, with the caption) and <name>.csv (six digits), and show it."""
    caption = " ".join([caption, *remarks(name, profile)])
    path = results.folder(out, profile) / name
    files.write(f"{path}.md", markdown(frame, caption))
    files.write(f"{path}.csv", results.csv(frame))
    table(frame, caption)


def markdown(frame: pd.DataFrame, caption: str) -> str:
    """A pipe table below its caption."""

    def line(cells) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    dashes = "|".join("--:" if right else "---" for right in numeric(frame))
    lines = [caption, "", line(frame.columns), f"|{dashes}|", *map(line, formatted(frame))]
    return "\n".join(lines) + "\n"


def numeric(frame: pd.DataFrame) -> list[bool]:
    """Which columns hold numbers (a frame may hold two columns of one name)."""
    return [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]


def formatted(frame: pd.DataFrame) -> list[list[str]]:
    """The cells as text: each column with the decimals it needs (at most 4), – if missing."""
    columns = []
    for i in range(frame.shape[1]):
        values = frame.iloc[:, i].tolist()
        numbers = [x for x in values if isinstance(x, float | np.floating) and math.isfinite(x)]
        needed = (n for n in range(4) if all(abs(x - round(x, n)) < 1e-9 for x in numbers))
        decimals = next(needed, 4)
        columns.append([text(value, decimals) for value in values])
    return [list(row) for row in zip(*columns)]


def text(value, decimals: int) -> str:
    if isinstance(value, bool | np.bool_ | str):
        return str(value)
    if pd.isna(value):
        return "–"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return f"{value:,.{decimals}f}" if isinstance(value, float | np.floating) else str(value)


# ------------------------------------------------------------------ numbers as text


def with_interval(value: float, low: float, high: float, signed: bool = False) -> str:
    """A fraction × 100 with its interval: `39.4 [36.1, 42.8]`, signed `+2.0 [-1.1, +5.2]`; or –."""
    if any(map(math.isnan, (value, low, high))):
        return "–"
    form = "{:+.1f}" if signed else "{:.1f}"
    return f"{form} [{form}, {form}]".format(100 * value, 100 * low, 100 * high)


def points(value: float) -> str:
    """A fraction × 100 as text: `3.1`, or – if it is missing."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def each_seed(differences: list[float]) -> str:
    """The difference of each pair of trainings × 100: `+2.0, -0.3`; – if there is one pair.

    Of more than four pairs only the ends: `-0.3 to +2.0`.
    """
    if len(differences) > 4:
        return f"{100 * min(differences):+.1f} to {100 * max(differences):+.1f}"
    texts = [f"{100 * value:+.1f}" for value in differences]
    return ", ".join(texts) if len(texts) > 1 else "–"


def chance(p: float) -> str:
    """A p-value as text."""
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


# ------------------------------------------------------------------ notebooks


def show(bundle: dict[str, str]) -> None:
    """Display in the notebook; outside of one, print the text."""
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is not None:
        display(bundle, raw=True)
    elif bundle["text/plain"]:
        print(bundle["text/plain"])
