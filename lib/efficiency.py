"""What reading a text costs: counted on paper, and measured on this machine.

A clock measures one implementation on one machine; a count says what any of
them has to do. Both, for M2-BERT and for its Transformer twin: a BERT of the
same width, depth and intermediate size.

    twin(config)                     the twin's configuration
    m2bert_flops(config, length)     operations of one forward pass, part by part
    transformer_flops(config, length)
    m2bert_activations(config, length), transformer_activations(config, length)
    parameters(config)               weights, by building the model without memory
    race(configs, lengths)           seconds of models taking turns, and each one's peak memory

Conventions: a multiply-add is 2 operations; a real FFT of n points is
2.5 n log₂ n (half of the textbook 5 n log₂ n of a complex one); norms,
activations, gates and look-ups are left out, linear in the length and small.
Axes: B texts, L tokens, D width, I intermediate width, K blocks, O filter width, E filter inputs.
"""
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from lib.long_conv import fft_length
from lib.model import M2BertConfig, M2BertForRetrieval
from lib.train import use


def twin(config: M2BertConfig) -> BertConfig:
    """The Transformer of the same width, depth, intermediate size, vocabulary and length; heads of 64 channels."""
    return BertConfig(vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
                      intermediate_size=config.intermediate_size, num_attention_heads=max(1, config.hidden_size // 64),
                      max_position_embeddings=config.max_position_embeddings, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)


def build(config) -> torch.nn.Module:
    """A model with random weights: M2-BERT or BERT, by the kind of configuration."""
    return (M2BertForRetrieval if isinstance(config, M2BertConfig) else BertModel)(config).eval()


def parameters(config) -> int:
    """How many weights the encoder has, pooler included."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in build(config).parameters())


# ------------------------------------------------------------------ counts

def convolution_flops(length: int, filters: int = 1) -> float:
    """One channel of one text: into the spectrum, times the kernel's spectrum, and back; L² became L log L.

        filters · (2 · 2.5 n log₂ n + 6 (n/2 + 1)),   n ≥ 2L - 1
    """
    n = fft_length(2 * length - 1)
    return filters * (5 * n * math.log2(n) + 6 * (n // 2 + 1))


def attention_flops(length: int) -> float:
    """One channel of one text: Q Kᵀ and the weighted sum of V, 2 L² each. Flash or not: the same operations."""
    return 4.0 * length**2


def m2bert_flops(config: M2BertConfig, length: int, batch: int = 1) -> dict[str, float]:
    """Operations per text.

        projections   8 L D²                                in (D -> 3D) and out
        short_conv    18 L D                                width 3 on 3D channels
        long_conv     D · convolution_flops                 gated and residual
        kernels       4 · 2 L (E O + 2 O² + O D) / B  + …   the filters' MLPs and spectra: once a forward pass, shared by its B texts
        mlp           6 L D I / K                           block-diagonal, gated
        pooler        2 D²
    """
    L, D, I, K = length, config.hidden_size, config.intermediate_size, config.mlp_blocks
    filters = 2 if config.residual_long_conv else 1
    directions = 2 if config.bidirectional else 1
    O, E, n = config.filter_order, config.filter_emb_dim, fft_length(2 * length - 1)
    taps = 2 * L * (E * O + 2 * O**2 + O * D)
    layer = {
        "projections": 8 * L * D**2,
        "short_conv": 18 * L * D,
        "long_conv": D * convolution_flops(L, filters),
        "kernels": filters * (directions * taps + D * 2.5 * n * math.log2(n)) / batch,
        "mlp": 6 * L * D * I / K,
    }
    return {part: config.num_hidden_layers * float(count) for part, count in layer.items()} | {"pooler": 2.0 * D**2}


def transformer_flops(config: BertConfig, length: int) -> dict[str, float]:
    """Operations per text.

        projections   8 L D²        queries, keys, values, output
        attention     4 L² D        the only part that grows faster than the text
        mlp           4 L D I       dense
        pooler        2 D²
    """
    L, D, I = length, config.hidden_size, config.intermediate_size
    layer = {"projections": 8 * L * D**2, "attention": D * attention_flops(L), "mlp": 4 * L * D * I}
    return {part: config.num_hidden_layers * float(count) for part, count in layer.items()} | {"pooler": 2.0 * D**2}


def m2bert_activations(config: M2BertConfig, length: int, batch: int = 1) -> float:
    """Numbers that one layer keeps for its backward pass, per text.

    Per token and channel: the mixer's input, three projections before and after the short convolution, each
    convolution's input as a spectrum of 2 (n/L ≈ 2 real numbers), the gated one's output at its full FFT size,
    and the inputs of the output projection, of the MLP, and of its norm. Per token: 4 I in the gated MLP.
    The kernels and their MLPs are shared by the batch. This is what autograd keeps in torch; lib/mixer.cpp keeps less.
    """
    L, D, I = length, config.hidden_size, config.intermediate_size
    filters, directions = (2 if config.residual_long_conv else 1), (2 if config.bidirectional else 1)
    n = fft_length(2 * L - 1)
    per_text = L * (10 * D + 4 * I) + n * D * (filters + 1)
    shared = filters * (directions * L * (9 * config.filter_order + D) + L * D + n * D)
    return float(per_text + shared / batch)


def transformer_activations(config: BertConfig, length: int, flash: bool = False) -> float:
    """Numbers that one layer keeps for its backward pass, per text: L (9 D + 2 I), and heads · L² attention weights.

    Flash attention recomputes the weights instead of keeping them: its L² is time, not memory.
    """
    L, D, I = length, config.hidden_size, config.intermediate_size
    return float(L * (9 * D + 2 * I) + (0 if flash else config.num_attention_heads * L**2))


# ------------------------------------------------------------------ measurements

def race(configs: dict, lengths: list[int], batch: int = 1, repeats: int = 3, threads: int = 2, device: str = "cpu", seed: int = 0) -> list[dict]:
    """Let models encode the same random tokens, taking turns, each in a process of its own.

    Turns (A B, A B, …) put a slow moment of the machine on both sides of a ratio; a process of its own gives each
    model its own peak of memory. At each length, the first turn warms up and is not reported.

    Returns:
        One {"model", "length_tokens", "batch", "turn", "encode_s", "cpu_s", "peak_gib"} per model, length and turn,
        shortest first. encode_s is the wall's time, cpu_s the sum over threads, which a busy machine disturbs less. peak_gib is the whole process's, Python, torch and weights included, NaN where the system does not tell;
        on a GPU it is what torch allocated there.

    Raises:
        RuntimeError: a process died; the message says at which length, and what to lower.
    """
    command = [sys.executable, "-m", "lib.efficiency"]
    # Threads that wait sleep: spinning ones count as work, and on a busy machine they take the core from whom they wait for.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    runners = {name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) for name in configs}
    turns = []
    try:
        for name, config in configs.items():
            kind = "m2bert" if isinstance(config, M2BertConfig) else "bert"
            say(runners[name], {"kind": kind, "config": config.to_dict(), "compute": {"threads": threads, "device": device}, "seed": seed})
        for length in sorted(lengths):
            for turn in range(repeats + 1):
                for name in configs:
                    answer = say(runners[name], {"length_tokens": length, "batch": batch})
                    if turn:
                        turns.append({"model": name, "length_tokens": length, "batch": batch, "turn": turn} | answer)
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
        where = f"at {message['length_tokens']} tokens" if "length_tokens" in message else "while building its model"
        raise RuntimeError(f"a measuring process ended {where} with code {process.wait()} (-9: killed by the system, often out of memory): "
                           f"lower efficiency.lengths or efficiency.batch in params.yaml")
    return json.loads(answer)


def runner() -> None:
    """The other end of `race`: builds a model from the first line, then encodes once per line until the lines end."""
    die_with_parent()
    task = json.loads(sys.stdin.readline())
    device = use(task["compute"])
    torch.manual_seed(task["seed"])
    model = build((M2BertConfig if task["kind"] == "m2bert" else BertConfig).from_dict(task["config"])).to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None         # a GPU answers before it has finished
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        ids = torch.randint(5, model.config.vocab_size, (turn["batch"], turn["length_tokens"])).to(device)
        mask = torch.ones_like(ids)
        forget_peak(device)
        wait()
        start, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model(ids, attention_mask=mask)
        wait()
        took = {"encode_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        print(json.dumps(took | {"peak_gib": peak_gib(device)}), flush=True)


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    runner()
