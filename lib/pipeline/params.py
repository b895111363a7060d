"""The experimental design, read from params.yaml: typed, checked, merged.

    settings(profile, stage, row)     base  <  profile  <  row, key by key
    length(profile, 2048)             what a paper length is in a profile
    rows(profile, "retrievers")       the rows a profile runs
    group(profile, "loss")            the part of them that answers one question
    trainings(profile, "opl")         the seeds of a row, and the folder of each one's model
    starts(profile, "opl")            the seeds of a row, and where the model of each one begins

`base` of a stage holds every key that its notebooks read, and gives each its
type: anything else is an error, and the message says which key was probably
meant. A design that is wrong anywhere is refused whole, before the first stage
runs. Lengths are in tokens.
"""

import copy
from collections.abc import Iterable
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from itertools import cycle
from pathlib import Path

from lib.pipeline.errors import require
from lib.pipeline.settings import PAPER_LENGTHS as PAPER_LENGTHS
from lib.pipeline.settings import (
    ROWS,
    SECTIONS,
    TABLES,
    TRAINED_ON_TEST,
    Design,
    Group,
    ParamsError,
    nearest,
    validate,
)

STAGES = tuple(SECTIONS)
MODELS = TABLES[:4]  # each of their rows is a model trained here
TRAINED_BY = {"pretrain": ("pretrained", "continued"), "finetune": ("distilled", "retrievers")}
# The tables that a row's reference may point to.
REFERENCES = {
    ("continued", "pretrained"): ("pretrained", "continued"),
    ("distilled", "pretrained"): ("pretrained", "continued"),
    ("distilled", "teacher"): ("retrievers", "teachers"),
    ("retrievers", "pretrained"): ("pretrained", "continued", "distilled"),
    ("ablations", "rows"): ("retrievers", "baselines"),
}


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
    return root() if profile == load_for(profile)["profile"] else root() / ".work" / profile


def data(profile: str) -> Path:
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
        row: for `pretrain` a row of pretrained or continued, for `finetune` one of distilled or
            retrievers; its own keys (length, pretrained, teacher) come along. For `model` any
            trained row: the shape of the pretrained model that it starts from. `lr_by_length`
            stands between profile and row.

    Raises:
        ParamsError: unknown profile or row; or the file is wrong.
    """
    design = load_for(profile)
    values = {**design[stage]["base"], **design[stage].get(profile, {})}
    if row is None:
        return values
    if stage == "model":
        keys = ancestors(design, row)[-1][1]
        return values | {key: value for key, value in keys.items() if key in values}
    candidates = {name: own for table in TRAINED_BY[stage] for name, own in design[table].items()}
    known(row, candidates, f"row of {' or '.join(TRAINED_BY[stage])}")
    shape, own = design["model"]["base"], candidates[row]
    rate = values.get("lr_by_length", {}).get(own.get("length"))
    rates = {} if rate is None else {"lr": rate, "embedding_lr": rate}
    return values | rates | {key: value for key, value in own.items() if key not in shape}


def length(profile: str, paper_length: int) -> int:
    """What one of the paper's lengths is in a profile, in tokens."""
    return load_for(profile)["lengths"][profile][paper_length]


def paper_length(row: str, profile: str | None = None) -> int:
    """The paper's length of a trained row: its own, or that of the model that it starts from.

    Args:
        profile: where the row may be one of the profile's own.
    """
    design = load_for(profile) if profile else load()
    return next(own["length"] for _, own in ancestors(design, row) if "length" in own)


def rows(profile: str, table: str) -> dict[str, dict]:
    """The rows of a table that a profile runs, by name, in the file's order.

    The profile that params.yaml names runs every row of the tables, and none of `rows`. Of an
    ablation, the rows that the profile runs are left.
    """
    return select(load_with(profile), profile)[table]


def group(profile: str, name: str) -> dict[str, list[str]]:
    """{"ablations", "rows", "lessons"} of a group; the rows of its ablations are in rows.

    Raises:
        ParamsError: no such group, or the profile runs none of its rows.
    """
    found = groups(load_with(profile), profile)
    known(name, found, f"group of {profile}")
    return found[name]


