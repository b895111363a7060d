"""What comparisons of the GPU kernels with torch found, kept on disk.

remembered(question, device, choices, find)   the answer that is known, or find()'s
first_process_first(device, ask)              the first process asks, the others take its answers

There is a file for each name of a GPU, version of torch and of Triton, and source of the kernels.
It is written whole. A file that is damaged or another machine's counts as absent, and is replaced.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from lib.pipeline import files

Answer = bool | int | None
FOLDER = Path(__file__).parent
SOURCES = ("gpu.py", "gpu_mlp.py", "support.py", "triton_kernels.py")
log = logging.getLogger(__name__)
_answers: dict[Path, dict[str, Answer]] = {}


def remembered(
    question: str, device: torch.device, choices: tuple, find: Callable[[], Answer]
) -> Answer:
    """The answer to a question about the kernels on a GPU; on a CPU find()'s.

    Args:
        question: names everything that the answer depends on, apart from the machine.
        choices: the answers that are kept. Any other answer, such as that a kernel failed, is
            found again in the next process.
    """
    if device.type != "cuda":
        return find()
    known = answers(device)
    if known.get(question) not in choices:
        answer = find()
        if answer not in choices:
            return answer
        known[question] = answer
        keep(device)
    return known[question]


def answers(device: torch.device) -> dict[str, Answer]:
    """What this process knows of a GPU, at first what the disk knows."""
    path = file(device)
    if path not in _answers:
        _answers[path] = read(path, machine(device))
    return _answers[path]


def keep(device: torch.device) -> None:
    """Write the answers, with those that another process has written meanwhile."""
    path, here = file(device), machine(device)
    content = {"machine": here, "answers": read(path, here) | answers(device)}
    try:
        files.write(path, json.dumps(content, indent=1, sort_keys=True))
    except OSError as error:
        log.info("the next process compares the kernels again: %s", error)


def read(path: Path, here: dict) -> dict[str, Answer]:
    """The answers in a file; none if it is absent, damaged or another machine's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = dict(content["answers"])
        sound = content["machine"] == here and {type(x) for x in known.values()} <= {bool, int}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return known if sound else {}


def file(device: torch.device) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loco-workbench"
    name = hashlib.sha256(json.dumps(machine(device), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"kernels-{name}.json"


@cache
def machine(device: torch.device) -> dict[str, str]:
    """What the answers depend on, apart from the question."""
    import triton

    source = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "source": source.hexdigest(),
    }


def first_process_first(device: torch.device, ask: Callable[[], None]) -> None:
    """ask() in the first process, then in the others, which know its answers.

    A process with another kind of GPU takes no answer.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ask()
    first = dist.get_rank() == 0
    if first:
        ask()
    content = {"machine": machine(device), "answers": answers(device)}
    content = broadcast(content, device if dist.get_backend() == "nccl" else torch.device("cpu"))
    if not first:
        if content["machine"] == machine(device):
            answers(device).update(content["answers"])
        ask()


def broadcast(content: dict, device: torch.device) -> dict:
    """The first process's content, as JSON."""
    text = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, 0)
    text = text if dist.get_rank() == 0 else text.new_empty(int(size))
    dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))
