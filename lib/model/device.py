"""The device and the number of threads of a process, and a batch's way to the device.

use(compute)                           the device, after setting the number of threads
kind(device)                           what decides the last bits of a result, for its record
to_device(ids, mask, pad_id, model)    a batch where its model is
padded_length(length, model)           the tokens of a row there, with its padding
"""

import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import kernels
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


def kind(device: torch.device) -> str:
    """The kind of machine that computes: the GPU, or the processor, its SIMD unit and the threads.

    Two kinds give other last bits from the same settings, and training makes them grow. So rows
    that are compared should come from one kind.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type}, {platform.machine()}"
    about = Path("/proc/cpuinfo")
    text = about.read_text(encoding="utf-8", errors="replace") if about.is_file() else ""
    known = re.search(r"^model name\s*:\s*(.+)", text, re.M)
    name = known[1] if known else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    threads = f"{threads} thread{'s' * (threads > 1)}"
    return f"{' '.join(name.split())}, {torch.backends.cpu.get_cpu_capability()}, {threads}"


def to_device(ids: Tensor, mask: Tensor, pad_id: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch's ids and mask, int64 (n, L) each, on the model's device.

    They go to a GPU `aligned`, and with the number of tokens of each text, in copies for which the
    process does not wait; nor does the model wait later, to find out what is padding.

    Args:
        mask: of `pad`: each row's ones come first.
    """
    if not pads_rows(model):
        return ids, mask
    device = next(model.parameters()).device
    packed, tokens = aligned((ids, mask), (pad_id, 0), model.config), mask.sum(dim=1)
    ids, mask = sent(packed, device).long()
    kernels.keep_tokens(mask, sent(tokens, device))
    return ids, mask


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, in a copy for which the process does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def aligned(tensors: Sequence[Tensor], fills: Sequence[int], config) -> Tensor:
    """Tensors of a batch, int32 (k, n, L), with L filled up to a multiple of 64.

    Batches then have few shapes, and their rows begin at aligned addresses.
    """
    L = tensors[0].shape[1]
    room, filled = aligned_length(L, config) - L, zip(tensors, fills)
    return torch.stack([F.pad(x.int(), (0, room), value=fill) for x, fill in filled])


def aligned_length(length: int, config) -> int:
    """`length` filled up to a multiple of 64, to at most the model's maximum; as it is if padding
    changes the model's results."""
    masks = getattr(config, "mask_padding", True)
    return min(64 * math.ceil(length / 64), config.max_position_embeddings) if masks else length


def padded_length(length: int, model: nn.Module) -> int:
    """The tokens of a row of `length` tokens after `to_device`."""
    return aligned_length(length, model.config) if pads_rows(model) else length


def pads_rows(model: nn.Module) -> bool:
    """Whether `to_device` pads rows for a model: a CPU gains nothing from rows of few lengths."""
    return next(model.parameters()).device.type != "cpu"
