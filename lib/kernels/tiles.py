"""The layers' definitions in torch, one tile at a time: without gradients, in the memory of a tile.

Between its two projections a sequence mixer computes each channel by itself, and an MLP computes
each token by itself. So the buffers hold TILE numbers, whatever the length of a text.
"""

from functools import partial

import torch
from torch import Tensor

from lib.operators.long_conv import long_conv, short_conv
from lib.operators.shared import active

TILE = 2**23  # numbers in a buffer: 32 MiB, few enough for a processor's cache


def sequence_mixer(layer, u: Tensor, mask: Tensor | None) -> Tensor | None:
    """y (B, L, D) of u (B, L, D) in groups of channels; None with gradients or for one group."""
    B, L, D = u.shape
    group = max(1, TILE // (3 * B * L))
    if torch.is_grad_enabled() or active() or group >= D:
        return None
    u = u.transpose(1, 2) if mask is None else u.transpose(1, 2) * mask  # (B, D, L)
    filters = [filter for filter in (layer.gated_filter, layer.residual_filter) if filter]
    hidden = [(filter, filter.hidden(L)) for filter in filters]
    mix = partial(mix_channels, layer, u, mask, hidden)
    return layer.out_linear(in_groups(mix, D, group, dim=1).transpose(1, 2))


def mix_channels(layer, u: Tensor, mask: Tensor | None, filters: list, channels: slice) -> Tensor:
    """Some channels, (B, d, L), of the steps of `SequenceMixer.definition` between projections."""

    def rows(parameter: Tensor) -> Tensor:  # (3D, …) -> (3d, …), the rows of x1, x2 and v
        return parameter.unflatten(0, (3, -1))[:, channels].flatten(0, 1)

    linear, short = layer.in_linear, layer.short_filter
    p = torch.matmul(rows(linear.weight), u) + rows(linear.bias)[:, None]  # (B, 3d, L)
    p = p if mask is None else p * mask
    x1, x2, v = short_conv(p, rows(short.weight), rows(short.bias)).chunk(3, dim=1)
    gate = v * x1 if mask is None else v * x1 * mask
    gated, *residual = (
        (filter.taps(hidden, channels), filter.bias[channels]) for filter, hidden in filters
    )
    y = long_conv(gate, *gated[0], gated[1]) * x2
    for taps, gain in residual:
        y = y + long_conv(u[:, channels], *taps, gain)
    return y


def gated_mlp(mlp, h: Tensor) -> Tensor | None:
    """y (B, L, D) of h in groups of tokens; None in training, with gradients or for one group."""
    tokens = h.flatten(0, 1)
    group = max(1, TILE // (2 * mlp.wo.d_in))
    if torch.is_grad_enabled() or mlp.training or group >= len(tokens):
        return None
    y = in_groups(lambda part: mlp.definition(tokens[part]), len(tokens), group, dim=0)
    return y.view_as(h)


def in_groups(function, n: int, group: int, dim: int) -> Tensor:
    """function(slice(0, n)), computed for `group` positions of the axis `dim` at a time."""
    if group >= n:
        return function(slice(0, n))
    whole = None
    for start in range(0, n, group):
        part = function(slice(start, min(start + group, n)))
        if whole is None:
            whole = part.new_empty(*part.shape[:dim], n, *part.shape[dim + 1 :])
        whole.narrow(dim, start, part.shape[dim]).copy_(part)
    return whole
