"""A start that retrieves before it is trained: another model's word vectors, as a weighted bag.

    read(model, tokenizer)                    the word vectors of a sentence-transformers model
    frequencies(sources, tokenizer)           how often each token stands in the training text
    start(encoder, vectors, frequencies, …)   put them into an M2-BERT, in place

An M2-BERT normalises every token, so all tokens count alike in its mean, "the" as much as a name.
The weight of a word is therefore put into its direction. With w = a / (a + p(word)) the weight of
smooth inverse frequency (Arora et al. 2017), p the word's share of the tokens, and e its vector:

    e <- rotated by principal components into D - 2 dimensions, orthogonal to 1 and to c
    s  = min(1, w |e| / q),  q the 99.9 % quantile of w |e|;  s = 0 for special tokens
    row = 0.02 sqrt(D) (s e / |e| + sqrt(1 - s²) c)

Each row has mean 0 and one norm, so LayerNorm only scales it; with layers that are the identity,
mean pooling adds up s e / |e|, and the pooler drops c and is nearly linear
(`m2bert.start_at_identity`). The mixer can turn what lies in a direction: it may learn to weigh a
word by its neighbours. The factor 0.02 is the standard deviation of untrained embeddings: a
learning rate then moves both as fast, and the logits of the head, which shares the table, are as
small. With rows of norm sqrt(D), 400,000 tokens of pretraining taught nothing.

Before that, the mean of e is taken off, each word counted as often as it contributes, p w: it is
what all documents have in common.

Words of one meaning share a direction, so a bag cannot ask for one of them alone, as BM25 does.
With `own` = o, e / |e| is replaced by the direction of sqrt(1 - o) e / |e| + sqrt(o) g, g a random
direction of each word: random directions are nearly orthogonal, the more so the larger D.

Axes: V words, D width of the encoder, D0 of the vectors.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from lib.model import places, token_rows
from lib.model.m2bert import neutral
from lib.model.tokens import given_tokenizer, tokenize
from lib.pipeline.errors import WorkbenchError, require

SMOOTHING = 1e-4  # a
SAMPLE = 1_000_000  # tokens of the training text that are counted
QUANTILE = 0.999
# The last names of embedding tables: BERT and its family, ModernBERT, decoders, GPT-2.
TABLES = (
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_tokens.weight",
    "wte.weight",
)
DEVIATION = 0.02  # of the entries of a row, as of untrained embeddings


class WordVectorError(WorkbenchError):
    """A model has no word vectors that can be read, or they are another tokenizer's."""


def read(model: str, tokenizer) -> np.ndarray:
    """Word vectors (V, D0) of a model for the tokens of a tokenizer, which must be the model's own.

    They are the rows of its embedding table; of a BERT, what its first layer reads of a word at a
    mean position: LayerNorm(word + type 0 + mean position). No other weight is read.

    Args:
        model: `package:<name>`, a folder, or a hub id; its own code is never run.

    Raises:
        WordVectorError: it cannot be loaded, or its tokenizer is another one.
    """
    where = places.of(model, WordVectorError)
    own = token_rows.fingerprint(given_tokenizer(model))
    other = f"word vectors of {model!r} are those of another tokenizer than the corpus has"
    way = f"set data.<profile>.tokenizer to {model!r}"
    require(own == token_rows.fingerprint(tokenizer), f"{other}: {way}", WordVectorError)
    try:
        weights, eps = embeddings(where)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        way = "an id of the hub, or a folder with its weights in safetensors"
        raise WordVectorError(f"word vectors of {model!r} ({reason}): {way}") from None
    words = next(weights[name] for name in TABLES if name in weights)
    if {"position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"} <= weights.keys():
        words = words + weights["position_embeddings.weight"].mean(dim=0)
        if "token_type_embeddings.weight" in weights:
            words = words + weights["token_type_embeddings.weight"][0]
        norm = weights["LayerNorm.weight"], weights["LayerNorm.bias"]
        words = F.layer_norm(words, words.shape[1:], *norm, eps)
    return words.numpy()


