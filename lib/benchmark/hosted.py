"""Embeddings that others compute: hosted models, and a cache of what was paid for.

    EmbeddingAPI(url, model, key)   an endpoint in OpenAI's form, as Voyage, Together, Cohere (at
                                    its compatible address) and most servers of one's own have it
    CachedEncoder(encoder, path)    any encoder, its vectors kept on disk: a run that stops goes on
                                    where it stopped

An endpoint decides what it does with texts longer than its model: nothing is cut here (rankers.py
sends first tokens or windows). The key is read from an environment variable; only the variable's
name stands in params.yaml. Answers and what is read back from disk are checked.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit

import numpy as np

from lib.pipeline.errors import require

REFUSED = {400, 413, 422}  # the request is wrong, or one of its texts
AWAY = {408, 409, 429}  # like 500 and more: the client has tried again
HEADERS = frozenset(  # all that is sent
    "host accept accept-encoding connection user-agent content-type content-length".split()
)
WORD = "width"  # sent if any vector of the endpoint will do
MAP_SIZE = 2**38  # bytes a cache may grow to; its file is as large as what is in it
OPEN = Lock()  # LMDB wants a file open once in a process


class HostedError(RuntimeError):
    """An endpoint or cache fails; the message names it and the way out, never the key."""


class Refused(HostedError):
    """A request that would be refused again."""


class RefusedText(Refused):
    """A text that an endpoint does not take; `index` says which."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


@contextmanager
def renumbered(index_of: Callable[[int], int]) -> Iterator[None]:
    """A text refused as number i of a batch becomes number index_of(i) of the caller's texts."""
    try:
        yield
    except RefusedText as error:
        error.index = int(index_of(error.index))
        raise


