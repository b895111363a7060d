"""What the pipeline's files promise: stages that declare what they use, an environment that is what was locked."""

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

from lib.pipeline import files, notebook, params

ROOT = Path(__file__).parents[2]
DESIGN = params.load(ROOT / "params.yaml")
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
ORDER = [
    "strip",
    "data",
    "pretrain",
    "continue",
    "distill",
    "finetune",
    "published",
    "evaluate",
    "baseline",
    "ablation",
    "efficiency",
    "lesson",
    "figures",
    "report",
]


def body(stage: str) -> dict:
    return PIPELINE[stage].get("do", PIPELINE[stage])


def notebooks(stage: str) -> list[str]:
    """The notebooks a stage runs, by name: one, or one a row."""
    names = re.findall(r"run data/source/(\S+)\.ipynb", body(stage)["cmd"])
    if names == ["${item.notebook}"]:
        return [
            row["notebook"]
            for row in DESIGN[re.sub(r"\W", "", PIPELINE[stage]["foreach"])].values()
        ]
    return names


@cache
def cells(name: str) -> str:
    """All the code of a notebook."""
    page = notebook.read(ROOT / "notebooks" / f"{name}.ipynb")
    return "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")


def imported(code: str) -> set[str]:
    """The modules of lib that a piece of code imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lib.")
            }
    return found


def used(code: str) -> set[str]:
    """The same, and what those import in turn."""
    found, fresh = set(), imported(code)
    while fresh:
        found |= fresh
        fresh = (
            set().union(
                *(
                    imported((ROOT / "lib" / f"{name}.py").read_text(encoding="utf-8"))
                    for name in fresh
                )
            )
            - found
        )
    return found


RUNS = [
    stage
    for stage in ORDER
    if stage in PIPELINE and "lib.pipeline.notebook run" in body(stage)["cmd"]
]


# ------------------------------------------------------------------ stages


def test_the_stages_are_these_in_this_order():
    assert list(PIPELINE) == ORDER


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_declares_the_modules_it_imports_and_no_others(stage):
    module = re.match(r"python -m lib\.(\w+)", body(stage)["cmd"])[1]
    code = "\n".join(map(cells, notebooks(stage))) if stage in RUNS else f"import lib.{module}"
    declared = {Path(path).name for path in body(stage)["deps"] if path.startswith("lib/")}
    assert declared == {f"{name}.py" for name in used(code)} | (
        {"mixer.cpp"} if "native" in used(code) else set()
    )


@pytest.mark.parametrize("stage", RUNS)
def test_a_stage_declares_the_params_and_inputs_its_notebooks_read(stage):
    for name in notebooks(stage):
        code, declared = cells(name), set(body(stage).get("params", []))
        for section in re.findall(r"params\.settings\(\s*profile,\s*[\"'](\w+)[\"']", code):
            assert {f"{section}.base", f"{section}.${{profile}}"} <= declared, (
                f"{name} reads {section}"
            )
        for table in re.findall(r"params\.rows\(\s*profile,\s*[\"'](\w+)[\"']", code):
            assert {table, f"{table}.${{key}}"} & declared, f"{name} reads the table {table}"
        if "params.length(" in code:
            assert "lengths.${profile}" in declared
        if "report.paper(" in code:
            assert "data/paper" in body(stage)["deps"]
        for folder in ("corpus", "models", "runs"):
            if re.search(rf"\bdata(\(profile\))? / \"{folder}\"", code) and (stage, folder) not in {
                ("data", "corpus"),
                ("pretrain", "models"),
                ("baseline", "models"),
            }:
                assert any(dep.startswith(f"data/{folder}") for dep in body(stage)["deps"]), (
                    f"{name} reads data/{folder}"
                )
        for table in re.findall(r'"tables" / "(\w+\.csv)"', code):
            assert f"data/report/${{profile}}/tables/{table}" in body(stage)["deps"], (
                f"{name} reads the table {table}"
            )


@pytest.mark.parametrize("stage", RUNS)
def test_a_notebook_gets_every_parameter_it_declares(stage):
    given = set(re.findall(r"(\w+)=\S+", body(stage)["cmd"]))
    for name in notebooks(stage):
        page = notebook.read(ROOT / "notebooks" / f"{name}.ipynb")
        declared = {
            key
            for cell in page.cells
            if "parameters" in cell.metadata.get("tags", [])
            for key in notebook.declared(cell.source)
        }
        assert given == declared, name
        dependency = f"data/source/{name}.ipynb"
        assert {dependency, "data/source/${item.notebook}.ipynb"} & set(body(stage)["deps"])


@pytest.mark.parametrize("stage", ORDER)
def test_an_output_is_cached_or_shown_by_git_and_never_a_timing(stage):
    """Not both: DVC refuses what git tracks. And what is neither metric nor plot keeps a stage out of the run cache."""
    listed = [
        (kind, output)
        for kind in ("outs", "metrics", "plots")
        for output in body(stage).get(kind, [])
    ]
    for kind, output in listed:
        path, options = (output, {}) if isinstance(output, str) else next(iter(output.items()))
        shown = path.startswith("data/report/") and not path.endswith("/notebooks")
        assert options.get("cache", True) is not shown, path
        assert kind == (
            "metrics"
            if path.endswith(".json")
            else "plots"
            if shown and not path.endswith(".html")
            else "outs"
        ), path
        assert "/timings" not in path


def test_names_and_notebooks_in_the_design_exist_and_their_stages_are_these():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {
        name for stage in RUNS for name in notebooks(stage)
    }


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """DVC's own reading of dvc.yaml: stage -> the stages it waits for."""
    from dvc.repo import Repo

    folder = tmp_path_factory.mktemp("graph")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy2(ROOT / name, folder / name)
    Repo.init(folder, no_scm=True).close()
    with Repo(folder) as repo:
        names = {stage: stage.name for stage in repo.index.stages}
        yield networkx.relabel_nodes(repo.index.graph, names)


