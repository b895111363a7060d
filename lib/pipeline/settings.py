"""What params.yaml may say: a settings object per section, and one per table of rows.

`base` of a section holds every key. A profile or a row overrides some of them, and is checked
together with the base that it overrides. Lengths are in tokens.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, ValidationError, create_model, model_validator
from pydantic.functional_validators import AfterValidator

from lib.pipeline.errors import WorkbenchError, require

PAPER_LENGTHS = (128, 2048, 8192, 32768)
TRAINED_ON_TEST = "trained_on_test"  # how the name of a row that always is begins

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
PaperLength = Literal[PAPER_LENGTHS]


class ParamsError(WorkbenchError):
    """params.yaml, or a question about it, is wrong; the message names the key."""


def text(pattern: str, refusal: str) -> type[str]:
    """The type of a text that matches a pattern."""

    def check(value: str) -> str:
        require(re.fullmatch(pattern, value), f"{value!r} {refusal}", ValueError)
        return value

    return Annotated[str, AfterValidator(check)]


def source(*names: str) -> type[str]:
    """The type of a collection: one of the names, or the absolute path of a folder."""
    return text("|".join([*names, "/.*"]), f"is none of {', '.join(names)} and an absolute path")


def complete(lengths: dict) -> dict:
    """The lengths of a profile: one for each of the paper's."""
    keys = ", ".join(map(str, PAPER_LENGTHS))
    require(tuple(lengths) == PAPER_LENGTHS, f"wants the keys {keys}, got {lengths!r}", ValueError)
    return lengths


def distinct(seeds: list[int]) -> list[int]:
    different = seeds and len({*seeds}) == len(seeds)
    require(different, f"wants one seed or several different ones, got {seeds}", ValueError)
    return seeds


def choices(rates: list[float]) -> list[float]:
    chosen = not rates or len(rates) > 1 and len({*rates}) == len(rates) and min(rates) > 0
    message = f"wants two or more different rates above 0, or none ([]: lr as given), got {rates}"
    require(chosen, message, ValueError)
    return rates


def picked(rows: list | dict) -> list | dict:
    """The rows of a profile: names, or {name: what differs from the row that every profile has}."""
    names = isinstance(rows, list) and all(isinstance(name, str) for name in rows)
    changes = isinstance(rows, dict) and all(isinstance(own, dict) for own in rows.values())
    message = f"wants a list of rows, or {{row: its changes}}, got {rows!r}"
    require(names or changes, message, ValueError)
    return rows


# Names of rows and profiles reach shell lines and file names.
Name = text(r"[a-z][a-z0-9_]*", "is no name: small letters, digits and _, a letter first")
Notebook = text(r"\d\d_[a-z0-9_]+", "is no notebook's name, such as 00_start_here")
Lengths = Annotated[dict[int, Count], AfterValidator(complete)]
Picked = Annotated[object, AfterValidator(picked)]


class Settings(BaseModel):
    model_config = {"extra": "forbid", "strict": True}


# ------------------------------------------------------------------ sections


class Compute(Settings):
    threads: Count  # of each process
    processes: Count  # that train one model, or embed its documents, on this machine
    stages_per_gpu: Count  # that run at a time on a machine with a GPU, if processes is 1
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["float32", "bfloat16"]  # of matrix multiplications


class Data(Settings):
    source: source("embedded", "hub", "longembed")
    pretraining: source("embedded", "hub")
    tokenizer: str  # embedded, or a folder with a tokenizer's files
    vocabulary: Count
    books: list[Amount]  # lengths of the longest documents, in tokens
    natural: list[str]
    packages: Amount  # packages that are read; 0: all
    files_per_package: Amount
    test_documents: Amount
    test_queries: Amount
    validation_documents: Amount
    validation_queries: Amount
    queries_per_document: Count
    hub_texts: Count


class WordVectors(Settings):
    model: str  # package:<name>, a hub id, or the absolute path of a folder
    weights: Literal["sif", "none"]  # smooth inverse frequency, or every word alike
    own: Share = 0.0  # of a word's direction that is random, so that no other word has it


class Model(Settings):
    hidden_size: Count
    num_hidden_layers: Amount
    intermediate_size: Count
    mlp_blocks: Count
    filter_order: Count
    pad_vocabulary: Count
    residual_long_conv: bool
    mixer: Literal["long_conv", "ungated", "short_conv", "attention", "none"]
    pooling: Literal["cls", "mean"]
    initialization: Literal["reference", "identity", "binding"]
    word_vectors: WordVectors | None  # to start from, with layers that start as the identity
    mask_padding: bool

    @model_validator(mode="after")
    def vectors_stay(self):
        ways = "initialization: identity or binding"
        message = f"word_vectors: want {ways}, since random layers scramble them"
        ready = self.word_vectors is None or self.initialization != "reference"
        require(ready, message, ValueError)
        return self


class Trained(Settings):
    """What is trained once for each of its seeds."""

    seeds: Annotated[list[Amount], AfterValidator(distinct)]

    @property
    def seed(self) -> int:
        """The seed of a training; `of(seed)` are the settings of another one."""
        return self.seeds[0]

    def of(self, seed: int) -> Self:
        return self.model_copy(update={"seeds": [seed]})


