"""Vectors that depend on their text alone, of texts of any length and script."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.benchmark.encoder import Encoder
from lib.model import checkpoint, tokens

ROOT = Path(__file__).parents[2]
WORDS = "red green blue fox hen owl runs sleeps the by night day unbelievable foxes".split()


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=length)) for length in lengths]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_vector_depends_on_its_text_alone(tiny, tokenizer, pooling):
    encoder = Encoder(tiny(pooling=pooling), tokenizer, truncate=True)
    texts = texts_of([3, 40, 1, 12, 7, 29, 0, 18, 5, 5, 31])
    together = encoder.encode(texts, show_progress=False)
    assert together.dtype == np.float32 and together.shape == (11, 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for batch_size in (1, 3, 7):
        np.testing.assert_allclose(
            encoder.encode(texts, batch_size, show_progress=False), together, atol=1e-5
        )
    shuffled = np.random.default_rng(0).permutation(11)
    np.testing.assert_allclose(
        encoder.encode([texts[i] for i in shuffled], 4, show_progress=False),
        together[shuffled],
        atol=1e-5,
    )


def test_encode_is_the_models_embedding_normalised_or_not(tiny, tokenizer):
    model, texts = tiny(), ["red fox runs", "owl"]
    encoder = Encoder(model, tokenizer)
    raw = encoder.encode(texts, normalize=False, show_progress=False)
    with torch.no_grad():
        expected = model(
            **tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        ).pooler_output.numpy()
    np.testing.assert_allclose(raw, expected, atol=1e-5)
    np.testing.assert_allclose(
        encoder.encode(texts, show_progress=False),
        raw / np.linalg.norm(raw, axis=1, keepdims=True),
        atol=1e-6,
    )


def test_a_batch_never_exceeds_its_budget_of_tokens(tiny, tokenizer, monkeypatch):
    model, shapes = tiny(), []
    monkeypatch.setattr("lib.benchmark.encoder.BATCH_TOKENS", 40)
    encoder, texts = Encoder(model, tokenizer, truncate=True), texts_of([30, 2, 2, 2, 20, 8])
    engine = encoder.engine
    encoder.engine = lambda ids: shapes.append([len(row) for row in ids]) or engine(ids)
    fast = encoder.encode(texts, batch_size=3, show_progress=False)
    assert [sum(some) for some in shapes] == [
        32,
        38,
        14,
    ]  # nothing is padded, so tokens count, not texts
    shapes.clear()
    encoder.engine = None  # as on a GPU: the model itself, padded
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    np.testing.assert_allclose(
        encoder.encode(texts, batch_size=3, show_progress=False), fast, atol=1e-5
    )
    assert sum(rows for rows, _ in shapes) == 6
    assert all(rows <= 3 and (rows == 1 or rows * length <= 40) for rows, length in shapes)


def test_no_texts_keep_the_width(tiny, tokenizer):
    assert Encoder(tiny(), tokenizer).encode([], show_progress=False).shape == (0, 16)


def test_truncated_texts_are_counted_and_read_up_to_the_limit(tiny, tokenizer):
    encoder = Encoder(tiny(), tokenizer, max_length=8, truncate=True)
    texts = [
        "red " * 6,
        "red " * 7,
        "",
        "red " * 5000,
    ]  # with [CLS] and [SEP]: 8, 9, 2 and 5002 tokens
    vectors = encoder.encode(texts, show_progress=False)
    assert encoder.longer == [False, True, False, True]
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    np.testing.assert_allclose(vectors[3], vectors[0], atol=1e-6)
    encoder.encode(["red"], show_progress=False)
    assert not any(encoder.longer)  # of the last call


def test_an_encoder_reads_no_more_than_its_model(tiny, tokenizer):
    assert Encoder(tiny(), tokenizer, max_length=1000).max_length == 32
    assert Encoder(tiny(), tokenizer).max_length == 32
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        Encoder(tiny(), tokenizer, max_length=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "\x00\ufeff\u200d",
        "\ud800 fox",
        "🦊🦉",
        "مرحبا",
        "红狐狸",
        "e\u0301",
        "x" * 5000,
    ],
)
def test_odd_texts_give_unit_vectors(tiny, tokenizer, text):
    vectors = Encoder(tiny(), tokenizer).encode([text, "fox"], show_progress=False)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "odd, kind", [(None, "NoneType"), (1.5, "float"), (b"fox", "bytes"), (math.nan, "float")]
)
def test_what_is_no_text_is_named(tiny, tokenizer, odd, kind):
    encoder = Encoder(tiny(), tokenizer)
    with pytest.raises(TypeError, match=f"text 1 is {kind}, not str"):
        encoder.encode(["fox", odd], show_progress=False)
    with pytest.raises(
        TypeError, match="a list of texts, not one text"
    ):  # it would be read letter by letter
        encoder.encode("fox", show_progress=False)


ENORMOUS = {
    "a million words": "'red fox ' * 500_000",
    "a million characters of Chinese": "'红' * 1_000_000",
    "a million letters without a space": "'x' * 1_000_000",
}


@pytest.mark.parametrize("kind", ENORMOUS)
def test_an_enormous_text_takes_little_memory(tiny, tokenizer, tmp_path, kind):
    """In its own process: less than 300 MB above the peak of the libraries and one short text."""
    checkpoint.save(tiny(max_position_embeddings=8192), tokenizer, tmp_path / "model")
    code = f"""if True:
        import resource, sys
        from lib.model import checkpoint
        from lib.benchmark.encoder import Encoder
        encoder = Encoder(*checkpoint.load({str(tmp_path / "model")!r}), truncate=True)
        encoder.encode(["fox " * 9000], show_progress=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(encoder.encode([{ENORMOUS[kind]}], show_progress=False).shape)
        extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(extra * (1 if sys.platform == "darwin" else 1024))"""
    shape, extra = (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
        )
        .stdout.strip()
        .split("\n")
    )
    assert shape == "(1, 16)" and int(extra) < 300e6


# ---------------------------------------------------------------- texts longer than the model


def test_a_text_longer_than_the_model_needs_a_word_about_it(tiny, tokenizer):
    encoder = Encoder(tiny(), tokenizer)
    assert encoder.encode(["red " * 30], show_progress=False).shape == (
        1,
        16,
    )  # 32 tokens with [CLS] and [SEP]
    with pytest.raises(
        ValueError,
        match=r"text 1 is longer than 32 tokens \(2 of 4 are\): "
        r"truncate=True .* chunk='mean', 'max' or 'best' .*extend",
    ):
        encoder.encode(["fox", "red " * 31, "owl", "hen " * 99], show_progress=False)
    for wrong in (dict(chunk="median"), dict(chunk="mean", truncate=True)):
        with pytest.raises(ValueError, match="chunk="):
            Encoder(tiny(), tokenizer, **wrong)


@pytest.mark.parametrize("chunk", ["mean", "max"])
def test_a_chunked_text_is_the_mean_or_largest_of_its_windows(tiny, tokenizer, chunk):
    words = [
        word for word in texts_of([50])[0].split() if len(word) < 7 and word != "foxes"
    ]  # a token each
    pieces = [
        " ".join(words[:6]),
        " ".join(words[6:12]),
        " ".join(words[12:14]),
    ]  # 8 tokens with [CLS] and [SEP], 8 and 4
    encoder = Encoder(tiny(), tokenizer, max_length=8, chunk=chunk)
    texts = ["", " ".join(words[:14]), "red fox", " ".join(words[:6])]
    vectors = encoder.encode(texts, batch_size=2, normalize=False, show_progress=False)
    assert encoder.longer == [False, True, False, False]
    each = Encoder(tiny(), tokenizer).encode(
        [*pieces, "", "red fox"], normalize=False, show_progress=False
    )
    expected = each[:3].mean(axis=0) if chunk == "mean" else each[:3].max(axis=0)
    np.testing.assert_allclose(vectors, [each[3], expected, each[4], each[0]], atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(encoder.encode(texts, show_progress=False), axis=1), 1, atol=1e-6
    )
    assert encoder.encode([], show_progress=False).shape == (0, 16)


def test_best_keeps_a_vector_for_each_window(tiny, tokenizer):
    encoder = Encoder(tiny(), tokenizer, max_length=8, chunk="best", stride=3)
    texts = ["fox", "", "red fox runs by night " * 3]
    vectors, owner = encoder.encode_documents(texts, show_progress=False)
    assert owner.tolist() == [0, 1, 2, 2, 2, 2] and encoder.longer == [False, False, True]
    whole = Encoder(tiny(), tokenizer, max_length=8, truncate=True)
    words = texts[2].split()
    np.testing.assert_allclose(
        vectors[2:],
        whole.encode([" ".join(words[i : i + 6]) for i in (0, 3, 6, 9)], show_progress=False),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        encoder.encode_queries(texts), whole.encode(texts, show_progress=False), atol=1e-6
    )
    with pytest.raises(ValueError, match="text 2 has several windows"):
        encoder.encode(texts, show_progress=False)
    for stride in (0, 7):
        with pytest.raises(ValueError, match=f"stride={stride}: from 1 to the window's 6 tokens"):
            Encoder(tiny(), tokenizer, max_length=8, chunk="best", stride=stride)
    with pytest.raises(ValueError, match="windows need chunk="):
        Encoder(tiny(), tokenizer, stride=2)


def test_an_encoder_that_reads_less_is_the_same_encoder(tiny, tokenizer):
    encoder = Encoder(tiny(), tokenizer, max_length=20, chunk="mean")
    assert (
        encoder.context_length,
        encoder.limited(8).context_length,
        encoder.limited(99).context_length,
    ) == (None, 8, 20)
    np.testing.assert_array_equal(
        encoder.limited(8).encode(["fox " * 30], show_progress=False),
        Encoder(tiny(), tokenizer, 8, truncate=True).encode(["fox " * 30], show_progress=False),
    )


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(st.sampled_from("red fox\n\tun🦊.-é红한\ud800"), max_size=200),
    max_length=st.integers(3, 20),
)
def test_the_windows_of_a_text_hold_all_of_its_tokens_once(tiny, tokenizer, text, max_length):
    windows = Encoder(tiny(), tokenizer, max_length, chunk="mean").tokenize([text])[0]
    whole = tokenizer(tokens.encodable(text))["input_ids"]
    assert [token for window in windows for token in window[1:-1]] == whole[1:-1]
    assert all(
        len(window) <= max_length and (window[0], window[-1]) == (whole[0], whole[-1])
        for window in windows
    )


def test_an_encoder_says_what_it_lacks(tiny, tokenizer):
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        Encoder(tiny(max_position_embeddings=2), tokenizer, chunk="mean")
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        Encoder(tiny(), bare)
    assert Encoder(tiny(), tokenizer).encode(
        (text for text in ("fox", "hen")), show_progress=False
    ).shape == (2, 16)


def test_a_published_model_gets_batches_of_the_length_it_pads_to(tiny, tokenizer, monkeypatch):
    model, shapes = tiny(mask_padding=False, pad_to_max_length=True, pooling="cls"), []
    monkeypatch.setattr("lib.benchmark.encoder.BATCH_TOKENS", 100)
    texts, encoder = texts_of([3, 1, 9, 14, 4, 2, 2]), Encoder(model, tokenizer)
    engine = encoder.engine
    encoder.engine = lambda ids: shapes.append(len(ids)) or engine(ids)
    vectors = encoder.encode(texts, show_progress=False)
    assert shapes == [3, 3, 1]  # 32 tokens each
    encoder.engine = None
    np.testing.assert_allclose(encoder.encode(texts, show_progress=False), vectors, atol=1e-5)
    padded = tokenizer(
        texts, padding="max_length", max_length=32, return_tensors="pt", return_token_type_ids=False
    )
    model.config.pad_to_max_length = False
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**padded).pooler_output)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_an_embedding_that_is_not_finite_is_refused_by_index(tiny, tokenizer):
    model = tiny()
    with torch.no_grad():
        model.model.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("owl")] = (
            torch.nan
        )
    with pytest.raises(ValueError, match="text 1 is not finite .1 such."):
        Encoder(model, tokenizer).encode(["fox", "owl", "hen"], show_progress=False)


def test_the_beginning_is_read_whatever_the_tokenizers_file_says(tiny, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.truncation_side = "left"
    text = ["red fox owl hen runs by night the blue green day sleeps"]
    vectors = [
        Encoder(tiny(), one, 6, truncate=True).encode(text, show_progress=False)
        for one in (tokenizer, other)
    ]
    np.testing.assert_array_equal(*vectors)
