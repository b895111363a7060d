"""Checkpoints of a training run, so that a stop costs minutes and the weights stay the same bits.

    key(settings, inputs)                 names a run by everything that decides its weights
    Checkpoints(folder, key)              the checkpoints of a row, in <folder>/<key>/<step>
    checkpoints.restore(model, optim)     the newest whole one; returns its curve
    checkpoints.save(model, optim, curve)
    checkpoints.clear()                   at the end of a run whose results are written
    signals()                             a stop that waits for the end of a step

A step's batch is a function of its seed and number, so a checkpoint holds what else a step reads:
weights, optimizer state and the states of the random generators (safetensors), and the curve so
far, whose length is the next step (JSON). Both carry a sha256. A checkpoint is written under a
temporary name, synchronised with the disk, and renamed; the last two are kept.
"""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.model.checkpoint import ensure, fingerprint, writing
from lib.pipeline import files
from lib.training import ranks

log = logging.getLogger(__name__)

# Of lib/: what decides the weights. `benchmark` reads the corpus and ranks hard negatives.
CODE = ("operators", "kernels/VERSION", "model", "benchmark", "training")
TENSORS, STATE = "state.safetensors", "state.json"
KEPT = 2
Optimizer = torch.optim.Optimizer


def key(settings: dict, inputs: Iterable[Path]) -> str:
    """A name for a run: a hash of its settings, its input folders, the code and torch's version.

    Args:
        settings: everything in params.yaml that the weights depend on.
        inputs: the folders of the corpus and of the models that the run reads.
    """
    library = Path(__file__).parents[1]
    sources = [path for name in CODE for path in contents(library / name)]
    record = {
        "settings": settings,
        "torch": torch.__version__,
        "code": {
            path.relative_to(library).as_posix(): files.sha256(path)
            for path in sources
            if path.suffix != ".pyc"
        },
        "inputs": [
            {path.relative_to(folder).as_posix(): files.sha256(path) for path in contents(folder)}
            for folder in inputs
        ],
    }
    return fingerprint(record)[:16]


def contents(place: Path) -> list[Path]:
    """The files of a folder and its subfolders, or the file itself."""
    paths = [place] if place.is_file() else place.rglob("*")
    return sorted(path for path in paths if path.is_file())


class Checkpoints:
    """The checkpoints of one row, under the key of the run that wrote them.

    Args:
        folder: of the row; runs with another key have their checkpoints beside this run's.
        minutes: from one checkpoint to the next.
    """

    def __init__(self, folder: str | Path, key: str, minutes: float = 10.0):
        self.row, self.folder = Path(folder), Path(folder) / key
        self.seconds, self.written = 60 * minutes, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.seconds

    def steps(self) -> list[Path]:
        """The folders of the checkpoints, the newest first."""
        numbered = [path for path in self.folder.glob("*") if path.name.isdigit()]
        return sorted(numbered, key=lambda path: -int(path.name))

    def last(self) -> str:
        """Where the newest checkpoint is, for a message."""
        return (
            f"the last checkpoint is {newest}" if (newest := next(iter(self.steps()), None)) else ""
        )

    # -------------------------------------------------------------- read

    def restore(self, model: nn.Module, optim: Optimizer) -> list[dict]:
        """Load the newest whole checkpoint into the model and optimizer.

        A damaged checkpoint is named in the log and deleted, and the one before it is taken. All
        processes load the one that the first process finds.

        Returns:
            The curve up to the checkpoint; its length is the next step. [] if there is none.
        """
        self.written = time.monotonic()
        place = ranks.told("" if ranks.rank() else str(self.newest() or ""))
        if not place:
            return []
        curve, tensors = read(Path(place))
        load(tensors, model, optim)
        log.warning("training goes on at step %d, from %s", len(curve), place)
        return curve

    def newest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones and what a killed run began are deleted."""
        for draft in self.folder.glob(".*"):
            shutil.rmtree(draft, ignore_errors=True)
        for place in self.steps():
            try:
                read(place)
                return place
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                problem = " ".join(str(error).split()) or type(error).__name__
                log.warning("%s is damaged, training goes on without it (%s)", place, problem)
                shutil.rmtree(place, ignore_errors=True)
        if self.row.is_dir() and any(path != self.folder for path in self.row.iterdir()):
            message = "settings, data or code have changed since the checkpoints in %s were written"
            log.warning(message + ": training starts at step 0", self.row)
        return None

    # -------------------------------------------------------------- write

    def save(self, model: nn.Module, optim: Optimizer, curve: list[dict]) -> None:
        """Write a checkpoint after the steps of `curve`, and delete all but the last two.

        If it cannot be written, the log says so and the last checkpoints stay. Of several
        processes, the first one writes.
        """
        self.written = time.monotonic()
        if ranks.rank():
            return
        place = self.folder / str(len(curve))
        try:
            with files.replacing(place) as draft, writing(place):
                save_file(state(model, optim), draft / TENSORS)
                record = {"step": len(curve), "curve": curve}
                record |= {"tokens": curve[-1]["tokens"], TENSORS: files.sha256(draft / TENSORS)}
                text = json.dumps({"state": record, "sha256": fingerprint(record)})
                (draft / STATE).write_text(text, encoding="utf-8")
            synchronize(place, self.folder)
        except OSError as error:
            reason = error.strerror or error
            message = "no checkpoint after step %d (%s: %s): training goes on, the last one stays"
            log.warning(message, len(curve), place, reason)
        else:
            for old in self.steps()[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Delete all checkpoints of the row, those of other keys too."""
        shutil.rmtree(self.row, ignore_errors=True)