def groups(design: dict, profile: str) -> dict[str, dict[str, list[str]]]:
    """The groups of which a profile runs a row, as `group` returns each."""
    tables, found = select(design, profile), {}
    run = {**tables["evaluated"], **tables["baselines"]}
    for name, own in design["groups"].items():
        ablations = [key for key in own.get("ablations", []) if key in tables["ablations"]]
        names = sum((tables["ablations"][key]["rows"] for key in ablations), [])
        names = [row for row in run if row in (*names, *own.get("rows", []))]
        if names:
            lessons = [key for key in own.get("lessons", []) if key in tables["lessons"]]
            found[name] = {"ablations": ablations, "rows": names, "lessons": lessons}
    return found


def needs(profile: str, rows: Iterable[str]) -> set[str]:
    """These rows, and the trained ones that they are built on: starts and teachers."""
    models, found, fresh = trained(load_for(profile)), set(), set(rows)
    while fresh:
        found |= fresh
        own = [models.get(row, {}) for row in fresh]
        fresh = {keys[key] for keys in own for key in ("pretrained", "teacher") if key in keys}
        fresh -= found
    return found


def trainings(profile: str, row: str) -> dict[int, str]:
    """{seed: folder in data/models and data/runs} of a row: `opl`, then `opl/seed_43`.

    The seed of a row that is not trained here is 0.
    """
    design = load_for(profile)
    for stage, tables in TRAINED_BY.items():
        if any(row in design[table] for table in tables):
            first, *others = settings(profile, stage, row)["seeds"]
            return {first: row} | {seed: f"{row}/seed_{seed}" for seed in others}
    return {0: row}


def starts(profile: str, row: str) -> dict[int, str]:
    """{seed: folder in data/models of the model that this training of a row starts from}.

    The first training starts from the first model of `pretrained`, the second from its second, and
    so on, from its first again when they are used up: the luck of pretraining is in a row's spread
    if what it is `pretrained` from has several seeds. {} for a row that starts from none.
    """
    before = trained(load_for(profile))[row].get("pretrained")
    if before is None:
        return {}
    models = cycle(trainings(profile, before).values())
    return dict(zip(trainings(profile, row), models))


def merged(design: dict, profile: str) -> dict:
    """The design with the changes and the new rows that a profile's `rows` have.

    A change is laid over the row of that name, unless it says what the row is `pretrained` from:
    then it is the whole row, and takes no rate or negatives from the other profile's.
    """
    tables = {}
    for table, rows in chosen_by(design, profile).items():
        changes = rows if isinstance(rows, dict) else {}
        below = {
            name: {} if "pretrained" in keys else design[table].get(name, {})
            for name, keys in changes.items()
        }
        own = {name: {**below[name], **keys} for name, keys in changes.items()}
        tables[table] = {**design[table], **own}
    design = {**design, **tables}
    return design | {"evaluated": {**design["retrievers"], **design["published"]}}


def chosen_by(design: dict, profile: str) -> dict[str, list | dict]:
    """The rows that a profile names, by table; {} for the file's own profile: DVC runs them all."""
    return {} if profile == design["profile"] else design["rows"].get(profile, {})


def select(design: dict, profile: str) -> dict[str, dict]:
    """The tables as `rows` of the design changes and cuts them for a profile."""
    chosen, design = chosen_by(design, profile), merged(design, profile)
    tables = {
        table: {
            name: own
            for name, own in design[table].items()
            if name in chosen.get(table, design[table])
        }
        for table in TABLES
    }
    tables["evaluated"] = {**tables["retrievers"], **tables["published"]}
    named = {own["teacher"] for own in tables["distilled"].values()} & tables["baselines"].keys()
    tables["teachers"] = {name: own for name, own in design["teachers"].items() if name in named}
    run = tables["evaluated"].keys() | tables["baselines"].keys()
    tables["ablations"] = {
        name: {**own, "rows": [row for row in own["rows"] if row in run]}
        for name, own in tables["ablations"].items()
    }
    return tables


def ancestors(design: dict, row: str) -> list[tuple[str, dict]]:
    """(name, keys) of the row and of what it is built on, the one pretrained from scratch last."""
    models = trained(design)
    known(row, models, "row")
    chain = [(row, models[row])]
    while "pretrained" in chain[-1][1]:
        name = chain[-1][1]["pretrained"]
        chain.append((name, models[name]))
    return chain


def trained(design: dict) -> dict[str, dict]:
    """The rows of all tables of MODELS."""
    return {name: own for table in MODELS for name, own in design[table].items()}


# ------------------------------------------------------------------ the file


