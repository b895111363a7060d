"""What a later stage would refuse is refused before training, in one line with its ways out."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lib.benchmark import locov1
from lib.corpus import build, preflight
from lib.model.tokens import load_tokenizer
from lib.pipeline import params
from lib.pipeline.errors import CorpusError

WORDS = (
    "the fox runs by night and an owl sleeps in red leaves while hens wake early for green seeds "
    "beside blue water"
).split()


def text(words: int, shift: int) -> str:
    return " ".join(WORDS[(i * (shift + 1) + i // 7) % len(WORDS)] for i in range(words))


def collection(
    folder: Path,
    task_files,
    splits=("train", "validation", "test"),
    documents: int = 12,
    evidence: bool = True,
    words: int = 60,
) -> Path:
    for split in splits:
        task_files(
            folder,
            [
                dict(pid=f"d{i}", dataset="fables", passage=f"{split} {i} {text(words, i)}")
                for i in range(documents)
            ],
            [
                dict(qid=f"q{i}", dataset="fables", query=f"{split} {i} fox", answer_pids=[f"d{i}"])
                for i in range(documents)
            ],
            [
                dict(qid=f"q{i}", dataset="fables", pid=f"d{i}", start_frac=0.5, end_frac=0.6)
                for i in range(documents)
            ]
            if evidence
            else None,
            split=split,
        )
    return folder


def texts(folder: Path, short: int = 60, long: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [text(40, i) + f" {i}" for i in range(short)] + [
        text(1500, i) + f" {i}" for i in range(long)
    ]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": row, "source": "one"}) + "\n" for row in rows)
    )
    return folder


@pytest.fixture
def check(house, task_files):
    """check(collection's options…, text={…}, design=change): what preflight says, at smoke."""

    def run(text=None, design=None, **options):
        values = YAML(typ="safe").load((house / "params.yaml").read_text(encoding="utf-8"))
        values["pretrain"]["smoke"]["tokens"] = 10_000  # at smoke's budgets so small a collection
        values["finetune"]["smoke"]["documents_seen"] = 60  # would be read fifty times
        if design:
            design(values)
        with open(house / "params.yaml", "w", encoding="utf-8") as file:
            YAML().dump(values, file)
        mirror = collection(house / "fables", task_files, **options)
        build.build(
            house / "corpus",
            source=str(mirror),
            pretraining=str(texts(house / "texts", **(text or {}))),
            vocabulary=200,
            show_progress=False,
        )
        return preflight.check("smoke", house / "corpus")

    return run


def refused(call, *parts) -> str:
    with pytest.raises(CorpusError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), error.value
    return str(error.value)


def test_a_collection_that_has_everything_lacks_nothing(check):
    assert check() == {}


def test_without_a_train_split_both_ways_out_are_named(check):
    said = refused(
        lambda: check(splits=("validation", "test")),
        "no train split (it has validation, test)",
        "give a source with a train split",
        "SET=finetune.allow_test_training=true",
    )
    assert said.count("no train split") == 1  # once, however many rows there are


def test_training_on_test_may_be_allowed_and_is_said(check):
    lacks = check(
        splits=("test",),
        design=lambda values: values["finetune"]["smoke"].update(allow_test_training=True),
    )
    assert (
        "trained on test" in lacks["no train split"]
        and "params.yaml" in lacks["no validation split"]
    )


def test_rows_that_train_on_nothing_need_no_train_split(check):
    def design(values):
        for row in values["rows"]["smoke"]["retrievers"].values():
            row["loss"] = "none"

    lacks = check(splits=("test",), design=design)
    assert "no row is fine-tuned" in lacks["no train split"]


def test_one_document_in_all_is_no_training(check):
    refused(lambda: check(documents=1), "the train split has one document in all (fables)")


def test_tasks_that_are_not_there_are_named_with_those_that_are(check):
    refused(
        lambda: check(
            design=lambda values: values["retrievers"]["reads_32k"].update(tasks=["book_*"])
        ),
        "row reads_32k trains on tasks book_*, and the train split has fables",
    )


@pytest.mark.parametrize(
    "given, parts",
    [
        (dict(short=0), ["no short text to train on", "SET=pretrain.mixture=long"]),
        (dict(long=0), ["no long text to train on", "no long text held out"]),
        (dict(long=1), ["no long text held out", "one alone cannot be divided"]),
        (dict(short=1), ["no short text held out"]),
    ],
)
def test_mixed_pretraining_needs_short_and_long_texts_to_train_on_and_to_measure_on(
    check, given, parts
):
    refused(lambda: check(text=given), *parts)


def test_budgets_that_read_the_same_again_and_again_are_said_and_not_refused(check):
    def design(values):
        values["pretrain"]["smoke"]["tokens"] = 1_000_000
        values["finetune"]["smoke"]["documents_seen"] = 12 * 20
        values["retrievers"]["opl"]["share"] = 0.1

    said = check(design=design)
    assert said.keys() == {"the same text more than 4 times", "the same pairs more than 10 times"}
    assert said["the same text more than 4 times"].startswith("mixed_8k (")
    assert "lower pretrain.tokens, or give more TEXT" in said["the same text more than 4 times"]
    # Each of 12 documents has one query; a document of opl is one of two kinds of its pair.
    rows = "reads_32k (20 times), reads_warm (20 times)"
    assert said["the same pairs more than 10 times"].startswith(f"{rows}: lower")


def test_what_no_row_pretrains_on_is_not_asked_for(check):
    assert (
        check(
            text=dict(short=0),
            design=lambda values: values["pretrain"]["smoke"].update(mixture="long"),
        )
        == {}
    )


def test_long_texts_must_fill_an_example(check):
    refused(
        lambda: check(design=lambda values: values["lengths"]["smoke"].update({32768: 9000})),
        "do not fill the 9,000 tokens of an example",
    )


def test_what_other_peoples_rows_need_is_asked_for_first(check, monkeypatch):
    def design(values):
        values["baselines"] |= {
            "voyage": {
                "model": "v",
                "url": "https://voyage.invalid/v1/embeddings",
                "key": "NO_SUCH_KEY",
            },
        }
        values["rows"]["smoke"]["baselines"] += ["voyage"]

    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    refused(
        lambda: check(design=design),
        "row voyage needs openai: `make interop`",
        "row voyage needs the environment variable NO_SUCH_KEY",
    )


def test_other_sources_are_read_first(check, house):
    refused(
        lambda: check(
            design=lambda values: values["evaluate"]["smoke"].update(also=[str(house / "nowhere")])
        ),
        "evaluate.also: ",
        "nowhere is no folder",
    )


def test_what_is_not_known_is_said(check):
    lacks = check(evidence=False, words=700)
    assert "nothing says where" in lacks["no evidence is known"]
    longest = params.length("smoke", 32768)
    assert lacks[f"documents longer than {longest} tokens"].startswith("12 of 12 test documents")


def test_evidence_of_some_queries_is_counted(check, house, task_files):
    check()
    task = locov1.load("fables", house / "corpus")
    del task.evidence["q0"]
    assert preflight.evidence([task])["evidence is known in part"].startswith(
        "of 11 of 12 test queries"
    )


def test_a_tokenizer_of_another_script_is_noticed(check, house):
    check()
    task = locov1.load("fables", house / "corpus")
    foreign = locov1.Task("x", "test", {"d": "日本語の文書 を 読む"}, {"q": "x"}, {"q": {"d": 1}})
    tokenizer = load_tokenizer(house / "corpus")
    assert preflight.vocabulary([task], tokenizer) == {}
    assert (
        "100 % of the word pieces"
        in preflight.vocabulary([foreign], tokenizer)["words that the tokenizer does not know"]
    )
