"""The report as pages that need nothing but a browser: offline, no scripts, the same bytes twice.

    python -m lib.report.site laptop

    data/report/<profile>/index.html          figures and tables, question by question
    data/report/<profile>/notebooks/          every executed notebook as a page
    data/report/<profile>/timings/index.html  seconds and memory: they differ from run to run

lib/report/safe.py makes the text of notebooks and tables harmless, and each page forbids the
browser to fetch anything. The pages name what was not run, and the command that runs it.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lib.pipeline import files, notebook, params
from lib.pipeline.errors import WorkbenchError
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
GOOD = dict.fromkeys((comparison.REPRODUCES, "matches"), "yes")
OPEN = (*comparison.UNSETTLED, "differs", results.NOT_RUN, "cannot run here")
OPEN = dict.fromkeys(OPEN, "soft")
VERDICTS = GOOD | OPEN | {comparison.NOT_HERE: "no"}  # the class of a cell in page.css
PAGES = Environment(loader=PackageLoader("lib.report"), autoescape=True, trim_blocks=True)
PAGES.globals |= {"code_css": safe.code_css, "verdicts": VERDICTS, "no": results.NOT_RUN}


def render(template: str, **values) -> Markup:
    """A template of lib/report/templates; it escapes every value that is not Markup."""
    return Markup(PAGES.get_template(f"{template}.html.j2").render(values))


# ------------------------------------------------------------------ the pages


def build(profile: str) -> Path:
    """Write the pages of a profile; return the path of the first one.

    Raises:
        WorkbenchError: no such profile, or a damaged file; the report is as it was before.
    """
    place = results.source(profile)
    paths = in_order((params.data(profile) / "executed").glob("*.ipynb"))
    paths = [path for path in paths if not path.name.endswith(".failed.ipynb")]
    executed = {path.stem: opened(path, notebook.read) for path in paths}
    pages = {"index": index_page(profile, place, executed)}
    pages |= timing_pages(profile, place / "timings")
    notebooks = notebook_pages(executed, profile)
    with files.replacing(place / "notebooks") as folder:
        for name, page in notebooks.items():
            files.write(folder / f"{name}.html", f"{page}\n")
    for name, page in pages.items():
        files.write(place / f"{name}.html", f"{page}\n")
    return place / "index.html"


def opened(path: Path, read: Callable):
    """read(path), or one line that names the damaged file and the command that makes it anew."""
    try:
        return read(path)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError) as error:
        reason = notebook.one_line(error).removeprefix(f"{path}: ")[:160]
        way_out = f"`{command}` makes it anew" if (command := remake(path)) else "delete it"
    raise WorkbenchError(f"{notebook.shown(path)}: cannot be read ({reason}); {way_out}")


def remake(path: Path) -> str:
    """The command that writes a file; "" if no stage does."""
    force = "--force " if "timings" in path.parts else ""
    return f"dvc repro {force}{stage}" if (stage := writer(path)) else ""


def writer(path: Path) -> str | None:
    """The stage that writes a file, as `dvc repro` takes it; None if params.yaml has no such."""
    if path.suffix == ".ipynb" or path.parent.name == "stages":
        stage, _, row = path.stem.partition("-")
    elif path.parent.name == "timings":
        stage, row = "efficiency", ""
    elif STAGES.get(path.parent.name, ("", ""))[1] is None:  # <stage>/<name>
        stage, row = path.parent.name, ""
    else:  # <stage>/<row>/<name>
        stage, row = path.parts[-3:-1]
    if stage not in STAGES:
        return None
    table = STAGES[stage][1]
    return stage if table is None else f"{stage}@{row}" if row in params.load()[table] else None


def in_order(paths) -> list[Path]:
    """Executed notebooks in the pipeline's order, the rest after them by name."""
    order = {stage: place for place, stage in enumerate(STAGES)}
    return sorted(
        paths, key=lambda path: (order.get(path.stem.partition("-")[0], len(order)), path.stem)
    )


def index_page(profile: str, place: Path, executed: dict) -> Markup:
    """Every figure and table below the question that it answers; anything else comes last."""
    left = {
        f"{kind}/{path.relative_to(place).with_suffix('').as_posix()}"
        for kind, suffix in (("figures", "svg"), ("tables", "md"), ("tables", "csv"))
        for stage in STAGES
        for path in (place / stage).rglob(f"*.{suffix}")
        if path.name != "curve.csv"
    }

    def items(*names: str) -> Markup:
        """`figures/<stage>/<name>`, `tables/…` as HTML, each crossed off the list of the rest."""
        left.difference_update(names)
        parts = []
        for kind, _, stem in (name.partition("/") for name in names):
            show = figure if kind == "figures" else table
            parts.append(show(place / stem, made_by(place / stem, executed)))
        return Markup("\n").join(parts)

    groups = catalogue(profile)
    listed = {name for stages in groups.values() for names in stages.values() for name in names}
    claims_map = place / "overview" / "paper_map.md"
    return render(
        "index",
        title=f"LoCoV1 and M2-BERT, {profile}",
        items=items,
        left=lambda: sorted(left),
        headlines=headlines(claims_map) if claims_map.is_file() else None,
        without_claims=not_run(claims_map),
        ablations=params.rows(profile, "ablations"),
        lessons=params.rows(profile, "lessons"),
        groups=groups,
        titles={name: title_of(book) for name, book in executed.items()},
        others=[name for name in executed if name not in listed],
        note=f"{display.note(profile)} {evaluated(profile)}",
    )


