"""A fast encoder for a CPU: the model's `forward` for texts of any lengths, without gradients.

    Engine(model)(ids)                   pooled outputs of rows of ids, float32 (n, D); within 1e-4
                                         of the model's own
    Engine(model, torch.bfloat16)(ids)   matrix multiplications in bfloat16; FFTs, sums and
                                         LayerNorms in float32

Texts lie one after another, (T, D), without padding. The filters do not depend on the text, so the
engine computes their spectra once for each FFT size and keeps them, up to a limit. One pass of
mixer.cpp (`lib.kernels.cpu`) computes a layer's short convolution, gates and both long
convolutions; torch computes the same if mixer.cpp cannot be compiled. The MLP reads one tile of
tokens at a time, so the activations between its two products never leave the cache.

A rounding error of a filter or a weight is the same at all positions, and a long convolution sums
over all positions. Therefore filters stay in float16, scaled channel by channel, and in long texts
the bias restores what rounding the matrix W to W' took from the mean token:

    y = W' x + (b + (W - W') mean(x))

The definition is lib/model/m2bert.py; tests/kernels/test_engine.py compares the two.
Axes: n texts, T tokens of all texts, D width, K blocks.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels import cpu, support
from lib.operators.long_conv import circular_kernel, fft_length, short_conv
from lib.operators.monarch import paired

TILE = 1024  # tokens in one pass through an MLP
LONG = 1024  # a text of at least this many tokens has its own matrix multiplications and mean token
# Bytes of spectra that are kept. The spectra of the 80M model for 32,768 tokens fill 2.3 GiB beside
# bfloat16 activations, 4.6 GiB beside float32.
SPECTRA = 3 * 2**30
CHANNELS = 64  # channels whose spectra one thread computes at a time
SAMPLE = 16  # numbers of each weight that are compared to notice a change


class Engine:
    """A fast `forward` of a model in eval mode, that is, without dropout.

    The engine notices changed weights by their version and by a sample of their numbers: fused
    optimizers and edits through `.data` leave the version unchanged. Set `seen` to None after an
    edit of single numbers through `.data`.

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
            raise ValueError(
                f"texts of {min(real)} to {max(real)} tokens: from 1 to the "
                f"{config.max_position_embeddings} that the model reads"
            )
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
        first = starts[:-1].tolist()
        if config.pooling == "cls":
            summary = torch.stack([x[start] for start in first]).float()
        else:
            means = [x[start : start + n].float().mean(dim=0) for start, n in zip(first, real)]
            summary = torch.stack(means)
        return torch.tanh(F.linear(summary, *self.pooler))

    # ------------------------------------------------------------------ weights

    def refresh(self) -> None:
        """Copy the model's weights if they have changed since the last call.

        Fused optimizers and edits through `.data` leave a tensor's version unchanged, so a sample
        of each tensor's numbers is compared too.
        """
        weights = list(self.model.parameters())
        versions = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        sample = torch.cat([w.detach().flatten()[:: max(1, w.numel() // SAMPLE)] for w in weights])
        if self.seen is not None and versions == self.seen[0] and torch.equal(sample, self.seen[1]):
            return
        dtypes = sorted({str(weight.dtype) for weight in weights})
        if dtypes != ["torch.float32"]:
            raise ValueError(
                f"a model of {', '.join(dtypes)}: the engine reads weights of float32, `dtype` is "
                "the dtype of its activations"
            )
        self.layers = [self.prepared(layer) for layer in self.model.layers]
        pooler = self.model.pooler
        self.pooler = pooler.weight.float(), pooler.bias.float()
        # FFT size -> {layer: spectra}; the size used last is at the end.
        self.tables: OrderedDict = OrderedDict()
        self.seen = versions, sample

    def prepared(self, layer) -> dict:
        """A layer's weights as `mix` and `mlp` read them."""
        mixer, mlp = layer.mixer, layer.mlp
        blocks = paired(mlp.gated_layers, mlp.wo)

        def products(linear) -> list[Product]:
            return [Product(weight, None, self.dtype) for weight in linear.weight]

        return {
            "layer": layer,
            "in": Product(mixer.in_linear.weight, mixer.in_linear.bias, self.dtype),
            "out": Product(mixer.out_linear.weight, mixer.out_linear.bias, self.dtype),
            "short": (
                mixer.short_filter.weight[:, 0].t().float().contiguous(),
                mixer.short_filter.bias.float().contiguous(),
            ),
            "gated": products(mlp.gated_layers) if blocks else None,
            "wo": products(mlp.wo) if blocks else None,
        }

    def spectra(self, number: int, n: int):
        """The spectra of a layer's filters for FFTs of size n.

        Spectra are kept if `make_room` found room for those of all layers; otherwise each batch
        computes them again.

        Returns:
            A function from a slice of channels to their spectra, and the number of channels to ask
            it for at a time.
        """
        mixer, D = self.layers[number]["layer"].mixer, self.model.config.hidden_size
        kept = self.tables.get(n)
        if kept is None or number not in kept:
            back_end = native_spectra if self.native else torch_spectra
            compute = back_end(mixer, n, self.model.config.max_position_embeddings, self.dtype)
            if kept is None:
                return compute, CHANNELS * (torch.get_num_threads() if self.native else 1)
            kept[number] = compute(slice(0, D))
        return kept[number].channels, D

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

    # ------------------------------------------------------------------ layers

    def embed(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """The output of the embeddings, (T,) -> (T, D)."""
        e = self.model.embeddings
        positions = e.position_embeddings.weight[: max(lengths)] + e.token_type_embeddings.weight[0]
        x = e.word_embeddings(ids)
        start = 0
        for length in lengths:
            x[start : start + length] += positions[:length]
            start += length
        return e.LayerNorm(x).to(self.dtype)

    def fft(self, length: int) -> int:
        """The FFT size for a text of `length` tokens."""
        return cpu.size(length) if self.native else fft_length(2 * length - 1)

    def runs(self, lengths: list[int]) -> list[tuple[slice, bool]]:
        """Divide the tokens into runs, each with one matrix multiplication.

        A long text in bfloat16 is a run of its own, since its mean token enters the result; so the
        result of a text does not depend on its neighbours.

        Returns:
            (the run's tokens, whether the run is one long text) for each run.
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

    def layer(
        self, number: int, x: Tensor, starts: Tensor, lengths: list[int], runs: list
    ) -> Tensor:
        """One layer of the model, (T, D) -> (T, D)."""
        weights = self.layers[number]
        mixer = weights["layer"].mixer
        if mixer.layernorm is not None:
            x = mixer.layernorm(x.float()).to(self.dtype)
        y = self.mix(number, each(weights["in"], x, runs), x, starts, lengths)
        return self.mlp(weights, each(weights["out"], y, runs), runs)

    def mix(self, number: int, p: Tensor, u: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
        """The mixer between its projections, (T, D), from p (T, 3D) and u (T, D)."""
        (weight, bias), y, D = self.layers[number]["short"], torch.empty_like(u), u.shape[1]
        sizes = [self.fft(length) for length in lengths]
        spectra = {n: self.spectra(number, n) for n in set(sizes)}
        group = min(count for _, count in spectra.values())
        for c in range(0, D, group):
            channels = slice(c, min(c + group, D))
            tables = {n: compute(channels) for n, (compute, _) in spectra.items()}
            if self.native:
                texts = [tables[n] for n in sizes]
                cpu.mix(p, u, starts, weight, bias, texts, y=y, channels=channels)
                continue
            for start, length, n in zip(starts.tolist(), lengths, sizes):
                text = slice(start, start + length)
                part = u[text, channels]
                result = in_torch(p[text], part, channels, weight, bias, tables[n].values, n)
                y[text, channels] = result.to(y.dtype)
        return y

    def mlp(self, weights: dict, h: Tensor, runs: list) -> Tensor:
        """LayerNorm(h + MLP(h)), (T, D)."""
        mlp = weights["layer"].mlp
        if weights["gated"] is None:
            gate, value = mlp.gated_layers(h.float()).chunk(2, dim=-1)
            return mlp.layernorm(h.float() + mlp.wo(F.gelu(gate) * value)).to(self.dtype)
        norm = mlp.layernorm
        scale, shift = norm.weight.float(), norm.bias.float()
        y, width = torch.empty_like(h), h.shape[1] // len(weights["gated"])
        for run, long in runs:
            mean = h[run].mean(dim=0, dtype=torch.float32) if long else None
            biases = [
                product.restoring(mean[k * width : (k + 1) * width]) if long else None
                for k, product in enumerate(weights["gated"])
            ]
            for start in range(run.start, run.stop, TILE):
                tile = slice(start, min(start + TILE, run.stop))
                total = self.blocks(weights, h[tile], biases, long)
                total = total.add_(h[tile].float()).add_(mlp.wo.bias)
                y[tile] = F.layer_norm(total, (h.shape[1],), scale, shift, norm.eps)
        return y

    def blocks(self, weights: dict, h: Tensor, biases: list, long: bool) -> Tensor:
        """W_o(GELU(a) b), (a, b) = W_g h + biases, of one tile of tokens; float32 (t, D)."""
        K = len(weights["gated"])
        width, hidden = h.shape[1] // K, weights["layer"].mlp.wo.d_in // K
        inputs = [h[:, k * width : (k + 1) * width].contiguous() for k in range(K)]
        outputs = []
        for k in range(K // 2):  # block k is the gate of the values of block k + K/2
            gate, value = (
                weights["gated"][block](inputs[block], biases[block]) for block in (k, k + K // 2)
            )
            if self.native and gate.shape[1] % 16 == 0:
                m = cpu.glu(gate, value, gate)
            else:
                m = F.gelu(gate) * value
            for side, product in enumerate(weights["wo"][2 * k : 2 * k + 2]):
                half = m[:, side * hidden : (side + 1) * hidden].contiguous()
                mean = half.mean(dim=0, dtype=torch.float32) if long else None
                outputs.append(product(half, product.restoring(mean) if long else None))
        return torch.cat(outputs, dim=1).float()


class Product:
    """W x + b with W in a compute dtype, laid out once for the processor."""

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


# ------------------------------------------------------------------ spectra


class Complex(NamedTuple):
    """Spectra in the layout of torch.fft, (S, d, n/2 + 1): gated and residual filter, or gated."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def channels(self, part: slice) -> "Complex":
        return Complex(self.values[:, part])


def native_spectra(mixer, n: int, longest: int, dtype: torch.dtype):
    """The function slice of channels -> cpu.Table, for FFTs of size n and up to `longest` taps."""
    L, gated = min(max(1, n // 2), longest), mixer.gated_filter
    group = CHANNELS * torch.get_num_threads()
    filters = [
        None if filter is None else (filter, filter.hidden(L))
        for filter in (gated, mixer.residual_filter)
    ]

    def floats(filter, hidden: tuple, channels: slice) -> tuple:
        taps = (*filter.before_decay(hidden, channels), filter.bias[channels])
        return tuple(None if part is None else part.float() for part in taps)

    def table(channels: slice) -> cpu.Table:
        pair = [None if filter is None else floats(*filter, channels) for filter in filters]
        delta = gated.deltas()[channels].float()
        return cpu.spectra(*pair, gated.time(L).float(), delta, n, dtype)

    def compute(channels: slice) -> cpu.Table:
        starts = range(channels.start, channels.stop, group)
        tables = [table(slice(c, min(c + group, channels.stop))) for c in starts]
        if len(tables) == 1:
            return tables[0]
        fields = zip(*tables)  # values, scales
        return cpu.Table(*(None if parts[0] is None else torch.cat(parts) for parts in fields))

    return compute


def torch_spectra(mixer, n: int, longest: int, dtype: torch.dtype):
    """The function slice of channels -> Complex, for FFTs of size n and up to `longest` taps."""
    L = min((n + 1) // 2, longest)
    filters = [
        (filter, filter.hidden(L))
        for filter in (mixer.gated_filter, mixer.residual_filter)
        if filter is not None
    ]

    def spectra(channels: slice) -> Tensor:
        kernels = (
            circular_kernel(*filter.taps(hidden, channels), filter.bias[channels], n).float()
            for filter, hidden in filters
        )
        return torch.stack([torch.fft.rfft(kernel) for kernel in kernels])

    def compute(channels: slice) -> Complex:
        starts = range(channels.start, channels.stop, CHANNELS)
        parts = [spectra(slice(c, min(c + CHANNELS, channels.stop))) for c in starts]
        return Complex(torch.cat(parts, dim=1))

    return compute


def in_torch(
    p: Tensor, u: Tensor, channels: slice, weight: Tensor, bias: Tensor, table: Tensor, n: int
) -> Tensor:
    """Some channels of one text's mixer, (L, d), from p (L, 3D) and these channels' u (L, d)."""
    L, D = len(p), p.shape[1] // 3
    thirds = [slice(i * D + channels.start, i * D + channels.stop) for i in range(3)]  # x1, x2, v
    q = torch.cat([p[:, third] for third in thirds], dim=1).t().float()  # (3d, L)
    x1, x2, v = short_conv(
        q[None],
        torch.cat([weight[:, third] for third in thirds], dim=1).t()[:, None],
        torch.cat([bias[third] for third in thirds]),
    )[0].chunk(3)
    y = torch.fft.irfft(torch.fft.rfft(x1 * v, n=n) * table[0], n=n)[:, :L] * x2
    if len(table) > 1:
        y = y + torch.fft.irfft(torch.fft.rfft(u.t().float(), n=n) * table[1], n=n)[:, :L]
    return y.t()
