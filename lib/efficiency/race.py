"""A benchmark of encoders: interleaved rounds on the same random tokens, one process per encoder.

    contenders(config, device)          the encoders: the definition in eager float32, this
                                        library's own, a Transformer twin
    benchmark(entries, lengths, …)      seconds and peak memory of each round; the machine's limits
                                        are measured in the same rounds
    table(measurements, entries)        tokens per second, ratios, memory and shares of the limits,
                                        one line per contender and length
    figure(lines, measurements)         time, memory and the roofline
    convolutions(lengths, …)            the gated long convolution alone, on a GPU

Interleaved rounds (A B, A B, …) put a slow moment of the machine on both sides of a ratio. A
process per contender gives each its own peak of memory, and its own processor time (`cpu_s`).
Weights are random: speed does not depend on them.
Axes: B texts, L tokens, D width.
"""

import contextlib
import copy
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
from lib.model.device import use
from lib.model.m2bert import M2BertConfig

# The back end of lib/kernels that each way of encoding uses.
BACK_ENDS = {
    "definition": "definition",
    "forward": "auto",
    "engine": "auto",
    "torch": "torch",
    "compiled": "torch",
}
LIMITS = "limits"
RATES = ["gflops_float32", "gflops_bfloat16", "gb_s"]
NOT_RUN = "not run: no GPU"
log = logging.getLogger(__name__)


# ------------------------------------------------------------------ contenders


def contenders(
    config: M2BertConfig, device: str = "cpu", shallow_from: int | None = None
) -> dict[str, dict]:
    """The contenders beside an M2-BERT of this configuration, by name.

    An entry is {"config", "way", "dtype", "shallow_from", "until"}:

        shallow_from    from this length on, one layer is timed and counted for all, because deep
                        models would take too long; infinite: at no length
        until           the contender leaves out longer texts
        way             definition: the equations of lib/model/m2bert.py, under
                        `kernels.use("definition")`; forward: the model with its kernels; torch: on
                        a GPU, torch.fft instead of lib/kernels/gpu.py; compiled: `torch` under
                        torch.compile; engine: lib/kernels/engine.py
    """

    def entry(way: str, dtype: str, config=config, shallow: int | None = None) -> dict:
        deep = shallow is None or config.num_hidden_layers == 1
        start = math.inf if deep else shallow
        options = {"shallow_from": start, "until": math.inf}
        return {"config": config, "way": way, "dtype": dtype, **options}

    def bert(width: int, layers: int, inner: int, heads: int) -> BertConfig:
        return BertConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            max_position_embeddings=config.max_position_embeddings,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    twin = counts.twin(config)
    attention = copy.copy(config)
    attention.mixer = "attention"
    if device == "cpu":
        return {
            "definition, float32": entry("definition", "float32", shallow=shallow_from),
            "model, float32": entry("forward", "float32", shallow=shallow_from),
            "engine, float32": entry("engine", "float32"),
            "engine, bfloat16": entry("engine", "bfloat16"),
            "attention twin, float32": entry("forward", "float32", attention, shallow_from),
            "Transformer twin, bfloat16": entry("forward", "bfloat16", twin, shallow_from),
        }
    large, giant = bert(1024, 24, 4096, 16), bert(4096, 32, 18432, 32)
    return {
        "definition, float32": entry("definition", "float32"),
        "torch.fft, bfloat16": entry("torch", "bfloat16"),
        "torch.compile, bfloat16": entry("compiled", "bfloat16"),
        "Monarch convolution, bfloat16": entry("forward", "bfloat16"),
        "Transformer twin, bfloat16": entry("forward", "bfloat16", twin),
        "BGE-large's shape, bfloat16": entry("forward", "bfloat16", large),
        "a 7B shape, bfloat16": entry("forward", "bfloat16", giant, 0),
    }


# ------------------------------------------------------------------ the benchmark


