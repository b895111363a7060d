"""Items, parts and documents by hand, where every word is one token; Python in another process."""

import os
import subprocess
import sys
from pathlib import Path

from lib.corpus.documents import Document, Part
from lib.corpus.packages import Item, normal
from lib.corpus.tasks import Candidate

ROOT = Path(__file__).parents[2]


def padded(text: str) -> str:
    """Normalised, so that `in` compares whole words."""
    return f" {normal(text)} "


def item(name: str, *lines: int, summary: str | None = None) -> Item:
    """An item whose body has so many words a line, none of which another item has."""
    words = iter(range(sum(lines)))
    body = "\n".join(" ".join(f"{name}{next(words)}" for _ in range(n)) for n in lines)
    return Item(
        "owls", name, f"Finds the {name} of everything." if summary is None else summary, body
    )


def part(
    name: str, *lines: int, summary: str | None = None, unique: bool = True, after: str = ""
) -> Part:
    """One token for the name, five for the summary, and one for each word of the lines."""
    made = item(name, *lines, summary=summary)
    return Part(made._replace(body=made.body + after), 1, len(made.summary.split()), lines, unique)


def names(parts: list[Part]) -> str:
    return "".join(part.item.name for part in parts)


def candidates(*bodies: str) -> list[Candidate]:
    """Documents of two items; the second answers the task deep, the first shallow."""
    result = []
    for number, body in enumerate(bodies):
        document = Document(f"head{number} {body}", [(0, 5), (6, 6 + len(body))], [0, 1], 9)
        queries = [f"the head number {number} of it", f"the tail number {number} of it"]
        result.append(Candidate(document, {"deep": [1], "shallow": [0]}, queries))
    return result


def elsewhere(code: str, seed: int, **changes) -> str:
    """What Python prints with another hash seed."""
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)} | changes
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=changes.get("HOME", ROOT),
    ).stdout
