"""The report's pages: complete, offline, harmless, and the same bytes for the same results."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from ruamel.yaml import YAML

from lib.pipeline import files, params
from lib.pipeline.params import ParamsError
from lib.report import display, safe, site
from lib.report import results as written

ROOT = Path(__file__).parents[2]
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Er"
    "kJggg=="
)
EVIL = (
    '<script>alert(1)</script><img src="http://evil.example/x.png" onerror="alert(2)">'
    '<a href="javascript:alert(3)">go</a>'
    '<style>@import "http://evil.example/x.css"</style><p onclick="alert(4)">kept</p></div></main>'
)
DRAWING = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9"
 onload="alert(5)">
 <title>ladder</title><desc>Scores &amp; lengths.</desc><script>alert(6)</script>
 <style>@import url(http://evil.example/y.css)</style>
 <defs><clipPath id="clip"><rect width="9" height="9"/></clipPath>
 <path id="mark" d="M0 0L1 1"/></defs>
 <g clip-path="url(#clip)" id="unused"><use xlink:href="#mark" x="1"/><use xlink:href="http://evil.example/z.svg#a"/>
 <rect style="fill: url(http://evil.example/w)" onclick="alert(7)" width="1"/>
 <a href="javascript:alert(8)"><rect/></a></g>
</svg>"""


class Reader(HTMLParser):
    """What a page asks a browser to do."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.said: list[str] = []
        self.feed(text)
        self.ids = [own["id"] for _, own in self.tags if "id" in own]
        self.links = [own["href"] for tag, own in self.tags if tag == "a" and "href" in own]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose path has a space and an umlaut."""
    folder = tmp_path / "höuse of pages"
    folder.mkdir()
    return folder


def save(path: Path, title: str, *cells) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {title}"), *cells]), path)


def shown(**forms):
    kinds = {"html": "text/html", "svg": "image/svg+xml", "png": "image/png", "text": "text/plain"}
    return new_output("display_data", data={kinds[kind]: text for kind, text in forms.items()})


@pytest.fixture
def results(house):
    """Two executed notebooks, figures, tables and timings at smoke; the data folder."""
    data, place = params.data("smoke"), written.source("smoke")
    injected = '# Parameters\nprofile = "smoke"\nrow = "losses"\n'
    table = "<div><style>p {}</style><table><tr><td align='right'>7</td></tr></table>"
    trace = ["\x1b[31mValueError\x1b[0m: <x>"]
    outputs = [
        new_output("stream", text="\x1b[31m3 < 4\x1b[0m\n"),
        shown(html=table + EVIL),
        shown(svg=DRAWING),
        shown(svg=DRAWING),
        shown(svg="<svg", text="no picture"),
        shown(png=PNG, text="a dot"),
        new_output("error", ename="ValueError", evalue="x", traceback=trace),
    ]
    save(
        data / "executed" / "lesson-losses.ipynb",
        "04 · How do you teach *ranking*?",
        new_code_cell('profile = "laptop"', metadata={"tags": ["parameters"]}),
        new_code_cell(injected, metadata={"tags": ["injected-parameters"]}),
        new_markdown_cell(
            "A cosine $c(q, d)$, a price of `$5`, and\n\n$$\\frac{a_1}{b} < 1$$\n\n"
            "```text\n$x$ stays\n```\n\n"
            "[05](05_finetune.ipynb) [paper](https://arxiv.org/abs/2402.07440) "
            "[bad](javascript:alert(1)) "
            "![x](http://evil.example/p.png)\n\n" + EVIL
        ),
        new_code_cell("loss(q, d)  # <b>", outputs=outputs),
    )
    save(
        data / "executed" / "finetune-opl.ipynb",
        "05 · How does an encoder become a retriever?",
        new_markdown_cell("Back to [04](04_losses.ipynb), on to [99](99_nothing.ipynb)."),
    )
    see = new_markdown_cell("See [05](05_finetune.ipynb).")
    save(place / "timings" / "efficiency.ipynb", "10 · Faster?", see)
    for name in ("overview/length_ladder", "overview/training", "lesson/losses/lesson_losses"):
        files.write(place / f"{name}.svg", DRAWING)
    claim = ["a|b <script>alert(9)</script>", "+2.0 [-1.1, +5.2]", 12_000, "reproduces"]
    claim = pd.DataFrame([claim], columns=["claim", "ours", "n", "verdict"])
    display.save_table(claim, "overview/paper_map", data, "smoke", "Claims.")
    display.save_table(pd.DataFrame(), "ablation/loss/ablation_loss", data, "smoke", "Nothing yet.")
    files.write(place / "overview" / "extra.csv", "x,y\n1,0.5\n")
    written.metric({"scores": {}}, "evaluate", "opl", data, "smoke")
    timed("finetune-opl", 1234.5)
    timed("lesson-losses", 617.25)
    return data


