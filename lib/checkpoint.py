"""Models on disk: ours, and the files the authors published.

    save(model, tokenizer, folder, about)   a Hugging Face folder plus training.json: all there or not at all
    load(folder)                            model and tokenizer, every byte checked against training.json
    load_published(path_or_id)              the authors' weights, in any of the formats they exist in

Nothing here unpickles, runs code from a checkpoint, or fills a missing weight
with random numbers.
"""
import copy
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lib.model import M2BertConfig, M2BertForMaskedLM, M2BertForRetrieval

PUBLISHED = ("togethercomputer/m2-bert-80M-2k-retrieval", "togethercomputer/m2-bert-80M-8k-retrieval",
             "togethercomputer/m2-bert-80M-32k-retrieval", "hazyresearch/M2-BERT-128-Retrieval-Encoder-V1",
             "hazyresearch/M2-BERT-2K-Retrieval-Encoder-V1", "hazyresearch/M2-BERT-8K-Retrieval-Encoder-V1",
             "hazyresearch/M2-BERT-32K-Retrieval-Encoder-V1")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.bin")


# Composer stores numpy's random state beside the weights: an array, and nothing that runs.
RANDOM_STATE = [np._core.multiarray._reconstruct, (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, np.dtypes.UInt32DType]


class CheckpointError(ValueError):
    """A folder or file that cannot be trusted to be the model it claims to be."""


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(model: nn.Module, tokenizer, folder: str | Path, about: dict | None = None) -> None:
    """Write config, weights (safetensors), tokenizer and `about` to `folder`, replacing it whole.

    The folder appears under its name only when complete: an interrupted save
    leaves the old one. `about` becomes training.json, with the weights' sha256.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        record = dict(about or {}, architecture=type(model).__name__, sha256={path.name: sha256(path) for path in sorted(draft.iterdir())})
        (draft / "training.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(draft / "training.json", draft / "model.safetensors")              # safetensors writes for its owner only
        for path in draft.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.chmod(draft, 0o755)
        replace(folder, draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def replace(folder: Path, draft: Path) -> None:
    """The draft under the folder's name; the old folder comes back when that fails."""
    if not folder.exists():
        draft.rename(folder)
        return
    old = draft.with_name(f"{draft.name}-old")
    folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load(folder: str | Path, architecture: type | None = None):
    """The model (in eval mode) and tokenizer of a folder written by `save`.

    Args:
        architecture: class to build; None: the one that was saved. An encoder
            may be loaded from a pretraining checkpoint: the head stays behind
            and the pooler starts as the config's initialisation draws it.

    Raises:
        CheckpointError: the folder is missing or incomplete, a weight file is
            damaged, or a key is missing, left over or of another shape.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "training.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no model folder: {name} is missing; run the stage that trains it")
    saved, files = read_record(folder / "training.json")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no model folder: {name} is missing; run the stage that trains it")
        if sha256(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is damaged: its sha256 is not the one in training.json; delete the folder and train or fetch it again")
    model = (architecture or saved)(M2BertConfig.from_pretrained(folder))
    state = read_weights(folder / "model.safetensors")
    if saved is M2BertForMaskedLM:
        # safetensors stores the tied matrix once, under the embeddings' name.
        state.setdefault("decoder.weight", state["model.embeddings.word_embeddings.weight"])
        if isinstance(model, M2BertForRetrieval):
            state = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
            state |= {f"model.pooler.{name}": tensor for name, tensor in model.model.pooler.state_dict().items()}
    load_strictly(model, state, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if (folder / "tokenizer.json").is_file() else None
    return model.eval(), tokenizer


def read_record(path: Path) -> tuple[type, dict[str, str]]:
    """The class that was saved, and {file: sha256}."""
    classes = {cls.__name__: cls for cls in (M2BertForRetrieval, M2BertForMaskedLM)}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved, files = record["architecture"], record["sha256"]
        if not {"config.json", "model.safetensors"} <= files.keys():
            raise ValueError("no checksum of the weights")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); delete the folder and train or fetch it again") from None
    if saved not in classes:
        raise CheckpointError(f"{path}: unknown architecture {saved!r}, known are {', '.join(classes)}")
    return classes[saved], files


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or (weights only) torch file."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(RANDOM_STATE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and fetch it again") from None
    except Exception as error:
        # torch raises half a dozen kinds for truncated, foreign and unsafe files; none is our bug. Its second sentence says how to run the file.
        raise CheckpointError(f"{path} cannot be read as weights only ({reason(error)}); fetch it again, or convert it to safetensors where you trust it") from None


def reason(error: Exception) -> str:
    """Kind and first sentence."""
    first = re.split(r"[.;] |[\n(]", str(error).strip())[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def load_strictly(model: nn.Module, state: dict[str, Tensor], source) -> None:
    """load_state_dict with one clear line: every key used, none missing, shapes equal, no NaN."""
    expected = model.state_dict()
    for name in expected.keys() - state.keys():
        raise CheckpointError(f"{source}: {name} is missing ({len(expected.keys() - state.keys())} keys in all)")
    for name in state.keys() - expected.keys():
        raise CheckpointError(f"{source}: {name} belongs to no part of the model ({len(state.keys() - expected.keys())} keys in all)")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{source}: {name} is {tuple(tensor.shape)}, the model needs {tuple(expected[name].shape)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds NaN or infinite weights")
    model.load_state_dict(state)


# The authors' names -> ours, applied in order. In their files one sine frequency
# vector is stored six times, and constants are stored beside the weights.
RENAME = tuple((re.compile(pattern), name) for pattern, name in (
    (r"^bert\.encoder\.layer\.(\d+)\.attention\.", r"model.layers.\1.mixer."),
    (r"^bert\.encoder\.layer\.(\d+)\.mlp\.", r"model.layers.\1.mlp."),
    (r"^bert\.pooler\.dense\.", "model.pooler."),
    (r"^bert\.", "model."),
    (r"^cls\.predictions\.transform\.dense\.", "dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "layernorm."),
    (r"^cls\.predictions\.decoder\.", "decoder."),
    (r"\.filter_fn\.", ".gated_filter."),
    (r"\.filter_fn2\.", ".residual_filter."),
    (r"\.pos_emb\.z$", ".inputs"),
    (r"\.implicit_filter(_rev)?\.[135]\.freq$", ".freq"),
    (r"\.implicit_filter\.0\.", ".back.0."), (r"\.implicit_filter\.2\.", ".back.1."),
    (r"\.implicit_filter\.4\.", ".back.2."), (r"\.implicit_filter\.6\.", ".back.3."),
    (r"\.implicit_filter_rev\.0\.", ".ahead.0."), (r"\.implicit_filter_rev\.2\.", ".ahead.1."),
    (r"\.implicit_filter_rev\.4\.", ".ahead.2."), (r"\.implicit_filter_rev\.6\.", ".ahead.3."),
))
CONSTANTS = re.compile(r"\.flashfft\.|\.position_ids$|\.pos_emb\.t$|\.modulation\.deltas$")


def from_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under our names: constants dropped, the six copies of each frequency vector made one."""
    ours = {}
    for name, tensor in state.items():
        name = name.replace("module.", "")
        if name.startswith("model.bert.") or name.startswith("model.cls."):
            name = name.removeprefix("model.")
        if CONSTANTS.search(name):
            continue
        for pattern, replacement in RENAME:
            name = pattern.sub(replacement, name)
        if name.endswith(("_filter.inputs", "_filter.freq")) and tensor.ndim > 1:
            tensor = tensor[0]                                             # stored with a leading axis of 1
        if name in ours and not torch.equal(ours[name], tensor):
            raise CheckpointError(f"{name} is stored several times with different values")
        ours[name] = tensor
    return ours


def infer_config(state: dict[str, Tensor], **changes) -> M2BertConfig:
    """The sizes of a published model, read off its tensors' shapes (names already ours)."""
    try:
        vocab, width = state["model.embeddings.word_embeddings.weight"].shape
        layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
        blocks, doubled, _ = state["model.layers.0.mlp.gated_layers.weight"].shape
        return M2BertConfig(
            vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
            intermediate_size=state["model.layers.0.mlp.wo.weight"].shape[2] * blocks if (blocks * doubled) % 2 else blocks * doubled // 2,
            max_position_embeddings=state["model.embeddings.position_embeddings.weight"].shape[0],
            type_vocab_size=state["model.embeddings.token_type_embeddings.weight"].shape[0],
            mlp_blocks=blocks, filter_order=state["model.layers.0.mixer.gated_filter.freq"].numel(),
            filter_emb_dim=state["model.layers.0.mixer.gated_filter.inputs"].shape[1],
            bidirectional="model.layers.0.mixer.gated_filter.ahead.0.weight" in state,
            residual_long_conv="model.layers.0.mixer.residual_filter.bias" in state,
            mixer_layer_norm="model.layers.0.mixer.layernorm.weight" in state,
            **(dict(mask_padding=False, pooling="cls", initialization="reference") | changes))
    except KeyError as error:
        raise CheckpointError(f"not the weights of an M2-BERT: {error} is missing") from None
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"not the weights of an M2-BERT: the shapes of word_embeddings, gated_filter.inputs or layers make no sense ({error})") from None


