"""The authors' weights, in each of the formats in which they were published.

    load_published(path_or_id)                          the model of a file, a folder or a hub id
    python -m lib.model.published laptop published_32k  a row of `published` in params.yaml

The command writes data/models/published_32k, a folder like that of any trained model, with the
tokenizer of the weights: the row's `tokenizer`, else the one beside the weight file, else
bert-base-uncased. After that `evaluate@published_32k` runs like any other stage.
"""

import copy
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.model.checkpoint import (
    CheckpointError,
    check_numbers,
    load,
    load_strictly,
    read_weights,
    reason,
    save,
)
from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM, M2BertForRetrieval
from lib.model.tokens import given_tokenizer
from lib.operators.long_conv import ImplicitFilter
from lib.pipeline import files, params
from lib.pipeline.errors import CorpusError

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
CONVERSION = "published-1"  # raise the number if `read_published` makes another model of a file
# The authors' names -> ours, applied in order. Their files store one sine frequency vector six
# times, and constants beside the weights.
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
    f"{layer}.{name}" for layer in ("dense", "layernorm", "decoder") for name in ("weight", "bias")
)
CONSTANT = re.compile(r"\.position_ids$|\.pos_emb\.t$|\.modulation\.deltas$")
# The authors store these tensors with a first axis of size 1.
ROWS = ("_filter.inputs", "_filter.freq", ".pos_emb.t", ".modulation.deltas", ".position_ids")


