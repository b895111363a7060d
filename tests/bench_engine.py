"""Tokens a second of the published 80M shape on a CPU, in one interleaved run: the model's forward, both engines, BERT-base.

    python tests/bench_engine.py [length …]          one thread; THREADS=2 for two

`limit` is what the products of the encoder allow: the machine's own rate of bfloat16 products, measured in the same run, over
0.10 GFLOP a token. BERT-base is transformers' own in bfloat16 with SDPA, up to 8,192 tokens. Weights are random: speed does not
depend on them. One JSON line a length, medians; peak_gib is the process's so far.
"""
import json
import os
import resource
import statistics
import sys
import time

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from lib import native
from lib.engine import Engine
from lib.model import M2BertConfig, M2BertForRetrieval

GFLOP_A_TOKEN = 0.10


def rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product like those of the encoder."""
    x, w = torch.randn(2048, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    taken = []
    for _ in range(12):
        started = time.perf_counter()
        F.linear(x, w)
        taken.append(time.perf_counter() - started)
    return 2 * 2048 * 768 * 3072 / statistics.median(taken[2:]) / 1e9


@torch.no_grad()
def measure(length: int) -> dict:
    torch.manual_seed(0)
    model = M2BertForRetrieval(M2BertConfig(max_position_embeddings=length, initialization="identity")).eval()
    ids = torch.randint(5, 30000, (1, length))
    exact, half = Engine(model), Engine(model, torch.bfloat16)
    ways = {"model": lambda: model(ids).pooler_output, "float32": lambda: exact(ids.tolist()), "bfloat16": lambda: half(ids.tolist())}
    if length <= 8192:
        bert = BertModel(BertConfig(max_position_embeddings=length, attn_implementation="sdpa")).eval().bfloat16()
        ways["bert_base"] = lambda: bert(ids).last_hidden_state
    found = {name: way() for name, way in ways.items()}                    # and the spectra are there
    taken: dict = {name: [] for name in ways}
    rates = []
    for _ in range(5 if length <= 2048 else 1):
        rates.append(rate(torch.bfloat16))
        for name, way in ways.items():
            times = max(1, 1024 // length)
            started = time.perf_counter()
            for _ in range(times):
                way()
            taken[name].append((time.perf_counter() - started) / times)
    speed = {name: length / statistics.median(values) for name, values in taken.items()}
    limit = statistics.median(rates) / GFLOP_A_TOKEN
    return {"length_tokens": length, "threads": torch.get_num_threads(), "kernel": native.kernel() is not None, **{f"{name}_tokens_s": round(value) for name, value in speed.items()},
            "limit_tokens_s": round(limit), "bfloat16_of_limit": round(speed["bfloat16"] / limit, 2), "cosine": round(float(F.cosine_similarity(found["model"], found["bfloat16"])), 5),
            "float32_difference": float(f"{(found['model'] - found['float32']).abs().max():.1e}"),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30, 1)}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    for length in map(int, sys.argv[1:] or ("128", "512", "2048", "8192", "32768")):
        print(json.dumps(measure(length)), flush=True)
