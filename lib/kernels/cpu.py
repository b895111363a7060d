"""The sequence mixer in C++: lib/kernels/mixer.cpp, compiled at first use where that is possible, and never needed.

    kernel()             the loaded library, or None: no AVX-512, no compiler, or LOCO_NATIVE=0
    mix(p, u, …)         x2 · conv(x1 v) + conv(u) for texts lying one after another; Mix, the same with gradients
    spectra(…)           the kernels of both convolutions as these want them; Spectra, the same with gradients

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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.kernels.support import back_end, compute_dtype
from lib.operators.monarch import BlockDiagonalLinear, paired

SOURCE = Path(__file__).with_name("mixer.cpp")
# No -ffast-math: gcc would have the library change how the whole process treats small numbers.
FLAGS = "-O3 -std=c++17 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -fPIC -shared -pthread -w".split()
LANES, PAIR = 16, 32  # channels of a vector, and of one pass over a text
log = logging.getLogger(__name__)


def kernel() -> ctypes.CDLL | None:
    """The compiled library; None if there is none, or `use` says torch or the definition."""
    return compiled() if back_end() == "auto" or os.environ.get("LOCO_NATIVE") == "0" else None


@cache
def compiled() -> ctypes.CDLL | None:
    """The same, asked once."""
    try:
        library = load()
    except (OSError, RuntimeError) as error:
        log.warning(
            "lib/kernels/mixer.cpp is not used (%s): the encoder runs in torch, with the same results",
            " ".join(str(error).split())[:300],
        )
        return None
    log.info("lib/kernels/mixer.cpp is used: %s", library._name)
    return library


def load() -> ctypes.CDLL:
    if os.environ.get("LOCO_NATIVE", "1") == "0":
        raise RuntimeError("LOCO_NATIVE=0")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        raise RuntimeError(
            f"it needs AVX-512, and this processor has {torch.backends.cpu.get_cpu_capability()}"
        )
    compiler = (
        os.environ.get("CXX")
        or shutil.which("c++")
        or shutil.which("g++")
        or shutil.which("clang++")
    )
    if not compiler:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or name one in CXX")
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS]).encode()).hexdigest()[
        :16
    ]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loco-workbench"
    library = folder / f"mixer-{name}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as draft:  # whole or not at all, also with two at once
            made = subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", f"{draft}/mixer.so"],
                capture_output=True,
                text=True,
            )
            if made.returncode:
                raise RuntimeError(f"{compiler} fails: {made.stderr}")
            os.chmod(
                f"{draft}/mixer.so", 0o700
            )  # gcc's follows the umask, and what others may write is not loaded
            os.replace(f"{draft}/mixer.so", library)
    for place in (folder, library):  # code that others may write is not run
        if hasattr(os, "getuid") and (
            place.stat().st_uid != os.getuid() or place.stat().st_mode & 0o022
        ):
            raise RuntimeError(
                f"{place} belongs to, or can be written by, others: remove it, or set XDG_CACHE_HOME to a folder of your own"
            )
    loaded = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.plan_new.restype, loaded.plan_new.argtypes = pointer, [number]
    for function in (loaded.mix_f32_f32, loaded.mix_bf16_f16, loaded.mix_bf16_f32):
        function.argtypes, function.restype = (
            [*[pointer] * 6, *[number] * 4, *[pointer] * 5, ctypes.c_int],
            None,
        )
    for function in (loaded.spectra_f32, loaded.spectra_f16):
        function.argtypes, function.restype = (
            [*[pointer] * 4, number, number, *[pointer] * 3, ctypes.c_int],
            None,
        )
    loaded.spectra_gradient.argtypes, loaded.spectra_gradient.restype = (
        [*[pointer] * 4, number, number, *[pointer] * 2, ctypes.c_int],
        None,
    )
    for function in (loaded.mix_gradient_f32, loaded.mix_gradient_bf16):
        function.argtypes, function.restype = (
            [*[pointer] * 8, number, number, *[pointer] * 7, ctypes.c_int],
            None,
        )
    for function in (loaded.glu_f32, loaded.glu_bf16):
        function.argtypes, function.restype = [*[pointer] * 3, number, ctypes.c_int], None
    for function in (loaded.glu_gradient_f32, loaded.glu_gradient_bf16):
        function.argtypes, function.restype = [*[pointer] * 6, number, ctypes.c_int], None
    return loaded


# ------------------------------------------------------------------ back end of lib/kernels


def sequence_mixer(layer, u: Tensor, mask: Tensor | None) -> Tensor | None:
    """y (B, L, D) of u (B, L, D); None without gradients outside of training, or for a mask with holes.

    In training without gradients too: the two passes of a micro-batch are one arithmetic.
    """
    if not (torch.is_grad_enabled() or layer.training):
        return None
    if mask is not None:
        u = u * mask.transpose(1, 2)
    if not (trains(u, layer.in_linear.weight) and fits(u.shape[-1])):
        return None
    if mask is not None and not bool((mask[..., 1:] <= mask[..., :-1]).all()):
        return None
    B, L, _ = u.shape
    u = u.to(compute_dtype(u))
    p = layer.in_linear(u)  # (B, L, 3D)
    if mask is None:
        real = torch.full((B,), L, dtype=torch.int64, device="cpu")
    else:
        p = p * mask.transpose(1, 2).to(p.dtype)
        real = mask[:, 0].sum(dim=1).long()
    gated, residual = layer.gated_filter, layer.residual_filter
    filters = [
        (None, None, None)
        if filter is None
        else (*filter.before_decay(filter.hidden(L)), filter.bias)
        for filter in (gated, residual)
    ]
    table = Spectra.apply(gated.time(L), gated.deltas(), size(L), *filters[0], *filters[1])
    short = layer.short_filter
    return layer.out_linear(Mix.apply(p, u, short.weight[:, 0].t(), short.bias, table, real))


def gated_mlp(mlp, h: Tensor) -> Tensor | None:
    """y (B, L, D) of h (B, L, D); None without gradients outside of training, or with dropout."""
    dropout = mlp.training and mlp.dropout.p
    if not (torch.is_grad_enabled() or mlp.training) or dropout:
        return None
    x = h.flatten(0, 1)
    if not GatedBlocks.fits(x, mlp.gated_layers, mlp.wo):
        return None
    product = GatedBlocks.apply(x, mlp.gated_layers.weight, mlp.wo.weight)
    return mlp.layernorm(product + (x + mlp.wo.bias)).view_as(h)


def fits(channels: int) -> bool:
    """Whether the kernel can be used for so many channels."""
    return channels % PAIR == 0 and kernel() is not None


def trains(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can be used with gradients: on a CPU, weights of float32, products of float32 or, under autocast, of bfloat16."""
    kinds = (
        (torch.float32, torch.bfloat16) if torch.is_autocast_enabled("cpu") else (torch.float32,)
    )
    return (
        x.device.type == "cpu"
        and weight.dtype == torch.float32
        and x.dtype in kinds
        and compute_dtype(x) in kinds
        and kernel() is not None
    )


