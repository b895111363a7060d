"""What params.yaml may say: a settings object per section, and one per table of rows.

`base` of a section holds every key. A profile or a row overrides some of them, and is checked
together with the base that it overrides. Lengths are in tokens.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lib.pipeline.errors import WorkbenchError

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
PaperLength = Literal[128, 2048, 8192, 32768]


class ParamsError(WorkbenchError):
    """params.yaml, or what is asked of it, is wrong; the message names the key."""


def source(*names: str) -> type[str]:
    """The type of a collection: one of the names, or the absolute path of a folder."""

    def check(value: str) -> str:
        if value not in names and not Path(value).is_absolute():
            raise ValueError(f"{value!r} is none of {', '.join(names)} and an absolute path")
        return value

    return Annotated[str, AfterValidator(check)]


def notebook_name(value: str) -> str:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", value):
        raise ValueError(f"{value!r} is no notebook's name, such as 00_start_here")
    return value


Notebook = Annotated[str, AfterValidator(notebook_name)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# ------------------------------------------------------------------ sections


class Compute(Settings):
    threads: Count
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["float32", "bfloat16"] = Field(description="of matrix multiplications")


class Data(Settings):
    source: source("embedded", "hub", "longembed")
    pretraining: source("embedded", "hub")
    tokenizer: str = Field(description="embedded, or a folder with a tokenizer's files")
    vocabulary: Count
    books: list[Amount] = Field(description="lengths of the longest documents, in tokens")
    natural: list[str]
    packages: Amount = Field(description="packages that are read; 0: all")
    files_per_package: Amount
    test_documents: Amount
    test_queries: Amount
    validation_documents: Amount
    validation_queries: Amount
    queries_per_document: Count
    hub_texts: Count


class Model(Settings):
    hidden_size: Count
    num_hidden_layers: Amount
    intermediate_size: Count
    mlp_blocks: Count
    filter_order: Count
    residual_long_conv: bool
    pooling: Literal["cls", "mean"]
    initialization: Literal["reference", "identity"]
    mask_padding: bool


class Pretrain(Settings):
    tokens: Amount
    batch_tokens: Count
    lr: Rate
    embedding_lr: Rate
    mask_rate: Share
    variable_share: Share = Field(description="of the examples: of variable length")
    warmup: Share
    final_lr: Share = Field(description="of the peak")
    weight_decay: Rate
    mixture: Literal["short", "long", "mixed"]
    extend_filters: Literal["stretch", "tile", "extrapolate"]
    seed: Amount


class Finetune(Settings):
    loss: Literal["opl", "mnrl", "prototype", "none"]
    documents: Count = Field(description="per step")
    documents_seen: Amount
    share: Share = Field(description="of documents_seen")
    queries_per_document: Count
    query_length: Count
    negatives: Amount = Field(description="per positive pair")
    scale: Rate
    micro_batch: Amount = Field(description="texts embedded at a time; 0: all")
    tasks: list[str]
    allow_test_training: bool
    lr: Rate
    embedding_lr: Rate
    lr_documents: Count = Field(description="documents per step that the rates are meant for")
    weight_decay: Rate
    warmup: Share
    seed: Amount


class Evaluate(Settings):
    depth: Count
    batch_size: Count
    also: list[source("hub", "longembed")]
    needles: Amount


class Efficiency(Settings):
    lengths: list[Amount]
    batch: Count
    repeats: Count
    shallow_from: Amount = Field(description="tokens from which one slow layer stands for all")


SECTIONS = {
    section.__name__.lower(): section
    for section in (Compute, Data, Model, Pretrain, Finetune, Evaluate, Efficiency)
}


# ------------------------------------------------------------------ rows


class Pretrained(Settings):
    length: PaperLength


class Continued(Settings):
    pretrained: str
    length: PaperLength


class Distilled(Settings):
    pretrained: str
    teacher: str


class Retriever(Settings):
    pretrained: str


class Published(Settings):
    checkpoint: str
    tokenizer: str = None
    max_length: Count = None


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
    key: str = Field(None, description="the environment variable that holds the endpoint's key")
    batch: Count = None
    query_options: dict = None
    document_options: dict = None

    @model_validator(mode="before")
    @classmethod
    def has_no_form(cls, values):
        if isinstance(values, dict) and "form" in values:
            raise ValueError(
                "form: endpoints are asked in OpenAI's form, leave the key out; "
                "Cohere's address for that is https://api.cohere.ai/compatibility/v1"
            )
        return values

    @model_validator(mode="after")
    def keys_agree(self):
        given = self.model_fields_set
        for needed, keys in (
            ("model", "revision chunk query_prompt document_prompt batch url"),
            ("chunk", "window stride"),
            ("url", "key query_options document_options"),
        ):
            for key in keys.split():
                if key in given and needed not in given:
                    raise ValueError(f"{key}: says nothing without {needed!r}")
        for wrong, message in self.contradictions():
            if wrong:
                raise ValueError(message)
        return self

    def contradictions(self):
        yield (
            self.key is not None and not re.fullmatch(r"[A-Za-z_]\w{0,60}", self.key, re.ASCII),
            "key: wants the name of the environment variable that holds the key, never the key",
        )
        yield self.url and self.revision, "revision: an endpoint has none"
        local = r"https://|http://(localhost|127\.0\.0\.1|\[::1\])[:/]"
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


class Ablation(Settings):
    notebook: Notebook
    rows: list[str]


class Lesson(Settings):
    notebook: Notebook


ROWS = {
    "pretrained": Pretrained,
    "continued": Continued,
    "distilled": Distilled,
    "retrievers": Retriever,
    "published": Published,
    "baselines": Baseline,
    "ablations": Ablation,
    "lessons": Lesson,
}


# ------------------------------------------------------------------ messages

WANTED = {
    "int": "a whole number",
    "float": "a number (without quotes: 1.0e-3)",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a section",
}


def validate(where: str, schema: type[Settings], values: dict, base: dict | None = None) -> None:
    """Check values, over the base that they override.

    Raises:
        ParamsError: one line that names the key, the value and what is allowed.
    """
    try:
        schema.model_validate({**(base or {}), **values})
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key first: a misspelt key is missing too.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        raise ParamsError(explained(where, schema, first)) from None


def explained(where: str, schema: type[Settings], problem: dict) -> str:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    key = "".join(f"[{part}]" if type(part) is int else f".{part}" for part in problem["loc"])
    if kind == "extra_forbidden":
        name = problem["loc"][0]
        return f"{where}: unknown key {name!r}{nearest(name, schema.model_fields)}"
    if kind == "missing":
        return f"{where}: {problem['loc'][0]!r} is missing{nearest(problem['loc'][0], value)}"
    if kind == "literal_error":
        choices = re.findall(r"'?([\w.]+)'?(?:,| or |$)", context["expected"])
        return f"{where}{key}: unknown value {value!r}{nearest(value, choices)}"
    if kind in ("greater_than_equal", "less_than_equal"):
        limits = "between 0 and 1" if "le" in context else f"at least {context['ge']}"
        return f"{where}{key}: {value} is out of range, should be {limits}"
    if kind == "value_error":
        return f"{where}{key}{':' if key else '.'}{' ' * bool(key)}{context['error']}"
    wanted = WANTED.get(kind.partition("_")[0], "another value")
    return f"{where}{key}: wants {wanted}, got {value!r}"


def nearest(name, names: Iterable) -> str:
    """`; did you mean …?`, or the whole list if nothing is near."""
    names = [str(n) for n in names]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(names) or 'none'}"
