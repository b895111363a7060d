"""Hours and epochs are counted before the first step; by hand at small sizes."""

import json

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch.utils.flop_counter import FlopCounterMode

from lib.corpus import build
from lib.efficiency import estimate
from lib.efficiency.estimate import Facts, Work
from lib.kernels import cpu
from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM
from lib.model.tokens import load_tokenizer
from lib.pipeline import params

WORDS = "the fox runs by night and an owl sleeps in red leaves while hens wake early".split()
KNOWN = Facts(
    vocabulary=500,
    texts={"short": {"": np.full(10, 52.0)}, "long": {"": np.full(4, 1_000.0)}},
    documents={"a": np.array([[100.0, 1], [300, 5]]), "b": np.array([[50.0, 4]])},
    query=10.0,
)


@pytest.fixture
def design(house):
    """design({"retrievers.opl.tasks": ["a"]}): the house's design with these changes."""

    def change(changes: dict) -> None:
        path = house / "params.yaml"
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        for place, value in changes.items():
            *above, last = place.split(".")
            section = values
            for key in above:
                section = section[key]
            section[last] = value
        with open(path, "w", encoding="utf-8") as file:
            YAML().dump(values, file)

    return change


def work(row: str, known: Facts = KNOWN) -> Work:
    return next(w for w in estimate.works("smoke", known) if w.row == row)


# ------------------------------------------------------------------ epochs


def test_epochs_of_a_mixture_by_hand(house):
    length = params.length("smoke", 8192)
    examples = 40_000 / (0.3 * 52 + 0.7 * length)
    long = 4 * 998 / (length - 2)  # examples that the long texts fill
    assert length == 256 and 0.7 * examples / long > 0.3 * examples / 10
    assert work("mixed_8k").epochs == pytest.approx(0.7 * examples / long)
    assert work("mixed_8k").tokens == 40_000 and work("mixed_8k").reads == "text"


def test_two_seeds_of_pretraining_read_twice_as_much_and_the_same_text_as_often(house, design):
    once = work("mixed_8k")
    design({"pretrain.smoke.seeds": [17, 18]})
    twice = work("mixed_8k")
    assert (twice.tokens, twice.operations) == (2 * once.tokens, 2 * once.operations)
    assert twice.epochs == once.epochs


def test_of_several_sources_the_smallest_is_read_most_often(house):
    short = {"short": {"c4": np.full(10, 52.0), "wikipedia": np.full(90, 52.0)}}
    equal = {"short": {"c4": np.full(50, 52.0), "wikipedia": np.full(50, 52.0)}}
    long = {"long": {"": np.full(10_000, 1_000.0)}}
    few, even = (work("mixed_8k", KNOWN._replace(texts=own | long)) for own in (short, equal))
    assert few.epochs == pytest.approx(5 * even.epochs)


def test_epochs_of_one_kind_leave_the_other_out(house, design):
    design({"pretrain.smoke.mixture": "short"})
    assert work("mixed_8k").epochs == pytest.approx(40_000 / 52 / 10)
    none = KNOWN._replace(texts={"short": KNOWN.texts["short"], "long": {}})
    assert work("mixed_8k", none) == work("mixed_8k")


def test_epochs_of_uniform_lengths_by_hand(house, design):
    """Ten texts of 50 tokens, in pieces of 10 to 256 tokens, with [CLS] and [SEP] in both."""
    design({"pretrain.smoke.mixture": "short", "pretrain.smoke.variable_lengths": "uniform"})
    length = (10 + 256) / 2
    assert work("mixed_8k").epochs == pytest.approx(40_000 / length / (500 / (length - 2)))


def test_epochs_of_pairs_by_hand(house, design):
    # 320 documents bring two queries each at most: (1 + 2 + 2) / 3 of 10 pairs.
    assert work("reads_32k").epochs == pytest.approx(320 * 5 / 3 / 10)
    design({"finetune.smoke.tasks": ["a"]})
    assert work("reads_32k").epochs == pytest.approx(320 * 1.5 / 6)


def test_a_step_of_one_pair_is_one_kind_of_it(house, design):
    own = {"loss": "opl", "documents": 1, "negatives": 1, "share": 0.2, "seeds": [42, 43]}
    own["lr_choices"] = []
    design({f"retrievers.reads_32k.{key}": value for key, value in own.items()})
    seen = 0.2 * 320
    assert work("reads_32k").epochs == pytest.approx(seen / 10 / 2)
    # Two models are trained.
    assert work("reads_32k").tokens == pytest.approx(2 * seen * (150 + 10))


