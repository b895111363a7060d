"""M2-BERT as a model of transformers; importing this module registers it.

    import lib.model.hub                      # no remote code
    AutoModel.from_pretrained(folder)         a retriever, M2BertForRetrieval
    AutoModelForMaskedLM.from_pretrained(…)   a pretrained encoder with its head
    SentenceTransformer(folder)               a retriever in sentence-transformers

The classes hold the parts of lib/model/m2bert.py under the same names, so the two have equal state
dicts, equal results and, from equal seeds, equal initial weights. This project itself builds and
loads the plain classes (lib/model/checkpoint.py): transformers' modelling code takes seconds to
import.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils import can_return_tuple

from lib.model import m2bert


@strict
class M2BertConfig(PreTrainedConfig, m2bert.M2BertConfig):
    """The options of the plain configuration, and those of every PreTrainedConfig."""

    model_type = m2bert.M2BertConfig.model_type


class M2BertPreTrainedModel(PreTrainedModel):
    """What the two models share."""

    config_class = M2BertConfig
    base_model_prefix = "model"
    # See ImplicitFilter.
    _keep_in_fp32_modules_strict = {"gated_filter", "residual_filter", "long_filter"}
    plain: type[nn.Module]  # the class in lib/model/m2bert.py

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        for name, part in self.plain(config).named_children():
            self.add_module(name, part)
        self.post_init()

    def init_weights(self) -> None:
        self.tie_weights(recompute_mapping=False)  # the parts have drawn their weights

    def _init_weights(self, module: nn.Module) -> None:
        m2bert.initialize(module)  # what a file lacks

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings.word_embeddings = value

    def encoder_options(self, options: dict) -> dict:
        """The keywords of `M2BertModel.forward` among a caller's; the rest is not for us."""
        states = options.get("output_hidden_states")
        if states is None:
            states = self.config.output_hidden_states
        return dict(token_type_ids=options.get("token_type_ids"), output_hidden_states=states)


class M2BertForRetrieval(M2BertPreTrainedModel):
    """A retriever: `pooler_output` (B, D) is the embedding, compared by cosine."""

    plain = m2bert.M2BertForRetrieval

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options
    ) -> BaseModelOutputWithPooling:
        out = self.model(input_ids, attention_mask, **self.encoder_options(options))
        return BaseModelOutputWithPooling(**out._asdict())


class M2BertForMaskedLM(M2BertPreTrainedModel):
    """The encoder with BERT's head, tied to the word embeddings."""

    plain = m2bert.M2BertForMaskedLM
    _tied_weights_keys = {"decoder.weight": "model.embeddings.word_embeddings.weight"}

    head = m2bert.M2BertForMaskedLM.head

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
        **options,
    ) -> MaskedLMOutput:
        options = self.encoder_options(options)
        # The plain forward needs `model` and `head`, which this class has too.
        out = self.plain.forward(self, input_ids, attention_mask, labels, **options)
        return MaskedLMOutput(**out._asdict())


AutoConfig.register(M2BertConfig.model_type, M2BertConfig)
AutoModel.register(M2BertConfig, M2BertForRetrieval)
AutoModelForMaskedLM.register(M2BertConfig, M2BertForMaskedLM)
