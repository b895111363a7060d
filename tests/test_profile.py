"""A profile runs its rows, beside the others and unseen by git."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lib import params, profile
from lib.params import ParamsError

ROOT = Path(__file__).parents[1]
TOY = """\
stages:
  train:
    foreach: ${retrievers}
    do:
      cmd: echo ${key} >> "$COUNT" && mkdir -p data/models data/report/${profile}/metrics && echo ${key} > data/models/${key} && echo '{"x":1}' > data/report/${profile}/metrics/${key}.json
      params: ['retrievers.${key}', 'finetune.${profile}']
      outs: ['data/models/${key}']
      metrics:
        - data/report/${profile}/metrics/${key}.json: {cache: false}
  page:
    cmd: ls data/report/${profile}/metrics > data/report/${profile}/index.html
    deps: ['data/report/${profile}/metrics']
    plots:
      - data/report/${profile}/index.html: {cache: false}
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository with toy stages, in a folder whose name has a comma, a space and an umlaut."""
    root = tmp_path / "höuse, copied"
    (root / ".dvc").mkdir(parents=True)
    (root / "notebooks").mkdir()
    shutil.copytree(ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", ".dvc/config", ".dvcignore", ".gitignore"):
        shutil.copy2(ROOT / name, root / name)
    (root / "dvc.yaml").write_text(TOY)
    monkeypatch.chdir(root)
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return root


def repro(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lib.profile", "repro", *arguments], env=os.environ | environment, text=True, capture_output=True, timeout=120)


def trained() -> list[str]:
    """The rows trained since the last question."""
    path = Path(os.environ["COUNT"])
    rows = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return rows


def replace(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def git(*arguments) -> str:
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], check=True, text=True, capture_output=True).stdout


def test_another_profile_runs_its_rows_in_its_folder_and_git_stays_clean(house):
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    rows = list(params.rows("smoke", "retrievers"))
    done = repro("smoke")
    assert done.returncode == 0, done.stderr
    assert trained() == rows and "data/report/smoke/index.html" in done.stdout
    assert (house / "data/report/smoke/index.html").read_text().split() == sorted(f"{row}.json" for row in rows)
    assert git("status", "--porcelain") == "" and not (house / "dvc.lock").exists()

    assert repro("smoke").returncode == 0 and trained() == []              # a second run is a no-op
    replace(house / "params.yaml", "opl:             {pretrained: warm_32k, loss: opl", "opl:             {seed: 7, pretrained: warm_32k, loss: opl")
    assert repro("smoke").returncode == 0 and trained() == ["opl"]
    replace(house / "params.yaml", "{seed: 7, ", "{")
    assert repro("smoke").returncode == 0 and trained() == []              # restored from the run cache
    assert (house / ".dvc" / "cache").is_dir() and not (house / ".work/smoke/.dvc/cache").exists()


def test_an_archive_without_git_runs_in_place_one_row_at_a_time(house):
    subprocess.run(["git", "init", "-q", ".."], check=True)               # unpacked inside somebody's other repository
    done = repro("train@opl", HOME="/proc/nowhere", SHELL="/usr/bin/fish")
    assert done.returncode == 0, done.stderr
    assert trained() == ["opl"] and (house / "data/report/laptop/metrics/opl.json").is_file() and (house / "dvc.lock").is_file()
    assert repro("smoke", "train@opl").returncode == 0 and trained() == ["opl"]
    assert not (house / "data/report/smoke/index.html").exists()


def test_a_failing_run_leaves_the_last_report_alone(house):
    report = house / "data/report/smoke/index.html"
    report.parent.mkdir(parents=True)
    report.write_text("of an earlier run")
    replace(house / "dvc.yaml", "cmd: ls", "cmd: false && ls")
    assert repro("smoke").returncode != 0 and report.read_text() == "of an earlier run"


def test_two_runs_of_one_profile_at_once_are_one_too_many(house):
    (house / ".work/smoke").mkdir(parents=True)
    with profile.locked(house / ".work/smoke/.lock", ""):
        done = repro("smoke")
    assert done.returncode == 1 and done.stderr == "another run at smoke is at work in .work/smoke: wait until it ends\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killing_the_run_kills_the_kernel(house):
    cells = [new_code_cell('profile = "smoke"', metadata={"tags": ["parameters"]}),
             new_code_cell("import os, sys\nprint('kernel', os.getpid(), file=sys.stderr)\nwhile True: sum(range(1000))")]
    nbformat.write(new_notebook(cells=cells), house / "notebooks" / "a.ipynb")
    (house / "dvc.yaml").write_text("stages:\n  endless:\n    cmd: python -m lib.notebook run notebooks/a.ipynb data/a.ipynb && echo\n")
    run = subprocess.Popen([sys.executable, "-m", "lib.profile", "repro", "smoke"], stderr=subprocess.PIPE, text=True)
    pid = next(int(line.split()[1]) for line in run.stderr if line.startswith("kernel "))
    run.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert repro("smoke", "--dry").returncode == 0                         # and its locks are gone with it


STAGES = {"data": None, "finetune": "retrievers", "report": None}


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], ("laptop", [])),
    (["smoke"], ("smoke", [])),
    (["smoke", "finetune@opl", "--single-item"], ("smoke", ["finetune@opl", "--single-item"])),
    (["finetune@cold"], ("laptop", ["finetune@cold"])),
    (["data"], ("laptop", ["data"])),
    (["--dry"], ("laptop", ["--dry"])),
])
def test_the_first_argument_is_a_profile_unless_it_is_a_stage_or_an_option(arguments, expected):
    assert profile.split(arguments, params.load(ROOT / "params.yaml"), STAGES) == expected


@pytest.mark.parametrize(("arguments", "message"), [
    (["smoek"], "unknown profile or stage 'smoek'; did you mean 'smoke'?"),
    (["finetun@opl"], "unknown profile or stage 'finetun@opl'"),
    (["smoke", "finetun@opl"], "unknown stage 'finetun'; did you mean 'finetune'?"),
    (["finetune@olp"], "unknown row of finetune at laptop 'olp'; did you mean 'opl'?"),
    (["smoke", "finetune@cold"], "unknown row of finetune at smoke 'cold'"),
    (["data@opl"], "unknown row of data at laptop 'opl'; there is none"),
])
def test_an_unknown_profile_stage_or_row_is_refused_before_anything_runs(arguments, message):
    with pytest.raises(ParamsError) as error:
        profile.split(arguments, params.load(ROOT / "params.yaml"), STAGES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_design_stops_the_run_before_its_first_stage(house):
    replace(house / "params.yaml", "loss: opl,", "loss: olp,")
    done = repro("smoke")
    assert done.returncode == 1 and trained() == [] and not (house / ".work").exists()
    assert done.stderr == "params.yaml: retrievers.opl.loss: unknown value 'olp'; did you mean 'opl'?\n"


def test_a_report_that_is_not_there_says_how_to_make_it(house, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(profile.webbrowser, "open", opened.append)
    assert profile.main(["report", "smoke"]) == 1
    assert capsys.readouterr().err == "no report at smoke yet: make repro PROFILE=smoke\n"
    (house / "data/report/smoke").mkdir(parents=True)
    (house / "data/report/smoke/index.html").write_text("")
    assert profile.main(["report", "smoke"]) == 0 and opened[0].startswith("file://") and opened[0].endswith("smoke/index.html")
    assert profile.main(["report", "smoke", "paper"]) == 2
