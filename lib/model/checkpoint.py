"""Our models on disk: a Hugging Face folder with a record of every file's sha256, training.json.

    save(model, tokenizer, folder, about, readme)   write the folder, whole or not at all
    record(folder)                                  what `about` said of a model's origin
    load(folder)                                    model and tokenizer; every file is checked

This module unpickles nothing, runs no code from a checkpoint, and fills no missing weight with
random numbers. The authors' files: lib/model/published.py.
"""

import copy
import errno
import hashlib
import json
import re
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM, M2BertForRetrieval
from lib.model.tokens import read_tokenizer
from lib.pipeline import files
from lib.pipeline.errors import WorkbenchError, require

# Composer stores numpy's random state beside the weights. It is an array; loading it runs no code.
RANDOM_STATE = [
    np._core.multiarray._reconstruct,
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]
AGAIN = "delete the folder and train or fetch it again"
WORDS = "model.embeddings.word_embeddings.weight"
CLASSES = {cls.__name__: cls for cls in (M2BertForRetrieval, M2BertForMaskedLM)}
HUB_KEYS = {"architectures", "dtype", "transformers_version"}  # of config.json, for transformers


class CheckpointError(WorkbenchError):
    """A folder or file is not the model that it claims to be."""


def ensure(condition, message: str) -> None:
    """Raise a CheckpointError unless the condition holds."""
    require(condition, message, CheckpointError)


# ------------------------------------------------------------------ write


