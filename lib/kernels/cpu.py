"""Optional C++ version (mixer.cpp) of the sequence mixer and the gated MLP, compiled on first use.

    sequence_mixer(…), gated_mlp(…)   the back end of lib/kernels for training on a CPU
    kernel()             the loaded library, or None: no compiler, or LOCO_NATIVE=0
    mix(p, u, …)         x2 · conv(x1 v) + conv(u) of texts that lie one after another
    spectra(…)           the spectra of both long filters, which `mix` reads
    Mix, Spectra         the same with gradients
    GatedBlocks          the matrix multiplications of the gated MLP, with gradients

It is compiled for the processor at hand (AVX-512, AVX2 with FMA, NEON, or whatever the compiler
knows), and cached by source, compiler and processor.
Without a compiler the model falls back to PyTorch: slower, with the same results. The log says once
which of the two computes, and why.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.kernels.support import back_end, compute_dtype
from lib.operators.monarch import BlockDiagonalLinear, paired
from lib.operators.shared import active, once

SOURCE = Path(__file__).with_name("mixer.cpp")
# No -ffast-math: gcc would have the library change how the whole process treats small numbers.
FLAGS = "-O3 -std=c++17 -ffp-contract=fast -fPIC -shared -pthread -w -Wno-psabi"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
STEP, PAIR = 16, 32  # numbers that `glu` takes at a time; channels of one pass over a text
POINTER, NUMBER, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
# The arguments of each function: p for POINTER, n for NUMBER, f for float, i for the threads.
SIGNATURES = {
    "mix_f32_f32 mix_bf16_f16 mix_bf16_f32": "pppppp nnnn ppppp i",
    "spectra_f32 spectra_f16": "pppp nn ppp i",
    "spectra_gradient": "pppp nn pp i",
    "mix_gradient_f32 mix_gradient_bf16": "pppppppp nn ppppppp i",
    "glu_f32 glu_bf16": "ppp n i",
    "glu_gradient_f32 glu_gradient_bf16": "pppppp n i",
    "add_norm_f32 add_norm_bf16": "pppppp nn f i",
    "lanes": "",
}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (dtype of the activations, dtype of the spectra) -> function
MIXERS = {(F32, F32): "mix_f32_f32", (BF16, F16): "mix_bf16_f16", (BF16, F32): "mix_bf16_f32"}
UNUSED = "lib/kernels/mixer.cpp is not used (%s): the encoder runs in torch, with the same results"
log = logging.getLogger(__name__)


def kernel() -> ctypes.CDLL | None:
    """The compiled library; None if there is none, or if `use` says torch or the definition."""
    switched_off = os.environ.get("LOCO_NATIVE") == "0"  # which `compiled` reports
    return compiled() if switched_off or back_end() == "auto" else None


@cache
def compiled() -> ctypes.CDLL | None:
    """Load the library once, and log the outcome."""
    try:
        library = load()
    except (OSError, RuntimeError) as error:
        log.warning(UNUSED, " ".join(str(error).split())[:300])
        return None
    log.info("lib/kernels/mixer.cpp is used: %s", library._name)
    return library


def load() -> ctypes.CDLL:
    """Compile mixer.cpp unless the cache holds the library, and load it.

    Raises:
        RuntimeError: this machine cannot compile or run it, or others can write the cached file.
    """
    candidates = (os.environ.get("CXX"), *map(shutil.which, ("c++", "g++", "clang++")))
    compiler = next(filter(None, candidates), None)
    obstacles = {
        "LOCO_NATIVE=0": os.environ.get("LOCO_NATIVE") == "0",
        "no C++ compiler: install g++ or clang++, or name one in CXX": not compiler,
    }
    if any(obstacles.values()):
        raise RuntimeError(next(text for text, applies in obstacles.items() if applies))
    command = [compiler, *FLAGS.split(), *processor_flags()]
    key = SOURCE.read_bytes() + " ".join(command).encode() + target(command)
    name = hashlib.sha256(key).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loco-workbench"
    library = folder / f"mixer-{name}.so"
    if not library.is_file():
        compile_to(library, command)
    for path in (folder, library):
        refuse_writable_by_others(path)
    loaded = ctypes.CDLL(str(library))
    loaded.plan_new.restype, loaded.plan_new.argtypes = POINTER, [NUMBER]
    types = {"p": POINTER, "n": NUMBER, "f": ctypes.c_float, "i": INT}
    for names, codes in SIGNATURES.items():
        for function in (getattr(loaded, name) for name in names.split()):
            function.argtypes = [types[code] for code in codes.replace(" ", "")]
            function.restype = NUMBER if names == "lanes" else None
    return loaded


def processor_flags() -> list[str]:
    """The compiler's flags for this processor, and for no more of it than torch uses."""
    machine, apple = platform.machine().lower(), platform.system() == "Darwin"
    if machine in ("x86_64", "amd64"):
        avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return AVX512.split() if avx512 else ["-march=native", "-mno-avx512f"]
    if machine in ("aarch64", "arm64"):
        return ["-mcpu=apple-m1" if apple else "-mcpu=native"]  # Apple clang may not know "native"
    return []


