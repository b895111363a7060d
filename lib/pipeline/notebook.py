"""Notebooks as steps of a pipeline: equal bytes in, equal bytes out, no process left behind.

    strip(source, destination)              clean copies of a folder's notebooks
    run(notebook, stage, row, profile)      a stage of the pipeline, its paths by convention

A run executes a notebook with papermill and keeps of it what does not depend
on when, where and by whom it was run. If it fails, one line says in which cell
and why, and the notebook as far as it came is kept beside the output as
`<output>.failed.ipynb`.
"""

import ast
import atexit
import contextlib
import ctypes
import gc
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from lib.pipeline import files, params, processes
from lib.pipeline.errors import WorkbenchError, require

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KERNEL_ENVIRONMENT = {
    # glibc returns every large buffer to the system when it is freed, and the next FFT faults its
    # pages in again: about half the training speed. These two keep freed memory in the process.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    # How long a thread spins before it sleeps. The default starves the other thread if the machine
    # has anything else to do: steps took 1.4 times as long beside one busy process.
    "GOMP_SPINCOUNT": "1000",
    # oneDNN keeps the code of 1,024 matrix multiplications, one per length of a text: 0.7 GiB at
    # `laptop`. Keeping fewer costs no time.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    # Figures go into the notebook, whatever the caller's backend.
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "COLUMNS": "120",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's advice about widgets
    "SOURCE_DATE_EPOCH": "0",  # the date that matplotlib writes into a figure
    "TOKENIZERS_PARALLELISM": "true",  # a fork would switch it off, with a warning
}

# What kernels import before the first cell, if their notebook imports it.
PRELOADED = ("lib", "matplotlib", "numpy", "pandas", "torch", "transformers")

GRACE = 10.0  # seconds that a signal leaves a kernel to write a checkpoint of its training


class NotebookError(WorkbenchError):
    """A notebook cannot be read or run; the message is one line."""


# ------------------------------------------------------------------ reading and writing


def read(path: str | Path):
    """The notebook, in the newest format; every cell has an id of its own."""
    import nbformat

    content = Path(path).read_bytes()
    try:
        return nbformat.reads(json.dumps(identified(json.loads(content))), as_version=4)
    except Exception as error:  # nbformat raises a dozen kinds, all meaning this
        raise NotebookError(f"{path}: is not a notebook ({one_line(error)[:200]})") from None


def identified(notebook: dict) -> dict:
    """Give cells without an id, or with another cell's, the hash of their index and text."""
    seen: set[str] = set()
    for index, cell in enumerate(notebook["cells"]):
        if not cell.get("id") or cell["id"] in seen:
            text = f"{index} {''.join(cell['source'])}"
            cell["id"] = hashlib.sha256(text.encode()).hexdigest()[:8]
        seen.add(cell["id"])
    return notebook | {"nbformat_minor": max(5, notebook["nbformat_minor"])}


def dumps(notebook) -> str:
    """Sorted keys, one space of indent, a newline at the end: what Jupyter writes too."""
    import nbformat

    return nbformat.writes(notebook, version=4) + "\n"


def one_line(error: object) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())


# ------------------------------------------------------------------ strip


def strip(source: str | Path, destination: str | Path) -> list[Path]:
    """Write the clean copy of every notebook of a folder, and remove copies whose notebook is gone.

    Raises:
        NotebookError: there are no notebooks, or one cannot be read; nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    clean = {path.name: dumps(bare(read(path))) for path in sorted(source.glob("[!.]*.ipynb"))}
    require(clean, f"{source}: is not a folder with notebooks", NotebookError)
    destination.mkdir(parents=True, exist_ok=True)
    for stale in destination.glob("*.ipynb"):
        if stale.name not in clean:
            stale.unlink()
    for name, text in clean.items():
        target = destination / name
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            files.write(target, text)
    return [destination / name for name in clean]


def bare(notebook):
    """Without outputs, execution counts and metadata other than tags."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return without_metadata(notebook)


