"""Several processes for a stage that trains (`compute.processes`): torchrun starts them.

    count(profile, stage)      the number of processes of a stage on this machine
    launch(count, arguments)   `python -m lib.pipeline run …` in so many processes
    is_follower()              whether this process is not the first one
    follow(notebook, values)   the code of a notebook, as every process but the first runs it

The first process executes the notebook and writes what it shows. Each other one runs the same cells
in a folder that is thrown away, until `ranks.end_others()`, so all take part in one training loop.
"""

import contextlib
import os
import subprocess
import sys
import tempfile

from lib.pipeline import params
from lib.pipeline.errors import WorkbenchError, require

STAGES = ("pretrain", "continue", "distill", "finetune")


def count(profile: str, stage: str) -> int:
    """The number of processes to start; 1 if torchrun started this process already."""
    if stage not in STAGES or "TORCHELASTIC_RUN_ID" in os.environ:
        return 1
    return params.settings(profile, "compute")["processes"]


def launch(count: int, arguments: list[str]) -> None:
    """Run a command of lib.pipeline in `count` processes on this machine.

    Raises:
        WorkbenchError: one of them failed; what it said stands above.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={count}", "-m", "lib.pipeline", "run", *arguments]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # torchrun would warn
    code = subprocess.run(command, cwd=params.root(), env={**os.environ, **threads}).returncode
    message = f"one of {count} processes failed (exit code {code}); its message stands above"
    require(code == 0, message, WorkbenchError)


def is_follower() -> bool:
    """Whether torchrun started this process, and others before it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["RANK"]) > 0


def follow(notebook, values: dict) -> None:
    """Run the code cells of a notebook, with these parameters, and show nothing."""
    os.environ["MPLBACKEND"] = "Agg"
    names: dict = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            try:
                exec(compile(cell.source, f"cell {index}", "exec"), names)
            except SystemExit:
                return
            if "parameters" in cell.metadata.get("tags", ()):
                names |= values | {"out": out}
