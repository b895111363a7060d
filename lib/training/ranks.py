"""Several processes that train one model: each takes a share of a step's passes.

    join(processes)             meet the processes that torchrun started
    share(tokens)               which passes of a step are this process's
    gather(rows, n, mine)       the embeddings of all processes
    add_up(model)               gradients summed over all processes, in one message
    total(numbers)              numbers summed over all processes
    told(text)                  the first process's text
    end_others()                the rest of a notebook is the first process's alone

A step is the same function of the seed and its number in every process. One process, or no
`torch.distributed`, is the case of one rank: nothing is sent.
"""

import heapq
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.pipeline.errors import TrainingError, require


def join(processes: int) -> None:
    """Meet the other processes of this training; each takes a GPU of its own if there are GPUs.

    Args:
        processes: expected on this machine.

    Raises:
        TrainingError: torchrun started another number of processes, or none.
    """
    started = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    message = f"compute.processes is {processes}, and this is one of {started}: run the stage with "
    message += "`make repro`, or set compute.processes to 1"
    require(started == processes, message, TrainingError)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def end_others() -> None:
    """End every process but the first, after the training."""
    first = rank() == 0
    if count() > 1:
        dist.barrier()
        dist.destroy_process_group()
    if not first:
        sys.exit()


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 writes and shows."""
    return dist.get_rank() if count() > 1 else 0


def share(tokens: list[int]) -> list[int]:
    """The passes of this process: the largest first, each to the process with the fewest tokens.

    Args:
        tokens: of each pass of the step, with padding.
    """
    loads = [(0, process) for process in range(count())]
    shares: list[list[int]] = [[] for _ in loads]
    for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, process = heapq.heappop(loads)
        shares[process].append(index)
        heapq.heappush(loads, (load + tokens[index], process))
    return sorted(shares[rank()])


def gather(rows: list[Tensor], places: list[list[int]], n: int, like: Tensor) -> Tensor:
    """The rows of all processes in one (n, D) tensor without graph, equal in every process.

    Args:
        rows, places: this process's rows, (k, D) each, and where each belongs.
        like: a tensor of the rows' device and dtype, (…, D).
    """
    whole = like.new_zeros(n, like.shape[-1])
    for part, place in zip(rows, places):
        whole[place] = part.detach()
    if count() > 1:
        dist.all_reduce(whole)  # each row comes from one process, the others add zeros
    return whole


def add_up(model: nn.Module) -> None:
    """Sum the gradients over all processes; a parameter without one counts as zeros."""
    if count() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


def total(*numbers: float) -> list[float]:
    """Each number summed over all processes."""
    if count() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def told(text: str) -> str:
    """The first process's text, in every process."""
    if count() == 1:
        return text
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    content = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8).to(device)
    size = torch.tensor(len(content), device=device)
    dist.broadcast(size, 0)
    if rank():
        content = content.new_zeros(int(size))
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()[:-1]
