"""A fast encoder for a CPU: the model's `forward` for texts of any lengths, without gradients.

    Engine(model)(ids)                   pooled outputs of rows of ids, float32 (n, D); within 1e-4
                                         of the model's own
    Engine(model, torch.bfloat16)(ids)   matrix multiplications in bfloat16; FFTs, sums and
                                         LayerNorms in float32

Texts lie one after another, (T, D), without padding. The filters do not depend on the text, so the
engine computes their spectra once for each FFT size and keeps them, up to a limit. One pass of
mixer.cpp (`lib.kernels.cpu`) computes a layer's short convolution, gates and both long
convolutions; torch computes the same if mixer.cpp cannot be compiled. The MLP reads one tile of
tokens at a time, so its activations never leave the processor's cache.

A rounding error of a filter or a weight is the same at all positions, and a long convolution sums
over all positions. Therefore the spectra are stored in float16, scaled channel by channel. In long
texts the bias restores what rounding the matrix W to W' took from the mean token:

    y = W' x + (b + (W - W') mean(x))

The definition is lib/model/m2bert.py; tests/kernels/test_engine.py compares the two.
Axes: n texts, T tokens of all texts, D width, K blocks.
"""

from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels import cpu, support
from lib.operators.long_conv import circular_kernel, fft_length, short_conv
from lib.operators.monarch import paired

