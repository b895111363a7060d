"""Search: vectors that depend on their text alone, one order among equals, files that survive."""
import builtins
import copy
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lib import checkpoint, metrics, retrieve

ROOT = Path(__file__).parents[1]
WORDS = "red green blue fox hen owl runs sleeps the by night day unbelievable foxes".split()


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=length)) for length in lengths]


# ---------------------------------------------------------------- encoding

@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_vector_depends_on_its_text_alone(tiny, tokenizer, pooling):
    encoder = retrieve.Encoder(tiny(pooling=pooling), tokenizer, truncate=True)
    texts = texts_of([3, 40, 1, 12, 7, 29, 0, 18, 5, 5, 31])
    together = encoder.encode(texts, show_progress=False)
    assert together.dtype == np.float32 and together.shape == (11, 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for batch_size in (1, 3, 7):
        np.testing.assert_allclose(encoder.encode(texts, batch_size, show_progress=False), together, atol=1e-5)
    shuffled = np.random.default_rng(0).permutation(11)
    np.testing.assert_allclose(encoder.encode([texts[i] for i in shuffled], 4, show_progress=False), together[shuffled], atol=1e-5)


def test_encode_is_the_models_embedding_normalised_or_not(tiny, tokenizer):
    model, texts = tiny(), ["red fox runs", "owl"]
    encoder = retrieve.Encoder(model, tokenizer)
    raw = encoder.encode(texts, normalize=False, show_progress=False)
    with torch.no_grad():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).pooler_output.numpy()
    np.testing.assert_allclose(raw, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts, show_progress=False), raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)


def test_a_batch_never_exceeds_its_budget_of_tokens(tiny, tokenizer, monkeypatch):
    model, shapes = tiny(), []
    monkeypatch.setattr(retrieve, "BATCH_TOKENS", 40)
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    retrieve.Encoder(model, tokenizer, truncate=True).encode(texts_of([30, 2, 2, 2, 20, 8]), batch_size=3, show_progress=False)
    assert sum(rows for rows, _ in shapes) == 6
    assert all(rows <= 3 and (rows == 1 or rows * length <= 40) for rows, length in shapes)


def test_no_texts_keep_the_width(tiny, tokenizer):
    assert retrieve.Encoder(tiny(), tokenizer).encode([], show_progress=False).shape == (0, 16)


def test_truncated_texts_are_counted_and_read_up_to_the_limit(tiny, tokenizer):
    encoder = retrieve.Encoder(tiny(), tokenizer, max_length=8, truncate=True)
    texts = ["red " * 6, "red " * 7, "", "red " * 5000]                    # with [CLS] and [SEP]: 8, 9, 2 and 5002 tokens
    vectors = encoder.encode(texts, show_progress=False)
    assert encoder.truncated == 2 and encoder.longer == [False, True, False, True]
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    np.testing.assert_allclose(vectors[3], vectors[0], atol=1e-6)
    encoder.encode(["red"], show_progress=False)
    assert encoder.truncated == 0                                          # of the last call


def test_an_encoder_reads_no_more_than_its_model(tiny, tokenizer):
    assert retrieve.Encoder(tiny(), tokenizer, max_length=1000).max_length == 32
    assert retrieve.Encoder(tiny(), tokenizer).max_length == 32
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        retrieve.Encoder(tiny(), tokenizer, max_length=2)


@pytest.mark.parametrize("text", ["", " \n\t", "\x00\ufeff\u200d", "\ud800 fox", "🦊🦉", "مرحبا", "红狐狸", "e\u0301", "x" * 5000])
def test_odd_texts_give_unit_vectors(tiny, tokenizer, text):
    vectors = retrieve.Encoder(tiny(), tokenizer).encode([text, "fox"], show_progress=False)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("odd, kind", [(None, "NoneType"), (1.5, "float"), (b"fox", "bytes"), (math.nan, "float")])
