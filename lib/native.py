"""The sequence mixer in C++: lib/mixer.cpp, compiled at first use where that is possible, and never needed.

    kernel()             the loaded library, or None: no AVX-512, no compiler, or LOCO_NATIVE=0
    mix(p, u, …)         x2 · conv(x1 v) + conv(u) for texts lying one after another; Mix, the same with gradients
    spectra(…)           the kernels of both convolutions as these want them

Without it all runs in torch and gives the same numbers, slower; the log says once which of the two it is, and why.
"""
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.long_conv import circular_kernel

SOURCE = Path(__file__).with_name("mixer.cpp")
# No -ffast-math: gcc would have the library change how the whole process treats small numbers.
FLAGS = "-O3 -std=c++17 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -fPIC -shared -pthread -w".split()
LANES, PAIR = 16, 32            # channels of a vector, and of one pass over a text
log = logging.getLogger(__name__)


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library; asked once."""
    try:
        library = load()
    except (OSError, RuntimeError) as error:
        log.warning("lib/mixer.cpp is not used (%s): the encoder runs in torch, with the same results", " ".join(str(error).split())[:300])
        return None
    log.info("lib/mixer.cpp is used: %s", library._name)
    return library


def load() -> ctypes.CDLL:
    if os.environ.get("LOCO_NATIVE", "1") == "0":
        raise RuntimeError("LOCO_NATIVE=0")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        raise RuntimeError(f"it needs AVX-512, and this processor has {torch.backends.cpu.get_cpu_capability()}")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or name one in CXX")
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loco-workbench"
    library = folder / f"mixer-{name}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as draft:                       # whole or not at all, also with two at once
            made = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", f"{draft}/mixer.so"], capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"{compiler} fails: {made.stderr}")
            os.replace(f"{draft}/mixer.so", library)
    for place in (folder, library):                                        # code that others may write is not run
        if hasattr(os, "getuid") and (place.stat().st_uid != os.getuid() or place.stat().st_mode & 0o022):
            raise RuntimeError(f"{place} belongs to, or can be written by, others: remove it, or set XDG_CACHE_HOME to a folder of your own")
    loaded = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.plan_new.restype, loaded.plan_new.argtypes = pointer, [number]
    for function in (loaded.mix_f32, loaded.mix_bf16):
        function.argtypes = [*[pointer] * 6, number, number, *[pointer] * 4, ctypes.c_int]
        function.restype = None
    loaded.mix_gradient.argtypes, loaded.mix_gradient.restype = [*[pointer] * 8, number, number, *[pointer] * 7, ctypes.c_int], None
    for function in (loaded.glu_f32, loaded.glu_bf16):
        function.argtypes, function.restype = [pointer, pointer, pointer, number, ctypes.c_int], None
    loaded.glu_gradient.argtypes, loaded.glu_gradient.restype = [*[pointer] * 4, number, ctypes.c_int], None
    return loaded


def fits(channels: int) -> bool:
    """Whether the kernel can be used for so many channels."""
    return channels % PAIR == 0 and kernel() is not None


def size(length: int) -> int:
    """The FFT's size for a text of so many tokens: the next power of two from 2 · length - 1."""
    return 1 << max(0, 2 * length - 2).bit_length()


@cache
def plan(n: int) -> int:
    """The twiddle factors of an FFT, made once; an address."""
    return kernel().plan_new(n)


