"""Models on disk: ours, and the files the authors published.

    save(model, tokenizer, folder, about)   a Hugging Face folder plus training.json: all there or not at all
    load(folder)                            model and tokenizer, every byte checked against training.json
    load_published(path_or_id)              the authors' weights, in any of the formats they exist in
    save_published(model, path)             a model in the authors' format

Nothing here unpickles, runs code from a checkpoint, or fills a missing weight
with random numbers.
"""

import copy
import errno
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM, M2BertForRetrieval
from lib.operators.long_conv import ImplicitFilter
from lib.pipeline import files
from lib.report import card

PUBLISHED = (
    "togethercomputer/m2-bert-80M-2k-retrieval",
    "togethercomputer/m2-bert-80M-8k-retrieval",
    "togethercomputer/m2-bert-80M-32k-retrieval",
    "hazyresearch/M2-BERT-128-Retrieval-Encoder-V1",
    "hazyresearch/M2-BERT-2K-Retrieval-Encoder-V1",
    "hazyresearch/M2-BERT-8K-Retrieval-Encoder-V1",
    "hazyresearch/M2-BERT-32K-Retrieval-Encoder-V1",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.bin")
CONVERSION = "published-1"  # another number when what `read_published` makes of a file changes


# Composer stores numpy's random state beside the weights: an array, and nothing that runs.
RANDOM_STATE = [
    np._core.multiarray._reconstruct,
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]


class CheckpointError(ValueError):
    """A folder or file that cannot be trusted to be the model it claims to be."""


def save(model: nn.Module, tokenizer, folder: str | Path, about: dict | None = None) -> None:
    """Write the model to `folder`, replacing it whole: config, weights (safetensors), tokenizer, card and record.

    A retriever's folder is also one that `SentenceTransformer(folder)` reads, after `import lib.model.m2bert`. The folder
    appears under its name only when complete: an interrupted save leaves the old one.

    Args:
        about: how the model came about, for training.json and the card (`card.card` says which keys it reads). The
            sha256 of every file, the class, and that of `about["settings"]` come along.
    """
    about = dict(about or {})
    if about.get("settings"):
        about["settings_sha256"] = card.fingerprint(about["settings"])
    with files.replacing(folder) as draft, writing(folder):
        model.save_pretrained(draft)
        if tokenizer is not None:
            words = copy.deepcopy(tokenizer)
            words.model_max_length = (
                model.config.max_position_embeddings
            )  # what other libraries truncate at
            words.save_pretrained(draft)
        if isinstance(model, M2BertForRetrieval):
            save_modules(model, draft)
        (draft / "README.md").write_text(card.card(model, about), encoding="utf-8", newline="\n")
        names = sorted(
            path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file()
        )
        record = about | {
            "architecture": type(model).__name__,
            "sha256": {name: files.sha256(draft / name) for name in names},
        }
        (draft / "training.json").write_text(
            json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8", newline="\n"
        )
        for path in draft.rglob("*.safetensors"):
            shutil.copymode(draft / "training.json", path)  # safetensors writes for its owner only


@contextmanager
def writing(path: str | Path):
    """A full disk as the OSError it is: safetensors, tokenizers and torch each report it in a way of their own."""
    try:
        yield
    except Exception as error:
        if type(error) not in (Exception, RuntimeError, SafetensorError):
            raise
        raise OSError(
            errno.EIO,
            f"cannot be written, what was there is as it was ({reason(error)})",
            str(path),
        ) from None


def save_modules(model: M2BertForRetrieval, folder: Path) -> None:
    """What sentence-transformers needs beside a Hugging Face folder: Transformer -> Pooling -> Dense(tanh) -> Normalize.

    The pooler is stored a second time, as their Dense. Class and option names are those of their versions 2 to 5, which 6 reads too.
    """
    D, pooling = (
        model.config.hidden_size,
        {"cls": "cls_token", "mean": "mean_tokens"}[model.config.pooling],
    )
    kinds = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Normalize": "Normalize",
    }
    texts = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ],
        "sentence_bert_config.json": {
            "max_seq_length": model.config.max_position_embeddings,
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "cosine",
            "prompts": {},
            "default_prompt_name": None,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": D,
            **{
                f"pooling_mode_{kind}": kind == pooling
                for kind in ("cls_token", "mean_tokens", "max_tokens")
            },
        },
        "2_Dense/config.json": {
            "in_features": D,
            "out_features": D,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
        "3_Normalize/config.json": {},
    }
    for name, content in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n"
        )
    save_file(
        {
            f"linear.{name}": tensor.detach().contiguous()
            for name, tensor in model.model.pooler.state_dict().items()
        },
        folder / "2_Dense" / "model.safetensors",
        metadata={"format": "pt"},
    )


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
            raise CheckpointError(
                f"{folder} is no model folder: {name} is missing; run the stage that trains it"
            )
    saved, checksums = read_record(folder / "training.json")
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is no model folder: {name} is missing; run the stage that trains it"
            )
        if files.sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} is damaged: its sha256 is not the one in training.json; delete the folder and train or fetch it again"
            )
    config = M2BertConfig.from_pretrained(folder)
    model = (architecture or saved)(config).to(config.dtype or torch.float32)
    state = read_weights(folder / "model.safetensors")
    if saved is M2BertForMaskedLM:
        # safetensors stores the tied matrix once, under the embeddings' name.
        state.setdefault("decoder.weight", state["model.embeddings.word_embeddings.weight"])
        if isinstance(model, M2BertForRetrieval):
            state = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
            state |= {
                f"model.pooler.{name}": tensor
                for name, tensor in model.model.pooler.state_dict().items()
            }
    load_strictly(model, state, folder)
    tokenizer = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if "tokenizer.json" in checksums
        else None
    )
    return model.eval(), tokenizer


