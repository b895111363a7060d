"""README.md and docs/: commands exist, links lead somewhere, code runs, numbers are the run's.

Tables between `<!-- name: made from file … -->` and `<!-- /name -->` are made from that file:

    python tests/test_readme.py        writes them anew, after a run
"""

import ast
import csv
import importlib
import os
import re
from functools import partial
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lib.efficiency import counts, estimate
from lib.model.m2bert import M2BertConfig
from lib.pipeline import params

ROOT = Path(__file__).parents[1]
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES[ROOT / "README.md"]
TEXT = "\n".join(PAGES.values())
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def code_with(word: str) -> str:
    return next(block for block in PYTHON if word in block)


# ---------------------------------------------------------------- tables made from files

HEADLINES = ("Table 13", "Table 3", "Table 6", "Table 7", "Table 8", "Table 5")


def markdown(header: list[str], rows: list[list[str]], right: int = 0) -> str:
    """A table whose last `right` columns are numbers."""
    rule = ["---"] * (len(header) - right) + ["--:"] * right
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *rows])


def records(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def claims(path: Path) -> list[dict[str, str]]:
    """Each claim of the map of `study`, or of that of `laptop` if `study` has not run its rows."""
    profiles = path.parents[1].name, "laptop"
    maps = [records(path.parents[2] / name / "overview" / path.name) for name in profiles]
    lines = []
    for own, other in zip(*maps, strict=True):
        assert own["claim"] == other["claim"]
        unknown = own["verdict"] == "not run" != other["verdict"]
        line, profile = (other, profiles[1]) if unknown else (own, profiles[0])
        lines.append(line | {"profile": "–" if line["verdict"] == "not run" else profile})
    return lines


def all_claims(path: Path) -> str:
    shown = [{k: v for k, v in row.items() if not k.startswith("tried")} for row in claims(path)]
    return markdown(list(shown[0]), [list(row.values()) for row in shown])


def six_claims(path: Path) -> str:
    """The first claim of each table that the paper's summary rests on."""
    header = ["claim", "paper", "on", "ours", "the paper's", "verdict", "profile"]
    rows = claims(path)
    first = [next(row for row in rows if row["paper"] == table) for table in HEADLINES]
    return markdown(header, [[row[column] for column in header] for row in first])


def encoder_speed(path: Path, threads: int) -> str:
    """Tokens per second at each length; factors over the definition, the engine's over the twin."""
    by_length: dict[str, dict[str, dict]] = {}
    for row in records(path):
        by_length.setdefault(row["length_tokens"], {})[row["model"]] = row
    cells = [speed_cells(int(length), models) for length, models in by_length.items()]
    if threads == 1:
        cells = [{k: v for k, v in row.items() if k not in ONLY_TWO_THREADS} for row in cells]
    return markdown(list(cells[0]), [list(row.values()) for row in cells], right=len(cells[0]))


ONLY_TWO_THREADS = ("model", "bandwidth", "peak GiB, float32 and bfloat16")


def speed_cells(length: int, models: dict[str, dict]) -> dict[str, str]:
    def rate(name: str, factor: str = "", of: str = "") -> str:
        if name not in models:
            return "–"
        value = models[of or name].get(factor) if factor else None
        return f"{float(models[name]['tokens_s']):,.0f}" + (
            f" ({float(value):.1f} ×)" if value else ""
        )

    fast = models["engine, bfloat16"]
    engines = [models["engine, float32"], fast]
    return {
        "tokens": f"{length:,}",
        "definition": rate("definition, float32"),
        "model": rate("model, float32"),
        "engine, float32": rate("engine, float32", "over_definition"),
        "engine, bfloat16": rate("engine, bfloat16", "over_definition"),
        "BERT-base, bfloat16 (engine over it)": rate(
            "Transformer twin, bfloat16", "over_twin", "engine, bfloat16"
        ),
        "limit": f"{100 * float(fast['of_products']):.0f} %",
        "bandwidth": f"{100 * float(fast['of_bandwidth']):.0f} %",
        "peak GiB, float32 and bfloat16": ", ".join(
            f"{float(engine['peak_gib']):.1f}" for engine in engines
        ),
    }


ROOMS = re.findall(r"^\| \[`lib/(\w+)`\]", README, re.M)


def modules(lib: Path) -> str:
    """The modules of each room, the rooms in the README's order."""
    names = {room: sorted({path.stem for path in (lib / room).glob("*.py")}) for room in ROOMS}
    cells = {
        room: ", ".join(f"`{name}`" for name in stems if name != "__init__")
        for room, stems in names.items()
    }
    return markdown(
        ["room", "modules"],
        [[f"[`lib/{room}`](../lib/{room})", text] for room, text in cells.items()],
    )


# Layers, width and intermediate width; the 80M shape is what was measured.
SHAPES = {"`gpu`, 15M": (2, 384, 768), "80M": (12, 768, 3072), "0.8B": (24, 2048, 8192)}
GPUS = {"H200": 4.8, "H100 SXM": 3.35, "A100, 80 GB": 2.04}  # TB/s of memory
PAPER_TOKENS = 36_700_160_000


def scale(path: Path) -> str:
    """Training: memory, tokens per second and days of models at lengths; docs/scale.md says how."""
    measured = {int(row["length_tokens"]): row for row in records(path)}
    passes = float(measured[2048]["forward_tokens_s"]) / float(measured[2048]["training_tokens_s"])
    header = ["model", "tokens a text", "memory, GiB", *(f"{gpu}, tokens/s" for gpu in GPUS)]
    rows = []
    for model in SHAPES:
        for length in params.PAPER_LENGTHS:
            row = measured[length]
            known = row["training_tokens_s"] if model == "80M" else ""
            own = float(row["training_tokens_s"] or float(row["forward_tokens_s"]) / passes)
            speed = own * slower(model, length)
            others = [f"{two_digits(speed * GPUS[gpu] / 4.8)} c" for gpu in list(GPUS)[1:]]
            first = f"{int(known):,} m" if known else f"{two_digits(speed)} c"
            days = PAPER_TOKENS / speed / 86_400
            cells = [f"{training_memory(model, length):.0f} c", first, *others]
            rows.append([model, f"{length:,}", *cells, f"{days:.1f} c, {days / 8:.1f} c"])
    return markdown([*header, "days on 1 and 8 H200"], rows, right=len(header))


def shape(model: str, length: int):
    layers, width, inner = SHAPES[model]
    return M2BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        max_position_embeddings=length,
    )


