"""Embeddings that others compute: hosted models, and a memory of what was paid for.

    Hosted(url, model, key)       an endpoint in OpenAI's form, as Voyage, Together, Cohere (at its compatible
                                  address) and most servers of one's own have it: encode(texts) -> (n, D)
    Remembered(encoder, path)     any encoder, its vectors kept on disk: a run that stops goes on where it stopped

What an endpoint does with texts longer than its model is its own business: nothing is cut here. As a row of
params.yaml, with first tokens or windows: lib/benchmark/rankers.py.

The key is read from an environment variable, whose name alone stands in params.yaml. What an endpoint answers is
checked before it is believed; what is read back from disk too.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit

import numpy as np

REFUSED = {400, 413, 422}  # the request is wrong, or one of its texts
AWAY = {408, 409, 429}  # like 500 and more: the client has tried again
HEADERS = {
    "host",
    "accept",
    "accept-encoding",
    "connection",
    "user-agent",  # all that is sent
    "content-type",
    "content-length",
}
WORD = "width"  # sent where any vector of the endpoint will do
MAP_SIZE = 2**38  # bytes a memory may grow to; its file is as large as what is in it
OPEN = Lock()  # LMDB wants a file open once in a process


class HostedError(RuntimeError):
    """An endpoint or memory that does not give what was asked.

    The message names it and the way out, never the key.
    """


class Refused(HostedError):
    """A request that would be refused again."""


class RefusedText(Refused):
    """A text that an endpoint does not take; `index` says which."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


