"""A fast encoder for a CPU: the model's `forward` for texts of any lengths, without gradients.

    Engine(model)(ids)                   pooled outputs of rows of ids, float32 (n, D); within 1e-4
                                         of the model's own
    Engine(model, torch.bfloat16)(ids)   matrix multiplications in bfloat16; FFTs, sums and
                                         LayerNorms in float32

Texts lie one after another, (T, D), without padding. The filters do not depend on the text, so the
engine computes their spectra once for each FFT size and keeps them, up to a limit. One pass of
mixer.cpp (`lib.kernels.cpu`) computes a layer's short convolution, gates and both long
convolutions. The MLP reads one tile of tokens at a time, so its activations never leave the
processor's cache. All layers write into the same memory, because the system clears what it hands
out afresh. If mixer.cpp cannot be compiled, or does not take the model's width or its mixer, the
model's own `forward` computes.

A rounding error of a filter or a weight is the same at all positions, and a long convolution sums
over all positions. Therefore the spectra are stored in float16, scaled channel by channel. In long
texts the bias restores what rounding the matrix W to W' took from the mean token:

    y = W' x + (b + (W - W') mean(x))

The definition is lib/model/m2bert.py; tests/kernels/test_engine.py compares the two.
Axes: n texts, T tokens of all texts, D width, K blocks.
"""

import contextlib
import math
import mmap
from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels import cpu, support
from lib.operators.monarch import paired

TILE = 1024  # tokens in one pass through an MLP
LONG = 1024  # a text of at least this many tokens has its own matrix multiplications and mean token
# Limit of the spectrum cache in bytes. The 80M model's spectra for 32,768 tokens fill 2.3 GiB for
# bfloat16 activations, 4.6 GiB for float32.
SPECTRA = 3 * 2**30
CHANNELS = 64  # channels of a thread whose spectra are in memory at a time, if they are not kept
SAMPLE = 16  # numbers of each weight that are compared to notice a change
HUGE = 2**21  # bytes of a huge page


