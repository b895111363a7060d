"""Near-duplicate texts: a copy with another title or other line breaks is no wrong answer.

    near_duplicates(texts)    pairs of texts that share most of their shingles of 13 words
    normalized(text)          equal for two queries that ask the same

A text is the set of its shingles (runs of consecutive words). A prefix filter finds the candidate
pairs: if every set is sorted in one order, sets with α common shingles share one of the first
|A| - α + 1 of A and |B| - α + 1 of B. With the rarest first, a shingle of a licence or a form,
which many texts have, is rarely looked up.

Source: Chaudhuri et al. 2006 (prefix filter), Bayardo et al. 2007 (all pairs, by size); Irber et
        al. 2022 (FracMinHash) for the sample of very many shingles.
"""

import functools
import math
import re
import unicodedata

import numpy as np

MOST_SHINGLES = 1 << 25  # in memory at a time, 8 bytes each; of more, a sample is kept
ODD = np.uint64(0xD6E8FEB86659FD93)
SEPARATOR, LETTER, SINGLE, MARK, IGNORED = range(5)  # classes of characters; SINGLE: is a word
# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, kana, Chinese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U000323af]"
)


def normalized(text: str) -> str:
    """A query without differences of white space, case and the encoding of accents."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def near_duplicates(texts: list[str], size: int = 13, jaccard: float = 0.8) -> np.ndarray:
    """Pairs of near-duplicate texts.

        J(A, B) = |A ∩ B| / |A ∪ B| ≥ jaccard,  A the set of a text's shingles of `size` words

    A text of fewer words has one shingle of all its words, or of its characters if it has no word.
    A ~ B and B ~ C do not imply A ~ C. Pairs are exact up to MOST_SHINGLES shingles in all. Beyond
    it each text keeps those whose hash falls into a share of all hashes (1/2, 1/4, …) and always
    its smallest: J is then an estimate, with a standard error of about
    sqrt(J (1 - J) / shingles kept).

    Returns:
        (P, 2) integers, i < j, ascending: k copies of one text make k (k - 1) / 2 pairs.
    """
    sets = shingles(texts, size)
    by_size = np.argsort([len(codes) for codes in sets], kind="stable")
    sets = [sets[i] for i in by_size]  # from here on, i < j implies |A_i| ≤ |A_j|
    sizes = np.array([len(codes) for codes in sets], dtype=np.int64)
    sets, ordered = shared_shingles(sets)
    # J ≥ t and |A| ≤ |B| imply |A ∩ B| ≥ 2t / (1 + t) |A| and |A ∩ B| ≥ t |B|.
    indexed = prefixes(ordered, sizes, 2 * jaccard / (1 + jaccard))
    codes = np.concatenate([*indexed, np.empty(0, dtype=np.uint64)])
    owners = np.repeat(np.arange(len(sets)), [len(prefix) for prefix in indexed])
    order = np.argsort(codes, kind="stable")
    codes, owners, pairs = codes[order], owners[order], []
    for j, prefix in enumerate(prefixes(ordered, sizes, jaccard)):
        low, high = (np.searchsorted(codes, prefix, side) for side in ("left", "right"))
        counts = high - low
        starts = np.repeat(low - np.cumsum(counts) + counts, counts)
        candidates = owners[starts + np.arange(counts.sum())]
        long_enough = sizes[candidates] >= jaccard * sizes[j] - 1e-9
        for i in np.unique(candidates[(candidates < j) & long_enough]):
            both = np.sort(np.concatenate([sets[i], sets[j]]), kind="stable")
            overlap = np.count_nonzero(both[1:] == both[:-1])
            if overlap / (sizes[i] + sizes[j] - overlap) >= jaccard:
                pairs.append(sorted((by_size[i], by_size[j])))
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def shared_shingles(sets: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each set without shingles that no other set has: ascending, and the rarest first.

    Shingles are counted in buckets: a shingle alone in its bucket is in no other text, and any
    order that is the same for all texts will do.
    """
    mask = np.uint64((1 << min(25, sum(map(len, sets)).bit_length() + 1)) - 1)
    counts = np.zeros(int(mask) + 1, dtype=np.int32)
    for codes in sets:
        counts[codes & mask] += 1
    shared = [codes[counts[codes & mask] > 1] for codes in sets]
    rarity = (np.minimum(counts[codes & mask], 65_535).astype(np.uint16) for codes in shared)
    return shared, [codes[np.argsort(n, kind="stable")] for codes, n in zip(shared, rarity)]