def read(place: Path) -> tuple[list[dict], dict[str, Tensor]]:
    """The curve and tensors of a checkpoint, after a check of every byte."""
    record = json.loads((place / STATE).read_text(encoding="utf-8"))
    content = record["state"]
    ensure(fingerprint(content) == record["sha256"], f"the sha256 of {STATE} is another one")
    ensure(
        files.sha256(place / TENSORS) == content[TENSORS],
        f"the sha256 of {TENSORS} is another one",
    )
    ensure(len(content["curve"]) == content["step"] == int(place.name), "the step is another one")
    return content["curve"], load_file(place / TENSORS)


def synchronize(*folders: Path) -> None:
    """Write the names in these folders to the disk, as fsync does the content of a file."""
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------ the state of training


def state(model: nn.Module, optim: Optimizer) -> dict[str, Tensor]:
    """Weights, optimizer state by the name of its parameter, and generator states, on the CPU."""
    tensors = {"generator/cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type != "cpu":
        tensors[f"generator/{device.type}"] = torch.get_device_module(device).get_rng_state()
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter
        for kind, value in optim.state.get(parameter, {}).items():
            tensors[f"{kind}/{name}"] = value
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load(tensors: dict[str, Tensor], model: nn.Module, optim: Optimizer) -> None:
    """Put what `state` returned into a model and its new optimizer."""
    parameters = dict(model.named_parameters())
    for path, tensor in tensors.items():
        kind, name = path.split("/", 1)
        if kind == "generator" and name == "cpu":
            torch.set_rng_state(tensor)
        elif kind == "generator":
            torch.get_device_module(name).set_rng_state(tensor)
        elif kind == "weight":
            parameters[name].copy_(tensor)
        else:
            parameter = parameters[name]
            shape = parameter if tensor.shape == parameter.shape else tensor  # its strides too
            options = dict(dtype=tensor.dtype, device=parameter.device)
            optim.state[parameter][kind] = torch.empty_like(shape, **options).copy_(tensor)


# ------------------------------------------------------------------ stop


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM inside the block, instead of its handler.

    The second SIGINT ends the block with a KeyboardInterrupt. After the block the first signal is
    raised again, for the handler that was there before.
    """
    received: list[int] = []

    def on_signal(number: int, _) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python would refuse
        yield received
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if received:
        signal.raise_signal(received[0])
        raise KeyboardInterrupt  # the handler from before ignored it
