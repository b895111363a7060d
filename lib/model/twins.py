"""Mixers to compare the long convolution with: attention, none, and itself without a part.

Each of them takes the place of `SequenceMixer` in a layer (`mixer` in `M2BertConfig`), so that two
models differ in it and in nothing else: embeddings, MLP, norms, pooling and head are the same.

    Attention        h = x + W_out softmax(Q Kᵀ / sqrt(d)) V        mixer: attention
    NoMixer          h = x                                          mixer: none
    UngatedMixer     the gates off, x1 = x2 = 1                     mixer: ungated
    ShortConvMixer   the long convolutions out, their gains stay    mixer: short_conv

`start_at_identity` of each makes h = x. What it sets to zero can be learned. `take_the_rest` gives
two models of one seed the same weights outside of their mixers, which draw different numbers.

Source: Vaswani et al. 2017 (arXiv 1706.03762) for attention; Su et al. 2021 (arXiv 2104.09864) for
        its rotary positions.
Axes:   B batch, L tokens, D width, H heads of d channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.operators.long_conv import ImplicitFilter, long_conv, short_conv
from lib.pipeline.errors import require

HEAD = 64  # channels of a head, as in BERT
BASE = 10_000  # of the rotary positions' wavelengths: from 2 pi to 2 pi BASE tokens


class Attention(nn.Module):
    """h = x + W_out concat_heads(softmax(R(Q) R(K)ᵀ / sqrt(d)) V),  (Q, K, V) = W_in x.

    Positions are rotary (R): scores depend on the distance of two tokens, as the taps of a long
    convolution do. With learned positions alone, which both models have, attention would see no
    order at the identity start, where they are zero, and would learn each position by itself.

    Raises:
        ValueError: heads of 64 channels do not fill the width, or have an odd number of channels.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.heads = heads(D)
        self.in_linear = nn.Linear(D, 3 * D)
        self.out_linear = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """h (B, L, D) from x (B, L, D) and mask (B, 1, L): 1 for a token, 0 for padding."""
        qkv = self.in_linear(x).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, H, d)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, L, d) each
        keys = None if mask is None else mask[:, None].bool()  # (B, 1, 1, L)
        y = F.scaled_dot_product_attention(rotary(q), rotary(k), v, attn_mask=keys)
        return x + self.out_linear(y.transpose(1, 2).flatten(2))

    def start_at_identity(self) -> None:
        """W_out = 0."""
        nn.init.zeros_(self.out_linear.weight)
        nn.init.zeros_(self.out_linear.bias)


