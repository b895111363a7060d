"""The device and the number of threads of a process."""

import torch

from lib.pipeline.errors import WorkbenchError, require


def use(compute: dict) -> torch.device:
    """Set the number of threads and return the device of `compute: {threads, device}`.

    `device: auto` is a GPU if the machine has one. The number of threads is a setting because the
    same settings give the same bits only with the same number of threads.

    Raises:
        WorkbenchError: a CUDA device is asked for and there is none.
    """
    torch.set_num_threads(compute["threads"])
    name = compute["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    possible = name != "cuda" or torch.cuda.is_available()
    message = f"device {name!r}: no CUDA device here; set compute.device to auto or cpu"
    require(possible, message, WorkbenchError)
    return torch.device(name)
