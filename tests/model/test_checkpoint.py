"""A model comes back bit for bit or not at all, and nothing in a file is ever run."""

import ast
import errno
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import signal
from pathlib import Path

import authors_format
import huggingface_hub
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import PreTrainedTokenizerFast

from lib.model import checkpoint, published
from lib.model.checkpoint import CheckpointError
from lib.model.extend import extend
from lib.model.m2bert import M2BertForMaskedLM, M2BertForRetrieval, neutral
from lib.pipeline.files import sha256

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = (
    "tiny_base",
    "tiny_len96",
    "tiny_training_additions",
    "tiny_no_residual_conv",
    "tiny_causal",
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where converted files are kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small spend a second thread's time waiting for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refused(call, *parts) -> str:
    """A CheckpointError of one line that holds every part; returns it."""
    with pytest.raises(CheckpointError) as error:
        call()
    text = str(error.value)
    assert text and "\n" not in text
    for part in parts:
        assert str(part) in text, text
    return text


def same(model, other) -> None:
    """Equal bits under equal names."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)  # tests/golden/README.md


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    """A saved retriever."""
    checkpoint.save(tiny(), tokenizer, tmp_path / "opl", {"row": "opl"})
    return tmp_path / "opl"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rewrite(folder: Path, change) -> None:
    """The folder's weights and checksum changed: only the tensors can tell."""
    path = folder / "model.safetensors"
    before, state = sha256(path), load_file(path)
    change(state)
    save_file(state, path)
    record = folder / "training.json"
    record.write_text(record.read_text().replace(before, sha256(path)))


# ------------------------------------------------------------------ save and load


@pytest.mark.parametrize("architecture", [M2BertForRetrieval, M2BertForMaskedLM])
@torch.no_grad()
def test_a_model_comes_back_bit_for_bit(tiny, tokenizer, tmp_path, architecture):
    model = tiny(architecture, mask_padding=False, mixer_layer_norm=True, filter_length=48).train()
    checkpoint.save(model, tokenizer, tmp_path / "new" / "model")
    again, words = checkpoint.load(tmp_path / "new" / "model")
    assert type(again) is architecture and not again.training
    same(again, model)
    assert again.config == model.config
    ids = words(["red fox runs unbelievably", "owl"], padding=True, return_tensors="pt")[
        "input_ids"
    ]
    assert torch.equal(
        ids,
        tokenizer(["red fox runs unbelievably", "owl"], padding=True, return_tensors="pt")[
            "input_ids"
        ],
    )
    assert torch.equal(again(ids)[-2], model.eval()(ids)[-2])  # pooler_output, or logits


def test_the_output_matrix_stays_tied_to_the_word_embeddings(tiny, tokenizer, tmp_path):
    checkpoint.save(tiny(M2BertForMaskedLM), tokenizer, tmp_path / "model")
    model, _ = checkpoint.load(tmp_path / "model")
    assert model.decoder.weight is model.model.embeddings.word_embeddings.weight
    assert (
        extend(model, 64).config.max_position_embeddings == 64
    )  # the warm start of a longer model


@pytest.mark.parametrize("initialization", ["reference", "identity"])
def test_a_retriever_starts_from_the_pretrained_encoder_and_a_fresh_pooler(
    tiny, tmp_path, initialization
):
    pretrained = tiny(M2BertForMaskedLM, initialization=initialization)
    checkpoint.save(pretrained, None, tmp_path / "mixed_8k")
    torch.manual_seed(0)
    model, tokenizer = checkpoint.load(tmp_path / "mixed_8k", M2BertForRetrieval)
    assert type(model) is M2BertForRetrieval and tokenizer is None
    encoder = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    assert encoder.keys() == {name for name in pretrained.state_dict() if name.startswith("model.")}
    assert all(
        torch.equal(tensor, pretrained.state_dict()[name]) for name, tensor in encoder.items()
    )
    torch.manual_seed(0)
    same(model.model.pooler, M2BertForRetrieval(pretrained.config).model.pooler)
    c = neutral(16)
    start = 0.3 * (torch.eye(16) - torch.outer(c, c))
    assert initialization == "reference" or torch.equal(model.model.pooler.weight, start)


def test_a_retriever_is_no_masked_lm(folder):
    refused(lambda: checkpoint.load(folder, M2BertForMaskedLM), folder, "is missing")


def test_the_record_says_how_the_model_came_about(folder):
    record = json.loads((folder / "training.json").read_text())
    assert record["row"] == "opl" and record["architecture"] == "M2BertForRetrieval"
    assert sha256(folder / "model.safetensors") in json.dumps(record)
    assert checkpoint.record(folder) == record and checkpoint.record(folder / "none") == {}


def test_saving_twice_gives_the_same_bytes_and_no_place(folder, tiny, tokenizer):
    first = contents(folder)
    checkpoint.save(tiny(), tokenizer, folder, {"row": "opl"})
    assert contents(folder) == first
    checkpoint.save(
        *checkpoint.load(folder), folder.parent / "copy"
    )  # a tokenizer may remember where it was read
    assert not any(
        bytes(folder.parent) in content for content in contents(folder.parent / "copy").values()
    )


def test_who_may_read_the_config_may_read_the_weights(folder):
    assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1


def test_a_new_model_replaces_the_old_folder_whole(folder, tiny, tokenizer):
    (folder / "left over").touch()
    model = tiny(hidden_size=32)
    checkpoint.save(model, tokenizer, folder)
    same(checkpoint.load(folder)[0], model)
    assert not (folder / "left over").exists() and [*folder.parent.iterdir()] == [folder]


def failing(call, error: BaseException, after: int = 0):
    """The call, but one raises: the first, or the one after so many."""
    count = itertools.count()

    def instead(*args, **options):
        if next(count) == after:
            raise error
        return call(*args, **options)

    return instead


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (checkpoint, "save_model"),
        (PreTrainedTokenizerFast, "save_pretrained"),
        (os, "fsync"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full", "interrupted"],
)
def test_a_failed_save_leaves_the_old_folder(
    folder, tiny, tokenizer, monkeypatch, place, name, error
):
    before = contents(folder)
    for target in (folder, folder.parent / "new"):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing(getattr(place, name), error))
            with pytest.raises(type(error)):
                checkpoint.save(tiny(hidden_size=32), tokenizer, target)
    assert contents(folder) == before and [*folder.parent.iterdir()] == [folder]