def target(command: list[str]) -> bytes:
    """What the compiler says of its version and of the processor that it compiles for."""
    macros = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    return run(macros).encode()


def run(command: list[str]) -> str:
    """The output of a compiler.

    Raises:
        RuntimeError: it fails.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} fails: {result.stderr}")
    return result.stdout


def compile_to(library: Path, command: list[str]) -> None:
    """Compile mixer.cpp. Two processes may do so at once: the library appears when it is whole."""
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        draft = f"{folder}/mixer.so"
        run([*command, str(SOURCE), "-o", draft])
        os.chmod(draft, 0o700)  # the compiler follows the umask
        os.replace(draft, library)


def refuse_writable_by_others(path: Path) -> None:
    """The process must not run code that other users can write."""
    status = path.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise RuntimeError(
            f"{path} belongs to, or can be written by, others: remove it, or set XDG_CACHE_HOME to "
            "a folder of your own"
        )


def call(name: str, *arguments) -> None:
    """Call a function of mixer.cpp with the addresses of tensors and the number of threads."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(kernel(), name)(*plain, torch.get_num_threads())


def lanes() -> int:
    """W, the number of channels of a vector. The layout of spectra depends on it."""
    return kernel().lanes()


def sequence_mixer(layer, u: Tensor, mask: Tensor | None) -> Tensor | None:
    """y (B, L, D) of u (B, L, D); None for a mask with holes, or outside of training.

    In training it runs without gradients too: both passes of a micro-batch are then one arithmetic.
    """
    if not (torch.is_grad_enabled() or layer.training):
        return None
    u = u if mask is None else u * mask.transpose(1, 2)
    if not (trains(u, layer.in_linear.weight) and fits(u.shape[-1])):
        return None
    if mask is not None and not bool((mask[..., 1:] <= mask[..., :-1]).all()):
        return None
    B, L, _ = u.shape
    u = u.to(compute_dtype(u))
    p = layer.in_linear(u)  # (B, L, 3D)
    real = torch.full((B,), L, device="cpu") if mask is None else mask[:, 0].sum(dim=1).long()
    p = p if mask is None else p * mask.transpose(1, 2).to(p.dtype)
    n, short = size(L), layer.short_filter
    # In a step the taps reach to the end of the transform, so that texts of all lengths share them.
    (table,) = once((layer, "spectra", n), lambda: (layer_spectra(layer, L, n),))
    return layer.out_linear(Mix.apply(p, u, short.weight[:, 0].t(), short.bias, table, real))


