"""How long training takes and how often it reads the same text, before its first step.

    facts(folder)                     sizes of a corpus's pretraining text and training pairs
    works(profile, facts)             tokens, epochs and operations of every row that is trained
    rate(profile, vocabulary)         operations per second of a training step on this machine
    repetitions(works)                what reads the same text or pair too often
    announce(profile, folder, row)    a row's line, or every row's, on stderr

    hours = operations / rate

A forward pass is counted (lib/efficiency/counts.py), a backward pass is two of them, and gradient
caching adds a forward pass. What a count leaves out is in the measured rate: norms, gates, copies,
the optimizer. The estimate is therefore good to a factor of two, unless steps are so small that
something else than the model takes the time. Reading data and evaluation come on top.

Source: Muennighoff et al. 2023 (arXiv 2305.16264): a text that is read up to 4 times is nearly as
        good as new text.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.efficiency.counts import m2bert_flops
from lib.kernels.support import matmul_dtype
from lib.model.device import use
from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM
from lib.model.tokens import load_tokenizer
from lib.pipeline import params, processes

LIMITS = {"text": 4, "pairs": 10}  # epochs from which a warning is due
KINDS = ("short", "long")
SAMPLE, CHARACTERS = 200, 2_000  # texts, and the beginning of each, that are tokenised
PROBE = {"cpu": 2_048, "cuda": 32_768}  # tokens of the step that measures a machine


class Facts(NamedTuple):
    """Sizes of what a corpus has to train on, in tokens with [CLS] and [SEP].

    Attributes:
        vocabulary: word pieces of its tokenizer.
        texts: {kind: {source: the length of each pretraining text}}, kind "short" or "long".
        documents: {task: (length, queries) of each document that answers a query, (N, 2)}.
        query: the mean length of a query.
    """

    vocabulary: int
    texts: dict[str, dict[str, np.ndarray]]
    documents: dict[str, np.ndarray]
    query: float


class Work(NamedTuple):
    """What the training of a row does in all its steps.

    Attributes:
        epochs: how often it reads the same `reads`: "text" or "pairs" of a query and its document.
        operations: of all passes, 2 for a multiply-add.
    """

    row: str
    reads: str
    tokens: float
    epochs: float
    operations: float


# ------------------------------------------------------------------ the corpus


def facts(folder: str | Path) -> Facts:
    """The sizes of a corpus: characters of every text, and word pieces per character of a sample.

    The pairs are those of the train split, or of the test split if there is no other.
    """
    import pyarrow.parquet as pq

    folder, tokenizer = Path(folder), load_tokenizer(folder)
    split = "train" if (folder / "queries-train.parquet").is_file() else "test"
    columns = ["dataset", "query", "answer_pids"]
    queries = pq.read_table(folder / f"queries-{split}.parquet", columns=columns)
    asked = Counter(
        (task, pid)
        for task, pids in zip(queries["dataset"].to_pylist(), queries["answer_pids"].to_pylist())
        for pid in pids
    )
    columns = ["dataset", "pid", "passage"]
    documents = pq.read_table(folder / f"documents-{split}.parquet", columns=columns)
    tasks, pids = documents["dataset"].to_pylist(), documents["pid"].to_pylist()
    sizes = lengths(tokenizer, documents["passage"])
    answers: dict[str, list] = {task: [] for task in tasks}
    for task, pid, size in zip(tasks, pids, sizes):
        if asked[task, pid]:
            answers[task].append((size, asked[task, pid]))
    by_task = {task: np.array(own, dtype=float).reshape(-1, 2) for task, own in answers.items()}
    query = float(lengths(tokenizer, queries["query"]).mean())
    return Facts(len(tokenizer), text_lengths(folder, tokenizer), by_task, query)


def text_lengths(folder: Path, tokenizer) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {source: the length of each pretraining text}}; one source is called ""."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "pretrain.parquet").drop_columns("source")
    table = table.filter(pc.equal(table["split"], "train"))
    found: dict = {}
    for kind in KINDS:
        texts = table.filter(pc.equal(table["kind"], kind))
        several = "dataset" in texts.column_names
        names = texts["dataset"].unique().to_pylist() if several else [""]
        found[kind] = {}
        for name in names if len(texts) else ():
            own = texts.filter(pc.equal(texts["dataset"], name)) if several else texts
            found[kind][name] = lengths(tokenizer, own["text"])
    return found


def lengths(tokenizer, texts) -> np.ndarray:
    """About how many tokens each text of a column has, [CLS] and [SEP] included, (n,) float."""
    import pyarrow.compute as pc

    characters = pc.utf8_length(texts).to_numpy().astype(float)
    chosen = np.unique(np.linspace(0, len(texts) - 1, SAMPLE, dtype=int))
    sample = [text[:CHARACTERS] for text in texts.take(chosen).to_pylist()]
    pieces = tokenizer(sample, add_special_tokens=False)["input_ids"]
    return 2 + characters * sum(map(len, pieces)) / max(1, sum(map(len, sample)))


# ------------------------------------------------------------------ the work of a row


def works(profile: str, known: Facts) -> list[Work]:
    """The work of every row that the profile trains, in the order of params.yaml."""
    return [work(profile, table, row, known) for table, row in trained(profile)]


def trained(profile: str) -> list[tuple[str, str]]:
    """(table, row) of every row that the profile trains."""
    return [(table, row) for table in params.MODELS for row in params.rows(profile, table)]


def work(profile: str, table: str, row: str, known: Facts) -> Work:
    pretrains = table in params.TRAINED_BY["pretrain"]
    return (pretraining if pretrains else finetuning)(profile, row, known)


def pretraining(profile: str, row: str, known: Facts) -> Work:
    """The work of a row of pretrained or continued, with all its seeds.

    The mixture gives each kind its share of the examples, and each source an equal part of it. One
    example is a short text, or L tokens of the long ones. A stream of n examples that has a share s
    of the examples is read

        s T / (n · mean length of an example)

    times in T tokens. Every token counts as one of a text of L tokens.
    """
    s = params.settings(profile, "pretrain", row)
    L, T, seeds = params.length(profile, s["length"]), s["tokens"], len(s["seeds"])
    part = {"short": 1.0, "long": 0.0, "mixed": s["variable_share"]}[s["mixture"]]
    streams = []  # (share of the examples, number of examples, their mean length)
    for share, kind in ((part, "short"), (1 - part, "long")):
        for sizes in known.texts[kind].values() if share else ():
            mean = float(L)
            if kind == "short" and s["variable_lengths"] == "uniform":
                mean = (min(10, L) + L) / 2
            n = (sizes - 2).sum() / (mean - 2)
            if kind == "short" and s["variable_lengths"] == "natural":
                n, mean = len(sizes), np.minimum(sizes, L).mean()
            streams.append((share / len(known.texts[kind]), n, mean))
    length = sum(share * mean for share, _, mean in streams)
    epochs = max((share * T / length / n for share, n, _ in streams), default=0.0)
    shape = config(profile, row, L, known.vocabulary)
    step = max(1.0, s["batch_tokens"] / L)
    operations = 3 * T * (forward(shape, L, step) / L + head(shape, s["mask_rate"]))
    return Work(row, "text", float(seeds * T), float(epochs), float(seeds * operations))


def finetuning(profile: str, row: str, known: Facts) -> Work:
    """The work of a row of distilled or retrievers, with all its seeds and the trials of its rates.

    A teacher is left out.

    A document brings up to `queries_per_document` of its queries, and MNRL's explicit negatives and
    hard ones are documents too. A pair's epoch is over when each of its kinds (`kinds`) was read.
    """
    s = params.settings(profile, "finetune", row)
    seen = 0 if s["loss"] == "none" else round(s["share"] * s["documents_seen"])
    tasks = known.documents.items()
    chosen = [own for task, own in tasks if any(fnmatch(task, p) for p in s["tasks"]) and len(own)]
    if not seen or not chosen:
        return Work(row, "pairs", 0.0, 0.0, 0.0)
    sizes, queries = np.concatenate(chosen).T
    asked = np.minimum(queries, s["queries_per_document"] or np.inf).mean()
    hard = s["hard_negatives"] != "none"
    extra = asked * (s["explicit_negatives"] if s["loss"] == "mnrl" else hard * s["negatives"])
    steps_of_pair = kinds(s)
    if steps_of_pair:  # a step is one pair or triplet
        asked, extra = 1.0, float(s["loss"] == "triplet")
    L = params.length(profile, params.paper_length(row, profile))
    longest = min(L, s["document_length"] or L)
    document, query = np.minimum(sizes, longest).mean(), min(known.query, s["query_length"], L)
    shape, batch = config(profile, row, L, known.vocabulary), s["documents"]
    read = (1 + extra) * document + asked * query
    passes = 3 if batch * read <= s["micro_batch_tokens"] else 4
    once = (1 + extra) * forward(shape, document, batch) + asked * forward(shape, query, batch)
    epochs = seen * asked / queries.sum() / max(1, steps_of_pair)
    total = seen * (len(params.trainings(profile, row)) + len(s["lr_choices"]) * s["trial_share"])
    return Work(row, "pairs", float(total * read), float(epochs), float(passes * total * once))


def kinds(s: dict) -> int:
    """The steps that a query and its document have in an epoch, with each negative one of them.

    0 if a step is a batch, in which all pairs of a document are read at once.
    """
    alone = {"opl": 1 + s["negatives"], "contrastive": 2 * s["negatives"]}
    alone["triplet"] = s["negatives"]
    return alone.get(s["loss"], 0) if s["documents"] == 1 else 0


def config(profile: str, row: str | None, length: int, vocabulary: int) -> M2BertConfig:
    """The configuration of a row's model; without a row, the profile's."""
    sizes = params.settings(profile, "model", row)
    shape = {key: sizes[key] for key in M2BertConfig().to_dict().keys() & sizes.keys()}
    padded = vocabulary + -vocabulary % sizes["pad_vocabulary"]
    return M2BertConfig(vocab_size=padded, max_position_embeddings=length, **shape)


def forward(shape: M2BertConfig, length: float, batch: float) -> float:
    """Operations of a text's forward pass; a step of `batch` texts computes the filters once."""
    return sum(m2bert_flops(shape, max(1, round(length)), batch).values())