def test_whoever_adds_up_waits_for_every_row(graph):
    waits = networkx.descendants
    rows = {f"evaluate@{row}" for row in DESIGN["retrievers"]} | {
        f"baseline@{row}" for row in DESIGN["baselines"]
    }
    for stage in ("figures", "report", *(f"ablation@{name}" for name in DESIGN["ablations"])):
        assert rows <= waits(graph, stage)
    assert waits(graph, "report") == set(graph) - {"report"} - {"efficiency"} | (
        {"efficiency"} & waits(graph, "report")
    )
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


def test_smoke_is_about_fifteen_stages():
    tables = params.select({**DESIGN, "profile": None}, "smoke")
    count = sum(
        len(tables[re.sub(r"\W", "", stage["foreach"])]) if "foreach" in stage else 1
        for stage in PIPELINE.values()
    )
    assert count <= 16


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
    cmd: python -m lib.pipeline.notebook strip notebooks data/source
    deps: [notebooks]
    outs: [data/source]
  work:
    cmd: python -m lib.pipeline.notebook run data/source/00_a.ipynb data/executed/a.ipynb --timing data/report/laptop/timings profile=${profile} out=data
    deps: [data/source/00_a.ipynb, lib]
    params: ['lengths.${profile}']
    outs: [data/executed/a.ipynb]
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
        files.write(
            house / "notebooks" / "00_a.ipynb",
            notebook.dumps(
                notebook.plain(notebook.bare(nbformat.from_dict(notebook.identified(dict(page)))))
            ),
        )
        runs.append(
            (
                house,
                subprocess.Popen(
                    [sys.executable, "-m", "lib.pipeline.profile", "repro"],
                    cwd=house,
                    umask=mask,
                    text=True,
                    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                ),
            )
        )
    for house, process in runs:
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out
    locks = [(house / "dvc.lock").read_text() for house, _ in runs]
    assert locks[0] == locks[1] and "executed/a.ipynb" in locks[0]
    again = subprocess.run(
        [sys.executable, "-m", "lib.pipeline.profile", "repro"],
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
def test_git_sees_the_library_and_the_default_report_and_nothing_dvc_keeps():
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
