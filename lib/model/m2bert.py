"""M2-BERT: an encoder whose every layer is subquadratic in the length of the text.

A BERT in which attention became a gated long convolution (cost L log L) and the
MLP became block-diagonal. One layer:

    h  = Mixer(x)                       gate -> long convolution -> gate, plus a residual long convolution
    x' = LayerNorm(h + MLP(h))          the skip starts at the mixer's output; x reaches it only through h

    M2BertModel          encoder and pooled embedding
    M2BertForMaskedLM    pretraining head
    M2BertForRetrieval   what a retriever is: ids -> one vector a text
    extend               the same model for longer texts

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3) and the published weights'
        layout; reproduced within 2e-5 of the reference outputs in tests/golden.
Axes:   B batch, L tokens, D width, K blocks, V vocabulary.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils import can_return_tuple

from lib.kernels import cpu, gpu, gpu_mlp
from lib.operators.long_conv import (
    ImplicitFilter,
    filter_inputs,
    long_conv,
    long_conv_direct,
    short_conv,
)
from lib.operators.monarch import BlockDiagonalLinear, GatedBlocks

TILE = (
    2**23
)  # numbers in a buffer of a forward pass without gradients: 32 MiB, little enough to be near the processor
CHOICES = {"pooling": ("cls", "mean"), "initialization": ("reference", "identity")}


class M2BertConfig(PreTrainedConfig):
    """Sizes and switches of an M2-BERT; the defaults are the published 80M model at 128 tokens.

    Names that BERT has too mean the same. The others:

        mlp_blocks            K, blocks of the block-diagonal MLP
        filter_order, filter_emb_dim, filter_frequency   width, inputs and initial sine frequency of the filter MLP
        filter_length         time unit of the filters, in tokens; None: max_position_embeddings (see `extend`)
        bidirectional         a second kernel looks ahead
        residual_long_conv    an ungated long convolution beside the gated one: the layer's skip path
        mixer_layer_norm      LayerNorm (eps 1e-5) in front of the mixer: the oldest published 80M model only
        mask_padding          zero padded positions before every convolution and in the pooling, so that an
                              embedding depends neither on its padding nor on its batch. Published models: False
        pad_to_max_length     `forward` pads every input to max_position_embeddings with pad_token_id, and gives back the
                              positions it was given. Published models: True. They were trained on padded text and mask
                              nothing, so the embedding they are known by is that of the padded text
        pooling               cls: token 0 (published); mean: the mean over real tokens
        initialization        reference: as the authors'; identity: every layer starts close to x' = x
    """

    model_type = "m2bert"

    def __init__(
        self,
        vocab_size: int = 30528,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 128,
        type_vocab_size: int = 2,
        layer_norm_eps: float = 1e-12,
        hidden_dropout_prob: float = 0.0,
        pad_token_id: int = 0,
        mlp_blocks: int = 4,
        filter_order: int = 128,
        filter_emb_dim: int = 5,
        filter_frequency: float = 10.0,
        filter_length: int | None = None,
        bidirectional: bool = True,
        residual_long_conv: bool = True,
        mixer_layer_norm: bool = False,
        mask_padding: bool = True,
        pad_to_max_length: bool = False,
        pooling: str = "cls",
        initialization: str = "reference",
        **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = (
            vocab_size,
            hidden_size,
            num_hidden_layers,
        )
        self.intermediate_size, self.max_position_embeddings = (
            intermediate_size,
            max_position_embeddings,
        )
        self.type_vocab_size, self.layer_norm_eps = type_vocab_size, layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.mlp_blocks, self.filter_order, self.filter_emb_dim = (
            mlp_blocks,
            filter_order,
            filter_emb_dim,
        )
        self.filter_frequency, self.filter_length = filter_frequency, filter_length
        self.bidirectional, self.residual_long_conv = bidirectional, residual_long_conv
        self.mixer_layer_norm, self.mask_padding, self.pad_to_max_length = (
            mixer_layer_norm,
            mask_padding,
            pad_to_max_length,
        )
        self.pooling, self.initialization = pooling, initialization
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(allowed)}")
        super().__init__(pad_token_id=pad_token_id, **({"tie_word_embeddings": True} | kwargs))


class Embeddings(nn.Module):
    """LayerNorm(word + type + position), dropout."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        x = self.word_embeddings(input_ids)  # (B, L, D)
        # Position and type are added at (L, D) where possible: the batch is many times larger.
        where = self.position_embeddings.weight[: input_ids.shape[1]]
        kind = (
            self.token_type_embeddings.weight[0]
            if token_type_ids is None
            else self.token_type_embeddings(token_type_ids)
        )
        return self.dropout(self.LayerNorm(x + (where + kind)))