def benchmark(
    entries: dict[str, dict],
    lengths: list[int],
    batch: int = 1,
    repeats: int = 3,
    threads: int = 2,
    device: str = "cpu",
    budget_s: float = math.inf,
    limits: bool = True,
) -> list[dict]:
    """Let the contenders encode the same random tokens in interleaved rounds.

    Args:
        entries: as `contenders` returns them.
        repeats: rounds at each length, after a warm-up round that is not reported. Shallow
            contenders skip the warm-up: they are slow, and warm from shorter texts (at 8,192 tokens
            of the published size their first round takes 0 to 10 % longer than the next ones).
        budget_s: seconds for one length; once they are over, the remaining rounds are left out, but
            not the first.
        limits: whether the machine's limits are measured in the same rounds, as the model "limits".

    Returns:
        One {"model", "length_tokens", "batch", "turn", "layers", "dtype", "encode_s", "cpu_s",
        "peak_gib"} per contender, length and round (its number is "turn"), shortest length first.
        encode_s is wall time (on a GPU: device time, by events), cpu_s the sum over threads, which
        a busy machine disturbs less. If `layers` is less than the model's, both times are
        multiplied up, with the parts outside of the layers (half a percent at the published width),
        and peak_gib is NaN. peak_gib is that of the whole process with Python, torch and weights,
        NaN if the system does not tell; on a GPU it is torch's allocated memory.
        "limits" has gflops_float32, gflops_bfloat16 (a matrix multiplication like an encoder's) and
        gb_s (a copy larger than any cache) instead.

    Raises:
        RuntimeError: a process died; the message says at which length, and what to lower.
    """
    entries = (entries | {LIMITS: None}) if limits else entries
    processes = {name: start_runner() for name in entries}
    measurements = []
    try:
        for name, entry in entries.items():
            compute = {"threads": threads, "device": device}
            line = entry and entry | {"config": entry["config"].to_dict()}
            say(processes[name], {"entry": line, "compute": compute})
        for length in sorted(lengths):
            started = time.monotonic()
            for turn in range(repeats + 1):
                if turn > 1 and time.monotonic() - started > budget_s:
                    break
                message = {"length_tokens": length, "batch": batch}
                warm_up = turn == 0 and length > min(lengths)
                for name, entry in entries.items():
                    if entry and is_left_out(entry, length, warm_up):
                        continue
                    answer = say(processes[name], message)
                    if turn:
                        measurements.append({"model": name} | message | {"turn": turn} | answer)
            log.info("the benchmark at %d tokens took %.0f s", length, time.monotonic() - started)
    finally:
        for process in processes.values():
            process.terminate()
            process.communicate()
    return measurements


def start_runner() -> subprocess.Popen:
    # Waiting threads sleep. Spinning ones would count as work, and on a busy machine they would
    # keep the processor from the thread that they wait for.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "lib.efficiency.race"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def is_left_out(entry: dict, length: int, warm_up: bool) -> bool:
    """Whether a contender skips a round: the text is too long for it, or it is shallow and warm."""
    return length > entry["until"] or warm_up and 0 < entry["shallow_from"] <= length


def say(process: subprocess.Popen, message: dict) -> dict:
    """Send one line, wait for the one-line answer."""
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        length = message.get("length_tokens")
        moment = "while building its model" if length is None else f"at {length} tokens"
        raise RuntimeError(
            f"a measuring process ended {moment} with code {process.wait()} (-9: killed by the "
            "system, often out of memory): lower efficiency.lengths or efficiency.batch in "
            "params.yaml"
        )
    return json.loads(answer)


def runner() -> None:
    """The process of a contender: build the model of the first line, then encode once per line."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 15)  # Linux ends this process when its parent dies
    task = json.loads(sys.stdin.readline())
    device = use(task["compute"])
    torch.manual_seed(0)
    encode = encoding(task["entry"], device) if task["entry"] else lambda message: limits(device)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        forget_peak(device)
        with torch.inference_mode():
            answer = encode(json.loads(line))
        print(json.dumps(answer), flush=True)


def encoding(entry: dict, device: torch.device):
    """A function that encodes random tokens once and returns its cost."""
    m2bert = entry["config"]["model_type"] == M2BertConfig.model_type
    config = (M2BertConfig if m2bert else BertConfig).from_dict(entry["config"])
    layers, dtype = config.num_hidden_layers, getattr(torch, entry["dtype"])
    back_end = BACK_ENDS[entry["way"]]
    if entry["shallow_from"] == 0:
        config.num_hidden_layers = 1
    model = counts.build(config).to(device)
    if entry["way"] == "engine":
        forward = Engine(model, dtype)
        dtype = forward.dtype  # float32 if the processor cannot multiply bfloat16 matrices
    else:
        forward = model.to(dtype)
    if entry["way"] == "compiled":
        forward = torch.compile(model, dynamic=False)
    stack, name = (model.model, "layers") if m2bert else (model.encoder, "layer")
    all_layers, first = getattr(stack, name), getattr(stack, name)[:1]

    def encode(message: dict) -> dict:
        batch, length = message["batch"], message["length_tokens"]
        shallow = length >= entry["shallow_from"]
        setattr(stack, name, first if shallow else all_layers)
        ids = torch.randint(5, config.vocab_size, (batch, length)).to(device)
        ids = ids.tolist() if entry["way"] == "engine" else ids
        with kernels.use(back_end):
            seconds = timed(lambda: forward(ids), device)
        return (
            {"layers": len(getattr(stack, name)), "dtype": str(dtype).removeprefix("torch.")}
            | {clock: value * (layers if shallow else 1) for clock, value in seconds.items()}
            | {"peak_gib": math.nan if shallow else peak_gib(device)}
        )

    return encode


def timed(work, device: torch.device) -> dict:
    """Seconds of work(): wall time (on a GPU: device time) and processor time."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds = time.perf_counter() - start
    if on_gpu:
        end.record()
        torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) / 1000
    return {"encode_s": seconds, "cpu_s": time.process_time() - cpu}


