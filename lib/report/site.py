"""The report as pages that need nothing but a browser: offline, no scripts, the same bytes twice.

    python -m lib.report.site laptop

    data/report/<profile>/index.html          figures and tables, question by question
    data/report/<profile>/notebooks/          every executed notebook as a page
    data/report/<profile>/timings/index.html  seconds and memory: they differ from run to run

lib/report/safe.py makes text of notebooks, tables and figures harmless, and a policy in each page
forbids the browser to fetch anything. What was not run is named, with the command that runs it.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from html import escape
from io import StringIO
from pathlib import Path

from lib.pipeline import files, notebook, params
from lib.report import claims, comparison, display, results, safe

# Stage -> (its notebook, None if the row names it; the table of its rows, None if it has none),
# in the pipeline's order.
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
PAPERS = "the paper's"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TEMPLATES = Path(__file__).parent / "templates"


class PageError(RuntimeError):
    """An input of the report cannot be read; the message is one line with the way out."""


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
    """The stage that writes a file, as `dvc repro` takes it; None if params.yaml has no such."""
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


def render(template: str, **values) -> str:
    """A template of this folder, filled in; values are HTML unless the template escapes them."""
    from jinja2 import Environment, FileSystemLoader

    return Environment(loader=FileSystemLoader(TEMPLATES)).get_template(template).render(**values)


def document(title: str, body: str) -> str:
    """A whole page; its policy forbids the browser to fetch anything or to run anything."""
    css = (TEMPLATES / "page.css").read_text(encoding="utf-8") + safe.code_css()
    return render("page.html.j2", policy=POLICY, title=title, css=css, body=body) + "\n"


def headlines(path: Path) -> str:
    """The claims that claims.yaml calls headlines, each with its verdict, from the map."""
    names = {entry["claim"] for entry in claims.entries() if entry.get("headline")}
    if not path.is_file():
        return not_run(path)
    _, columns, _, rows = opened(path, pipe_table)
    lines = [line for row in rows if (line := dict(zip(columns, row))).get("claim") in names]
    return "\n".join(['<ul class="headlines">', *map(headline, lines), "</ul>"])


def headline(line: dict[str, str]) -> str:
    verdict, numbers = line["verdict"], f"{line['ours']}; the paper: {line[PAPERS]}"
    return (
        f'<li><b class="{VERDICTS.get(verdict, "soft")}">{escape(verdict)}</b>'
        f'{escape(line["claim"])} <span class="soft">{escape(numbers)}</span></li>'
    )


def index_page(profile: str, place: Path, executed: dict) -> str:
    """Every figure and table where its question is asked; anything else comes last."""
    left = {
        f"{kind}/{path.relative_to(place).with_suffix('').as_posix()}"
        for kind, suffix in (("figures", "svg"), ("tables", "md"), ("tables", "csv"))
        for stage in STAGES
        for path in (place / stage).rglob(f"*.{suffix}")
        if path.name != "curve.csv"
    }

    def items(*names: str) -> str:
        """`figures/<stage>/<name>`, `tables/…` as HTML, each crossed off the list of the rest."""
        left.difference_update(names)
        parts = []
        for kind, _, stem in (name.partition("/") for name in names):
            show = figure if kind == "figures" else table
            parts.append(show(place / stem, made_by(place / stem, executed)))
        return "\n".join(parts)

    body = render(
        "index.html.j2",
        items=items,
        left=lambda: sorted(left),
        headlines=headlines(place / "overview" / "paper_map.md"),
        ablations=params.rows(profile, "ablations"),
        lessons=params.rows(profile, "lessons"),
        notebooks=notebook_list(profile, executed),
        note=f"{display.note(profile)} {evaluated(profile)}",
    )
    return document(f"LoCoV1 and M2-BERT, {profile}", body)


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
    names = f"; {results.NOT_RUN}: {', '.join(missing)}" if missing else ""
    return f"{len(rows) - len(missing)} of {len(rows)} rows are scored{names}."


# ------------------------------------------------------------------ figures and tables


def figure(path: Path, note: str = "") -> str:
    path = path.with_name(f"{path.name}.svg")
    if not path.is_file():
        return not_run(path)
    picture, caption = opened(
        path, lambda path: safe.drawn(path.read_text(encoding="utf-8"), f"figure-{path.stem}")
    )
    caption = f"<figcaption>{escape(caption)} {note}</figcaption>"
    return f'<figure>\n<div class="picture">{picture}</div>\n{caption}\n</figure>'


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
    command = f" (<code>dvc repro {stage}</code>)" if stage else ""
    name = f"The {kind} {escape(path.stem)}"
    return f'<p class="missing">{name}: {results.NOT_RUN}{command}.</p>'


def made_by(path: Path, executed: dict) -> str:
    """A link to the notebook a figure or table comes from."""
    stage = (writer(path) or "").replace("@", "-")
    if stage == "efficiency":
        return '<a href="timings/efficiency.html">How it was made</a>'
    return f'<a href="notebooks/{stage}.html">How it was made</a>' if stage in executed else ""


def pipe_table(path: Path) -> tuple[str, list[str], list[bool], list[list[str]]]:
    """(caption, columns, which columns hold numbers, rows) of a table of `display.save_table`.

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
    return safe.scrolled(
        f"<table>\n<caption>{escape(caption)} {note}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>",
        caption,
    )


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
    """The executed notebooks by question; for those that were not run, the command."""
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
            target = stage if len(own) > 1 else own[0].replace("-", "@", 1)
            command = f"{results.NOT_RUN}: <code>dvc repro {target}</code>"
            command = f' <span class="soft">({command})</span>' if missing else ""
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
            parts.append(safe.markdown(cell.source, known))
        elif "parameters" in tags and injected:  # the injected ones follow, and win
            continue
        elif {"parameters", "injected-parameters"} & set(tags):
            parts.append(parameters(cell.source))
        elif cell.cell_type == "code":
            parts.append(safe.highlighted(cell.source))
            parts += [
                output_of(output, f"cell-{number}-{place}", known)
                for place, output in enumerate(cell.outputs)
            ]
    title = title_of(book)
    report = f'<a href="../index.html#notebooks">Report at {escape(profile)}</a>'
    here = f'<span class="soft">{escape(name)}</span>'
    back = f'<header><nav aria-label="Report">{report}{here}{links}</nav></header>'
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
        return safe.plain(output.text)
    if output.output_type == "error":
        return safe.plain(
            "\n".join(output.traceback) or f"{output.ename}: {output.evalue}", "error"
        )
    forms = output.get("data", {})
    if "image/svg+xml" in forms:
        try:
            return (
                f'<figure class="picture">{safe.drawn(forms["image/svg+xml"], prefix)[0]}</figure>'
            )
        except (ValueError, SyntaxError):  # not XML: one of the other forms will do
            pass
    if "image/png" in forms and re.fullmatch(r"[A-Za-z0-9+/=\s]+", forms["image/png"]):
        alt, image = escape(forms.get("text/plain", "figure")), "".join(forms["image/png"].split())
        source = f"data:image/png;base64,{image}"
        return f'<figure class="picture"><img alt="{alt}" src="{source}"></figure>'
    if "text/html" in forms and (clean := safe.sanitized(forms["text/html"])).strip():
        return safe.scrolled(clean, "table") if "<table" in clean else clean
    if "text/markdown" in forms:
        return safe.markdown(forms["text/markdown"], known)
    return safe.plain(forms.get("text/plain", ""))


