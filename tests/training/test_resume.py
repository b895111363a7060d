"""A run that is stopped anywhere, by anything, ends with the bits of a run that is not."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import learn, tune

from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM, M2BertForRetrieval
from lib.pipeline import files
from lib.pipeline.errors import TrainingError
from lib.training import resume
from lib.training.optim import train, warmup_then_linear
from lib.training.resume import Checkpoints, key

STEPS = 12


class Killed(Exception):
    """In place of a signal: the step's update is not made."""


def stop():
    raise Killed


def run(checkpoints=None, events=None):
    """Train a linear layer; (its weights, the curve, the steps taken).

    The loss depends on the step, on torch's generator and on what Adam has seen. events: {step: a
    function that is called before the step's gradient}.
    """
    torch.manual_seed(0)
    model, taken = nn.Linear(3, 2), []
    model.weight = nn.Parameter(torch.randn(3, 2).t())  # not contiguous
    optim = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def gradient(step: int) -> dict:
        (events or {}).get(step, list)()
        taken.append(step)
        x = torch.from_numpy(np.random.default_rng([1, step]).normal(size=(4, 3))).float()
        loss = (model(x + torch.randn(4, 3)) - 1).square().mean()
        loss.backward()
        return dict(loss=loss.item(), tokens=10 + step)

    shares = warmup_then_linear(STEPS, 0.2)
    curve = train(model, optim, shares, gradient, "toys", 17, checkpoints, show_progress=False)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), curve, taken


@pytest.fixture(scope="module")
def whole():
    """(weights, curve) of a run without checkpoints."""
    return run()[:2]


@pytest.fixture
def checkpoints(tmp_path):
    """A new object over the same folder, with a checkpoint after each step."""
    return lambda name="key": Checkpoints(tmp_path / "row", name, minutes=0)


def stopped(checkpoints, step: int) -> None:
    """A run that is stopped in a step, so that its last checkpoint is of that many steps."""
    with pytest.raises(Killed):
        run(checkpoints, {step: stop})


def same(result, whole) -> bool:
    return torch.equal(result[0], whole[0]) and result[1] == whole[1]


def kept(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.iterdir()), key=int)


# ------------------------------------------------------------------ kill -9


def words(architecture, size: int, seed: int):
    torch.manual_seed(seed)
    config = M2BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=32,
        filter_order=8,
        pooling="mean",
        hidden_dropout_prob=0.1,
    )
    return architecture(config)


def kill_at(event: int) -> None:
    """Kill this process at the n-th update, write, fsync or rename from now on."""
    left = iter(range(event, -1, -1))

    def dying(function):
        def call(*arguments, **options):
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    torch.nn.utils.clip_grad_norm_ = dying(torch.nn.utils.clip_grad_norm_)
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step)
    resume.save_file, os.fsync = dying(resume.save_file), dying(os.fsync)
    Path.rename, shutil.rmtree = dying(Path.rename), dying(shutil.rmtree)


def work(kind: str, folder: Path, texts, size: int, out: Path, event: int | None) -> None:
    """What a process does: train, with checkpoints in a folder, and write weights and curve."""
    torch.set_num_threads(1)
    given = Checkpoints(folder, "key", minutes=0) if folder else None
    if event is not None:
        kill_at(event)
    if kind == "pretraining":
        model = words(M2BertForMaskedLM, size, seed=0)
        settings = dict(tokens=960, batch_tokens=60, lr=1e-2, dropout=0.1)
        curve = learn(model, texts, checkpoints=given, **settings)
    else:
        model, teacher = (words(M2BertForRetrieval, size, seed) for seed in (0, 1))
        settings = dict(documents=4, documents_seen=64, queries_per_document=2, lr=1e-2)
        settings |= dict(loss="prototype" if kind == "distilling" else "mnrl", checkpoints=given)
        curve = tune(model, texts, teacher.eval(), **settings)
    save_file({name: p.detach() for name, p in model.named_parameters()}, out / "weights")
    (out / "curve").write_text(json.dumps(curve))


@pytest.fixture(scope="module")
def processes():
    """Processes that are forked from one which has imported everything and started no thread."""
    context = multiprocessing.get_context("forkserver")
    training = ["lib.training.finetune", "lib.training.pretrain"]
    context.set_forkserver_preload(["pytest", "torch._dynamo", *training])  # AdamW imports it
    return context


