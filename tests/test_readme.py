"""The README's commands exist, its links lead somewhere, and its numbers are those of the committed run."""

import csv
import re
from pathlib import Path

import pytest
import torch

from lib.model import checkpoint
from lib.pipeline import params

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = ROOT / "data" / "report" / "laptop" / "tables" / "paper_map.csv"


def table(text: str) -> list[dict[str, str]]:
    head, _, *body = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()
    ]
    return [dict(zip(head, row)) for row in body]


def test_every_make_command_has_its_target_and_every_row_exists():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[
        1
    ].split()
    assert {name for name in re.findall(r"make (\w+)", README)} >= {
        "repro",
        "test",
        "report",
        "lab",
        "help",
    }
    for name in re.findall(r"`make (\w+)|^make (\w+)", README, re.M):
        assert "".join(name) in targets
    design = params.load(ROOT / "params.yaml")
    for profile in re.findall(r"PROFILE=(\w+)", README):
        assert profile in design["lengths"]
    for row in re.findall(r"ARGS=\w+@(\w+)", README):
        assert row in {name for kind in params.TABLES for name in design[kind]}


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_notebook_and_module_has_its_place():
    assert {
        int(number)
        for number in re.findall(r"\b(\d\d) (?:start|the|pre|fine|eval|eff|all)", README)
    } | {7, 8, 9} == set(range(13))
    assert "07-09" in README
    named = set(
        re.findall(
            r"`(\w+)`", next(line for line in README.splitlines() if line.startswith("| [`lib/`]"))
        )
    )
    assert named == {path.stem for path in (ROOT / "lib").glob("*.py")} - {"__init__"}


def test_the_map_is_the_committed_runs():
    stored = {line["claim"]: line for line in csv.DictReader(MAP.open(encoding="utf-8"))}
    shown = table(README.split("tests/test_readme.py -->")[1].split("<!-- /map -->")[0])
    assert len(shown) >= 10
    for line in shown:
        own = stored[line["claim"]]
        assert {
            key: line[key] for key in ("paper", "rows", "on", "ours", "the paper's", "verdict")
        } == {key: own[key] for key in ("paper", "rows", "on", "ours", "the paper's", "verdict")}


def test_the_lines_for_published_weights_run(golden, tokenizer, tmp_path, monkeypatch):
    """The README's own code, on a file and a tokenizer that are here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(
        {
            name.removeprefix("param/"): value
            for name, value in golden("tiny_base").items()
            if name.startswith("param/bert.")
        },
        tmp_path / "pytorch_model.bin",
    )
    tokenizer.save_pretrained(tmp_path)
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.S)
        if "load_published" in block
    )
    for name in (checkpoint.PUBLISHED[0], "bert-base-uncased"):
        assert code.count(name) == 1
        code = code.replace(name, str(tmp_path))
    names: dict = {}
    exec(code, names)
    assert names["vectors"].shape == (2, 32) and names["vectors"].dtype == "float32"
    listed = [
        f"{head}{length}{tail}"
        for head, lengths, tail in re.findall(r"`([\w/-]+){([\w,]+)}([\w-]+)`", README)
        for length in lengths.split(",")
    ]
    assert sorted(listed) == sorted(checkpoint.PUBLISHED)


@pytest.mark.parametrize("mark", ["@", "TODO", "TBD"])
def test_nothing_is_left_to_fill_in(mark):
    assert not re.findall(
        rf"(?<![\w`]){mark}[A-Z_]*@?", re.sub(r"`[^`]*`", "", README).replace("```", "")
    )