def prefixes(sets: list[np.ndarray], sizes: np.ndarray, overlap: float) -> list[np.ndarray]:
    """The first shingles of each set, one of which is in every set with that share of it."""
    return [
        codes[: max(0, len(codes) - math.ceil(overlap * size - 1e-9) + 1)]
        for codes, size in zip(sets, sizes)
    ]


def shingles(texts: list[str], size: int) -> list[np.ndarray]:
    """The codes of each text's shingles, ascending, without repetition; at least one per text."""
    sets, total, halvings = [], 0, 0
    for text in texts:
        words = word_codes(text)
        n = min(size, len(words))
        # A short text's only shingle differs from those of longer texts by its first factor.
        codes = np.full(len(words) - n + 1, n, dtype=np.uint64)
        for i in range(n):
            codes = codes * ODD + words[i : len(words) - n + 1 + i]
        sets.append(sample(np.unique(scrambled(codes)), halvings))
        total += len(sets[-1])
        while total > MOST_SHINGLES and halvings < 63:
            halvings += 1
            sets = [sample(codes, halvings) for codes in sets]
            total = sum(map(len, sets))
    return sets


def sample(codes: np.ndarray, halvings: int) -> np.ndarray:
    """The ascending codes below 2^(64 - halvings), and always the smallest code."""
    if not halvings:
        return codes
    below = np.searchsorted(codes, np.uint64((1 << 64 - halvings) - 1), "right")
    return codes[: max(1, below)].copy()


def word_codes(text: str) -> np.ndarray:
    """A 64-bit code of each word of a text, in order: a sum over its characters and positions.

    A word is a run of letters, digits and their combining marks, in any case; in a script without
    spaces, a character with its marks; in a text without words, all but white space.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    characters = code_points(text)
    classes = character_classes()[characters]
    visible = classes != IGNORED
    characters, classes = characters[visible], classes[visible]
    mark = classes == MARK
    # A mark belongs to the class of the character before it.
    base = np.maximum.accumulate(np.where(mark, 0, np.arange(len(classes))))
    classes = np.where(mark, SEPARATOR, classes)[base]
    before = np.concatenate([[SEPARATOR], classes[:-1]])
    start = (classes == SINGLE) & ~mark | (classes == LETTER) & (before != LETTER)
    inside = classes != SEPARATOR
    starts, characters = np.flatnonzero(start[inside]), characters[inside]
    if not len(starts):
        characters, starts = code_points("".join(text.split())), np.array([0])
    if not len(characters):
        return np.empty(0, dtype=np.uint64)
    lengths = np.diff(starts, append=len(characters))
    position = np.arange(len(characters)) - np.repeat(starts, lengths)
    codes = characters.astype(np.uint64) << np.uint64(32) | position.astype(np.uint64)
    return np.add.reduceat(scrambled(codes), starts)


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


@functools.cache
def character_classes() -> np.ndarray:
    """The class of each Unicode character; invisible ones, such as soft hyphens, are IGNORED."""
    table = np.full(0x110000, SEPARATOR, dtype=np.uint8)
    for c in (*range(0x323B0), *range(0xE0100, 0xE01F0)):
        category = unicodedata.category(chr(c))
        if category[0] == "M":
            table[c] = MARK
        elif chr(c).isalnum():
            table[c] = SINGLE if UNSPACED.match(chr(c)) else LETTER
        elif category == "Cf" and c != 0x200B:  # a zero-width space does separate words
            table[c] = IGNORED
    return table


def scrambled(x: np.ndarray) -> np.ndarray:
    """64-bit integers under a bijection in which every bit of the result depends on all of x."""
    for _ in range(2):
        x = (x ^ x >> np.uint64(32)) * ODD
    return x ^ x >> np.uint64(32)
