"""Notebooks as steps of a pipeline: equal bytes in, equal bytes out, no process left behind.

    strip(source, destination)              clean copies of a folder's notebooks
    run_stage(notebook, stage, row, …)      a stage of the pipeline, its paths by convention
    run(source, output, given, timing)      one notebook

A run executes a notebook with papermill and keeps of it what does not depend
on when, where and by whom it was run. If it fails, one line says in which cell
and why, and the notebook as far as it came is kept beside the output as
`<output>.failed.ipynb`.
"""

import ast
import ctypes
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from lib.pipeline import files, params
from lib.pipeline.errors import WorkbenchError

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python"}
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
TYPES = {kind.__name__: kind for kind in (str, int, float, bool, list, dict)} | {"None": type(None)}


class NotebookError(WorkbenchError):
    """A notebook cannot be read or run; the message is one line."""


# ------------------------------------------------------------------ reading and writing


def read(path: str | Path):
    """The notebook, in the newest format; every cell has an id of its own."""
    import nbformat

    try:
        return nbformat.reads(
            json.dumps(identified(json.loads(Path(path).read_text(encoding="utf-8")))), as_version=4
        )
    except OSError as error:
        raise NotebookError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # nbformat raises a dozen kinds, all meaning this
        raise NotebookError(f"{path}: is not a notebook ({one_line(error)[:200]})") from None


def identified(notebook: dict) -> dict:
    """Ids for cells that were copied, or made before cells had ids: by place and text."""
    seen: set[str] = set()
    for place, cell in enumerate(notebook["cells"]):
        if not cell.get("id") or cell["id"] in seen:
            cell["id"] = hashlib.sha256(f"{place} {''.join(cell['source'])}".encode()).hexdigest()[
                :8
            ]
        seen.add(cell["id"])
    return notebook | {"nbformat_minor": max(5, notebook["nbformat_minor"])}


def dumps(notebook) -> str:
    """Sorted keys, one space of indent, a newline at the end: what Jupyter writes too."""
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def one_line(error: object) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())


# ------------------------------------------------------------------ strip