def headlines(path: Path) -> list[dict[str, str]]:
    """The lines of the map whose claims are headlines in claims.yaml."""
    names = {entry["claim"] for entry in claims.entries() if entry.get("headline")}
    _, columns, _, rows = opened(path, pipe_table)
    lines = [dict(zip(columns, row)) for row in rows]
    return [line for line in lines if line.get("claim") in names]


def evaluated(profile: str) -> str:
    """How many of the rows that params.yaml expects have a score, and which have none."""
    rows = results.rows(profile, "evaluate")
    paths = {row: results.source(profile, "evaluate", row) / "metrics.json" for row in rows}
    missing = [row for row in rows if not opened(paths[row], results.read_json)]
    names = f"; {results.NOT_RUN}: {', '.join(missing)}" if missing else ""
    return f"{len(rows) - len(missing)} of {len(rows)} rows are scored{names}."


# ------------------------------------------------------------------ figures and tables


def figure(path: Path, note: str = "") -> Markup:
    path = path.with_name(f"{path.name}.svg")
    if not path.is_file():
        return not_run(path)
    picture, caption = opened(path, lambda path: safe.picture(path.read_text(encoding="utf-8")))
    html = '<figure>\n<div class="picture">{}</div>\n<figcaption>{} {}</figcaption>\n</figure>'
    return Markup(html).format(picture, caption, note)


def table(path: Path, note: str = "") -> Markup:
    """From the rounded .md with its caption; from the .csv if there is no .md."""
    rounded, exact = (path.with_name(f"{path.name}.{suffix}") for suffix in ("md", "csv"))
    path = exact if exact.is_file() and not rounded.is_file() else rounded
    if not path.is_file():
        return not_run(path)
    caption, names, numeric, rows = opened(path, pipe_table)
    values = {"caption": caption, "note": note, "names": names, "numeric": numeric, "rows": rows}
    html = render("table", **values)
    return safe.scrolled(html, caption) if rows else html


def not_run(path: Path) -> Markup:
    kind = {".svg": "figure", ".ipynb": "notebook"}.get(path.suffix, "table")
    command = Markup(" (<code>{}</code>)").format(remake(path)) if remake(path) else ""
    html = '<p class="missing">The {} {}: {}{}.</p>'
    return Markup(html).format(kind, path.stem, results.NOT_RUN, command)


def made_by(path: Path, executed: dict) -> Markup:
    """A link to the notebook that a figure or a table comes from."""
    stage = (writer(path) or "").replace("@", "-")
    if stage != "efficiency" and stage not in executed:
        return Markup()
    folder = "timings" if stage == "efficiency" else "notebooks"
    return Markup('<a href="{}/{}.html">How it was made</a>').format(folder, stage)


def pipe_table(path: Path) -> tuple[str, list[str], list[bool], list[list[str]]]:
    """(caption, columns, which columns hold numbers, rows) of a table of `display.save_table`.

    Raises:
        ValueError: it is no table, or a line has more or fewer cells than there are columns.
    """
    if path.suffix == ".csv":
        text = display.markdown(pd.read_csv(path), path.stem.replace("_", " "))
    else:
        text = path.read_text(encoding="utf-8")
    caption, _, lines = text.partition("\n|")
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
        for line in f"|{lines}".strip().split("\n")
    ]
    ragged = any(len(row) != len(rows[0]) for row in rows)
    if ragged or len(rows) < 2 or not all(re.fullmatch(":?-*:?", cell) for cell in rows[1]):
        raise ValueError("it is no table, or a line does not have the cells of the table's head")
    numeric = [
        side.endswith(":") or all(NUMBER.fullmatch(cell) for cell in cells)
        for side, *cells in zip(*rows[1:])
    ]
    return " ".join(caption.split()), rows[0], numeric, rows[2:]


# ------------------------------------------------------------------ notebooks


def catalogue(profile: str) -> dict[str, dict[str, list[str]]]:
    """Notebook -> stage -> the executed notebooks that are expected of it, in numerical order."""
    groups: dict[str, dict[str, list[str]]] = {}
    for stage, (source, table) in STAGES.items():
        rows = params.rows(profile, table) if table else {"": {}}
        for row, own in rows.items():
            stages = groups.setdefault(source or own["notebook"], {})
            stages.setdefault(stage, []).append(f"{stage}-{row}" if row else stage)
    return dict(sorted(groups.items()))


