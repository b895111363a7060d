"""The pipeline at a profile: in place if params.yaml names it, else in a folder of its own.

A pipeline's stages are the rows of params.yaml, whatever the profile, and
DVC's lock file remembers one profile. So another profile, or another
collection, gets a copy of the code and a params.yaml with only its rows; the
cache is shared, the report comes back to data/report/<name>, and git sees
nothing. Given folders are dependencies of the stage `data`: what changes in
them is noticed.
"""

import argparse
import copy as copying
import ctypes
import fcntl
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

from ruamel.yaml import YAML

from lib.pipeline import files, params, schedule
from lib.pipeline.errors import require
from lib.pipeline.params import ParamsError

SOURCES = ("embedded", "hub", "longembed")
WANTED = {
    "data": "a folder, hub, longembed",
    "text": "a folder, hub",
    "set": "section.key=value",
    "group": "a group of params.yaml",
}
# What shows rows. It waits for every row, so the pages of a group are asked for by themselves.
PAGES = ("overview", "site")
COPIED = (
    "lib notebooks data/paper dvc.yaml .dvcignore .dvc/config .dvc/config.local requirements.lock"
).split()


def repro(arguments: list[str]) -> int:
    """Run `dvc repro` for a profile; DVC's exit code.

    Args:
        arguments: the profile's name, if it is not the one of params.yaml; --data, --text, --set
            and --group with their values; then what `dvc repro` takes. With a group, the rows of
            the group alone; the report shows the others as they last ran.

    Raises:
        ParamsError: a wrong design, profile, stage, row, folder, group or setting; nothing has run
            then.
    """
    root, design = params.root(), params.load()
    given, arguments = options(arguments)
    stages = foreach(root / "dvc.yaml")
    profile, arguments = split(arguments, design, stages)
    group = given.pop("group", None)
    commands = [[]] if group is None else of_group(profile, group)
    commands[0] += arguments
    home = folder(root, profile, given)
    name = profile if home == root else home.name
    if home == root:
        make_folders(root, profile, stages)
        if not (root / ".git").exists():
            configure(root, root)
        code = dvc(root, commands, profile, design)
    else:
        design = changed(design, profile, given)
        home.mkdir(parents=True, exist_ok=True)
        where = home.relative_to(root)
        with locked(home / ".lock", f"another run at {name} is at work in {where}"):
            copy(root, home, design, profile)
            make_folders(home, profile, stages)
            values = {**design["data"]["base"], **design["data"].get(profile, {})}
            folders = {values["source"], values["pretraining"]} - set(SOURCES)
            depend(home / "dvc.yaml", sorted(folders))
            code = dvc(home, commands, profile, design)
            report = home / "data" / "report" / profile
            if code == 0 and report.is_dir():
                with files.replacing(root / "data" / "report" / name) as draft:
                    shutil.copytree(report, draft, dirs_exist_ok=True)
    if code == 0:
        print(summary(root / "data" / "report" / name, root))
    return code


def options(arguments: list[str]) -> tuple[dict, list[str]]:
    """({data, text, set: what was given}, the rest); folders as absolute paths."""
    reader = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in WANTED:
        reader.add_argument(f"--{name}", nargs="?", const="", action="append")
    known, rest = reader.parse_known_args(arguments)
    given: dict = {name: values for name, values in vars(known).items() if values}
    for name, values in given.items():
        empty = f"--{name}: says nothing; it wants {WANTED[name]}"
        require(all(map(str.strip, values)), empty, ParamsError)
        given[name] = read_option(name, values)
    return given, rest


def read_option(name: str, values: list[str]) -> str | list[str]:
    if name == "set":
        return " ".join(values).split()
    return values[-1].strip() if name == "group" else collection(name, values[-1])


def of_group(profile: str, name: str) -> list[list[str]]:
    """The targets of two runs of `dvc repro`: the rows of a group, then what shows them."""
    group, baselines = params.group(profile, name), params.rows(profile, "baselines")
    stages = {row: "baseline" if row in baselines else "evaluate" for row in group["rows"]}
    rows = [f"{stage}@{row}" for row, stage in stages.items()]
    pages = [f"{kind}@{name}" for kind in ("ablation", "lesson") for name in group[kind + "s"]]
    return [[*rows, "efficiency"], ["--single-item", *pages, *PAGES]]