def embeddings(where: Path | str) -> tuple[dict[str, Tensor], float]:
    """The weights beside a model's embedding table by their last names, float64; LayerNorm's eps.

    Args:
        where: a folder, or a hub id, whose safetensors are fetched.

    Raises:
        ValueError: no file has a table that is known here.
    """
    folder = Path(where)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(where), allow_patterns=["*.safetensors", "*.json"]))
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            found = (name for table in TABLES for name in names if name.endswith("." + table))
            if table := next(found, None):
                room = table[: -len(".weight")].rpartition(".")[0] + "."
                beside = [name for name in names if name.startswith(room) and ".layer" not in name]
                weights = {n.removeprefix(room): file.get_tensor(n).double() for n in beside}
                config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
                return weights, float(config.get("layer_norm_eps", 1e-12))
    raise ValueError(f"no safetensors with {' or '.join(TABLES)}")


def frequencies(
    sources: Iterable[dict[str, list[str]]], tokenizer, most_tokens: int = SAMPLE
) -> np.ndarray:
    """How often each token stands in a sample of the text, int64 (V,).

    The data stage counts and keeps them (`token_rows.counts`).

    Args:
        sources: the texts of each kind, by source; all have an equal part.
        most_tokens: about as many are counted, of texts in a random order.
    """
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    lists = [texts for kind in sources for texts in kind.values()]
    for texts in lists:
        left = most_tokens / len(lists)
        for i in np.random.default_rng(len(texts)).permutation(len(texts)):
            row = tokenize([texts[i]], tokenizer, 8192)[0][0][1:-1]
            counts += np.bincount(row, minlength=len(counts))
            left -= len(row)
            if left <= 0:
                break
    return counts


def start(
    encoder: nn.Module,
    vectors: np.ndarray,
    frequencies: np.ndarray,
    special_ids: list[int],
    weights: str = "sif",
    own: float = 0.0,
) -> None:
    """Put word vectors into an M2-BERT (`initialization: identity`), in place.

    A masked-language head, tied to the same table, then predicts the frequencies.

    Args:
        encoder: M2BertForMaskedLM or M2BertForRetrieval.
        frequencies: (V,), how often each word stands in the training text (`frequencies`).
        weights: "sif", or "none": w = 1.
        own: share of a word's direction that no other word has.
    """
    p = frequencies / max(1, frequencies.sum())
    w = SMOOTHING / (SMOOTHING + p) if weights == "sif" else np.ones(len(p))
    w[special_ids] = 0.0
    D = encoder.config.hidden_size
    rows = torch.from_numpy(table(vectors, p, w, D, own)).float()
    with torch.no_grad():
        words = encoder.get_input_embeddings().weight
        words[: len(rows)] = rows
        words[len(rows) :] = 0.0
        words[encoder.config.pad_token_id] = 0.0
        if hasattr(encoder, "decoder"):
            nn.init.eye_(encoder.dense.weight)
            seen = torch.from_numpy(np.log((frequencies + 0.5) / (frequencies + 0.5).sum()))
            encoder.decoder.bias.fill_(float(seen.min()))
            encoder.decoder.bias[: len(seen)] = seen.float()


def table(
    vectors: np.ndarray, p: np.ndarray, w: np.ndarray, D: int, own: float = 0.0
) -> np.ndarray:
    """The rows of the docstring, (V, D), float64."""
    share = p * w
    e = vectors - (share[:, None] * vectors).sum(axis=0) / max(share.sum(), 1e-12)
    k = min(D - 2, e.shape[1])
    _, axes = np.linalg.eigh(e.T @ e)
    e = e @ axes[:, ::-1][:, :k]  # (V, k), the largest component first
    norm = np.linalg.norm(e, axis=1)
    q = np.quantile(w * norm, QUANTILE)
    s = np.minimum(1.0, w * norm / max(q, 1e-12))
    directions = np.zeros((len(e), D - 2))
    directions[:, :k] = e / np.maximum(norm, 1e-12)[:, None]
    if own:
        random = unit(np.random.default_rng(0).normal(size=directions.shape))
        directions = unit(math.sqrt(1 - own) * directions + math.sqrt(own) * random)
    Q = basis(D)
    inside = (s[:, None] * directions) @ Q[:, 2:].T
    return DEVIATION * math.sqrt(D) * (inside + np.sqrt(1.0 - s**2)[:, None] * Q[:, 1])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def basis(D: int) -> np.ndarray:
    """An orthonormal basis (D, D); the first column has the direction of 1, the second is c."""
    columns = np.random.default_rng(0).normal(size=(D, D))
    columns[:, 0], columns[:, 1] = 1.0, neutral(D).numpy()
    Q = np.linalg.qr(columns)[0]
    return Q * np.sign((Q * columns).sum(axis=0))
