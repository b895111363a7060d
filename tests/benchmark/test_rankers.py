"""Rows of params.yaml become rankers, also of others' models, read as far as the row says."""

import importlib.machinery
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from lib.benchmark import rankers
from lib.benchmark.bm25 import Bm25
from lib.benchmark.hosted import HostedError
from lib.benchmark.rankers import ExternalEncoder, RankerError
from lib.model import places
from lib.pipeline import params

TEXT = "red fox runs by night the owl sleeps by day"  # ten tokens of the tests' tokenizer


def letters(texts: list[str]) -> np.ndarray:
    """How often each letter stands in a text, and 1: a model that adds up."""
    return np.array(
        [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] + [1] for text in texts],
        dtype=np.float32,
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def foreign(tokenizer, **options) -> ExternalEncoder:
    return ExternalEncoder(letters, letters, tokenizer, **options)


@pytest.mark.parametrize(
    "max_length, read",
    [
        (None, TEXT),
        (99, TEXT),
        (12, TEXT),
        (11, "red fox runs by night the owl sleeps by"),
        (3, "red"),
    ],
)
def test_the_first_tokens_are_read_and_what_is_left_is_counted(tokenizer, max_length, read):
    one = foreign(tokenizer, max_length=max_length)
    vectors, owner = one.encode_documents([TEXT, "hen"], show_progress=False)
    np.testing.assert_allclose(vectors, unit(letters([read, "hen"])), atol=1e-6)
    assert (
        owner.tolist() == [0, 1]
        and one.longer == [read != TEXT, False]
        and one.context_length == max_length
    )
    np.testing.assert_allclose(one.encode_queries([TEXT]), vectors[:1], atol=1e-6)


@pytest.mark.parametrize("chunk", ["mean", "max", "best"])
@pytest.mark.parametrize(
    "window, stride, parts",
    [
        (5, None, ["red fox runs by night", "the owl sleeps by day"]),
        (4, 3, ["red fox runs by", "by night the owl", "owl sleeps by day"]),
        (99, None, [TEXT]),
    ],
)
def test_windows_are_put_together_by_their_definition(tokenizer, chunk, window, stride, parts):
    one = foreign(tokenizer, chunk=chunk, window=window, stride=stride)
    vectors, owner = one.encode_documents(["hen", TEXT, ""], show_progress=False)
    windows = unit(letters(parts))
    expected = {
        "mean": unit(windows.mean(axis=0))[None],
        "max": unit(windows.max(axis=0))[None],
        "best": windows,
    }[chunk]
    np.testing.assert_allclose(vectors[1:-1], expected, atol=1e-6)
    np.testing.assert_allclose(vectors[[0, -1]], unit(letters(["hen", ""])), atol=1e-6)
    assert (
        owner.tolist() == [0, *[1] * len(expected), 2]
        and one.longer == [False, len(parts) > 1, False]
        and one.context_length is None
    )
    assert one.limited(5).context_length == 5 and one.limited(5).chunk is None


def test_a_prompt_takes_its_room(tokenizer):
    """Two specials and three of prompt leave five of ten, so that no window loses its end."""
    seen = []
    one = ExternalEncoder(
        lambda texts: seen.extend(texts) or letters(texts),
        letters,
        tokenizer,
        max_length=10,
        chunk="best",
        prompt="blue hen by",
    )
    one.encode_documents([TEXT], show_progress=False)
    assert sorted(seen) == ["red fox runs by night", "the owl sleeps by day"]


def test_a_model_is_given_each_text_once(tokenizer):
    seen = []
    one = ExternalEncoder(
        lambda texts: seen.extend(texts) or letters(texts), letters, tokenizer, max_length=4
    )
    vectors, _ = one.encode_documents(
        ["red fox", "hen", "red fox runs", "hen"], show_progress=False
    )
    assert sorted(seen) == ["hen", "red fox"]
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert one.encode_documents([], show_progress=False)[0].shape == (0, 0)


@pytest.mark.parametrize(
    "options, part",
    [
        (dict(max_length=2), "no room"),
        (dict(chunk="mean"), "needs `window`"),
        (dict(chunk="best", window=3, stride=4), "stride=4: from 1 to the window's 3 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(tokenizer, options, part):
    with pytest.raises(RankerError) as error:
        foreign(tokenizer, **options)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        lambda texts: letters(texts)[1:],
        lambda texts: letters(texts) * np.nan,
        lambda texts: np.zeros(len(texts)),
    ],
)
def test_vectors_are_checked_before_they_are_believed(tokenizer, answer):
    with pytest.raises(RankerError, match="2 texts gave vectors of shape"):
        ExternalEncoder(answer, letters, tokenizer).encode_documents(
            ["red", "fox"], show_progress=False
        )


# ------------------------------------------------------------------ rows


@pytest.fixture
def row(tmp_path, monkeypatch, tokenizer):
    """row(own): the ranker of a baseline with these keys."""
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rankers, "load_tokenizer", lambda source: tokenizer)
    design = params.load(params.Path(__file__).parents[2] / "params.yaml")
    monkeypatch.setattr(params, "load", lambda *_: design | {"baselines": design["baselines"]})

    def build(own):
        design["baselines"]["mine"] = own
        return rankers.of("laptop", "mine")

    return build