def read_record(path: Path) -> tuple[type, dict[str, str]]:
    """The class that was saved, and {file: sha256}."""
    classes = {cls.__name__: cls for cls in (M2BertForRetrieval, M2BertForMaskedLM)}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved, checksums = record["architecture"], record["sha256"]
        if not {"config.json", "model.safetensors"} <= checksums.keys():
            raise ValueError("no checksum of the weights")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete the folder and train or fetch it again"
        ) from None
    if saved not in classes:
        raise CheckpointError(
            f"{path}: unknown architecture {saved!r}, known are {', '.join(classes)}"
        )
    return classes[saved], checksums


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
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and fetch it again"
        ) from None
    except Exception as error:
        # torch raises half a dozen kinds for truncated, foreign and unsafe files; none is our bug. Its second sentence says how to run the file.
        raise CheckpointError(
            f"{path} cannot be read as weights only ({reason(error)}); fetch it again, or convert it to safetensors where you trust it"
        ) from None


def reason(error: Exception) -> str:
    """Kind and first sentence."""
    first = re.split(r"[.;] |[\n(]", str(error).strip())[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def load_strictly(model: nn.Module, state: dict[str, Tensor], source) -> None:
    """load_state_dict with one clear line: every key used, none missing, shapes equal, real numbers, no NaN."""
    expected = model.state_dict()
    for name in expected.keys() - state.keys():
        raise CheckpointError(
            f"{source}: {name} is missing ({len(expected.keys() - state.keys())} keys in all)"
        )
    for name in state.keys() - expected.keys():
        raise CheckpointError(
            f"{source}: {name} belongs to no part of the model ({len(state.keys() - expected.keys())} keys in all)"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: {name} is {tuple(tensor.shape)}, the model needs {tuple(expected[name].shape)}"
            )
        check_numbers(tensor, f"{source}: {name}")
    model.load_state_dict(state)


def check_numbers(tensor: Tensor, name: str) -> None:
    if (
        tensor.layout != torch.strided
        or tensor.is_meta
        or not tensor.is_floating_point()
        or tensor.element_size() < 2
    ):
        raise CheckpointError(
            f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: no table of real numbers of 16 bits or more"
        )
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} holds NaN or infinite weights")


# The authors' names -> ours, applied in order. In their files one sine frequency
# vector is stored six times, and constants are stored beside the weights.
RENAME = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
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
        (r"\.implicit_filter\.0\.", ".back.0."),
        (r"\.implicit_filter\.2\.", ".back.1."),
        (r"\.implicit_filter\.4\.", ".back.2."),
        (r"\.implicit_filter\.6\.", ".back.3."),
        (r"\.implicit_filter_rev\.0\.", ".ahead.0."),
        (r"\.implicit_filter_rev\.2\.", ".ahead.1."),
        (r"\.implicit_filter_rev\.4\.", ".ahead.2."),
        (r"\.implicit_filter_rev\.6\.", ".ahead.3."),
    )
)
HEAD = tuple(
    f"{layer}.{kind}" for layer in ("dense", "layernorm", "decoder") for kind in ("weight", "bias")
)
CONSTANT = re.compile(r"\.position_ids$|\.pos_emb\.t$|\.modulation\.deltas$")