def test_what_is_no_text_is_named(tiny, tokenizer, odd, kind):
    encoder = retrieve.Encoder(tiny(), tokenizer)
    with pytest.raises(TypeError, match=f"text 1 is {kind}, not str"):
        encoder.encode(["fox", odd], show_progress=False)
    with pytest.raises(TypeError, match="a list of texts, not one text"):  # it would be read letter by letter
        encoder.encode("fox", show_progress=False)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("red fox\n\tun🦊.-é红\ud800"), max_size=60), gap=st.sampled_from([" ", "\n", "", "unbelievable", " unbelievable ", "红", "红e\u0301", "un-", "🦊", "un\u00a0", "un—", "un\x0b", "un\x85", "\u2028", "。"]),
       times=st.integers(0, 400), max_length=st.integers(3, 12), reach=st.sampled_from([8, 40, 4096]))
def test_tokenising_the_beginning_gives_the_tokens_of_the_whole(tokenizer, text, gap, times, max_length, reach):
    """Only so many characters are tokenised as can matter, and no word is read in half."""
    text = text + gap * times + text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieve, "REACH", reach)
        ids, cut = retrieve.tokenize([text], tokenizer, max_length)
    whole = tokenizer(retrieve.encodable(text))["input_ids"]
    assert cut == [len(whole) > max_length]
    assert ids == [whole if not cut[0] else whole[: max_length - 1] + whole[-1:]]


def test_a_word_across_the_first_cut_is_read_whole(tokenizer):
    """16 characters a token are tokenised at first; here the cut falls into a word that would end in other pieces."""
    text = " " * (16 * 8 - 4) + "unbelievable red green blue fox hen owl runs"
    ids, cut = retrieve.tokenize([text], tokenizer, 8)
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["[CLS]", "un", "##believ", "##able", "red", "green", "blue", "[SEP]"]
    assert cut == [True]


@pytest.mark.parametrize("separator", [" ", "\r", "\u00a0", "\u3000", "\u2028", "—", "。", "红", "."])
def test_a_million_words_cost_as_much_as_the_first_few(tokenizer, separator):
    seen = []
    spy = lambda texts, **options: seen.extend(map(len, texts)) or tokenizer(texts, **options)
    retrieve.tokenize([f"fox{separator}" * 1_000_000], spy, 32)
    assert max(seen) <= 16 * 32


ENORMOUS = {"a million words": "'red fox ' * 500_000", "a million characters of Chinese": "'红' * 1_000_000", "a million letters without a space": "'x' * 1_000_000"}


@pytest.mark.parametrize("kind", ENORMOUS)
def test_an_enormous_text_takes_little_memory(tiny, tokenizer, tmp_path, kind):
    """In a process of its own: peak memory is a process's. Less than 300 MB above what the libraries and one short text take."""
    checkpoint.save(tiny(max_position_embeddings=8192), tokenizer, tmp_path / "model")
    code = f"""if True:
        import resource, sys
        from lib import checkpoint, retrieve
        encoder = retrieve.Encoder(*checkpoint.load({str(tmp_path / 'model')!r}), truncate=True)
        encoder.encode(["fox " * 9000], show_progress=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(encoder.encode([{ENORMOUS[kind]}], show_progress=False).shape)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024))"""
    shape, extra = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip().split("\n")
    assert shape == "(1, 16)" and int(extra) < 300e6


# ---------------------------------------------------------------- texts longer than the model

def test_a_text_longer_than_the_model_needs_a_word_about_it(tiny, tokenizer):
    encoder = retrieve.Encoder(tiny(), tokenizer)
    assert encoder.encode(["red " * 30], show_progress=False).shape == (1, 16)           # 32 tokens with [CLS] and [SEP]
    with pytest.raises(ValueError, match=r"text 1 is longer than 32 tokens \(2 of 4 are\): truncate=True .* chunk='mean' or 'max' .*extend"):
        encoder.encode(["fox", "red " * 31, "owl", "hen " * 99], show_progress=False)
    for wrong in (dict(chunk="median"), dict(chunk="mean", truncate=True)):
        with pytest.raises(ValueError, match="chunk="):
            retrieve.Encoder(tiny(), tokenizer, **wrong)


