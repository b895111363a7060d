"""What this machine can do, and the comparison of a kernel with torch.

use(back_end), back_end()      which kernels may run in this process
compute_dtype(x)               the dtype of a matrix multiplication of x
matmul_dtype(dtype, device)    `dtype`, or float32 if the device cannot multiply in it
real_tokens(mask)              the number of tokens of each text
keep_tokens(mask, tokens)      tells it beforehand, so that nobody waits for a GPU
verify(what, …)                whether a GPU kernel compiles here and agrees with torch
fastest(what, ways)            which of several functions takes the least time on a GPU
"""

import logging
import math
import os
import platform
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

BACK_ENDS = ("auto", "torch", "definition")
# Relative. Sums over a whole text are off by up to 0.03 in bfloat16; torch itself may use tf32.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 0.005}
HAS_TRITON = find_spec("triton") is not None
log = logging.getLogger(__name__)
_state = {"back_end": "auto"}
_real_tokens = WeakTensorKeyDictionary()


@contextmanager
def use(back_end: str):
    """A context in which the whole process uses a back end.

    Args:
        back_end: "auto": the fastest kernel that fits. "torch": no compiled code. "definition": the
            equations as lib/model/m2bert.py writes them.

    Raises:
        ValueError: an unknown back end.
    """
    if back_end not in BACK_ENDS:
        raise ValueError(f"back end {back_end!r}: one of {', '.join(BACK_ENDS)}")
    before = _state["back_end"]
    _state["back_end"] = back_end
    try:
        yield
    finally:
        _state["back_end"] = before


def back_end() -> str:
    """The back end in use; LOCO_NATIVE=0 in the environment makes "auto" mean "torch"."""
    name = _state["back_end"]
    return "torch" if name == "auto" and os.environ.get("LOCO_NATIVE", "1") == "0" else name


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix multiplication of x: autocast's if autocast is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@cache
def takes_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices here, natively or emulated with AVX-512.

    The environment variable ONEDNN_MAX_CPU_ISA can forbid it.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 matrices: AVX-512 BF16 or AMX.

    If torch cannot tell, oneDNN's answer counts.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    questions = [getattr(torch.cpu, name, None) for name in names]
    unknown = platform.machine().lower() not in ("x86_64", "amd64") or None in questions
    return takes_bfloat16() and (unknown or any(question() for question in questions))


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `device` should multiply matrices of `dtype`.

    It is float32 for bfloat16 if the device has no bfloat16 instructions; the log says so.
    """
    if dtype != torch.bfloat16:
        return dtype
    if device.type == "cpu" and multiplies_bfloat16():
        return dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return dtype
    log.warning(
        "this processor has no bfloat16 products: float32 instead, which is faster here and more "
        "exact"
    )
    return torch.float32


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels as Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(u: Tensor) -> bool:
    """Whether Triton's kernels can read u: on a GPU, or on a CPU in the interpreter."""
    reachable = u.device.type == "cuda" or u.device.type == "cpu" and interpreted()
    return reachable and back_end() == "auto" and HAS_TRITON


def real_tokens(mask: Tensor) -> Tensor | None:
    """The number of tokens of each text, int64 (B,), from a mask (B, 1, L) of 0 and 1.

    None if a text has a hole, that is, a one after a zero. The result is kept with the mask, so
    the process waits for the GPU once for each mask, not once for each layer.
    """
    kept = _real_tokens.get(mask)
    if kept is None or kept[0] != version(mask):
        with torch.inference_mode(False):  # a later pass with gradients may see this mask too
            whole = bool((mask[..., 1:] <= mask[..., :-1]).all())
            keep_tokens(mask, mask[:, 0].sum(dim=1).long() if whole else None)
    return _real_tokens[mask][1]


def keep_tokens(mask: Tensor, tokens: Tensor | None) -> None:
    """Keep the number of tokens of each text, (B,), with a mask; None: a text has a hole."""
    _real_tokens[mask] = version(mask), tokens


def kept_tokens(mask: Tensor) -> Tensor | None:
    """What is kept with a mask that did not change; None: nothing."""
    known, tokens = _real_tokens.get(mask) or (None, None)
    return tokens if known == version(mask) else None


def version(x: Tensor) -> int:
    """Changes when x does."""
    return 0 if x.is_inference() else x._version


def verify(what: str, dtype: torch.dtype, device: torch.device, kernel, torch_way, names) -> bool:
    """Whether a kernel compiles here and agrees with torch; the log says so.

    Args:
        kernel, torch_way: functions without arguments that return lists of tensors.
        names: of these tensors, for the log.
    """
    try:
        with torch.autocast(device.type, enabled=False):
            for name, result, exact in zip(names, kernel(), torch_way()):
                error = float(torch.linalg.vector_norm(result.float() - exact.float()))
                size = float(torch.linalg.vector_norm(exact.float()))
                if not error <= TOLERANCE[dtype] * size:  # a gradient may be 0 everywhere
                    share = error / size if size else math.inf
                    raise RuntimeError(f"{name} is wrong: its error is {share:.2g} of its size")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may throw
        log.warning(
            "lib/kernels/triton_kernels.py is not used for %s in %s on %s (%s: %s): torch does it, "
            "with the same results",
            *(what, dtype, device, type(error).__name__, " ".join(str(error).split())[:300]),
        )
        return False
    log.info("lib/kernels/triton_kernels.py is used for %s in %s on %s", what, dtype, device)
    return True


def fastest(what: str, ways: dict[str, Callable], rounds: int = 10) -> str:
    """The name of the function with the smallest time on a GPU; the log has the times.

    The functions take turns. The first two rounds, which may compile, do not count. Other stages on
    the GPU only add time, so the shortest of the other rounds is the least disturbed.
    """
    times = {name: [] for name in ways}
    for _ in range(2 + rounds):
        for name, function in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    shortest = {name: min(measured[2:]) for name, measured in times.items()}
    text = ", ".join(f"{name} {ms:.3f}" for name, ms in shortest.items())
    log.info("%s takes, in ms: %s", what, text)
    return min(shortest, key=shortest.get)