def test_what_json_cannot_hold_leaves_the_old_folder(folder, tiny, tokenizer):
    before = contents(folder)
    with pytest.raises(TypeError):
        checkpoint.save(tiny(hidden_size=32), tokenizer, folder, {"settings": object()})
    assert contents(folder) == before and [*folder.parent.iterdir()] == [folder]


def test_a_failed_move_leaves_the_old_folder(folder, tiny, tokenizer, monkeypatch):
    """Every move in turn fails once, until there are no more."""
    before, model = contents(folder), tiny(hidden_size=32)
    for moves in range(9):
        with monkeypatch.context() as patch:
            move = failing(os.rename, OSError(errno.EIO, "Input/output error"), after=moves)
            patch.setattr(os, "rename", move)
            patch.setattr(os, "replace", move)
            try:
                checkpoint.save(model, tokenizer, folder)
                break
            except OSError:
                assert contents(folder) == before and [*folder.parent.iterdir()] == [folder]
    assert 0 < moves < 8
    same(checkpoint.load(folder)[0], model)


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_a_missing_file_is_named_with_the_way_out(folder, name):
    (folder / name).unlink()
    refused(
        lambda: checkpoint.load(folder), folder, name, "is missing", "run the stage that trains it"
    )


def test_a_missing_folder_is_named_with_the_way_out(folder):
    refused(
        lambda: checkpoint.load(folder / "nowhere"),
        folder / "nowhere",
        "run the stage that trains it",
    )
    refused(lambda: checkpoint.load(folder / "config.json"), folder / "config.json")


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "cut": content[:middle],
        "one byte short": content[:-1],
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "longer": content + b"\0",
        "something else": b"<html>404</html>",
    }


@pytest.mark.parametrize("how", damaged(b"ab"))
def test_damaged_weights_are_refused_by_checksum(folder, how):
    path = folder / "model.safetensors"
    path.write_bytes(damaged(path.read_bytes())[how])
    refused(
        lambda: checkpoint.load(folder),
        path,
        "is damaged",
        "delete the folder and train or fetch it again",
    )


@pytest.mark.parametrize("how", ["cut", "empty", "something else"])
@pytest.mark.parametrize(
    "name", ["config.json", "training.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_damaged_text_file_is_refused_by_name(folder, name, how):
    path = folder / name
    path.write_bytes(damaged(path.read_bytes())[how])
    refused(lambda: checkpoint.load(folder), path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[]", "no config of an M2-BERT"),
        ('{"hidden_size": "wide"}', "hidden_size='wide'"),
        ('{"hiden_size": 16}', "no option 'hiden_size'"),
        ('{"dtype": "float33"}', "float33"),
    ],
)
def test_a_config_of_another_kind_is_refused_by_name(folder, content, part):
    path, record = folder / "config.json", folder / "training.json"
    before = sha256(path)
    path.write_text(content)
    record.write_text(record.read_text().replace(before, sha256(path)))
    refused(lambda: checkpoint.load(folder), path, part)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"sha256": 1, "architecture": "M2BertForRetrieval"}']
)
def test_a_record_without_a_checksum_is_refused_by_name(folder, content):
    (folder / "training.json").write_text(content)
    refused(lambda: checkpoint.load(folder), folder)