def size(length: int) -> int:
    """The FFT's size for a text of so many tokens: the next power of two from 2 · length - 1."""
    return 1 << max(0, 2 * length - 2).bit_length()


@cache
def plan(n: int) -> int:
    """The twiddle factors of an FFT, made once; an address."""
    return kernel().plan_new(n)


class Table(NamedTuple):
    """A = (K1 + K2) / 2n and B = (K1 - K2) / 2n, the spectra of a layer's two filters: (D/16, n/2 + 1, 4, 16), re A, im A, re B, im B."""

    values: Tensor  # float32; float16 beside the bfloat16 activations of an encoder, not in training, which needs their gradient
    scale: (
        Tensor | None
    )  # what float16 is to be multiplied by, (D,): its largest number in each channel is 2^14

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def channels(self, some: slice) -> "Table":
        """Those of some channels, without a copy; `some` in steps of 16."""
        return Table(
            self.values[some.start // LANES : some.stop // LANES],
            None if self.scale is None else self.scale[some],
        )


def spectra(
    gated: tuple,
    residual: tuple | None,
    time: Tensor,
    delta: Tensor,
    n: int,
    dtype: torch.dtype = torch.float32,
) -> Table:
    """The table for FFTs of size n that `mix` reads beside activations of `dtype`.

    8 bits of mantissa would not do: an error in a filter is the same at every position, and layers add it up.

    Args:
        gated, residual: (back, ahead or None, gain) of each filter, (L, D), before their decay, and (D,), float32; L ≤ n/2, or 1.
        time, delta: decay = exp(-time |delta|), (L,) and (D,).
    """
    half = dtype == torch.bfloat16
    L, D = gated[0].shape
    values = torch.empty(
        D // LANES,
        n // 2 + 1,
        4,
        LANES,
        dtype=torch.float16 if half else torch.float32,
        device="cpu",
    )
    scale = torch.empty(D, dtype=torch.float32, device="cpu") if half else None
    taps = [
        None if part is None else part.contiguous() for part in (*gated, *(residual or (None,) * 3))
    ]
    kernels, gains = (taps[0], taps[1], taps[3], taps[4]), (taps[2], taps[5])
    check(time, delta, *filter(lambda part: part is not None, taps))
    (kernel().spectra_f16 if half else kernel().spectra_f32)(
        pointers(kernels),
        pointers(gains),
        time.data_ptr(),
        delta.data_ptr(),
        L,
        D,
        values.data_ptr(),
        None if scale is None else scale.data_ptr(),
        plan(n),
        torch.get_num_threads(),
    )
    return Table(values, scale)


class Spectra(torch.autograd.Function):
    """`spectra` with gradients: back, ahead and gain of the gated and of the residual filter -> the values of a float32 table."""

    @staticmethod
    def forward(ctx, time: Tensor, delta: Tensor, n: int, *taps: Tensor | None) -> Tensor:
        ctx.save_for_backward(time, delta)
        ctx.n, ctx.shapes = n, [None if part is None else part.shape for part in taps]
        return spectra(taps[:3], None if taps[3] is None else taps[3:], time, delta, n).values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        time, delta = ctx.saved_tensors
        grad, grads = (
            grad.contiguous(),
            [
                None if shape is None else torch.empty(shape, dtype=torch.float32, device="cpu")
                for shape in ctx.shapes
            ],
        )
        kernel().spectra_gradient(
            pointers((grads[0], grads[1], grads[3], grads[4])),
            pointers((grads[2], grads[5])),
            time.data_ptr(),
            delta.data_ptr(),
            len(time),
            len(delta),
            grad.data_ptr(),
            plan(ctx.n),
            torch.get_num_threads(),
        )
        return None, None, None, *grads


def check(*tensors: Tensor) -> None:
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        raise TypeError(
            f"lib/kernels/mixer.cpp reads float32 as it lies: got {[(tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) for tensor in tensors]}"
        )


def check_alike(*tensors: Tensor) -> None:
    if (
        len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1
        or tensors[0].numel() % LANES
        or not all(tensor.is_contiguous() for tensor in tensors)
    ):
        raise TypeError(
            f"lib/kernels/mixer.cpp takes contiguous tensors of one type and shape, a multiple of {LANES} numbers: got {[(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]}"
        )


def mix(
    p: Tensor,
    u: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: list[Table],
    real: Tensor | None = None,
    c1: Tensor | None = None,
    y: Tensor | None = None,
    channels: slice | None = None,
) -> Tensor:
    """x2 · conv(x1 · v) + conv(u) of each text, (T, D) like u.

    Args:
        p: (T, 3D), float32 or bfloat16; u: (T, D), alike.
        starts: where each text begins, and T, int64, (texts + 1,).
        weight: of the short convolution, (3, 3D), float32; bias: (3D,).
        tables: `spectra` for each text; of float16 beside bfloat16 only.
        real: tokens of each text, int64; what follows is padding, x1 · v and u are 0 there. None: all.
        c1: where conv(x1 · v) is put, (T, D), like u.
        y, channels: where the result is put, and which channels, in steps of 32; the tables hold those alone.
    """
    library, y, channels = (
        kernel(),
        torch.empty_like(u) if y is None else y,
        channels or slice(0, u.shape[-1]),
    )
    kinds = {
        (p.dtype, kind.dtype, table.values.dtype)
        for kind in (u, y, *(() if c1 is None else (c1,)))
        for table in tables
    }
    function = (
        {
            (torch.float32,) * 3: library.mix_f32_f32,
            (torch.bfloat16, torch.bfloat16, torch.float16): library.mix_bf16_f16,
            (torch.bfloat16, torch.bfloat16, torch.float32): library.mix_bf16_f32,
        }.get(kinds.pop())
        if len(kinds) == 1
        else None
    )
    if function is None:
        types = [
            str(tensor.dtype).removeprefix("torch.")
            for tensor in (
                p,
                u,
                y,
                *(() if c1 is None else (c1,)),
                *(table.values for table in tables),
            )
        ]
        raise TypeError(
            f"p, u, y (and c1) and the tables are {', '.join(types)}: all of them float32, or bfloat16 and tables of float16 or float32"
        )
    given = [
        starts,
        weight,
        bias,
        *(table.scale for table in tables if table.scale is not None),
        *(tensor for tensor in (real,) if tensor is not None),
    ]
    if not all(
        tensor.is_contiguous()
        for tensor in (
            p,
            u,
            y,
            *given,
            *(() if c1 is None else (c1,)),
            *(table.values for table in tables),
        )
    ):
        raise ValueError("mix reads its inputs as they lie: give it contiguous ones")
    (T, D), lengths, d = u.shape, starts.diff().tolist(), channels.stop - channels.start
    real = starts.diff() if real is None else real
    if {tensor.dtype for tensor in given if tensor is not starts and tensor is not real} != {
        torch.float32
    } or {starts.dtype, real.dtype} != {torch.int64}:
        raise TypeError("weight, bias and scales are float32, starts and real int64")
    if (
        (p.shape, y.shape, weight.shape, bias.shape) != ((T, 3 * D), (T, D), (3, 3 * D), (3 * D,))
        or c1 is not None
        and c1.shape != u.shape
        or channels.start % PAIR
        or d % PAIR
        or not 0 <= channels.start < channels.stop <= D
    ):
        raise ValueError(
            f"for u {(T, D)} and channels {channels.start} to {channels.stop}, in steps of {PAIR}: got p {tuple(p.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    if (
        min(lengths) < 1
        or int(starts[0]) < 0
        or int(starts[-1]) > T
        or len(real) != len(lengths)
        or any(not 0 <= few <= length for few, length in zip(real.tolist(), lengths))
    ):
        raise ValueError(
            f"texts that begin at {starts.tolist()} with {real.tolist()} tokens do not lie in {T}"
        )
    if any(
        table.values.shape != (d // LANES, size(length) // 2 + 1, 4, LANES)
        or (table.scale is None) == (table.values.dtype == torch.float16)
        for table, length in zip(tables, lengths, strict=True)
    ):
        raise ValueError(
            f"tables of {[tuple(table.values.shape) for table in tables]} do not fit texts of {lengths} tokens and channels {channels.start} to {channels.stop}"
        )
    scales = None if tables[0].scale is None else pointers([table.scale for table in tables])
    function(
        p.data_ptr(),
        u.data_ptr(),
        y.data_ptr(),
        None if c1 is None else c1.data_ptr(),
        starts.data_ptr(),
        real.data_ptr(),
        len(real),
        u.shape[-1],
        channels.start,
        channels.stop - channels.start,
        weight.data_ptr(),
        bias.data_ptr(),
        pointers([table.values for table in tables]),
        scales,
        (ctypes.c_void_p * len(lengths))(*(plan(size(length)) for length in lengths)),
        torch.get_num_threads(),
    )
    return y


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors)
    )