@pytest.mark.parametrize("kind", ["pretraining", "fine-tuning", "distilling"])
def test_five_kills_change_no_bit_of_the_weights(processes, text, pairs, tokenizer, tmp_path, kind):
    """Of 16 steps. An epoch of fine-tuning is 1.5 of them, so that each kill is in another one."""
    texts = text if kind == "pretraining" else pairs
    assert len(pairs.documents) == 1.5 * 4

    def process(folder: Path | None, name: str, event: int | None = None) -> int:
        (tmp_path / name).mkdir()
        arguments = kind, folder, texts, len(tokenizer), tmp_path / name, event
        child = processes.Process(target=work, args=arguments)
        child.start()
        child.join(60)
        return child.exitcode

    def results(name: str):
        curve = json.loads((tmp_path / name / "curve").read_text())
        return load_file(tmp_path / name / "weights"), curve

    assert process(None, "whole") == 0
    events = np.random.default_rng(sum(map(ord, kind))).integers(2, 26, 5)
    for attempt, event in enumerate(events.tolist()):
        assert process(tmp_path / "row", f"killed-{attempt}", event) == -signal.SIGKILL
    assert process(tmp_path / "row", "resumed") == 0
    (weights, curve), (whole_weights, whole_curve) = results("resumed"), results("whole")
    assert curve == whole_curve and len(curve) == 16 and weights.keys() == whole_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, whole_weights[name]), name


# ------------------------------------------------------------------ a stop


def test_a_run_that_is_stopped_in_any_step_ends_with_the_bits_of_one_that_is_not(
    whole, checkpoints, tmp_path
):
    for step in range(STEPS):
        stopped(checkpoints(f"key{step}"), step)
        *result, taken = run(checkpoints(f"key{step}"))
        assert same(result, whole) and taken == [*range(step, STEPS)]
        assert kept(tmp_path / "row" / f"key{step}") == [str(STEPS - 1), str(STEPS)]


def test_a_stop_after_training_costs_no_step(whole, tmp_path):
    """A checkpoint at the end is written whatever the time since the last one."""
    run(Checkpoints(tmp_path, "key", minutes=10))
    assert kept(tmp_path / "key") == [str(STEPS)]
    *result, taken = run(Checkpoints(tmp_path, "key", minutes=10))
    assert same(result, whole) and not taken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_its_checkpoint(whole, tmp_path, monkeypatch, number):
    before = signal.signal(number, lambda *_: stop())
    try:
        with pytest.raises(Killed):
            run(Checkpoints(tmp_path, "key"), {5: lambda: signal.raise_signal(number)})
        assert kept(tmp_path / "key") == ["6"]
        with pytest.raises(Killed):
            signal.raise_signal(number)  # the handler is back
    finally:
        signal.signal(number, before)
    *result, taken = run(Checkpoints(tmp_path, "key"))
    assert same(result, whole) and taken == [*range(6, STEPS)]


def test_the_second_interrupt_waits_for_nothing(tmp_path):
    events = dict.fromkeys([5], lambda: [signal.raise_signal(signal.SIGINT) for _ in "12"])
    with pytest.raises(KeyboardInterrupt):
        run(Checkpoints(tmp_path, "key"), events)
    assert not (tmp_path / "key").exists()


def test_a_stop_that_the_caller_ignores_is_no_whole_run(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Checkpoints(tmp_path, "key"), {5: lambda: signal.raise_signal(signal.SIGTERM)})
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_signals_are_the_callers(whole, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(Checkpoints(tmp_path, "key"))))
    thread.start()
    thread.join()
    assert same(results[0], whole)


# ------------------------------------------------------------------ damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"tokens": 1', '"tokens": 2', 1))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = [
    (resume.TENSORS, cut),
    (resume.TENSORS, flip),
    (resume.TENSORS, empty),
    (resume.TENSORS, Path.unlink),
    (resume.STATE, cut),
    (resume.STATE, digit),
    (resume.STATE, empty),
    (resume.STATE, Path.unlink),
]


@pytest.mark.parametrize(
    "name, damage", DAMAGE, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    whole, checkpoints, tmp_path, caplog, name, damage
):
    stopped(checkpoints(), 5)
    newest = tmp_path / "row" / "key" / "5"
    damage(newest / name)
    *result, taken = run(checkpoints())
    assert same(result, whole) and taken == [*range(4, STEPS)]
    damaged, resumed = (record.message for record in caplog.records)
    assert damaged.startswith(f"{newest} is damaged, training goes on without it (")
    assert "\n" not in damaged
    assert resumed == f"training goes on at step 4, from {newest.with_name('4')}"


