"""Which documents say the same: a copy with another title or other line breaks is no wrong answer.

    near_duplicates(texts)     the pairs that share most of their runs of 13 words
    question(text)             what two queries share that ask the same
    word_codes(text)           what counts as a word

A text is the set of its runs; two texts are near-identical where |A ∩ B| / |A ∪ B|, the Jaccard
index of their sets, reaches 0.8. To compare all pairs would be quadratic, so they are looked up. Put
every set in one order, the rarest run first: sets that overlap by α runs share one of the first
|A| - α + 1 of A and |B| - α + 1 of B (the prefix filter). A run that all texts have, of a licence
or a form, stands last and is hardly ever looked up.

Source: Chaudhuri et al. 2006 (prefix filter), Bayardo et al. 2007 (all pairs, by size); Irber et
        al. 2022 (FracMinHash) for the sample that stands in for very many runs.
"""

import functools
import math
import unicodedata

import numpy as np

MOST_RUNS = 1 << 25  # held at a time, 8 bytes each; of more than that, a share
ODD = np.uint64(0xD6E8FEB86659FD93)
PARTS, LETTER, ALONE, MARK, NOTHING = range(5)  # what a character is to a word
# Scripts that put no space between words: Thai and Lao, Burmese, Khmer, kana, Chinese.
UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)