def test_what_trains_on_nothing_costs_nothing(house, design):
    design({"finetune.smoke.loss": "none", "pretrain.smoke.tokens": 0})
    assert {(w.tokens, w.epochs, w.operations) for w in [work("reads_32k"), work("warm_32k")]} == {
        (0, 0, 0)
    }


def test_rows_that_repeat_themselves_are_named_with_the_way_out():
    done = [
        Work("mixed_8k", "text", 1.0, 4.5, 1.0),
        Work("warm_32k", "text", 1.0, 4.0, 1.0),
        Work("opl", "pairs", 1.0, 281.0, 1.0),
    ]
    said = estimate.repetitions(done)
    assert said["the same text more than 4 times"].startswith("mixed_8k (4 times): lower pretrain")
    assert said["the same pairs more than 10 times"].startswith("opl (281 times): ")
    assert "\n" not in str(said) and estimate.repetitions(done[1:2]) == {}


def test_every_profile_is_fine_tuned_on_a_source_that_has_a_train_split(house):
    for profile in params.load()["lengths"]:  # of the hub's LoCoV1 there is the test split alone
        assert params.settings(profile, "data")["source"] == "embedded"
    assert params.settings("paper", "evaluate")["also"] == ["hub"]
    assert params.settings("paper", "pretrain")["tokens"] == 36_700_160_000


