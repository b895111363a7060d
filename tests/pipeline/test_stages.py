"""What the pipeline's files promise: stages declare what they use, the environment is as locked."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import networkx
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from ruamel.yaml import YAML

from lib.pipeline import notebook, params
from lib.report import results

ROOT = Path(__file__).parents[2]
DESIGN = params.load(ROOT / "params.yaml")
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
ORDER = (
    "strip data pretrain continue teach distill finetune published evaluate baseline ablation "
    "efficiency lesson overview site"
).split()
# The rooms of lib in reading order: none imports a room that stands after it.
ROOMS = "pipeline operators kernels model benchmark training efficiency corpus report".split()
# Rooms that a stage may import without depending on them.
SHORT_LIST = {
    "report": "how results look: it makes only the pages stale",
    "pipeline": "how notebooks run: their numbers are the same",
    "kernels": "the same numbers, faster: lib/kernels/VERSION counts in its place",
    "efficiency": "how long it takes: no result depends on it, but those of notebook 10",
}
PAGES = {"ablation", "overview", "site"}


def body(stage: str) -> dict:
    return PIPELINE[stage].get("do", PIPELINE[stage])


def notebooks(stage: str) -> list[str]:
    """The notebooks that a stage runs, by name: one, or one per row."""
    names = re.findall(r"lib\.pipeline run (\S+) ", body(stage)["cmd"])
    if names == ["${item.notebook}"]:
        table = re.sub(r"\W", "", PIPELINE[stage]["foreach"])
        designs = [params.merged(DESIGN, profile) for profile in DESIGN["lengths"]]
        rows = [row for design in designs for row in design[table].values()]
        return list(dict.fromkeys(row["notebook"] for row in rows))
    return names


@cache
def cells(name: str) -> str:
    """All the code of a notebook."""
    page = notebook.read(ROOT / "notebooks" / f"{name}.ipynb")
    return "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")


def module(name: str) -> str:
    """The file of lib that holds `lib.room.module.name`; "" for a name that is not lib's."""
    parts = name.split(".")
    while parts and parts[0] == "lib":
        path = "/".join(parts)
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if (ROOT / file).is_file():
                return file
        parts.pop()
    return ""


