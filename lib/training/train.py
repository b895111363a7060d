"""Training: masked-language pretraining, and fine-tuning into a retriever.

    pretrain(model, texts, …)      MLM at 0.30 on short, concatenated or mixed examples
    finetune(model, pairs, …)      OPL, MNRL or prototype loss, any batch in any memory

What goes into step t is a pure function of (seed, t): the same settings give
the same bits on the same machine, and no shuffle buffer has to be saved.
Budgets are counts (tokens, pairs), never seconds.

What the qrels call relevant to a query is never its negative, nor is a
near-identical text (lib/training/duplicates.py).

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3), pretraining mixture and
        appendix A.3; loss by loss see lib/training/losses.py.
Axes:   B texts in a batch, L tokens, D width.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lib.benchmark import statistics
from lib.kernels import engine
from lib.model.tokens import pad, tokenize
from lib.pipeline.progress import bar
from lib.training.duplicates import near_duplicates, question
from lib.training.losses import (
    multiple_negatives_ranking_loss,
    orthogonal_projection_loss,
    prototype_loss,
)

LOSSES = ("mnrl", "opl", "prototype", "none")
MIXTURES = ("short", "long", "mixed")
PRECISIONS = ("float32", "bfloat16")
PASS_TOKENS = (
    32_768  # of pretraining that go through the model together; a step of more is added up
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and why."""


def use(compute: dict) -> torch.device:
    """Set the number of threads of `compute: {threads, device}` and return the device; auto is a GPU where there is one.

    The same settings give the same bits for one number of threads, so the number is a setting and not the machine's.
    """
    torch.set_num_threads(compute["threads"])
    name = compute["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError(
            f"device {name!r}: no CUDA device here; set compute.device to auto or cpu"
        )
    return torch.device(name)


def products(device: torch.device, precision: str) -> AbstractContextManager:
    """A context in which a model's matrix products, and what lies between a layer's projections, are taken in `precision`.

    bfloat16 is torch.autocast, on a device that multiplies it itself; elsewhere it is float32, and the log says so. Weights, optimizer, sums, the norms
    of the encoder, embeddings and losses are float32 in either case.
    """
    if precision not in PRECISIONS:
        raise TrainingError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")
    dtype = engine.multiplied(getattr(torch, precision), device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas=(0.9, 0.999),
    eps: float = 1e-8,
    embedding_lr: float | None = None,
) -> torch.optim.AdamW:
    """AdamW; no decay on biases, norms and gains (any vector), nor on the filters' inputs.

    The word embeddings may learn faster than the rest: a row is touched only when its word occurs.
    """
    words = model.get_input_embeddings().weight
    decayed = [
        p
        for name, p in model.named_parameters()
        if p.ndim > 1 and p is not words and not name.endswith("filter.inputs")
    ]
    chosen = {id(p) for p in decayed} | {id(words)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        dict(params=decayed, weight_decay=weight_decay),
        dict(params=rest, weight_decay=0.0),
        dict(params=[words], weight_decay=weight_decay, lr=embedding_lr or lr),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=True)


def warmup_then_linear(step: int, steps: int, warmup: float, floor: float = 0.0) -> float:
    """The share of the peak rate at a step: 0 -> 1 over the first `warmup` of the steps, then down to `floor`."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return floor + (1 - floor) * (steps - step) / max(1, steps - rise)


def update(
    model: nn.Module, optim: torch.optim.Optimizer, share: float, max_grad_norm: float
) -> None:
    """One optimizer step at `share` of each group's peak rate, gradients clipped and cleared."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    for group in optim.param_groups:
        group["lr"] = group.setdefault("peak", group["lr"]) * share
    optim.step()
    optim.zero_grad(set_to_none=True)


