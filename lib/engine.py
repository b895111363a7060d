"""The encoder at the processor's speed: what `forward` computes, for texts of any lengths, without gradients, on a CPU.

    Engine(model)(ids)                   pooled outputs of rows of ids, float32 (n, D), within 1e-4 of the model's own
    Engine(model, torch.bfloat16)(ids)   matrix products in bfloat16; FFTs, sums and LayerNorms inside in float32

Texts lie one after another, (T, D), and nothing is padded. The filters do not depend on the text: their spectra are
computed once for a size of FFT and kept, up to a limit. The two convolutions of a layer, its gates and its short
convolution are one pass of lib/mixer.cpp (`lib.native`), or the same in torch where that cannot be compiled. The MLP goes
through its tokens a tile at a time, so that what lies between its two products never leaves the cache.

The definition is lib/model.py; tests/test_engine.py holds the two together.
Axes: n texts, T tokens of all of them, D width, K blocks.
"""
from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import native
from lib.long_conv import circular_kernel, fft_length, short_conv
from lib.model import M2BertModel, SequenceMixer

TILE = 1024                     # tokens that go through an MLP at a time
SPECTRA = 3 * 2**30             # bytes of spectra that are kept; those of a 32,768-token model of 80M are 2.3 GiB in bfloat16
CHANNELS = 64                   # whose spectra are computed at a time
SAMPLE = 16                     # numbers of a weight that are compared with what they were


