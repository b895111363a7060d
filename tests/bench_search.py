"""Exact search in seconds and memory: 500 queries over 20,000 documents of 384 numbers, with either backend.

    python tests/bench_search.py [documents] [width]

One process a backend, so that each one's peak memory is its own.
"""
import subprocess
import sys

MEASURE = """
import resource, sys, time
import numpy as np
from lib import retrieve
backend, N, D, Q = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)
documents, queries = (rng.standard_normal((n, D)).astype(np.float32) for n in (N, Q))
documents, queries = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (documents, queries))
qids, pids = [f"q{i}" for i in range(Q)], [f"d{i}" for i in range(N)]
started = time.perf_counter()
run = retrieve.search(queries, documents, qids, pids, k=100, backend=backend)
took = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(f"{backend:6} {N:9,} documents x {D}, {Q} queries, 100 best: {took:.2f} s, {peak / 2**30:.2f} GiB at most")
"""

if __name__ == "__main__":
    N, D = (sys.argv[1:] + ["20000", "384"][len(sys.argv) - 1 :])[:2]
    for backend in ("torch", "faiss"):
        subprocess.run([sys.executable, "-c", MEASURE, backend, N, D, "500"], check=True)