def strip(source: str | Path, destination: str | Path) -> list[Path]:
    """Write the clean copy of every notebook of a folder, and remove copies whose notebook is gone.

    Raises:
        NotebookError: no folder, no notebooks, or one cannot be read; nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        raise NotebookError(f"{source}: is not a folder")
    clean = {
        path.name: dumps(plain(bare(read(path)))) for path in sorted(source.glob("[!.]*.ipynb"))
    }
    if not clean:
        raise NotebookError(f"{source}: holds no notebooks")
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
        cell.metadata = {"tags": list(cell.metadata["tags"])} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def plain(notebook) -> dict:
    """As it is stored: text as a list of lines."""
    import nbformat

    return json.loads(nbformat.writes(notebook, version=4))


# ------------------------------------------------------------------ scrub


def scrub(notebook, keep_stderr: bool = False):
    """An executed notebook without what differs between two runs of the same thing.

    Removed: times, papermill's notes, widgets, stderr (warnings with paths, progress bars).
    Rewritten: absolute paths, memory addresses, random ids of styled tables. Merged: streams, which
    are cut as the machine's speed has it. Figures, tables and printed text stay.
    """
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": list(tags)} if tags else {}
        if "injected-parameters" in (tags or []):
            cell.id = "injected-parameters"
        elif "papermill-error-cell-tag" in (tags or []):
            cell.id = f"error-{hashlib.sha256(cell.source.encode()).hexdigest()[:8]}"
        if cell.cell_type == "code":
            cell.outputs = merged(
                [o for o in cell.outputs if keep_stderr or o.get("name") != "stderr"]
            )
            for output in cell.outputs:
                scrub_output(output)
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}
    return notebook


def merged(outputs: list) -> list:
    """Neighbouring streams of one name as one, and no widgets."""
    kept: list = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if (
            kept
            and output.output_type == "stream" == kept[-1].output_type
            and output.name == kept[-1].name
        ):
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def scrub_output(output) -> None:
    if output.output_type == "stream":
        output.text = scrub_text(overwritten(output.text))
    elif output.output_type == "error":
        output.evalue, output.traceback = (
            scrub_text(output.evalue),
            [scrub_text(line) for line in output.traceback],
        )
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and (kind.startswith("text/") or kind == "image/svg+xml"):
            output.data[kind] = scrub_text(value)


def scrub_text(text: str) -> str:
    """No absolute path, no memory address, no random table id."""
    for place, name in (
        (sys.prefix, "<python>"),
        (str(params.root()), "."),
        (tempfile.gettempdir(), "<tmp>"),
        (str(Path.home()), "~"),
    ):
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


def run_stage(
    notebook: str, stage: str, row: str | None, profile: str, measured: bool = False
) -> dict:
    """Run data/source/<notebook>.ipynb as a stage, or as one row of a stage; its cost, as `run`.

    It is written to data/executed/<stage>-<row>.ipynb, and its cost to the profile's timings.

    Args:
        measured: the notebook shows what it measured, which differs from run to run: it goes to
            the timings too.
    """
    root = params.root()
    timings = root / "data" / "report" / profile / "timings"
    name = f"{stage}-{row}.ipynb" if row else f"{stage}.ipynb"
    given = {"profile": profile, "out": "data"} | ({"row": row} if row else {})
    return run(
        root / "data" / "source" / f"{notebook}.ipynb",
        (timings if measured else root / "data" / "executed") / name,
        given,
        timings,
    )


def run(
    source: str | Path, output: str | Path, given: dict[str, str], timing: str | Path | None = None
) -> dict:
    """Execute a notebook in the root folder; write it, scrubbed, to `output`, whole or not at all.

    Args:
        given: values for names of the cell tagged `parameters`.
        timing: folder for stages/<output's name>.json: {"stage", "seconds", "peak_gib"}, the last
            the largest resident memory of the kernel.

    Raises:
        NotebookError: one line; the notebook as far as it came is `<output>.failed.ipynb`.
    """
    source, output = Path(source).absolute(), Path(output).absolute()
    notebook = bare(read(source))
    values = parameters(notebook, given, source.name)
    label = source.stem + (
        f" ({', '.join(f'{k}={v}' for k, v in values.items())})" if values else ""
    )
    failed = output.with_suffix(".failed.ipynb")
    started = time.monotonic()
    with Folder() as folder:
        draft, begun = folder / "notebook.ipynb", []
        try:
            executed = execute(notebook, draft, values, folder, begun)
            refuse_early_end(executed)
            files.write(output, dumps(plain(scrub(executed))))
        except (Exception, KeyboardInterrupt) as error:
            try:
                reached = read(draft) if draft.is_file() else notebook
            except NotebookError:  # a full disk cut the draft off; it is not the reason
                reached = notebook
            message = f"{label}: {explanation(error, begun)}"
            try:
                files.write(failed, dumps(plain(scrub(reached, keep_stderr=True))))
                message += f"; all of it in {shown(failed)}"
            except OSError as full:
                message += f"; {shown(failed)} could not be written ({full.strerror})"
            raise (Stopped if isinstance(error, KeyboardInterrupt) else NotebookError)(
                message
            ) from None
    failed.unlink(missing_ok=True)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # getrusage: bytes there, KiB here
    cost = {
        "stage": output.stem,
        "seconds": round(time.monotonic() - started, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit, 2),
    }
    if timing:
        files.write(
            Path(timing) / "stages" / f"{output.stem}.json", json.dumps(cost, indent=1) + "\n"
        )
    return cost


def parameters(notebook, given: dict[str, str], name: str) -> dict:
    """The given values, each of the type that the cell tagged `parameters` gives it.

    Raises:
        NotebookError: a name that the cell does not assign, or a value of another type.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"{name}: {len(cells)} cells are tagged `parameters`, should be one")
    try:
        known = declared(cells[0].source)
    except (SyntaxError, ValueError):
        raise NotebookError(
            f'{name}: the cell tagged `parameters` may only hold lines such as `row = "opl"`'
        ) from None
    values = {}
    for key, text in given.items():
        if key not in known:
            raise NotebookError(f"{name}: unknown parameter {key!r}{params.nearest(key, known)}")
        types, example = known[key]
        try:
            values[key] = typed(text, types)
        except (ValueError, OverflowError) as error:
            reason = f": {error}" if str(error) else ""
            raise NotebookError(
                f"{name}: parameter {key} wants {example}, got {text!r}{reason}"
            ) from None
    return values