def needed(module: str):
    """A module of an optional package.

    Raises:
        HostedError: it is not installed; one line says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise HostedError(
            f"an endpoint needs the package {module.partition('.')[0]} ({error}): `make interop` "
            "installs it, or `pip install 'loco-workbench[interop]'`"
        ) from None


class Hosted:
    """An endpoint that embeds texts: POST {"model", "input": [...]} -> one vector a text.

    The client is the package `openai`: it tries again, waits longer each time, or as long as Retry-After says.

    Args:
        url: the whole address (…/v1/embeddings) or its base (…/v1), https unless it is this machine's.
        key: the name of the environment variable that holds the key; "" where none is needed.
        options: more fields to send, such as {"input_type": "document"}; nothing is sent beside them.
        tries: attempts for each batch, where the endpoint is away or says to wait.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        batch: int = 32,
        options: dict | None = None,
        tries: int = 8,
        timeout: float = 120.0,
    ):
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise HostedError(
                f"{parts.hostname}: its address holds a name or password; `key` is the way to give them"
            )
        here = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
        if parts.scheme != "https" and not here:
            raise HostedError(f"{url}: a key and texts go over https only (http on this machine)")
        self.secret = os.environ.get(key, "").strip() if key else ""
        if key and not re.fullmatch(r"[\x21-\x7e]+", self.secret):
            raise HostedError(
                f"{url} needs a key: set the environment variable {key} to it, one word"
            )
        if batch < 1 or tries < 1:
            raise HostedError(f"batch={batch}, tries={tries}: both count from 1")
        path = parts.path.rstrip("/").removesuffix("/embeddings") + "/embeddings"
        self.url, self.model, self.batch = parts._replace(path=path).geturl(), model, batch
        self.options, self.tries, self.width, self.openai = (
            options or {},
            tries,
            None,
            needed("openai"),
        )
        # A redirection would take the key and the texts to another host; it is an error instead.
        http = self.openai.DefaultHttpxClient(
            follow_redirects=False, event_hooks={"request": [self.sign]}
        )
        self.client = self.openai.OpenAI(
            api_key="-", base_url=self.url, max_retries=tries - 1, timeout=timeout, http_client=http
        )

    def sign(self, request) -> None:
        """Send this row's key, and nothing that the client finds in the environment for OpenAI."""
        for name in set(request.headers) - HEADERS:
            del request.headers[name]
        if self.secret:
            request.headers["Authorization"] = f"Bearer {self.secret}"

    def encode(
        self,
        texts: list[str],
        batch_size: int | None = None,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Vectors in the order of `texts`, float32, (n, D); of unit norm if `normalize`, else as they come.

        A text of white space alone is not sent, since endpoints refuse it: its vector is zero, its cosine to
        every query 0. Where no other text has told D yet, one word is sent to learn it.

        Raises:
            RefusedText: a text that the endpoint does not take.
            HostedError: all else, after the last try, or at once where another would not help.
        """
        size = min(self.batch, batch_size or self.batch)
        sent = [i for i, text in enumerate(texts) if text.strip()]
        parts = [self.ask(texts, sent[start : start + size]) for start in range(0, len(sent), size)]
        if texts and self.width is None:
            self.request([WORD])
        vectors = np.zeros((len(texts), self.width or 0), dtype=np.float32)
        vectors[sent] = np.concatenate(parts) if parts else 0
        norms = (
            np.linalg.norm(vectors, axis=1, keepdims=True)
            if normalize
            else np.ones(1, dtype=np.float32)
        )
        return vectors / np.maximum(norms, 1e-12)

    def ask(self, texts: list[str], places: list[int]) -> np.ndarray:
        """The vectors of the texts in these places, (n, D).

        Where they are refused together they are asked for by halves: what was too much at once passes then, and
        a text at fault is found with 2 log2(n) requests.
        """
        try:
            return self.request([texts[i] for i in places])
        except Refused as error:
            if self.width is None:
                self.request([WORD])  # refused as well: no text is at fault
            if len(places) == 1:
                text = texts[places[0]]
                raise RefusedText(
                    f"{error}: text {text[:60]!r} …, {len(text)} characters; `first_tokens` or "
                    "`chunk` send less of it",
                    places[0],
                ) from None
        half = len(places) // 2
        return np.concatenate([self.ask(texts, places[:half]), self.ask(texts, places[half:])])

    def request(self, texts: list[str]) -> np.ndarray:
        """The vectors of one request, checked, (n, D)."""
        body = {"model": self.model, "input": texts, **self.options}
        try:  # embeddings.create adds an encoding_format
            answer = self.client.post(self.url, cast_to=str, body=body)
        except self.openai.APIError as error:
            code, cause = getattr(error, "status_code", None), error.__cause__ or error
            reason = (
                f"HTTP {code}: {said(error.response.text)}"
                if code
                else f"{type(cause).__name__}: {cause}"
            )
            if code is None or code >= 500 or code in AWAY:
                raise HostedError(
                    self.told("does not answer for", reason) + f" in up to {self.tries} tries: run "
                    "it again later; what `Remembered` holds is not asked for again"
                ) from None
            raise (Refused if code in REFUSED else HostedError)(
                self.told("refuses", reason)
            ) from None
        try:
            found = json.loads(answer)
            if found.get("error"):
                raise LookupError
            vectors = in_order(found["data"], len(texts))
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
            reason = error if type(error) is ValueError else said(answer)
            raise HostedError(self.told("gives no vectors for", str(reason))) from None
        if vectors.shape[1] != (self.width or vectors.shape[1]):
            raise HostedError(
                self.told("changes", f"vectors of {self.width} and {vectors.shape[1]} numbers")
            )
        self.width = vectors.shape[1]
        return vectors

    def told(self, what: str, reason: str) -> str:
        """One line about this endpoint; of what the server said 300 characters at most, the key never."""
        reason = " ".join(reason.replace(self.secret or "\0", "***").split())[:300]
        return f"{self.url} {what} model {self.model!r} ({reason})"


def said(answer: str) -> str:
    """A server's own message, where its answer holds one; else the answer."""
    try:
        found = json.loads(answer)
        found = next(
            (found[name] for name in ("error", "detail", "message") if found.get(name)), found
        )
        return str(found.get("message") or found if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        return answer


def in_order(data: list[dict], n: int) -> np.ndarray:
    """The vectors of an answer by their index, (n, D), or the reason not to believe them (ValueError)."""
    places = [item.get("index", 0) for item in data]  # JSON made from proto3 leaves zeros out
    if sorted(places) != list(range(n)):
        raise ValueError(
            f"{n} texts came back numbered {sorted(places)[:9]}, not 0 to {n - 1}, each once"
        )
    found = np.zeros((n, len(data[0]["embedding"])), dtype=np.float32)
    found[places] = [item["embedding"] for item in data]
    if not found.size or not np.isfinite(found).all():
        raise ValueError(
            f"{n} texts came back as an array of shape {found.shape}, or with values not finite"
        )
    return found


class Remembered:
    """An encoder whose vectors are kept in a file, each under sha256(name, normalize, text), with a checksum.

    Processes may share the file, which is LMDB's; one that is killed loses only what it had not yet kept.

    Args:
        encoder: anything with encode(texts) -> (n, D).
        name: of the model and of all that changes its vectors; other names share nothing.
        step: texts embedded before they are kept: what a run that stops can lose.

    Raises:
        HostedError: the file is damaged, full or not to be used; the message says which, and the way out.
    """

    # Not diskcache: it is no longer maintained, and even its JSONDisk unpickles a row that is marked as a pickle.

    def __init__(self, encoder, path: str | Path, name: str, step: int = 256):
        self.encoder, self.path, self.name, self.step = encoder, Path(path), name, step
        self.lmdb, verifier = needed("lmdb"), needed("lmdb.verify")
        self.asked = 0  # texts that the encoder had to embed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.file(write=True):  # while nobody else writes; 2 s for 50,000 texts
            if problems := verifier.verify(str(self.path), subdir=False):
                raise self.lmdb.CorruptedError(problems[0])

    @contextmanager
    def file(self, write: bool = False) -> Iterator:
        """A transaction of the file: what is put is kept whole, or not at all."""
        lmdb = self.lmdb
        try:
            with OPEN, lmdb.open(str(self.path), map_size=MAP_SIZE, subdir=False) as file:
                with file.begin(write=write) as transaction:
                    yield transaction
        except (
            lmdb.CorruptedError,
            lmdb.InvalidError,
            lmdb.PageNotFoundError,
            lmdb.VersionMismatchError,
        ) as error:
            raise HostedError(
                f"{self.path} is damaged ({error}): delete it, its vectors are embedded again"
            ) from None
        except lmdb.Error as error:
            way = (
                "raise MAP_SIZE in lib/benchmark/hosted.py"
                if isinstance(error, lmdb.MapFullError)
                else "free the disk, or mend that"
            )
            raise HostedError(
                f"{self.path} cannot be used now ({error}): {way}; what is in it is kept"
            ) from None

    def encode(
        self,
        texts: list[str],
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> np.ndarray:
        """As the encoder's; texts that are kept are not asked for."""
        texts = list(texts)
        keys = [
            hashlib.sha256(json.dumps([self.name, normalize, text]).encode()).digest()
            for text in texts
        ]
        known = self.read(keys)
        first = dict(zip(keys[::-1], range(len(keys))[::-1]))
        fresh = sorted(i for key, i in first.items() if key not in known)
        for start in range(0, len(fresh), self.step):
            some = fresh[start : start + self.step]
            try:
                vectors = self.encoder.encode(
                    [texts[i] for i in some],
                    batch_size,
                    normalize=normalize,
                    show_progress=show_progress,
                )
            except RefusedText as error:
                error.index = some[error.index]
                raise
            self.asked += len(some)
            known |= {
                keys[i]: vector
                for i, vector in zip(some, np.ascontiguousarray(vectors, dtype="<f4"))
            }
            with self.file(write=True) as file:
                for key in (keys[i] for i in some):
                    file.put(key, checksum(key, known[key].tobytes()) + known[key].tobytes())
        widths = sorted({len(known[key]) for key in keys})
        if len(widths) > 1:
            raise HostedError(
                f"{self.path} holds vectors of {' and '.join(map(str, widths))} numbers under the "
                f"name {self.name!r}: the model has changed, give it another name"
            )
        return np.array([known[key] for key in keys], dtype=np.float32).reshape(
            len(texts), -1 if texts else 0
        )

    def read(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """What is kept of these and is undamaged."""
        with self.file() as file:
            kept = {key: file.get(key, b"") for key in set(keys)}
        return {
            key: np.frombuffer(value, dtype="<f4", offset=8)
            for key, value in kept.items()
            if value and value[:8] == checksum(key, value[8:])
        }


def checksum(key: bytes, vector: bytes) -> bytes:
    return hashlib.sha256(key + vector).digest()[:8]
