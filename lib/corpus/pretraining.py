"""Pretraining text as rows of (text, source, kind, split) or (…, dataset).

    embedded_text(modules, readmes)    from the documentation of the installed packages
    hub_text(most)                     the paper's: C4, Wikipedia, BookCorpus
    folder_text(folder)                anybody's: parquet, jsonl or txt files

A text is "long" if it has more than LONG characters, else "short". The split is "train", or
"validation" for one source in HELD_OUT. Text of several datasets is prepared as the authors do:
every document is both, its first 4,000 characters "short" and its first 8,000 "long".

Source: the authors' bert/src/convert_dataset.py (HazyResearch/m2, 7d359e8) for the two cuts.
"""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lib.benchmark.sources import read_jsonl, read_parquet, readable
from lib.benchmark.task import SPLITS, CorpusError
from lib.corpus.packages import Module, Shingles, normal, sha256
from lib.model.tokens import encodable
from lib.pipeline.errors import require

Row = tuple[str, ...]

LONG = 4_000  # characters
CUTS = {"short": 4_000, "long": 8_000}  # characters of a document, if there are several datasets
HELD_OUT = 50
SHORTEST = 200  # characters of a docstring, comment or section of a readme
REPEATED = 0.2  # share of a readme's word runs that held-out documents may have

# The paper's text, a third each: (hub id, configuration, revision, rows that make a text).
HUB_TEXT = {
    "c4": ("allenai/c4", "en", None, 1),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", None, 1),
    # Its rows are sentences of 66 characters on average: 120 of them fill the longer cut.
    "bookcorpus": ("bookcorpus/bookcorpus", None, "refs/convert/parquet", 120),
}


def embedded_text(modules: dict[str, list[Module]], readmes: dict[str, str]) -> list[Row]:
    """Text of the training modules: docstrings and comments are short, pages and sources long."""
    rows = []
    for module in modules["train"]:
        split = held_out(module.name)
        docs = ["\n".join(filter(None, (item.summary, item.body))) for item in module.items]
        page = "\n\n".join(item.text() for item in module.items)
        short = [text for text in [*docs, *module.comments] if len(text) > SHORTEST]
        long = [text for text in (page, module.code) if len(text) > LONG]
        rows += [(text, module.name, "short", split) for text in short]
        rows += [(text, module.name, "long", split) for text in long]
    return rows + readme_rows(modules, readmes)


def readme_rows(modules: dict[str, list[Module]], readmes: dict[str, str]) -> list[Row]:
    """The sections of readmes that share few word runs with the documents of the other splits."""
    shingles = Shingles()
    items = [item for split in SPLITS[1:] for module in modules[split] for item in module.items]
    last = np.array([2**64 - 1], dtype=np.uint64)  # every search ends at it, if not before
    held = np.unique(np.concatenate([*(shingles.of(normal(item.text())) for item in items), last]))
    rows = []
    for package, text in readmes.items():
        for section in re.split(r"\n(?=#+ |.+\n[-=~]{4,}\n)", text):
            runs = shingles.of(normal(section))
            if len(section) <= SHORTEST or not len(runs):
                continue
            if (held[np.searchsorted(held, runs)] == runs).mean() < REPEATED:
                rows.append((section.strip(), package, "short", held_out(package)))
    return rows


def held_out(source: str) -> str:
    """train, or validation for one source in HELD_OUT, by a hash of its name."""
    return "validation" if int(sha256(source)[:8], 16) % HELD_OUT == 0 else "train"


def as_rows(texts: list[tuple[str, str]]) -> list[Row]:
    """Rows of (text, source), the short ones first."""
    rows = []
    for kind in ("short", "long"):
        same = [(text, source) for text, source in texts if (len(text) > LONG) == (kind == "long")]
        rows += [(*text, kind, split) for text, split in zip(same, divided(same))]
    return rows


