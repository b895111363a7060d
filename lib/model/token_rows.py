"""The tokens of a corpus, kept on disk: a collection is tokenised once, and not by every stage.

    write(folder, rows_of, tokenizer, counts)    keep rows of tokens in a folder
    use(tokenizer, corpus)                       let `tokens.tokenize` take its rows from there
    known(tokenizer)                             the rows in use; None: everything is tokenised
    counts(tokenizer, corpus)                    how often each token stands in the training text

A row is found by the sha256 of its text, so it does not matter which task or split a text is of. A
tokenizer that is not the folder's own, in any setting but truncation and padding, uses nothing.

Files: ids.npy (T,), uint16 or int32, memory-mapped; ends.npy int64 (N + 1,), row i is
ids[ends[i] : ends[i + 1]]; texts.npy uint8 (N, 16), the beginnings of the sha256; counts.npy int64
(V,), of `word_vectors.frequencies`; tokenizer.txt.
"""

import hashlib
import json
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from lib.pipeline.errors import BUILD, CorpusError, require

DIGEST = 16  # bytes of a text's sha256
_in_use: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> TokenRows


class TokenRows:
    """The rows of a folder.

    Raises:
        CorpusError: the files are damaged.
    """

    def __init__(self, folder: Path, vocabulary: int):
        self.ids, self.ends, texts = (array(folder, name) for name in ("ids", "ends", "texts"))
        self.row_of = {texts[i].tobytes(): i for i in range(len(texts))}
        sizes = np.diff(self.ends)
        whole = (
            texts.shape == (len(self.ends) - 1, DIGEST)
            and len(self.row_of) == len(texts)
            and self.ends[0] == 0
            and self.ends[-1] == len(self.ids)
            and sizes.min(initial=2) >= 2
            and 0 <= self.ids.min(initial=0) <= self.ids.max(initial=0) < vocabulary
        )
        require(whole, f"{folder} is damaged: {BUILD}")

    def get(self, text: str) -> np.ndarray | None:
        """All tokens of a text, [CLS] … [SEP]; None: this text is not kept."""
        row = self.row_of.get(digest(text))
        return None if row is None else self.ids[self.ends[row] : self.ends[row + 1]]


def array(folder: Path, name: str) -> np.ndarray:
    try:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"{folder / name}.npy cannot be read ({error}): {BUILD}") from None


def write(folder: Path, rows_of: dict[str, list[int]], tokenizer, counts: np.ndarray) -> None:
    """Write the rows of texts, whole, and the counts into a folder that does not exist yet."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    rows = [np.array(row, dtype=dtype) for row in rows_of.values()]
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    digests = np.frombuffer(b"".join(map(digest, rows_of)), dtype=np.uint8).reshape(-1, DIGEST)
    folder.mkdir()
    for name, array in (
        ("ids", np.concatenate([np.zeros(0, dtype=dtype), *rows])),
        ("ends", ends),
        ("texts", digests),
        ("counts", counts),
    ):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    (folder / "tokenizer.txt").write_text(f"{fingerprint(tokenizer)}\n", encoding="ascii")


def use(tokenizer, corpus: str | Path):
    """The tokenizer, whose rows are taken from corpus/tokens if it is that folder's own."""
    folder = Path(corpus, "tokens")
    if fingerprint(tokenizer) and is_of(folder, tokenizer):
        _in_use[tokenizer] = TokenRows(folder, len(tokenizer))
    return tokenizer


def counts(tokenizer, corpus: str | Path) -> np.ndarray:
    """How often each token stands in a sample of the corpus's training text, int64 (V,).

    Raises:
        CorpusError: they are missing, damaged, or of another tokenizer.
    """
    folder = Path(corpus, "tokens")
    other = f"{folder} is of another tokenizer, or was never written: {BUILD}"
    require(is_of(folder, tokenizer), other)
    found = array(folder, "counts")
    whole = found.dtype == np.int64 and found.shape == (len(tokenizer),)
    require(whole and found.min() >= 0, f"{folder / 'counts.npy'} is damaged: {BUILD}")
    return np.array(found)


def is_of(folder: Path, tokenizer) -> bool:
    """Whether a folder's rows and counts are those of a tokenizer."""
    path, own = folder / "tokenizer.txt", fingerprint(tokenizer)
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace").strip() == own


def known(tokenizer) -> TokenRows | None:
    return _in_use.get(tokenizer)


def fingerprint(tokenizer) -> str:
    """The sha256 of all that decides a tokenizer's ids; "" if nobody can tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    design = json.loads(backend.to_str())
    design = {key: part for key, part in design.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(design, sort_keys=True).encode()).hexdigest()


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:DIGEST]
