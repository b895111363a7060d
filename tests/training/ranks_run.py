"""Train the tiny models of a folder in one of several processes: FOLDER RANK COUNT."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from toys import SENTENCES, learn, task, tune, weights

from lib.model import checkpoint
from lib.model.m2bert import M2BertForMaskedLM, M2BertForRetrieval
from lib.training.pairs import Pairs
from lib.training.text import PretrainingText

FINETUNED = {
    "mnrl": dict(loss="mnrl", documents=5, queries_per_document=3),
    "mnrl_in_parts": dict(loss="mnrl", documents=5, queries_per_document=3, micro_batch_tokens=40),
    "opl": dict(loss="opl", documents=1, negatives=2),
    "opl_accumulated": dict(loss="opl", documents=5, negatives=2),
    "prototype": dict(loss="prototype", documents=2),
}


def main(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after 20 steps of pretraining, and of fine-tuning with each loss."""
    trained = {}
    model, tokenizer = checkpoint.load(folder / "model", M2BertForMaskedLM)
    short = [" ".join(SENTENCES[:i]) for i in range(1, 9)]
    text = PretrainingText.from_texts(short, [" ".join(SENTENCES)] * 6, tokenizer, length=16)
    learn(model, text, lr=1e-3, tokens=20 * 200, batch_tokens=200)
    trained["pretraining"] = weights(model)
    for name, options in FINETUNED.items():
        torch.manual_seed(0)  # draws the pooler
        model, _ = checkpoint.load(folder / "model", M2BertForRetrieval)
        teacher = None
        if options["loss"] == "prototype":
            teacher, _ = checkpoint.load(folder / "teacher", M2BertForRetrieval)
        pairs = Pairs([task()], tokenizer, max_length=24)
        options = dict(documents_seen=20 * options["documents"], lr=1e-3) | options
        assert len(tune(model, pairs, teacher, **options)) == 20
        trained[name] = weights(model)
    return trained


if __name__ == "__main__":
    folder, rank, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    options = dict(rank=rank, world_size=count, init_method=f"file://{folder}/meeting")
    dist.init_process_group("gloo", **options)
    torch.save(main(folder), folder / f"weights-{rank}.pt")
    dist.destroy_process_group()
