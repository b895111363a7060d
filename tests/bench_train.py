"""A training step, five ways in one interleaved run.

Straightforward eager, and this library in torch alone and with lib/kernels/mixer.cpp, each in
float32 and in bfloat16.

    python tests/bench_train.py [--width 256 --layers 4 --threads 2] [length …]

Masked-language steps of 8,192 tokens. "eager" is the original's way: FFTs of twice the length by
autograd, whole logits, an optimizer that goes tensor by tensor, float32. bfloat16 is the dtype of
matrix multiplications (`optim.autocast`), left out on a processor that does not multiply it. One
JSON line per length: seconds of a step and ratios to eager, medians.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn import functional as F

from lib import kernels
from lib.kernels.support import matmul_dtype
from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM
from lib.training.optim import autocast
from lib.training.optim import optimizer as training_optimizer

TOKENS, VOCABULARY = 8192, 8192
KINDS = ("eager", "torch_float32", "torch_bfloat16", "native_float32", "native_bfloat16")


def step_of(kind: str, length: int, width: int = 256, layers: int = 4):
    """A function that makes one step."""
    torch.manual_seed(0)
    config = M2BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )
    model = M2BertForMaskedLM(config).train()
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
        if kind == "eager"
        else training_optimizer(model, 1e-4, 0.01)
    )
    ids = torch.randint(5, VOCABULARY, (max(1, TOKENS // length), length))
    labels = ids.masked_fill(torch.rand(ids.shape) > 0.3, -100)
    context = autocast(ids.device, "bfloat16" if kind.endswith("bfloat16") else "float32")

    def loss():
        if kind == "eager":
            logits = model.decoder(
                model.layernorm(F.gelu(model.dense(model.model(ids).last_hidden_state)))
            )
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        with context:
            return model(ids, labels=labels).loss

    def step():
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def measure(length: int, width: int, layers: int, repeats: int = 5) -> dict:
    multiplies = matmul_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    kinds = [kind for kind in KINDS if multiplies or not kind.endswith("bfloat16")]
    steps = {kind: step_of(kind, length, width, layers) for kind in kinds}
    taken: dict = {kind: [] for kind in steps}
    for repeat in range(repeats + 1):
        for kind, step in steps.items():
            way = kind.split("_")[0]
            with kernels.use({"eager": "definition", "native": "auto"}.get(way, way)):
                started = time.perf_counter()
                step()
                if repeat:  # the first warms up
                    taken[kind].append(time.perf_counter() - started)
    seconds = {kind: statistics.median(values) for kind, values in taken.items()}
    return {
        "length_tokens": length,
        "width": width,
        "layers": layers,
        "threads": torch.get_num_threads(),
        **{f"{kind}_s": round(value, 3) for kind, value in seconds.items()},
        **{f"{kind}_ratio": round(seconds["eager"] / seconds[kind], 2) for kind in kinds[1:]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("lengths", nargs="*", type=int, default=[128, 1024, 4096])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for length in given.lengths:
        print(json.dumps(measure(length, given.width, given.layers)), flush=True)