def load_published(path_or_id: str | Path, max_length: int | None = None):
    """The authors' weights as our model, in eval mode.

    Reads a file or folder in the flat retrieval format (`bert.…`, with or without `module.`), the
    Composer format (`['state']['model']`), or safetensors under either naming; or a hub id, from
    the local hub cache or else the network. A torch file is converted once: the model is kept in
    safetensors as a folder of ours under ~/.cache/loco-workbench (or XDG_CACHE_HOME), named by the
    file's sha256.

    The authors' embedding of a text is that of the text padded to the model's length. So the config
    sets `pad_to_max_length`, and every caller of `forward` gets this embedding; the shortest text
    costs as much as the longest.

    Args:
        max_length: None: the length of the file's tables. A smaller length cuts the tables, and
            texts are padded to it.

    Returns:
        M2BertForRetrieval; M2BertForMaskedLM if the file has an MLM head and no pooler.

    Raises:
        CheckpointError: the file is unreadable, incomplete or not an M2-BERT; max_length exceeds
            the file's length.
    """
    path = find_weights(path_or_id)
    if path.suffix == ".safetensors":
        return cut(read_published(path), max_length).eval()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    converted = cache / "loco-workbench" / CONVERSION / files.sha256(path)
    try:
        model, _ = load(converted)
    except CheckpointError:  # missing or incomplete
        model = read_published(path)
        origin = {"File": path.name, "sha256": converted.name}
        try:
            save(model, None, converted, {"stage": "published", "trained_on": origin})
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
                f"{path}: decoder.weight and the word embeddings are one matrix, stored with "
                "different values"
            )
    model = (M2BertForRetrieval if retrieval else M2BertForMaskedLM)(config)
    load_strictly(model, state, path)
    try:
        check_constants(model, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model


def from_authors(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The authors' state dict under our names: (weights, constants).

    The buffers of FlashFFTConv are left out; the six copies of each frequency vector become one.

    Raises:
        CheckpointError: copies differ, or a tensor has NaN or an unexpected shape.
    """
    weights, constants = {}, {}
    for name, tensor in state.items():
        name = name.replace("module.", "")
        if name.startswith(("model.bert.", "model.cls.")):
            name = name.removeprefix("model.")
        if ".flashfft." in name or name.startswith("classifier."):
            continue
        for pattern, replacement in RENAME:
            name = pattern.sub(replacement, name)
        if name.endswith(ROWS) and tensor.ndim > 1:
            if len(tensor) != 1:
                raise CheckpointError(
                    f"{name} is {tuple(tensor.shape)}, its first axis should be 1"
                )
            tensor = tensor[0]
        if not name.endswith(".position_ids"):
            check_numbers(tensor, name)  # before copies are compared: NaN differs from itself
        tensors = constants if CONSTANT.search(name) else weights
        if name in tensors and not torch.equal(tensors[name], tensor):
            raise CheckpointError(f"{name} is stored several times with different values")
        tensors[name] = tensor
    return weights, constants


def constants(model: M2BertForRetrieval | M2BertForMaskedLM) -> dict[str, Tensor]:
    """The constants that the authors store beside the weights, as our model computes them.

    Each has the name of our module that it belongs to, and the authors' own suffix.
    """
    computed = {"model.embeddings.position_ids": torch.arange(model.config.max_position_embeddings)}
    for name, module in model.named_modules():
        if isinstance(module, ImplicitFilter):
            computed |= {
                f"{name}.pos_emb.t": module.time(module.max_length),
                f"{name}.modulation.deltas": module.deltas(),
            }
    return computed


def check_constants(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Check that the constants of the file are those that the model computes.

    Raises:
        CheckpointError: a constant is unknown, or has other values.
    """
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
                f"{name} is not what an M2-BERT of this size computes: the file is damaged, or of "
                "a variant that is not known here"
            )


def infer_config(state: dict[str, Tensor], **changes) -> M2BertConfig:
    """The configuration of a published model, from its tensors' names (already ours) and shapes.

    Raises:
        CheckpointError: a tensor is missing, or its shape makes no sense.
    """
    options = dict(
        mask_padding=False, pad_to_max_length=True, pooling="cls", initialization="reference"
    )
    mixer, embeddings = "model.layers.0.mixer", "model.embeddings"
    try:
        vocab, width = state[f"{embeddings}.word_embeddings.weight"].shape
        layers = count_layers(state)
        blocks, doubled, _ = state["model.layers.0.mlp.gated_layers.weight"].shape
        padded = state["model.layers.0.mlp.wo.weight"].shape[2] * blocks
        return M2BertConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=padded if (blocks * doubled) % 2 else blocks * doubled // 2,
            max_position_embeddings=state[f"{embeddings}.position_embeddings.weight"].shape[0],
            type_vocab_size=state[f"{embeddings}.token_type_embeddings.weight"].shape[0],
            mlp_blocks=blocks,
            filter_order=state[f"{mixer}.gated_filter.freq"].numel(),
            filter_emb_dim=state[f"{mixer}.gated_filter.inputs"].shape[1],
            bidirectional=f"{mixer}.gated_filter.ahead.0.weight" in state,
            residual_long_conv=f"{mixer}.residual_filter.bias" in state,
            mixer_layer_norm=f"{mixer}.layernorm.weight" in state,
            **(options | changes),
        )
    except KeyError as error:
        raise CheckpointError(f"not the weights of an M2-BERT: {error} is missing") from None
    except CheckpointError:
        raise
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            "not the weights of an M2-BERT: the shapes of word_embeddings, gated_filter.inputs or "
            f"layers make no sense ({error})"
        ) from None


def count_layers(state: dict[str, Tensor]) -> int:
    """The number of layers; they must be numbered from 0 without a gap."""
    numbers = {int(name.split(".")[2]) for name in state if name.startswith("model.layers.")}
    layers = len(numbers)
    if not layers or max(numbers) != layers - 1:
        raise CheckpointError(
            f"not the weights of an M2-BERT: its layers are {sorted(numbers)[:3]} … "
            f"{max(numbers, default='none')}, not 0 to {layers - 1}"
        )
    return layers


def infer_filter_length(stored: dict[str, Tensor]) -> int | None:
    """N of the filters' time axis t_i = i / (N-1); None if the file does not store t."""
    axes = (tensor.flatten() for name, tensor in stored.items() if name.endswith(".pos_emb.t"))
    t = next(axes, None)
    if t is None or len(t) < 2 or not 0 < float(t[-1]) < float("inf"):
        return None
    return round((len(t) - 1) / float(t[-1])) + 1


