"""The authors' weights, in any of the formats they exist in.

    load_published(path_or_id)      the model of a file, a folder or a hub id
    python -m lib.model.published laptop published_32k      a row of `published` in params.yaml

The second writes data/models/published_32k, a folder like any trained model's, with the tokenizer
that the weights were trained with: what lies beside the weight file, or the row's `tokenizer`, or
bert-base-uncased. After that `evaluate@published_32k` runs like any other.
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
CONVERSION = "published-1"  # another number when what `read_published` makes of a file changes
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


def load_published(path_or_id: str | Path, max_length: int | None = None):
    """The authors' weights as our model, in eval mode.

    Reads a file or folder in the flat retrieval format (`bert.…`, perhaps `module.`), the Composer format
    (`['state']['model']`), or safetensors under either naming; or a hub id, through the local hub cache and then the
    network. A torch file is converted once: the model is kept as a folder of ours, in safetensors, under
    ~/.cache/loco-workbench (or XDG_CACHE_HOME), named by the file's sha256.

    The embedding the authors publish is that of the text padded to the model's length: `pad_to_max_length` is set in
    the config, so that every client of `forward` gets it. It costs the full length for the shortest text.

    Args:
        max_length: None: the file's row_settings; smaller: the tables are cut, and texts are padded to that.

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


def fetch(profile: str, row: str) -> Path:
    """Load the row's checkpoint and save it as data/models/<row>; that folder.

    Raises:
        CheckpointError: the checkpoint cannot be had or trusted, is no retriever, or does not fit its tokenizer.
        CorpusError: the tokenizer cannot be had.
        ParamsError: there is no such row.
    """
    rows = params.rows(profile, "published")
    params.known(row, rows, f"row of published at {profile}")
    row_settings = rows[row]
    source = find_weights(row_settings["checkpoint"])
    tokenizer = given_tokenizer(
        row_settings.get("tokenizer") or beside(source) or "bert-base-uncased"
    )
    model = load_published(source, row_settings.get("max_length"))
    if not isinstance(model, M2BertForRetrieval):
        raise CheckpointError(
            f"{row_settings['checkpoint']} has no pooler: a masked language model is no retriever"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{row_settings['checkpoint']} has {model.config.vocab_size:,} words, its tokenizer {len(tokenizer):,}: name the right one as `tokenizer` of the row"
        )
    if tokenizer.pad_token_id != model.config.pad_token_id:
        raise CheckpointError(
            f"{row_settings['checkpoint']} pads with id {model.config.pad_token_id}, its tokenizer with {tokenizer.pad_token_id}: name the right one as `tokenizer` of the row"
        )
    folder = params.data(profile) / "models" / row
    checkpoint = row_settings["checkpoint"]
    about = {"stage": "published", "row": row, "profile": profile, "settings": row_settings}
    about["trained_on"] = {"Published by": "the authors of the paper", "Checkpoint": checkpoint}
    readme = f"# {row} ({profile})\n\nThe weights that the authors of the paper published: {checkpoint}\n"
    save(model, tokenizer, folder, about, readme)
    return folder


def beside(weights: Path) -> str | None:
    """The folder of the weights, where it holds a tokenizer too."""
    return (
        str(weights.parent)
        if any((weights.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
        else None
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lib.model.published PROFILE ROW")
    try:
        fetch(*sys.argv[1:])
    except (CheckpointError, CorpusError, params.ParamsError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