def slower(model: str, length: int) -> float:
    """The rate of a model over that of the 80M shape: by traffic if it is smaller, else by work."""
    ours, theirs = shape(model, length), shape("80M", length)
    traffic = [own.num_hidden_layers * own.hidden_size for own in (theirs, ours)]
    batch = max(1, 524_288 / length)
    work = [
        estimate.forward(own, length, batch) / length + estimate.head(own, 0.3)
        for own in (theirs, ours)
    ]
    return min(traffic[0] / traffic[1], work[0] / work[1])


def training_memory(model: str, length: int) -> float:
    """GiB: 16 bytes a weight, what autograd keeps in bfloat16, 12 bytes a hidden word's logit."""
    own, tokens = shape(model, length), max(32_768, length)
    kept = counts.m2bert_activations(own, length, tokens / length) / length * tokens
    logits = 0.3 * tokens * own.vocab_size
    return (16 * counts.parameters(own) + 2 * own.num_hidden_layers * kept + 12 * logits) / 2**30


def two_digits(value: float) -> str:
    return f"{float(f'{value:.1e}'):,.0f}"


def real_documents(path: Path) -> str:
    """A column a row, in the order of the file, and a line a task: nDCG@10 × 100."""
    rows = records(path)
    tasks = [name for name in rows[0] if name not in ("row", "reads")]
    header = ["task", *(f"{row['row']}: {row['reads']}" for row in rows)]
    return markdown(header, [[t, *(row[t] for row in rows)] for t in tasks], right=len(rows))


MAKERS = {
    "real": real_documents,
    "scale": scale,
    "modules": modules,
    "claims": six_claims,
    "map": all_claims,
    "encoder": partial(encoder_speed, threads=2),
    "encoder_one_thread": partial(encoder_speed, threads=1),
}
TABLE = re.compile(r"(<!-- (\w+): made from (\S+) .*?-->\n)(.*?)(<!-- /\2 -->)", re.S)


def made(match: re.Match) -> str:
    """The table between two markers, from the file that the first one names."""
    return match[1] + MAKERS[match[2]](ROOT / match[3]) + match[5]


def test_the_tables_are_made_from_the_committed_files():
    found = {match[2]: match for match in TABLE.finditer(TEXT)}
    assert found.keys() == MAKERS.keys()
    for name, match in found.items():
        assert match[0] == made(match), f"{name}: python tests/test_readme.py writes it anew"
    assert found["map"][4].count("\n") > 12 and found["claims"][4].count("\n") == 8


def test_the_figures_caption_is_the_committed_runs():
    figure = re.search(r"!\[.*?\]\((.*?)\)", README)[1]
    path = (ROOT / figure).with_name("paper_map.csv")
    ours = {
        row["on"]: row["ours"] for row in records(path) if row["rows"] == "reads_32k − reads_128"
    }
    caption = " ".join(README.split("\n\n")[3].split())
    assert caption.index(ours["deep"]) < caption.index(ours["shallow"])


# ---------------------------------------------------------------- size, commands, links


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 100 and len(README.encode()) <= 6_000