class Pretrain(Trained):
    tokens: Amount
    batch_tokens: Count
    lr: Rate
    embedding_lr: Rate
    lr_by_length: dict[PaperLength, Rate]  # both rates of a row of that length
    filter_rate: Rate  # of lr, for the implicit filters, in parameter_groups: none
    parameter_groups: Literal["none", "intended"]
    mask_rate: Share
    variable_share: Share  # of the examples: of variable length
    variable_lengths: Literal["natural", "uniform"]
    dropout: Share
    warmup: Share
    final_lr: Share  # of the peak
    weight_decay: Rate  # of a step at the peak rate
    mixture: Literal["short", "long", "mixed"]
    extend_filters: Literal["stretch", "tile", "extrapolate"]


class Finetune(Trained):
    loss: Literal["opl", "mnrl", "contrastive", "triplet", "prototype", "none"]
    documents: Count  # per step; explicit and hard negatives come on top
    documents_seen: Amount
    share: Share  # of documents_seen
    queries_per_document: Amount  # in an epoch; 0: all
    query_length: Count
    document_length: Amount  # tokens of a document in training; 0: all that the row reads
    negatives: Amount  # of a query and its document; of all losses but MNRL
    explicit_negatives: Amount  # of MNRL: documents of each query, beside those of the batch
    hard_negatives: Literal["none", "bm25", "model"]
    hard_depth: Count  # best ranked negatives of a query, from which hard ones are drawn
    scale: Rate
    micro_batch_tokens: Count  # of a forward pass, with padding
    tasks: list[str]
    # True: of a collection without a train split. always: whatever splits there are, for a row of
    # retrievers that says so in its name (`TRAINED_ON_TEST`).
    allow_test_training: Literal[False, True, "always"]
    lr: Rate
    embedding_lr: Rate
    filter_rate: Rate  # of lr, for the implicit filters
    lr_documents: Count  # documents per step that the rates are meant for
    lr_choices: Annotated[list[Rate], AfterValidator(choices)]  # tried on validation; []: lr
    trial_share: Share  # of the row's documents, for a trial of a rate
    weight_decay: Rate
    warmup: Share
    evaluations: Amount  # on validation during training, evenly spread
    whiten: bool  # start from a pooler that whitens the training texts
    pretraining_texts: Amount  # of a step of distilling, beside its documents and queries

    @model_validator(mode="after")
    def texts_are_read(self):
        ready = self.loss == "prototype" or not self.pretraining_texts
        message = "pretraining_texts: only loss: prototype reads texts without queries"
        require(ready, message, ValueError)
        return self

    @model_validator(mode="after")
    def trains_on_something(self):
        ready = self.allow_test_training != "always" or self.loss != "none"
        message = "allow_test_training: always says nothing with loss: none, which trains nothing"
        require(ready, message, ValueError)
        return self

    def longest(self, reads: int) -> int:
        """Tokens of the longest document in training, of a model that reads so many."""
        return min(reads, self.document_length or reads)

    def at(self, lr: float) -> Self:
        """The settings at another rate; `embedding_lr` keeps its proportion to `lr`."""
        embedding_lr = self.embedding_lr * lr / self.lr
        return self.model_copy(update={"lr": lr, "embedding_lr": embedding_lr, "lr_choices": []})

    def trial(self, lr: float) -> Self:
        """The settings of a trial of a rate: its share of the documents, the first seed."""
        shorter = {"share": self.share * self.trial_share, "evaluations": 0}
        return self.at(lr).of(self.seed).model_copy(update=shorter)

    @model_validator(mode="after")
    def rates_have_a_proportion(self):
        message = "lr_choices: want an lr above 0, to which embedding_lr has its proportion"
        require(self.lr or not self.lr_choices, message, ValueError)
        return self


class Evaluate(Settings):
    depth: Count
    batch_size: Count
    also: list[source("hub", "longembed")]
    needles: Amount


class Efficiency(Settings):
    lengths: list[Amount]
    batch: Count
    repeats: Count
    shallow_from: Amount  # tokens from which one slow layer stands for all


SECTIONS = {
    section.__name__.lower(): section
    for section in (Compute, Data, Model, Pretrain, Finetune, Evaluate, Efficiency)
}


# ------------------------------------------------------------------ rows

# The keys of a baseline that say nothing without another key.
NEEDED = (
    dict.fromkeys("revision chunk query_prompt document_prompt batch url".split(), "model")
    | dict.fromkeys(("window", "stride"), "chunk")
    | dict.fromkeys(("key", "query_options", "document_options"), "url")
)


