"""Convolutions as long as the text: every token sees every other in less than O(L²).

Attention compares all pairs of tokens. A long convolution applies one filter,
as long as the text, to every position; the FFT does it in O(L log L). Here it
is bidirectional: one kernel looks back, another looks ahead.

    long_conv_direct(u, k, k_rev, bias)    the definition, O(L²)
    long_conv(u, k, k_rev, bias)           the same through the FFT
    short_conv(x, weight, bias)            depthwise and causal, width 3
    ImplicitFilter                         a small MLP that writes the kernels
    filters_once(model, length)            a training step: all filters of a model in one product

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3); Poli et al. 2023 (Hyena,
        arXiv 2302.10866) for the implicit filter. Checked against tests/golden.
Axes:   B batch, D channels, L positions.
"""

import math
from collections import defaultdict
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lib.operators import shared


def long_conv_direct(
    u: Tensor, k: Tensor, k_rev: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y[i] = Σ_{m≤i} k[i-m] u[m] + Σ_{m>i} k_rev[m-i-1] u[m] + bias · u[i].

    Tap 0 of `k_rev` acts on the *next* position; its last tap never acts.

    Shapes: u and the result (B, D, L); k and k_rev (D, L) or longer, else a ValueError; bias (D,),
    a gain on u, not an addend.
    """
    check_kernels(u, k, k_rev)
    i = torch.arange(u.shape[-1], device=u.device)
    lag = i[:, None] - i  # (L, L)
    toeplitz = k[:, lag.clamp(min=0)] * (lag >= 0)  # (D, L, L)
    if k_rev is not None:
        toeplitz = toeplitz + k_rev[:, (-lag - 1).clamp(min=0)] * (lag < 0)
    if bias is not None:
        toeplitz = toeplitz + bias[:, None, None] * (lag == 0)
    return torch.einsum("dij,bdj->bdi", toeplitz, u)  # (B, D, L)


def check_kernels(u: Tensor, k: Tensor, k_rev: Tensor | None) -> None:
    for kernel in (k, k_rev):
        if kernel is not None and (kernel.shape[0] != u.shape[1] or kernel.shape[-1] < u.shape[-1]):
            raise ValueError(
                f"a kernel of {tuple(kernel.shape)} does not span an input of {tuple(u.shape)}: "
                "one row per channel, one tap per position"
            )


@cache
def fft_length(n: int) -> int:
    """The smallest 2^a 3^b 5^c ≥ n: lengths the FFT is fast at."""
    threes_and_fives = (3**b * 5**c for b in range(n.bit_length()) for c in range(n.bit_length()))
    # m << k with the smallest k that reaches n
    return min(m << max(0, ((n - 1) // m).bit_length()) for m in threes_and_fives)


class CircularConv(torch.autograd.Function):
    """y = irfft(rfft(u) · rfft(K)), with a backward pass in real FFTs.

        du = irfft(rfft(dy) · conj(K^)),   dK = irfft(Σ_b rfft(dy) · conj(u^))

    Autograd's own backward pass of rfft is a complex FFT of twice the size.
    """

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor, n: int) -> Tensor:  # (B, D, L), (D, n) -> (B, D, L)
        u_f, k_f = torch.fft.rfft(u, n=n), torch.fft.rfft(kernel)  # (B, D, n/2+1), (D, n/2+1)
        ctx.save_for_backward(u_f, k_f)
        ctx.n = n
        return torch.fft.irfft(u_f * k_f, n=n)[..., : u.shape[-1]]

    # Spectra are saved, not inputs: a second derivative would be silently wrong.
    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        u_f, k_f = ctx.saved_tensors
        dy_f = torch.fft.rfft(dy, n=ctx.n)
        dk = du = None
        if ctx.needs_input_grad[1]:
            dk = torch.fft.irfft((dy_f * u_f.conj()).sum(dim=0), n=ctx.n)
        if ctx.needs_input_grad[0]:
            du = torch.fft.irfft(dy_f.mul_(k_f.conj()), n=ctx.n)[..., : dy.shape[-1]]
        return du, dk, None


def circular_kernel(k: Tensor, k_rev: Tensor | None, bias: Tensor | None, n: int) -> Tensor:
    """Both kernels and the gain as one circular kernel of size n ≥ 2L-1, (D, n).

    K[j] = k[j] for 0 ≤ j < L, K[n-1-j] = k_rev[j] for 0 ≤ j < L-1, K[0] += bias:
    negative lags live at the end of the circle, and the padding between the two
    halves keeps them from meeting.
    """
    D, L = k.shape
    if bias is not None:
        k = torch.cat([k[:, :1] + bias[:, None], k[:, 1:]], dim=-1)
    gap = k.new_zeros(D, n - 2 * L + 1)
    back = k.new_zeros(D, L - 1) if k_rev is None else k_rev[:, : L - 1].flip(-1)
    return torch.cat([k, gap, back], dim=-1)


def long_conv(
    u: Tensor, k: Tensor, k_rev: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`long_conv_direct` in O(L log L): multiply spectra of size ≥ 2L-1, so nothing wraps around.

    16-bit inputs are convolved in float32; the result has the dtype of u.
    """
    check_kernels(u, k, k_rev)
    L = u.shape[-1]
    n = fft_length(2 * L - 1)
    kernel = circular_kernel(k[:, :L], None if k_rev is None else k_rev[:, :L], bias, n)
    if u.dtype == kernel.dtype and u.element_size() >= 4:
        return CircularConv.apply(u, kernel, n)
    wide = torch.promote_types(torch.promote_types(u.dtype, kernel.dtype), torch.float32)
    return CircularConv.apply(u.to(wide), kernel.to(wide), n).to(u.dtype)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y[t] = bias + w[0] x[t-2] + w[1] x[t-1] + w[2] x[t], depthwise; zeros precede the text.

    Shapes: x and y (B, C, L), weight (C, 1, 3), bias (C,).
    """
    return F.conv1d(F.pad(x, (2, 0)), weight, bias, groups=x.shape[1])


class ImplicitFilter(nn.Module):
    """An MLP from position to filter tap, so a filter's size does not grow with its length.

        z_i = [t_i, cos(f w_i) …, -sin(f w_i) …],  t_i = i / (N-1),  w_i = 2π i / N
        k_i = MLP(z_i) · exp(-t_i |δ_c|),  three hidden layers h -> sin(F · (h W^T + b))

    N is `filter_length`, the length the time axis was made for. The reverse
    kernel has its own MLP; both share the sine frequencies F, the inputs z
    (trained) and the decay δ_c, from slow (4.6 / 1.5) to fast (4.6 / 0.3).

    Kernels are float32 whatever the model's dtype: bfloat16 tells only 256 positions of the time
    axis apart.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        emb_dim: int = 5,
        order: int = 128,
        frequency: float = 10.0,
        bidirectional: bool = True,
        filter_length: int | None = None,
    ):
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"filter_emb_dim={emb_dim}: an odd number ≥ 3 (time, cosines, sines)")
        self.channels, self.max_length, self.emb_dim = channels, max_length, emb_dim
        self.frequency, self.filter_length = frequency, filter_length or max_length

        wide = dict(dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))

        def mlp() -> nn.ModuleList:
            hidden = (nn.Linear(width, order, **wide) for width in (emb_dim, order, order))
            return nn.ModuleList([*hidden, nn.Linear(order, channels, bias=False, **wide)])

        self.inputs = nn.Parameter(torch.empty(max_length, emb_dim, **wide))  # z
        self.freq = nn.Parameter(torch.empty(order, **wide))  # F
        self.bias = nn.Parameter(torch.empty(channels, **wide))  # gain on the input
        self.ahead = mlp() if bidirectional else None
        self.back = mlp()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset z, F and the gain; the model that owns the linear layers draws them."""
        with torch.no_grad():
            self.inputs.copy_(filter_inputs(self.max_length, self.emb_dim, self.filter_length))
            self.freq.fill_(self.frequency)
            self.bias.normal_()

    def _apply(self, fn, recurse: bool = True):
        # `to`, `half` and `bfloat16` call this: follow to another device, not into 16 bits.
        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(wide, recurse)

    def decay(self, length: int, channels: slice = slice(None)) -> Tensor:
        """exp(-t_i |δ_c|), (L, D)."""
        return torch.exp(-self.time(length)[:, None] * self.deltas()[channels].abs())

    # Computed, not stored: a buffer would have to survive saving, resizing and meta devices.
    def time(self, length: int) -> Tensor:
        """t_i, (L,)."""
        options = dict(device=self.inputs.device, dtype=self.inputs.dtype)
        if self.filter_length == self.max_length:
            return torch.linspace(0, 1, self.max_length, **options)[:length]
        return torch.arange(length, **options) / max(1, self.filter_length - 1)

    def deltas(self) -> Tensor:
        """δ_c, (D,)."""
        options = dict(device=self.inputs.device, dtype=self.inputs.dtype)
        slow, fast = math.log(0.01) / 1.5, math.log(0.01) / 0.3
        return torch.linspace(slow, fast, self.channels, **options)

    def hidden(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The last hidden layers of both MLPs for the first `length` taps, (L, O) each.

        All channels share them; the second is None in a causal model.
        """

        def features(mlp: nn.ModuleList | None) -> Tensor | None:
            if mlp is None:
                return None
            h = self.inputs[:length]  # (L, E)
            for layer in mlp[:3]:
                h = torch.sin(self.freq * layer(h))  # (L, O)
            return h

        with torch.autocast(self.inputs.device.type, enabled=False):
            return features(self.back), features(self.ahead)

    def before_decay(
        self, hidden: tuple[Tensor, Tensor | None], channels: slice = slice(None)
    ) -> tuple[Tensor, Tensor | None]:
        """The kernels of some channels without their decay, from `hidden`, (L, d) each."""
        with torch.autocast(hidden[0].device.type, enabled=False):
            return tuple(
                None if h is None else F.linear(h, mlp[3].weight[channels])
                for h, mlp in zip(hidden, (self.back, self.ahead))
            )

    def taps(
        self, hidden: tuple[Tensor, Tensor | None], channels: slice = slice(None)
    ) -> tuple[Tensor, Tensor | None]:
        """The kernels of some channels from `hidden`, (d, L) each."""
        decay = self.decay(len(hidden[0]), channels)  # (L, d)
        kernels = self.before_decay(hidden, channels)
        return tuple(None if kernel is None else (kernel * decay).t() for kernel in kernels)

    def forward(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The first `length` taps of both kernels, (D, L); the second is None in a causal model."""
        if not shared.active():
            return self.taps(self.hidden(length))

        def taps() -> tuple[Tensor, Tensor | None]:
            kernels = self.kernels()
            decay = self.decay(len(kernels[0]))
            return tuple(None if kernel is None else (kernel * decay).t() for kernel in kernels)

        both = shared.once((self, "taps"), taps)
        return tuple(None if kernel is None else kernel[:, :length] for kernel in both)

    def kernels(self, length: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The first `length` taps of both kernels without their decay, (L, D).

        In a step they are those that `filters_once` computed; None: all that it computed.
        """
        both = shared.once((self, "kernels"), lambda: self.before_decay(self.hidden(length)))
        return tuple(None if kernel is None else kernel[:length] for kernel in both)


@contextmanager
def filters_once(model: nn.Module, length: int):
    """A training step of texts of at most `length` tokens, which computes each filter once.

    The networks of all filters of one shape are one batched product. Passes add up the gradients of
    the taps; the sum goes through the networks at the end of the block.
    """
    groups = defaultdict(list)
    for filter in model.modules():
        if isinstance(filter, ImplicitFilter):
            groups[filter.channels, tuple(filter.back[0].weight.shape)].append(filter)
    with shared.step():
        for shape, filters in groups.items():
            kernels = iter(shared.once(shape, partial(batched_kernels, filters, length)))
            for filter in filters:
                both = next(kernels), None if filter.ahead is None else next(kernels)
                shared.put((filter, "kernels"), both)
        yield


def batched_kernels(filters: list[ImplicitFilter], length: int) -> tuple[Tensor, ...]:
    """`before_decay` of each filter, back then ahead, (L, D) each, by batched products."""
    both = [(f, mlp) for f in filters for mlp in (f.back, f.ahead) if mlp is not None]
    with torch.autocast(filters[0].inputs.device.type, enabled=False), torch.enable_grad():
        h = torch.stack([f.inputs[:length] for f, _ in both])  # (n, L, E)
        frequency = torch.stack([f.freq for f, _ in both])[:, None]
        for i in range(3):
            weight = torch.stack([mlp[i].weight for _, mlp in both])
            bias = torch.stack([mlp[i].bias for _, mlp in both])[:, None]
            h = torch.sin(frequency * torch.baddbmm(bias, h, weight.mT))  # (n, L, O)
        weight = torch.stack([mlp[3].weight for _, mlp in both])
        return torch.bmm(h, weight.mT).unbind()


def filter_inputs(length: int, emb_dim: int, filter_length: int | None = None) -> Tensor:
    """z before training, (length, emb_dim): the time and its Fourier features."""
    n = filter_length or length
    bands = (emb_dim - 1) // 2
    # On the CPU by name: a model may be under construction on the meta device.
    f = torch.linspace(1e-4, bands - 1, bands, device="cpu")
    i = torch.arange(length, dtype=torch.float32, device="cpu")
    t = torch.linspace(0, 1, n, device="cpu") if n == length else i / max(1, n - 1)
    angle = f * (2 * math.pi * i / n)[:, None]  # (length, bands)
    return torch.cat([t[:, None], angle.cos(), -angle.sin()], dim=-1)