def without_metadata(notebook):
    """The notebook with no metadata but the tags of its cells."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": list(tags)} if tags else {}
    notebook.metadata, notebook.nbformat, notebook.nbformat_minor = METADATA, 4, 5
    return notebook


# ------------------------------------------------------------------ scrub


def scrub(notebook, keep_stderr: bool = False):
    """An executed notebook without what differs between two runs of the same thing.

    Removed: times, papermill's notes, widgets, stderr (warnings with paths, progress bars).
    Rewritten: absolute paths, memory addresses, random ids of styled tables. Merged: streams, which
    are cut as the machine's speed has it. Figures, tables and printed text stay.
    """
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.id = "injected-parameters"
        if cell.cell_type == "code":
            kept = [o for o in cell.outputs if keep_stderr or o.get("name") != "stderr"]
            cell.outputs = merged(kept)
            for output in cell.outputs:
                scrub_output(output)
    return without_metadata(notebook)


def merged(outputs: list) -> list:
    """Neighbouring streams of one name as one, and no widgets."""
    kept: list = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def scrub_output(output) -> None:
    if output.output_type == "stream":
        output.text = scrub_text(overwritten(output.text))
    elif output.output_type == "error":
        output.evalue = scrub_text(output.evalue)
        output.traceback = [scrub_text(line) for line in output.traceback]
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and (kind.startswith("text/") or kind == "image/svg+xml"):
            output.data[kind] = scrub_text(value)


def scrub_text(text: str) -> str:
    """No absolute path, no memory address, no random table id."""
    places = {sys.prefix: "<python>", str(params.root()): ".", tempfile.gettempdir(): "<tmp>"}
    for place, name in (*places.items(), (str(Path.home()), "~")):
        if len(place) > 1:
            text = re.sub(rf"(?<![\w.]){re.escape(place)}(?=[/\s'\":,)\]]|$)", name, text)
    text = re.sub(r"\bat 0x[0-9a-fA-F]{6,}", "at 0x…", text)
    for number, name in enumerate(dict.fromkeys(re.findall(r"\bT_[0-9a-f]{5}\b", text))):
        text = text.replace(name, f"T_{number:05d}")
    return text


def overwritten(text: str) -> str:
    """What a terminal shows after carriage returns: `1%\\r2%\\n` is `2%`."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


# ------------------------------------------------------------------ run


def run(
    notebook: str, stage: str, row: str | None, profile: str, measured: bool = False
) -> dict[str, str | float]:
    """Run data/source/<notebook>.ipynb in the root folder, as a stage or as one row of a stage.

    It is written, scrubbed, to data/executed/<stage>-<row>.ipynb, whole or not at all, and its cost
    to stages/<stage>-<row>.json of the profile's timings: {"stage", "seconds", "peak_gib": the
    kernel's largest resident memory}. A notebook that shows what it `measured` differs from run to
    run, so it goes to the timings too.

    Raises:
        NotebookError: one line; the notebook as far as it came is `<stage>-<row>.failed.ipynb`.
    """
    data, name = params.root() / "data", f"{stage}-{row}" if row else stage
    timings = data / "report" / profile / "timings"
    output = (timings if measured else data / "executed") / f"{name}.ipynb"
    source = bare(read(data / "source" / f"{notebook}.ipynb"))
    given = {"profile": profile, "out": "data"} | ({"row": row} if row else {})
    if processes.is_follower():
        processes.follow(source, given)
        return {"stage": name}
    started = time.monotonic()
    # A private folder whose path is short enough for sockets (104 characters).
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 70 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="nb-", dir=base, ignore_cleanup_errors=True) as folder:
        draft, begun = Path(folder) / "notebook.ipynb", []
        try:
            files.write(output, dumps(scrub(execute(source, draft, given, begun))))
        except (Exception, KeyboardInterrupt) as error:
            values = ", ".join(f"{key}={value}" for key, value in given.items())
            kept = keep(output.with_suffix(".failed.ipynb"), draft, source)
            kind = Stopped if isinstance(error, KeyboardInterrupt) else NotebookError
            reason = explanation(error, begun) + resumption(row, error)
            raise kind(f"{notebook} ({values}): {reason}; {kept}") from None
    output.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # getrusage: bytes there, KiB here
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
    seconds = round(time.monotonic() - started, 1)
    cost = {"stage": name, "seconds": seconds, "peak_gib": round(peak, 2)}
    files.write(timings / "stages" / f"{name}.json", json.dumps(cost, indent=1) + "\n")
    return cost