def from_authors(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The authors' state dict under our names: (weights, constants). Buffers of FlashFFTConv are dropped, the six copies
    of each frequency vector made one."""
    weights, fixed = {}, {}
    for name, tensor in state.items():
        name = name.replace("module.", "")
        if name.startswith(("model.bert.", "model.cls.")):
            name = name.removeprefix("model.")
        if ".flashfft." in name or name.startswith("classifier."):
            continue
        for pattern, replacement in RENAME:
            name = pattern.sub(replacement, name)
        if (
            name.endswith(
                (
                    "_filter.inputs",
                    "_filter.freq",
                    ".pos_emb.t",
                    ".modulation.deltas",
                    ".position_ids",
                )
            )
            and tensor.ndim > 1
        ):
            if len(tensor) != 1:
                raise CheckpointError(
                    f"{name} is {tuple(tensor.shape)}, its first axis should be 1"
                )
            tensor = tensor[0]
        if not name.endswith(".position_ids"):
            check_numbers(tensor, name)  # before copies are compared: NaN differs from itself
        mine = fixed if CONSTANT.search(name) else weights
        if name in mine and not torch.equal(mine[name], tensor):
            raise CheckpointError(f"{name} is stored several times with different values")
        mine[name] = tensor
    return weights, fixed


def to_authors(model: M2BertForRetrieval | M2BertForMaskedLM) -> dict[str, Tensor]:
    """The inverse: every key of the authors' state dict, constants and copies included, each a tensor of its own."""
    renames = [
        (r"^model\.layers\.(\d+)\.mixer\.", r"bert.encoder.layer.\1.attention."),
        (r"^model\.layers\.(\d+)\.mlp\.", r"bert.encoder.layer.\1.mlp."),
        (r"^model\.pooler\.", "bert.pooler.dense."),
        (r"^model\.", "bert."),
        (r"^dense\.", "cls.predictions.transform.dense."),
        (r"^layernorm\.", "cls.predictions.transform.LayerNorm."),
        (r"^decoder\.", "cls.predictions.decoder."),
        (r"\.gated_filter\.", ".filter_fn."),
        (r"\.residual_filter\.", ".filter_fn2."),
        (r"\.inputs$", ".pos_emb.z"),
        *(
            (rf"\.{ours}\.{depth}\.", f".{theirs}.{2 * depth}.")
            for ours, theirs in (("back", "implicit_filter"), ("ahead", "implicit_filter_rev"))
            for depth in range(4)
        ),
    ]
    shapes = {
        ".freq": (1, -1),
        ".pos_emb.z": (1, -1, model.config.filter_emb_dim),
        ".pos_emb.t": (1, -1, 1),
        ".deltas": (1, 1, -1),
        ".position_ids": (1, -1),
    }
    directions = (
        ("implicit_filter", "implicit_filter_rev")
        if model.config.bidirectional
        else ("implicit_filter",)
    )
    theirs = {}
    for name, tensor in (model.state_dict() | constants(model)).items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        tensor = tensor.reshape(
            next((shape for end, shape in shapes.items() if name.endswith(end)), tensor.shape)
        )
        copies = (
            [
                f"{name.removesuffix('freq')}{direction}.{depth}.freq"
                for direction in directions
                for depth in (1, 3, 5)
            ]
            if name.endswith(".freq")
            else [name]
        )
        theirs |= {copy: tensor.detach().clone() for copy in copies}
    return theirs


def constants(model: M2BertForRetrieval | M2BertForMaskedLM) -> dict[str, Tensor]:
    """What the authors store beside the weights, under our names of their owners; here it is computed."""
    found = {"model.embeddings.position_ids": torch.arange(model.config.max_position_embeddings)}
    for name, module in model.named_modules():
        if isinstance(module, ImplicitFilter):
            found |= {
                f"{name}.pos_emb.t": module.time(module.max_length),
                f"{name}.modulation.deltas": module.deltas(),
            }
    return found


def check_constants(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """What the file stores beside the weights is what this model computes."""
    expected = constants(model)
    for name, tensor in stored.items():
        if name not in expected:
            raise CheckpointError(f"{name} belongs to no part of the model")
        if tensor.numel() != expected[name].numel() or not torch.allclose(
            tensor.flatten().double(),
            expected[name].to(tensor.dtype).double(),
            rtol=1e-5,
            atol=1e-6,
        ):
            raise CheckpointError(
                f"{name} is not what an M2-BERT of this size computes: the file is damaged, or of a variant that is not known here"
            )


# All of a config that changes what `forward` computes.
ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
    "mlp_blocks",
    "filter_order",
    "filter_emb_dim",
    "filter_length",
    "bidirectional",
    "residual_long_conv",
    "mixer_layer_norm",
    "mask_padding",
    "pad_to_max_length",
    "pooling",
)


def infer_config(state: dict[str, Tensor], **changes) -> M2BertConfig:
    """The sizes of a published model, read off its tensors' shapes (names already ours)."""
    try:
        vocab, width = state["model.embeddings.word_embeddings.weight"].shape
        numbers = {int(name.split(".")[2]) for name in state if name.startswith("model.layers.")}
        layers = len(numbers)
        if not layers or max(numbers) != layers - 1:
            raise CheckpointError(
                f"not the weights of an M2-BERT: its layers are {sorted(numbers)[:3]} … {max(numbers, default='none')}, not 0 to {layers - 1}"
            )
        blocks, doubled, _ = state["model.layers.0.mlp.gated_layers.weight"].shape
        return M2BertConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=state["model.layers.0.mlp.wo.weight"].shape[2] * blocks
            if (blocks * doubled) % 2
            else blocks * doubled // 2,
            max_position_embeddings=state["model.embeddings.position_embeddings.weight"].shape[0],
            type_vocab_size=state["model.embeddings.token_type_embeddings.weight"].shape[0],
            mlp_blocks=blocks,
            filter_order=state["model.layers.0.mixer.gated_filter.freq"].numel(),
            filter_emb_dim=state["model.layers.0.mixer.gated_filter.inputs"].shape[1],
            bidirectional="model.layers.0.mixer.gated_filter.ahead.0.weight" in state,
            residual_long_conv="model.layers.0.mixer.residual_filter.bias" in state,
            mixer_layer_norm="model.layers.0.mixer.layernorm.weight" in state,
            **(
                dict(
                    mask_padding=False,
                    pad_to_max_length=True,
                    pooling="cls",
                    initialization="reference",
                )
                | changes
            ),
        )
    except KeyError as error:
        raise CheckpointError(f"not the weights of an M2-BERT: {error} is missing") from None
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            f"not the weights of an M2-BERT: the shapes of word_embeddings, gated_filter.inputs or layers make no sense ({error})"
        ) from None


