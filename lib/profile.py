"""The pipeline at a profile: in place for the one that params.yaml names, in a folder of its own for any other.

    python -m lib.profile repro                       everything, at the profile of params.yaml
    python -m lib.profile repro smoke                 everything, at smoke, in .work/smoke
    python -m lib.profile repro smoke finetune@opl    one row (or any other arguments of `dvc repro`)
    python -m lib.profile report smoke                open its report

A pipeline's stages are the rows of params.yaml, whatever the profile, and
DVC's lock file remembers one profile. So another profile gets a copy of the
code and a params.yaml with only its rows; the cache is shared, the report
comes back to data/report/<profile>, and git sees nothing.
"""
import configparser
import ctypes
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

from lib import files, params
from lib.params import ParamsError

COPIED = ("lib", "notebooks", "data/paper", "dvc.yaml", ".dvcignore", ".dvc/config", "requirements.lock")


def repro(arguments: list[str]) -> int:
    """Run `dvc repro` for a profile; DVC's exit code.

    Args:
        arguments: the profile's name, if it is not the one of params.yaml; then what `dvc repro` takes.

    Raises:
        ParamsError: the design is wrong, or there is no such profile, stage or row; nothing has run then.
    """
    root, design = params.root(), params.load()
    profile, arguments = split(arguments, design, foreach(root / "dvc.yaml"))
    home = params.home(profile)
    if home == root:
        configure(root, no_scm=not (root / ".git").exists())
        code = dvc(root, ["repro", *arguments])
    else:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / ".lock", f"another run at {profile} is at work in {home.relative_to(root)}: wait until it ends"):
            copy(root, home, design, profile)
            code = dvc(home, ["repro", *arguments])
            if code == 0:
                bring_back(home / "data" / "report" / profile, root / "data" / "report" / profile)
    if code == 0:
        print(summary(root / "data" / "report" / profile, root))
    return code


def foreach(path: Path) -> dict[str, str | None]:
    """The stages of a dvc.yaml, each with the table of params.yaml it runs over, or None."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"]
    return {name: re.sub(r"\W", "", stage["foreach"]) if "foreach" in stage else None for name, stage in stages.items()}


def split(arguments: list[str], design: dict, stages: dict[str, str | None]) -> tuple[str, list[str]]:
    """(profile, the rest): the first argument is a profile unless it is an option or a stage. Names are checked."""
    profile = design["profile"]
    if arguments and not arguments[0].startswith("-") and arguments[0].partition("@")[0] not in stages:
        params.known(arguments[0], [*design["lengths"], *stages], "profile or stage")
        profile, arguments = arguments[0], arguments[1:]
    tables = params.select(design, profile)
    for target in arguments:
        stage, at, row = target.partition("@")
        if at and not target.startswith("-"):
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
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif source.is_file():
            shutil.copy2(source, target)
    from ruamel.yaml import YAML

    with open(home / "params.yaml", "w", encoding="utf-8") as file:
        YAML().dump({**design, "profile": profile, "rows": {}, **params.select(design, profile)}, file)
    local = root / ".dvc" / "config.local"
    if local.is_file():
        shutil.copy2(local, home / ".dvc" / "config.local")
    configure(home, no_scm=True, cache=cache_folder(root))


def cache_folder(root: Path) -> Path:
    """Where the root's cache is: .dvc/cache, or what its configuration says."""
    for name in ("config.local", "config"):
        said = read_config(root / ".dvc" / name).get("cache", "dir", fallback=None)
        if said:
            return (root / ".dvc" / said.strip("\"'")).resolve()
    return root / ".dvc" / "cache"


def configure(root: Path, no_scm: bool, cache: Path | None = None) -> None:
    """Tell DVC, in its untracked config.local, what only holds here."""
    path = root / ".dvc" / "config.local"
    config = read_config(path)
    before = {name: dict(section) for name, section in config.items()}
    if no_scm:                                                             # a source archive, or a copy: DVC refuses to run without git unless told
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
    config.read(path, encoding="utf-8")
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
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)                     # PR_SET_PDEATHSIG

    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
                                "SHELL": "/bin/sh"}                        # DVC runs commands with the user's shell, and fish is not sh
    process = subprocess.Popen([sys.executable, "-m", "dvc", *arguments], cwd=folder, env=environment, preexec_fn=with_parent)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:                                          # Ctrl-C reaches the stage too; DVC says what it leaves
            continue


def summary(report: Path, root: Path) -> str:
    """What the stages cost when they last ran, and where to look."""
    costs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((report / "timings" / "stages").glob("*.json"))]
    page = report / "index.html"
    where = (page if page.is_file() else report).relative_to(root).as_posix()
    if not costs:
        return f"see {where}"
    slowest = max(costs, key=lambda cost: cost["seconds"])
    return (f"{len(costs)} stages, {sum(cost['seconds'] for cost in costs) / 60:.1f} min when each last ran (longest: {slowest['stage']}, "
            f"{slowest['seconds'] / 60:.1f} min), {max(cost['peak_gib'] for cost in costs)} GiB at most; see {where}")


def report(profile: str | None = None) -> int:
    """Open a profile's report in a browser, and print where it is.

    Raises:
        ParamsError: there is no such profile, or it has not been run.
    """
    root, design = params.root(), params.load()
    profile = profile or design["profile"]
    params.known(profile, design["lengths"], "profile")
    page = root / "data" / "report" / profile / "index.html"
    if not page.is_file():
        raise ParamsError(f"no report at {profile} yet: make repro{'' if profile == design['profile'] else f' PROFILE={profile}'}")
    print(page)
    webbrowser.open(page.as_uri())
    return 0


def main(arguments: list[str]) -> int:
    if arguments[:1] not in (["repro"], ["report"]) or arguments[0] == "report" and len(arguments) > 2:
        print("usage: python -m lib.profile repro [PROFILE] [arguments of dvc repro]\n       python -m lib.profile report [PROFILE]", file=sys.stderr)
        return 2
    try:
        return repro(arguments[1:]) if arguments[0] == "repro" else report(*arguments[1:])
    except ParamsError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
