"""Long documents made of documented items, and the items in them that a query may ask for.

    as_parts(items, count, tokenizer)    items with their lengths in word pieces
    pack(parts, n)                       consecutive parts in documents of at most n tokens
    digests(parts), pages(parts)         documents of 24 unrelated items, of one module
    choose(parts, zones)                 a document without the summaries that are asked for
    tail(module, count)                  a module's source, asked for by its last three items

A query is the summary of an item, and the document does not contain that summary.
"""

import itertools
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from lib.corpus.packages import Item, Module, normal, sha256
from lib.corpus.tokenizer import lengths

PAGE_TOKENS = (1_500, 131_072)
DIGEST_ITEMS, DIGEST_TOKENS = 24, (60, 1_500)
BODY_TOKENS = 16  # of an item that is asked for: enough to find it by


class Part(NamedTuple):
    """An item with its lengths in word pieces."""

    item: Item
    name_tokens: int
    summary_tokens: int
    lines: tuple[int, ...]  # of its body
    unique: bool  # its summary has at least four words, and no other item has it

    @property
    def tokens(self) -> int:
        return self.name_tokens + self.summary_tokens + sum(self.lines)

    @property
    def asks(self) -> bool:
        """May its summary serve as a query?"""
        return self.unique and sum(self.lines) >= BODY_TOKENS


class Zone(NamedTuple):
    """Where in a document an item must start to be asked for."""

    low: float  # shares of the document, of its tokens and of its characters
    high: float
    count: int  # queries of one document at most
    after: int = 0  # tokens