def load_published(path_or_id: str | Path, max_length: int | None = None):
    """The authors' weights as our model, in eval mode.

    Reads a file or folder in the flat retrieval format (`bert.…`, perhaps
    `module.`), the Composer format (`['state']['model']`), or safetensors under
    either naming; or a hub id, through the local hub cache and then the network.

    Args:
        max_length: None: the file's own; smaller: the tables are cut.

    Returns:
        M2BertForRetrieval; M2BertForMaskedLM where the file has an MLM head and no pooler.

    Raises:
        CheckpointError: unreadable, incomplete or foreign file; max_length beyond the file's.
    """
    path = find_weights(path_or_id)
    state = read_weights(path)
    if isinstance(state, dict) and isinstance(state.get("state"), dict):
        state = state["state"].get("model")
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise CheckpointError(f"{path} holds no table of tensors")
    if "model.layers.0.mixer.in_linear.weight" in state:
        raise CheckpointError(f"{path} is a model of this project: give its folder to `load`")
    try:
        state = from_authors({name: tensor for name, tensor in state.items() if not name.startswith("classifier.")})
        config = infer_config(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    retrieval = "model.pooler.weight" in state
    if retrieval:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("decoder.", "dense.", "layernorm."))}
    else:
        words = state["model.embeddings.word_embeddings.weight"]
        if not torch.equal(state.setdefault("decoder.weight", words), words):
            raise CheckpointError(f"{path}: decoder.weight and the word embeddings are one matrix, stored with different values")
    model = (M2BertForRetrieval if retrieval else M2BertForMaskedLM)(config)
    load_strictly(model, state, path)
    return cut(model, max_length).eval()


