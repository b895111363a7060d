"""Search: vectors that depend on their text alone, one order among equals, files that survive."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.benchmark import metrics, search

ROOT = Path(__file__).parents[2]
WORDS = "red green blue fox hen owl runs sleeps the by night day unbelievable foxes".split()


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=length)) for length in lengths]


# ---------------------------------------------------------------- search

BACKENDS = [
    "torch",
    pytest.param(
        "faiss",
        marks=pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed"),
    ),
]


def expected_run(queries, documents, qids, pids, k):
    """The definition: every score in float64, rounded to float32, sorted by score and id."""
    run = {}
    for qid, q in zip(qids, queries.astype(np.float64)):
        scores = {
            pid: float(np.float32((d * q).sum()))
            for pid, d in zip(pids, documents.astype(np.float64))
        }
        run[qid] = {pid: scores[pid] for pid in metrics.ranking(scores)[:k]}
    return run


def same(run, expected):
    assert {qid: list(found.items()) for qid, found in run.items()} == {
        qid: list(found.items()) for qid, found in expected.items()
    }
    assert list(run) == list(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_search_by_hand(backend):
    documents = np.array([[1, 0], [0, 1], [3, 4], [-1, 0]], dtype=np.float32)
    run = search.search(
        np.array([[2, 1]], dtype=np.float32),
        documents,
        ["q"],
        ["a", "b", "c", "d"],
        k=3,
        backend=backend,
    )
    assert list(run["q"].items()) == [("c", 10.0), ("a", 2.0), ("b", 1.0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "distinct, k", [(300, 10), (5, 10), (5, 100), (1, 1), (1, 299), (40, 300), (40, 5000)]
)
def test_both_backends_follow_the_definition_to_the_last_tie(backend, distinct, k):
    """300 documents, many identical: ties straddle the k-th place, exceed the first candidates."""
    rng = np.random.default_rng(distinct)
    documents = rng.standard_normal((distinct, 24)).astype(np.float32)[
        rng.integers(distinct, size=300)
    ]
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries = rng.standard_normal((7, 24)).astype(np.float32)
    pids, qids = [f"d{i}" for i in rng.permutation(300)], [f"q{i}" for i in range(7)]
    same(
        search.search(queries, documents, qids, pids, k, backend),
        expected_run(queries, documents, qids, pids, k),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_ties_below_float32_sums_are_settled_alike(backend):
    """Scores closer than the rounding of a float32 sum: the library's order would be its own."""
    rng = np.random.default_rng(0)
    documents = np.ones((500, 96), dtype=np.float32) + 1e-7 * rng.integers(
        -3, 4, size=(500, 96)
    ).astype(np.float32)
    queries = 1 + 0.1 * rng.standard_normal((3, 96)).astype(np.float32)
    pids, qids = [f"d{i:03}" for i in range(500)], ["x", "y", "z"]
    same(
        search.search(queries, documents, qids, pids, 20, backend),
        expected_run(queries, documents, qids, pids, 20),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_vectors_of_any_norm_are_searched_exactly(backend):
    rng = np.random.default_rng(0)
    documents = (
        rng.standard_normal((400, 16)) * 10.0 ** rng.integers(-4, 4, size=(400, 1))
    ).astype(np.float32)
    queries = (rng.standard_normal((4, 16)) * 1e3).astype(np.float32)
    pids, qids = [f"d{i}" for i in range(400)], list("wxyz")
    same(
        search.search(queries, documents, qids, pids, 15, backend),
        expected_run(queries, documents, qids, pids, 15),
    )


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(0, 60), k=st.integers(1, 70), values=st.integers(1, 3), seed=st.integers(0, 999)
)
def test_small_integers_tie_everywhere_and_backends_agree(N, k, values, seed):
    rng = np.random.default_rng(seed)
    documents, queries = (
        rng.integers(-values, values + 1, size=(n, 4)).astype(np.float32) for n in (N, 3)
    )
    pids, qids = [f"{i:x}" for i in rng.permutation(N)], ["a", "b", "c"]
    for backend in ("torch", "auto"):
        same(
            search.search(queries, documents, qids, pids, k, backend),
            expected_run(queries, documents, qids, pids, k),
        )