def load(path: str | Path | None = None) -> dict:
    """The whole file, checked.

    Raises:
        ParamsError: one line, naming the key, or the line for YAML that cannot be parsed.
    """
    path = Path(path) if path else root() / "params.yaml"
    return copy.deepcopy(read(path.read_bytes(), path.name))


def load_for(profile: str) -> dict:
    """The whole file with the profile's own rows, if it has this profile."""
    return merged(load_with(profile), profile)


def load_with(profile: str) -> dict:
    """The whole file, if it has this profile."""
    design = load()
    known(profile, design["lengths"], "profile")
    return design


@lru_cache(maxsize=8)
def read(text: str | bytes, name: str) -> dict:
    """Parsed and checked; remembered by the text, since a notebook asks a dozen times."""
    design = parse(text, name)
    try:
        check(design)
    except ParamsError as error:
        raise ParamsError(f"{name}: {error}") from None
    return design


def parse(text: str | bytes, name: str) -> dict:
    """YAML 1.2 as DVC reads it (1e-3 is a number, a key twice an error), of plain values only."""
    from ruamel.yaml import YAML, YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "context", None) or error
        line = f", line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{name}{line}: {' '.join(str(reason).split())}") from None
    message = f"{name}: holds no sections; it should start with `profile:`"
    require(isinstance(values, dict), message, ParamsError)
    return values


def check(design: dict) -> None:
    """Everything that can be wrong in a design, section by section."""
    validate("", Design, design)
    known(design["profile"], design["lengths"], "profile", "profile: ")
    for stage, schema in SECTIONS.items():
        check_stage(stage, schema, design[stage], design["lengths"])
    check_rows(design)
    check_references(design)
    require(
        design["evaluated"] == {**design["retrievers"], **design["published"]},
        "evaluated: is always the rows of retrievers and published, "
        "`<<: [*retrievers, *published]`; add rows to those",
        ParamsError,
    )
    named = design["profile"]
    way = f"name the profile that they are, and `make repro PROFILE={named}`"
    message = f"profile: {named} has rows of its own, other than the tables of this file: {way}"
    require(named not in design["rows"], message, ParamsError)
    for profile, chosen in design["rows"].items():
        known(profile, design["lengths"], "profile", "rows: ")
        for table, names in chosen.items():
            for name in names if isinstance(names, list) else ():
                known(name, design[table], f"row of {table}", f"rows.{profile}.{table}: ")
        check_own_rows(design, profile)
        check_subset(design, profile)
    check_groups(design)


def check_stage(stage: str, schema: type, section: dict, profiles: Iterable) -> None:
    missing = f"{stage}.base: is missing; it holds every key and the paper's values"
    require("base" in section, missing, ParamsError)
    for profile in ("base", *section):
        known(profile, ("base", *profiles), "profile", f"{stage}: ")
        validate(f"{stage}.{profile}", schema, {**section["base"], **section[profile]})


def check_rows(design: dict) -> None:
    """Each row over the base that it overrides; names unique over all models and baselines."""
    tables: dict[str, str] = {}
    for table, schema in ROWS.items():
        base = {}
        for stage, section in SECTIONS.items():
            base |= design[stage]["base"] if issubclass(schema, section) else {}
        for name, own in design[table].items():
            validate(f"{table}.{name}", schema, {**base, **own})
            if table not in ("teachers", "ablations", "lessons"):
                other = tables.setdefault(name, table)
                require(
                    other == table,
                    f"{table}.{name}: {other} has a row of that name too; "
                    "a model's name is its folder, so it must be the only one",
                    ParamsError,
                )
    check_test_training(design)


def check_test_training(design: dict) -> None:
    """A row that is always trained on test is named so, and no other row can learn from it.

    Tables, claims and lessons choose rows by name, so none of them can take it for an honest one.
    """
    of_retrievers = "always is for a row of retrievers, beside the row that is trained on train"
    places = {f"finetune.{profile}": own for profile, own in design["finetune"].items()}
    places |= {f"distilled.{row}": own for row, own in design["distilled"].items()}
    for place, own in places.items():
        message = f"{place}.allow_test_training: {of_retrievers}"
        require(own.get("allow_test_training") != "always", message, ParamsError)
    for row in always_on_test(design):
        message = f"retrievers.{row}.allow_test_training: always wants a row that says so: "
        message += f"begin its name with {TRAINED_ON_TEST}"
        require(row.startswith(TRAINED_ON_TEST), message, ParamsError)
    for row, own in design["distilled"].items():
        message = f"distilled.{row}.teacher: {own['teacher']!r} is trained on test; name another"
        require(own["teacher"] not in always_on_test(design), message, ParamsError)


