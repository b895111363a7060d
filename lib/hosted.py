"""Embeddings that others compute: hosted models, and a memory of what was paid for.

    Hosted(url, model, key)      an endpoint as OpenAI, Voyage, Together or Cohere have it: encode(texts) -> (n, D)
    Remembered(encoder, path)    any encoder, its vectors kept on disk: a run that stops goes on where it stopped

What an endpoint does with texts longer than its model is its own business: nothing is cut here. As a row of params.yaml,
with first tokens or windows: lib/ranker.py.

The key is read from an environment variable, whose name alone stands in params.yaml. What an endpoint answers is
checked before it is believed; what is read back from disk too.
"""
import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np

FORMS = {                                                                  # what is sent, and where the vectors stand in the answer
    "openai": ("input", lambda answer: in_order(answer["data"])),
    "cohere": ("texts", lambda answer: answer["embeddings"]["float"] if isinstance(answer["embeddings"], dict) else answer["embeddings"]),
}
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}                      # worth another try
LONGEST_WAIT = 60.0


class NoRedirect(HTTPRedirectHandler):
    """A redirection would take the key and the texts to another host; it is an error instead."""

    def redirect_request(self, *_):
        return None


def in_order(data: list[dict]) -> list:
    """OpenAI's answers by their index, which must be 0, 1, 2 …"""
    found = {item["index"]: item["embedding"] for item in data}
    if sorted(found) != list(range(len(data))):
        raise ValueError(f"the answers are numbered {sorted(found)[:9]}, not 0 to {len(data) - 1}")
    return [found[i] for i in range(len(data))]


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
        self.secret = os.environ.get(key, "").strip() if key else ""
        if key and not re.fullmatch(r"[\x21-\x7e]+", self.secret):
            raise HostedError(f"{url} needs a key: set the environment variable {key} to it, one word")
        if batch < 1 or tries < 1:
            raise HostedError(f"batch={batch}, tries={tries}: both count from 1")
        self.url, self.model, self.form, self.batch, self.options, self.tries, self.timeout = url, model, form, batch, options or {}, tries, timeout
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.secret}"} if key else {})

    def encode(self, texts: list[str], batch_size: int | None = None, normalize: bool = True, show_progress: bool = False) -> np.ndarray:
        """Vectors in the order of `texts`, float32, (n, D); of unit norm if `normalize`, else as the endpoint gives them.

        Raises:
            HostedError: after the last try, or at once where another would not help.
        """
        size = min(self.batch, batch_size or self.batch)
        parts = [self.ask(list(texts[start : start + size])) for start in range(0, len(texts), size)]
        if len({part.shape[1] for part in parts}) > 1:
            raise HostedError(f"{self.url} answers with vectors of {' and '.join(str(width) for width in sorted({part.shape[1] for part in parts}))} numbers: one model has one width")
        vectors = np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if normalize and parts else vectors

    def ask(self, texts: list[str]) -> np.ndarray:
        field, vectors_of = FORMS[self.form]
        body = json.dumps({"model": self.model, field: texts, **self.options}).encode()
        for attempt in range(1, self.tries + 1):
            wait = min(2.0 ** (attempt - 1), LONGEST_WAIT)
            try:
                with build_opener(NoRedirect).open(Request(self.url, body, self.headers), timeout=self.timeout) as answer:
                    return checked(vectors_of(json.loads(answer.read())), len(texts))
            except HTTPError as error:
                try:
                    said = error.read(300).decode("utf-8", "replace")
                except (OSError, HTTPException):
                    said = ""
                reason = f"HTTP {error.code} {error.reason}: {said}"
                if error.code not in AGAIN:
                    raise HostedError(f"{self.url} refuses model {self.model!r} ({self.told(reason)})") from None
                wait = seconds(error.headers.get("Retry-After"), wait)
            except (URLError, HTTPException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.tries:
                time.sleep(wait)
        raise HostedError(f"{self.url} does not answer for model {self.model!r} after {self.tries} tries (last: {self.told(reason)}): run it again later; what `Remembered` holds is not asked for again")

    def told(self, reason: str) -> str:
        """A reason in one line; a server may repeat what it was sent."""
        return " ".join((reason.replace(self.secret, "***") if self.secret else reason).split())[:200]


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


class Remembered:
    """An encoder whose vectors are kept in an SQLite file, each under sha256(name, normalize, text), each with its own checksum.

    Args:
        encoder: anything with encode(texts) -> (n, D).
        name: of the model and of all that changes its vectors; other names share nothing.
        step: texts embedded before they are kept: what a run that stops can lose.
    """

    def __init__(self, encoder, path: str | Path, name: str, step: int = 256):
        self.encoder, self.path, self.name, self.step = encoder, Path(path), name, step
        self.asked = 0                                                     # texts that the encoder had to embed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.file() as file:
            file.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL, checksum BLOB NOT NULL)")

    @contextmanager
    def file(self) -> Iterator[sqlite3.Connection]:
        connection = None
        try:
            connection = sqlite3.connect(self.path, timeout=60)
            with connection:
                yield connection
        except sqlite3.OperationalError as error:                          # locked, full, not writable
            raise HostedError(f"{self.path} cannot be used now ({error}): free the disk, or wait for the other run; what is in it is kept") from None
        except sqlite3.DatabaseError as error:
            raise HostedError(f"{self.path} is damaged ({error}): delete it, its vectors are embedded again") from None
        finally:
            if connection is not None:
                connection.close()

    def encode(self, texts: list[str], batch_size: int = 32, normalize: bool = True, show_progress: bool = False) -> np.ndarray:
        """As the encoder's; texts that are kept are not asked for."""
        texts = list(texts)
        keys = [hashlib.sha256(json.dumps([self.name, normalize, text]).encode()).digest() for text in texts]
        known = self.read(keys)
        fresh = list({key: text for key, text in zip(keys, texts) if key not in known}.items())
        for start in range(0, len(fresh), self.step):
            some = fresh[start : start + self.step]
            vectors = np.ascontiguousarray(self.encoder.encode([text for _, text in some], batch_size, normalize=normalize, show_progress=show_progress), dtype="<f4")
            self.asked += len(some)
            rows = [(key, vector.tobytes(), checksum(key, vector.tobytes())) for (key, _), vector in zip(some, vectors)]
            with self.file() as file:
                file.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
            known |= {key: vector for (key, _), vector in zip(some, vectors)}
        widths = {known[key].shape for key in keys}
        if len(widths) > 1:
            raise HostedError(f"{self.path} holds vectors of {' and '.join(str(width) for width, in sorted(widths))} numbers under the name {self.name!r}: the model has changed, give it another name")
        return np.array([known[key] for key in keys], dtype=np.float32).reshape(len(texts), -1 if len(texts) else 0)

    def read(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """What is kept of these and is undamaged."""
        found = {}
        with self.file() as file:
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                for key, vector, stored in file.execute(f"SELECT * FROM vectors WHERE key IN ({','.join('?' * len(some))})", some):
                    if stored == checksum(key, vector):
                        found[key] = np.frombuffer(vector, dtype="<f4")
        return found


def checksum(key: bytes, vector: bytes) -> bytes:
    return hashlib.sha256(key + vector).digest()[:8]
