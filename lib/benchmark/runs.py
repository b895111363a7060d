"""TREC run files: `qid Q0 pid rank score tag`, which any tool can score again.

write_run(run, path)     a run as a file
read_run(path)           run[query_id][doc_id] = score, of a file by any TREC tool
unwritable(ids)          the first id that such a file cannot hold

Fields are separated by white space and nothing is quoted.
"""

import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from lib.benchmark.metrics import ranking
from lib.pipeline import files
from lib.pipeline.errors import require

# White space of any alphabet and control characters, which separate fields or lines in some tool;
# half a character, which UTF-8 cannot write; a byte order mark where a file may begin.
UNWRITABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\ufeff|^$")


def unwritable(ids: Iterable[str]) -> str | None:
    """The first id that a TREC file cannot hold (it may be the empty one), or None."""
    return next((id for id in dict.fromkeys(ids) if UNWRITABLE.search(id)), None)


def write_run(run: dict, path: str | Path, tag: str = "lib", k: int = 1000) -> None:
    """Write the k best documents of each query. Scores are float32, as trec_eval reads them.

    Raises:
        ValueError: an id or tag that such a file cannot hold, or a score that is not finite;
            nothing is written.
        TypeError: an id is no string.
    """
    documents = chain.from_iterable(run.values())
    for name, ids in (("tag", [tag]), ("query id", run), ("document id", documents)):
        id = unwritable(ids)
        require(
            id is None,
            f"{name} {id!r} cannot stand in {path}: fields of a TREC file are parted by white "
            "space and never quoted, so it must not be empty or hold white space, a control "
            "character or a lone surrogate: rename it",
            ValueError,
        )
    lines = []
    for qid, scores in run.items():
        ids = ranking(scores)[:k]
        values = np.array([scores[pid] for pid in ids], dtype=np.float32)
        bad = next(iter(np.flatnonzero(~np.isfinite(values))), None)
        if bad is not None:
            raise ValueError(f"query {qid}: the score of {ids[bad]} is {values[bad]}")
        lines += [
            f"{qid} Q0 {pid} {rank} {value!s} {tag}\n"
            for rank, (pid, value) in enumerate(zip(ids, values), start=1)
        ]
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
            fields = (line.removeprefix(BOM_UTF8) if number == 1 else line).split()
            if not fields:
                continue
            try:  # messages are made when they are needed: a file has a hundred thousand lines
                qid, _, pid, _, score, _ = fields
                qid, pid, value = qid.decode(), pid.decode(), float(np.float32(score.decode()))
            except ValueError as error:
                form = "a run line has six fields (qid Q0 pid rank score tag), got "
                problem = error if len(fields) == 6 else f"{form}{len(fields)}"
                raise ValueError(f"{path}:{number}: {problem}") from None
            ranked = run.setdefault(qid, {})
            if pid in ranked or not math.isfinite(value):
                again = f"query {qid} ranks {pid} twice"
                problem = again if pid in ranked else f"the score is {score.decode()}"
                raise ValueError(f"{path}:{number}: {problem}")
            ranked[pid] = value
    return run
