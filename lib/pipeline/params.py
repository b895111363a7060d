"""The experimental design, read from params.yaml: typed, checked, merged.

    settings(profile, stage, row)     base  <  profile  <  row, key by key
    length(profile, 2048)             what a paper length is in a profile
    rows(profile, "retrievers")       the rows a profile runs

`base` of a stage holds every key that its notebooks read, and gives each its
type: anything else is an error, and the message says which key was probably
meant. A design that is wrong anywhere is refused whole, before the first stage
runs. Lengths are in tokens.
"""

import copy
import difflib
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from lib.pipeline.errors import WorkbenchError

PAPER_LENGTHS = (128, 2048, 8192, 32768)
# What the notebooks read of each stage; `base` holds all of it and nothing else.
KEYS = {
    "compute": "threads device precision",
    "data": "source pretraining tokenizer vocabulary books natural packages files_per_package test_documents test_queries validation_documents validation_queries queries_per_document hub_texts",
    "model": "hidden_size num_hidden_layers intermediate_size mlp_blocks filter_order residual_long_conv pooling initialization mask_padding",
    "pretrain": "tokens batch_tokens lr embedding_lr mask_rate variable_share warmup final_lr weight_decay mixture extend_filters seed",
    "finetune": "loss documents documents_seen share queries_per_document query_length negatives scale micro_batch tasks allow_test_training lr embedding_lr lr_documents weight_decay warmup seed",
    "evaluate": "depth batch_size also needles",
    "efficiency": "lengths batch repeats shallow_from",
}
STAGES = tuple(KEYS)
TABLES = (
    "pretrained",
    "continued",
    "distilled",
    "retrievers",
    "published",
    "evaluated",
    "baselines",
    "ablations",
    "lessons",
)
MODELS = (
    "pretrained",
    "continued",
    "distilled",
    "retrievers",
)  # each of their rows is a model trained here
TRAINED_BY = {"pretrain": ("pretrained", "continued"), "finetune": ("distilled", "retrievers")}

# What a row holds beside the settings of the stage that trains it.
OWN_KEYS = {
    "pretrained": {"length": int},
    "continued": {"pretrained": str, "length": int},
    "distilled": {"pretrained": str, "teacher": str},
    "retrievers": {"pretrained": str},
    "published": {"checkpoint": str},
    "baselines": {},
    "ablations": {"notebook": str, "rows": list},
    "lessons": {"notebook": str},
}
# The same, where it may be left out.
OPTIONAL = {
    "published": {"tokenizer": str, "max_length": int},
    "baselines": {
        "first_tokens": int,
        "model": str,
        "revision": str,
        "chunk": str,
        "window": int,
        "stride": int,
        "query_prompt": str,
        "document_prompt": str,
        "url": str,
        "key": str,
        "batch": int,
        "query_options": dict,
        "document_options": dict,
    },
}
# Keys of a baseline that say nothing without another one.
NEEDS = {
    "revision": "model",
    "chunk": "model",
    "window": "chunk",
    "stride": "chunk",
    "query_prompt": "model",
    "document_prompt": "model",
    "batch": "model",
    "url": "model",
    "key": "url",
    "query_options": "url",
    "document_options": "url",
}
# Where a row's reference may point.
REFERENCES = {
    ("continued", "pretrained"): ("pretrained", "continued"),
    ("distilled", "pretrained"): ("pretrained", "continued"),
    ("distilled", "teacher"): ("retrievers",),
    ("retrievers", "pretrained"): ("pretrained", "continued", "distilled"),
    ("ablations", "rows"): ("retrievers", "baselines"),
}
CHOICES = {
    ("compute", "device"): ("auto", "cpu", "cuda", "mps"),
    ("compute", "precision"): ("float32", "bfloat16"),
    ("model", "pooling"): ("cls", "mean"),
    ("model", "initialization"): ("reference", "identity"),
    ("pretrain", "mixture"): ("short", "long", "mixed"),
    ("pretrain", "extend_filters"): ("stretch", "tile", "extrapolate"),
    ("finetune", "loss"): ("opl", "mnrl", "prototype", "none"),
    ("baselines", "chunk"): ("mean", "max", "best"),
}
SHARES = {"mask_rate", "variable_share", "warmup", "final_lr", "share"}  # of something: at most 1
AT_LEAST_ONE = {
    "threads",
    "batch_tokens",
    "documents",
    "lr_documents",
    "queries_per_document",
    "query_length",
    "hub_texts",
    "batch_size",
    "batch",
    "repeats",
    "depth",
    "hidden_size",
    "intermediate_size",
    "mlp_blocks",
    "filter_order",
    "vocabulary",
    "length",
    "max_length",
    "first_tokens",
    "window",
    "stride",
}
NAME = re.compile(r"[a-z][a-z0-9_]*")  # names reach shell lines and file names


