"""The cost of encoding a text, counted on paper.

A clock measures one implementation on one machine (lib/efficiency/race.py); a count says what every
implementation has to compute. The Transformer twin of an M2-BERT is a BERT of the same width, depth
and intermediate size. An M2-BERT with `mixer: attention` differs in less: it keeps the MLP.

    twin(config)                     the twin's configuration: BERT
    m2bert_flops(config, length)     operations of one forward pass, part by part
    transformer_flops(config, length)
    m2bert_activations(config, length), transformer_activations(config, length)
    parameters(config)               weights, by building the model without memory
    cost(config, length, …)          matrix multiplications, all operations, bytes: for a roofline
    encoder_costs(config, L, batch)  the same per token for lib/kernels on a GPU, part by part

Conventions: a multiply-add is 2 operations; a real FFT of n points is 2.5 n log₂ n (half of the
textbook 5 n log₂ n of a complex one); norms, activations, gates and look-ups are left out: they are
small and linear in the length.
Axes: B texts, L tokens, D width, I intermediate width (`inner`), K blocks, O filter width
      (`order`), E filter inputs.
"""

import math
from typing import TYPE_CHECKING

import torch

from lib.kernels import gpu
from lib.model.m2bert import M2BertConfig, M2BertForRetrieval
from lib.operators.long_conv import fft_length

if TYPE_CHECKING:
    from transformers import BertConfig

# The parts of each mixer of an M2-BERT (lib/model/twins.py).
PARTS = {
    "long_conv": ("projections", "short_conv", "long_conv", "kernels"),
    "ungated": ("projections", "short_conv", "long_conv", "kernels"),
    "short_conv": ("projections", "short_conv"),
    "attention": ("projections", "attention"),
    "none": (),
}


