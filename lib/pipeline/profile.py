"""The pipeline at a profile: in place if params.yaml names it, else in a folder of its own.

    python -m lib.pipeline repro                       everything, at the profile of params.yaml
    python -m lib.pipeline repro smoke                 everything, at smoke, in .work/smoke
    python -m lib.pipeline repro smoke finetune@opl    one row, or other arguments of `dvc repro`
    python -m lib.pipeline repro smoke --data ~/mine   in .work/smoke-mine-<hash>
    python -m lib.pipeline report smoke                open its report

    --data    the tasks: a folder in any layout of lib/benchmark/sources.py, hub, or longembed
    --text    the pretraining text: a folder of parquet, jsonl or txt, or hub
    --set     section.key=value …, over what params.yaml says for this run alone

A pipeline's stages are the rows of params.yaml, whatever the profile, and
DVC's lock file remembers one profile. So another profile, or another
collection, gets a copy of the code and a params.yaml with only its rows; the
cache is shared, the report comes back to data/report/<name>, and git sees
nothing. Given folders are dependencies of the stage `data`: what changes in
them is noticed.
"""

import configparser
import copy as copying
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import webbrowser
from contextlib import contextmanager
from pathlib import Path

from lib.pipeline import files, params
from lib.pipeline.params import ParamsError

SOURCES = ("embedded", "hub", "longembed")
COPIED = (
    "lib",
    "notebooks",
    "data/paper",
    "dvc.yaml",
    ".dvcignore",
    ".dvc/config",
    "requirements.lock",
)


def repro(arguments: list[str]) -> int:
    """Run `dvc repro` for a profile; DVC's exit code.

    Args:
        arguments: the profile's name, if it is not the one of params.yaml; --data, --text and --set
            with their values; then what `dvc repro` takes.

    Raises:
        ParamsError: a wrong design, profile, stage, row, folder or setting; nothing has run then.
    """
    root, design = params.root(), params.load()
    given, arguments = options(arguments)
    stages = foreach(root / "dvc.yaml")
    profile, arguments = split(arguments, design, stages)
    home = folder(root, profile, given)
    if home == root:
        make_folders(root, profile, stages)
        configure(root, no_scm=not (root / ".git").exists())
        code = dvc(root, ["repro", *arguments])
    else:
        design = changed(design, profile, given)
        home.mkdir(parents=True, exist_ok=True)
        with locked(
            home / ".lock",
            f"another run at {home.name} is at work in {home.relative_to(root)}: "
            "wait until it ends",
        ):
            copy(root, home, design, profile)
            make_folders(home, profile, stages)
            values = {**design["data"]["base"], **design["data"].get(profile, {})}
            depend(
                home / "dvc.yaml", sorted({values["source"], values["pretraining"]} - set(SOURCES))
            )
            code = dvc(home, ["repro", *arguments])
            if code == 0:
                bring_back(home / "data" / "report" / profile, root / "data" / "report" / home.name)
    if code == 0:
        print(summary(root / "data" / "report" / (profile if home == root else home.name), root))
    return code


def options(arguments: list[str]) -> tuple[dict, list[str]]:
    """({data, text, set: what was given}, the rest); folders as absolute paths.

    Raises:
        ParamsError: a folder that is none, or an option without its value.
    """
    given: dict = {}
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in ("data", "text", "set"):
            rest.append(argument)
            continue
        value = value if equals else next(left, "")
        if not value.strip():
            raise ParamsError(
                f"--{name}: says nothing; it wants "
                + (
                    "section.key=value"
                    if name == "set"
                    else "a folder, hub" + ", longembed" * (name == "data")
                )
            )
        if name == "set":
            given.setdefault("set", []).extend(value.split())
        elif value in SOURCES and (name, value) != ("text", "longembed"):
            given[name] = value
        else:
            place = Path(value).expanduser().resolve()
            if not place.is_dir():
                near = params.nearest(value, SOURCES) if os.sep not in value else ""
                raise ParamsError(
                    f"{name.upper()}={value}: {place} is no folder"
                    f"{near if 'did you mean' in near else ''}"
                )
            given[name] = str(place)
    return given, rest


