"""A training step, three ways in one interleaved run: straightforward eager, this library in torch alone, and with lib/mixer.cpp.

    python tests/bench_train.py [length …]

Masked-language steps of a model of width 256 and 4 layers, 8,192 tokens each, float32. "eager" is the original's way: FFTs of
twice the length by autograd, whole logits, an optimizer that goes tensor by tensor. One JSON line a length: seconds of a step and
ratios to eager, medians.
"""
import json
import statistics
import sys
import time

import torch
from torch.nn import functional as F

from lib import native, train
from lib.model import M2BertConfig, M2BertForMaskedLM
from lib.race import by_definition

TOKENS, VOCABULARY = 8192, 8192


def step_of(kind: str, length: int):
    """A function that makes one step."""
    torch.manual_seed(0)
    model = M2BertForMaskedLM(M2BertConfig(vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, intermediate_size=1024, max_position_embeddings=length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False) if kind == "eager" else train.optimizer(model, 1e-4, 0.01)
    ids = torch.randint(5, VOCABULARY, (max(1, TOKENS // length), length))
    labels = ids.masked_fill(torch.rand(ids.shape) > 0.3, -100)

    def loss():
        if kind == "eager":
            logits = model.decoder(model.layernorm(F.gelu(model.dense(model.model(ids).last_hidden_state))))
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return model(ids, labels=labels).loss

    def step():
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def measure(length: int, repeats: int = 5) -> dict:
    kernel = native.kernel
    steps = {kind: step_of(kind, length) for kind in ("eager", "torch", "native")}
    taken: dict = {kind: [] for kind in steps}
    try:
        for repeat in range(repeats + 1):
            for kind, step in steps.items():
                native.kernel = kernel if kind == "native" else lambda: None
                with by_definition(kind == "eager"):
                    started = time.perf_counter()
                    step()
                    if repeat:                                             # the first warms up
                        taken[kind].append(time.perf_counter() - started)
    finally:
        native.kernel = kernel
    seconds = {kind: statistics.median(values) for kind, values in taken.items()}
    return {"length_tokens": length, "threads": torch.get_num_threads(), **{f"{kind}_s": round(value, 3) for kind, value in seconds.items()},
            **{f"{kind}_ratio": round(seconds["eager"] / seconds[kind], 2) for kind in ("torch", "native")}}


if __name__ == "__main__":
    for length in map(int, sys.argv[1:] or ("128", "1024", "4096")):
        print(json.dumps(measure(length)), flush=True)
