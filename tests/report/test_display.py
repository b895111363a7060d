"""Figures, tables and numbers as text: the same bytes twice, and readable."""

import math
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.pipeline import params
from lib.report import display, results

matplotlib.use("svg")


def written(name: str) -> Path:
    return results.source("smoke") / name


# ------------------------------------------------------------------ figures


def draw(name: str = "ladder") -> str:
    display.style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot([128, 2048], [0.2, 0.4], label="opl")
    # A clip path, and so an id that matplotlib draws at random.
    ax.fill_between([128, 2048], [0.1, 0.3], [0.3, 0.5], alpha=0.2)
    ax.legend()
    display.figure(fig, f"overview/{name}", params.data("smoke"), "smoke", "Scores < 1 & lengths.")
    assert not plt.get_fignums()
    return written(f"overview/{name}.svg").read_text(encoding="utf-8")


def test_a_figure_has_the_same_bytes_twice_and_says_what_it_shows(house):
    first = draw()
    assert draw() == first
    root = ElementTree.fromstring(first)
    texts = {child.tag.rpartition("}")[2]: child.text for child in root}
    assert texts["title"] == "ladder"
    assert texts["desc"] == f"Scores < 1 & lengths. {display.note('smoke')}"
    assert root.get("role") == "img"


def test_a_figure_holds_no_date_no_program_and_no_path(house):
    text = draw("other")
    assert not [word for word in ("DOCTYPE", "<dc:date>", "Matplotlib", str(house)) if word in text]


def test_outside_of_a_notebook_a_figure_is_its_caption(house, capsys):
    draw()
    caption = f"Scores < 1 & lengths. {display.note('smoke')}"
    assert capsys.readouterr().out == f"figure ladder: {caption}\n"


def test_a_note_says_which_lengths_stand_for_the_papers_and_which_collection(house, monkeypatch):
    a, b, c, d = params.load()["lengths"]["smoke"].values()
    assert display.note("smoke") == (
        f"Profile smoke: {a}, {b}, {c} and {d} tokens stand for the paper's 128, 2,048, 8,192 and"
        " 32,768."
    )
    assert display.note("gpu") == "Profile gpu, the paper's own lengths."
    settings = params.settings("gpu", "data") | {"source": "hub"}
    monkeypatch.setattr(params, "settings", lambda *_: settings)
    assert display.note("gpu") == "Profile gpu on LoCoV1, the paper's own lengths."


def test_a_caption_says_from_what_rows_start_and_where_they_were_trained(house):
    def write(stage, row, **values):
        results.metric(values, stage, row, params.data("study"), "study")

    def remarks(name):
        *texts, last = display.remarks(name, "study")
        assert last == display.note("study")
        return texts

    assert remarks("overview/rows") == []  # nothing has run
    vectors = "the word vectors of package:x"
    write("pretrain", "mixed_2k", start=vectors, tokens=1, machine="A")
    write("pretrain", "short_2k", start=vectors, tokens=1, machine="A")
    write("pretrain", "cold_32k", start="random weights", tokens=1, machine="B")
    for row in ("mixed", "short"):
        write("finetune", row, tokens=1, machine="A")
    ours = "Word vectors are ours: the paper's encoders start from random weights."
    assert remarks("ablation/mixture/ablation_mixture") == [
        f"Encoders start from {vectors}. {ours}",
        "Trained on A.",
    ]
    assert remarks("overview/rows") == [
        f"Encoders start from random weights (cold); {vectors} (the others). {ours}",
        "Trained on several kinds of machine, which may be a part of a difference: B (cold); A"
        " (the others).",
    ]
    assert remarks("ablation/warm_start/x") == [
        "Encoders start from random weights.",
        "Trained on B.",
    ]
    assert remarks("data/data_lengths") == remarks("table") == []


