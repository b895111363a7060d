"""Several stages at a time: a small model fills one core, and a machine has more.

    at_once(threads, per_gpu)     how many stages of so many threads this machine has room for
    plan(folder, targets, …)      the stages that are out of date, and what each waits for
    ahead(plan, jobs, start)      run them, up to `jobs` at a time

DVC runs one stage after the other, but lets other processes of its own work on other stages. So
each stage that is out of date, or may become so, is given to a `dvc repro --single-item` as soon as
all that it needs is there, those first that most seconds wait for. A stage with `meta: {alone:
true}` in dvc.yaml measures time and has the machine to itself. What is left for the plain `dvc
repro` that follows is to find everything up to date.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TextIO

MEMORY = 3 * 2**30  # bytes of the machine's memory for each thread of a stage
SECONDS = 30.0  # of a stage that has never run
# What DVC says around each stage.
CHATTER = (
    *("Running stage ", "> ", "Updating lock ", "Generating lock ", "Use `dvc push`"),
    *("To track the changes", "git add ", "To enable auto staging", "dvc config core.autostage"),
    *("Stage '", "Data and pipelines are up to date"),
    "WARNING: 'data/report/",  # … is empty: a kind of stage without rows
)


def at_once(threads: int, per_gpu: int = 1) -> int:
    """How many stages of `threads` threads this machine has the cores and the memory for.

    Args:
        per_gpu: the most on a machine with a GPU, since stages share its memory.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    room = max(1, min(cores, memory() // MEMORY) // threads)
    return min(room, per_gpu) if has_gpu() else room


def has_gpu() -> bool:
    """Whether the system has a driver of a GPU; torch, which would know, takes seconds to ask."""
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "kfd"))


def memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return machine


@dataclass
class Plan:
    """The stages to run. `needs`: of each stage, those among them that it waits for."""

    needs: dict[str, set[str]]
    alone: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)

    def urgency(self) -> dict[str, float]:
        """Of each stage: the seconds that it and the longest chain of stages behind it take."""
        found, behind = {}, dict.fromkeys(self.needs, 0.0)
        for stage in reversed([*TopologicalSorter(self.needs).static_order()]):
            found[stage] = self.seconds.get(stage, SECONDS) + behind[stage]
            for one in self.needs[stage]:
                behind[one] = max(behind[one], found[stage])
        return found


def plan(folder: Path, targets: list[str], timings: Path) -> Plan:
    """What `dvc repro` of these targets may have to run: what is out of date, and what follows it.

    Args:
        targets: stages, stage@row, or [] for all.
        timings: the folder of <stage>-<row>.json, with the seconds of earlier runs.

    Raises:
        DvcException: DVC cannot read the pipeline, or another DVC is at work on it.
    """
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        graph = repo.index.graph
        stages = {name_of(stage.addressing): stage for stage in graph}
        needs = {
            name: {name_of(one.addressing) for one in graph.successors(stage)}
            for name, stage in stages.items()
        }
        changed = {*map(name_of, repo.status())}
    wanted = ancestors(needs, [n for n in needs if not targets or {n, group(n)} & set(targets)])
    for name in TopologicalSorter(needs).static_order():
        if needs[name] & changed:
            changed.add(name)
    todo = changed & wanted
    return Plan(
        {name: needs[name] & todo for name in needs if name in todo},
        {name for name in todo if (stages[name].meta or {}).get("alone")},
        {name: seconds for name in todo if (seconds := measured(timings, name))},
    )


def name_of(address: str) -> str:
    """finetune@opl of .work/study/dvc.yaml:finetune@opl."""
    return address.rpartition(":")[2]


def group(stage: str) -> str:
    """finetune of finetune@opl."""
    return stage.partition("@")[0]


def ancestors(needs: dict[str, set[str]], stages: Iterable[str]) -> set[str]:
    """The stages and all that they need."""
    found: set[str] = set()
    rest = list(stages)
    while rest:
        stage = rest.pop()
        if stage not in found:
            found.add(stage)
            rest += needs[stage]
    return found


def measured(timings: Path, stage: str) -> float:
    """The seconds that a stage took when it last ran; 0 if nobody knows."""
    path = timings / f"{stage.replace('@', '-')}.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def ahead(plan: Plan, jobs: int, start: Callable[[str], subprocess.Popen]) -> int:
    """Run the stages of a plan, up to `jobs` at a time; the exit code of the first that fails.

    After a failure or Ctrl-C nothing new begins, and what runs is waited for.

    Args:
        start: begins one stage, whose process writes to pipes.
    """
    order = sorted(plan.needs, key=plan.urgency().__getitem__, reverse=True)
    sorter = TopologicalSorter(plan.needs)
    sorter.prepare()
    ready: list[str] = []
    running: dict[str, subprocess.Popen] = {}
    ended: SimpleQueue[tuple[str, int]] = SimpleQueue()
    begun = code = 0
    while sorter.is_active() and (running or not code):
        ready += sorter.get_ready()
        ready.sort(key=order.index)
        while ready and not code and room(running, ready[0], plan.alone, jobs):
            stage, begun = ready.pop(0), begun + 1
            print(f"[{begun} of {len(order)}] {stage}", flush=True)
            running[stage] = start(stage)
            Thread(target=watch, args=(stage, running[stage], ended), daemon=True).start()
        try:
            stage, result = ended.get()
        except KeyboardInterrupt:  # reaches the stages, too
            code = code or 130
            continue
        del running[stage]
        if result == 0:
            sorter.done(stage)
        elif not code:
            code = result
            waited = f"; waiting for {' and '.join(running)}" if running else ""
            print(f"{stage} failed{waited}", file=sys.stderr, flush=True)
    return code


def watch(stage: str, process: subprocess.Popen, ended: SimpleQueue) -> None:
    """Show what a stage writes, and say when it has ended, even if nobody reads us any more."""
    pipes = (process.stdout, sys.stdout), (process.stderr, sys.stderr)
    threads = [Thread(target=show, args=(stage, *pair), daemon=True) for pair in pipes]
    for thread in threads:
        thread.start()
    code = process.wait()
    for thread in threads:
        thread.join(timeout=5)  # what a stage that was ended has left behind may hold its pipes
    ended.put((stage, code))


def room(running: Iterable[str], stage: str, alone: set[str], jobs: int) -> bool:
    """Whether a stage may begin beside those that run."""
    running = set(running)
    return not running or (len(running) < jobs and stage not in alone and not running & alone)


def show(stage: str, lines: Iterable[bytes] | None, place: TextIO) -> None:
    """The lines of a stage, under its name; of a progress bar only what it leaves."""
    for line in lines or ():
        text = line.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
        if text and not text.strip().startswith(CHATTER):
            with suppress(OSError, ValueError):  # our own output is closed: the stage goes on
                print(f"{stage} | {text}", file=place, flush=True)