def like_lengths(
    lengths: list[int], most: int | None = None, waste_tokens: int = 2048
) -> list[list[int]]:
    """Indices in groups of like length, longest first, at most `most` a group.

    A group ends where a text would pad less than 0.8 of its longest and the group holds enough tokens
    (`waste_tokens`) to be worth a pass of its own: padding is computed and thrown away.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else None
        if (
            group is None
            or len(group) == most
            or (
                lengths[i] < 0.8 * lengths[group[0]]
                and len(group) * lengths[group[0]] > waste_tokens
            )
        ):
            groups.append([i])
        else:
            group.append(i)
    return groups


# ------------------------------------------------------------------ pretraining


@dataclass
class PretrainingText:
    """Token streams to draw examples from.

    variable    one example a text: its first `length` tokens, at least 10 (the paper's "10 tokens up to the maximum")
    maximum     texts run into each other, cut every length - 2 tokens, [CLS] … [SEP] around each
    """

    variable: list[np.ndarray]
    maximum: np.ndarray
    tokenizer: object
    length: int

    @classmethod
    def from_texts(
        cls,
        short: list[str],
        long: list[str],
        tokenizer,
        length: int,
        limit_tokens: int | None = None,
    ) -> "PretrainingText":
        """Tokenise about `limit_tokens` of each kind (None: everything), texts in a random order that is always the same."""

        def ids(texts: list[str], cut: int) -> Iterator[np.ndarray]:
            total = 0
            texts = [texts[i] for i in np.random.default_rng(len(texts)).permutation(len(texts))]
            for start in range(0, len(texts), 256):
                for row in tokenize(texts[start : start + 256], tokenizer, cut)[0]:
                    total += len(row)
                    yield np.asarray(row, dtype=np.int32)
                if limit_tokens is not None and total >= limit_tokens:
                    return

        variable = [row for row in ids(short, length) if len(row) >= min(10, length)]
        inner = [row[1:-1] for row in ids(long, 4 * 8192)]
        room = length - 2
        stream = np.concatenate(inner) if inner else np.empty(0, dtype=np.int32)
        stream = stream[: len(stream) // room * room].reshape(-1, room)
        n = len(stream)
        edges = [
            np.full((n, 1), token, dtype=np.int32)
            for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        ]
        return cls(variable, np.hstack([edges[0], stream, edges[1]]), tokenizer, length)

    def check(self, mixture: str, what: str) -> None:
        """Say before training what a draw from the mixture would stumble over.

        Args:
            what: whose text it is, for the message: "the training text", "the held-out text".

        Raises:
            TrainingError: the mixture draws from a kind of text that is not there, or is none of MIXTURES.
        """
        if mixture not in MIXTURES:
            raise TrainingError(f"mixture {mixture!r}: one of {', '.join(MIXTURES)}")
        there = {"short": len(self.variable) > 0, "long": len(self.maximum) > 0}
        wanted = {
            "short": f"short text of {min(10, self.length)} tokens or more",
            "long": f"long text that fills {self.length} tokens",
        }
        lacking = [
            wanted[kind] for kind in wanted if mixture in (kind, "mixed") and not there[kind]
        ]
        if lacking:
            ways_out = [
                "add some to the pretraining text",
                *(f"set mixture: {kind}" for kind in there if there[kind]),
            ]
            raise TrainingError(
                f"{what} has no {' and no '.join(lacking)}, which mixture {mixture!r} draws from: {', or '.join(ways_out)}"
            )

    def batch(
        self, step: int, seed: int, tokens: int, mixture: str, variable_share: float
    ) -> list[list[np.ndarray]]:
        """The examples of a step, as groups of like length: `variable_share` of the examples variable, the others of maximum length.

        mixture: `mixed`; `short` (variable only) and `long` (maximum only) are the ablation's ends.
        """
        share = {"short": 1.0, "long": 0.0, "mixed": variable_share}[mixture]
        rng = np.random.default_rng([seed, step])
        rows, used = [], 0
        while used < tokens:
            kind = self.variable if rng.random() < share else self.maximum
            rows.append(kind[rng.integers(len(kind))])
            used += len(rows[-1])
        groups = []
        for group in like_lengths([len(row) for row in rows]):
            most = max(1, PASS_TOKENS // len(rows[group[0]]))
            groups += [
                [rows[i] for i in group[start : start + most]]
                for start in range(0, len(group), most)
            ]
        return groups


def mask_tokens(
    ids: Tensor, real: Tensor, tokenizer, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's corruption: `rate` of the real tokens are targets; 80 % of them become [MASK], 10 % a random word, 10 % stay.

    Args:
        ids, real: (B, L); real is 1 where there is a token.

    Returns:
        (corrupted ids, labels), labels -100 where there is no target. [CLS] and [SEP] never are.
    """
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    target = (torch.rand(ids.shape, generator=generator) < rate) & real.bool() & ~special
    labels = ids.masked_fill(~target, -100)
    dice = torch.rand(ids.shape, generator=generator)
    corrupted = ids.masked_fill(target & (dice < 0.8), tokenizer.mask_token_id)
    random = torch.randint(
        len(tokenizer.all_special_ids), len(tokenizer), ids.shape, generator=generator
    )
    return torch.where(target & (dice >= 0.8) & (dice < 0.9), random, corrupted), labels


def pretrain(
    model: nn.Module,
    text: PretrainingText,
    tokens: int,
    batch_tokens: int,
    lr: float,
    mixture: str = "mixed",
    variable_share: float = 0.30,
    mask_rate: float = 0.30,
    betas=(0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 1e-5,
    warmup: float = 0.06,
    max_grad_norm: float = 1.0,
    final_lr: float = 0.02,
    embedding_lr: float | None = None,
    precision: str = "float32",
    seed: int = 17,
    show_progress: bool = True,
) -> list[dict]:
    """Masked-language pretraining, in place.

    Args:
        precision: float32, or bfloat16 (`products`).

    Returns:
        The curve: one {"step", "tokens", "loss", "accuracy", "lr"} a step, measured before the step's update.

    Raises:
        TrainingError: there is no text for the mixture (before the first step), or the loss is no longer finite.
    """
    steps = math.ceil(tokens / batch_tokens) if tokens else 0
    if steps:
        text.check(mixture, "the training text")
    device = next(model.parameters()).device
    context = products(device, precision)
    optim = optimizer(model, lr, weight_decay, betas, eps, embedding_lr)
    model.train()
    curve, seen = [], 0
    progress = bar(total=tokens, desc=f"pretrain ({mixture})", show=show_progress)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batches = []
        for group in text.batch(step, seed, batch_tokens, mixture, variable_share):
            ids, real = pad([row.tolist() for row in group], text.tokenizer.pad_token_id)
            batches.append((*mask_tokens(ids, real, text.tokenizer, mask_rate, generator), real))
        targets = sum(int((labels > 0).sum()) for _, labels, _ in batches)
        loss = correct = 0.0
        for ids, labels, real in batches:
            n = int((labels > 0).sum())
            if not n:
                continue
            with context:
                out = model(ids.to(device), real.to(device), labels=labels.to(device))
            (out.loss * n / targets).backward()  # the mean over the step's targets, however grouped
            loss += out.loss.item() * n / targets
            correct += float((out.logits.argmax(-1).cpu() == labels[labels > 0]).sum())
        check(loss, step, optim, "pretraining")
        share = warmup_then_linear(step, steps, warmup, final_lr)
        update(model, optim, share, max_grad_norm)
        fresh = sum(int(real.sum()) for _, _, real in batches)
        seen += fresh
        curve.append(
            dict(
                step=step, tokens=seen, loss=loss, accuracy=correct / max(1, targets), lr=lr * share
            )
        )
        progress.update(fresh)
    progress.close()
    model.eval()
    return curve


def check(loss: float, step: int, optim: torch.optim.Optimizer, what: str) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"{what}: the loss is {loss} at step {step} (lr {optim.param_groups[0]['lr']:.2g}); lower lr"
        )


@torch.no_grad()
def mlm_accuracy(
    model: nn.Module,
    text: PretrainingText,
    batches: int = 8,
    batch_tokens: int = 8192,
    mixture: str = "mixed",
    mask_rate: float = 0.15,
    seed: int = 1,
) -> tuple[float, float, float]:
    """Share of masked tokens predicted right, over a fixed sample, with its 95 % interval over examples: (accuracy, low, high).

    The paper validates at a mask rate of 0.15.

    Raises:
        TrainingError: there is no text for the mixture; `text.check` says so before anything is trained.
    """
    text.check(mixture, "the held-out text")
    model.eval()
    device = next(model.parameters()).device
    right, asked = [], []
    for step in range(batches):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in text.batch(step, seed, batch_tokens, mixture, 0.30):
            ids, real = pad([row.tolist() for row in group], text.tokenizer.pad_token_id)
            ids, labels = mask_tokens(ids, real, text.tokenizer, mask_rate, generator)
            logits = model(ids.to(device), real.to(device), labels=labels.to(device)).logits
            hits = torch.zeros_like(labels)
            hits[labels > 0] = (logits.argmax(-1).cpu() == labels[labels > 0]).long()
            right += hits.sum(dim=1).tolist()
            asked += (labels > 0).sum(dim=1).tolist()
    right, asked = np.array(right, dtype=float), np.array(asked, dtype=float)
    accuracy = right.sum() / max(1.0, asked.sum())
    # An example counts by its masked tokens: the interval of a ratio of two means, by its linear approximation.
    _, low, high = statistics.interval(accuracy + (right - accuracy * asked) / max(1.0, asked.mean()))
    return float(accuracy), low, high


# ------------------------------------------------------------------ fine-tuning


class Rows:
    """Token rows of texts, cut to `max_length` and made when they are first asked for: a budget may end before the texts do."""

    def __init__(self, texts: list[str], tokenizer, max_length: int):
        self.texts, self.tokenizer, self.max_length = texts, tokenizer, max_length
        self.rows: list[np.ndarray | None] = [None] * len(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, where: list[int]) -> list[np.ndarray]:
        fresh = [i for i in dict.fromkeys(where) if self.rows[i] is None]
        for i, row in zip(
            fresh, tokenize([self.texts[i] for i in fresh], self.tokenizer, self.max_length)[0]
        ):
            self.rows[i] = np.asarray(row, dtype=np.int32)
        return [self.rows[i] for i in where]


class Pairs:
    """Training pairs, kept by document: a document's embedding serves all its queries.

    One text under two ids, in one task or in two, is one document, and one question (white space
    and case aside) under two ids is one question.

    Args:
        tasks: of lib.benchmark.locov1, train split. Documents are cut to `max_length`
            tokens, queries to `query_length`.
        tokenizer: None will do for a `check` alone.
    """

    def __init__(self, tasks, tokenizer, max_length: int, query_length: int = 64):
        self.pad_id = None if tokenizer is None else tokenizer.pad_token_id
        texts: dict[str, int] = {}
        asked: dict[str, int] = {}
        queries, questions, groups = [], [], {}
        for task in tasks:
            for qid, judged in task.qrels.items():
                answers = [task.documents[pid] for pid, gain in judged.items() if gain > 0]
                if not answers:
                    continue
                for where in dict.fromkeys(texts.setdefault(text, len(texts)) for text in answers):
                    groups.setdefault(where, []).append(len(queries))
                queries.append(task.queries[qid])
                questions.append(asked.setdefault(question(task.queries[qid]), len(asked)))
        if not queries:
            raise TrainingError(
                f"no training pairs in {', '.join(task.name for task in tasks) or 'no task'}"
            )
        self.documents, self.queries = (
            Rows(list(texts), tokenizer, max_length),
            Rows(queries, tokenizer, query_length),
        )
        self.answers = groups  # document -> its queries
        self.questions = np.array(questions, dtype=np.int32)  # query -> its question

    @functools.cached_property
    def barred(self) -> dict[int, np.ndarray]:
        """Question -> documents that are never its negatives, ascending: all that the qrels of any of
        its ids call relevant, and near-identical texts.

        A question that bars its one answer alone is not in it. Made when a loss first asks, since to
        compare the texts takes seconds.
        """
        near = near_duplicates(self.documents.texts)
        near = np.concatenate([near, near[:, ::-1]])
        near = near[np.argsort(near[:, 0], kind="stable")]
        edges = np.searchsorted(near[:, 0], np.arange(len(self.documents) + 1))
        relevant = defaultdict(list)
        for document, queries in self.answers.items():
            for asked in dict.fromkeys(self.questions[queries].tolist()):
                relevant[asked].append(document)
        sets: dict[tuple, np.ndarray] = {}  # questions of the same answers share an array
        for answers in map(tuple, relevant.values()):
            if answers not in sets:
                copies = [near[edges[document] : edges[document + 1], 1] for document in answers]
                sets[answers] = np.unique(np.concatenate([answers, *copies])).astype(np.int32)
        return {
            asked: sets[tuple(answers)]
            for asked, answers in relevant.items()
            if len(sets[tuple(answers)]) > 1
        }

    def check(self, loss: str) -> None:
        """Say before the first step that no query has a negative, to a loss that learns from them.

        Raises:
            TrainingError: there is one document, or each one answers every query or is near-identical to one that does.
        """
        if loss not in ("mnrl", "opl"):
            return
        n, questions = len(self.documents), int(self.questions.max()) + 1
        if n > 1 and (
            len(self.barred) < questions or any(len(barred) < n for barred in self.barred.values())
        ):
            return
        raise TrainingError(
            f"loss {loss!r} needs documents that do not answer a query, and here are none: "
            + (
                f"each of {n} documents answers every query or is nearly the text of one that does"
                if n > 1
                else "there is 1 document"
            )
            + "; give more documents, or set loss: prototype or none"
        )

    def batch(
        self, step: int, seed: int, documents: int, queries_per_document: int | None
    ) -> tuple[list[int], list[int], list[int]]:
        """(documents, queries, target): epoch after epoch without repetition, whatever the batch size.

        Query i is answered by the batch's target[i]-th document, and maybe by others (`related`).
        `queries_per_document` None is all of them, in the same order.
        """
        chosen, queries, target = [], [], []
        keys = sorted(self.answers)
        for place in range(step * documents, (step + 1) * documents):
            epoch, index = divmod(place, len(keys))
            where = keys[permutation(len(keys), seed, epoch)[index]]
            if where in chosen:
                continue  # the seam of two epochs
            rng = np.random.default_rng([seed, epoch, where])
            own = rng.permutation(self.answers[where])[:queries_per_document]
            target += [len(chosen)] * len(own)
            queries += own.tolist()
            chosen.append(where)
        return chosen, queries, target

    def related(self, documents: list[int], queries: list[int], target: list[int]) -> np.ndarray:
        """Which documents of a batch are never negatives of which of its queries, the target among them.

        Returns:
            (queries, documents) bool.
        """
        found = np.arange(len(documents)) == np.array(target)[:, None]
        for row, asked in zip(found, self.questions[queries].tolist()):
            if asked in self.barred:
                row |= np.isin(documents, self.barred[asked])
        return found

    def negative(self, cycle: int, seed: int, step: int) -> tuple[int, int]:
        """(document, query) of a pair with label 0: the cycle's query, and a document drawn from all that it does not bar.

        A query that bars every document has no negative: the document's next query takes its place,
        then those of the next documents in the order of the epochs. `check` has seen that there is one.
        """
        for later in range(cycle, cycle + 2 * len(self.answers)):  # a whole epoch lies in it
            (answer,), queries, _ = self.batch(later, seed, 1, None)
            for query in queries:
                barred = self.barred.get(int(self.questions[query]), [answer])
                if len(barred) < len(self.documents):
                    return other(
                        answer, barred, len(self.documents), np.random.default_rng([seed, step, 1])
                    ), query
        raise TrainingError(f"no query has a negative among {len(self.documents)} documents")


_orders: dict = {}


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch`: a function of its three arguments; the last one is remembered."""
    key = (n, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch, n]).permutation(n)
    return _orders[key]


def embed(
    model: nn.Module,
    rows: list[np.ndarray],
    pad_id: int,
    micro_batch: int | None = None,
    context: AbstractContextManager = nullcontext(),
) -> Tensor:
    """Embeddings (n, D) of token rows, in their order; at most `micro_batch` go through the model at a time, in that context."""
    device = next(model.parameters()).device
    groups = like_lengths([len(row) for row in rows], micro_batch)
    parts = []
    for group in groups:
        ids, real = pad([rows[i].tolist() for i in group], pad_id)
        with context:
            parts.append(model(ids.to(device), real.to(device)).pooler_output)
    back = torch.empty(len(rows), dtype=torch.long)
    back[torch.tensor([i for group in groups for i in group])] = torch.arange(len(rows))
    return torch.cat(parts)[back.to(device)]


def finetune(
    model: nn.Module,
    pairs: Pairs,
    documents_seen: int,
    documents: int,
    lr: float,
    loss: str = "mnrl",
    teacher=None,
    teacher_pairs: Pairs | None = None,
    queries_per_document: int = 1,
    negatives: int = 1,
    scale: float = 20.0,
    micro_batch: int | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.10,
    max_grad_norm: float = 1.0,
    betas=(0.9, 0.999),
    eps: float = 1e-8,
    embedding_lr: float | None = None,
    precision: str = "float32",
    seed: int = 42,
    show_progress: bool = True,
) -> list[dict]:
    """Turn an encoder into a retriever, in place.

    Each step embeds `documents` documents and up to `queries_per_document` queries of each. MNRL ranks every query
    against all of them. OPL takes the pairs one by one: each query with its document (label 1) and with
    `negatives` others drawn from the step's documents (label 0), or, at `documents: 1`, one pair a step: a
    positive, then `negatives` negatives with a document drawn from all of `pairs`. The prototype loss compares
    each text with the teacher's embedding of it.

    A document that answers a query too, or is nearly the same text as one that does, is never its negative
    (`Pairs.barred`). A query for which that leaves none has none: it adds 0 to MNRL's mean, is a positive alone in
    OPL, and at `documents: 1` another query takes its place (`Pairs.negative`).

    With `micro_batch`, texts are embedded that many at a time and twice: first without a graph, to get the loss's
    gradient with respect to every embedding; then with one, a part at a time. The gradient is that of the whole
    batch, for every loss, and memory that of the part (gradient caching: Gao et al. 2021, arXiv 2101.06983).

    Args:
        documents_seen: budget, in documents embedded.
        precision: float32, or bfloat16 (`products`); embeddings and losses are float32.

    Returns:
        The curve: one {"step", "tokens", "loss", "lr"} a step.

    Raises:
        TrainingError: before the first step, no such loss or precision, or no negative for any query; later, a loss that is not finite.
    """
    if loss not in LOSSES:
        raise TrainingError(f"loss {loss!r}: one of {', '.join(LOSSES)}")
    if loss == "none" or not documents_seen:
        model.eval()
        return []
    if loss == "mnrl" or negatives:
        pairs.check(loss)
    steps = math.ceil(documents_seen / documents)
    context = products(next(model.parameters()).device, precision)
    optim = optimizer(model, lr, weight_decay, betas, eps, embedding_lr)
    model.train()
    curve, seen = [], 0
    progress = bar(total=steps, desc=f"fine-tune ({loss})", show=show_progress)
    for step in range(steps):
        if loss == "opl" and documents == 1:
            cycle, phase = divmod(step, 1 + negatives)
            docs, queries, target = pairs.batch(cycle, seed, 1, 1)
            labels = torch.tensor([1.0])
            if phase:
                document, query = pairs.negative(cycle, seed, step)
                docs, queries, labels = [document], [query], torch.tensor([0.0])
        else:
            docs, queries, target = pairs.batch(step, seed, documents, queries_per_document)
            labels = None
        rows = pairs.documents[docs] + pairs.queries[queries]
        n, related, wrong, drawn = len(docs), None, [], []
        if loss == "mnrl":
            related = torch.from_numpy(pairs.related(docs, queries, target))
            related = (
                related if related.sum() > len(queries) else None
            )  # each target alone: nothing to leave out
        elif loss == "opl" and labels is None:
            rng = np.random.default_rng([seed, step])
            for row, barred in enumerate(map(np.flatnonzero, pairs.related(docs, queries, target))):
                fresh = [
                    other(target[row], barred, n, rng)
                    for _ in range(negatives if len(barred) < n else 0)
                ]
                wrong, drawn = wrong + fresh, drawn + [row] * len(fresh)
        target = torch.tensor(target)

        def value(vectors: Tensor) -> Tensor:  # (n + Q, D) -> scalar
            d, q = vectors[:n], vectors[n:]
            where = target.to(d.device)
            if loss == "mnrl":
                return multiple_negatives_ranking_loss(
                    q,
                    d,
                    scale=scale,
                    targets=where,
                    relevant=None if related is None else related.to(d.device),
                )
            if loss == "prototype":
                with torch.no_grad():
                    t = embed(
                        teacher,
                        teacher_pairs.documents[docs] + teacher_pairs.queries[queries],
                        pairs.pad_id,
                    )
                return prototype_loss(q, d[where], t[n:], t[:n][where])
            if labels is not None:
                return orthogonal_projection_loss(q, d, labels.to(d.device))
            y = torch.cat([torch.ones(len(q)), torch.zeros(len(wrong))]).to(d.device)
            return orthogonal_projection_loss(
                torch.cat([q, q[drawn]]), torch.cat([d[where], d[wrong]]), y
            )

        total = backward(model, rows, value, pairs.pad_id, micro_batch, n, context)
        check(total, step, optim, "fine-tuning")
        share = warmup_then_linear(step, steps, warmup)
        update(model, optim, share, max_grad_norm)
        seen += sum(len(row) for row in rows)
        curve.append(dict(step=step, tokens=seen, loss=total, lr=lr * share))
        progress.update(1)
    progress.close()
    model.eval()
    return curve


def other(answer: int, barred: np.ndarray | list[int], n: int, rng: np.random.Generator) -> int:
    """A document drawn from those of n that are not barred, each as likely.

        (answer + 1 + rng.integers(n - 1)) % n,  where the answer alone is barred

    Otherwise the draw counts answer + 1, answer + 2, … (mod n) without the barred ones.

    Args:
        barred: fewer than n, each once, the answer among them.
    """
    steps = np.sort((np.asarray(barred) - answer - 1) % n)  # from answer + 1 to each barred one
    draw = rng.integers(n - len(steps))
    passed = np.searchsorted(steps - np.arange(len(steps)), draw, side="right")
    return int((answer + 1 + draw + passed) % n)


def backward(
    model: nn.Module,
    rows: list[np.ndarray],
    value,
    pad_id: int,
    micro_batch: int | None,
    documents: int,
    context: AbstractContextManager = nullcontext(),
) -> float:
    """Add the gradient of value(embeddings of rows) to the model; returns the value.

    Documents and queries go through the model separately: their lengths differ a hundredfold.
    """
    kinds = (rows[:documents], rows[documents:])
    if micro_batch is None or len(rows) <= micro_batch:
        total = value(
            torch.cat([embed(model, kind, pad_id, context=context) for kind in kinds if kind])
        )
        total.backward()
        return total.item()
    state = torch.get_rng_state()
    with torch.no_grad():
        vectors = torch.cat(
            [embed(model, kind, pad_id, micro_batch, context) for kind in kinds if kind]
        )
    vectors.requires_grad_()
    total = value(vectors)
    total.backward()
    torch.set_rng_state(state)  # dropout falls on the same units again
    start = 0
    for kind in kinds:
        for some in like_lengths([len(row) for row in kind], micro_batch):
            out = embed(model, [kind[i] for i in some], pad_id, context=context)
            out.backward(vectors.grad[[start + i for i in some]])
        start += len(kind)
    return total.item()
