"""Exact search in seconds and memory, beside faiss's, from 10,000 documents to a million.

    python tests/bench_search.py                           10,000 and 100,000 documents: a minute
    python tests/bench_search.py --documents 1000000       minutes, 10 GiB

Approximate indexes: docs/search.md has the recipe and what was measured.

The vectors are made: 50 fields, 1,000 topics in them of sizes after Zipf, and around each topic a
Gaussian in 16 directions of its own with a little noise in all. Queries are drawn as documents are.

The methods take turns, round by round, in one process for each number of documents. Times are the
best of the rounds; with one thread they are processor time, which other work on the machine
disturbs less. *× flat* is the time over that of faiss `IndexFlatIP`, the median of the rounds'
ratios; *memory* the most that the process held beyond what it held before; *limit* the rate of
torch's float32 product of one block in the same rounds.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from lib.benchmark import metrics, search

FLAT = "faiss IndexFlatIP"
HEAD = (
    "documents",
    "how",
    "ms a query",
    "× flat",
    "one alone, ms",
    "recall@10",
    "memory, GiB",
    "GFLOP/s",
    "of the limit",
)
clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def write_vectors(folder: Path, N: int, D: int, Q: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)

    def normal(*shape):  # rows of norm 1
        return rng.standard_normal(shape, dtype=np.float32) / shape[-1] ** 0.5

    fields, topics, rank = 50, 1000, 16
    centres = 0.7 * normal(fields, D)[rng.integers(fields, size=topics)] + 0.7 * normal(topics, D)
    directions = normal(topics, rank, D)
    often = 1 / (10 + np.arange(topics))
    for name, n in (("documents", N), ("queries", Q)):
        vectors = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(n, D)
        )
        for first in range(0, n, 2**15):
            topic = rng.choice(topics, size=min(2**15, n - first), p=often / often.sum())
            block = centres[topic] + 0.3 * normal(len(topic), D)
            for one in np.unique(topic):
                block[topic == one] += 0.8 * normal((topic == one).sum(), rank) @ directions[one]
            vectors[first : first + len(topic)] = block / np.linalg.norm(
                block, axis=1, keepdims=True
            )


class Memory(threading.Thread):
    """The most that the process held in memory of its own since this began, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.began = self.most = self.now()
        self.going = True
        self.start()

    def run(self) -> None:
        while self.going:
            self.most = max(self.most, self.now())
            time.sleep(0.005)

    def now(self) -> int:
        try:
            return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
        except (OSError, IndexError):  # not Linux: the peak, files included
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )

    def beyond(self, last: bool = False) -> float:
        """GiB; the last call ends the watch."""
        self.going = not last
        return (max(self.most, self.now()) - self.began) / 2**30


def seconds(work) -> tuple[float, object]:
    """(seconds, result)"""
    started = clock()
    result = work()
    return clock() - started, result


def product_rate(documents: np.ndarray, queries: np.ndarray) -> float:
    """FLOP/s of the product of one block, the best of seven."""
    table, columns = (
        torch.from_numpy(np.array(documents[: search.ROWS])),
        torch.from_numpy(queries).T,
    )
    out = torch.empty(len(table), len(queries))
    flop = 2 * out.numel() * table.shape[1]
    return flop / min(seconds(lambda: torch.mm(table, columns, out=out))[0] for _ in range(7))


def flat_index(documents: np.ndarray):
    """faiss `IndexFlatIP` of the documents, and the seconds and GiB that it took."""
    import faiss

    memory, index = Memory(), faiss.IndexFlatIP(documents.shape[1])
    took, _ = seconds(lambda: [index.add(block.numpy()) for _, block in search.blocks(documents)])
    return index, took, memory.beyond(last=True)


def measure(folder: Path, rounds: int) -> None:
    queries = np.load(folder / "queries.npy")
    stored = np.load(folder / "documents.npy", mmap_mode="r")
    (N, D), Q, k = stored.shape, len(queries), 10
    qids, pids = [str(i) for i in range(Q)], [str(i) for i in range(N)]
    index, build, index_gib = flat_index(stored)

    def flat(some: np.ndarray, _) -> dict:
        scores, rows = index.search(some, k)
        best = (zip(map(str, row), score.tolist()) for row, score in zip(rows, scores))
        return dict(zip(qids, map(dict, best)))

    def exact(documents, backend: str):
        return lambda some, names: search.search(some, documents, names, pids, k, backend)

    ways = {
        "exact: torch": exact(np.array(stored), "torch"),
        "exact: torch, documents in a file": exact(stored, "torch"),
        "exact: faiss in blocks": exact(stored, "faiss"),
        FLAT: flat,
    }
    took, alone, held = ({how: [] for how in ways} for _ in range(3))
    limit, runs = 0.0, {}
    for _ in range(rounds):
        for how, way in ways.items():
            limit, memory = max(limit, product_rate(stored, queries)), Memory()
            once, runs[how] = seconds(lambda way=way: way(queries, qids))
            held[how].append(memory.beyond(last=True))
            took[how].append(once)
            alone[how].append(seconds(lambda way=way: way(queries[:1], qids[:1]))[0])
    best = {qid: dict.fromkeys(run, 1) for qid, run in runs["exact: torch"].items()}
    for how in ways:
        recall = metrics.recall(runs[how], best, k=k)
        assert how == FLAT or recall == 1, how
        ratio = statistics.median(a / b for a, b in zip(took[how], took[FLAT]))
        rate, gib = 2 * N * D * Q / min(took[how]), max(held[how]) + index_gib * (how == FLAT)
        cells = f"{N:,}", how, f"{min(took[how]) / Q * 1e3:.3f}", f"{ratio:.2f}"
        cells += f"{min(alone[how]) * 1e3:.2f}", f"{recall:.3f}", f"{gib:.2f}"
        cells += f"{rate / 1e9:.0f}", f"{rate / limit:.0%}"
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nThe index of {N:,} documents was built in {build:.1f} s.\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the vectors are put meanwhile (default: a temporary folder)",
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.rounds)
        sys.exit()
    print(
        f"{options.queries} queries of {options.width} dimensions, 10 best, "
        f"{torch.get_num_threads()} threads, {options.rounds} rounds\n"
    )
    print("| " + " | ".join(HEAD) + " |\n|---:|---" + "|---:" * (len(HEAD) - 2) + "|", flush=True)
    for N in options.documents:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_vectors(Path(folder), N, options.width, options.queries)
            command = [sys.executable, __file__, "--measure", folder]
            subprocess.run([*command, "--rounds", str(options.rounds)], check=True)