def question(text: str) -> str:
    """A query without what does not change it: white space, case, how its accents are encoded."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def near_duplicates(texts: list[str], size: int = 13, jaccard: float = 0.8) -> np.ndarray:
    """Pairs of near-identical texts.

        J(A, B) = |A ∩ B| / |A ∪ B| ≥ jaccard,  A the set of a text's runs of `size` words

    A text of fewer words is near-identical to those of the same words, and a text without a word to
    those of the same signs. The relation is of pairs, not of chains: A ~ B and B ~ C do not make
    A ~ C. Pairs are exact, and the same on every machine, up to MOST_RUNS runs in all; beyond it
    each text keeps those whose hash falls in one share of all hashes (1/2, 1/4, …) and always its
    smallest: J is then an estimate, with a standard error of about sqrt(J (1 - J) / runs kept).

    Returns:
        (P, 2) integers, i < j, ascending. Time and memory grow with the runs and with P: k copies
        of one text make k (k - 1) / 2 pairs.
    """
    sets = run_codes(texts, size)
    by_size = np.argsort([len(codes) for codes in sets], kind="stable")
    sets = [sets[i] for i in by_size]  # from here on i < j is |A| ≤ |B|
    sizes = np.array([len(codes) for codes in sets], dtype=np.int64)
    # How many texts have a bucket of runs. The order need only be one for all texts, so buckets will do;
    # a run in a bucket of one text is in no other text.
    mask = np.uint64((1 << min(25, int(sizes.sum()).bit_length() + 1)) - 1)
    texts_with = np.zeros(int(mask) + 1, dtype=np.int32)
    for codes in sets:
        texts_with[codes & mask] += 1
    listed, looked_up = [], []
    for i, codes in enumerate(sets):
        rarity = texts_with[codes & mask]
        sets[i] = shared = codes[rarity > 1]
        rarity = np.minimum(rarity[rarity > 1], 65_535).astype(np.uint16)
        rare_first = shared[np.argsort(rarity, kind="stable")]
        # J ≥ t and |A| ≤ |B| make |A ∩ B| at least 2t / (1 + t) |A|, where A is listed, and t |B|, which looks up.
        for heads, least in ((listed, 2 * jaccard / (1 + jaccard)), (looked_up, jaccard)):
            head = len(codes) - math.ceil(least * len(codes) - 1e-9) + 1
            heads.append(rare_first[: max(0, head - (len(codes) - len(shared)))])
    codes, owner = (
        np.concatenate([*listed, np.empty(0, dtype=np.uint64)]),
        np.repeat(np.arange(len(sets)), [len(head) for head in listed]),
    )
    order = np.argsort(codes, kind="stable")
    codes, owner, pairs = codes[order], owner[order], []
    for j, head in enumerate(looked_up):
        low, high = (np.searchsorted(codes, head, side) for side in ("left", "right"))
        reach = high - low
        found = owner[np.repeat(low - np.cumsum(reach) + reach, reach) + np.arange(reach.sum())]
        for i in np.unique(found[(found < j) & (sizes[found] >= jaccard * sizes[j] - 1e-9)]):
            both = np.sort(
                np.concatenate([sets[i], sets[j]]), kind="stable"
            )  # a merge: both are sorted
            overlap = np.count_nonzero(both[1:] == both[:-1])
            if overlap / (sizes[i] + sizes[j] - overlap) >= jaccard:
                pairs.append(sorted((by_size[i], by_size[j])))
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def run_codes(texts: list[str], size: int) -> list[np.ndarray]:
    """For each text the codes of its runs, ascending and each once; at least one, whatever the text."""
    sets, total, halvings = [], 0, 0
    for text in texts:
        words = word_codes(text)
        n = min(size, len(words))
        runs = np.full(
            len(words) - n + 1, n, dtype=np.uint64
        )  # a short text's run is no other's part
        for i in range(n):
            runs = runs * ODD + words[i : len(words) - n + 1 + i]
        runs = mixed(runs)
        runs.sort()
        sets.append(share(runs[np.concatenate([[True], runs[1:] != runs[:-1]])], halvings))
        total += len(sets[-1])
        while total > MOST_RUNS and halvings < 63:
            halvings += 1
            for i, codes in enumerate(sets):
                sets[i] = share(codes, halvings)
            total = sum(map(len, sets))
    return sets


def share(codes: np.ndarray, halvings: int) -> np.ndarray:
    """Of ascending codes those below 2^(64 - halvings), and the smallest, so that equal sets stay equal."""
    return (
        codes[: max(1, np.searchsorted(codes, np.uint64((1 << 64 - halvings) - 1), "right"))].copy()
        if halvings
        else codes
    )


def word_codes(text: str) -> np.ndarray:
    """A 64-bit code for each word of a text, in order: the sum of its characters' codes at their places.

    A word is a run of letters, digits and their combining marks, whatever its case. Where a script
    puts no space between words a run could be a whole sentence, so there each character is a word,
    with the marks on it. A text without a word counts as one word of its signs.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    characters = code_points(text)
    kind = kinds()[characters]
    if kind.max(initial=0) == NOTHING:
        characters, kind = characters[kind != NOTHING], kind[kind != NOTHING]
    mark = kind == MARK
    if mark.any():  # a mark is of the kind of what it stands on
        kind = np.where(mark, PARTS, kind)[
            np.maximum.accumulate(np.where(mark, 0, np.arange(len(kind))))
        ]
    start = (kind == ALONE) & ~mark | (kind == LETTER) & (
        np.concatenate([[PARTS], kind[:-1]]) != LETTER
    )
    inside = kind != PARTS
    starts = np.flatnonzero(start[inside])
    characters = characters[inside]
    if not len(starts):
        characters, starts = code_points("".join(text.split())), np.array([0])
    if not len(characters):
        return np.empty(0, dtype=np.uint64)
    place = np.arange(len(characters)) - np.repeat(starts, np.diff(starts, append=len(characters)))
    return np.add.reduceat(
        mixed(characters.astype(np.uint64) << np.uint64(32) | place.astype(np.uint64)), starts
    )


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


@functools.cache
def kinds() -> np.ndarray:
    """What each Unicode character is to a word; those that nobody sees, such as soft hyphens, are nothing."""
    table = np.full(0x110000, PARTS, dtype=np.uint8)
    for c in (*range(0x323B0), *range(0xE0100, 0xE01F0)):
        category = unicodedata.category(chr(c))
        if category[0] == "M":
            table[c] = MARK
        elif chr(c).isalnum():
            table[c] = ALONE if any(first <= c <= last for first, last in UNSPACED) else LETTER
        elif category == "Cf" and c != 0x200B:  # the zero-width space does part words
            table[c] = NOTHING
    return table


def mixed(x: np.ndarray) -> np.ndarray:
    """64-bit integers scrambled one to one: every bit of the result hangs on all of x."""
    for _ in range(2):
        x = (x ^ x >> np.uint64(32)) * ODD
    return x ^ x >> np.uint64(32)
