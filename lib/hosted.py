"""Embeddings that others compute: hosted models, and a memory of what was paid for.

    Hosted(url, model, key)      an endpoint as OpenAI, Voyage, Together or Cohere have it, as an encoder
    Remembered(encoder, path)    any encoder, its vectors kept on disk: a run that stops goes on where it stopped

The key is read from an environment variable, whose name alone stands in params.yaml. What an endpoint answers is
checked before it is believed; what is read back from disk too.
"""
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np

FORMS = {                                                                  # what is sent, and where the vectors stand in the answer
    "openai": ("input", lambda answer: [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])]),
    "cohere": ("texts", lambda answer: answer["embeddings"]["float"] if isinstance(answer["embeddings"], dict) else answer["embeddings"]),
}
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}                      # worth another try
LONGEST_WAIT = 60.0


class HostedError(RuntimeError):
    """An endpoint that does not give what was asked; the message names it and the way out, never the key."""


class Hosted:
    """An endpoint that embeds texts: POST {"model", "input": [...]} -> one vector a text.

    Args:
        url: the whole address, https unless it is this machine's.
        key: the name of the environment variable that holds the key; "" where none is needed.
        form: openai (also Voyage, Together and most servers of one's own) or cohere.
        options: more fields to send, such as {"input_type": "search_document"}.
        tries: attempts for each batch; waits double from one second to the next, or are as long as Retry-After says.
    """

    def __init__(self, url: str, model: str, key: str = "", form: str = "openai", batch: int = 32, options: dict | None = None, tries: int = 6, timeout: float = 120.0):
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")):
            raise HostedError(f"{url}: a key and texts go over https only (http on this machine)")
        if form not in FORMS:
            raise HostedError(f"form {form!r}: one of {', '.join(FORMS)}")
        if key and not os.environ.get(key):
            raise HostedError(f"{url} needs a key: set the environment variable {key}")
        self.url, self.model, self.form, self.batch, self.options, self.tries, self.timeout = url, model, form, batch, options or {}, tries, timeout
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {os.environ[key].strip()}"} if key else {})

    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors in the order of `texts`, float32, (n, D), as the endpoint gives them.

        Raises:
            HostedError: after the last try, or at once where another would not help.
        """
        vectors = [vector for start in range(0, len(texts), self.batch) for vector in self.ask(list(texts[start : start + self.batch]))]
        return np.asarray(vectors, dtype=np.float32).reshape(len(texts), -1 if len(texts) else 0)

    def ask(self, texts: list[str]) -> np.ndarray:
        field, vectors_of = FORMS[self.form]
        body = json.dumps({"model": self.model, field: texts, **self.options}).encode()
        for attempt in range(1, self.tries + 1):
            wait = min(2.0 ** (attempt - 1), LONGEST_WAIT)
            try:
                with urlopen(Request(self.url, body, self.headers), timeout=self.timeout) as answer:
                    return checked(vectors_of(json.loads(answer.read())), len(texts))
            except HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code not in AGAIN:
                    raise HostedError(f"{self.url} refuses model {self.model!r} ({one_line(reason)})") from None
                wait = seconds(error.headers.get("Retry-After"), wait)
            except (URLError, HTTPException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.tries:
                time.sleep(wait)
        raise HostedError(f"{self.url} does not answer for model {self.model!r} after {self.tries} tries (last: {one_line(reason)}): what was embedded is kept, run it again later")


def checked(vectors, n: int) -> np.ndarray:
    """An endpoint's vectors, or the reason not to believe them."""
    found = np.asarray(vectors, dtype=np.float32)
    if found.ndim != 2 or len(found) != n or not found.shape[1] or not np.isfinite(found).all():
        raise ValueError(f"{n} texts came back as an array of shape {found.shape}" + ("" if np.isfinite(found).all() else " with values that are not finite"))
    return found


def seconds(header: str | None, otherwise: float) -> float:
    """Retry-After in seconds; a date, or nothing, is not followed."""
    try:
        return min(max(0.0, float(header)), LONGEST_WAIT)
    except (TypeError, ValueError):
        return otherwise


def one_line(text: str) -> str:
    return " ".join(text.split())[:200]


class Remembered:
    """An encoder whose vectors are kept in an SQLite file, each under sha256(model, text), each with its own checksum.

    Args:
        encoder: anything with encode(texts) -> (n, D).
        name: of the model and of all that changes its vectors; other names share nothing.
        step: texts embedded before they are kept: what a run that stops can lose.
    """

    def __init__(self, encoder, path: str | Path, name: str, step: int = 256):
        self.encoder, self.path, self.name, self.step = encoder, Path(path), name, step
        self.asked = 0                                                     # texts that the encoder had to embed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.file() as file:
                file.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL, checksum BLOB NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise HostedError(f"{self.path} cannot be read as a store of vectors ({error}): delete it, they are embedded again") from None

    @contextmanager
    def file(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    def encode(self, texts: list[str], *args, **options) -> np.ndarray:
        keys = [hashlib.sha256(json.dumps([self.name, text]).encode()).digest() for text in texts]
        known = self.read(keys)
        place = {key: i for i, key in reversed(list(enumerate(keys)))}     # the first text of each key
        fresh = sorted(i for key, i in place.items() if key not in known)
        for start in range(0, len(fresh), self.step):
            some = fresh[start : start + self.step]
            vectors = np.ascontiguousarray(self.encoder.encode([texts[i] for i in some], *args, **options), dtype="<f4")
            self.asked += len(some)
            rows = [(keys[i], vector.tobytes(), checksum(keys[i], vector.tobytes())) for i, vector in zip(some, vectors)]
            with self.file() as file:
                file.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
            known |= {keys[i]: vector for i, vector in zip(some, vectors)}
        return np.array([known[key] for key in keys], dtype=np.float32).reshape(len(texts), -1 if len(texts) else 0)

    def read(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """What is kept of these and is undamaged."""
        found = {}
        try:
            with self.file() as file:
                for start in range(0, len(keys), 500):
                    some = keys[start : start + 500]
                    for key, vector, stored in file.execute(f"SELECT * FROM vectors WHERE key IN ({','.join('?' * len(some))})", some):
                        if stored == checksum(key, vector):
                            found[key] = np.frombuffer(vector, dtype="<f4")
        except sqlite3.DatabaseError as error:
            raise HostedError(f"{self.path} is damaged ({error}): delete it, its vectors are embedded again") from None
        return found


def checksum(key: bytes, vector: bytes) -> bytes:
    return hashlib.sha256(key + vector).digest()[:8]