def test_an_unknown_architecture_is_refused_by_name(folder):
    record = folder / "training.json"
    record.write_text(record.read_text().replace("M2BertForRetrieval", "Evil"))
    refused(lambda: checkpoint.load(folder), record, "Evil")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", '"pooling": "mean"', '"pooling": "cls"'),
        ("config.json", '"mask_padding": true', '"mask_padding": false'),
        ("tokenizer.json", '"fox"', '"ofx"'),
    ],
)
def test_a_changed_file_that_still_loads_is_refused(folder, name, old, new):
    """Same weights, another function: every byte is checked."""
    path = folder / name
    text = path.read_text()
    path.write_text(text.replace(old, new))
    assert path.read_text() != text
    refused(lambda: checkpoint.load(folder), path)


def test_a_lost_tokenizer_is_not_taken_for_none(folder):
    (folder / "tokenizer.json").unlink()
    refused(lambda: checkpoint.load(folder), folder, "tokenizer.json")


KEY = "model.layers.0.mixer.in_linear.bias"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda state: state.pop(KEY), (KEY, "is missing")),
        (
            lambda state: state.update(extra=torch.zeros(1)),
            ("extra", "belongs to no part of the model"),
        ),
        (lambda state: state.update({KEY: state[KEY][:-1]}), (KEY, "(47,)", "(48,)")),
        (lambda state: state.update({KEY: state[KEY][None]}), (KEY, "(1, 48)", "(48,)")),
        (lambda state: state[KEY].fill_(torch.nan), (KEY, "NaN")),
        (lambda state: state[KEY][-1:].fill_(-torch.inf), (KEY, "infinite")),
    ],
    ids=["missing", "extra", "reshaped", "another axis", "nan", "infinite"],
)
def test_weights_that_are_not_the_models_are_named(folder, change, parts):
    """from_pretrained fills them with random numbers and prints a warning."""
    rewrite(folder, change)
    refused(lambda: checkpoint.load(folder), folder, *parts)


@pytest.fixture(scope="module")
def files():
    """Small weight files: {suffix: content}."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, buffer)
    old = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, old, _use_new_zipfile_serialization=False)
    return {
        ".bin": buffer.getvalue(),
        ".pt": old.getvalue(),
        ".safetensors": save({"a": torch.arange(6.0)}),
    }


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    suffix=st.sampled_from([".bin", ".pt", ".safetensors"]),
    end=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
)
@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_an_error_with_the_path_or_harmless(files, tmp_path, suffix, end, flips):
    """A flipped weight byte reads as another weight: what the checksum is for."""
    content = bytearray(files[suffix][: round(end * len(files[suffix]))])
    for place, bits in flips if content else ():
        content[int(place * len(content))] ^= bits
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    try:
        checkpoint.read_weights(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


# ------------------------------------------------------------------ nothing is run


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def payloads(marker: Path) -> dict[str, bytes]:
    new, old = io.BytesIO(), io.BytesIO()
    torch.save({"state": {"model": Evil(marker)}}, new)
    torch.save(
        {"bert.weight": torch.zeros(1), "evil": Evil(marker)},
        old,
        _use_new_zipfile_serialization=False,
    )
    return {
        "pickle": pickle.dumps(Evil(marker)),
        "torch": new.getvalue(),
        "old torch": old.getvalue(),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.bin", "composer.pt", "model.safetensors"]
)
@pytest.mark.parametrize("kind", payloads(Path()))
def test_a_malicious_pickle_never_runs(tmp_path, kind, name):
    marker, path = tmp_path / "marker", tmp_path / "model" / name
    payload = payloads(marker)[kind]
    if kind == "pickle":
        pickle.loads(payload).close()  # the trap works
        marker.unlink()
    path.parent.mkdir()
    path.write_bytes(payload)
    for place in (path, path.parent):
        text = refused(lambda place=place: published.load_published(place), path)
        assert "`False`" not in text and "=False" not in text  # no way out through the trap
    assert not marker.exists()


def test_a_malicious_pickle_beside_the_weights_is_not_opened(folder, golden):
    marker = folder.parent / "marker"
    for kind, name in (("torch", "pytorch_model.bin"), ("pickle", "training_args.bin")):
        (folder / name).write_bytes(payloads(marker)[kind])
    checkpoint.load(folder)
    save_file(authors_state(golden), folder / "model.safetensors")
    published.load_published(folder)  # safetensors come first
    assert not marker.exists()


def test_code_beside_the_weights_never_runs(folder, monkeypatch):
    marker = folder.parent / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Evil"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a pipeline a question"))
    try:
        checkpoint.load(folder)
    except CheckpointError:
        pass
    assert not marker.exists()


UNSAFE_IMPORTS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}


def unsafe(code: str) -> list[str]:
    """What a source does that could run a file's code, or hide an error."""
    found = []
    for node in ast.walk(ast.parse(code)):
        options = {
            option.arg: getattr(option.value, "value", "?")
            for option in getattr(node, "keywords", [])
            if isinstance(node, ast.Call)
        }
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        found += [
            f"{name}={value}"
            for name, safe in (
                ("weights_only", True),
                ("trust_remote_code", False),
                ("allow_pickle", False),
            )
            if (value := options.get(name, safe)) is not safe
        ]
        if called == "torch.load" and "weights_only" not in options:
            found.append("torch.load")
        if re.search(r"Auto\w+\.from_pretrained$", called) and "trust_remote_code" not in options:
            found.append(called)
        modules = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [
            f"import {module}" for module in modules if module.split(".")[0] in UNSAFE_IMPORTS
        ]
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append("except:")
    return found


