"""The benchmark is fair, its numbers are what they say, and its definition is the model."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from lib import kernels
from lib.efficiency import counts, race
from lib.model.m2bert import M2BertConfig, M2BertForRetrieval

CONFIG = M2BertConfig(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=256,
    max_position_embeddings=96,
    filter_order=16,
)
COLUMNS = {
    "model",
    "length_tokens",
    "batch",
    "turn",
    "layers",
    "dtype",
    "encode_s",
    "cpu_s",
    "peak_gib",
}


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    "options",
    [{}, dict(residual_long_conv=False), dict(bidirectional=False), dict(mixer_layer_norm=True)],
)
@pytest.mark.parametrize("length", [1, 2, 33, 96])
@torch.no_grad()
def test_the_definition_is_the_model(options, length):
    torch.manual_seed(0)
    model = M2BertForRetrieval(
        M2BertConfig(
            **(
                {
                    key: CONFIG.to_dict()[key]
                    for key in (
                        "vocab_size",
                        "hidden_size",
                        "num_hidden_layers",
                        "intermediate_size",
                        "max_position_embeddings",
                    )
                }
                | options
            )
        )
    ).eval()
    ids = torch.randint(5, 100, (2, length))
    expected = model(ids).last_hidden_state
    with kernels.use("definition"):
        found = model(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_race_takes_turns_and_reports_each_models_memory(monkeypatch):
    entries = race.contenders(CONFIG, shallow_from=64)
    entries["model, float32"]["until"] = 16
    asked, say = [], race.say
    monkeypatch.setattr(
        race,
        "say",
        lambda process, message: (
            asked.append(message.get("length_tokens")) or say(process, message)
        ),
    )
    turns = race.benchmark(entries, lengths=[64, 16], repeats=2, threads=1)
    names = [*entries, race.LIMITS]
    assert [(turn["length_tokens"], turn["model"]) for turn in turns] == [
        (length, name)
        for length in (16, 64)
        for _ in range(2)
        for name in names
        if (name, length) != ("model, float32", 64)
    ]
    assert (
        asked.count(16) == 3 * len(names) and asked.count(64) == 2 * (len(names) - 1) + 3
    )  # both engines and the limits are warmed up at 64 again, the two shallow ones are not
    encoded = [turn for turn in turns if turn["model"] != race.LIMITS]
    assert all(set(turn) == COLUMNS and turn["encode_s"] > 0 for turn in encoded)
    for turn in encoded:
        shallow = turn["length_tokens"] == 64 and not turn["model"].startswith("engine")
        assert turn["layers"] == (1 if shallow else 2) and (
            math.isnan(turn["peak_gib"]) if shallow else 0.05 < turn["peak_gib"] < 4
        )
    assert all(
        turn["gflops_float32"] > 1 and turn["gflops_bfloat16"] > 1 and turn["gb_s"] > 0.5
        for turn in turns
        if turn["model"] == race.LIMITS
    )
    found = race.table(turns, entries)
    assert (
        len(found) == 11
        and found[["tokens_s", "gflops", "of_products", "of_bandwidth"]].gt(0).all().all()
    )
    assert len(race.figure(found, turns).axes) == 3


def test_a_race_says_which_length_was_too_much():
    entries = {"engine": race.contenders(CONFIG)["engine, float32"]}
    with pytest.raises(RuntimeError, match="at 100 tokens with code 1"):
        race.benchmark(entries, lengths=[100], repeats=1, threads=1, limits=False)  # reads 96


def test_a_table_by_hand():
    """Two turns, in which the machine is slow once: a ratio is taken turn by turn."""
    entries = {
        name: entry
        for name, entry in race.contenders(CONFIG).items()
        if name in ("definition, float32", "engine, bfloat16", "Transformer twin, bfloat16")
    }
    seconds = {
        "definition, float32": (1.0, 3.0),
        "engine, bfloat16": (0.25, 0.5),
        "Transformer twin, bfloat16": (0.5, 0.5),
    }
    turns = [
        {
            "model": name,
            "length_tokens": 96,
            "batch": 2,
            "turn": turn + 1,
            "layers": 2,
            "dtype": entries[name]["dtype"],
            "encode_s": seconds[name][turn],
            "cpu_s": 1.0,
            "peak_gib": 0.5,
        }
        for turn in range(2)
        for name in entries
    ]
    turns += [
        {
            "model": race.LIMITS,
            "length_tokens": 96,
            "batch": 2,
            "turn": turn + 1,
            "gflops_float32": 50.0,
            "gflops_bfloat16": 100.0,
            "gb_s": 10.0,
        }
        for turn in range(2)
    ]
    line = race.table(turns, entries).set_index("model").loc["engine, bfloat16"]
    assert (line["tokens_s"], line["over_definition"], line["over_twin"]) == (
        96 * 2 / 0.375,
        5.0,
        1.5,
    )
    products, operations, moved = counts.cost(CONFIG, 96, 2, 2)
    assert line["of_products"] == pytest.approx(2 * products / 0.375 / 1e9 / 100) and line[
        "of_bandwidth"
    ] == pytest.approx(2 * moved / 0.375 / 1e9 / 10)
    assert line["gflops"] == pytest.approx(2 * operations / 0.375 / 1e9) and line[
        "gflop_a_byte"
    ] == pytest.approx(operations / moved)
    alone = race.table(
        [turn for turn in turns if turn["model"] == "engine, bfloat16"], entries
    ).iloc[0]
    assert pd.isna(alone["over_definition"]) and pd.isna(alone["of_products"])
    assert (
        len(
            race.figure(
                race.table([turn for turn in turns if turn["model"] != race.LIMITS], entries),
                [turn for turn in turns if turn["model"] != race.LIMITS],
            ).axes
        )
        == 3
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_cells_say_so():
    found = race.convolutions([128, 131_072])
    assert (
        found[["length_tokens", "batch"]].values.tolist() == [[128, 1], [128, 1024], [131_072, 1]]
        and (found["monarch_ms"] == "not run: no GPU").all()
    )


def test_on_a_gpu_others_race():
    entries = race.contenders(CONFIG, "cuda")
    assert counts.parameters(entries["a 7B shape, bfloat16"]["config"]) == pytest.approx(
        7e9, rel=0.03
    )
    assert [entry["way"] for entry in entries.values()] == [
        "definition",
        "torch",
        "compiled",
        "forward",
        "forward",
        "forward",
        "forward",
    ]
    assert (
        entries["a 7B shape, bfloat16"]["shallow_from"] == 0
        and entries["BGE-large's shape, bfloat16"]["config"].num_hidden_layers == 24
    )
