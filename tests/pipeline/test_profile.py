"""A profile runs its rows, beside the others and unseen by git."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from dvc.config import Config
from nbformat.v4 import new_code_cell, new_notebook

from lib.pipeline import params, profile, schedule
from lib.pipeline.__main__ import main
from lib.pipeline.params import ParamsError

ROOT = Path(__file__).parents[2]
TOY = """\
stages:
  train:
    foreach: ${retrievers}
    do:
      cmd: echo ${key} >> "$COUNT" && mkdir -p data/models data/report/${profile}/metrics
        && echo ${key} > data/models/${key}
        && echo '{"x":1}' > data/report/${profile}/metrics/${key}.json
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
    return subprocess.run(
        [sys.executable, "-m", "lib.pipeline", "repro", *arguments],
        env=os.environ | environment,
        text=True,
        capture_output=True,
        timeout=120,
    )


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
    return subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
        check=True,
        text=True,
        capture_output=True,
    ).stdout


def test_another_profile_runs_its_rows_in_its_folder_and_git_stays_clean(house):
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    rows = list(params.rows("smoke", "retrievers"))
    done = repro("smoke")
    assert done.returncode == 0, done.stderr
    assert sorted(trained()) == sorted(rows) and "data/report/smoke/index.html" in done.stdout
    assert (house / "data/report/smoke/index.html").read_text().split() == sorted(
        f"{row}.json" for row in rows
    )
    assert git("status", "--porcelain") == "" and not (house / "dvc.lock").exists()

    assert repro("smoke").returncode == 0 and trained() == []  # a second run is a no-op
    replace(
        house / "params.yaml",
        "opl: {pretrained: start_32k, loss: opl, documents: 1}",
        "opl: {lr: 7.0, pretrained: start_32k, loss: opl, documents: 1}",
    )
    assert repro("smoke").returncode == 0 and trained() == ["opl"]
    replace(house / "params.yaml", "{lr: 7.0, ", "{")
    assert repro("smoke").returncode == 0 and trained() == []  # restored from the run cache
    assert (house / ".dvc" / "cache").is_dir() and not (house / ".work/smoke/.dvc/cache").exists()


def test_an_archive_without_git_runs_in_place_one_row_at_a_time(house):
    subprocess.run(
        ["git", "init", "-q", ".."], check=True
    )  # unpacked inside somebody's other repository
    done = repro("train@opl", HOME="/proc/nowhere", SHELL="/usr/bin/fish")
    assert done.returncode == 0, done.stderr
    assert (
        trained() == ["opl"]
        and (house / "data/report/laptop/metrics/opl.json").is_file()
        and (house / "dvc.lock").is_file()
    )
    assert repro("smoke", "train@opl").returncode == 0 and trained() == ["opl"]
    assert not (house / "data/report/smoke/index.html").exists()


GROUPED = """\
stages:
  evaluate:
    foreach: ${evaluated}
    do:
      cmd: echo ${key} >> "$COUNT" && mkdir -p data/runs && echo ${key} > data/runs/${key}
      params: ['retrievers.${key}']
      outs: ['data/runs/${key}']
  baseline:
    foreach: ${baselines}
    do:
      cmd: echo ${key} >> "$COUNT" && mkdir -p data/runs && echo ${key} > data/runs/${key}
      params: ['baselines.${key}']
      outs: ['data/runs/${key}']
  ablation:
    foreach: ${ablations}
    do:
      cmd: ls data/runs > data/ablation-${key}
      deps: [data/runs]
      outs: ['data/ablation-${key}']
  efficiency:
    cmd: echo efficiency >> "$COUNT" && echo x > data/efficiency
    outs: [data/efficiency]
  overview:
    cmd: mkdir -p data/report/${profile} && ls data/runs > data/report/${profile}/overview
    deps: [data/runs, data/efficiency]
    plots:
      - data/report/${profile}/overview: {cache: false}
  site:
    cmd: cp data/report/${profile}/overview data/report/${profile}/index.html
    deps: ['data/report/${profile}/overview']
    plots:
      - data/report/${profile}/index.html: {cache: false}
"""