def test_no_source_runs_a_files_code_or_hides_an_error():
    sources = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "lib").rglob("*.py"))
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        sources[path.name] = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert len(sources) > 60
    assert {name: found for name, code in sources.items() if (found := unsafe(code))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, weights_only=False)",
        "torch.load(path)",
        "f(weights_only=flag)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "transformers.AutoTokenizer.from_pretrained(p)",
        "np.load(path, allow_pickle=True)",
        "import os, pickle",
        "from pickle import loads",
        "def f():\n    import joblib.memory",
        "try: f()\nexcept: pass",
    ],
)
def test_the_search_finds_what_it_looks_for(code):
    assert len(unsafe(code)) == 1
    assert (
        unsafe(
            "torch.load(p, weights_only=True)\n"
            "AutoModel.from_pretrained(p, trust_remote_code=False)\n"
            "try: f()\nexcept Exception: pass"
        )
        == []
    )


# ------------------------------------------------------------------ the authors' files


def authors_state(golden, variant="tiny_base", drop=("cls.",), prefix=""):
    """The reference weights under the authors' names; drop: beginnings of what to leave out."""
    state = {
        name.removeprefix("param/"): value
        for name, value in golden(variant).items()
        if name.startswith("param/")
    }
    return {prefix + name: value for name, value in state.items() if not name.startswith(drop)}


HEAD_ONLY = ("bert.pooler.",)  # drop, for a pretraining file
FLASH = {
    "bert.encoder.flashfft.f_32_fft": torch.zeros(4, dtype=torch.complex64),
    "bert.encoder.layer.0.attention.filter_fn.flashfft.twiddle_factors_fft_32_1K": torch.ones(3, 2),
    "bert.encoder.layer.1.attention.filter_fn2.flashfft.N": torch.tensor(32),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_published_weights_give_the_reference_outputs(golden, tmp_path, variant):
    torch.save(authors_state(golden, variant), tmp_path / "pytorch_model.bin")
    model, arrays = published.load_published(tmp_path), golden(variant)
    assert type(model) is M2BertForRetrieval and not model.training
    out = model(arrays["input/input_ids"], arrays["input/attention_mask"])
    close(out.last_hidden_state, arrays["output/hidden/1"])
    close(out.pooler_output, arrays["output/pooled"])


def test_published_weights_pad_every_text_to_the_models_length(golden, tmp_path):
    torch.save(authors_state(golden), tmp_path / "pytorch_model.bin")
    arrays = golden("tiny_base")
    ids, mask = arrays["short/input/input_ids"], arrays["short/input/attention_mask"]
    model = published.load_published(tmp_path)
    close(model(ids, mask).pooler_output, arrays["short_padded_to_full/output/pooled"])
    checkpoint.save(model, None, tmp_path / "ours")
    again, _ = checkpoint.load(tmp_path / "ours")
    close(again(ids, mask).pooler_output, arrays["short_padded_to_full/output/pooled"])
    model.config.pad_to_max_length = False
    close(model(ids, mask).pooler_output, arrays["short/output/pooled"])


def test_a_torch_file_is_converted_once(golden, tmp_path, cache, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    torch.save(authors_state(golden), path)
    first = published.load_published(path)
    kept = cache / "loco-workbench" / published.CONVERSION / sha256(path)
    assert (kept / "model.safetensors").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)
        same(published.load_published(path), first)
        same(published.load_published(path, 32), published.cut(first, 32))
        torch_file = path.read_bytes()
        path.write_bytes(
            torch_file[:-1] + b"x"
        )  # another file of that name is not the converted one
        with pytest.raises(CheckpointError):
            published.load_published(path)
        path.write_bytes(torch_file)
    (kept / "model.safetensors").write_bytes(b"damaged")
    same(published.load_published(path), first)
    same(checkpoint.load(kept)[0], first)  # and mended
    state = authors_state(golden)
    save_file(state, tmp_path / "model.safetensors")
    same(published.load_published(tmp_path / "model.safetensors"), first)
    assert len(list(kept.parent.iterdir())) == 1  # safetensors needs no conversion


def test_without_room_for_the_converted_file_the_model_loads_all_the_same(
    golden, tmp_path, cache, monkeypatch
):
    torch.save(authors_state(golden), tmp_path / "model.bin")
    monkeypatch.setattr(
        os, "fsync", failing(os.fsync, OSError(errno.ENOSPC, "No space left on device"))
    )
    model = published.load_published(tmp_path / "model.bin")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    same(published.load_published(tmp_path / "model.bin"), model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["again.bin", "again.pt", "again.safetensors"])
def test_what_save_published_writes_is_the_authors_file(golden, tmp_path, variant, name):
    original = authors_state(golden, variant)
    torch.save(original, tmp_path / "pytorch_model.bin")
    model = published.load_published(tmp_path)
    authors_format.save_published(model, tmp_path / name)
    written = checkpoint.read_weights(tmp_path / name)
    assert written.keys() == original.keys()
    for key, tensor in original.items():
        assert written[key].shape == tensor.shape and written[key].dtype == tensor.dtype, key
        torch.testing.assert_close(
            written[key],
            tensor,
            rtol=0,
            atol=1e-6 if key.endswith((".t", ".deltas")) else 0,
            msg=key,
        )
    same(published.load_published(tmp_path / name), model)
    short = published.cut(model, 40)  # the time unit survives, although no shape says it
    authors_format.save_published(short, tmp_path / name)
    again = published.load_published(tmp_path / name)
    same(again, short)
    assert (
        again.config.filter_length
        == short.config.filter_length
        == model.config.max_position_embeddings
    )


@pytest.mark.parametrize("name", ["again.pt", "again.safetensors"])
def test_a_masked_lm_goes_back_to_composers_format(golden, tmp_path, name):
    original = authors_state(golden, drop=HEAD_ONLY, prefix="model.")
    torch.save({"state": {"model": original}}, tmp_path / "ep1.pt")
    model = published.load_published(tmp_path / "ep1.pt")
    authors_format.save_published(model, tmp_path / name)
    written = checkpoint.read_weights(tmp_path / name)
    assert (
        written["state"]["model"] if name.endswith(".pt") else written
    ).keys() == original.keys()
    same(published.load_published(tmp_path / name), model)


AS_PUBLISHED = dict(mask_padding=False, pad_to_max_length=True, pooling="cls")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(mask_padding=True), "mask_padding"),
        (dict(pooling="mean"), "pooling"),
        (dict(pad_to_max_length=False), "pad_to_max_length"),
        (dict(layer_norm_eps=1e-3), "layer_norm_eps"),
        (dict(pad_token_id=3), "pad_token_id"),
        (dict(intermediate_size=31), "intermediate_size"),
        (dict(mlp_blocks=3), "intermediate_size"),
        (dict(num_hidden_layers=0), "layers"),
    ],
)
def test_what_the_file_cannot_say_is_not_written(tiny, tmp_path, changes, name):
    refused(
        lambda: authors_format.save_published(
            tiny(**(AS_PUBLISHED | changes)), tmp_path / "model.bin"
        ),
        name,
    )
    assert not list(tmp_path.iterdir())