class Document(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # of each part, in characters
    starts: list[int]  # of each part, in tokens
    tokens: int

    def inside(self, i: int, zone: Zone) -> bool:
        """Does part i start in the zone?"""
        shares = self.starts[i] / max(self.tokens, 1), self.spans[i][0] / max(len(self.text), 1)
        return self.starts[i] >= zone.after and all(zone.low <= x <= zone.high for x in shares)


def as_parts(items: list[Item], count: Counter, tokenizer) -> list[Part]:
    """Items with their lengths. Word pieces never cross white space, so lengths of lines add up.

    Args:
        count: how many items of the library have a summary, by its normalised words.
    """
    bodies = [item.body.split("\n") for item in items]
    names, summaries = [item.name for item in items], [item.summary for item in items]
    texts = dict.fromkeys(itertools.chain(*bodies, names, summaries))
    tokens = dict(zip(texts, lengths(tokenizer, list(texts)).tolist()))
    parts = []
    for item, body in zip(items, bodies):
        lines, plain = tuple(tokens[line] for line in body), normal(item.summary)
        words = min(len(item.summary.split()), len(plain.split()))
        unique = words >= 4 and count[plain] == 1
        parts.append(Part(item, tokens[item.name], tokens[item.summary], lines, unique))
    return parts


def cut(part: Part, most: int) -> Part:
    """The part, its body cut at the end of a line to at most `most` tokens altogether."""
    if part.tokens <= most:
        return part
    room = most - part.name_tokens - part.summary_tokens
    keep = int(np.searchsorted(np.cumsum(part.lines), room, side="right"))
    body = "\n".join(part.item.body.split("\n")[:keep]).rstrip()
    return part._replace(item=part.item._replace(body=body), lines=part.lines[:keep])


def pack(parts: list[Part], n: int) -> list[list[Part]]:
    """Consecutive parts in documents of at most n tokens, [CLS] and [SEP] included.

    No part takes more than half of a document. The last part is cut to the room that is left, so
    that documents are close to n tokens and "the second half" is the same place in all of them.
    """
    packs, current, used = [], [], 0
    for part in parts:
        part = cut(part, n // 2 - 1)
        if sum(part.lines) < BODY_TOKENS // 2 or part.tokens > n // 2 - 1:
            continue
        room = n - 2 - used
        if part.tokens > room:
            last = cut(part, room)
            fits = room >= n // 8 and sum(last.lines) >= 2 * BODY_TOKENS
            packs.append(current + [last] if fits else current)
            current, used = ([], 0) if fits else ([part], part.tokens)
        else:
            current.append(part)
            used += part.tokens
    return packs + [current] if used > n // 2 else packs


def render(parts: list[Part], asked: set[int] = frozenset()) -> Document:
    """The parts joined into one text; those asked for lose their summary."""
    texts, spans, starts, start, tokens = [], [], [], 0, 0
    for i, part in enumerate(parts):
        text = part.item.text(summary=i not in asked)
        texts.append(text)
        spans.append((start, start + len(text)))
        starts.append(tokens)
        start += len(text) + 2
        tokens += part.tokens - (part.summary_tokens if i in asked else 0)
    return Document("\n\n".join(texts), spans, starts, tokens)


def choose(parts: list[Part], zones: dict[str, Zone]) -> tuple[Document, dict[str, list[int]]]:
    """The document without the summaries asked for, and the parts asked for in each zone.

    A part asked for in one zone serves the later ones too. It must lie in its zone before the
    summaries are taken out and after, and its summary must not be left elsewhere in the document.
    """
    before = render(parts)
    chosen: dict[str, list[int]] = {}
    asked: set[int] = set()
    for name, zone in zones.items():
        inside = [i for i, part in enumerate(parts) if part.asks and before.inside(i, zone)]
        taken = [i for i in inside if i in asked]
        fresh = spread([i for i in inside if i not in asked], max(0, zone.count - len(taken)))
        chosen[name] = sorted(taken + fresh)[: zone.count]
        asked.update(chosen[name])
    document = render(parts, asked)
    words = f" {normal(document.text)} "
    left = {i for i in asked if f" {normal(parts[i].item.summary)} " in words}
    return document, {
        name: [i for i in indices if i not in left and document.inside(i, zones[name])]
        for name, indices in chosen.items()
    }


def spread(things: list, count: int | None) -> list:
    """`count` of the things, evenly spaced, in order; None: all of them."""
    if count is None or count >= len(things):
        return list(things)
    return [things[(2 * i + 1) * len(things) // (2 * count)] for i in range(count)]


def digests(parts: list[Part]) -> list[list[Part]]:
    """Documents of 24 unrelated items: in the order of a hash."""
    pool = [part for part in parts if DIGEST_TOKENS[0] <= part.tokens <= DIGEST_TOKENS[1]]
    pool.sort(key=lambda part: sha256(part.item.name))
    starts = range(0, len(pool) - DIGEST_ITEMS + 1, DIGEST_ITEMS)
    return [pool[start : start + DIGEST_ITEMS] for start in starts]


def pages(parts: list[Part]) -> list[list[Part]]:
    """The parts of each module with at least five parts, if their length is in PAGE_TOKENS."""
    low, high = PAGE_TOKENS
    modules = [list(page) for _, page in itertools.groupby(parts, lambda part: part.item.module)]
    lengths_of = [sum(part.tokens for part in page) for page in modules]
    return [page for page, n in zip(modules, lengths_of) if low <= n <= high and len(page) >= 5]


def tail(module: Module, count: Counter) -> tuple[Document, str] | None:
    """The module's source without docstrings, and the summaries of its last three items.

    None if the module has fewer unique items, if its source is too short or too long, or if a
    summary or a definition cannot be told apart in the source.
    """
    prefix, (low, high) = f"{module.name}.", PAGE_TOKENS
    inside = [item for item in module.items if item.name.startswith(prefix) and item.summary]
    asked = [item for item in inside if count[normal(item.summary)] == 1][-3:]
    if len(asked) < 3 or not 4 * low <= len(module.code) <= 4 * high:
        return None
    words = f" {normal(module.code)} "
    starts = [definition(item.name.removeprefix(prefix), module.code) for item in asked]
    if None in starts or any(f" {normal(item.summary)} " in words for item in asked):
        return None
    document = Document(module.code, [(min(starts), len(module.code))], [0], 0)
    return document, " ".join(item.summary for item in asked)


def definition(dotted: str, code: str) -> int | None:
    """Where `Class.method` is defined: the method's first definition after the class."""
    start = 0
    for name in dotted.split("."):
        line = re.compile(rf"(?m)^[ \t]*(?:async def|def|class) {re.escape(name)}\b")
        match = line.search(code, start)
        if not match:
            return None
        start = match.start()
    return start
