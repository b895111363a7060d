"""TREC run files: what is written is read again, by us and by trec_eval."""

import math
import os
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.benchmark import metrics, runs, search

ids = st.text(st.characters(), max_size=6).filter(lambda id: runs.unwritable([id]) is None)


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    run=st.dictionaries(
        ids,
        st.dictionaries(ids, st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=4),
        max_size=4,
    )
)
def test_any_run_survives_its_file(tmp_path, run):
    """Ids of any characters that fit in a field, quotes and backslashes too; scores bit for bit."""
    runs.write_run(run, tmp_path / "run.trec")
    assert runs.read_run(tmp_path / "run.trec") == run
    lines = (tmp_path / "run.trec").read_text(encoding="utf-8").splitlines()
    assert [(qid, pid) for qid, _, pid, _, _, _ in map(str.split, lines)] == [
        (qid, pid) for qid in run for pid in metrics.ranking(run[qid])
    ]


@pytest.mark.parametrize(
    "id",
    [
        "",
        " ",
        "a b",
        "a\tb",
        "a\nb",
        "a\rb",
        "a\x0bb",
        "a\x1cb",
        "a\x85b",
        "a\xa0b",
        "a\u2009b",
        "a\u2028b",
        "a\u3000b",
        "a\0b",
        "a\x7f",
        "\ud800",
        "a\udcff",
        "\ufeffa",
    ],
)
def test_an_id_that_other_tools_would_read_otherwise_is_named_and_nothing_is_written(tmp_path, id):
    assert runs.unwritable(["a", id, "b c"]) == id
    for kind, run in (
        ("query", {"q": {"a": 1.0}, id: {"a": 1.0}}),
        ("document", {"q": {"a": 1.0, id: 0.5}}),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{kind} id {id!r} cannot stand in")):
            runs.write_run(run, tmp_path / "run")
    with pytest.raises(ValueError, match="tag .* cannot stand in"):
        runs.write_run({"q": {"a": 1.0}}, tmp_path / "run", tag=id)
    assert not list(tmp_path.iterdir())


def test_ids_of_other_types_are_no_ids_of_a_file(tmp_path):
    assert (
        runs.unwritable(["a", 'say"fox"', "\\", "ü", "狐", "🦊", np.str_("b"), "a\u200bb"]) is None
    )
    for run in ({7: {"a": 1.0}}, {"q": {7: 1.0}}, {"q": {None: 1.0}}):
        with pytest.raises(TypeError, match="string"):
            runs.write_run(run, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffq1 Q0 a 1 2.0 x\nq1 Q0 b 2 1.0 x\n",  # a byte order mark
        "q1 Q0 a 1 2.0 x\r\nq1 Q0 b 2 1.0 x\r\n",
        "\n q1\tQ0 \t a  1 2.0\tx \n\n \t\r\nq1 Q0 b 2 1.0 x",
        "q1\x0bQ0\x0ca 1 2.0 x\nq1 Q0 b 2 1.0 x\n",
    ],
)
def test_a_run_is_read_as_other_tools_read_it(tmp_path, text):
    (tmp_path / "run").write_bytes(text.encode())
    assert runs.read_run(tmp_path / "run") == {"q1": {"a": 2.0, "b": 1.0}}


def test_a_quote_and_a_space_beyond_ascii_are_characters_like_others(tmp_path):
    (tmp_path / "run").write_text(
        '"q Q0 a" 1 2.0 x\n"q Q0 "b 2 1.0 x\nq\u00a0r Q0 \u3000\x1c\u2028 1 0.5 x\n'
        '\ufeffq Q0 "\\n" 1 0.25 x\n',
        encoding="utf-8",
        newline="",
    )
    assert runs.read_run(tmp_path / "run") == {
        '"q': {'a"': 2.0, '"b': 1.0},
        "q\u00a0r": {"\u3000\x1c\u2028": 0.5},
        "\ufeffq": {'"\\n"': 0.25},
    }


def test_a_run_file_is_what_trec_eval_reads(tmp_path):
    run = {"q1": {"b": 0.1, "a": 2.0, "c": 0.1}, "q2": {}}
    runs.write_run(run, tmp_path / "deep" / "run.trec", tag="opl")
    assert (
        tmp_path / "deep" / "run.trec"
    ).read_text() == "q1 Q0 a 1 2.0 opl\nq1 Q0 c 2 0.1 opl\nq1 Q0 b 3 0.1 opl\n"
    assert runs.read_run(tmp_path / "deep" / "run.trec") == {
        "q1": {"a": 2.0, "b": float(np.float32(0.1)), "c": float(np.float32(0.1))}
    }
    (tmp_path / "theirs").write_text("7\tQ0\tdoc-1\t1\t12.5\tindri\n7 Q0  doc-2  2  11  indri")
    assert runs.read_run(tmp_path / "theirs") == {"7": {"doc-1": 12.5, "doc-2": 11.0}}


def test_only_the_k_best_are_written(tmp_path):
    runs.write_run({"q": {"a": 1.0, "b": 2.0, "c": 1.0}}, tmp_path / "run", k=2)
    assert list(runs.read_run(tmp_path / "run")["q"]) == ["b", "c"]


def test_scores_survive_so_that_the_metric_can_be_recomputed(tmp_path):
    rng = np.random.default_rng(0)
    documents, queries = (rng.standard_normal((n, 8)).astype(np.float32) for n in (60, 9))
    qids, pids = [f"q{i}" for i in range(9)], [f"d{i}" for i in range(60)]
    run = search.search(queries, documents, qids, pids)
    runs.write_run(run, tmp_path / "run")
    qrels = {qid: {pid: 1} for qid, pid in zip(qids, pids)}
    assert metrics.ndcg(runs.read_run(tmp_path / "run"), qrels, per_query=True) == metrics.ndcg(
        run, qrels, per_query=True
    )


@pytest.mark.parametrize(
    "line, reason",
    [
        ("q Q0 b 2 0.5", "six fields.* got 5"),
        ("q Q0 b 2 0.5 tag more", "six fields.* got 7"),
        ("tag", "six fields.* got 1"),
        ("q Q0 b 2 high tag", "high"),
        ("q Q0 b 2 nan tag", "the score is nan"),
        ("q Q0 b 2 -inf tag", "the score is -inf"),
        ("q Q0 a 2 0.5 tag", "query q ranks a twice"),
        ('"q r" Q0 b 2 0.5 tag', "six fields.* got 7"),
        ("q Q0 \udcff 2 0.5 tag", "utf-8"),
    ],
)
def test_a_corrupt_line_is_refused_by_file_and_number(tmp_path, line, reason):
    (tmp_path / "run.trec").write_text(
        f"q Q0 a 1 1.0 tag\n{line}\nq Q0 z 3 0.1 tag\n", encoding="utf-8", errors="surrogateescape"
    )
    with pytest.raises(ValueError, match=f"run.trec:2: .*{reason}"):
        runs.read_run(tmp_path / "run.trec")


def test_what_trec_eval_could_not_read_is_not_written(tmp_path):
    for run, options in (
        ({"q": {"a": math.nan}}, {}),
        ({"q": {"a": 1e300}}, {}),
        ({}, dict(tag="two words")),
    ):
        with pytest.raises(ValueError), np.errstate(over="ignore"):
            runs.write_run(run, tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_no_write_permission_names_the_file(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="run.trec"):
            runs.write_run({"q": {"a": 1.0}}, tmp_path / "run.trec")
    finally:
        tmp_path.chmod(0o700)