@pytest.mark.parametrize("chunk", ["mean", "max"])
def test_a_chunked_text_is_the_mean_or_largest_of_its_windows(tiny, tokenizer, chunk):
    words = [word for word in texts_of([50])[0].split() if len(word) < 7 and word != "foxes"]      # a token each
    pieces = [" ".join(words[:6]), " ".join(words[6:12]), " ".join(words[12:14])]        # 8 tokens with [CLS] and [SEP], 8 and 4
    encoder = retrieve.Encoder(tiny(), tokenizer, max_length=8, chunk=chunk)
    texts = ["", " ".join(words[:14]), "red fox", " ".join(words[:6])]
    vectors = encoder.encode(texts, batch_size=2, normalize=False, show_progress=False)
    assert encoder.longer == [False, True, False, False]
    each = retrieve.Encoder(tiny(), tokenizer).encode([*pieces, "", "red fox"], normalize=False, show_progress=False)
    expected = each[:3].mean(axis=0) if chunk == "mean" else each[:3].max(axis=0)
    np.testing.assert_allclose(vectors, [each[3], expected, each[4], each[0]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(texts, show_progress=False), axis=1), 1, atol=1e-6)
    assert encoder.encode([], show_progress=False).shape == (0, 16)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("red fox\n\tun🦊.-é红한\ud800"), max_size=200), max_length=st.integers(3, 20))
def test_the_windows_of_a_text_hold_all_of_its_tokens_once(tiny, tokenizer, text, max_length):
    windows = retrieve.Encoder(tiny(), tokenizer, max_length, chunk="mean").tokenize([text])[0]
    whole = tokenizer(retrieve.encodable(text))["input_ids"]
    assert [token for window in windows for token in window[1:-1]] == whole[1:-1]
    assert all(len(window) <= max_length and (window[0], window[-1]) == (whole[0], whole[-1]) for window in windows)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.sampled_from("red fox\n\tun🦊.-é红한\ud800\u00a0—"), max_size=60), max_size=5), piece=st.integers(1, 50), reach=st.sampled_from([1, 8, 4096]))
def test_pieces_give_the_tokens_of_the_whole(tokenizer, texts, piece, reach):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieve, "PIECE", piece)
        patch.setattr(retrieve, "REACH", reach)
        ids = retrieve.tokenize_whole(texts, tokenizer)
        cut, _ = retrieve.tokenize(texts, tokenizer, 10**4)
    assert ids == cut == [tokenizer(retrieve.encodable(text))["input_ids"] for text in texts]


def test_no_call_of_the_tokenizer_gets_more_than_a_piece(tokenizer, monkeypatch):
    monkeypatch.setattr(retrieve, "PIECE", 1000)
    seen = []
    spy = lambda texts, **options: seen.append(sum(map(len, texts))) or tokenizer(texts, **options)
    retrieve.tokenize(["fox " * n for n in (10, 200, 249, 90, 1, 1000, 3)], spy, 10**4)
    assert max(seen) == 4000 and sorted(seen)[-2] <= 1000 and sum(seen) == 4 * 1553      # a text of 4,000 characters without more goes alone


@pytest.mark.parametrize("odd", [None, 1.5, b"fox"])
def test_rank_names_the_task_and_document_that_is_wrong(tiny, tokenizer, odd):
    encoder = retrieve.Encoder(tiny(), tokenizer)
    with pytest.raises(TypeError, match="toy: document d2 is"):
        retrieve.rank(encoder, [task(documents={"d1": "fox", "d2": odd})], show_progress=False)
    with pytest.raises(TypeError, match="toy: query 7 is"):
        retrieve.rank(encoder, [task(queries={"7": odd})], show_progress=False)
    with pytest.raises(ValueError, match="toy: document d2 is longer than 32 tokens.*truncate=True"):
        retrieve.rank(encoder, [task(documents={"d1": "fox", "d2": "hen " * 40})], show_progress=False)


def test_an_encoder_says_what_it_lacks(tiny, tokenizer):
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        retrieve.Encoder(tiny(max_position_embeddings=2), tokenizer, chunk="mean")
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        retrieve.Encoder(tiny(), bare)
    assert retrieve.Encoder(tiny(), tokenizer).encode((text for text in ("fox", "hen")), show_progress=False).shape == (2, 16)


