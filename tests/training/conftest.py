"""Fixtures of the tests of training."""

import pytest
from toys import SENTENCES, task

from lib.training.pairs import Pairs
from lib.training.text import PretrainingText


@pytest.fixture
def text(tokenizer):
    short = [" ".join(SENTENCES[:i]) for i in range(1, 9)]
    return PretrainingText.from_texts(short, [" ".join(SENTENCES)] * 6, tokenizer, length=16)


@pytest.fixture
def pairs(tokenizer):
    return Pairs([task()], tokenizer, max_length=24)