def cut(model: nn.Module, max_length: int | None) -> nn.Module:
    """The model with tables for `max_length` tokens only; its filters keep their time unit, so nothing else changes."""
    longest = model.config.max_position_embeddings
    if max_length is None or max_length == longest:
        return model
    if max_length > longest:
        raise CheckpointError(f"max_length={max_length} exceeds the {longest} tokens of the file: load it and lengthen the model with `extend`")
    config = copy.deepcopy(model.config)
    config.filter_length, config.max_position_embeddings = config.filter_length or longest, max_length
    short = type(model)(config)
    tables = ("position_embeddings.weight", "filter.inputs")
    short.load_state_dict({name: tensor[:max_length] if name.endswith(tables) else tensor for name, tensor in model.state_dict().items()})
    return short


def find_weights(path_or_id: str | Path) -> Path:
    """The weight file of a path or hub id."""
    path = Path(path_or_id)
    if path.is_file():
        return path
    if path.is_dir():
        for name in WEIGHTS:
            if (path / name).is_file():
                return path / name
        found = sorted(path.glob("*.pt"))
        if len(found) == 1:
            return found[0]
        raise CheckpointError(f"{path} holds none of {', '.join(WEIGHTS)}, nor exactly one .pt file")
    name = str(path_or_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} is neither a file, a folder nor a hub id")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    for weights in WEIGHTS:
        cached = try_to_load_from_cache(name, weights)
        if isinstance(cached, str):
            return Path(cached)
    for weights in WEIGHTS:
        try:
            get_hf_file_metadata(hf_hub_url(name, weights))                # asks once; hf_hub_download asks six times, for half a minute
            return Path(hf_hub_download(name, weights))
        except Exception as error:
            why = reason(error)
            if type(error).__name__ not in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
                break
    raise CheckpointError(f"{name} cannot be fetched ({why}); known ids: {', '.join(PUBLISHED)}. Without a network, put its "
                          f"pytorch_model.bin into a folder and give the folder's path instead of the id")