def cut(model: nn.Module, max_length: int | None) -> nn.Module:
    """The model with tables for `max_length` tokens only.

    The filters keep their time unit, so their taps do not change.

    Raises:
        CheckpointError: max_length is no length, or exceeds that of the model.
    """
    longest = model.config.max_position_embeddings
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise CheckpointError(
            f"max_length={max_length!r}: a whole number of tokens, or None for all {longest}"
        )
    if max_length is None or max_length == longest:
        return model
    if max_length > longest:
        raise CheckpointError(
            f"max_length={max_length} exceeds the {longest} tokens of the file: load it and "
            "lengthen the model with `extend`"
        )
    config = copy.deepcopy(model.config)
    config.filter_length = config.filter_length or longest
    config.max_position_embeddings = max_length
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
    """The weight file of a path or hub id.

    Raises:
        CheckpointError: no such file, or the hub cannot be reached.
    """
    path = Path(path_or_id)
    if path.is_file():
        return path
    return weights_in(path) if path.is_dir() else weights_of_hub_id(str(path_or_id))


def weights_in(folder: Path) -> Path:
    """The weight file of a folder."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(folder.glob("*.pt"))
    if len(candidates) != 1:
        raise CheckpointError(
            f"{folder} holds none of {', '.join(WEIGHTS)}, nor exactly one .pt file"
        )
    return candidates[0]


def weights_of_hub_id(name: str) -> Path:
    """The weight file of a hub id, from the local hub cache or else the network."""
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
            # It asks once; hf_hub_download asks six times, for half a minute.
            get_hf_file_metadata(hf_hub_url(name, weights))
            return Path(hf_hub_download(name, weights))
        except Exception as error:
            why = reason(error)
            if type(error).__name__ not in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
                break
    raise CheckpointError(
        f"{name} cannot be fetched ({why}); known ids: {', '.join(PUBLISHED)}. Without a network, "
        "put its pytorch_model.bin into a folder and give the folder's path instead of the id"
    )


def fetch(profile: str, row: str) -> Path:
    """Load the checkpoint of a row of `published` and save it as data/models/<row>.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint cannot be read or trusted, is no retriever, or does not fit
            its tokenizer.
        CorpusError: the tokenizer cannot be read.
        ParamsError: there is no such row.
    """
    rows = params.rows(profile, "published")
    params.known(row, rows, f"row of published at {profile}")
    settings = rows[row]
    checkpoint = settings["checkpoint"]
    source = find_weights(checkpoint)
    tokenizer = given_tokenizer(
        settings.get("tokenizer") or tokenizer_beside(source) or "bert-base-uncased"
    )
    model = load_published(source, settings.get("max_length"))
    check_tokenizer(checkpoint, model, tokenizer)
    folder = params.data(profile) / "models" / row
    about = {"stage": "published", "row": row, "profile": profile, "settings": settings}
    about["trained_on"] = {"Published by": "the authors of the paper", "Checkpoint": checkpoint}
    readme = (
        f"# {row} ({profile})\n\n"
        f"The weights that the authors of the paper published: {checkpoint}\n"
    )
    save(model, tokenizer, folder, about, readme)
    return folder


def check_tokenizer(checkpoint: str, model: nn.Module, tokenizer) -> None:
    """Raise a CheckpointError unless the model is a retriever and the tokenizer fits it."""
    if not isinstance(model, M2BertForRetrieval):
        raise CheckpointError(
            f"{checkpoint} has no pooler: a masked language model is no retriever"
        )
    remedy = "name the right one as `tokenizer` of the row"
    vocab, pad = model.config.vocab_size, model.config.pad_token_id
    if len(tokenizer) > vocab:
        raise CheckpointError(
            f"{checkpoint} has {vocab:,} words, its tokenizer {len(tokenizer):,}: {remedy}"
        )
    if tokenizer.pad_token_id != pad:
        raise CheckpointError(
            f"{checkpoint} pads with id {pad}, its tokenizer with {tokenizer.pad_token_id}: "
            f"{remedy}"
        )


def tokenizer_beside(weights: Path) -> str | None:
    """The folder of the weights if it holds a tokenizer too."""
    names = ("tokenizer.json", "vocab.txt")
    return str(weights.parent) if any((weights.parent / name).is_file() for name in names) else None


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lib.model.published PROFILE ROW")
    try:
        fetch(*sys.argv[1:])
    except (CheckpointError, CorpusError, params.ParamsError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