def test_a_group_runs_its_rows_and_the_report_grows_from_group_to_group(house):
    (house / "dvc.yaml").write_text(GROUPED)
    replace(
        house / "params.yaml",
        "      reads_warm: ",
        "      mnrl: ",
    )
    path = house / "params.yaml"
    path.write_text(
        re.sub(
            r"(?m)^groups:\n(  .*\n)+",
            """groups:
  loss: {rows: [opl, reads_32k]}
  length: {rows: [reads_32k, bm25]}
""",
            path.read_text(encoding="utf-8"),
        ),
        encoding="utf-8",
    )
    done = repro("smoke", "--group=loss")
    assert done.returncode == 0, done.stderr + done.stdout
    assert sorted(trained()) == ["efficiency", "opl", "reads_32k"]
    page = house / "data/report/smoke/index.html"
    assert page.read_text().split() == ["opl", "reads_32k"]

    assert repro("smoke", "--group=loss").returncode == 0 and trained() == []
    done = repro("smoke", "--group=length")
    assert done.returncode == 0 and trained() == ["bm25"], done.stderr  # the rest is there
    assert page.read_text().split() == ["bm25", "opl", "reads_32k"]
    assert not (house / ".work/smoke/data/ablation-loss").exists()  # no ablation of these groups
    done = repro("smoke")
    assert done.returncode == 0 and trained() == ["mnrl"], done.stderr
    assert (
        house / ".work/smoke/data/ablation-loss"
    ).read_text().split() == page.read_text().split()

    done = repro("smoke", "--group=los")
    assert done.returncode == 1
    assert done.stderr == "unknown group of smoke 'los'; did you mean 'loss'?\n"


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
    assert (
        done.returncode == 1
        and done.stderr == "another run at smoke is at work in .work/smoke: wait until it ends\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killing_the_run_kills_the_kernel(house):
    cells = [
        new_code_cell('profile = out = "a"', metadata={"tags": ["parameters"]}),
        new_code_cell(
            "import os, sys\nprint('kernel', os.getpid(), file=sys.stderr)\n"
            "while True: sum(range(1000))"
        ),
    ]
    nbformat.write(new_notebook(cells=cells), house / "notebooks" / "00_a.ipynb")
    (house / "dvc.yaml").write_text(
        "stages:\n  endless:\n    cmd: python -m lib.pipeline strip notebooks data/source"
        " && python -m lib.pipeline run 00_a endless --profile smoke && echo\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "lib.pipeline", "repro", "smoke"], stderr=subprocess.PIPE, text=True
    )
    pid = next(int(line.split()[1]) for line in run.stderr if line.startswith("kernel "))
    run.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert repro("smoke", "--dry").returncode == 0  # and its locks are gone with it


# ------------------------------------------------------------------ a collection of one's own

DATA = """\
  data:
    cmd: python -c "from lib.pipeline import params;
      print(params.settings('${profile}', 'data')['source'])" >> "$COUNT"
      && mkdir -p data && echo > data/corpus
    deps: [lib/pipeline/params.py]
    params: ['data.${profile}']
    outs: [data/corpus]
"""


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "Meine Sammlung, 1"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    return folder


def test_another_collection_runs_in_a_folder_of_its_own_and_is_looked_at_again_when_it_changes(
    house, mine
):
    replace(house / "dvc.yaml", "stages:\n", "stages:\n" + DATA)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    rows = list(params.rows("smoke", "retrievers"))
    done = repro("smoke", "--data", str(mine), "--set=finetune.seeds=[7] data.vocabulary=99")
    assert done.returncode == 0, done.stderr
    assert sorted(trained()) == sorted([*str(mine).split(), *rows])
    page = re.search(r"see (\S+)", done.stdout)[1]
    assert (
        re.fullmatch(r"data/report/smoke-meine-sammlung-1-[0-9a-f]{6}/index.html", page)
        and (house / page).is_file()
    )
    assert (
        git("status", "--porcelain") == ""
        and not (house / "dvc.lock").exists()
        and not (house / ".work/smoke").exists()
    )
    work = params.load(house / ".work" / Path(page).parts[2] / "params.yaml")
    assert (
        work["data"]["smoke"]["source"],
        work["data"]["smoke"]["pretraining"]
        if "pretraining" in work["data"]["smoke"]
        else "embedded",
    ) == (str(mine), "embedded")
    assert (work["finetune"]["smoke"]["seeds"], work["data"]["smoke"]["vocabulary"]) == ([7], 99)

    again = ("smoke", f"--data={mine}", "--set", "finetune.seeds=[7]", "--set=data.vocabulary=99")
    assert repro(*again).returncode == 0 and trained() == []
    (mine / "a.txt").write_text("another")
    assert (
        repro(*again).returncode == 0 and trained() == str(mine).split()
    )  # the stage data, and what came of it is the same
    assert repro("smoke").returncode == 0
    assert sorted(trained()) == sorted(["embedded", *rows])  # the embedded run is another one
    assert main(["report", "smoke", f"--data={mine}"]) == 0


def test_a_relative_folder_is_one_and_the_same(house, mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    assert profile.options([f"--data={mine.name}", "--text", "./" + mine.name, "data"]) == (
        {"data": str(mine), "text": str(mine)},
        ["data"],
    )
    monkeypatch.setenv("HOME", str(mine.parent))
    assert profile.options([f"--data=~/{mine.name}"])[0] == {"data": str(mine)}


def test_two_folders_of_one_name_do_not_share_a_run(house, tmp_path):
    places = []
    for parent in ("a", "b"):
        (tmp_path / parent / "ä ö").mkdir(parents=True)
        places.append(
            profile.folder(
                house, "laptop", profile.options(["--data", str(tmp_path / parent / "ä ö")])[0]
            )
        )
    assert places[0] != places[1] and {place.parent for place in places} == {house / ".work"}
    assert profile.folder(house, "laptop", {"data": "hub"}) == house / ".work" / "laptop-hub"
    assert profile.folder(house, "laptop", {"text": "/x"}) == house / ".work" / "laptop-embedded"


def test_a_relative_remote_is_the_roots_wherever_the_run_is(house):
    (house / ".dvc" / "config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n    url = ../../storage\n"
        "['remote \"web\"']\n    url = https://x.invalid/y\n"
    )
    assert repro("smoke").returncode == 0
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "list"],
        cwd=house / ".work/smoke",
        text=True,
        capture_output=True,
    ).stdout
    assert (
        re.search(rf"^store\s+{re.escape(str(house.parent / 'storage'))}\b", listed, re.M)
        and "https://x.invalid/y" in listed
    )


