"""The authors' weights become a row: fetched, checked, evaluated by the usual stages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from lib.benchmark import locov1, metrics, search
from lib.model import checkpoint, published
from lib.model.checkpoint import CheckpointError
from lib.pipeline import params
from lib.pipeline.errors import CorpusError
from lib.pipeline.params import ParamsError

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    "d1": "the red fox runs by night",
    "d2": "the green hen sleeps",
    "d3": "an owl by day",
    "d4": "blue owl owl owl " * 30,
}
QUERIES = {
    "q1": ("red fox", ["d1"]),
    "q2": ("hen sleeps", ["d2"]),
    "q3": ("blue owl", ["d4", "d3"]),
}


@pytest.fixture
def weights(golden, tokenizer, tmp_path):
    """A retrieval file as the authors wrote it, its tokenizer beside it."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    state = {
        name.removeprefix("param/"): value
        for name, value in golden("tiny_base").items()
        if name.startswith("param/bert.")
    }
    torch.save(state, folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def house(tmp_path, monkeypatch, weights):
    """house(row): a copy of the repository with this published row alone, as working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def build(row: dict) -> Path:
        root = tmp_path / "house"
        for name in (
            "lib",
            "notebooks",
            "data/paper",
            ".dvc/config",
            "dvc.yaml",
            ".dvcignore",
            "requirements.lock",
            "params.yaml",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, root / name)
        text = (root / "params.yaml").read_text(encoding="utf-8")
        (root / "params.yaml").write_text(
            text.replace(
                "published: &published {}", f"published: &published {json.dumps({'theirs': row})}"
            ),
            encoding="utf-8",
        )
        monkeypatch.chdir(root)
        return root

    return build


def test_a_published_row_is_evaluated_like_any_other(house, weights):
    root = house({"checkpoint": str(weights)})
    (root / "data" / "corpus").mkdir()
    pd.DataFrame(
        [dict(dataset="foxes", pid=pid, passage=text) for pid, text in DOCUMENTS.items()]
    ).to_parquet(root / "data/corpus/documents-test.parquet")
    pd.DataFrame(
        [
            dict(dataset="foxes", qid=qid, query=text, answer_pids=pids)
            for qid, (text, pids) in QUERIES.items()
        ]
    ).to_parquet(root / "data/corpus/queries-test.parquet")
    AutoTokenizer.from_pretrained(weights).save_pretrained(root / "data" / "corpus" / "tokenizer")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lib.pipeline",
            "repro",
            "-s",
            "strip",
            "published@theirs",
            "evaluate@theirs",
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    model, tokenizer = checkpoint.load(root / "data/models/theirs")
    assert model.config.pad_to_max_length and len(tokenizer) == 92
    task = locov1.load("foxes", root / "data/corpus")
    expected, _ = search.rank(
        search.Encoder(published.load_published(weights), tokenizer, truncate=True),
        [task],
        show_progress=False,
    )["foxes"]
    score = json.loads((root / "data/report/laptop/evaluate/theirs/metrics.json").read_text())
    assert score["reads_tokens"] == 64 and score["scores"]["all"]["foxes"]["truncated"] == 1
    assert score["scores"]["all"]["foxes"]["ndcg@10"] == pytest.approx(
        metrics.ndcg(expected, task.qrels), abs=1e-6
    )
    assert str(weights) in (root / "data/models/theirs/README.md").read_text()


def test_max_length_and_tokenizer_of_the_row_are_obeyed(house, weights, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    for path in weights.glob("tokenizer*"):
        path.rename(words / path.name)
    house(
        {
            "checkpoint": str(weights / "pytorch_model.bin"),
            "tokenizer": str(words),
            "max_length": 24,
        }
    )
    model, tokenizer = checkpoint.load(published.fetch("laptop", "theirs"))
    assert (
        model.config.max_position_embeddings,
        model.config.filter_length,
        tokenizer.model_max_length,
    ) == (24, 64, 24)


def test_what_cannot_be_a_row_is_one_line_and_leaves_no_folder(house, weights, golden, no_network):
    root = house({"checkpoint": str(weights)})

    def refused(kind, *parts):
        with pytest.raises(kind) as error:
            published.fetch("laptop", "theirs")
        assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), (
            error.value
        )
        assert not (root / "data" / "models" / "theirs").exists()

    with pytest.raises(
        ParamsError, match="unknown row of published at laptop 'their'; did you mean 'theirs'"
    ):
        published.fetch("laptop", "their")
    (weights / "tokenizer.json").rename(weights / "elsewhere.json")
    refused(CorpusError, "bert-base-uncased", "vocab.txt into a folder")
    words = [*(f"word{i}" for i in range(96)), "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (weights / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    refused(CheckpointError, "100 words", "its tokenizer 101", "`tokenizer` of the row")
    state = {
        name.removeprefix("param/"): value
        for name, value in golden("tiny_base").items()
        if name.startswith("param/") and "pooler" not in name
    }
    torch.save(state, weights / "pytorch_model.bin")
    (weights / "elsewhere.json").rename(weights / "tokenizer.json")
    refused(CheckpointError, str(weights), "has no pooler")
    (weights / "pytorch_model.bin").write_bytes(b"<html>")
    refused(CheckpointError, "pytorch_model.bin", "fetch it again")
    done = subprocess.run(
        [sys.executable, "-m", "lib.model.published", "laptop", "theirs"],
        text=True,
        capture_output=True,
    )
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and "pytorch_model.bin" in done.stderr
    )
    assert params.rows("laptop", "published") == {"theirs": {"checkpoint": str(weights)}}