def folder(root: Path, profile: str, given: dict) -> Path:
    """Where a run works: in the root or .work/<profile>, as `params.home`; with another collection,
    text or setting in .work/<profile>-<collection>, with a hash of the collection's path."""
    if not given:
        return params.home(profile)
    params.known(profile, params.load()["lengths"], "profile")
    source = given.get("data", "embedded")
    if source in SOURCES:
        return root / ".work" / f"{profile}-{source}"
    name = re.sub(r"[^a-z0-9]+", "-", Path(source).name.lower()).strip("-")[:40]
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return root / ".work" / "-".join(filter(None, [profile, name, digest]))


def changed(design: dict, profile: str, given: dict) -> dict:
    """The design with what was given, checked as a whole.

    Raises:
        ParamsError: no such section or key, or a value that it cannot have.
    """
    if not given:
        return design
    design = copying.deepcopy(design)

    def values(section: str) -> dict:
        if not isinstance(design[section].get(profile), dict):
            design[section][profile] = {}
        return design[section][profile]

    for name, key in (("data", "source"), ("text", "pretraining")):
        if name in given:
            values("data")[key] = given[name]
    for text in given.get("set", ()):
        name, equals, value = text.partition("=")
        section, dot, key = name.partition(".")
        if not equals or not dot:
            raise ParamsError(
                f"SET={text}: wants section.key=value, such as finetune.allow_test_training=true"
            )
        params.known(section, params.STAGES, "section", f"SET={text}: ")
        values(section)[key] = params.parse(f"value: {value}", f"SET={text}")["value"]
    params.check(design)
    return design


def make_folders(home: Path, profile: str, stages: dict[str, str | None]) -> None:
    """The report's folders of the stages with rows: other stages read them, even without a row."""
    for stage, table in stages.items():
        if table:
            (home / "data" / "report" / profile / stage).mkdir(parents=True, exist_ok=True)


def depend(path: Path, folders: list[str]) -> None:
    """Make the stage `data` of a dvc.yaml depend on these folders too."""
    from ruamel.yaml import YAML

    if not folders:
        return
    yaml = YAML()
    pipeline = yaml.load(path.read_text(encoding="utf-8"))
    if "data" in pipeline["stages"]:
        pipeline["stages"]["data"]["deps"].extend(place.replace("${", r"\${") for place in folders)
        with open(path, "w", encoding="utf-8") as file:
            yaml.dump(pipeline, file)


def foreach(path: Path) -> dict[str, str | None]:
    """The stages of a dvc.yaml, each with the table of params.yaml it runs over, or None."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"]
    return {
        name: re.sub(r"\W", "", stage["foreach"]) if "foreach" in stage else None
        for name, stage in stages.items()
    }


def split(
    arguments: list[str], design: dict, stages: dict[str, str | None]
) -> tuple[str, list[str]]:
    """(profile, the rest), names checked: the first may be a profile, an option or a stage."""
    profile = design["profile"]
    if (
        arguments
        and not arguments[0].startswith("-")
        and not re.search("[:/]", arguments[0])
        and arguments[0].partition("@")[0] not in stages
    ):
        params.known(arguments[0], [*design["lengths"], *stages], "profile or stage")
        profile, arguments = arguments[0], arguments[1:]
    tables = params.select(design, profile)
    for target in arguments:
        stage, at, row = target.partition("@")
        if at and not target.startswith("-") and "--glob" not in arguments:
            params.known(stage, stages, "stage")
            params.known(row, tables.get(stages[stage], ()), f"row of {stage} at {profile}")
    return profile, arguments


# ------------------------------------------------------------------ the work folder


@contextmanager
def locked(path: Path, message: str):
    """Hold a lock file that the system frees when we end, however we end."""
    import fcntl

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ParamsError(message) from None
        yield


def copy(root: Path, home: Path, design: dict, profile: str) -> None:
    """The code as it is now, and a params.yaml with the profile's rows only."""
    for name in COPIED:
        source, target = root / name, home / name
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        elif source.is_file():
            shutil.copy2(source, target)
    from ruamel.yaml import YAML

    with open(home / "params.yaml", "w", encoding="utf-8") as file:
        YAML().dump(
            {**design, "profile": profile, "rows": {}, **params.select(design, profile)}, file
        )
    local = root / ".dvc" / "config.local"
    if local.is_file():
        shutil.copy2(local, home / ".dvc" / "config.local")
    configure(home, no_scm=True, cache=cache_folder(root))
    for name in ("config", "config.local"):
        absolute_remotes(home / ".dvc" / name, root / ".dvc")