def collection(name: str, value: str) -> str:
    """What DATA or TEXT names: a source, or the absolute path of a folder."""
    if value in SOURCES and (name, value) != ("text", "longembed"):
        return value
    place = Path(value).expanduser().resolve()
    near = params.nearest(value, SOURCES) if os.sep not in value else ""
    near = near if "did you mean" in near else ""
    require(place.is_dir(), f"{name.upper()}={value}: {place} is no folder{near}", ParamsError)
    return str(place)


def folder(root: Path, profile: str, given: dict) -> Path:
    """Where a run works: in the root or .work/<profile>, as `params.home`; with another collection,
    text or setting in .work/<profile>-<collection>, with a hash of the collection's path."""
    if not given:
        return params.home(profile)
    source = given.get("data", "embedded")
    if source in SOURCES:
        return root / ".work" / f"{profile}-{source}"
    name = re.sub(r"[^a-z0-9]+", "-", Path(source).name.lower()).strip("-")[:40]
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return root / ".work" / "-".join(filter(None, [profile, name, digest]))


def changed(design: dict, profile: str, given: dict) -> dict:
    """The design with what was given, checked as a whole."""
    design = copying.deepcopy(design)
    for name, key in (("data", "source"), ("text", "pretraining")):
        if name in given:
            design["data"][profile] = {**design["data"].get(profile, {}), key: given[name]}
    for text in given.get("set", ()):
        match = re.fullmatch(r"([^.=]*)\.([^=]*)=(.*)", text)
        example = "wants section.key=value, such as finetune.allow_test_training=true"
        require(match, f"SET={text}: {example}", ParamsError)
        section, key, value = match.groups()
        params.known(section, params.STAGES, "section", f"SET={text}: ")
        value = params.parse(f"value: {value}", f"SET={text}")["value"]
        # A new dict: profiles may share one, by an anchor of the file.
        design[section][profile] = {**design[section].get(profile, {}), key: value}
    params.check(design)
    return design


def make_folders(home: Path, profile: str, stages: dict[str, str | None]) -> None:
    """The report's folders of the stages with rows: other stages read them, even without a row."""
    for stage in filter(stages.get, stages):
        (home / "data" / "report" / profile / stage).mkdir(parents=True, exist_ok=True)


def depend(path: Path, folders: list[str]) -> None:
    """Make the stage `data` of a dvc.yaml depend on these folders too."""
    yaml = YAML()
    pipeline = yaml.load(path)
    if folders and "data" in pipeline["stages"]:
        pipeline["stages"]["data"]["deps"].extend(place.replace("${", r"\${") for place in folders)
        yaml.dump(pipeline, path)


def foreach(path: Path) -> dict[str, str | None]:
    """The stages of a dvc.yaml, each with the table of params.yaml it runs over, or None."""
    stages = YAML(typ="safe", pure=True).load(path)["stages"]
    return {
        name: re.sub(r"\W", "", stage["foreach"]) if "foreach" in stage else None
        for name, stage in stages.items()
    }


def split(
    arguments: list[str], design: dict, stages: dict[str, str | None]
) -> tuple[str, list[str]]:
    """(profile, the rest), names checked: the first may be a profile, an option or a stage."""
    profile, first = design["profile"], arguments[0] if arguments else "-"
    if not re.match(r"-|.*[:/]", first) and first.partition("@")[0] not in stages:
        params.known(first, [*design["lengths"], *stages], "profile or stage")
        profile, *arguments = arguments
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
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ParamsError(f"{message}: wait until it ends") from None
        yield


def copy(root: Path, home: Path, design: dict, profile: str) -> None:
    """The code as it is now, and a params.yaml with the profile's rows only."""
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for source, target in ((root / name, home / name) for name in COPIED):
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=unwanted)
        elif source.is_file():
            shutil.copy2(source, target)
    own = {"profile": profile, "rows": {}, "groups": params.groups(design, profile)}
    own |= params.select(design, profile)
    YAML().dump({**design, **own}, home / "params.yaml")
    configure(root, home)