def title_of(book) -> str:
    """The first heading, as plain text."""
    texts = (cell.source for cell in book.cells if cell.cell_type == "markdown")
    headings = [heading for text in texts for heading in re.findall(r"^#\s+(.+)", text, re.M)]
    return re.sub(r"[*`$]", "", headings[0]).strip() if headings else "Notebook"


def notebook_pages(executed: dict, profile: str) -> dict[str, Markup]:
    names, pages = list(executed), {}
    for name, before, after in zip(names, [None, *names], [*names[1:], None]):
        links = {f"← {before}": before, f"{after} →": after}
        pages[name] = notebook_page(executed[name], name, profile, links)
    return pages


def notebook_page(book, name: str, profile: str, links: dict[str, str | None]) -> Markup:
    """One executed notebook; `links` are {text: the page it leads to, None: no link}."""
    known = set(catalogue(profile))
    tagged = [(set(cell.metadata.get("tags", [])), cell) for cell in book.cells]
    injected = any("injected-parameters" in tags for tags, _ in tagged)
    parts = []
    for tags, cell in tagged:
        if cell.cell_type == "markdown":
            parts.append(safe.markdown(cell.source, known))
        elif "injected-parameters" in tags or "parameters" in tags and not injected:
            values = re.findall(r"^(\w+)(?:\s*:[^=\n]+)?\s*=\s*(.+)$", cell.source, re.M)
            parts.append({name: value.strip('"') for name, value in values})
        elif cell.cell_type == "code" and "parameters" not in tags:
            outputs = [output_of(output, known) for output in cell.outputs]
            parts += [safe.highlighted(cell.source), *outputs]
    title = f"{title_of(book)} ({name})"
    values = {"title": title, "name": name, "profile": profile, "links": links}
    return render("notebook", parts=parts, **values)


def output_of(output, known: set[str]) -> Markup:
    """The richest form of an output that is harmless."""
    if output.output_type == "stream":
        return safe.plain(output.text)
    if output.output_type == "error":
        trace = "\n".join(output.traceback) or f"{output.ename}: {output.evalue}"
        return safe.plain(trace, "error")
    forms = output.get("data", {})
    picture = Markup('<figure class="picture">{}</figure>')
    if "image/svg+xml" in forms:
        try:
            return picture.format(safe.picture(forms["image/svg+xml"])[0])
        except (ValueError, SyntaxError):  # not XML: one of the other forms will do
            pass
    if "image/png" in forms:
        address = f"data:image/png;base64,{''.join(forms['image/png'].split())}"
        image = Markup('<img alt="{}" src="{}">')
        return picture.format(image.format(forms.get("text/plain", "figure"), address))
    if "text/html" in forms and (clean := safe.sanitized(forms["text/html"])).strip():
        return safe.scrolled(clean) if "<table" in clean else clean
    if "text/markdown" in forms:
        return safe.markdown(forms["text/markdown"], known)
    return safe.plain(forms.get("text/plain", ""))


# ------------------------------------------------------------------ what was measured


def timing_pages(profile: str, place: Path) -> dict[str, Markup]:
    """Seconds and memory of every stage when it last ran, and the benchmark of notebook 10."""

    def cost(path: Path) -> tuple[str, float, float]:
        values = json.loads(path.read_text(encoding="utf-8"))
        return str(values["stage"]), float(values["seconds"]), float(values["peak_gib"])

    benchmark = [
        show(place / name)
        for show, name, suffix in (
            (figure, "efficiency", "svg"),
            (table, "efficiency", "csv"),
            (table, "convolution", "csv"),
        )
        if (place / f"{name}.{suffix}").is_file()
    ]
    costs = [opened(path, cost) for path in in_order((place / "stages").glob("*.json"))]
    values = {"title": f"What was measured, {profile}", "profile": profile}
    pages = {"timings/index": render("timings", costs=costs, benchmark=benchmark, **values)}
    book, links = place / "efficiency.ipynb", {"What was measured": "index"}
    if book.is_file():
        page = notebook_page(opened(book, notebook.read), "efficiency", profile, links)
    else:
        values = {"title": "Efficiency", "name": "efficiency", "profile": profile, "links": links}
        page = render("notebook", parts=[Markup("<h1>Efficiency</h1>"), not_run(book)], **values)
    return {"timings/efficiency": page} | pages


# ------------------------------------------------------------------ command line


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m lib.report.site PROFILE", file=sys.stderr)
        return 2
    try:
        print(f"see {notebook.shown(build(arguments[0]))}")
        return 0
    except WorkbenchError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