@cache
def order(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each stored pair of frequencies (k, n - k) the one up to n/2; its inverse; and -1 where the other is the one that is stored, else 1."""
    bits = n.bit_length() - 1
    place = torch.arange(n)
    reverse = torch.zeros_like(place)
    for bit in range(bits):
        reverse |= ((place >> bit) & 1) << (bits - 1 - bit)
    stored = torch.zeros(n // 2 + 1, dtype=torch.long)                     # where in bit-reversed order; see lib/mixer.cpp
    stored[-1] = min(1, n - 1)
    block = 2
    while block < n:
        stored[block // 2 : block] = torch.arange(block, block + block // 2)
        block *= 2
    k = reverse[stored]
    low = torch.minimum(k, n - k) if n > 1 else k
    return low, torch.argsort(low), torch.where(k > n // 2, -1.0, 1.0)


def spectra(gated: tuple, residual: tuple | None, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A = (K1 + K2) / 2n and B = (K1 - K2) / 2n of two kernels, (D/16, n/2 + 1, 4, 16): re A, im A, re B, im B.

    Args:
        gated, residual: (taps back, taps ahead or None, gain), (D, L) and (D,); L ≥ n/2, or all that act.
    """
    def circular(kernels: tuple) -> Tensor:
        back, ahead, gain = kernels
        L = min(back.shape[1], max(1, n // 2))
        return circular_kernel(back[:, :L], None if ahead is None else ahead[:, :L], gain, n)

    one = circular(gated)
    return Spectra.apply(one, torch.zeros_like(one) if residual is None else circular(residual)).to(dtype)


class Spectra(torch.autograd.Function):
    """Two circular kernels, (D, n) -> the table of `spectra`."""

    @staticmethod
    def forward(ctx, one: Tensor, two: Tensor) -> Tensor:
        n = one.shape[1]
        a, b = torch.fft.rfft(one), torch.fft.rfft(two)
        a, b = (a + b) / (2 * n), (a - b) / (2 * n)
        k, _, sign = order(n)
        table = torch.empty(len(one) // LANES, n // 2 + 1, 4, LANES)
        for i, part in enumerate((a.real, a.imag, b.real, b.imag)):
            part = part.index_select(1, k)
            table[:, :, i] = (part * sign if i % 2 else part).unflatten(0, (-1, LANES)).transpose(1, 2)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        D, n = grad.shape[0] * LANES, 2 * (grad.shape[1] - 1) or 1
        _, inverse, sign = order(n)
        parts = [grad[:, :, i].transpose(1, 2).reshape(D, -1) for i in range(4)]
        a, b = (torch.complex(parts[i], parts[i + 1] * sign).index_select(1, inverse) for i in (0, 2))
        return tuple(adjoint(found, n) for found in ((a + b) / (2 * n), (a - b) / (2 * n)))


def adjoint(grad: Tensor, n: int) -> Tensor:
    """The gradient of rfft: dx_t = Re Σ_{k ≤ n/2} dX_k e^{2πi kt / n}."""
    if n == 1:
        return grad.real
    grad = grad * (n / 2)
    grad[:, 0] *= 2
    grad[:, -1] *= 2
    return torch.fft.irfft(grad, n=n)


def mix(p: Tensor, u: Tensor, starts: Tensor, weight: Tensor, bias: Tensor, tables: list[Tensor], real: Tensor | None = None, c1: Tensor | None = None) -> Tensor:
    """x2 · conv(x1 · v) + conv(u) of each text, (T, D) like u.

    Args:
        p: (T, 3D), float32 or bfloat16; u: (T, D), alike.
        starts: where each text begins, and T, int64, (texts + 1,).
        weight: of the short convolution, (3, 3D), float32; bias: (3D,).
        tables: `spectra` for each text, of p's type.
        real: tokens of each text, int64; what follows is padding, x1 · v and u are 0 there. None: all.
        c1: where conv(x1 · v) is put, (T, D), float32.
    """
    library, y = kernel(), torch.empty_like(u)
    if {p.dtype, u.dtype, *(table.dtype for table in tables)} not in ({torch.float32}, {torch.bfloat16}):
        raise TypeError(f"p is {p.dtype}, u {u.dtype}, the tables {tables[0].dtype}: all of them float32 or all bfloat16")
    if not all(tensor.is_contiguous() for tensor in (p, u, starts, weight, bias, *tables)):
        raise ValueError("mix reads its inputs as they lie: give it contiguous ones")
    lengths = starts.diff()
    real = lengths if real is None else real
    addresses, plans = pointers([table.data_ptr() for table in tables]), pointers([plan(size(length)) for length in lengths.tolist()])
    function = {torch.float32: library.mix_f32, torch.bfloat16: library.mix_bf16}[p.dtype]
    function(p.data_ptr(), u.data_ptr(), y.data_ptr(), None if c1 is None else c1.data_ptr(), starts.data_ptr(), real.data_ptr(), len(real), u.shape[-1],
             weight.data_ptr(), bias.data_ptr(), addresses, plans, torch.get_num_threads())
    return y


def pointers(addresses: list[int]):
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Mix(torch.autograd.Function):
    """`mix` of texts of one length, padding at their ends, with gradients: p (B, L, 3D), u (B, L, D), real (B,) -> (B, L, D), all float32.

    Two FFTs forward; backward, one repeats what would be too large to keep, one takes the gradient there and one back.
    """

    @staticmethod
    def forward(ctx, p: Tensor, u: Tensor, weight: Tensor, bias: Tensor, table: Tensor, real: Tensor) -> Tensor:
        p, u, weight, bias, table = (tensor.contiguous() for tensor in (p, u, weight, bias, table))
        B, L, D = u.shape
        starts, c1 = torch.arange(B + 1) * L, torch.empty_like(u)
        y = mix(p, u, starts, weight, bias, [table] * B, real, c1)
        ctx.save_for_backward(p, u, weight, bias, table, real, starts, c1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        p, u, weight, bias, table, real, starts, c1 = ctx.saved_tensors
        dy = dy.contiguous()
        dp, du, dweight, dbias, dtable = torch.empty_like(p), torch.empty_like(u), torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(table)
        B, L, D = u.shape
        kernel().mix_gradient(*(tensor.data_ptr() for tensor in (p, u, c1, dy, dp, du, starts, real)), B, D,
                              *(tensor.data_ptr() for tensor in (weight, bias, table, dtable, dweight, dbias)), plan(size(L)), torch.get_num_threads())
        return dp, du, dweight, dbias, dtable, None


def glu(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU(a) · b; a, b and out contiguous, of one type and a multiple of 16 numbers. `out` may be a."""
    out = torch.empty_like(a) if out is None else out
    function = {torch.float32: kernel().glu_f32, torch.bfloat16: kernel().glu_bf16}[a.dtype]
    function(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel(), torch.get_num_threads())
    return out


def glu_gradient(a: Tensor, b: Tensor, dm: Tensor) -> Tensor:
    """GELU(a) · b once more; a and b become their gradients. Float32."""
    m = torch.empty_like(a)
    kernel().glu_gradient(a.data_ptr(), b.data_ptr(), m.data_ptr(), dm.data_ptr(), a.numel(), torch.get_num_threads())
    return m