def test_the_order_of_a_run_is_the_order_that_is_scored():
    rng = np.random.default_rng(0)
    documents = rng.integers(-1, 2, size=(50, 3)).astype(np.float32)
    pids = [f"d{i}" for i in range(50)]
    for found in search.search(documents[:5], documents, list("abcde"), pids, 20).values():
        assert list(found) == metrics.ranking(found)


def test_blocks_of_queries_give_the_same_run(monkeypatch):
    rng = np.random.default_rng(0)
    documents, queries = (rng.standard_normal((n, 8)).astype(np.float32) for n in (200, 20))
    arguments = queries, documents, [f"q{i}" for i in range(20)], [f"d{i}" for i in range(200)], 5
    whole = search.search(*arguments)
    monkeypatch.setattr(search, "SCORES", 600)  # three queries at a time
    same(search.search(*arguments), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    N=st.integers(1, 90),
    k=st.integers(1, 30),
    values=st.integers(0, 2),
    rows=st.integers(1, 40),
    group=st.integers(1, 8),
    spare=st.integers(0, 8),
    seed=st.integers(0, 999),
)
def test_blocks_of_any_size_follow_the_definition(backend, N, k, values, rows, group, spare, seed):
    """Ties within blocks and across their borders, blocks smaller than k.

    Also groups cut by the end of a block, and pools that overflow.
    """
    rng = np.random.default_rng(seed)
    documents, queries = (
        rng.integers(-values, values + 1, size=(n, 3)).astype(np.float32) for n in (N, 5)
    )
    documents[N // 2 :] *= 1 + 2.0**-22  # nearly the same: below what a float32 sum can tell
    pids, qids = [f"{i:x}" for i in rng.permutation(N)], list("abcde")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ROWS", rows), ("GROUP", group), ("SPARE", spare)):
            patch.setattr(search, name, value)
        same(
            search.search(queries, documents, qids, pids, k, backend),
            expected_run(queries, documents, qids, pids, k),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("descending", [True, False])
def test_equal_scores_across_blocks_are_ordered_by_id_alone(backend, descending, monkeypatch):
    """One document 1,000 times: the last block or the first wins, whatever was found before."""
    monkeypatch.setattr(search, "ROWS", 64)
    pids = sorted((f"d{i:03}" for i in range(1000)), reverse=descending)
    run = search.search(
        np.ones((2, 8), np.float32), np.ones((1000, 8), np.float32), ["x", "y"], pids, 12, backend
    )
    assert list(run["x"]) == list(run["y"]) == [f"d{i}" for i in range(999, 987, -1)]


@pytest.mark.parametrize("order", [1, -1])
def test_documents_sorted_by_their_score_are_found_from_either_end(order, monkeypatch):
    """Ascending, every block is better than all before it."""
    monkeypatch.setattr(search, "ROWS", 128)
    documents = np.arange(2000, dtype=np.float32)[::order, None] * np.array([[1, 1e-3]], np.float32)
    pids, queries = [f"d{i}" for i in range(2000)], np.array([[1, 0], [-1, 0]], np.float32)
    same(
        search.search(queries, documents, ["x", "y"], pids, 20),
        expected_run(queries, documents, ["x", "y"], pids, 20),
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_file_is_searched_as_what_stands_in_it(dtype, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(search, "ROWS", 50)
    rng = np.random.default_rng(0)
    documents, queries = (
        rng.standard_normal((333, 8)).astype(dtype),
        rng.standard_normal((4, 8)).astype(np.float32),
    )
    np.save(tmp_path / "documents.npy", documents)
    file = np.load(tmp_path / "documents.npy", mmap_mode="r")
    pids, qids = [f"d{i}" for i in range(333)], list("wxyz")
    same(
        search.search(queries, file, qids, pids, 7),
        expected_run(queries, documents.astype(np.float32), qids, pids, 7),
    )
    assert not recwarn.list


@pytest.mark.parametrize(
    "scale, other",
    [(1e-30, 1), (1e-25, 1e10), (1e-12, 1), (1e15, 1), (1e25, 1), (1e19, 1e18), (1e20, 1e20)],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_scores_at_the_ends_of_float32_are_searched_all_the_same(scale, other):
    """Squares, sums or scores are no float32 there; infinite scores tie."""
    rng = np.random.default_rng(0)
    documents, queries = (
        (rng.standard_normal((200, 6)) * scale).astype(np.float32),
        (rng.standard_normal((3, 6)) * other).astype(np.float32),
    )
    pids, qids = [f"d{i}" for i in range(200)], list("xyz")
    same(
        search.search(queries, documents, qids, pids, 5),
        expected_run(queries, documents, qids, pids, 5),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_queries_are_each_given_their_own(backend):
    documents = np.eye(300, dtype=np.float32)
    run = search.search(
        documents,
        documents,
        [f"q{i}" for i in range(300)],
        [f"d{i}" for i in range(300)],
        1,
        backend,
    )
    assert run == {f"q{i}": {f"d{i}": 1.0} for i in range(300)}


MEMORY = """
import numpy as np, resource
from lib.benchmark import search as retrieve
rng = np.random.default_rng(0)
documents, queries = (rng.standard_normal((n, 64), dtype=np.float32) for n in (300_000, 500))
pids = [str(i) for i in range(300_000)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieve.search(queries, documents, [str(i) for i in range(500)], pids, 10, "torch")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_memory_is_bounded_by_blocks_and_not_by_documents_times_queries():
    """Scores of all would be 572 MiB, a copy of the documents 73; a block of scores is 31."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    assert int(out) < 120


def test_nothing_to_search_gives_empty_rankings():
    none, two = np.zeros((0, 4), np.float32), np.eye(2, 4, dtype=np.float32)
    for backend in search.BACKENDS:
        assert search.search(two, none, ["a", "b"], [], backend=backend) == {"a": {}, "b": {}}
        assert search.search(none, two, [], ["a", "b"], backend=backend) == {}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_named(broken):
    good, bad = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    bad[1:, 2] = broken
    with pytest.raises(ValueError, match=r"document b is not finite \(2 such\)"):
        search.search(good, bad, list("xyz"), list("abc"))
    with pytest.raises(ValueError, match="query y is not finite"):
        search.search(bad, good, list("xyz"), list("abc"))


def test_misfits_are_refused_with_their_numbers():
    vectors = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="2 ids for 3 queries, 3 for 3"):
        search.search(vectors, vectors, ["x", "y"], list("abc"))
    with pytest.raises(ValueError, match="document a comes twice"):
        search.search(vectors, vectors, list("xyz"), ["a", "b", "a"])
    with pytest.raises(ValueError, match="query x comes twice"):
        search.search(vectors, vectors, list("yxx"), list("abc"))
    with pytest.raises(ValueError, match=r"\(3, 4\) for queries, \(3, 5\) for documents"):
        search.search(vectors, np.ones((3, 5), np.float32), list("xyz"), list("abc"))
    with pytest.raises(ValueError, match="k=0"):
        search.search(vectors, vectors, list("xyz"), list("abc"), k=0)
    with pytest.raises(ValueError, match="backend='annoy'.*torch, faiss"):
        search.search(vectors, vectors, list("xyz"), list("abc"), backend="annoy")


def test_without_faiss_auto_uses_torch_and_asking_for_it_says_what_to_do(no_faiss):
    eye = np.eye(3, dtype=np.float32)
    assert list(search.search(eye[:1], eye, ["q"], list("abc"))["q"]) == ["a", "c", "b"]
    with pytest.raises(ImportError, match="faiss-cpu or faiss-gpu, or use backend='torch'"):
        search.search(eye, eye, list("xyz"), list("abc"), backend="faiss")


def test_faiss_is_imported_only_where_it_is_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    eye = np.eye(3, dtype=np.float32)
    search.search(eye, eye, list("xyz"), list("abc"), backend="torch")
    assert "faiss" not in sys.modules and not hasattr(search, "faiss")


# ---------------------------------------------------------------- rank, evaluate


def task(name="toy", **changes):
    fields = dict(
        documents={"a": "red fox", "b": "owl " * 60, "c": "green hen"},
        queries={"1": "fox", "2": "hen"},
        qrels={"1": {"a": 1}, "2": {"c": 1}},
    )
    return SimpleNamespace(name=name, **(fields | changes))


def test_rank_embeds_shared_texts_once_and_counts_the_truncated_of_each_task(tiny, tokenizer):
    encoder = search.Encoder(tiny(), tokenizer, truncate=True)
    seen = []
    encode, tokenize = encoder.encode, encoder.tokenize
    encoder.tokenize = lambda texts: seen.append(len(texts)) or tokenize(texts)
    first, second = (
        task(),
        task("other", documents={"z": "owl " * 60, "y": "red fox"}, queries={"1": "fox"}),
    )
    ranked = search.rank(encoder, [first, second], show_progress=False)
    assert seen == [3, 2, 1]  # three distinct texts, then each task's queries
    assert {name: truncated for name, (_, truncated) in ranked.items()} == {"toy": 1, "other": 1}
    vectors = encode(list(second.documents.values()), show_progress=False)
    queries = encode(["fox"], show_progress=False)
    run = ranked["other"][0]
    assert run.keys() == {"1"} and run["1"].keys() == {"z", "y"}
    for pid, vector in zip("zy", vectors):
        assert run["1"][pid] == pytest.approx(float(vector @ queries[0]), abs=1e-5)
    assert ranked["toy"][0]["1"]["a"] == pytest.approx(run["1"]["y"], abs=1e-6)


def test_rank_refuses_an_empty_query_by_name(tiny, tokenizer):
    with pytest.raises(ValueError, match="toy: query 2 is empty"):
        search.rank(search.Encoder(tiny(), tokenizer), [task(queries={"1": "fox", "2": " \n"})])


@pytest.mark.parametrize("windows", [1, 3])
def test_a_document_of_many_windows_scores_what_its_best_does(windows, monkeypatch):
    """Against the definition, with ties between windows and documents, in blocks of any size."""
    rng = np.random.default_rng(windows)
    queries = rng.integers(-2, 3, (7, 4)).astype(np.float32)
    documents = [
        rng.integers(-2, 3, (rng.integers(1, windows + 1), 4)).astype(np.float32) for _ in range(23)
    ]
    qids, pids = [f"q{i}" for i in range(7)], [f"d{i}" for i in range(23)]
    expected = {
        qid: {pid: max(float(query @ row) for row in rows) for pid, rows in zip(pids, documents)}
        for qid, query in zip(qids, queries)
    }
    for scores in (1, 100, 10**6):
        monkeypatch.setattr(search, "SCORES", scores)
        run = search.search_windows(queries, documents, qids, pids, k=9)
        assert {qid: list(found.items()) for qid, found in run.items()} == {
            qid: [(pid, found[pid]) for pid in metrics.ranking(found)[:9]]
            for qid, found in expected.items()
        }
    if windows == 1:
        assert run == search.search(queries, np.concatenate(documents), qids, pids, k=9)


def test_windows_of_real_numbers_follow_the_definition_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    queries, documents = (
        rng.standard_normal((5, 12)).astype(np.float32),
        [rng.standard_normal((rng.integers(1, 9), 12)).astype(np.float32) for _ in range(150)],
    )
    documents[7] = documents[90] = documents[41][:1].repeat(
        30, axis=0
    )  # many windows alike, in several documents
    qids, pids = [f"q{i}" for i in range(5)], [f"d{i}" for i in rng.permutation(150)]
    scored = [
        expected_run(queries, rows, qids, [f"{pid} {i}" for i in range(len(rows))], 1)
        for pid, rows in zip(pids, documents)
    ]
    expected = {
        qid: {next(iter(one[qid])).split()[0]: next(iter(one[qid].values())) for one in scored}
        for qid in qids
    }
    for rows in (2**14, 100, 7):
        monkeypatch.setattr(search, "ROWS", rows)
        for k in (1, 10, 200):
            run = search.search_windows(queries, documents, qids, pids, k)
            same(
                run,
                {
                    qid: {pid: found[pid] for pid in metrics.ranking(found)[:k]}
                    for qid, found in expected.items()
                },
            )


def test_windows_that_are_not_finite_are_named_by_their_document():
    documents = [np.ones((2, 3), np.float32), np.array([[1, 1, 1], [1, math.nan, 1]], np.float32)]
    with pytest.raises(ValueError, match=r"document b is not finite \(1 such\)"):
        search.search_windows(np.ones((1, 3), np.float32), documents, ["q"], ["a", "b"])


def test_the_best_window_finds_what_stands_at_the_end(tiny, tokenizer):
    documents = {"a": "hen " * 40 + "red fox runs by night", "b": "hen " * 45, "c": "owl " * 45}
    one = task(documents=documents, queries={"1": "red fox runs by night"}, qrels={"1": {"a": 1}})
    encoder = search.Encoder(tiny(), tokenizer, max_length=12, chunk="best", stride=5)
    run, longer = search.rank(encoder, [one], show_progress=False)["toy"]
    assert list(run["1"])[0] == "a" and longer == 3 and encoder.context_length is None
    whole = search.Encoder(tiny(), tokenizer, max_length=12, truncate=True)
    parts = whole.encode(["hen " * 10, "red fox runs by night"], show_progress=False)
    assert run["1"]["b"] == pytest.approx(float(parts[0] @ parts[1]), abs=1e-5)


def test_a_document_that_is_the_query_is_left_out_unless_it_is_an_answer(tiny, tokenizer):
    run = {"1": {"1": 3.0, "a": 2.0, "b": 1.0}, "2": {"2": 3.0, "a": 2.0}}
    assert search.without_itself(run, ["1"], k=2) == {
        "1": {"a": 2.0, "b": 1.0},
        "2": {"2": 3.0, "a": 2.0},
    }
    same = task(
        documents={"1": "red fox", "a": "red fox", "b": "hen"},
        queries={"1": "red fox"},
        qrels={"1": {"a": 1}},
    )
    for ranker in (search.Encoder(tiny(), tokenizer), search.Bm25()):
        ranked, _ = search.rank(ranker, [same], show_progress=False, k=2)["toy"]
        assert list(ranked["1"]) == ["a", "b"][: len(ranked["1"])]
        assert search.evaluate(same, ranked) | {"itself": 1} == search.evaluate(same, ranked)


@pytest.mark.parametrize(
    ("document", "query", "judged", "itself"),
    [
        ("red fox", "red fox", {"a": 1}, True),
        ("  red\n fox ", "red fox\n", {"a": 1}, True),  # white space aside
        ("Foxes\nred fox", "red fox", {"a": 1}, True),  # its title does not count
        ("Foxes\nred fox", "Foxes red fox", {"a": 1}, True),
        ("red fox", "red fox", {"1": 0, "a": 1}, True),  # judged, and no answer
        ("red fox", "red fox", {"1": 1}, False),
        ("fox fox fox red fox", "red fox", {"a": 1}, False),  # both are number 1, and that is all
        ("Foxes\nby night\nred fox", "red fox", {"a": 1}, False),
        ("red fox\nby night", "red fox", {"a": 1}, False),
        ("redfox", "red fox", {"a": 1}, False),
        ("Red fox", "red fox", {"a": 1}, False),
        ("", "red fox", {"a": 1}, False),
    ],
)
def test_only_a_query_with_the_documents_text_is_that_document(document, query, judged, itself):
    one = task(
        documents={"1": document, "a": "fox"},
        queries={"1": query, "2": "a"},
        qrels={"1": judged, "2": {"a": 1}},
    )
    assert search.queries_that_are_documents(one) == (["1"] if itself else [])
    found = search.rank(
        search.Bm25(), [task(documents=one.documents, queries={"1": query}, qrels={"1": judged})]
    )["toy"][0]["1"]
    assert ("1" in found) == (not itself and bool(set(document.lower().split()) & {"red", "fox"}))


def test_ids_that_coincide_score_the_same_in_the_pipeline_and_by_hand():
    """Both numbered from 0: the wrong document 0 stands before the right one, 1 / log2(3).

    Query 1 finds its answer.
    """
    one = task(
        documents={
            "0": "fox fox fox red fox",
            "1": "red fox by night and something longer about other animals",
            "2": "owl",
        },
        queries={"0": "red fox", "1": "owl"},
        qrels={"0": {"1": 1}, "1": {"2": 1}},
    )
    ranked = search.rank(search.Bm25(), [one])["toy"][0]
    for run in (ranked, search.bm25(one.documents, one.queries)):
        assert metrics.ndcg(run, one.qrels, per_query=True) == {
            "0": pytest.approx(1 / math.log2(3)),
            "1": 1.0,
        }
        assert "itself" not in search.evaluate(one, run)


def test_how_many_queries_lack_themselves_is_said_where_some_do():
    """ArguAna in small: of a run from elsewhere that has the document, nothing was left out."""
    one = task(
        documents={"1": "red fox", "2": "hen", "c": "fox"},
        queries={"1": "red fox", "2": "hen"},
        qrels={"1": {"c": 1}, "2": {"c": 1}},
    )
    assert search.evaluate(one, search.rank(search.Bm25(), [one])["toy"][0])["itself"] == 2
    assert search.evaluate(one, {"1": {"1": 1.0}, "2": {"c": 1.0}})["itself"] == 1
    assert "itself" not in search.evaluate(one, {"1": {"1": 1.0}, "2": {"2": 1.0, "c": 0.5}})


def test_documents_that_bm25_reads_in_part_are_counted(tokenizer):
    cut = [search.rank(search.Bm25(n, tokenizer), [task()])["toy"][1] for n in (None, 1, 2, 59, 60)]
    assert cut == [0, 3, 1, 1, 0]
    assert (
        search.Bm25(60, tokenizer).limited(2).context_length
        == 2
        == search.Bm25(2).limited(60).context_length
    )


def test_evaluate_reports_mean_interval_and_counts():
    run = {"1": {"a": 1.0, "b": 0.5}, "2": {"a": 1.0, "c": 0.5}}
    scores = search.evaluate(task(), run)
    assert scores["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2, abs=1e-6)
    assert scores["low"] <= scores["ndcg@10"] <= scores["high"]
    assert (scores["queries"], scores["documents"]) == (2, 3)
    assert (scores["recall@100"], scores["mrr@10"], scores["precision@10"], scores["map"]) == (
        1,
        0.75,
        0.1,
        0.75,
    )
    assert scores["missing"] == 0 and "ties" not in scores
    some = search.evaluate(task(), {"2": {"a": 1.0, "c": 1.0}})
    assert some["missing"] == 1 and some["ties"] == pytest.approx(
        [1 / math.log2(3) / 2, 0.5], abs=1e-6
    )
    json.dumps(scores)


@pytest.mark.parametrize("odd", [None, 1.5, b"fox"])
def test_rank_names_the_task_and_document_that_is_wrong(tiny, tokenizer, odd):
    encoder = search.Encoder(tiny(), tokenizer)
    with pytest.raises(TypeError, match="toy: document d2 is"):
        search.rank(encoder, [task(documents={"d1": "fox", "d2": odd})], show_progress=False)
    with pytest.raises(TypeError, match="toy: query 7 is"):
        search.rank(encoder, [task(queries={"7": odd})], show_progress=False)
    with pytest.raises(
        ValueError, match="toy: document d2 is longer than 32 tokens.*truncate=True"
    ):
        search.rank(
            encoder, [task(documents={"d1": "fox", "d2": "hen " * 40})], show_progress=False
        )


def test_the_values_of_several_trainings_are_averaged_query_by_query():
    first, second = (
        {"ndcg@10": {"a": a, "b": b}, "mrr": {"a": b, "b": a}} for a, b in [(1, 0), (0.5, 1)]
    )
    mean = search.averaged([first, second])
    assert mean == {"ndcg@10": {"a": 0.75, "b": 0.5}, "mrr": {"a": 0.5, "b": 0.75}}
    odd = {"ndcg@10": {"a": 0.1 + 0.2}}
    assert search.averaged([odd]) == odd  # one training: the same bits
