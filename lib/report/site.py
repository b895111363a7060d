"""The report as pages that need nothing but a browser: no network, no scripts, and the same bytes for the same results.

    python -m lib.report.site laptop

    data/report/<profile>/index.html          figures and tables in the order of the questions, what was not run by name
    data/report/<profile>/notebooks/          every executed notebook as a page
    data/report/<profile>/timings/index.html  what was measured: it differs from run to run, so it is no output of the pipeline

Text of notebooks, tables and figures is made safe on the way: what is not known to be harmless is left out, and a
policy in each page forbids the browser to fetch anything.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from html import escape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

from lib.pipeline import files, notebook, params
from lib.report import comparison, display, results

# Stage -> (the notebook it runs, None where its row says which; the table of its rows, None without), in the pipeline's order.
STAGES = {
    "data": ("01_locov1", None),
    "pretrain": ("03_pretrain", "pretrained"),
    "continue": ("03_pretrain", "continued"),
    "distill": ("05_finetune", "distilled"),
    "finetune": ("05_finetune", "retrievers"),
    "evaluate": ("06_evaluate", "evaluated"),
    "baseline": ("06_evaluate", "baselines"),
    "ablation": (None, "ablations"),
    "efficiency": ("10_efficiency", None),
    "lesson": (None, "lessons"),
    "overview": ("11_figures", None),
}
NUMBER = re.compile(rf"[-+–\d.,%\[\] ]*|{results.NOT_RUN}")
VERDICTS = {
    "reproduces": "yes",
    "matches": "yes",
    comparison.NOT_HERE: "no",
    "undecided": "soft",
    "differs": "soft",
    results.NOT_RUN: "soft",
    "cannot run here": "soft",
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CSS = """
:root { color-scheme: light dark; --ink: #1d2229; --soft: #5a6470; --line: #d9dee4; --card: #f6f7f9; --page: #fff; --link: #0a58a8; --bar: #7fa8d1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #a0a9b4; --line: #3a424c; --card: #1f252c; --page: #15191e; --link: #7db7f5; --bar: #3f6f9f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; color: var(--ink); background: var(--page); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: .6rem 0; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); scroll-margin-top: .5rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .3rem; }
p, li { max-width: 46rem; }
p:has(math[display=block]) { max-width: none; }
a { color: var(--link); text-underline-offset: .15em; }
.soft, figcaption, caption, .missing { color: var(--soft); font-size: .9rem; }
figure { margin: 1.2rem 0 1.6rem; }
figcaption { margin-top: .5rem; max-width: 52rem; }
.picture { padding: .8rem; background: #fff; border: 1px solid var(--line); border-radius: .6rem; overflow-x: auto; color: #000; }
.picture svg, .picture img { display: block; max-width: 100%; height: auto; margin: auto; }
.picture svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow: auto; max-height: 85vh; border: 1px solid var(--line); border-radius: .6rem; width: fit-content; max-width: 100%; margin: 1rem 0; }
table { min-width: 24rem; border-collapse: separate; border-spacing: 0; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .8rem; position: sticky; left: 0; max-width: min(60rem, calc(100vw - 4rem)); }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; overflow-wrap: normal; }
thead th { position: sticky; top: 0; background: var(--card); }
tbody th { font-weight: inherit; min-width: 8rem; position: sticky; left: 0; background: var(--page); }
tbody tr:last-child > * { border-bottom: 0; }
.number, [align=right] { text-align: right; } .number { white-space: nowrap; }
.yes { color: #1a7f3c; font-weight: 600; } .no { color: #c0352b; font-weight: 600; }
@media (prefers-color-scheme: dark) { .yes { color: #6fcf8e; } .no { color: #f08a80; } }
.dataframe th, .dataframe td { text-align: right; }
.missing { border: 1px dashed var(--line); border-radius: .6rem; padding: .6rem .9rem; width: fit-content; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--card); padding: .1em .3em; border-radius: .25em; }
pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; margin: .5rem 0; padding: .6rem .9rem; border-radius: .4rem; }
pre code { font: inherit; background: none; padding: 0; }
pre.code { background: var(--card); border-left: 3px solid var(--line); }
pre.error { border: 1px solid #c33; }
math[display=block] { margin: .8rem 0; padding: .2rem 0; overflow: auto hidden; }
dl.parameters { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .8rem 0; padding: .5rem .9rem; background: var(--card); border-radius: .4rem; font-size: .88rem; }
dl.parameters div { display: flex; gap: .4rem; } dl.parameters dd { margin: 0; font-weight: 600; } dl.parameters dt { color: var(--soft); }
.bar { display: block; height: .9rem; margin-top: .25rem; min-width: 1px; border-radius: .2rem; background: var(--bar); }
header nav, footer nav { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .9rem; } footer nav { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem; }
.contents ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; }
@media (min-width: 90rem) {
  body:has(.contents) { max-width: 84rem; display: grid; grid-template-columns: 12rem minmax(0, 70rem); gap: 0 2rem; }
  .contents { position: sticky; top: 1.5rem; align-self: start; } .contents ul { display: block; } .contents li { margin-bottom: .35rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --page: #fff; --card: #f6f7f9; --link: #000; }
  .contents, header nav, footer nav { display: none; } .scroll { overflow: visible; max-height: none; } thead th { position: static; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } pre { white-space: pre-wrap; }
}
"""


class PageError(RuntimeError):
    """Something that the report is made of cannot be read; the message is one line with the way out."""


# ------------------------------------------------------------------ the pages


def build(profile: str) -> Path:
    """Write a profile's pages, all of them or none; where the first one is.

    Raises:
        PageError: a file cannot be read; the report is as it was before.
        params.ParamsError: there is no such profile.
    """
    place = results.source(profile)
    executed = {
        path.stem: opened(path, notebook.read)
        for path in in_order((params.data(profile) / "executed").glob("*.ipynb"))
        if not path.name.endswith(".failed.ipynb")
    }
    pages = notebook_pages(executed, profile)
    index = index_page(profile, place, executed)
    measured = timing_pages(profile, place / "timings")
    place.mkdir(parents=True, exist_ok=True)
    (place / "timings").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".drafts-") as folder:
        drafts = Path(folder)
        (drafts / "notebooks").mkdir()
        for name, page in {
            "index": index,
            **{f"notebooks/{name}": page for name, page in pages.items()},
            **{f"timings/{name}": page for name, page in measured.items()},
        }.items():
            files.write(drafts / f"{name}.html", page)
        if (place / "notebooks").exists():
            (place / "notebooks").rename(drafts / "replaced")
        for name in ("notebooks", "index.html", *(f"timings/{name}.html" for name in measured)):
            (drafts / name).replace(place / name)
    return place / "index.html"


def opened(path: Path, read: Callable):
    """read(path), or one line that says which file is broken and which stage makes it anew."""
    try:
        return read(path)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except notebook.NotebookError as error:
        reason = str(error).removeprefix(f"{path}: ")
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        reason = f"is damaged ({notebook.one_line(error)[:160]})"
    stage = writer(path)
    way_out = (
        f"`dvc repro {'--force ' if 'timings' in path.parts else ''}{stage}` makes it anew"
        if stage
        else "delete it"
    )
    raise PageError(f"{notebook.shown(path)}: {reason}; {way_out}")


def writer(path: Path) -> str | None:
    """The stage that writes a file, as `dvc repro` takes it; None where no stage of params.yaml does."""
    design = params.load()
    if path.suffix == ".ipynb" or path.parent.name == "stages":
        stage, _, row = path.stem.partition("-")
    elif path.parent.name == "timings":
        stage, row = "efficiency", ""
    elif path.parent.name in STAGES and STAGES[path.parent.name][1] is None:
        stage, row = path.parent.name, ""
    else:  # <stage>/<row>/<name>
        stage, row = path.parts[-3:-1]
    if stage not in STAGES:
        return None
    table = STAGES[stage][1]
    return stage if table is None else f"{stage}@{row}" if row in design[table] else None


def in_order(paths) -> list[Path]:
    """Executed notebooks in the pipeline's order, the rest after them by name."""
    order = list(STAGES)

    def key(path: Path):
        stage = path.stem.partition("-")[0]
        return order.index(stage) if stage in order else len(order), path.stem

    return sorted(paths, key=key)


def document(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{escape(title)}</title>\n<style>{CSS}{code_css()}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def index_page(profile: str, place: Path, executed: dict) -> str:
    """Every figure and table where its question is asked; what is there and not asked for comes last."""
    left = {
        (kind, path.relative_to(place).with_suffix("").as_posix())
        for kind, suffix in (("figures", "svg"), ("tables", "md"), ("tables", "csv"))
        for stage in STAGES
        for path in (place / stage).rglob(f"*.{suffix}")
        if path.name != "curve.csv"
    }

    def items(*names: str) -> str:
        """`figures/<stage>/<name>` and `tables/…` as HTML, each crossed off the list of what is left."""
        parts = []
        for name in names:
            kind, _, stem = name.partition("/")
            left.discard((kind, stem))
            parts.append(
                (figure if kind == "figures" else table)(
                    place / stem, made_by(place / stem, executed)
                )
            )
        return "\n".join(parts)

    sections = [
        (
            "claims",
            "The claims",
            "What the paper says, beside what was found here.",
            items("tables/overview/paper_map"),
        ),
        (
            "length",
            "Does reading further help?",
            "The same kind of encoder, reading further and further.",
            items(
                "figures/overview/length_ladder",
                "figures/overview/retrievers",
                "tables/overview/table_locov1",
            ),
        ),
        (
            "where",
            "Where is the evidence read?",
            "By its place in the document, by the document’s length, and by moving a needle.",
            items(
                "figures/overview/needle",
                "figures/overview/where_read",
                "tables/overview/where_read",
            ),
        ),
    ]
    for name, own in params.rows(profile, "ablations").items():
        sections.append(
            (
                f"ablation-{name}",
                f"Ablation: {name.replace('_', ' ')}",
                f"Compared with {own['rows'][0]}: {', '.join(own['rows'][1:]) or 'nothing at this profile'}.",
                items(
                    f"figures/ablation/{name}/ablation_{name}",
                    f"tables/ablation/{name}/ablation_{name}",
                ),
            )
        )
    sections += [
        (
            "training",
            "Training",
            "How each row learned, and what came of it.",
            items("figures/overview/training", "tables/overview/rows"),
        ),
        (
            "data",
            "The data",
            "What is searched, how long it is, and how much of it a word count needs.",
            items("figures/data/data_lengths", "figures/data/bm25_ladder", "tables/data/data"),
        ),
        (
            "efficiency",
            "Efficiency",
            'Counted here; measured times differ from run to run and <a href="timings/index.html">have a page of their own</a>.',
            items("figures/efficiency/efficiency_counts", "tables/efficiency/efficiency_counts"),
        ),
        (
            "lessons",
            "Lessons",
            "A search, the mixer and the losses from close by.",
            items(
                *(
                    f"figures/lesson/{name}/lesson_{name}"
                    for name in params.rows(profile, "lessons")
                )
            ),
        ),
        (
            "cells",
            "The paper, number by number",
            "Each number that the paper prints, and what became of it here.",
            items("tables/overview/paper_cells"),
        ),
        (
            "notebooks",
            "Notebooks",
            "Every number above comes out of one of these, as it was run.",
            notebook_list(profile, executed),
        ),
    ]
    if left:
        sections.append(
            (
                "more",
                "More",
                "What else the stages wrote.",
                items(*(f"{kind}/{stem}" for kind, stem in sorted(left))),
            )
        )
    contents = "\n".join(
        f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _, _ in sections
    )
    body = "\n".join(
        f'<section id="{name}">\n<h2>{escape(title)}</h2>\n<p>{lead}</p>\n{content}\n</section>'
        for name, title, lead, content in sections
    )
    return document(
        f"LoCoV1 and M2-BERT, {profile}",
        (
            f'<nav class="contents" aria-label="Contents"><ul>\n{contents}\n</ul></nav>\n<main>\n<h1>Does an encoder that reads further find more?</h1>\n'
            f'<p>A reproduction of LoCoV1 and M2-BERT (<a href="https://arxiv.org/abs/2402.07440">arXiv 2402.07440</a>): encoders that read from one page to a whole book, '
            f'the paper’s own choices taken out one at a time, and each of its claims beside what was measured here.</p>\n<p class="soft">{escape(display.note(profile))} {escape(evaluated(profile))}</p>\n{body}\n</main>'
        ),
    )


def evaluated(profile: str) -> str:
    """How many of the rows that params.yaml expects have a score, and which have none."""
    for stage in results.STAGES["evaluate"]:
        for path in sorted(results.source(profile, stage).glob("*/metrics.json")):
            opened(path, lambda path: json.loads(path.read_text(encoding="utf-8")))
    rows = results.rows(profile, "evaluate")
    missing = [
        row
        for row in rows
        if not (results.source(profile, "evaluate", row) / "metrics.json").is_file()
    ]
    return f"{len(rows) - len(missing)} of {len(rows)} rows are scored{f'; {results.NOT_RUN}: ' + ', '.join(missing) if missing else ''}."


# ------------------------------------------------------------------ figures and tables


def figure(path: Path, note: str = "") -> str:
    path = path.with_name(f"{path.name}.svg")
    if not path.is_file():
        return not_run(path)
    picture, caption = opened(
        path, lambda path: drawn(path.read_text(encoding="utf-8"), f"figure-{path.stem}")
    )
    return f'<figure>\n<div class="picture">{picture}</div>\n<figcaption>{escape(caption)} {note}</figcaption>\n</figure>'


def table(path: Path, note: str = "") -> str:
    """From the rounded .md with its caption; from the .csv where there is no .md."""
    path = next(
        (
            path.with_name(path.name + suffix)
            for suffix in (".md", ".csv")
            if path.with_name(path.name + suffix).is_file()
        ),
        path.with_name(f"{path.name}.md"),
    )
    return (
        opened(path, lambda path: tabular(pipe_table(path), note))
        if path.is_file()
        else not_run(path)
    )


def not_run(path: Path) -> str:
    kind = "figure" if path.suffix == ".svg" else "table"
    stage = writer(path)
    return f'<p class="missing">The {kind} {escape(path.stem)}: {results.NOT_RUN}{f" (<code>dvc repro {stage}</code>)" if stage else ""}.</p>'


def made_by(path: Path, executed: dict) -> str:
    """A link to the notebook a figure or table comes from."""
    stage = (writer(path) or "").replace("@", "-")
    if stage == "efficiency":
        return '<a href="timings/efficiency.html">How it was made</a>'
    return f'<a href="notebooks/{stage}.html">How it was made</a>' if stage in executed else ""


def pipe_table(path: Path) -> tuple[str, list[str], list[bool], list[list[str]]]:
    """(caption, column names, which columns hold numbers, rows of cells) of a table that `report.save_table` wrote.

    Raises:
        ValueError: it is no table, or a line has more or fewer cells than there are columns.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        import pandas as pd

        text = display.markdown(pd.read_csv(StringIO(text)), path.stem.replace("_", " "))
    caption, _, lines = text.partition("\n|")
    rows = [
        [
            cell.strip().replace("\\|", "|")
            for cell in re.split(
                r"(?<!\\)\|",
                line.strip().strip("|") if set(line) <= set("|-: ") else line.strip()[1:-1],
            )
        ]
        for line in f"|{lines}".strip().split("\n")
    ]
    if (
        len(rows) < 2
        or rows[:2] != [[""], [""]]
        and not all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
    ):  # no column: nothing was run
        raise ValueError("no line of dashes under a table's head")
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"a line does not have the head's {len(rows[0])} cells")
    numeric = [
        cell.endswith(":") or all(NUMBER.fullmatch(row[i]) for row in rows[2:])
        for i, cell in enumerate(rows[1])
    ]
    return " ".join(caption.split()), rows[0], numeric, rows[2:]


def tabular(parts: tuple[str, list[str], list[bool], list[list[str]]], note: str = "") -> str:
    caption, names, numeric, rows = parts
    if not rows:
        return f'<p class="missing">{escape(caption)} Nothing of it: {results.NOT_RUN}. {note}</p>'

    def cell(text: str, right: bool, scope: str = "") -> str:
        kinds = " ".join(filter(None, ["number" if right else "", VERDICTS.get(text, "")]))
        tag, said = ("th", f' scope="{scope}"') if scope else ("td", "")
        return f"<{tag}{said}" + (f' class="{kinds}"' if kinds else "") + f">{escape(text)}</{tag}>"

    head = "".join(cell(name, right, "col") for name, right in zip(names, numeric))
    body = "\n".join(
        "<tr>"
        + "".join(
            cell(text, right, "row" if i == 0 else "")
            for i, (text, right) in enumerate(zip(row, numeric))
        )
        + "</tr>"
        for row in rows
    )
    return scrolled(
        f"<table>\n<caption>{escape(caption)} {note}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>",
        caption,
    )


def scrolled(content: str, label: str) -> str:
    """A wide table scrolls by itself, also by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label[:80] or "table")}">{content}</div>'


# ------------------------------------------------------------------ notebooks


def catalogue(profile: str) -> dict[str, dict[str, list[str]]]:
    """Notebook -> stage -> the executed notebooks that are expected of it, in numerical order."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, (source, table) in STAGES.items():
        for row, own in params.rows(profile, table).items() if table else ():
            found.setdefault(source or own["notebook"], {}).setdefault(stage, []).append(
                f"{stage}-{row}"
            )
        if not table:
            found.setdefault(source, {})[stage] = [stage]
    return dict(sorted(found.items()))


def notebook_list(profile: str, executed: dict) -> str:
    """The executed notebooks by question; rows as links, and the command for those that were not run."""
    groups, shown = catalogue(profile), {"efficiency"}
    parts = []
    for source, stages in groups.items():
        names = [name for own in stages.values() for name in own]
        shown |= {*names}
        title = next(
            (title_of(executed[name]) for name in names if name in executed),
            source.replace("_", " · ", 1).replace("_", " "),
        )
        lines = []
        for stage, own in stages.items():
            links = ", ".join(page_link(name, executed) for name in own)
            missing = any(name not in executed for name in own if name != "efficiency")
            command = (
                f' <span class="soft">({results.NOT_RUN}: <code>dvc repro {stage if len(own) > 1 else own[0].replace("-", "@", 1)}</code>)</span>'
                if missing
                else ""
            )
            lines.append(
                f"<li>{stage}: {links}{command}</li>"
                if own != [stage]
                else f"<li>{links}{command}</li>"
            )
        parts.append(
            f'<h3 id="notebook-{source}">{escape(title)}</h3>\n<ul>\n'
            + "\n".join(lines)
            + "\n</ul>"
        )
    if others := [name for name in executed if name not in shown]:
        parts.append(
            "<h3>No longer in params.yaml</h3>\n<ul>\n"
            + "\n".join(f"<li>{page_link(name, executed)}</li>" for name in others)
            + "\n</ul>"
        )
    return "\n".join(parts)


def page_link(name: str, executed: dict) -> str:
    row = escape(name.partition("-")[2] or name)
    if name == "efficiency":
        return f'<a href="timings/efficiency.html">{row}</a> (with what was measured)'
    return (
        f'<a href="notebooks/{escape(name)}.html">{row}</a>'
        if name in executed
        else f'<span class="soft">{row}</span>'
    )


def title_of(book) -> str:
    """The first heading, as plain text."""
    found = next(
        (
            match[1]
            for cell in book.cells
            if cell.cell_type == "markdown"
            and (match := re.search(r"^#\s+(.+)", cell.source, re.M))
        ),
        "Notebook",
    )
    return re.sub(r"[*`$]", "", found).strip()


def notebook_pages(executed: dict, profile: str) -> dict[str, str]:
    known, names, pages = set(catalogue(profile)), list(executed), {}
    for place, name in enumerate(names):
        near = [
            (label, names[i])
            for label, i in (("← {}", place - 1), ("{} →", place + 1))
            if 0 <= i < len(names)
        ]
        links = "".join(
            f'<a href="{escape(other)}.html">{label.format(escape(other))}</a>'
            for label, other in near
        )
        pages[name] = notebook_page(executed[name], name, profile, known, links)
    return pages


def notebook_page(book, name: str, profile: str, known: set[str], links: str = "") -> str:
    """One executed notebook; `known` are the notebooks that the index has an anchor for."""
    injected = any("injected-parameters" in cell.metadata.get("tags", []) for cell in book.cells)
    parts = []
    for number, cell in enumerate(book.cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            parts.append(markdown(cell.source, known))
        elif "parameters" in tags and injected:  # the injected ones follow, and win
            continue
        elif {"parameters", "injected-parameters"} & set(tags):
            parts.append(parameters(cell.source))
        elif cell.cell_type == "code":
            parts.append(highlighted(cell.source))
            parts += [
                output_of(output, f"cell-{number}-{place}", known)
                for place, output in enumerate(cell.outputs)
            ]
    title = title_of(book)
    back = f'<header><nav aria-label="Report"><a href="../index.html#notebooks">Report at {escape(profile)}</a><span class="soft">{escape(name)}</span>{links}</nav></header>'
    return document(
        f"{title} ({name})",
        back
        + "\n<main>\n"
        + "\n".join(filter(None, parts))
        + f'\n</main>\n<footer><nav aria-label="Other notebooks">{links}</nav></footer>',
    )


def parameters(source: str) -> str:
    values = re.findall(r"^(\w+)(?:\s*:[^=\n]+)?\s*=\s*(.+)$", source, re.M)
    return (
        '<dl class="parameters" aria-label="Parameters">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{escape(value.strip(chr(34)))}</dd></div>"
            for name, value in values
        )
        + "</dl>"
    )


def output_of(output, prefix: str, known: set[str]) -> str:
    """The richest form of an output that is harmless."""
    if output.output_type == "stream":
        return plain(output.text)
    if output.output_type == "error":
        return plain("\n".join(output.traceback) or f"{output.ename}: {output.evalue}", "error")
    forms = output.get("data", {})
    if "image/svg+xml" in forms:
        try:
            return f'<figure class="picture">{drawn(forms["image/svg+xml"], prefix)[0]}</figure>'
        except (ValueError, SyntaxError):  # not XML: one of the other forms will do
            pass
    if "image/png" in forms and re.fullmatch(r"[A-Za-z0-9+/=\s]+", forms["image/png"]):
        return f'<figure class="picture"><img alt="{escape(forms.get("text/plain", "figure"))}" src="data:image/png;base64,{"".join(forms["image/png"].split())}"></figure>'
    if "text/html" in forms and (clean := sanitized(forms["text/html"])).strip():
        return scrolled(clean, "table") if "<table" in clean else clean
    if "text/markdown" in forms:
        return markdown(forms["text/markdown"], known)
    return plain(forms.get("text/plain", ""))


def plain(text: str, kind: str = "output") -> str:
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip("\n")
    return f'<pre class="{kind}">{escape(text)}</pre>' if text else ""


# ------------------------------------------------------------------ markdown, formulas, code

# Code comes first, so that a dollar in it is a dollar. Inline: no space inside the dollars, no digit behind them.
FORMULA = re.compile(
    r"""(?P<code>^[ \t]*(?P<fence>`{3,}|~{3,}).*?(?:^[ \t]*(?P=fence)|\Z)|(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))
    |\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:(?:[^$\n]|\n(?!\s*\n))*[^\s$\\])?)\$(?![\d\w])""",
    re.S | re.M | re.X,
)
MATHML = {
    "math",
    "mrow",
    "mi",
    "mn",
    "mo",
    "mtext",
    "mspace",
    "msup",
    "msub",
    "msubsup",
    "mfrac",
    "msqrt",
    "mroot",
    "munder",
    "mover",
    "munderover",
    "mtable",
    "mtr",
    "mtd",
    "mstyle",
    "mpadded",
    "mphantom",
    "menclose",
    "mmultiscripts",
    "mprescripts",
    "none",
}


def markdown(text: str, known: set[str]) -> str:
    """Markdown as HTML: formulas as MathML, raw HTML as text, links to notebooks as links to the index."""
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def link(self, text, url, title=None):
            if re.match(r"https?://[^\s\"'<>\ue000]+$", url):
                return f'<a href="{escape(url)}" rel="noopener">{text}</a>'
            name = re.fullmatch(r"(?:\./)?(\d\d_\w+)\.ipynb(?:#.*)?", url)
            return (
                f'<a href="../index.html#notebook-{name[1]}">{text}</a>'
                if name and name[1] in known
                else text
            )

        def image(self, text, url, title=None):
            return text

        def block_code(self, code, info=None):
            return highlighted(code, info or "text") + "\n"

    formulas: list[str] = []

    def keep(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        formulas.append(
            formula(match["block"] or match["inline"], "block" if match["block"] else "inline")
        )
        return f"\ue000{len(formulas) - 1}\ue001"  # characters that mean nothing to markdown, nor to anyone

    text = FORMULA.sub(keep, re.sub("[\ue000\ue001]", "", text))
    html = mistune.create_markdown(
        renderer=Renderer(escape=True), plugins=["table", "strikethrough"]
    )(text)
    html = re.sub("\ue000(\\d+)\ue001", lambda match: formulas[int(match[1])], html)
    return re.sub(
        r"<table>.*?</table>", lambda match: scrolled(match[0], "table"), html, flags=re.S
    ).strip()


def formula(latex: str, display: str) -> str:
    """LaTeX as MathML; what cannot be converted is shown as it was typed."""
    from latex2mathml.converter import convert

    try:
        tree = ElementTree.fromstring(convert(latex.strip(), display=display))
        bad = any(
            local(part.tag) not in MATHML or "\\" in (part.text or "") for part in tree.iter()
        )
    except Exception:  # the converter raises a dozen kinds
        bad = True
    if bad:
        return f"<code>{escape(' '.join(latex.split()))}</code>"
    return markup(
        tree,
        MATHML,
        lambda name, key, value: (
            (key, value)
            if key
            in (
                "display",
                "mathvariant",
                "stretchy",
                "width",
                "minsize",
                "maxsize",
                "accent",
                "linethickness",
                "columnalign",
                "fence",
                "form",
                "movablelimits",
                "notation",
                "lspace",
                "rspace",
            )
            else None
        ),
    )


def highlighted(code: str, language: str = "python") -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language.split()[0], stripnl=True)
    except (ClassNotFound, IndexError):
        lexer = get_lexer_by_name("text")
    return (
        f'<pre class="code"><code>{highlight(code, lexer, HtmlFormatter(nowrap=True)).rstrip()}</code></pre>'
        if code.strip()
        else ""
    )


@cache
def code_css() -> str:
    """Colours of code in daylight and in the dark."""
    from pygments.formatters import HtmlFormatter

    def colours(style: str) -> str:
        lines = HtmlFormatter(style=style).get_style_defs("pre.code").split("\n")
        return "\n".join(line for line in lines if re.match(r"pre\.code \.\w+ ", line))

    return f"{colours('xcode')}\n@media screen and (prefers-color-scheme: dark) {{\n{colours('github-dark')}\n}}\n"


# ------------------------------------------------------------------ harmless HTML and SVG

HTML_TAGS = {
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "caption",
    "div",
    "span",
    "p",
    "code",
    "pre",
    "b",
    "i",
    "em",
    "strong",
    "sub",
    "sup",
    "br",
}
SILENT = {
    "script",
    "style",
    "template",
    "title",
    "head",
    "iframe",
    "object",
    "svg",
    "math",
    "noscript",
    "textarea",
    "select",
}
SVG_TAGS = {
    "svg",
    "g",
    "path",
    "use",
    "defs",
    "clipPath",
    "rect",
    "circle",
    "ellipse",
    "line",
    "polyline",
    "polygon",
    "text",
    "tspan",
    "title",
    "desc",
    "linearGradient",
    "radialGradient",
    "stop",
    "pattern",
    "mask",
    "marker",
    "symbol",
    "image",
}


class Sanitizer(HTMLParser):
    """Writes anew the tags and attributes that are known to be harmless, closes what is open, and keeps other tags' text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.written: list[str] = []
        self.open: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag in SILENT:
            self.silent.append(tag)
        if self.silent or tag not in HTML_TAGS:
            return
        kept = "".join(
            f' {key}="{escape(value or "")}"'
            for key, value in dict(attributes).items()
            if key in ("align", "scope", "colspan", "rowspan", "class")
        )
        self.written.append(f"<{tag}{kept}>")
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        if tag not in SILENT:
            self.handle_starttag(tag, attributes)
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.silent:
            if tag in self.silent:
                del self.silent[self.silent.index(tag) :]
        elif tag in self.open:
            while self.open[-1] != tag:
                self.written.append(f"</{self.open.pop()}>")
            self.written.append(f"</{self.open.pop()}>")

    def handle_data(self, data):
        if not self.silent:
            self.written.append(escape(data))


def sanitized(html: str) -> str:
    parser = Sanitizer()
    parser.feed(html)
    parser.close()
    return "".join(parser.written) + "".join(f"</{tag}>" for tag in reversed(parser.open))


def drawn(text: str, prefix: str) -> tuple[str, str]:
    """(an SVG for the middle of a page, its caption): shapes only, no address outside, and no id that another picture has.

    Raises:
        ValueError, ElementTree.ParseError: it is no SVG, or declares entities.
    """
    prefix = re.sub(r"\W", "-", prefix)
    if "<!ENTITY" in text:
        raise ValueError("declares entities")
    root = ElementTree.fromstring(text)
    if local(root.tag) != "svg":
        raise ValueError(f"holds <{local(root.tag)}>, not <svg>")
    said = {
        kind: next((child for child in root if local(child.tag) == kind), None)
        for kind in ("title", "desc")
    }
    for kind, child in said.items():
        if child is not None:
            child.set("id", kind)
    labels = [kind for kind, child in said.items() if child is not None]
    wanted = {
        name
        for part in root.iter()
        for key, value in part.items()
        for name in re.findall(r"url\(#([^)\s]+)\)" if local(key) != "href" else r"^#(\S+)$", value)
    } | {*labels}

    def attribute(tag: str, key: str, value: str) -> tuple[str, str] | None:
        if key == "id":
            return (key, f"{prefix}-{value}") if value in wanted else None
        if key == "href":
            if value.startswith("#"):
                return key, f"#{prefix}-{value[1:]}"
            return (
                (key, value)
                if tag == "image"
                and re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=\s]*", value)
                else None
            )
        value = re.sub(r"url\(#([^)\s]+)\)", rf"url(#{prefix}-\1)", value)
        if (
            key.lower().startswith(("on", "aria", "role"))
            or not re.fullmatch(r"[A-Za-z][A-Za-z-]*\d?", key)
            or re.search(r"//|\\|@|url\((?!#)", value)
        ):
            return None
        return key, value

    for part in root.iter():  # matplotlib's line breaks between shapes
        part.text, part.tail = (
            (part.text if local(part.tag) in ("text", "tspan", "title", "desc") else None),
            (part.tail or "").strip() and part.tail,
        )
    label = (
        f'aria-labelledby="{" ".join(f"{prefix}-{kind}" for kind in labels)}"'
        if labels
        else 'aria-label="figure"'
    )
    caption = (
        (said["desc"].text or "")
        if said["desc"] is not None
        else (said["title"].text or "")
        if said["title"] is not None
        else ""
    )
    return markup(root, SVG_TAGS, attribute).replace(
        "<svg", f'<svg role="img" {label}', 1
    ), " ".join(caption.split())


def local(name) -> str:
    """A name without its namespace; comments have none."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""


def markup(part: ElementTree.Element, tags: set[str], attribute: Callable) -> str:
    """The element as HTML takes it: known tags, and of their attributes what `attribute` lets through."""
    tag = local(part.tag)
    if tag not in tags:
        return ""
    kept = "".join(
        f' {item[0]}="{escape(item[1])}"'
        for key, value in part.items()
        if (item := attribute(tag, local(key), value))
    )
    inside = escape(part.text or "", quote=False) + "".join(
        markup(child, tags, attribute) + escape(child.tail or "", quote=False) for child in part
    )
    return (
        f"<{tag}{kept}>{inside}</{tag}>"
        if inside or tag not in ("path", "use", "rect", "image", "mspace")
        else f"<{tag}{kept}/>"
    )


# ------------------------------------------------------------------ what was measured


def timing_pages(profile: str, place: Path) -> dict[str, str]:
    """Seconds and memory of every stage when it last ran, and the race of notebook 10."""

    def cost(path: Path) -> tuple[str, float, float]:
        values = json.loads(path.read_text(encoding="utf-8"))
        return str(values["stage"]), float(values["seconds"]), float(values["peak_gib"])

    costs = [opened(path, cost) for path in in_order((place / "stages").glob("*.json"))]
    if costs:
        longest = max(seconds for _, seconds, _ in costs) or 1.0
        rows = "\n".join(
            f'<tr><th scope="row">{escape(stage)}</th><td class="number">{seconds:,.1f}</td><td class="number">{gib:.2f}</td>'
            f'<td style="width: 18rem"><span class="bar" style="width: {100 * seconds / longest:.1f}%"></span></td></tr>'
            for stage, seconds, gib in costs
        )
        total = f"{len(costs)} stages, {sum(seconds for _, seconds, _ in costs) / 60:.1f} min when each last ran, {max(gib for *_, gib in costs):.2f} GiB at most."
        stages = scrolled(
            f'<table>\n<caption>{total}</caption>\n<thead><tr><th scope="col">stage</th><th scope="col" class="number">seconds</th>'
            f'<th scope="col" class="number">peak GiB</th><th scope="col"><span class="soft">of the longest</span></th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>',
            "Seconds and memory of the stages",
        )
    else:
        stages = f'<p class="missing">No stage has left its time here: {results.NOT_RUN} (<code>dvc repro</code>).</p>'
    race = [
        (figure if suffix == "svg" else table)(place / name)
        for name, suffix in (("efficiency", "svg"), ("efficiency", "csv"), ("convolution", "csv"))
        if (place / f"{name}.{suffix}").is_file()
    ]
    race = race or [
        f'<p class="missing">The race of notebook 10: {results.NOT_RUN} (<code>dvc repro --force efficiency</code>).</p>'
    ]
    home = f'<header><nav aria-label="Report"><a href="../index.html">Report at {escape(profile)}</a></nav></header>\n<main>\n'
    book = place / "efficiency.ipynb"
    if book.is_file():
        run = notebook_page(
            opened(book, notebook.read),
            "efficiency",
            profile,
            set(catalogue(profile)),
            '<a href="index.html">What was measured</a>',
        )
    else:
        run = document(
            "Efficiency",
            f'{home}<h1>Efficiency</h1>\n<p class="missing">The notebook 10_efficiency: {results.NOT_RUN} (<code>dvc repro --force efficiency</code>).</p>\n</main>',
        )
    index = document(
        f"What was measured, {profile}",
        (
            f"{home}<h1>What was measured</h1>\n<p>Times and memory belong to the machine and the moment: two runs of the same thing agree on every number of the report and on none of these.</p>\n"
            f'<h2>Stages</h2>\n{stages}\n<h2>Efficiency</h2>\n<p><a href="efficiency.html">Notebook 10 as it was run.</a></p>\n'
            + "\n".join(race)
            + "\n</main>"
        ),
    )
    return {"efficiency": run, "index": index}


# ------------------------------------------------------------------ command line


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m lib.report.site PROFILE", file=sys.stderr)
        return 2
    try:
        print(f"see {notebook.shown(build(arguments[0]))}")
        return 0
    except (PageError, params.ParamsError) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
