"""A collection embedded in shards, by several processes or machines, to the bits of one.

    python -m lib.benchmark.shards embed MODEL TEXTS OUT --shard 3/8    the vectors of one shard
    python -m lib.benchmark.shards merge OUT                            all of them: OUT/vectors.npy
    ShardedEncoder(folder, processes, model, tokenizer)                 an `Encoder` that does both

MODEL is the folder of a retriever, TEXTS a .jsonl file in the form of BEIR's corpus.jsonl or of
LoCoV1's documents. A shard is two files: OUT/3-of-8.npy, float32 (M, D), and OUT/3-of-8.json, which
says whose vectors these are and has their sha256. A shard that is whole is not made again.

The last bits of a vector depend on the batch that its text is in. Therefore shards are cut between
the batches that one process would make: texts are taken BLOCK at a time, and a shard is whole
batches of one block or several. Its boundaries depend on the texts and on the number of shards. A
process tokenises only the blocks that its shard has a part of. The bits are equal if the processor
or GPU, the number of threads and the versions of the libraries are.

Axes: N texts, M of them in a shard, D width.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from lib.benchmark.encoder import BLOCK, Encoder, lengths_of, unit
from lib.benchmark.sources import Beir, read_jsonl
from lib.model import checkpoint
from lib.model.device import use
from lib.model.m2bert import M2BertForRetrieval
from lib.pipeline import files
from lib.pipeline.errors import WorkbenchError, require
from lib.pipeline.progress import bar
from lib.pipeline.settings import Amount, Count

Runs = list[tuple[Amount, Count]]  # of neighbouring numbers: (the first, how many)


class ShardError(WorkbenchError):
    """A shard is missing, damaged, or of another collection; the message says how to make it."""


class Job(BaseModel, extra="forbid", strict=True):
    """What all shards of a collection have in common."""

    shards: Count
    total: Amount  # texts of the collection
    texts_sha256: str
    model_sha256: str  # of training.json, which has the sha256 of every file of the model
    max_length: Count
    batch_size: Count
    precision: str
    device: str


class Shard(BaseModel, extra="forbid", strict=True):
    """The .json file of a shard."""

    number: Count
    job: Job
    texts: Runs  # whose vectors these are, in this order
    longer: Runs  # those of them that have more than max_length tokens
    sha256: str  # of the .npy file
    command: list[str]  # that made it, without the number of the shard


# ------------------------------------------------------------------ embed


def embed(encoder: Encoder, job: Job, file: Path, out: Path, number: int, command=()) -> Path:
    """Make shard `number` of a job, unless it is there and whole; the path of its vectors.

    Args:
        command: that makes the shard, without its number, for messages of `merge`.

    Raises:
        ShardError: `out` holds this shard of another job, or a vector is not finite.
    """
    path = path_of(out, number, job.shards)
    known = whole(out, number, job.shards)
    if known is not None:
        check_same(job, known.job, path)
        return path
    texts, vectors, longer = shard_of(encoder, texts_of(file), job, number)
    bad = texts[~np.isfinite(vectors).all(axis=1)].tolist()
    if bad:
        reason = "is not finite: the model's weights are damaged, or too large for 16 bits"
        raise ShardError(f"{file}: the embedding of text {bad[0]} {reason}")
    with files.replacing_file(path) as draft:
        with open(draft, "wb") as opened:
            np.save(opened, vectors, allow_pickle=False)
        checksum = files.sha256(draft)
    lists = dict(texts=runs(texts), longer=runs(texts[longer]))
    shard = Shard(number=number, job=job, sha256=checksum, command=list(command), **lists)
    files.write(path.with_suffix(".json"), shard.model_dump_json() + "\n")
    return path


def shard_of(
    encoder: Encoder, texts: Iterable[str], job: Job, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers of a shard's texts, ascending, (M,); their unit vectors, (M, D); who is longer.

    Args:
        texts: all texts of the collection; those of other blocks are passed over.
    """
    texts, reached = iter(texts), 0
    width = encoder.model.config.hidden_size
    numbers, longer = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
    vectors = [np.zeros((0, width), dtype=np.float32)]
    progress = bar(total=-(-job.total // job.shards), desc=f"shard {number}/{job.shards}")
    for block, start, end in parts(job.total, number, job.shards):
        first = block * BLOCK
        held = list(islice(texts, first - reached, first - reached + BLOCK))
        reached = first + BLOCK
        ids = [row for (row,) in encoder.tokenize(held)]
        for batch in share(encoder, lengths_of(ids), job, start, end):
            numbers.append(first + batch)
            vectors.append(encoder.forward([ids[i] for i in batch]))
            longer.append(np.array(encoder.longer)[batch])
            progress.update(len(batch))
    progress.close()
    order = np.argsort(np.concatenate(numbers))
    numbers, vectors, longer = (np.concatenate(kind)[order] for kind in (numbers, vectors, longer))
    return numbers, unit(vectors), longer


def parts(total: int, number: int, shards: int) -> Iterator[tuple[int, int, int]]:
    """The blocks that a shard has a part of: (block, start, end), in `shards`-ths of the block.

    All blocks in a row are cut into equal parts, one per shard.
    """
    blocks = -(-total // BLOCK)
    first, last = (number - 1) * blocks, number * blocks  # in shards-ths of a block
    for block in range(first // shards, -(-last // shards)):
        yield block, max(first - block * shards, 0), min(last - block * shards, shards)


def share(
    encoder: Encoder, lengths: np.ndarray, job: Job, start: int, end: int
) -> list[np.ndarray]:
    """The batches of a block that begin in its part from start/shards to end/shards of the tokens.

    Each batch is in one shard, and a shard has its part of the tokens to within one batch.
    """
    batches = encoder.batches(lengths, job.batch_size)
    tokens = np.array([encoder.read_tokens(lengths[batch]).sum() for batch in batches])
    begins, total = (np.cumsum(tokens) - tokens) * job.shards, tokens.sum()
    inside = (start * total <= begins) & (begins < end * total)
    return [batches[i] for i in np.flatnonzero(inside)]


def texts_of(file: str | Path) -> Iterator[str]:
    """The documents of a .jsonl file: BEIR's `text` (after its title), or LoCoV1's `passage`.

    Raises:
        CorpusError: a line is in neither form; it is named.
    """
    ours = "passage" in next(read_jsonl(file, ()), ())
    for number, row in enumerate(read_jsonl(file, ("passage",)) if ours else Beir.documents(file)):
        is_text = isinstance(row["passage"], str)
        require(is_text, f"{file}: text {number} is no string: give it one, or take it out")
        yield row["passage"]


def runs(numbers: np.ndarray) -> Runs:
    """Ascending numbers as runs of neighbours, [(the first, how many)]."""
    pieces = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces if len(piece)]


def numbers_of(runs: Runs) -> np.ndarray:
    """The numbers of which these are the runs."""
    pieces = [np.arange(first, first + count) for first, count in runs]
    return np.concatenate([np.zeros(0, dtype=np.int64), *pieces])


# ------------------------------------------------------------------ merge


def merge(out: str | Path) -> tuple[Path, np.ndarray]:
    """Write OUT/vectors.npy, float32 (N, D), row i the unit vector of text i, whole or not at all.

    Returns:
        The file's path, and which texts are longer than the encoder reads, (N,).

    Raises:
        ShardError: a shard is missing or damaged (the message has the command that makes it), the
            shards are of more than one job, or a text is in no shard or in two.
    """
    out = Path(out)
    shards = checked(out)
    longer = np.zeros(shards[0].job.total, dtype=bool)
    with files.replacing_file(out / "vectors.npy") as draft:
        vectors = None
        for shard in shards:
            path = path_of(out, shard.number, shard.job.shards)
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            if vectors is None:
                shape = (len(longer), part.shape[1])
                vectors = np.lib.format.open_memmap(draft, "w+", dtype=np.float32, shape=shape)
            row = 0
            for first, count in shard.texts:
                vectors[first : first + count] = part[row : row + count]
                row += count
            longer[numbers_of(shard.longer)] = True
        vectors.flush()
    return out / "vectors.npy", longer


def checked(out: Path) -> list[Shard]:
    """All shards of a folder, after a check that each is there, whole, and of one job."""
    names = (re.fullmatch(r"(\d+)-of-([1-9]\d*)", path.stem) for path in out.glob("*-of-*.json"))
    counts = sorted({int(name[2]) for name in names if name})
    several = f"shards of {' and of '.join(map(str, counts))}: delete those of the wrong number"
    problem = several if counts else "no shard: `embed` makes them"
    require(len(counts) == 1, f"{out} holds {problem}", ShardError)
    shards = {number: whole(out, number, counts[0]) for number in range(1, counts[0] + 1)}
    found = [shard for shard in shards.values() if shard is not None]
    require(found, f"{out} holds no whole shard: `embed` makes them again", ShardError)
    for shard in found:
        check_same(found[0].job, shard.job, path_of(out, shard.number, counts[0]))
    lost = [number for number, shard in shards.items() if shard is None]
    if lost:
        command = shlex.join([*found[0].command, f"--shard={lost[0]}/{counts[0]}"])
        problem = f"shard {lost[0]} of {counts[0]} is missing or damaged ({len(lost)} such)"
        raise ShardError(f"{out}: {problem}; this makes it: {command}")
    check_complete(found, out)
    return found


def check_same(job: Job, other: Job, path: Path) -> None:
    """Refuse a shard, `path`, of another collection, model or option."""
    for key, value in job:
        theirs = getattr(other, key)
        way = "give another folder, or delete the shards that are not wanted"
        message = f"{path} is a shard with {key} {theirs}, not {value}: {way}"
        require(value == theirs, message, ShardError)


def check_complete(shards: list[Shard], out: Path) -> None:
    """Refuse shards that do not hold each text once."""
    total, pieces = shards[0].job.total, [run for shard in shards for run in shard.texts]
    times = np.zeros(total, dtype=np.uint8)
    for first, count in pieces:
        times[first : first + count] += 1
    once = (times == 1).all() and sum(count for _, count in pieces) == total
    cause = "a machine had another version of a library; embed all shards again with one version"
    require(once, f"{out}: the shards do not hold each of {total} texts once: {cause}", ShardError)


def whole(out: Path, number: int, shards: int) -> Shard | None:
    """The record of a shard; None if it is missing or damaged, or its vectors are."""
    path = path_of(out, number, shards)
    try:
        shard = Shard.model_validate_json(path.with_suffix(".json").read_bytes())
        intact = shard.sha256 == files.sha256(path)
    except (FileNotFoundError, ValidationError):
        return None
    return shard if intact and (shard.number, shard.job.shards) == (number, shards) else None


def path_of(out: str | Path, number: int, shards: int) -> Path:
    return Path(out) / f"{number}-of-{shards}.npy"


# ------------------------------------------------------------------ several processes


class ShardedEncoder(Encoder):
    """An encoder whose documents are embedded by several processes of this machine, to its bits.

    Args:
        folder: of the model, from which each process loads it.
        processes: the number of processes and of shards. Each has this process's number of threads
            and, if there are GPUs, one of them.
        model, tokenizer, options: of `Encoder`. Longer texts are truncated.
    """

    def __init__(self, folder: str | Path, processes: int, model, tokenizer, **options):
        super().__init__(model, tokenizer, truncate=True, **options)
        self.folder, self.processes = Path(folder).resolve(), processes

    def limited(self, first_tokens: int) -> "ShardedEncoder":
        """The same encoder with a context of at most `first_tokens`."""
        length = min(first_tokens, self.max_length)
        options = dict(max_length=length, precision=self.precision, engine=self.engine)
        return ShardedEncoder(self.folder, self.processes, self.model, self.tokenizer, **options)

    def encode_documents(
        self, texts: list[str], batch_size: int = 32, show_progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Encoder.encode_documents`.

        Raises:
            ShardError: a process fails; the message is its own.
        """
        options = {
            "max-length": self.max_length,
            "batch-size": batch_size,
            "precision": self.precision,
            "device": next(self.model.parameters()).device.type,
            "threads": torch.get_num_threads(),
        }
        with tempfile.TemporaryDirectory(prefix="shards-") as folder:
            out, file = Path(folder), Path(folder, "texts.jsonl")
            with open(file, "w", encoding="utf-8") as opened:
                opened.writelines(json.dumps({"passage": text}) + "\n" for text in texts)
            arguments = ["embed", str(self.folder), str(file), str(out)]
            arguments += [f"--{name}={value}" for name, value in options.items()]
            launch(arguments, self.processes, out, show_progress)
            path, longer = merge(out)
            self.longer = longer.tolist()
            return np.load(path, allow_pickle=False), np.arange(len(texts))


def launch(arguments: list[str], processes: int, out: Path, show_progress: bool) -> None:
    """Make all shards at once, a process each.

    Raises:
        ShardError: one fails; with the last line that it said.
    """
    command = [sys.executable, "-m", "lib.benchmark.shards", *arguments]
    logs = [out / f"{number}.log" for number in range(1, processes + 1)]
    running: list[subprocess.Popen] = []
    try:
        for number, log in enumerate(logs, start=1):
            shard = [*command, f"--shard={number}/{processes}"]
            options = dict(cwd=Path(__file__).parents[2], env=os.environ | gpu(number - 1))
            with open(log, "wb") as opened:
                running.append(subprocess.Popen(shard, stdout=opened, stderr=opened, **options))
        waited = bar(total=processes, desc="shards", show=show_progress)
        for process in running:
            process.wait()
            waited.update()
        waited.close()
    finally:
        for process in running:
            process.kill()
            process.wait()
    for number, (process, log) in enumerate(zip(running, logs), start=1):
        said = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "it was killed")
        message = f"process {number} of {processes} that embed failed: {last}"
        require(process.returncode == 0, message, ShardError)


def gpu(index: int) -> dict[str, str]:
    """The environment in which a process sees one of this process's GPUs; {} without GPUs."""
    count = torch.cuda.device_count()
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[index % count]}


# ------------------------------------------------------------------ command line


def main(arguments: list[str]) -> int:
    """Run a command. The exit code: 0; 1 after one line about what is wrong; 2 after the usage."""
    options = parser().parse_args(arguments)
    try:
        print((merged if options.command == "merge" else embedded)(options))
    except (ValueError, OSError) as error:
        name = getattr(error, "filename", None)
        print(f"{name}: {error.strerror}" if name else error, file=sys.stderr)
        return 1
    return 0


def embedded(options: argparse.Namespace) -> str:
    """Make one shard of a collection."""
    threads = options.threads or torch.get_num_threads()
    device = use({"device": options.device, "threads": threads})
    model, tokenizer = checkpoint.load(options.model)
    message = f"{options.model} is no retriever: give the folder of a fine-tuned model"
    require(isinstance(model, M2BertForRetrieval) and tokenizer, message, ShardError)
    limits = dict(max_length=options.max_length, precision=options.precision)
    encoder = Encoder(model.to(device), tokenizer, truncate=True, **limits)
    number, shards = options.shard
    with open(options.texts, "rb") as file:
        total = sum(bool(line.strip()) for line in file)
    job = Job(
        shards=shards,
        total=total,
        texts_sha256=files.sha256(options.texts),
        model_sha256=files.sha256(options.model / "training.json"),
        max_length=encoder.max_length,
        batch_size=options.batch_size,
        precision=encoder.precision,
        device=device.type,
    )
    command = ["python", "-m", "lib.benchmark.shards", "embed"]
    command += map(str, (options.model, options.texts, options.out))
    for key in ("max_length", "batch_size", "precision", "device"):
        command.append(f"--{key.replace('_', '-')}={getattr(job, key)}")
    return str(embed(encoder, job, options.texts, options.out, number, command))


def merged(options: argparse.Namespace) -> str:
    """Join all shards of a folder."""
    path, longer = merge(options.out)
    return f"{path}: {len(longer)} texts, of which {longer.sum()} were cut"


def parser() -> argparse.ArgumentParser:
    reader = argparse.ArgumentParser(prog="python -m lib.benchmark.shards")
    commands = reader.add_subparsers(dest="command", required=True)
    one = commands.add_parser("embed", help="make one shard")
    one.add_argument("model", type=Path, help="the folder of a retriever, such as data/models/opl")
    one.add_argument("texts", type=Path, help="BEIR's corpus.jsonl, or documents of LoCoV1")
    one.add_argument("out", type=Path, help="the folder of the shards, of all machines")
    one.add_argument("--shard", type=shard_number, required=True, help="3/8: the third of eight")
    one.add_argument("--max-length", type=positive, help="tokens read of a text (all that fit)")
    one.add_argument("--batch-size", type=positive, default=32, help="of padded texts, at most")
    one.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    one.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    one.add_argument("--threads", type=positive, help="the same number gives the same bits")
    all_of_them = commands.add_parser("merge", help="join all shards: OUT/vectors.npy")
    all_of_them.add_argument("out", type=Path)
    return reader


def positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on")
    return int(text)


def shard_number(text: str) -> tuple[int, int]:
    form = re.fullmatch(r"(\d+)/(\d+)", text)
    number, shards = map(int, form.groups()) if form else (0, 0)
    if not 1 <= number <= shards:
        raise argparse.ArgumentTypeError(f"{text!r}: the third of eight is 3/8")
    return number, shards


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
