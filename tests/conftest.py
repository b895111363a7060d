"""What several test files share: tests read small and run on two cores."""

import builtins
import importlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import lib
from lib.kernels import gpu, gpu_mlp
from lib.model.m2bert import M2BertConfig, M2BertForRetrieval, M2BertModel

ROOT = Path(__file__).parents[1]
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several processes share the cores
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "red",
    "green",
    "blue",
    "fox",
    "hen",
    "owl",
    "runs",
    "sleeps",
    "the",
    "by",
    "night",
    "day",
    "un",
    "##believ",
    "##able",
    "##s",
]


@pytest.fixture
def golden():
    """golden(name): the arrays of tests/golden/<name>.npz as tensors."""

    def arrays(name: str) -> dict[str, torch.Tensor]:
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
            return {
                key: torch.from_numpy(file[key])
                for key in file.files
                if file[key].dtype.kind != "U"
            }

    return arrays


@pytest.fixture(scope="session")
def tokenizer():
    """WordPiece over sixteen words and every letter: nothing to train, nothing to fetch."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    endings = ["##" + letter for letter in letters if letter != "s"]  # "##s" is in WORDS
    pieces = SPECIAL + WORDS + list(letters) + endings
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer, model.decoder = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=model, **names)


@pytest.fixture
def tiny(tokenizer):
    """tiny(architecture, **changes): a model of width 16 off its initial values (many are zero)."""

    def build(architecture=M2BertForRetrieval, **changes):
        torch.manual_seed(0)
        sizes = dict(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            intermediate_size=32,
            max_position_embeddings=32,
            filter_order=8,
            pooling="mean",
        )
        model = architecture(M2BertConfig(**(sizes | changes))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def unlearned():
    """unlearned(config): the weights of an encoder's layers without a gradient at the third step.

    What starts at zero has a gradient at once, or after a step of the others.
    """

    def names(config) -> list[str]:
        torch.manual_seed(0)
        model = M2BertModel(config).train()
        ids, optimizer = torch.randint(1, 50, (4, 32)), torch.optim.SGD(model.parameters(), lr=0.1)
        target = torch.randn(4, 32, config.hidden_size)
        for _ in range(3):
            optimizer.zero_grad()
            ((model(ids).last_hidden_state - target) ** 2).sum().backward()
            optimizer.step()
        return [name for name, p in model.layers.named_parameters() if not p.grad.any()]

    return names


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository folder with the project's design, and the working directory in it."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def task_files():
    """task_files(folder, documents, queries, …): write rows in LoCoV1's columns, return the folder.

    The files have one layout: parquet, jsonl or beir. For beir, answer_pids may be {pid: grade}, a
    document may have a title, and a query without answers is in queries.jsonl alone.
    """

    def lines(path: Path, rows) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        )

    def write(
        folder: Path,
        documents: list[dict],
        queries: list[dict],
        evidence: list[dict] | None = None,
        layout: str = "parquet",
        split: str = "test",
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        kinds = {
            kind: rows
            for kind, rows in (
                ("documents", documents),
                ("queries", queries),
                ("evidence", evidence),
            )
            if rows is not None
        }
        if layout == "beir":
            lines(
                folder / "corpus.jsonl",
                [
                    {
                        "_id": row["pid"],
                        "title": row.get("title", ""),
                        "text": row["passage"],
                        "metadata": {},
                    }
                    for row in documents
                ],
            )
            lines(
                folder / "queries.jsonl",
                [{"_id": row["qid"], "text": row["query"]} for row in queries],
            )
            judged = [
                (row["qid"], pid, gain)
                for row in queries
                for pid, gain in (
                    row["answer_pids"]
                    if isinstance(row["answer_pids"], dict)
                    else dict.fromkeys(row["answer_pids"], 1)
                ).items()
            ]
            (folder / "qrels").mkdir(exist_ok=True)
            (folder / "qrels" / f"{split}.tsv").write_text(
                "".join(
                    "\t".join(map(str, line)) + "\n"
                    for line in [("query-id", "corpus-id", "score"), *judged]
                ),
                encoding="utf-8",
            )
        for kind, rows in kinds.items():
            if layout == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), folder / f"{kind}-{split}.parquet")
            elif layout == "jsonl":
                for name in {row["dataset"] for row in rows}:
                    lines(
                        folder / kind / f"{name}_{split}.jsonl",
                        [row for row in rows if row["dataset"] == name],
                    )
        return folder

    return write


@pytest.fixture
def no_faiss(monkeypatch):
    """Importing faiss fails, as where it is not installed."""
    original = builtins.__import__
    monkeypatch.delitem(sys.modules, "faiss", raising=False)

    def absent(name, *arguments, **options):
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name resolves and nothing is cached; lists of the names asked for and seconds waited."""
    import datasets
    import huggingface_hub

    asked, waited = [], []

    def getaddrinfo(host, *args, **options):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return asked, waited


@pytest.fixture(scope="module")
def interpreter():
    """lib/kernels/triton_kernels.py as Python, for one file of tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("LOCO_NATIVE", "1")
        patch.delitem(sys.modules, "lib.kernels.triton_kernels", raising=False)
        kernels, runtime = (
            importlib.import_module("lib.kernels.triton_kernels"),
            importlib.import_module("triton.runtime.interpreter"),
        )
        scope = runtime._patch_lang(
            kernels.mix.fn
        )  # it would go through the whole language at each call of a function
        patch.setattr(
            runtime, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None)
        )
        yield
        scope.restore()
    sys.modules.pop("lib.kernels.triton_kernels", None)
    del lib.kernels.triton_kernels
    gpu.is_supported.cache_clear()
    gpu_mlp.program.cache_clear()
    gpu_mlp.gate_is_supported.cache_clear()
