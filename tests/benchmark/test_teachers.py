"""Teachers: a row's encoder, and the vectors of a baseline that are kept."""

import json

import lmdb
import numpy as np
import pytest
import torch
from torch import nn

from lib.benchmark import rankers, teachers
from lib.benchmark.encoder import Encoder
from lib.benchmark.hosted import HostedError
from lib.model import checkpoint
from lib.pipeline import params

WINDOWS = {"model": "some/model", "chunk": "mean", "window": 4}
TEXTS = ["the red fox runs by night and the owl sleeps", "green hen", "green hen"]


class Model(nn.Module):
    """What `rankers` uses of a sentence-transformers model; the mean of its words' vectors."""

    max_seq_length, prompts = 32, {}

    def __init__(self, tokenizer):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.tokenizer = nn.Embedding(len(tokenizer), 6), tokenizer

    def __getitem__(self, i):
        return self

    @torch.no_grad()
    def encode_document(self, texts, **options):
        ids = self.tokenizer(texts)["input_ids"]
        vectors = torch.stack([self.words(torch.tensor(row)).mean(dim=0) for row in ids])
        return nn.functional.normalize(vectors).numpy()

    encode_query = encode_document


@pytest.fixture(autouse=True)
def model(monkeypatch, tokenizer):
    """The model of every row, without the library that reads it from a folder."""
    monkeypatch.setattr(rankers, "load_model", lambda *_: Model(tokenizer))
    return Model(tokenizer)


@pytest.fixture
def design(house):
    """The project's design with a teacher that reads windows, in the working directory."""
    text = (house / "params.yaml").read_text(encoding="utf-8")
    model = "{model: some/model, chunk: mean, window: 4}"
    text = text.replace("\nteachers: {}\n", "\nteachers: {windows: {}}\n")
    text = text.replace("\nbaselines:\n", f"\nbaselines:\n  windows: {model}\n")
    (house / "params.yaml").write_text(text, encoding="utf-8")
    return params.load()


def counted(encoder) -> list[str]:
    """The texts that a teacher's model is given from now on."""
    asked, cache = [], encoder.documents.__self__
    own = cache.encoder.encode
    cache.encoder.encode = lambda texts, *options: asked.extend(texts) or own(texts, *options)
    return asked


def test_vectors_are_kept_and_a_damaged_one_is_computed_again(tmp_path):
    plain, _ = rankers.sentence_transformer(WINDOWS).encode_documents(TEXTS, show_progress=False)
    first = rankers.sentence_transformer(WINDOWS, "cpu", tmp_path)
    asked = counted(first)
    vectors, owner = first.encode_documents(TEXTS, show_progress=False)
    assert owner.tolist() == [0, 1, 2] and len(asked) == 4  # three windows, and one text
    np.testing.assert_allclose(vectors, plain, atol=1e-6)
    again = rankers.sentence_transformer(WINDOWS, "cpu", tmp_path)
    asked = counted(again)
    np.testing.assert_array_equal(again.encode_documents(TEXTS, show_progress=False)[0], vectors)
    assert asked == []
    # Another text shares the windows that it has in common.
    again.encode_documents(["the red fox runs hen"], show_progress=False)
    assert asked == ["hen"]
    path = again.documents.__self__.path
    with lmdb.open(str(path), subdir=False) as file, file.begin(write=True) as transaction:
        key, value = next(iter(transaction.cursor()))
        transaction.put(key, value[:-1] + bytes([value[-1] ^ 1]))
    repaired = rankers.sentence_transformer(WINDOWS, "cpu", tmp_path)
    asked = counted(repaired)
    texts = [*TEXTS, "the red fox runs hen"]
    whole = repaired.encode_documents(texts, show_progress=False)[0]
    assert len(asked) == 1
    np.testing.assert_allclose(whole[:3], vectors, atol=1e-6)


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path):
    teacher = rankers.sentence_transformer(WINDOWS, "cpu", tmp_path)
    teacher.encode_documents(TEXTS, show_progress=False)
    path = teacher.documents.__self__.path
    path.write_bytes(b"\0" * 8192)
    with pytest.raises(HostedError, match=f"{path} is damaged .*: delete it"):
        rankers.sentence_transformer(WINDOWS, "cpu", tmp_path)


def test_a_model_with_other_weights_or_another_length_has_another_fingerprint(model):
    before = rankers.fingerprint(model)
    assert before == rankers.fingerprint(model)
    model.max_seq_length = 128
    shorter = rankers.fingerprint(model)
    next(model.parameters()).data.view(-1)[0] += 1e-3
    assert len({before, shorter, rankers.fingerprint(model)}) == 3


def test_a_row_is_a_retriever_trained_here_or_a_baseline_that_is_a_teacher(
    design, house, tiny, tokenizer
):
    folder = teachers.describe("laptop", "windows")
    content = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
    assert content["settings"]["window"] == 4 and len(content["fingerprint"]) == 64
    teacher = teachers.of("laptop", "windows")
    vectors, _ = teacher.encode_documents(TEXTS, show_progress=False)
    assert vectors.shape == (3, 6) and list((house / "data" / "embeddings").glob("*.lmdb"))
    about = {"stage": "finetune", "row": "reads_128", "profile": "laptop", "settings": {}}
    checkpoint.save(tiny(), tokenizer, house / "data" / "models" / "reads_128", about, "")
    own = teachers.of("laptop", "reads_128")
    assert isinstance(own, Encoder) and own.encode_queries(["owl"]).shape == (1, 16)
    with pytest.raises(params.ParamsError, match="'bm25'"):
        teachers.of("laptop", "bm25")