class ParamsError(WorkbenchError):
    """params.yaml, or what is asked of it, is wrong; the message names the key."""


# ------------------------------------------------------------------ places


def root() -> Path:
    """The folder with dvc.yaml and params.yaml: the working directory or the nearest one above it.

    Never found from this file's place: a profile's work folder has its own copy of the library.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            return folder
    raise ParamsError(
        f"no dvc.yaml and params.yaml in {here} or above it: start from the repository's folder"
    )


def home(profile: str) -> Path:
    """Where a profile runs: the root for the profile that params.yaml names, .work/<profile> for any other."""
    design = load()
    known(profile, design["lengths"], "profile")
    return root() if profile == design["profile"] else root() / ".work" / profile


def data(profile: str) -> Path:
    """The profile's data folder: home(profile)/data."""
    return home(profile) / "data"


def output(out: str | Path) -> Path:
    """root()/out, created: the same folder whether a kernel starts in notebooks/ or in the root."""
    folder = root() / out
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ------------------------------------------------------------------ questions to the design


def settings(profile: str, stage: str, row: str | None = None) -> dict:
    """The values a stage runs with: base < profile < row.

    Args:
        stage: one of STAGES.
        row: for `pretrain` a row of pretrained or continued, for `finetune` one of distilled or retrievers; its own
            keys (length, pretrained, teacher) come along. For `model` any trained row: the shape of the pretrained
            model it starts from, and nothing else.

    Raises:
        ParamsError: unknown profile, stage or row; or the file is wrong.
    """
    design = load()
    known(profile, design["lengths"], "profile")
    known(stage, STAGES, "stage")
    values = {**design[stage]["base"], **design[stage].get(profile, {})}
    if row is None:
        return values
    if stage == "model":
        return values | {
            key: value for key, value in ancestors(design, row)[-1][1].items() if key in values
        }
    if stage not in TRAINED_BY:
        raise ParamsError(
            f"stage {stage!r} has no rows: settings({profile!r}, {stage!r}) is all there is, not row {row!r}"
        )
    candidates = {name: own for table in TRAINED_BY[stage] for name, own in design[table].items()}
    known(row, candidates, f"row of {' or '.join(TRAINED_BY[stage])}")
    shape = set(design["model"]["base"])
    return values | {key: value for key, value in candidates[row].items() if key not in shape}


def length(profile: str, paper_length: int) -> int:
    """What one of the paper's lengths is in a profile, in tokens."""
    lengths = load()["lengths"]
    known(profile, lengths, "profile")
    if paper_length not in lengths[profile]:
        raise ParamsError(
            f"length {paper_length!r}: the paper's are {', '.join(map(str, PAPER_LENGTHS))}"
        )
    return lengths[profile][paper_length]


def paper_length(row: str) -> int:
    """The paper's length of a trained row, of any table: its own, or that of the model it starts from."""
    return next(own["length"] for _, own in ancestors(load(), row) if "length" in own)


def rows(profile: str, table: str) -> dict[str, dict]:
    """The rows of a table that a profile runs, by name, in the file's order.

    The profile that params.yaml names runs in place, and in place DVC runs every row. Of an ablation, only the rows
    that the profile runs are left.
    """
    design = load()
    known(profile, design["lengths"], "profile")
    known(table, TABLES, "table")
    return select(design, profile)[table]


def own(row: str, table: str) -> dict | None:
    """What params.yaml says of a row of this table; None where the table has no such row."""
    design = load()
    known(table, TABLES, "table")
    return design[table].get(row)


def repeats(row: str) -> list[str]:
    """The rows that are this one with other seeds: those of its table that differ from it in nothing but `seed`, in the file's order, itself among them."""
    design = load()
    for table in MODELS:
        if row in design[table]:
            return [
                name
                for name, own in design[table].items()
                if {**own, "seed": 0} == {**design[table][row], "seed": 0}
            ]
    return [row]