def limits(device: torch.device) -> dict:
    """The machine's limits: multiplications of (2048, 768) and (768, 3072), a copy of 256 MiB.

    Medians of five.
    """

    def median(work) -> float:
        work()
        return statistics.median(timed(work, device)["encode_s"] for _ in range(5))

    def gflops(dtype: torch.dtype) -> float:
        x = torch.randn(2048, 768, device=device).to(dtype)
        w = torch.randn(3072, 768, device=device).to(dtype)
        return 2 * 2048 * 768 * 3072 / median(lambda: F.linear(x, w)) / 1e9

    rates = [gflops(torch.float32), gflops(torch.bfloat16)]
    a, b = torch.zeros(2**26, device=device), torch.zeros(2**26, device=device)
    return dict(zip(RATES, [*rates, 2 * a.nbytes / median(lambda: b.copy_(a)) / 1e9]))


# ------------------------------------------------------------------ table and figure


def limit_medians(measurements: pd.DataFrame) -> pd.Series | None:
    """The medians of the machine's limits; None if they were not measured."""
    rows = measurements[measurements["model"] == LIMITS]
    return None if rows.empty else rows[RATES].median()


def table(measurements: list[dict], entries: dict[str, dict]) -> pd.DataFrame:
    """One line per contender and length, medians over the rounds.

    over_definition, over_twin    how many times as fast, median of the ratios of each round
    gflops, gflop_a_byte          operations per second, and per byte, as counts.py counts them
    of_products, of_bandwidth     matrix multiplications and bytes per second, as shares of the
                                  machine's limits (medians of all rounds)
    """
    measurements = pd.DataFrame(measurements)
    rate = limit_medians(measurements)
    measurements = measurements[measurements["model"] != LIMITS]
    groups = measurements.groupby(["length_tokens", "model"], sort=False, as_index=False)
    lines = groups.agg(
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
    lines["tokens_s"] = lines["length_tokens"] * lines["batch"] / lines["encode_s"]
    lines["over_definition"] = speed_ratios(measurements, lines, "definition, float32")
    lines["over_twin"] = speed_ratios(measurements, lines, "Transformer twin, bfloat16")
    shares = [against_limits(line, entries[line.model], rate) for line in lines.itertuples()]
    return pd.concat([lines, pd.DataFrame(shares)], axis=1)


def speed_ratios(measurements: pd.DataFrame, lines: pd.DataFrame, reference: str) -> list[float]:
    """For each line, how many times as fast as `reference`: the median of the rounds' ratios."""
    index = ["length_tokens", "turn"]
    seconds = measurements.pivot(index=index, columns="model", values="encode_s")
    ratios = seconds.rdiv(seconds[reference] if reference in seconds else math.nan, axis=0)
    medians = ratios.groupby("length_tokens").median()
    return [medians.at[key] for key in zip(lines["length_tokens"], lines["model"])]


def against_limits(line, entry: dict, rate: pd.Series | None) -> dict[str, float]:
    """A line's counted operations and bytes in its time, and their shares of the limits."""
    itemsize, batch = 4 if line.dtype == "float32" else 2, line.batch
    costs = counts.cost(entry["config"], line.length_tokens, itemsize, batch)
    products, operations, moved = costs
    rate = dict.fromkeys(RATES, math.nan) if rate is None else rate
    return {
        "gflops": operations / line.encode_s / 1e9 * batch,
        "gflop_a_byte": operations / moved,
        "of_products": products * batch / line.encode_s / 1e9 / rate[f"gflops_{line.dtype}"],
        "of_bandwidth": moved * batch / line.encode_s / 1e9 / rate["gb_s"],
    }


def figure(lines: pd.DataFrame, measurements: list[dict]):
    """Time per token and memory against length, and the roofline of the machine."""
    import matplotlib.pyplot as plt

    fig, (a, b, c) = plt.subplots(1, 3, figsize=(13, 3.8))
    for i, (model, rows) in enumerate(lines.groupby("model", sort=False)):
        style = dict(marker="o", ms=4, color=f"C{i}", label=model)
        unit, tokens = 1e6 / rows["length_tokens"] / rows["batch"], rows["length_tokens"]
        below, above = rows["encode_s"] - rows["fastest_s"], rows["slowest_s"] - rows["encode_s"]
        errors = [below * unit, above * unit]
        a.errorbar(tokens, rows["encode_s"] * unit, errors, capsize=3, **style)
        b.plot(tokens, rows["peak_gib"], **style)
        c.plot(rows["gflop_a_byte"], rows["gflops"], ls="", **style)
    rates, intensity = limit_medians(pd.DataFrame(measurements)), lines["gflop_a_byte"]
    if rates is not None:
        draw_limits(c, rates, [intensity.min() / 2, intensity.max() * 2])
    ticks = sorted(set(lines["length_tokens"]))
    for ax in (a, b):
        ax.set(xscale="log", xlabel="tokens of a text", xticks=ticks)
        ax.set_xticklabels([f"{n:,}" for n in ticks])
        ax.tick_params(axis="x", labelrotation=30)
        ax.minorticks_off()
    a.set(title="time", ylabel="µs a token", yscale="log")
    b.set(title="peak memory of the process", ylabel="GiB", ylim=(0, None))
    c.set(title="roofline", ylabel="GFLOP/s", xlabel="operations a byte, counted")
    c.set(xscale="log", yscale="log")
    a.legend(fontsize=7)
    c.legend(fontsize=7)
    fig.tight_layout()
    return fig


def draw_limits(axis, rates: pd.Series, intensity: list[float]) -> None:
    """The roofline over a range of operations per byte: the lower of memory and multiplications."""
    for dtype, style in (("float32", "--"), ("bfloat16", "-")):
        rate, low, high = rates[f"gflops_{dtype}"], *intensity
        points = sorted({low, high, min(max(rate / rates["gb_s"], low), high)})
        roof = [min(rate, rates["gb_s"] * point) for point in points]
        axis.plot(points, roof, color="0.4", lw=1, ls=style, label=f"limit, {dtype}")


def convolutions(
    lengths: list[int],
    width: int = 768,
    dtype: str = "bfloat16",
    tokens: int = 131_072,
    repeats: int = 20,
) -> pd.DataFrame:
    """Milliseconds of one layer's gated long convolution, forward; one line per length and batch.

    The batch is 1, and as many texts as fill `tokens` tokens. The convolution runs by torch.fft, by
    torch.fft under torch.compile, and by lib/kernels/gpu.py. `of_bandwidth` is the share of the
    GPU's bandwidth (a copy of 256 MiB) that the counted bytes of lib/kernels/gpu.py take in its
    time. Without a GPU the cells say "not run: no GPU".
    """
    columns = "torch_fft_ms", "compiled_ms", "monarch_ms", "fft_over_monarch", "of_bandwidth"
    lines, cells = [], dict.fromkeys(columns, NOT_RUN)
    for length in lengths:
        for batch in sorted({1, max(1, tokens // length)}):
            if torch.cuda.is_available():
                cells = measured(length, batch, width, getattr(torch, dtype), repeats)
            lines.append({"length_tokens": length, "batch": batch} | cells)
    return pd.DataFrame(lines)


@torch.no_grad()
def measured(length: int, batch: int, width: int, dtype: torch.dtype, repeats: int) -> dict:
    """The cells of one line of `convolutions`, medians over `repeats` interleaved rounds."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    torch._dynamo.reset()  # otherwise the ninth shape and all later ones would run uncompiled

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    p, u = draw(batch, 3 * width, length).to(dtype), draw(batch, width, length).to(dtype)
    weight, bias = draw(3 * width, 1, 3), draw(3 * width)
    filters = [(draw(width, length), draw(width, length), draw(width)) for _ in range(2)]
    spectra = gpu.spectra(*filters, length)
    compiled = torch.compile(gpu.mix_direct, dynamic=False)
    ways = {
        "torch_fft_ms": lambda: gpu.mix_direct(p, u, weight, bias, filters),
        "compiled_ms": lambda: compiled(p, u, weight, bias, filters),
        "monarch_ms": lambda: gpu.mix(p, u, weight, bias, spectra),
    }
    rounds = [
        {name: timed(way, device)["encode_s"] * 1000 for name, way in ways.items()}
        for _ in range(repeats + 3)
    ]
    medians = pd.DataFrame(rounds[3:]).median().to_dict()  # without three rounds to warm up
    per_token = sum(counts.traffic(length, width, batch=batch, size=dtype.itemsize).values())
    moved = per_token * length * batch
    return medians | {
        "fft_over_monarch": medians["torch_fft_ms"] / medians["monarch_ms"],
        "of_bandwidth": moved / medians["monarch_ms"] * 1000 / limits(device)["gb_s"] / 1e9,
    }


# ------------------------------------------------------------------ memory


def forget_peak(device: torch.device) -> None:
    """Reset the peak to the memory in use; if the system refuses, the old peak stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """The largest resident memory since `forget_peak`; on a GPU, torch's largest allocation."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(OSError, IndexError):
        # Not getrusage: its peak starts at the parent's size.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    with contextlib.suppress(ImportError):
        import resource

        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return math.nan


if __name__ == "__main__":
    runner()
