"""How much memory and time one forward pass of the published 80M model takes at 32K, 64K and 128K tokens.

    python tests/bench_length.py [tokens ...]

Each length in a process of its own: peak RSS is a process's. Random weights, batch 1, float32, no gradients.
Not collected by pytest.
"""
import json
import resource
import subprocess
import sys
import time

LENGTHS = (32_768, 65_536, 131_072)


def measure(length: int) -> dict:
    import torch

    from lib.model import M2BertConfig, M2BertForRetrieval

    torch.set_num_threads(2)
    with torch.device("meta"):
        model = M2BertForRetrieval(M2BertConfig(max_position_embeddings=length))
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    before = peak_gib()
    started = time.perf_counter()
    with torch.no_grad():
        embedding = model(torch.randint(1, 30_522, (1, length))).pooler_output
    assert embedding.isfinite().all()
    return {"length_tokens": length, "weights_mib": round(sum(p.nbytes for p in model.parameters()) / 2**20), "before_gib": before,
            "peak_gib": peak_gib(), "forward_s": round(time.perf_counter() - started, 1)}


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30), 2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]))))
    else:
        for length in map(int, sys.argv[1:] or LENGTHS):
            subprocess.run([sys.executable, __file__, "--one", str(length)], check=True)