def select(design: dict, profile: str) -> dict[str, dict]:
    """The tables as `rows` of the design cuts them for a profile."""
    chosen = {} if profile == design["profile"] else design["rows"].get(profile, {})
    tables = {
        table: {
            name: own
            for name, own in design[table].items()
            if name in chosen.get(table, design[table])
        }
        for table in TABLES
    }
    tables["evaluated"] = {**tables["retrievers"], **tables["published"]}
    run = tables["evaluated"].keys() | tables["baselines"].keys()
    tables["ablations"] = {
        name: {**own, "rows": [row for row in own["rows"] if row in run]}
        for name, own in tables["ablations"].items()
    }
    return tables


def ancestors(design: dict, row: str) -> list[tuple[str, dict]]:
    """The row and the rows it is built on, (name, its keys), the one pretrained from scratch last."""
    models = {name: own for table in MODELS for name, own in design[table].items()}
    known(row, models, "row")
    chain = [(row, models[row])]
    while "pretrained" in chain[-1][1]:
        name = chain[-1][1]["pretrained"]
        chain.append((name, models[name]))
    return chain


# ------------------------------------------------------------------ the file


def load(path: str | Path | None = None) -> dict:
    """The whole file, checked.

    Raises:
        ParamsError: one line, naming the key, or the line for YAML that cannot be parsed.
    """
    path = Path(path) if path else root() / "params.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ParamsError(f"{path.name}: is not UTF-8 text") from None
    return copy.deepcopy(read(text, path.name))


@lru_cache(maxsize=8)
def read(text: str, name: str) -> dict:
    """Parsed and checked; remembered by the text, since a notebook asks a dozen times."""
    design = parse(text, name)
    try:
        check(design)
    except ParamsError as error:
        raise ParamsError(f"{name}: {error}") from None
    return design


def parse(text: str, name: str) -> dict:
    """YAML 1.2 as DVC reads it (1e-3 is a number, a key twice is an error); nothing but plain values is built."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        what = " ".join((error.problem or error.context or "not YAML").split())
        raise ParamsError(f"{name}, line {line}: {what}") from None
    except (YAMLError, ValueError) as error:
        raise ParamsError(f"{name}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{name}: holds no sections; it should start with `profile:`")
    return values


def check(design: dict) -> None:
    """Everything that can be wrong in a design, section by section."""
    sections = ("profile", "lengths", "rows", *STAGES, *TABLES)
    all_known(design, sections, "section")
    for name in sections:
        if name not in design:
            raise ParamsError(f"section {name!r} is missing")
        if name != "profile" and not isinstance(design[name], dict):
            raise ParamsError(f"{name}: holds {design[name]!r}, should hold keys and values")
    check_lengths(design["lengths"])
    known(design["profile"], design["lengths"], "profile", "profile: ")
    for stage in STAGES:
        check_stage(design, stage)
    check_rows(design)
    check_references(design)
    if design["evaluated"] != {**design["retrievers"], **design["published"]}:
        raise ParamsError(
            "evaluated: is always the rows of retrievers and published, `<<: [*retrievers, *published]`; add rows to those"
        )
    for profile in design["rows"]:
        check_subset(design, profile)


def check_lengths(lengths: dict) -> None:
    for profile, table in lengths.items():
        named(profile, "lengths: ")
        if not isinstance(table, dict) or tuple(table) != PAPER_LENGTHS:
            raise ParamsError(
                f"lengths.{profile}: wants the keys {', '.join(map(str, PAPER_LENGTHS))}, got {table!r}"
            )
        for paper, tokens in table.items():
            if type(tokens) is not int or tokens < 1:
                raise ParamsError(
                    f"lengths.{profile}.{paper}: wants a number of tokens, got {tokens!r}"
                )


def check_stage(design: dict, stage: str) -> None:
    section = design[stage]
    if not isinstance(section.get("base"), dict):
        raise ParamsError(
            f"{stage}.base: is missing; it holds the paper's values and is the schema"
        )
    base, keys = section["base"], KEYS[stage].split()
    all_known(base, keys, "key", f"{stage}.base: ")
    for key in keys:
        if key not in base:
            raise ParamsError(f"{stage}.base: {key!r} is missing")
    all_known(section, ("base", *design["lengths"]), "profile", f"{stage}: ")
    for profile, values in section.items():
        if not isinstance(values, dict):
            raise ParamsError(
                f"{stage}.{profile}: holds {values!r}, should hold keys and values ({{}} for none)"
            )
        for key, value in values.items():
            check_value(f"{stage}.{profile}", stage, key, value, base)


def check_value(where: str, stage: str, key: str, value, base: dict) -> None:
    """One setting against `base`: the key known, the type the same, the value possible."""
    known(key, base, "key", f"{where}: ")
    like = base[key]
    same_type(f"{where}.{key}", value, like)
    if (stage, key) == ("evaluate", "also"):
        for source in value:
            if (
                not isinstance(source, str)
                or source not in ("hub", "longembed")
                and not Path(source).is_absolute()
            ):
                raise ParamsError(
                    f"{where}.also: {source!r} is none of hub, longembed and an absolute path"
                )
    if (
        stage == "data"
        and key in ("source", "pretraining")
        and value not in ("embedded", "hub", *["longembed"] * (key == "source"))
        and not Path(value).is_absolute()
    ):
        raise ParamsError(
            f"{where}.{key}: {value!r} is none of embedded, hub{', longembed' * (key == 'source')} and an absolute path"
        )
    choices = CHOICES.get((stage, key))
    if choices:
        known(value, choices, "value", f"{where}.{key}: ")
    for number in value if isinstance(value, list) else [value]:
        if type(number) not in (int, float):
            continue
        low = 1 if key in AT_LEAST_ONE else 0
        if not low <= number <= (1 if key in SHARES else float("inf")):
            allowed = "between 0 and 1" if key in SHARES else f"at least {low}"
            raise ParamsError(f"{where}.{key}: {number} is out of range, should be {allowed}")


def same_type(where: str, value, like) -> None:
    """An int passes for a float, True does not pass for 1; a list's items are like the first of `like`."""
    if isinstance(like, list) and isinstance(value, list):
        for place, item in enumerate(value):
            if like:
                same_type(f"{where}[{place}]", item, like[0])
        return
    if type(value) is type(like) or isinstance(like, float) and type(value) is int:
        return
    hint = (
        " (a number has no quotes: 1.0e-3)"
        if isinstance(like, float) and isinstance(value, str)
        else ""
    )
    raise ParamsError(
        f"{where}: wants {kind(like)} like {like!r}, got {kind(value)} {value!r}{hint}"
    )