TILE = 1024  # tokens in one pass through an MLP
LONG = 1024  # a text of at least this many tokens has its own matrix multiplications and mean token
# Limit of the spectrum cache in bytes. The 80M model's spectra for 32,768 tokens fill 2.3 GiB for
# bfloat16 activations, 4.6 GiB for float32.
SPECTRA = 3 * 2**30
CHANNELS = 64  # channels whose spectra one thread computes at a time
SAMPLE = 16  # numbers of each weight that are compared to notice a change


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
        self.native = cpu.fits(self.model.config.hidden_size)

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
        if config.pad_to_max_length and not config.mask_padding:  # masked padding changes nothing
            longest = config.max_position_embeddings
            ids = [row + [config.pad_token_id] * (longest - len(row)) for row in ids]
        self.refresh()
        lengths = [len(row) for row in ids]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        runs = self.runs(lengths)
        self.make_room({self.fft(length) for length in lengths})
        x = self.embed(torch.tensor([token for row in ids for token in row]), lengths)
        for number in range(len(self.layers)):
            x = self.layer(number, x, starts, lengths, runs)
        if config.pooling == "cls":
            summary = x[starts[:-1]].float()
        else:
            means = [text[:n].float().mean(dim=0) for text, n in zip(x.split(lengths), real)]
            summary = torch.stack(means)
        return torch.tanh(F.linear(summary, *self.pooler))

    def refresh(self) -> None:
        """Copy the model's weights if they have changed since the last call."""
        weights = list(self.model.parameters())
        versions = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        sample = torch.cat([w.detach().flatten()[:: max(1, w.numel() // SAMPLE)] for w in weights])
        if self.seen is not None and versions == self.seen[0] and torch.equal(sample, self.seen[1]):
            return
        dtypes = sorted({str(weight.dtype) for weight in weights})
        if dtypes != ["torch.float32"]:
            raise ValueError(f"a model of {', '.join(dtypes)}: the engine reads weights of float32")
        self.layers = [self.prepared(layer) for layer in self.model.layers]
        pooler = self.model.pooler
        self.pooler = pooler.weight.float(), pooler.bias.float()
        # FFT size -> {layer: spectra}; the size used last is at the end.
        self.tables: OrderedDict = OrderedDict()
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

    def spectra(self, number: int, n: int):
        """The spectra of a layer's filters for FFTs of size n.

        Spectra are kept if `make_room` found room for those of all layers; otherwise each batch
        computes them again. Returns a function from a slice of channels to their spectra, and the
        largest number of channels of a slice.
        """
        mixer, D = self.layers[number]["layer"].mixer, self.model.config.hidden_size
        kept = self.tables.get(n)
        if kept is None or number not in kept:
            back_end = native_spectra if self.native else torch_spectra
            compute = back_end(mixer, n, self.model.config.max_position_embeddings, self.dtype)
            group = CHANNELS * (torch.get_num_threads() if self.native else 1)
            if kept is None:
                return compute, group
            starts = range(0, D, group)
            kept[number] = joined([compute(slice(c, min(c + group, D))) for c in starts])
        table = kept[number]
        return table.channels if self.native else lambda channels: table[:, channels], D

    def make_room(self, sizes: set[int]) -> None:
        """Choose which FFT sizes stay in the spectrum cache.

        This batch's sizes come first (smallest first), then the most recently used, up to SPECTRA
        bytes.
        """
        config = self.model.config
        numbers = 4 if self.native else 2 * (1 + bool(config.residual_long_conv))
        itemsize = 2 if self.native and self.dtype == torch.bfloat16 else 4

        def bytes_of(n: int) -> int:
            return len(self.layers) * config.hidden_size * (n // 2 + 1) * numbers * itemsize

        candidates = [*sorted(sizes), *(n for n in reversed(self.tables) if n not in sizes)]
        room, kept = SPECTRA, []
        for n in candidates:
            if bytes_of(n) <= room:
                room -= bytes_of(n)
                kept.append(n)
        self.tables = OrderedDict((n, self.tables.get(n, {})) for n in reversed(kept))

    def embed(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """The output of the model's embeddings, (T,) -> (T, D)."""
        e = self.model.embeddings
        positions = e.position_embeddings.weight[: max(lengths)] + e.token_type_embeddings.weight[0]
        x = e.word_embeddings(ids)
        x += torch.cat([positions[:length] for length in lengths])
        return e.LayerNorm(x).to(self.dtype)

    def fft(self, length: int) -> int:
        """The FFT size for a text of `length` tokens."""
        return cpu.size(length) if self.native else fft_length(2 * length - 1)

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

    def layer(self, number: int, x: Tensor, starts: Tensor, lengths: list, runs: list) -> Tensor:
        """One layer of the model, (T, D) -> (T, D)."""
        weights = self.layers[number]
        mixer = weights["layer"].mixer
        if mixer.layernorm is not None:
            x = mixer.layernorm(x.float()).to(self.dtype)
        y = self.mix(number, each(weights["in"], x, runs), x, starts, lengths)
        return self.mlp(weights, each(weights["out"], y, runs), runs)

    def mix(self, number: int, p: Tensor, u: Tensor, starts: Tensor, lengths: list) -> Tensor:
        """The mixer between its projections, (T, D), from p (T, 3D) and u (T, D)."""
        short, y, D = self.layers[number]["short"], torch.empty_like(u), u.shape[1]
        sizes = [self.fft(length) for length in lengths]
        spectra = {n: self.spectra(number, n) for n in set(sizes)}
        group = min(count for _, count in spectra.values())
        for c in range(0, D, group):
            channels = slice(c, min(c + group, D))
            tables = {n: compute(channels) for n, (compute, _) in spectra.items()}
            if self.native:
                cpu.mix(p, u, starts, *short, [tables[n] for n in sizes], y=y, channels=channels)
                continue
            for *text, out, n in zip(p.split(lengths), u.split(lengths), y.split(lengths), sizes):
                out[:, channels] = in_torch(*text, channels, *short, tables[n], n)
        return y

    def mlp(self, weights: dict, h: Tensor, runs: list) -> Tensor:
        """LayerNorm(h + MLP(h)), (T, D)."""
        mlp, gated = weights["layer"].mlp, weights.get("gated")
        if gated is None:
            gate, value = mlp.gated_layers(h.float()).chunk(2, dim=-1)
            return mlp.layernorm(h.float() + mlp.wo(F.gelu(gate) * value)).to(self.dtype)
        y = torch.empty_like(h)
        for run, long in runs:
            biases = [None] * len(gated)
            if long:
                means = h[run].mean(dim=0, dtype=torch.float32).chunk(len(gated))
                biases = [product.restoring(mean) for product, mean in zip(gated, means)]
            for start in range(run.start, run.stop, TILE):
                tile = slice(start, min(start + TILE, run.stop))
                total = self.blocks(weights, h[tile], biases, long)
                y[tile] = mlp.layernorm(total.add_(h[tile].float()).add_(mlp.wo.bias))
        return y

    def blocks(self, weights: dict, h: Tensor, biases: list, long: bool) -> Tensor:
        """W_o(GELU(a) · b), (a, b) = W_g h + biases, of one tile of t tokens; float32 (t, D)."""
        gated, wo, K, outputs = weights["gated"], weights["wo"], len(weights["wo"]), []
        inputs = [block.contiguous() for block in h.chunk(K, dim=1)]
        for k in range(K // 2):  # block k is the gate of the values of block k + K/2
            gate, value = (gated[b](inputs[b], biases[b]) for b in (k, k + K // 2))
            if self.native and gate.shape[1] % 16 == 0:
                m = cpu.glu(gate, value, gate)
            else:
                m = F.gelu(gate) * value
            for half, product in zip(m.chunk(2, dim=1), wo[2 * k : 2 * k + 2]):
                outputs.append(each(product, half.contiguous(), [(slice(None), long)]))
        return torch.cat(outputs, dim=1).float()


class Product:
    """W x + b with W rounded to a compute dtype and, for oneDNN, reordered once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.exact, self.weight = weight.detach(), weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().float()
        self.packed, self.lost = None, None
        if dtype == torch.bfloat16 and support.takes_bfloat16():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias; None: the bias of the layer."""
        bias = self.bias if bias is None else bias
        if self.packed is None:
            return F.linear(x, self.weight, None if bias is None else bias.to(x.dtype))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def restoring(self, mean: Tensor) -> Tensor:
        """b + (W - W') mean, float32: the bias that restores the mean token's share of W - W'."""
        if self.lost is None:
            self.lost = (self.exact.float() - self.weight.float()).to(self.weight.dtype)
        restored = torch.mv(self.lost.float(), mean)
        return restored if self.bias is None else restored + self.bias


def each(product: Product, x: Tensor, runs: list[tuple[slice, bool]]) -> Tensor:
    """The product of each run of tokens."""

    def bias(run: slice) -> Tensor:
        return product.restoring(x[run].mean(dim=0, dtype=torch.float32))

    parts = [product(x[run], bias(run) if long else None) for run, long in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def native_spectra(mixer, n: int, longest: int, dtype: torch.dtype):
    """The function slice of channels -> cpu.Table, for FFTs of size n and up to `longest` taps."""
    L, gated, residual = min(max(1, n // 2), longest), mixer.gated_filter, mixer.residual_filter
    filters = [(filter, filter.hidden(L)) for filter in (gated, residual) if filter is not None]
    time, deltas = gated.time(L), gated.deltas()

    def table(channels: slice) -> cpu.Table:
        taps = []
        for filter, hidden in filters:
            taps += [*filter.before_decay(hidden, channels), filter.bias[channels]]
        return cpu.spectra(taps + [None] * (6 - len(taps)), time, deltas[channels], n, dtype)

    return table


def torch_spectra(mixer, n: int, longest: int, dtype: torch.dtype):
    """The function slice of channels -> spectra, for FFTs of size n and up to `longest` taps.

    The spectra are complex64 (S, d, n/2 + 1), as torch.fft lays them out: of the gated filter, and
    of the residual filter if there is one.
    """
    L, filters = min((n + 1) // 2, longest), (mixer.gated_filter, mixer.residual_filter)
    filters = [(filter, filter.hidden(L)) for filter in filters if filter is not None]

    def table(channels: slice) -> Tensor:
        kernels = (
            circular_kernel(*filter.taps(hidden, channels), filter.bias[channels], n)
            for filter, hidden in filters
        )
        return torch.stack([torch.fft.rfft(kernel) for kernel in kernels])

    return table


def joined(tables: list):
    """The spectra of neighbouring groups of channels as one."""
    if len(tables) == 1:
        return tables[0]
    if isinstance(tables[0], Tensor):
        return torch.cat(tables, dim=1)
    values, scales = zip(*tables)
    return cpu.Table(torch.cat(values), None if scales[0] is None else torch.cat(scales))


def in_torch(p, u, channels: slice, weight: Tensor, bias: Tensor, table, n: int) -> Tensor:
    """Some channels of one text's mixer, (L, d), from p (L, 3D) and u (L, D)."""

    def thirds(x: Tensor) -> Tensor:  # (…, 3D) -> (…, 3d), the channels of x1, x2 and v
        return x.unflatten(-1, (3, -1))[..., channels].flatten(-2)

    L, q = len(p), thirds(p).t().float()  # (3d, L)
    x1, x2, v = short_conv(q[None], thirds(weight).t()[:, None], thirds(bias))[0].chunk(3)
    u = u[:, channels].t().float()
    y = torch.fft.irfft(torch.fft.rfft(x1 * v, n=n) * table[0], n=n)[:, :L] * x2
    if len(table) > 1:
        y = y + torch.fft.irfft(torch.fft.rfft(u, n=n) * table[1], n=n)[:, :L]
    return y.t()