class Mix(torch.autograd.Function):
    """`mix` of texts of one length, padding at their ends, with gradients: p (B, L, 3D), u (B, L, D), real (B,) -> (B, L, D).

    p and u are float32, or both bfloat16 (autocast); table, weight, bias and their gradients are float32 and so are all sums.

    Two FFTs forward; backward, one repeats what would be too large to keep, one takes the gradient there and one back.
    """

    @staticmethod
    def forward(
        ctx, p: Tensor, u: Tensor, weight: Tensor, bias: Tensor, table: Tensor, real: Tensor
    ) -> Tensor:
        p, u, weight, bias, table = (tensor.contiguous() for tensor in (p, u, weight, bias, table))
        B, L, D = u.shape
        starts, c1 = torch.arange(B + 1, device="cpu") * L, torch.empty_like(u)
        y = mix(
            p.flatten(0, 1),
            u.flatten(0, 1),
            starts,
            weight,
            bias,
            [Table(table, None)] * B,
            real,
            c1.flatten(0, 1),
        ).view_as(u)
        ctx.save_for_backward(p, u, weight, bias, table, real, starts, c1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        p, u, weight, bias, table, real, starts, c1 = ctx.saved_tensors
        dy = dy.contiguous()
        dp, du, dweight, dbias, dtable = (
            torch.empty_like(p),
            torch.empty_like(u),
            torch.zeros_like(weight),
            torch.zeros_like(bias),
            torch.zeros_like(table),
        )
        B, L, D = u.shape
        function = {
            torch.float32: kernel().mix_gradient_f32,
            torch.bfloat16: kernel().mix_gradient_bf16,
        }[p.dtype]
        check_alike(u, c1, dy)
        function(
            *(tensor.data_ptr() for tensor in (p, u, c1, dy, dp, du, starts, real)),
            B,
            D,
            *(tensor.data_ptr() for tensor in (weight, bias, table, dtable, dweight, dbias)),
            plan(size(L)),
            torch.get_num_threads(),
        )
        return dp, du, dweight, dbias, dtable, None


def glu(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU(a) · b; a, b and out contiguous, of one type and a multiple of 16 numbers. `out` may be a."""
    out = torch.empty_like(a) if out is None else out
    check_alike(a, b, out)
    function = {torch.float32: kernel().glu_f32, torch.bfloat16: kernel().glu_bf16}[a.dtype]
    function(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel(), torch.get_num_threads())
    return out


def glu_gradient(a: Tensor, b: Tensor, dm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(a) · b once more, in the place of dm, and the gradients of a and b. Contiguous and of one type, as for `glu`."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    check_alike(a, b, dm)
    function = {
        torch.float32: kernel().glu_gradient_f32,
        torch.bfloat16: kernel().glu_gradient_bf16,
    }[a.dtype]
    function(
        *(tensor.data_ptr() for tensor in (a, b, dm, dm, da, db)),
        a.numel(),
        torch.get_num_threads(),
    )
    return dm, da, db


class GatedBlocks(torch.autograd.Function):
    """y = W_o (GELU(a) · b), (a, b) = W_g x: block by block on slices of x and y, which no one transposes or joins.

    x (n, D), W_g (K, 2I/K, D/K), W_o (K, D/K, I/K), K even, on a CPU with the kernel of lib/kernels/mixer.cpp. float32; or, under
    autocast, y and all products in bfloat16, the weights' gradients too before they become float32. Kept for the backward pass are x, a and b.
    """

    @staticmethod
    def fits(x: Tensor, gated: BlockDiagonalLinear, out: BlockDiagonalLinear) -> bool:
        return paired(gated, out) and gated.weight.shape[1] % 16 == 0 and trains(x, gated.weight)

    @staticmethod
    def forward(ctx, x: Tensor, gated: Tensor, out: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        with torch.autocast("cpu", enabled=False):
            x, gated, out = x.to(dtype).contiguous(), gated.to(dtype), out.to(dtype)
            parts = [
                torch.mm(part, weight.t())
                for part, weight in zip(x.chunk(len(gated), dim=1), gated)
            ]
            y, half = torch.empty_like(x), len(gated) // 2
            for k, (a, b) in enumerate(zip(parts[:half], parts[half:])):
                for side, m in enumerate(glu(a, b).chunk(2, dim=1)):
                    torch.mm(m, out[2 * k + side].t(), out=y.chunk(len(out), dim=1)[2 * k + side])
        ctx.save_for_backward(x, gated, out, *parts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, gated, out, *parts = ctx.saved_tensors
        dy, K = dy.contiguous(), len(gated)
        dx, dgated, dout = torch.empty_like(x), torch.empty_like(gated), torch.empty_like(out)
        xs, dys, dxs = (tensor.chunk(K, dim=1) for tensor in (x, dy, dx))
        with torch.autocast("cpu", enabled=False):
            for k in range(K // 2):
                dm = torch.empty_like(parts[k])
                for side, part in enumerate(dm.chunk(2, dim=1)):
                    torch.mm(dys[2 * k + side], out[2 * k + side], out=part)
                m, da, db = glu_gradient(parts[k], parts[k + K // 2], dm)
                for side, part in enumerate(m.chunk(2, dim=1)):
                    torch.mm(dys[2 * k + side].t(), part, out=dout[2 * k + side])
                for block, grad in ((k, da), (k + K // 2, db)):
                    torch.mm(grad.t(), xs[block], out=dgated[block])
                    torch.mm(grad, gated[block], out=dxs[block])
        return dx, dgated.float(), dout.float()