def in_parts(function, n: int, group: int, dim: int) -> Tensor:
    """function(slice(0, n)), computed `group` places of the axis `dim` at a time."""
    if group >= n:
        return function(slice(0, n))
    whole = None
    for start in range(0, n, group):
        part = function(slice(start, min(start + group, n)))
        if whole is None:
            whole = part.new_empty(*part.shape[:dim], n, *part.shape[dim + 1 :])
        whole.narrow(dim, start, part.shape[dim]).copy_(part)
    return whole


class SequenceMixer(nn.Module):
    """x2 · LongConv(x1 · v) + ResidualLongConv(u): mixes tokens, channel by channel.

    x1, x2 and v are three projections of the input u, each passed through a
    causal convolution of width 3. No channel meets another between the two
    projections, so in `eval` without gradients they go in groups: memory for
    one group, whatever the length. With gradients, or in `train`, on a CPU, all
    between the projections is one function of lib/kernels/mixer.cpp where that can be
    compiled; on a GPU, always, it is lib/kernels/gpu.py.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__()
        D = config.hidden_size

        def long_filter() -> ImplicitFilter:
            return ImplicitFilter(
                D,
                config.max_position_embeddings,
                config.filter_emb_dim,
                config.filter_order,
                config.filter_frequency,
                config.bidirectional,
                config.filter_length,
            )

        self.mask_padding = config.mask_padding
        self.layernorm = nn.LayerNorm(D) if config.mixer_layer_norm else None
        self.in_linear = nn.Linear(D, 3 * D)
        self.short_filter = nn.Conv1d(3 * D, 3 * D, 3, groups=3 * D)
        self.gated_filter = long_filter()
        self.residual_filter = long_filter() if config.residual_long_conv else None
        self.out_linear = nn.Linear(D, D)
        self.kept, self.layers = None, config.num_hidden_layers  # see `spectra`

    def forward(
        self, u: Tensor, mask: Tensor | None = None
    ) -> Tensor:  # (B, L, D), (B, 1, L) of 0 and 1
        if self.layernorm is not None:
            u = self.layernorm(u)
        y = self.on_gpu(u, mask)
        if y is not None:
            return self.out_linear(y.transpose(1, 2))
        u = u.transpose(1, 2)  # (B, D, L)
        if mask is not None:
            u = u * mask
        B, D, L = u.shape
        # In training without gradients too: the two passes of a micro-batch are one arithmetic.
        if (
            (torch.is_grad_enabled() or self.training)
            and cpu.trains(u, self.in_linear.weight)
            and cpu.fits(D)
            and (mask is None or bool((mask[..., 1:] <= mask[..., :-1]).all()))
        ):  # padding at the ends, no holes
            return self.out_linear(self.fused(u.transpose(1, 2), mask))
        kernels = [
            (filter, filter.hidden(L))
            for filter in (self.gated_filter, self.residual_filter)
            if filter is not None
        ]
        group = D if torch.is_grad_enabled() else max(1, TILE // (3 * B * L))
        y = in_parts(lambda some: self.mix(u, mask, kernels, some), D, group, dim=1)
        return self.out_linear(y.transpose(1, 2))  # (B, L, D)

    def fused(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """All channels of x2 · LongConv(x1 · v) + ResidualLongConv(u), (B, L, D), from u (B, L, D); padding stands at the ends."""
        B, L, _ = u.shape
        u = u.to(cpu.number_type(u))
        p = self.in_linear(u)  # (B, L, 3D)
        if mask is not None:
            p = p * mask.transpose(1, 2).to(p.dtype)
        real = (
            torch.full((B,), L, dtype=torch.int64, device="cpu")
            if mask is None
            else mask[:, 0].sum(dim=1).long()
        )
        filters = [
            (None, None, None)
            if filter is None
            else (*filter.before_decay(filter.hidden(L)), filter.bias)
            for filter in (self.gated_filter, self.residual_filter)
        ]
        table = cpu.Spectra.apply(
            self.gated_filter.time(L),
            self.gated_filter.deltas(),
            cpu.size(L),
            *filters[0],
            *filters[1],
        )
        return cpu.Mix.apply(
            p, u, self.short_filter.weight[:, 0].t(), self.short_filter.bias, table, real
        )

    def on_gpu(self, u: Tensor, mask: Tensor | None) -> Tensor | None:
        """All channels of x2 · LongConv(x1 · v) + ResidualLongConv(u), (B, D, L), from u (B, L, D); None where that cannot be done here."""
        B, L, _ = u.shape
        if not gpu.fits(u.transpose(1, 2), self.in_linear.weight):
            return None
        real = None if mask is None else gpu.real_tokens(mask)
        if mask is not None and real is None:
            return None
        dtype = cpu.number_type(u)
        if not gpu.works(
            gpu.alike(L, u.device),
            dtype,
            u.device,
            self.residual_filter is not None,
            torch.is_grad_enabled(),
        ):
            return None
        u = u.transpose(1, 2).to(dtype).contiguous()  # (B, D, L)
        p = torch.matmul(self.in_linear.weight, u)  # (B, 3D, L), its bias still to come
        return gpu.mix(
            p,
            u,
            self.short_filter.weight,
            self.short_filter.bias,
            self.spectra(L),
            real,
            self.in_linear.bias,
        )

    def train(self, mode: bool = True):
        self.kept = None
        return super().train(mode)

    def spectra(self, length: int) -> Tensor:
        """`monarch_conv.spectra` of this layer's filters for texts of `length` tokens.

        Without gradients and in `eval` those of one length are kept, until a weight's version changes or the mode does: a fused optimizer changes
        weights behind their version. And only where those of all layers leave three quarters of the GPU free.
        """
        filters = [
            filter for filter in (self.gated_filter, self.residual_filter) if filter is not None
        ]
        if torch.is_grad_enabled():
            self.kept = None
            gated, *residual = ((*filter(length), filter.bias) for filter in filters)
            return gpu.spectra(gated, residual[0] if residual else None, length)
        weights = [weight for filter in filters for weight in filter.parameters()]
        now = (
            length,
            [
                (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
                for weight in weights
            ],
        )
        if self.kept is None or self.kept[0] != now:
            self.kept, device = None, weights[0].device
            hidden = [filter.hidden(length) for filter in filters]
            table = in_parts(
                lambda some: torch.stack(
                    [
                        gpu.spectrum(*filter.taps(shared, some), filter.bias[some], length)
                        for filter, shared in zip(filters, hidden)
                    ]
                ),
                len(self.gated_filter.bias),
                max(1, TILE // (4 * length)),
                dim=1,
            )
            if (
                self.training
                or device.type == "cuda"
                and 4 * self.layers * table.nbytes
                > torch.cuda.get_device_properties(device).total_memory
            ):
                return table
            self.kept = now, table, weights  # held, so that no other weight gets their addresses
        return self.kept[1]

    def mix(self, u: Tensor, mask: Tensor | None, kernels: list, some: slice) -> Tensor:
        """`some` of the channels of x2 · LongConv(x1 · v) + ResidualLongConv(u), (B, d, L)."""

        def part(parameter: Tensor) -> Tensor:  # (3D, …) -> (3d, …), those of x1, x2 and v
            return parameter.unflatten(0, (3, -1))[:, some].flatten(0, 1)

        p = (
            torch.matmul(part(self.in_linear.weight), u) + part(self.in_linear.bias)[:, None]
        )  # (B, 3d, L)
        if mask is not None:
            p = p * mask
        x1, x2, v = short_conv(
            p, part(self.short_filter.weight), part(self.short_filter.bias)
        ).chunk(3, dim=1)
        g = v * x1
        if mask is not None:
            # The short convolution's bias and its two taps reach into the padding again.
            g = g * mask
        gated, *residual = (
            (filter.taps(hidden, some), filter.bias[some]) for filter, hidden in kernels
        )
        y = long_conv(g, *gated[0], gated[1]) * x2
        for taps, gain in residual:
            y = y + long_conv(u[:, some], *taps, gain)
        return y

    def direct(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same by its definition: real convolutions instead of FFTs, all channels at once. O(L²)."""
        mask = torch.ones(len(u), 1, u.shape[1], dtype=u.dtype) if mask is None else mask
        u = (u if self.layernorm is None else self.layernorm(u)).transpose(1, 2) * mask  # (B, D, L)
        p = (self.in_linear.weight @ u + self.in_linear.bias[:, None]) * mask  # (B, 3D, L)
        w, L = self.short_filter.weight[:, 0], u.shape[-1]
        before = F.pad(p, (2, 0))  # (B, 3D, L + 2)
        s = self.short_filter.bias[:, None] + sum(
            w[:, tap, None] * before[..., tap : tap + L] for tap in range(3)
        )
        x1, x2, v = s.chunk(3, dim=1)
        y = x2 * long_conv_direct(v * x1 * mask, *self.gated_filter(L), self.gated_filter.bias)
        if self.residual_filter is not None:
            y = y + long_conv_direct(u, *self.residual_filter(L), self.residual_filter.bias)
        return self.out_linear(y.transpose(1, 2))


