"""Several processes train the model that one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_run
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.model import checkpoint
from lib.model.m2bert import M2BertForMaskedLM
from lib.training import ranks


def test_two_processes_train_the_weights_of_one(tiny, tokenizer, tmp_path):
    checkpoint.save(tiny(M2BertForMaskedLM), tokenizer, tmp_path / "model")
    checkpoint.save(tiny(M2BertForMaskedLM, num_hidden_layers=0), tokenizer, tmp_path / "teacher")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    command = [sys.executable, str(here / "ranks_run.py"), str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank), "2"], env={**os.environ, "PYTHONPATH": path})
        for rank in range(2)
    ]
    one = ranks_run.main(tmp_path)
    assert [process.wait(120) for process in processes] == [0, 0]
    both = [torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, weights in one.items():
        assert torch.equal(both[0][name], both[1][name]), name
        error = (both[0][name] - weights).abs().max()
        assert error < 1e-5, f"{name}: {error}"


@given(st.lists(st.integers(1, 10_000), max_size=40), st.integers(1, 8))
def test_each_pass_is_one_process_and_none_has_much_more_than_another(tokens, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "count", lambda: count)
        shares = []
        for rank in range(count):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            shares.append(ranks.share(tokens))
    assert sorted(i for share in shares for i in share) == list(range(len(tokens)))
    loads = [sum(tokens[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)
