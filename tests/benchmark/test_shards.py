"""A collection embedded in shards has the bits of one process, or is refused."""

import json
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.benchmark import encoder as encoders
from lib.benchmark import rankers, shards
from lib.benchmark.encoder import Encoder, unit
from lib.benchmark.shards import ShardedEncoder, ShardError
from lib.model import checkpoint
from lib.model.m2bert import M2BertForMaskedLM
from lib.pipeline import params

WORDS = "red green blue fox hen owl runs sleeps the by night day unbelievable foxes".split()
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, size=length)) for length in RNG.integers(0, 45, size=83)]


@pytest.fixture
def retriever(tiny, tokenizer, tmp_path):
    """The folder of a tiny retriever that reads 32 tokens."""
    checkpoint.save(tiny(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small(monkeypatch):
    """Batches of at most 70 tokens, of blocks of 20 texts: 83 texts are five blocks."""
    monkeypatch.setattr(encoders, "BATCH_TOKENS", 70)
    monkeypatch.setattr(encoders, "BLOCK", 20)
    monkeypatch.setattr(shards, "BLOCK", 20)


@pytest.fixture
def embed(retriever, tmp_path, small):
    """embed("2/3", …): the command line in this process, over TEXTS and into the folder `out`."""
    file, out = tmp_path / "texts.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"passage": text}) + "\n" for text in TEXTS))

    def command(shard: str, *options: str) -> int:
        threads = f"--threads={torch.get_num_threads()}"
        places = map(str, (retriever, file, out))
        return shards.main(["embed", *places, f"--shard={shard}", threads, *options])

    return command


def of_one_process(folder, **options) -> tuple[Encoder, np.ndarray]:
    encoder = Encoder(*checkpoint.load(folder), truncate=True, **options)
    return encoder, encoder.encode_documents(TEXTS, show_progress=False)[0]


# ------------------------------------------------------------------ the bits of one process


def test_two_processes_give_the_bits_of_one(retriever):
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 12)]  # 20,000 tokens: two batches
    encoder = Encoder(*checkpoint.load(retriever), truncate=True, max_length=24)
    vectors, owner = encoder.encode_documents(texts, show_progress=False)
    sharded = ShardedEncoder(retriever, 2, encoder.model, encoder.tokenizer).limited(24)
    same, same_owner = sharded.encode_documents(texts, show_progress=False)
    assert same.dtype == np.float32 and same.tobytes() == vectors.tobytes()
    assert same_owner.tolist() == owner.tolist()
    assert sharded.longer == encoder.longer and 0 < sum(encoder.longer) < len(texts)
    assert sharded.context_length == 24


@pytest.mark.parametrize(
    "count, precision", [(1, "float32"), (2, "float32"), (7, "float32"), (3, "bfloat16")]
)
def test_any_number_of_shards_gives_the_bits_of_one_process(
    retriever, embed, tmp_path, count, precision
):
    for number in reversed(range(1, count + 1)):
        assert embed(f"{number}/{count}", f"--precision={precision}") == 0
    path, longer = shards.merge(tmp_path / "out")
    encoder, vectors = of_one_process(retriever, precision=precision)
    assert np.load(path, allow_pickle=False).tobytes() == vectors.tobytes()
    assert longer.tolist() == encoder.longer


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("count", [4, 60])  # 60: more shards than batches
def test_shards_are_whole_batches_padded_or_not(retriever, small, engine, count):
    encoder, _ = of_one_process(retriever)
    encoder.engine = encoder.engine if engine else None  # None, as on a GPU: padded by the model
    vectors, _ = encoder.encode_documents(TEXTS, batch_size=3, show_progress=False)
    job = job_of(len(TEXTS), count, batch_size=3)
    pieces = [shards.shard_of(encoder, TEXTS, job, number + 1) for number in range(count)]
    assert sorted(i for texts, _, _ in pieces for i in texts) == list(range(len(TEXTS)))
    for texts, part, _ in pieces:
        assert part.tobytes() == vectors[texts].tobytes()


def job_of(total: int, count: int, batch_size: int = 32) -> shards.Job:
    names = dict.fromkeys(("texts_sha256", "model_sha256", "precision", "device"), "")
    sizes = dict(shards=count, total=total, max_length=32, batch_size=batch_size)
    return shards.Job(**names, **sizes)