def test_without_a_model_a_row_counts_words(row):
    assert (
        isinstance(row({}), Bm25)
        and row({}).context_length is None
        and row({"first_tokens": 7}).context_length == 7
    )
    with pytest.raises(
        params.ParamsError,
        match="unknown row of retrievers, published or baselines 'bm52'; did you mean 'bm25'",
    ):
        rankers.of("laptop", "bm52")


@pytest.mark.parametrize("absent", ["openai", "lmdb"])
def test_without_the_packages_of_an_endpoint_one_line_says_how_to_get_them(
    row, monkeypatch, absent
):
    for package in ("openai", "lmdb"):
        monkeypatch.setitem(
            sys.modules,
            package,
            None
            if package == absent
            else sys.modules.get(package)
            or SimpleNamespace(DefaultHttpxClient=lambda **_: None, OpenAI=lambda **_: None),
        )
    with pytest.raises(
        HostedError,
        match=f"needs the package {absent} .*: `make interop` installs it, or `pip install",
    ) as error:
        row({"model": "m", "url": "https://example.org/v1"})
    assert "\n" not in str(error.value)


def test_the_form_of_an_endpoint_is_openais(monkeypatch):
    """A row from before says where Cohere's models are to be had in it."""
    text = (Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8")
    theirs = '\nbaselines:\n  theirs: {{model: embed-v4.0, url: "https://api.cohere.ai/compatibility/v1"{}}}\n'
    assert (
        params.read(text.replace("\nbaselines:\n", theirs.format("")), "params.yaml")["baselines"][
            "theirs"
        ]["model"]
        == "embed-v4.0"
    )
    for form in ("cohere", "openai"):
        with pytest.raises(
            params.ParamsError,
            match="baselines.theirs.form: .*leave the key out.*https://api.cohere.ai/compatibility/v1",
        ) as error:
            params.read(
                text.replace("\nbaselines:\n", theirs.format(f", form: {form}")), "params.yaml"
            )
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------ how much a model reads

SIZES = dict(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=20,
    pad_token_id=1,
)
OTHERS = {
    "luke": dict(entity_vocab_size=5, entity_emb_size=8),
    "xmod": dict(default_language="en_XX"),
    "esm": dict(position_embedding_type="absolute", token_dropout=False, mask_token_id=4),
    "distilbert": dict(dim=8, n_heads=2, n_layers=1, hidden_dim=8),
}


@pytest.mark.parametrize(
    "kind, places",
    [
        ("bert", 20),
        ("distilbert", 20),
        ("big_bird", 20),
        ("deberta-v2", 20),
        ("nystromformer", 20),
        *(
            (kind, 18)
            for kind in (
                "roberta",
                "xlm-roberta",
                "camembert",
                "mpnet",
                "xlm-roberta-xl",
                "roberta-prelayernorm",
                "data2vec-text",
                "xmod",
                "ibert",
                "luke",
                "esm",
            )
        ),
    ],
)
def test_a_model_reads_as_many_tokens_as_it_has_places_for(kind, places):
    """That many tokens pass, one more does not.

    If padding has a position of the table, the positions up to it are not for tokens.
    """
    model = AutoModel.from_config(
        AutoConfig.for_model(kind, **SIZES, **OTHERS.get(kind, {}))
    ).eval()
    assert rankers.positions([SimpleNamespace(auto_model=model)]) == places
    ids = torch.full((1, places + 1), 7)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids[:, 1:]).last_hidden_state).all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)


def test_what_says_nothing_of_places_has_no_limit():
    for config in (SimpleNamespace(), SimpleNamespace(max_position_embeddings=-1), None):
        assert (
            rankers.positions([SimpleNamespace(auto_model=SimpleNamespace(config=config))]) is None
        )
    assert rankers.positions([SimpleNamespace()]) is None


def test_a_packages_model_is_found_without_running_its_code(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    (package / "inside").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('I ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.machinery.PathFinder.invalidate_caches()
    with pytest.raises(RankerError, match="holds 0 sentence-transformers models"):
        places.of("package:some_model", RankerError)
    (package / "inside" / "modules.json").write_text("[]")
    assert places.of("package:some_model", RankerError) == package / "inside"
    for name in ("no_such_package", "../etc", "os.path"):
        with pytest.raises(RankerError, match="is not installed"):
            places.of(f"package:{name}", RankerError)
