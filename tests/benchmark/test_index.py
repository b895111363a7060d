"""Approximate search: the scores of exact search, everything where everything is looked at, and one clear line otherwise."""

import numpy as np
import pytest

from lib.benchmark import index, metrics, search

pytest.importorskip("faiss")


def vectors(n, D=16, seed=0):
    found = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


DOCUMENTS, QUERIES = vectors(600), vectors(9, seed=1)
QIDS, PIDS = (
    [f"q{i}" for i in range(9)],
    [f"d{i:03}" for i in np.random.default_rng(2).permutation(600)],
)
EXACT = search.search(QUERIES, DOCUMENTS, QIDS, PIDS, k=10)


def recall(run):
    return metrics.recall(run, {qid: dict.fromkeys(found, 1) for qid, found in EXACT.items()}, k=10)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq"])
def test_with_every_list_and_every_candidate_it_is_exact_search(kind):
    run = index.Index(DOCUMENTS, kind, lists=12).search(
        QUERIES, QIDS, PIDS, 10, effort=12, candidates=600
    )
    assert [(qid, list(found.items())) for qid, found in run.items()] == [
        (qid, list(found.items())) for qid, found in EXACT.items()
    ]


def test_lists_of_whole_vectors_need_no_more_candidates_than_are_wanted():
    assert (
        recall(index.Index(DOCUMENTS, "ivf_flat", lists=12).search(QUERIES, QIDS, PIDS, effort=12))
        == 1
    )


@pytest.mark.parametrize("kind", list(index.KINDS))
def test_more_effort_finds_no_less_and_every_score_is_the_exact_one(kind):
    table = index.Index(DOCUMENTS, kind, lists=12 if kind != "hnsw" else None)
    runs = [table.search(QUERIES, QIDS, PIDS, 10, effort, candidates=100) for effort in (1, 12)]
    assert recall(runs[0]) <= recall(runs[1]) and recall(runs[1]) > 0.9
    whole = search.search(QUERIES, DOCUMENTS, QIDS, PIDS, k=600)
    for qid, found in runs[0].items():
        assert all(score == whole[qid][pid] for pid, score in found.items()) and list(
            found
        ) == metrics.ranking(found)


def test_a_file_of_halves_is_indexed_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "ROWS", 100)
    np.save(tmp_path / "documents.npy", DOCUMENTS.astype(np.float16))
    file = np.load(tmp_path / "documents.npy", mmap_mode="r")
    run = index.Index(file, "ivf_flat", lists=5).search(QUERIES, QIDS, PIDS, effort=5)
    assert run == search.search(QUERIES, file, QIDS, PIDS, k=10)


def test_sizes_are_those_of_what_is_kept():
    N, D = DOCUMENTS.shape
    sizes = {kind: index.Index(DOCUMENTS, kind, lists=12).size for kind in index.KINDS}
    assert sizes["ivf_flat"] == N * (4 * D + 8) + 12 * D * 4
    assert (
        sizes["ivf_sq8"] == N * (D + 8) + 12 * D * 4
        and sizes["ivf_pq"] == N * (D // 8 + 8) + 12 * D * 4 + 256 * D * 4
    )
    assert sizes["hnsw"] > N * (4 * D + 64 * 4)  # two links of four bytes for each of 32


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kind="annoy"), "kind='annoy': one of hnsw, ivf_flat, ivf_sq8, ivf_pq"),
        (dict(documents=DOCUMENTS[:0]), r"at least one: got \(0, 16\)"),
        (dict(documents=DOCUMENTS[0]), r"\(N, D\), at least one: got \(16,\)"),
        (dict(kind="ivf_flat", lists=601), "lists=601: there are 600 documents"),
        (dict(kind="ivf_pq", documents=DOCUMENTS[:200]), "200 documents of 16 numbers are too few"),
        (
            dict(kind="ivf_pq", documents=DOCUMENTS[:, :12]),
            "600 documents of 12 numbers .* no multiple of 8",
        ),
        (dict(documents=DOCUMENTS * np.nan), r"document 0 is not finite \(600 such\)"),
    ],
)
def test_what_cannot_be_indexed_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        index.Index(**(dict(documents=DOCUMENTS) | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(effort=13), "effort=13.*effort from 1 to 12"),
        (dict(effort=0), "effort=0"),
        (dict(k=0), "k=0"),
        (dict(k=9, candidates=8), "candidates=8"),
        (dict(pids=PIDS[1:]), "599 for 600 documents"),
        (dict(qids=QIDS[1:]), "8 ids for 9 queries"),
        (dict(queries=QUERIES[:, 1:]), r"\(Q, 16\).*got \(9, 15\)"),
        (dict(queries=QUERIES * np.nan), "query q0 is not finite"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        index.Index(DOCUMENTS, "ivf_flat", lists=12).search(
            **(dict(queries=QUERIES, qids=QIDS, pids=PIDS) | changes)
        )
    assert "\n" not in str(error.value)


def test_without_faiss_it_says_what_to_do(no_faiss):
    with pytest.raises(
        ImportError, match="faiss-cpu or faiss-gpu, or search exactly with `retrieve.search`"
    ):
        index.Index(DOCUMENTS)
