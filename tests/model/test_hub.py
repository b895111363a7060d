"""The models as transformers sees them: the plain models' numbers, and the same files."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from lib.model import checkpoint, hub, m2bert

KINDS = {
    "retriever": (m2bert.M2BertForRetrieval, hub.M2BertForRetrieval, AutoModel),
    "masked lm": (m2bert.M2BertForMaskedLM, hub.M2BertForMaskedLM, AutoModelForMaskedLM),
}
SIZES = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=32,
    max_position_embeddings=64,
    filter_order=8,
    pooling="mean",
)
IDS = torch.arange(1, 41).reshape(2, 20)
MASK = torch.ones(2, 20, dtype=torch.long).index_fill(1, torch.arange(15, 20), 0)
LABELS = torch.where(IDS % 7 == 0, IDS, -100)


def same(model, other) -> None:
    """Equal bits under equal names."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def pair(kind: str, **changes):
    """The plain model and the hub's from one seed, and transformers' class for them."""
    plain, wrapped, auto = KINDS[kind]
    torch.manual_seed(3)
    ours = plain(m2bert.M2BertConfig(**(SIZES | changes))).eval()
    torch.manual_seed(3)
    return ours, wrapped(hub.M2BertConfig(**(SIZES | changes))).eval(), auto


def weights_off_their_start(model):
    """Initial biases are zero, and zero is right for the wrong reasons."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("initialization", ["reference", "identity"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_both_the_same_weights(kind, initialization):
    ours, theirs, _ = pair(kind, initialization=initialization)
    same(ours, theirs)
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]


def test_the_configs_have_the_same_options_and_defaults():
    ours, theirs = m2bert.M2BertConfig(), hub.M2BertConfig()
    assert ours.to_dict().items() <= theirs.to_dict().items()
    assert isinstance(theirs, m2bert.M2BertConfig)
    assert type(AutoConfig.for_model("m2bert", pooling="mean")) is hub.M2BertConfig


@torch.no_grad()
def test_outputs_are_transformers_own_and_the_numbers_ours():
    ours, theirs, _ = pair("retriever")
    theirs.load_state_dict(weights_off_their_start(ours).state_dict())
    expected = ours(IDS, MASK, output_hidden_states=True)
    out = theirs(IDS, MASK, output_hidden_states=True, num_items_in_batch=2)
    assert torch.equal(out["pooler_output"], expected.pooler_output)
    assert torch.equal(out[0], expected.last_hidden_state) and len(out.hidden_states) == 3
    assert theirs(IDS, MASK).hidden_states is None
    last, pooled = theirs(IDS, MASK, return_dict=False)
    assert torch.equal(pooled, expected.pooler_output)
    types = torch.ones_like(IDS)
    assert torch.equal(
        theirs(IDS, MASK, token_type_ids=types)[0], ours(IDS, MASK, token_type_ids=types)[0]
    )
    theirs.config.return_dict = False
    assert isinstance(theirs(IDS), tuple)
    theirs.config.return_dict, theirs.config.output_hidden_states = True, True
    assert len(theirs(IDS).hidden_states) == 3


def test_a_masked_lm_has_our_loss_and_gradients():
    ours, theirs, _ = pair("masked lm")
    theirs.load_state_dict(weights_off_their_start(ours).state_dict())
    expected, out = ours(IDS, MASK, labels=LABELS), theirs(IDS, MASK, labels=LABELS)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)
    assert torch.equal(theirs(IDS, MASK)[0], ours(IDS, MASK).logits)
    for loss in (expected.loss, out.loss):
        loss.backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_both_write_the_same_files_and_read_each_others(kind, dtype, tokenizer, tmp_path):
    ours, theirs, auto = pair(kind)
    theirs.load_state_dict(weights_off_their_start(ours).state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    tokenizer.backend_tokenizer.no_padding()  # it keeps the state of its last call, in another test
    tokenizer.backend_tokenizer.no_truncation()
    checkpoint.save(ours, tokenizer, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "model.safetensors"):
        first, second = (tmp_path / who / name for who in ("ours", "theirs"))
        assert first.read_bytes() == second.read_bytes(), name
    again = auto.from_pretrained(tmp_path / "ours", trust_remote_code=False)
    assert type(again) is type(theirs)
    same(again, ours)
    if kind == "masked lm":
        assert again.decoder.weight is again.get_input_embeddings().weight
    words = AutoTokenizer.from_pretrained(tmp_path / "ours", trust_remote_code=False)
    mine = checkpoint.load(tmp_path / "ours")[1]
    assert type(mine) is type(words)
    assert mine.backend_tokenizer.to_str() == words.backend_tokenizer.to_str()
    settings = [copy.deepcopy(t.init_kwargs) for t in (mine, words)]
    assert settings[0] == settings[1] and mine.model_max_length == 64


def test_a_retriever_from_a_masked_lm_gets_a_fresh_pooler(tmp_path):
    ours, _, _ = pair("masked lm")
    checkpoint.save(ours, None, tmp_path / "pretrained")
    model = AutoModel.from_pretrained(tmp_path / "pretrained", trust_remote_code=False)
    same(model.model.layers, ours.model.layers)
    assert 0.01 < model.model.pooler.weight.std() < 0.03 and not model.model.pooler.bias.any()


@torch.no_grad()
def test_published_weights_are_padded_there_too(tmp_path):
    ours, _, _ = pair("retriever", mask_padding=False, pad_to_max_length=True, pooling="cls")
    checkpoint.save(weights_off_their_start(ours), None, tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=False)
    padded = torch.nn.functional.pad(IDS, (0, 44))
    torch.testing.assert_close(again(IDS).pooler_output, ours(padded).pooler_output)


@torch.no_grad()
def test_16_bit_weights_leave_the_filters_in_float32(tmp_path):
    """bfloat16 has 256 places for 4096 positions: kernels of rounded inputs would be steps."""
    _, model, _ = pair("retriever", max_position_embeddings=4096)
    kernel = model.model.layers[0].mixer.gated_filter(4096)[0]
    model.save_pretrained(tmp_path)
    loaded = hub.M2BertForRetrieval.from_pretrained(tmp_path, dtype=torch.bfloat16)
    built = AutoModel.from_config(model.config, dtype=torch.bfloat16)
    for half in (loaded, built):
        mixer = half.model.layers[0].mixer
        assert mixer.in_linear.weight.dtype == torch.bfloat16
        assert {weight.dtype for weight in mixer.gated_filter.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.layers[0].mixer.gated_filter(4096)[0], kernel)


def test_a_longer_vocabulary_is_tied_too():
    _, model, _ = pair("masked lm")
    model.resize_token_embeddings(60)
    assert model.decoder.weight is model.get_input_embeddings().weight
    assert model(IDS).logits.shape == (2, 20, 60)