def absolute_remotes(path: Path, base: Path) -> None:
    """Make a relative remote absolute: it is meant from the root's .dvc."""
    config = read_config(path)
    moved = False
    for section in config.sections():
        url = config[section].get("url", "").strip("\"'")
        if (
            "remote" in section
            and url
            and "://" not in url
            and not url.startswith("~")
            and not Path(url).is_absolute()
        ):
            config[section]["url"], moved = f'"{(base / url).resolve()}"', True
    if moved:
        with open(path, "w", encoding="utf-8") as file:
            config.write(file)


def cache_folder(root: Path) -> Path:
    """Where the root's cache is: .dvc/cache, or what DVC's configuration says.

    Raises:
        ParamsError: the configuration cannot be read.
    """
    from dvc.config import (
        Config,
        ConfigError,
    )  # its own reading: other files, ~, comments and quotes

    try:
        said = Config(dvc_dir=str(root / ".dvc")).get("cache", {}).get("dir")
    except ConfigError as error:
        reason = " ".join(str(error).split())[:200]
        raise ParamsError(f".dvc/config or .dvc/config.local cannot be read: {reason}") from None
    return (root / ".dvc" / Path(said).expanduser()).resolve() if said else root / ".dvc" / "cache"


def configure(root: Path, no_scm: bool, cache: Path | None = None) -> None:
    """Tell DVC, in its untracked config.local, what only holds here."""
    path = root / ".dvc" / "config.local"
    config = read_config(path)
    before = {name: dict(section) for name, section in config.items()}
    if no_scm:  # a source archive, or a copy: DVC refuses to run without git unless told
        config.setdefault("core", {})
        config["core"]["no_scm"] = "true"
    if cache:
        config.setdefault("cache", {})
        config["cache"]["dir"] = f'"{cache}"'
    if {name: dict(section) for name, section in config.items()} != before:
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            config.write(file)


def read_config(path: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(path, encoding="utf-8-sig")
    except configparser.Error as error:
        raise ParamsError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:160]})"
        ) from None
    return config


def bring_back(source: Path, target: Path) -> None:
    """Put a copy of the report in place of the last one, whole."""
    if not source.is_dir():
        return
    with files.replacing(target) as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True)


# ------------------------------------------------------------------ DVC


def dvc(folder: Path, arguments: list[str]) -> int:
    """DVC in a folder, its stages with this Python; it ends when we are ended."""

    def with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    environment = os.environ | {
        "PATH": os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        ),
        "SHELL": "/bin/sh",
    }  # DVC runs commands with the user's shell, and fish is not sh
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=environment,
        preexec_fn=with_parent,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the stage too; DVC says what it leaves
            continue


def summary(report: Path, root: Path) -> str:
    """What the stages cost when they last ran, and where to look."""
    costs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((report / "timings" / "stages").glob("*.json"))
    ]
    page = report / "index.html"
    where = (page if page.is_file() else report).relative_to(root).as_posix()
    if not costs:
        return f"see {where}"
    slowest = max(costs, key=lambda cost: cost["seconds"])
    minutes = sum(cost["seconds"] for cost in costs) / 60
    return (
        f"{len(costs)} stages, {minutes:.1f} min when each last ran (longest: {slowest['stage']}, "
        f"{slowest['seconds'] / 60:.1f} min), {max(cost['peak_gib'] for cost in costs)} GiB "
        f"at most; see {where}"
    )


def report(arguments: list[str]) -> int:
    """Open the report of a profile, or of its run on --data, in a browser; print where it is.

    Raises:
        ParamsError: there is no such profile, or it has not been run.
    """
    root, design = params.root(), params.load()
    given, rest = options(arguments)
    if len(rest) > 1:
        raise ParamsError(f"report: takes one profile, got {' '.join(rest)}")
    profile = rest[0] if rest else design["profile"]
    params.known(profile, design["lengths"], "profile")
    home = folder(root, profile, given)
    name = profile if home == root else home.name
    page = root / "data" / "report" / name / "index.html"
    if not page.is_file():
        said = [f"PROFILE={profile}"] * (profile != design["profile"])
        said += [f"{key.upper()}={given[key]}" for key in ("data", "text") if key in given]
        raise ParamsError(f"no report at {name} yet: {' '.join(['make repro', *said])}")
    print(page)
    webbrowser.open(page.as_uri())
    return 0