def test_an_unknown_suffix_is_refused(tiny, tmp_path):
    refused(
        lambda: authors_format.save_published(tiny(**AS_PUBLISHED), tmp_path / "model.h5"),
        "model.h5",
        ".safetensors",
    )


@pytest.mark.parametrize(
    "kind", ["save", "save_published.bin", "save_published.safetensors", "load_published"]
)
def test_a_disk_that_is_really_full_is_one_oserror_and_leaves_what_was_there(
    golden, tiny, tokenizer, tmp_path, kind
):
    """The system's own refusal, which the libraries that write report each in its own way."""
    torch.save(authors_state(golden), tmp_path / "weights.bin")
    model, before = tiny(**AS_PUBLISHED), contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        if kind == "load_published":
            assert type(published.load_published(tmp_path / "weights.bin")) is M2BertForRetrieval
        else:
            with pytest.raises(
                OSError, match=f"cannot be written.*{'folder' if kind == 'save' else 'out'}"
            ):
                checkpoint.save(
                    model, tokenizer, tmp_path / "folder"
                ) if kind == "save" else authors_format.save_published(
                    model, tmp_path / f"out.{kind.rpartition('.')[2]}"
                )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bit_weights_stay_16_bits_on_disk_and_back(tiny, tokenizer, golden, tmp_path, dtype):
    model = tiny().to(dtype)
    checkpoint.save(model, tokenizer, tmp_path / "folder")
    again = checkpoint.load(tmp_path / "folder")[0]
    same(again, model)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype, torch.float32}
    ids = torch.tensor([[2, 5, 9, 3]])
    assert torch.equal(again(ids).pooler_output, model(ids).pooler_output)
    torch.save(
        {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in authors_state(golden).items()
        },
        tmp_path / "model.bin",
    )
    arrays = golden("tiny_base")  # published in 16 bits: read into float32
    torch.testing.assert_close(
        published.load_published(tmp_path / "model.bin")(arrays["input/input_ids"]).pooler_output,
        arrays["output/pooled"],
        rtol=0,
        atol=0.2,
    )


