"""An encoder that starts from word vectors is the weighted bag that its formula says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel

from lib.model import word_vectors
from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM, M2BertForRetrieval, neutral
from lib.model.tokens import load_tokenizer
from lib.model.word_vectors import WordVectorError

V, SPECIAL = 60, [0, 1, 2, 3, 4]
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(V, 20)) * RNG.gamma(2.0, size=(V, 1))
FREQUENCIES = RNG.integers(0, 10**6, size=V) * (RNG.random(V) < 0.8)


def config(vocab_size: int, D: int = 32) -> M2BertConfig:
    sizes = dict(vocab_size=vocab_size, hidden_size=D, num_hidden_layers=1, intermediate_size=2 * D)
    more = dict(max_position_embeddings=64, filter_order=8, pooling="mean")
    return M2BertConfig(**sizes, **more, initialization="identity")


def started(architecture=M2BertForRetrieval, weights: str = "sif", vocab_size: int = V):
    torch.manual_seed(0)
    model = architecture(config(vocab_size=vocab_size)).eval()
    word_vectors.start(model, VECTORS, FREQUENCIES, SPECIAL, weights)
    return model


def weight() -> np.ndarray:
    w = 1e-4 / (1e-4 + FREQUENCIES / FREQUENCIES.sum())
    w[SPECIAL] = 0
    return w


@settings(deadline=None, max_examples=30)
@given(D=st.integers(8, 40), k=st.integers(1, 50), seed=st.integers(0, 99))
def test_rows_have_one_norm_and_say_how_much_a_word_counts(D, k, seed):
    rng = np.random.default_rng(seed)
    vectors, p, w = rng.normal(size=(V, k)), rng.dirichlet(np.ones(V)), rng.random(V)
    w[SPECIAL] = 0
    rows = word_vectors.table(vectors, p, w, D) / word_vectors.DEVIATION
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose((rows**2).mean(axis=1), 1, atol=1e-6)
    c = neutral(D).double().numpy()
    np.testing.assert_allclose(rows[SPECIAL], np.tile(math.sqrt(D) * c, (5, 1)), atol=1e-5)
    if k <= D - 2:  # nothing is reduced: cosines of words are those of the centred vectors
        e = vectors - (p * w) @ vectors / (p * w).sum()
        size, inside = np.linalg.norm(e, axis=1), rows - rows @ np.outer(c, c)
        s = np.minimum(1, w * size / np.quantile(w * size, 0.999))
        expected = D * (s / size)[:, None] * (e @ e.T) * (s / size)
        np.testing.assert_allclose(inside @ inside.T, expected, atol=1e-4)


@pytest.mark.parametrize("own", [0.25, 0.5, 1.0])
def test_a_share_of_a_words_direction_is_its_own(own):
    rng, D = np.random.default_rng(0), 512
    vectors, p = rng.normal(size=(V, 20)), np.full(V, 1 / V)
    vectors[7] = vectors[6]
    rows = word_vectors.table(vectors, p, np.ones(V), D, own)
    plain = word_vectors.table(vectors, p, np.ones(V), D)
    c = neutral(D).double().numpy()
    inside = [table - table @ np.outer(c, c) for table in (rows, plain)]
    sizes = [np.linalg.norm(table, axis=1) for table in inside]
    np.testing.assert_allclose(*sizes, rtol=1e-6)  # words count as much as before
    assert inside[0][6] @ inside[0][7] / sizes[0][6] ** 2 == pytest.approx(1 - own, abs=0.1)


@torch.no_grad()
def test_an_embedding_is_the_weighted_bag_of_its_words():
    model, w, p = started(), weight(), FREQUENCIES / FREQUENCIES.sum()
    e = VECTORS - (p * w) @ VECTORS / (p * w).sum()
    size = np.linalg.norm(e, axis=1)
    s = np.minimum(1, w * size / np.quantile(w * size, 0.999))
    texts = RNG.integers(5, V, size=(12, 40))
    texts[:, 0], texts[:, -1] = 2, 3
    bags = (s[texts] / size[texts])[..., None] * e[texts]
    bags = bags.mean(axis=1) @ bags.mean(axis=1).T
    found = model(torch.from_numpy(texts)).pooler_output.double().numpy()
    found = np.arctanh(found) / 0.3  # tanh is nearly, not quite, linear
    np.testing.assert_allclose(found @ found.T, 32 * bags, atol=1e-4)


def test_each_source_gives_an_equal_part_of_the_sample(tokenizer):
    fox, owl = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("fox", "owl"))
    sources = [{"a": ["fox"] * 50}, {"b": ["owl"] * 50}]
    for sample, each in ((20, 10), (1_000, 50)):
        counts = word_vectors.frequencies(sources, tokenizer, sample)
        assert counts.shape == (len(tokenizer),) and counts.dtype == np.int64
        assert (counts[fox] == each).all() and (counts[owl] == each).all()
        assert counts.sum() == each * (len(fox) + len(owl))


def test_without_weights_frequent_words_count_like_rare_ones():
    norms = []
    for weights in ("sif", "none"):
        rows = started(weights=weights).get_input_embeddings().weight.detach()[5:]
        norms.append((rows - torch.outer(rows @ neutral(32), neutral(32))).norm(dim=1) / 0.02)
    frequent = torch.from_numpy(FREQUENCIES[5:] > np.median(FREQUENCIES))
    assert norms[0][frequent].mean() < 0.3 * norms[0][~frequent].mean()
    assert norms[1][frequent].mean() > 0.5 * norms[1][~frequent].mean()


def test_the_head_begins_better_than_blind():
    model = started(M2BertForMaskedLM, vocab_size=64)
    share = FREQUENCIES[5:] / FREQUENCIES[5:].sum()
    texts = torch.from_numpy(np.random.default_rng(1).choice(np.arange(5, V), (8, 64), p=share))
    with torch.no_grad():
        loss = model(texts, labels=texts).loss
        model.decoder.bias.zero_()
        blind = model(texts, labels=texts).loss
    assert loss < math.log(V) - 0.1  # the frequencies are known
    assert blind < math.log(V) + 0.5  # and no logit is sure of something wrong


def test_padding_and_unused_rows_stay_zero():
    words = started(vocab_size=64).get_input_embeddings().weight
    assert not words[0].any() and not words[V:].any() and words[V - 1].any()


def test_a_berts_vectors_are_what_its_first_layer_reads(tmp_path, tokenizer):
    torch.manual_seed(0)
    n = len(tokenizer)
    sizes = dict(vocab_size=n, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = BertModel(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=8)).eval()
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vectors = word_vectors.read(str(tmp_path), load_tokenizer(tmp_path))
    table = bert.embeddings
    with torch.no_grad():
        table.position_embeddings.weight[:] = table.position_embeddings.weight.mean(dim=0)
        expected = table(torch.arange(n)[:, None])[:, 0]
    np.testing.assert_allclose(vectors, expected.double().numpy(), atol=1e-6)
    other = type(tokenizer)(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0})))
    with pytest.raises(WordVectorError, match="of another tokenizer .*: set data.<profile>.token"):
        word_vectors.read(str(tmp_path), other)


def test_a_model_that_is_not_there_is_named(tmp_path, tokenizer):
    with pytest.raises(WordVectorError, match="'no_such_model' is not installed: pip install"):
        word_vectors.read("package:no_such_model", tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WordVectorError, match="word vectors of .*: an id of the hub, or a folder"):
        word_vectors.read(str(tmp_path), load_tokenizer(tmp_path))
