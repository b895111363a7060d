"""A stage that trains may be several processes, which run one notebook."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lib.pipeline.errors import TrainingError
from lib.training import ranks

ROOT = Path(__file__).parents[2]
CELLS = [
    "from pathlib import Path\n\nfrom lib.training import ranks\n\nranks.join(2)\n"
    "(together,) = ranks.total(ranks.rank() + 1)",
    "ranks.end_others()",
    "print(together)\n(Path(out) / 'alone').write_text('the first process')",
]


def run(house, *cells: str, processes: int = 2) -> subprocess.CompletedProcess:
    text = (house / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("processes: 1", f"processes: {processes}")
    (house / "params.yaml").write_text(text, encoding="utf-8")
    parameters = 'profile = "smoke"\nrow = "opl"\nout = "data/scratch"'
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    source = house / "data/source/09_a.ipynb"
    source.parent.mkdir(parents=True)
    nbformat.write(new_notebook(cells=[first, *map(new_code_cell, cells)]), source)
    command = "run 09_a finetune opl --profile smoke"
    return subprocess.run(
        [sys.executable, "-m", "lib.pipeline", *command.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_two_processes_share_a_notebook_and_the_first_one_writes_it(house):
    done = run(house, *CELLS)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(house / "data/executed/finetune-opl.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.startswith("3.0")
    assert [path.name for path in (house / "data").glob("alone")] == ["alone"]
    assert done.stdout.count("finetune-opl: ") == 1


def test_a_process_that_fails_fails_the_stage(house):
    done = run(house, CELLS[0], "assert ranks.rank() == 0, 'the second one'", *CELLS[1:])
    assert done.returncode == 1
    assert "the second one" in done.stderr
    assert done.stderr.rstrip().endswith("its message stands above")


def test_another_number_of_processes_than_the_settings_say_is_refused():
    with pytest.raises(TrainingError, match="compute.processes is 2, and this is one of 1"):
        ranks.join(2)
