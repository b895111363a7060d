"""Training on twins teaches a layer to bind."""

import pytest
import torch

from lib.benchmark import binding, search
from lib.benchmark.binding import Fact
from lib.benchmark.encoder import Encoder
from lib.model.m2bert import M2BertConfig, M2BertForRetrieval, neutral
from lib.pipeline.errors import TrainingError
from lib.training.bound_pairs import learn

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FACTS = [Fact(a, b) for a, b in zip(LETTERS[:13], LETTERS[13:])]


def model(tokenizer, start="binding", length=64):
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1)
    more = dict(intermediate_size=64, max_position_embeddings=length, filter_order=64)
    config = M2BertConfig(**sizes, **more, pooling="mean", initialization=start)
    built = M2BertForRetrieval(config)
    quiet = tokenizer.convert_tokens_to_ids(["the", "[CLS]", "[SEP]"])
    with torch.no_grad():  # common words say nothing, as in lib/model/word_vectors.py
        built.get_input_embeddings().weight[quiet] = neutral(64)
    return built


def test_open_gates_learn_to_bind_and_word_vectors_stay(tokenizer):
    encoder = model(tokenizer)
    task = binding.binding(FACTS, ["the"], 6, pairs=20)

    def accuracy():
        ranked = search.rank(Encoder(encoder, tokenizer), [task], show_progress=False)
        return binding.accuracy(ranked[task.name][0], task)

    words = encoder.get_input_embeddings().weight
    before, start = words.detach().clone(), accuracy()
    curve = learn(encoder, tokenizer, FACTS, ["the"], [6], 60, lr=3e-3, show_progress=False)
    assert start == 0.5 and accuracy() > 0.75
    assert torch.equal(words, before) and words.requires_grad
    assert len(curve) == 60 and curve[-1]["loss"] < curve[0]["loss"]


def test_the_seed_draws_the_training(tokenizer):
    options = dict(distances=[2, 4], steps=3, pairs=2, show_progress=False)
    losses = [
        [line["loss"] for line in learn(model(tokenizer), tokenizer, FACTS, ["the"], **o)]
        for o in (options, options, options | {"seed": 1})
    ]
    assert losses[0] == losses[1] != losses[2]


def test_documents_that_the_model_cannot_read_are_refused(tokenizer):
    with pytest.raises(TrainingError, match="40 tokens apart exceed max_length=64"):
        learn(model(tokenizer), tokenizer, FACTS, ["the"], [40], 1, show_progress=False)


def test_what_is_not_named_stays_as_it_is(tokenizer):
    encoder = model(tokenizer)
    encoder.model.layers[0].mlp.wo.weight.requires_grad_(False)  # as it was given
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    options = dict(pairs=2, learns=("gated_filter",), show_progress=False)
    learn(encoder, tokenizer, FACTS, ["the"], [4], 2, **options)
    changed = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("gated_filter" in name for name in changed)
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"model.layers.0.mlp.wo.weight"}
    with pytest.raises(TrainingError, match="no weight is named gates"):
        learn(encoder, tokenizer, FACTS, ["the"], [4], 1, learns=("gates",), show_progress=False)
