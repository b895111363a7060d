"""Stages that run side by side do so in an order, and up to a number, that the pipeline allows."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import pytest

from lib.pipeline import schedule
from lib.pipeline.schedule import Plan

#   data -> a -> b -> page,   data -> c -> page
NEEDS = {"data": set(), "a": {"data"}, "b": {"a"}, "c": {"data"}, "page": {"b", "c"}}


class Toys:
    """Stages that take some time, or fail; their processes in the order of their beginning."""

    def __init__(self, seconds=0.15, failing=()):
        self.seconds, self.failing, self.processes = seconds, failing, {}

    def __call__(self, stage: str) -> subprocess.Popen:
        code = (
            f"import sys, time; time.sleep({self.seconds}); sys.exit({3 * (stage in self.failing)})"
        )
        self.processes[stage] = subprocess.Popen(
            [sys.executable, "-S", "-c", f"print('{stage} is here'); {code}"],
            stdout=subprocess.PIPE,
        )
        return self.processes[stage]

    def alive(self) -> int:
        return sum(process.poll() is None for process in self.processes.values())


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_a_stage_waits_for_what_it_needs_and_for_room(jobs):
    toys, most = Toys(), []

    def start(stage):
        running = toys.alive()
        assert all(toys.processes[one].poll() == 0 for one in NEEDS[stage])
        most.append(running + 1)
        return toys(stage)

    assert schedule.ahead(Plan(NEEDS), jobs, start) == 0
    assert sorted(toys.processes) == sorted(NEEDS)
    assert max(most) == min(jobs, 2)  # two at most have what they need


def test_those_come_first_for_which_most_seconds_wait():
    toys = Toys(0)
    needs = {"short": set(), "long": set(), "chain": set(), "end": {"chain"}}
    seconds = {"short": 1, "long": 50, "chain": 5, "end": 60}
    assert Plan(needs, seconds=seconds).urgency() == {
        "short": 1,
        "long": 50,
        "chain": 65,
        "end": 60,
    }
    schedule.ahead(Plan(needs, seconds=seconds), 1, toys)
    assert list(toys.processes) == ["chain", "end", "long", "short"]


def test_a_stage_that_measures_has_the_machine_to_itself():
    names = ["a", "b", "measures", "c", "d"]
    toys, beside = Toys(), {}

    def start(stage):
        beside[stage] = {one for one, process in toys.processes.items() if process.poll() is None}
        return toys(stage)

    plan = Plan({name: set() for name in names}, alone={"measures"})
    assert schedule.ahead(plan, 3, start) == 0
    assert not beside["measures"]
    assert not any("measures" in others for others in beside.values())


def test_after_a_failure_nothing_begins_and_what_runs_is_waited_for(capsys):
    toys, started = Toys(failing={"bad"}), time.monotonic()
    needs = {"bad": set(), "slow": set(), "after": {"slow"}, "follows": {"bad"}}

    def start(stage):
        toys.seconds = 0.6 if stage == "slow" else 0.1
        return toys(stage)

    assert schedule.ahead(Plan(needs), 2, start) == 3
    assert set(toys.processes) == {"bad", "slow"}
    assert toys.processes["slow"].poll() == 0 and time.monotonic() - started > 0.5
    assert "bad failed; waiting for slow" in capsys.readouterr().err


def test_lines_stand_under_their_stage_without_what_dvc_adds(capsys):
    said = ("Running stage 'a':", "> python", "", "\r 10 %\r 90 %\rloss 3.2", "\r   \r")
    schedule.show("finetune@opl", [f"{line}\n".encode() for line in said], sys.stdout)
    assert capsys.readouterr().out == "finetune@opl | loss 3.2\n"


def test_what_is_needed_comes_with_a_target():
    assert schedule.ancestors(NEEDS, ["b"]) == {"data", "a", "b"}


def test_the_pipeline_has_one_stage_that_measures_and_a_plan_knows_it(tmp_path):
    root = Path(__file__).parents[2]
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy2(root / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    found = schedule.plan(tmp_path, [], tmp_path)
    assert found.alone == {"efficiency"} and found.needs["data"] == {"strip"}
    row = schedule.plan(tmp_path, ["evaluate@opl"], tmp_path).needs
    assert set(row) == {"strip", "data", "pretrain@start_2k", "finetune@opl", "evaluate@opl"}
    assert set(schedule.plan(tmp_path, ["finetune"], tmp_path).needs) > {"finetune@opl"}


def test_a_reader_that_has_gone_stops_no_stage(monkeypatch):
    """`make repro | head`: the lines go nowhere, the stages go on."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        process = Toys(0)("a")
        ended = SimpleQueue()
        schedule.watch("a", process, ended)
        monkeypatch.undo()
        assert ended.get(timeout=5) == ("a", 0)
        with suppress(OSError):
            gone.close()
