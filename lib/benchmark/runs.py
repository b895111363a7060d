"""TREC run files: `qid Q0 pid rank score tag`, which any tool can score again.

write_run(run, path)     a run as a file
read_run(path)           run[query_id][doc_id] = score, of a file by any TREC tool
unwritable(ids)          the first id that such a file cannot hold

Fields are separated by white space and nothing is quoted.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from lib.benchmark.metrics import ranking
from lib.pipeline import files

# White space of any alphabet and control characters, which separate fields or lines in some tool;
# half a character, which UTF-8 cannot write; a byte order mark where a file may begin.
UNWRITABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\ufeff|^$")


def unwritable(ids: Iterable[str]) -> str | None:
    """The first id that a TREC file cannot hold so that every tool reads it again, or None.

    Ask `is not None`: the first may be the empty one.

    Raises:
        TypeError: an id is no string.
    """
    for id in dict.fromkeys(ids):
        if not isinstance(id, str):
            raise TypeError(f"id {id!r} is {type(id).__name__}, not str")
        if UNWRITABLE.search(id):
            return id
    return None


def write_run(run: dict, path: str | Path, tag: str = "lib", k: int = 1000) -> None:
    """A TREC run file of each query's k best documents, ids as they are.

    Scores are float32, as trec_eval reads them. A query without documents has no line.

    Raises:
        ValueError: an id or tag that such a file cannot hold, or a score that is not finite;
            nothing is written.
        TypeError: an id is no string.
    """
    documents = chain.from_iterable(run.values())
    for name, ids in (("tag", [tag]), ("query id", run), ("document id", documents)):
        if (id := unwritable(ids)) is not None:
            raise ValueError(
                f"{name} {id!r} cannot stand in {path}: fields of a TREC file are parted by white "
                "space and never quoted, so it must not be empty or hold white space, a control "
                "character or a lone surrogate: rename it"
            )
    lines = []
    for qid, scores in run.items():
        for rank, pid in enumerate(ranking(scores)[:k], start=1):
            score = np.float32(scores[pid])
            if not np.isfinite(score):
                raise ValueError(f"query {qid}: the score of {pid} is {score}")
            lines.append(f"{qid} Q0 {pid} {rank} {score!s} {tag}\n")
    files.write(path, "".join(lines))


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """The run of a file by `write_run` or by any TREC tool; scores are rounded to float32.

    As those tools read it: fields are separated by any amount of ASCII white space and by nothing
    else (U+00A0 and quotes are part of an id). Lines may end in \\r\\n or be empty, and the file
    may begin with a byte order mark.

    Raises:
        ValueError: a line that is no run line, or a document ranked twice; path and line are named.
    """
    run: dict = {}
    with open(path, "rb") as file:  # bytes split at ASCII white space alone
        for number, line in enumerate(file, start=1):
            parts = (line.removeprefix(BOM_UTF8) if number == 1 else line).split()
            if not parts:
                continue
            try:
                qid, pid, score = run_line(parts)
                if pid in run.setdefault(qid, {}):
                    raise ValueError(f"query {qid} ranks {pid} twice")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            run[qid][pid] = score
    return run


def run_line(parts: list[bytes]) -> tuple[str, str, float]:
    """(qid, pid, score) of the fields of a line."""
    if len(parts) != 6:
        raise ValueError(f"a run line has six fields (qid Q0 pid rank score tag), got {len(parts)}")
    score = float(np.float32(parts[4].decode()))
    if not np.isfinite(score):
        raise ValueError(f"the score is {parts[4].decode()}")
    return parts[0].decode(), parts[2].decode(), score
