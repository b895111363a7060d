"""The encoder at the processor's speed: what `forward` computes, for texts of any lengths, without gradients, on a CPU.

    Engine(model)(ids)                   pooled outputs of rows of ids, float32 (n, D), within 1e-4 of the model's own
    Engine(model, torch.bfloat16)(ids)   matrix products in bfloat16; FFTs, sums and LayerNorms inside in float32

Texts lie one after another, (T, D), and nothing is padded. The filters do not depend on the text: their spectra are
computed once for a size of FFT and kept, up to a limit. The two convolutions of a layer, its gates and its short
convolution are one pass of lib/kernels/mixer.cpp (`lib.kernels.cpu`), or the same in torch where that cannot be compiled. The MLP goes
through its tokens a tile at a time, so that what lies between its two products never leaves the cache.

What bfloat16 costs is kept small where it would add up: errors of a filter or a weight are the same at all positions, and a
long convolution sums over all of them. So filters stay in float16, scaled channel by channel, and in long texts what the
rounding of a matrix did to the mean token is put back: y = W' x + (b + (W - W') mean(x)), W' the rounded W.

The definition is lib/model/m2bert.py; tests/test_engine.py holds the two together.
Axes: n texts, T tokens of all of them, D width, K blocks.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.kernels import cpu, support
from lib.operators.long_conv import circular_kernel, fft_length, short_conv
from lib.operators.monarch import paired

TILE = 1024  # tokens that go through an MLP at a time
LONG = 1024  # tokens from which on a text has products of its own, with a mean token of its own
SPECTRA = (
    3 * 2**30
)  # bytes of spectra that are kept; those of a 32,768-token model of 80M are 2.3 GiB beside bfloat16, 4.6 beside float32
CHANNELS = 64  # whose spectra are computed at a time, for one thread
SAMPLE = 16  # numbers of a weight that are compared with what they were


class Engine:
    """A fast `forward` of a model, in eval: without dropout.

    Weights that change are noticed by their version, and by a sample of each where that stays (fused optimizers, `.data`). Who
    edits single numbers through `.data` sets `seen` to None.

    Args:
        model: an M2BertModel or what holds one as `.model`, on the CPU.
        dtype: float32 or bfloat16, of activations and matrix products.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: float32 or bfloat16")
        self.model = getattr(model, "model", model)
        self.dtype, self.seen = support.matmul_dtype(dtype, torch.device("cpu")), None
        self.native = cpu.fits(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, ids: list[list[int]]) -> Tensor:
        """Pooled outputs, float32 (n, D).

        Raises:
            ValueError: no token, or more than the model reads.
        """
        config = self.model.config
        if not ids:
            return torch.zeros(0, config.hidden_size)
        real = [len(row) for row in ids]
        if min(real) < 1 or max(real) > config.max_position_embeddings:
            raise ValueError(
                f"texts of {min(real)} to {max(real)} tokens: from 1 to the {config.max_position_embeddings} that the model reads"
            )
        if (
            config.pad_to_max_length and not config.mask_padding
        ):  # padding that is masked changes nothing
            ids = [
                row + [config.pad_token_id] * (config.max_position_embeddings - len(row))
                for row in ids
            ]
        self.refresh()
        lengths = [len(row) for row in ids]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        runs = self.runs(lengths)
        self.make_room({self.fft(length) for length in lengths})
        x = self.embed(torch.tensor([token for row in ids for token in row]), lengths)
        for number in range(len(self.layers)):
            x = self.layer(number, x, starts, lengths, runs)
        rows = starts[:-1].tolist()
        summary = (
            torch.stack([x[a] for a in rows]).float()
            if config.pooling == "cls"
            else torch.stack([x[a : a + n].float().mean(dim=0) for a, n in zip(rows, real)])
        )
        return torch.tanh(F.linear(summary, *self.pooler))

    # ------------------------------------------------------------------ weights

    def refresh(self) -> None:
        """Take over the model's weights where they have changed since the last call.

        Fused optimizers and edits through `.data` leave a tensor's version as it is, so a sample of each is looked at too.
        """
        parameters = list(self.model.parameters())
        now = [
            (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for parameter in parameters
        ]
        sample = torch.cat(
            [
                parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLE)]
                for parameter in parameters
            ]
        )
        if self.seen is not None and now == self.seen[0] and torch.equal(sample, self.seen[1]):
            return
        if {parameter.dtype for parameter in parameters} != {torch.float32}:
            raise ValueError(
                f"a model of {', '.join(sorted({str(parameter.dtype) for parameter in parameters}))}: the engine reads weights of float32, and `dtype` is for the rest"
            )
        self.layers = [self.prepared(layer) for layer in self.model.layers]
        pooler = self.model.pooler
        self.pooler = pooler.weight.float(), pooler.bias.float()
        self.tables: OrderedDict = (
            OrderedDict()
        )  # n -> {layer: spectra}, those used last at the end
        self.seen = now, sample

    def prepared(self, layer) -> dict:
        mixer, mlp = layer.mixer, layer.mlp
        blocks = paired(mlp.gated_layers, mlp.wo)
        return {
            "layer": layer,
            "in": Product(mixer.in_linear.weight, mixer.in_linear.bias, self.dtype),
            "out": Product(mixer.out_linear.weight, mixer.out_linear.bias, self.dtype),
            "short": (
                mixer.short_filter.weight[:, 0].t().float().contiguous(),
                mixer.short_filter.bias.float().contiguous(),
            ),
            "gated": [Product(weight, None, self.dtype) for weight in mlp.gated_layers.weight]
            if blocks
            else None,
            "wo": [Product(weight, None, self.dtype) for weight in mlp.wo.weight]
            if blocks
            else None,
        }

    def spectra(self, number: int, n: int):
        """A function from a slice of channels to their spectra, of a layer's filters for FFTs of size n; and how many channels to ask for at a time.

        Those of a size are kept where `make_room` found room for all layers; else they are computed for each batch anew.
        """
        mixer, D = self.layers[number]["layer"].mixer, self.model.config.hidden_size
        kept = self.tables.get(n)
        if kept is None or number not in kept:
            compute = (native_spectra if self.native else torch_spectra)(
                mixer, n, self.model.config.max_position_embeddings, self.dtype
            )
            if kept is None:
                return compute, CHANNELS * (torch.get_num_threads() if self.native else 1)
            kept[number] = compute(slice(0, D))
        return kept[number].channels, D

    def make_room(self, sizes: set[int]) -> None:
        """Say for which sizes of FFT spectra are kept: as many of this batch's as fit, the smallest first, then those that were used last."""

        def bytes_of(n: int) -> int:
            numbers = 4 if self.native else 2 * (1 + bool(self.model.config.residual_long_conv))
            return (
                len(self.layers)
                * self.model.config.hidden_size
                * (n // 2 + 1)
                * numbers
                * (2 if self.native and self.dtype == torch.bfloat16 else 4)
            )

        wanted = [*sorted(sizes), *(n for n in reversed(self.tables) if n not in sizes)]
        room, stay = SPECTRA, []
        for n in wanted:
            if bytes_of(n) <= room:
                room -= bytes_of(n)
                stay.append(n)
        self.tables = OrderedDict((n, self.tables.get(n, {})) for n in reversed(stay))

    # ------------------------------------------------------------------ layers

    def embed(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """(T,) -> (T, D)."""
        e = self.model.embeddings
        where = e.position_embeddings.weight[: max(lengths)] + e.token_type_embeddings.weight[0]
        x = e.word_embeddings(ids)
        start = 0
        for length in lengths:
            x[start : start + length] += where[:length]
            start += length
        return e.LayerNorm(x).to(self.dtype)

    def fft(self, length: int) -> int:
        """The size of FFT for a text of so many tokens."""
        return cpu.size(length) if self.native else fft_length(2 * length - 1)

    def runs(self, lengths: list[int]) -> list[tuple[slice, bool]]:
        """Tokens that go through a product together, and whether they are one long text: so a text's neighbours do not matter to it."""
        found, start = [], 0
        for length in lengths:
            long = self.dtype == torch.bfloat16 and length >= LONG
            if found and not long and not found[-1][1]:
                found[-1] = slice(found[-1][0].start, start + length), False
            else:
                found.append((slice(start, start + length), long))
            start += length
        return found

    def layer(
        self, number: int, x: Tensor, starts: Tensor, lengths: list[int], runs: list
    ) -> Tensor:
        own = self.layers[number]
        mixer = own["layer"].mixer
        if mixer.layernorm is not None:
            x = mixer.layernorm(x.float()).to(self.dtype)
        y = self.mix(number, each(own["in"], x, runs), x, starts, lengths)
        return self.mlp(own, each(own["out"], y, runs), runs)

    def mix(self, number: int, p: Tensor, u: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
        (weight, bias), y, D = self.layers[number]["short"], torch.empty_like(u), u.shape[1]
        sizes = [self.fft(length) for length in lengths]
        spectra = {n: self.spectra(number, n) for n in set(sizes)}
        group = min(few for _, few in spectra.values())
        for c in range(0, D, group):
            some = slice(c, min(c + group, D))
            tables = {n: of(some) for n, (of, _) in spectra.items()}
            if self.native:
                cpu.mix(p, u, starts, weight, bias, [tables[n] for n in sizes], y=y, channels=some)
            else:
                for start, length, n in zip(starts.tolist(), lengths, sizes):
                    text = slice(start, start + length)
                    y[text, some] = in_torch(
                        p[text], u[text, some], some, weight, bias, tables[n].values, n
                    ).to(y.dtype)
        return y

    def mlp(self, own: dict, h: Tensor, runs: list) -> Tensor:
        """LayerNorm(h + MLP(h)), (T, D)."""
        mlp = own["layer"].mlp
        if own["gated"] is None:
            gate, value = mlp.gated_layers(h.float()).chunk(2, dim=-1)
            return mlp.layernorm(h.float() + mlp.wo(F.gelu(gate) * value)).to(self.dtype)
        K = len(own["gated"])
        width, hidden = h.shape[1] // K, mlp.wo.d_in // K
        out, bias = torch.empty_like(h), mlp.wo.bias
        for run, long in runs:
            mean = h[run].mean(dim=0, dtype=torch.float32) if long else None
            biases = [
                product.putting_back(mean[k * width : (k + 1) * width]) if long else None
                for k, product in enumerate(own["gated"])
            ]
            for start in range(run.start, run.stop, TILE):
                some = slice(start, min(start + TILE, run.stop))
                parts = [h[some, k * width : (k + 1) * width].contiguous() for k in range(K)]
                done = []
                for k in range(K // 2):  # the first half of the blocks is gated by the second
                    gate, value = (
                        own["gated"][block](parts[block], biases[block])
                        for block in (k, k + K // 2)
                    )
                    m = (
                        cpu.glu(gate, value, gate)
                        if self.native and gate.shape[1] % 16 == 0
                        else F.gelu(gate) * value
                    )
                    for side, product in enumerate(own["wo"][2 * k : 2 * k + 2]):
                        half = m[:, side * hidden : (side + 1) * hidden].contiguous()
                        done.append(
                            product(
                                half,
                                product.putting_back(half.mean(dim=0, dtype=torch.float32))
                                if long
                                else None,
                            )
                        )
                total = torch.cat(done, dim=1).float().add_(h[some].float()).add_(bias)
                out[some] = F.layer_norm(
                    total,
                    (h.shape[1],),
                    mlp.layernorm.weight.float(),
                    mlp.layernorm.bias.float(),
                    mlp.layernorm.eps,
                )
        return out


class Product:
    """W x + b, the weight laid out once for the processor."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.exact, self.weight = weight.detach(), weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().float()
        self.packed, self.lost = None, None
        if dtype == torch.bfloat16 and support.takes_bfloat16():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """With another bias than its own, if one is given; float32."""
        bias = self.bias if bias is None else bias
        if self.packed is None:
            return F.linear(x, self.weight, None if bias is None else bias.to(x.dtype))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def putting_back(self, mean: Tensor) -> Tensor:
        """The bias with what rounding W took from the mean token, float32."""
        if self.lost is None:
            self.lost = (self.exact.float() - self.weight.float()).to(self.weight.dtype)
        found = torch.mv(self.lost.float(), mean)
        return found if self.bias is None else found + self.bias


def each(product: Product, x: Tensor, runs: list[tuple[slice, bool]]) -> Tensor:
    """The product of each run of tokens."""
    parts = [
        product(
            x[run], product.putting_back(x[run].mean(dim=0, dtype=torch.float32)) if long else None
        )
        for run, long in runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Complex(NamedTuple):
    """Spectra as torch.fft makes them: (2, d, n/2 + 1) of the gated and the residual filter, or (1, …)."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def channels(self, some: slice) -> "Complex":
        return Complex(self.values[:, some])


def native_spectra(mixer, n: int, most: int, dtype: torch.dtype):
    """slice of channels -> native.Table."""
    L, own, group = (
        min(max(1, n // 2), most),
        mixer.gated_filter,
        CHANNELS * torch.get_num_threads(),
    )
    filters = [
        None if filter is None else (filter, filter.hidden(L))
        for filter in (own, mixer.residual_filter)
    ]

    def compute(some: slice) -> cpu.Table:
        def table(part: slice) -> cpu.Table:
            gated, residual = (
                None
                if one is None
                else tuple(
                    None if taps is None else taps.float()
                    for taps in (*one[0].before_decay(one[1], part), one[0].bias[part])
                )
                for one in filters
            )
            return cpu.spectra(
                gated, residual, own.time(L).float(), own.deltas()[part].float(), n, dtype
            )

        made = [
            table(slice(c, min(c + group, some.stop))) for c in range(some.start, some.stop, group)
        ]
        return (
            made[0]
            if len(made) == 1
            else cpu.Table(
                *(None if parts[0] is None else torch.cat(parts) for parts in zip(*made))
            )
        )

    return compute


def torch_spectra(mixer, n: int, most: int, dtype: torch.dtype):
    """slice of channels -> Complex."""
    L = min((n + 1) // 2, most)
    filters = [
        (filter, filter.hidden(L))
        for filter in (mixer.gated_filter, mixer.residual_filter)
        if filter is not None
    ]

    def compute(some: slice) -> Complex:
        def part(c: int) -> Tensor:
            few = slice(c, min(c + CHANNELS, some.stop))
            return torch.stack(
                [
                    torch.fft.rfft(
                        circular_kernel(*filter.taps(hidden, few), filter.bias[few], n).float()
                    )
                    for filter, hidden in filters
                ]
            )

        return Complex(torch.cat([part(c) for c in range(some.start, some.stop, CHANNELS)], dim=1))

    return compute


def in_torch(
    p: Tensor, u: Tensor, some: slice, weight: Tensor, bias: Tensor, table: Tensor, n: int
) -> Tensor:
    """Some channels of the mixer of one text, (L, d), from p (L, 3D) and their u (L, d)."""
    L, D = len(p), p.shape[1] // 3
    places = [slice(kind * D + some.start, kind * D + some.stop) for kind in range(3)]
    q = torch.cat([p[:, one] for one in places], dim=1).t().float()  # (3d, L)
    x1, x2, v = short_conv(
        q[None],
        torch.cat([weight[:, one] for one in places], dim=1).t()[:, None],
        torch.cat([bias[one] for one in places]),
    )[0].chunk(3)
    found = torch.fft.irfft(torch.fft.rfft(x1 * v, n=n) * table[0], n=n)[:, :L] * x2
    if len(table) > 1:
        found = found + torch.fft.irfft(torch.fft.rfft(u.t().float(), n=n) * table[1], n=n)[:, :L]
    return found.t()