IN_LINEAR = "bert.encoder.layer.0.attention.in_linear.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda state: state.update(
                {"bert.encoder.layer.3000000.attention.in_linear.weight": state[IN_LINEAR]}
            ),
            ("layers", "3000000"),
        ),
        (
            lambda state: state.update({IN_LINEAR: state[IN_LINEAR].to(torch.int8)}),
            ("in_linear.weight", "torch.int8"),
        ),
        (
            lambda state: state.update({IN_LINEAR: state[IN_LINEAR].to(torch.complex64)}),
            ("in_linear.weight", "torch.complex64"),
        ),
        (
            lambda state: state.update({IN_LINEAR: state[IN_LINEAR].to(torch.float8_e4m3fn)}),
            ("in_linear.weight", "float8"),
        ),
        (
            lambda state: state.update({IN_LINEAR: state[IN_LINEAR].to_sparse()}),
            ("in_linear.weight", "sparse"),
        ),
        (
            lambda state: state.update(
                {
                    "bert.encoder.layer.1.attention.filter_fn.pos_emb.z": state[
                        "bert.encoder.layer.1.attention.filter_fn.pos_emb.z"
                    ].repeat(2, 1, 1)
                }
            ),
            ("inputs", "first axis"),
        ),
        (
            lambda state: state[
                "bert.encoder.layer.1.attention.filter_fn.implicit_filter.1.freq"
            ].fill_(torch.nan),
            (".freq", "NaN"),
        ),
        (
            lambda state: state.update({"dense.whatever": torch.zeros(1)}),
            ("dense.whatever", "no part of the model"),
        ),
    ],
    ids=[
        "layer number",
        "int8",
        "complex",
        "float8",
        "sparse",
        "two filters in one",
        "NaN",
        "unknown head",
    ],
)
def test_tensors_that_only_look_right_are_refused_by_name(golden, tmp_path, change, parts):
    state = authors_state(golden)
    change(state)
    torch.save(state, tmp_path / "model.bin")
    refused(lambda: published.load_published(tmp_path / "model.bin"), "model.bin", *parts)


def test_a_tokenizer_that_the_record_does_not_know_is_not_read(tiny, tokenizer, tmp_path):
    checkpoint.save(tiny(), None, tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    assert checkpoint.load(tmp_path / "folder")[1] is None


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("bert.embeddings.position_ids", lambda tensor: tensor + 1),
        ("bert.encoder.layer.1.attention.filter_fn.pos_emb.t", lambda tensor: tensor**2),
        (
            "bert.encoder.layer.0.attention.filter_fn2.modulation.deltas",
            lambda tensor: tensor * 1.001,
        ),
        (
            "bert.encoder.layer.0.attention.filter_fn2.modulation.deltas",
            lambda tensor: tensor[..., 1:],
        ),
        ("bert.encoder.layer.7.attention.filter_fn.pos_emb.t", None),
        ("bert.encoder.layer.0.attention.filter_fn.pos_emb.t", lambda tensor: tensor * torch.nan),
    ],
)
def test_a_constant_that_this_model_does_not_compute_is_refused_by_name(
    golden, tmp_path, key, change
):
    state = authors_state(golden)
    state[key] = change(state[key]) if change else torch.linspace(0, 1, 64)[None, :, None]
    torch.save(state, tmp_path / "model.bin")
    ours = (
        key.replace("bert.encoder.layer.", "model.layers.")
        .replace("attention.filter_fn2", "mixer.residual_filter")
        .replace("attention.filter_fn", "mixer.gated_filter")
        .replace("bert.", "model.")
    )
    refused(lambda: published.load_published(tmp_path / "model.bin"), "model.bin", ours)