@cache
def imported(code: str) -> frozenset[str]:
    """The files of lib that a piece of code imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return frozenset(map(module, names)) - {"", "lib/__init__.py"}


def used(code: str) -> set[str]:
    """The files of lib that a piece of code imports, directly or not."""
    files, fresh = set(), set(imported(code))
    while fresh:
        files |= fresh
        texts = [(ROOT / file).read_text(encoding="utf-8") for file in fresh]
        fresh = set().union(*map(imported, texts)) - files
    return files


def stage_code(stage: str) -> str:
    names = notebooks(stage)
    command = re.match(r"python -m (lib\.\w+\.\w+)", body(stage)["cmd"])
    return "\n".join(map(cells, names)) if names else f"import {command[1]}" if command else ""


def covers(dependency: str, file: str) -> bool:
    return file == dependency or file.startswith(f"{dependency}/")


RUNS = [stage for stage in ORDER if stage in PIPELINE and notebooks(stage)]


# ------------------------------------------------------------------ the rooms of lib

GRAPH = {
    file: imported((ROOT / file).read_text(encoding="utf-8")) - {file}
    for file in sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "lib").rglob("*.py"))
}
# Imports that still go against the order: (importing file, imported file).
KNOWN: set[tuple[str, str]] = set()


def test_no_room_imports_a_room_that_stands_after_it():
    def place(file: str) -> int:
        return ROOMS.index(file.split("/")[1])

    against = {
        (file, other)
        for file, others in GRAPH.items()
        for other in others
        if file != "lib/__init__.py" and place(other) > place(file)
    }
    assert against <= KNOWN, sorted(against - KNOWN)


def test_no_modules_import_each_other_in_a_circle():
    edges = [(file, other) for file, others in GRAPH.items() for other in others]
    circles = networkx.strongly_connected_components(networkx.DiGraph(edges))
    assert not [sorted(circle) for circle in circles if len(circle) > 1]


# ------------------------------------------------------------------ stages


def test_the_stages_are_these_in_this_order():
    assert list(PIPELINE) == ORDER


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_depends_on_the_rooms_that_it_imports_or_they_stand_on_the_short_list(stage):
    files = used(stage_code(stage))
    declared = {path for path in body(stage)["deps"] if path.startswith("lib/")}
    for file in files:
        room = file.split("/")[1]
        assert room in SHORT_LIST or any(covers(path, file) for path in declared), (
            f"{stage} imports {file}"
        )
    kernels = any(file.startswith("lib/kernels/") for file in files)
    assert ("lib/kernels/VERSION" in declared) == (kernels and stage not in PAGES)
    for path in declared - {"lib/kernels/VERSION"}:
        assert any(covers(path, file) for file in files), f"{stage} does not use {path}"


@pytest.mark.parametrize(
    ("edited", "stale"),
    [
        ("lib/kernels/cpu.py", set()),
        ("lib/kernels/triton_kernels.py", set()),
        ("lib/pipeline/notebook.py", set()),
        ("lib/report/results.py", PAGES),
        ("lib/report/card.py", PAGES),
        ("lib/corpus/build.py", {"data", "lesson"}),
        (
            "lib/training/losses.py",
            {"pretrain", "continue", "distill", "finetune", "ablation", "lesson"},
        ),
    ],
)
def test_an_edit_makes_stale_these_stages_and_no_others(edited, stale):
    """What follows from them DVC decides by content."""
    touched = {
        stage for stage in ORDER if any(covers(path, edited) for path in body(stage)["deps"])
    }
    assert touched == stale


def test_dvc_yaml_can_be_read_in_a_minute():
    lines = (ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 190 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("stage", RUNS)
def test_a_stage_declares_the_params_and_inputs_its_notebooks_read(stage):
    declared, deps = set(body(stage).get("params", [])), body(stage)["deps"]
    for name in notebooks(stage):
        code = cells(name)
        for section in re.findall(r"params\.settings\(\s*profile,\s*[\"'](\w+)[\"']", code):
            assert {f"{section}.base", f"{section}.${{profile}}"} <= declared, (
                f"{name} reads {section}"
            )
        for table in re.findall(r"params\.rows\(\s*profile,\s*[\"'](\w+)[\"']", code):
            parts = {"evaluated": ("retrievers", "published")}.get(table, (table,))
            for part in parts:
                assert {part, f"{part}.${{key}}"} & declared, f"{name} reads the table {table}"
        if "params.length(" in code:
            assert "lengths.${profile}" in declared
        if "results.paper(" in code:
            assert "data/paper" in deps
        for folder in ("corpus", "models", "runs"):
            if re.search(rf"\bdata(\(profile\))? / \"{folder}\"", code) and (stage, folder) not in {
                ("data", "corpus"),
                ("pretrain", "models"),
                ("baseline", "models"),
            }:
                assert any(dep.startswith(f"data/{folder}") for dep in deps), (
                    f"{name} reads data/{folder}"
                )
        for other in read_of_the_report(code):
            assert f"data/report/${{profile}}/{other}" in deps, f"{name} reads the stage {other}"


def read_of_the_report(code: str) -> set[str]:
    """The stages whose folders a notebook reads through lib.report."""
    steps = re.findall(r"results\.(?:load_metrics|curves|source)\(\s*profile, \"(\w+)\"", code)
    steps += ["evaluate"] * ("results.scores(" in code)
    return {stage for step in steps for stage in results.STAGES.get(step, {step: ""})}


@pytest.mark.parametrize("stage", RUNS)
def test_a_notebook_gets_every_parameter_it_declares(stage):
    row = " ${key}" if "foreach" in PIPELINE[stage] else ""
    source = "${item.notebook}" if stage in ("ablation", "lesson") else notebooks(stage)[0]
    assert body(stage)["cmd"].removesuffix(" --measured") == (
        f"python -m lib.pipeline run {source} {stage}{row} --profile ${{profile}}"
    )
    assert f"data/source/{source}.ipynb" in body(stage)["deps"]
    for name in notebooks(stage):
        page = notebook.read(ROOT / "notebooks" / f"{name}.ipynb")
        declared = {
            key
            for cell in page.cells
            if "parameters" in cell.metadata.get("tags", [])
            for key in re.findall(r"^(\w+) = ", cell.source, re.M)
        }
        assert declared == {"profile", "out"} | ({"row"} if row else set()), name


@pytest.mark.parametrize("stage", ORDER)
def test_an_output_is_cached_or_shown_by_git_and_never_a_timing(stage):
    """Not both: DVC refuses what git tracks. And an uncached output that is no plot keeps a stage
    out of the run cache: of these there is the page of the report alone."""
    plots = body(stage).get("plots", [])
    for output in [*body(stage).get("outs", []), *plots]:
        path, options = (output, {}) if isinstance(output, str) else next(iter(output.items()))
        shown = path.startswith("data/report/") and not path.endswith("/notebooks")
        assert options.get("cache", True) is not shown, path
        assert (output in plots) is (shown and not path.endswith(".html")), path
        assert "/timings" not in path


@pytest.mark.parametrize("stage", RUNS)
def test_a_stage_owns_its_folder_of_the_report_and_its_executed_notebook(stage):
    row = "/${key}" if "foreach" in PIPELINE[stage] else ""
    folder = f"data/report/${{profile}}/{stage}{row}"
    assert body(stage)["plots"] == [{folder: {"cache": False}}]
    name = f"{stage}{row.replace('/', '-')}"
    measured = body(stage)["cmd"].endswith(" --measured")
    assert (f"data/executed/{name}.ipynb" in body(stage).get("outs", [])) != measured


def test_names_and_notebooks_in_the_design_exist_and_their_stages_are_these():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {
        name for stage in RUNS for name in notebooks(stage)
    }


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """graphs(design): DVC's own reading of dvc.yaml with it, stage -> the stages it waits for."""
    from dvc.repo import Repo

    def read(design: dict) -> networkx.DiGraph:
        params.check(design)
        folder = tmp_path_factory.mktemp("graph")
        for name in ("dvc.yaml", ".dvcignore"):
            shutil.copy2(ROOT / name, folder / name)
        YAML().dump(design, folder / "params.yaml")
        Repo.init(folder, no_scm=True).close()
        with Repo(folder) as repo:
            names = {stage: stage.name for stage in repo.index.stages}
            return networkx.relabel_nodes(repo.index.graph, names)

    return read