def needed(module: str):
    """A module of an optional package, or the line that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        way = "`make interop` installs it, or `pip install 'loco-workbench[interop]'`"
        name = module.partition(".")[0]
        raise HostedError(f"an endpoint needs the package {name} ({error}): {way}") from None


class EmbeddingAPI:
    """An endpoint that embeds texts: POST {"model", "input": [...]} -> one vector per text.

    The client is the package `openai`. It tries again and waits longer each time, or as long as
    Retry-After says.

    Args:
        url: the whole address (…/v1/embeddings) or its base (…/v1); https, unless it is this
            machine's.
        key: the name of the environment variable that holds the key; "" if none is needed.
        options: more fields to send, such as {"input_type": "document"}.
        tries: attempts for each batch, if the endpoint is away or says to wait.

    Raises:
        HostedError: an address or key that would leak or cannot work, or the client is absent.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        batch: int = 32,
        options: dict | None = None,
        tries: int = 8,
    ):
        parts = urlsplit(url)
        here = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
        self.secret = os.environ.get(key, "").strip()
        leak = f"{parts.hostname}: its address holds a name or password; `key` gives them instead"
        require("@" not in parts.netloc, leak, HostedError)
        https = f"{url}: a key and texts go over https only (http on this machine)"
        require(parts.scheme == "https" or here, https, HostedError)
        unset = f"{url} needs a key: set the environment variable {key} to it, one word"
        require(not key or re.fullmatch(r"[\x21-\x7e]+", self.secret), unset, HostedError)
        path = parts.path.rstrip("/").removesuffix("/embeddings") + "/embeddings"
        self.url, self.model, self.batch = parts._replace(path=path).geturl(), model, batch
        self.options, self.tries, self.width = options or {}, tries, None
        self.openai = needed("openai")
        # A redirection would take the key and the texts to another host; it is an error instead.
        hooks = {"request": [self.sign]}
        http = self.openai.DefaultHttpxClient(follow_redirects=False, event_hooks=hooks)
        self.client = self.openai.OpenAI(
            api_key="-", base_url=self.url, max_retries=tries - 1, timeout=120.0, http_client=http
        )

    def sign(self, request) -> None:
        """Send this row's key, and nothing that the client finds in the environment for OpenAI."""
        for name in set(request.headers) - HEADERS:
            del request.headers[name]
        if self.secret:
            request.headers["Authorization"] = f"Bearer {self.secret}"

    def encode(self, texts: list[str], batch_size=None, normalize=True, show_progress=False):
        """Vectors in the order of `texts`, float32, (n, D); of unit norm if `normalize`.

        A text of white space alone is not sent, since endpoints refuse it: its vector is zero, its
        cosine to every query 0. If no other text has told D yet, one word is sent to learn it.

        Raises:
            RefusedText: a text that the endpoint does not take.
            HostedError: all else, after the last try, or at once if another would not help.
        """
        size = min(self.batch, batch_size or self.batch)
        sent = [i for i, text in enumerate(texts) if text.strip()]
        parts = [self.ask(texts, sent[start : start + size]) for start in range(0, len(sent), size)]
        if texts and self.width is None:
            self.request([WORD])
        vectors = np.zeros((len(texts), self.width or 0), dtype=np.float32)
        vectors[sent] = np.concatenate(parts) if parts else 0
        if not normalize:
            return vectors
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def ask(self, texts: list[str], indices: list[int]) -> np.ndarray:
        """The vectors of the texts of these indices, (n, D).

        If they are refused together, they are asked for by halves: what was too much at once
        passes then, and a text at fault is found with 2 log2(n) requests.
        """
        try:
            return self.request([texts[i] for i in indices])
        except Refused as error:
            if self.width is None:
                self.request([WORD])  # refused as well: no text is at fault
            if len(indices) == 1:
                text, way = texts[indices[0]], "`first_tokens` or `chunk` send less of it"
                message = f"{error}: text {text[:60]!r} …, {len(text)} characters; {way}"
                raise RefusedText(message, indices[0]) from None
        half = len(indices) // 2
        return np.concatenate([self.ask(texts, indices[:half]), self.ask(texts, indices[half:])])

    def request(self, texts: list[str]) -> np.ndarray:
        """The vectors of one request, checked, (n, D)."""
        body = {"model": self.model, "input": texts, **self.options}
        try:  # embeddings.create adds an encoding_format
            answer = self.client.post(self.url, cast_to=str, body=body)
        except self.openai.APIError as error:
            raise self.failure(error) from None
        try:
            parsed = json.loads(answer)
            vectors = in_order(None if parsed.get("error") else parsed["data"], len(texts))
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
            reason = str(error) if type(error) is ValueError else own_words(answer)
            raise HostedError(self.line("gives no vectors for", reason)) from None
        width = vectors.shape[1]
        change = f"vectors of {self.width} and {width} numbers"
        require(width == (self.width or width), self.line("changes", change), HostedError)
        self.width = width
        return vectors

    def failure(self, error) -> HostedError:
        """The client's error as ours: to try later, to send less, or to give up."""
        code, cause = getattr(error, "status_code", None), error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}"
        if code is not None:
            reason = f"HTTP {code}: {own_words(error.response.text)}"
        if code is None or code >= 500 or code in AWAY:
            way = "run it again later; what `CachedEncoder` holds is not asked for again"
            line = self.line("does not answer for", reason)
            return HostedError(f"{line} in up to {self.tries} tries: {way}")
        return (Refused if code in REFUSED else HostedError)(self.line("refuses", reason))

    def line(self, verb: str, reason: str) -> str:
        """One line about this endpoint: 300 characters of the server's words, never the key."""
        reason = " ".join(reason.replace(self.secret or "\0", "***").split())[:300]
        return f"{self.url} {verb} model {self.model!r} ({reason})"


def own_words(answer: str) -> str:
    """A server's own message, if its answer holds one; else the answer."""
    try:
        parsed = json.loads(answer)
        keys = [key for key in ("error", "detail", "message") if parsed.get(key)]
        message = parsed[keys[0]] if keys else parsed
        return str(message.get("message") or message if isinstance(message, dict) else message)
    except (ValueError, AttributeError):
        return answer


def in_order(data: list[dict], n: int) -> np.ndarray:
    """The vectors of an answer by their index, (n, D), or the reason not to believe them."""
    indices = [item.get("index", 0) for item in data]  # JSON made from proto3 leaves zeros out
    fault = f"{n} texts came back numbered {sorted(indices)[:9]}, not 0 to {n - 1}, each once"
    require(sorted(indices) == list(range(n)), fault, ValueError)
    vectors = np.zeros((n, len(data[0]["embedding"])), dtype=np.float32)
    vectors[indices] = [item["embedding"] for item in data]
    fault = f"{n} texts came back as an array of shape {vectors.shape}, or with values not finite"
    require(vectors.size and np.isfinite(vectors).all(), fault, ValueError)
    return vectors