@pytest.mark.parametrize("length", [0, -5, 16.0, "16", True])
def test_a_length_that_is_none_is_refused(golden, tmp_path, length):
    torch.save(authors_state(golden), tmp_path / "model.bin")
    refused(
        lambda: published.load_published(tmp_path / "model.bin", length),
        f"max_length={length!r}",
        "whole number",
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_is_read_off_the_shapes(golden, tmp_path, variant):
    with np.load(GOLDEN / f"{variant}.npz") as file:
        stated = json.loads(str(file["config_json"]))
    torch.save(authors_state(golden, variant), tmp_path / "model.bin")
    config = published.load_published(tmp_path / "model.bin").config
    names = dict(
        max_seq_len="max_position_embeddings",
        nblocks="mlp_blocks",
        training_additions="mixer_layer_norm",
        filter_w_init="filter_frequency",
    )
    known = {
        ours: value
        for name, value in stated.items()
        if hasattr(config, ours := names.get(name, name))
    }
    assert len(known) > 12 and {name: getattr(config, name) for name in known} == known
    assert (config.mask_padding, config.pooling) == (False, "cls")  # as published


FORMATS = {
    "flat": ("pytorch_model.bin", lambda golden: authors_state(golden)),
    "module.": ("model.bin", lambda golden: authors_state(golden, prefix="module.")),
    "classifier": (
        "step.pt",
        lambda golden: (
            authors_state(golden)
            | {"classifier.weight": torch.zeros(1, 32), "classifier.bias": torch.zeros(1)}
        ),
    ),
    "module.classifier": (
        "step.pt",
        lambda golden: (
            authors_state(golden, prefix="module.")
            | {"module.classifier.weight": torch.zeros(1, 32)}
        ),
    ),
    "with a head": ("step.pt", lambda golden: authors_state(golden, drop=("none",))),
    "FlashFFTConv": ("step.pt", lambda golden: authors_state(golden) | FLASH),
    "Composer": (
        "ep1.pt",
        lambda golden: {
            "state": {
                "model": authors_state(golden, prefix="model.")
                | {f"model.{name}": value for name, value in FLASH.items()}
            }
        },
    ),
    "Composer with its random states": (
        "ep1.pt",
        lambda golden: {
            "state": {"model": authors_state(golden, prefix="model."), "run_name": "m2"},
            "rng": [
                {
                    "python": random.getstate(),
                    "numpy": np.random.get_state(),
                    "torch": torch.get_rng_state(),
                }
            ],
        },
    ),  # composer.utils.reproducibility
    "safetensors": ("model.safetensors", lambda golden: authors_state(golden)),
    "safetensors of Composer": (
        "weights.safetensors",
        lambda golden: authors_state(golden, prefix="model."),
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_every_published_format_is_the_same_model(golden, tmp_path, form):
    name, build = FORMATS[form]
    (save_file if name.endswith(".safetensors") else torch.save)(build(golden), tmp_path / name)
    model, arrays = published.load_published(tmp_path / name), golden("tiny_base")
    assert type(model) is M2BertForRetrieval
    close(model(arrays["input/input_ids"]).pooler_output, arrays["output/pooled"])


@pytest.mark.parametrize("form", ["flat", "Composer", "safetensors"])
@torch.no_grad()
def test_a_head_without_a_pooler_is_a_masked_lm(golden, tmp_path, form):
    state = authors_state(golden, drop=HEAD_ONLY, prefix="model." if form == "Composer" else "")
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "ep1.pt")
    (save_file if form == "safetensors" else torch.save)(
        {"state": {"model": state}} if form == "Composer" else state, path
    )
    model, arrays = published.load_published(path), golden("tiny_base")
    assert (
        type(model) is M2BertForMaskedLM
        and model.decoder.weight is model.get_input_embeddings().weight
    )
    close(model(arrays["input/input_ids"]).logits, arrays["output/mlm_logits"])


@torch.no_grad()
def test_a_tied_matrix_may_be_stored_once(golden, tmp_path):
    state = authors_state(golden, drop=HEAD_ONLY)
    del state["cls.predictions.decoder.weight"]
    torch.save(state, tmp_path / "model.bin")
    close(
        published.load_published(tmp_path)(golden("tiny_base")["input/input_ids"]).logits,
        golden("tiny_base")["output/mlm_logits"],
    )


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.filter_fn.implicit_filter_rev.3.freq",
        "cls.predictions.decoder.weight",
    ],
)
def test_copies_that_disagree_are_refused(golden, tmp_path, name):
    state = authors_state(golden, drop=HEAD_ONLY)
    torch.save(state | {name: state[name] + 1}, tmp_path / "model.bin")
    refused(lambda: published.load_published(tmp_path), "different values")


@torch.no_grad()
def test_a_smaller_length_cuts_the_tables_and_changes_nothing_else(golden, tmp_path):
    torch.save(authors_state(golden), tmp_path / "model.bin")
    arrays = golden("tiny_base")
    ids = arrays["short/input/input_ids"]  # 24 tokens
    short = published.load_published(tmp_path, max_length=ids.shape[1])
    assert short.config.max_position_embeddings == 24 and not short.training
    assert {
        tensor.shape[0]
        for name, tensor in short.state_dict().items()
        if name.endswith(("position_embeddings.weight", "filter.inputs"))
    } == {24}
    close(short(ids).pooler_output, arrays["short/output/pooled"])
    with pytest.raises(ValueError, match="max_length=24"):
        short(arrays["input/input_ids"])
    same(published.load_published(tmp_path, max_length=64), published.load_published(tmp_path))
    refused(
        lambda: published.load_published(tmp_path, max_length=65),
        "max_length=65",
        "64 tokens",
        "`extend`",
    )