def test_without_a_whole_checkpoint_training_starts_anew(whole, checkpoints, tmp_path, caplog):
    stopped(checkpoints(), 5)
    for place in (tmp_path / "row" / "key").iterdir():
        cut(place / resume.TENSORS)
    *result, taken = run(checkpoints())
    assert same(result, whole) and taken == [*range(STEPS)]
    assert [f"{n} is damaged" in r.message for n, r in zip("54", caplog.records)] == [True, True]


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(whole, checkpoints, tmp_path):
    stopped(checkpoints(), 5)
    place = tmp_path / "row" / "key" / "5"
    place.rename(place.with_name("7"))
    assert same(run(checkpoints()), whole)


def test_what_a_killed_run_began_is_deleted(whole, checkpoints, tmp_path):
    stopped(checkpoints(), 5)
    draft = tmp_path / "row" / "key" / ".6-x1y2"
    draft.mkdir()
    (draft / resume.TENSORS).write_bytes(b"half of a")
    assert same(run(checkpoints()), whole) and not draft.exists()


@pytest.mark.parametrize("how", ["refused", "full"])
def test_a_full_disk_costs_a_checkpoint_and_no_step(
    whole, checkpoints, tmp_path, caplog, monkeypatch, how
):
    """`full` is the system's own refusal, which safetensors reports in its own way."""
    limits, original = resource.getrlimit(resource.RLIMIT_FSIZE), resume.save_file

    def fill() -> None:
        def refuse(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if how == "refused":
            monkeypatch.setattr(resume, "save_file", refuse)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))

    def clean() -> None:
        monkeypatch.setattr(resume, "save_file", original)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert kept(tmp_path / "row" / "key") == ["4", "5"]  # and nothing half written

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        result = run(checkpoints(), {5: fill, 8: clean})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert same(result, whole) and kept(tmp_path / "row" / "key") == ["11", "12"]
    assert [r.message.split(" (")[0] for r in caplog.records] == [
        f"no checkpoint after step {n}" for n in (6, 7, 8)
    ]


# ------------------------------------------------------------------ other runs of the row


def test_a_changed_key_never_goes_on_and_a_row_that_is_done_leaves_nothing(
    whole, checkpoints, tmp_path, caplog
):
    stopped(checkpoints("old"), 5)
    *result, taken = run(checkpoints("new"))
    assert same(result, whole) and taken == [*range(STEPS)]
    (message,) = (record.message for record in caplog.records)
    assert "have changed since the checkpoints in" in message and "starts at step 0" in message
    assert kept(tmp_path / "row" / "old") == ["4", "5"]  # until the new run is done
    checkpoints("new").clear()
    checkpoints("new").clear()
    assert not (tmp_path / "row").exists()


def test_a_key_depends_on_settings_inputs_and_code(tmp_path, monkeypatch):
    corpus, model, library = (tmp_path / name for name in ("corpus", "model", "lib"))
    for path in (corpus / "a" / "text", model / "training.json", library / "model" / "x.py"):
        files.write(path, "1")
    files.write(library / "training" / "resume.py", "1")
    files.write(library / "report" / "page.py", "1")
    monkeypatch.setattr(resume, "__file__", str(library / "training" / "resume.py"))
    settings = {"lr": 1e-3, "nested": {"a": [1, 2]}}
    first = key(settings, [corpus, model])
    assert first == key({"nested": {"a": [1, 2]}, "lr": 1e-3}, [corpus, model])
    files.write(library / "report" / "page.py", "2")  # how results look
    files.write(library / "model" / "__pycache__" / "x.pyc", "2")
    assert first == key(settings, [corpus, model])

    others = [key({"lr": 2e-3}, [corpus, model]), key(settings, [corpus])]
    for path in (corpus / "a" / "text", model / "training.json", library / "model" / "x.py"):
        files.write(path, "2")
        others.append(key(settings, [corpus, model]))
    (corpus / "a" / "text").rename(corpus / "a" / "words")
    others.append(key(settings, [corpus, model]))
    assert len({first, *others}) == 1 + len(others)
    assert all(len(name) == 16 and name.isalnum() for name in others)


# ------------------------------------------------------------------ numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_last_good_checkpoint_stays_when_a_loss_is_not_finite(
    whole, checkpoints, tmp_path, monkeypatch, value
):
    def spoil() -> None:
        monkeypatch.setattr(torch.Tensor, "item", lambda self: value)

    place = tmp_path / "row" / "key"
    with pytest.raises(TrainingError) as error:
        run(checkpoints(), {7: spoil})
    monkeypatch.undo()
    assert str(error.value) == (
        f"toys: the loss is {value} at step 7 (lr 0.05; its batch is that of seed 17 and step 7); "
        f"lower lr; the last checkpoint is {place / '7'}"
    )
    assert kept(place) == ["6", "7"]
    *result, taken = run(checkpoints())
    assert same(result, whole) and taken == [*range(7, STEPS)]
