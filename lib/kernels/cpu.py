"""The sequence mixer and the gated MLP in C++ (mixer.cpp), compiled at first use, never needed.

    sequence_mixer(…), gated_mlp(…)   the back end of lib/kernels: training on a CPU
    kernel()             the loaded library, or None: no AVX-512, no compiler, or LOCO_NATIVE=0
    mix(p, u, …)         x2 · conv(x1 v) + conv(u) of texts that lie one after another
    spectra(…)           the filters of both convolutions as `mix` wants them
    Mix, Spectra         the same with gradients
    GatedBlocks          the gated MLP's two products, with gradients and without copies

Without a compiler the model falls back to torch with the same results, slower; the log says once
which of the two it is, and why.
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
FLAGS = "-O3 -std=c++17 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -fPIC -shared -pthread -w"
LANES, PAIR = 16, 32  # channels of a vector, and of one pass over a text
POINTER, NUMBER, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
# Functions without a result, by the types of their arguments; the last is the number of threads.
SIGNATURES = {
    ("mix_f32_f32", "mix_bf16_f16", "mix_bf16_f32"): [
        *[POINTER] * 6,
        *[NUMBER] * 4,
        *[POINTER] * 5,
        INT,
    ],
    ("spectra_f32", "spectra_f16"): [*[POINTER] * 4, NUMBER, NUMBER, *[POINTER] * 3, INT],
    ("spectra_gradient",): [*[POINTER] * 4, NUMBER, NUMBER, *[POINTER] * 2, INT],
    ("mix_gradient_f32", "mix_gradient_bf16"): [
        *[POINTER] * 8,
        NUMBER,
        NUMBER,
        *[POINTER] * 7,
        INT,
    ],
    ("glu_f32", "glu_bf16"): [*[POINTER] * 3, NUMBER, INT],
    ("glu_gradient_f32", "glu_gradient_bf16"): [*[POINTER] * 6, NUMBER, INT],
}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
log = logging.getLogger(__name__)


# ------------------------------------------------------------------ the library


def kernel() -> ctypes.CDLL | None:
    """The compiled library; None if there is none, or if `use` says torch or the definition."""
    switched_off = os.environ.get("LOCO_NATIVE") == "0"  # which `compiled` reports
    return compiled() if switched_off or back_end() == "auto" else None


@cache
def compiled() -> ctypes.CDLL | None:
    """The same, asked once."""
    try:
        library = load()
    except (OSError, RuntimeError) as error:
        log.warning(
            "lib/kernels/mixer.cpp is not used (%s): the encoder runs in torch, with the same "
            "results",
            " ".join(str(error).split())[:300],
        )
        return None
    log.info("lib/kernels/mixer.cpp is used: %s", library._name)
    return library


def load() -> ctypes.CDLL:
    """Compile mixer.cpp if the cache does not hold it, and load it.

    Raises:
        RuntimeError: this machine cannot, or the cached file is not safe to load.
    """
    if os.environ.get("LOCO_NATIVE", "1") == "0":
        raise RuntimeError("LOCO_NATIVE=0")
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        raise RuntimeError(f"it needs AVX-512, and this processor has {capability}")
    candidates = (os.environ.get("CXX"), *map(shutil.which, ("c++", "g++", "clang++")))
    compiler = next(filter(None, candidates), None)
    if not compiler:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or name one in CXX")
    command = [compiler, *FLAGS.split()]
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loco-workbench"
    library = folder / f"mixer-{name}.so"
    if not library.is_file():
        compile_to(library, command)
    for path in (folder, library):
        refuse_writable_by_others(path)
    loaded = ctypes.CDLL(str(library))
    loaded.plan_new.restype, loaded.plan_new.argtypes = POINTER, [NUMBER]
    for names, types in SIGNATURES.items():
        for function in (getattr(loaded, name) for name in names):
            function.argtypes, function.restype = types, None
    return loaded


def compile_to(library: Path, command: list[str]) -> None:
    """Compile mixer.cpp whole or not at all, also if two processes do so at once."""
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        draft = f"{folder}/mixer.so"
        command = [*command, str(SOURCE), "-o", draft]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{command[0]} fails: {result.stderr}")
        os.chmod(draft, 0o700)  # the compiler follows the umask
        os.replace(draft, library)


def refuse_writable_by_others(path: Path) -> None:
    """Code that others may write is not run."""
    status = path.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise RuntimeError(
            f"{path} belongs to, or can be written by, others: remove it, or set XDG_CACHE_HOME to "
            "a folder of your own"
        )


# ------------------------------------------------------------------ back end of lib/kernels


def sequence_mixer(layer, u: Tensor, mask: Tensor | None) -> Tensor | None:
    """y (B, L, D) of u (B, L, D); None for a mask with holes, or outside of training.

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
    filters = [*gated.before_decay(gated.hidden(L)), gated.bias]
    if residual is None:
        filters += [None, None, None]
    else:
        filters += [*residual.before_decay(residual.hidden(L)), residual.bias]
    table = Spectra.apply(gated.time(L), gated.deltas(), size(L), *filters)
    short = layer.short_filter
    return layer.out_linear(Mix.apply(p, u, short.weight[:, 0].t(), short.bias, table, real))