def save(
    model: nn.Module, tokenizer, folder: str | Path, about: dict | None = None, readme=None
) -> None:
    """Write the model to `folder`, replacing it whole: config, weights, tokenizer and record.

    `SentenceTransformer(folder)` reads a retriever's folder too, after `import lib.model.hub`.

    Args:
        about: the model's origin, for training.json. The model's class and the sha256 of every file
            and of `about["settings"]` are added.
        readme: the text of the model card (lib/report/card.py makes one); None: no README.md.

    Raises:
        OSError: the disk is full or read-only. The old folder is unchanged.
    """
    record = dict(about or {})
    if record.get("settings"):
        record["settings_sha256"] = fingerprint(record["settings"])
    with files.replacing(folder) as draft, writing(folder):
        save_model(model, draft)
        if tokenizer is not None:
            limited = copy.deepcopy(tokenizer)
            limited.model_max_length = model.config.max_position_embeddings  # others truncate there
            limited.save_pretrained(draft)
        if isinstance(model, M2BertForRetrieval):
            save_modules(model, draft)
        if readme is not None:
            write(draft / "README.md", readme)
        written = [path for path in draft.rglob("*") if path.is_file()]
        record["architecture"] = type(model).__name__
        record["sha256"] = {p.relative_to(draft).as_posix(): files.sha256(p) for p in written}
        write(draft / "training.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
        for path in draft.rglob("*.safetensors"):
            shutil.copymode(draft / "training.json", path)  # safetensors writes for its owner only


def fingerprint(settings: dict) -> str:
    """sha256 of the settings as sorted JSON: equal settings, equal hash."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing(path: str | Path):
    """Turn a failed write into an OSError: safetensors, tokenizers and torch raise their own."""
    try:
        yield
    except Exception as error:
        if type(error) not in (Exception, RuntimeError, SafetensorError):
            raise
        message = f"cannot be written, what was there is unchanged ({reason(error)})"
        raise OSError(errno.EIO, message, str(path)) from None


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def save_model(model: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors, as transformers writes and reads them."""
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("decoder.weight", None)  # safetensors stores a tied matrix once
    content = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(weights[WORDS].dtype).removeprefix("torch."),
        "transformers_version": version("transformers"),
    }
    write(folder / "config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_modules(model: nn.Module, folder: Path) -> None:
    """Write what sentence-transformers needs beside the Hugging Face folder of a retriever.

    Transformer -> Pooling -> Dense(tanh) -> Normalize. The pooler is stored a second time, as the
    library's Dense. Class and option names are those of versions 2 to 5; version 6 reads them too.
    """
    D, pooling = model.config.hidden_size, model.config.pooling
    paths, tanh = ("", "1_Pooling", "2_Dense", "3_Normalize"), "torch.nn.modules.activation.Tanh"
    contents = {
        "modules.json": [
            dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{module}")
            for i, path in enumerate(paths)
            for module in [path[2:] or "Transformer"]
        ],
        "sentence_bert_config.json": dict(
            max_seq_length=model.config.max_position_embeddings, do_lower_case=False
        ),
        "config_sentence_transformers.json": dict(
            model_type="SentenceTransformer",
            similarity_fn_name="cosine",
            prompts={},
            default_prompt_name=None,
        ),
        "1_Pooling/config.json": dict(
            word_embedding_dimension=D,
            pooling_mode_cls_token=pooling == "cls",
            pooling_mode_mean_tokens=pooling == "mean",
            pooling_mode_max_tokens=False,
        ),
        "2_Dense/config.json": dict(
            in_features=D, out_features=D, bias=True, activation_function=tanh
        ),
        "3_Normalize/config.json": {},
    }
    for name, content in contents.items():
        write(folder / name, json.dumps(content, indent=1) + "\n")
    pooler = model.model.pooler.state_dict()
    weights = {f"linear.{name}": tensor.detach().contiguous() for name, tensor in pooler.items()}
    save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------ read


def load(folder: str | Path, architecture: type | None = None):
    """The model (in eval mode) and tokenizer of a folder written by `save`.

    Args:
        architecture: the class to build; None: the class that was saved. A retriever can be loaded
            from a pretraining checkpoint: it leaves out the head, and its pooler starts as the
            config's initialisation draws it.

    Raises:
        CheckpointError: the folder is missing or incomplete, a file is damaged, or a weight is
            missing, unknown or of another shape.
    """
    folder = Path(folder)
    saved, checksums = read_record(folder)
    config, dtype = read_config(folder / "config.json")
    model = (architecture or saved)(config).to(dtype)
    state = read_weights(folder / "model.safetensors")
    if saved is M2BertForMaskedLM and isinstance(model, M2BertForRetrieval):
        fresh = {k: tensor for k, tensor in model.state_dict().items() if ".pooler." in k}
        state = {k: tensor for k, tensor in state.items() if k.startswith("model.")} | fresh
    elif saved is M2BertForMaskedLM and config.tie_word_embeddings:
        state.setdefault("decoder.weight", state.get(WORDS))
    load_strictly(model, state, folder)
    tokenizer = read_tokenizer(folder) if "tokenizer.json" in checksums else None
    return model.eval(), tokenizer


def read_record(folder: Path) -> tuple[type, dict[str, str]]:
    """The class that was saved and {file: sha256}, after a check of every file."""

    def complete(names) -> None:
        missing = next((name for name in names if not (folder / name).is_file()), None)
        message = f"{folder} is no model folder: {missing} is missing; run the stage that trains it"
        ensure(missing is None, message)

    complete(("config.json", "model.safetensors", "training.json"))
    path = folder / "training.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved, checksums = str(record["architecture"]), dict(record["sha256"])
        _ = checksums["config.json"], checksums["model.safetensors"]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged ({problem}); {AGAIN}") from None
    ensure(saved in CLASSES, f"{path}: unknown architecture {saved!r}, known are {[*CLASSES]}")
    complete(checksums)
    for name, checksum in checksums.items():
        message = f"{folder / name} is damaged: its sha256 is not the one in training.json; {AGAIN}"
        ensure(files.sha256(folder / name) == checksum, message)
    return CLASSES[saved], checksums


def read_config(path: Path) -> tuple[M2BertConfig, torch.dtype]:
    """The configuration in a config.json, and the dtype of the weights beside it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        options = {key: value for key, value in content.items() if key not in HUB_KEYS}
        return M2BertConfig.from_dict(options), getattr(torch, content.get("dtype") or "float32")
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no config of an M2-BERT: {error}") from None


def record(folder: str | Path) -> dict:
    """What `save` was told about a model's origin; {} if there is no such model."""
    path = Path(folder) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or (weights only) torch file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(RANDOM_STATE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises half a dozen exceptions for truncated, foreign and unsafe files; none is our
        # bug. The second sentence of its message says how to run the file.
        raise CheckpointError(
            f"{path} cannot be read as weights only ({reason(error)}); fetch it again, or convert "
            "it to safetensors where you trust it"
        ) from None


def reason(error: Exception) -> str:
    """The class and the first sentence of an error."""
    first = re.split(r"[.;] |[\n(]", str(error).strip())[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def load_strictly(model: nn.Module, state: dict[str, Tensor], source) -> None:
    """load_state_dict that requires every key and no other, equal shapes and finite numbers.

    Raises:
        CheckpointError: one of them is violated.
    """
    expected = model.state_dict()
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    problems = {"is missing": missing, "belongs to no part of the model": unknown}
    for problem, names in problems.items():
        first = min(names, default="")
        ensure(not names, f"{source}: {first} {problem} ({len(names)} keys in all)")
    for name, tensor in state.items():
        shapes = tuple(tensor.shape), tuple(expected[name].shape)
        message = f"{source}: {name} is {shapes[0]}, the model needs {shapes[1]}"
        ensure(shapes[0] == shapes[1], message)
        check_numbers(tensor, f"{source}: {name}")
    model.load_state_dict(state)


def check_numbers(tensor: Tensor, name: str) -> None:
    """Raise a CheckpointError unless the tensor is finite and dense, of 16-bit floats or more."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    ensure(
        dense and tensor.is_floating_point() and tensor.element_size() >= 2,
        f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: no table of real numbers "
        "of 16 bits or more",
    )
    finite = bool(torch.isfinite(tensor).all())
    ensure(finite, f"{name} holds NaN or infinite weights")