def timed(stage: str, seconds: float) -> None:
    cost = json.dumps({"stage": stage, "seconds": seconds, "peak_gib": 3.25})
    files.write(written.source("smoke") / "timings" / "stages" / f"{stage}.json", cost)


def pages_of(place: Path) -> dict[str, str]:
    """The pages by their place in the report."""
    return {
        path.relative_to(place).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(place.rglob("*.html"))
    }


def built() -> dict[str, str]:
    return pages_of(site.build("smoke").parent)


def broken(capsys) -> str:
    """The one line with which the command failed."""
    assert site.main(["smoke"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


# ------------------------------------------------------------------ offline and harmless


def test_no_page_asks_for_anything_outside_or_runs_anything(results):
    pages = built()
    assert set(pages) == {
        "index.html",
        "notebooks/finetune-opl.html",
        "notebooks/lesson-losses.html",
        "timings/index.html",
        "timings/efficiency.html",
    }
    for text in pages.values():
        for tag, own in Reader(text).tags:
            assert tag not in "script link iframe object embed base form svg foreignobject".split()
            assert not [key for key in own if key.startswith("on")]
            assert own.get("src", "data:image/").startswith("data:image/")
            assert tag == "a" or "href" not in own
            assert "//" not in own.get("style", "") and "javascript" not in own.get("href", "")
        assert "default-src 'none'" in text
        assert str(results.parents[1]) not in text


@pytest.mark.parametrize(
    "attack",
    [
        EVIL,
        "<SCRIPT\n>x</SCRIPT>",
        "<scr<script>ipt>x</script>",
        "<svg><script>x</script></svg>",
        "<div class='\" onclick=\"x'>",
        "<img src=x onerror=x//",
        "<!--><script>x</script>-->",
        "<math><style><img onerror=x></style></math>",
        "<p style='background: url(//x)'>",
        "<details open ontoggle=x>",
    ],
)
def test_html_of_an_output_comes_out_with_known_tags_and_attributes_only(attack):
    reader = Reader(safe.sanitized(attack))
    assert {tag for tag, _ in reader.tags} <= set(safe.HTML.split())
    assert {key for _, own in reader.tags for key in own} <= set(safe.HTML_KEYS.split())


def test_html_of_an_output_is_closed_and_keeps_its_table():
    html = safe.sanitized("<div><table><tbody><tr><td colspan=2>3 &lt; 4</div></section></main>")
    assert html == '<div><table><tbody><tr><td colspan="2">3 &lt; 4</td></tr></tbody></table></div>'
    assert safe.sanitized("<style>td {}</style><font>a</font> &amp; b") == "a &amp; b"


def test_a_drawing_is_an_image_in_which_a_browser_runs_and_fetches_nothing():
    picture, caption = safe.picture(DRAWING)
    ((tag, own),) = Reader(picture).tags
    assert (tag, own["alt"], caption) == ("img", "ladder", "Scores & lengths.")
    kind, _, content = own["src"].partition(",")
    assert kind == "data:image/svg+xml" and not set(content) & set('<>"#&\n')
    assert ElementTree.fromstring(unquote(content)).find("{*}g/{*}use").get("x") == "1"


# ------------------------------------------------------------------ the index


def test_every_id_is_unique_and_every_link_arrives(results):
    pages = built()
    ids = {name: Reader(text).ids for name, text in pages.items()}
    for name, text in pages.items():
        assert len(ids[name]) == len(set(ids[name])), name
        for link in Reader(text).links:
            if not link.startswith("https://"):
                path, _, anchor = link.partition("#")
                path = os.path.join(os.path.dirname(name), path) if path else name
                target = os.path.normpath(path)
                assert target in pages and (not anchor or anchor in ids[target]), f"{name}: {link}"


def test_sections_come_in_the_order_of_the_questions_and_nothing_is_lost(results):
    index = built()["index.html"]
    ablations = [f"ablation-{name}" for name in params.rows("smoke", "ablations")]
    order = [own["id"] for tag, own in Reader(index).tags if tag == "section"]
    rest = "training data efficiency lessons cells notebooks more".split()
    assert order == ["claims", "length", "where", *ablations, *rest]
    lessons, _, more = index.partition('<section id="lessons">')[2].partition('<section id="more">')
    assert 'alt="ladder"' in lessons and '<td class="number">0.5</td>' in more  # extra.csv


def test_a_table_has_a_caption_scopes_and_numbers_on_the_right(results):
    index = built()["index.html"]
    assert "<caption>Claims. Profile smoke:" in index
    assert (
        '<th scope="row">a|b &lt;script&gt;alert(9)&lt;/script&gt;</th>'
        '<td class="number">+2.0 [-1.1, +5.2]</td><td class="number">12,000</td>'
        '<td class="yes">reproduces</td>' in index
    )
    assert '<th scope="col" class="number">n</th>' in index


def test_what_was_not_run_is_named_with_its_command(results):
    said = " ".join("".join(Reader(built()["index.html"]).said).split())
    for name, command in (
        ("figure retrievers", "overview"),
        ("table table_locov1", "overview"),
        ("figure ablation_loss", "ablation@loss"),
        ("table data", "data"),
        ("figure efficiency_counts", "efficiency"),
    ):
        assert f"The {name}: not run (dvc repro {command})." in said
    assert "Nothing yet." in said and "Nothing of it: not run." in said  # a table without a column
    rows = len(params.rows("smoke", "retrievers")) + len(params.rows("smoke", "baselines"))
    assert f"1 of {rows} rows are scored; not run: " in said


def test_measured_times_have_a_page_of_their_own(results):
    pages = built()
    measured = pages.pop("timings/index.html")
    for number in ("1,234.5", "617.2", "30.9 min", "3.25"):  # 30.9 = (1234.5 + 617.25) / 60
        assert number in measured
    for text in pages.values():
        assert not re.search(r"1,?234\.5|617\.2|30\.9", text)


def test_the_same_results_give_the_same_bytes_whatever_the_time(results):
    before = built()
    timed("finetune-opl", 7.0)
    after = built()
    assert {name for name in before if before[name] != after[name]} == {"timings/index.html"}
    assert not list(written.source("smoke").rglob(".*"))


def test_without_any_result_all_is_not_run(house):
    pages = built()
    assert set(pages) == {"index.html", "timings/index.html", "timings/efficiency.html"}
    for name in ("timings/index.html", "timings/efficiency.html"):
        assert "not run" in pages[name]
    assert pages["index.html"].count('class="missing"') >= 10


def test_a_notebook_that_is_gone_loses_its_page(results):
    assert "notebooks/finetune-opl.html" in built()
    (results / "executed" / "finetune-opl.ipynb").unlink()
    assert "notebooks/finetune-opl.html" not in built()


# ------------------------------------------------------------------ notebooks


def test_a_notebook_shows_its_parameters_code_and_outputs(results):
    text = built()["notebooks/lesson-losses.html"]
    assert "<title>04 · How do you teach ranking? (lesson-losses)</title>" in text
    assert "<dt>profile</dt><dd>smoke</dd>" in text and "laptop" not in text
    assert '<span class="n">loss</span>' in text and "&lt;b&gt;" in text
    assert '<pre class="output">3 &lt; 4</pre>' in text
    assert '<pre class="error">ValueError: &lt;x&gt;</pre>' in text
    assert '<td align="right">7</td>' in text and "<p>kept</p>" in text
    assert f'<img alt="a dot" src="data:image/png;base64,{PNG}">' in text
    assert '<pre class="output">no picture</pre>' in text  # an SVG that is none
    assert text.count('<img alt="ladder"') == 2


def test_links_lead_to_notebooks_and_to_the_web_and_nowhere_else(results):
    reader = Reader(built()["notebooks/lesson-losses.html"])
    assert set(reader.links) == {
        "../index.html#notebooks",
        "../index.html#notebook-05_finetune",
        "https://arxiv.org/abs/2402.07440",
        "finetune-opl.html",
    }
    said = "".join(Reader(built()["notebooks/finetune-opl.html"]).said)
    assert "on to 99." in said  # no such notebook: the text remains


def test_formulas_become_mathml_and_code_stays_code(results):
    text = built()["notebooks/lesson-losses.html"]
    assert text.count("<math ") == 2 and '<math display="block">' in text and "<mfrac>" in text
    assert "<code>$5</code>" in text and "$x$ stays" in text


@pytest.mark.parametrize(
    "source, shown",
    [
        ("costs $5 and $10", "costs $5 and $10"),
        (r"\$a\$", "$a$"),
        ("``a $x$ b``", "<code>a $x$ b</code>"),
        ("~~~text\n$x$\n~~~", "$x$"),
        (r"$\nosuchcommand{x}$", r"<code>\nosuchcommand{x}</code>"),
        (r"$\text{<b onclick=x>}$", r"<code>\text{&lt;b onclick=x&gt;}</code>"),
        ("$a & b$", "<code>a &amp; b</code>"),
    ],
)
def test_what_is_no_formula_is_shown_as_typed(source, shown):
    html = safe.markdown(source, set())
    assert shown in html and "<math" not in html


def test_a_formula_over_several_lines_is_not_taken_for_markdown():
    html = safe.markdown("Let $a_1 * b_1 * c$ and\n\n$$x\n- y_1\n= *z*$$", set())
    assert html.count("<math") == 2 and not re.search("<(em|li|h)", html)
    assert "javascript" not in safe.formula(r"\href{javascript:alert(1)}{x}", "inline")


# ------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize(
    "name, content, way_out",
    [
        ("executed/finetune-opl.ipynb", "{", "`dvc repro finetune@opl`"),
        ("executed/mine.ipynb", "{}", "delete it"),
        ("executed/finetune-gone.ipynb", "{}", "delete it"),
        ("report/smoke/ablation/loss/ablation_loss.svg", "<svg>", "`dvc repro ablation@loss`"),
        ("report/smoke/lesson/mine/mine.svg", "<html/>", "delete it"),
        ("report/smoke/overview/rows.md", "no table", "`dvc repro overview`"),
        ("report/smoke/data/data.md", "c\n\n| a | b |\n|---|---|\n| 1 |\n", "`dvc repro data`"),
        ("report/smoke/evaluate/opl/metrics.json", "{", "`dvc repro evaluate@opl`"),
        ("report/smoke/timings/stages/data.json", "[]", "`dvc repro --force data`"),
        ("report/smoke/timings/efficiency.ipynb", "\0", "`dvc repro --force efficiency`"),
    ],
)
def test_a_damaged_file_is_one_line_and_the_last_report_stays(
    results, capsys, name, content, way_out
):
    before = built()
    files.write(results / name, content)
    (results / "executed" / "lesson-losses.ipynb").unlink()  # the next report would be another one
    line = broken(capsys)
    assert name in line and way_out in line
    place = written.source("smoke")
    assert pages_of(place) == before and not list(place.rglob(".*"))


def test_a_report_that_cannot_be_written_is_one_line(results, capsys):
    (written.source("smoke") / "index.html").mkdir(parents=True)
    assert "index.html" in broken(capsys)


def test_an_unknown_profile_is_one_line_with_the_nearest_name(house, capsys):
    assert site.main(["smokee"]) == 1
    assert capsys.readouterr().err == "unknown profile 'smokee'; did you mean 'smoke'?\n"
    with pytest.raises(ParamsError):
        site.build("nothing")
    assert site.main([]) == 2


def test_the_command_writes_the_pages(results):
    command = [sys.executable, "-m", "lib.report.site", "smoke"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().endswith("data/report/smoke/index.html")
    assert (written.source("smoke") / "notebooks" / "finetune-opl.html").is_file()


def test_the_stages_are_those_of_the_pipeline(house):
    """The notebook and the rows of every stage, and who writes which folder, as in dvc.yaml."""
    pipeline = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    runs = {stage: body for stage, body in pipeline.items() if "lib.pipeline run" in str(body)}
    assert list(runs) == list(site.STAGES)
    for stage, body in runs.items():
        source, table = site.STAGES[stage]
        assert (f"${{{table}}}" if table else None) == body.get("foreach")
        command = body.get("do", body)["cmd"]
        run = f"python -m lib.pipeline run {source or '${item.notebook}'} {stage}"
        assert command.startswith(run)
        folder = next(iter(body.get("do", body)["plots"][0]))
        for row in params.load()[table] if table else [""]:
            path = Path(folder.replace("${key}", row)) / "a.svg"
            assert site.writer(path) == (f"{stage}@{row}" if table else stage)