def gated_mlp(mlp, h: Tensor) -> Tensor | None:
    """y (B, L, D) of h (B, L, D); None outside of training, or with dropout."""
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
    """Whether the kernel can be used with gradients: on a CPU, with weights of float32.

    Products are of float32 or, under autocast, of bfloat16.
    """
    dtypes = (F32, BF16) if torch.is_autocast_enabled("cpu") else (F32,)
    on_cpu = x.device.type == "cpu" and weight.dtype == F32
    return on_cpu and x.dtype in dtypes and compute_dtype(x) in dtypes and kernel() is not None


# ------------------------------------------------------------------ spectra


def size(length: int) -> int:
    """The FFT's size for a text of so many tokens: the next power of two from 2 · length - 1."""
    return 1 << max(0, 2 * length - 2).bit_length()


@cache
def plan(n: int) -> int:
    """The twiddle factors of an FFT, made once; an address."""
    return kernel().plan_new(n)


class Table(NamedTuple):
    """The spectra of a layer's two filters, (D/16, n/2 + 1, 4, 16): re A, im A, re B, im B of

        A = (K1 + K2) / 2n,   B = (K1 - K2) / 2n

    values: float32; float16 beside the bfloat16 activations of an encoder, but not in training,
        which needs their gradient.
    scale: (D,), what float16 is to be multiplied by: each channel's largest number is 2^14.
    """

    values: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def channels(self, part: slice) -> "Table":
        """The spectra of some channels, without a copy; `part` in steps of 16."""
        values = self.values[part.start // LANES : part.stop // LANES]
        return Table(values, None if self.scale is None else self.scale[part])


def spectra(
    gated: tuple,
    residual: tuple | None,
    time: Tensor,
    delta: Tensor,
    n: int,
    dtype: torch.dtype = F32,
) -> Table:
    """The table for FFTs of size n that `mix` reads beside activations of `dtype`.

    Not in bfloat16: an error in a filter is the same at every position, and layers add it up.

    Args:
        gated, residual: (back, ahead or None, gain) of each filter, (L, D) before their decay, and
            (D,), float32; L ≤ n/2, or 1.
        time, delta: decay = exp(-time |delta|), (L,) and (D,).
    """
    half = dtype == BF16
    L, D = gated[0].shape
    shape = D // LANES, n // 2 + 1, 4, LANES
    values = torch.empty(shape, dtype=F16 if half else F32, device="cpu")
    scale = torch.empty(D, dtype=F32, device="cpu") if half else None
    filters = (*gated, *(residual or (None,) * 3))
    filters = [None if part is None else part.contiguous() for part in filters]
    given = [time, delta, *(part for part in filters if part is not None)]
    if not all(tensor.dtype == F32 and tensor.is_contiguous() for tensor in given):
        types = [(tensor.dtype, tuple(tensor.shape)) for tensor in given]
        raise TypeError(f"lib/kernels/mixer.cpp reads float32 as it lies: got {types}")
    (kernel().spectra_f16 if half else kernel().spectra_f32)(
        *filter_pointers(filters),
        *addresses(time, delta),
        L,
        D,
        *addresses(values, scale),
        plan(n),
        torch.get_num_threads(),
    )
    return Table(values, scale)


class Spectra(torch.autograd.Function):
    """`spectra` with gradients: back, ahead and gain of both filters -> a float32 table."""

    @staticmethod
    def forward(ctx, time: Tensor, delta: Tensor, n: int, *filters: Tensor | None) -> Tensor:
        ctx.save_for_backward(time, delta)
        ctx.n, ctx.shapes = n, [None if part is None else part.shape for part in filters]
        residual = None if filters[3] is None else filters[3:]
        return spectra(filters[:3], residual, time, delta, n).values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        time, delta = ctx.saved_tensors
        grad = grad.contiguous()
        grads = [
            None if shape is None else torch.empty(shape, dtype=F32, device="cpu")
            for shape in ctx.shapes
        ]
        kernel().spectra_gradient(
            *filter_pointers(grads),
            *addresses(time, delta),
            len(time),
            len(delta),
            grad.data_ptr(),
            plan(ctx.n),
            torch.get_num_threads(),
        )
        return None, None, None, *grads


def filter_pointers(filters: list) -> tuple:
    """Of (back, ahead, gain) of two filters: the addresses of the taps, and of the gains."""
    back, ahead, gain, back2, ahead2, gain2 = filters
    return pointers((back, ahead, back2, ahead2)), pointers((gain, gain2))


def pointers(tensors):
    """An array of addresses, as C reads it; None becomes a null pointer."""
    return (POINTER * len(tensors))(*addresses(*tensors))


def addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


# ------------------------------------------------------------------ the mixer


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
        real: tokens of each text, int64; what follows is padding, x1 · v and u are 0 there. None:
            all.
        c1: where conv(x1 · v) is put, (T, D), like u.
        y, channels: where the result is put, and which channels, in steps of 32; the tables hold
            those alone.

    Raises:
        TypeError, ValueError: types, shapes or lengths that do not belong together: C++ would read
            beyond its inputs.
    """
    y = torch.empty_like(u) if y is None else y
    channels = channels or slice(0, u.shape[-1])
    real = starts.diff() if real is None else real
    function = mix_function(p, u, y, c1, tables)
    scales = [table.scale for table in tables if table.scale is not None]
    values = [table.values for table in tables]
    check_types([p, u, y, c1, *values], [weight, bias, *scales], [starts, real])
    check_shapes(p, u, y, c1, weight, bias, channels)
    check_texts(u, starts, real, tables, channels)
    lengths = starts.diff().tolist()
    function(
        *addresses(p, u, y, c1, starts, real),
        len(real),
        u.shape[-1],
        channels.start,
        channels.stop - channels.start,
        *addresses(weight, bias),
        pointers(values),
        pointers(scales) if scales else None,
        (POINTER * len(lengths))(*(plan(size(length)) for length in lengths)),
        torch.get_num_threads(),
    )
    return y


def mix_function(p: Tensor, u: Tensor, y: Tensor, c1: Tensor | None, tables: list[Table]):
    """The C++ function for these types."""
    activations = [p, u, y] if c1 is None else [p, u, y, c1]
    types = {tensor.dtype for tensor in activations}, {table.values.dtype for table in tables}
    functions = {F32: {F32: "mix_f32_f32"}, BF16: {F16: "mix_bf16_f16", F32: "mix_bf16_f32"}}
    if len(types[0]) == len(types[1]) == 1:
        name = functions.get(types[0].pop(), {}).get(types[1].pop())
        if name is not None:
            return getattr(kernel(), name)
    given = [*activations, *(table.values for table in tables)]
    names = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in given)
    raise TypeError(
        f"p, u, y (and c1) and the tables are {names}: all of them float32, or bfloat16 and tables "
        "of float16 or float32"
    )


def check_types(activations: list, floats: list, integers: list) -> None:
    tensors = [tensor for tensor in (*activations, *floats, *integers) if tensor is not None]
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("mix reads its inputs as they lie: give it contiguous ones")
    types = {tensor.dtype for tensor in floats}, {tensor.dtype for tensor in integers}
    if types != ({F32}, {torch.int64}):
        raise TypeError("weight, bias and scales are float32, starts and real int64")


def check_shapes(p, u, y, c1, weight, bias, channels: slice) -> None:
    T, D = u.shape
    shapes = p.shape, y.shape, weight.shape, bias.shape, u.shape if c1 is None else c1.shape
    expected = (T, 3 * D), (T, D), (3, 3 * D), (3 * D,), (T, D)
    in_steps = not (channels.start % PAIR or channels.stop % PAIR)
    if shapes != expected or not in_steps or not 0 <= channels.start < channels.stop <= D:
        raise ValueError(
            f"for u {(T, D)} and channels {channels.start} to {channels.stop}, in steps of {PAIR}: "
            f"got p {tuple(p.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )


def check_texts(u: Tensor, starts: Tensor, real: Tensor, tables: list, channels: slice) -> None:
    lengths, tokens = starts.diff().tolist(), real.tolist()
    inside = 0 <= int(starts[0]) and int(starts[-1]) <= len(u) and min(lengths) >= 1
    if (
        not inside
        or len(tokens) != len(lengths)
        or any(not 0 <= count <= length for count, length in zip(tokens, lengths))
    ):
        raise ValueError(
            f"texts that begin at {starts.tolist()} with {tokens} tokens do not lie in {len(u)}"
        )
    blocks = (channels.stop - channels.start) // LANES
    shapes = [(blocks, size(length) // 2 + 1, 4, LANES) for length in lengths]
    scaled = all((table.scale is None) == (table.values.dtype != F16) for table in tables)
    if [tuple(table.values.shape) for table in tables] != shapes or not scaled:
        raise ValueError(
            f"tables of {[tuple(table.values.shape) for table in tables]} do not fit texts of "
            f"{lengths} tokens and channels {channels.start} to {channels.stop}"
        )


class Mix(torch.autograd.Function):
    """`mix` of texts of one length, padding at their ends, with gradients.

    p (B, L, 3D), u (B, L, D), real (B,) -> (B, L, D). p and u are float32, or both bfloat16
    (autocast); table, weight, bias, their gradients and all sums are float32.

    Two FFTs forward. Backward, one repeats what would be too large to keep, one takes the gradient
    there and one back.
    """

    @staticmethod
    def forward(ctx, p, u, weight, bias, table, real) -> Tensor:
        p, u, weight, bias, table = (tensor.contiguous() for tensor in (p, u, weight, bias, table))
        B, L, _ = u.shape
        starts, c1 = torch.arange(B + 1, device="cpu") * L, torch.empty_like(u)
        texts, tables = [p.flatten(0, 1), u.flatten(0, 1), starts], [Table(table, None)] * B
        y = mix(*texts, weight, bias, tables, real, c1.flatten(0, 1)).view_as(u)
        ctx.save_for_backward(p, u, weight, bias, table, real, starts, c1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        p, u, weight, bias, table, real, starts, c1 = ctx.saved_tensors
        dy, (B, L, D) = dy.contiguous(), u.shape
        dp, du = torch.empty_like(p), torch.empty_like(u)
        dweight, dbias, dtable = map(torch.zeros_like, (weight, bias, table))
        name = "mix_gradient_f32" if p.dtype == F32 else "mix_gradient_bf16"
        check_alike(u, c1, dy)
        getattr(kernel(), name)(
            *addresses(p, u, c1, dy, dp, du, starts, real),
            B,
            D,
            *addresses(weight, bias, table, dtable, dweight, dbias),
            plan(size(L)),
            torch.get_num_threads(),
        )
        return dp, du, dweight, dbias, dtable, None


# ------------------------------------------------------------------ the MLP


def glu(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU(a) · b; a, b and out contiguous, of one type, 16 k numbers. `out` may be a."""
    out = torch.empty_like(a) if out is None else out
    check_alike(a, b, out)
    function = kernel().glu_f32 if a.dtype == F32 else kernel().glu_bf16
    function(*addresses(a, b, out), a.numel(), torch.get_num_threads())
    return out


def glu_gradient(a: Tensor, b: Tensor, dm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(a) · b once more, in the place of dm, and the gradients of a and b."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    check_alike(a, b, dm)
    function = kernel().glu_gradient_f32 if a.dtype == F32 else kernel().glu_gradient_bf16
    function(*addresses(a, b, dm, dm, da, db), a.numel(), torch.get_num_threads())
    return dm, da, db


def check_alike(*tensors: Tensor) -> None:
    types = {(tensor.dtype, tensor.shape) for tensor in tensors}
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    if len(types) > 1 or tensors[0].numel() % LANES or not contiguous:
        got = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        raise TypeError(
            "lib/kernels/mixer.cpp takes contiguous tensors of one type and shape, a multiple of "
            f"{LANES} numbers: got {got}"
        )


class GatedBlocks(torch.autograd.Function):
    """y = W_o (GELU(a) · b), (a, b) = W_g x: block by block on slices of x and y, without copies.

    x (n, D), W_g (K, 2I/K, D/K), W_o (K, D/K, I/K), K even, on a CPU with the compiled library.
    float32; or, under autocast, y and all products in bfloat16, the weights' gradients too before
    they become float32. Kept for the backward pass are x, a and b.
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