MISSING = "bert.encoder.layer.1.attention.filter_fn.pos_emb.z"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda state: state.pop("bert.embeddings.word_embeddings.weight"), ("word_embeddings",)),
        (
            lambda state: state.pop(MISSING),
            ("model.layers.1.mixer.gated_filter.inputs", "is missing"),
        ),
        (lambda state: state.pop("bert.pooler.dense.bias"), ("model.pooler.bias", "is missing")),
        (
            lambda state: state.update({"bert.extra": torch.zeros(1)}),
            ("model.extra", "belongs to no part"),
        ),
        (
            lambda state: state.update({MISSING: state[MISSING][:, :-1]}),
            ("gated_filter.inputs", "(63, 5)", "(64, 5)"),
        ),
        (lambda state: state.update({MISSING: torch.tensor(0.0)}), ("gated_filter.inputs",)),
        (
            lambda state: state.update(
                {"bert.embeddings.word_embeddings.weight": torch.zeros(100)}
            ),
            ("word_embeddings",),
        ),
        (
            lambda state: state["bert.pooler.dense.bias"].fill_(torch.nan),
            ("model.pooler.bias", "NaN"),
        ),
    ],
    ids=["no words", "missing", "half a pooler", "extra", "reshaped", "no axis", "flat", "nan"],
)
def test_published_weights_that_are_not_a_models_are_named(golden, tmp_path, change, parts):
    state = authors_state(golden)
    change(state)
    torch.save(state, tmp_path / "model.bin")
    refused(lambda: published.load_published(tmp_path), tmp_path / "model.bin", *parts)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [],
        {},
        {"state": {}},
        {"state": None},
        {"state": {"model": [1]}},
        {"epoch": 3},
        {1: torch.zeros(1)},
        {"weight": torch.zeros(1)},
    ],
    ids=lambda content: str(content)[:24],
)
def test_a_file_of_something_else_is_refused_by_path(tmp_path, content):
    torch.save(content, tmp_path / "model.bin")
    refused(lambda: published.load_published(tmp_path / "model.bin"), tmp_path / "model.bin")


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"<html>404</html>", b"\0" * 200])
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "step.pt"])
def test_a_file_that_is_no_weight_file_is_refused_by_path(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(lambda: published.load_published(tmp_path), tmp_path / name, "fetch it again")


def test_a_folder_of_ours_is_no_published_model(folder):
    """Its shapes do not tell how it pools: `load` reads it."""
    refused(lambda: published.load_published(folder), folder)


def test_a_folder_without_one_weight_file_says_which_it_needs(tmp_path):
    needs = "model.safetensors", "pytorch_model.bin", "exactly one .pt"
    refused(lambda: published.load_published(tmp_path), tmp_path, *needs)
    (tmp_path / "ep1.pt").touch()
    (tmp_path / "ep2.pt").touch()
    refused(lambda: published.load_published(tmp_path), tmp_path, *needs)
    refused(
        lambda: published.load_published(tmp_path / "a" / "b"),
        tmp_path / "a" / "b",
        "neither a file, a folder nor a hub id",
    )


# ------------------------------------------------------------------ the hub


@pytest.mark.parametrize("offline", [True, False], ids=["offline mode", "no network"])
def test_an_id_that_cannot_be_fetched_says_which_file_to_put_where(
    no_network, monkeypatch, offline
):
    """Asked once at most: a library that tries again waits half a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    refused(
        lambda: published.load_published("someone/m2-bert"),
        "someone/m2-bert",
        "pytorch_model.bin",
        "folder",
        *published.PUBLISHED,
    )
    asked, waited = no_network
    assert len(asked) <= (0 if offline else 1) and not waited


@pytest.mark.parametrize(
    "failure",
    [
        TimeoutError(),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("two\nlines"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_any_failure_of_the_hub_is_one_line(no_network, monkeypatch, failure):
    def fail(*args, **options):
        raise failure

    for name in ("hf_hub_download", "get_hf_file_metadata"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    refused(
        lambda: published.load_published("someone/m2-bert"),
        "someone/m2-bert",
        type(failure).__name__,
        "pytorch_model.bin",
    )


@torch.no_grad()
def test_a_cached_id_needs_no_network(no_network, golden, tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--m2-bert" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--someone--m2-bert" / "refs").mkdir()
    (tmp_path / "hub" / "models--someone--m2-bert" / "refs" / "main").write_text("0" * 40)
    torch.save(authors_state(golden), snapshot / "pytorch_model.bin")
    arrays = golden("tiny_base")
    close(
        published.load_published("someone/m2-bert")(arrays["input/input_ids"]).pooler_output,
        arrays["output/pooled"],
    )
    assert no_network == ([], [])


@torch.no_grad()
def test_a_published_model_becomes_a_folder_of_ours(golden, tmp_path):
    torch.save(authors_state(golden), tmp_path / "model.bin")
    model = published.load_published(tmp_path / "model.bin", max_length=24)
    checkpoint.save(model, None, tmp_path / "folder")
    again, _ = checkpoint.load(tmp_path / "folder")
    same(again, model)
    arrays = golden("tiny_base")
    close(again(arrays["short/input/input_ids"]).pooler_output, arrays["short/output/pooled"])
