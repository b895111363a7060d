"""Encoders race: the same random tokens, taking turns, each in a process of its own.

    entrants(config, device)     who races: the definition in eager float32, what this library runs, a Transformer twin
    race(entries, lengths, …)    seconds and peak memory, turn by turn; the machine's own limits take turns too
    table(turns, entries)        tokens a second, ratios, memory, shares of the limits: one line an entrant and length
    convolutions(lengths, …)     the gated long convolution alone, on a GPU

Turns (A B, A B, …) put a slow moment of the machine on both sides of a ratio; a process of its own gives each model its own peak
of memory, and the system's clock of work (`cpu_s`) its own threads. Weights are random: speed does not depend on them.
Axes: B texts, L tokens, D width.
"""

import ctypes
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F
from transformers import BertConfig

from lib import kernels
from lib.efficiency import counts
from lib.kernels import gpu
from lib.kernels.engine import Engine
from lib.model.m2bert import M2BertConfig
from lib.model.device import use

WAYS = ("forward", "definition", "torch", "engine", "compiled")
LIMITS = "limits"
log = logging.getLogger(__name__)
NOT_RUN = "not run: no GPU"


# ------------------------------------------------------------------ who races


def entrants(
    config: M2BertConfig, device: str = "cpu", shallow_from: int | None = None
) -> dict[str, dict]:
    """Who races against an M2-BERT of this configuration, by name.

    An entry is {"config", "way", "dtype", "shallow_from"} and perhaps "until". shallow_from: tokens from which on one layer is timed and counted for
    all, since a race should end, or None; until: tokens beyond which it stays out. Ways: `definition` (the equations of lib/model/m2bert.py), `forward` (the model as it is), `torch` (on a GPU:
    with torch.fft in place of lib/kernels/gpu.py), `compiled` (that, by torch.compile), `engine` (lib/kernels/engine.py).
    """

    def entry(way: str, dtype: str, config=config, shallow: int | None = None) -> dict:
        return {"config": config, "way": way, "dtype": dtype, "shallow_from": shallow}

    bert = counts.twin(config)
    if device == "cpu":
        return {
            "definition, float32": entry("definition", "float32", shallow=shallow_from),
            "model, float32": entry("forward", "float32", shallow=shallow_from),
            "engine, float32": entry("engine", "float32"),
            "engine, bfloat16": entry("engine", "bfloat16"),
            "Transformer twin, bfloat16": entry("forward", "bfloat16", bert, shallow_from),
        }
    large = dict(
        vocab_size=30522,
        max_position_embeddings=config.max_position_embeddings,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return {
        "definition, float32": entry("definition", "float32"),
        "torch.fft, bfloat16": entry("torch", "bfloat16"),
        "torch.compile, bfloat16": entry("compiled", "bfloat16"),
        "Monarch convolution, bfloat16": entry("forward", "bfloat16"),
        "Transformer twin, bfloat16": entry("forward", "bfloat16", bert),
        "BGE-large's shape, bfloat16": entry(
            "forward",
            "bfloat16",
            BertConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                intermediate_size=4096,
                num_attention_heads=16,
                **large,
            ),
        ),
        "a 7B shape, bfloat16": entry(
            "forward",
            "bfloat16",
            BertConfig(
                hidden_size=4096,
                num_hidden_layers=32,
                intermediate_size=18432,
                num_attention_heads=32,
                **large,
            ),
            0,
        ),
    }


def shallow_from(entry: dict, layers: int) -> float:
    """Tokens from which on one of an entrant's layers is timed; a model of one layer is never shallow."""
    return math.inf if entry["shallow_from"] is None or layers == 1 else entry["shallow_from"]


# ------------------------------------------------------------------ the race


