"""M2-BERT: an encoder in which every layer is subquadratic in the length of the text.

A gated long convolution (cost L log L) replaces BERT's attention, and a block-diagonal MLP its
dense one. One layer:

    h  = Mixer(x)                  gate, long convolution, gate, plus a residual long convolution
    x' = LayerNorm(h + MLP(h))     the skip starts at h, the mixer's output, not at x

    SequenceMixer, MLP   the two halves of a layer; `definition` is the equation, step by step
    M2BertModel          the encoder, with the pooled embedding
    M2BertForMaskedLM    the encoder with the pretraining head
    M2BertForRetrieval   a retriever: one vector for each text

These are plain modules of torch; lib/model/hub.py makes them models of transformers.

Source: Saad-Falcon et al. 2024 (arXiv 2402.07440v3) and the layout of the published weights;
        reproduces the reference outputs in tests/golden within 2e-5.
Axes:   B batch, L tokens, D width, I intermediate width, K blocks, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import kernels
from lib.model.twins import MIXERS, Gain, start_gates
from lib.operators.long_conv import ImplicitFilter, long_conv, short_conv
from lib.operators.monarch import BlockDiagonalLinear
from lib.pipeline.errors import WorkbenchError, require


@dataclass(kw_only=True)
class M2BertConfig:
    """Sizes and switches of an M2-BERT; the defaults are the published 80M model at 128 tokens.

    Names that BERT has too mean the same as there; the others are explained here.

    Raises:
        WorkbenchError: a value is of another type, or none of the choices.
    """

    model_type: ClassVar[str] = "m2bert"

    vocab_size: int = 30528
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 128
    type_vocab_size: int = 2
    layer_norm_eps: float | int = 1e-12
    hidden_dropout_prob: float | int = 0.0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    mlp_blocks: int = 4  # K, the blocks of the block-diagonal MLP
    filter_order: int = 128  # width of the filters' MLPs
    filter_emb_dim: int = 5  # inputs of the filters' MLPs
    filter_frequency: float | int = 10.0  # initial sine frequency of the filters' MLPs
    filter_length: int | None = None  # their time unit in tokens; None: max_position_embeddings
    bidirectional: bool = True  # a second kernel looks ahead
    residual_long_conv: bool = True  # an ungated one beside the gated one: the layer's skip path
    # What brings tokens together: `SequenceMixer`, or one of lib/model/twins.py to compare it with.
    mixer: Literal["long_conv", "ungated", "short_conv", "attention", "none"] = "long_conv"
    mixer_layer_norm: bool = False  # in front of the mixer; only the oldest published model has it
    # Set padded positions to zero before every convolution and leave them out of the pooling, so
    # that an embedding depends neither on its padding nor on its batch. Published models: False.
    mask_padding: bool = True
    # `forward` pads every input to max_position_embeddings with pad_token_id, and returns the
    # positions of the given ids. Published models: True. Their training padded texts and masked
    # nothing, so their published embeddings are those of padded texts.
    pad_to_max_length: bool = False
    pooling: Literal["cls", "mean"] = "cls"  # token 0 (published), or the mean over real tokens
    # As the authors do, or every layer starts as x' = x (`start_at_identity`), with its gates shut
    # or open (`open_gates`).
    initialization: Literal["reference", "identity", "binding"] = "reference"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(M2BertConfig).items():
            if name == "model_type":
                continue
            value, allowed = getattr(self, name), get_args(hint) or (hint,)
            fits = value in allowed if isinstance(allowed[0], str) else type(value) in allowed
            choices = " or ".join(getattr(choice, "__name__", repr(choice)) for choice in allowed)
            require(fits, f"{name}={value!r}: M2BertConfig takes {choices}", WorkbenchError)

    def to_dict(self) -> dict:
        """All options by name, and the model's type."""
        return {"model_type": self.model_type} | asdict(self)

    @classmethod
    def from_dict(cls, options: dict) -> "M2BertConfig":
        """The inverse of `to_dict`; what is left out has its default.

        Raises:
            WorkbenchError: also of an option that is not known here.
        """
        known = M2BertConfig().to_dict()
        unknown = min(options.keys() - known.keys(), default=None)
        message = f"M2BertConfig has no option {unknown!r}: a newer version wrote it, or a typo"
        require(unknown is None, message, WorkbenchError)
        return M2BertConfig(**{key: options[key] for key in options if key != "model_type"})


class EncoderOutput(NamedTuple):
    """What an encoder makes of texts; see `M2BertModel.forward`."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None


class MaskedLMOutput(NamedTuple):
    """What a masked language model makes of texts; see `M2BertForMaskedLM.forward`."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