def test_gpu_repeats_nothing_even_on_the_text_of_400_files_a_package(house):
    """Sizes of `laptop`'s corpus, whose books are shorter; `gpu` reads all files."""
    texts = {
        "short": {"": np.full(18_023, 4_246_409 / 18_023)},
        "long": {"": np.full(3_020, 15_609_595 / 3_020)},
    }
    pages = 2_863_210  # tokens of the training documents
    documents = {
        f"book_{n}_any": np.tile([n, min(64.0, n / 235)], (pages // n, 1))  # 12,169 queries in all
        for n in params.settings("gpu", "data")["books"]
    }
    done = estimate.works("gpu", Facts(30_522, texts, documents, 18.2))
    assert estimate.repetitions(done) == {}
    assert max(w.epochs for w in done if w.reads == "text") > 3  # and nothing is left unread
    hours = sum(w.operations for w in done) / 60e12 / 3600
    assert hours < 1


def test_paper_takes_46_hours_a_row_on_an_h200(house):
    """221,000 tokens/s at 2,048 tokens (data/measured/gpu.csv) are 77 TFLOP/s of counted work."""
    done = estimate.works("paper", KNOWN._replace(vocabulary=30_522))
    hours = {w.row: w.operations / 77e12 / 3_600 for w in done if w.reads == "text" and w.tokens}
    assert len(hours) == 7 and hours["mixed_2k"] == pytest.approx(
        36_700_160_000 / 221_000 / 3_600, rel=0.01
    )
    assert all(hours["mixed_128"] <= other < 47 for other in hours.values())


# ------------------------------------------------------------------ operations


def test_a_training_step_is_three_times_the_counted_forward_pass(monkeypatch):
    monkeypatch.setattr(cpu, "kernel", lambda: None)  # torch cannot count lib/kernels/mixer.cpp
    shape = M2BertConfig(
        vocab_size=400,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=256,
        max_position_embeddings=128,
        filter_order=16,
    )
    ids = torch.arange(4 * 128).reshape(4, 128) % 390 + 5
    labels = ids.where(torch.arange(128) % 10 < 3, -100)
    model = M2BertForMaskedLM(shape)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=labels).loss.backward()
    counted = 3 * 4 * (estimate.forward(shape, 128, 4) + 128 * estimate.head(shape, 0.3))
    # torch counts no FFT, and the backward pass of a depthwise convolution as that of a dense one.
    totals = counter.get_flop_counts()["Global"].items()
    matmuls = sum(flops for name, flops in totals if "conv" not in str(name))
    assert 0.7 * counted < matmuls < counted


def test_gradient_caching_costs_a_fourth_pass(house, design):
    whole = work("reads_32k").operations
    design({"finetune.smoke.micro_batch_tokens": 64})
    assert work("reads_32k").operations == pytest.approx(whole * 4 / 3)


def test_the_trials_of_a_rate_are_trained_too(house, design):
    alone, epochs = work("reads_32k").operations, work("reads_32k").epochs
    design({"finetune.smoke.lr_choices": [1e-4, 1e-3, 1e-2], "finetune.smoke.trial_share": 0.5})
    assert work("reads_32k").operations == pytest.approx(alone * (2 + 3 * 0.5) / 2)  # two seeds
    assert work("reads_32k").epochs == epochs


def test_a_group_costs_its_rows_and_what_they_are_built_on(house, design):
    every = ["reads_32k", "opl", "reads_warm"]
    design({"groups": {"loss": {"rows": ["reads_warm"]}, "length": {"rows": every}}})
    done = estimate.works("smoke", KNOWN)
    cost = {w.row: w.operations for w in done}
    groups = estimate.by_group("smoke", done)
    assert groups["loss"][0] == {"reads_warm", "warm_32k", "mixed_8k"}
    assert groups["loss"][1] == pytest.approx(sum(cost[row] for row in groups["loss"][0]))
    assert groups["length"][1] == pytest.approx(sum(cost.values()))


def test_explicit_negatives_are_read_too(house, design):
    alone = work("reads_32k").tokens
    design({"finetune.smoke.explicit_negatives": 1})
    document, asked, seeds = 150, 5 / 3, 2  # (100 + 300 + 50) / 3 tokens
    assert work("reads_32k").tokens == pytest.approx(alone + seeds * 320 * asked * document)


# ------------------------------------------------------------------ a corpus, a machine


@pytest.fixture
def corpus(house, task_files):
    """A corpus of 12 documents, each with one query, and texts to pretrain on."""
    for split in ("train", "test"):
        rows = range(12)
        task_files(
            house / "fables",
            [
                dict(pid=f"d{i}", dataset="fables", passage=f"{split} {i} " + text(60 + 9 * i))
                for i in rows
            ],
            [
                dict(qid=f"q{i}", dataset="fables", query=f"{i} fox", answer_pids=[f"d{i}"])
                for i in rows
            ],
            split=split,
        )
    (house / "texts").mkdir()
    lines = [text(40 + i) + f" {i}" for i in range(60)] + [text(1_500) + f" {i}" for i in range(6)]
    (house / "texts" / "a.jsonl").write_text(
        "".join(json.dumps({"text": line, "source": "one"}) + "\n" for line in lines)
    )
    build.build(
        house / "corpus",
        source=str(house / "fables"),
        pretraining=str(house / "texts"),
        vocabulary=200,
        show_progress=False,
    )
    return house / "corpus"


def text(words: int) -> str:
    return " ".join(WORDS[(i + i // 7) % len(WORDS)] for i in range(words))


def test_sizes_are_estimated_from_characters_and_a_sample(corpus):
    import pyarrow.parquet as pq

    known, tokenizer = estimate.facts(corpus), load_tokenizer(corpus)
    table = pq.read_table(corpus / "pretrain.parquet").to_pylist()
    for kind, texts in known.texts.items():
        own = [r["text"] for r in table if (r["kind"], r["split"]) == (kind, "train")]
        exact = [len(ids) for ids in tokenizer(own)["input_ids"]]
        assert texts[""].sum() == pytest.approx(sum(exact), rel=0.05)
        np.testing.assert_allclose(sorted(texts[""]), sorted(exact), rtol=0.1)
    assert known.documents["fables"].shape == (12, 2)
    assert known.documents["fables"][:, 1].tolist() == [1.0] * 12
    assert known.vocabulary == len(tokenizer)


def test_the_rate_of_this_machine_uses_up_no_random_number(house):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert estimate.rate("smoke", 200) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_estimate_goes_to_the_log_alone(corpus, capsys):
    estimate.announce("smoke", corpus)
    out, err = capsys.readouterr()
    rows = "start_32k mixed_8k attention_32k warm_32k reads_32k opl reads_warm".split()
    rows += [f"group {name}" for name in params.groups(params.load(), "smoke")] + ["all rows"]
    assert (
        out == ""
        and [line.partition(":")[0].partition(",")[0] for line in err.splitlines()] == rows
    )
    estimate.announce("smoke", corpus, "opl")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("opl: ") and "epochs of its pairs, about " in err


def test_of_several_processes_the_first_one_says_it(corpus, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    estimate.announce("smoke", corpus, "opl")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (40, "40 s"),
        (90, "1.5 min"),
        (1_500, "25 min"),
        (11_520, "3.2 hours"),
        (440_640, "5.1 days"),
    ],
)
def test_a_duration_has_two_digits(seconds, said):
    assert estimate.duration(seconds) == said