def race(
    entries: dict[str, dict],
    lengths: list[int],
    batch: int = 1,
    repeats: int = 3,
    threads: int = 2,
    device: str = "cpu",
    seed: int = 0,
    budget_s: float | None = None,
    limits: bool = True,
) -> list[dict]:
    """Let entrants encode the same random tokens, taking turns.

    Args:
        entries: as `entrants` gives them.
        repeats: turns at each length, after one that warms up and is not reported (left out where an entrant
            is shallow: these are slow, and warm from shorter texts; at 8,192 tokens of the published size their first turn takes 0 to 10 % longer than the next ones).
        budget_s: seconds for one length: with less than that many turns taken, the next turns are left out (one is taken in any case).
        limits: whether the machine's own limits take turns too, as the model "limits".

    Returns:
        One {"model", "length_tokens", "batch", "turn", "layers", "dtype", "encode_s", "cpu_s", "peak_gib"} per entrant, length and
        turn, shortest first. encode_s is the wall's time (on a GPU: the device's, by its events), cpu_s the sum over threads, which a busy machine disturbs
        less; where `layers` are fewer than the model has, both are multiplied up (with what lies outside of the layers: half a percent at the published width) and peak_gib is NaN. peak_gib is the whole
        process's, Python, torch and weights included, NaN where the system does not tell; on a GPU what torch allocated there.
        Of "limits": gflops_float32, gflops_bfloat16 (a product like an encoder's) and gb_s (a copy larger than any cache).

    Raises:
        RuntimeError: a process died; the message says at which length, and what to lower.
        ValueError: a way that is none of WAYS.
    """
    for name, entry in entries.items():
        if entry["way"] not in WAYS:
            raise ValueError(f"{name} goes the way {entry['way']!r}: one of {', '.join(WAYS)}")
    entries = (entries | {LIMITS: None}) if limits else entries
    # Threads that wait sleep: spinning ones count as work, and on a busy machine they take the core from whom they wait for.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    runners = {
        name: subprocess.Popen(
            [sys.executable, "-m", "lib.efficiency.race"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in entries
    }
    turns = []
    try:
        for name, entry in entries.items():
            entry = entry and entry | {
                "kind": "m2bert" if isinstance(entry["config"], M2BertConfig) else "bert",
                "config": entry["config"].to_dict(),
            }
            say(
                runners[name],
                {"entry": entry, "compute": {"threads": threads, "device": device}, "seed": seed},
            )
        for length in sorted(lengths):
            started = time.monotonic()
            for turn in range(repeats + 1):
                if budget_s and turn > 1 and time.monotonic() - started > budget_s:
                    break
                for name, entry in entries.items():
                    if entry and (
                        length > (entry.get("until") or length)
                        or not turn
                        and length > min(lengths)
                        and 0 < shallow_from(entry, entry["config"].num_hidden_layers) <= length
                    ):
                        continue
                    answer = say(runners[name], {"length_tokens": length, "batch": batch})
                    if turn:
                        turns.append(
                            {"model": name, "length_tokens": length, "batch": batch, "turn": turn}
                            | answer
                        )
            log.info("the race at %d tokens took %.0f s", length, time.monotonic() - started)
    finally:
        for process in runners.values():
            process.terminate()
            process.communicate()
    return turns


def say(process: subprocess.Popen, message: dict) -> dict:
    """Send one line, wait for the one-line answer."""
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        where = (
            f"at {message['length_tokens']} tokens"
            if "length_tokens" in message
            else "while building its model"
        )
        raise RuntimeError(
            f"a measuring process ended {where} with code {process.wait()} (-9: killed by the system, often out of memory): "
            f"lower efficiency.lengths or efficiency.batch in params.yaml"
        )
    return json.loads(answer)


def runner() -> None:
    """The other end of `race`: builds a model from the first line, then encodes once per line until the lines end."""
    die_with_parent()
    task = json.loads(sys.stdin.readline())
    device = use(task["compute"])
    torch.manual_seed(task["seed"])
    encode = None if task["entry"] is None else encoding(task["entry"], device)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        forget_peak(device)
        with torch.inference_mode():
            print(
                json.dumps(limits(device) if encode is None else encode(turn, device)), flush=True
            )


def encoding(entry: dict, device: torch.device):
    """A function that encodes random tokens once and says what it cost."""
    kind = M2BertConfig if entry["kind"] == "m2bert" else BertConfig
    config = kind.from_dict(entry["config"])
    layers = config.num_hidden_layers
    if shallow_from(entry, layers) == 0:
        config.num_hidden_layers = 1
    model = counts.build(config).to(device)
    if entry["way"] != "engine":
        model = model.to(getattr(torch, entry["dtype"]))
    stack, name = (model.model, "layers") if entry["kind"] == "m2bert" else (model.encoder, "layer")
    every, first = getattr(stack, name), getattr(stack, name)[:1]
    ways = {"definition": "definition", "torch": "torch", "compiled": "torch"}
    back_end = ways.get(entry["way"], "auto")
    engine = Engine(model, getattr(torch, entry["dtype"])) if entry["way"] == "engine" else None
    forward = torch.compile(model, dynamic=False) if entry["way"] == "compiled" else model
    dtype = (
        entry["dtype"] if engine is None else str(engine.dtype).removeprefix("torch.")
    )  # float32 where there are no bfloat16 products

    def encode(turn: dict, device: torch.device) -> dict:
        shallow = turn["length_tokens"] >= shallow_from(entry, layers)
        setattr(stack, name, first if shallow else every)
        ids = torch.randint(5, config.vocab_size, (turn["batch"], turn["length_tokens"])).to(device)
        rows = ids.tolist()
        with kernels.use(back_end):
            took = timed(
                (lambda: engine(rows)) if engine is not None else (lambda: forward(ids)), device
            )
        times = layers if shallow else 1
        return (
            {"layers": len(getattr(stack, name)), "dtype": dtype}
            | {part: value * times for part, value in took.items()}
            | {"peak_gib": math.nan if shallow else peak_gib(device)}
        )

    return encode


def timed(work, device: torch.device) -> dict:
    """Seconds of work(): the wall's and the processor's; on a GPU its own instead of the wall's."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return {"encode_s": start.elapsed_time(end) / 1000, "cpu_s": time.process_time() - cpu}
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return {"encode_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


def limits(device: torch.device) -> dict:
    """What the machine can do: products of (2048, 768) and (768, 3072), and a copy of 256 MiB, medians of five."""

    def median(work) -> float:
        work()
        return statistics.median(timed(work, device)["encode_s"] for _ in range(5))

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (
            torch.randn(2048, 768, device=device).to(dtype),
            torch.randn(3072, 768, device=device).to(dtype),
        )
        found[f"gflops_{str(dtype).removeprefix('torch.')}"] = (
            2 * 2048 * 768 * 3072 / median(lambda: F.linear(x, w)) / 1e9
        )
    a, b = torch.zeros(2**26, device=device), torch.zeros(2**26, device=device)
    return found | {"gb_s": 2 * a.nbytes / median(lambda: b.copy_(a)) / 1e9}


# ------------------------------------------------------------------ what came of it


def table(turns: list[dict], entries: dict[str, dict]) -> pd.DataFrame:
    """One line an entrant and length, medians over turns.

    Columns: length_tokens, model, layers (those timed), dtype, turns, encode_s, fastest_s, slowest_s, cpu_s, tokens_s, over_definition and
    over_twin (how many times as fast, turn by turn), peak_gib; gflops and gflop_a_byte (counted operations and bytes, lib/efficiency/counts.py, in that time),
    of_products and of_bandwidth (products, and bytes, in that time as shares of the machine's limits, medians of all their turns).
    """
    turns = pd.DataFrame(turns)
    rate = (
        turns[turns["model"] == LIMITS][["gflops_float32", "gflops_bfloat16", "gb_s"]].median()
        if LIMITS in set(turns["model"])
        else None
    )
    turns = turns[turns["model"] != LIMITS]
    seconds = turns.pivot(index=["length_tokens", "turn"], columns="model", values="encode_s")
    found = (
        turns.groupby(["length_tokens", "model"], sort=False)
        .agg(
            batch=("batch", "first"),
            layers=("layers", "first"),
            dtype=("dtype", "first"),
            turns=("turn", "size"),
            encode_s=("encode_s", "median"),
            fastest_s=("encode_s", "min"),
            slowest_s=("encode_s", "max"),
            cpu_s=("cpu_s", "median"),
            peak_gib=("peak_gib", "max"),
        )
        .reset_index()
    )
    found["tokens_s"] = found["length_tokens"] * found["batch"] / found["encode_s"]
    for column, model in (
        ("over_definition", "definition, float32"),
        ("over_twin", "Transformer twin, bfloat16"),
    ):
        ratios = (seconds[[model]].to_numpy() / seconds) if model in seconds else seconds * math.nan
        found[column] = [
            ratios.loc[length][name].median()
            for length, name in zip(found["length_tokens"], found["model"])
        ]
    lines = []
    for line in found.itertuples():
        entry = entries[line.model]
        products, operations, moved = counts.cost(
            entry["config"], line.length_tokens, 4 if line.dtype == "float32" else 2, line.batch
        )
        lines.append(
            {
                "gflops": operations / line.encode_s / 1e9 * line.batch,
                "gflop_a_byte": operations / moved,
                "of_products": math.nan
                if rate is None
                else products * line.batch / line.encode_s / 1e9 / rate[f"gflops_{line.dtype}"],
                "of_bandwidth": math.nan
                if rate is None
                else moved * line.batch / line.encode_s / 1e9 / rate["gb_s"],
            }
        )
    return pd.concat([found, pd.DataFrame(lines)], axis=1)


def figure(found: pd.DataFrame, turns: list[dict]):
    """Time a token and memory against length, and the roofline: what was reached of what products and memory allow."""
    import matplotlib.pyplot as plt

    machine = pd.DataFrame(turns)
    machine = (
        machine[["gflops_float32", "gflops_bfloat16", "gb_s"]][machine["model"] == LIMITS].median()
        if LIMITS in set(machine["model"])
        else None
    )
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(13, 3.8))
    for i, (model, rows) in enumerate(found.groupby("model", sort=False)):
        style = dict(marker="o", ms=4, color=f"C{i}", label=model)
        unit = 1e6 / rows["length_tokens"] / rows["batch"]
        a.errorbar(
            rows["length_tokens"],
            rows["encode_s"] * unit,
            [
                (rows["encode_s"] - rows["fastest_s"]) * unit,
                (rows["slowest_s"] - rows["encode_s"]) * unit,
            ],
            capsize=3,
            **style,
        )
        b.plot(rows["length_tokens"], rows["peak_gib"], **style)
        c.plot(rows["gflop_a_byte"], rows["gflops"], ls="", **style)
    intensity = [found["gflop_a_byte"].min() / 2, found["gflop_a_byte"].max() * 2]
    for dtype, line in (("float32", "--"), ("bfloat16", "-")) if machine is not None else ():
        rate = machine[f"gflops_{dtype}"]
        points = sorted({*intensity, min(max(rate / machine["gb_s"], intensity[0]), intensity[1])})
        c.plot(
            points,
            [min(rate, machine["gb_s"] * x) for x in points],
            color="0.4",
            lw=1,
            ls=line,
            label=f"limit, {dtype}",
        )
    lengths = sorted(set(found["length_tokens"]))
    for ax, title, label in (
        (a, "time", "µs a token"),
        (b, "peak memory of the process", "GiB"),
        (c, "roofline", "GFLOP/s"),
    ):
        ax.set(title=title, ylabel=label)
        if ax is not c:
            ax.set(
                xscale="log",
                xlabel="tokens of a text",
                xticks=lengths,
                xticklabels=[f"{n:,}" for n in lengths],
            )
            ax.tick_params(axis="x", labelrotation=30)
            ax.minorticks_off()
    a.set(yscale="log")
    b.set(ylim=(0, None))
    c.set(xscale="log", yscale="log", xlabel="operations a byte, counted")
    a.legend(fontsize=7)
    c.legend(fontsize=7)
    fig.tight_layout()
    return fig


def convolutions(
    lengths: list[int],
    width: int = 768,
    dtype: str = "bfloat16",
    tokens: int = 131_072,
    repeats: int = 20,
) -> pd.DataFrame:
    """The gated long convolution of one layer alone, forward, at batch 1 and at `tokens` tokens a batch: milliseconds by torch.fft, by that compiled, and by lib/kernels/gpu.py.

    One line a length and batch; on a machine without a GPU they say "not run: no GPU". `of_bandwidth` is the share of the
    GPU's bandwidth (a copy of 256 MiB) that the bytes of lib/kernels/gpu.py, counted, take in its time.
    """
    lines, gpu = [], torch.cuda.is_available()
    for length in lengths:
        for batch in sorted({1, max(1, tokens // length)}):
            line = {"length_tokens": length, "batch": batch}
            lines.append(
                line
                | (
                    measured(length, batch, width, getattr(torch, dtype), repeats)
                    if gpu
                    else dict.fromkeys(
                        (
                            "torch_fft_ms",
                            "compiled_ms",
                            "monarch_ms",
                            "fft_over_monarch",
                            "of_bandwidth",
                        ),
                        NOT_RUN,
                    )
                )
            )
    return pd.DataFrame(lines)


@torch.no_grad()
def measured(
    length: int, batch: int, width: int, dtype: torch.dtype, repeats: int, device: str = "cuda"
) -> dict:
    device = torch.device(device)
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the ninth shape and all after it would run uncompiled
    p, u = (
        torch.randn(batch, channels, length, device=device).to(dtype)
        for channels in (3 * width, width)
    )
    weight, bias = (
        torch.randn(3 * width, 1, 3, device=device),
        torch.randn(3 * width, device=device),
    )
    kernels = [
        (
            torch.randn(width, length, device=device),
            torch.randn(width, length, device=device),
            torch.randn(width, device=device),
        )
        for _ in range(2)
    ]
    spectra = gpu.spectra(*kernels, length)
    compiled = torch.compile(gpu.mix_direct, dynamic=False)
    ways = {
        "torch_fft_ms": lambda: gpu.mix_direct(p, u, weight, bias, kernels),
        "compiled_ms": lambda: compiled(p, u, weight, bias, kernels),
        "monarch_ms": lambda: gpu.mix(p, u, weight, bias, spectra),
    }
    taken: dict[str, list] = {name: [] for name in ways}
    for turn in range(repeats + 3):
        for name, way in ways.items():
            took = timed(way, device)["encode_s"] * 1000
            if turn >= 3:
                taken[name].append(took)
    found = {name: statistics.median(values) for name, values in taken.items()}
    moved = (
        sum(counts.traffic(length, width, batch=batch, size=dtype.itemsize).values())
        * length
        * batch
    )
    return found | {
        "fft_over_monarch": found["torch_fft_ms"] / found["monarch_ms"],
        "of_bandwidth": moved / found["monarch_ms"] * 1000 / limits(device)["gb_s"] / 1e9,
    }


# ------------------------------------------------------------------ memory


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies; elsewhere the closed pipe ends it at the next line."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 15)


def forget_peak(device: torch.device) -> None:
    """Let the peak start again from what is in memory now; where the system refuses, it stays the highest so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_gib(device: torch.device) -> float:
    """The largest resident memory of this process since `forget_peak`, in GiB; on a GPU, torch's largest allocation there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        # Not getrusage: its peak starts at the parent's size.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )


if __name__ == "__main__":
    runner()
