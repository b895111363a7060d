"""The authors' weights, in each of the formats in which they were published.

    load_published(path_or_id)                          the model of a file, a folder or a hub id
    python -m lib.model.published laptop published_32k  a row of `published` in params.yaml

The command writes data/models/published_32k, a folder like that of any trained model, with the
tokenizer of the weights: the row's `tokenizer`, else the one beside the weight file, else
bert-base-uncased. After that `evaluate@published_32k` runs like any other stage.
"""

import copy
import itertools
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.model.checkpoint import (
    WORDS,
    CheckpointError,
    check_numbers,
    ensure,
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
from lib.pipeline.errors import WorkbenchError

PUBLISHED = (
    *(f"togethercomputer/m2-bert-80M-{length}-retrieval" for length in ("2k", "8k", "32k")),
    *(f"hazyresearch/M2-BERT-{n}-Retrieval-Encoder-V1" for n in ("128", "2K", "8K", "32K")),
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.bin")
CONVERSION = "published-1"  # raise the number if `read_published` makes another model of a file
# The authors' names -> ours, applied in order. A linear layer stands at every second place of
# their filters; their files store one sine frequency vector six times.
RENAME = {
    r"module\.": "",
    r"^model\.(bert|cls)\.": r"\1.",
    r"^bert\.encoder\.layer\.(\d+)\.attention\.": r"model.layers.\1.mixer.",
    r"^bert\.encoder\.layer\.(\d+)\.mlp\.": r"model.layers.\1.mlp.",
    r"^bert\.pooler\.dense\.": "model.pooler.",
    r"^bert\.": "model.",
    r"^cls\.predictions\.transform\.dense\.": "dense.",
    r"^cls\.predictions\.transform\.LayerNorm\.": "layernorm.",
    r"^cls\.predictions\.decoder\.": "decoder.",
    r"\.filter_fn\.": ".gated_filter.",
    r"\.filter_fn2\.": ".residual_filter.",
    r"\.pos_emb\.z$": ".inputs",
    r"\.implicit_filter(_rev)?\.[135]\.freq$": ".freq",
    r"\.implicit_filter\.([0246])\.": lambda match: f".back.{int(match[1]) // 2}.",
    r"\.implicit_filter_rev\.([0246])\.": lambda match: f".ahead.{int(match[1]) // 2}.",
}
UNUSED = re.compile(r"\.flashfft\.|^classifier\.")
HEAD = tuple(
    f"{layer}.{name}" for layer in ("dense", "layernorm", "decoder") for name in ("weight", "bias")
)
# Constants stored beside the weights, and tensors whose first axis has size 1.
CONSTANTS = (".position_ids", ".pos_emb.t", ".modulation.deltas")
ROWS = ("_filter.inputs", "_filter.freq", *CONSTANTS)


def load_published(path_or_id: str | Path, max_length: int | None = None):
    """The authors' weights as our model, in eval mode.

    Reads the flat retrieval format (`bert.…`, with or without `module.`), the Composer format
    (`['state']['model']`), or safetensors under either naming. A torch file is converted once: the
    model is kept in safetensors as a folder of ours under ~/.cache/loco-workbench (or
    XDG_CACHE_HOME), named by the file's sha256.

    The authors' embedding of a text is that of the text padded to the model's length. So the config
    sets `pad_to_max_length`, and the shortest text costs as much as the longest.

    Args:
        path_or_id: a file, a folder, or a hub id (from the local cache or else the network).
        max_length: texts are padded to it and the tables are cut; None: the length of the tables.

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


# ------------------------------------------------------------------ one weight file


def read_published(path: Path) -> M2BertForRetrieval | M2BertForMaskedLM:
    """The model of one weight file."""
    state = read_weights(path)
    try:
        state, stored = from_authors(table_of_tensors(state))
        config = infer_config(state, filter_length=infer_filter_length(stored))
        if config.filter_length == config.max_position_embeddings:
            config.filter_length = None
        if "model.pooler.weight" in state:
            model = M2BertForRetrieval(config)
            state = {name: tensor for name, tensor in state.items() if name not in HEAD}
        else:
            model = M2BertForMaskedLM(config)
            tied = torch.equal(state.setdefault("decoder.weight", state[WORDS]), state[WORDS])
            message = "decoder.weight and the word embeddings are one matrix with different values"
            ensure(tied, message)
        check_constants(model, stored)
    except ValueError as error:  # also of a layer that cannot have these sizes
        raise CheckpointError(f"{path}: {error}") from None
    load_strictly(model, state, path)
    return model


def table_of_tensors(content) -> dict[str, Tensor]:
    """The state dict in the content of a file of the authors."""
    if isinstance(content, dict) and isinstance(content.get("state"), dict):
        content = content["state"].get("model")
    ensure(
        isinstance(content, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()),
        "holds no table of tensors",
    )
    ours = "model.layers.0.mixer.in_linear.weight" in content
    ensure(not ours, "a model of this project: give its folder to `load`")
    return content


def from_authors(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The authors' state dict under our names: (weights, constants).

    The buffers of FlashFFTConv are left out; the six copies of each frequency vector, which have
    to be equal, become one.
    """
    weights, constants = {}, {}
    for name, tensor in state.items():
        for pattern, replacement in RENAME.items():
            name = re.sub(pattern, replacement, name)
        if UNUSED.search(name):
            continue
        if name.endswith(ROWS) and tensor.ndim > 1:
            message = f"{name} is {tuple(tensor.shape)}, its first axis should be 1"
            ensure(len(tensor) == 1, message)
            tensor = tensor[0]
        if not name.endswith(".position_ids"):
            check_numbers(tensor, name)  # before copies are compared: NaN differs from itself
        tensors = constants if name.endswith(CONSTANTS) else weights
        first = tensors.setdefault(name, tensor)
        same = first is tensor or torch.equal(first, tensor)
        ensure(same, f"{name} is stored several times with different values")
    return weights, constants


def constants(model: M2BertForRetrieval | M2BertForMaskedLM) -> dict[str, Tensor]:
    """The constants as our model computes them: {our module's name + the authors' suffix: …}."""
    computed = {"model.embeddings.position_ids": torch.arange(model.config.max_position_embeddings)}
    for name, module in model.named_modules():
        if isinstance(module, ImplicitFilter):
            computed[f"{name}.pos_emb.t"] = module.time(module.max_length)
            computed[f"{name}.modulation.deltas"] = module.deltas()
    return computed


def check_constants(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Raise a CheckpointError unless the model computes the constants of the file."""
    computed = constants(model)
    for name, tensor in stored.items():
        ensure(name in computed, f"{name} belongs to no part of the model")
        ours, theirs = computed[name].to(tensor.dtype).double(), tensor.flatten().double()
        ensure(
            ours.shape == theirs.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6),
            f"{name} is not what an M2-BERT of this size computes: the file is damaged, or of a "
            "variant that is not known here",
        )


def infer_config(state: dict[str, Tensor], **changes) -> M2BertConfig:
    """The configuration of a published model, from its tensors' names (already ours) and shapes."""
    options = dict(mask_padding=False, pad_to_max_length=True, pooling="cls") | changes
    mixer, mlp, embeddings = "model.layers.0.mixer", "model.layers.0.mlp", "model.embeddings"
    # Layers are numbered from 0; of a number beyond a gap, load_strictly refuses the keys.
    numbers = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
    try:
        vocab, width = state[WORDS].shape
        blocks, doubled, _ = state[f"{mlp}.gated_layers.weight"].shape
        padded = state[f"{mlp}.wo.weight"].shape[2] * blocks
        return M2BertConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=next(n for n in itertools.count() if str(n) not in numbers),
            intermediate_size=padded if (blocks * doubled) % 2 else blocks * doubled // 2,
            max_position_embeddings=state[f"{embeddings}.position_embeddings.weight"].shape[0],
            type_vocab_size=state[f"{embeddings}.token_type_embeddings.weight"].shape[0],
            mlp_blocks=blocks,
            filter_order=state[f"{mixer}.gated_filter.freq"].numel(),
            filter_emb_dim=state[f"{mixer}.gated_filter.inputs"].shape[1],
            bidirectional=f"{mixer}.gated_filter.ahead.0.weight" in state,
            residual_long_conv=f"{mixer}.residual_filter.bias" in state,
            mixer_layer_norm=f"{mixer}.layernorm.weight" in state,
            **options,
        )
    except (KeyError, ValueError, IndexError) as error:
        shapes = "the shapes of word_embeddings, gated_filter.inputs or layers make no sense"
        missing = isinstance(error, KeyError)
        problem = f"{error} is missing" if missing else f"{shapes} ({error})"
        raise CheckpointError(f"not the weights of an M2-BERT: {problem}") from None


def infer_filter_length(stored: dict[str, Tensor]) -> int | None:
    """N of the filters' time axis t_i = i / (N-1); None if the file does not store t."""
    axes = (tensor.flatten() for name, tensor in stored.items() if name.endswith(".pos_emb.t"))
    t = next(axes, torch.empty(0))
    if len(t) < 2 or not 0 < float(t[-1]) < float("inf"):
        return None
    return round((len(t) - 1) / float(t[-1])) + 1


def cut(model: nn.Module, max_length: int | None) -> nn.Module:
    """The model with tables for `max_length` tokens only; None: all of them.

    The filters keep their time unit, so their taps do not change.
    """
    longest = model.config.max_position_embeddings
    length = longest if max_length is None else max_length
    message = f"max_length={length!r}: a whole number of tokens, or None for all {longest}"
    ensure(type(length) is int and length > 0, message)
    message = f"max_length={length} exceeds the {longest} tokens of the file: load it and lengthen"
    ensure(length <= longest, f"{message} the model with `extend`")
    if length == longest:
        return model
    config = copy.deepcopy(model.config)
    config.filter_length = config.filter_length or longest
    config.max_position_embeddings = length
    short, state = type(model)(config), model.state_dict()
    for name, tensor in state.items():
        if name.endswith(("position_embeddings.weight", "filter.inputs")):
            state[name] = tensor[:length]
    short.load_state_dict(state)
    return short.to(next(model.parameters()))


# ------------------------------------------------------------------ where the weights are


def find_weights(path_or_id: str | Path) -> Path:
    """The weight file of a path, a folder or a hub id."""
    path = Path(path_or_id)
    if path.is_file():
        return path
    if not path.is_dir():
        return weights_of_hub_id(str(path_or_id))
    named = [path / name for name in WEIGHTS if (path / name).is_file()]
    candidates = named[:1] or list(path.glob("*.pt"))
    message = f"{path} holds none of {', '.join(WEIGHTS)}, nor exactly one .pt file"
    ensure(len(candidates) == 1, message)
    return candidates[0]


def weights_of_hub_id(name: str) -> Path:
    """The weight file of a hub id, from the local hub cache or else the network."""
    import huggingface_hub as hub

    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    ensure(is_id, f"{name} is neither a file, a folder nor a hub id")
    for weights in WEIGHTS:
        cached = hub.try_to_load_from_cache(name, weights)
        if isinstance(cached, str):
            return Path(cached)
    for weights in WEIGHTS:
        try:
            # It asks once; hf_hub_download asks six times, for half a minute.
            hub.get_hf_file_metadata(hub.hf_hub_url(name, weights))
            return Path(hub.hf_hub_download(name, weights))
        except Exception as error:
            why = reason(error)
            if type(error).__name__ not in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
                break
    raise CheckpointError(
        f"{name} cannot be fetched ({why}); known ids: {', '.join(PUBLISHED)}. Without a network, "
        "put its pytorch_model.bin into a folder and give the folder's path instead of the id"
    )


# ------------------------------------------------------------------ a row of params.yaml


def fetch(profile: str, row: str) -> Path:
    """Save the checkpoint of a row of `published` as data/models/<row>; return the folder.

    Raises:
        CheckpointError, CorpusError, ParamsError: the checkpoint cannot be trusted, is no
            retriever, or does not fit its tokenizer; the tokenizer cannot be read; no such row.
    """
    rows = params.rows(profile, "published")
    params.known(row, rows, f"row of published at {profile}")
    settings = rows[row]
    checkpoint = settings["checkpoint"]
    source = find_weights(checkpoint)
    beside = any((source.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    default = str(source.parent) if beside else "bert-base-uncased"
    tokenizer = given_tokenizer(settings.get("tokenizer") or default)
    model = load_published(source, settings.get("max_length"))
    check_tokenizer(checkpoint, model, tokenizer)
    folder = params.data(profile) / "models" / row
    about = {"stage": "published", "row": row, "profile": profile, "settings": settings}
    about["trained_on"] = {"Published by": "the authors of the paper", "Checkpoint": checkpoint}
    origin = f"The weights that the authors of the paper published: {checkpoint}\n"
    save(model, tokenizer, folder, about, f"# {row} ({profile})\n\n{origin}")
    return folder


def check_tokenizer(checkpoint: str, model: nn.Module, tokenizer) -> None:
    """Raise a CheckpointError unless the model is a retriever and the tokenizer fits it."""
    message = f"{checkpoint} has no pooler: a masked language model is no retriever"
    ensure(isinstance(model, M2BertForRetrieval), message)
    remedy = "name the right one as `tokenizer` of the row"
    words, pad = len(tokenizer), tokenizer.pad_token_id
    vocab, ours = model.config.vocab_size, model.config.pad_token_id
    message = f"{checkpoint} has {vocab:,} words, its tokenizer {words:,}: {remedy}"
    ensure(words <= vocab, message)
    ensure(pad == ours, f"{checkpoint} pads with id {ours}, its tokenizer with {pad}: {remedy}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lib.model.published PROFILE ROW")
    try:
        fetch(*sys.argv[1:])
    except WorkbenchError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