class Engine:
    """A fast `forward` of a model in eval mode, that is, without dropout.

    The engine notices changed weights by their version and by a sample of their numbers, since
    fused optimizers and edits through `.data` leave the version unchanged. Set `seen` to None after
    an edit of single numbers through `.data`.

    Args:
        model: an M2BertModel, or a model that holds one as `.model`, on the CPU.
        dtype: float32 or bfloat16, the dtype of activations and matrix multiplications.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: float32 or bfloat16")
        self.model = getattr(model, "model", model)
        self.dtype, self.seen = support.matmul_dtype(dtype, torch.device("cpu")), None
        config = self.model.config
        self.native = config.mixer == "long_conv" and cpu.fits(config.hidden_size)

    @torch.no_grad()
    def __call__(self, ids: list[list[int]]) -> Tensor:
        """The pooled outputs, float32 (n, D), of n rows of ids.

        Raises:
            ValueError: a text has no token, or more tokens than the model reads; or the model's
                weights are not float32.
        """
        config = self.model.config
        if not ids:
            return torch.zeros(0, config.hidden_size)
        real = [len(row) for row in ids]
        if min(real) < 1 or max(real) > config.max_position_embeddings:
            limits = f"from 1 to the {config.max_position_embeddings} that the model reads"
            raise ValueError(f"texts of {min(real)} to {max(real)} tokens: {limits}")
        weights = list(self.model.parameters())
        dtypes = sorted({str(weight.dtype) for weight in weights})
        if dtypes != ["torch.float32"]:
            raise ValueError(f"a model of {', '.join(dtypes)}: the engine reads weights of float32")
        if not self.native:
            return self.forward(ids)
        if config.pad_to_max_length and not config.mask_padding:  # masked padding changes nothing
            longest = config.max_position_embeddings
            ids = [row + [config.pad_token_id] * (longest - len(row)) for row in ids]
        self.refresh(weights)
        lengths = [len(row) for row in ids]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        runs = self.runs(lengths)
        self.make_room({cpu.size(length) for length in lengths})
        x, room = self.embed(torch.tensor([token for row in ids for token in row]), lengths), Room()
        for number in range(len(self.layers)):
            x = self.layer(number, x, starts, lengths, runs, room)
        if config.pooling == "cls":
            summary = x[starts[:-1]].float()
        else:
            means = [text[:n].float().mean(dim=0) for text, n in zip(x.split(lengths), real)]
            summary = torch.stack(means)
        return torch.tanh(F.linear(summary, *self.pooler))

    def forward(self, ids: list[list[int]]) -> Tensor:
        """The pooled outputs of the model's own `forward`, texts of one length together."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        found, groups = torch.empty(len(ids), self.model.config.hidden_size), {}
        for i, row in enumerate(ids):
            groups.setdefault(len(row), []).append(i)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                for same in groups.values():
                    batch = torch.tensor([ids[i] for i in same])
                    found[same] = self.model(batch).pooler_output.float()
        finally:
            for module, mode in modes:
                module.training = mode
        return found

    def refresh(self, weights: list[Tensor]) -> None:
        """Copy the model's weights if they have changed since the last call."""
        versions = [(w.data_ptr(), support.version(w)) for w in weights]
        sample = torch.cat([w.detach().flatten()[:: max(1, w.numel() // SAMPLE)] for w in weights])
        if self.seen is not None and versions == self.seen[0] and torch.equal(sample, self.seen[1]):
            return
        self.layers = [self.prepared(layer) for layer in self.model.layers]
        pooler = self.model.pooler
        self.pooler = pooler.weight.float(), pooler.bias.float()
        # FFT size -> {layer: spectra}; the size used last is at the end. FFT size -> layers kept.
        self.tables: OrderedDict = OrderedDict()
        self.kept: dict[int, int] = {}
        self.seen = versions, sample

    def prepared(self, layer) -> dict:
        """A layer's weights as `mix` and `mlp` read them."""
        mixer, mlp, short = layer.mixer, layer.mlp, layer.mixer.short_filter
        weights = {
            "layer": layer,
            "in": Product(mixer.in_linear.weight, mixer.in_linear.bias, self.dtype),
            "out": Product(mixer.out_linear.weight, mixer.out_linear.bias, self.dtype),
            "short": (short.weight[:, 0].t().contiguous(), short.bias.contiguous()),
        }
        if paired(mlp.gated_layers, mlp.wo):
            for name, linear in (("gated", mlp.gated_layers), ("wo", mlp.wo)):
                weights[name] = [Product(block, None, self.dtype) for block in linear.weight]
        return weights

    def spectra(self, number: int, n: int, room):
        """The spectra of a layer's filters for FFTs of size n.

        Spectra are kept if `make_room` found room for those of this layer. Otherwise each batch
        computes them again, group of channels by group, all groups in the same memory. Returns a
        function from a slice of channels to their spectra, valid until its next call, and the
        largest number of channels of a slice.
        """
        mixer, D = self.layers[number]["layer"].mixer, self.model.config.hidden_size
        keep, tables = number < self.kept.get(n, 0), self.tables.get(n, {})
        if number in tables:
            return tables[number].channels, D
        longest = self.model.config.max_position_embeddings
        compute = native_spectra(mixer, n, longest, self.dtype, room)
        group = min(D, CHANNELS * torch.get_num_threads())
        if keep:
            table = tables[number] = cpu.empty_table(D, n, self.dtype, fresh)
            for c in range(0, D, group):
                channels = slice(c, min(c + group, D))
                compute(channels, table.channels(channels))
            return table.channels, D
        table = cpu.empty_table(group, n, self.dtype, partial(room, f"spectra of {n}"))

        def streamed(channels: slice) -> cpu.Table:
            return compute(channels, table.channels(slice(0, channels.stop - channels.start)))

        return streamed, group

    def make_room(self, sizes: set[int]) -> None:
        """Choose the spectra that stay in the cache: of which FFT sizes, and of how many layers.

        This batch's sizes come first (smallest first), then the most recently used, up to SPECTRA
        bytes.
        """
        itemsize = 2 if self.dtype == torch.bfloat16 else 4
        candidates = [*sorted(sizes), *(n for n in reversed(self.tables) if n not in sizes)]
        room, self.kept = SPECTRA, {}
        for n in candidates:
            layer = self.model.config.hidden_size * (n // 2 + 1) * 4 * itemsize  # bytes
            count = min(len(self.layers), room // layer)
            if count:
                room -= count * layer
                self.kept[n] = count
        tables = self.tables
        self.tables = OrderedDict((n, {}) for n in reversed(self.kept))
        for n, count in self.kept.items():
            kept = tables.get(n, {}).items()
            self.tables[n] = {number: table for number, table in kept if number < count}

    def embed(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """The output of the model's embeddings, (T,) -> (T, D)."""
        e = self.model.embeddings
        positions = e.position_embeddings.weight[: max(lengths)] + e.token_type_embeddings.weight[0]
        x = e.word_embeddings(ids)
        x += torch.cat([positions[:length] for length in lengths])
        return e.LayerNorm(x).to(self.dtype)

    def runs(self, lengths: list[int]) -> list[tuple[slice, bool]]:
        """Divide the tokens into runs, one matrix multiplication each: (tokens, is one long text).

        A long text in bfloat16 is a run of its own, since its mean token enters its result. The
        result of a text therefore does not depend on its neighbours.
        """
        runs, start = [], 0
        for length in lengths:
            long = self.dtype == torch.bfloat16 and length >= LONG
            if runs and not long and not runs[-1][1]:
                runs[-1] = slice(runs[-1][0].start, start + length), False
            else:
                runs.append((slice(start, start + length), long))
            start += length
        return runs

    def layer(self, number, x: Tensor, starts: Tensor, lengths: list, runs: list, room) -> Tensor:
        """One layer of the model, (T, D) -> (T, D)."""
        weights, (T, D) = self.layers[number], x.shape
        mixer = weights["layer"].mixer
        if mixer.layernorm is not None:
            x = mixer.layernorm(x.float()).to(self.dtype)
        p = each(weights["in"], x, runs, room("p", (T, 3 * D), self.dtype))
        y = self.mix(number, p, x, starts, lengths, room)
        h = each(weights["out"], y, runs, room("p", (T, D), self.dtype))  # p was read
        return self.mlp(weights, h, runs, x, room)

    def mix(self, number: int, p: Tensor, u: Tensor, starts: Tensor, lengths: list, room) -> Tensor:
        """The mixer between its projections, y (T, D), from p (T, 3D) and u (T, D)."""
        short, D = self.layers[number]["short"], u.shape[1]
        y, sizes = room("y", u.shape, self.dtype), [cpu.size(length) for length in lengths]
        spectra = {n: self.spectra(number, n, room) for n in set(sizes)}
        group = min(count for _, count in spectra.values())
        for c in range(0, D, group):
            channels = slice(c, min(c + group, D))
            tables = {n: compute(channels) for n, (compute, _) in spectra.items()}
            cpu.mix(p, u, starts, *short, [tables[n] for n in sizes], y=y, channels=channels)
        return y

    def mlp(self, weights: dict, h: Tensor, runs: list, y: Tensor, room) -> Tensor:
        """y = LayerNorm(h + MLP(h)), (T, D)."""
        mlp, gated = weights["layer"].mlp, weights.get("gated")
        if gated is None:
            gate, value = mlp.gated_layers(h.float()).chunk(2, dim=-1)
            return mlp.layernorm(h.float() + mlp.wo(F.gelu(gate) * value)).to(self.dtype)
        for run, long in runs:
            biases = [None] * len(gated)
            if long:
                means = h[run].mean(dim=0, dtype=torch.float32).chunk(len(gated))
                biases = [product.restoring(mean) for product, mean in zip(gated, means)]
            for start in range(run.start, run.stop, TILE):
                tile = slice(start, min(start + TILE, run.stop))
                total = self.blocks(weights, h[tile], biases, long, room)
                cpu.add_norm(total, h[tile], mlp.wo.bias, mlp.layernorm, y[tile])
        return y

    def blocks(self, weights: dict, h: Tensor, biases: list, long: bool, room) -> Tensor:
        """W_o(GELU(a) · b), (a, b) = W_g h + biases, of one tile of t tokens; (t, D)."""
        gated, wo, K, t = weights["gated"], weights["wo"], len(weights["wo"]), len(h)
        inputs, total = h.chunk(K, dim=1), room("total", h.shape, h.dtype)
        outputs = total.chunk(K, dim=1)
        for k in range(K // 2):  # block k is the gate of the values of block k + K/2
            gate, value = (
                gated[b](inputs[b], biases[b], room(name, (t, len(gated[b].weight)), h.dtype))
                for b, name in ((k, "gate"), (k + K // 2, "value"))
            )
            if gate.shape[1] % cpu.STEP == 0:
                m = cpu.glu(gate, value, gate)
            else:
                m = F.gelu(gate) * value
            for half, b in zip(m.chunk(2, dim=1), (2 * k, 2 * k + 1)):
                bias = wo[b].restoring(half.mean(dim=0, dtype=torch.float32)) if long else None
                found = wo[b](half, bias, outputs[b])
                if found is not outputs[b]:
                    outputs[b].copy_(found)
        return total


class Room:
    """Memory by name, which the layers and tiles of one call use again and again."""

    def __init__(self):
        self.memory: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape; it has what the last one of this name left there."""
        count = math.prod(shape)
        if name not in self.memory or len(self.memory[name]) < count:
            self.memory[name] = fresh((count,), dtype)
        return self.memory[name][:count].view(shape)


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of new memory, in huge pages where Linux gives them.

    A row of p is pages long, and the mixer goes through it row by row: with small pages it waits
    for their addresses.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, -(-size // HUGE) * HUGE)
    with contextlib.suppress(OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


class Product:
    """W x + b with W rounded to a compute dtype and, for oneDNN, reordered once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.exact, self.weight = weight.detach(), weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().float()
        self.packed, self.lost = None, None
        if dtype == torch.bfloat16 and support.takes_bfloat16():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """W x + bias, in `out` unless oneDNN returns new memory; bias None: that of the layer."""
        bias = self.bias if bias is None else bias
        if self.packed is not None:
            x = x.contiguous()
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        if bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(bias.to(x.dtype), x, self.weight.t(), out=out)

    def restoring(self, mean: Tensor) -> Tensor:
        """b + (W - W') mean, float32: the bias that restores the mean token's share of W - W'."""
        if self.lost is None:
            self.lost = (self.exact.float() - self.weight.float()).to(self.weight.dtype)
        restored = torch.mv(self.lost.float(), mean)
        return restored if self.bias is None else restored + self.bias


def each(product: Product, x: Tensor, runs: list[tuple[slice, bool]], out: Tensor) -> Tensor:
    """The product of each run of tokens, in `out` unless oneDNN returns new memory."""

    def bias(run: slice) -> Tensor:
        return product.restoring(x[run].mean(dim=0, dtype=torch.float32))

    parts = [product(x[run], bias(run) if long else None, out[run]) for run, long in runs]
    if product.packed is None:
        return out
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def native_spectra(mixer, n: int, longest: int, dtype: torch.dtype, room):
    """A function that computes the spectra of a slice of channels in a `cpu.Table`.

    They are for FFTs of size n and up to `longest` taps. A tap is read once, so all slices have
    theirs in the same memory: fresh pages would cost as much as the product itself.
    """
    L, gated, residual = min(max(1, n // 2), longest), mixer.gated_filter, mixer.residual_filter
    filters = [(filter, filter.hidden(L)) for filter in (gated, residual) if filter is not None]
    time, deltas = gated.time(L), gated.deltas()

    def compute(channels: slice, table: cpu.Table) -> cpu.Table:
        taps, shape = [], (L, channels.stop - channels.start)
        for filter, hidden in filters:
            for mlp, h in zip((filter.back, filter.ahead), hidden):  # as `before_decay`
                out = None if h is None else room(f"taps {len(taps)}", shape, torch.float32)
                taps.append(h if h is None else torch.mm(h, mlp[3].weight[channels].t(), out=out))
            taps.append(filter.bias[channels])
        taps += [None] * (6 - len(taps))
        return cpu.spectra(taps, time, deltas[channels], n, dtype, table)

    return compute