def head(shape: M2BertConfig, mask_rate: float) -> float:
    """Operations of the pretraining head per token: 2 (D² + D V) for each hidden one."""
    D = shape.hidden_size
    return mask_rate * 2 * D * (D + shape.vocab_size)


# ------------------------------------------------------------------ the machine


def rate(profile: str, vocabulary: int) -> float:
    """Operations per second of a masked-language step of the profile's model, measured here.

    The best of two steps after one that compiles what there is to compile: a fraction of a second
    at laptop, seconds for 80M weights on two cores. No random number of the caller is used up.
    """
    compute = params.settings(profile, "compute")
    device = use(compute)
    L = min(2_048, params.length(profile, params.PAPER_LENGTHS[-1]))
    batch = max(1, PROBE.get(device.type, PROBE["cpu"]) // L)
    dtype = matmul_dtype(getattr(torch, compute["precision"]), device)
    generators = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(generators):
        shape = config(profile, None, L, vocabulary)
        model = M2BertForMaskedLM(shape).to(device).train()
        ids = torch.randint(5, vocabulary, (batch, L)).to(device)
        labels = ids.where((torch.rand(batch, L) < 0.3).to(device), -100)
        seconds = [step(model, ids, labels, dtype) for _ in range(3)]
    once = batch * (forward(shape, L, batch) + L * head(shape, 0.3))
    return 3 * once / min(seconds[1:])


def step(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor, dtype) -> float:
    """Seconds of a forward and a backward pass."""
    device = ids.device.type
    started = time.perf_counter()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(ids, labels=labels).loss
    loss.backward()
    loss.item()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ------------------------------------------------------------------ what is said


def repetitions(done: Iterable[Work]) -> dict[str, str]:
    """{what is read too often: which rows do, and the way out}; empty if none does."""
    ways = {
        "text": "lower pretrain.tokens, or give more TEXT",
        "pairs": "lower finetune.documents_seen, or give DATA with more queries to train on",
    }
    found = {}
    for reads, limit in LIMITS.items():
        over = [w for w in done if w.reads == reads and w.epochs > limit]
        rows = ", ".join(f"{w.row} ({w.epochs:,.0f} times)" for w in over)
        if over:
            found[f"the same {reads} more than {limit} times"] = f"{rows}: {ways[reads]}"
    return found


def announce(profile: str, folder: str | Path, row: str | None = None) -> None:
    """Print what training will read and how long it takes, before its first step.

    stderr, since a time differs from run to run and an executed notebook keeps none. With a row its
    line, and a warning if it repeats itself; else a line for each row, each group and all of them.
    Of several processes the first prints, and the rate is its own times their number.
    """
    if processes.is_follower():
        return
    known = facts(folder)
    speed = rate(profile, known.vocabulary) * params.settings(profile, "compute")["processes"]
    todo = [work(profile, t, r, known) for t, r in trained(profile) if row in (None, r)]
    lines = [line(w, speed) for w in todo]
    if row is None:
        lines += [
            f"group {name}: about {duration(operations / speed)} for {len(group)} rows"
            for name, (group, operations) in by_group(profile, todo).items()
        ]
        total = sum(w.operations for w in todo) / speed
        lines.append(f"all rows, one after the other: about {duration(total)} on this machine")
    else:
        lines += [f"{what}: {which}" for what, which in repetitions(todo).items()]
    print(*lines, sep="\n", file=sys.stderr)


def by_group(profile: str, done: list[Work]) -> dict[str, tuple[set[str], float]]:
    """{group: (its rows with what they are built on, the operations of their training)}."""
    groups = params.groups(params.load(), profile)
    rows = {name: params.needs(profile, group["rows"]) for name, group in groups.items()}
    return {
        name: (group, sum(w.operations for w in done if w.row in group))
        for name, group in rows.items()
    }


def line(done: Work, speed: float) -> str:
    """`mixed_2k: 300,000 tokens, 0.02 epochs of its text, about 30 s at 0.1 TFLOP/s`."""
    took = duration(done.operations / speed)
    return (
        f"{done.row}: {done.tokens:,.0f} tokens, {done.epochs:.2g} epochs of its {done.reads}, "
        f"about {took} at {speed / 1e12:.2g} TFLOP/s"
    )


def duration(seconds: float) -> str:
    """Two digits in the largest fitting unit: 40 s, 12 min, 3.2 hours, 5.1 days."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s"