class Baseline(Settings):
    """BM25 without a `model`; else a model of sentence-transformers, or of the endpoint `url`."""

    first_tokens: Count = None
    model: str = None
    revision: str = None
    chunk: Literal["mean", "max", "best"] = None
    window: Count = None
    stride: Count = None
    query_prompt: str = None
    document_prompt: str = None
    url: str = None
    key: str = None  # the environment variable that holds the endpoint's key
    batch: Count = None
    query_options: dict = None
    document_options: dict = None

    @model_validator(mode="before")
    @classmethod
    def has_no_form(cls, values):
        cohere = "Cohere's address for that is https://api.cohere.ai/compatibility/v1"
        message = f"form: endpoints are asked in OpenAI's form, leave the key out; {cohere}"
        require("form" not in values, message, ValueError)
        return values

    @model_validator(mode="after")
    def keys_agree(self):
        given = self.model_fields_set
        for key, needed in NEEDED.items():
            message = f"{key}: says nothing without {needed!r}"
            require(key not in given or needed in given, message, ValueError)
        for wrong, message in self.contradictions():
            require(not wrong, message, ValueError)
        return self

    def contradictions(self):
        name, local = r"[A-Za-z_]\w{0,60}", r"https://|http://(localhost|127\.0\.0\.1|\[::1\])[:/]"
        yield (
            self.key is not None and not re.fullmatch(name, self.key, re.ASCII),
            "key: wants the name of the environment variable that holds the key, never the key",
        )
        yield self.url and self.revision, "revision: an endpoint has none"
        yield (
            self.url is not None and not re.match(local, self.url),
            f"url: wants https:// (http:// on this machine only), got {self.url!r}",
        )
        yield (
            self.chunk and self.first_tokens,
            "first_tokens: reads the beginning and chunk everything; give one of the two "
            "(`window` is the windows' length)",
        )
        yield (
            self.chunk and self.url and not self.window,
            "chunk: needs `window`, in tokens: the length that an endpoint reads is not known",
        )
        yield (
            (self.stride or 0) > (self.window or float("inf")),
            f"stride: {self.stride} is more than window={self.window}: tokens would be left out",
        )


def row(*sections: type[Settings], **keys) -> type[Settings]:
    """The type of a row: its own keys, and those of the sections that it may override."""
    return create_model("Row", __base__=sections or Settings, **keys)


ROWS = {
    "pretrained": row(Pretrain, Model, length=PaperLength),
    "continued": row(Pretrain, pretrained=str, length=PaperLength),
    "distilled": row(Finetune, pretrained=str, teacher=str),
    "retrievers": row(Finetune, pretrained=str),
    "published": row(checkpoint=str, tokenizer=(str, None), max_length=(Count, None)),
    "baselines": Baseline,
    "teachers": row(),  # a name of a row of baselines
    "ablations": row(notebook=Notebook, rows=list[str]),
    "lessons": row(notebook=Notebook),
}
TABLES = (*ROWS, "evaluated")
Group = row(ablations=(list[str], []), rows=(list[str], []), lessons=(list[str], []))

Design = create_model(
    "Design",
    __base__=Settings,
    profile=str,
    lengths=dict[Name, Lengths],
    rows=dict[str, dict[Literal[TABLES], Picked]],
    groups=dict[Name, dict],
    **dict.fromkeys(SECTIONS, dict[str, dict]),
    **dict.fromkeys(TABLES, dict[Name, dict]),
)


# ------------------------------------------------------------------ messages

WANTED = {
    "int": "a whole number",
    "float": "a number (without quotes: 1.0e-3)",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "keys and values ({} for none)",
}


def validate(where: str, schema: type[Settings], values: dict) -> None:
    """Refuse values in one line that names the key, the value and what is allowed."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key first: a misspelt key is missing too.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        raise ParamsError(explained(where, schema, first)) from None


def explained(where: str, schema: type[Settings], problem: dict) -> str:
    """pydantic's first problem in our words, with the nearest name that would do."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    path = [str(part) for part in (where, *problem["loc"]) if part not in ("", "[key]")]
    place, section = (re.sub(r"\.(\d+)", r"[\1]", ".".join(parts)) for parts in (path, path[:-1]))
    section = f"{section}: " if section else ""
    if kind == "extra_forbidden":
        return f"{section}unknown key {path[-1]!r}{nearest(path[-1], schema.model_fields)}"
    if kind == "missing":
        return f"{section}{path[-1]!r} is missing"
    if kind == "literal_error":
        choices = re.findall(r"'?([\w.]+)'?(?:,| or |$)", context["expected"])
        choices = [{"True": "true", "False": "false"}.get(name, name) for name in choices]  # YAML's
        return f"{place}: unknown value {value!r}{nearest(value, choices)}"
    if kind in ("greater_than_equal", "less_than_equal"):
        limits = "between 0 and 1" if "le" in context else f"at least {context['ge']}"
        return f"{place}: {value} is out of range, should be {limits}"
    if kind == "value_error":  # of several keys: the message begins with one of them
        return f"{place}{': ' if problem['loc'] else '.'}{context['error']}"
    wanted = WANTED.get(kind.partition("_")[0], "another value")
    return f"{place}: wants {wanted}, got {value!r}"


def nearest(name, names: Iterable) -> str:
    """`; did you mean …?`, or the whole list if nothing is near."""
    names = [str(n) for n in names]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(names) or 'none'}"
