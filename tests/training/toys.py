"""What the tests of training share: small tasks, and training with a few settings."""

from types import SimpleNamespace

import torch
from torch import nn

from lib.benchmark.encoder import Encoder
from lib.pipeline.settings import Finetune, Pretrain
from lib.training.finetune import finetune
from lib.training.pretrain import pretrain
from lib.training.targets import Targets

SENTENCES = [
    "the red fox runs by night",
    "the green hen sleeps by day",
    "the blue owl runs",
    "owls sleeps by day",
    "red hens runs unbelievable",
    "the fox sleeps",
    "blue hen by night",
    "green owl by day the red fox",
]
PRETRAIN = dict(
    mask_rate=0.30,
    variable_share=0.30,
    variable_lengths="natural",
    lr_by_length={},
    filter_rate=1.0,
    parameter_groups="none",
    dropout=0.0,
    warmup=0.06,
    final_lr=0.02,
    weight_decay=1e-5,
    mixture="mixed",
    extend_filters="stretch",
    seeds=[17],
)
FINETUNE = dict(
    loss="mnrl",
    share=1.0,
    queries_per_document=1,
    query_length=64,
    negatives=1,
    explicit_negatives=0,
    hard_negatives="none",
    hard_depth=50,
    scale=20.0,
    micro_batch_tokens=65_536,
    tasks=["*"],
    allow_test_training=False,
    lr_documents=1,
    lr_choices=[],
    trial_share=0.25,
    weight_decay=0.01,
    warmup=0.10,
    evaluations=0,
    seeds=[42],
    pretraining_texts=0,
    whiten=False,
    document_length=0,
    filter_rate=1.0,
)


def learn(model, text, precision="float32", checkpoints=None, **settings):
    """Pretrain with these settings; returns the curve."""
    settings = Pretrain(**PRETRAIN | {"embedding_lr": settings["lr"]} | settings)
    return pretrain(model, text, settings, precision, checkpoints, show_progress=False)


def tune(
    model,
    pairs,
    teacher=None,
    precision="float32",
    checkpoints=None,
    seed=42,
    evaluate=None,
    **settings,
):
    """Fine-tune with these settings; returns the curve."""
    settings = Finetune(**FINETUNE | {"embedding_lr": settings["lr"]} | settings).of(seed)
    if isinstance(teacher, nn.Module):
        read = [Encoder(m, pairs.documents.tokenizer, truncate=True) for m in (teacher, model)]
        teacher = Targets(read[0], pairs, settings, read[1], show_progress=False)
    options = dict(show_progress=False, evaluate=evaluate)
    return finetune(model, pairs, settings, teacher, precision, checkpoints, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model):
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in model.parameters()
        ]
    )


def task(name="t", documents=6, queries=3, same=()):
    pids = [f"d{i}" for i in range(documents)]
    texts = {pid: f"{SENTENCES[i % 8]} {'ab' * i}" for i, pid in enumerate(pids)}
    numbers = [(i, j) for i in range(documents) for j in range(queries)]
    return SimpleNamespace(
        name=name,
        documents=texts | dict.fromkeys(same, "the same text"),
        queries={f"q{i}_{j}": f"fox {'c' * i} {'d' * j}" for i, j in numbers},
        qrels={f"q{i}_{j}": {f"d{i}": 1} for i, j in numbers},
    )


def judged(qrels, queries=None, documents=None, name="t"):
    """A task with these qrels; if no text is given, it is the id and a word of its own."""
    pids = [pid for pids in qrels.values() for pid in pids]
    return SimpleNamespace(
        name=name,
        qrels={qid: dict.fromkeys(pids, 1) for qid, pids in qrels.items()},
        queries={qid: (queries or {}).get(qid, f"who {name} {qid}") for qid in qrels},
        documents={pid: (documents or {}).get(pid, f"text {pid}") for pid in pids},
    )
