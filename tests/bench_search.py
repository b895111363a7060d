"""Exact search in seconds and memory, beside faiss's, from 10,000 documents to a million.

    python tests/bench_search.py                           10,000 and 100,000 documents: a minute
    python tests/bench_search.py --documents 1000000       minutes, 4 GiB

Approximate indexes: docs/search.md has the recipe and what was measured.

The vectors are made: 50 fields, 1,000 topics in them of sizes after Zipf, and around each topic a
Gaussian in 16 directions of its own with a little noise in all. Queries are drawn as documents are.

Each method runs in a process of its own. Times are the best of the repeats, the exact methods in
turns. *memory* is the most that the process held beyond the documents and what python holds
anyway; *limit* is the rate of torch's float32 product of one block, between those turns.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lib.benchmark import metrics, search

KINDS = ["exact", "flat"]
HEAD = (
    "documents",
    "how",
    "build, s",
    "index, GiB",
    "ms a query",
    "one alone, ms",
    "recall@10",
    "memory, GiB",
    "GFLOP/s",
    "of the limit",
)


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


def seconds(work, repeats: int) -> tuple[float, object]:
    """(the best, result)"""
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        took.append(time.perf_counter() - started)
    return min(took), result


def product_rate(documents: np.ndarray, queries: np.ndarray) -> float:
    """FLOP/s of the product of one block, the best of seven."""
    table, columns = (
        torch.from_numpy(np.array(documents[: search.ROWS])),
        torch.from_numpy(queries).T,
    )
    out = torch.empty(len(table), len(queries))
    return max(
        2 * out.numel() * table.shape[1] / seconds(lambda: torch.mm(table, columns, out=out), 1)[0]
        for _ in range(7)
    )


def row(
    documents,
    how,
    build=None,
    size=None,
    batch=None,
    alone=None,
    recall=None,
    memory=None,
    rate=None,
    limit=None,
) -> None:
    cells = [
        f"{documents:,}",
        how,
        *(
            "" if value is None else f"{value:{form}}"
            for value, form in (
                (build, ".1f"),
                (size, ".2f"),
                (batch, ".3f"),
                (alone, ".2f"),
                (recall, ".3f"),
                (memory, ".2f"),
                (rate and rate / 1e9, ".0f"),
                (limit and rate / limit, ".0%"),
            )
        ),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def measure(folder: Path, kind: str, repeats: int) -> None:
    queries, documents = (
        np.load(folder / "queries.npy"),
        np.load(folder / "documents.npy", mmap_mode="r"),
    )
    (N, D), Q = documents.shape, len(queries)
    qids, pids = [str(i) for i in range(Q)], [str(i) for i in range(N)]
    stored = folder / "exact.json"

    def recall(run):
        best = {qid: dict.fromkeys(pids, 1) for qid, pids in json.loads(stored.read_text()).items()}
        return metrics.recall(run, best, k=10)

    if kind == "exact":
        ways = {
            "exact: torch": (np.array(documents), "torch"),
            "exact: torch, documents in a file": (documents, "torch"),
            "exact: faiss in blocks": (documents, "faiss"),
        }
        took, held, limit = {how: np.inf for how in ways}, dict.fromkeys(ways, 0.0), 0.0
        for _ in range(repeats):
            for how, (table, backend) in ways.items():
                limit, memory = max(limit, product_rate(documents, queries)), Memory()
                work = partial(search.search, queries, table, qids, pids, 10, backend)
                once, run = seconds(work, 1)
                took[how], held[how] = (
                    min(took[how], once),
                    max(held[how], memory.beyond(last=True)),
                )
                if not stored.exists():
                    stored.write_text(json.dumps({qid: list(best) for qid, best in run.items()}))
                assert recall(run) == 1, how
        for how, (table, backend) in ways.items():
            work = partial(search.search, queries[:1], table, qids[:1], pids, 10, backend)
            alone, _ = seconds(work, repeats)
            row(
                N,
                how,
                None,
                0,
                took[how] / Q * 1e3,
                alone * 1e3,
                1,
                held[how],
                2 * N * D * Q / took[how],
                limit,
            )
    else:
        import faiss

        limit, memory = product_rate(documents, queries), Memory()
        table = faiss.IndexFlatIP(D)
        build, _ = seconds(
            lambda: [table.add(block.numpy()) for _, block in search.blocks(documents)], 1
        )
        took, (_, rows) = seconds(lambda: table.search(queries, 10), repeats)
        alone, _ = seconds(lambda: table.search(queries[:1], 10), 3)
        row(
            N,
            "faiss IndexFlatIP",
            build,
            N * D * 4 / 2**30,
            took / Q * 1e3,
            alone * 1e3,
            recall({qid: dict.fromkeys(map(str, best), 1.0) for qid, best in zip(qids, rows)}),
            memory.beyond(last=True),
            2 * N * D * Q / took,
            limit,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="exact always runs first"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the vectors are put meanwhile (default: a temporary folder)",
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1], options.repeats)
    else:
        print(
            f"{options.queries} queries of {options.width} dimensions, 10 best, "
            f"{torch.get_num_threads()} threads, the best of {options.repeats}\n"
        )
        print(
            "| " + " | ".join(HEAD) + " |\n|---:|---" + "|---:" * (len(HEAD) - 2) + "|", flush=True
        )
        for N in options.documents:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                write_vectors(Path(folder), N, options.width, options.queries)
                for kind in dict.fromkeys(["exact", *options.kinds]):
                    subprocess.run(
                        [
                            sys.executable,
                            __file__,
                            "--measure",
                            folder,
                            kind,
                            "--repeats",
                            str(options.repeats),
                        ],
                        check=True,
                    )