def twin(config: M2BertConfig) -> "BertConfig":
    """The Transformer of the same sizes, vocabulary and length, with heads of 64 channels."""
    from transformers import BertConfig

    same = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    return BertConfig(
        **{name: getattr(config, name) for name in (*same, "max_position_embeddings")},
        num_attention_heads=max(1, config.hidden_size // 64),
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )


def build(config) -> torch.nn.Module:
    """A model with random weights: M2-BERT or BERT, by the configuration's class."""
    if isinstance(config, M2BertConfig):
        return M2BertForRetrieval(config).eval()
    from transformers import BertModel

    return BertModel(config).eval()


def parameters(config) -> int:
    """The number of weights of the encoder, pooler included."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in build(config).parameters())


def convolution_flops(length: int, filters: int = 1) -> float:
    """One channel of one text: an FFT, times the filter's spectrum, and back; L² became L log L.

    filters · (2 · 2.5 n log₂ n + 6 (n/2 + 1)),   n ≥ 2L - 1
    """
    n = fft_length(2 * length - 1)
    return filters * (5 * n * math.log2(n) + 6 * (n // 2 + 1))


def attention_flops(length: int) -> float:
    """One channel of one text: Q Kᵀ and the weighted sum of V, 2 L² each, flash or not."""
    return 4.0 * length**2


def m2bert_flops(config: M2BertConfig, length: int, batch: int = 1) -> dict[str, float]:
    """Operations per text, part by part; other mixers than `long_conv` have fewer parts.

    projections   8 L D²                                in (D -> 3D) and out; ungated: 4 L D²
    short_conv    18 L D                                width 3 on 3D channels; ungated: 6 L D
    long_conv     D · convolution_flops                 gated and residual
    kernels       4 · 2 L (E O + 2 O² + O D) / B  + …   the filters' MLPs and spectra: once per
                                                        forward pass, shared by its B texts
    attention     4 L² D                                in place of the convolutions
    mlp           6 L D I / K                           block-diagonal, gated
    pooler        2 D²
    """
    L, D, inner, K = length, config.hidden_size, config.intermediate_size, config.mlp_blocks
    filters, directions = 1 + config.residual_long_conv, 1 + config.bidirectional
    order, E, n = config.filter_order, config.filter_emb_dim, fft_length(2 * length - 1)
    taps = 2 * L * (E * order + 2 * order**2 + order * D)
    streams = 1 if config.mixer == "ungated" else 3  # that W_in makes of u
    layer = {
        "projections": 2 * (streams + 1) * L * D**2,
        "short_conv": 6 * streams * L * D,
        "long_conv": D * convolution_flops(L, filters),
        "kernels": filters * (directions * taps + D * 2.5 * n * math.log2(n)) / batch,
        "attention": D * attention_flops(L),
        "mlp": 6 * L * D * inner / K,
    }
    return of_layers(config, {part: layer[part] for part in (*PARTS[config.mixer], "mlp")})


def transformer_flops(config: "BertConfig", length: int) -> dict[str, float]:
    """Operations per text.

    projections   8 L D²        queries, keys, values, output
    attention     4 L² D        the only part that grows faster than the text
    mlp           4 L D I       dense
    pooler        2 D²
    """
    L, D, inner = length, config.hidden_size, config.intermediate_size
    attention, mlp = D * attention_flops(L), 4 * L * D * inner
    return of_layers(config, {"projections": 8 * L * D**2, "attention": attention, "mlp": mlp})


def of_layers(config, layer: dict[str, float]) -> dict[str, float]:
    """The operations of all layers, part by part, and of the pooler."""
    flops = {part: config.num_hidden_layers * float(count) for part, count in layer.items()}
    return flops | {"pooler": 2.0 * config.hidden_size**2}


def m2bert_activations(config: M2BertConfig, length: int, batch: int = 1) -> float:
    """Numbers that autograd keeps of one layer in torch, per text; lib/kernels/mixer.cpp: fewer.

    Per token and channel: the mixer's input, three projections before and after the short
    convolution, each convolution's input as a spectrum (n/L ≈ 2 real numbers), the gated one's
    output at its full FFT size, and the inputs of the output projection, of the MLP and of its
    norm. Per token: 4 I in the gated MLP. The batch shares the filters and their MLPs.
    """
    assert config.mixer == "long_conv", config.mixer  # the other mixers' are not counted
    L, D, inner, n = (
        length,
        config.hidden_size,
        config.intermediate_size,
        fft_length(2 * length - 1),
    )
    filters, directions = 1 + config.residual_long_conv, 1 + config.bidirectional
    per_text = L * (10 * D + 4 * inner) + n * D * (filters + 1)
    shared = filters * (directions * L * (9 * config.filter_order + D) + L * D + n * D)
    return float(per_text + shared / batch)


def transformer_activations(config: "BertConfig", length: int, flash: bool = False) -> float:
    """Numbers that one layer keeps for its backward pass, per text: L (9 D + 2 I) + heads · L².

    Flash attention recomputes the heads · L² attention weights: its L² is time, not memory.
    """
    L, D, inner = length, config.hidden_size, config.intermediate_size
    return float(L * (9 * D + 2 * inner) + (0 if flash else config.num_attention_heads * L**2))


def m2bert_traffic(config: M2BertConfig, length: int, itemsize: int = 4, batch: int = 1) -> float:
    """Bytes to and from memory per text of one forward pass.

    Each step of a layer reads its input once and writes its output once. Numbers per layer:

    each token    projections in D + 3D, mixer 3D + D + D, projection out D + D, MLP D + D
    each text     spectra: 2 D (n/2 + 1) complex numbers, n ≥ 2L - 1 a power of two
    B texts       weights: 4 D² + 3 D I / K

    With attention the mixer is 3D + D, and there are no spectra.
    """
    assert config.mixer in ("long_conv", "attention"), config.mixer  # no other one is timed
    D, inner, K = config.hidden_size, config.intermediate_size, config.mlp_blocks
    n = 1 << max(0, 2 * length - 2).bit_length()
    weights = (4 * D**2 + 3 * D * inner / K) / batch
    if config.mixer == "attention":
        numbers = 12 * length * D + weights
    else:
        numbers = 13 * length * D + weights + 4 * D * (n // 2 + 1)
    return float(itemsize * config.num_hidden_layers * numbers)


def transformer_traffic(
    config: "BertConfig", length: int, itemsize: int = 4, batch: int = 1
) -> float:
    """`m2bert_traffic` for a Transformer whose attention weights never leave the cache.

    each token    queries, keys, values D + 3D, attention 3D + D, output D + D, MLP D + I, I + D
    B texts       weights: 4 D² + 2 D I
    """
    D, inner = config.hidden_size, config.intermediate_size
    numbers = length * (12 * D + 2 * inner) + (4 * D**2 + 2 * D * inner) / batch
    return float(itemsize * config.num_hidden_layers * numbers)


def cost(config, length: int, itemsize: int, batch: int = 1) -> tuple[float, float, float]:
    """Per text: operations of matrix multiplications, all operations, bytes.

    The operations of M2-BERT's filters are left out: they do not depend on the text.
    """
    if isinstance(config, M2BertConfig):
        parts = m2bert_flops(config, length, batch)
        products = parts["projections"] + parts["mlp"] + parts.get("attention", 0.0)
        total = sum(parts.values()) - parts.get("kernels", 0.0)
        return products, total, m2bert_traffic(config, length, itemsize, batch)
    total = sum(transformer_flops(config, length).values())
    return total, total, transformer_traffic(config, length, itemsize, batch)


def flops(L: int, channels: int, signals: int = 2) -> dict[str, float]:
    """Operations per token of one layer's `gpu.mix` forward. A text of L tokens fills H = M R1 R2.

    products     S D (H/L) 2 (4 M + 8 (R1 + R2)): two transforms
    pointwise    S D (H/L) 6 per twiddle and spectrum; 21 D for the short convolution and the gates

    Args:
        channels: D. signals: S, 2 with the residual convolution, else 1.
    """
    M, R1, R2 = gpu.factors(L)
    fill = M * R1 * R2 / L
    second, twiddles = (R2, 1) if R1 == 1 else (R1 + R2, 2)
    return {
        "products": signals * channels * fill * 2 * (4 * M + 8 * second),
        "pointwise": signals * channels * fill * 6 * (2 * twiddles + 1) + 21 * channels,
    }


def traffic(
    L: int, channels: int, signals: int = 2, batch: int = 1, size: int = 2
) -> dict[str, float]:
    """Bytes per token of one layer's `gpu.mix` forward to and from memory.

    If a program reads a number twice, the cache serves the second read.

    texts      D numbers of p (3), y (1), and u with the residual convolution (1)
    planes     8 S D H/L numbers, for three passes only
    spectra    8 S D H/L bytes, read once for all texts of a batch

    Args:
        size: bytes of a number, 2 in bfloat16.
    """
    M, R1, R2 = gpu.factors(L)
    fill = M * R1 * R2 / L
    return {
        "texts": size * channels * (3 + signals),
        "planes": 0.0 if R1 == 1 else size * channels * fill * signals * 8,
        "spectra": 8 * signals * channels * fill / batch,
    }


def encoder_costs(config, L: int, batch: int = 1) -> dict[str, tuple[float, float]]:
    """(operations, bytes) per token of all layers, without gradients, bfloat16, part by part.

    mixer          `gpu.mix`
    projections    8 D² operations; u is transposed (2 D numbers) and read, p written, y read, the
                   output written, and 4 D² weights per batch
    mlp            6 W I operations, W the next power of two from D / K; D read, D written, and
                   3 D I / K weights per batch (lib/kernels/gpu_mlp.py), which the cache gives to
                   each of its programs
    """
    D, inner, K = config.hidden_size, config.intermediate_size, config.mlp_blocks
    N, S = config.num_hidden_layers, 2 if config.residual_long_conv else 1
    tokens, block = batch * L, 1 << (D // K - 1).bit_length()
    return {
        "mixer": (N * sum(flops(L, D, S).values()), N * sum(traffic(L, D, S, batch).values())),
        "projections": (N * 8.0 * D**2, N * 2 * (8 * D + 4 * D**2 / tokens)),
        "mlp": (N * 6.0 * block * inner, N * 2 * (2 * D + 3 * D * inner / K / tokens)),
    }