@pytest.fixture(scope="module")
def graph(graphs):
    """Of the paper's rows, which have one of every kind but a row with a baseline as its teacher:
    one is added."""
    tables = params.select(DESIGN, "paper") | {"teachers": {"minilm": {}}}
    row = {"pretrained": "warm_32k", "loss": "prototype", "teacher": "minilm"}
    tables["distilled"] = {**tables["distilled"], "from_minilm": row}
    return graphs({**DESIGN, **tables, "rows": {}, "groups": {}})


@pytest.mark.parametrize("profile", DESIGN["lengths"])
def test_whoever_adds_up_waits_for_every_row(graphs, profile):
    waits, design = networkx.descendants, params.select(DESIGN, profile)
    graph = graphs({**DESIGN, **design, "profile": profile, "rows": {}, "groups": {}})
    rows = {f"evaluate@{row}" for row in design["evaluated"]} | {
        f"baseline@{row}" for row in design["baselines"]
    }
    for stage in ("overview", "site", *(f"ablation@{name}" for name in design["ablations"])):
        assert rows <= waits(graph, stage)
    assert waits(graph, "site") == set(graph) - {"site"}
    assert "data" not in waits(graph, "efficiency")


def test_a_row_waits_for_what_it_is_built_on_and_nothing_else(graph):
    first = {"strip", "data"}
    assert networkx.descendants(graph, "pretrain@mixed_8k") == first
    assert networkx.descendants(graph, "evaluate@opl") == first | {
        "pretrain@mixed_8k",
        "continue@warm_32k",
        "finetune@opl",
    }
    assert {
        "distill@prototype_32k",
        "finetune@reads_128",
        "pretrain@mixed_128",
    } <= networkx.descendants(graph, "finetune@prototype")
    started = first | {"pretrain@mixed_8k", "continue@warm_32k"}
    assert networkx.descendants(graph, "distill@from_minilm") == started | {"teach@minilm"}
    assert networkx.descendants(graph, "teach@minilm") == set()