class MLP(nn.Module):
    """LayerNorm(h + W_o(GELU(a) · b)), (a, b) = W_g h, both block-diagonal."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        D, I, K = config.hidden_size, config.intermediate_size, config.mlp_blocks
        self.gated_layers = BlockDiagonalLinear(D, 2 * I, K, bias=False)
        self.wo = BlockDiagonalLinear(I, D, K)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, h: Tensor) -> Tensor:  # (B, L, D)
        tokens = h.flatten(0, 1)  # no token meets another here
        program = None if self.training else gpu_mlp.fits(tokens, self.gated_layers, self.wo)
        if program is not None:
            norm = self.layernorm
            return gpu_mlp.mlp(
                tokens,
                self.gated_layers.weight,
                self.wo.weight,
                self.wo.bias,
                norm.weight,
                norm.bias,
                norm.eps,
                program,
            ).view_as(h)
        group = (
            len(tokens)
            if torch.is_grad_enabled() or self.training
            else max(1, TILE // (2 * self.wo.d_in))
        )
        return in_parts(lambda some: self.each(tokens[some]), len(tokens), group, dim=0).view_as(h)

    def each(self, h: Tensor) -> Tensor:  # (…, D)
        if (
            (torch.is_grad_enabled() or self.training)
            and not (self.training and self.dropout.p)
            and GatedBlocks.fits(h, self.gated_layers, self.wo)
        ):
            return self.layernorm(
                GatedBlocks.apply(h, self.gated_layers.weight, self.wo.weight) + (h + self.wo.bias)
            )
        gate, value = self.gated_layers(h).chunk(2, dim=-1)  # (…, I) each
        return self.layernorm(h + self.wo(self.dropout(F.gelu(gate) * value)))


class Layer(nn.Module):
    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.mixer = SequenceMixer(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mlp(self.mixer(x, mask))


class M2BertPreTrainedModel(PreTrainedModel):
    config_class = M2BertConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = {"gated_filter", "residual_filter"}  # see ImplicitFilter

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02) for linear and embedding weights, zero biases; the rest as each module draws itself."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
            if getattr(module, "padding_idx", None) is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            # Fan-in of a depthwise convolution is its width.
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (BlockDiagonalLinear, ImplicitFilter)):
            module.reset_parameters()


@torch.no_grad()
def start_near_identity(model: "M2BertModel") -> None:
    """Move every layer next to the identity, x' ≈ LayerNorm(x) = x, and the pooler to e ≈ tanh(h).

    out_linear = I, the residual convolution's gain 1, its taps and the MLP's output a tenth; positions and types
    a tenth of the words. A stack of random layers scrambles the word embeddings that a young retriever lives on;
    this start lets the loss reach them from the first step.
    """
    model.embeddings.position_embeddings.weight.mul_(0.1)
    model.embeddings.token_type_embeddings.weight.mul_(0.1)
    for layer in model.layers:
        nn.init.eye_(layer.mixer.out_linear.weight)
        if layer.mixer.residual_filter is not None:
            nn.init.ones_(layer.mixer.residual_filter.bias)
            for mlp in filter(
                None, (layer.mixer.residual_filter.back, layer.mixer.residual_filter.ahead)
            ):
                mlp[3].weight.mul_(0.1)
        layer.mlp.wo.weight.mul_(0.1)
        nn.init.zeros_(layer.mlp.wo.bias)
    if model.pooler is not None:
        nn.init.eye_(model.pooler.weight)


class M2BertModel(M2BertPreTrainedModel):
    """The encoder: ids (B, L) -> hidden states (B, L, D) and, unless pooler=False, an embedding (B, D).

        cls:   e = tanh(W h_0 + b)
        mean:  e = tanh(W mean_{real t} h_t + b)

    The embedding is not normalised: retrieval compares cosines.
    """

    def __init__(self, config: M2BertConfig, pooler: bool = True):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None
        self.post_init()
        if config.initialization == "identity":
            start_near_identity(self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: (B, L), L at most max_position_embeddings.
            attention_mask: 1 for a token, 0 for padding, (B, L); None: every position is a token. Without
                `mask_padding` it matters to mean pooling only, as in the published models.

        Returns:
            last_hidden_state (B, L, D), pooler_output (B, D) and, when asked, hidden_states: the embeddings' output
            and that of each layer.

        Raises:
            ValueError: no token, or more than the model reads.
        """
        L, limit = input_ids.shape[1], self.config.max_position_embeddings
        if L == 0:
            raise ValueError(
                "no token to read: give every text at least one, a tokenizer adds [CLS] and [SEP]"
            )
        if L > limit:
            raise ValueError(
                f"{L} tokens exceed max_length={limit}: truncate in the tokenizer, or lengthen the model with `extend`"
            )
        if self.config.pad_to_max_length and L < limit:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            input_ids = F.pad(input_ids, (0, limit - L), value=self.config.pad_token_id)
            attention_mask = F.pad(attention_mask, (0, limit - L))
            token_type_ids = (
                None if token_type_ids is None else F.pad(token_type_ids, (0, limit - L))
            )
        mask = None
        if (
            self.config.mask_padding
            and attention_mask is not None
            and not bool(attention_mask.all())
        ):
            mask = attention_mask[:, None, :].to(
                self.embeddings.LayerNorm.weight.dtype
            )  # (B, 1, L)
        x = self.embeddings(input_ids, token_type_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [x[:, :L]] if output_hidden_states else []
        for layer in self.layers:
            x = layer(x, mask)
            if output_hidden_states:
                states.append(x[:, :L])
        pooled = None if self.pooler is None else self.pool(x, attention_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=x[:, :L],
            pooler_output=pooled,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def pool(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:  # (B, L, D) -> (B, D)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # one row a text: rounding it would save nothing
            if self.config.pooling == "cls":
                summary = x[:, 0]
            elif attention_mask is None:
                summary = x.mean(dim=1)
            else:
                weight = attention_mask.to(x.dtype) / attention_mask.sum(dim=1, keepdim=True).clamp(
                    min=1
                )
                summary = torch.einsum("bld,bl->bd", x, weight)
            return torch.tanh(self.pooler(summary.to(self.pooler.weight.dtype)))


class M2BertForRetrieval(M2BertPreTrainedModel):
    """A text encoder: `pooler_output` (B, D) is the embedding, compared by cosine."""

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.model = M2BertModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `M2BertModel.forward`."""
        return self.model(input_ids, attention_mask, return_dict=True, **kwargs)


class M2BertForMaskedLM(M2BertPreTrainedModel):
    """The encoder with BERT's head: logits = LayerNorm(GELU(x W + b)) E^T + c, E the word embeddings."""

    _tied_weights_keys = {"decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        D = config.hidden_size
        self.model = M2BertModel(config, pooler=False)
        self.dense = nn.Linear(D, D)
        self.layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(D, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Without labels: logits (B, L, V). With labels (B, L): the loss, and logits (M, V) at the M labelled
        positions only, in reading order; 0 and below (-100) is "no label". The head is most of a small model's cost.
        """
        out = self.model(input_ids, attention_mask, return_dict=True, **kwargs)
        x = out.last_hidden_state
        if labels is not None:
            x, labels = x[labels > 0], labels[labels > 0]  # (M, D), (M,)
        logits = self.decoder(self.layernorm(F.gelu(self.dense(x))))
        loss = (
            None
            if labels is None
            else F.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), labels
            )
        )
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


@torch.no_grad()
def extend(
    model: PreTrainedModel, new_length: int, positions: str = "tile", filters: str = "stretch"
) -> PreTrainedModel:
    """The same model for texts of up to `new_length` tokens; weights copied, `model` unchanged.

    Positions, P of length N -> P' of length N':
        tile         P'[i] = P[i mod N]                        the paper's 32K model
    Filters, k(i) of a model of length N:
        stretch      k'(i) ≈ k(i (N-1)/(N'-1))                 the same shape on a slower axis: z is interpolated, t rescaled
        tile         z'[i] = z[i mod N], t rescaled            the paper's recipe for positions, applied to z
        extrapolate  k'(i) = k(i) for i < N, then the same formula continued: nothing changes for a short text
                     (but where `pad_to_max_length` pads it to N' now)

    The authors' own code for 8k -> 32k cannot run: it makes 5 N positions and 16 N inputs z, the first N of them zero.
    What it means to do is `tile` for both, with t rescaled; `stretch` is the default, since it keeps the kernels' shape.

    Raises:
        ValueError: new_length is shorter than the model, or an unknown choice.
    """
    config = copy.deepcopy(model.config)
    old = config.max_position_embeddings
    if type(new_length) is not int or new_length < old:
        raise ValueError(
            f"extend to {new_length!r} tokens: a whole number, and the model already reads {old}"
        )
    if positions != "tile" or filters not in ("stretch", "tile", "extrapolate"):
        raise ValueError(
            f"positions={positions!r}, filters={filters!r}: tile; stretch, tile or extrapolate"
        )
    config.max_position_embeddings = new_length
    if filters == "extrapolate":
        config.filter_length = config.filter_length or old
    elif config.filter_length is not None:
        config.filter_length = (
            round((config.filter_length - 1) * (new_length - 1) / max(1, old - 1)) + 1
        )
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
        longer = type(model)(config)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("position_embeddings.weight"):
            state[name] = tensor[torch.arange(new_length, device=tensor.device) % old]
        elif name.endswith("filter.inputs") and filters == "stretch":
            state[name] = F.interpolate(
                tensor.t()[None], size=new_length, mode="linear", align_corners=True
            )[0].t()
        elif name.endswith("filter.inputs") and filters == "tile":
            state[name] = tensor[torch.arange(new_length, device=tensor.device) % old]
        elif name.endswith("filter.inputs"):
            state[name] = torch.cat(
                [
                    tensor,
                    filter_inputs(new_length, config.filter_emb_dim, config.filter_length)[old:].to(
                        tensor
                    ),
                ]
            )
    longer.load_state_dict(state)
    return longer.to(next(model.parameters())).train(model.training)  # its device and number type


AutoConfig.register(M2BertConfig.model_type, M2BertConfig)
AutoModel.register(M2BertConfig, M2BertForRetrieval)
AutoModelForMaskedLM.register(M2BertConfig, M2BertForMaskedLM)