def always_on_test(design: dict) -> list[str]:
    """The rows of retrievers with `allow_test_training: always`."""
    rows = design["retrievers"].items()
    return [row for row, own in rows if own.get("allow_test_training") == "always"]


def check_references(design: dict) -> None:
    """References point to rows of the right tables, and never in a circle."""
    check_teachers(design)
    for (table, key), targets in REFERENCES.items():
        names = [name for target in targets for name in design[target]]
        for row, own in design[table].items():
            for name in own[key] if isinstance(own[key], list) else [own[key]]:
                known(name, names, f"row of {' or '.join(targets)}", f"{table}.{row}.{key}: ")
    waits = {
        name: [own[key] for key in ("pretrained", "teacher") if key in own]
        for name, own in trained(design).items()
    }
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        circle = " <- ".join(reversed(error.args[1]))
        raise ParamsError(f"rows wait for each other: {circle}") from None


def check_own_rows(design: dict, profile: str) -> None:
    """The rows that only this profile has, and those that it changes."""
    whole = merged({**design, "profile": None}, profile)
    try:
        validate("", Design, {**whole, "profile": profile})
        check_rows(whole)
        check_references(whole)
    except ParamsError as error:
        raise ParamsError(f"rows.{profile}: {error}") from None


def check_groups(design: dict) -> None:
    """A group names ablations, rows and lessons that some profile has."""
    every = [merged({**design, "profile": None}, profile) for profile in design["lengths"]]
    tables = {key: (key,) for key in ("ablations", "lessons")}
    tables["rows"] = "evaluated", "baselines"
    for group, own in design["groups"].items():
        validate(f"groups.{group}", Group, own)
        for key, names in own.items():
            there = dict.fromkeys(n for whole in every for t in tables[key] for n in whole[t])
            for name in names:
                what = "row of retrievers or baselines" if key == "rows" else key[:-1]
                known(name, there, what, f"groups.{group}.{key}: ")


def check_teachers(design: dict) -> None:
    """A teacher that is not trained here is a baseline with one vector for each text."""
    baselines = design["baselines"]
    named = {f"distilled.{row}.teacher": own["teacher"] for row, own in design["distilled"].items()}
    wanted = {f"teachers.{name}": name for name in design["teachers"]}
    wanted |= {place: name for place, name in named.items() if name in baselines}
    for place, name in wanted.items():
        known(name, baselines, "row of baselines", f"{place}: ")
        own = baselines[name]
        words = f"{place}: {name!r} is BM25, which has no vectors; name a baseline with `model`"
        require("model" in own, words, ParamsError)
        several = f"{place}: {name!r} has a vector for each window; it wants chunk: mean or max"
        require(own.get("chunk") != "best", several, ParamsError)
        way = f"add the line `{name}: {{}}` to teachers, so that its stage is run"
        require(name in design["teachers"], f"{place}: {name!r} is a baseline: {way}", ParamsError)


def check_subset(design: dict, profile: str) -> None:
    """What the rows that a profile picks are built on is picked too."""
    design = merged({**design, "profile": None}, profile)
    tables = select(design, profile)
    for (table, key), targets in REFERENCES.items():
        for row, own in tables[table].items() if table != "ablations" else ():
            home = next(target for target in targets if own[key] in design[target])
            require(
                own[key] in tables[home],
                f"rows.{profile}: {row} of {table} needs {own[key]!r} ({key}), "
                f"which this profile does not run; add it to rows.{profile}."
                + ("baselines" if home == "teachers" else home),
                ParamsError,
            )
    for name, own in tables["ablations"].items():
        require(
            own["rows"],
            f"rows.{profile}: none of the rows that the ablation {name} compares is run; "
            f"leave it out of rows.{profile}.ablations",
            ParamsError,
        )


def known(name, names: Iterable, what: str, where: str = "") -> None:
    """Raise unless `name` is one of `names`, naming the nearest."""
    names = list(names)
    if name not in names:
        raise ParamsError(f"{where}unknown {what} {name!r}{nearest(name, names)}")