def test_smoke_is_about_twenty_stages():
    tables = params.select({**DESIGN, "profile": None}, "smoke")
    count = sum(
        len(tables[re.sub(r"\W", "", stage["foreach"])]) if "foreach" in stage else 1
        for stage in PIPELINE.values()
    )
    assert count <= 20


# ------------------------------------------------------------------ the same bytes elsewhere


def test_a_pipeline_writes_the_same_lock_in_another_place_by_another_user(tmp_path):
    page = new_notebook(
        cells=[
            new_code_cell(
                'profile = "smoke"\nout = "data/scratch"', metadata={"tags": ["parameters"]}
            ),
            new_code_cell(
                "import os, time\nfrom pathlib import Path\nfrom lib.pipeline import params\n"
                "print(os.getcwd(), time.time() > 0, sorted({'b', 'a'}), hash('x'))\n"
                "(params.output(out) / 'result.json').write_text(str(params.length(profile, 128)))"
            ),
        ]
    )
    stages = """\
stages:
  strip:
    cmd: python -m lib.pipeline strip notebooks data/source
    deps: [notebooks]
    outs: [data/source]
  work:
    cmd: python -m lib.pipeline run 00_a work --profile ${profile}
    deps: [data/source/00_a.ipynb, lib]
    params: ['lengths.${profile}']
    outs: [data/executed/work.ipynb]
    metrics:
      - data/result.json: {cache: false}
"""
    runs = []
    for name, environment, mask in (
        ("one", {}, 0o022),
        (
            "zwei, ü",
            {"TZ": "Asia/Tokyo", "LC_ALL": "C", "HOME": "/proc/nowhere", "PYTHONHASHSEED": "77"},
            0o077,
        ),
    ):
        house = tmp_path / name
        (house / ".dvc").mkdir(parents=True)
        (house / "notebooks").mkdir()
        shutil.copytree(ROOT / "lib", house / "lib", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("params.yaml", ".dvc/config", ".dvcignore"):
            shutil.copy2(ROOT / file, house / file)
        (house / "dvc.yaml").write_text(stages)
        nbformat.write(page, house / "notebooks" / "00_a.ipynb")
        runs.append(
            (
                house,
                subprocess.Popen(
                    [sys.executable, "-m", "lib.pipeline", "repro"],
                    cwd=house,
                    umask=mask,
                    text=True,
                    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                ),
            )
        )
    for _, process in runs:
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out
    locks = [(house / "dvc.lock").read_text() for house, _ in runs]
    assert locks[0] == locks[1] and "executed/work.ipynb" in locks[0]
    again = subprocess.run(
        [sys.executable, "-m", "lib.pipeline", "repro"],
        cwd=runs[0][0],
        text=True,
        capture_output=True,
    )
    assert (
        again.returncode == 0 and "Running stage" not in again.stdout and "1 stages" in again.stdout
    )


# ------------------------------------------------------------------ what is installed

CARD = (
    "jupyterlab",
    "papermill",
    "torch",
    "transformers",
    "datasets",
    "matplotlib",
    "seaborn",
    "faiss",
    "dvc",
)
CONDA = {
    "pytorch-gpu": "torch",
    "faiss-gpu": "faiss",
    "matplotlib-base": "matplotlib",
    "huggingface_hub": "huggingface-hub",
}
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
VERSIONS = {
    match[1].replace("faiss-cpu", "faiss"): Version(match[2])
    for match in re.finditer(r"^([a-z0-9.-]+)==(\S+)", LOCK, re.M)
}


def project() -> dict:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_lock_holds_what_the_project_asks_for_by_hash_and_no_torch():
    wanted = [
        Requirement(line)
        for line in [
            *project()["dependencies"],
            *project()["optional-dependencies"]["cpu"],
            *project()["optional-dependencies"]["test"],
        ]
    ]
    for requirement in wanted:
        name = canonicalize_name(requirement.name).replace("faiss-cpu", "faiss")
        assert name == "torch" or VERSIONS[name] in requirement.specifier, name
    assert not [name for name in VERSIONS if name.startswith(("torch", "nvidia", "cuda", "triton"))]
    assert VERSIONS["setuptools"] >= Version("77")  # the project itself is built without isolation
    for block in re.split(r"\n(?=\S)", LOCK.split("\n# The following packages")[0]):
        assert block.startswith("#") or "--hash=sha256:" in block, block[:80]
    assert not re.search(
        r"https?://|file:|--index|--find-links|--trusted|(?<![\w.])/(home|root|work|tmp|Users)/",
        LOCK,
    )


def test_conda_users_get_the_same_packages_in_overlapping_ranges():
    listed = YAML(typ="safe").load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    lines = [line for line in listed["dependencies"] if isinstance(line, str)] + next(
        line["pip"] for line in listed["dependencies"] if isinstance(line, dict)
    )
    ranges = {}
    for line in lines:
        name, _, wanted = line.partition(" ")
        wanted = re.sub(r"^(\d[\d.]*)\.\*$", r"==\1.*", wanted)
        ranges[canonicalize_name(CONDA.get(name, name))] = SpecifierSet(wanted)
    torch = next(
        Requirement(line) for line in project()["dependencies"] if line.startswith("torch")
    )
    installed = VERSIONS | {"torch": Version(next(iter(torch.specifier)).version)}
    assert set(CARD) <= ranges.keys()
    for requirement in map(Requirement, project()["dependencies"]):
        assert canonicalize_name(requirement.name) in ranges, (
            f"{requirement.name} is not in environment.yml"
        )
    for name, wanted in ranges.items():
        assert name in ("python", "pip", "cuda-version") or installed[name] in wanted, (
            f"{name}: locked {installed[name]}, conda {wanted}"
        )
    assert listed["channels"] == ["conda-forge", "nodefaults"]


STUB = """\
#!/bin/sh
# Plays python, venv and pip: writes down what it is asked for.
case "$*" in
  -c*) exec {python} "$@" ;;
  "-m venv --clear .venv") sleep 0.3; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"install -q torch"*) echo torch >> log ;;
  *requirements.lock*) test -e broken && exit 1; echo lock >> log ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(STUB.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)

    def run(*arguments):
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("MAKE") and key != "MFLAGS"
        }
        return subprocess.Popen(
            ["make", "PYTHON=./python", *arguments],
            cwd=tmp_path,
            text=True,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return run


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_environment_is_built_once_even_by_two_at_once_and_again_when_the_lock_changes(
    make, tmp_path
):
    first, second = make("environment"), make("environment")
    assert first.wait(60) == second.wait(60) == 0
    assert make("environment").wait(60) == 0
    assert (tmp_path / "log").read_text().split() == ["torch", "lock"]
    with open(tmp_path / "requirements.lock", "a") as file:
        file.write("# changed\n")
    assert make("environment").wait(60) == 0
    assert (tmp_path / "log").read_text().split() == ["torch", "lock"] * 2


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_failed_install_says_so_and_is_begun_again(make, tmp_path):
    (tmp_path / "broken").touch()
    failed = make("environment")
    _, err = failed.communicate(timeout=60)
    assert failed.returncode != 0 and "'make environment' begins it again" in err
    (tmp_path / "broken").unlink()
    assert make("environment").wait(60) == 0
    assert (tmp_path / "log").read_text().split() == ["torch", "torch", "lock"]
    old = make("environment", "PYTHON=false", "EXTRA=gpu")
    assert old.wait(60) != 0 and "Python 3.11 or newer is needed" in old.stderr.read()


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_help_names_every_target(make):
    out, _ = make("help").communicate(timeout=60)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert {target for target in targets if f"make {target}" not in out} == {"help"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_sees_the_library_and_the_committed_reports_and_nothing_dvc_keeps():
    def ignored(path):
        return (
            subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode
            == 0
        )

    for path in (
        "lib/training/losses.py",
        "data/paper/table5.csv",
        "data/report/laptop/index.html",
        "data/report/laptop/timings/stages/data.json",
        "data/report/study/index.html",
        "dvc.lock",
        ".dvc/config",
    ):
        assert not ignored(path), path
    for path in (
        "data/models/opl",
        "data/corpus",
        "data/executed",
        "data/report/smoke",
        "data/report/laptop/notebooks/a.html",
        ".work/smoke",
        ".dvc/cache",
        ".dvc/config.local",
        ".venv/bin",
    ):
        assert ignored(path), path