class Embeddings(nn.Module):
    """LayerNorm(word + type + position), then dropout."""

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
        positions = self.position_embeddings.weight[: input_ids.shape[1]]  # (L, D)
        # Positions and types are added first: without type ids their sum is (L, D), not (B, L, D).
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]
        else:
            types = self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + (positions + types)))


class SequenceMixer(nn.Module):
    """y = W_out (x2 · LongConv(x1 · v) + ResidualLongConv(u)),  (x1, x2, v) = ShortConv(W_in u).

    Gates and convolutions work channel by channel; only the projections mix channels.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__()
        D = config.hidden_size
        sizes = D, config.max_position_embeddings, config.filter_emb_dim, config.filter_order
        options = config.filter_frequency, config.bidirectional, config.filter_length
        self.mask_padding = config.mask_padding
        self.layernorm = nn.LayerNorm(D) if config.mixer_layer_norm else None
        self.in_linear = nn.Linear(D, 3 * D)
        self.short_filter = nn.Conv1d(3 * D, 3 * D, 3, groups=3 * D)
        self.gated_filter = ImplicitFilter(*sizes, *options)
        has_residual = config.residual_long_conv
        self.residual_filter = ImplicitFilter(*sizes, *options) if has_residual else None
        self.out_linear = nn.Linear(D, D)

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """y (B, L, D) from u (B, L, D) and mask (B, 1, L): 1 for a token, 0 for padding."""
        if self.layernorm is not None:
            u = self.layernorm(u)
        y = kernels.sequence_mixer(self, u, mask)
        return self.definition(u, mask) if y is None else y

    def definition(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """The equation, step by step."""

        def masked(x: Tensor) -> Tensor:
            return x if mask is None else x * mask

        u = masked(u.transpose(1, 2))  # (B, D, L)
        p = masked(torch.matmul(self.in_linear.weight, u) + self.in_linear.bias[:, None])
        s = short_conv(p, self.short_filter.weight, self.short_filter.bias)  # (B, 3D, L)
        x1, x2, v = s.chunk(3, dim=1)
        gate = masked(v * x1)  # the short convolution reaches into the padding
        y = long_conv(gate, *self.gated_filter(u.shape[-1]), self.gated_filter.bias) * x2
        residual = self.residual_filter
        if residual is not None:
            y = y + long_conv(u, *residual(u.shape[-1]), residual.bias)
        return self.out_linear(y.transpose(1, 2))  # (B, L, D)

    def start_at_identity(self) -> None:
        """y = u.

        x1 = 0, so that the gated convolution is silent; kernel of the residual one 0, its gain 1;
        W_out = I. Without a residual convolution: x1 = x2 = 1, v = u, kernel 0 and gain 1.
        """
        nn.init.eye_(self.out_linear.weight)
        nn.init.zeros_(self.in_linear.bias)
        passing = self.residual_filter
        start_gates(self.in_linear, self.short_filter, silent=passing is not None)
        passing = self.gated_filter if passing is None else passing
        nn.init.ones_(passing.bias)
        for mlp in filter(None, (passing.back, passing.ahead)):
            nn.init.zeros_(mlp[3].weight)


class MLP(nn.Module):
    """LayerNorm(h + W_o(GELU(a) · b)), (a, b) = W_g h, both block-diagonal."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        D, inner, K = config.hidden_size, config.intermediate_size, config.mlp_blocks
        self.gated_layers = BlockDiagonalLinear(D, 2 * inner, K, bias=False)
        self.wo = BlockDiagonalLinear(inner, D, K)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, h: Tensor) -> Tensor:  # (B, L, D)
        y = kernels.gated_mlp(self, h)
        return self.definition(h) if y is None else y

    def definition(self, h: Tensor) -> Tensor:  # (…, D)
        """The equation, step by step."""
        gate, value = self.gated_layers(h).chunk(2, dim=-1)  # (…, I) each
        return self.layernorm(h + self.wo(self.dropout(F.gelu(gate) * value)))