def keep(failed: Path, draft: Path, notebook) -> str:
    """Write the notebook as far as it came; where it is, for the message."""
    try:
        reached = read(draft)
    except (OSError, NotebookError):  # not begun, or cut off by a full disk: not the reason
        reached = notebook
    try:
        files.write(failed, dumps(scrub(reached, keep_stderr=True)))
    except OSError as error:
        return f"{shown(failed)} could not be written ({error.strerror})"
    return f"all of it in {shown(failed)}"


def execute(notebook, draft: Path, values: dict, begun: list[str]):
    """The executed notebook. Cell by cell, `draft` is kept up to date and `begun` gets an id."""
    root = params.root()
    os.environ.update(
        KERNEL_ENVIRONMENT,
        PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        IPYTHONDIR=str(draft.parent / "ipython"),
        JUPYTER_RUNTIME_DIR=str(draft.parent),
    )
    import papermill

    # papermill would say in many lines what `explanation` says in one.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    executed = papermill.execute_notebook(
        notebook,
        str(draft).replace("{", "{{").replace("}", "}}"),  # it fills braces with parameters
        values,
        kernel_name="python3",
        progress_bar=False,
        cwd=root,
        start_timeout=300,
        stderr_file=Terminal(),
        kernel_manager_class=kernel_manager(draft.parent, imports(notebook)),
        iopub_timeout=60,
        on_cell_execute=lambda cell, cell_index: begun.append(cell.id),
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    ended = any(output.get("ename") == "SystemExit" for output in outputs)  # papermill's success
    message = "a cell ended the notebook before its end: take sys.exit() out"
    require(not ended, message, NotebookError)
    return executed


def imports(notebook) -> str:
    """What a notebook imports of PRELOADED: one statement a line."""
    found = []
    for cell in notebook.cells:
        with contextlib.suppress(SyntaxError):  # a magic, or a mistake that the cell will report
            found += ast.parse(cell.source).body if cell.cell_type == "code" else []
    lines = [ast.unparse(s) for s in found if isinstance(s, (ast.Import, ast.ImportFrom))]
    return "\n".join(line for line in lines if re.split(r"[ .]", line)[1] in PRELOADED)


def kernel_manager(folder: Path, preloaded: str) -> type:
    """A manager of kernels that end with us; it talks through sockets in a private folder, since
    kernels race for TCP ports."""
    from jupyter_client import AsyncKernelManager
    from traitlets import CaselessStrEnum, Unicode

    class Kernel(AsyncKernelManager):
        transport = CaselessStrEnum(["tcp", "ipc"], default_value="ipc")
        connection_file = Unicode(str(folder / "k.json"))

        def format_kernel_cmd(self, extra_arguments=None):
            command = [sys.executable, "-m", "lib.pipeline", "kernel", preloaded]
            return [*command, "-f", self.connection_file, *(extra_arguments or [])]

        async def start_kernel(self, **options):
            await super().start_kernel(**options)
            kernels.append(self.provisioner.process)

    kernels: list[subprocess.Popen] = []
    stop_with(kernels, folder)
    return Kernel


def explanation(error: BaseException, begun: list[str]) -> str:
    """What went wrong and in which cell, in one line."""
    kind, reason = type(error).__name__, error
    where = f"in cell {len(begun)} ({begun[-1]!r})" if begun else "before the first cell"
    if isinstance(error, NotebookError):
        return f"{error}, {where}"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {error} {where}"
    if kind == "DeadKernelError":
        return (
            f"the kernel was killed by the system {where}, often out of memory: "
            "lower batch_tokens, micro_batch_tokens or the profile's lengths"
        )
    if kind == "PapermillExecutionError":
        kind, reason = error.ename, error.evalue
    if kind == "CellExecutionError" and not reason:  # a magic that is not there
        return f"the cell failed; what it said stands in its output, {where}"
    return f"{kind}: {one_line(reason)[:600]}, {where}"