def configure(root: Path, home: Path) -> None:
    """Tell DVC, in the untracked config.local of `home`, to do without git; for a work folder also
    where the root's cache is, and its relative remotes, which are meant from the root."""
    from configobj import ConfigObj
    from dvc.config import Config, ConfigError
    from dvc.config_schema import RelPath

    try:
        shared = Config(root / ".dvc")
    except ConfigError as error:
        reason = " ".join(str(error).split())[:200]
        raise ParamsError(f".dvc/config or .dvc/config.local cannot be read: {reason}") from None
    local = ConfigObj(str(home / ".dvc" / "config.local"), encoding="utf-8", interpolation=False)
    local.setdefault("core", {})["no_scm"] = "true"
    if home != root:
        cache = shared["cache"].get("dir", str(root / ".dvc" / "cache"))
        local.setdefault("cache", {})["dir"] = cache
        for name, remote in shared["remote"].items():
            if isinstance(remote["url"], RelPath):  # as DVC has read it: absolute
                local.setdefault(f'remote "{name}"', {})["url"] = remote["url"]
    local.write()  # by DVC's own writer only ASCII would do


# ------------------------------------------------------------------ DVC


def dvc(folder: Path, commands: list[list[str]], profile: str, design: dict) -> int:
    """`dvc repro` in a folder, for each list of arguments until one fails; the exit code."""
    compute = {**design["compute"]["base"], **design["compute"].get(profile, {})}
    threads, stages = compute["threads"] * compute["processes"], compute["stages_per_gpu"]
    jobs = schedule.at_once(threads, stages if compute["processes"] == 1 else 1)
    codes = (reproduced(folder, arguments, profile, jobs) for arguments in commands)
    return next((code for code in codes if code), 0)


def reproduced(folder: Path, arguments: list[str], profile: str, jobs: int) -> int:
    """`dvc repro` once, several stages at a time if there is room and no option says otherwise."""
    running: list[subprocess.Popen] = []

    def start(arguments: list[str], **options) -> subprocess.Popen:
        running.append(begin(folder, arguments, **options))
        return running[-1]

    def end(*_) -> None:
        for process in running:
            process.terminate()
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    if jobs > 1 and not any(one.startswith("-") for one in arguments):
        code = ahead(folder, arguments, profile, jobs, start)
        if code:
            return code
    process = start(["repro", *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the stage too; DVC says what it leaves
            continue


def ahead(folder: Path, targets: list[str], profile: str, jobs: int, start) -> int:
    """What is out of date, `jobs` stages at a time; the exit code. Errors of DVC's are left to the
    `dvc repro` that follows, which says them in its own words."""
    timings = folder / "data" / "report" / profile / "timings" / "stages"
    try:
        plan = schedule.plan(folder, targets, timings)
    except Exception:  # DVC's libraries raise nothing more exact
        return 0
    if len(plan.needs) < 2:
        return 0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    one = ["--wait-for-lock", "repro", "--single-item"]
    return schedule.ahead(plan, jobs, lambda stage: start([*one, stage], **pipes))


def begin(folder: Path, arguments: list[str], **options) -> subprocess.Popen:
    """Start DVC. Its stages run with this Python, and it ends when we are ended."""
    linux = sys.platform == "linux"
    prctl = ctypes.CDLL(None).prctl if linux else None  # found before the fork: threads may run

    def with_parent() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path, "SHELL": "/bin/sh"},  # DVC would take fish, which is not sh
        preexec_fn=with_parent if linux else None,
        **options,
    )


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
    """Open the report of a profile, or of its run on --data, in a browser; print where it is."""
    root, design = params.root(), params.load()
    given, rest = options(arguments)
    require(len(rest) < 2, f"report: takes one profile, got {' '.join(rest)}", ParamsError)
    profile = rest[0] if rest else design["profile"]
    params.known(profile, design["lengths"], "profile")
    home = folder(root, profile, given)
    name = profile if home == root else home.name
    page = root / "data" / "report" / name / "index.html"
    words = [f"PROFILE={profile}"] * (profile != design["profile"])
    words += [f"{key.upper()}={given[key]}" for key in ("data", "text") if key in given]
    message = f"no report at {name} yet: {' '.join(['make repro', *words])}"
    require(page.is_file(), message, ParamsError)
    print(page)
    webbrowser.open(page.as_uri())
    return 0