def test_every_make_command_has_its_target_and_every_row_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    named = {"".join(name) for name in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", TEXT, re.M)}
    assert named >= {"repro", "test", "report", "lab", "help"}
    assert named <= set(targets)
    design = params.load(ROOT / "params.yaml")
    for profile in re.findall(r"PROFILE=(\w+)", TEXT):
        assert profile in design["lengths"]
    for row in re.findall(r"ARGS=\w+@(\w+)", TEXT):
        assert row in {name for table in params.TABLES for name in design[table]}


def anchors(text: str) -> set[str]:
    """The headings of a page as the repository's page links them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_and_image_leads_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not heading or heading in anchors(PAGES[target]), link


def test_every_page_is_reached_from_the_readme():
    assert {path.name for path in PAGES} - {"README.md"} == set(
        re.findall(r"\(docs/(\w+\.md)\)", README)
    )


def test_every_notebook_and_room_has_its_place():
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"notebooks/(\d\d_\w+\.ipynb)", TEXT)) == notebooks
    assert sorted(ROOMS) == sorted({path.parent.name for path in (ROOT / "lib").glob("*/*.py")})


def test_every_path_in_code_marks_exists():
    for path in set(re.findall(r"`((?:lib|tests|docs|notebooks)/[\w/]+\.\w+)", TEXT)):
        assert (ROOT / path).is_file(), path


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.split("\n")[0])
def test_every_python_block_imports_and_names_what_exists(block):
    modules = {}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                modules[alias.asname or name] = pytest.importorskip(
                    alias.name
                ) and importlib.import_module(name)
        elif isinstance(node, ast.ImportFrom):
            module = (
                importlib.import_module(node.module)
                if node.module.startswith("lib")
                else pytest.importorskip(node.module)
            )
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id not in modules or hasattr(modules[node.value.id], node.attr), (
                node.attr
            )


def test_the_lines_for_published_weights_run(golden, tokenizer, tmp_path, monkeypatch):
    """The page's own code, on a file and a tokenizer that are here."""
    import torch

    from lib.model import published

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = {
        name.removeprefix("param/"): value
        for name, value in golden("tiny_base").items()
        if name.startswith("param/bert.")
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path)
    code = code_with("load_published")
    for name in (published.PUBLISHED[0], "bert-base-uncased"):
        assert code.count(name) == 1
        code = code.replace(name, str(tmp_path))
    names: dict = {}
    exec(code, names)
    assert names["vectors"].shape == (2, 32) and names["vectors"].dtype == "float32"
    listed = [
        f"{head}{length}{tail}"
        for head, lengths, tail in re.findall(r"`([\w/-]+){([\w,]+)}([\w-]+)`", TEXT)
        for length in lengths.split(",")
    ]
    assert sorted(listed) == sorted(published.PUBLISHED)


def test_the_lines_for_an_approximate_index_find_most_of_what_exact_search_finds(
    tmp_path, monkeypatch
):
    import numpy as np

    from lib.benchmark import metrics, search

    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(1).standard_normal((1_500, 16)).astype(np.float32)
    np.save("documents.npy", vectors)
    np.save("queries.npy", vectors[:2] + 0.1)
    names: dict = {}
    exec(code_with("index_factory"), names)
    ids = [str(row) for row in range(len(vectors))]
    exact = search.search(np.load("queries.npy"), vectors, names["qids"], ids, k=10)
    judged = {qid: {pid: 1 for pid in ranking} for qid, ranking in exact.items()}
    assert metrics.recall(names["run"], judged, k=10) > 0.5
    for qid, ranking in names["run"].items():
        assert {pid: exact[qid][pid] for pid in ranking if pid in exact[qid]} == {
            pid: score for pid, score in ranking.items() if pid in exact[qid]
        }


def test_the_rows_for_other_peoples_models_are_rows(tmp_path):
    yaml = YAML()
    design = yaml.load(ROOT / "params.yaml")
    for block in re.findall(r"```yaml\n(.*?)```", PAGES[ROOT / "docs" / "extend.md"], re.S):
        changes = yaml.load(block)
        for profile, tables in changes.pop("rows", {}).items():
            own = design["rows"][profile]
            for table, rows in tables.items():  # beside those that the profile has
                own[table] = {**own[table], **rows} if rows else rows
        for table, rows in changes.items():
            design[table] |= rows
    yaml.dump(design, tmp_path / "params.yaml")
    assert params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("mark", ["@", "TODO", "TBD"])
def test_nothing_is_left_to_fill_in(mark):
    prose = re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", TEXT, flags=re.S))
    assert not re.findall(rf"(?<![\w`]){mark}[A-Z_]*@?", prose)


if __name__ == "__main__":
    for page, text in PAGES.items():
        if (fresh := TABLE.sub(made, text)) != text:
            page.write_text(fresh, encoding="utf-8", newline="\n")
            print(os.path.relpath(page))