def kind(value) -> str:
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a section",
        type(None): "nothing:",
    }.get(type(value), type(value).__name__)


def check_rows(design: dict) -> None:
    """Names unique over all models and baselines, keys of each row known and typed."""
    seen: dict[str, str] = {}
    for table in TABLES:
        if table == "evaluated":
            continue
        for name, own in design[table].items():
            named(name, f"{table}: ")
            where = f"{table}.{name}"
            if table not in ("ablations", "lessons") and seen.setdefault(name, table) != table:
                raise ParamsError(
                    f"{where}: {seen[name]} has a row of that name too; a model's name is its folder, so it must be the only one"
                )
            if not isinstance(own, dict):
                raise ParamsError(
                    f"{where}: holds {own!r}, should hold keys and values ({{}} for none)"
                )
            for key, wanted in OWN_KEYS[table].items():
                if key not in own:
                    raise ParamsError(f"{where}: {key!r} is missing{nearest(key, own)}")
                same_type(f"{where}.{key}", own[key], wanted())
            check_row(design, table, where, own)


def check_row(design: dict, table: str, where: str, own: dict) -> None:
    stages = [stage for stage, tables in TRAINED_BY.items() if table in tables] + ["model"] * (
        table == "pretrained"
    )
    schema = {key: stage for stage in stages for key in design[stage]["base"]}
    for key, value in own.items():
        if key in OWN_KEYS[table]:
            continue
        if key in OPTIONAL.get(table, {}):
            check_value(where, table, key, value, {key: OPTIONAL[table][key]()})
            continue
        if (table, key) == ("baselines", "form"):
            raise ParamsError(
                f"{where}.form: endpoints are asked in OpenAI's form, leave the key out; Cohere's address for that is https://api.cohere.ai/compatibility/v1"
            )
        known(key, (*OWN_KEYS[table], *OPTIONAL.get(table, {}), *schema), "key", f"{where}: ")
        check_value(where, schema[key], key, value, design[schema[key]]["base"])
    if "length" in own and own["length"] not in PAPER_LENGTHS:
        raise ParamsError(
            f"{where}.length: {own['length']} is none of the paper's {', '.join(map(str, PAPER_LENGTHS))}; what they are in a profile stands in `lengths`"
        )
    if table == "baselines":
        for key, other in NEEDS.items():
            if key in own and other not in own:
                raise ParamsError(f"{where}.{key}: says nothing without {other!r}")
        if not re.fullmatch(r"[A-Za-z_]\w{0,60}", own.get("key", "A"), re.ASCII):
            raise ParamsError(
                f"{where}.key: wants the name of the environment variable that holds the key, never the key"
            )
        if "url" in own and "revision" in own:
            raise ParamsError(f"{where}.revision: an endpoint has none")
        if "url" in own and not re.match(
            r"https://|http://(localhost|127\.0\.0\.1|\[::1\])[:/]", own["url"]
        ):
            raise ParamsError(
                f"{where}.url: wants https:// (http:// on this machine only), got {own['url']!r}"
            )
        if "chunk" in own and "first_tokens" in own:
            raise ParamsError(
                f"{where}: first_tokens reads the beginning, chunk everything; one of the two (`window` is the windows' length)"
            )
        if "chunk" in own and "url" in own and "window" not in own:
            raise ParamsError(
                f"{where}.chunk: needs `window`, in tokens, since an endpoint's length is not known"
            )
        if own.get("stride", 0) > own.get("window", float("inf")):
            raise ParamsError(
                f"{where}.stride: {own['stride']} is more than window={own['window']}: tokens would be left out"
            )
    if "notebook" in own and not re.fullmatch(r"\d\d_[a-z0-9_]+", own["notebook"]):
        raise ParamsError(
            f"{where}.notebook: {own['notebook']!r} is no notebook's name, such as 00_start_here"
        )