def test_a_block_is_sorted_by_itself(retriever, small):
    encoder, vectors = of_one_process(retriever)
    lengths = np.random.default_rng(1).integers(2, 33, size=83)
    batches = encoder.batches(lengths, 32)
    assert sorted(np.concatenate(batches)) == list(range(83))
    assert all(len(set(batch // 20)) == 1 and lengths[batch].sum() <= 70 for batch in batches)
    first = encoder.encode_documents(TEXTS[:40], show_progress=False)[0]
    assert first.tobytes() == vectors[:40].tobytes()


@pytest.mark.parametrize("rows", [1, 2, 31, 700])
def test_a_vectors_norm_is_that_of_the_row_alone(rows):
    vectors = np.random.default_rng(rows).normal(size=(rows, 768)).astype(np.float32)
    assert unit(vectors[rows // 2 :]).tobytes() == unit(vectors)[rows // 2 :].tobytes()


# ------------------------------------------------------------------ where shards are cut


@given(total=st.integers(0, 10**8), count=st.integers(1, 60))
def test_shards_divide_the_blocks_and_read_few_of_them(total, count):
    blocks = -(-total // shards.BLOCK)
    assigned: dict[int, list] = {block: [] for block in range(blocks)}
    for number in range(1, count + 1):
        parts = list(shards.parts(total, number, count))
        assert len(parts) <= blocks / count + 2
        for block, start, end in parts:
            assigned[block].append((start, end))
    for pieces in assigned.values():  # one after another, from 0 to the block's end
        assert [start for start, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
        assert pieces[-1][1] == count


def test_shards_of_a_block_have_equal_tokens_to_within_a_batch(retriever, small, monkeypatch):
    monkeypatch.setattr(encoders, "BLOCK", 10**6)
    encoder, _ = of_one_process(retriever)
    lengths = np.random.default_rng(2).integers(2, 33, size=500)
    job = job_of(500, 4)
    pieces = [shards.share(encoder, lengths, job, k, k + 1) for k in range(4)]
    tokens = [sum(lengths[batch].sum() for batch in piece) for piece in pieces]
    assert sum(tokens) == lengths.sum() and max(tokens) - min(tokens) <= 140
    assert sorted(i for piece in pieces for batch in piece for i in batch) == list(range(500))


@given(st.sets(st.integers(0, 60)))
def test_runs_are_the_numbers_in_fewer_words(numbers):
    array = np.array(sorted(numbers), dtype=np.int64)
    runs = shards.runs(array)
    assert shards.numbers_of(runs).tolist() == array.tolist()
    assert len(runs) == sum(number - 1 not in numbers for number in numbers)


# ------------------------------------------------------------------ missing and damaged shards


def test_the_command_of_a_missing_shard_makes_it(retriever, embed, tmp_path, capsys):
    assert embed("1/3", "--max-length=9") == embed("3/3", "--max-length=9") == 0
    capsys.readouterr()
    assert shards.main(["merge", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out/vectors.npy").exists()
    message = capsys.readouterr().err
    assert "shard 2 of 3 is missing or damaged (1 such); this makes it: python -m" in message
    command = shlex.split(message.partition("this makes it: ")[2])
    assert command[:3] == ["python", "-m", "lib.benchmark.shards"]
    assert shards.main(command[3:]) == shards.main(["merge", str(tmp_path / "out")]) == 0
    encoder, vectors = of_one_process(retriever, max_length=9)
    assert np.load(tmp_path / "out/vectors.npy").tobytes() == vectors.tobytes()
    assert f"83 texts, of which {sum(encoder.longer)} were cut" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["2-of-3.npy", "2-of-3.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:]])
def test_a_damaged_shard_is_an_error_and_is_made_again(embed, tmp_path, name, damage):
    out = tmp_path / "out"
    assert [embed(f"{number}/3") for number in (1, 2, 3)] == [0, 0, 0]
    intact = (out / name).read_bytes()
    (out / name).write_bytes(damage(intact.rstrip()))
    with pytest.raises(ShardError, match="shard 2 of 3 is missing or damaged"):
        shards.merge(out)
    assert embed("2/3") == 0
    assert (out / name).read_bytes() == intact
    shards.merge(out)


def test_a_whole_shard_is_not_made_again(embed, tmp_path, monkeypatch):
    assert embed("1/2") == 0
    monkeypatch.setattr(Encoder, "forward", lambda *_: pytest.fail("a text is embedded again"))
    assert embed("1/2") == 0


def test_a_full_disk_leaves_no_shard(embed, tmp_path, monkeypatch, capsys):
    def fill(file, *_, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fill)
    assert embed("1/2") == 1
    assert "1-of-2.npy" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_a_copy_under_another_number_is_no_shard(embed, tmp_path):
    assert embed("1/2") == 0
    for suffix in (".npy", ".json"):
        path = tmp_path / "out" / f"1-of-2{suffix}"
        shutil.copy(path, path.with_name(f"2-of-2{suffix}"))
    with pytest.raises(ShardError, match="shard 2 of 2 is missing or damaged"):
        shards.merge(tmp_path / "out")


def test_texts_that_are_in_no_shard_or_in_two_are_an_error(embed, tmp_path):
    assert embed("1/2") == embed("2/2") == 0
    path = tmp_path / "out/2-of-2.json"
    record = json.loads(path.read_text())
    record["texts"][0][0] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(ShardError, match="do not hold each of 83 texts once"):
        shards.merge(tmp_path / "out")


# ------------------------------------------------------------------ other collections


def test_shards_of_two_jobs_are_not_joined(embed, tmp_path, capsys):
    assert embed("1/2") == 0
    assert embed("1/2", "--max-length=8") == 1
    assert "is a shard with max_length 32, not 8: give another folder" in capsys.readouterr().err
    assert embed("2/2", "--max-length=8") == 0
    with pytest.raises(ShardError, match="2-of-2.npy is a shard with max_length 8, not 32"):
        shards.merge(tmp_path / "out")


def test_another_text_or_model_is_another_job(embed, retriever, tmp_path, tiny, tokenizer, capsys):
    assert embed("1/2") == 0
    checkpoint.save(tiny(hidden_size=32), tokenizer, retriever)
    assert embed("1/2") == 1
    assert "is a shard with model_sha256" in capsys.readouterr().err
    (tmp_path / "texts.jsonl").write_text(json.dumps({"passage": "red"}) + 82 * '\n{"passage": ""}')
    assert embed("1/2") == 1
    assert "is a shard with texts_sha256" in capsys.readouterr().err
    (tmp_path / "texts.jsonl").write_text("")
    assert embed("1/2") == 1
    assert "is a shard with total 83, not 0" in capsys.readouterr().err


def test_no_texts_keep_the_width(embed, tmp_path):
    (tmp_path / "texts.jsonl").write_text("")
    assert embed("1/2") == embed("2/2") == 0
    path, longer = shards.merge(tmp_path / "out")
    assert np.load(path).shape == (0, 16) and len(longer) == 0


def test_a_folder_with_two_numbers_of_shards_or_none_is_refused(embed, tmp_path):
    with pytest.raises(ShardError, match="holds no shard"):
        shards.merge(tmp_path / "out")
    assert embed("1/1") == embed("1/2") == 0
    with pytest.raises(ShardError, match="holds shards of 1 and of 2"):
        shards.merge(tmp_path / "out")


# ------------------------------------------------------------------ input


def test_beirs_documents_have_their_titles(tmp_path):
    lines = [{"_id": "1", "title": "Owls", "text": "sleep by day"}, {"_id": "2", "text": "red"}]
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert list(shards.texts_of(file)) == ["Owls\nsleep by day", "red"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"passage": 7}', "text 83 is no string"),
        ('{"text": "red"}', "texts.jsonl:84: no JSON object with passage"),
        ("red", "texts.jsonl:84: no JSON object"),
    ],
)
def test_a_line_that_is_no_text_is_named(embed, tmp_path, capsys, line, message):
    with open(tmp_path / "texts.jsonl", "a") as file:
        file.write(line)
    assert embed("1/1") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/0", "-1/3", "a/b"])
def test_a_wrong_number_is_refused(embed, shard, capsys):
    with pytest.raises(SystemExit):
        embed(shard)
    assert "the third of eight is 3/8" in capsys.readouterr().err


def test_what_is_no_retriever_is_refused(embed, retriever, tiny, tokenizer, capsys, tmp_path):
    checkpoint.save(tiny(M2BertForMaskedLM), tokenizer, retriever)
    assert embed("1/2") == 1
    assert "is no retriever: give the folder of a fine-tuned model" in capsys.readouterr().err
    shutil.rmtree(retriever)
    assert embed("1/2") == 1
    assert "is no model folder" in capsys.readouterr().err


def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "no room" >&2\ncase "$*" in *=2/3) exit 1; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ShardError, match="process 2 of 3 that embed failed: no room"):
        shards.launch(["embed"], 3, tmp_path, show_progress=False)


@pytest.mark.parametrize("processes, kind", [(1, Encoder), (2, ShardedEncoder)])
def test_a_row_is_embedded_by_the_processes_of_its_profile(house, tiny, tokenizer, processes, kind):
    text = (house / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("processes: 1", f"processes: {processes}")
    (house / "params.yaml").write_text(text, encoding="utf-8")
    checkpoint.save(tiny(), tokenizer, params.data("smoke") / "models/opl")
    assert type(rankers.of("smoke", "opl")) is kind