def infer_filter_length(stored: dict[str, Tensor]) -> int | None:
    """The time unit of the filters, t_i = i / (N-1), where the file says it."""
    t = next(
        (tensor.flatten() for name, tensor in stored.items() if name.endswith(".pos_emb.t")), None
    )
    return (
        None
        if t is None or len(t) < 2 or not 0 < float(t[-1]) < float("inf")
        else round((len(t) - 1) / float(t[-1])) + 1
    )


def load_published(path_or_id: str | Path, max_length: int | None = None):
    """The authors' weights as our model, in eval mode.

    Reads a file or folder in the flat retrieval format (`bert.…`, perhaps `module.`), the Composer format
    (`['state']['model']`), or safetensors under either naming; or a hub id, through the local hub cache and then the
    network. A torch file is converted once: the model is kept as a folder of ours, in safetensors, under
    ~/.cache/loco-workbench (or XDG_CACHE_HOME), named by the file's sha256.

    The embedding the authors publish is that of the text padded to the model's length: `pad_to_max_length` is set in
    the config, so that every client of `forward` gets it. It costs the full length for the shortest text.

    Args:
        max_length: None: the file's own; smaller: the tables are cut, and texts are padded to that.

    Returns:
        M2BertForRetrieval; M2BertForMaskedLM where the file has an MLM head and no pooler.

    Raises:
        CheckpointError: unreadable, incomplete or foreign file; max_length beyond the file's.
    """
    path = find_weights(path_or_id)
    if path.suffix == ".safetensors":
        return cut(read_published(path), max_length).eval()
    kept = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "loco-workbench"
        / CONVERSION
        / files.sha256(path)
    )
    try:
        model, _ = load(kept)
    except CheckpointError:  # not there, or not whole
        model = read_published(path)
        try:
            save(
                model,
                None,
                kept,
                {"stage": "published", "trained_on": {"File": path.name, "sha256": kept.name}},
            )
        except OSError:
            pass  # a full or read-only home: convert again next time
    return cut(model, max_length).eval()