def check_references(design: dict) -> None:
    for (table, key), targets in REFERENCES.items():
        names = [name for target in targets for name in design[target]]
        for row, own in design[table].items():
            for name in own[key] if isinstance(own[key], list) else [own[key]]:
                known(name, names, f"row of {' or '.join(targets)}", f"{table}.{row}.{key}: ")
    models = {name: own for table in MODELS for name, own in design[table].items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ParamsError(
                f"rows wait for each other: {' <- '.join((*path[path.index(name) :], name))}"
            )
        if name not in done:
            for key in ("pretrained", "teacher"):
                if key in models[name]:
                    visit(models[name][key], (*path, name))
            done.add(name)

    for name in models:
        visit(name, ())


def check_subset(design: dict, profile: str) -> None:
    """The rows a profile picks exist, and so does what they are built on."""
    known(profile, design["lengths"], "profile", "rows: ")
    chosen = design["rows"][profile]
    if not isinstance(chosen, dict):
        raise ParamsError(
            f"rows.{profile}: holds {chosen!r}, should hold a list of rows for each table"
        )
    all_known(chosen, TABLES, "table", f"rows.{profile}: ")
    for table, names in chosen.items():
        same_type(f"rows.{profile}.{table}", names, [""])
        all_known(names, design[table], f"row of {table}", f"rows.{profile}.{table}: ")
    tables = select({**design, "profile": None}, profile)
    for (table, key), targets in REFERENCES.items():
        for row, own in tables[table].items():
            if table != "ablations" and not any(own[key] in tables[target] for target in targets):
                raise ParamsError(
                    f"rows.{profile}: {row} of {table} needs {own[key]!r} ({key}), which this profile does not run; "
                    f"add it to rows.{profile}.{next(t for t in targets if own[key] in design[t])}"
                )
    for name, own in tables["ablations"].items():
        if not own["rows"]:
            raise ParamsError(
                f"rows.{profile}: none of the rows that the ablation {name} compares is run; leave it out of rows.{profile}.ablations"
            )


# ------------------------------------------------------------------ messages


def known(name, names: Iterable, what: str, where: str = "") -> None:
    """Raise unless `name` is one of `names`, naming the nearest."""
    names = list(names)
    if name not in names:
        raise ParamsError(f"{where}unknown {what} {name!r}{nearest(name, names)}")


def all_known(given: Iterable, names: Iterable, what: str, where: str = "") -> None:
    for name in given:
        known(name, names, what, where)


def named(name, where: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ParamsError(
            f"{where}{name!r} is no name: small letters, digits and _, a letter first"
        )


def nearest(name, names: Iterable) -> str:
    """`; did you mean …?`, or the whole list where it is short or nothing is near."""
    names = [str(n) for n in names]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(names)}" if names else "; there is none"