class Engine:
    """A fast `forward` of a model; weights that change are noticed.

    Args:
        model: an M2BertModel or what holds one as `.model`, on the CPU.
        dtype: float32 or bfloat16, of activations and matrix products.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: float32 or bfloat16")
        self.model: M2BertModel = getattr(model, "model", model)
        self.dtype, self.seen = dtype, None
        self.native = native.fits(self.model.config.hidden_size)

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
            raise ValueError(f"texts of {min(real)} to {max(real)} tokens: from 1 to the {config.max_position_embeddings} that the model reads")
        if config.pad_to_max_length and not config.mask_padding:           # padding that is masked changes nothing
            ids = [row + [config.pad_token_id] * (config.max_position_embeddings - len(row)) for row in ids]
        self.refresh()
        lengths = [len(row) for row in ids]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        x = self.embed(torch.tensor([token for row in ids for token in row]), lengths)
        for number in range(len(self.layers)):
            x = self.layer(number, x, starts, lengths)
        rows = starts[:-1].tolist()
        summary = torch.stack([x[a] for a in rows]).float() if config.pooling == "cls" else torch.stack([x[a : a + n].float().mean(dim=0) for a, n in zip(rows, real)])
        return torch.tanh(F.linear(summary, *self.pooler))

    # ------------------------------------------------------------------ weights

    def refresh(self) -> None:
        """Take over the model's weights where they have changed since the last call.

        Fused optimizers and edits through `.data` leave a tensor's version as it is, so a sample of each is looked at too.
        """
        parameters = list(self.model.parameters())
        now = [(parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version) for parameter in parameters]
        sample = torch.cat([parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLE)] for parameter in parameters])
        if self.seen is not None and now == self.seen[0] and torch.equal(sample, self.seen[1]):
            return
        self.layers = [self.prepared(layer) for layer in self.model.layers]
        pooler = self.model.pooler
        self.pooler = pooler.weight.float(), pooler.bias.float()
        self.tables: OrderedDict = OrderedDict()                           # (layer, n) -> spectra
        self.seen = now, sample

    def prepared(self, layer) -> dict:
        mixer, mlp = layer.mixer, layer.mlp
        K, I = mlp.gated_layers.weight.shape[0], mlp.wo.d_in
        blocks = K % 2 == 0 and mlp.gated_layers.d_in % K == 0 and mlp.wo.d_out % K == 0 and I % K == 0 and 2 * I % K == 0
        return {"layer": layer, "in": Product(mixer.in_linear.weight, mixer.in_linear.bias, self.dtype), "out": Product(mixer.out_linear.weight, mixer.out_linear.bias, self.dtype),
                "short": (mixer.short_filter.weight[:, 0].t().float().contiguous(), mixer.short_filter.bias.float().contiguous()),
                "gated": [Product(weight, None, self.dtype) for weight in mlp.gated_layers.weight] if blocks else None,
                "wo": [Product(weight, None, self.dtype) for weight in mlp.wo.weight] if blocks else None}

    def spectra(self, number: int, n: int) -> Tensor:
        """The spectra of a layer's filters for FFTs of size n, kept while there is room."""
        key = number, n
        if key not in self.tables:
            mixer = self.layers[number]["layer"].mixer
            table = (self.native_spectra if self.native else self.torch_spectra)(mixer, n)
            if len(self.layers) * table.nbytes > SPECTRA:                  # all layers of this size do not fit: keeping some would help none
                return table
            while self.tables and sum(kept.nbytes for kept in self.tables.values()) + table.nbytes > SPECTRA:
                self.tables.popitem(last=False)
            self.tables[key] = table
        self.tables.move_to_end(key)
        return self.tables[key]

    def native_spectra(self, mixer: SequenceMixer, n: int) -> Tensor:
        D = self.model.config.hidden_size
        parts = [native.spectra(*some, n, self.dtype) for some in kernels(mixer, min(max(1, n // 2), self.model.config.max_position_embeddings), D)]
        return torch.cat(parts)

    def torch_spectra(self, mixer: SequenceMixer, n: int) -> Tensor:
        """(2, D, n/2 + 1) or (1, …), complex."""
        D, taps = self.model.config.hidden_size, min((n + 1) // 2, self.model.config.max_position_embeddings)
        parts = [torch.stack([torch.fft.rfft(circular_kernel(*one, n)) for one in some if one is not None]) for some in kernels(mixer, taps, D)]
        return torch.cat(parts, dim=1)

    # ------------------------------------------------------------------ layers

    def embed(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """(T,) -> (T, D)."""
        e = self.model.embeddings
        where = (e.position_embeddings.weight + e.token_type_embeddings.weight[0])[: max(lengths)]
        x = e.word_embeddings(ids)
        start = 0
        for length in lengths:
            x[start : start + length] += where[:length]
            start += length
        return e.LayerNorm(x).to(self.dtype)

    def layer(self, number: int, x: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
        own = self.layers[number]
        mixer = own["layer"].mixer
        if mixer.layernorm is not None:
            x = mixer.layernorm(x.float()).to(self.dtype)
        y = self.mix(number, own["in"](x), x, starts, lengths)
        return self.mlp(own, own["out"](y))

    def mix(self, number: int, p: Tensor, u: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
        weight, bias = self.layers[number]["short"]
        if self.native:
            tables = {n: self.spectra(number, n) for n in {native.size(length) for length in lengths}}
            return native.mix(p, u, starts, weight, bias, [tables[native.size(length)] for length in lengths])
        y, D = torch.empty_like(u), u.shape[1]
        for start, length in zip(starts.tolist(), lengths):
            n = fft_length(2 * length - 1)
            table = self.spectra(number, n)
            for c in range(0, D, CHANNELS):
                some = [slice(kind * D + c, kind * D + min(c + CHANNELS, D)) for kind in range(3)]
                q = torch.cat([p[start : start + length, one] for one in some], dim=1).t().float()             # (3d, L)
                x1, x2, v = short_conv(q[None], torch.cat([weight[:, one] for one in some], dim=1).t()[:, None], torch.cat([bias[one] for one in some]))[0].chunk(3)
                first = slice(c, min(c + CHANNELS, D))
                found = torch.fft.irfft(torch.fft.rfft(x1 * v, n=n) * table[0, first], n=n)[:, :length] * x2
                if len(table) > 1:
                    found = found + torch.fft.irfft(torch.fft.rfft(u[start : start + length, first].t().float(), n=n) * table[1, first], n=n)[:, :length]
                y[start : start + length, first] = found.t().to(y.dtype)
        return y

    def mlp(self, own: dict, h: Tensor) -> Tensor:
        """LayerNorm(h + MLP(h)), (T, D)."""
        mlp = own["layer"].mlp
        if own["gated"] is None:
            return mlp(h[None].float())[0].to(self.dtype)
        K = len(own["gated"])
        width, hidden = h.shape[1] // K, mlp.wo.d_in // K
        out, bias = torch.empty_like(h), mlp.wo.bias
        for start in range(0, len(h), TILE):
            tile = h[start : start + TILE]
            parts = [tile[:, k * width : (k + 1) * width].contiguous() for k in range(K)]
            done = []
            for k in range(K // 2):                                        # the first half of the blocks is gated by the second
                gate, value = own["gated"][k](parts[k]), own["gated"][k + K // 2](parts[k + K // 2])
                m = native.glu(gate, value, gate) if self.native and gate.shape[1] % 16 == 0 else F.gelu(gate) * value
                done += [own["wo"][2 * k + side](m[:, side * hidden : (side + 1) * hidden].contiguous()) for side in range(2)]
            total = torch.cat(done, dim=1).float().add_(tile.float()).add_(bias)
            out[start : start + TILE] = F.layer_norm(total, (h.shape[1],), mlp.layernorm.weight.float(), mlp.layernorm.bias.float(), mlp.layernorm.eps)
        return out


class Product:
    """x W^T + b, its weight laid out once for the processor."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight, self.bias = weight.detach().to(dtype).contiguous(), None if bias is None else bias.detach().to(dtype)
        self.packed = None
        if dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def kernels(mixer: SequenceMixer, taps: int, channels: int):
    """(gated, residual or None) of every CHANNELS channels, each (back, ahead or None, gain), float32."""
    filters = [None if filter is None else (filter, filter.hidden(taps)) for filter in (mixer.gated_filter, mixer.residual_filter)]
    for c in range(0, channels, CHANNELS):
        some = slice(c, min(c + CHANNELS, channels))
        yield [None if one is None else (*(None if k is None else k.float() for k in one[0].taps(one[1], some)), one[0].bias[some].float()) for one in filters]