def test_a_published_model_gets_batches_of_the_length_it_pads_to(tiny, tokenizer, monkeypatch):
    model, shapes = tiny(mask_padding=False, pad_to_max_length=True, pooling="cls"), []
    monkeypatch.setattr(retrieve, "BATCH_TOKENS", 100)
    hook = model.register_forward_pre_hook(lambda module, inputs: shapes.append(len(inputs[0])))
    texts = texts_of([3, 1, 9, 14, 4, 2, 2])
    vectors = retrieve.Encoder(model, tokenizer).encode(texts, show_progress=False)
    hook.remove()
    assert shapes == [3, 3, 1]                                             # 32 tokens each
    padded = tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt", return_token_type_ids=False)
    model.config.pad_to_max_length = False
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**padded).pooler_output)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_an_embedding_that_is_not_finite_is_refused_by_index(tiny, tokenizer):
    model = tiny()
    with torch.no_grad():
        model.model.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("owl")] = torch.nan
    with pytest.raises(ValueError, match="text 1 is not finite .1 such."):
        retrieve.Encoder(model, tokenizer).encode(["fox", "owl", "hen"], show_progress=False)


# ---------------------------------------------------------------- search

BACKENDS = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed"))]


def expected_run(queries, documents, qids, pids, k):
    """The definition: every score in float64, rounded to float32, sorted by score and id."""
    run = {}
    for qid, q in zip(qids, queries.astype(np.float64)):
        scores = {pid: float(np.float32((d * q).sum())) for pid, d in zip(pids, documents.astype(np.float64))}
        run[qid] = {pid: scores[pid] for pid in metrics.ranking(scores)[:k]}
    return run