@pytest.mark.parametrize(
    "said, place",
    [
        ("~/cache", "~/cache"),
        ("/x/cache # shared", "/x/cache"),
        ("../kept", "kept"),
        (None, ".dvc/cache"),
    ],
)
def test_the_cache_is_where_dvc_has_it(house, monkeypatch, said, place):
    monkeypatch.setenv("HOME", str(house.parent))
    if said:
        (house / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {said}\n")
    (house / ".work/smoke/.dvc").mkdir(parents=True)
    profile.configure(house, house / ".work/smoke")
    cache = Config(house / ".work/smoke/.dvc")["cache"]["dir"]
    assert Path(cache) == (house / Path(place).expanduser()).resolve()


def test_a_configuration_that_cannot_be_read_is_named(house, capsys):
    (house / ".dvc" / "config.local").write_text("nonsense\n[cache\n")
    assert main(["repro", "smoke"]) == 1
    said = capsys.readouterr().err
    assert "config.local" in said and said.count("\n") == 1


def test_a_folder_named_in_the_design_is_looked_at_again_too(house, mine):
    replace(house / "dvc.yaml", "stages:\n", "stages:\n" + DATA)
    replace(
        house / "params.yaml",
        "books: [512], natural",
        f"source: '{mine}', books: [512], natural",
    )
    assert repro("smoke").returncode == 0 and {*str(mine).split()} < {*trained()}
    (mine / "a.txt").write_text("another")
    assert repro("smoke").returncode == 0 and trained() == str(mine).split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--data=hub", "--set=data.source=mine"],
            "data.laptop.source: 'mine' is none of embedded, hub, longembed and an absolute path",
        ),
        (
            ["--data=hub", "--set=data.pretraining=longembed"],
            "data.laptop.pretraining: 'longembed' is none of embedded, hub and an absolute path",
        ),
        (["--data=nowhere"], "DATA=nowhere: "),
        (["--data=hubb"], "did you mean 'hub'?"),
        (["--text=longembed"], "TEXT=longembed: "),
        (["--data="], "--data: says nothing; it wants a folder, hub, longembed"),
        (["--text"], "--text: says nothing; it wants a folder, hub"),
        (["--data=hub", "--set=finetune"], "SET=finetune: wants section.key=value"),
        (
            ["--data=hub", "--set=finetun.seed=1"],
            "SET=finetun.seed=1: unknown section 'finetun'; did you mean 'finetune'?",
        ),
        (
            ["--data=hub", "--set=finetune.allow_test_trainin=true"],
            "finetune.laptop: unknown key 'allow_test_trainin'; "
            "did you mean 'allow_test_training'?",
        ),
        (
            ["--data=hub", "--set=finetune.allow_test_training=ys"],
            "finetune.laptop.allow_test_training: unknown value 'ys'; there is false, true, always",
        ),
        (["smoek", "--data=hub"], "unknown profile or stage 'smoek'"),
    ],
)
def test_a_wrong_collection_or_setting_is_refused_before_anything_runs(
    house, arguments, message, capsys
):
    assert main(["repro", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (house / ".work").exists()


STAGES = {"data": None, "finetune": "retrievers", "report": None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("laptop", [])),
        (["smoke"], ("smoke", [])),
        (["smoke", "finetune@opl", "--single-item"], ("smoke", ["finetune@opl", "--single-item"])),
        (["finetune@bag"], ("laptop", ["finetune@bag"])),
        (["data"], ("laptop", ["data"])),
        (["--dry"], ("laptop", ["--dry"])),
        (["--glob", "finetune@reads*"], ("laptop", ["--glob", "finetune@reads*"])),
        (["dvc.yaml:data"], ("laptop", ["dvc.yaml:data"])),
    ],
)
def test_the_first_argument_is_a_profile_unless_it_is_a_stage_or_an_option(arguments, expected):
    assert profile.split(arguments, params.load(ROOT / "params.yaml"), STAGES) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smoek"], "unknown profile or stage 'smoek'; did you mean 'smoke'?"),
        (["finetun@opl"], "unknown profile or stage 'finetun@opl'"),
        (["smoke", "finetun@opl"], "unknown stage 'finetun'; did you mean 'finetune'?"),
        (["finetune@olp"], "unknown row of finetune at laptop 'olp'; did you mean 'opl'?"),
        (["smoke", "finetune@bag"], "unknown row of finetune at smoke 'bag'"),
        (["data@opl"], "unknown row of data at laptop 'opl'; there is none"),
    ],
)
def test_an_unknown_profile_stage_or_row_is_refused_before_anything_runs(arguments, message):
    with pytest.raises(ParamsError) as error:
        profile.split(arguments, params.load(ROOT / "params.yaml"), STAGES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_design_stops_the_run_before_its_first_stage(house):
    replace(house / "params.yaml", "start_2k, loss: opl,", "start_2k, loss: olp,")
    done = repro("smoke")
    assert done.returncode == 1 and trained() == [] and not (house / ".work").exists()
    assert (
        done.stderr
        == "params.yaml: retrievers.opl.loss: unknown value 'olp'; did you mean 'opl'?\n"
    )


def test_a_report_that_is_not_there_says_how_to_make_it(house, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(profile.webbrowser, "open", opened.append)
    assert main(["report", "smoke"]) == 1
    assert capsys.readouterr().err == "no report at smoke yet: make repro PROFILE=smoke\n"
    (house / "data/report/smoke").mkdir(parents=True)
    (house / "data/report/smoke/index.html").write_text("")
    assert (
        main(["report", "smoke"]) == 0
        and opened[0].startswith("file://")
        and opened[0].endswith("smoke/index.html")
    )
    assert main(["report", "smoke", "paper"]) == 1
    assert "takes one profile" in capsys.readouterr().err


# ------------------------------------------------------------------ several stages at a time


@pytest.mark.parametrize(
    "gpu, threads, per_gpu, expected",
    [(False, 1, 1, 16), (False, 2, 8, 8), (True, 2, 1, 1), (True, 2, 8, 8), (True, 4, 8, 4)],
)
def test_stages_have_cores_of_their_own_and_share_a_gpu_as_far_as_they_may(
    monkeypatch, gpu, threads, per_gpu, expected
):
    monkeypatch.setattr(schedule, "has_gpu", lambda: gpu)
    monkeypatch.setattr(schedule, "memory", lambda: 128 * 2**30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert schedule.at_once(threads, per_gpu) == expected


side_by_side = pytest.mark.skipif(
    schedule.at_once(1) < 2, reason="this machine has no room for two stages at a time"
)


@side_by_side
def test_stages_side_by_side_make_what_one_after_the_other_makes(house):
    """Of three rows and a page: each once, then nothing; then a row that has changed."""
    rows = ["reads_32k", "opl", "reads_warm"]
    together = repro("smoke")
    assert together.returncode == 0, together.stderr
    assert sorted(trained()) == sorted(rows)
    assert "[4 of 4] page" in together.stdout
    page = house / "data" / "report" / "smoke" / "index.html"
    assert page.read_text() == "".join(f"{row}.json\n" for row in sorted(rows))
    assert "of 4]" not in repro("smoke").stdout and trained() == []
    replace(house / "params.yaml", "opl: {pretrained: start_32k,", "opl: {pretrained: mixed_8k,")
    assert repro("smoke").returncode == 0
    assert trained() == ["opl"]


@side_by_side
def test_a_failure_among_stages_side_by_side_is_the_outcome(house):
    replace(house / "dvc.yaml", "echo ${key} > data", "test ${key} != opl && echo ${key} > data")
    outcome = repro("smoke")
    assert outcome.returncode not in (0, None)
    assert "train@opl | ERROR: failed to reproduce" in outcome.stderr
    assert not (house / "data" / "report" / "smoke" / "index.html").exists()


@side_by_side
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stages_side_by_side_end_with_us_and_nothing_new_begins(house, number):
    replace(
        house / "dvc.yaml",
        'cmd: echo ${key} >> "$COUNT"',
        'cmd: echo ${key} >> "$COUNT" && sleep 20',
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.pipeline", "repro", "smoke"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # What a shell has started with & ignores SIGINT, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    counted = Path(os.environ["COUNT"])
    deadline = time.monotonic() + 60
    while not (counted.exists() and len(counted.read_text().split()) == 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    if number == signal.SIGINT:  # Ctrl-C reaches the group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=15) != 0
    assert len(trained()) == 2
    assert not (house / ".work/smoke/data/report/smoke/index.html").exists()
