"""The tokenizer is a function of its text, and reads as BERT's does."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from parts import elsewhere

from lib.corpus.tokenizer import make_tokenizer, train_tokenizer
from lib.model.tokens import SPECIAL, load_tokenizer
from lib.pipeline.errors import CorpusError

ROOT = Path(__file__).parents[2]


def test_a_tokenizer_is_a_function_of_its_text():
    """The library's trainer gives another vocabulary in every process."""
    code = (
        "import json; from pathlib import Path\n"
        "from lib.corpus.tokenizer import train_tokenizer\n"
        "texts = [path.read_text() for path in sorted(Path('lib/corpus').glob('*.py'))[:6]]\n"
        "vocabularies = [train_tokenizer(t, 600).get_vocab() for t in (texts, texts[::-1])]\n"
        "print(json.dumps(vocabularies, sort_keys=True))"
    )
    first, *others = (json.loads(elsewhere(code, seed)) for seed in (0, 1, 2))
    assert first[0] == first[1]  # nor does the order of the texts matter
    assert others == [first, first]
    assert sorted(first[0].values()) == list(range(600))
    assert [first[0][piece] for piece in SPECIAL] == [0, 1, 2, 3, 4]


def test_a_trained_tokenizer_reads_as_bert_does(tmp_path):
    tokenizer = train_tokenizer(["The owl sees the owls, and the hen sees nothing. " * 30], 80)
    assert (
        tokenizer.decode(tokenizer("The OWL, sees!")["input_ids"])
        == "[CLS] the owl, sees [UNK] [SEP]"
    )  # no ! in the text
    assert (
        tokenizer("owl", "hen", return_token_type_ids=True)["token_type_ids"].count(1) == 2
        and len(tokenizer("")["input_ids"]) == 2
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for folder in (tmp_path, tmp_path / "tokenizer"):
        assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(tmp_path)("The owls").input_ids == tokenizer("The owls").input_ids
    with pytest.raises(
        CorpusError, match=r"nothing/tokenizer/tokenizer.json is missing: build it with"
    ):
        load_tokenizer(tmp_path / "nothing")


def test_without_a_network_the_tokenizer_is_named_with_the_way_out(monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda name, **options: asked.append(options) or offline(),
    )
    way_out = "'bert-base-uncased' is no folder here .*vocab.txt.*set data.tokenizer to embedded"
    # The hub does not answer; or it does, and then breaks off.
    for answer in (offline, lambda *_: None):
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
        with pytest.raises(CorpusError, match=way_out):
            make_tokenizer("bert-base-uncased", [], 0)
    # Only the second time: it would ask for most of a minute.
    assert asked == [{"trust_remote_code": False}]