def declared(source: str) -> dict[str, tuple[tuple[type, ...], str]]:
    """{parameter: (its types, what it wants in words)} of a cell's assignments, annotated or not.

    The types are those of a plain annotation (`rate: float = 1`, `top: int | None = None`), else
    the default's; none, for any value, if the default is None or no literal.
    """
    found: dict[str, tuple[tuple[type, ...], str]] = {}
    for line in ast.parse(source).body:
        if isinstance(line, ast.AnnAssign):
            default, targets = literal(line.value), [line.target]
            text = ast.unparse(line.annotation).strip("'\"")
            names = [part.partition("[")[0].strip() for part in text.split("|")]
            types = tuple(TYPES[name] for name in names) if TYPES.keys() >= set(names) else ()
        elif isinstance(line, ast.Assign):
            default, targets, types = literal(line.value), line.targets, ()
        else:
            continue
        if default is None and types:
            types += (type(None),)
        elif default not in (None, ...) and not (type(default) is int and float in types):
            types += (type(default),)
        for target in targets:  # a = b = 3 names two; x[0] = 3 and x.y = 3 none
            example = (
                text
                if types and default in (None, ...)
                else f"a value like {ast.unparse(line.value or target)}"
            )
            if isinstance(target, ast.Name):
                found[target.id] = types, example
            elif isinstance(target, (ast.Tuple, ast.List)):  # a, b = 1, 2: each takes any value
                found |= {
                    part.id: ((), example) for part in target.elts if isinstance(part, ast.Name)
                }
    return found


def literal(node: ast.expr | str | None):
    """The value of a literal; `...` where it is none."""
    try:
        return ... if node is None else ast.literal_eval(node)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # TypeError: {[]: 1}
        return ...


def typed(text: str, types: tuple[type, ...]):
    """The value of a text, of one of the types, or of any if there are none.

    As in papermill's command line (True, -3, 0.5), and lists and dicts. An int serves as a float.

    Raises:
        ValueError: it is of another type, or papermill does not write it into a cell as it is.
        OverflowError: an int too large for a float.
    """
    value = literal(text)
    if bool in types and text in ("true", "false"):  # YAML's, which DVC fills in
        value = text == "true"
    if float in types and int not in types:
        if type(value) is int:
            value = float(value)
        elif re.fullmatch(r"[-+]?(inf|nan)", text):
            value = float(text)
    if set(types) - {type(None)} == {str} and not (value is None and type(None) in types):
        return text
    if type(value) in types and not injectable(value):
        raise ValueError(
            "papermill writes text, numbers, True, False, None, lists, and dicts with text as keys "
            "into a cell, so take one of these"
        )
    if type(value) in types if types else injectable(value):
        return value
    if str in types or not types:
        return text
    raise ValueError


