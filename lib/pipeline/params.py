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
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from lib.pipeline.settings import (
    ROWS,
    SECTIONS,
    ParamsError,
    Settings,
    nearest,
    validate,
)

PAPER_LENGTHS = (128, 2048, 8192, 32768)
STAGES = tuple(SECTIONS)
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
MODELS = TABLES[:4]  # each of their rows is a model trained here
TRAINED_BY = {"pretrain": ("pretrained", "continued"), "finetune": ("distilled", "retrievers")}
# The tables that a row's reference may point to.
REFERENCES = {
    ("continued", "pretrained"): ("pretrained", "continued"),
    ("distilled", "pretrained"): ("pretrained", "continued"),
    ("distilled", "teacher"): ("retrievers",),
    ("retrievers", "pretrained"): ("pretrained", "continued", "distilled"),
    ("ablations", "rows"): ("retrievers", "baselines"),
}
NAME = re.compile(r"[a-z][a-z0-9_]*")  # names reach shell lines and file names


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
    """Where a profile runs: in the root if params.yaml names it, else in .work/<profile>."""
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
        row: for `pretrain` a row of pretrained or continued, for `finetune` one of distilled or
            retrievers; its own keys (length, pretrained, teacher) come along. For `model` any
            trained row: the shape of the pretrained model that it starts from.

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
            f"stage {stage!r} has no rows, so none is {row!r}: settings({profile!r}, {stage!r})"
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
    """The paper's length of a trained row: its own, or that of the model that it starts from."""
    return next(own["length"] for _, own in ancestors(load(), row) if "length" in own)


def rows(profile: str, table: str) -> dict[str, dict]:
    """The rows of a table that a profile runs, by name, in the file's order.

    The profile that params.yaml names runs every row. Of an ablation, the rows that the profile
    runs are left.
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
    """This row and those of its table that differ in `seed` alone, in the file's order."""
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
    """(name, keys) of the row and of what it is built on, the one pretrained from scratch last."""
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
    """YAML 1.2 as DVC reads it (1e-3 is a number, a key twice an error), of plain values only."""
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
            "evaluated: is always the rows of retrievers and published, "
            "`<<: [*retrievers, *published]`; add rows to those"
        )
    for profile in design["rows"]:
        check_subset(design, profile)


def check_lengths(lengths: dict) -> None:
    for profile, table in lengths.items():
        named(profile, "lengths: ")
        if not isinstance(table, dict) or tuple(table) != PAPER_LENGTHS:
            raise ParamsError(
                f"lengths.{profile}: wants the keys {', '.join(map(str, PAPER_LENGTHS))}, "
                f"got {table!r}"
            )
        for paper, tokens in table.items():
            if type(tokens) is not int or tokens < 1:
                raise ParamsError(
                    f"lengths.{profile}.{paper}: wants a number of tokens, got {tokens!r}"
                )


def check_stage(design: dict, stage: str) -> None:
    section = design[stage]
    base = section.get("base")
    if not isinstance(base, dict):
        raise ParamsError(f"{stage}.base: is missing; it holds every key and the paper's values")
    all_known(section, ("base", *design["lengths"]), "profile", f"{stage}: ")
    for profile in ("base", *section):
        values = a_dict(section[profile], f"{stage}.{profile}")
        validate(f"{stage}.{profile}", SECTIONS[stage], values, base)


def a_dict(values, where: str) -> dict:
    if not isinstance(values, dict):
        raise ParamsError(f"{where}: holds {values!r}, should hold keys and values ({{}} for none)")
    return values


def check_rows(design: dict) -> None:
    """Names unique over all models and baselines, keys of each row known and typed."""
    seen: dict[str, str] = {}
    for table, schema in ROWS.items():
        for name, own in design[table].items():
            named(name, f"{table}: ")
            where = f"{table}.{name}"
            if table not in ("ablations", "lessons") and seen.setdefault(name, table) != table:
                raise ParamsError(
                    f"{where}: {seen[name]} has a row of that name too; "
                    "a model's name is its folder, so it must be the only one"
                )
            check_row(design, table, where, a_dict(own, where), schema)


def check_row(design: dict, table: str, where: str, own: dict, schema: type[Settings]) -> None:
    """A row's own keys, then the settings that it overrides."""
    sections = [stage for stage, tables in TRAINED_BY.items() if table in tables]
    sections += ["model"] * (table == "pretrained")
    overridden = {
        key: section for section in sections for key in design[section]["base"] if key in own
    }
    if sections:
        keys = [key for section in sections for key in design[section]["base"]]
        all_known(own, [*schema.model_fields, *keys], "key", f"{where}: ")
    validate(where, schema, {key: own[key] for key in own if key not in overridden})
    for section in sections:
        values = {key: own[key] for key, place in overridden.items() if place == section}
        validate(where, SECTIONS[section], values, design[section]["base"])


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
        if not isinstance(names, list):
            raise ParamsError(f"rows.{profile}.{table}: wants a list of rows, got {names!r}")
        all_known(names, design[table], f"row of {table}", f"rows.{profile}.{table}: ")
    tables = select({**design, "profile": None}, profile)
    for (table, key), targets in REFERENCES.items():
        for row, own in tables[table].items():
            if table != "ablations" and not any(own[key] in tables[target] for target in targets):
                raise ParamsError(
                    f"rows.{profile}: {row} of {table} needs {own[key]!r} ({key}), "
                    f"which this profile does not run; "
                    f"add it to rows.{profile}.{next(t for t in targets if own[key] in design[t])}"
                )
    for name, own in tables["ablations"].items():
        if not own["rows"]:
            raise ParamsError(
                f"rows.{profile}: none of the rows that the ablation {name} compares is run; "
                f"leave it out of rows.{profile}.ablations"
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