def cut_rows(texts: list[tuple[str, str]], datasets: list[str]) -> list[Row]:
    """Rows of (text, source) and the dataset of each: every text in both kinds, in one split."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for text, dataset in zip(texts, datasets):
        grouped.setdefault(dataset, []).append(text)
    splits = {dataset: divided(same) for dataset, same in grouped.items()}
    return [
        (text[:characters], source, kind, split, dataset)
        for kind, characters in CUTS.items()
        for dataset, same in grouped.items()
        for (text, source), split in zip(same, splits[dataset])
    ]


def divided(texts: list[tuple[str, str]]) -> list[str]:
    """The split of each (text, source): one text in HELD_OUT, or more, is for validation.

    A source is held out as a whole, if this holds out between a quarter of 1 / HELD_OUT and five
    times as much. If not (the texts have one source, or few), texts are held out by their own hash.
    """
    splits = [held_out(source) for _, source in texts]
    if 0.25 <= HELD_OUT * splits.count("validation") / max(1, len(texts)) <= 5:
        return splits
    hashes = [sha256(text) for text, _ in texts]
    distinct = sorted(set(hashes))
    first = distinct[: -(-len(distinct) // HELD_OUT)] if len(distinct) > 1 else []
    return ["validation" if code in first else "train" for code in hashes]


def folder_text(folder: Path) -> list[Row]:
    """Text of a folder: parquet or jsonl with a column `text` (and `source`), or txt files.

    If all files lie in two or more subfolders, each subfolder is a dataset, named after it.

    Raises:
        CorpusError: no folder, no text, or a file that cannot be read.
    """
    require(
        folder.is_dir(),
        f"{folder} is no folder: data.pretraining is embedded, hub, or a folder of parquet, jsonl "
        "or txt files",
    )
    texts, datasets = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = name.startswith(".") or "/." in name
        if hidden or path.suffix not in (".parquet", ".jsonl", ".txt") or not path.is_file():
            continue
        for number, row in enumerate(rows_of(path, name)):
            text, source = row["text"], str(row.get("source", f"{name}#{number}"))
            kind = "null" if text is None else type(text).__name__
            message = f"{path}: text {number + 1} is {kind}: give every row a text, or take it out"
            require(isinstance(text, str), message)
            if text.strip():
                texts.append((encodable(text), encodable(source)))
                datasets.append(encodable(name.rpartition("/")[0].partition("/")[0]))
    require(
        texts,
        f"{folder} has no text: it needs parquet or jsonl files with a column `text`, or txt files",
    )
    one = "" in datasets or len(set(datasets)) == 1
    return as_rows(texts) if one else cut_rows(texts, datasets)


def rows_of(path: Path, name: str) -> Iterable[dict]:
    if path.suffix == ".parquet":
        return read_parquet(path, ["text"], optional=["source"])
    if path.suffix == ".jsonl":
        return read_jsonl(path, ("text",))
    with readable(path, way="convert it, or take it out"):
        return [{"text": path.read_text(encoding="utf-8-sig"), "source": name}]


def hub_text(most: int) -> list[Row]:
    """The first `most` texts of C4, Wikipedia and BookCorpus each, streamed, in both kinds.

    Raises:
        CorpusError: one of them cannot be read.
    """
    import datasets

    texts: list[tuple[str, str]] = []
    for name, (identifier, configuration, revision, joined) in HUB_TEXT.items():
        try:
            rows = datasets.load_dataset(
                identifier, configuration, split="train", revision=revision, streaming=True
            )
            lines = (row["text"] for row in rows)
            batches = iter(lambda lines=lines, n=joined: list(itertools.islice(lines, n)), [])
            for number, parts in enumerate(itertools.islice(batches, most)):
                texts.append(("\n".join(parts), f"{name}#{number}"))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise CorpusError(
                f"{identifier} cannot be read from the hub ({reason}): without a network, give "
                "data.pretraining a folder of parquet, jsonl or txt files"
            ) from None
    return cut_rows(texts, [source.partition("#")[0] for _, source in texts])