def read_published(path: Path) -> M2BertForRetrieval | M2BertForMaskedLM:
    """The model of one weight file."""
    state = read_weights(path)
    if isinstance(state, dict) and isinstance(state.get("state"), dict):
        state = state["state"].get("model")
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{path} holds no table of tensors")
    if "model.layers.0.mixer.in_linear.weight" in state:
        raise CheckpointError(f"{path} is a model of this project: give its folder to `load`")
    try:
        state, stored = from_authors(state)
        config = infer_config(state, filter_length=infer_filter_length(stored))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if config.filter_length == config.max_position_embeddings:
        config.filter_length = None
    retrieval = "model.pooler.weight" in state
    if retrieval:
        state = {name: tensor for name, tensor in state.items() if name not in HEAD}
    else:
        words = state["model.embeddings.word_embeddings.weight"]
        if not torch.equal(state.setdefault("decoder.weight", words), words):
            raise CheckpointError(
                f"{path}: decoder.weight and the word embeddings are one matrix, stored with different values"
            )
    model = (M2BertForRetrieval if retrieval else M2BertForMaskedLM)(config)
    load_strictly(model, state, path)
    try:
        check_constants(model, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model


def save_published(model: M2BertForRetrieval | M2BertForMaskedLM, path: str | Path) -> None:
    """Write the weights as the authors do, whole or not at all.

    A retriever as the flat dict of their retrieval files, a masked language model as Composer's ['state']['model'] with
    its prefix `model.`; in safetensors, which cannot nest, without the outer dicts.

    Args:
        path: ….safetensors, or ….bin or ….pt for torch's format.

    Raises:
        CheckpointError: the model's embedding is not one that the authors' code computes, or another suffix.
    """
    path, state = Path(path), to_authors(model)
    if path.suffix not in (".safetensors", ".bin", ".pt"):
        raise CheckpointError(f"{path}: one of .safetensors, .bin or .pt")
    # The file says nothing but weights: what they would be taken for must be what they are.
    weights, stored = from_authors(state)
    theirs = infer_config(weights, filter_length=infer_filter_length(stored))
    for name in ARCHITECTURE:
        ours, there = (
            getattr(config, name) or config.max_position_embeddings
            if name == "filter_length"
            else getattr(config, name)
            for config in (model.config, theirs)
        )
        if ours != there:
            raise CheckpointError(
                f"{name}={ours!r}: the file cannot say so, and the authors' code would compute another embedding from these weights, with {there!r}; "
                f"set model.config.{name} = {there!r} first if that is what you want"
            )
    if isinstance(model, M2BertForMaskedLM):
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    with files.replacing_file(path) as draft, writing(path):
        if path.suffix == ".safetensors":
            save_file(state, draft)
        else:
            torch.save(
                {"state": {"model": state}} if isinstance(model, M2BertForMaskedLM) else state,
                draft,
            )


def cut(model: nn.Module, max_length: int | None) -> nn.Module:
    """The model with tables for `max_length` tokens only; its filters keep their time unit, so nothing else changes."""
    longest = model.config.max_position_embeddings
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise CheckpointError(
            f"max_length={max_length!r}: a whole number of tokens, or None for all {longest}"
        )
    if max_length is None or max_length == longest:
        return model
    if max_length > longest:
        raise CheckpointError(
            f"max_length={max_length} exceeds the {longest} tokens of the file: load it and lengthen the model with `extend`"
        )
    config = copy.deepcopy(model.config)
    config.filter_length, config.max_position_embeddings = (
        config.filter_length or longest,
        max_length,
    )
    short = type(model)(config)
    tables = ("position_embeddings.weight", "filter.inputs")
    short.load_state_dict(
        {
            name: tensor[:max_length] if name.endswith(tables) else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    return short.to(next(model.parameters()))


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
        raise CheckpointError(
            f"{path} holds none of {', '.join(WEIGHTS)}, nor exactly one .pt file"
        )
    name = str(path_or_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} is neither a file, a folder nor a hub id")
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    for weights in WEIGHTS:
        cached = try_to_load_from_cache(name, weights)
        if isinstance(cached, str):
            return Path(cached)
    for weights in WEIGHTS:
        try:
            get_hf_file_metadata(
                hf_hub_url(name, weights)
            )  # asks once; hf_hub_download asks six times, for half a minute
            return Path(hf_hub_download(name, weights))
        except Exception as error:
            why = reason(error)
            if type(error).__name__ not in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
                break
    raise CheckpointError(
        f"{name} cannot be fetched ({why}); known ids: {', '.join(PUBLISHED)}. Without a network, put its "
        f"pytorch_model.bin into a folder and give the folder's path instead of the id"
    )
