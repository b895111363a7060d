"""Notebooks run to the same bytes, fail in one line, and leave no process behind."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.pipeline import notebook
from lib.pipeline.notebook import NotebookError

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCE = "data/source/09_a.ipynb"
PARAMETERS = 'profile = "smoke"\nrow = "opl"\nout = "data/scratch"'


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository folder with a space and an umlaut in its path, as working directory."""
    root = tmp_path / "höuse of notebooks"
    root.mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    monkeypatch.chdir(root)
    return root


def save(path: Path, *cells: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        new_notebook(
            cells=[
                new_markdown_cell("# 09 · A question?"),
                new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
                *map(new_code_cell, cells),
            ]
        ),
        path,
    )
    return path


def command(*arguments, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "lib.pipeline", *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def alive(pid: int) -> bool:
    """Running, and not merely waiting to be collected by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def soon(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


# ------------------------------------------------------------------ strip


def test_strip_gives_the_same_bytes_whatever_jupyter_left_in_the_notebook(tmp_path):
    path = save(tmp_path / "notebooks" / "00_a.ipynb", "1 + 1")
    (clean,) = notebook.strip(tmp_path / "notebooks", tmp_path / "source")
    before = clean.read_bytes()

    saved = nbformat.read(path, as_version=4)  # as JupyterLab saves it after a run
    saved.metadata = {
        "kernelspec": {"display_name": "my env", "name": "mine", "language": "python"},
        "language_info": {"name": "python", "version": "3.13.1"},
        "widgets": {},
    }
    saved.cells[2].outputs = [new_output("stream", text="2")]
    saved.cells[2].execution_count = 7
    saved.cells[2].metadata = {
        "execution": {"iopub.execute_input": "2026-01-01"},
        "collapsed": True,
        "trusted": True,
    }
    nbformat.write(saved, path)
    notebook.strip(tmp_path / "notebooks", tmp_path / "source")
    assert clean.read_bytes() == before
    notebook.strip(tmp_path / "source", tmp_path / "source")
    assert clean.read_bytes() == before
    assert nbformat.read(clean, as_version=4).cells[1].metadata == {"tags": ["parameters"]}
    nbformat.validate(nbformat.read(clean, as_version=4))


def test_cells_copied_with_their_id_get_one_of_their_own(tmp_path):
    path = save(tmp_path / "notebooks" / "00_a.ipynb", "1", "1")
    twice = json.loads(path.read_text())
    for cell in twice["cells"][2:]:
        cell["id"] = "same"
    path.write_text(json.dumps(twice))
    (clean,) = notebook.strip(path.parent, path.parent)
    ids = [cell["id"] for cell in json.loads(clean.read_text())["cells"]]
    assert len(set(ids)) == len(ids) and "same" in ids


def test_a_copy_goes_when_its_notebook_goes_and_a_broken_notebook_changes_nothing(tmp_path):
    save(tmp_path / "notebooks" / "00_a.ipynb")
    gone = save(tmp_path / "notebooks" / "01_b.ipynb")
    notebook.strip(tmp_path / "notebooks", tmp_path / "source")
    gone.unlink()
    notebook.strip(tmp_path / "notebooks", tmp_path / "source")
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["00_a.ipynb"]

    for text in ("", "{", "[]", '{"cells": 3}'):
        gone.write_text(text)
        with pytest.raises(NotebookError, match="01_b.ipynb: is not a notebook") as error:
            notebook.strip(tmp_path / "notebooks", tmp_path / "source")
        assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["00_a.ipynb"]
    with pytest.raises(NotebookError, match="is not a folder"):
        notebook.strip(tmp_path / "nowhere", tmp_path / "source")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_are_stripped_and_say_who_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert text == notebook.dumps(notebook.bare(notebook.read(path))), (
        "run `python -m lib.pipeline strip --in-place notebooks`"
    )
    cells = json.loads(text)["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    identity = {
        target.id: ast.literal_eval(line.value)
        for cell in cells
        if "parameters" in cell["metadata"].get("tags", [])
        for line in ast.parse("".join(cell["source"])).body
        for target in getattr(line, "targets", None) or [line.target]
    }
    assert (
        identity.keys() <= {"profile", "row", "out"}
        and identity["profile"] == "smoke"
        and identity["out"] == "data/scratch"
    )
    for cell in cells:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), f"{path.name} {cell['id']}", "exec")


# ------------------------------------------------------------------ run

NOISY = """\
import os, random, sys, time, warnings
print(os.getcwd(), sys.executable, object())
for part in range(3):
    print(part, end=" ")
    sys.stdout.flush()
    time.sleep(random.random() / 5)                # where the stream is cut
    print("on", "stderr:", os.environ["HOME"], file=sys.stderr)
print("\\n1 %", end="\\r"); print("100 %")
warnings.warn("with a " + "path in it")
print(hash("the same"), os.environ["MALLOC_MMAP_MAX_"], os.environ["MALLOC_TRIM_THRESHOLD_"])
lambda: 0
"""
FIGURE = """\
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats
plt.rcParams["svg.hashsalt"] = "fixed"
set_matplotlib_formats("svg")
plt.plot([1, 2])
plt.show()
"""


def test_two_runs_give_the_same_bytes_and_keep_the_figure(house):
    save(house / SOURCE, NOISY, FIGURE, "f'{profile} {row} {out}'")
    executed = house / "data/executed"
    executed.mkdir()
    row = 'it\'s "$HOME"'
    (executed / f"a-{row}.failed.ipynb").write_text("of a run that failed; this one will not")
    first = command("run", "09_a", "a", row, "--profile=laptop")
    second = command(
        "run",
        "09_a",
        "b",
        row,
        "--profile=laptop",
        env={
            "TZ": "Asia/Tokyo",
            "LC_ALL": "C",
            "HOME": "/proc/nowhere",
            "PYTHONHASHSEED": "77",
            "MPLBACKEND": "agg",
            "COLUMNS": "40",
        },
    )
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "on stderr" in err and re.search(r"\d s, \d.*GiB", out)  # shown, but not kept
    a, b = ((executed / f"{name}-{row}.ipynb").read_text(encoding="utf-8") for name in "ab")
    assert a == b
    for trace in ("on stderr", "with a path", str(house), str(ROOT), "0x7", "papermill", "2026"):
        assert trace not in a, trace
    page = nbformat.reads(a, as_version=4)
    nbformat.validate(page)
    noisy, figure, identity = page.cells[3:6]
    assert noisy.outputs[0].text.splitlines()[1:3] == ["0 1 2 ", "100 %"] and noisy.outputs[
        0
    ].text.endswith(f" 0 {16 * 2**30}\n")
    assert "image/svg+xml" in figure.outputs[0].data
    assert identity.outputs[0].data["text/plain"] == repr('laptop it\'s "$HOME" data')

    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_notebook_node(page)
    assert "data:image/svg+xml" in html and "100 %" in html
    timings = house / "data/report/laptop/timings/stages"
    cost = json.loads((timings / f"a-{row}.json").read_text())
    assert cost["stage"] == f"a-{row}" and 0 < cost["seconds"] < 120 and 0.02 < cost["peak_gib"] < 2
    assert not list(executed.glob(".*")) and not list(executed.glob("*failed*"))


def test_a_notebook_that_measures_is_written_to_the_timings(house):
    save(house / SOURCE, "1")
    done = command("run", "09_a", "efficiency", "--profile=laptop", "--measured")
    assert done.wait(60) == 0, done.communicate()
    assert (house / "data/report/laptop/timings/efficiency.ipynb").is_file()
    assert not (house / "data/executed/efficiency.ipynb").exists()


def test_a_failing_cell_is_one_line_and_the_notebook_so_far_is_kept(house):
    save(
        house / SOURCE,
        "from lib.pipeline.params import ParamsError\nprint('reached')",
        "raise ParamsError('unknown row\\n in \"opll\"')",
        "print('never')",
    )
    (house / "data/executed").mkdir()
    (house / "data/executed" / "a-opll.ipynb").write_text("of an earlier run")
    process = command("run", "09_a", "a", "opll", "--profile=laptop")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith(
        '09_a (profile=laptop, out=data, row=opll): ParamsError: unknown row in "opll", in cell 4 ('
    ) and line.endswith("all of it in data/executed/a-opll.failed.ipynb")
    kept = (house / "data/executed" / "a-opll.failed.ipynb").read_text(encoding="utf-8")
    assert "reached" in kept and "Traceback" in kept and str(house) not in kept
    assert (house / "data/executed" / "a-opll.ipynb").read_text() == "of an earlier run"


def test_a_failing_import_is_the_mistake_of_its_cell(house):
    save(house / SOURCE, "1", "import numpy as np\nfrom lib.pipeline import nothing")
    process = command("run", "09_a", "a", "--profile=laptop")
    _, err = process.communicate(timeout=60)
    (line,) = err.splitlines()
    assert process.returncode == 1 and "ImportError: cannot import name 'nothing'" in line
    assert "in cell 4 (" in line


def test_a_kernel_ends_after_its_threads_and_exit_functions(house):
    cell = """
import atexit, threading, time
atexit.register(lambda: open("left", "a").write("exit"))
def work():
    time.sleep(1)
    open("left", "a").write("thread ")
threading.Thread(target=work).start()
"""
    save(house / SOURCE, cell)
    done = command("run", "09_a", "a", "--profile=laptop")
    assert done.wait(60) == 0, done.communicate()
    assert (house / "left").read_text() == "thread exit"


def test_a_kernel_killed_by_the_system_is_told_from_a_mistake(house):
    save(house / SOURCE, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    process = command("run", "09_a", "a", "--profile=laptop")
    _, err = process.communicate(timeout=60)
    (line,) = err.splitlines()
    assert process.returncode == 1 and "killed by the system" in line and "out of memory" in line
    assert (house / "data/executed" / "a.failed.ipynb").is_file()
    assert not (house / "data/executed" / "a.ipynb").exists()


ENDLESS = (
    "import os, sys, time\nprint('kernel', os.getpid(), file=sys.stderr)\n"
    "while True: sum(range(1000))"
)


def kernel_of(process: subprocess.Popen) -> int:
    """Wait for the kernel's line on stderr: it comes through while the cell still runs."""
    for line in process.stderr:
        if line.startswith("kernel "):
            return int(line.split()[1])
    raise AssertionError(f"ended with {process.wait()}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_kernel_outlives_its_run(house):
    save(house / SOURCE, ENDLESS)
    runs = {
        name: command("run", "09_a", name, "--profile=laptop")
        for name in ("SIGINT", "SIGTERM", "SIGKILL")
    }
    shell = subprocess.Popen(
        [
            "sh",
            "-c",
            '"$@"; true',
            "sh",
            sys.executable,
            "-m",
            "lib.pipeline",
            "run",
            "09_a",
            "shell",
            "--profile=laptop",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stderr=subprocess.PIPE,
    )
    kernels = {name: kernel_of(process) for name, process in (runs | {"shell": shell}).items()}
    assert all(map(alive, kernels.values()))
    for name, process in runs.items():
        process.send_signal(getattr(signal, name))
    shell.kill()  # as DVC is killed: the run itself gets no signal
    for name, pid in kernels.items():
        assert soon(lambda pid=pid: not alive(pid), 3 if name != "shell" else 5), (
            f"{name}: the kernel runs on"
        )
    for name in ("SIGINT", "SIGTERM"):
        _, err = runs[name].communicate(timeout=30)
        assert runs[name].returncode == 130 and f"stopped by {name} in cell" in err.splitlines()[-1]
        assert (house / "data/executed" / f"{name}.failed.ipynb").is_file()
    executed = list((house / "data/executed").iterdir())
    assert all(path.name.endswith(".failed.ipynb") for path in executed)
    runs["SIGKILL"].wait(timeout=10)


TRAINING = """\
import os, sys, time
from pathlib import Path
from lib.training.resume import signals
with signals() as stop:
    print('kernel', os.getpid(), file=sys.stderr)
    while not stop:
        time.sleep(0.05)
    Path(out, 'checkpoints', 'finetune', row, 'key', '7').mkdir(parents=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_leaves_a_training_time_for_its_checkpoint_and_says_how_to_go_on(house):
    save(house / SOURCE, TRAINING)
    process = command("run", "09_a", "finetune", "opl", "--profile=laptop")
    kernel = kernel_of(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not alive(kernel)
    assert "stopped by SIGTERM in cell 3" in err.splitlines()[-1]
    assert "; `make repro` goes on after step 7; all of it in" in err.splitlines()[-1]


# ------------------------------------------------------------------ parts


def test_text_loses_what_belongs_to_one_run(house):
    assert (
        notebook.scrub_text(
            f"<object at 0x7f12ab34cd56> in {house}/data, {Path.home()}/x and {house}"
        )
        == "<object at 0x…> in ./data, ~/x and ."
    )
    assert (
        notebook.scrub_text('<table id="T_ab12f"><td id="T_ab12f_row0">')
        == '<table id="T_00000"><td id="T_00000_row0">'
    )
    assert (
        notebook.scrub_text("mask 0x7f, color #ab12ff, T_total")
        == "mask 0x7f, color #ab12ff, T_total"
    )
    assert notebook.overwritten("a\n 1%\r 2%\r\nb") == "a\n 2%\nb"


# ------------------------------------------------------------------ what others met


def run_of(house, *cells, **environment):
    save(house / SOURCE, 'profile = "smoke"', *cells)
    done = command("run", "09_a", "a", "--profile=laptop", env=os.environ | environment)
    _, err = done.communicate(timeout=120)
    return done.returncode, err.strip().splitlines()


def test_a_cell_that_ends_the_notebook_is_no_success(house):
    """The cells behind it have not run, which papermill takes for done."""
    code, said = run_of(house, "import sys\nsys.exit(0)", "print('behind')")
    assert (
        code == 1
        and "in cell 4 (" in said[-1]
        and "ended the notebook before its end" in said[-1]
        and not (house / "data/executed/a.ipynb").exists()
    )


def test_a_magic_that_is_not_there_is_said_in_words(house):
    code, said = run_of(house, "%nosuchmagic")
    assert code == 1 and "the cell failed" in said[-1] and "in cell 4" in said[-1]


def test_a_temporary_folder_may_have_braces_in_its_name(house, tmp_path):
    (tmp_path / "t{x}").mkdir()
    assert run_of(house, "print(1)", TMPDIR=str(tmp_path / "t{x}"))[0] == 0


def test_a_draft_that_was_cut_off_does_not_hide_the_reason(house, monkeypatch):
    def full(notebook, draft, *_):
        draft.write_text("{")
        raise OSError(28, "No space left on device")

    save(house / SOURCE)
    monkeypatch.setattr(notebook, "execute", full)
    with pytest.raises(NotebookError, match="No space left on device.*executed/a.failed.ipynb"):
        notebook.run("09_a", "a", None, "smoke")