def heads(D: int) -> int:
    """The number of heads of a width: one for each 64 channels, one at least."""
    count = max(1, D // HEAD)
    fits = D % count == 0 and (D // count) % 2 == 0
    way = f"take a multiple of {HEAD}, or an even number below {2 * HEAD}"
    message = f"mixer: attention has {count} heads, which do not fit hidden_size={D}: {way}"
    require(fits, message, ValueError)
    return count


def rotary(x: Tensor) -> Tensor:
    """Rotate the channels (i, i + d/2) of token t by the angle t · BASE^(-2i/d), (B, H, L, d).

    A product of two rotated vectors depends on their positions only by the difference.
    """
    L, half = x.shape[-2], x.shape[-1] // 2
    options = dict(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    rates = BASE ** (-torch.arange(half, **options) / half)
    angle = torch.arange(L, **options)[:, None] * rates  # (L, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class NoMixer(nn.Module):
    """h = x: a layer that sees one token at a time. The pooling alone brings tokens together."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x

    def start_at_identity(self) -> None:
        pass


class UngatedMixer(nn.Module):
    """h = W_out (LongConv(v) + ResidualLongConv(x)),  v = ShortConv(W_in x).

    `SequenceMixer` with x1 = x2 = 1. It is linear: what it brings from one token to another does
    not depend on either.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.in_linear = nn.Linear(D, D)
        self.short_filter = nn.Conv1d(D, D, 3, groups=D)
        self.long_filter = implicit_filter(config)
        self.residual_filter = implicit_filter(config) if config.residual_long_conv else None
        self.out_linear = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """h (B, L, D) from x (B, L, D) and mask (B, 1, L)."""
        u = masked(x.transpose(1, 2), mask)  # (B, D, L)
        p = masked(self.in_linear(x).transpose(1, 2), mask)
        v = masked(short_conv(p, self.short_filter.weight, self.short_filter.bias), mask)
        y = convolved(self.long_filter, v)
        if self.residual_filter is not None:
            y = y + convolved(self.residual_filter, u)
        return self.out_linear(y.transpose(1, 2))

    def start_at_identity(self) -> None:
        """W_out = I; of the path that passes x on, kernel 0 and gain 1; of the other one 0 and 0.

        Without a residual convolution v = x.
        """
        nn.init.eye_(self.out_linear.weight)
        passing = self.residual_filter
        if passing is None:
            passing = self.long_filter
            start_with_the_input(self.in_linear, self.short_filter)
        nn.init.zeros_(self.long_filter.bias)
        nn.init.ones_(passing.bias)
        for filter in (self.long_filter, passing):
            for mlp in (filter.back, filter.ahead):
                if mlp is not None:
                    nn.init.zeros_(mlp[3].weight)


class ShortConvMixer(nn.Module):
    """h = W_out (x2 · g · x1 · v + g' · x),  (x1, x2, v) = ShortConv(W_in x).

    `SequenceMixer` without the taps of its long convolutions, of which the gains g and g' stay: no
    token sees further than two tokens back.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.in_linear = nn.Linear(D, 3 * D)
        self.short_filter = nn.Conv1d(3 * D, 3 * D, 3, groups=3 * D)
        self.gain = Gain(D)
        self.residual_gain = Gain(D) if config.residual_long_conv else None
        self.out_linear = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """h (B, L, D) from x (B, L, D) and mask (B, 1, L)."""
        p = masked(self.in_linear(x).transpose(1, 2), mask)  # (B, 3D, L)
        s = short_conv(p, self.short_filter.weight, self.short_filter.bias)
        x1, x2, v = s.transpose(1, 2).chunk(3, dim=-1)  # (B, L, D) each
        y = x2 * self.gain(x1 * v)
        if self.residual_gain is not None:
            y = y + self.residual_gain(x)
        return self.out_linear(y)

    def start_at_identity(self) -> None:
        """W_out = I, x1 = 0 and g' = 1; without the residual path x1 = x2 = 1, v = x and g = 1."""
        nn.init.eye_(self.out_linear.weight)
        passing = self.residual_gain
        start_gates(self.in_linear, self.short_filter, silent=passing is not None)
        nn.init.ones_((self.gain if passing is None else passing).bias)


class Gain(nn.Module):
    """What is left of a long convolution without its taps: y = bias · x, channel by channel."""

    def __init__(self, D: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(D))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 1), as the gain of an `ImplicitFilter`."""
        self.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.bias


def implicit_filter(config) -> ImplicitFilter:
    """A filter with the sizes of those in `SequenceMixer`."""
    sizes = config.hidden_size, config.max_position_embeddings
    inner = config.filter_emb_dim, config.filter_order, config.filter_frequency
    return ImplicitFilter(*sizes, *inner, config.bidirectional, config.filter_length)


def convolved(filter: ImplicitFilter, u: Tensor) -> Tensor:
    return long_conv(u, *filter(u.shape[-1]), filter.bias)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, …, L) with zeros at the padding of mask (B, 1, L)."""
    return x if mask is None else x * mask


def start_gates(in_linear: nn.Linear, short_filter: nn.Conv1d, silent: bool) -> None:
    """x1 = 0, so that the gated path is silent; else it passes x on: x1 = x2 = 1 and v = x."""
    D = in_linear.in_features
    nn.init.zeros_(in_linear.weight[:D])
    nn.init.zeros_(short_filter.bias[:D])
    if not silent:
        nn.init.zeros_(in_linear.weight[D : 2 * D])
        nn.init.ones_(short_filter.bias[: 2 * D])
        start_with_the_input(in_linear, short_filter)


def start_with_the_input(in_linear: nn.Linear, short_filter: nn.Conv1d) -> None:
    """v = x: the last D rows of W_in are I, their short filters keep the token itself."""
    D = in_linear.in_features
    nn.init.eye_(in_linear.weight[-D:])
    short_filter.weight[-D:] = torch.tensor([0.0, 0.0, 1.0])
    nn.init.zeros_(short_filter.bias[-D:])


MIXERS = {
    "attention": Attention,
    "none": NoMixer,
    "ungated": UngatedMixer,
    "short_conv": ShortConvMixer,
}


def take_the_rest(model: nn.Module, other: nn.Module) -> None:
    """Copy all weights of another model but its mixers', in place."""
    rest = {name: w for name, w in other.state_dict().items() if ".mixer." not in name}
    model.load_state_dict(model.state_dict() | rest)