def resumption(row: str | None, error: BaseException) -> str:
    """Where training goes on next time, if the row has checkpoints (lib/training/resume.py)."""
    if getattr(error, "ename", "") == "TrainingError":  # it would come again
        return ""
    folder = params.root() / "data" / "checkpoints"
    steps = [path for path in folder.glob(f"*/{row}/**/*") if path.name.isdigit()]
    if not steps:
        return ""
    newest = max(steps, key=lambda path: path.stat().st_mtime)
    return f"; `make repro` goes on after step {newest.name}"


def shown(path: Path) -> str:
    """The path from the repository's folder, in which a work folder is .work/<name>."""
    root = params.root()
    root = root.parent.parent if root.parent.name == ".work" else root
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


class Terminal:
    """The kernel's stderr, live; progress bars only where there is a terminal to redraw them."""

    def __init__(self):
        self.rest = ""

    def write(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(text)
            return
        *lines, self.rest = (self.rest + text).split("\n")
        sys.stderr.writelines(f"{line}\n" for line in map(overwritten, lines) if line.strip())

    def flush(self) -> None:
        sys.stderr.flush()


# ------------------------------------------------------------------ no process left behind


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a signal to end: asyncio lets nothing but a KeyboardInterrupt through."""


def stop_with(kernels: list[subprocess.Popen], folder: Path) -> None:
    """End the kernels at a signal, and when our parent is gone (kill -9 of DVC sends no signal).

    The second signal leaves them no time.
    """
    before, grace = parents(), [GRACE]

    def on_signal(number, _) -> None:
        end(kernels, grace.pop() if grace else 0)
        raise Stopped(signal.Signals(number).name)

    def watch() -> None:
        while parents() == before:
            time.sleep(0.5)
        end(kernels, 1.5)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    threading.Thread(target=watch, daemon=True).start()


def end(kernels: list[subprocess.Popen], seconds: float) -> None:
    """Ask kernels to end, and end them after `seconds`; one that trains writes a checkpoint."""

    def send(number: int) -> None:
        for kernel in kernels:
            try:
                os.killpg(kernel.pid, number)  # a kernel leads its own process group
            except ProcessLookupError:
                pass

    send(signal.SIGTERM)
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(kernel.poll() is None for kernel in kernels):
        time.sleep(0.05)
    send(signal.SIGKILL)


def parents() -> tuple[int, ...]:
    """Our parent and, if it can be read, its parent: DVC may put a shell in between."""
    parent = os.getppid()
    try:
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return (parent,)


def kernel(arguments: list[str]) -> None:
    """What the kernel process runs: IPython's kernel, which the system ends with its parent.

    Args:
        arguments: the imports of its notebook, then the kernel's own arguments.
    """
    preloaded, *arguments = arguments
    parent = int(os.environ.get("JPY_PARENT_PID", 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent and os.getppid() != parent:  # it ended before we could say so
        os._exit(1)
    atexit.register(leave)
    from ipykernel.kernelapp import IPKernelApp

    # IPython would report the interrupt that ends it as an error.
    app = IPKernelApp.instance()
    app.initialize([*arguments, "--log-level=CRITICAL"])
    preload(preloaded)
    app.start()


def preload(statements: str) -> None:
    """Import what a notebook will import. An import that fails does so again in its cell.

    The collector would look for garbage among a million objects that stay: a second of a stage.
    They are frozen, so that it never looks at them later either.
    """
    gc.disable()
    for statement in statements.splitlines():
        with contextlib.suppress(Exception):
            exec(statement, {})
    gc.freeze()
    gc.enable()


def leave() -> None:
    """End without taking the modules apart: 2 s of every stage that has imported transformers.

    Python has waited for threads, and whatever registered with atexit after us has run.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(0)