def injectable(value) -> bool:
    """True if papermill writes the value as it is: a tuple or a dict's key 1 would become text."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(injectable, value.values()))
    if isinstance(value, list):
        return all(map(injectable, value))
    return value is None or isinstance(value, (str, int, float))


def execute(notebook, draft: Path, values: dict, folder: Path, begun: list[str]):
    """The executed notebook. Cell by cell, `draft` is kept up to date and `begun` gets an id."""
    root = params.root()
    os.environ.update(
        KERNEL_ENVIRONMENT,
        PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        IPYTHONDIR=str(folder / "ipython"),
        JUPYTER_RUNTIME_DIR=str(folder),
    )
    import logging

    import papermill
    from jupyter_client import AsyncKernelManager
    from traitlets import CaselessStrEnum, Unicode

    class Kernel(AsyncKernelManager):
        """Talks through sockets in a private folder, since kernels race for TCP ports."""

        transport = CaselessStrEnum(["tcp", "ipc"], default_value="ipc")
        connection_file = Unicode(str(folder / "k.json"))

        def format_kernel_cmd(self, extra_arguments=None):
            return [
                sys.executable,
                "-m",
                "lib.pipeline",
                "kernel",
                "-f",
                self.connection_file,
                *(extra_arguments or []),
            ]

        async def start_kernel(self, **options):
            await super().start_kernel(**options)
            kernels.append(self.provisioner.pid)

    kernels: list[int] = []
    stop_with(kernels, folder)
    logging.getLogger("papermill").setLevel(
        logging.CRITICAL
    )  # it would say in many lines what `explanation` says in one
    # papermill fills braces in paths with parameters
    return papermill.execute_notebook(
        notebook,
        str(draft).replace("{", "{{").replace("}", "}}"),
        values,
        kernel_name="python3",
        progress_bar=False,
        cwd=root,
        start_timeout=300,
        stderr_file=Terminal(),
        kernel_manager_class=Kernel,
        iopub_timeout=60,
        on_cell_execute=lambda cell, cell_index: begun.append(cell.id),
    )


def refuse_early_end(notebook) -> None:
    """An end before the last cell (`sys.exit()`) is an error, though papermill calls it success.

    Raises:
        NotebookError: a cell did.
    """
    if any(
        output.get("ename") == "SystemExit"
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    ):
        raise NotebookError("a cell ended the notebook before its end: take sys.exit() out")


def explanation(error: BaseException, begun: list[str]) -> str:
    """What went wrong and in which cell, in one line."""
    kind = type(error).__name__
    where = f"in cell {len(begun)} ({begun[-1]!r})" if begun else "before the first cell"
    if isinstance(error, NotebookError):
        return f"{error}, {where}"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {error} {where}"
    if kind == "PapermillExecutionError":
        if (
            error.ename == "CellExecutionError" and not error.evalue
        ):  # a magic that is not there says why on stderr alone
            return f"the cell failed; what it said stands in its output, {where}"
        return f"{error.ename}: {one_line(error.evalue)[:600]}, {where}"
    if kind == "DeadKernelError":
        return (
            f"the kernel was killed by the system {where}, often out of memory: "
            "lower batch_tokens, documents, micro_batch or the profile's lengths"
        )
    return f"{kind}: {one_line(error)[:600]}, {where}"


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


class Folder:
    """A private folder, gone at the end; its path is short enough for sockets (104 characters)."""

    def __enter__(self) -> Path:
        base = tempfile.gettempdir()
        self.path = Path(tempfile.mkdtemp(prefix="nb-", dir=base if len(base) < 70 else "/tmp"))
        return self.path

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


# ------------------------------------------------------------------ no process left behind


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a signal to end: asyncio lets nothing but a KeyboardInterrupt through."""


def stop_with(kernels: list[int], folder: Path) -> None:
    """End the kernels at a signal, and when our parent is gone (kill -9 of DVC sends no signal)."""

    def end() -> None:
        for pid in kernels:
            try:
                os.killpg(pid, signal.SIGKILL)  # a kernel leads its own process group
            except ProcessLookupError:
                pass

    def on_signal(number, _) -> None:
        end()
        raise Stopped(signal.Signals(number).name)

    def orphaned() -> None:
        end()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    watch(elders(), orphaned)


def elders() -> tuple[int, ...]:
    """Our parent and, if it can be read, its parent: DVC may put a shell in between."""
    parent = os.getppid()
    try:
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return (parent,)


def watch(before: tuple[int, ...], orphaned) -> None:
    """Call `orphaned` soon after an elder has ended."""

    def loop() -> None:
        while elders() == before:
            time.sleep(0.5)
        orphaned()

    threading.Thread(target=loop, daemon=True).start()


def kernel(arguments: list[str]) -> None:
    """What the kernel process runs: IPython's kernel, which the system ends with its parent."""
    parent = int(os.environ.get("JPY_PARENT_PID", 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent and os.getppid() != parent:  # it ended before we could say so
        os._exit(1)
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(
        argv=[*arguments, "--log-level=CRITICAL"]
    )  # it reports the interrupt that ends it as an error