# ------------------------------------------------------------------ what was measured


def timing_pages(profile: str, place: Path) -> dict[str, str]:
    """Seconds and memory of every stage when it last ran, and the benchmark of notebook 10."""

    def cost(path: Path) -> tuple[str, float, float]:
        values = json.loads(path.read_text(encoding="utf-8"))
        return str(values["stage"]), float(values["seconds"]), float(values["peak_gib"])

    files_of = (("efficiency", "svg"), ("efficiency", "csv"), ("convolution", "csv"))
    benchmark = [
        (figure if suffix == "svg" else table)(place / name)
        for name, suffix in files_of
        if (place / f"{name}.{suffix}").is_file()
    ]
    costs = [opened(path, cost) for path in in_order((place / "stages").glob("*.json"))]
    values = {"profile": profile, "costs": costs, "benchmark": benchmark, "no": results.NOT_RUN}
    index = document(f"What was measured, {profile}", render("timings.html.j2", **values))
    book = place / "efficiency.ipynb"
    if not book.is_file():
        missing = render("timings.html.j2", **values, without_notebook=True)
        return {"efficiency": document("Efficiency", missing), "index": index}
    cells, known = opened(book, notebook.read), set(catalogue(profile))
    links = '<a href="index.html">What was measured</a>'
    return {
        "efficiency": notebook_page(cells, "efficiency", profile, known, links),
        "index": index,
    }


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