class Layer(nn.Module):
    """x' = MLP(Mixer(x)); norm and skip are in the MLP."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.mixer = {"long_conv": SequenceMixer, **MIXERS}[config.mixer](config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mlp(self.mixer(x, mask))


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Linear and embedding weights from N(0, 0.02), zero biases; other modules as they draw."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if getattr(module, "padding_idx", None) is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv1d):
        bound = module.kernel_size[0] ** -0.5  # the fan-in of a depthwise one is its width
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, (BlockDiagonalLinear, ImplicitFilter, Gain)):
        module.reset_parameters()


@torch.no_grad()
def start_at_identity(model: "M2BertModel") -> None:
    """Make every layer the identity, x' = LayerNorm(x) = x, and the pooler nearly linear.

    A stack of random layers scrambles the word embeddings on which a young retriever depends. Here
    the layers begin where a bag of words ends, and what they are worth has to be learned: the
    weights below that are zero have gradients that are not.

        the mixer passes its input on, see its own `start_at_identity`
        W_o = 0 in the MLP; positions and token types 0
        e = tanh(0.3 (I - c cᵀ) h), c a direction in which no word differs from another (`neutral`)
    """
    nn.init.zeros_(model.embeddings.position_embeddings.weight)
    nn.init.zeros_(model.embeddings.token_type_embeddings.weight)
    for layer in model.layers:
        layer.mixer.start_at_identity()
        nn.init.zeros_(layer.mlp.wo.weight)
        nn.init.zeros_(layer.mlp.wo.bias)
    if model.pooler is not None:
        c = neutral(model.config.hidden_size)
        model.pooler.weight.copy_(0.3 * (torch.eye(len(c)) - torch.outer(c, c)))


@torch.no_grad()
def open_gates(model: "M2BertModel", scale: float = 0.0) -> None:
    """Let the gated convolution bind from the first step on, in a model that is the identity.

        x1 = 1,  x2[t] = Q2 P u[t],  v[s] = Q1 P u[s],  P = I - c cᵀ - 1 1ᵀ/D;  gain 0
        k[i] = scale · exp(-t_i |δ_c|) looking back, 0 looking ahead
        dE/dk[i] = Σ_t g[t] · Q2 P u[t] · Q1 P u[t-i],  g = dE/dy

    Q1 and Q2 are random and orthogonal, so Q2 u · Q1 w is a code of the ordered pair (u, w): codes
    of other pairs, (w, u) too, are nearly orthogonal to it (Plate 2003, holographic reduced
    representations; Gayler 2003 with the product channel by channel). What is left to learn is k,
    the distances that count, and its gradient is there at once. With x1 = 0 it is zero until x1 has
    grown, by a gradient that a random kernel and small gates have blurred. Neutral tokens (c) have
    no code.

    Another mixer, or one without a residual convolution, stays as `start_at_identity` made it: what
    is left has to pass the words on.

    Args:
        scale: 0: the model is the identity. Above: its embeddings are those of a bag of words and
            of pairs of words, near ones more than far ones, before any training.
    """
    D = model.config.hidden_size
    c, one = neutral(D), torch.ones(D) / D**0.5
    for layer in model.layers:
        mixer = layer.mixer
        if model.config.mixer != "long_conv" or mixer.residual_filter is None:
            continue
        for rows in (slice(D, 2 * D), slice(2 * D, 3 * D)):  # x2, v
            Q = nn.init.orthogonal_(torch.empty(D, D))
            mixer.in_linear.weight[rows] = Q - torch.outer(Q @ c, c) - torch.outer(Q @ one, one)
        mixer.short_filter.weight[:] = torch.tensor([0.0, 0.0, 1.0])
        nn.init.zeros_(mixer.short_filter.bias)
        nn.init.ones_(mixer.short_filter.bias[:D])  # x1
        nn.init.zeros_(mixer.gated_filter.bias)
        gated = mixer.gated_filter
        for mlp in filter(None, (gated.back, gated.ahead)):
            nn.init.zeros_(mlp[3].weight)
        if scale:  # hidden unit 0 is sin(F · π / 2F) = 1 at all taps
            nn.init.zeros_(gated.back[2].weight[0])
            nn.init.constant_(gated.back[2].bias[:1], math.pi / (2 * gated.frequency))
            nn.init.constant_(gated.back[3].weight[:, 0], scale)


def neutral(D: int) -> Tensor:
    """c, the direction of tokens that say nothing (lib/model/word_vectors.py): (D,), norm 1, sum 0.

    +1, -1, +1, … over sqrt(D); the last of an odd number is 0.
    """
    c = torch.ones(D)
    c[1::2] = -1.0
    if D % 2:
        c[-1] = 0.0
    return c / c.norm()


class M2BertModel(nn.Module):
    """The encoder: ids (B, L) -> hidden states (B, L, D) and an embedding (B, D).

        cls:   e = tanh(W h_0 + b)
        mean:  e = tanh(W mean_{real t} h_t + b)

    The embedding is not normalised: retrieval compares cosines. pooler=False: no embedding.
    """

    def __init__(self, config: M2BertConfig, pooler: bool = True):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None
        self.apply(initialize)
        if config.initialization != "reference":
            start_at_identity(self)
        if config.initialization == "binding":
            open_gates(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encode rows of ids.

        Args:
            input_ids: (B, L), L at most max_position_embeddings, else a ValueError.
            attention_mask: (B, L), 1 for a token, 0 for padding; None: every position is a token.
                Without `mask_padding` only mean pooling reads it, as in the published models.

        Returns:
            last_hidden_state (B, L, D), pooler_output (B, D) and, if `output_hidden_states`,
            hidden_states: the output of the embeddings and of each layer.
        """
        L, limit = input_ids.shape[1], self.config.max_position_embeddings
        message = "no token to read: give every text at least one, a tokenizer adds [CLS] and [SEP]"
        require(L > 0, message, ValueError)
        message = f"{L} tokens exceed max_length={limit}: truncate in the tokenizer, or lengthen "
        require(L <= limit, message + "the model with `extend`", ValueError)
        if self.config.pad_to_max_length and L < limit:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            input_ids = F.pad(input_ids, (0, limit - L), value=self.config.pad_token_id)
            attention_mask = F.pad(attention_mask, (0, limit - L))
            if token_type_ids is not None:
                token_type_ids = F.pad(token_type_ids, (0, limit - L))
        mask = self.padding_mask(attention_mask)
        x = self.embeddings(input_ids, token_type_ids)
        states = [x[:, :L]] if output_hidden_states else []
        for layer in self.layers:
            x = layer(x, mask)
            if output_hidden_states:
                states.append(x[:, :L])
        return EncoderOutput(
            last_hidden_state=x[:, :L],
            pooler_output=None if self.pooler is None else self.pool(x, attention_mask),
            hidden_states=tuple(states) or None,
        )

    def padding_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """The mask (B, 1, L) of the mixers; None: they mask nothing."""
        if not self.config.mask_padding or attention_mask is None:
            return None
        tokens = kernels.kept_tokens(attention_mask)  # if kept, nobody waits for the GPU
        if tokens is None and bool(attention_mask.all()):
            return None
        mask = attention_mask[:, None, :].to(self.embeddings.LayerNorm.weight.dtype)
        if tokens is not None:
            kernels.keep_tokens(mask, tokens)
        return mask

    def pool(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The embedding, (B, L, D) -> (B, D)."""
        # No autocast: there is one row per text, and rounding it would save nothing.
        with torch.autocast(x.device.type, enabled=False):
            if self.config.pooling == "cls":
                summary = x[:, 0]
            elif attention_mask is None:
                summary = x.mean(dim=1)
            else:
                tokens = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
                summary = torch.einsum("bld,bl->bd", x, attention_mask.to(x.dtype) / tokens)
            return torch.tanh(self.pooler(summary.to(self.pooler.weight.dtype)))


class M2BertForRetrieval(nn.Module):
    """A retriever: `pooler_output` (B, D) is the embedding, compared by cosine."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.config = config
        self.model = M2BertModel(config)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings.word_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options
    ) -> EncoderOutput:
        """As `M2BertModel.forward`."""
        return self.model(input_ids, attention_mask, **options)


class M2BertForMaskedLM(nn.Module):
    """The encoder with BERT's head: LayerNorm(GELU(x W + b)) E^T + c, E the word embeddings."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.model = M2BertModel(config, pooler=False)
        self.dense = nn.Linear(D, D)
        self.layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(D, config.vocab_size)
        for part in (self.dense, self.layernorm, self.decoder):
            initialize(part)
        if config.tie_word_embeddings:
            self.decoder.weight = self.get_input_embeddings().weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options,
    ) -> MaskedLMOutput:
        """Logits (B, L, V); with labels, the loss and the logits of the labelled positions.

        Args:
            labels: (B, L); 0 or less (-100) means "no label". The head, most of a small model's
                cost, then computes logits (M, V) of the M labelled positions in reading order.
        """
        out = self.model(input_ids, attention_mask, **options)
        x = out.last_hidden_state
        if labels is not None:
            x, labels = x[labels > 0], labels[labels > 0]  # (M, D), (M,)
        logits = self.head(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = None if labels is None else F.cross_entropy(logits.to(wide), labels)
        return MaskedLMOutput(loss, logits, out.hidden_states)

    def head(self, x: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, D)."""
        return self.decoder(self.layernorm(F.gelu(self.dense(x))))
