"""The corpus: the answer lies where its task says, and the same text gives the same bytes."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parts import elsewhere, padded

from lib.benchmark import locov1
from lib.benchmark.sources import pretraining_texts
from lib.benchmark.task import SPLITS, CorpusError
from lib.corpus import build
from lib.corpus.packages import Shingles, normal
from lib.corpus.pretraining import held_out
from lib.corpus.tokenizer import lengths, make_tokenizer
from lib.model import token_rows, word_vectors
from lib.model.tokens import SPECIAL, load_tokenizer, tokenize_whole

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "loco-real"

SMALL = dict(
    packages=3, files_per_package=40, vocabulary=1024, books=[512, 1024], show_progress=False
)
CONTENT = "85ea4fe99953cb29e45527c6ef17edfe3448a2149a82cba696d0d988791d1f3d"
READ = ("networkx", "numpy", "pandas", "tokenizers")  # what the content of SMALL is made of, and by


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, manifest) of three packages' documentation."""
    folder = tmp_path_factory.mktemp("built") / "corpus"
    return folder, build.build(folder, **SMALL)


@pytest.fixture(scope="module")
def tasks(small):
    """Every task of every split, as the rest of the project loads it."""
    folder, _ = small
    return [
        locov1.load(name, folder, split) for split in SPLITS for name in locov1.tasks(folder, split)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- the corpus of three packages


def test_every_designed_task_is_there(small):
    made = small[1]["tasks"]
    held_out = {
        f"{family}_{depth}"
        for family in ("book_512", "book_1024", "page")
        for depth in ("deep", "shallow")
    } | {"tail", "digest"}
    assert made.keys() == held_out | {"book_512_any", "book_1024_any"}
    for name, splits in made.items():
        assert splits.keys() == ({"train"} if name.endswith("_any") else {"validation", "test"})


def test_no_query_is_left_in_a_document(tasks):
    """Normalised, whole words: not in its own, and outside training in no other of its task."""
    for task in tasks:
        plain = {pid: padded(text) for pid, text in task.documents.items()}
        for qid, query in task.queries.items():
            for pid in task.qrels[qid] if task.split == "train" else plain:
                assert padded(query) not in plain[pid], (task.name, qid, pid)


def test_queries_are_unique_and_no_split_asks_anothers(tasks):
    asked = {split: set() for split in SPLITS}
    for task in tasks:
        plain = [normal(query) for query in task.queries.values()]
        assert len(set(plain)) == len(plain), task.name
        assert all(len(query.split()) >= 4 for query in plain)
        asked[task.split] |= set(plain)
    assert not any(
        asked[a] & asked[b]
        for a, b in (("train", "validation"), ("train", "test"), ("validation", "test"))
    )


def test_splits_share_no_document_and_hardly_a_sentence(small, tasks):
    """Near-duplicates share half of their runs of eight words."""
    texts = {
        split: {text for task in tasks if task.split == split for text in task.documents.values()}
        for split in SPLITS
    }
    texts["train"] |= {
        text
        for kind in ("short", "long")
        for split in ("train", "validation")
        for text in pretraining_texts(small[0], kind, split)
    }
    shingles = Shingles()
    runs = {
        split: {text: shingles.of(normal(text)) for text in some} for split, some in texts.items()
    }
    for a, b in (("validation", "train"), ("test", "train"), ("test", "validation")):
        assert not texts[a] & texts[b]
        others = np.unique(
            np.concatenate([*runs[b].values(), np.array([2**64 - 1], dtype=np.uint64)])
        )
        assert (
            max(
                (others[np.searchsorted(others, found)] == found).mean()
                for found in runs[a].values()
            )
            < 0.5
        )


ZONES = {
    "book_512_deep": (0.5, 1),
    "book_512_shallow": (0, 0.15),
    "book_1024_deep": (0.5, 1),
    "book_1024_shallow": (0, 0.15),
    "page_deep": (0.6, 1),
    "page_shallow": (0, 0.2),
}


def test_evidence_is_one_item_of_its_document_and_lies_in_its_zone(small, tasks):
    tokenizer = load_tokenizer(small[0])
    for task in tasks:
        assert task.evidence.keys() == task.queries.keys()
        low, high = ZONES.get(task.name, (0, 1))
        for qid, (pid, start_frac, end_frac) in task.evidence.items():
            assert (
                [pid] == list(task.qrels[qid])
                and low <= start_frac <= high
                and start_frac < end_frac <= 1
            )
            text = task.documents[pid]
            start, end = (round(share * len(text)) for share in (start_frac, end_frac))
            if task.name == "tail":
                assert re.match(r"[ \t]*(async def|def|class) \w", text[start:]) and end == len(
                    text
                )
                continue
            assert (
                re.match(r"[\w.]+\n\S?", text[start:end])
                and text[:start].endswith("\n\n" if start else "")
                and text[end:].startswith("\n\n" if end < len(text) else "")
            )
            if task.name.endswith("_deep"):
                n = int(task.name.split("_")[1]) if task.name.startswith("book") else 0
                assert len(tokenizer(text[:start], add_special_tokens=False)["input_ids"]) >= n // 2


def test_a_books_documents_fit_n_tokens_and_are_the_same_in_its_tasks(small, tasks):
    tokenizer = load_tokenizer(small[0])
    books = [task for task in tasks if task.name.startswith("book")]
    for task in books:
        n = int(task.name.split("_")[1])
        tokens = lengths(tokenizer, list(task.documents.values())) + 2
        assert tokens.max() <= n and tokens.min() >= n // 3 and np.median(tokens) > 0.7 * n
    texts = {(task.name, task.split): task.documents for task in books}
    for (name, split), documents in texts.items():
        if name.endswith("_deep"):
            assert documents == texts[name.replace("deep", "shallow"), split]


def test_test_queries_and_documents_are_limited_and_training_is_not(small):
    manifest = build.build(
        small[0].with_name("limited"),
        **SMALL
        | dict(
            test_documents=5,
            test_queries=4,
            validation_documents=5,
            validation_queries=3,
            queries_per_document=1,
            natural=["page_deep"],
        ),
    )
    assert manifest["tasks"].keys() == {name for name in ZONES if name != "page_shallow"} | {
        "book_512_any",
        "book_1024_any",
    }
    for name, splits in manifest["tasks"].items():
        for split, some in splits.items():
            if split == "train":
                assert (
                    some["queries"]
                    <= some["documents"]
                    == small[1]["tasks"][name]["train"]["documents"]
                )
            else:
                assert (
                    some["documents"] == 5
                    and some["queries"] <= {"test": 4, "validation": 3}[split]
                )


def test_the_manifest_counts_and_hashes_what_is_there(small, tasks):
    folder, manifest = small
    there = files(folder)
    assert json.loads(there.pop("manifest.json")) == manifest
    assert manifest["files"] == {
        name: hashlib.sha256(raw).hexdigest() for name, raw in there.items()
    }
    assert (
        manifest["packages"] == {name: version(name) for name in ("networkx", "numpy", "pandas")}
        and manifest["absent"] == []
    )
    for task in tasks:
        assert manifest["tasks"][task.name][task.split] == {
            "documents": len(task.documents),
            "queries": len(task.queries),
        }
    for kind, counts in manifest["pretraining"].items():
        texts = pretraining_texts(folder, kind) + pretraining_texts(folder, kind, "validation")
        assert counts == {"texts": len(texts), "characters": sum(map(len, texts))} and texts
    assert manifest["vocabulary"] == len(load_tokenizer(folder)) == 1024


def test_the_tokens_of_all_documents_and_queries_are_there(small, tasks):
    texts = [text for task in tasks for text in (*task.documents.values(), *task.queries.values())]
    tokenizer = load_tokenizer(small[0])
    expected = tokenize_whole(texts, tokenizer)
    rows = token_rows.known(token_rows.use(tokenizer, small[0]))
    assert [rows.get(text).tolist() for text in texts] == expected
    assert len(rows.row_of) == len(set(texts))


def test_the_counts_that_are_kept_are_those_of_the_training_text_in_the_order_of_its_sample(small):
    """Each kind is counted until it has given half of the sample, texts whole but for the cut."""
    tokenizer = load_tokenizer(small[0])
    expected = np.zeros(len(tokenizer), dtype=int)
    for kind in ("short", "long"):
        texts, left = pretraining_texts(small[0], kind), word_vectors.SAMPLE / 2
        order = iter(np.random.default_rng(len(texts)).permutation(len(texts)))
        while left > 0 and (i := next(order, None)) is not None:
            row = tokenize_whole([texts[i]], tokenizer)[0][1:-1][: 8192 - 2]
            np.add.at(expected, row, 1)
            left -= len(row)
    found = token_rows.counts(tokenizer, small[0])
    assert found.tolist() == expected.tolist() and found.sum() > 10_000


def test_pretraining_text_keeps_whole_sources_for_validation(small):
    table = pq.read_table(small[0] / "pretrain.parquet").to_pydict()
    split_of = {}
    for source, split in zip(table["source"], table["split"]):
        assert split_of.setdefault(source, split) == split
    assert 0 < list(split_of.values()).count("validation") < len(split_of) / 10
    with pytest.raises(CorpusError, match="'tall': one of short, long"):
        pretraining_texts(small[0], "tall")
    with pytest.raises(CorpusError, match="'test': one of train, validation"):
        pretraining_texts(small[0], "short", "test")


# ---------------------------------------------------------------- the same bytes


def test_a_second_build_gives_the_same_bytes_and_leaves_nothing_of_the_first(small, tmp_path):
    folder = tmp_path / "corpus"
    build.build(folder, **SMALL | dict(packages=("networkx",), books=[256], files_per_package=20))
    assert "documents-train.parquet" in files(folder)
    (folder / "old.parquet").touch()
    build.build(folder, **SMALL)
    assert files(folder) == files(small[0])
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_another_process_gives_the_same_bytes(small, tmp_path):
    """Another hash seed, path, time zone, locale, home, umask and number of threads."""
    folder = tmp_path / "räum lich" / "corpus"
    folder.parent.mkdir()
    elsewhere(
        "import os; os.umask(0o77); from lib.corpus.build import build; "
        f"build({str(folder)!r}, **{SMALL!r})",
        12345,
        TZ="Pacific/Chatham",
        LC_ALL="C",
        HOME=str(folder.parent),
        RAYON_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    assert files(folder) == files(small[0])


def test_the_same_versions_give_the_same_content_on_every_machine(small):
    locked = dict(
        re.findall(r"(?m)^([a-z0-9-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text())
    )
    others = [
        f"{name} {version(name)}, not {locked[name]}"
        for name in READ
        if version(name) != locked[name]
    ]
    if others:
        pytest.skip(f"versions differ from requirements.lock: {'; '.join(others)}")
    assert small[1]["content"] == CONTENT, (
        "the corpus has changed, and the versions are those of requirements.lock: if lib/corpus or "
        f"the lock were changed on purpose, store the new hash; otherwise the text of "
        f"{', '.join(READ[:3])} depends on this machine or its Python"
    )


# ---------------------------------------------------------------- another source

DOCUMENTS = {"a": "red fox runs by night", "b": "green hen sleeps", "c": "blue owl"}
QUERIES = {"1": ("fox", ["a"]), "2": ("who sleeps", ["b", "c"])}


def table(
    folder: Path, split: str = "test", passages=DOCUMENTS, queries=QUERIES, evidence: bool = True
) -> Path:
    """A mirror in parquet."""
    folder.mkdir(exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "pid": list(passages),
                "dataset": ["toy"] * len(passages),
                "passage": list(passages.values()),
            }
        ),
        folder / f"documents-{split}.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "qid": list(queries),
                "dataset": ["toy"] * len(queries),
                "query": [query for query, _ in queries.values()],
                "answer_pids": [answers for _, answers in queries.values()],
            }
        ),
        folder / f"queries-{split}.parquet",
    )
    if evidence:
        pq.write_table(
            pa.table(
                {
                    "qid": ["1"],
                    "dataset": ["toy"],
                    "pid": ["a"],
                    "start_frac": [0.25],
                    "end_frac": [0.5],
                }
            ),
            folder / f"evidence-{split}.parquet",
        )
    return folder