def same(run, expected):
    assert {qid: list(found.items()) for qid, found in run.items()} == {qid: list(found.items()) for qid, found in expected.items()}
    assert list(run) == list(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_search_by_hand(backend):
    documents = np.array([[1, 0], [0, 1], [3, 4], [-1, 0]], dtype=np.float32)
    run = retrieve.search(np.array([[2, 1]], dtype=np.float32), documents, ["q"], ["a", "b", "c", "d"], k=3, backend=backend)
    assert list(run["q"].items()) == [("c", 10.0), ("a", 2.0), ("b", 1.0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distinct, k", [(300, 10), (5, 10), (5, 100), (1, 1), (1, 299), (40, 300), (40, 5000)])
def test_both_backends_follow_the_definition_to_the_last_tie(backend, distinct, k):
    """300 documents, many of them identical, so that ties straddle the k-th place and exceed what was asked for at first."""
    rng = np.random.default_rng(distinct)
    documents = rng.standard_normal((distinct, 24)).astype(np.float32)[rng.integers(distinct, size=300)]
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries = rng.standard_normal((7, 24)).astype(np.float32)
    pids, qids = [f"d{i}" for i in rng.permutation(300)], [f"q{i}" for i in range(7)]
    same(retrieve.search(queries, documents, qids, pids, k, backend), expected_run(queries, documents, qids, pids, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_ties_below_float32_sums_are_settled_alike(backend):
    """Scores that differ by less than the rounding of a float32 sum: the library's own order would be its own."""
    rng = np.random.default_rng(0)
    documents = np.ones((500, 96), dtype=np.float32) + 1e-7 * rng.integers(-3, 4, size=(500, 96)).astype(np.float32)
    queries = 1 + 0.1 * rng.standard_normal((3, 96)).astype(np.float32)
    pids, qids = [f"d{i:03}" for i in range(500)], ["x", "y", "z"]
    same(retrieve.search(queries, documents, qids, pids, 20, backend), expected_run(queries, documents, qids, pids, 20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_vectors_of_any_norm_are_searched_exactly(backend):
    rng = np.random.default_rng(0)
    documents = (rng.standard_normal((400, 16)) * 10.0 ** rng.integers(-4, 4, size=(400, 1))).astype(np.float32)
    queries = (rng.standard_normal((4, 16)) * 1e3).astype(np.float32)
    pids, qids = [f"d{i}" for i in range(400)], list("wxyz")
    same(retrieve.search(queries, documents, qids, pids, 15, backend), expected_run(queries, documents, qids, pids, 15))


@settings(deadline=None, max_examples=60)
@given(N=st.integers(0, 60), k=st.integers(1, 70), values=st.integers(1, 3), seed=st.integers(0, 999))
def test_small_integers_tie_everywhere_and_backends_agree(N, k, values, seed):
    rng = np.random.default_rng(seed)
    documents, queries = (rng.integers(-values, values + 1, size=(n, 4)).astype(np.float32) for n in (N, 3))
    pids, qids = [f"{i:x}" for i in rng.permutation(N)], ["a", "b", "c"]
    for backend in ("torch", "auto"):
        same(retrieve.search(queries, documents, qids, pids, k, backend), expected_run(queries, documents, qids, pids, k))


def test_the_order_of_a_run_is_the_order_that_is_scored():
    rng = np.random.default_rng(0)
    documents = rng.integers(-1, 2, size=(50, 3)).astype(np.float32)
    pids = [f"d{i}" for i in range(50)]
    for found in retrieve.search(documents[:5], documents, list("abcde"), pids, 20).values():
        assert list(found) == metrics.ranking(found)


def test_blocks_of_queries_give_the_same_run(monkeypatch):
    rng = np.random.default_rng(0)
    documents, queries = (rng.standard_normal((n, 8)).astype(np.float32) for n in (200, 20))
    arguments = queries, documents, [f"q{i}" for i in range(20)], [f"d{i}" for i in range(200)], 5
    whole = retrieve.search(*arguments)
    monkeypatch.setattr(retrieve, "SCORES", 600)                           # three queries at a time
    same(retrieve.search(*arguments), whole)


def test_nothing_to_search_gives_empty_rankings():
    none, two = np.zeros((0, 4), np.float32), np.eye(2, 4, dtype=np.float32)
    for backend in retrieve.BACKENDS:
        assert retrieve.search(two, none, ["a", "b"], [], backend=backend) == {"a": {}, "b": {}}
        assert retrieve.search(none, two, [], ["a", "b"], backend=backend) == {}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_named(broken):
    good, bad = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    bad[1:, 2] = broken
    with pytest.raises(ValueError, match=r"document b is not finite \(2 such\)"):
        retrieve.search(good, bad, list("xyz"), list("abc"))
    with pytest.raises(ValueError, match="query y is not finite"):
        retrieve.search(bad, good, list("xyz"), list("abc"))


def test_misfits_are_refused_with_their_numbers():
    vectors = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="2 ids for 3 queries, 3 for 3"):
        retrieve.search(vectors, vectors, ["x", "y"], list("abc"))
    with pytest.raises(ValueError, match="document a comes twice, at 0 and 2"):
        retrieve.search(vectors, vectors, list("xyz"), ["a", "b", "a"])
    with pytest.raises(ValueError, match="query x comes twice, at 1 and 2"):
        retrieve.search(vectors, vectors, list("yxx"), list("abc"))
    with pytest.raises(ValueError, match=r"\(3, 4\) for queries, \(3, 5\) for documents"):
        retrieve.search(vectors, np.ones((3, 5), np.float32), list("xyz"), list("abc"))
    with pytest.raises(ValueError, match="k=0"):
        retrieve.search(vectors, vectors, list("xyz"), list("abc"), k=0)
    with pytest.raises(ValueError, match="backend='annoy'.*torch, faiss"):
        retrieve.search(vectors, vectors, list("xyz"), list("abc"), backend="annoy")


def test_without_faiss_auto_uses_torch_and_asking_for_it_says_what_to_do(monkeypatch):
    original = builtins.__import__
    monkeypatch.delitem(sys.modules, "faiss", raising=False)

    def absent(name, *arguments, **options):
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    eye = np.eye(3, dtype=np.float32)
    assert list(retrieve.search(eye[:1], eye, ["q"], list("abc"))["q"]) == ["a", "c", "b"]
    with pytest.raises(ImportError, match="faiss-cpu or faiss-gpu, or use backend='torch'"):
        retrieve.search(eye, eye, list("xyz"), list("abc"), backend="faiss")


def test_faiss_is_imported_only_where_it_is_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    eye = np.eye(3, dtype=np.float32)
    retrieve.search(eye, eye, list("xyz"), list("abc"), backend="torch")
    assert "faiss" not in sys.modules and not hasattr(retrieve, "faiss")


# ---------------------------------------------------------------- rank, evaluate

def task(name="toy", **changes):
    fields = dict(documents={"a": "red fox", "b": "owl " * 60, "c": "green hen"}, queries={"1": "fox", "2": "hen"},
                  qrels={"1": {"a": 1}, "2": {"c": 1}})
    return SimpleNamespace(name=name, **(fields | changes))


def test_rank_embeds_shared_texts_once_and_counts_the_truncated_of_each_task(tiny, tokenizer):
    encoder = retrieve.Encoder(tiny(), tokenizer, truncate=True)
    seen = []
    encode = encoder.encode
    encoder.encode = lambda texts, *arguments, **options: seen.append(len(texts)) or encode(texts, *arguments, **options)
    first, second = task(), task("other", documents={"z": "owl " * 60, "y": "red fox"}, queries={"1": "fox"})
    ranked = retrieve.rank(encoder, [first, second], show_progress=False)
    assert seen == [3, 2, 1]                                               # three distinct texts, then each task's queries
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
        retrieve.rank(retrieve.Encoder(tiny(), tokenizer), [task(queries={"1": "fox", "2": " \n"})])


def test_a_document_that_is_the_query_is_left_out_unless_it_is_an_answer(tiny, tokenizer):
    run = {"1": {"1": 3.0, "a": 2.0, "b": 1.0}, "2": {"2": 3.0, "a": 2.0}}
    assert retrieve.without_itself(run, {"1": {"a": 1}, "2": {"2": 1}}, k=2) == {"1": {"a": 2.0, "b": 1.0}, "2": {"2": 3.0, "a": 2.0}}
    same = task(documents={"1": "red fox", "a": "red fox", "b": "hen"}, queries={"1": "red fox"}, qrels={"1": {"a": 1}})
    ranked, _ = retrieve.rank(retrieve.Encoder(tiny(), tokenizer), [same], show_progress=False, k=2)["toy"]
    assert list(ranked["1"]) == ["a", "b"]


def test_documents_that_bm25_reads_in_part_are_counted(tokenizer):
    assert [retrieve.longer_than(task(), n, tokenizer) for n in (None, 1, 2, 59, 60)] == [0, 3, 1, 1, 0]


def test_evaluate_reports_mean_interval_and_counts():
    run = {"1": {"a": 1.0, "b": 0.5}, "2": {"a": 1.0, "c": 0.5}}
    scores = retrieve.evaluate(task(), run)
    assert scores["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2, abs=1e-6)
    assert scores["low"] <= scores["ndcg@10"] <= scores["high"]
    assert (scores["queries"], scores["documents"]) == (2, 3)
    assert (scores["recall@100"], scores["mrr@10"], scores["precision@10"], scores["map"]) == (1, 0.75, 0.1, 0.75)
    assert scores["missing"] == 0 and "ties" not in scores
    some = retrieve.evaluate(task(), {"2": {"a": 1.0, "c": 1.0}})
    assert some["missing"] == 1 and some["ties"] == pytest.approx([1 / math.log2(3) / 2, 0.5], abs=1e-6)
    json.dumps(scores)


# ---------------------------------------------------------------- BM25

def test_bm25_by_hand():
    """Lucene's form: idf = ln(1 + (N - n + .5) / (n + .5)), tf part = f / (f + 1.2 (.25 + .75 |d| / mean|d|))."""
    documents = {"a": "fox fox hen", "b": "Hen!", "c": "owl owl owl owl"}
    run = retrieve.bm25(documents, {"q": "the FOX, hen", "r": "hen hen", "s": "wolf"})
    length = (3 + 1 + 4) / 3
    idf = lambda n: math.log(1 + (3 - n + 0.5) / (n + 0.5))
    part = lambda f, words: f / (f + 1.2 * (0.25 + 0.75 * words / length))
    assert run["q"] == pytest.approx({"a": idf(1) * part(2, 3) + idf(2) * part(1, 3), "b": idf(2) * part(1, 1)}, rel=1e-5)
    assert run["r"] == pytest.approx({"b": 2 * idf(2) * part(1, 1), "a": 2 * idf(2) * part(1, 3)}, rel=1e-5)
    assert list(run["r"]) == ["b", "a"]
    assert run["s"] == {}


def test_bm25_reads_scripts_without_spaces_by_pairs_of_characters():
    assert retrieve.words("The red Füchsin, 红狐狸 and 猫! ひらがなABC") == ["red", "füchsin", "红狐", "狐狸", "猫", "ひら", "らが", "がな", "abc"]
    assert retrieve.words("ПРИВЕТ мир") == ["привет", "мир"]
    assert retrieve.first_words("红狐狸在夜里 red fox", 3) == "红狐狸在夜里" and retrieve.first_words("red 红狐狸 fox", 3) == "red 红狐狸" and retrieve.first_words("a red fox", 2) == "a red"
    documents = {"a": "一只红狐狸在夜里奔跑", "b": "绿色的母鸡睡觉", "c": "猫头鹰"}
    assert list(retrieve.bm25(documents, {"q": "红狐狸"})["q"]) == ["a"] and list(retrieve.bm25(documents, {"q": "母鸡"})["q"]) == ["b"]


def test_bm25_reads_only_the_first_words():
    documents = {"a": "the red fox, the owl", "b": "owl by night"}
    assert retrieve.bm25(documents, {"q": "owl"})["q"].keys() == {"a", "b"}
    assert retrieve.bm25(documents, {"q": "owl"}, first_tokens=4)["q"].keys() == {"b"}
    assert retrieve.bm25(documents, {"q": "owl"}, first_tokens=5)["q"].keys() == {"a", "b"}
    assert retrieve.bm25(documents, {"q": "fox"}, first_tokens=2)["q"] == {}
    # a cut document is a shorter document: the same run as on the texts cut by hand
    cut = {"a": "the red fox", "b": "owl by night"}
    assert retrieve.bm25(documents, {"q": "fox night"}, first_tokens=3) == retrieve.bm25(cut, {"q": "fox night"})


def test_bm25_reads_only_the_first_pieces_of_a_tokenizer(tokenizer):
    documents = {"a": "unbelievable red fox", "b": "red fox unbelievable"}     # un ##believ ##able red fox
    run = lambda n: {qid: set(found) for qid, found in retrieve.bm25(documents, {"q": "fox", "r": "unbelievable"}, n, tokenizer).items()}
    assert run(5) == {"q": {"a", "b"}, "r": {"a", "b"}}
    assert run(4) == {"q": {"b"}, "r": {"a"}}                                  # b ends in "unbeliev", which is another word
    assert run(1) == {"q": set(), "r": set()}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("red fox\n\tun🦊.-é红\ud800"), max_size=80), times=st.integers(1, 12), n=st.integers(1, 9))
def test_the_first_pieces_are_those_of_the_whole_text(tokenizer, text, times, n):
    text = text * times
    part = retrieve.first_words(text, n, tokenizer)
    assert retrieve.encodable(text).startswith(part)
    offsets = tokenizer(retrieve.encodable(text), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(part) == (offsets[:n][-1][1] if offsets else 0)


def test_bm25_keeps_the_k_best_and_breaks_ties_by_id():
    documents = {f"d{i}": "fox hen" for i in range(9)} | {"best": "fox"}
    run = retrieve.bm25(documents, {"q": "fox"}, k=4)["q"]
    assert list(run) == ["best", "d8", "d7", "d6"] == metrics.ranking(run)


def test_bm25_of_wordless_documents_finds_nothing():
    assert retrieve.bm25({"a": "...", "b": ""}, {"q": "fox"}) == {"q": {}}
    assert retrieve.bm25({"a": "fox", "b": ""}, {"q": "fox"})["q"].keys() == {"a"}
    assert retrieve.bm25({"a": "fox"}, {"q": "the of ?"}) == {"q": {}}


def test_bm25_refuses_what_it_cannot_search():
    with pytest.raises(ValueError, match="no documents"):
        retrieve.bm25({}, {"q": "fox"})
    with pytest.raises(ValueError, match="query q is empty"):
        retrieve.bm25({"a": "fox"}, {"p": "fox", "q": "  "})
    with pytest.raises(TypeError, match="document b is NoneType"):
        retrieve.bm25({"a": "fox", "b": None}, {"q": "fox"})
    with pytest.raises(TypeError, match="query q is float"):
        retrieve.bm25({"a": "fox"}, {"q": math.nan})
    for options in (dict(first_tokens=0), dict(k=0)):
        with pytest.raises(ValueError, match="count from 1"):
            retrieve.bm25({"a": "fox"}, {"q": "fox"}, **options)


# ---------------------------------------------------------------- run files

ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=st.dictionaries(ids, st.dictionaries(ids, st.floats(-2.0**100, 2.0**100, width=32), min_size=1, max_size=4), max_size=4))
def test_any_run_survives_its_file(tmp_path, run):
    """Ids with spaces, quotes, line ends or nothing in them; scores bit for bit."""
    retrieve.write_run(run, tmp_path / "run.trec")
    assert retrieve.read_run(tmp_path / "run.trec") == run


def test_a_run_file_is_what_trec_eval_reads(tmp_path):
    run = {"q1": {"b": 0.1, "a": 2.0, "c": 0.1}, "q2": {}}
    retrieve.write_run(run, tmp_path / "deep" / "run.trec", tag="opl")
    assert (tmp_path / "deep" / "run.trec").read_text() == "q1 Q0 a 1 2.0 opl\nq1 Q0 c 2 0.1 opl\nq1 Q0 b 3 0.1 opl\n"
    assert retrieve.read_run(tmp_path / "deep" / "run.trec") == {"q1": {"a": 2.0, "b": float(np.float32(0.1)), "c": float(np.float32(0.1))}}
    (tmp_path / "theirs").write_text("7\tQ0\tdoc-1\t1\t12.5\tindri\n7 Q0  doc-2  2  11  indri")
    assert retrieve.read_run(tmp_path / "theirs") == {"7": {"doc-1": 12.5, "doc-2": 11.0}}


def test_only_the_k_best_are_written(tmp_path):
    retrieve.write_run({"q": {"a": 1.0, "b": 2.0, "c": 1.0}}, tmp_path / "run", k=2)
    assert list(retrieve.read_run(tmp_path / "run")["q"]) == ["b", "c"]


def test_scores_survive_so_that_the_metric_can_be_recomputed(tmp_path):
    rng = np.random.default_rng(0)
    documents, queries = (rng.standard_normal((n, 8)).astype(np.float32) for n in (60, 9))
    qids, pids = [f"q{i}" for i in range(9)], [f"d{i}" for i in range(60)]
    run = retrieve.search(queries, documents, qids, pids)
    retrieve.write_run(run, tmp_path / "run")
    qrels = {qid: {pid: 1} for qid, pid in zip(qids, pids)}
    assert metrics.ndcg(retrieve.read_run(tmp_path / "run"), qrels, per_query=True) == metrics.ndcg(run, qrels, per_query=True)


@pytest.mark.parametrize("line, reason", [
    ("q Q0 b 2 0.5", "six fields.* got 5"), ("q Q0 b 2 0.5 tag more", "six fields.* got 7"), ("", "six fields.* got 0"),
    ("q Q0 b 2 high tag", "high"), ("q Q0 b 2 nan tag", "the score is nan"), ("q Q0 b 2 -inf tag", "the score is -inf"),
    ("q Q0 a 2 0.5 tag", "query q ranks a twice"), ('"q\\x" Q0 b 2 0.5 tag', "escape")])
def test_a_corrupt_line_is_refused_by_file_and_number(tmp_path, line, reason):
    (tmp_path / "run.trec").write_text(f"q Q0 a 1 1.0 tag\n{line}\nq Q0 z 3 0.1 tag\n")
    with pytest.raises(ValueError, match=f"run.trec:2: .*{reason}"):
        retrieve.read_run(tmp_path / "run.trec")


def test_what_trec_eval_could_not_read_is_not_written(tmp_path):
    for run, options in (({"q": {"a": math.nan}}, {}), ({"q": {"a": 1e300}}, {}), ({}, dict(tag="two words"))):
        with pytest.raises(ValueError), np.errstate(over="ignore"):
            retrieve.write_run(run, tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission_names_the_file(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="run.trec"):
            retrieve.write_run({"q": {"a": 1.0}}, tmp_path / "run.trec")
    finally:
        tmp_path.chmod(0o700)
