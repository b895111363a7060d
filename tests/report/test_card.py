"""The card says what the config and the record say, and its lines run."""

import re

import pytest
from ruamel.yaml import YAML

from lib.model import checkpoint
from lib.model.m2bert import M2BertForMaskedLM
from lib.report import card

ABOUT = {
    "row": "opl",
    "profile": "laptop",
    "stage": "finetune",
    "starts_from": "warm_32k",
    "start": "random weights",
    "settings": {"loss": "opl", "lr": 5e-6, "tasks": ["*"]},
    "trained_on": {"Tasks": "book_512_deep, tail", "Documents seen": 3072},
    "metrics": {"nDCG@10, validation of tail": 0.31412, "a | b": "x\ny"},
}


def test_the_card_names_where_the_model_comes_from_and_what_was_measured(tiny):
    text = card.card(tiny(), ABOUT)
    for part in (
        "# opl (laptop)",
        "| Starts from | warm_32k |",
        "| First weights | random weights |",
        "| Documents seen | 3,072 |",
        "| nDCG@10, validation of tail | 0.3141 |",
        "| a \\| b | x y |",
        "up to 32 tokens",
        "the mean over tokens",
        '"lr": 5e-06',
        checkpoint.fingerprint(ABOUT["settings"]),
    ):
        assert part in text, part
    assert f"{sum(p.numel() for p in tiny().parameters()):,} parameters" in text
    assert "\n| | |\n|---|---|\n" in text and "\n\n\n" not in text


def test_what_is_unknown_is_said_to_be(tiny):
    text = card.card(tiny(), {})
    assert text.startswith("---\n") and "# M2-BERT\n" in text and text.count("Unknown.") == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(mask_padding=True), "does not depend on its batch"),
        (dict(mask_padding=False), "leaks into the embedding"),
        (dict(mask_padding=False, pad_to_max_length=True), "padded to 32 tokens inside `forward`"),
    ],
)
def test_the_card_says_what_padding_does(tiny, changes, words):
    assert words in card.card(tiny(**changes), ABOUT)


def test_the_card_of_a_twin_does_not_call_it_a_long_convolution(tiny):
    long_conv, attention = card.card(tiny(), ABOUT), card.card(tiny(mixer="attention"), ABOUT)
    assert "attention replaced by gated long convolutions" in long_conv
    assert "attention in the place of its long convolutions" in attention
    assert "replaced by" not in attention


def test_the_head_is_what_the_hub_reads(tiny):
    for model, library, task in (
        (tiny(), "sentence-transformers", "sentence-similarity"),
        (tiny(M2BertForMaskedLM), "transformers", "fill-mask"),
    ):
        head = YAML(typ="safe").load(card.card(model, ABOUT).split("---\n")[1])
        assert (head["library_name"], head["pipeline_tag"]) == (library, task)
        assert "long-context" in head["tags"]


def test_equal_settings_have_equal_fingerprints_in_any_order():
    one, same = (
        checkpoint.fingerprint({"a": 1, "b": [2]}),
        checkpoint.fingerprint({"b": [2], "a": 1}),
    )
    assert one == same != checkpoint.fingerprint({"a": 1, "b": [3]})


def test_every_saved_model_has_its_card_and_a_masked_lms_lines_run(tiny, tokenizer, tmp_path):
    model, folder = tiny(M2BertForMaskedLM), tmp_path / "model"
    checkpoint.save(model, tokenizer, folder, ABOUT, card.card(model, ABOUT))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == card.card(tiny(M2BertForMaskedLM), ABOUT)
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    names: dict = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    assert names["logits"].shape[-1] == len(tokenizer)