def lines(folder: Path, name: str = "toy", split: str = "test") -> Path:
    """The same in the hub's files."""
    for kind, rows in (
        ("documents", [dict(pid=pid, passage=text) for pid, text in DOCUMENTS.items()]),
        (
            "queries",
            [
                dict(qid=qid, query=query, answer_pids=answers)
                for qid, (query, answers) in QUERIES.items()
            ],
        ),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{name}_{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return folder


def vocabulary(folder: Path, pieces: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789."
    (folder / "vocab.txt").write_text(
        "\n".join(
            [
                *SPECIAL,
                *letters,
                *("##" + letter for letter in letters),
                *(f"word{i}" for i in range(pieces)),
            ]
        )
        + "\n"
    )
    return folder


@pytest.fixture
def other(tmp_path):
    """A build's settings, from folders: a mirror, a text, a vocabulary; a test may spoil them."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The red fox runs by night. " * 20)
    return dict(
        source=str(table(tmp_path / "mirror")),
        pretraining=str(tmp_path / "text"),
        tokenizer=str(vocabulary(tmp_path / "vocabulary")),
        show_progress=False,
    )


def test_a_mirror_in_parquet_comes_out_as_it_went_in(other, tmp_path):
    table(
        tmp_path / "mirror",
        "train",
        passages={"x": "a hen"},
        queries={"9": ("hen", ["x"])},
        evidence=False,
    )
    manifest = build.build(tmp_path / "corpus", **other)
    assert manifest["tasks"] == {
        "toy": {"train": {"documents": 1, "queries": 1}, "test": {"documents": 3, "queries": 2}}
    }
    assert manifest["packages"] == {} and manifest["vocabulary"] == 5 + 2 * 37
    task = locov1.load("toy", tmp_path / "corpus")
    assert task == locov1.load("toy", tmp_path / "mirror")
    assert (task.documents, task.evidence) == (DOCUMENTS, {"1": ("a", 0.25, 0.5)}) and task.qrels[
        "2"
    ] == {"b": 1, "c": 1}
    assert locov1.load("toy", tmp_path / "corpus", "train").queries == {"9": "hen"}
    assert load_tokenizer(tmp_path / "corpus").convert_tokens_to_ids(list(SPECIAL)) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_what_is_common_in_a_collection_is_counted_in_its_own_train_documents(other, tmp_path):
    """The pretraining text knows foxes alone, train has owls, test has hens: owls are counted."""
    for split, word in (("train", "word1"), ("test", "word2")):
        passages, queries = {"x": f"{word} " * 30}, {"9": (word, ["x"])}
        table(tmp_path / "mirror", split, passages=passages, queries=queries, evidence=False)
    other |= {"tokenizer": str(vocabulary(tmp_path / "vocabulary", pieces=3))}
    build.build(tmp_path / "corpus", **other)
    tokenizer = load_tokenizer(tmp_path / "corpus")
    found = token_rows.counts(tokenizer, tmp_path / "corpus")
    texts = found[: 5 + 2 * 37].sum()
    train, test = found[tokenizer.convert_tokens_to_ids(["word1", "word2"])]
    assert 0 < texts and train == 30 and test == 0


def test_a_mirror_in_jsonl_comes_out_as_it_went_in(other, tmp_path):
    lines(lines(tmp_path / "lines"), "other")
    lines(tmp_path / "lines", "toy", "validation")
    manifest = build.build(tmp_path / "corpus", **other | dict(source=str(tmp_path / "lines")))
    assert {name: set(splits) for name, splits in manifest["tasks"].items()} == {
        "toy": {"validation", "test"},
        "other": {"test"},
    }
    for name in ("toy", "other"):
        assert locov1.load(name, tmp_path / "corpus") == locov1.load(name, tmp_path / "lines")
    assert locov1.load("other", tmp_path / "corpus").documents == DOCUMENTS


def test_a_graded_mirror_comes_out_as_it_went_in(other, tmp_path, task_files):
    documents = [dict(pid=pid, dataset="graded", passage=text) for pid, text in DOCUMENTS.items()]
    queries = [
        dict(qid="1", dataset="graded", query="fox", answer_pids={"a": 2, "b": 1, "c": 0}),
        dict(qid="2", dataset="graded", query="hen", answer_pids={"b": 1}),
    ]
    source = task_files(tmp_path / "graded", documents, queries, layout="beir")
    build.build(tmp_path / "corpus", **other | dict(source=str(source)))
    assert locov1.load("graded", tmp_path / "corpus") == locov1.load("graded", source)
    assert locov1.load("graded", tmp_path / "corpus").qrels == {
        "1": {"a": 2, "b": 1},
        "2": {"b": 1},
    }


def test_pretraining_text_and_tokenizer_of_ones_own(other, tmp_path):
    build.build(tmp_path / "corpus", **other | dict(tokenizer="embedded", vocabulary=100))
    assert pretraining_texts(tmp_path / "corpus", "short", held_out("a.txt")) == [
        "The red fox runs by night. " * 20
    ]
    assert {"fox", "night"} < load_tokenizer(tmp_path / "corpus").get_vocab().keys()
    build.build(
        tmp_path / "again", **other | dict(tokenizer=str(tmp_path / "corpus" / "tokenizer"))
    )
    first, again = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("corpus", "again")
    )
    assert again["content"] == first["content"]


def test_berts_own_files_give_a_tokenizer_that_pads_and_masks(tmp_path):
    """The hub's bert-base-uncased: tokenizer.json, and no special tokens in its configuration."""
    make_tokenizer(str(vocabulary(tmp_path / "bert")), [], 0).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer_config.json").write_text(
        '{"do_lower_case": true, "model_max_length": 512}'
    )
    tokenizer = make_tokenizer(str(tmp_path / "hub"), [], 0)
    assert [
        tokenizer.pad_token,
        tokenizer.unk_token,
        tokenizer.cls_token,
        tokenizer.sep_token,
        tokenizer.mask_token,
    ] == list(SPECIAL)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real sets are not beside the project")
def test_real_sets_load_with_their_counts():
    assert set(locov1.splits(REAL)) == set(SPLITS)
    task = locov1.load("qmsum", REAL)
    assert (len(task.queries), len(task.documents)) == (272, 272)
    assert all(len(pids) == 1 for pids in task.qrels.values())


# ---------------------------------------------------------------- what cannot be used


def spoil(name: str, text: str | bytes):
    """A build whose pretraining text has a file more."""

    def change(folder: Path) -> dict:
        path = folder / "text" / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return {}

    return change


def parquet(columns: dict, cut: int | None = None):
    def change(folder: Path) -> dict:
        path = folder / "text" / "b.parquet"
        pq.write_table(pa.table(columns), path)
        path.write_bytes(path.read_bytes()[:cut])
        return {}

    return change


def tokens(name: str, text: str | bytes):
    """A build with another tokenizer folder."""

    def change(folder: Path) -> dict:
        (folder / "tokens").mkdir()
        (folder / "tokens" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return dict(tokenizer=str(folder / "tokens"))

    return change


def emptied(folder: Path) -> dict:
    (folder / "text" / "a.txt").write_text(" \n")
    return {}


def no_test_split(folder: Path) -> dict:
    for path in list((folder / "mirror").iterdir()):
        path.rename(path.with_name(path.name.replace("test", "train")))
    return {}


def occupied(folder: Path) -> dict:
    (folder / "corpus").mkdir()
    (folder / "corpus" / "thesis.tex").touch()
    return {}


UNUSABLE = [
    (
        lambda folder: dict(natural=["page_deep", "tial"]),
        ["unknown task 'tial'", "page_deep, page_shallow, tail, digest"],
    ),
    (lambda folder: dict(books=[1024, 100]), ["books: 100 tokens", "512"]),
    (
        lambda folder: dict(source="embedded", packages=("no-such-owls",)),
        ["no-such-owls", "requirements.lock"],
    ),
    (occupied, ["corpus holds something else", "no manifest.json", "another folder"]),
    (
        lambda folder: dict(source=str(folder / "nowhere")),
        ["nowhere is no folder", "documents-<split>.parquet"],
    ),
    (no_test_split, ["mirror has no test split", "queries-test.parquet"]),
    (
        lambda folder: table(folder / "mirror", passages=DOCUMENTS | {"b": None}) and {},
        ["documents-test.parquet", "document 'b' of toy has a null passage"],
    ),
    (
        lambda folder: dict(pretraining=str(folder / "nowhere")),
        ["nowhere is no folder", "data.pretraining"],
    ),
    (emptied, ["text has no text", "a column `text`"]),
    (spoil("b.txt", "é".encode("latin-1")), ["text/b.txt cannot be read as UTF-8", "convert it"]),
    (spoil("b.jsonl", '{"text": "é"}\n'.encode("latin-1")), ["text/b.jsonl:1:", "no JSON object"]),
    (spoil("b.jsonl", '{"text": "owl"}\n{"text": null}\n'), ["text/b.jsonl: text 2 is null"]),
    (spoil("b.jsonl", '{"text": "owl"}\n\n{"text": "ow'), ["text/b.jsonl:3:", "no JSON object"]),
    (
        spoil("b.jsonl", '{"text": "owl"}\n{"txt": "owl"}\n'),
        ["text/b.jsonl:2: no JSON object with text"],
    ),
    (spoil("b.jsonl", '{"text": "owl"}\n["owl"]\n'), ["text/b.jsonl:2: no JSON object with text"]),
    (spoil("b.jsonl", "[" * 100_000), ["text/b.jsonl:1:", "no JSON object"]),
    (spoil("b.parquet", b""), ["text/b.parquet cannot be read"]),
    (parquet({"text": ["owl"] * 9}, cut=-40), ["text/b.parquet cannot be read", "fetch it again"]),
    (parquet({"txt": ["owl"]}), ["text/b.parquet has no column text"]),
    (parquet({"text": ["owl", None]}), ["text/b.parquet: text 2 is null"]),
    (parquet({"text": [1, 2]}), ["text/b.parquet: text 1 is int"]),
    (
        lambda folder: dict(tokenizer=str(folder / "nowhere")),
        ["nowhere has neither vocab.txt nor tokenizer.json"],
    ),
    (
        lambda folder: dict(tokenizer=str(folder / "text")),
        ["text has neither vocab.txt nor tokenizer.json"],
    ),
    (tokens("vocab.txt", "[PAD]\n[UNK]\n[CLS]\nowl\n"), ["tokens/vocab.txt has no [SEP], [MASK]"]),
    (tokens("vocab.txt", ""), ["tokens/vocab.txt has no [PAD], [UNK]"]),
    (tokens("vocab.txt", "é\n".encode("latin-1")), ["tokens/vocab.txt", "UTF-8"]),
    (tokens("tokenizer.json", '{"version": "1.0", "trunc'), ["tokens", "tokenizer.json"]),
    (tokens("tokenizer.json", "{}"), ["tokens", "tokenizer.json"]),
]


@pytest.mark.parametrize("change, parts", UNUSABLE, ids=[parts[0] for _, parts in UNUSABLE])
def test_what_cannot_be_used_is_named_in_one_line_and_nothing_is_written(
    other, tmp_path, change, parts
):
    options = other | change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorpusError) as error:
        build.build(tmp_path / "corpus", **options)
    assert "\n" not in str(error.value)
    for some in parts:
        assert some in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lone_surrogate_is_replaced_or_named(other, tmp_path):
    """JSON can spell half a character, which no file can hold."""
    spoil("b.jsonl", '{"text": "the red \\ud800 fox"}\n')(tmp_path)
    try:
        build.build(tmp_path / "corpus", **other)
    except CorpusError as error:
        assert "b.jsonl" in str(error)
    else:
        assert "the red \ufffd fox" in [
            *pretraining_texts(tmp_path / "corpus", "short"),
            *pretraining_texts(tmp_path / "corpus", "short", "validation"),
        ]


def test_a_lone_surrogate_of_a_mirror_is_replaced_or_named(other, tmp_path):
    path = lines(tmp_path / "lines") / "documents" / "toy_test.jsonl"
    path.write_text(path.read_text().replace("blue owl", "blue \\ud800 owl"))
    try:
        build.build(tmp_path / "corpus", **other | dict(source=str(tmp_path / "lines")))
    except CorpusError as error:
        assert "toy_test.jsonl" in str(error) or "'c'" in str(error)
    else:
        assert locov1.load("toy", tmp_path / "corpus").documents["c"] == "blue \ufffd owl"


# ---------------------------------------------------------------- writing


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def old(other, tmp_path):
    """A corpus that is there, and the settings of the next, which has another text."""
    build.build(tmp_path / "corpus", **other)
    (tmp_path / "text" / "b.txt").write_text("And another.")
    return files(tmp_path / "corpus")


def refused(other, tmp_path, old) -> str:
    """The message of a build that fails and leaves all as it was."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CorpusError) as error:
        build.build(tmp_path / "corpus", **other)
    assert files(tmp_path / "corpus") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(error.value)


def test_a_corpus_that_cannot_take_its_place_leaves_the_old_one(other, tmp_path, old, monkeypatch):
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, full)
    assert "corpus cannot be written (No space left on device)" in refused(other, tmp_path, old)


def test_a_failure_at_the_last_step_leaves_the_old_corpus(other, tmp_path, old, monkeypatch):
    """The draft fails to take the folder's name, once; what is moved aside before may move back."""
    failed = []

    def once(move):
        def moved(source, target, **options):
            if Path(target) == tmp_path / "corpus" and not failed:
                failed.append(source)
                full()
            move(source, target, **options)

        return moved

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, once(getattr(os, name)))
    refused(other, tmp_path, old)
    assert len(failed) == 1


@pytest.mark.parametrize("name", ["save", "counts"])
def test_a_full_disk_leaves_the_old_corpus_and_no_draft(other, tmp_path, old, monkeypatch, name):
    monkeypatch.setattr(build, name, full)
    assert "No space left on device" in refused(other, tmp_path, old)


@pytest.mark.parametrize("limit", [100, 20_000], ids=["tables", "tokenizer"])
def test_a_file_that_cannot_grow_leaves_the_old_corpus_and_no_draft(other, tmp_path, limit):
    """The system's own refusal, which the libraries that write report in their own ways."""
    vocabulary(
        tmp_path / "vocabulary", pieces=5_000
    )  # its tokenizer.json has 100 kB, the tables have less than one
    build.build(tmp_path / "corpus", **other)
    old = files(tmp_path / "corpus")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        error = pytest.raises(CorpusError, build.build, tmp_path / "corpus", **other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value)
    assert files(tmp_path / "corpus") == old and not list(tmp_path.glob(".corpus*"))


def test_an_interrupted_write_leaves_the_old_corpus_and_no_draft(other, tmp_path, old, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path / "corpus", **other)
    assert files(tmp_path / "corpus") == old and not list(tmp_path.glob(".corpus*"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_no_write_permission_names_the_folder(other, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(CorpusError, match="shut/corpus cannot be written .Permission denied"):
        build.build(tmp_path / "shut" / "corpus", **other)


def test_a_file_in_the_folders_place_stays(other, tmp_path):
    (tmp_path / "corpus").write_text("mine")
    with pytest.raises(CorpusError, match="corpus"):
        build.build(tmp_path / "corpus", **other)
    assert (tmp_path / "corpus").read_text() == "mine" and not list(tmp_path.glob(".corpus*"))


def test_an_empty_folder_and_missing_parents_are_welcome(other, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "far" / "away"):
        build.build(folder, **other)
        assert (folder / "manifest.json").is_file() and (folder.stat().st_mode & 0o777) == 0o755
    shutil.rmtree(tmp_path / "far")