def layer_spectra(layer, L: int, n: int) -> Tensor:
    """`spectra` of a layer's filters with gradients, for FFTs of size n and texts of L tokens."""
    gated, taps = layer.gated_filter, []
    for filter in (gated, layer.residual_filter):
        if filter is not None:
            taps += [*filter.kernels(n // 2 if active() and n > 1 else L), filter.bias]
    taps += [None] * (6 - len(taps))
    return Spectra.apply(gated.time(len(taps[0])), gated.deltas(), n, *taps)


def gated_mlp(mlp, h: Tensor) -> Tensor | None:
    """y (B, L, D) of h (B, L, D); None outside of training."""
    trained = torch.is_grad_enabled() or mlp.training
    x, dropout = h.flatten(0, 1), mlp.dropout.p if mlp.training else 0.0
    if not trained or dropout == 1 or not GatedBlocks.fits(x, mlp.gated_layers, mlp.wo):
        return None
    product = GatedBlocks.apply(x, mlp.gated_layers.weight, mlp.wo.weight, dropout)
    return mlp.layernorm(product + (x + mlp.wo.bias)).view_as(h)


def fits(channels: int) -> bool:
    """Whether the library is loaded and takes this number of channels."""
    return channels % PAIR == 0 and kernel() is not None


def trains(x: Tensor, weight: Tensor) -> bool:
    """Whether the library computes gradients here: on a CPU, with float32 weights.

    Matrix multiplications are in float32, or in bfloat16 under autocast.
    """
    dtypes = (F32, BF16) if torch.is_autocast_enabled("cpu") else (F32,)
    on_cpu = x.device.type == "cpu" and weight.dtype == F32
    return on_cpu and x.dtype in dtypes and compute_dtype(x) in dtypes and kernel() is not None


# ------------------------------------------------------------------ spectra


def size(length: int) -> int:
    """The FFT size for a text of `length` tokens: the smallest power of two ≥ 2 · length - 1."""
    return 1 << max(0, 2 * length - 2).bit_length()


@cache
def plan(n: int) -> int:
    """The address of the twiddle factors of an FFT of size n, computed once."""
    return kernel().plan_new(n)


class Table(NamedTuple):
    """The spectra of a layer's two filters, (D/W, n/2 + 1, 4, W): re A, im A, re B, im B of

        A = (K1 + K2) / 2n,   B = (K1 - K2) / 2n

    values: float32. An encoder in bfloat16 reads float16; training needs the gradient in float32.
    scale: (D,), the factor by which float16 values are multiplied: the largest value of each
        channel is stored as 2^14.
    """

    values: Tensor
    scale: Tensor | None

    def channels(self, part: slice) -> "Table":
        """The spectra of some channels, without a copy; `part` in steps of W."""
        W = self.values.shape[-1]
        values = self.values[part.start // W : part.stop // W]
        return Table(values, None if self.scale is None else self.scale[part])


def empty_table(channels: int, n: int, dtype: torch.dtype, memory=None) -> Table:
    """A table of so many channels for FFTs of size n, to be filled by `spectra`.

    memory: (shape, dtype) -> the tensor that holds the values; None: torch's.
    """
    half, W = dtype == BF16, lanes()
    memory = memory or partial(torch.empty, device="cpu")
    values = memory((channels // W, n // 2 + 1, 4, W), dtype=F16 if half else F32)
    return Table(values, torch.empty(channels, dtype=F32, device="cpu") if half else None)


def spectra(filters, time, delta, n: int, dtype=F32, table: Table | None = None) -> Table:
    """The spectra for FFTs of size n that `mix` reads beside activations of `dtype`.

    They are not in bfloat16: an error in a filter is the same at every position, and the errors of
    all layers add up.

    Args:
        filters: (back, ahead or None, gain) of the gated filter, then of the residual filter, or
            three None. Taps (L, D) without their decay, L ≤ n/2 or 1; gains (D,); float32.
        time, delta: decay = exp(-time |delta|), (L,) and (D,).
        table: receives the result.
    """
    (L, D), half = filters[0].shape, dtype == BF16
    table = table or empty_table(D, n, dtype)
    assert table.values.shape == (D // lanes(), n // 2 + 1, 4, lanes())
    assert table.values.dtype == (F16 if half else F32) and table.values.is_contiguous()
    assert table.scale.shape == (D,) if half else table.scale is None
    filters = [None if part is None else part.contiguous() for part in filters]
    for tensor in (time, delta, *(part for part in filters if part is not None)):
        assert tensor.dtype == F32 and tensor.is_contiguous()
    name = "spectra_f16" if half else "spectra_f32"
    call(name, *filter_pointers(filters), time, delta, L, D, *table, plan(n))
    return table


class Spectra(torch.autograd.Function):
    """`spectra` in float32 with gradients of the taps and gains."""

    @staticmethod
    def forward(ctx, time: Tensor, delta: Tensor, n: int, *filters: Tensor | None) -> Tensor:
        ctx.save_for_backward(time, delta)
        ctx.n, ctx.shapes = n, [None if part is None else part.shape for part in filters]
        return spectra(filters, time, delta, n).values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        time, delta = ctx.saved_tensors
        grad = grad.contiguous()
        options = dict(dtype=F32, device="cpu")
        grads = [None if shape is None else torch.empty(shape, **options) for shape in ctx.shapes]
        sizes = len(time), len(delta)
        call("spectra_gradient", *filter_pointers(grads), time, delta, *sizes, grad, plan(ctx.n))
        return None, None, None, *grads


def filter_pointers(filters: list) -> tuple:
    """The addresses of both filters' taps, and of their gains."""
    back, ahead, gain, back2, ahead2, gain2 = filters
    return pointers((back, ahead, back2, ahead2)), pointers((gain, gain2))


def pointers(tensors):
    """An array of addresses, as C reads it; None becomes a null pointer."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (POINTER * len(addresses))(*addresses)


# ------------------------------------------------------------------ the mixer


def mix(p, u, starts, weight, bias, tables, real=None, c1=None, y=None, channels=None) -> Tensor:
    """x2 · conv(x1 · v) + conv(u) of each text, (T, D), in u's dtype.

    Args:
        p: (T, 3D), float32 or bfloat16; u: (T, D), of p's dtype.
        starts: the first token of each text, then T; int64, (texts + 1,).
        weight: of the short convolution, (3, 3D), float32; bias: (3D,).
        tables: the `Table` of each text; float16 only beside bfloat16.
        real: the number of tokens of each text, int64. The positions behind them are padding:
            x1 · v and u are 0 there. None: no padding.
        c1: receives conv(x1 · v), (T, D), in u's dtype.
        y: receives the result.
        channels: the slice of channels to compute, in steps of 32; the tables hold only these.
    """
    y = torch.empty_like(u) if y is None else y
    channels = channels or slice(0, u.shape[-1])
    real = starts.diff() if real is None else real
    check(p, u, y, c1, weight, bias, starts, real, tables, channels)
    lengths, count = starts.diff().tolist(), channels.stop - channels.start
    (spectra_dtype,) = {table.values.dtype for table in tables}
    scales = [table.scale for table in tables if table.scale is not None]
    call(
        MIXERS[u.dtype, spectra_dtype],
        *(p, u, y, c1, starts, real, len(real), u.shape[-1], channels.start, count, weight, bias),
        pointers([table.values for table in tables]),
        pointers(scales) if scales else None,
        (POINTER * len(lengths))(*(plan(size(length)) for length in lengths)),
    )
    return y


def check(p, u, y, c1, weight, bias, starts, real, tables, channels) -> None:
    """Assert dtypes, shapes and layout of the arguments of `mix`, which C++ does not see."""
    (T, D), lengths, count = u.shape, starts.diff(), channels.stop - channels.start
    W = lanes()
    activations = [p, u, y] if c1 is None else [p, u, y, c1]
    values, integers = [table.values for table in tables], [starts, real]
    floats = [weight, bias, *(table.scale for table in tables if table.scale is not None)]
    dtypes = [{x.dtype for x in tensors} for tensors in (activations, floats, integers)]
    assert dtypes == [{u.dtype}, {F32}, {torch.int64}]
    assert all(x.is_contiguous() for x in (*activations, *floats, *integers, *values))
    assert p.shape == (T, 3 * D) and {x.shape for x in activations[1:]} == {u.shape}
    assert weight.shape == (3, 3 * D) and bias.shape == (3 * D,)
    assert channels.start % PAIR == count % PAIR == 0 <= channels.start < channels.stop <= D
    assert 0 <= starts[0] and starts[-1] <= T and len(real) == len(lengths)
    assert bool(((lengths >= 1) & (real >= 0) & (real <= lengths)).all())
    bins = [size(length) // 2 + 1 for length in lengths.tolist()]
    assert [x.shape for x in values] == [(count // W, n, 4, W) for n in bins]
    assert all((table.scale is None) == (table.values.dtype != F16) for table in tables)


class Mix(torch.autograd.Function):
    """`mix` of texts of one length, padding at their ends, with gradients.

    p (B, L, 3D), u (B, L, D), real (B,) -> (B, L, D). p and u are float32, or both bfloat16
    (autocast); table, weight, bias, their gradients and all sums are float32.

    The forward pass takes two FFTs. The backward pass takes three: it computes one spectrum again
    that would be too large to keep, and transforms the gradient there and back.
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
        check_alike(u, c1, dy)
        call(
            "mix_gradient_f32" if p.dtype == F32 else "mix_gradient_bf16",
            *(p, u, c1, dy, dp, du, starts, real, B, D, weight, bias),
            *(table, dtable, dweight, dbias, plan(size(L))),
        )
        return dp, du, dweight, dbias, dtable, None


def glu(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU(a) · b; a, b and out have one dtype and one shape. `out` may be a."""
    out = torch.empty_like(a) if out is None else out
    check_alike(a, b, out)
    call("glu_f32" if a.dtype == F32 else "glu_bf16", a, b, out, a.numel())
    return out


def glu_gradient(a: Tensor, b: Tensor, dm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(a) · b, written over dm, and the gradients of a and b."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    check_alike(a, b, dm)
    name = "glu_gradient_f32" if a.dtype == F32 else "glu_gradient_bf16"
    call(name, a, b, dm, dm, da, db, a.numel())
    return dm, da, db


def add_norm(a: Tensor, h: Tensor, bias: Tensor, norm: torch.nn.LayerNorm, out: Tensor) -> Tensor:
    """LayerNorm(a + h + bias) in `out`, (n, D), D a multiple of 32; `out` may be a or h."""
    (n, D), vectors = a.shape, (bias, norm.weight, norm.bias)
    check_alike(a, h, out)
    assert D % PAIR == 0 and all(x.dtype == F32 and x.shape == (D,) for x in vectors)
    name = "add_norm_f32" if a.dtype == F32 else "add_norm_bf16"
    call(name, a, h, *vectors, out, n, D, norm.eps)
    return out


def check_alike(*tensors: Tensor) -> None:
    """Assert one dtype and shape, contiguous, a multiple of 16 numbers, as C++ reads them."""
    assert len({(tensor.dtype, tensor.shape) for tensor in tensors}) == 1
    assert tensors[0].dtype in (F32, BF16)
    assert all(tensor.is_contiguous() for tensor in tensors) and tensors[0].numel() % STEP == 0


class GatedBlocks(torch.autograd.Function):
    """y = W_o (GELU(a) · b · r), (a, b) = W_g x: block by block on slices of x and y, no copies.

    x (n, D), W_g (K, 2I/K, D/K), W_o (K, D/K, I/K), K even, on a CPU with the compiled library.
    All tensors are float32. Under autocast y and all matrix multiplications are bfloat16, also for
    the weights' gradients, which become float32 afterwards. The backward pass keeps x, a and b · r.
    r is 1, or dropout's factors; it draws them as nn.Dropout does, and again in the backward pass.
    """

    @staticmethod
    def fits(x: Tensor, gated: BlockDiagonalLinear, out: BlockDiagonalLinear) -> bool:
        return paired(gated, out) and gated.weight.shape[1] % STEP == 0 and trains(x, gated.weight)

    @staticmethod
    def forward(ctx, x: Tensor, gated: Tensor, out: Tensor, dropout: float) -> Tensor:
        dtype = compute_dtype(x)
        ctx.dropout, ctx.state = dropout, torch.get_rng_state() if dropout else None
        with torch.autocast("cpu", enabled=False):
            x, gated, out = x.to(dtype).contiguous(), gated.to(dtype), out.to(dtype)
            xs = x.chunk(len(gated), dim=1)
            parts = [torch.mm(part, weight.t()) for part, weight in zip(xs, gated)]
            y, half = torch.empty_like(x), len(gated) // 2
            if dropout:
                for b, factors in zip(parts[half:], GatedBlocks.factors(parts, dropout)):
                    b.mul_(factors)
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
        if ctx.dropout:
            generator = torch.Generator()
            generator.set_state(ctx.state)
            factors = GatedBlocks.factors(parts, ctx.dropout, generator)
        xs, dys, dxs = (tensor.chunk(K, dim=1) for tensor in (x, dy, dx))
        with torch.autocast("cpu", enabled=False):
            for k in range(K // 2):
                dm = torch.empty_like(parts[k])
                for side, part in enumerate(dm.chunk(2, dim=1)):
                    torch.mm(dys[2 * k + side], out[2 * k + side], out=part)
                m, da, db = glu_gradient(parts[k], parts[k + K // 2], dm)
                if ctx.dropout:
                    db.mul_(factors[k])
                for side, part in enumerate(m.chunk(2, dim=1)):
                    torch.mm(dys[2 * k + side].t(), part, out=dout[2 * k + side])
                for block, grad in ((k, da), (k + K // 2, db)):
                    torch.mm(grad.t(), xs[block], out=dgated[block])
                    torch.mm(grad, gated[block], out=dxs[block])
        return dx, dgated.float(), dout.float(), None

    @staticmethod
    def factors(parts: list[Tensor], dropout: float, generator=None) -> tuple[Tensor, ...]:
        """nn.Dropout's factors of GELU(a) · b, 0 or 1 / (1 - dropout), in K/2 blocks."""
        (n, width), half = parts[0].shape, len(parts) // 2
        factors = torch.empty(n, half * width, dtype=parts[0].dtype, device="cpu")
        factors.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
        return factors.chunk(half, dim=1)