class CachedEncoder:
    """An encoder whose vectors are kept in a file, under sha256(name, normalize, text).

    Each has a checksum. Processes may share the file, which is LMDB's; one that is killed loses
    only what it had not yet kept.

    Args:
        encoder: anything with encode(texts) -> (n, D).
        name: of the model and of all that changes its vectors; other names share nothing.
        step: texts embedded before they are kept: what a run that stops can lose.

    Raises:
        HostedError: the file is damaged, full or not to be used; the message says which, and the
            way out.
    """

    # Not diskcache: no longer maintained, and its JSONDisk unpickles a row marked as a pickle.
    def __init__(self, encoder, path: str | Path, name: str, step: int = 256):
        self.encoder, self.path, self.name, self.step = encoder, Path(path), name, step
        self.lmdb, verifier = needed("lmdb"), needed("lmdb.verify")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.file(write=True):  # while nobody else writes; 2 s for 50,000 texts
            problems = verifier.verify(str(self.path), subdir=False)
            require(not problems, "".join(problems[:1]), self.lmdb.CorruptedError)

    @contextmanager
    def file(self, write: bool = False) -> Iterator:
        """A transaction of the file: what is put is kept whole, or not at all."""
        lmdb = self.lmdb
        damage = "CorruptedError InvalidError PageNotFoundError VersionMismatchError".split()
        try:
            with OPEN, lmdb.open(str(self.path), map_size=MAP_SIZE, subdir=False) as file:
                with file.begin(write=write) as transaction:
                    yield transaction
        except lmdb.Error as error:
            state = f"is damaged ({error}): delete it, its vectors are embedded again"
            if not isinstance(error, tuple(getattr(lmdb, name) for name in damage)):
                full = isinstance(error, lmdb.MapFullError)
                way = "raise MAP_SIZE in lib/benchmark/hosted.py" if full else "free the disk"
                state = f"cannot be used now ({error}): {way}, or mend that; what is in it is kept"
            raise HostedError(f"{self.path} {state}") from None

    def encode(self, texts: list[str], batch_size=32, normalize=True, show_progress=False):
        """As the encoder's; texts that are kept are not asked for."""
        records = (json.dumps([self.name, normalize, text]) for text in texts)
        keys = [hashlib.sha256(record.encode()).digest() for record in records]
        known = self.read(keys)
        first = dict(zip(keys[::-1], range(len(keys))[::-1]))
        fresh = sorted(i for key, i in first.items() if key not in known)
        for start in range(0, len(fresh), self.step):
            indices = fresh[start : start + self.step]
            batch = [texts[i] for i in indices]
            with renumbered(indices.__getitem__):
                vectors = self.encoder.encode(batch, batch_size, normalize, show_progress)
            vectors = np.ascontiguousarray(vectors, dtype="<f4")
            fetched = {keys[i]: vector for i, vector in zip(indices, vectors)}
            with self.file(write=True) as file:
                for key, vector in fetched.items():
                    file.put(key, checksum(key, vector.tobytes()) + vector.tobytes())
            known |= fetched
        widths = " and ".join(map(str, sorted({len(known[key]) for key in keys})))
        way = f"under the name {self.name!r}: the model has changed, give it another name"
        message = f"{self.path} holds vectors of {widths} numbers {way}"
        require("and" not in widths, message, HostedError)
        vectors = np.array([known[key] for key in keys], dtype=np.float32)
        return vectors.reshape(len(texts), -1 if texts else 0)

    def read(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """The vectors of these keys that are kept and undamaged."""
        with self.file() as file:
            kept = {key: value for key in set(keys) if (value := file.get(key))}
        whole = (key for key, value in kept.items() if value[:8] == checksum(key, value[8:]))
        return {key: np.frombuffer(kept[key], dtype="<f4", offset=8) for key in whole}


def checksum(key: bytes, vector: bytes) -> bytes:
    return hashlib.sha256(key + vector).digest()[:8]