@pytest.mark.parametrize(
    "name, shown",
    [
        ("qmsum", "qmsum"),
        ("_hidden", " _hidden"),
        ("cost in $ and $", r"cost in \$ and \$"),
        ("x" * 40, "x" * 31 + "…"),
    ],
)
def test_a_name_from_outside_is_drawn_as_it_is(name, shown):
    assert display.label(name) == shown
    fig, ax = plt.subplots()
    ax.plot([0, 1], label=display.label(name))
    ax.legend()
    fig.canvas.draw()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [shown]
    plt.close(fig)


# ------------------------------------------------------------------ tables

FRAME = pd.DataFrame(
    {
        "row": ["a|b", "two\nlines"],
        "tokens": [36_700_160_000, 7],
        "ndcg@10": [0.123456789, math.nan],
        "gib": [1.5, 2.25],
        "whole": [3.0, 1200.0],
        "run": [True, False],
    }
)


def test_a_table_is_rounded_for_reading_and_exact_to_six_digits_for_computing(house):
    display.save_table(FRAME, "overview/rows", params.data("smoke"), "smoke", "Rows.")
    assert written("overview/rows.md").read_text(encoding="utf-8") == (
        f"Rows. {display.note('smoke')}\n\n"
        "| row | tokens | ndcg@10 | gib | whole | run |\n|---|--:|--:|--:|--:|--:|\n"
        "| a\\|b | 36,700,160,000 | 0.1235 | 1.50 | 3 | True |\n"
        "| two lines | 7 | – | 2.25 | 1,200 | False |\n"
    )
    back = pd.read_csv(written("overview/rows.csv"))
    assert back["ndcg@10"][0] == 0.123457 and math.isnan(back["ndcg@10"][1])
    others = [frame.drop(columns="ndcg@10") for frame in (back, FRAME)]
    pd.testing.assert_frame_equal(*others, check_dtype=False)


def test_a_table_read_and_written_again_is_the_same_bytes(house):
    first = results.csv(FRAME)
    written("x").parent.mkdir(parents=True)
    written("x").write_text(first, encoding="utf-8")
    assert results.csv(pd.read_csv(written("x"))) == first


@pytest.mark.parametrize(
    "values, cells",
    [
        ([0.5, 0.25], ["0.50", "0.25"]),
        ([1.0, 2.0], ["1", "2"]),
        ([1 / 3, 1.0], ["0.3333", "1.0000"]),
        ([math.nan, None], ["–", "–"]),
        ([1234.5, math.nan], ["1,234.5", "–"]),
        (["not run", 0.25], ["not run", "0.25"]),
        ([pd.NA, 3], ["–", "3"]),
        ([np.int64(1000), np.int64(1)], ["1,000", "1"]),
    ],
)
def test_a_column_has_the_decimals_it_needs(values, cells):
    assert [row[0] for row in display.formatted(pd.DataFrame({"x": values}))] == cells


def test_a_table_of_nothing_and_a_name_twice_are_tables_too():
    assert display.formatted(pd.DataFrame()) == []
    twice = pd.DataFrame([[1, 0.5]], columns=["x", "x"])
    assert display.markdown(twice, "c") == "c\n\n| x | x |\n|--:|--:|\n| 1 | 0.5 |\n"


def test_an_interval_in_words():
    assert display.with_interval(0.394, 0.361, 0.428) == "39.4 [36.1, 42.8]"
    assert display.with_interval(0.02, -0.011, 0.052, signed=True) == "+2.0 [-1.1, +5.2]"
    assert display.with_interval(math.nan, 0.1, 0.2) == "–"


def test_a_p_value_and_the_differences_of_trainings_in_words():
    texts = [display.chance(p) for p in (math.nan, 0.0002, 0.0491)]
    assert texts == ["–", "< 0.001", "0.049"]
    assert display.each_seed([0.3, 0.3, -0.3]) == "+30.0, +30.0, -30.0"
    assert display.each_seed([0.1]) == "–"
    assert display.each_seed([0.1, 0.2, -0.3, 0.0, 0.15]) == "-30.0 to +20.0"
